"""What docs/formats.md promises: each name that it tells is written, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
import zarr
from tiny import BANDS, TinyScene, tiny_model, tiny_scene

from speciesmap import predict
from speciesmap.config import load_config
from speciesmap.datasets.chips import make_chips
from speciesmap.learning.train import train
from speciesmap.models import save_model
from speciesmap.models.trust import Trust
from speciesmap.observations.clean import clean_files
from speciesmap.rasters.imagery import open_imagery

PAGE = (Path(__file__).parent.parent / "docs/formats.md").read_text()


def first_column(row: str) -> list[str]:
    return re.findall(r"`([^`]+)`", row.split("|")[1])


def told(heading: str) -> set[str]:
    """Names in the first column of the table below a heading."""
    _, _, below = PAGE.partition(f"\n| {heading} |")
    table, _, _ = below.partition("\n\n")
    found = {name for row in table.splitlines()[2:] for name in first_column(row)}
    assert found, heading
    return found


def files(section: str) -> set[str]:
    _, _, below = PAGE.partition(f"\n## {section}\n")
    table, _, _ = below.partition("| file |")[2].partition("\n\n")
    return {
        n for row in table.splitlines()[2:] for n in re.findall(r"`([^`]+)`", row.split("|")[1])
    }


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> TinyScene:
    return tiny_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def model(scene: TinyScene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned, validated, calibrated for one of its taxa."""
    folder = tmp_path_factory.mktemp("runs")
    start = tiny_model(taxa=())
    object.__setattr__(start.architecture, "bands", BANDS)
    content = {
        "stage": "finetune",
        "init": str(save_model(start, folder / "start", {})),
        "data": {"dataset": str(scene.chips), "imagery": str(scene.imagery), "background": 60},
        "validation": {"method": "kmeans", "folds": 2},
        "optim": {"epochs": 1, "batch_size": 12},
        "trainer": {"accelerator": "cpu", "workers": 0},
    }
    return train(load_config(content), folder / "model")


@pytest.fixture(scope="module")
def maps(model: Path, scene: TinyScene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "maps"
    return predict(model, imagery=scene.imagery, out=out, qgis_project=True).path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_of_maps(maps: Path) -> None:
    run = json.loads((maps / "run.json").read_text())
    assert set(run) == told("key of `run.json`")
    entry = next(line for line in PAGE.splitlines() if line.startswith("| `maps` | by file"))
    assert set(next(iter(run["maps"].values()))) == set(re.findall("`([^`]+)`", entry)) - {"maps"}
    stems = {Path(name).stem for name in run["maps"]}
    kinds = {f"genus_species.{end}" for end in ("tif", "qml")} | {"photo_", "text_", "_2"}
    expected = files("A folder of maps") - kinds - {"richness.tif"}
    assert names(maps) == expected | {f"{stem}.{end}" for stem in stems for end in ("tif", "qml")}
    with rasterio.open(maps / next(iter(run["maps"]))) as raster:
        assert set(raster.descriptions) <= told("band")
        assert set(raster.tags()) - {"AREA_OR_POINT"} == told("tag") - {"MONTH", "QUANTITY"}
        assert np.isnan(raster.nodata) and raster.dtypes[0] == "float32"
    ranges = gpd.read_file(maps / "ranges.gpkg", layer="ranges")
    assert set(ranges.columns) - {"geometry"} == told("column of `ranges`")


def test_a_store(maps: Path) -> None:
    store = zarr.open_group(maps.with_name("maps.store.zarr"), mode="r")
    assert set(store.attrs) == told("attribute")
    assert set(store.array_keys()) == told("array") - {"crs_wkt", "GeoTransform"}
    assert {"crs_wkt", "GeoTransform"} <= set(store["spatial_ref"].attrs)


def test_a_model(model: Path) -> None:
    assert names(model) == files("A model")
    assert set(json.loads((model / "config.json").read_text())) == told("key of `config.json`")
    folds = pd.read_parquet(model / "folds.parquet")
    taxa = [taxon["name"] for taxon in json.loads((model / "taxa.json").read_text())]
    assert set(folds.columns) == told("column of `folds.parquet`") | set(taxa)


def test_observations_and_a_data_set(scene: TinyScene, tmp_path: Path) -> None:
    imagery = open_imagery(scene.imagery)
    x, y = imagery.xy([40, 50], [50, 40])
    rows = [f"Quercus lobata,{lon},{lat}" for lon, lat in zip(x, y, strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(["taxon,longitude,latitude", *rows, ""]))
    out = tmp_path / "observations.parquet"
    clean_files([tmp_path / "a.csv"], out)
    assert names(tmp_path) == {"a.csv", "observations.parquet", "observations.report.json"}
    table = gpd.read_parquet(out)
    assert set(table.columns) - {"geometry"} == told("column")
    make_chips(table, imagery, tmp_path / "chips", window_px=16)
    assert names(tmp_path / "chips") == files("A data set")


@pytest.mark.parametrize("curves", [{}, {"Quercus agrifolia": ([0.0, 0.05], [0.0, 0.4])}])
def test_a_map_made_without_speciesmap_is_the_same(
    scene: TinyScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curves: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    object.__setattr__(model.architecture, "bands", BANDS)
    count = len(model.taxa)
    model.trust = Trust(torch.zeros(count, 1, model.dim), torch.zeros(count, 1), curves=curves)
    save_model(model, "runs/model", {})
    predict("runs/model", imagery=scene.imagery, out="maps", precision="float32")
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    found: dict[str, Any] = {}
    exec(code, found)
    with rasterio.open("maps/quercus_agrifolia.tif") as raster:
        np.testing.assert_allclose(found["quercus"], raster.read(1), atol=1e-5)
    assert np.nanmax(found["quercus"]) > np.nanmin(found["quercus"])
