"""Ranges: where a map reaches a threshold that was fixed at training, as polygons."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import geopandas as gpd
import numpy as np
from rasterio.features import shapes
from shapely import area, union_all
from shapely.geometry import MultiPolygon, shape
from shapely.geometry.base import BaseGeometry

from speciesmap.outputs import replacing
from speciesmap.rasters.imagery import open_imagery

EQUAL_AREA = "EPSG:6933"
LAYER = "ranges"


def draw_range(path: Path, taxon: str, thresholds: Mapping[str, float]) -> gpd.GeoDataFrame:
    """Turn a map into one polygon for each threshold.

    Args:
        path: Map whose first band is thresholded; cells where a band `applicability` is 0 are
            left out.
        taxon: Kept with the polygons.
        thresholds: Value by rule.

    Returns:
        A row for each rule: `taxon`, `rule`, `threshold`, `quantity`, `area_km2` and the
        geometry, empty where nothing reaches the threshold, in the map's CRS.
    """
    source = open_imagery(path)
    pixels, valid = source.read(0, 0, *source.shape)
    known = valid & np.isfinite(pixels[0])
    if "applicability" in source.bands:
        known &= pixels[source.bands.index("applicability")] != 0
    rows = []
    for rule, threshold in thresholds.items():
        inside = known & (pixels[0] >= threshold)
        found = shapes(inside.astype(np.uint8), inside, transform=source.geobox.transform)
        whole = _multi(union_all([shape(geometry) for geometry, _ in found]))
        rows.append((taxon, rule, threshold, source.bands[0], whole))
    names = ["taxon", "rule", "threshold", "quantity", "geometry"]
    table = gpd.GeoDataFrame(rows, columns=names, geometry="geometry", crs=source.geobox.crs)
    table.insert(4, "area_km2", area(table.geometry.to_crs(EQUAL_AREA).to_numpy()) / 1e6)
    return table


def write_ranges(table: gpd.GeoDataFrame, path: Path) -> Path:
    """Write ranges as a GeoPackage with one layer, `ranges`."""
    with replacing(path) as beside:
        table.to_file(beside, layer=LAYER, driver="GPKG")
    return path


def _multi(geometry: BaseGeometry) -> MultiPolygon:
    return (
        geometry
        if isinstance(geometry, MultiPolygon)
        else MultiPolygon([] if geometry.is_empty else [geometry])
    )
