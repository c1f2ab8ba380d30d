"""A STAC item that describes a folder of maps."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pystac
from pystac.extensions.projection import ProjectionExtension
from pystac.extensions.raster import (
    DataType,
    NoDataStrings,
    RasterBand,
    RasterExtension,
    Statistics,
)
from rasterio.warp import transform_bounds, transform_geom

from speciesmap.errors import OutputError
from speciesmap.outputs import replacing
from speciesmap.present.styles import read_legend
from speciesmap.present.warp import open_map
from speciesmap.taxa import slug

MLM = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"
PROCESSING = "https://stac-extensions.github.io/processing/v1.1.0/schema.json"
COG = "image/tiff; application=geotiff; profile=cloud-optimized"


def write_item(
    folder: Path,
    rasters: Sequence[Path],
    *,
    model: Mapping[str, Any],
    imagery: str,
    datetime: dt.datetime,
    item_id: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `item.json`, which finds and describes the maps of a folder.

    Each map is an asset with its grid, band and statistics (projection and raster extensions).
    The page `map.html`, the record `run.json` and the QGIS styles become assets where the folder
    has them. Links are relative: the folder can be moved.

    Args:
        folder: Where the maps are.
        rasters: Map GeoTIFFs in it.
        model: What made them; of its keys `name`, `architecture`, `bands`, `window_px`,
            `resolution_m`, `fingerprint` and `path` all may be missing. With the first four and a
            path the model is described by the machine learning model extension, which demands the
            model among the assets.
        imagery: Source of the imagery; linked as `derived_from`.
        datetime: Of the imagery if it is known, else of the maps; without a zone it is UTC.
        item_id: Identifier; by default the folder's name.
        overwrite: Whether an existing `item.json` may be replaced.

    Returns:
        Path of `item.json`.

    Raises:
        ImageryError: A map cannot be opened.
        OutputError: There are no maps, or the item exists.
    """
    folder = Path(folder)
    if not rasters:
        raise OutputError(f"no maps in {folder} to describe; name at least one GeoTIFF")
    places = [_place(path) for path in rasters]
    boxes = [place["bbox"] for place in places]
    bbox = [
        *(min(b[i] for b in boxes) for i in (0, 1)),
        *(max(b[i] for b in boxes) for i in (2, 3)),
    ]
    same = all(place["geometry"] == places[0]["geometry"] for place in places)
    when = datetime if datetime.tzinfo else datetime.replace(tzinfo=dt.UTC)
    item = pystac.Item(
        id=item_id or folder.resolve().name,
        geometry=places[0]["geometry"] if same else _rectangle(bbox),
        bbox=bbox,
        datetime=when.astimezone(dt.UTC),
        properties={
            "created": f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ}",
            "processing:level": "L4",
            "processing:software": {"speciesmap": _version()},
        },
        stac_extensions=[PROCESSING],
    )
    ProjectionExtension.add_to(item)
    RasterExtension.add_to(item)
    for path, place in zip(rasters, places, strict=True):
        _add_map(item, folder, path, place)
    for name, media, role, title in (
        ("map.html", "text/html", "overview", "Interactive map"),
        ("run.json", "application/json", "metadata", "Inputs, versions, seed and timings"),
    ):
        if (folder / name).exists():
            key = Path(name).stem
            item.add_asset(key, pystac.Asset(f"./{name}", title, None, media, [role]))
    _add_model(item, folder, model, places[0]["quantity"])
    item.add_link(pystac.Link("derived_from", _relative(imagery, folder), title="Imagery"))
    out = folder / "item.json"
    with replacing(out, overwrite=overwrite) as beside:
        text = json.dumps(
            item.to_dict(include_self_link=False, transform_hrefs=False),
            indent=2,
            ensure_ascii=False,
            allow_nan=False,
        )
        beside.write_text(text + "\n", encoding="utf-8")
    return out


def _place(path: Path) -> dict[str, Any]:
    """Read what an item says about a map."""
    with open_map(path) as dataset:
        legend = read_legend(dataset)
        t, (height, width) = dataset.transform, dataset.shape
        ring = [t * corner for corner in ((0, 0), (0, height), (width, height), (width, 0), (0, 0))]
        polygon = {"type": "Polygon", "coordinates": [[list(point) for point in ring]]}
        bounds = transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
        geometry = transform_geom(dataset.crs, "EPSG:4326", polygon)
        tags = dataset.tags(1)
        return {
            "title": f"{legend.label} ({legend.quantity})",
            "quantity": legend.quantity,
            "bbox": [round(v, 8) for v in bounds],
            # in two parts where it crosses the antimeridian
            "geometry": json.loads(json.dumps(geometry), parse_float=lambda v: round(float(v), 8)),
            "epsg": dataset.crs.to_epsg(),
            "wkt2": dataset.crs.to_wkt(version="WKT2_2019"),
            "proj_bbox": list(dataset.bounds),
            "shape": [height, width],
            "transform": list(t)[:6],
            "dtype": dataset.dtypes[0],
            "nodata": dataset.nodata,
            "statistics": {
                name: float(tags[tag])
                for name, tag in (
                    ("minimum", "STATISTICS_MINIMUM"),
                    ("maximum", "STATISTICS_MAXIMUM"),
                    ("mean", "STATISTICS_MEAN"),
                    ("stddev", "STATISTICS_STDDEV"),
                    ("valid_percent", "STATISTICS_VALID_PERCENT"),
                )
                if tag in tags
            },
        }


def _add_map(item: pystac.Item, folder: Path, path: Path, place: Mapping[str, Any]) -> None:
    href = _relative(str(path), folder)
    asset = pystac.Asset(href, place["title"], None, COG, ["data"])
    key = Path(path).stem
    item.add_asset(key, asset)
    ProjectionExtension.ext(asset).apply(
        epsg=place["epsg"],
        wkt2=None if place["epsg"] else place["wkt2"],
        bbox=place["proj_bbox"],
        shape=place["shape"],
        transform=place["transform"],
    )
    nodata = place["nodata"]
    band = RasterBand.create(
        nodata=NoDataStrings.NAN if nodata is not None and nodata != nodata else nodata,
        data_type=DataType(place["dtype"]),
        statistics=Statistics.create(**place["statistics"]) if place["statistics"] else None,
    )
    band.properties["name"] = place["quantity"]
    RasterExtension.ext(asset).apply([band])
    style = Path(path).with_suffix(".qml")
    if style.exists():
        href = _relative(str(style), folder)
        item.add_asset(
            f"{key}-style",
            pystac.Asset(
                href, f"QGIS style of {place['title']}", None, "application/xml", ["style"]
            ),
        )


def _add_model(item: pystac.Item, folder: Path, model: Mapping[str, Any], quantity: str) -> None:
    """Describe the model: fully where the extension's demands are met, else by its fingerprint."""
    if model.get("fingerprint"):
        item.properties["speciesmap:model"] = str(model["fingerprint"])
    if not all(model.get(key) for key in ("name", "architecture", "bands", "window_px", "path")):
        return
    bands, side = [str(band) for band in model["bands"]], int(model["window_px"])
    item.stac_extensions.append(MLM)
    item.properties |= {
        "mlm:name": f"speciesmap-{slug(str(model['name']))}".rstrip("_"),
        "mlm:architecture": str(model["architecture"]),
        "mlm:framework": "PyTorch",
        "mlm:tasks": ["similarity-search", "regression"],
        "mlm:input": [
            {
                "name": "aerial window",
                "bands": bands,
                "input": {
                    "shape": [-1, len(bands), side, side],
                    "dim_order": ["batch", "bands", "height", "width"],
                    "data_type": "float32",
                },
            }
        ],
        "mlm:output": [
            {
                "name": quantity,
                "tasks": ["regression"],
                "result": {"shape": [-1], "dim_order": ["batch"], "data_type": "float32"},
            }
        ],
    }
    described: list[dict[str, Any]] = [{"name": band} for band in bands]
    if model.get("resolution_m"):
        for band in described:
            band["spatial_resolution"] = float(model["resolution_m"])
    item.add_asset(
        "model",
        pystac.Asset(
            _relative(str(model["path"]), folder),
            "Model that made the maps",
            roles=["mlm:model"],
            extra_fields={
                "mlm:artifact_type": "safetensors.torch.save_file",
                "raster:bands": described,
            },
        ),
    )


def _rectangle(bbox: Sequence[float]) -> dict[str, Any]:
    west, south, east, north = bbox
    ring = [[west, north], [west, south], [east, south], [east, north], [west, north]]
    return {"type": "Polygon", "coordinates": [ring]}


def _relative(href: str, folder: Path) -> str:
    """Write a local path relative to the folder; leave addresses as they are."""
    if "://" in href or "+http" in href:
        return href
    path = Path(os.path.relpath(href, folder)).as_posix()
    return path if path.startswith(".") else f"./{path}"


def _version() -> str:
    try:
        return version("speciesmap")
    except PackageNotFoundError:
        return "unknown"
