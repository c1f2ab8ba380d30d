"""Ranges: where a map reaches a threshold that was fixed at training, as polygons."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import geopandas as gpd
import numpy as np
from affine import Affine
from rasterio.features import shapes
from shapely import area, union_all
from shapely.geometry import MultiPolygon, shape
from shapely.geometry.base import BaseGeometry

from speciesmap.outputs import replacing
from speciesmap.rasters.imagery import open_imagery

EQUAL_AREA = "EPSG:6933"
LAYER = "ranges"
TILE_PX = 2048  # side of the parts in which a map is read


def draw_range(path: Path, taxon: str, thresholds: Mapping[str, float]) -> gpd.GeoDataFrame:
    """Turn a map into one polygon for each threshold.

    The map is read part by part, and polygons that meet at the edge of a part are joined.

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
    source = source.select([b for k, b in enumerate(source.bands) if not k or b == "applicability"])
    height, width = source.shape
    parts: dict[str, list[BaseGeometry]] = {rule: [] for rule in thresholds}
    for top, left in product(range(0, height, TILE_PX), range(0, width, TILE_PX)):
        size = min(TILE_PX, height - top), min(TILE_PX, width - left)
        pixels, valid = source.read(top, left, *size)
        known = valid & np.isfinite(pixels[0])
        if len(pixels) > 1:
            known &= pixels[1] != 0
        transform = source.geobox.transform * Affine.translation(left, top)
        for rule, threshold in thresholds.items():
            inside = known & (pixels[0] >= threshold)
            found = shapes(inside.astype(np.uint8), inside, transform=transform)
            parts[rule].append(union_all([shape(geometry) for geometry, _ in found]))
    rows = [
        (taxon, rule, threshold, source.bands[0], _multi(union_all(parts[rule])))
        for rule, threshold in thresholds.items()
    ]
    names = ["taxon", "rule", "threshold", "quantity", "geometry"]
    table = gpd.GeoDataFrame(rows, columns=names, geometry="geometry", crs=source.geobox.crs)
    area_m2 = area(table.geometry.to_crs(EQUAL_AREA).to_numpy())
    table.insert(4, "area_km2", np.round(area_m2 / 1e6, 6))
    return table


def write_ranges(table: gpd.GeoDataFrame, path: Path) -> Path:
    """Write ranges as a GeoPackage, into its layer `ranges`."""
    with replacing(path) as beside:
        table.to_file(beside, layer=LAYER, driver="GPKG")
    return path


def _multi(geometry: BaseGeometry) -> MultiPolygon:
    return (
        geometry
        if isinstance(geometry, MultiPolygon)
        else MultiPolygon([] if geometry.is_empty else [geometry])
    )
