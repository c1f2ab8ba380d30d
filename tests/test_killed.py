"""Runs that are killed at random moments end, once resumed, in the bytes of one that was not."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from forks import ended, start
from odc.geo.geobox import GeoBox
from tiny import tiny_model

from speciesmap.mapping.embed import embed
from speciesmap.models import save_model
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.store import open_store

KILLS = 20
TILES = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factored one: what neighbouring tiles share is encoded by whichever comes first."""
    cells = {"cell_px": 8, "width": 16, "layers": 2, "heads": 2}
    made = tiny_model(bands=3, aerial={"backbone": "test_resnet", "factored": cells})
    return save_model(made, tmp_path_factory.mktemp("model") / "m", {})


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 500, 500)).astype(np.uint8)
    grid = GeoBox((500, 500), Affine(1, 0, 550_000, 0, -1, 4_180_000), "EPSG:32610")
    names = ("band_0", "band_1", "band_2")
    return write_geotiff(tmp_path_factory.mktemp("scene") / "a.tif", pixels, grid, bands=names)


def begin(model: Path, scene: Path, out: Path) -> BaseProcess:
    """Encode into a store, in a process of its own."""
    return start(partial(embed, precision="float32"), model, scene, out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def chunks(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.glob("vectors/c/*/*/0")}


def test_a_run_killed_again_and_again_ends_in_the_same_bytes(
    model: Path, scene: Path, tmp_path: Path
) -> None:
    whole = embed(model, scene, tmp_path / "whole.zarr", precision="float32").path
    out, rng = tmp_path / "s.zarr", np.random.default_rng(0)
    at_work = 0
    for by in [signal.SIGKILL] * KILLS + [signal.SIGTERM] * 4:
        before = chunks(out)
        process = begin(model, scene, out)
        more, deadline = int(rng.integers(TILES // 2)), time.monotonic() + 30
        while len(chunks(out)) < len(before) + more and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        if process.is_alive():
            os.kill(process.pid or 0, by)
        ended(process)
        after = chunks(out)
        assert {name: after[name] for name in before} == before, "what was done stays as it is"
        if out.exists():
            open_store(out)
        at_work += len(before) < len(after) < TILES
        if len(after) > TILES // 2:  # so that every kill hits a run with work to do
            for name in rng.choice(sorted(after), TILES // 2, replace=False):
                Path(name).unlink()
    assert at_work >= 1, "some runs were hit between two tiles"
    done = chunks(out)
    embed(model, scene, out, precision="float32")
    assert {name: chunks(out)[name] for name in done} == done
    assert contents(out) == contents(whole)


def test_two_processes_on_one_store_end_in_the_same_bytes(
    model: Path, scene: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.zarr", tmp_path / "s.zarr"
    assert ended(begin(model, scene, whole)) == 0
    both = [begin(model, scene, out), begin(model, scene, out)]
    assert [ended(process) for process in both] == [0, 0]
    assert contents(out) == contents(whole)
