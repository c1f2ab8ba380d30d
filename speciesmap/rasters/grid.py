"""The grid of a map, chosen once: of one raster its own, of unlike scenes by a stated rule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyproj
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from speciesmap.errors import AreaError, ConfigError, ImageryError
from speciesmap.rasters.windows import bounds_of, outline, transformed

TOLERANCE_PX = 0.01  # of scenes against a grid, over their whole width
SNAP_PX = 64  # origins are multiples, so that areas share cells of 1, 2, 4, ... 64 pixels
UTM_LATITUDES = (-80.0, 84.0)
METRES_PER_DEGREE = 111_320.0  # of latitude, and of longitude at the equator
WIDEST_UTM_DEG = 12.0  # twice a zone; scale is wrong by 1% at its edges


def offset(grid: GeoBox, geobox: GeoBox) -> tuple[int, int] | None:
    """Row and column of a raster's first pixel on a grid, where their pixels coincide."""
    if grid.crs != geobox.crs:
        return None
    to_grid = ~grid.transform * geobox.transform
    if not np.isfinite(to_grid).all():
        return None
    height, width = geobox.shape
    row, col = round(to_grid.f), round(to_grid.c)
    across, down = np.array([0, width, 0]), np.array([0, 0, height])
    cols, rows = transformed(to_grid, across, down)
    strays = np.abs([cols - across - col, rows - down - row]).max()
    return (row, col) if strays <= TOLERANCE_PX else None


def to_pixels(
    source: GeoBox, grid: GeoBox, rows: NDArray[np.float64], cols: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Convert continuous pixel coordinates of a raster to those of a grid: rows and columns.

    Raises:
        ImageryError: No way is known from one CRS to the other.
    """
    x, y = transformed(source.transform, cols, rows)
    try:
        transformer = pyproj.Transformer.from_crs(source.crs, grid.crs, always_xy=True)
    except pyproj.exceptions.ProjError as error:
        raise ImageryError(
            f"no way is known from {_name(source.crs)} to {_name(grid.crs)} ({error}); choose "
            "another grid with --crs or --like"
        ) from error
    there = transformed(~grid.transform, *transformer.transform(x, y))
    return there[1], there[0]


def on_grid(
    source: GeoBox, grid: GeoBox, rectangle: tuple[int, int, int, int]
) -> tuple[int, int, int, int] | None:
    """Whole pixels of a grid that hold a rectangle of a raster.

    Args:
        source: Grid of the raster.
        grid: Another grid.
        rectangle: Top, left, bottom and right, in pixels of the raster.

    Returns:
        The same in pixels of the grid, or `None` where no part can be projected there.
    """
    top, left, bottom, right = rectangle
    across, down = outline(left, top, right, bottom)
    rows, cols = to_pixels(source, grid, down, across)
    fine = np.isfinite(rows) & np.isfinite(cols)
    if not fine.any():
        return None
    rows, cols = rows[fine], cols[fine]
    return (
        math.floor(rows.min()),
        math.floor(cols.min()),
        math.ceil(rows.max()),
        math.ceil(cols.max()),
    )


def union(geoboxes: Sequence[GeoBox]) -> GeoBox | None:
    """The smallest grid that holds rasters whose pixels coincide, or `None` if they do not."""
    first = geoboxes[0]
    offsets = []
    for geobox in geoboxes:
        place = offset(first, geobox)
        if place is None:
            return None
        offsets.append((*place, place[0] + geobox.shape[0], place[1] + geobox.shape[1]))
    top, left = (min(o[k] for o in offsets) for k in (0, 1))
    bottom, right = (max(o[k] for o in offsets) for k in (2, 3))
    transform = first.transform * Affine.translation(left, top)
    return GeoBox((bottom - top, right - left), transform, first.crs)


def choose_grid(
    scenes: Sequence[GeoBox],
    *,
    bbox: Sequence[float] | None = None,
    bbox_crs: Any = "EPSG:4326",
    crs: Any = None,
    resolution_m: float | None = None,
    preferred_m: float | None = None,
) -> GeoBox:
    """Choose the grid on which scenes are read.

    Scenes whose pixels coincide keep their own grid, so that none is warped, unless a CRS or a
    resolution is asked for. For others the CRS is the UTM zone of the area's centre, in the datum
    of the scenes that are in that zone, if any; the origin is a whole number of pixels, or lies on
    the pixels of the first scene of this CRS and resolution.

    Args:
        scenes: Their own grids, those that matter most first.
        bbox: Area of interest; by default that of the scenes.
        bbox_crs: CRS of `bbox`.
        crs: Of the grid.
        resolution_m: Side of its pixels on the ground, metres.
        preferred_m: The same, used for unlike scenes where none is asked for and no scene is more
            than 1.5 times coarser. By default that of the finest scene.

    Raises:
        AreaError: The area reaches beyond UTM, or is too wide for it, and no CRS is asked for.
        ConfigError: The CRS is unknown.
    """
    own = union(scenes)
    if own is not None and crs is None and resolution_m is None:
        return own
    area = _lonlat(bbox, bbox_crs) if bbox is not None else _area(scenes)
    west, south, east, north = area
    center = ((west + east) / 2, (south + north) / 2)
    chosen = _crs(crs) if crs is not None else _utm(area, center, scenes)
    if resolution_m is None:
        sizes = [ground_m(scene) for scene in scenes]
        usable = preferred_m is not None and max(sizes) <= 1.5 * preferred_m
        resolution_m = preferred_m if usable else _rounded(min(sizes))
    assert resolution_m is not None
    if not resolution_m > 0:
        raise ConfigError(f"--resolution-m {resolution_m:g} is no size of a pixel; give metres")
    side = resolution_m / _metres_per_unit(chosen, center)
    lattice = Affine(side, 0, 0, 0, -side, 0)
    snap = SNAP_PX
    for scene in scenes:
        t = scene.transform
        same = max(abs(t.a - side), abs(t.e + side)) < 1e-3 * side and t.b == t.d == 0
        if same and scene.crs == chosen:
            lattice, snap = t, 1
            break
    left, bottom, right, top = bounds_of(area, "EPSG:4326", chosen)
    cols, rows = transformed(~lattice, np.array([left, right]), np.array([top, bottom]))
    if not np.isfinite([cols, rows]).all():
        raise AreaError(f"the area cannot be projected to {chosen.to_string()}; choose another CRS")
    first_col, first_row = (math.floor(v[0] / snap + 1e-6) * snap for v in (cols, rows))
    last_col, last_row = (math.ceil(v[1] / snap - 1e-6) * snap for v in (cols, rows))
    return GeoBox(
        (max(last_row - first_row, 1), max(last_col - first_col, 1)),
        lattice * Affine.translation(first_col, first_row),
        chosen.to_wkt() if chosen.to_epsg() is None else f"EPSG:{chosen.to_epsg()}",
    )


def grown(area: Sequence[float], around_m: float) -> tuple[float, float, float, float]:
    """An area in degrees and what lies around it; the east exceeds 180 where it crosses there."""
    west, south, east, north = area
    up = around_m / METRES_PER_DEGREE
    aside = min(up / max(math.cos(math.radians(max(abs(south), abs(north)))), 1e-9), 180)
    turn = 360 if west - aside < -180 else 0
    bounds = west - aside + turn, max(south - up, -90), east + aside + turn, min(north + up, 90)
    return bounds if bounds[2] - bounds[0] < 360 else (-180, bounds[1], 180, bounds[3])


def ground_m(geobox: GeoBox) -> float:
    """Geometric mean of the central pixel's sides on the ellipsoid, in metres; see `sides_m`."""
    return math.sqrt(math.prod(sides_m(geobox)))


def sides_m(geobox: GeoBox) -> tuple[float, float]:
    """Measure the central pixel on the ellipsoid: its width and its height, in metres.

    Raises:
        ImageryError: The centre has no longitude and latitude, or the pixel no size.
    """
    col, row = geobox.shape[1] / 2, geobox.shape[0] / 2
    cols, rows = np.array([col, col + 1, col]), np.array([row, row, row + 1])
    x, y = transformed(geobox.transform, cols, rows)
    try:
        to_lonlat = pyproj.Transformer.from_crs(geobox.crs, "EPSG:4326", always_xy=True)
    except pyproj.exceptions.ProjError as error:
        raise ImageryError(
            f"the imagery's CRS, {_name(geobox.crs)}, has no longitude and latitude; set the right "
            "one with gdal_edit.py -a_srs"
        ) from error
    lon, lat = to_lonlat.transform(x, y)
    if not (np.isfinite([lon, lat]).all() and np.abs(lat).max() <= 90):
        raise ImageryError(
            f"the centre of the imagery, {x[0]:.6g} {y[0]:.6g}, has no longitude and latitude in "
            f"{_name(geobox.crs)}; its CRS or transform is wrong: set the right one with "
            "gdal_edit.py -a_srs or -a_ullr"
        )
    _, _, sides = pyproj.Geod(ellps="WGS84").inv(lon[[0, 0]], lat[[0, 0]], lon[1:], lat[1:])
    if not (np.isfinite(sides).all() and sides.all()):
        raise ImageryError(
            f"the imagery's central pixel has sides of {sides[0]:g} and {sides[1]:g} m; its "
            "transform is wrong: set the right one with gdal_edit.py -a_ullr"
        )
    return float(sides[0]), float(sides[1])


def in_words(geobox: GeoBox) -> str:
    """A line that tells a grid: its CRS, pixels, origin and shape."""
    t = geobox.transform
    height, width = geobox.shape
    return (
        f"{_name(geobox.crs)}, pixels of {abs(t.a):.6g} x "
        f"{abs(t.e):.6g}, origin {t.c:.10g} {t.f:.10g}, {height} rows x {width} columns"
    )


def _name(crs: Any) -> str:
    """A CRS as people call it: EPSG:32610, not its definition."""
    known = pyproj.CRS.from_user_input(crs)
    return ":".join(known.to_authority() or ()) or known.name


def _crs(crs: Any) -> pyproj.CRS:
    try:
        return pyproj.CRS.from_user_input(crs)
    except pyproj.exceptions.CRSError as error:
        raise ConfigError(f"--crs {crs} is not a CRS; give one such as EPSG:32610") from error


def _lonlat(bbox: Sequence[float], crs: Any) -> tuple[float, float, float, float]:
    """Bounds in degrees; the east exceeds 180 where they cross the antimeridian."""
    west, south, east, north = bounds_of(bbox, crs, "EPSG:4326")
    return west, south, east, north


def _area(scenes: Sequence[GeoBox]) -> tuple[float, float, float, float]:
    """Bounds in degrees that hold all scenes."""
    boxes = np.array([bounds_of(s.boundingbox, s.crs, "EPSG:4326") for s in scenes])  # (N, 4)
    center = boxes[0, [0, 2]].mean()
    shift = np.round((boxes[:, [0, 2]].mean(axis=1) - center) / 360) * 360
    boxes[:, [0, 2]] -= shift[:, None]
    west, south = boxes[:, :2].min(axis=0)
    east, north = boxes[:, 2:].max(axis=0)
    return float(west), float(south), float(east), float(north)


def _utm(
    area: tuple[float, float, float, float],
    center: tuple[float, float],
    scenes: Sequence[GeoBox],
) -> pyproj.CRS:
    west, south, east, north = area
    low, high = UTM_LATITUDES
    if south < low or north > high:
        pole = "EPSG:3031" if south < low else "EPSG:3413"
        raise AreaError(
            f"the area reaches latitude {south if south < low else north:.4g}, UTM ends at "
            f"{low if south < low else high:g}; choose a CRS for it, such as --crs {pole}"
        )
    if east - west > WIDEST_UTM_DEG:
        raise AreaError(
            f"the area is {east - west:.3g} degrees wide, more than UTM shows well "
            f"({WIDEST_UTM_DEG:g}); map it in parts or choose a CRS with --crs"
        )
    zone = int((center[0] + 180) % 360 // 6) + 1
    name = f"{zone}{'N' if center[1] >= 0 else 'S'}"
    theirs = Counter(str(s.crs) for s in scenes if pyproj.CRS(str(s.crs)).utm_zone == name)
    if theirs:
        return pyproj.CRS(theirs.most_common(1)[0][0])
    return pyproj.CRS.from_epsg((32600 if center[1] >= 0 else 32700) + zone)


def _rounded(size_m: float) -> float:
    """A size as it was meant: 0.59978 m in UTM is 0.6."""
    nice = float(f"{size_m:.2g}")
    return nice if abs(nice - size_m) < 2e-3 * size_m else size_m


def _metres_per_unit(crs: pyproj.CRS, center: tuple[float, float]) -> float:
    """Metres on the ground to a unit of a CRS at a place; 1 where they differ by under 1%."""
    to_crs = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    x, y = to_crs.transform(*center)
    if not np.isfinite([x, y]).all():
        raise AreaError(f"the area cannot be projected to {crs.to_string()}; choose another CRS")
    unit = 1e-5 if crs.is_geographic else 1.0
    size = ground_m(GeoBox((1, 1), Affine(unit, 0, x, 0, -unit, y), crs.to_wkt())) / unit
    return 1.0 if abs(size - 1) < 0.01 else size
