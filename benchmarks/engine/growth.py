"""Windows per second and peak memory against the raster's side and the number of workers.

`growth.py [SIDE ...]` measures each side in a process of its own, writes growth.json, draws
growth.svg and puts a table into README.md. The encoder is a small factored one, so that reading,
cutting and writing are what is seen. To start takes as long for any raster and is left out: the
rate is counted from the making of the store, with workers from the first tile written. Each worker
has one core.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from page import put
from run import make_model, make_scene

HERE = Path(__file__).parent
SIDES = (2048, 4096, 8192, 16384)
STRIDE = 64
WORKERS = (1, 2)
WORKERS_SIDE = 8192
FACTORED = {"cell_px": 64, "width": 64, "layers": 1, "heads": 2}


def measure(scene: str, model: str, out: str, workers: int) -> None:
    """One run in this process; prints what it took."""
    from speciesmap.mapping.embed import embed

    if workers:  # as many cores, of which each takes its share
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    store = embed(model, scene, out, stride_px=STRIDE, precision="float32", workers=workers)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    written = sorted(file.stat().st_mtime for file in Path(out).glob("vectors/c/*/*/0"))
    windows = math.prod(store.geobox.shape)
    if workers:
        rate = windows * (1 - 1 / len(written)) / (written[-1] - written[0])
    else:
        rate = windows / (written[-1] - Path(out, "vectors", "zarr.json").stat().st_mtime)
    print(json.dumps({"windows_per_s": rate, "memory_mb": memory}))


def draw(by_side: dict[int, dict[str, float]], by_workers: dict[int, dict[str, float]]) -> None:
    """Three small plots."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axis, found, key, title in (
        (axes[0], by_side, "windows_per_s", "windows/s by raster side, px"),
        (axes[1], by_side, "memory_mb", "peak MB by raster side, px"),
        (axes[2], by_workers, "windows_per_s", "windows/s by workers"),
    ):
        axis.plot(list(found), [f[key] for f in found.values()], "o-", color="0.2")
        axis.set(title=title, ylim=(0, None), xticks=list(found))
    figure.savefig(HERE / "growth.svg")


def main() -> None:
    """Measure a side or, without arguments, all of them, and keep figures and plot."""
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:5], workers=int(sys.argv[5]))
        return
    sides = [int(word) for word in sys.argv[1:]] or list(SIDES)
    found: dict[str, dict[int, dict[str, float]]] = {"sides": {}, "workers": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        aerial: dict[str, object] = {"backbone": "test_vit", "factored": FACTORED}
        model = make_model(folder / "model", aerial)
        runs = [("sides", side, side, 0) for side in sides]
        runs += [("workers", count, min(WORKERS_SIDE, max(sides)), count) for count in WORKERS]
        for kind, key, side, workers in runs:
            scene = folder / f"{side}.tif"
            if not scene.exists():
                make_scene(scene, side)
            words = [sys.executable, __file__, "--measure", str(scene), str(model)]
            words += [str(folder / f"{kind}-{key}.zarr"), str(workers)]
            run = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            found[kind][key] = json.loads(run.stdout)
            print(kind, key, found[kind][key], flush=True)
    (HERE / "growth.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(found["sides"], found["workers"])
    put("growth", table(found))


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """The runs in Markdown, and what the largest raster took more than the smallest."""
    lines = ["| | windows/s | peak MB |", "|---|---|---|"]
    for kind, words in (("sides", "{:,} px a side"), ("workers", "{} workers")):
        for key, one in found[kind].items():
            rate, memory = one["windows_per_s"], one["memory_mb"]
            lines.append(f"| {words.format(key)} | {rate:,.0f} | {memory:.0f} |")
    sides = found["sides"]
    more = sides[max(sides)]["memory_mb"] - sides[min(sides)]["memory_mb"]
    lines += ["", f"{max(sides):,} px took {more:.0f} MB more than {min(sides):,} px."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
