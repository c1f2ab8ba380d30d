"""Maps by season: a month moves stored embeddings, and nothing is encoded for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from rio_cogeo.cogeo import cog_validate
from tiny import BANDS, WINDOW_PX, TinyScene, tiny_model, tiny_scene

from speciesmap import atlas
from speciesmap.cli import group
from speciesmap.errors import ConfigError, ModelError
from speciesmap.mapping.predict import moved
from speciesmap.mapping.query import Query, make_queries
from speciesmap.models import SpeciesModel, save_model
from speciesmap.present.styles import MONTHS, seasonal
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.windows import WindowGrid

STRIDE_PX = 8


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> TinyScene:
    return tiny_scene(tmp_path_factory.mktemp("scene"))


def model_with_dates() -> SpeciesModel:
    model = tiny_model(metadata={"dropout": 0.25})
    object.__setattr__(model.architecture, "bands", BANDS)
    assert model.metadata is not None
    for parameter in model.metadata.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def predict(model: SpeciesModel, scene: TinyScene, out: Path, **options: Any) -> atlas.Prediction:
    return atlas.predict(
        model, imagery=scene.imagery, out=out, stride_px=STRIDE_PX, precision="float32", **options
    )


def encoded_with_month(model: SpeciesModel, scene: TinyScene, month: int) -> NDArray[np.float32]:
    """Every window of the scene, encoded again with the month, shape (rows, columns, D)."""
    imagery = open_imagery(scene.imagery)
    grid = WindowGrid(imagery.geobox, WINDOW_PX, STRIDE_PX)
    rows, cols = grid.cells
    fields = torch.tensor([[torch.nan, torch.nan, month, torch.nan]])
    vectors = np.empty((rows, cols, model.dim), np.float32)
    for row, col in np.ndindex(rows, cols):
        pixels, _ = imagery.read(*grid.start(row, col), WINDOW_PX, WINDOW_PX)
        with torch.inference_mode():
            vectors[row, col] = model.encode_aerial(torch.from_numpy(pixels)[None], fields)[0]
    return vectors


def values(query: Query, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    logits = query.gain * vectors @ query.vector + query.offset
    return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


def test_a_years_map_is_what_encoding_with_each_month_would_give(
    scene: TinyScene, tmp_path: Path
) -> None:
    model = model_with_dates()
    made = predict(model, scene, tmp_path / "maps", months=range(1, 13))
    query = make_queries(model)[0]
    with rasterio.open(made.maps[0].path) as raster:
        assert raster.descriptions == MONTHS
        assert seasonal(raster)
        assert raster.tags()["QUANTITY"] == "suitability"
        bands = raster.read()
    inner = (slice(2, -2), slice(2, -2))
    for month in (1, 5, 12):
        wanted = values(query, encoded_with_month(model, scene, month))
        np.testing.assert_allclose(bands[month - 1][inner], wanted[inner], atol=1e-3)
    assert np.nanmax(np.abs(bands[0] - bands[6])) > 0.02, "seasons differ"
    assert cog_validate(made.maps[0].path)[0]
    assert len(made.maps) == 3
    assert made.html.exists()
    opened = made.to_xarray()[made.maps[0].path.stem]
    assert opened.dims == ("month", "y", "x")
    np.testing.assert_array_equal(opened.sel(month="May"), bands[4])


def test_a_month_encodes_nothing_and_is_the_band_of_the_year(
    scene: TinyScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with_dates()
    first = predict(model, scene, tmp_path / "plain")
    with monkeypatch.context() as patch:
        patch.setattr(SpeciesModel, "encode_aerial", None)
        year = atlas.predict(model, store=first.store, out=tmp_path / "y", months=range(1, 13))
        may = predict(model, scene, tmp_path / "may", store=first.store, months=[5])
    with rasterio.open(may.maps[1].path) as one, rasterio.open(year.maps[1].path) as all_months:
        assert (one.count, one.descriptions) == (1, ("suitability",))
        assert one.tags()["MONTH"] == "May"
        np.testing.assert_array_equal(one.read(1), all_months.read(5))
        with rasterio.open(first.maps[1].path) as plain:
            assert "MONTH" not in plain.tags()
            assert not np.allclose(plain.read(1), one.read(1), atol=0.01, equal_nan=True)
            np.testing.assert_array_equal(np.isnan(plain.read(1)), np.isnan(one.read(1)))


def test_a_calibration_does_not_hold_for_a_month(scene: TinyScene, tmp_path: Path) -> None:
    model = model_with_dates()
    model.prevalence = {model.taxa[0].name: 0.2}
    plain = predict(model, scene, tmp_path / "plain")
    may = predict(model, scene, tmp_path / "may", store=plain.store, months=[5])
    assert plain.maps[0].query.quantity == "probability"
    assert {m.query.quantity for m in may.maps} == {"suitability"}


def test_a_model_without_dates_and_a_month_that_is_none_are_refused(
    scene: TinyScene, tmp_path: Path
) -> None:
    bare = tiny_model()
    object.__setattr__(bare.architecture, "bands", BANDS)
    with pytest.raises(ModelError, match=r"trained without dates.*leave --month out"):
        predict(bare, scene, tmp_path / "maps", months=[5])
    with pytest.raises(ConfigError, match="no month 13"):
        predict(model_with_dates(), scene, tmp_path / "maps", months=[13])
    assert not (tmp_path / "maps").exists()


def test_predict_takes_a_month_or_all(scene: TinyScene, tmp_path: Path) -> None:
    run = save_model(model_with_dates(), tmp_path / "run", {})
    call = [
        "predict",
        str(run),
        "--imagery",
        str(scene.imagery),
        "--store",
        str(tmp_path / "s.zarr"),
    ]
    for month, count in (("all", 12), ("5", 1)):
        done = CliRunner().invoke(group, [*call, "--month", month, "--out", str(tmp_path / month)])
        assert done.exit_code == 0, done.output
        with rasterio.open(tmp_path / month / "quercus_lobata.tif") as raster:
            assert raster.count == count
    done = CliRunner().invoke(group, [*call, "--month", "13", "--out", str(tmp_path / "x")])
    assert done.exit_code == 2


def test_nothing_known_stays_nothing_known() -> None:
    vectors = np.array([[np.nan, np.nan], [1, 0]], np.float16)
    after = moved(vectors, np.array([0, 1], np.float32))
    assert np.isnan(after[0]).all()
    np.testing.assert_allclose(after[1], [0.5**0.5] * 2, rtol=1e-6)
