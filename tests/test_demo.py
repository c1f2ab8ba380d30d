"""The demo's scenes, small, by the contract of `speciesmap demo --json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import yaml
from click.testing import CliRunner
from test_examples import examples

from speciesmap.cli import group
from speciesmap.config import load_config
from speciesmap.demo import sf_bay, simulated
from speciesmap.simulate import simulate

SCENE_KEYS = {
    "imagery", "observations", "model", "store", "maps", "maps_by_photo", "maps_by_name", "html",
    "truth", "sites", "metrics",
}  # fmt: skip


def briefly(*more: str) -> Callable[..., Any]:
    """Read configurations that end soon."""

    def load(source: Any, changes: Sequence[str] = ()) -> Any:
        return load_config(source, [*changes, "optim.epochs=1", *more])

    return load


def run(scene: str, out: Path) -> dict[str, Any]:
    done = CliRunner().invoke(group, ["demo", "--scene", scene, "--out", str(out), "--json", "-q"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result) == {"html", "scenes"}
    assert Path(result["html"]).is_absolute() and "<html" in Path(result["html"]).read_text()
    assert list(result["scenes"]) == [scene]
    facts: dict[str, Any] = result["scenes"][scene]
    assert set(facts) == SCENE_KEYS
    for key in ("imagery", "observations", "model", "store", "html"):
        assert Path(facts[key]).exists(), key
    return facts


def test_the_simulated_scene_maps_every_taxon_in_three_ways_and_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated, "simulate", partial(simulate, size_px=512, species=4))
    monkeypatch.setattr(simulated, "load_config", briefly())
    facts = run("simulated", tmp_path / "demo")
    taxa = set(facts["truth"])
    withheld, control = facts["metrics"]["withheld"], facts["metrics"]["control"]
    assert len(taxa) == 4 and {withheld, control} < taxa
    assert set(facts["maps"]) == taxa - {withheld}, "no training saw the withheld taxon"
    assert set(facts["maps_by_photo"]) == set(facts["maps_by_name"]) == taxa
    for way in ("maps", "maps_by_photo", "maps_by_name", "truth"):
        for path in facts[way].values():
            with rasterio.open(path) as raster:
                values = raster.read(1, masked=True)
            assert 0 <= values.min() < values.max() <= 1
    sites = pd.read_csv(facts["sites"])
    assert {"lon", "lat", "taxon", "present"} <= set(sites)
    rows = {row["taxon"]: row for row in facts["metrics"]["taxa"]}
    assert set(rows) == taxa
    for name, row in rows.items():
        ways = ("photos", "name") if name == withheld else ("learned", "photos", "name", "baseline")
        assert all(-1 <= row[f"rho {way}"] <= 1 for way in ways)
    assert "rho learned" not in rows[withheld]
    out = tmp_path / "demo"
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]
    told = yaml.safe_load((Path(facts["model"]) / "config.yaml").read_text())
    assert Path(told["data"]["imagery"]) == out / "simulated/scene/aerial.tif"
    texts = [f.read_bytes() for f in out.rglob("*") if f.suffix in (".json", ".yaml", ".html")]
    assert len(texts) > 10 and not any(b".demo." in text for text in texts)


def test_the_bay_scene_is_evaluated_beside_two_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("localtileserver")
    pytest.importorskip("elapid")
    whole = sf_bay.packaged("localtileserver", "tiler/data/landsat7.tif")
    corner = tmp_path / "landsat7.tif"
    with rasterio.open(whole) as raster:
        window = rasterio.windows.Window(0, 0, 640, 640)
        profile = raster.profile | {
            "width": 640, "height": 640, "transform": raster.window_transform(window),
        }  # fmt: skip
        with rasterio.open(corner, "w", **profile) as part:
            part.write(raster.read(window=window))
            part.colorinterp = raster.colorinterp
    packaged = sf_bay.packaged
    monkeypatch.setattr(
        sf_bay,
        "packaged",
        lambda package, inside: (
            str(corner) if package == "localtileserver" else packaged(package, inside)
        ),
    )
    monkeypatch.setattr(sf_bay, "load_config", briefly("data.background=600"))
    monkeypatch.setattr(sf_bay, "BACKGROUND", 600)
    monkeypatch.chdir(tmp_path)
    assert examples("demo") == [["demo", "--scene", "sf-bay", "--out", "demo"]]
    facts = run("sf-bay", Path("demo"))
    assert facts["truth"] is None and facts["sites"] is None
    assert list(facts["maps"]) == ["Ariolimax"]
    table = {row["method"]: row for row in facts["metrics"]["cross_validation"]}
    assert list(table) == ["speciesmap", "location only", "band means and textures"]
    assert all(0 <= row["AUC"] <= 1 and row["sd"] >= 0 for row in table.values())
    ladder = [row["method"] for row in facts["metrics"]["ladder"]]
    assert {"prevalence only", "location only", "embedding + head"} < set(ladder)
    assert (Path(facts["html"]).parents[1] / "evaluation/report.html").is_file()
    folds = pd.read_parquet(Path(facts["model"]) / "folds.parquet")
    assert facts["metrics"]["presences"] == int((folds["taxon"] == "Ariolimax").sum())
    assert np.unique(folds["fold"]).tolist() == list(range(6))


def test_a_demo_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    done = CliRunner().invoke(group, ["demo", "--out", str(tmp_path)])
    assert done.exit_code != 0
    assert (tmp_path / "index.html").read_text() == "mine"
