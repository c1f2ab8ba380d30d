"""The side by side: `run.py OUR_PYTHON PEERS_PYTHON`; prints a table and writes results.json."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio
import torch
from affine import Affine

from speciesmap.models import Architecture, SpeciesModel, save_model

HERE = Path(__file__).parent
SIDE = 2048  # (2048 - 256) / 128 + 1 = 15 windows along a side
SAME = 1e-5
BACKBONE = "vit_small_patch16_224"
FACTORED = {"cell_px": 64, "width": 384, "layers": 4, "heads": 6}
PEERS = ("torchgeo", "terratorch", "geoai", "xbatcher")
OURS = {
    "speciesmap": "plain",
    "speciesmap bfloat16": "plain",
    "speciesmap factored": "factored",
    "speciesmap factored bfloat16": "factored",
}


def make_scene(path: Path, side: int) -> Path:
    """Write smooth noise of three bands, in blocks, whatever its size."""
    rng = np.random.default_rng(0)
    profile = {
        "driver": "GTiff",
        "width": side,
        "height": side,
        "count": 3,
        "dtype": "uint8",
        "crs": "EPSG:32610",
        "transform": Affine(1, 0, 550_000, 0, -1, 4_180_000),
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "BIGTIFF": "IF_SAFER",
    }
    with rasterio.open(path, "w", **profile) as raster:
        raster.descriptions = ("red", "green", "blue")
        for _, window in raster.block_windows(1):
            coarse = rng.integers(0, 255, (3, 64, 64)).astype(np.uint8)
            block = coarse.repeat(8, 1).repeat(8, 2)[:, : window.height, : window.width]
            raster.write(block, window=window)
    return path


def make_model(folder: Path, aerial: dict[str, object], window_px: int = 256) -> Path:
    torch.manual_seed(0)
    model = SpeciesModel(
        Architecture(
            dim=512,
            bands=("red", "green", "blue"),
            window_px=window_px,
            resolution_m=1.0,
            mean=(127.5,) * 3,
            std=(73.6,) * 3,
            aerial=aerial,
        )
    )
    return save_model(model, folder, {})


def main() -> None:
    ours, peers = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scene").mkdir()
        scene = make_scene(folder / "scene" / "scene.tif", SIDE)
        models = {
            "plain": make_model(folder / "plain", {"backbone": BACKBONE}),
            "factored": make_model(
                folder / "factored", {"backbone": BACKBONE, "factored": FACTORED}
            ),
        }
        results: dict[str, dict[str, object]] = {}
        for side in (*PEERS, *OURS):
            python = peers if side in PEERS else ours
            model = models[OURS.get(side, "plain")]
            words = [python, str(HERE / "sides.py"), side, str(scene), str(model)]
            run = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if run.returncode:
                print(f"{side} failed: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            results[side] = json.loads(run.stdout.splitlines()[-1])
            print(f"{side}: {results[side]['windows_per_s']:.2f} windows/s", file=sys.stderr)
    reference = np.array(results["speciesmap"]["scores"])
    best = max(results[side]["windows_per_s"] for side in PEERS if side in results)
    print(f"\n{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | version | windows/s | of its encoder alone | of the fastest peer | peak MB | same |")
    print("|---|---|---|---|---|---|---|")
    for side, found in results.items():
        scores = np.array(found.pop("scores"))
        same = "other windows or encoder"
        if scores.shape == reference.shape and "factored" not in side:
            gap = float(np.abs(scores - reference).max())
            found["largest_difference"] = gap
            same = f"{'yes' if gap < SAME else 'NO'}, {gap:.0e}"
            if gap >= SAME and "bfloat16" in side:
                same = f"bfloat16, {gap:.0e}"
        found["of_encoder"] = found["windows_per_s"] / found["encoder_windows_per_s"]
        found["of_fastest_peer"] = found["windows_per_s"] / best
        print(
            f"| {side} | {found['version']} | {found['windows_per_s']:.2f} "
            f"| {found['of_encoder']:.2f} | {found['of_fastest_peer']:.2f} "
            f"| {found['memory_mb']:.0f} | {same} |"
        )
    facts = {"processor": processor(), "torch": torch.__version__, "sides": results}
    (HERE / "results.json").write_text(json.dumps(facts, indent=2) + "\n")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
