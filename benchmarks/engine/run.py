"""The side by side: `run.py OUR_PYTHON PEERS_PYTHON`.

Prints a table and puts it into README.md, and all numbers into results.json. Nothing is compared
unless all scores agree.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from affine import Affine
from page import put

from speciesmap.models import Architecture, SpeciesModel, save_model

HERE = Path(__file__).parent
SIDE = 1664  # (1664 - 256) / 128 + 1 = 12 windows along a side
LARGE_SIDE = 8192  # where a factored encoder has 1.05 cells per window, not 1.3
SAME = 1e-5
BACKBONE = "vit_small_patch16_224"
# the twelve blocks of a ViT-S: ten of them see cells, without a class token, and two the window
CELLS = {"depth": 10, "class_token": False, "global_pool": "avg"}
FACTORED = {"cell_px": 64, "width": 384, "layers": 2, "heads": 6}
PEERS = ("torchgeo", "terratorch", "geoai", "xbatcher")
OURS = (
    "speciesmap",
    "speciesmap bfloat16",
    "speciesmap factored",
    "speciesmap factored bfloat16",
    "speciesmap factored, large scene",
    "speciesmap factored bfloat16, large scene",
)


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
        "transform": Affine(1, 0, 549_888, 0, -1, 4_180_480),  # so that windows start at pixel 0
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
    """Save an untrained model with an aerial tower."""
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
    """Measure every side in a process of its own, compare, print and keep."""
    ours, peers = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes = {}
        for side in (SIDE, LARGE_SIDE):
            (folder / str(side)).mkdir()
            scenes[side] = make_scene(folder / str(side) / "scene.tif", side)
        models = {
            "plain": make_model(folder / "plain", {"backbone": BACKBONE}),
            "factored": make_model(
                folder / "factored", {"backbone": BACKBONE, "kwargs": CELLS, "factored": FACTORED}
            ),
        }
        results: dict[str, dict[str, Any]] = {}
        for side in (*PEERS, *OURS):
            python = peers if side in PEERS else ours
            model = models["factored" if "factored" in side else "plain"]
            scene = scenes[LARGE_SIDE if "large" in side else SIDE]
            words = [python, str(HERE / "sides.py"), side, str(scene), str(model)]
            run = subprocess.run(words, capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"{side} failed: {run.stderr.strip().splitlines()[-1]}")
            results[side] = json.loads(run.stdout.splitlines()[-1])
            print(f"{side}: {results[side]['windows_per_s']:.2f} windows/s", file=sys.stderr)
    check(results)
    fastest = min(PEERS, key=lambda side: results[side]["cpu_s_per_window"])
    for found in results.values():
        found["of_encoder"] = found["windows_per_s"] / found["encoder_windows_per_s"]
        found["of_encoder_cpu"] = found["encoder_cpu_s_per_window"] / found["cpu_s_per_window"]
        best = results[fastest]
        found["of_fastest_peer"] = found["windows_per_s"] / best["windows_per_s"]
        found["of_fastest_peer_cpu"] = best["cpu_s_per_window"] / found["cpu_s_per_window"]
    facts = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "fastest_peer": fastest,
        "sides": results,
    }
    (HERE / "results.json").write_text(json.dumps(facts, indent=2) + "\n")
    put("side by side", f"{table(facts)}\n{statements(results)}")
    print(table(facts), statements(results), sep="\n")


def check(results: dict[str, dict[str, Any]]) -> None:
    """Compare the scores of all that encode the same windows, and factored ones with themselves."""
    reference = np.array(results["speciesmap"]["scores"])
    for side, found in results.items():
        scores = np.array(found.pop("scores"))
        gap = found.get("from_its_windows", 0.0)
        if "factored" not in side:
            if scores.shape != reference.shape:
                sys.exit(f"{side} made {len(scores)} windows, not {len(reference)}")
            gap = max(gap, float(np.abs(scores - reference).max()))
        found["largest_difference"] = gap
        if gap >= SAME and "bfloat16" not in side:
            sys.exit(f"{side} is off by {gap:.1e}: what it took is no comparison")


def table(facts: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"timm {facts['timm']}; fastest peer: {facts['fastest_peer']}",
        "",
        "| | version | windows | windows/s | of its encoder alone | of the fastest peer "
        "| CPU s per window | of its encoder alone | of the fastest peer | peak MB "
        "| largest difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for side, found in facts["sides"].items():
        lines.append(
            f"| {side} | {found['version']} | {found['windows']} | {found['windows_per_s']:.2f} "
            f"| {found['of_encoder']:.2f} | {found['of_fastest_peer']:.2f} "
            f"| {found['cpu_s_per_window']:.3f} | {found['of_encoder_cpu']:.2f} "
            f"| {found['of_fastest_peer_cpu']:.2f} | {found['memory_mb']:.0f} "
            f"| {found['largest_difference']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def statements(sides: dict[str, dict[str, Any]]) -> str:
    """The aims, and what came of them by the clock and by processor time."""
    exact, large = sides["speciesmap"], sides["speciesmap factored, large scene"]
    bf16, best = sides["speciesmap bfloat16"], sides["speciesmap factored bfloat16, large scene"]
    halves = exact["cpu_s_per_window"] / bf16["cpu_s_per_window"]
    return (
        f"- Exact, in float32, beside its encoder on windows in memory: {exact['of_encoder']:.2f} "
        f"by the clock, {exact['of_encoder_cpu']:.2f} by processor time; the aim was 0.97.\n"
        f"- bfloat16 beside float32: {bf16['windows_per_s'] / exact['windows_per_s']:.1f} times "
        f"by the clock, {halves:.1f} by processor time.\n"
        f"- Factored, large scene, float32, beside itself window by window: "
        f"{large['of_encoder']:.1f} times by the clock, {large['of_encoder_cpu']:.1f} by processor "
        "time; the aim was 12.\n"
        f"- Factored, large scene, bfloat16, beside plain ViT-S/16 under the fastest peer: "
        f"{best['of_fastest_peer']:.1f} times by the clock, {best['of_fastest_peer_cpu']:.1f} by "
        "processor time; the aim was 30.\n"
    )


def processor() -> str:
    """What the processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
