"""Readers of what lies elsewhere: STAC catalogs, tile indexes, grids, covariates, data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import geopandas as gpd
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import shapely
from birds import cub, inat_birds, nabirds
from damage import JSON, Run, damaged, twisted
from odc.geo.geobox import GeoBox
from rasterio.transform import from_origin
from tiny import tiny_scene

from speciesmap.datasets import paired
from speciesmap.datasets.birds import open_birds
from speciesmap.errors import ImageryError
from speciesmap.learning.surveys import read_surveys
from speciesmap.observations.background import biased_background
from speciesmap.rasters import stac
from speciesmap.rasters.covariates import open_covariates
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.scenes import list_files

GRID = GeoBox((40, 48), from_origin(560000, 4150000, 10, 10), "EPSG:32610")
BBOX = (-122.32, 37.489, -122.3155, 37.492)
PLACES = [-122.3185, -122.3178], [37.4935, 37.4931]


def scene(path: Path, bands: Sequence[str] = ("red", "green")) -> Path:
    """Imagery of a few bands."""
    pixels = np.random.default_rng(0).integers(1, 255, (len(bands), *GRID.shape)).astype(np.uint8)
    return write_geotiff(path, pixels, GRID, bands=bands, nodata=0)


def item(href: str) -> dict[str, Any]:
    """A scene as a STAC item tells of it, so fully that its header need not be read."""
    west, south, east, north = GRID.extent.to_crs("EPSG:4326").boundingbox.bbox
    return {
        "type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": "scene",
        "collection": "naip", "bbox": [west, south, east, north],
        "geometry": shapely.geometry.mapping(shapely.box(west, south, east, north)),
        "properties": {
            "datetime": "2020-05-01T00:00:00Z", "eo:cloud_cover": 3, "proj:epsg": 32610,
            "proj:shape": list(GRID.shape), "proj:transform": list(GRID.transform)[:6],
        },
        "links": [],
        "assets": {
            "image": {
                "href": href, "type": "image/tiff; application=geotiff; profile=cloud-optimized",
                "roles": ["data"], "eo:bands": [{"name": "Red", "common_name": "red"},
                {"name": "Green", "common_name": "green"}],
                "raster:bands": [{"data_type": "uint8"}, {"data_type": "uint8", "scale": 2.0}],
            },
            "thumbnail": {"href": "thumbnail.jpg", "type": "image/jpeg", "roles": ["thumbnail"]},
        },
    }  # fmt: skip


def collection(links: list[dict[str, str]]) -> dict[str, Any]:
    """The collection of that item."""
    return {
        "type": "Collection", "stac_version": "1.0.0", "id": "naip", "description": "aerial photos",
        "license": "proprietary", "links": links,
        "extent": {"spatial": {"bbox": [[-125, 30, -110, 45]]},
        "temporal": {"interval": [["2015-01-01T00:00:00Z", None]]}},
    }  # fmt: skip


def text(content: Any) -> bytes:
    """Content as a server sends it."""
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def stac_api(folder: Path) -> tuple[Any, Run]:
    """Answers of a STAC API: its landing page and the items that it found."""
    host = "https://hostile.example/stac"
    link = {"rel": "search", "href": f"{host}/search", "type": "application/geo+json"}
    root = {
        "type": "Catalog", "stac_version": "1.0.0", "id": "api", "description": "an API",
        "links": [{"rel": "root", "href": host}, {**link, "method": "GET"},
        {**link, "method": "POST"}],
        "conformsTo": [f"https://api.stacspec.org/v1.0.0/{name}" for name in
        ("core", "item-search", "item-search#query", "collections", "ogcapi-features")],
    }  # fmt: skip
    found = {
        "type": "FeatureCollection",
        "features": [item(f"{host}/a.tif")],
        "links": [{"rel": "self", "href": f"{host}/search"}],
    }
    whole = {"root": root, "found": found}

    def of(name: str) -> Any:
        broken = damaged([json.dumps(whole[name]).encode()])
        return st.tuples(st.just(name), st.one_of(twisted([whole[name]]), broken, JSON))

    def read(change: tuple[str, Any]) -> None:
        answers = whole | dict([change])

        def answer(self: Any, href: Any, *args: Any, **kwargs: Any) -> str:
            return text(answers["found" if "search" in str(href) else "root"]).decode(
                "utf-8", "replace"
            )

        def remote(path: str, *args: Any) -> Any:
            raise ImageryError(f"{path} is not on this machine")

        api = "pystac_client.stac_api_io.StacApiIO.request"
        with patch(api, answer), patch.object(stac, "describe_file", remote):
            source = f"stac+{host}#naip"
            for found in stac.find_scenes(source, BBOX, query=["eo:cloud_cover<10"]):
                assert all("://" in file.path for file in found.files)
            open_imagery(source, bbox=BBOX)

    return st.sampled_from(sorted(whole)).flatmap(of), read


def stac_catalog(folder: Path) -> tuple[Any, Run]:
    """A static catalog of one collection and one item, and the imagery that it leads to."""
    scene(folder / "a.tif")
    child = {"rel": "child", "href": "./collection.json"}
    whole = {
        "catalog.json": {
            "type": "Catalog", "stac_version": "1.0.0", "id": "here", "description": "files",
            "links": [{"rel": "root", "href": "./catalog.json"}, child],
        },
        "collection.json": collection([{"rel": "item", "href": "./item.json"}]),
        "item.json": item("./a.tif"),
    }  # fmt: skip
    for name, content in whole.items():
        (folder / name).write_bytes(text(content))

    def of(name: str) -> Any:
        broken = damaged([text(whole[name])])
        return st.tuples(st.just(name), st.one_of(twisted([whole[name]]), broken, JSON))

    def read(change: tuple[str, Any]) -> None:
        name, content = change
        (folder / name).write_bytes(text(content))
        try:
            imagery = open_imagery(f"stac+{folder}/catalog.json#naip", bbox=BBOX)
            imagery.read(0, 0, 8, 8)
        finally:
            (folder / name).write_bytes(text(whole[name]))

    read(("item.json", whole["item.json"]))
    return st.sampled_from(sorted(whole)).flatmap(of), read


def tile_index(folder: Path) -> tuple[Any, Run]:
    """Tile indexes, whose places come from a table."""
    scene(folder / "a.tif")
    index = folder / "index.gpkg"
    table = gpd.GeoDataFrame(
        {"location": ["a.tif"]}, geometry=[shapely.box(*GRID.extent.boundingbox.bbox)], crs=GRID.crs
    )
    table.to_file(index)
    table.to_file(folder / "index.geojson")
    originals = [(folder / name).read_bytes() for name in ("index.gpkg", "index.geojson")]

    def read(content: bytes) -> None:
        path = index if content[:6] == b"SQLite" else folder / "index.geojson"
        path.write_bytes(content)
        if all("://" not in file for file in list_files(str(path))):
            open_imagery(path).read(0, 0, 8, 8)

    read(originals[0])
    return damaged(originals), read


def like(folder: Path) -> tuple[Any, Run]:
    """Rasters whose grid another is put on."""
    path, whole = scene(folder / "like.tif"), scene(folder / "a.tif")

    def read(content: bytes) -> None:
        path.write_bytes(content)
        open_imagery(whole, like=path).read(0, 0, 8, 8)

    original = path.read_bytes()
    read(original)
    return damaged([original]), read


def covariates(folder: Path) -> tuple[Any, Run]:
    """Environmental rasters, and rasters of sampling effort."""
    whole, path = scene(folder / "a.tif"), scene(folder / "elevation.tif", ["elevation"])

    def read(content: bytes) -> None:
        path.write_bytes(content)
        values = open_covariates([f"height={path}"], crs="EPSG:32610")
        values.at(*PLACES)
        values.cells(GRID[0:4, 0:4])
        biased_background(open_imagery(whole), 3, 8, np.random.default_rng(0), open_imagery(path))

    original = path.read_bytes()
    read(original)
    return damaged([original]), read


def surveys(folder: Path) -> tuple[Any, Run]:
    """Tables of presence and absence."""
    table = pd.DataFrame(
        {"lon": [-122.1, -122.2], "lat": [37.1, 37.2], "taxon": ["Acer rubrum", "Acer né"],
         "present": [1, 0]}
    )  # fmt: skip
    table.to_csv(folder / "surveys.csv", index=False)
    table.to_parquet(folder / "surveys.parquet")
    originals = [(folder / name).read_bytes() for name in ("surveys.csv", "surveys.parquet")]

    def read(content: bytes) -> None:
        path = folder / ("surveys.parquet" if content[:3] == b"PAR" else "surveys.csv")
        path.write_bytes(content)
        read_surveys(path)

    for original in originals:
        read(original)
    return damaged(originals), read


def kept_facts(folder: Path) -> tuple[Any, Run]:
    """Facts of a remote data set, as they were kept on this machine."""
    [file] = tiny_scene(folder, rows=6).chips.rglob("*.parquet")
    kept, address = folder / "kept.parquet", f"file://{file}"

    def read(content: bytes) -> None:
        kept.write_bytes(content)
        with patch.object(paired, "_kept_facts", lambda address: kept):
            assert len(paired._read_facts(address)[0]) == 6

    with patch.object(paired, "_kept_facts", lambda address: kept):
        paired._read_facts(address)
    return damaged([kept.read_bytes()]), read


def birds(folder: Path) -> tuple[Any, Run]:
    """iNat-2021 birds, CUB-200-2011 and NABirds in their layouts."""
    tops = [inat_birds(folder / "inat", 12, 3), cub(folder / "cub", 6), nabirds(folder / "na")]
    pd.DataFrame({"image_id": [100], "overhead": ["100.jpeg"]}).to_csv(
        tops[0] / "val_birds_labels.csv", index=False
    )
    files = [
        (top, file)
        for top in tops
        for file in sorted(top.iterdir())
        if file.suffix in (".json", ".txt", ".csv")
    ]
    saved = {file: file.read_bytes() for _, file in files}

    def of(place: tuple[Path, Path]) -> Any:
        whole = saved[place[1]]
        broken = damaged([whole])
        if place[1].suffix == ".json":
            broken = st.one_of(twisted([json.loads(whole)]), broken, JSON)
        return st.tuples(st.just(place), broken)

    def read(change: tuple[tuple[Path, Path], Any]) -> None:
        (top, file), content = change
        file.write_bytes(text(content))
        try:
            dataset = open_birds(top)
            dataset.ground([0])
            assert dataset.labels.min() >= 0
        finally:
            file.write_bytes(saved[file])

    return st.sampled_from(files).flatmap(of), read


SOURCES: dict[str, Callable[[Path], tuple[Any, Run]]] = {
    "stac_api": stac_api,
    "stac_catalog": stac_catalog,
    "tile_index": tile_index,
    "like": like,
    "covariates": covariates,
    "surveys": surveys,
    "kept_facts": kept_facts,
    "birds": birds,
}
