"""Runs that are killed at random moments end, once resumed, in the bytes of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from tiny import tiny_model

from speciesmap.mapping.embed import embed
from speciesmap.models import save_model
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.store import open_store

KILLS = 20
TILES = 16
ROUNDS = """
import os, sys
from speciesmap.mapping import embed as engine
from speciesmap.models import load_model

model, imagery = load_model(sys.argv[1]), sys.argv[2]
for line in sys.stdin:  # each is one run, in a process of its own
    child = os.fork()
    if child == 0:
        engine.embed(model, imagery, sys.argv[3], precision="float32")
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(bands=3), tmp_path_factory.mktemp("model") / "m", {})


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 500, 500)).astype(np.uint8)
    grid = GeoBox((500, 500), Affine(1, 0, 550_000, 0, -1, 4_180_000), "EPSG:32610")
    names = ("band_0", "band_1", "band_2")
    return write_geotiff(tmp_path_factory.mktemp("scene") / "a.tif", pixels, grid, bands=names)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def chunks(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.glob("vectors/c/*/*/0")}


def test_a_run_killed_again_and_again_ends_in_the_same_bytes(
    model: Path, scene: Path, tmp_path: Path
) -> None:
    whole = embed(model, scene, tmp_path / "whole.zarr", precision="float32").path
    out, rng = tmp_path / "s.zarr", np.random.default_rng(0)
    runs = subprocess.Popen(
        [sys.executable, "-c", ROUNDS, model, scene, out],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert runs.stdin is not None and runs.stdout is not None
    at_work = 0
    for by in [signal.SIGKILL] * KILLS + [signal.SIGTERM] * 4:
        before = chunks(out)
        runs.stdin.write("go\n")
        runs.stdin.flush()
        child = int(runs.stdout.readline())
        time.sleep(rng.uniform(0, 0.8))
        os.kill(child, by)
        assert runs.stdout.readline() == "ended\n"
        after = chunks(out)
        assert {name: after[name] for name in before} == before, "what was done stays as it is"
        if out.exists():
            open_store(out)
        at_work += len(before) < len(after) < TILES
        if len(after) > TILES // 2:  # so that every kill hits a run with work to do
            for name in rng.choice(sorted(after), TILES // 2, replace=False):
                Path(name).unlink()
    runs.stdin.close()
    runs.wait(30)
    assert at_work >= 1, "some runs were hit between two tiles"
    done = chunks(out)
    embed(model, scene, out, precision="float32")
    assert {name: chunks(out)[name] for name in done} == done
    assert contents(out) == contents(whole)


def test_two_processes_on_one_store_end_in_the_same_bytes(
    model: Path, scene: Path, tmp_path: Path
) -> None:
    whole = embed(model, scene, tmp_path / "whole.zarr").path
    out = tmp_path / "s.zarr"
    code = "import sys; from speciesmap.mapping.embed import embed; embed(*sys.argv[1:])"
    both = [
        subprocess.Popen([sys.executable, "-c", code, model, scene, out], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    assert contents(out) == contents(whole)
