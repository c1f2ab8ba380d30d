"""Uncertainty, applicability, thresholds and calibration: fixed at training, kept, and mapped."""

from __future__ import annotations

import json
import logging
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
import torch.nn.functional as F
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from scipy.special import expit
from tiny import TAXA, tiny_model, tiny_scene

from speciesmap.atlas import predict
from speciesmap.config import load_config
from speciesmap.datasets.paired import open_paired
from speciesmap.errors import ObservationsError
from speciesmap.learning.data import PairedRows
from speciesmap.learning.heads import where
from speciesmap.learning.surveys import clear_of, read_surveys, surveyed_places
from speciesmap.learning.train import train
from speciesmap.learning.trust import measure_trust, thresholds
from speciesmap.mapping.applicability import applicable, dissimilarity, learn_applicability
from speciesmap.mapping.query import score, spread, taxon_query
from speciesmap.mapping.ranges import draw_range
from speciesmap.models import load_model, read_facts, save_model
from speciesmap.rasters.geotiff import MapWriter
from speciesmap.rasters.imagery import Imagery, open_imagery
from speciesmap.statistics.calibration import calibrate_on_surveys


def unit(rng: np.random.Generator, rows: int, dim: int = 16) -> torch.Tensor:
    return F.normalize(torch.from_numpy(rng.normal(size=(rows, dim))).float(), dim=1)


def test_dissimilarity_is_the_distance_to_the_nearest_over_the_mean_between() -> None:
    rng = np.random.default_rng(0)
    trained, there = unit(rng, 60), unit(rng, 20)  # 16 dimensions: the axes span all
    known = learn_applicability(trained, np.arange(60) % 3, rng)
    assert known is not None
    between = torch.cdist(trained, trained)
    mean = float(between.sum() / (60 * 59))
    assert known.mean_distance == pytest.approx(mean, rel=1e-4)
    wanted = torch.cdist(there, trained).amin(1) / mean
    assert dissimilarity(there.numpy(), known) == pytest.approx(wanted.numpy(), abs=2e-3)
    fold = torch.arange(60) % 3
    index = (between + 9 * (fold[:, None] == fold)).amin(1).numpy() / mean
    lower, upper = np.quantile(index, [0.25, 0.75])
    limit = upper + 1.5 * (upper - lower)
    assert known.threshold == pytest.approx(index[index <= limit].max(), abs=2e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(40, 90))
def test_distances_along_axes_never_overstate(seed: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    trained, there = unit(rng, 80, dim), unit(rng, 10, dim)
    known = learn_applicability(trained, np.arange(80) % 4, rng)
    assert known is not None
    exact = torch.cdist(there, trained).amin(1).numpy() / known.mean_distance
    assert (dissimilarity(there.numpy(), known) <= exact + 1e-3).all()


def test_what_training_never_saw_is_outside_and_what_it_saw_is_inside() -> None:
    rng = np.random.default_rng(0)
    mean = torch.zeros(16)
    mean[0] = 3.0
    seen = F.normalize(torch.from_numpy(rng.normal(size=(400, 16))).float() + mean, dim=1)
    other = F.normalize(torch.from_numpy(rng.normal(size=(200, 16))).float() - mean, dim=1)
    known = learn_applicability(seen[:300], np.arange(300) % 5, rng)
    assert known is not None
    assert applicable(seen[300:].numpy(), known).mean() > 0.9
    assert applicable(other.numpy(), known).mean() < 0.05
    holes = seen[:4].numpy().reshape(2, 2, 16).copy()
    holes[0, 1] = np.nan
    found = applicable(holes, known)
    assert np.isnan(found[0, 1]) and found[1, 1] == 1


def test_one_fold_or_places_all_alike_measure_nothing() -> None:
    rng = np.random.default_rng(0)
    assert learn_applicability(unit(rng, 20), np.zeros(20), rng) is None
    assert learn_applicability(unit(rng, 1).repeat(20, 1), np.arange(20), rng) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(0, 100))
def test_thresholds_omit_what_their_names_say(values: list[float], seed: int) -> None:
    here = np.array(values)
    away = np.random.default_rng(seed).random(50)
    found = thresholds(here, away)
    assert next(iter(found)) == "5th percentile of presences"
    assert (here < found["5th percentile of presences"]).mean() <= 0.05 + 1e-9
    assert (here < found["10th percentile of presences"]).mean() <= 0.10 + 1e-9
    assert found["5th percentile of presences"] <= found["10th percentile of presences"]


def trusted(seed: int = 0, presences: int = 60) -> Any:
    """A model whose taxa live where the first three coordinates are high, and its trust."""
    rng = np.random.default_rng(seed)
    model = tiny_model()
    labels = np.arange(presences * 3) % 3
    here = unit(rng, len(labels)) + 1.2 * torch.eye(3, 16)[torch.from_numpy(labels)]
    here, away = F.normalize(here, dim=1), unit(rng, 400)
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(3, 16))
    values = {}
    with torch.inference_mode():
        logits = model.head(torch.cat([here, away])).double().numpy()
    for k, taxon in enumerate(TAXA):
        value = expit(logits[:, k])
        values[taxon.name] = value[: len(here)][labels == k], value[len(here) :]
    fold = rng.integers(0, 4, len(here) + len(away))
    model.trust = measure_trust(model, here, labels, away, fold, values, {}, seed)
    return model, away


def test_members_are_on_the_scale_of_the_map_and_differ() -> None:
    model, away = trusted()
    assert model.trust.weight.shape == (3, 8, 16)
    query = taxon_query(model, TAXA[0].name)
    mapped = score(away.numpy(), [query])[0]
    logits = away.numpy() @ query.members.T + query.member_offsets
    own = query.gain * (away.numpy() @ query.vector) + query.offset
    assert logits.mean(0) == pytest.approx(np.full(8, own.mean()), abs=1e-3)
    assert logits.std(0) == pytest.approx(np.full(8, own.std()), rel=1e-3)
    assert np.corrcoef(expit(logits).mean(1), mapped)[0, 1] > 0.9
    wanted = expit(logits).std(1, ddof=1)
    assert spread(away.numpy(), query) == pytest.approx(wanted, abs=1e-5)
    assert wanted.mean() > 0.001


def test_more_records_leave_less_uncertainty() -> None:
    few, away = trusted(presences=8)
    many, _ = trusted(presences=300)
    name = TAXA[1].name
    uncertain = [spread(away.numpy(), taxon_query(m, name)).mean() for m in (few, many)]
    assert uncertain[1] < uncertain[0]


def test_a_taxon_with_few_presences_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = trusted(presences=8)
    with caplog.at_level(logging.WARNING, logger="speciesmap"):
        taxon_query(model, TAXA[0].name)
    assert "learned from 8 presences, fewer than 25" in caplog.text
    model.trust = replace(model.trust, uninformative=[TAXA[1].name])
    assert "fewer than" in taxon_query(model, TAXA[0].name).caution
    assert (
        "no better than chance, or than maps of random records"
        in taxon_query(model, TAXA[1].name).caution
    )
    assert "null maps" not in taxon_query(model, TAXA[2].name).caution


def test_trust_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    model, away = trusted()
    model.trust = replace(model.trust, curves={TAXA[0].name: ([0.1, 0.9], [0.0, 0.5])})
    loaded = load_model(save_model(model, tmp_path / "model", {}))
    assert loaded.trust is not None
    assert loaded.trust.thresholds == model.trust.thresholds
    assert loaded.trust.presences == model.trust.presences
    a, b = (taxon_query(m, TAXA[0].name) for m in (model, loaded))
    assert np.array_equal(score(away.numpy(), [a]), score(away.numpy(), [b]))
    assert np.array_equal(spread(away.numpy(), a), spread(away.numpy(), b))
    x, y = (applicable(away.numpy(), m.trust.applicability) for m in (model, loaded))
    assert np.array_equal(x, y)
    assert score(away.numpy(), [b]).max() <= 0.5


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_surveys_calibrate(method: Any) -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 6000)
    truth = expit(0.5 * logit - 1)
    surveys = pd.DataFrame({"taxon": TAXA[0].name, "present": rng.random(6000) < truth})
    logits = np.column_stack([logit, logit, logit])
    found, curves = calibrate_on_surveys(logits, surveys, TAXA, method)
    assert set(found) == {TAXA[0].name}
    c = found[TAXA[0].name]
    said = expit(c.slope * logit + c.intercept)
    if method == "isotonic":
        said = np.interp(said, *curves[TAXA[0].name])
    assert np.abs(said - truth).mean() < 0.03
    assert c.prevalence == pytest.approx(truth.mean(), abs=0.03)


def test_surveys_that_contradict_the_map_calibrate_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logit = np.linspace(-2, 2, 200)
    surveys = pd.DataFrame({"taxon": TAXA[0].name, "present": logit < 0})
    with caplog.at_level(logging.WARNING, logger="speciesmap"):
        assert calibrate_on_surveys(logit[:, None], surveys, TAXA[:1], "platt") == ({}, {})
    assert "surveys contradict its map" in caplog.text


def test_sites_that_share_ground_with_training_are_told(tmp_path: Path) -> None:
    here = np.array([100.0, 116.0, 117.0, 300.0])
    trained = np.array([100.0]), np.array([50.0])
    assert clear_of(here, np.full(4, 50.0), *trained, 17).tolist() == [False, False, True, True]


def test_surveys_on_ground_that_any_crop_of_a_chip_may_show_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = tiny_scene(tmp_path)
    imagery, dataset = open_imagery(scene.imagery), open_paired(scene.chips)
    model = tiny_model()
    presences = PairedRows(dataset, np.arange(1), dataset.taxa, None, model.window_px)
    row, col = (float(v[0]) for v in imagery.rowcol(*where(presences)))
    apart_px = (dataset.window_px + model.window_px) / 2
    lon, lat = imagery.xy([row] * 2, [col - apart_px - 0.5, col - apart_px - 1.5])
    table = pd.DataFrame({"lon": [*lon, 200.0], "lat": [*lat, 95.0], "taxon": "a", "present": 1})
    kept, _ = surveyed_places(model, table, presences, imagery)
    assert kept.index.tolist() == [1]
    assert "2 of 3 surveys are left out: 1 are not on" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lon,lat,taxon\n1,2,a\n", "lack the column 'present'"),
        ("lon,lat,taxon,present\n1,2,a,1\n1,x,a,0\n", "row 1 has no position"),
        ("lon,lat,taxon,present\n1,2,a,7\n", "row 0 has no position or a `present`"),
    ],
)
def test_bad_surveys_are_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ObservationsError, match=message):
        read_surveys(tmp_path / "s.csv")
    with pytest.raises(ObservationsError, match="cannot be read"):
        read_surveys(tmp_path / "none.csv")


def test_a_range_is_where_the_map_reaches_its_threshold_inside_the_known(tmp_path: Path) -> None:
    grid = GeoBox.from_bbox((550_000, 4_180_000, 550_400, 4_180_300), "EPSG:32610", resolution=100)
    values = np.array([[0.1, 0.6, 0.7, 0.9], [0.1, 0.2, np.nan, 0.9], [0.8, 0.1, 0.1, 0.9]])
    known = np.ones((3, 4))
    known[:, 3] = 0
    path = tmp_path / "map.tif"
    with MapWriter(path, grid, bands=["suitability", "applicability"], tags={}) as writer:
        writer.write(0, 0, np.stack([values, known]).astype(np.float32))
    found = draw_range(path, "Quercus <lobata>", {"low": 0.55, "none": 0.95})
    assert found["taxon"].tolist() == ["Quercus <lobata>"] * 2
    assert found.geometry.area.tolist() == [30_000, 0]
    assert found["area_km2"][0] == pytest.approx(0.03, rel=0.01)
    assert found["threshold"].tolist() == [0.55, 0.95]
    assert found["quantity"].tolist() == ["suitability"] * 2
    assert found.geometry[1].is_empty


def test_a_range_is_the_same_in_however_many_parts_the_map_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 50
    grid = GeoBox((side, side), Affine(30, 0, 550_000, 0, -30, 4_180_000), "EPSG:32610")
    bands = np.random.default_rng(0).uniform(size=(3, side, side)).astype(np.float32)
    bands[2] = bands[2] > 0.2
    bands[0, 5:9] = np.nan
    path = tmp_path / "map.tif"
    names = ["probability", "uncertainty", "applicability"]
    with MapWriter(path, grid, bands=names, tags={}) as writer:
        writer.write(0, 0, bands)
    read, sizes = Imagery.read, []

    def counted(self: Imagery, row: int, col: int, height: int, width: int) -> Any:
        sizes.append((len(self.bands), height, width))
        return read(self, row, col, height, width)

    monkeypatch.setattr(Imagery, "read", counted)
    thresholds = {"low": 0.3, "high": 0.8}
    whole = draw_range(path, "a", thresholds)
    monkeypatch.setattr("speciesmap.mapping.ranges.TILE_PX", 16)
    sizes.clear()
    parts = draw_range(path, "a", thresholds)
    assert max(sizes) == (2, 16, 16), "never more of the map in memory, nor bands that are not used"
    for one, other, threshold in zip(
        whole.geometry, parts.geometry, thresholds.values(), strict=True
    ):
        assert one.equals(other) and len(one.geoms) == len(other.geoms)
        cells = ((bands[0] >= threshold) & (bands[2] > 0)).sum()
        assert other.area == pytest.approx(900 * cells)
    assert parts["area_km2"].tolist() == pytest.approx(whole["area_km2"].tolist())
    assert parts["quantity"].tolist() == ["probability"] * 2


def test_a_trained_model_maps_all_of_it(tmp_path: Path) -> None:
    """From training to files: bands, ranges, richness, and what run.json says."""
    scene = tiny_scene(tmp_path, rows=60, photos=False)
    base = save_model(tiny_model(ground=None, text=None, bands=4), tmp_path / "base", {})
    facts = json.loads((base / "config.json").read_text())
    facts["architecture"]["bands"] = ["red", "green", "blue", "nir"]
    (base / "config.json").write_text(json.dumps(facts))
    settings_ = {
        "stage": "finetune",
        "init": str(base),
        "data": {
            "dataset": str(scene.chips),
            "imagery": str(scene.imagery),
            "background": 80,
        },
        "validation": {"folds": 2, "block_m": 40, "prevalence": 0.2},
        "optim": {"epochs": 1, "batch_size": 16},
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
    }
    model = train(load_config(settings_), tmp_path / "model")
    trust = read_facts(model)["trust"]
    assert trust["presences"] == {taxon.name: 20 for taxon in TAXA}
    assert trust["applicability"]["threshold"] > 0
    made = predict(
        model, imagery=scene.imagery, out=tmp_path / "maps", stride_px=8, qgis_project=True
    )
    for m in made.maps:
        with rasterio.open(m.path) as raster:
            assert raster.descriptions == ("probability", "uncertainty", "applicability")
            assert "learned from 20 presences" in raster.tags()["CAUTION"]
            value, uncertainty, inside = raster.read()
        there = np.isfinite(value)
        assert there.any()
        assert (uncertainty[there] >= 0).all() and (uncertainty[there] < 0.5).all()
        assert set(np.unique(inside[there])) <= {0.0, 1.0}
    opened = made.to_xarray()
    assert opened.rio.crs.to_epsg() == 32610
    stem = made.maps[0].path.stem
    assert opened[stem].attrs["long_name"] == made.maps[0].query.label
    with rasterio.open(made.maps[0].path) as raster:
        for k, name in enumerate((stem, f"{stem}_uncertainty", f"{stem}_applicability"), 1):
            np.testing.assert_array_equal(opened[name].values, raster.read(k))
    with rasterio.open(made.path / "richness.tif") as raster:
        total = raster.read(1)
    layers = [rasterio.open(m.path).read(1) for m in made.maps]
    known = np.isfinite(total)
    assert total[known] == pytest.approx(np.sum(layers, axis=0)[known], abs=1e-5)
    assert "Species richness (richness)" in (made.path / "richness.qml").read_text()
    assert '"label":"Species richness"' in made.html.read_text()
    with zipfile.ZipFile(made.path / "maps.qgz") as project:
        assert b"./richness.tif" in project.read("maps.qgs")
        assert b"./ranges.gpkg|layername=ranges" in project.read("maps.qgs")
    ranges = gpd.read_file(made.path / "ranges.gpkg", layer="ranges")
    styles = gpd.read_file(made.path / "ranges.gpkg", layer="layer_styles")
    assert all(taxon.name in styles["styleQML"].item() for taxon in TAXA)
    assert len(ranges) == 9
    assert ranges.crs == "EPSG:32610"
    assert set(ranges["rule"]) == set(next(iter(trust["thresholds"].values())))
    run = json.loads(made.run.read_text())
    for name, facts in run["maps"].items():
        assert facts["thresholds"] == trust["thresholds"][facts["label"]], name
        assert "fewer than 25" in facts["caution"]
    again = predict(model, store=made.store, out=tmp_path / "again", species=[TAXA[0].name])
    first = ranges[ranges["taxon"] == TAXA[0].name]["threshold"].tolist()
    assert gpd.read_file(again.path / "ranges.gpkg", layer="ranges")["threshold"].tolist() == first
    assert not (again.path / "richness.tif").exists()
