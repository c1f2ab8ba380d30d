"""The tiled engine: exact windows, cells in their place, nothing encoded twice."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from fake_model import BlobModel, FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from rasterio.errors import RasterioIOError
from safetensors import SafetensorError
from tiny import tiny_model

from speciesmap.errors import AreaError, ConfigError, ImageryError, ResourceError, StoreError
from speciesmap.mapping import cut, encode
from speciesmap.mapping import embed as engine
from speciesmap.mapping.embed import embed
from speciesmap.models import SpeciesModel, save_model
from speciesmap.models.factored import FactoredTower
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import Imagery, open_imagery
from speciesmap.rasters.store import EmbeddingStore, open_store
from speciesmap.rasters.windows import WindowGrid, bounds_in

ORIGIN = Affine(1, 0, 550_000, 0, -1, 4_180_000)
BANDS = ("red", "green", "blue")


def scene(path: Path, shape: tuple[int, int] = (150, 210), dtype: str = "uint8") -> Path:
    pixels = np.random.default_rng(0).integers(1, 255, (3, *shape)).astype(dtype)
    return write_geotiff(path, pixels, GeoBox(shape, ORIGIN, "EPSG:32610"), bands=BANDS)


def vectors(store: engine.EmbeddingStore) -> np.ndarray:
    return store.read(*(slice(0, side) for side in store.geobox.shape))


def naive(model: FakeModel, imagery: Imagery, stride: int, min_valid: float) -> np.ndarray:
    """Every window sliced, filled and encoded by itself."""
    side = model.window_px
    grid = WindowGrid(imagery.geobox, side, stride)
    out = np.full((*grid.cells, model.dim), np.nan, np.float16)
    for i in range(grid.cells[0]):
        for j in range(grid.cells[1]):
            window, valid = imagery.read(*grid.start(i, j), side, side)
            if valid.mean() < min_valid or not valid.any():
                continue
            window = window.astype(np.float64)
            for band, value in zip(window, model.fill, strict=True):
                band[~valid] = value
            out[i, j] = model.embed_windows(torch.from_numpy(window)[None])[0].half().numpy()
    return out


@pytest.mark.parametrize(("window", "stride"), [(16, 4), (15, 7), (8, 8)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_the_store_holds_what_encoding_each_window_by_itself_gives(
    tmp_path: Path, window: int, stride: int, dtype: str
) -> None:
    imagery = open_imagery(scene(tmp_path / "a.tif", (60, 83), dtype))
    model = FakeModel(window_px=window)
    store = embed(model, imagery, tmp_path / "s.zarr", stride_px=stride, precision="float32")
    expected = naive(model, imagery, stride, 0.5)
    np.testing.assert_allclose(vectors(store), expected, atol=2e-3)
    assert np.isfinite(expected).any()
    assert store.precision == "float32"


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 5),
    side=st.integers(1, 9),
    stride=st.integers(1, 12),
)
def test_windows_are_usable_by_their_share_of_valid_pixels(
    rows: int, cols: int, side: int, stride: int
) -> None:
    shape = ((rows - 1) * stride + side, (cols - 1) * stride + side)
    valid = np.random.default_rng(1).random(shape) > 0.4
    usable = cut._usable(valid, side, stride, 0.5)
    assert usable.shape == (rows, cols)
    for i in range(rows):
        for j in range(cols):
            place = (
                slice(i * stride, i * stride + side),
                slice(j * stride, j * stride + side),
            )
            share = valid[place].mean()
            assert usable[i, j] == (share >= 0.5 and share > 0)


@pytest.mark.parametrize(
    ("shape", "transform"),
    [
        ((200, 200), ORIGIN),
        ((140, 310), ORIGIN),
        ((200, 160), ORIGIN * Affine.scale(1.5, 0.7)),
        ((200, 160), ORIGIN * Affine.rotation(33)),
        ((200, 160), ORIGIN * Affine.scale(1, -1)),
    ],
    ids=["square", "oblong", "pixels not square", "rotated", "south up"],
)
@pytest.mark.parametrize(("window", "stride"), [(32, 8), (30, 11)])
def test_a_planted_object_is_found_where_it_is(
    tmp_path: Path, shape: tuple[int, int], transform: Affine, window: int, stride: int
) -> None:
    model = BlobModel(window_px=window)
    row, col = 0.61 * shape[0], 0.27 * shape[1]
    pixels = np.full((3, *shape), 90, np.uint8)
    top, left = round(row) - 2, round(col) - 2
    pixels[:, top : top + 4, left : left + 4] = 255
    grid = GeoBox(shape, transform, "EPSG:32610")
    path = write_geotiff(tmp_path / "a.tif", pixels, grid, bands=BANDS)
    store = embed(
        model, path, tmp_path / "s.zarr", stride_px=stride, precision="float32", any_resolution=True
    )
    similarity = vectors(store)[..., 0].astype(np.float32)
    i, j = np.unravel_index(np.nanargmax(similarity), similarity.shape)
    found = store.geobox.transform * (j + 0.5, i + 0.5)
    planted = transform * (left + 2, top + 2)
    offset = ~transform * found
    assert abs(offset[0] - left - 2) <= stride / 2
    assert abs(offset[1] - top - 2) <= stride / 2
    pixel_m = max(np.hypot(transform.a, transform.d), np.hypot(transform.b, transform.e))
    assert np.hypot(*np.subtract(found, planted)) <= stride / 2 * pixel_m * np.sqrt(2)


def test_a_part_equals_the_crop_of_the_whole_and_fills_only_what_it_touches(tmp_path: Path) -> None:
    path = scene(tmp_path / "a.tif", (300, 420))
    model = FakeModel()
    whole = embed(model, path, tmp_path / "whole.zarr")
    left, bottom, right, top = bounds_in(open_imagery(path).geobox)
    bbox = (left + (right - left) * 0.6, bottom, right, bottom + (top - bottom) * 0.3)
    encoded = model.encoded
    part = embed(model, path, tmp_path / "part.zarr", bbox=bbox)
    assert 0 < model.encoded - encoded < encoded / 2
    assert part.geobox == whole.geobox
    done = part.done()
    assert done is not None
    assert part.read(*done).tobytes() == whole.read(*done).tobytes()
    assert np.isnan(part.read(slice(0, done[0].start), slice(0, done[1].start))).all()
    embed(model, path, tmp_path / "part.zarr")
    assert contents(part.path) == contents(whole.path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_asking_again_encodes_nothing(tmp_path: Path) -> None:
    path, model = scene(tmp_path / "a.tif"), FakeModel()
    embed(model, path, tmp_path / "s.zarr")
    encoded = model.encoded
    assert encoded > 0
    embed(model, path, tmp_path / "s.zarr")
    assert model.encoded == encoded


def test_windows_of_nodata_cost_nothing_and_come_out_as_nodata(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 96, 96)).astype(np.uint8)
    pixels[:, :, 40:] = 0
    grid = GeoBox((96, 96), ORIGIN, "EPSG:32610")
    path = write_geotiff(tmp_path / "a.tif", pixels, grid, bands=BANDS, nodata=0)
    previous = None
    for min_valid in (0.0, 0.3, 0.5, 1.0):
        model = FakeModel()
        store = embed(
            model,
            path,
            tmp_path / f"{min_valid}.zarr",
            min_valid=min_valid,
            precision="float32",
        )
        made = vectors(store)
        imagery = open_imagery(path)
        windows = WindowGrid(imagery.geobox, 16, 4)
        share = np.array(
            [
                [
                    imagery.read(*windows.start(i, j), 16, 16)[1].mean()
                    for j in range(windows.cells[1])
                ]
                for i in range(windows.cells[0])
            ]
        )
        expected = (share >= min_valid) & (share > 0)
        assert (np.isfinite(made).all(axis=-1) == expected).all()
        assert np.isnan(made[~expected]).all()
        assert model.encoded == expected.sum()
        assert previous is None or expected.sum() < previous
        previous = expected.sum()


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    path = scene(tmp_path / "a.tif", (300, 300))
    whole = embed(FakeModel(), path, tmp_path / "whole.zarr")

    class Interrupted(FakeModel):
        def encode_aerial(self, windows: torch.Tensor) -> torch.Tensor:
            if self.encoded > 1600:
                raise KeyboardInterrupt
            return super().encode_aerial(windows)

    model = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        embed(model, path, tmp_path / "s.zarr")
    begun = [
        t
        for t in whole.tiles_in(slice(0, 75), slice(0, 75))
        if open_store(tmp_path / "s.zarr").has(t)
    ]
    assert 0 < len(begun) < 9
    resumed = FakeModel()
    store = embed(resumed, path, tmp_path / "s.zarr")
    assert 0 < resumed.encoded < 75 * 75 - 1000
    assert contents(store.path) == contents(whole.path)


def test_a_failure_before_the_first_tile_leaves_no_store(tmp_path: Path) -> None:
    class Broken(FakeModel):
        def encode_aerial(self, windows: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        embed(Broken(), scene(tmp_path / "a.tif"), tmp_path / "s.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_tall_windows_are_read_in_strips_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = scene(tmp_path / "a.tif")
    whole = embed(FakeModel(), path, tmp_path / "whole.zarr")
    monkeypatch.setattr(cut, "BLOCK_BYTES", 10_000)
    strips = embed(FakeModel(), path, tmp_path / "strips.zarr")
    assert contents(strips.path) == contents(whole.path)


def test_each_tile_of_pixels_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagery = open_imagery(scene(tmp_path / "a.tif", (300, 420)))
    imagery.fingerprint  # noqa: B018  (it reads a sample)
    reads: list[int] = []
    real = Imagery.read
    monkeypatch.setattr(
        Imagery, "read", lambda self, *place: (reads.append(1), real(self, *place))[1]
    )
    store = embed(FakeModel(), imagery, tmp_path / "s.zarr", precision="float32")
    assert len(reads) == np.prod(store.tiles)


def test_a_store_of_something_else_is_refused_with_both_names(tmp_path: Path) -> None:
    path, out = scene(tmp_path / "a.tif"), tmp_path / "s.zarr"
    embed(FakeModel(), path, out, stride_px=8)
    embed(FakeModel(), path, out)  # the stride of the store
    with pytest.raises(StoreError, match="model fake, not other"):
        embed(FakeModel(fingerprint="other"), path, out)
    with pytest.raises(StoreError, match="stride_px 8, not 4"):
        embed(FakeModel(), path, out, stride_px=4)
    with pytest.raises(StoreError, match=r"imagery [0-9a-f]{64}, not [0-9a-f]{64}"):
        embed(FakeModel(), scene(tmp_path / "b.tif", (150, 211)), out)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="folder is not an embedding store"):
        embed(FakeModel(), path, tmp_path / "folder", overwrite=True)
    with pytest.raises(AreaError):
        embed(FakeModel(), path, out, overwrite=True, bbox=(100, 10, 101, 11))
    assert open_store(out).identity.stride_px == 8, "a mistyped area costs no store"
    embed(FakeModel(fingerprint="other"), path, out, overwrite=True)
    assert open_store(out).identity.model == "other"


def test_a_store_stands_until_the_one_that_replaces_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = scene(tmp_path / "a.tif"), tmp_path / "s.zarr"
    embed(FakeModel(), path, out)
    write, left = EmbeddingStore.write, [1]

    def interrupted(self: EmbeddingStore, *arguments: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, *arguments)

    monkeypatch.setattr(EmbeddingStore, "write", interrupted)
    other = FakeModel(fingerprint="other")
    with pytest.raises(KeyboardInterrupt):
        embed(other, path, out, overwrite=True)
    old, [begun] = open_store(out), tmp_path.glob(".s.fresh.zarr")
    assert old.identity.model == "fake" and all(map(old.has, old.tiles_in(*old.done() or ())))
    first = {file: file.stat().st_mtime_ns for file in begun.glob("vectors/c/*/*/0")}
    assert len(first) == 1
    monkeypatch.undo()
    new = embed(other, path, out, overwrite=True)
    assert new.path == out and open_store(out).identity.model == "other"
    assert not begun.exists()
    [kept] = [file.relative_to(begun) for file in first]
    assert (out / kept).stat().st_mtime_ns == first[begun / kept], "it went on where it was"


def test_bands_fit_by_meaning_or_are_refused(tmp_path: Path) -> None:
    path = scene(tmp_path / "scene.tif")
    model = FakeModel(bands=("blue", "red"))
    assert engine.fit_imagery(model, path).bands == ("blue", "red")
    assert engine.fit_imagery(model, path, bands=["red", "blue"]).bands == ("blue", "red")
    assert engine.fit_imagery(model, path, bands=["2", "1"]).bands == ("green", "red")
    with pytest.raises(ImageryError) as caught:
        engine.fit_imagery(FakeModel(bands=("red", "green", "blue", "nir")), path)
    assert str(caught.value) == (
        "scene.tif has the bands red, green, blue, the model was trained on red, green, blue, nir; "
        "give imagery that has them, or use another model"
    )
    with pytest.raises(
        ImageryError, match="model was trained on blue, red; name 2 bands with --bands"
    ):
        engine.fit_imagery(model, path, bands=["red"])
    with pytest.raises(ImageryError, match="--bands thermal=1,red=2, or use another model"):
        engine.fit_imagery(FakeModel(bands=("thermal", "red")), path)


def test_imagery_of_another_resolution_is_refused_unless_told(tmp_path: Path) -> None:
    path = scene(tmp_path / "scene.tif")
    for fits in (0.7, 1.4):
        engine.fit_imagery(FakeModel(resolution_m=fits), path)
    for off in (0.6, 1.6):
        with pytest.raises(ImageryError, match=r"scene\.tif has pixels of 1 m.*--any-resolution"):
            engine.fit_imagery(FakeModel(resolution_m=off), path)
        engine.fit_imagery(FakeModel(resolution_m=off), path, any_resolution=True)


def test_reduced_precision_is_used_only_where_it_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Delicate(FakeModel):
        def embed_windows(self, windows: torch.Tensor) -> torch.Tensor:
            vectors = super().embed_windows(windows)
            if torch.is_autocast_enabled("cpu"):
                vectors = vectors + 0.1
            return torch.nn.functional.normalize(vectors, dim=1)

    path = scene(tmp_path / "a.tif")
    monkeypatch.setattr(encode, "computes_bfloat16", lambda device: True)
    assert embed(FakeModel(), path, tmp_path / "a.zarr").precision == "bfloat16"
    assert embed(Delicate(), path, tmp_path / "b.zarr").precision == "float32"
    monkeypatch.setattr(encode, "computes_bfloat16", lambda device: False)
    store = embed(FakeModel(), path, tmp_path / "c.zarr", bbox=None)
    assert store.precision == "float32"
    (store.path / "vectors/c/0/0/0").unlink()
    with pytest.raises(StoreError, match="begun in float32, not bfloat16"):
        embed(FakeModel(), path, store.path, precision="bfloat16")


def test_bad_areas_devices_and_shares_stop_before_anything_is_written(tmp_path: Path) -> None:
    path, out = scene(tmp_path / "a.tif"), tmp_path / "s.zarr"
    with pytest.raises(AreaError, match="misses the imagery"):
        embed(FakeModel(), path, out, bbox=(0, 0, 1, 1))
    with pytest.raises(ConfigError, match="no device 'abacus' here"):
        embed(FakeModel(), path, out, device="abacus")
    with pytest.raises(ConfigError, match="not a share"):
        embed(FakeModel(), path, out, min_valid=7)
    assert not out.exists()


def test_a_corner_of_a_raster_beyond_4_gb_and_100_000_px_is_encoded_as_its_crop(
    tmp_path: Path,
) -> None:
    high, wide, corner = 20_000, 140_000, 300
    pixels = np.random.default_rng(0).integers(1, 255, (3, corner, corner)).astype(np.uint8)
    profile = {
        "driver": "GTiff",
        "height": high,
        "width": wide,
        "count": 3,
        "dtype": "uint8",
        "nodata": 0,
        "crs": "EPSG:32610",
        "transform": ORIGIN,
        "tiled": True,
        "SPARSE_OK": True,
        "BIGTIFF": "IF_SAFER",
    }
    with rasterio.open(tmp_path / "huge.tif", "w", **profile) as raster:
        raster.descriptions = BANDS
        place = rasterio.windows.Window(wide - corner, high - corner, corner, corner)
        raster.write(pixels, window=place)
    grid = GeoBox(
        (corner, corner), ORIGIN * Affine.translation(wide - corner, high - corner), "EPSG:32610"
    )
    crop = write_geotiff(tmp_path / "crop.tif", pixels, grid, bands=BANDS, nodata=0)
    bounds = (grid.boundingbox.left, grid.boundingbox.bottom, *grid.boundingbox[2:])
    huge, small = (
        embed(
            FakeModel(),
            path,
            tmp_path / f"{path.stem}.zarr",
            bbox=bounds,
            bbox_crs="EPSG:32610",
            precision="float32",
        )
        for path in (tmp_path / "huge.tif", crop)
    )
    side = corner // 4
    ends = (slice(length - side, length) for length in huge.geobox.shape)
    np.testing.assert_allclose(huge.read(*ends), vectors(small), atol=2e-3)
    assert np.isfinite(vectors(small)).all(-1).sum() > 5000


def test_the_model_is_given_back_in_the_mode_it_came_in(tmp_path: Path) -> None:
    model = FakeModel().train()
    seen: list[bool] = []
    real = model.embed_windows
    model.embed_windows = lambda w: (seen.append(model.training), real(w))[1]  # type: ignore[method-assign]
    embed(model, scene(tmp_path / "a.tif"), tmp_path / "s.zarr")
    assert seen
    assert not any(seen)
    assert model.training


def factored(window_px: int = 24) -> SpeciesModel:
    shape = {"cell_px": 8, "width": 16, "layers": 2, "heads": 2}
    aerial = {"backbone": "test_resnet", "factored": shape}
    return tiny_model(aerial=aerial, window_px=window_px, bands=3)


def gappy(path: Path, shape: tuple[int, int]) -> Path:
    """A scene with invalid pixels, some windows half empty and some wholly."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(1, 255, (3, *shape)).astype(np.uint8)
    pixels[:, rng.random(shape) < 0.05] = 0
    pixels[:, : shape[0] // 3, shape[1] // 2 :] = 0
    grid = GeoBox(shape, ORIGIN, "EPSG:32610")
    return write_geotiff(path, pixels, grid, bands=("band_0", "band_1", "band_2"), nodata=0)


@pytest.mark.parametrize(
    ("shape", "stride", "window"),
    [
        ((80, 332), 8, 24),
        ((301, 70), 8, 24),
        ((90, 90), 16, 24),
        ((70, 50), 4, 24),
        ((60, 61), 5, 24),
        ((90, 300), 8, 56),
    ],
    ids=["two tiles", "tall", "two cells", "half a cell", "no grid in common", "49 cells a window"],
)
def test_windows_of_shared_cells_equal_windows_encoded_by_themselves(
    tmp_path: Path, shape: tuple[int, int], stride: int, window: int
) -> None:
    model, imagery = factored(window), open_imagery(gappy(tmp_path / "a.tif", shape))
    store = embed(model, imagery, tmp_path / "s.zarr", stride_px=stride, precision="float32")
    encoder = encode.Encoder(model, torch.device("cpu"), 4)
    encoder.precision = "float32"
    tiles = list(store.tiles_in(*(slice(0, side) for side in store.geobox.shape)))
    shared, alone = (
        list(cut.cut_windows(imagery, store, tiles, model.fill, 64, piece_px=piece))
        for piece in (encoder.piece_px, None)
    )
    checked = 0
    for tile in tiles:
        both = []
        for batches, work in ((shared, encoder.encode), (alone, model.encode_aerial)):
            mine = [b for b in batches if b.tile == tile]
            with torch.inference_mode():
                both.append([work(b.pixels) for b in mine if b.pixels is not None])
            layout = mine[-1].layout
        if not both[1]:
            continue
        quick, exact = encoder.assemble(both[0], _layout(shared, tile)), torch.cat(both[1])
        assert quick is not None and layout is not None
        assert (quick - exact).abs().max() < 1e-5
        cells = vectors(store)[*store.cells(tile)].reshape(-1, model.dim)
        np.testing.assert_allclose(cells[layout.slots], exact.numpy(), atol=1e-3)
        checked += len(exact)
    assert checked == np.isfinite(vectors(store)).all(axis=-1).sum() > 20
    assert sum(len(b.pixels) for b in shared if b.pixels is not None) <= 9 * checked


def _layout(batches: list[cut.Batch], tile: tuple[int, int]) -> cut.Layout:
    return next(b.layout for b in batches if b.tile == tile and b.layout is not None)


@pytest.fixture
def encoded_cells(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches of cells that any factored encoder is given."""
    seen: list[int] = []
    real = FactoredTower.encode_cells
    monkeypatch.setattr(
        FactoredTower,
        "encode_cells",
        lambda tower, cells: (seen.append(len(cells)), real(tower, cells))[1],
    )
    return seen


@pytest.mark.parametrize("strip_bytes", [cut.BLOCK_BYTES, 150_000], ids=["whole", "strips"])
def test_a_cell_is_encoded_once_for_all_windows_of_all_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded_cells: list[int], strip_bytes: int
) -> None:
    monkeypatch.setattr(cut, "BLOCK_BYTES", strip_bytes)
    path = scene(tmp_path / "a.tif", (8 * 96, 8 * 70))
    more = {"bands": ["1", "2", "3"], "stride_px": 8, "min_valid": 0, "precision": "float32"}
    store = embed(factored(), path, tmp_path / "s.zarr", **more)  # type: ignore[arg-type]
    assert store.tiles == (3, 3)
    assert sum(encoded_cells) == 98 * 72, "96 x 70 cells, and a margin of one around them"
    encoded_cells.clear()
    monkeypatch.setattr(encode, "KEPT_BYTES", 0)
    again = embed(factored(), path, tmp_path / "again.zarr", **more)  # type: ignore[arg-type]
    assert sum(encoded_cells) == (32 + 2 + 32 + 2 + 32 + 2) * (32 + 2 + 32 + 2 + 6 + 2)
    assert contents(again.path) == contents(store.path), "what was kept changes no byte"


def test_a_wide_raster_keeps_no_more_cells_than_a_narrow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    real = encode.Encoder.encode

    def watched(self: encode.Encoder, *what: Any) -> torch.Tensor:
        result = real(self, *what)
        kept.append(sum(tokens.nbytes for tokens in self._kept.values()))
        return result

    monkeypatch.setattr(encode, "KEPT_BYTES", 10_000)
    monkeypatch.setattr(encode.Encoder, "encode", watched)
    path = scene(tmp_path / "a.tif", (80, 8 * 200))
    embed(factored(), path, tmp_path / "s.zarr", bands=["1", "2", "3"], stride_px=8)
    assert 5_000 < max(kept) <= 10_000


def test_a_factored_store_resumes_in_the_same_bytes_and_strips_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = gappy(tmp_path / "a.tif", (300, 300)), factored()
    whole = embed(model, path, tmp_path / "whole.zarr", stride_px=8)
    part = embed(model, path, tmp_path / "part.zarr", stride_px=8)
    (part.path / "vectors/c/0/1/0").unlink()
    (part.path / "vectors/c/1/0/0").unlink()
    embed(model, path, part.path)
    assert contents(part.path) == contents(whole.path)
    monkeypatch.setattr(cut, "BLOCK_BYTES", 20_000)
    strips = embed(model, path, tmp_path / "strips.zarr", stride_px=8)
    np.testing.assert_allclose(vectors(strips), vectors(whole), atol=2e-3)


@pytest.mark.parametrize("error", ["torch", "cpu", "python"])
def test_where_memory_runs_out_the_batch_halves_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: str
) -> None:
    kinds = {
        "torch": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        "python": MemoryError(),
    }

    class Small(FakeModel):
        most = 9

        def encode_aerial(self, windows: torch.Tensor) -> torch.Tensor:
            if len(windows) > self.most:
                raise kinds[error]
            return super().encode_aerial(windows)

    path = scene(tmp_path / "a.tif")
    model, whole = Small(), embed(FakeModel(), path, tmp_path / "whole.zarr", precision="float32")
    store = embed(model, path, tmp_path / "s.zarr", precision="float32", batch_size=32)
    np.testing.assert_allclose(vectors(store), vectors(whole), atol=1e-3)
    assert max(model.batches) == 8
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert said == [
        "out of memory with 32 windows at once; going on with 16",
        "out of memory with 16 windows at once; going on with 8",
    ]
    model.most = 0
    with pytest.raises(ResourceError, match="not even one window can be encoded"):
        embed(model, path, tmp_path / "t.zarr", precision="float32")


def test_where_memory_runs_out_for_batches_they_are_halved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, most = scene(tmp_path / "a.tif"), [8]
    whole = embed(FakeModel(), path, tmp_path / "whole.zarr", precision="float32")
    real = torch.empty

    def empty(shape: Any, **kind: Any) -> torch.Tensor:
        if isinstance(shape, tuple) and len(shape) == 4 and shape[0] > most[0]:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return real(shape, **kind)

    monkeypatch.setattr(torch, "empty", empty)
    store = embed(FakeModel(), path, tmp_path / "s.zarr", precision="float32", batch_size=32)
    np.testing.assert_allclose(vectors(store), vectors(whole), atol=1e-3)
    assert [r.getMessage() for r in caplog.records if "no memory" in r.getMessage()][:2] == [
        "no memory for batches of 32; going on with 16",
        "no memory for batches of 16; going on with 8",
    ]
    most[0] = 0
    with pytest.raises(ResourceError, match=r"cannot be read in the memory there is .*9 bytes"):
        embed(FakeModel(), path, tmp_path / "t.zarr", precision="float32")


@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_where_memory_runs_out_for_pixels_it_is_said_and_no_tile_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip_unreadable: bool
) -> None:
    path, read, calls = scene(tmp_path / "a.tif", (520, 520)), rasterio.DatasetReader.read, [0]

    def reads(self: Any, *words: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > 100:
            raise RasterioIOError("GetBlockRef failed: cannot allocate 2147483648 bytes")
        return read(self, *words, **named)

    with monkeypatch.context() as short:
        short.setattr("rasterio.DatasetReader.read", reads)
        with pytest.raises(
            ResourceError, match=r"tile .* in the memory there is .*cannot allocate"
        ):
            embed(
                FakeModel(), path, tmp_path / "s.zarr", stride_px=2, skip_unreadable=skip_unreadable
            )
    embed(FakeModel(), path, tmp_path / "s.zarr", stride_px=2)
    embed(FakeModel(), path, tmp_path / "whole.zarr", stride_px=2)
    assert contents(tmp_path / "s.zarr") == contents(tmp_path / "whole.zarr")


@pytest.mark.parametrize("threads", [0, 1])
def test_where_no_thread_can_be_started_it_is_said_and_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    path, start, started = scene(tmp_path / "a.tif"), threading.Thread.start, [0]

    def few(self: threading.Thread) -> None:
        started[0] += 1
        if started[0] > threads:
            raise RuntimeError("can't start new thread")
        start(self)

    whole = embed(FakeModel(), path, tmp_path / "whole.zarr")
    (tmp_path / "whole.zarr/vectors/c/0/0/0").rename(tmp_path / "kept")
    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", few)
        with pytest.raises(
            ResourceError, match=r"ran out \(can't start new thread\); ask for less"
        ):
            embed(FakeModel(), path, whole.path)
    embed(FakeModel(), path, whole.path)
    assert (tmp_path / "kept").read_bytes() == (whole.path / "vectors/c/0/0/0").read_bytes()


def test_a_model_that_memory_has_no_room_for_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tiny_model(bands=3), tmp_path / "model", {})
    monkeypatch.setattr("speciesmap.models.checkpoint.safe_open", no_room)
    with pytest.raises(ResourceError, match=r"ran out \(unable to mmap 9 bytes: Cannot allocate"):
        embed(model, scene(tmp_path / "a.tif"), tmp_path / "s.zarr")


def no_room(*words: Any, **named: Any) -> Any:
    raise SafetensorError("unable to mmap 9 bytes: Cannot allocate memory (12)")


def test_other_errors_of_the_encoder_are_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    class Broken(FakeModel):
        def encode_aerial(self, windows: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        embed(Broken(), scene(tmp_path / "a.tif"), tmp_path / "s.zarr", precision="float32")


def damaged(path: Path) -> Path:
    """A scene whose block at rows 256 to 512, columns 0 to 256 cannot be decompressed."""
    scene(path, (520, 520))
    with rasterio.open(path) as raster:
        offset = int(raster.get_tag_item("BLOCK_OFFSET_0_1", "TIFF", bidx=1))
        size = int(raster.get_tag_item("BLOCK_SIZE_0_1", "TIFF", bidx=1))
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = b"\xff" * size
    path.write_bytes(bytes(content))
    return path


def test_an_unreadable_block_names_its_tile_and_stops_or_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = damaged(tmp_path / "a.tif")
    assert len(open_imagery(path).fingerprint) == 64, "that it cannot be sampled stops nothing"
    monkeypatch.setattr(Imagery, "fingerprint", "f")
    out = tmp_path / "s.zarr"
    with pytest.raises(
        ImageryError, match=r"tile \(1, 0\) cannot be encoded: .*a\.tif cannot be read at rows"
    ):
        embed(FakeModel(), path, out)
    begun = open_store(out)
    assert begun.has((0, 1)) and not begun.has((1, 0))
    caplog.clear()
    store = embed(FakeModel(), path, out, skip_unreadable=True)
    everything = list(store.tiles_in(*(slice(0, side) for side in store.geobox.shape)))
    lost = [tile for tile in everything if not store.has(tile)]
    assert (1, 0) in lost
    named = [r.getMessage() for r in caplog.records if "stays empty" in r.getMessage()]
    assert [n.split(" stays")[0] for n in named] == [f"tile {tile}" for tile in lost]
    assert f"{len(lost)} tiles could not be read" in caplog.text
    whole = embed(FakeModel(), scene(tmp_path / "b.tif", (520, 520)), tmp_path / "b.zarr")
    for tile in everything:
        cells = store.cells(tile)
        if tile in lost:
            assert np.isnan(store.read(*cells)).all()
        else:
            assert store.read(*cells).tobytes() == whole.read(*cells).tobytes()
    path.unlink()
    embed(FakeModel(), scene(path, (520, 520)), out)  # mended
    assert vectors(open_store(out)).tobytes() == vectors(whole).tobytes()


def test_compiling_changes_no_vector_and_says_what_it_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shapes: list[tuple[int, ...]] = []

    def compile(function: Any, dynamic: bool, options: dict[str, bool]) -> Any:
        assert not dynamic and options == {"freezing": True}  # the real one takes a minute
        return lambda inputs: (shapes.append(tuple(inputs.shape)), function(inputs))[1]

    monkeypatch.setattr(torch, "compile", compile)
    path = scene(tmp_path / "a.tif", (100, 100))
    whole = embed(FakeModel(), path, tmp_path / "whole.zarr", precision="float32")
    with caplog.at_level(logging.INFO, "speciesmap"):
        store = embed(FakeModel(), path, tmp_path / "s.zarr", precision="float32", compiled=True)
    assert contents(store.path) == contents(whole.path)
    assert set(shapes) == {(256, 3, 16, 16)}, "one shape is compiled"
    assert caplog.text.count("torch.compile took") == 1


@pytest.mark.parametrize(("window", "most"), [(16, 256), (64, 128), (256, 8), (512, 2), (1024, 1)])
def test_batches_of_large_windows_hold_fewer(window: int, most: int) -> None:
    encoder = encode.Encoder(FakeModel(window_px=window), torch.device("cpu"))
    assert encoder.windows == most


def test_memory_of_batches_is_used_again_only_when_asked(tmp_path: Path) -> None:
    imagery = open_imagery(scene(tmp_path / "a.tif", (150, 300)))
    store = embed(FakeModel(), imagery, tmp_path / "s.zarr", precision="float32")
    tiles = list(store.tiles_in(*(slice(0, side) for side in store.geobox.shape)))
    fill = FakeModel().fill
    kept = list(cut.cut_windows(imagery, store, tiles, fill, 100))
    seen: list[torch.Tensor] = []
    places = set()
    for batch in cut.cut_windows(imagery, store, tiles, fill, 100, reuse=2):
        if batch.pixels is not None:
            seen.append(batch.pixels.clone())
            places.add(batch.pixels.data_ptr())
    assert len(places) == 2 < len(seen)
    fresh = [b.pixels for b in kept if b.pixels is not None]
    assert all(torch.equal(a, b) for a, b in zip(seen, fresh, strict=True))


def test_the_times_of_a_gpu_are_counted_as_they_come_and_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            made.append(self)

        def record(self, stream: Any) -> None:
            self.number = made.index(self)

        def query(self) -> bool:
            return self.number < len(made) - 8  # the work of four blocks is under way

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 500.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch, stream = encode.Stopwatch(), object()
    for _ in range(40):
        with watch("encode", stream):  # type: ignore[arg-type]
            pass
    assert len(watch._events) <= 5
    assert watch.seconds["encode"] >= 17
    assert watch.settle()["encode"] == 20
