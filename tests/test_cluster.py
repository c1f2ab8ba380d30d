"""The cluster: the same bytes from several processes, whatever happens to one of them."""

from __future__ import annotations

import builtins
import importlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from forks import start
from odc.geo.geobox import GeoBox
from tiny import tiny_model

from speciesmap.errors import (
    ClusterError,
    ConfigError,
    DependencyError,
    ImageryError,
    OutputError,
)
from speciesmap.mapping.embed import embed
from speciesmap.models import save_model
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.store import open_store

pytest.importorskip("distributed")

ORIGIN = Affine(1, 0, 550_000, 0, -1, 4_180_000)
SIDE = 420


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(bands=3), tmp_path_factory.mktemp("model") / "m", {})


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(1, 255, (3, SIDE, SIDE)).astype(np.uint8)
    grid = GeoBox((SIDE, SIDE), ORIGIN, "EPSG:32610")
    names = ("band_0", "band_1", "band_2")
    return write_geotiff(tmp_path_factory.mktemp("scene") / "a.tif", pixels, grid, bands=names)


@pytest.fixture(scope="module")
def whole(model: Path, scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process makes."""
    return embed(model, scene, tmp_path_factory.mktemp("whole") / "s.zarr").path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_workers_make_the_bytes_of_one_process_though_one_is_killed(
    model: Path, scene: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.zarr"
    killed: list[int] = []

    def kill_one() -> None:
        import psutil

        while not (out.exists() and open_store(out).done()):
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has ended meanwhile
                if "spawn_main" in " ".join(process.cmdline()) and process.children() == []:
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    return

    killer, variables = threading.Thread(target=kill_one), dict(os.environ)
    killer.start()
    embed(model, scene, out, workers=2)
    killer.join()
    assert killed
    assert dict(os.environ) == variables, "what workers inherit is not left behind"
    assert contents(out) == contents(whole)


def run_dask(what: str, folder: Path, words: Sequence[str]) -> None:
    os.chdir(folder)
    importlib.import_module(f"distributed.cli.dask_{what}").main(words)


def begin(what: str, file: Path, *more: str) -> BaseProcess:
    """A scheduler or a worker, which meet through a file, in a process and a folder of its own."""
    words = ["--scheduler-file", str(file), *more]
    return start(run_dask, what, file.parent, words, err=os.devnull)


SCHEDULER = ("--port", "0", "--dashboard-address", ":0")
WORKER = ("--nthreads", "1", "--no-dashboard", "--no-nanny")


def address_in(file: Path) -> str:
    while not (told := file.read_text() if file.exists() else "").rstrip().endswith("}"):
        time.sleep(0.1)
    return str(json.loads(told)["address"])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("dask") / "scheduler.json"
    started = [begin("scheduler", file, *SCHEDULER), begin("worker", file, *WORKER)]
    yield address_in(file)
    for process in started:
        process.kill()
        process.join()


def test_a_cluster_that_runs_already_makes_the_same_bytes(
    model: Path, scene: Path, whole: Path, tmp_path: Path, address: str
) -> None:
    import dask.config

    said, timeout = logging.getLogger("distributed.client"), "distributed.comm.timeouts.connect"
    before = said.level, dask.config.get(timeout)
    store = embed(model, scene, tmp_path / "s.zarr", scheduler=address)
    assert contents(store.path) == contents(whole)
    assert (said.level, dask.config.get(timeout)) == before, "the process is as it was"
    (store.path / "vectors/c/1/1/0").unlink()
    written = {p: p.stat().st_mtime_ns for p in store.path.rglob("c/*/*/0")}
    embed(model, scene, store.path, scheduler=address)
    assert contents(store.path) == contents(whole)
    after = {p: p.stat().st_mtime_ns for p in store.path.rglob("c/*/*/0")}
    assert {p: after[p] for p in written} == written, "only what was missing was encoded"
    for stride in (None, 8):  # workers that go on know nothing of the store that was there
        shutil.rmtree(store.path)
        embed(model, scene, store.path, scheduler=address, stride_px=stride)
        alone = embed(model, scene, tmp_path / f"{stride}.zarr", stride_px=stride)
        assert contents(store.path) == contents(alone.path)


def test_a_tile_that_workers_cannot_write_is_named_and_the_store_can_be_resumed(
    model: Path, scene: Path, whole: Path, tmp_path: Path, address: str
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "s.zarr"))
    shutil.rmtree(out / "vectors/c/2")
    (out / "vectors/c/2").touch()  # where a folder must be made
    with pytest.raises(OutputError, match=r"cannot write tile \(2, \d\) in .*make room or choose"):
        embed(model, scene, out, scheduler=address)
    (out / "vectors/c/2").unlink()
    embed(model, scene, out, scheduler=address)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("source", ["a.tif", "*.tif", "."])
def test_a_store_tells_its_source_as_the_user_did_whoever_encodes(
    model: Path,
    scene: Path,
    tmp_path: Path,
    address: str,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(scene.parent)  # where no worker is
    alone = embed(model, source, tmp_path / "alone.zarr")
    store = embed(model, source, tmp_path / "s.zarr", scheduler=address)
    assert store.source == source
    assert contents(store.path) == contents(alone.path)


@pytest.mark.parametrize("where", ["scheduler", "workers"])
def test_an_unreadable_block_is_told_by_workers_as_by_one_process(
    model: Path,
    tmp_path: Path,
    address: str,
    where: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 300, 300)).astype(np.uint8)
    grid = GeoBox((300, 300), ORIGIN, "EPSG:32610")
    path = write_geotiff(tmp_path / "a.tif", pixels, grid, bands=("band_0", "band_1", "band_2"))
    with rasterio.open(path) as raster:
        offset = int(raster.get_tag_item("BLOCK_OFFSET_0_1", "TIFF", bidx=1))
        size = int(raster.get_tag_item("BLOCK_SIZE_0_1", "TIFF", bidx=1))
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = b"\xff" * size
    path.write_bytes(bytes(content))
    on: dict[str, Any] = {"scheduler": {"scheduler": address}, "workers": {"workers": 1}}[where]
    out = tmp_path / "s.zarr"
    with pytest.raises(ImageryError, match=r"tile \(\d+, \d+\) cannot be encoded"):
        embed(model, path, out, **on)
    assert "Traceback" not in capfd.readouterr().err, "the error that is raised says it all"
    store = embed(model, path, out, skip_unreadable=True, **on)
    lost = [tile for tile in store.tiles_in(slice(0, 75), slice(0, 75)) if not store.has(tile)]
    assert 0 < len(lost) < 9
    [said] = [r.getMessage() for r in caplog.records if "the workers say why" in r.getMessage()]
    assert f"why: {', '.join(map(str, lost))}; another run" in said


FIRST_TILE_ONLY = """
import threading
from speciesmap.mapping import cluster

if cluster.encode_tiles.__name__ == "encode_tiles":  # Dask loads this more than once
    encode = cluster.encode_tiles

    def wait_after_one(model, imagery, store, tiles, **settings):
        if store.done():
            threading.Event().wait()
        return encode(model, imagery, store, tiles, **settings)

    cluster.encode_tiles = wait_after_one
"""


def test_ctrl_c_leaves_a_store_that_can_be_resumed(
    model: Path, scene: Path, whole: Path, tmp_path: Path
) -> None:
    out, preload = tmp_path / "s.zarr", tmp_path / "first_tile_only.py"
    preload.write_text(FIRST_TILE_ONLY)
    words = [sys.executable, "-m", "speciesmap", "embed", str(model)]
    words += ["--imagery", str(scene), "--out", str(out), "--workers", "1", "-q"]
    loads = {"DASK_DISTRIBUTED__WORKER__PRELOAD": str(preload)}
    process = subprocess.Popen(words, env=os.environ | loads, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out.exists() and open_store(out).done()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 1, said
    assert "run again to go on: tiles that are done are kept" in said
    assert "Traceback" not in said
    assert len(list(out.glob("vectors/c/*/*/0"))) == 1
    embed(model, scene, out)
    assert contents(out) == contents(whole)


def test_a_cluster_that_has_no_fit_workers_or_is_lost_says_so(
    model: Path,
    scene: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("speciesmap.mapping.cluster.CONNECT_S", 2)
    file, out = tmp_path / "scheduler.json", tmp_path / "s.zarr"
    other, stops = tmp_path / "other.py", tmp_path / "stops.py"
    other.write_text("import speciesmap\nspeciesmap.__version__ = '0.0.1'\n")
    stops.write_text(FIRST_TILE_ONLY)
    started = [begin("scheduler", file, *SCHEDULER)]
    place = address_in(file)

    def when(happened: Callable[[], object], act: Callable[[], object]) -> threading.Thread:
        def wait() -> None:
            while not happened():
                time.sleep(0.02)
            act()

        thread = threading.Thread(target=wait)
        thread.start()
        return thread

    def work(preload: Path) -> None:
        started.append(begin("worker", file, *WORKER, "--preload", str(preload)))

    try:
        starter = when(lambda: "there are none yet" in caplog.text, lambda: work(other))
        with pytest.raises(ClusterError, match=r"has speciesmap 0\.0\.1, this machine .*the same"):
            embed(model, scene, out, scheduler=place)
        starter.join()
        started[1].kill()
        started[1].join()
        work(stops)
        killer = when(lambda: out.exists() and open_store(out).done(), started[0].kill)
        with pytest.raises(ClusterError, match=r"connection to the cluster was lost; .*are kept"):
            embed(model, scene, out, scheduler=place)
        killer.join()
    finally:
        for process in started:
            process.kill()
            process.join()
    assert len(list(out.glob("vectors/c/*/*/0"))) == 1
    embed(model, scene, out)
    assert contents(out) == contents(whole)


def test_what_cannot_work_is_said_before_anything_starts(
    model: Path, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.zarr"
    with pytest.raises(ConfigError, match="give both as paths"):
        embed(tiny_model(bands=3), scene, out, workers=1)
    monkeypatch.setattr("speciesmap.mapping.cluster.CONNECT_S", 3600)  # and nobody waits for it
    for wrong in ("tcp://127.0.0.1:9", "tcp://nowhere.invalid:8786", "node1", "tcp://node1:port"):
        with pytest.raises(ClusterError, match=f"no scheduler answers at {wrong} "):
            embed(model, scene, out, scheduler=wrong)
    monkeypatch.setattr("speciesmap.mapping.cluster.CONNECT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # as a dashboard is
        other = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"no scheduler answers at {other} .timed out"):
            embed(model, scene, out, scheduler=other)
    assert not out.exists()
    real = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.partition(".")[0] == "distributed":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match=r"speciesmap\[cluster\]"):
        embed(model, scene, out, workers=1)
