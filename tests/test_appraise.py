"""The ladder judges all methods on the same rows, and its report is safe to open."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from present_maps import CONTRAST, chromium, visit
from tiny import BANDS, TAXA, TinyScene, tiny_model, tiny_scene

from speciesmap.appraise import Appraisal, evaluate
from speciesmap.cli import main
from speciesmap.config import load_config
from speciesmap.errors import ConfigError, ImageryError, ObservationsError, OutputError
from speciesmap.evaluation.ladder import on_surveys
from speciesmap.evaluation.rungs import HEAD, SHUFFLED, WITH_COVARIATES, gather
from speciesmap.learning.seen import NOTHING, sample_seen
from speciesmap.learning.sources import open_sources
from speciesmap.models import load_model, save_model
from speciesmap.present.odmap import protocol
from speciesmap.present.report import write_report
from speciesmap.rasters.imagery import open_imagery


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> TinyScene:
    return tiny_scene(tmp_path_factory.mktemp("scene"), rows=60)


def settings(scene: TinyScene, init: Path) -> dict[str, Any]:
    return {
        "stage": "finetune",
        "init": str(init),
        "data": {"dataset": str(scene.chips), "imagery": str(scene.imagery), "background": 120},
        "validation": {"folds": 2, "block_m": 40},
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
    }


@pytest.fixture(scope="module")
def folder(scene: TinyScene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose facts say how it was fine-tuned; its initial checkpoint is at hand."""
    made = tmp_path_factory.mktemp("models")
    model = tiny_model()
    model.architecture.__dict__["bands"] = BANDS
    base = save_model(model, made / "base", {})
    return save_model(model, made / "tuned", {"training": settings(scene, base)})


@pytest.fixture(scope="module")
def surveys(scene: TinyScene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    x, y = open_imagery(scene.imagery).xy(*rng.uniform(10, 150, (2, 400)))
    table = pd.DataFrame(
        {"lon": x, "lat": y, "taxon": TAXA[0].name, "present": rng.random(400) < 0.4}
    )
    path = tmp_path_factory.mktemp("surveys") / "sites.csv"
    table.astype({"present": int}).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def appraisal(scene: TinyScene, folder: Path, surveys: Path) -> Appraisal:
    return evaluate(
        folder,
        data=scene.chips,
        covariates=[scene.imagery],
        surveys=surveys,
        out=folder.parent / "evaluation",
    )


def test_every_rung_is_judged_by_every_measure_on_the_same_rows(appraisal: Appraisal) -> None:
    rungs = appraisal.result["rungs"]
    wanted = {"prevalence only", "location only", "query by text", "query by photo", HEAD}
    assert wanted | {WITH_COVARIATES, SHUFFLED} <= set(rungs)
    places = {rung["taxa"][t.name]["places"] for rung in rungs.values() for t in TAXA}
    assert len(places) == 1
    for rung in rungs.values():
        assert rung["mean"]["auc"] is not None
        assert sum(row["count"] for row in rung["reliability"]) == 3 * places.copy().pop()
    shares = rungs["prevalence only"]["taxa"][TAXA[0].name]["auc_folds"]
    assert shares == [0.5, 0.5]
    assert abs(rungs["prevalence only"]["mean"]["brier_skill"]) < 0.1
    assert rungs["prevalence only"]["mean"]["boyce"] is None, "it ranks nothing"
    for rival in ("MaxEnt on covariates", "heads on covariates"):
        assert {f"{rival}, random background", f"{rival}, target-group background"} <= set(rungs)
    assert appraisal.result["head"] == HEAD, "covariates were given, but the model reads none"
    assert set(appraisal.result["differences"]) == set(rungs) - {HEAD}
    assert appraisal.result["shuffle"]["pairs"] == 6


def test_random_imagery_teaches_nothing(appraisal: Appraisal) -> None:
    """Windows of this scene are noise: no rung may be good on held-out blocks."""
    for name, rung in appraisal.result["rungs"].items():
        assert 0.3 < rung["mean"]["auc"] < 0.7, name


def test_maps_of_noise_do_no_better_than_null_maps(appraisal: Appraisal) -> None:
    judged = appraisal.result["rungs"][HEAD]["taxa"].values()
    assert all(0.5 < found["auc_null"] < 0.8 for found in judged)
    assert sum(found["informative"] for found in judged) <= 1
    assert "uninformative" in appraisal.html.read_text()


def test_surveyed_places_that_share_ground_with_presences_are_left_out(
    appraisal: Appraisal,
) -> None:
    found = appraisal.result["surveys"]
    assert found["places"] + found["left_out"] == 400
    assert found["left_out"] > 0
    assert set(found["taxa"]) == {TAXA[0].name}
    assert found["taxa"][TAXA[0].name]["brier_skill"] is None, "suitability is no probability"


def test_surveys_that_cannot_be_used_are_counted_aloud(
    scene: TinyScene, folder: Path, surveys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, model = load_config(settings(scene, folder.parent / "base")), load_model(folder)
    sources = open_sources(config.data)
    path = surveys.with_name("far.csv")
    table = pd.read_csv(surveys)
    with caplog.at_level("WARNING", "speciesmap"):
        table.assign(lon=table["lon"] + np.where(table.index < 7, 1, 0)).to_csv(path, index=False)
        on_surveys(model, config, sources, path)  # type: ignore[arg-type]
    assert "of 400 surveys are left out: 7 are not on" in caplog.text
    table.assign(lon=table["lon"] + 1).to_csv(path, index=False)
    with pytest.raises(ObservationsError, match="400 of 400 surveys are left out: 400 are not on"):
        on_surveys(model, config, sources, path)  # type: ignore[arg-type]


def test_folds_are_apart_and_the_same_as_in_training(scene: TinyScene, folder: Path) -> None:
    config = load_config(settings(scene, folder.parent / "base"))
    rows = gather(load_model(folder), config, open_sources(config.data))  # type: ignore[arg-type]
    for k, use in rows.uses.items():
        held = rows.fold == k
        assert not (use & held).any()
        at = np.column_stack([rows.places.rows, rows.places.cols])
        apart = np.abs(at[use][:, None] - at[held][None]).max(2)
        assert apart.min() >= 16


def test_files_agree_with_the_figures(appraisal: Appraisal) -> None:
    kept = json.loads(appraisal.json.read_text())
    assert kept["rungs"][HEAD]["mean"] == pytest.approx(
        appraisal.result["rungs"][HEAD]["mean"], nan_ok=True
    )
    table = pd.read_csv(appraisal.odmap)
    assert len(table) == 84
    focal = table.loc[table["element"] == "Focal taxon", "value"].item()
    assert all(taxon.name in focal for taxon in TAXA)
    assert (table["value"] == "to be filled").sum() > 20
    beyond = table.loc[table["element"] == "Model settings (extrapolation)", "value"].item()
    assert beyond == "embeddings are not clamped; covariates are, to the range trained on"


class Tags(HTMLParser):
    """Collects what could load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_is_self_contained_and_escapes_every_string(
    appraisal: Appraisal, tmp_path: Path
) -> None:
    evil = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
    text = json.dumps(appraisal.result, default=str)
    for name in (*(t.name for t in TAXA), "location only", "tuned", "base"):
        text = text.replace(json.dumps(name)[1:-1], json.dumps(evil)[1:-1] + name)
    hostile = json.loads(text)
    hostile["notes"].append(evil)
    hostile["skipped"][evil] = evil
    hostile["surveys"]["taxa"][evil] = next(iter(hostile["surveys"]["taxa"].values()))
    known = protocol({("Overview", "Location", "Location"): evil})
    page = write_report(hostile, known, tmp_path / "r.html").read_text()
    tags = Tags()
    tags.feed(page)
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "img", "link", "iframe", "object"}
    for _, attributes in tags.seen:
        assert not any(key.startswith("on") or key in {"src", "href"} for key in attributes)
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"https?://", page)


def test_the_page_shows_only_measures_that_were_taken_and_true_minus_signs(
    appraisal: Appraisal, tmp_path: Path
) -> None:
    result = copy.deepcopy(appraisal.result)
    for rung in result["rungs"].values():
        for measures in (rung["mean"], *rung["taxa"].values()):
            measures["tss"], measures["boyce"] = None, -0.25
    page = write_report(result, protocol({}), tmp_path / "r.html").read_text()
    assert "Boyce</span>" in page
    assert "TSS</span>" not in page.partition("At surveyed sites")[0]
    assert "<td>&minus;0.250</td>" in page
    assert not re.search(r"<(td|b)[^>]*>-", page)


@pytest.mark.chromium
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_reads_well_on_any_screen(
    appraisal: Appraisal, tmp_path: Path, width: int
) -> None:
    html = write_report(appraisal.result, protocol({}), tmp_path / "r.html")
    with chromium() as browser, visit(browser, html, width, 844) as seen:
        page = seen.page
        page.click("summary")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        lowest = page.evaluate(CONTRAST)[0]
        assert lowest[0] >= 4.5, lowest
        for rung in page.locator(".rung:has(b)").all():
            name, track = (rung.locator(k).bounding_box() for k in ("span", "svg"))
            assert name["height"] >= 15, "small print"
            assert track["width"] >= 200
            apart = name["y"] + name["height"] <= track["y"] + 1
            assert apart or name["x"] + name["width"] <= track["x"]
        assert seen.outside == []
        assert seen.complaints == []


def test_what_is_missing_is_said_in_words(scene: TinyScene, folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    save_model(load_model(folder), bare, {})
    with pytest.raises(ConfigError, match="says neither imagery nor folds"):
        evaluate(bare, data=scene.chips, out=tmp_path / "out")
    config = settings(scene, folder.parent / "base")
    del config["validation"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="needs spatial folds"):
        evaluate(folder, data=tmp_path / "c.yaml", out=tmp_path / "out")
    with pytest.raises(ImageryError):
        evaluate(folder, data=scene.chips, out=tmp_path / "out", covariates=[tmp_path / "no.tif"])
    with pytest.raises(ObservationsError, match="cannot be read"):
        evaluate(folder, data=scene.chips, out=tmp_path / "out", surveys=tmp_path / "none.csv")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="--overwrite"):
        evaluate(folder, data=scene.chips, out=tmp_path / "there")
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_saw_the_held_out_records_is_said_to_have(
    scene: TinyScene, folder: Path, appraisal: Appraisal, tmp_path: Path
) -> None:
    from speciesmap.appraise import _encoder

    assert "before fine-tuning" in appraisal.result["notes"][0]
    gone = {"training": copy.deepcopy(settings(scene, tmp_path / "gone"))}
    model = load_model(folder)
    sources = open_sources(load_config(settings(scene, tmp_path / "gone")).data)
    encoder, _, notes = _encoder(model, gone, sources)
    assert encoder is model
    assert "has seen the held-out records" in notes[0]
    frozen = {"training": {**gone["training"], "freeze_encoder": True}}
    assert _encoder(model, {**frozen, **NOTHING}, sources)[2] == []
    assert "Pre-training may have paired windows" in _encoder(model, frozen, sources)[2][0]
    data = {"dataset": str(scene.chips)}
    paired = {"stage": "pretrain", "data": data, "model": {"aerial": {"backbone": "test_resnet"}}}
    seen = sample_seen(load_config(paired), sources, NOTHING)  # type: ignore[arg-type]
    base = save_model(tiny_model(), tmp_path / "crisp", {"seen": seen})
    tuned = {"training": settings(scene, base)}
    _, _, notes = _encoder(model, tuned, sources)
    assert "windows of 100% of these records" in notes[1]
    tuned["initial"] = load_model(base).fingerprint
    assert _encoder(model, tuned, sources)[0].fingerprint == tuned["initial"]
    save_model(tiny_model(seed=1), base, {"seen": seen})
    encoder, _, notes = _encoder(model, tuned, sources)
    assert encoder is model
    assert "crisp that the model was fine-tuned from is another now" in notes[0]


def test_the_command_prints_where_the_report_is(
    scene: TinyScene, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(folder), "--data", str(tmp_path / "no.yaml"), "--out", "x", "-q"])
    assert stopped.value.code == 1
    assert "no.yaml does not exist" in capsys.readouterr().err
    from speciesmap.cli.evaluate import command

    assert "speciesmap evaluate runs/model" in CliRunner().invoke(command, ["--help"]).output
