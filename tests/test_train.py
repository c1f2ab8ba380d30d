"""Training: a configuration in, a checkpoint out; whole or not at all; the same seed, the same."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
import yaml
from affine import Affine
from forks import ended, start
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from odc.geo.geobox import GeoBox
from pyproj import Geod
from rasterio.transform import from_origin
from tiny import BANDS, SIDE, TAXA, TinyScene, tiny_model, tiny_scene
from torch import Tensor

from speciesmap.cli import main
from speciesmap.config import FinetuneConfig, load_config
from speciesmap.datasets.paired import PairedDataset, open_paired
from speciesmap.describe import describe
from speciesmap.errors import (
    ConfigError,
    DatasetError,
    ModelError,
    ObservationsError,
    OutputError,
)
from speciesmap.learning import crossview
from speciesmap.learning.data import PairedRows, Places
from speciesmap.learning.finetune import check_validation, refuse_elsewhere
from speciesmap.learning.fit import ByPlace, best_precision, measure, set_reference
from speciesmap.learning.heads import fit_heads
from speciesmap.learning.modules import Crisp, Finetune
from speciesmap.learning.pretrain import build
from speciesmap.learning.seen import ENOUGH, KEPT, NOTHING, sample_seen, share_seen
from speciesmap.learning.sources import Sources, draw_background, open_sources, target_group_places
from speciesmap.learning.train import told, train
from speciesmap.learning.validation import FOLDS, make_folds, rows_to_train_on
from speciesmap.models import load_model, read_facts, save_model
from speciesmap.observations.folds import kmeans_folds
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import open_imagery
from speciesmap.taxa import Taxon, words

NAMES = [taxon.name for taxon in TAXA]
CPU = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> TinyScene:
    return tiny_scene(tmp_path_factory.mktemp("scene"))


def crisp(scene: TinyScene, **changes: Any) -> dict[str, Any]:
    base = {
        "stage": "pretrain",
        "data": {"dataset": str(scene.chips)},
        "model": {
            "dim": 16,
            "aerial": {"backbone": "test_resnet"},
            "ground": {"backbone": "test_resnet", "image_px": 16},
            "text": {"width": 16, "layers": 1, "heads": 2},
        },
        "optim": {"epochs": 2, "batch_size": 12},
        "trainer": CPU,
    }
    return {**base, **changes}


def tune(scene: TinyScene, init: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "stage": "finetune",
        "init": str(init),
        "data": {
            "dataset": str(scene.chips),
            "imagery": str(scene.imagery),
            "background": 30,
        },
        "optim": {"epochs": 1, "batch_size": 12},
        "trainer": CPU,
    }
    return {**base, **changes}


@pytest.fixture(scope="module")
def pretrained(scene: TinyScene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(load_config(crisp(scene)), tmp_path_factory.mktemp("runs") / "pretrained")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start for fine-tuning, without the time to train one."""
    model = tiny_model(taxa=(), bands=4)
    object.__setattr__(model.architecture, "bands", BANDS)
    return save_model(model, tmp_path_factory.mktemp("runs") / "untrained", {})


def weights(run: Path) -> dict[str, Tensor]:
    return load_model(run).state_dict()


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pretraining_makes_a_joint_space_of_the_data(scene: TinyScene, pretrained: Path) -> None:
    model = load_model(pretrained)
    assert model.bands == BANDS
    assert (model.window_px, model.resolution_m, model.taxa) == (16, 1.0, ())
    assert len(model.reference) == 36
    assert torch.allclose(model.reference.norm(dim=1), torch.ones(36), atol=1e-2)
    pixels = open_sources(load_config(crisp(scene)).data).dataset
    assert pixels is not None
    bands = pixels.aerial().astype(float)
    assert model.architecture.mean == pytest.approx(bands.mean((0, 2, 3)), rel=1e-3)
    assert model.architecture.std == pytest.approx(bands.std((0, 2, 3)), rel=1e-3)
    facts = read_facts(pretrained)
    assert facts["metrics"]["steps"] == 6
    assert set(facts["metrics"]["losses"]) >= {"aerial_ground", "aerial_text", "ground_text"}
    assert facts["training"]["method"] == "crisp"


def test_a_run_counts_its_epochs_from_one_and_ends_by_telling_how_good_it_is(
    scene: TinyScene,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO, "speciesmap")
    caplog.set_level(logging.INFO, "lightning.pytorch")
    run = train(load_config(crisp(scene)), tmp_path / "pretrained")
    assert {record.name for record in caplog.records} == {"speciesmap"}, "Lightning is silent"
    assert logging.getLogger("lightning.pytorch").level == logging.INFO, "and free again"
    assert re.findall(r"Epoch (\S+)", capsys.readouterr().err) == ["1/2", "2/2"]
    loss = read_facts(run)["metrics"]["losses"]["loss"]
    assert caplog.messages[-1] == f"training: loss {loss:.3g} after 6 steps"
    validation = {"folds": 2, "block_m": 40}
    tuned = train(load_config(tune(scene, run, validation=validation)), tmp_path / "tuned")
    judged = read_facts(tuned)["metrics"]["validation"].values()
    mean = sum(facts["auc"] for facts in judged) / 3
    words = f"validation on held-out folds: AUC {mean:.2f} (mean of 3 taxa"
    assert caplog.messages[-1].startswith(words)
    assert caplog.messages[-1].endswith(")")


@pytest.mark.parametrize(
    ("taxa", "line"),
    [
        ({"a": (0.75, True), "b": (None, None)}, "AUC 0.75 (a)"),
        (
            {"a": (0.9, True), "b": (0.5, False)},
            "AUC 0.70 (mean of 2 taxa; 1 of them uninformative)",
        ),
        ({"a": (0.5, False)}, "AUC 0.50 (a; uninformative)"),
    ],
)
def test_validation_is_summed_up_over_the_taxa_that_it_judged(
    taxa: dict[str, tuple[float | None, bool | None]], line: str
) -> None:
    judged = {name: {"auc": auc, "informative": verdict} for name, (auc, verdict) in taxa.items()}
    said = told({"losses": {"loss": 1.0}, "steps": 3, "validation": judged})
    assert said == f"validation on held-out folds: {line}"


def test_what_nothing_judged_says_how_far_it_came() -> None:
    nobody = {"a": {"auc": None, "informative": None}}
    metrics = {"losses": {"loss": 0.51234}, "steps": 3, "validation": nobody}
    assert told(metrics) == "training: loss 0.512 after 3 steps"
    assert told({"penalty": 0.1}) == "training: heads at their optimum"


def test_a_run_holds_no_pickle_and_nothing_is_left_beside_it(pretrained: Path) -> None:
    assert everything(pretrained.parent) == ["pretrained"]
    kinds = {path.suffix for path in pretrained.rglob("*") if path.is_file()}
    assert not kinds & {".ckpt", ".pt", ".pth", ".pkl", ".bin"}
    assert {".safetensors", ".json", ".yaml"} <= kinds
    described = yaml.safe_load((pretrained / "config.yaml").read_text())
    assert load_config(described) == load_config(pretrained / "config.yaml")


def test_finetuning_validates_by_folds_and_calibrates(
    scene: TinyScene, pretrained: Path, tmp_path: Path
) -> None:
    stated = {NAMES[0]: 0.2, NAMES[2]: 0.4}
    config = tune(scene, pretrained, validation={"folds": 2, "block_m": 40, "prevalence": stated})
    run = train(load_config(config), tmp_path / "tuned")
    model = load_model(run)
    assert model.taxa == TAXA
    assert set(model.names) == {*NAMES, *(name for taxon in TAXA for name in taxon.lineage)}
    assert model.prevalence == stated
    assert model.fingerprint != load_model(pretrained).fingerprint
    validation = read_facts(run)["metrics"]["validation"]
    assert set(validation) == set(NAMES)
    assert all(len(facts["auc_folds"]) == 2 for facts in validation.values())
    folds = pd.read_parquet(run / "folds.parquet")
    assert len(folds) == 36 + 30
    assert (folds["taxon"] == "").sum() == 30
    assert folds[NAMES].notna().all().all()
    for _, part in folds.groupby("fold"):
        rest = len(folds) - len(part)
        assert 0 < part["trained"].iloc[0] <= rest
        assert part["trained"].nunique() == 1

    from speciesmap.mapping.query import taxon_query

    assert taxon_query(model, NAMES[0]).quantity == "probability"
    assert taxon_query(model, NAMES[1]).quantity == "suitability"


def test_blocks_are_as_wide_as_high_on_imagery_in_degrees(
    scene: TinyScene, untrained: Path, tmp_path: Path
) -> None:
    grid = GeoBox((240, 240), from_origin(10, 60, 0.001, 0.001), "EPSG:4326")  # 56 x 111 m
    pixels = np.full((1, *grid.shape), 9, np.uint8)
    imagery = open_imagery(write_geotiff(tmp_path / "a.tif", pixels, grid, bands=["red"]))
    row, col = (v.ravel() + 0.5 for v in np.meshgrid(range(240), range(240), indexing="ij"))
    changes = tune(scene, untrained, validation={"folds": 9, "block_m": 4000})
    places = Places(imagery, row, col, 8, [0.0])
    folds = make_folds(row, col, len(row), places, load_config(changes)).reshape(240, 240)
    down = np.flatnonzero((np.diff(folds, axis=0) != 0).any(1))
    across = np.flatnonzero((np.diff(folds, axis=1) != 0).any(0))
    assert np.diff(down).mean() * 111.4 == pytest.approx(4000, rel=0.05)
    assert np.diff(across).mean() * 55.9 == pytest.approx(4000, rel=0.05)


def test_regions_are_of_the_ground_on_imagery_in_degrees(
    scene: TinyScene, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far north, where four degrees across are as far as one down."""
    grid = GeoBox((100, 400), from_origin(10, 76, 0.01, 0.01), "EPSG:4326")
    pixels = np.full((4, *grid.shape), 9, np.uint8)
    imagery = open_imagery(write_geotiff(tmp_path / "a.tif", pixels, grid, bands=BANDS))
    rng = np.random.default_rng(0)
    dataset = open_paired(scene.chips)
    there = {"longitude": rng.uniform(10.2, 13.8, 36), "latitude": rng.uniform(75.2, 75.8, 36)}
    presences = PairedRows(
        replace(dataset, facts=dataset.facts.assign(**there)), np.arange(36), TAXA, None, 16
    )
    background = draw_background(imagery, 16, 40, rng)
    config = load_config(tune(scene, untrained, validation={"method": "kmeans", "folds": 4}))
    assert isinstance(config, FinetuneConfig)
    given: list[Any] = []

    def spied(x_m: Any, y_m: Any, **options: Any) -> Any:
        given.append((x_m, y_m))
        return kmeans_folds(x_m, y_m, **options)

    for room in ("heads", "validation"):
        monkeypatch.setattr(f"speciesmap.learning.{room}.kmeans_folds", spied)
    model = load_model(untrained)
    model.taxa = TAXA
    fit_heads(model, presences, background, None, None, config)
    make_folds(*imagery.rowcol(*there.values()), 36, background, config)
    first, others = np.zeros(35, int), np.arange(1, 36)
    lonlat = [there[axis][rows] for rows in (first, others) for axis in there]
    distance = Geod(ellps="WGS84").inv(*lonlat)[2]
    assert len(given) == 2
    for x, y in given:
        measured = np.hypot(x[1:36] - x[0], y[1:36] - y[0])
        assert measured == pytest.approx(distance, rel=0.05)


def test_taxa_that_a_fold_leaves_none_of_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """The first seven have one record each, the eighth is in every fold."""
    taxon = np.r_[np.arange(7), np.full(8, 7), np.full(8, -1)]
    place, fold = np.arange(len(taxon)) * 10.0, np.arange(len(taxon)) % 4
    uses = rows_to_train_on(place, place, fold, 4, taxon, "ABCDEFGH")
    assert [int(use.sum()) for use in uses.values()] == [17, 17, 17, 18]
    assert "no record of A, B, C, D, E and 2 more to train on" in caplog.text
    caplog.clear()
    rows_to_train_on(place[7:], place[7:], fold[7:], 4, taxon[7:], "ABCDEFGH")
    assert not caplog.text


@pytest.mark.parametrize("biased", [False, True])
def test_a_prevalence_is_of_the_area_whatever_background_was_trained_on(
    scene: TinyScene,
    untrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    biased: bool,
) -> None:
    asked = []

    def watched(folds: pd.DataFrame, taxa: Any, prevalence: Any) -> dict[str, Any]:
        asked.append((set(folds["background"]), prevalence))
        return {}

    monkeypatch.setattr("speciesmap.learning.finetune.calibrate", watched)
    changes = tune(scene, untrained, freeze_encoder=True, align=0.0)
    changes["validation"] = {"folds": 2, "block_m": 40, "prevalence": 0.2}
    if biased:
        grid = open_imagery(scene.imagery).geobox
        effort = np.ones((1, *grid.shape), np.float32)
        changes["data"]["bias"] = str(
            write_geotiff(tmp_path / "effort.tif", effort, grid, bands=["effort"])
        )
    else:
        changes["data"]["background_kind"] = "target-group"
    run = train(load_config(changes), tmp_path / "run")
    assert asked == [({"", "random"}, 0.2)]
    kinds = set(pd.read_parquet(run / "folds.parquet")["background"])
    assert kinds == {"", "random", "biased" if biased else "target-group"}
    judged = read_facts(run)["metrics"]["validation"].values()
    assert all(facts["auc_random"] is not None for facts in judged)


@pytest.mark.parametrize(
    ("method", "kind", "file"),
    [("kmeans", "random", True), ("knndm", "target-group", False), ("blocks", "random", False)],
)
def test_both_kinds_of_background_are_evaluated_whatever_makes_the_folds(
    scene: TinyScene, untrained: Path, tmp_path: Path, method: str, kind: str, file: bool
) -> None:
    changes = tune(scene, untrained, freeze_encoder=True, align=0.0)
    changes["validation"] = {"folds": 2, "method": method, "block_m": 40}
    changes["data"]["background_kind"] = kind
    height, width = open_imagery(scene.imagery).shape
    if file:
        rows, cols = np.random.default_rng(0).uniform(0, 1, (2, 90)) * [[height], [width]]
        x, y = open_imagery(scene.imagery).xy(rows, cols)
        text = [f"{lon},{lat},{k % 2}" for k, (lon, lat) in enumerate(zip(x, y, strict=True))]
        group = tmp_path / "group.csv"
        group.write_text("longitude,latitude,obscured\n" + "\n".join(text) + "\n")
        changes["data"]["target_group"] = str(group)
    run = train(load_config(changes), tmp_path / "run")
    folds = pd.read_parquet(run / "folds.parquet")
    counts = folds["background"].value_counts().to_dict()
    assert counts[""] == 36 and counts["random"] == 30
    if method == "blocks":
        assert "target-group" not in counts, "the other taxa's records are the group"
    else:
        assert 2 <= counts["target-group"] <= (45 if file else 36), "one per cell, none obscured"
    assert set(folds["fold"]) == {0, 1}
    known = open_paired(scene.chips).facts["observation_uuid"]
    assert folds["observation_id"].tolist()[:36] == known.tolist()
    assert (folds["taxon"] == "").equals(folds["background"] != "")
    for facts in read_facts(run)["metrics"]["validation"].values():
        assert facts["auc_random"] is not None and facts["auc_target_group"] is not None
        assert facts["auc"] == facts["auc_" + kind.replace("-", "_")]
    trained_on = folds["background"].isin(["", kind])
    for k in (0, 1):
        held = folds["fold"] == k
        assert 0 < folds["trained"][held].iloc[0] <= (trained_on & ~held).sum()


def test_places_of_the_group_without_a_valid_window_are_no_background(
    scene: TinyScene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = open_imagery(scene.imagery)
    pixels, _ = whole.read(0, 0, *whole.shape)
    pixels[:, :, : whole.shape[1] // 2] = 0
    half = tmp_path / "half.tif"
    write_geotiff(half, pixels, whole.geobox, bands=whole.bands, nodata=0)
    config = load_config(
        {
            "stage": "finetune",
            "init": "m",
            "data": {"dataset": str(scene.chips), "imagery": str(half)},
        }
    )
    sources = open_sources(config.data)
    with caplog.at_level(logging.INFO, logger="speciesmap"):
        places = target_group_places(sources, None, (0.0,) * len(whole.bands))
    assert len(places) > 1 and (places.cols >= whole.shape[1] // 2).all()
    assert "places of the group of all taxa have a valid window" in caplog.text


def test_a_file_of_background_gives_its_places_on_the_imagery(
    scene: TinyScene, tmp_path: Path
) -> None:
    imagery = open_imagery(scene.imagery)
    x, y = imagery.xy([20.5, 30.5, -500.0], [40.5, 50.5, 10.0])
    path = tmp_path / "away.csv"
    rows = [f"{lon},{lat},0" for lon, lat in zip(x, y, strict=True)]
    path.write_text("\n".join(["longitude,latitude,presence", *rows]) + "\n")
    places = draw_background(imagery, 16, str(path), np.random.default_rng(0))
    np.testing.assert_allclose([places.rows, places.cols], [[20.5, 30.5], [40.5, 50.5]], atol=1e-6)
    path.write_text(f"longitude,latitude\n{x[2]},{y[2]}\n")
    with pytest.raises(ObservationsError, match="none of the 1 places of"):
        draw_background(imagery, 16, str(path), np.random.default_rng(0))


def test_a_frozen_encoder_keeps_its_embeddings(
    scene: TinyScene, untrained: Path, tmp_path: Path
) -> None:
    config = tune(scene, untrained, freeze_encoder=True, align=0.0)
    before, after = load_model(untrained), load_model(train(load_config(config), tmp_path / "run"))
    for (name, old), new in zip(
        before.aerial.named_parameters(), after.aerial.parameters(), strict=True
    ):
        assert torch.equal(old, new), name
    assert all(parameter.requires_grad for parameter in after.parameters())


def test_a_text_tower_that_is_trained_further_learns_the_names_beside_those_it_knew(
    scene: TinyScene, untrained: Path, tmp_path: Path
) -> None:
    base = load_model(untrained)
    base.names = ("Fagaceae", "Fagus sylvatica")
    start = save_model(base, tmp_path / "start", {})
    frozen = train(load_config(tune(scene, start, freeze_encoder=True)), tmp_path / "frozen")
    assert load_model(frozen).names == base.names
    moved = load_model(train(load_config(tune(scene, start)), tmp_path / "moved")).names
    assert moved[:2] == base.names
    assert {*NAMES, "Pinaceae"} < set(moved)
    assert len(set(moved)) == len(moved)


def test_the_same_seed_gives_the_same_weights(scene: TinyScene, tmp_path: Path) -> None:
    first = weights(train(load_config(crisp(scene)), tmp_path / "first"))
    torch.rand(7)
    np.random.default_rng().random()
    again = weights(train(load_config(crisp(scene)), tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = weights(train(load_config(crisp(scene, seed=1)), tmp_path / "other"))
    assert not torch.equal(first["aerial.project.weight"], other["aerial.project.weight"])


def test_band_statistics_are_of_valid_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    pixels = rng.integers(100, 140, (2, SIDE, SIDE)).astype(np.uint8)
    pixels[:, :, np.arange(SIDE) % 8 < 3] = 0
    grid = GeoBox((SIDE, SIDE), Affine(1, 0, 550_000, 0, -1, 4_180_000), "EPSG:32610")
    holed = write_geotiff(tmp_path / "holed.tif", pixels, grid, bands=("red", "nir"), nodata=0)
    sources = open_sources(load_config(mae(TinyScene(holed, tmp_path))).data)
    assert sources.imagery is not None
    places = draw_background(sources.imagery, 16, 40, rng)
    built = build(load_config(mae(TinyScene(holed, tmp_path))).model, sources, places)
    assert built.architecture.mean == pytest.approx((119.5, 119.5), abs=0.5)
    assert built.architecture.std == pytest.approx((11.5, 11.5), abs=0.3)
    values = measure(places, sources)[2]
    assert built.values == values
    assert min(cuts[0] for cuts in values.quantiles) >= 100


@pytest.mark.parametrize(("side", "quick"), [(16, False), (32, True)])
def test_towers_that_stride_over_one_pixel_learn_in_float32(
    side: int, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the gradients of such a convolution are of any value on a CPU."""
    monkeypatch.setattr("speciesmap.learning.fit.computes_bfloat16", lambda device: True)
    model = tiny_model(ground={"backbone": "test_resnet", "image_px": side}, window_px=64)
    assert best_precision("cpu", model) == ("bf16-mixed" if quick else "32-true")


def mae(scene: TinyScene, **changes: Any) -> dict[str, Any]:
    base = {
        "stage": "pretrain",
        "method": "mae",
        "data": {"imagery": str(scene.imagery), "window_px": 16, "background": 24},
        "model": {
            "dim": 16,
            "aerial": {"backbone": "test_vit", "kwargs": {"patch_size": 4}},
        },
        "masked": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
        "optim": {"epochs": 1, "batch_size": 12},
        "trainer": CPU,
    }
    return {**base, **changes}


def test_masked_pretraining_needs_only_imagery(scene: TinyScene, tmp_path: Path) -> None:
    run = train(load_config(mae(scene)), tmp_path / "mae")
    model = load_model(run)
    assert (model.bands, model.window_px) == (BANDS, 16)
    assert model.ground is None
    assert model.text is None
    assert not [name for name in model.state_dict() if "decoder" in name or "mask" in name]
    assert len(model.reference) == 24
    tuned = load_model(train(load_config(tune(scene, run)), tmp_path / "tuned"))
    assert tuned.taxa == TAXA


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_masked_windows_are_jittered_as_configured(
    scene: TinyScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jitter: float
) -> None:
    asked: set[float] = set()
    original = crossview.aerial_view

    def spy(*call: Any, **options: Any) -> Tensor:
        asked.add(options["jitter"])
        return original(*call, **options)

    monkeypatch.setattr(crossview, "aerial_view", spy)
    train(load_config(mae(scene, views={"aerial": {"jitter": jitter}})), tmp_path / "mae")
    assert asked == {jitter}


class Interrupted(Exception):
    pass


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Let CRISP's training fail at a step; gives the steps made, as a list that grows."""
    steps: list[int] = []
    original = Crisp.training_step

    def training_step(self: Crisp, batch: Any, index: int) -> Tensor:
        if len(steps) == step:
            raise Interrupted
        steps.append(index)
        return original(self, batch, index)

    monkeypatch.setattr(Crisp, "training_step", training_step)
    return steps


def test_an_interrupted_run_leaves_no_checkpoint_and_goes_on_where_it_stopped(
    scene: TinyScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(crisp(scene, optim={"epochs": 4, "batch_size": 12}))
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        steps = interrupt_at(patch, step=7)  # three steps an epoch: in the third
        with pytest.raises(Interrupted):
            train(config, out)
    assert len(steps) == 7
    assert not out.exists()
    assert everything(tmp_path) == [".run.training"]
    assert everything(tmp_path / ".run.training" / "state") == ["last.ckpt"]
    with pytest.raises(OutputError, match=r"interrupted run lies in .*--resume.*--overwrite"):
        train(config, out)
    with pytest.raises(ConfigError, match="had another configuration; pass --overwrite"):
        train(load_config(crisp(scene, seed=9)), out, resume=True)
    with monkeypatch.context() as patch:
        steps = interrupt_at(patch, step=99)
        assert train(config, out, resume=True) == out
    assert len(steps) == 6, "the two epochs that were finished are not repeated"
    assert read_facts(out)["metrics"]["steps"] == 12
    assert everything(tmp_path) == ["run"]


def test_a_run_keeps_no_credentials(
    scene: TinyScene, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an address only what names the place is kept."""
    monkeypatch.setattr(
        "speciesmap.learning.sources.open_imagery", lambda *_, **__: open_imagery(scene.imagery)
    )
    changes = tune(scene, untrained, freeze_encoder=True, align=0.0)
    changes["data"]["imagery"] = "https://me:word@example.org/a.tif?sig=secret"
    run = train(load_config(changes), tmp_path / "run")
    assert read_facts(run)["training"]["data"]["imagery"] == "https://example.org/a.tif"
    kept = b"".join(file.read_bytes() for file in run.rglob("*") if file.is_file())
    assert b"secret" not in kept and b"me:word" not in kept


def test_ctrl_c_ends_in_one_line_that_tells_how_to_go_on(scene: TinyScene, tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(crisp(scene)))
    words = ["train", str(tmp_path / "long.yaml"), "--out", str(tmp_path / "a run")]
    words += ["--set", "optim.epochs=100000"]
    printed, said = tmp_path / "out.txt", tmp_path / "err.txt"
    run = start(main, [*words, "-q"], out=printed, err=said)
    state = tmp_path / ".a run.training" / "state" / "last.ckpt"
    while not state.exists() and run.is_alive():
        time.sleep(0.05)
    while run.is_alive():  # Python forgets one that falls into a finaliser
        os.kill(run.pid or 0, signal.SIGINT)
        run.join(30)
    told = said.read_text()
    assert (ended(run), printed.read_text()) == (130, ""), told
    line, command = told.removesuffix("`\n").split("`")
    assert line == "interrupted: go on where it was last saved with "
    assert shlex.split(command) == ["speciesmap", *words, "--resume"]
    assert state.exists()


def test_ctrl_c_before_anything_is_saved_says_so(
    scene: TinyScene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(crisp(scene)))

    def ctrl_c(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Crisp, "training_step", ctrl_c)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        main(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "-q"])
    assert end.value.code == 130
    told = capsys.readouterr().err
    assert told.startswith("interrupted: nothing was saved; start again with `speciesmap train ")
    assert "--resume" not in told
    assert everything(tmp_path) == ["run.yaml"]
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_resumed_run_ends_with_the_very_weights_of_one_that_was_never_interrupted(
    scene: TinyScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(crisp(scene, optim={"epochs": 3, "batch_size": 12}))
    whole = weights(train(config, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step=4)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run")
    torch.rand(5)
    resumed = weights(train(config, tmp_path / "run", resume=True))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_interrupted_after_its_last_step_ends_with_the_very_losses(
    scene: TinyScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(crisp(scene))
    whole = read_facts(train(config, tmp_path / "whole"))["metrics"]

    def interrupted(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("speciesmap.learning.pretrain.set_reference", interrupted)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run")
    for end in (interrupted, set_reference):  # interrupted a second time before anything is saved
        monkeypatch.setattr("speciesmap.learning.pretrain.set_reference", end)
        with suppress(Interrupted):
            train(config, tmp_path / "run", resume=True)
    assert read_facts(tmp_path / "run")["metrics"] == whole


def test_a_resumed_validation_repeats_no_fold(
    scene: TinyScene, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folds = {"folds": 3, "block_m": 40}
    config = load_config(tune(scene, untrained, validation=folds, align=0.0))
    started: list[int] = []
    original = Finetune.training_step

    def training_step(self: Finetune, batch: Any, index: int) -> Tensor:
        if index == 0:
            started.append(len(started))
        if stop_at is not None and len(started) > stop_at:
            raise Interrupted
        return original(self, batch, index)

    monkeypatch.setattr(Finetune, "training_step", training_step)
    stop_at: int | None = 2
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    started.clear()
    stop_at = None
    run = train(config, tmp_path / "run", resume=True)
    assert len(started) == 2, "the last fold, and the final fit"
    assert everything(tmp_path) == ["run"]
    whole = train(config, tmp_path / "whole")
    resumed, unbroken = (pd.read_parquet(r / "folds.parquet") for r in (run, whole))
    pd.testing.assert_frame_equal(resumed, unbroken)
    assert torch.equal(weights(run)["head.weight"], weights(whole)["head.weight"])


@pytest.mark.parametrize(
    "changed",
    [
        "data.dataset",
        "data.imagery",
        "data.bias",
        "data.covariates",
        "data.background",
        "data.target_group",
        "init",
        "validation.surveys",
    ],
)
def test_a_run_is_not_resumed_on_other_data(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    def interrupted(config: Any, sources: Any, initial: Any, work: Path) -> Any:
        (work / FOLDS).mkdir(exist_ok=True)
        raise Interrupted

    monkeypatch.setattr("speciesmap.learning.train.finetune", interrupted)
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    here = tiny_scene(tmp_path / "before")
    given = {
        "data.bias": tmp_path / "bias.tif",
        "data.covariates": tmp_path / "covariates.tif",
        "data.background": tmp_path / "background.csv",
        "data.target_group": tmp_path / "archive" / "records.csv",
        "validation.surveys": tmp_path / "surveys.csv",
        "init": tmp_path / "init" / "model.safetensors",
    }
    shutil.copytree(untrained, tmp_path / "init")
    (tmp_path / "archive").mkdir()
    for path in given.values():
        if path.suffix == ".tif":
            path.write_bytes(here.imagery.read_bytes())
        elif path.suffix == ".csv":
            path.write_text("before")
    data = {
        "dataset": str(here.chips),
        "imagery": str(here.imagery),
        **(
            {"bias": str(given["data.bias"])}
            if changed == "data.bias"
            else {"background": str(given["data.background"])}
        ),
        "covariates": [f"green={given['data.covariates']}"],
        "target_group": str(tmp_path / "archive"),
    }
    folds = {"block_m": 40, "surveys": str(given["validation.surveys"])}
    config = load_config(tune(here, tmp_path / "init", data=data, validation=folds))
    for resume in (False, True):
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run", resume=resume)
    path = given.get(changed, here.imagery)
    if changed == "data.dataset":
        other = tiny_scene(tmp_path / "after", rows=30)
        shutil.rmtree(here.chips)
        other.chips.rename(here.chips)
    elif path.suffix == ".tif":
        imagery = open_imagery(path)
        pixels = 255 - imagery.read(0, 0, SIDE, SIDE)[0]
        path.unlink()
        write_geotiff(path, pixels, imagery.geobox, bands=BANDS)
    else:
        path.write_bytes(path.read_bytes() + b"after")
    with pytest.raises(ConfigError, match=rf"run in .* had another {changed} than .*overwrite"):
        train(config, tmp_path / "run", resume=True)
    assert (tmp_path / ".run.training" / FOLDS).exists()
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", overwrite=True)


def test_each_raster_of_a_configuration_is_opened_once(
    scene: TinyScene, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def spied(source: Any, *more: Any, **options: Any) -> Any:
        opened.append(str(source))
        return open_imagery(source, *more, **options)

    for room in ("learning.sources", "rasters.covariates"):
        monkeypatch.setattr(f"speciesmap.{room}.open_imagery", spied)
    monkeypatch.setattr("speciesmap.rasters.covariates._nodata", lambda source: {})
    given = {name: tmp_path / f"{name}.tif" for name in ("effort", "height")}
    for path in given.values():
        shutil.copy(scene.imagery, path)
    config = tune(scene, untrained, freeze_encoder=True, trainer={"accelerator": "cpu"})
    config["data"] |= {"bias": str(given["effort"]), "covariates": [str(given["height"])]}
    train(load_config(config), tmp_path / "run")
    assert sorted(opened) == sorted(map(str, (scene.imagery, *given.values())))


def test_windows_smaller_than_the_chips_are_cropped_at_random_and_mapped_from_the_middle(
    scene: TinyScene, tmp_path: Path
) -> None:
    data: dict[str, Any] = {"dataset": str(scene.chips), "window_px": 12}
    run = train(load_config(crisp(scene, data=data)), tmp_path / "run")
    assert load_model(run).window_px == 12
    sources = open_sources(load_config(crisp(scene, data=data)).data)
    assert sources.dataset is not None
    rows = PairedRows(sources.dataset, [3, 1], sources.taxa, window_px=12)
    wanted = sources.dataset.aerial([3, 1])[:, :, 2:14, 2:14]
    assert np.array_equal(rows.aerial([0, 1]).numpy(), wanted)
    assert rows.__getitems__([0])["aerial"].shape == (1, 4, 16, 16)
    data |= {"imagery": str(scene.imagery), "background": 20}
    tuned = train(load_config(tune(scene, run, data=data)), tmp_path / "tuned")
    assert load_model(tuned).window_px == 12
    data["window_px"] = 17
    with pytest.raises(ConfigError, match="window_px = 17 is more than the 16 px"):
        train(load_config(tune(scene, run, data=data)), tmp_path / "more")


def test_rows_of_one_place_follow_each_other_where_they_are_positives() -> None:
    place = np.array([7, 7, 2, 5, 5, 5, 9, 2])
    torch.manual_seed(0)
    orders = [list(ByPlace(place)) for _ in range(20)]
    for order in orders:
        assert sorted(order) == list(range(8))
        kept = place[order]
        assert len(kept) - np.count_nonzero(np.diff(kept)) == 8 - 3, "four places, three borders"
    assert len({tuple(order) for order in orders}) > 10


def test_positives_of_one_place_and_chunks_train(scene: TinyScene, tmp_path: Path) -> None:
    changes = {"contrastive": {"same_place": "positive", "same_taxon": "ignored"}}
    config = crisp(scene, optim={"epochs": 1, "batch_size": 12, "chunk_size": 5}, **changes)
    assert read_facts(train(load_config(config), tmp_path / "run"))["metrics"]["steps"] == 3


def test_overwrite_starts_an_interrupted_run_anew(
    scene: TinyScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(crisp(scene))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step=4)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        steps = interrupt_at(patch, step=99)
        train(config, tmp_path / "run", overwrite=True)
    assert len(steps) == 6
    assert everything(tmp_path) == ["run"]


def test_resume_without_an_interrupted_run_is_a_start(scene: TinyScene, tmp_path: Path) -> None:
    out = train(load_config(mae(scene)), tmp_path / "run", resume=True)
    assert load_model(out).window_px == 16


def test_an_output_that_exists_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    nothing = TinyScene(tmp_path / "none.tif", tmp_path / "none")
    with pytest.raises(OutputError, match="exists already; pass --overwrite"):
        train(load_config(crisp(nothing)), tmp_path / "run")
    assert everything(tmp_path) == ["run"]
    assert everything(tmp_path / "run") == ["mine"]


@pytest.mark.parametrize("of", ["surveys", "bias", "target_group", "covariates", "background"])
def test_an_output_never_takes_the_place_of_an_input(
    scene: TinyScene, untrained: Path, tmp_path: Path, of: str
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("kept")
    if of == "surveys":
        config = tune(scene, untrained, validation={"block_m": 40, "surveys": str(mine)})
    else:
        config = tune(scene, untrained)
        config["data"][of] = [f"height={mine}"] if of == "covariates" else str(mine)
    with pytest.raises(OutputError, match="would replace the input"):
        train(load_config(config), mine, overwrite=True)
    assert mine.read_text() == "kept"


def test_surveys_that_cannot_be_used_stop_a_run_before_its_folds(
    scene: TinyScene, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speciesmap.learning.finetune.cross_validate", None)
    path = tmp_path / "surveys.csv"
    folds = {"block_m": 40, "folds": 2, "surveys": str(path)}
    config = load_config(tune(scene, untrained, validation=folds))
    for content, message in (
        (None, "cannot be read"),
        ("lon,lat,taxon,present\n9,9,Quercus lobata,1\n", "1 are not on"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ObservationsError, match=message):
            train(config, tmp_path / "run")
    assert everything(tmp_path) == ["surveys.csv"]


def test_taxa_without_a_record_to_learn_from_are_not_learned(
    scene: TinyScene, tmp_path: Path
) -> None:
    chips = tmp_path / "chips"
    shutil.copytree(scene.chips, chips)
    facts = json.loads((chips / "dataset.json").read_text())
    facts["taxa"].append({"name": "Yucca brevifolia", "lineage": []})
    (chips / "dataset.json").write_text(json.dumps(facts))
    sources = open_sources(load_config(crisp(scene, data={"dataset": str(chips)})).data)
    assert [taxon.name for taxon in sources.taxa] == NAMES
    assert set(describe(chips)["taxa"]) == set(NAMES)


def test_withheld_taxa_are_never_seen(
    scene: TinyScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[int] = set()
    for name in ("aerial", "ground"):
        original = getattr(PairedDataset, name)

        def spy(self: PairedDataset, rows: ArrayLike, original: Any = original) -> Any:
            read.update(np.asarray(rows).tolist())
            return original(self, rows)

        monkeypatch.setattr(PairedDataset, name, spy)
    prompts: set[str] = set()

    from speciesmap.models.text import TextTower

    encode = TextTower.forward

    def spoken(self: TextTower, words: list[str]) -> Tensor:
        prompts.update(words)
        return encode(self, words)

    monkeypatch.setattr(TextTower, "forward", spoken)
    data: dict[str, Any] = {"dataset": str(scene.chips), "withheld": [NAMES[1]]}
    run = train(load_config(crisp(scene, data=data)), tmp_path / "run")
    data |= {"imagery": str(scene.imagery), "background": 20}
    folds = {"folds": 2, "block_m": 40}
    tuned = train(load_config(tune(scene, run, data=data, validation=folds)), tmp_path / "tuned")
    assert [taxon.name for taxon in load_model(tuned).taxa] == [NAMES[0], NAMES[2]]
    assert read == {row for row in range(36) if row % 3 != 1}
    assert not [prompt for prompt in prompts if "lobata" in prompt]
    assert [prompt for prompt in prompts if "agrifolia" in prompt]
    spoken_of = {word for prompt in prompts for word in prompt.casefold().split()}
    for made in (run, tuned):
        learned = words(" ".join(load_model(made).names))
        assert "lobata" not in learned
        assert learned < spoken_of, "which holds made-up epithets too"
    assert set(pd.read_parquet(tuned / "folds.parquet")["taxon"]) == {NAMES[0], NAMES[2], ""}


def test_records_that_are_not_on_the_imagery_stop_or_are_counted(
    scene: TinyScene, untrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with rasterio.open(scene.imagery) as raster:
        pixels, grid = raster.read(), GeoBox(raster.shape, raster.transform, raster.crs)
        bands = raster.descriptions
    far = GeoBox(grid.shape, grid.transform * Affine.translation(9999, 0), grid.crs)
    elsewhere = write_geotiff(tmp_path / "far.tif", pixels, far, bands=bands)
    data = {"dataset": str(scene.chips), "background": 40}
    config = tune(scene, untrained, data={**data, "imagery": str(elsewhere)})
    with pytest.raises(ConfigError, match=r"none of the \d+ records of .* is on .*far\.tif"):
        train(load_config(config), tmp_path / "run")
    half = write_geotiff(tmp_path / "half.tif", pixels[:, :80], grid[:80], bands=bands)
    presences = PairedRows(open_paired(scene.chips), np.arange(36), TAXA, None, 16)
    with caplog.at_level("WARNING", "speciesmap"):
        refuse_elsewhere(presences, open_imagery(half), load_config(config))  # type: ignore[arg-type]
    assert re.search(r"\d+ of 36 records of .* are not on .*half\.tif", caplog.text)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (
            lambda s, i: tune(s, i, data={"dataset": str(s.chips)}),
            ConfigError,
            "data.imagery is not said; add .*--set data.imagery=RASTER",
        ),
        (
            lambda s, i: tune(s, i, data={"imagery": str(s.imagery), "window_px": 16}),
            ConfigError,
            "data.dataset is not said; add .*--set data.dataset=CHIPS",
        ),
        (lambda s, i: tune(s, i / "none"), ModelError, "none is not a model"),
        (lambda s, i: crisp(s, data={}), ConfigError, "neither a dataset nor imagery"),
        (
            lambda s, i: crisp(s, data={"imagery": str(s.imagery), "window_px": 16}),
            ConfigError,
            "crisp learns from pairs",
        ),
        (
            lambda s, i: crisp(s, model={"aerial": {"backbone": "test_resnet"}}),
            ConfigError,
            "needs model.ground or model.text",
        ),
        (
            lambda s, i: crisp(s, data={"dataset": str(s.chips), "withheld": ["Quercus x"]}),
            ConfigError,
            "data.withheld names 'Quercus x'",
        ),
        (
            lambda s, i: mae(s, data={"imagery": str(s.imagery)}),
            ConfigError,
            "data.window_px is missing",
        ),
        (
            lambda s, i: mae(s, model={"aerial": {"backbone": "test_resnet"}}),
            ModelError,
            "needs a vision transformer",
        ),
        (
            lambda s, i: crisp(
                s, model={"aerial": {"backbone": "test_resnet", "mean": [1.0]}, "text": {}}
            ),
            ConfigError,
            r"model.aerial.mean has 1 values, the data has 4 bands \(red, green, blue, nir\)",
        ),
        (
            lambda s, i: crisp(s, data={"dataset": str(s.chips), "withheld": NAMES}),
            ConfigError,
            "withheld",
        ),
        (
            lambda s, i: crisp(s, optim={"epochs": 1, "batch_size": 12, "chunk_size": 2}),
            ConfigError,
            "optim.chunk_size = 2 can leave batch norm a single row; give 3 or more",
        ),
        (
            lambda s, i: tune(s, i, optim={"epochs": 1, "batch_size": 12, "chunk_size": 1}),
            ConfigError,
            "optim.chunk_size = 1 can leave batch norm a single row; give 3 or more",
        ),
        (
            lambda s, i: tune(
                s,
                i,
                data={
                    "dataset": str(s.chips),
                    "imagery": str(s.imagery),
                    "background": 30,
                    "categorical": ["landcover"],
                },
            ),
            ConfigError,
            "data.categorical names 'landcover', and the covariates are none",
        ),
        (
            lambda s, i: crisp(s, trainer={"accelerator": "abacus"}),
            ConfigError,
            "cannot train with trainer.accelerator = 'abacus'",
        ),
        (
            lambda s, i: crisp(s, trainer={"accelerator": "cpu", "precision": "9-bit"}),
            ConfigError,
            "precision = '9-bit'",
        ),
        (
            lambda s, i: tune(s, i, validation={"block_m": 40, "prevalence": {NAMES[0][:-1]: 0.1}}),
            ConfigError,
            f"validation.prevalence names .*; it has {NAMES[0]}",
        ),
        (
            lambda s, i: tune(
                s,
                i,
                data={"dataset": str(s.chips), "imagery": str(s.imagery), "background": 2},
                validation={"folds": 2, "block_m": 40},
            ),
            ConfigError,
            "fold . leaves .* presences and [01] background places to train on",
        ),
        (
            lambda s, i: mae(s, data={"imagery": str(s.imagery), "window_px": 16, "background": 1}),
            DatasetError,
            "there is 1 background place to learn from",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    scene: TinyScene,
    untrained: Path,
    tmp_path: Path,
    config: Any,
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message) as caught:
        train(load_config(config(scene, untrained)), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert everything(tmp_path) == [], "nothing was trained, so nothing is left to resume"


def test_a_model_of_other_bands_is_refused(untrained: Path, tmp_path: Path) -> None:
    colour = tiny_scene(tmp_path / "colour", rows=6, bands=BANDS[:3])
    with pytest.raises(ModelError, match=r"with bands red, green, blue, nir; .* has 16 px and red"):
        train(load_config(tune(colour, untrained)), tmp_path / "run")
    with pytest.raises(ModelError, match="takes windows of 16 px"):
        smaller = tiny_model(bands=3, taxa=())
        save_model(smaller, tmp_path / "smaller", {})
        train(load_config(tune(colour, tmp_path / "smaller")), tmp_path / "run")


def test_pixels_of_other_sizes_do_not_meet(scene: TinyScene, tmp_path: Path) -> None:
    coarse = tiny_model(taxa=(), bands=4, resolution_m=10.0)
    object.__setattr__(coarse.architecture, "bands", BANDS)
    save_model(coarse, tmp_path / "coarse", {})
    with pytest.raises(ModelError, match=r"trained on pixels of 10 m, those of .* have 1 m; cut"):
        train(load_config(tune(scene, tmp_path / "coarse")), tmp_path / "run")
    with rasterio.open(scene.imagery) as raster:
        profile = {**raster.profile, "transform": raster.transform * Affine.scale(2)}
        with rasterio.open(tmp_path / "zoomed.tif", "w", **profile) as zoomed:
            zoomed.write(raster.read())
            zoomed.descriptions = raster.descriptions
    data = {"dataset": str(scene.chips), "imagery": str(tmp_path / "zoomed.tif")}
    with pytest.raises(ConfigError, match=r"zoomed.tif has pixels of 2 m, those of .* have 1 m"):
        train(load_config(tune(scene, tmp_path / "coarse", data=data)), tmp_path / "run")


def test_pixels_unlike_those_of_the_model_are_warned_about(
    scene: TinyScene, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(load_config(tune(scene, pretrained)), tmp_path / "like")
    assert not caplog.messages
    model = load_model(pretrained)
    assert model.values is not None
    small = np.divide(model.values.quantiles, 255)
    model.values = replace(model.values, quantiles=tuple(map(tuple, small.tolist())))
    init = save_model(model, tmp_path / "reflectance", {})
    train(load_config(tune(scene, init)), tmp_path / "unlike")
    for message, path in zip(caplog.messages, (scene.chips, scene.imagery), strict=True):
        assert message.startswith(f"{path}: band ")
        assert "far from what the model was trained on" in message
        assert message.endswith("has to make up for it")


def test_folds_that_hold_out_what_training_saw_are_said_to_wherever_it_lies(
    scene: TinyScene,
    pretrained: Path,
    untrained: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(scene.chips, tmp_path / "copy")
    tuned = train(load_config(tune(scene, pretrained, align=0.0)), tmp_path / "tuned")
    frozen = tune(scene, untrained, freeze_encoder=True, head={}, trainer={"accelerator": "cpu"})
    heads = train(load_config(frozen), tmp_path / "heads")
    masked = train(load_config(mae(scene)), tmp_path / "masked")
    shown = "{} learned from 100% of the records of "
    silent = "{} may have learned from the records of "  # none made by `train`
    for init, said in (
        (pretrained, shown), (tuned, shown), (untrained, silent), (heads, silent), (masked, ""),
    ):  # fmt: skip
        caplog.clear()
        config = load_config(
            tune(scene, init, validation={"block_m": 40}),
            [f"data.dataset={tmp_path / 'copy'}"],
        )
        assert isinstance(config, FinetuneConfig)
        check_validation(config, open_sources(config.data), read_facts(init))
        assert len(caplog.messages) == bool(said)
        assert said.format(init) in caplog.text


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 30_000), shared=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_share_of_records_seen_is_told_from_a_sample(
    scene: TinyScene, rows: int, shared: float, seed: int
) -> None:
    config = load_config(crisp(scene, crossview={"aerial_init": "none"}))  # crisp does not read it
    sources = open_sources(config.data)
    rng = np.random.default_rng(seed)

    def of(lon: ArrayLike) -> Sources:
        facts = pd.DataFrame({"name": "Quercus lobata", "longitude": lon, "latitude": 37.0})
        dataset = replace(sources.dataset, facts=facts)  # type: ignore[type-var]
        return replace(sources, dataset=dataset, rows=np.arange(len(facts)))

    before = rng.uniform(-100, -50, 30_000)
    again = rng.permutation(before)[: round(rows * shared)]
    now = np.r_[again, rng.uniform(50, 100, rows - len(again))]
    facts = {"seen": sample_seen(config, of(before), NOTHING)}  # type: ignore[arg-type]
    assert facts["seen"] is not None
    assert len(facts["seen"]) < 50_000
    exact = len(again) / max(rows, 1)
    looked = max(rows * KEPT / 30_000, 1)  # rows of the sample's range
    told = share_seen(facts, of(now))
    if told is None:  # too few to tell, and none of them found
        assert looked < 2 * ENOUGH
        assert exact < 1 or looked < 10
    else:
        assert told == pytest.approx(exact, abs=4 * (0.25 / looked) ** 0.5)
        assert told or looked > ENOUGH / 2
    assert share_seen({"seen": ""}, of(now)) == 0
    assert share_seen({}, of(now)) is None
    with pytest.raises(ModelError, match=r"sample of the records it saw is damaged"):
        share_seen({"seen": "QQ=="}, of(now))


def test_losses_that_are_no_numbers_are_an_error(scene: TinyScene, tmp_path: Path) -> None:
    broken = crisp(scene, optim={"epochs": 1, "batch_size": 12, "lr": 1e30})
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"training diverged: .* lower optim.lr = 1e\+30"):
            train(load_config(broken), tmp_path / "run", resume=resume)
        assert not (tmp_path / "run").exists()


def test_pixels_that_are_no_numbers_are_refused(tmp_path: Path, untrained: Path) -> None:
    scene = tiny_scene(tmp_path, dtype=np.float32, missing=np.nan)
    heads = tune(scene, untrained, freeze_encoder=True, head={}, trainer={"accelerator": "cpu"})
    for config in (crisp(scene), heads):
        with pytest.raises(DatasetError, match="pixels of band nir that are no numbers"):
            train(load_config(config), tmp_path / "run")
    assert not list(tmp_path.glob("*run*"))


def test_rows_without_photos_are_refused_where_photos_are_learned_from(tmp_path: Path) -> None:
    bare = tiny_scene(tmp_path, rows=12, photos=False)
    with pytest.raises(
        ConfigError, match=r"has no photos \(column gl_image\), which model\.ground"
    ):
        train(load_config(crisp(bare)), tmp_path / "run")
    model = {"dim": 16, "aerial": {"backbone": "test_resnet"}, "text": {"width": 16, "heads": 2}}
    run = train(load_config(crisp(bare, model=model)), tmp_path / "run", overwrite=True)
    assert load_model(run).ground is None


def test_a_taxon_starts_where_its_windows_differ_from_the_background(
    scene: TinyScene, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Tensor] = []
    original = Finetune.__init__

    def spy(self: Finetune, model: Any, *rest: Any) -> None:
        started.append(model.head.vectors.detach().clone())
        original(self, model, *rest)

    monkeypatch.setattr(Finetune, "__init__", spy)
    config = load_config(tune(scene, untrained))
    train(config, tmp_path / "run")
    base, sources = load_model(untrained), open_sources(config.data)
    assert sources.dataset is not None
    assert sources.imagery is not None
    rng = np.random.default_rng(config.seed)
    background = draw_background(sources.imagery, 16, 30, rng, base.fill)
    with torch.inference_mode():
        here = base.encode_aerial(torch.from_numpy(sources.dataset.aerial()))
        away = base.encode_aerial(background.aerial(range(30))).mean(0)
    for k in range(3):
        wanted = here[k::3].mean(0) - away
        assert torch.cosine_similarity(wanted, started[0][k], dim=0) > 0.95


def shrunk(path: Path, scene: TinyScene, init: Path) -> list[str]:
    """Assignments that make a shipped configuration small and point it to small data."""
    content = yaml.safe_load(path.read_text())
    data, model = content["data"], content.get("model", {})
    changes = ["optim.epochs=1", "optim.batch_size=8", f"trainer={json.dumps(CPU)}"]
    if data.get("dataset"):
        changes.append(f"data.dataset={scene.chips}")
    if data.get("imagery"):
        changes.append(f"data.imagery={scene.imagery}")
    if data.get("window_px"):
        changes.append("data.window_px=16")
    if data.get("split"):
        changes.append("data.split=train")
    if data.get("withheld"):
        changes.append(f"data.withheld=[{NAMES[1]}]")
    changes.append("data.background=24")
    if content["stage"] == "finetune":
        changes.append(f"init={init}")
        if content.get("validation"):
            changes += ["validation.folds=2", "validation.block_m=40"]
        return changes
    changes.append("model.dim=16")
    masked = content.get("method") == "mae"
    backbone = (
        "{backbone: test_vit, kwargs: {patch_size: 4}}" if masked else "{backbone: test_resnet}"
    )
    changes.append(f"model.aerial={backbone}")
    if model.get("ground"):
        changes.append("model.ground={backbone: test_resnet, image_px: 16}")
    if model.get("text"):
        changes.append("model.text={width: 16, layers: 1, heads: 2}")
    if masked:
        changes.append("masked={decoder_dim: 16, decoder_depth: 1, decoder_heads: 2}")
    return changes


@pytest.mark.parametrize(
    "path",
    sorted({*CONFIGS.glob("[!b]*.yaml")} - {*CONFIGS.glob("*_classify.yaml")}),
    ids=lambda path: path.name,
)
def test_every_shipped_configuration_trains(
    path: Path, scene: TinyScene, untrained: Path, tmp_path: Path
) -> None:
    config = load_config(path, shrunk(path, scene, untrained))
    model = load_model(train(config, tmp_path / "run"))
    with torch.inference_mode():
        assert model.encode_aerial(torch.zeros(1, 4, 16, 16)).isfinite().all()
    assert bool(model.taxa) == (config.stage == "finetune")
    assert all(isinstance(taxon, Taxon) for taxon in model.taxa)
