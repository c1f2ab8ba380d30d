"""Stores: opened by xarray in place, resumable by their chunks, closed to other inputs."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from speciesmap.errors import OutputError, StoreError
from speciesmap.rasters.store import TILE, EmbeddingStore, Identity, open_store

GRID = GeoBox((70, 50), Affine(38.4, 0, 550_000, 0, -38.4, 4_180_000), "EPSG:32610")
IDENTITY = Identity("abc", 256, 64, ("red", "nir"), "def", 0.5)


def make(path: Path, grid: GeoBox = GRID) -> EmbeddingStore:
    return EmbeddingStore.create(path, IDENTITY, grid, 8, source="scene.tif")


def test_a_tile_is_done_when_it_is_written_even_if_it_is_all_nodata(tmp_path: Path) -> None:
    store = make(tmp_path / "s.zarr")
    assert store.tiles == (3, 2)
    assert store.done() is None
    vectors = np.random.default_rng(0).normal(size=(6, 18, 8)).astype(np.float16)
    store.write((2, 1), vectors)
    store.write((0, 1), np.full((TILE, 18, 8), np.nan, np.float16))
    again = open_store(tmp_path / "s.zarr")
    done = [tile for tile in again.tiles_in(slice(0, 70), slice(0, 50)) if again.has(tile)]
    assert done == [(0, 1), (2, 1)]
    assert again.done() == (slice(0, 70), slice(32, 50))
    assert (again.read(slice(64, 70), slice(32, 50)) == vectors).all()
    assert np.isnan(again.read(slice(0, 64), slice(0, 32))).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_range_reads_as_zarr_reads_it(half_full: EmbeddingStore, data: st.DataObject) -> None:
    rows, cols = (
        slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))
        for n in GRID.shape
    )
    theirs = zarr.open_array(half_full.path / "vectors", mode="r")[rows, cols]
    assert np.array_equal(half_full.read(rows, cols), theirs, equal_nan=True)


@pytest.fixture(scope="module")
def half_full(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    store = make(tmp_path_factory.mktemp("stores") / "half.zarr")
    rng = np.random.default_rng(0)
    for tile in ((0, 0), (1, 1), (2, 1)):
        rows, cols = store.cells(tile)
        shape = (rows.stop - rows.start, cols.stop - cols.start, 8)
        store.write(tile, rng.normal(size=shape).astype(np.float16))
    return store


def test_chunks_that_are_coded_otherwise_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "s.zarr")
    about = tmp_path / "s.zarr/vectors/zarr.json"
    facts = json.loads(about.read_text())
    facts["codecs"] = facts["codecs"][:1]
    about.write_text(json.dumps(facts))
    whole = tmp_path / "s.zarr/zarr.json"
    whole.write_text(
        json.dumps({k: v for k, v in json.loads(whole.read_text()).items() if k[:5] != "conso"})
    )
    with pytest.raises(StoreError, match="chunks coded by bytes"):
        open_store(tmp_path / "s.zarr")


def test_tiles_cover_every_cell_once(tmp_path: Path) -> None:
    store = make(tmp_path / "s.zarr")
    count = np.zeros(GRID.shape, int)
    for tile in store.tiles_in(slice(0, 70), slice(0, 50)):
        count[store.cells(tile)] += 1
    assert (count == 1).all()
    assert list(store.tiles_in(slice(31, 33), slice(10, 11))) == [(0, 0), (1, 0)]


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
@pytest.mark.parametrize("turn", [0, 25])
def test_xarray_opens_it_with_its_place_on_earth(tmp_path: Path, turn: float) -> None:
    import rioxarray  # noqa: F401

    grid = GeoBox(GRID.shape, GRID.transform * Affine.rotation(turn), GRID.crs)
    make(tmp_path / "s.zarr", grid)
    vectors = xarray.open_zarr(tmp_path / "s.zarr")["vectors"]
    assert vectors.dims == ("y", "x", "embedding")
    assert vectors.dtype == np.float16
    assert vectors.rio.crs.to_epsg() == 32610
    assert vectors.rio.transform().almost_equals(grid.transform)
    if not turn:
        assert vectors.x.values[0] == 550_000 + 19.2
        assert vectors.y.values[-1] == pytest.approx(4_180_000 - 69.5 * 38.4)
    assert open_store(tmp_path / "s.zarr").geobox == grid


def test_what_it_was_made_from_is_kept_and_anything_else_refused(tmp_path: Path) -> None:
    make(tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    assert store.identity == IDENTITY
    assert (store.dim, store.source) == (8, "scene.tif")
    store.refuse_other(IDENTITY)
    for change, says in (
        ({"model": "xyz"}, "model abc, not xyz"),
        ({"stride_px": 32}, "stride_px 64, not 32"),
        ({"bands": ("red",)}, r'bands \["red", "nir"\], not \["red"\]'),
        ({"imagery": "123"}, "imagery def, not 123"),
    ):
        with pytest.raises(StoreError, match=rf"s\.zarr was made with {says}"):
            store.refuse_other(replace(IDENTITY, **change))


def test_its_precision_is_remembered(tmp_path: Path) -> None:
    store = make(tmp_path / "s.zarr")
    assert store.precision is None
    other = open_store(tmp_path / "s.zarr")
    assert store.settle("bfloat16") == "bfloat16"
    assert other.settle("float32") == "bfloat16", "who comes second keeps to the first's choice"
    assert open_store(tmp_path / "s.zarr").precision == other.precision == "bfloat16"


def test_who_lands_a_store_second_opens_the_first(tmp_path: Path) -> None:
    path, real = tmp_path / "s.zarr", Path.rename

    def late(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        store = make(path)
        store.write((0, 0), np.ones((32, 32, 8), np.float16))
        return real(self, target)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Path, "rename", late)
        assert make(path).has((0, 0)), "the other's tiles are kept"
    assert make(path).has((0, 0)), "also where it landed before this one looked"
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]
    shutil.rmtree(path)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Path, "rename", late)
        with pytest.raises(StoreError, match="model abc, not xyz"):
            EmbeddingStore.create(path, replace(IDENTITY, model="xyz"), GRID, 8, source="a.tif")


def test_left_overs_of_the_killed_go_when_nobody_else_writes(tmp_path: Path) -> None:
    store = make(tmp_path / "s.zarr")
    left = tmp_path / "s.zarr/vectors/c/0/0/0.0123abcd.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a chunk")
    with store.writing(), open_store(store.path).writing():
        pass
    assert not left.exists()
    with store.writing():
        left.write_bytes(b"of this process")
        with open_store(store.path).writing():
            assert left.exists(), "it may belong to who still writes"


def test_an_error_before_the_first_tile_removes_a_store_that_nobody_else_fills(
    tmp_path: Path,
) -> None:
    store = make(tmp_path / "s.zarr")
    with store.writing(), pytest.raises(KeyboardInterrupt), open_store(store.path).writing():
        raise KeyboardInterrupt
    assert store.path.exists()
    with pytest.raises(KeyboardInterrupt), store.writing():
        raise KeyboardInterrupt
    assert not store.path.exists()
    with pytest.raises(OutputError, match=r"cannot write tiles in .*s\.zarr"), store.writing():
        pass
    store = make(tmp_path / "s.zarr")
    store.write((0, 0), np.ones((32, 32, 8), np.float16))
    with pytest.raises(KeyboardInterrupt), store.writing():
        raise KeyboardInterrupt
    assert store.has((0, 0))


def test_a_full_disk_stops_with_the_tile_and_leaves_no_half_of_it(tmp_path: Path) -> None:
    store = make(tmp_path / "s.zarr")
    noise = np.random.default_rng(0).normal(size=(32, 32, 8)).astype(np.float16)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OutputError, match=r"cannot write tile \(0, 0\) in .*make room"):
            store.write((0, 0), noise)
        with pytest.raises(OutputError, match=r"cannot write .*t\.zarr .*make room"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            make(tmp_path / "t.zarr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not store.has((0, 0))
    assert not list(tmp_path.rglob("*.partial"))
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]
    store.write((0, 0), noise)
    assert (store.read(slice(0, 32), slice(0, 32)) == noise).all()


def test_equal_content_makes_equal_bytes_whatever_the_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tiles = {(i, j): rng.normal(size=(32, 32, 8)).astype(np.float16) for i in (0, 1) for j in (0,)}
    for name, order in (("a", list(tiles)), ("b", list(tiles)[::-1])):
        store = make(tmp_path / f"{name}.zarr")
        for tile in order:
            store.write(tile, tiles[tile])
        store.write(order[0], tiles[order[0]])
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_left_over_temporary_files_do_no_harm(tmp_path: Path) -> None:
    store = make(tmp_path / "s.zarr")
    chunk = tmp_path / "s.zarr/vectors/c/0/0"
    chunk.mkdir(parents=True)
    (chunk / "0.0123abcd.partial").write_bytes(b"half a chu")
    assert not store.has((0, 0))
    store.write((0, 0), np.ones((32, 32, 8), np.float16))
    assert store.has((0, 0))
    assert (open_store(store.path).read(slice(0, 32), slice(0, 32)) == 1).all()


def test_what_is_no_store_or_is_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none\.zarr does not exist; make it with"):
        open_store(tmp_path / "none.zarr")
    with pytest.raises(StoreError, match="is not an embedding store"):
        open_store(tmp_path)
    assert not list(tmp_path.iterdir())
    store = make(tmp_path / "s.zarr")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        make(tmp_path / "file")
    store.write((0, 0), np.ones((32, 32, 8), np.float16))
    (tmp_path / "s.zarr/vectors/c/0/0/0").write_bytes(b"rubbish")
    with pytest.raises(
        StoreError,
        match=r"c/0/0/0 cannot be read \(it does not hold 16384 bytes\); delete it and run",
    ):
        store.read(slice(0, 32), slice(0, 50))
