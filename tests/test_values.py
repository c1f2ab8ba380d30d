"""Values of pixels: brought to what the model saw where that is known, warned about where far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from fake_model import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from rasterio.enums import ColorInterp

from speciesmap.atlas import predict
from speciesmap.config import DataConfig, load_config
from speciesmap.describe import describe
from speciesmap.learning.sources import open_sources
from speciesmap.learning.train import train
from speciesmap.mapping.embed import embed
from speciesmap.mapping.fit import fit_values
from speciesmap.mapping.plan import plan
from speciesmap.models import load_model
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.store import open_store
from speciesmap.rasters.values import Values, tagged_gains, warn_of_black

NAIP = Path(__file__).parents[2] / "shared/data/naip_pairs"
BANDS = ("red", "green", "blue")
COLORS = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
GRID = GeoBox((200, 240), Affine(1, 0, 550_000, 0, -1, 4_180_000), "EPSG:32610")


def landscape(seed: int = 0) -> np.ndarray:
    """Smooth fields between 20 and 230, uint8."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[: GRID.shape[0], : GRID.shape[1]]
    waves = [
        np.sin(rows / a + p) + np.cos(cols / b - p)
        for a, b, p in rng.uniform(5, 25, (len(BANDS), 3))
    ]
    return np.rint(125 + 50 * np.array(waves)).astype(np.uint8)


def model_of(pixels: np.ndarray, scaling: Any = None) -> FakeModel:
    model = FakeModel(BANDS)
    model.values = Values.of(pixels.reshape(len(pixels), -1), pixels.dtype, scaling)
    return model


def tagged(path: Path, pixels: np.ndarray, scale: float, offset: float) -> Path:
    write_geotiff(path, pixels, GRID, bands=BANDS)
    with rasterio.open(path, "r+") as raster:
        raster.scales, raster.offsets = (scale,) * len(BANDS), (offset,) * len(BANDS)
    return path


WHOLE = (0, 0, *GRID.shape)


@pytest.mark.parametrize(
    ("seen", "given"),
    [
        (np.uint8, np.float32), (np.uint8, np.uint16), (np.float32, np.uint8),
        (np.float32, np.uint16), (np.uint16, np.uint8),
    ],
)  # fmt: skip
def test_other_customs_of_storing_brightness_give_the_same_vectors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seen: type, given: type
) -> None:
    full = {np.uint8: 255.0, np.float32: 1.0, np.uint16: 65535.0}
    values = landscape() / 255
    stored = {
        kind: (values * full[kind]).astype(kind) if kind != np.uint16
        else np.rint(values * 65535).astype(kind) for kind in full
    }  # fmt: skip
    model = model_of(stored[seen])
    paths = {
        kind: write_geotiff(tmp_path / f"{np.dtype(kind)}.tif", stored[kind], GRID, bands=BANDS)
        for kind in (seen, given)
    }
    with caplog.at_level("WARNING", "speciesmap"):
        expected = embed(model, paths[seen], tmp_path / "a.zarr")
        assert not caplog.messages
        store = embed(model, paths[given], tmp_path / "b.zarr")
    assert f"they are multiplied by {full[seen] / full[given]:.6g}" in caplog.text
    assert "far from" not in caplog.text
    everything = [slice(0, side) for side in store.geobox.shape]
    np.testing.assert_allclose(
        store.read(*everything).astype(float), expected.read(*everything), atol=2e-2
    )


def test_the_store_and_the_record_of_a_run_tell_what_values_were_multiplied_by(
    tmp_path: Path,
) -> None:
    counts = np.rint(landscape() / 255 * 10000).astype(np.uint16)
    model = model_of((landscape() / 255).astype(np.float32))
    path = write_geotiff(tmp_path / "a.tif", counts, GRID, bands=BANDS)
    made = predict(model, imagery=path, species=["Quercus agrifolia"], out=tmp_path / "maps")
    run = json.loads(made.run.read_text())
    assert run["imagery"]["values"] == {b: {"factor": 1e-4, "shift": 0.0} for b in BANDS}
    assert open_store(made.store).gains == ((1e-4, 0.0),) * 3
    assert describe(made.store)["imagery_gains"] == ((1e-4, 0.0),) * 3
    path = write_geotiff(tmp_path / "b.tif", landscape(), GRID, bands=BANDS)
    made = predict(
        FakeModel(BANDS), imagery=path, species=["Quercus agrifolia"], out=tmp_path / "m"
    )
    assert json.loads(made.run.read_text())["imagery"]["values"] is None


def test_reflectance_in_ten_thousandths_is_told_from_a_full_range(tmp_path: Path) -> None:
    model = model_of((landscape() / 255).astype(np.float32))
    counts = np.rint(landscape() / 255 * 10000).astype(np.uint16)
    path = write_geotiff(tmp_path / "a.tif", counts, GRID, bands=BANDS)
    pixels, _ = fit_values(model, open_imagery(path), WHOLE).read(*WHOLE)
    np.testing.assert_allclose(pixels, counts / 10000, rtol=1e-5)


def test_tags_of_both_decide_and_tags_of_one_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sentinel-2 before and after January 2022: reflectance is stored with an offset of 1000."""
    counts = landscape().astype(np.uint16) * 30
    model = model_of(counts, ((1e-4, 0.0),) * 3)
    newer = open_imagery(tagged(tmp_path / "b.tif", counts + 1000, 1e-4, -0.1))
    with caplog.at_level("WARNING", "speciesmap"):
        pixels, valid = fit_values(model, newer, WHOLE).read(*WHOLE)
        np.testing.assert_allclose(pixels, counts, rtol=1e-5)
        assert valid.all() and pixels.dtype == np.float32
        untagged = open_imagery(write_geotiff(tmp_path / "c.tif", counts, GRID, bands=BANDS))
        assert fit_values(model, untagged, WHOLE) is untagged
        older = open_imagery(tagged(tmp_path / "a.tif", counts, 1e-4, 0.0))
        assert fit_values(model, older, WHOLE) is older
        assert fit_values(model_of(counts), newer, WHOLE) is newer
    assert not caplog.messages


@pytest.mark.parametrize("change", ["halved", "doubled", "dark"])
def test_values_that_are_far_are_warned_about_with_both_ranges(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    pixels = landscape().astype(np.uint16)
    given = {"halved": pixels // 2, "doubled": pixels * 2, "dark": pixels // 20}[change]
    path = write_geotiff(tmp_path / "a.tif", given, GRID, bands=BANDS)
    with caplog.at_level("WARNING", "speciesmap"):
        embed(model_of(pixels), path, tmp_path / "a.zarr")
    (message,) = caplog.messages
    assert message.startswith("a.tif: band ")
    assert "far from what the model was trained on" in message
    assert "gdal_translate -scale" in message


def test_nothing_is_said_of_a_model_without_histograms_or_an_area_without_pixels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bright = write_geotiff(
        tmp_path / "a.tif", np.full((3, *GRID.shape), 65000, np.uint16), GRID, bands=BANDS
    )
    empty = write_geotiff(
        tmp_path / "b.tif", np.zeros((3, *GRID.shape), np.uint8), GRID, bands=BANDS, nodata=0
    )
    with caplog.at_level("WARNING", "speciesmap"):
        fit_values(FakeModel(BANDS), open_imagery(bright), WHOLE)
        fit_values(model_of(landscape()), open_imagery(empty), WHOLE)
    assert not caplog.messages


def with_black_edges() -> np.ndarray:
    """The landscape, whose western tenth is black."""
    pixels = landscape()
    pixels[:, :, :24] = 0
    return pixels


def test_black_edges_that_no_file_declares_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_geotiff(tmp_path / "a.tif", with_black_edges(), GRID, bands=BANDS)
    model = model_of(with_black_edges())
    with caplog.at_level("WARNING", "speciesmap"):
        embed(model, path, tmp_path / "a.zarr")
        (message,) = caplog.messages
        plan(model, path)
        open_sources(DataConfig(imagery=str(path), window_px=32))
    assert [told for told in caplog.messages if "in every band" in told] == [message] * 3
    assert "% of a sample of its pixels are 0 in every band" in message
    assert message.endswith(f"gdal_edit.py -a_nodata 0 {path}")


def test_black_edges_of_a_part_are_told_of_that_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_geotiff(tmp_path / "a.tif", with_black_edges(), GRID, bands=BANDS)
    imagery = open_imagery(path)
    with caplog.at_level("WARNING", "speciesmap"):
        warn_of_black(imagery, (0, 30, 200, 200))
        assert not caplog.messages
        warn_of_black(imagery, (0, 0, 200, 100))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("declared", ["nodata", "another nodata", "mask", "alpha"])
def test_what_is_declared_as_missing_or_as_black_is_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, declared: str
) -> None:
    pixels, known = with_black_edges(), np.full(GRID.shape, 255, np.uint8)
    nodata = {"nodata": 0, "another nodata": 255}.get(declared)
    bands = BANDS
    if declared == "alpha":
        pixels, bands = np.concatenate([pixels, known[None]]), (*BANDS, "alpha")
    path = write_geotiff(
        tmp_path / "a.tif", pixels, GRID, bands=bands, nodata=nodata,
        colorinterp=[*COLORS, ColorInterp.alpha] if declared == "alpha" else None,
    )  # fmt: skip
    if declared == "mask":
        with rasterio.open(path, "r+") as raster:
            raster.write_mask(known)
    with caplog.at_level("WARNING", "speciesmap"):
        warn_of_black(open_imagery(path), WHOLE)
    assert not caplog.messages


@pytest.mark.parametrize("water", [(0, 0, 3), (1, 1, 1), None])
def test_dark_water_is_not_taken_for_an_edge(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, water: tuple[int, ...] | None
) -> None:
    pixels = landscape()
    if water:
        pixels[:, :, :24] = np.array(water)[:, None, None]
    else:
        pixels[:, 5::11, 5::11] = 0  # single pixels in shadow
    path = write_geotiff(tmp_path / "a.tif", pixels, GRID, bands=BANDS)
    with caplog.at_level("WARNING", "speciesmap"):
        warn_of_black(open_imagery(path), WHOLE)
    assert not caplog.messages


def test_zeros_of_a_single_band_may_mean_something(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_geotiff(tmp_path / "a.tif", with_black_edges()[:1], GRID, bands=("lights",))
    with caplog.at_level("WARNING", "speciesmap"):
        warn_of_black(open_imagery(path), WHOLE)
    assert not caplog.messages


@pytest.mark.skipif(not NAIP.exists(), reason="real NAIP chips (shared/data/naip_pairs) are absent")
def test_real_imagery_of_another_city_and_year_is_not_called_unlike() -> None:
    def pixels(pattern: str) -> np.ndarray:
        parts = []
        for path in sorted(NAIP.glob(pattern))[::6]:
            with rasterio.open(path) as raster:
                parts.append(raster.read()[:, ::8, ::8].reshape(4, -1))
        return np.concatenate(parts, axis=1).astype(float)

    sets = [
        pixels(f"{c}_{y}_*.tif") for c in ("santa_monica", "palm_springs") for y in (2018, 2020)
    ]
    bands = ("red", "green", "blue", "nir")
    for one in sets:
        seen = Values.of(one, np.uint8)
        apart = [seen.distance(Values.of(other, np.uint8).quantiles).max() for other in sets]
        assert max(apart) < 0.9
        for factor in (1 / 255, 0.5, 2, 257):
            assert seen.far(Values.of(one * factor, np.float32), bands)


@settings(max_examples=50, deadline=None)
@given(
    theirs=st.tuples(st.floats(1e-5, 10), st.floats(-10, 10)),
    ours=st.tuples(st.floats(1e-5, 10), st.floats(-10, 10)),
    value=st.floats(0, 1000),
)
def test_gains_keep_what_a_value_means(
    theirs: tuple[float, float], ours: tuple[float, float], value: float
) -> None:
    gains = tagged_gains((theirs,), (ours,))
    if gains is None:
        assert theirs == ours or (1.0, 0.0) in (theirs, ours)
        return
    ((factor, shift),) = gains
    means = value * theirs[0] + theirs[1]
    assert (value * factor + shift) * ours[0] + ours[1] == pytest.approx(means, abs=1e-6)


def test_gains_follow_each_other(tmp_path: Path) -> None:
    imagery = open_imagery(write_geotiff(tmp_path / "a.tif", landscape(), GRID, bands=BANDS))
    twice = imagery.rescaled([(2, 1)] * 3).rescaled([(10, 5)] * 3)
    np.testing.assert_allclose(twice.read(*WHOLE)[0], (landscape() * 2.0 + 1) * 10 + 5)
    assert len({i.fingerprint for i in (imagery, twice, imagery.rescaled([(20, 15)] * 3))}) == 2


def test_training_keeps_the_histograms_of_its_imagery(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "a.tif", landscape(), GRID, bands=BANDS)
    config = tmp_path / "mae.yaml"
    config.write_text(
        f"""stage: pretrain
method: mae
data: {{imagery: {path}, window_px: 16, background: 64}}
model:
  dim: 8
  aerial:
    backbone: vit_tiny_patch16_224
    kwargs: {{patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}}
masked: {{decoder_dim: 16, decoder_depth: 1, decoder_heads: 2}}
optim: {{epochs: 1, batch_size: 32}}
trainer: {{accelerator: cpu}}
"""
    )
    seen = load_model(train(load_config(config), tmp_path / "model")).values
    assert seen is not None and seen.dtype == "uint8"
    pixels = landscape().reshape(3, -1)
    assert seen.distance(Values.of(pixels, np.uint8).quantiles).max() < 0.3
    assert seen.far(Values.of(pixels / 255, np.float32), BANDS)
