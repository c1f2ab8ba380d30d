"""`speciesmap info`: any path says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from affine import Affine
from fake_model import FakeModel
from loopback import serving
from odc.geo.geobox import GeoBox
from present_maps import ramp, write_map
from tiny import tiny_model, tiny_scene

from speciesmap import atlas, cli
from speciesmap.describe import as_text, describe
from speciesmap.errors import ImageryError, ModelError, OutputError, SpeciesmapError
from speciesmap.models import Architecture, SpeciesModel, save_model
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.taxa import Taxon

TEXT = {"width": 16, "layers": 1, "heads": 2}
GRID = GeoBox((100, 130), Affine(1, 0, 550_000, 0, -1, 4_180_000), "EPSG:32610")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imagery, and the store and maps made from it."""
    folder = tmp_path_factory.mktemp("info")
    pixels = np.random.default_rng(0).integers(1, 255, (3, *GRID.shape)).astype(np.uint8)
    write_geotiff(folder / "a.tif", pixels, GRID, bands=("red", "green", "blue"))
    atlas.predict(FakeModel(), imagery=folder / "a.tif", out=folder / "maps")
    return folder


def test_what_lies_at_an_address(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(made) as server:
        for name, kind in (("a.tif", "imagery"), ("maps/quercus_lobata.tif", "map")):
            address = f"{server.address}/{name}"
            with pytest.raises(SystemExit):
                cli.main(["info", address, "--json"])
            there, here = json.loads(capsys.readouterr().out), describe(made / name)
            assert there["kind"] == kind and there["path"] == address
            assert {**there, "path": "", "fingerprint": ""} == json.loads(
                json.dumps({**here, "path": "", "fingerprint": ""})
            )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chips = tiny_scene(tmp_path, rows=6).chips
    there, here = describe(f"file://{chips}"), describe(chips)
    assert {**there, "path": ""} == {**here, "path": ""}


def test_imagery(made: Path) -> None:
    facts = describe(made / "a.tif")
    assert facts["kind"] == "imagery"
    assert facts["bands"] == ["red", "green", "blue"]
    assert (facts["rows"], facts["columns"], facts["crs"]) == (100, 130, "EPSG:32610")
    assert facts["resolution_m"] == pytest.approx(1, abs=1e-3)
    west, south, east, north = facts["west_south_east_north"]
    assert -122.44 < west < east < -122.42
    assert 37.76 < south < north < 37.77


def test_imagery_says_how_it_marks_pixels_that_are_missing(tmp_path: Path) -> None:
    form = {"height": 32, "width": 32, "dtype": "uint8", "crs": GRID.crs, "transform": GRID.affine}
    colours = np.random.default_rng(0).integers(1, 200, (4, 32, 32)).astype(np.uint8)
    opaque = colours.copy()
    opaque[3] = np.where(np.arange(32) < 9, 0, 255)

    def missing(pixels: Any, mask: Any = None, **more: Any) -> Any:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.tif"
        with rasterio.open(path, "w", count=len(pixels), **form, **more) as raster:
            raster.write(pixels)
            if mask is not None:
                raster.write_mask(mask)
        return describe(path)["missing"]

    assert missing(colours[:3]) == "not marked, every pixel counts"
    assert missing(colours[:3], nodata=0) == "nodata 0"
    called_alpha = {"photometric": "RGB", "ALPHA": "YES"}
    assert missing(opaque, **called_alpha) == "by a mask or an alpha band"
    assert missing(colours, **called_alpha) == "not marked, every pixel counts"  # as NAIP's is nir
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        assert missing(colours[:3], mask=opaque[3]) == "by a mask or an alpha band"


@pytest.mark.parametrize("here", [True, False])
def test_a_map_says_what_it_shows_and_its_range(
    made: Path, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    facts = describe(("" if here else f"{made}/") + "maps/quercus_lobata.tif")
    assert facts["kind"] == "map"
    assert (facts["label"], facts["query"], facts["model"]) == ("Quercus lobata", "taxon", "fake")
    assert facts["bands"] == ["probability"]
    assert 0 < facts["minimum"] < facts["mean"] < facts["maximum"] < 1


def test_a_map_passes_on_what_speaks_against_it(tmp_path: Path) -> None:
    plain = write_map(tmp_path / "a.tif", ramp())
    doubted = write_map(tmp_path / "b.tif", ramp(), CAUTION="learned from 12 presences")
    assert "caution" not in describe(plain)
    assert describe(doubted)["caution"] == "learned from 12 presences"


def test_a_folder_of_maps(made: Path) -> None:
    facts = describe(made / "maps")
    assert facts["kind"] == "run"
    assert facts["maps"]["quercus_lobata.tif"] == "Quercus lobata"
    assert facts["model"]["fingerprint"] == "fake"


def test_a_store_says_how_far_it_is(made: Path) -> None:
    facts = describe(made / "maps.store.zarr")
    assert facts["kind"] == "store"
    assert (facts["tiles_done"], facts["tiles"]) == (2, 2)
    assert (facts["model"], facts["stride_px"], facts["dim"]) == ("fake", 4, 8)


def test_a_model_says_what_it_needs_and_knows(tmp_path: Path) -> None:
    model = SpeciesModel(
        Architecture(
            dim=8,
            bands=("red", "nir"),
            window_px=32,
            resolution_m=0.6,
            mean=(1.0, 2.0),
            std=(1.0, 1.0),
            aerial={"backbone": "test_resnet"},
        ),
        [Taxon("Quercus agrifolia")],
        prevalence={"Quercus agrifolia": 0.5},
    )
    facts = describe(save_model(model, tmp_path / "run", {"metrics": {"auc": 0.9}}))
    assert facts["kind"] == "model"
    assert facts["bands"] == ["red", "nir"]
    assert facts["taxa"] == facts["calibrated"] == ["Quercus agrifolia"]
    assert facts["ground"] is None
    assert facts["metrics"] == {"auc": 0.9}
    assert facts["fingerprint"] == model.fingerprint


VIT = {"backbone": "test_vit", "kwargs": {"patch_size": 8}}
GROUND = {**VIT, "image_px": 16}


@pytest.mark.parametrize(
    ("parts", "learned", "queries"),
    [
        ({}, (), ["--species"]),
        ({"taxa": ()}, (), []),
        ({"ground": GROUND}, (), ["--species"]),
        ({"ground": GROUND}, ("log_scale",), ["--species", "--photo"]),
        ({"text": TEXT, "taxa": ()}, ("log_scale",), ["--text"]),
        (
            {"ground": GROUND, "text": TEXT, "metadata": {"dropout": 0.25}},
            ("log_scale", "metadata.date.weight"),
            ["--species", "--photo", "--text", "--month"],
        ),
        ({"ground": GROUND, "metadata": {"dropout": 0.25}, "matcher": True}, (), ["--species"]),
    ],
)
def test_a_model_says_what_it_can_be_asked_with(
    parts: dict[str, Any], learned: tuple[str, ...], queries: list[str], tmp_path: Path
) -> None:
    model = tiny_model(**{"aerial": VIT, "ground": None, "text": None, **parts})
    for name in learned:
        torch.nn.init.ones_(model.get_parameter(name))
    facts = describe(save_model(model, tmp_path / "run", {}))
    assert facts["queries"] == queries
    assert facts["scores_pairs"] == ("matcher" in parts)
    assert bool(facts["metadata"]) == ("metadata" in parts)
    assert (facts["ground"], facts["text"]) == (
        "test_vit" if "ground" in parts else None,
        "trained jointly" if "text" in parts else None,
    )
    assert ("--month" in queries) == model.dated
    assert json.loads(json.dumps(facts)) == facts


def test_a_model_without_its_weights_is_damaged(tmp_path: Path) -> None:
    run = save_model(tiny_model(), tmp_path / "run", {})
    (run / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"model\.safetensors cannot be read .*copy the checkpoint"
    ):
        describe(run)


def test_observations(tmp_path: Path) -> None:
    table = tmp_path / "seen.csv"
    table.write_text("scientific_name,longitude,latitude\nQuercus lobata,-122,37.5\n" * 1)
    facts = describe(table)
    assert (facts["kind"], facts["rows"]) == ("observations", 1)
    assert facts["taxa"] == {"Quercus lobata": 1}


def test_what_it_is_not_gets_an_error_that_says_so(made: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is no model, store, data set"):
        describe(tmp_path)
    with pytest.raises(ImageryError, match="does not exist"):
        describe(tmp_path / "nothing")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"run\.json is damaged"):
        describe(tmp_path)
    named = pa.table({"taxon": ["Quercus lobata"], "lon": [-122], "lat": [37]})
    pq.write_table(named, tmp_path / "named.parquet", store_schema=False)
    damaged = (tmp_path / "named.parquet").read_bytes().replace(b"taxon", b"tax\xffn")
    (tmp_path / "named.parquet").write_bytes(damaged)
    with pytest.raises(SpeciesmapError, match=r"named\.parquet is a damaged Parquet file"):
        describe(tmp_path / "named.parquet")
    (tmp_path / "torn.parquet").write_text("x")
    with pytest.raises(SpeciesmapError, match=r"torn\.parquet"):
        describe(tmp_path / "torn.parquet")


def test_the_command_prints_text_or_one_json_object(
    made: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in (["info", str(made / "maps")], ["info", str(made / "maps"), "--json"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert not stop.value.code
        out, err = capfd.readouterr()
        assert err == ""
        if "--json" in words:
            assert json.loads(out) == json.loads(json.dumps(describe(made / "maps")))
        else:
            assert out.strip() == as_text(describe(made / "maps"))
            assert "quercus_lobata.tif Quercus lobata" in out


def test_facts_that_hold_further_ones_head_a_block() -> None:
    facts = {"dim": 8, "metrics": {"steps": 6, "validation": {"Quercus lobata": {"auc": 0.12345}}}}
    assert as_text(facts).splitlines() == [
        "dim      8",
        "metrics",
        "  steps       6",
        "  validation",
        "    Quercus lobata  auc 0.123",
    ]


def test_long_lists_are_cut_in_text() -> None:
    names = [f"Genus species{k}" for k in range(40)]
    assert as_text({"taxa": names}) == f"taxa  {', '.join(names[:12])} and 28 more"
    counted = as_text({"taxa": dict.fromkeys(names, 3)})
    assert counted == f"taxa  {', '.join(f'{name} 3' for name in names[:12])} and 28 more"
    lines = as_text({"validation": {name: {"auc": 0.5} for name in names}}).splitlines()
    assert len(lines) == 14
    assert lines[-1] == "  and 28 more; --json gives all"
