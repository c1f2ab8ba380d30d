"""Covariates beside imagery: read where they are asked for, learned from, found again for maps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from click.testing import CliRunner
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from scipy.spatial import cKDTree
from tiny import BANDS, SIDE, TAXA, TinyScene, tiny_model, tiny_scene

from speciesmap.appraise import evaluate
from speciesmap.atlas import predict
from speciesmap.cli import main
from speciesmap.config import AnyConfig, load_config, shipped_config
from speciesmap.datasets.birds import open_dataset
from speciesmap.errors import ConfigError, ImageryError, ModelError
from speciesmap.evaluation.rungs import WITH_COVARIATES
from speciesmap.learning.train import train
from speciesmap.mapping.applicability import applicable, learn_applicability
from speciesmap.mapping.surroundings import PROBED
from speciesmap.models import load_model, read_facts, save_model
from speciesmap.models.environment import Environment, Expansion
from speciesmap.rasters.covariates import LOCATION, open_covariates
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.store import open_store

LEFT, TOP = 550_000.0, 4_180_000.0


def raster(
    path: Path, pixels: NDArray[Any], pixel_m: float = 2.0, crs: str = "EPSG:32610", **more: Any
) -> Path:
    """Write a raster of the scene's extent."""
    bands, height, width = pixels.shape
    profile = {"driver": "GTiff", "count": bands, "height": height, "width": width, "crs": crs}
    transform = Affine(pixel_m, 0, LEFT, 0, -pixel_m, TOP)
    profile |= {"dtype": str(pixels.dtype), "transform": transform, **more}
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels)
    return path


def degrees(east: NDArray[Any], north: NDArray[Any]) -> tuple[Any, Any]:
    from pyproj import Transformer

    return Transformer.from_crs("EPSG:32610", "EPSG:4326", always_xy=True).transform(east, north)


def test_a_covariate_is_the_pixel_under_a_place_whatever_its_grid(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fine = rng.normal(size=(1, 80, 80)).astype(np.float32)
    coarse = rng.integers(0, 9, (2, 10, 10)).astype(np.int16)
    coarse[1, 0, 0] = -99
    paths = [
        raster(tmp_path / "elevation.tif", fine),
        raster(tmp_path / "climate.tif", coarse, 16.0, nodata=-99),
    ]
    with rasterio.open(paths[1], "r+") as file:
        file.scales, file.offsets = (0.1, 1.0), (5.0, 0.0)
    found = open_covariates(paths, crs="EPSG:32610")
    assert found.names == ("elevation", "climate_band_1", "climate_band_2", *LOCATION)
    east, north = LEFT + np.array([1.0, 77.0, 500.0]), TOP - np.array([3.0, 31.0, 3.0])
    values = found.at(*degrees(east, north))
    assert values[0, :2] == pytest.approx([fine[0, 1, 0], coarse[0, 0, 0] * 0.1 + 5])
    assert np.isnan(values[0, 2]), "one band alone has no value here"
    assert values[1, :3] == pytest.approx([fine[0, 15, 38], *(coarse[:, 1, 4] * [0.1, 1] + [5, 0])])
    assert np.isnan(values[2, :3]).all()
    assert values[:, 3:] == pytest.approx(np.column_stack([east, north]), abs=1e-3)
    grid = GeoBox((12, 16), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32610")
    cells = found.cells(grid)
    assert cells.shape == (12, 16, 5)
    x, y = LEFT + 35, TOP - 25
    one = found.at(*degrees(np.array([x]), np.array([y])))[0]
    assert cells[2, 3] == pytest.approx(one, abs=1e-3)


def test_names_tell_covariates_apart(tmp_path: Path) -> None:
    flat = np.ones((1, 80, 80), np.float32)
    (tmp_path / "other").mkdir()
    one, two = raster(tmp_path / "a.tif", flat), raster(tmp_path / "other" / "a.tif", 2 * flat)
    with pytest.raises(ImageryError, match="covariates are called 'a'"):
        open_covariates([one, two])
    both = open_covariates([one, f"b={two}"], wanted=["b", "a"])
    assert both.names == ("b", "a")
    assert both.at(*degrees(np.array([LEFT + 9]), np.array([TOP - 9]))).tolist() == [[2, 1]]
    assert both.fingerprint != open_covariates([one, f"b={two}"]).fingerprint
    with pytest.raises(ImageryError, match="needs the covariate 'c', and those given are a"):
        open_covariates([one], wanted=["c"])
    with pytest.raises(ImageryError, match=r"covariate b has no value at any of 1 places"):
        both.at([10.0], [10.0])
    with pytest.raises(ImageryError):
        open_covariates([tmp_path / "none.tif"])
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(ImageryError):
        open_covariates([tmp_path / "text.tif"])


def test_an_expansion_comes_back_from_its_state() -> None:
    rng = np.random.default_rng(0)
    table = np.column_stack([rng.normal(size=50), rng.integers(0, 3, 50), rng.normal(size=50)])
    made = Expansion(table, [1], hinges=3, quadratic=True)
    again = Expansion.restore(json.loads(json.dumps(made.state())))
    other = rng.normal(size=(20, 3)) * 3
    assert torch.equal(made(other), again(other))
    assert again.width == made.width == made(other).shape[1]
    damaged = made.state() | {"centre": [0.0]}
    with pytest.raises(ValueError, match="do not fit"):
        Expansion.restore(damaged)
    around = Environment(("a", "b", "c"), (), None, "", made)
    other[3, 1] = np.nan
    features = around.features(other.reshape(4, 5, 3))
    assert np.isnan(features[0, 3]).all() and np.isfinite(features).sum() == 19 * made.width


def test_places_unlike_in_a_covariate_are_not_applicable() -> None:
    rng = np.random.default_rng(0)
    vectors = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(400, 8))), dim=1)
    scaled = torch.from_numpy(rng.normal(size=(400, 2)))
    known = learn_applicability(vectors[:300], np.arange(300) % 5, rng, scaled[:300])
    assert known is not None and known.beside > 0
    there, like = vectors[300:].numpy(), scaled[300:].float().numpy()
    assert applicable(there, known, like).mean() > 0.9
    assert applicable(there, known, like + 12).mean() < 0.05


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> TinyScene:
    return tiny_scene(tmp_path_factory.mktemp("scene"), rows=90)


@pytest.fixture(scope="module")
def moisture(scene: TinyScene) -> Path:
    """High where the nearest record is of the first taxon; unknown along the right edge."""
    facts = open_dataset(scene.chips).facts
    rows, cols = open_imagery(scene.imagery).rowcol(facts["longitude"], facts["latitude"])
    centres = np.stack(np.mgrid[1:SIDE:2, 1:SIDE:2], -1).reshape(-1, 2)
    nearest = cKDTree(np.column_stack([rows, cols])).query(centres)[1]
    wet = (facts["name"].to_numpy() == TAXA[0].name)[nearest].reshape(1, 80, 80) * 100.0
    wet[0, :, 74:] = -9999
    return raster(scene.imagery.parent / "moisture.tif", wet.astype(np.float32), nodata=-9999)


def settings(scene: TinyScene, base: Path, **data: Any) -> dict[str, Any]:
    return {
        "stage": "finetune",
        "init": str(base),
        "freeze_encoder": True,
        "data": {
            "dataset": str(scene.chips),
            "imagery": str(scene.imagery),
            "background": 300,
            **data,
        },
        "validation": {"folds": 3, "block_m": 30},
        "trainer": {"accelerator": "cpu"},
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    model.architecture.__dict__["bands"] = BANDS
    return save_model(model, tmp_path_factory.mktemp("models") / "base", {})


@pytest.fixture(scope="module")
def trained(scene: TinyScene, moisture: Path, base: Path) -> Path:
    config = load_config(settings(scene, base, covariates=[str(moisture)], location=True))
    return train(config, base.parent / "trained")


def test_what_imagery_does_not_show_is_learned_from_a_covariate(
    scene: TinyScene, base: Path, trained: Path
) -> None:
    alone = train(
        load_config({**settings(scene, base), "head": {"loss": "poisson"}}), base.parent / "alone"
    )
    blind, seeing = (read_facts(p)["metrics"]["validation"][TAXA[0].name] for p in (alone, trained))
    assert seeing["auc"] > 0.75 > blind["auc"] + 0.1
    assert read_facts(trained)["metrics"]["penalty"] in {10, 30, 100, 300}
    model = load_model(trained)
    assert model.environment is not None
    assert model.environment.names == ("moisture", *LOCATION)
    assert model.fingerprint == load_model(base).fingerprint, "stores serve both"


def test_a_map_reads_the_covariate_at_its_cells(
    scene: TinyScene, moisture: Path, trained: Path, tmp_path: Path
) -> None:
    made = predict(
        trained,
        imagery=scene.imagery,
        out=tmp_path / "maps",
        stride_px=4,
        species=[t.name for t in TAXA],
        texts=["Plantae"],
    )
    values = {m.query.label: rasterio.open(m.path).read() for m in made.maps}
    wet = rasterio.open(moisture).read(1)[1::2, 1::2]
    first = values[TAXA[0].name]
    there = np.isfinite(first[0])
    assert there.any() and not there[:, 37:].any(), "no map where the covariate is unknown"
    assert np.isfinite(values["Plantae"][0, :, 37:]).any(), "text reads the embedding alone"
    assert first[0][there & (wet == 100)].mean() > first[0][there & (wet == 0)].mean() + 0.05
    assert np.isfinite(first[1][there]).all() and set(np.unique(first[2][there])) <= {0, 1}
    run = json.loads(made.run.read_text())
    assert run["covariates"]["names"] == ["moisture", *LOCATION]
    assert run["covariates"]["fingerprint"] == run["covariates"]["trained_on"]
    again = predict(
        trained,
        store=made.store,
        out=tmp_path / "again",
        species=[TAXA[0].name],
        covariates=[f"moisture={moisture}"],
    )
    assert np.array_equal(rasterio.open(again.maps[0].path).read(), first, equal_nan=True)


def test_a_covariate_of_the_area_serves_whatever_else_the_store_holds(
    scene: TinyScene, moisture: Path, trained: Path, tmp_path: Path
) -> None:
    species = [TAXA[0].name]
    whole = predict(
        trained, imagery=scene.imagery, out=tmp_path / "whole", stride_px=2, species=species
    )
    cells = open_store(whole.store).geobox
    side = min(cells.shape)
    looked_at = {int((k + 0.5) * side / PROBED) for k in range(PROBED)}  # in a look at the whole
    between = sorted(set(range(side)) - looked_at)[10]
    cell = cells[between : between + 1, between : between + 1]
    patch = tmp_path / "moisture.tif"
    write_geotiff(patch, np.full((1, 1, 1), 50, np.float32), cell, bands=["moisture"])
    made = predict(
        trained,
        store=whole.store,
        out=tmp_path / "part",
        bbox=cell.boundingbox.bbox,
        bbox_crs="EPSG:32610",
        covariates=[patch],
        species=species,
    )
    with rasterio.open(made.maps[0].path) as file:
        assert np.isfinite(file.read(1)).any()


def test_the_command_line_adds_covariates_to_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[AnyConfig] = []

    def stop(config: AnyConfig, *_: Any, **__: Any) -> Path:
        found.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr("speciesmap.learning.train.train", stop)
    rasters = ["--covariates", "dem=a b.tif", "--covariates", "rain.tif", "--location"]
    for name in ("demo_finetune.yaml", "demo_crisp.yaml"):
        with pytest.raises(SystemExit):
            main(["train", str(shipped_config(name)), "--out", str(tmp_path / "run"), *rasters])
    assert len(found) == 1, "of pre-training they are refused"
    refused = "stage pretrain does not read data.covariates, it is for stage finetune; leave it out"
    assert refused in capsys.readouterr().err.replace("\n", " ")
    assert found[0].data.covariates == ["dem=a b.tif", "rain.tif"]
    assert found[0].data.location


def test_covariates_are_kept_without_credentials(
    moisture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_imagery(moisture)
    monkeypatch.setattr("speciesmap.rasters.covariates.open_imagery", lambda file: opened)
    monkeypatch.setattr("speciesmap.rasters.covariates._nodata", lambda file: {})
    found = open_covariates(["https://me:word@example.org/moisture.tif?sig=secret"])
    assert found.sources == ("https://example.org/moisture.tif",)


def test_covariates_that_do_not_fit_are_refused_in_words(
    scene: TinyScene,
    moisture: Path,
    trained: Path,
    base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    area = {"imagery": scene.imagery, "stride_px": 16, "species": [TAXA[0].name]}
    other = raster(tmp_path / "slope.tif", np.ones((1, 80, 80), np.float32))
    with pytest.raises(ImageryError, match="needs the covariate 'moisture', and those given are s"):
        predict(trained, out=tmp_path / "a", covariates=[other], **area)
    far = tmp_path / "moisture.tif"
    raster(far, np.ones((1, 8, 8), np.float32), crs="EPSG:32611")
    with pytest.raises(ImageryError, match="moisture has no value in the area that is mapped"):
        predict(trained, out=tmp_path / "a", covariates=[far], **area)
    with pytest.raises(ModelError, match="trained without covariates"):
        predict(base, out=tmp_path / "a", covariates=[moisture], **area)
    assert not (tmp_path / "a").exists()
    with caplog.at_level(logging.WARNING, logger="speciesmap"):
        kelvin = raster(tmp_path / "k.tif", np.full((1, 80, 80), 5e5, np.float32))
        predict(trained, out=tmp_path / "b", covariates=[f"moisture={kelvin}"], **area)
    assert "moisture is outside the 0 to 100" in caplog.text
    with pytest.raises(ConfigError, match=r"categorical names 'soil', and the covariates are"):
        config = settings(scene, base, covariates=[str(moisture)], categorical=["soil"])
        train(load_config(config), tmp_path / "c")
    with pytest.raises(ImageryError, match="has no value at any of"):
        train(load_config(settings(scene, base, covariates=[str(far)])), tmp_path / "c")


def test_a_damaged_environment_is_a_damaged_checkpoint(trained: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    facts = json.loads((copy / "config.json").read_text())
    for damage in ({}, {"names": ["a"]}, {**facts["environment"], "expansion": {"low": "x"}}):
        (copy / "config.json").write_text(json.dumps({**facts, "environment": damage or None}))
        with pytest.raises(ModelError, match="is damaged"):
            load_model(copy)


def test_a_model_that_reads_covariates_stands_on_their_rung(
    scene: TinyScene, trained: Path, tmp_path: Path
) -> None:
    made = evaluate(trained, data=scene.chips, out=tmp_path / "evaluation")
    assert made.result["head"] == WITH_COVARIATES
    assert WITH_COVARIATES not in made.result["differences"]
    found = made.result["rungs"][WITH_COVARIATES]["taxa"][TAXA[0].name]
    assert found["informative"] and found["auc_mean"] > found["auc_null"], "it follows moisture"
    page = made.html.read_text()
    assert "Covariates: moisture" in page and "Embedding + covariates + head minus each" in page


@pytest.mark.parametrize("loss", ["assume_negative", "poisson", "weighted_logistic"])
def test_every_loss_fits_heads_on_covariates(
    scene: TinyScene, moisture: Path, base: Path, tmp_path: Path, loss: str
) -> None:
    config = settings(scene, base, covariates=[str(moisture)])
    del config["validation"]
    train(load_config({**config, "head": {"loss": loss}}), tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.environment is not None and model.head.covariates is not None
    wet, dry = model.environment.features(np.array([[100.0], [0.0]]))
    gain = (wet - dry) @ model.head.covariates.detach().numpy().T
    assert gain[0] > 0.5 > max(gain[1], gain[2])


def test_the_command_line_takes_covariates() -> None:
    from speciesmap.cli.predict import command as predicts
    from speciesmap.cli.train import command as trains

    for command in (predicts, trains):
        assert "--covariates" in CliRunner().invoke(command, ["--help"]).output
    with pytest.raises(ConfigError, match="stage finetune"):
        load_config(
            {
                "stage": "pretrain",
                "data": {"imagery": "a.tif", "covariates": ["b.tif"]},
                "model": {"aerial": {"backbone": "test_resnet"}},
            }
        )
