"""The arithmetic of windows and cells, in whole pixels of the imagery's own grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyproj
from affine import Affine
from numpy.typing import ArrayLike, NDArray
from odc.geo.geobox import GeoBox

from speciesmap.errors import AreaError, ImageryError

MAX_LATITUDE = 85.0511  # of Web Mercator
EDGE_POINTS = 33  # along each side of an area's outline when it is projected


@dataclass(frozen=True)
class WindowGrid:
    """Windows at a constant stride over a raster, and the cells that they describe.

    Windows start at pixels whose number, counted from the origin of the raster's CRS, is a multiple
    of the stride. A window's cell is the square of `stride_px` at its centre. The grid holds every
    cell whose centre lies in the raster, so that windows at the raster's edge reach beyond it. So
    rasters that share pixels share cells, whatever part of them is at hand: an area of interest or
    the scenes that were found choose cells and never move them.

    Attributes:
        imagery: Grid of the raster.
        window_px: Side of a window.
        stride_px: Distance between windows and side of a cell.
    """

    imagery: GeoBox
    window_px: int
    stride_px: int

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ImageryError: A size is not positive, or the raster holds no cell.
        """
        if self.window_px < 1 or self.stride_px < 1:
            raise ImageryError(
                f"windows of {self.window_px} px every {self.stride_px} px make no grid; both must "
                "be at least 1"
            )
        if min(self.cells) < 1:
            height, width = self.imagery.shape
            raise ImageryError(
                f"a raster of {height} x {width} px is too small for cells of {self.stride_px} px; "
                "choose a smaller --stride-px"
            )

    @cached_property
    def first(self) -> tuple[int, int]:
        """Row and column of the first pixel of the first cell's window; may be negative."""
        t = self.imagery.transform
        across, down = ~Affine(t.a, t.b, 0, t.d, t.e, 0) * (t.c, t.f)
        half, starts = self.window_px / 2, []
        for pixels in (down, across):
            # pixels begin or are centred at whole numbers; neither is where rounding turns
            phase = -math.floor(pixels + 0.25) % self.stride_px
            starts.append(phase - self.stride_px * math.floor((phase + half) / self.stride_px))
        return starts[0], starts[1]

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        rows, cols = (
            math.ceil((side - first - self.window_px / 2) / self.stride_px)
            for side, first in zip(self.imagery.shape, self.first, strict=True)
        )
        return rows, cols

    def start(self, row: int, col: int) -> tuple[int, int]:
        """Row and column of the first pixel of a cell's window."""
        return self.first[0] + row * self.stride_px, self.first[1] + col * self.stride_px

    def pixels(self, rows: slice, cols: slice) -> tuple[int, int, int, int]:
        """The smallest raster within this one whose cells are the given ones.

        Returns:
            Its first row and column, height and width, in pixels.
        """
        row, col = self.start(rows.start, cols.start)
        height, width = ((r.stop - r.start - 1) * self.stride_px + 1 for r in (rows, cols))
        return row + self.window_px // 2, col + self.window_px // 2, height, width

    @property
    def geobox(self) -> GeoBox:
        """Grid of the cells on Earth."""
        beside = (self.window_px - self.stride_px) / 2
        corner = Affine.translation(self.first[1] + beside, self.first[0] + beside)
        transform = self.imagery.transform * corner * Affine.scale(self.stride_px)
        return GeoBox(self.cells, transform, self.imagery.crs)


def cells_in(bbox: Sequence[float], cells: GeoBox, crs: Any = "EPSG:4326") -> tuple[slice, slice]:
    """Find the smallest ranges of cells that hold every cell whose centre is in an area.

    Args:
        bbox: West, south, east, north.
        cells: Grid of all cells.
        crs: CRS of the bounding box.

    Returns:
        Ranges of rows and of columns, not empty. Where the box is askew to the grid they hold cells
        outside it too.

    Raises:
        AreaError: The box is malformed, has latitude first, misses the imagery, or holds no cell.
    """
    x, y = outline(*overlap(bbox, cells, crs))
    to_grid = pyproj.Transformer.from_crs(crs, cells.crs, always_xy=True)
    cols, rows = transformed(~cells.transform, *to_grid.transform(x, y))
    ranges = []
    for places, count in zip((rows, cols), cells.shape, strict=True):
        places = places[np.isfinite(places)]
        # cell i has its centre at i + 0.5
        first = max(0, math.ceil(float(places.min()) - 0.5)) if places.size else 0
        last = min(count - 1, math.floor(float(places.max()) - 0.5)) if places.size else -1
        ranges.append(slice(first, last + 1))
    if any(r.start >= r.stop for r in ranges):
        raise AreaError(
            f"--bbox {_words(bbox)} holds the centre of no cell; enlarge it or choose a smaller "
            "--stride-px"
        )
    return ranges[0], ranges[1]


def window_start(row: float, col: float, window_px: int) -> tuple[int, int]:
    """Find the window whose centre is nearest to a place.

    Args:
        row: Continuous pixel row; 0 is the outer edge of the first pixel.
        col: Continuous pixel column.
        window_px: Side of the window.

    Returns:
        Row and column of the window's first pixel; may be negative.
    """
    return math.floor(row - window_px / 2 + 0.5), math.floor(col - window_px / 2 + 0.5)


def transformed(
    affine: Affine, x: ArrayLike, y: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Apply an affine transform to arrays of coordinates."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return affine.a * x + affine.b * y + affine.c, affine.d * x + affine.e * y + affine.f


def bounds_of(
    bbox: Sequence[float], crs: Any, to: Any = "EPSG:4326"
) -> tuple[float, float, float, float]:
    """Bounds of a rectangle's outline in another CRS.

    Args:
        bbox: Left, bottom, right, top; in degrees the left may exceed the right, where the
            rectangle crosses the antimeridian.
        crs: CRS of `bbox`.
        to: CRS of the result.

    Returns:
        Left, bottom, right, top. Longitudes are continuous: they leave [-180, 180] where the
        rectangle crosses the antimeridian.

    Raises:
        AreaError: The box is malformed or has latitude first, a CRS is unknown, or the box cannot
            be projected.
    """
    source, target = _crs(crs), _crs(to)
    left, bottom, right, top = _continuous(bbox, source.is_geographic)
    _refuse_malformed(bbox, (left, bottom, right, top), source.is_geographic)
    x, y = outline(left, bottom, right, top)
    bounds = _projected_bounds(x, y, source, target)
    if bounds is None:
        raise AreaError(f"--bbox {_words(bbox)} cannot be projected to {to}; choose another CRS")
    return bounds


def bounds_in(imagery: GeoBox, crs: Any = "EPSG:4326") -> tuple[float, float, float, float]:
    """Left, bottom, right and top of a raster's outline in a CRS; longitudes are continuous."""
    height, width = imagery.shape
    x, y = transformed(imagery.transform, *outline(0, 0, width, height))
    bounds = _projected_bounds(x, y, imagery.crs, _crs(crs))
    if bounds is None:
        raise AreaError(f"the imagery cannot be projected to {crs}; choose another --bbox-crs")
    return bounds


def _projected_bounds(
    x: NDArray[np.float64], y: NDArray[np.float64], source: Any, target: pyproj.CRS
) -> tuple[float, float, float, float] | None:
    try:
        transformer = pyproj.Transformer.from_crs(source, target, always_xy=True)
    except pyproj.exceptions.ProjError:
        return None
    there = np.asarray(transformer.transform(x, y))  # (2, points)
    there = there[:, np.isfinite(there).all(axis=0)]
    if not there.size:
        return None
    if target.is_geographic and np.ptp(there[0]) > 180 > np.ptp(there[0] % 360):
        there[0] %= 360
    left, bottom = there.min(axis=1)
    right, top = there.max(axis=1)
    return float(left), float(bottom), float(right), float(top)


def _crs(crs: Any) -> pyproj.CRS:
    try:
        return pyproj.CRS.from_user_input(crs)
    except pyproj.exceptions.CRSError as error:
        raise AreaError(f"--bbox-crs {crs} is not a CRS; give one such as EPSG:4326") from error


def _continuous(bbox: Sequence[float], geographic: bool) -> tuple[float, float, float, float]:
    """Let the east exceed 180 where less than half of the globe lies between west and east."""
    west, south, east, north = bbox
    if geographic and -180 <= east < west <= 180 and east + 360 - west < 180:
        east += 360
    return west, south, east, north


def _refuse_malformed(
    bbox: Sequence[float], continuous: tuple[float, float, float, float], geographic: bool
) -> None:
    west, south, east, north = bbox
    swapped = (south, west, north, east)
    if geographic and _on_globe(swapped) and not _on_globe(bbox) and continuous == tuple(bbox):
        raise AreaError(
            f"--bbox {_words(bbox)} looks like latitude first; "
            f"did you mean --bbox {_words(swapped)} ?"
        )
    if not all(math.isfinite(value) for value in bbox):
        raise AreaError(f"--bbox {_words(bbox)} is not four numbers; give west south east north")
    west, south, east, north = continuous
    if west >= east or south >= north:
        axis, low, high = ("west", west, east) if west >= east else ("south", south, north)
        other = {"west": "east", "south": "north"}[axis]
        raise AreaError(
            f"--bbox {_words(bbox)} is empty: its {axis} {low} is not below its {other} {high}; "
            "give west south east north"
        )
    if geographic and (south < -90 or north > 90):
        raise AreaError(
            f"--bbox {_words(bbox)} has latitudes beyond 90 degrees; give west south east north, "
            "and the CRS of numbers that are no degrees as --bbox-crs"
        )


def overlap(
    bbox: Sequence[float], imagery: GeoBox, crs: Any = "EPSG:4326"
) -> tuple[float, float, float, float]:
    """Clip an area of interest to the imagery.

    Args:
        bbox: West, south, east, north.
        imagery: Grid of the raster.
        crs: CRS of the bounding box.

    Returns:
        Left, bottom, right, top in the CRS of the box.

    Raises:
        AreaError: The box is malformed, has latitude first, or misses the imagery.
    """
    geographic = _crs(crs).is_geographic
    bounds = bounds_in(imagery, crs)
    west, south, east, north = continuous = _continuous(bbox, geographic)
    if geographic and all(math.isfinite(value) for value in bbox):
        turns = 360 * round((bounds[0] + bounds[2] - west - east) / 720)
        west, east = west + turns, east + turns
    clipped = _clip((west, south, east, north), bounds)
    if clipped is not None and _clip(continuous, continuous) is not None:
        return clipped
    swapped = (bbox[1], bbox[0], bbox[3], bbox[2])
    if geographic and _clip(swapped, bounds):
        raise AreaError(
            f"--bbox {_words(bbox)} looks like latitude first; "
            f"did you mean --bbox {_words(swapped)} ?"
        )
    _refuse_malformed(bbox, continuous, geographic)
    shown = _words(tuple(round(value, 6 if geographic else 2) for value in bounds))
    raise AreaError(
        f"--bbox {_words(bbox)} misses the imagery, which covers {shown} (west south east north, "
        f"{crs}); choose an area inside"
    )


def coverage(bbox: Sequence[float], imagery: GeoBox, crs: Any = "EPSG:4326") -> float:
    """Share of an area of interest that lies within a raster's bounds, 0 to 1, in the area's CRS.

    Raises:
        AreaError: As for `overlap`.
    """
    left, bottom, right, top = overlap(bbox, imagery, crs)
    west, south, east, north = _continuous(bbox, _crs(crs).is_geographic)
    return (right - left) * (top - bottom) / ((east - west) * (north - south))


def _clip(
    bbox: Sequence[float], bounds: tuple[float, float, float, float]
) -> tuple[float, float, float, float] | None:
    left, bottom = max(bbox[0], bounds[0]), max(bbox[1], bounds[1])
    right, top = min(bbox[2], bounds[2]), min(bbox[3], bounds[3])
    return (left, bottom, right, top) if left < right and bottom < top else None


def _on_globe(bbox: Sequence[float]) -> bool:
    west, south, east, north = bbox
    return -180 <= west < east <= 180 and -90 <= south < north <= 90


def outline(
    left: float, bottom: float, right: float, top: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points along the four sides of a rectangle."""
    x, y = np.linspace(left, right, EDGE_POINTS), np.linspace(bottom, top, EDGE_POINTS)
    low, high = np.full_like(x, bottom), np.full_like(x, top)
    near, far = np.full_like(y, left), np.full_like(y, right)
    return np.concatenate([x, x, near, far]), np.concatenate([low, high, y, y])


def _words(bbox: Sequence[float]) -> str:
    return " ".join(str(float(value)) for value in bbox)
