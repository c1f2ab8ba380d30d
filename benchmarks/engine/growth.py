"""Windows per second and peak memory against the raster's side and the number of workers.

`growth.py [SIDE ...]` measures each side in a process of its own and draws growth.svg. The encoder
is a small one, so that reading, cutting and writing are what is seen.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import make_model, make_scene

HERE = Path(__file__).parent
SIDES = (2048, 4096, 8192, 16384)
STRIDE = 64
WORKERS = (1, 2)
WORKERS_SIDE = 8192


def measure(scene: str, model: str, out: str, workers: int) -> None:
    """One run in this process; prints what it took."""
    from speciesmap.mapping.embed import embed

    started = time.perf_counter()
    store = embed(model, scene, out, stride_px=STRIDE, precision="float32", workers=workers)
    rows, cols = store.geobox.shape
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rate = rows * cols / (time.perf_counter() - started)
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
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:5], workers=int(sys.argv[5]))
        return
    sides = [int(word) for word in sys.argv[1:]] or list(SIDES)
    found: dict[str, dict[int, dict[str, float]]] = {"sides": {}, "workers": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", {"backbone": "test_resnet"})
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


if __name__ == "__main__":
    main()
