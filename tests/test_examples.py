"""The examples that end every `--help`, run as they are written, on a small project."""

from __future__ import annotations

import re
import shlex
import shutil
import webbrowser
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
import torch
from click.testing import CliRunner
from fuzz_observations import GBIF, INAT
from odc.geo.geobox import GeoBox
from PIL import Image
from rasterio.transform import from_origin
from sklearn.decomposition import PCA
from tiny import BANDS, TAXA, architecture, tiny_scene

from speciesmap import cli, embed, open_imagery, predict, read_observations
from speciesmap.config import load_config
from speciesmap.mapping import benchmark as benchmark_room
from speciesmap.mapping import umap as umap_room
from speciesmap.models import SpeciesModel, save_model
from speciesmap.models.encoders import ImageTower
from speciesmap.present import view as view_room
from speciesmap.rasters.geotiff import write_geotiff

ELSEWHERE = {"demo"}  # test_demo.py runs its example, on less
# inputs of evaluations that take minutes; test_appraise.py and test_classify.py do such on less
LONG = {"configs/crisp_nmv_classify.yaml", "configs/demo_landsat_finetune.yaml", "elevation.tif"}


def examples(name: str) -> list[list[str]]:
    """Words of the calls that a command's help ends with, without the program's."""
    command = cli.group.get_command(click.Context(cli.group), name)
    assert command is not None and command.help is not None
    _, _, body = command.help.rpartition("Example:")
    lines = body.replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the examples name."""
    folder = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 255, (4, 96, 96)).astype(np.uint8)
    grid = GeoBox((96, 96), from_origin(565_000, 4_180_000, 1, 1), "EPSG:32610")
    (folder / "naip").mkdir()
    scene = write_geotiff(folder / "naip/a.tif", pixels, grid, bands=BANDS)
    shutil.copy(scene, folder / "scene.tif")
    tiny_scene(folder, rows=12)
    for name, metadata in (
        ("finetuned", None),
        ("pretrained", None),
        ("birds", {"dropout": 0.25}),
    ):
        parts = replace(architecture(metadata=metadata), bands=BANDS)
        facts = {"training": {"stage": "pretrain"}}
        model = SpeciesModel(parts, TAXA)
        model.log_scale.data += 0.1  # as if trained
        if model.metadata is not None:
            model.metadata.date.weight.data += 0.1
        save_model(model, folder / "runs" / name, facts)
    for photo in ("oak.jpg", "jay.jpg"):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(folder / photo)
    imagery = open_imagery(scene)
    predict(folder / "runs/finetuned", imagery=imagery, out=folder / "maps")
    embed(folder / "runs/birds", imagery, folder / "birds.zarr")
    (folder / "gbif.csv").write_bytes(GBIF)
    (folder / "inat.csv").write_bytes(INAT)
    read_observations(folder / "gbif.csv").to_parquet(folder / "slugs.parquet")
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a moment, lay out by principal axes, and do not wait for Ctrl-C."""
    measure = benchmark_room.benchmark
    monkeypatch.setattr(
        benchmark_room, "benchmark", lambda *a, **k: measure(*a, **{**k, "seconds": 0.1})
    )

    monkeypatch.setattr(umap_room, "fit_umap", lambda v, n, *_: PCA(n).fit_transform(v))

    class Event:
        def wait(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(view_room, "threading", SimpleNamespace(Event=Event))
    monkeypatch.setattr(webbrowser, "open", lambda address: True)


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - ELSEWHERE))
def test_the_examples_of_help_run(
    name: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    here = tmp_path / "here"
    shutil.copytree(project, here)
    monkeypatch.chdir(here)
    for words in examples(name):
        if LONG & set(words):
            continue
        out = words[words.index("--out") + 1] if "--out" in words else None
        if out and Path(out).is_dir():
            shutil.rmtree(out)
        written = [
            part
            for word in words
            for part in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
        ]
        done = CliRunner().invoke(cli.group, written)
        assert done.exit_code == 0, (words, done.output, done.exception)
        assert out is None or Path(out).exists()


ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "docs/recipes.md"
PAGES = [ROOT / "README.md", RECIPES, *sorted(ROOT.glob("examples/**/*.*"))]


def calls(text: str) -> list[list[str]]:
    """Words of the calls of speciesmap in a page or a script, without the program's."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [line.strip().removeprefix("srun ") for line in lines]
    split = [shlex.split(line, comments=True) for line in found if line.startswith("speciesmap ")]
    return [[word for word in words[1:] if word != "$@"] for words in split]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_calls_in_the_pages_and_scripts_parse_and_configurations_are_read(page: Path) -> None:
    if page.suffix == ".yaml":
        load_config(page)
        return
    for words in calls(page.read_text()):
        command = cli.group.get_command(click.Context(cli.group), words[0])
        assert command is not None, words
        command.make_context(words[0], cli.split_bbox(words[1:])).close()
        for word in words[1:]:
            if word.startswith(("configs/", "examples/")):
                assert (ROOT / word).is_file(), word
        if words[0] == "train" and (ROOT / words[1]).is_file():
            changes = [value for word, value in pairwise(words) if word == "--set"]
            load_config(ROOT / words[1], changes)


def test_the_python_of_the_recipes_runs(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    here = tmp_path / "here"
    shutil.copytree(project, here)
    (here / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(here)
    (here / "photos").mkdir(exist_ok=True)
    for photo in ("oak.jpg", "jay.jpg"):
        shutil.copy(photo, "photos")
    with rasterio.open("maps/quercus_agrifolia.tif") as raster:
        crs, step, values = raster.crs, raster.res[0], raster.read(1, masked=True)
        middle = shapely.Point(*raster.xy(values.shape[0] // 2, values.shape[1] // 2))
        quantity = raster.descriptions[0]
        at_middle = next(raster.sample([(middle.x, middle.y)]))[0]
    county = gpd.GeoDataFrame(geometry=[middle.buffer(6 * step)], crs=crs)
    county.to_crs("EPSG:4326").to_file("county.gpkg")
    plots = [middle, shapely.Point(middle.x + 5 * step, middle.y)]
    gpd.GeoDataFrame({"habitat": ["wood", "scrub"]}, geometry=plots, crs=crs).to_file("plots.gpkg")
    names: dict[str, Any] = {"__name__": __name__}  # timm keeps the module of what it is given
    code = re.findall(r"```python\n(.*?)```", RECIPES.read_text(), re.S)
    for block in code:
        exec(block.replace("suitability", quantity), names)
    table = pd.read_csv("quercus_agrifolia.csv")
    assert len(table) == values.count()
    assert {"x", "y", quantity} <= set(table.columns)
    with rasterio.open("quercus_agrifolia_county.tif") as raster:
        assert 0 < raster.read(1, masked=True).count() < values.count()
    assert names["plots"][quantity][0] == at_middle
    assert names["found"].shape == (2, 16)
    listed = capfd.readouterr().out.split()
    assert {"photos/oak.jpg", "photos/jay.jpg"} <= set(listed)
    tower = ImageTower("my_small", image_px=32, mean=[1.0] * 4, std=[1.0] * 4, dim=8)
    assert tower(torch.zeros(2, 4, 32, 32)).shape == (2, 8)


def test_the_pages_do_call_the_program() -> None:
    assert sum(len(calls(page.read_text())) for page in PAGES if page.suffix != ".yaml") > 10
