"""Rasters onto the Web Mercator grid on which pages and pictures show them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rasterio._err import CPLE_BaseError
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import Affine, from_bounds
from rasterio.warp import reproject, transform_bounds
from rasterio.warp import transform as transform_places
from rasterio.windows import Window, intersect

from speciesmap.errors import ImageryError
from speciesmap.rasters.imagery import Imagery, open_imagery, open_raster
from speciesmap.rasters.scenes import is_one_file
from speciesmap.rasters.windows import MAX_LATITUDE, transformed

RADIUS_M = 6378137.0
"""Radius of Web Mercator's sphere, EPSG:3857."""

HALF_M = math.pi * RADIUS_M
"""Easting of the 180th meridian."""

SHIFTED = "+proj=merc +a=6378137 +b=6378137 +lon_0=180 +units=m +nadgrids=@null +no_defs"
"""Web Mercator about the 180th meridian, for maps that cross it."""

COLOURS = ("red", "green", "blue")
OVERSAMPLE = 16  # grid pixels along a cell's side, where cells must be warped


@dataclass(frozen=True)
class Grid:
    """A north-up rectangle in EPSG:3857 with its pixels.

    East of the 180th meridian eastings go on growing, as longitudes beyond 180 do in Leaflet.

    Attributes:
        left: West edge, in metres of the projection, as the other three.
        bottom: South edge.
        right: East edge.
        top: North edge.
        width: Pixels from west to east.
        height: Pixels from north to south.
        exact: Whether pixels are the raster's own cells, or whole blocks of them.
    """

    left: float
    bottom: float
    right: float
    top: float
    width: int
    height: int
    exact: bool = False

    @property
    def transform(self) -> Affine:
        """From pixel to projected coordinates."""
        return from_bounds(self.left, self.bottom, self.right, self.top, self.width, self.height)

    @property
    def crs(self) -> str:
        """The projection in which the grid is in one piece."""
        return SHIFTED if self.right > HALF_M else "EPSG:3857"

    @property
    def easting_m(self) -> float:
        """What to add to an easting of `crs` to get one of the grid."""
        return HALF_M if self.right > HALF_M else 0.0

    @property
    def pixel_m(self) -> float:
        """Longer side of a pixel, in metres of the projection."""
        return max((self.right - self.left) / self.width, (self.top - self.bottom) / self.height)


def longitude_latitude(x: float, y: float) -> tuple[float, float]:
    """Convert a place from EPSG:3857 to degrees; exact, the projection is spherical."""
    longitude = math.degrees(x / RADIUS_M)
    return longitude, math.degrees(2 * math.atan(math.exp(y / RADIUS_M)) - math.pi / 2)


def mercator(longitude: float, latitude: float) -> tuple[float, float]:
    """Convert a place from degrees to EPSG:3857; the inverse of `longitude_latitude`.

    >>> x, y = mercator(-122.5, 37.5)
    >>> round(x), round(y)
    (-13636638, 4509031)
    """
    latitude = max(-MAX_LATITUDE, min(MAX_LATITUDE, latitude))
    y = RADIUS_M * math.log(math.tan(math.pi / 4 + math.radians(latitude) / 2))
    return RADIUS_M * math.radians(longitude), y


def open_map(path: Path | str) -> DatasetReader:
    """Open a raster that has a place on Earth.

    Raises:
        ImageryError: It cannot be opened, or has no CRS or no transform.
    """
    dataset = open_raster(path)
    if dataset.crs is None or dataset.transform.is_identity:
        dataset.close()
        raise ImageryError(
            f"{path} is not a map: it has no coordinate reference system or no transform; "
            "set them with gdal_edit.py -a_srs and -a_ullr"
        )
    return dataset


def map_grid(dataset: DatasetReader, side_px: int) -> Grid:
    """Choose the grid on which a map is shown.

    A north-up raster in EPSG:3857 keeps its cells, averaged where they are too many. Any other is
    divided up to `OVERSAMPLE` times finer than its cells, so that their edges stay where they are.

    Args:
        dataset: Open raster with a CRS.
        side_px: Most pixels along the longer side.

    Raises:
        ImageryError: The raster does not lie in the part of the Earth that Web Mercator shows.
    """
    t = dataset.transform
    if dataset.crs.to_epsg() == 3857 and t.b == 0 and t.d == 0 and t.a > 0 and t.e < 0:
        reduce = max(1.0, max(dataset.shape) / side_px)
        height, width = (math.ceil(side / reduce) for side in dataset.shape)
        left, bottom, right, top = dataset.bounds
        return Grid(left, bottom, right, top, width, height, exact=True)
    left, bottom, right, top = _bounds(dataset.name, dataset.crs, t, dataset.shape)
    wide, high = right - left, top - bottom
    cell = math.sqrt(wide * high / (dataset.width * dataset.height))
    pixel = max(max(wide, high) / side_px, cell / OVERSAMPLE)
    width, height = (max(1, round(length / pixel)) for length in (wide, high))
    return Grid(left, bottom, right, top, width, height)


def union(rasters: Sequence[Path]) -> Grid:
    """The rectangle that holds several maps, as a grid of one pixel.

    Where one crosses the 180th meridian, those that lie just beyond it are taken eastwards.

    Raises:
        ImageryError: A raster cannot be opened or shown, as `open_map` and `map_grid` say.
    """
    grids = []
    for path in rasters:
        with open_map(path) as dataset:
            grids.append(map_grid(dataset, 64))
    right = max(g.right for g in grids)
    grids = [beside(g, right) for g in grids]
    return Grid(
        left=min(g.left for g in grids),
        bottom=min(g.bottom for g in grids),
        right=max(g.right for g in grids),
        top=max(g.top for g in grids),
        width=1,
        height=1,
    )


def beside(grid: Grid, right: float) -> Grid:
    """Take a grid of the western hemisphere once around the Earth, if an extent reaches over there.

    Args:
        grid: What to place.
        right: East edge of the extent, in metres.
    """
    if right <= HALF_M or grid.left >= 0:
        return grid
    return replace(grid, left=grid.left + 2 * HALF_M, right=grid.right + 2 * HALF_M)


def _bounds(
    name: str, crs: Any, transform: Affine, shape: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Rectangle in EPSG:3857 that holds a raster."""
    height, width = shape
    corners = [transform * (col, row) for col in (0, width) for row in (0, height)]
    xs, ys = zip(*corners, strict=True)
    misplaced = ImageryError(
        f"{name} does not lie within the latitudes of a web map, {MAX_LATITUDE} south to north, "
        f"or its corners have no longitude and latitude in {crs}; warp it with gdalwarp -t_srs"
    )
    try:
        west, south, east, north = transform_bounds(
            crs, "EPSG:4326", min(xs), min(ys), max(xs), max(ys)
        )
    except (RasterioError, CPLE_BaseError, ValueError) as error:
        raise misplaced from error
    south, north = max(south, -MAX_LATITUDE), min(north, MAX_LATITUDE)
    if not all(map(math.isfinite, (west, south, east, north))) or north <= south:
        raise misplaced
    if east <= west:  # it crosses the 180th meridian
        east += 360
    return (*mercator(west, south), *mercator(east, north))


def warp(
    dataset: DatasetReader, indexes: Sequence[int], grid: Grid, resampling: Resampling
) -> NDArray[np.float32]:
    """Read bands of a raster onto a grid, from overviews where those are fine enough.

    Args:
        dataset: Open raster.
        indexes: Band numbers, counted from 1.
        grid: Where to.
        resampling: How a pixel's value is found; the reduction before it averages.

    Returns:
        Values, not a number where there are none, shape (B, height, width).

    Raises:
        ImageryError: The raster cannot be read.
    """
    window = Window(0, 0, dataset.width, dataset.height)
    shape = (grid.height, grid.width)
    if not grid.exact:
        window = _window(dataset.crs, dataset.transform, dataset.shape, grid)
        reduce = max(1.0, min(window.width / grid.width, window.height / grid.height))
        shape = (math.ceil(window.height / reduce), math.ceil(window.width / reduce))
    try:
        pixels = dataset.read(
            list(indexes),
            window=window,
            out_shape=(len(indexes), *shape),
            masked=True,
            resampling=Resampling.average,
        )
    except (RasterioError, OSError) as error:
        raise ImageryError(
            f"{dataset.name} cannot be read ({error}); it is damaged or truncated: copy or make "
            "it again"
        ) from error
    values: NDArray[np.float32] = pixels.astype(np.float32).filled(np.nan)
    if grid.exact:
        return values
    reduced = dataset.transform * Affine.translation(window.col_off, window.row_off)
    reduced = reduced * Affine.scale(window.width / shape[1], window.height / shape[0])
    return _project(values, reduced, dataset.crs, grid, resampling)


def _window(crs: Any, transform: Affine, shape: tuple[int, int], grid: Grid) -> Window:
    """Pixels of a raster that a grid shows, with a few around them."""
    share = np.linspace(0, 1, 33)
    x = grid.left + share * (grid.right - grid.left)
    y = grid.bottom + share * (grid.top - grid.bottom)
    edge_x = np.concatenate([x, x, np.full(33, grid.left), np.full(33, grid.right)])
    edge_y = np.concatenate([np.full(33, grid.bottom), np.full(33, grid.top), y, y])
    east, north = transform_places(grid.crs, crs, edge_x - grid.easting_m, edge_y)
    cols, rows = transformed(~transform, east, north)
    whole = Window(0, 0, shape[1], shape[0])
    if not (np.isfinite(cols).all() and np.isfinite(rows).all()):
        return whole
    pad = 4 + 0.01 * max(np.ptp(cols), np.ptp(rows))
    left, top = math.floor(cols.min() - pad), math.floor(rows.min() - pad)
    near = Window(left, top, math.ceil(cols.max() + pad) - left, math.ceil(rows.max() + pad) - top)
    if not intersect(near, whole):
        raise ImageryError(
            f"a raster of {shape[0]} x {shape[1]} pixels does not touch the area of the page "
            f"(its nearest pixel would be row {top}, column {left}); check its georeferencing"
        )
    return near.intersection(whole)


def _project(
    values: NDArray[np.float32], transform: Affine, crs: Any, grid: Grid, resampling: Resampling
) -> NDArray[np.float32]:
    projected = np.full((len(values), grid.height, grid.width), np.nan, np.float32)
    reproject(
        values,
        projected,
        src_transform=transform,
        src_crs=crs,
        src_nodata=np.nan,
        dst_transform=Affine.translation(-grid.easting_m, 0) * grid.transform,
        dst_crs=grid.crs,
        dst_nodata=np.nan,
        resampling=resampling,
        tolerance=0.25 / OVERSAMPLE,
    )
    return projected


@dataclass(frozen=True)
class Picture:
    """Imagery as the eye sees it.

    Attributes:
        pixels: Red, green, blue and alpha, shape (row, column, 4).
        grid: Where they lie.
    """

    pixels: NDArray[np.uint8]
    grid: Grid


def read_picture(
    source: Imagery | Path | str, extent: Grid, side_px: int, *, margin: float = 0.0
) -> Picture:
    """Read imagery, reduced, as a picture of some extent and what lies around it.

    Red, green and blue are taken by name, else the first three bands, else the first in grey;
    they are stretched together between their 1st and 99th percentile.

    Args:
        source: Imagery, or whatever `open_imagery` takes. One file is shown on its own grid, from
            its overviews.
        extent: What the picture must show, as far as the imagery reaches.
        side_px: Most pixels along the longer side.
        margin: How much more to show on each side, as a share of the extent.

    Raises:
        ImageryError: The imagery cannot be read, or shows nothing of the extent.
    """
    name = source.source if isinstance(source, Imagery) else str(source)
    if name.startswith("stac+") or not is_one_file(name):
        imagery = source if isinstance(source, Imagery) else _open_around(name, extent)
        crs: Any = imagery.geobox.crs
        crs = crs.to_wkt()
        grid = _picture_grid(
            name, crs, imagery.geobox.transform, imagery.shape, extent, side_px, margin
        )
        try:
            chosen = imagery.select(COLOURS)  # also where a model takes other bands of the files
        except ImageryError:
            chosen = imagery.select([imagery.bands[i] for i in _colours(imagery.bands)])
        return Picture(_stretch(_project_mosaic(chosen, crs, grid)), grid)
    with open_map(name) as dataset:
        grid = _picture_grid(
            name, dataset.crs, dataset.transform, dataset.shape, extent, side_px, margin
        )
        names = [
            (text or colour.name).strip().lower()
            for text, colour in zip(dataset.descriptions, dataset.colorinterp, strict=True)
        ]
        indexes = [i + 1 for i in _colours(names)]
        return Picture(_stretch(warp(dataset, indexes, grid, Resampling.bilinear)), grid)


def _open_around(source: str, extent: Grid) -> Imagery:
    """Open scenes for a picture; of a STAC collection those of an extent."""
    west, south = longitude_latitude(extent.left, extent.bottom)
    east, north = longitude_latitude(extent.right, extent.top)
    return open_imagery(source, bbox=(west, south, east, north), wanted=COLOURS)


def _colours(names: Sequence[str]) -> list[int]:
    """Positions of the bands to show as red, green and blue, or of one to show in grey."""
    if set(COLOURS) <= set(names):
        return [names.index(name) for name in COLOURS]
    return [0, 1, 2] if len(names) >= 3 else [0]


def _picture_grid(
    name: str,
    crs: Any,
    transform: Affine,
    shape: tuple[int, int],
    extent: Grid,
    side_px: int,
    margin: float,
) -> Grid:
    """The part of imagery that lies on and around an extent, at most as fine as its pixels."""
    placed = beside(Grid(*_bounds(name, crs, transform, shape), 1, 1), extent.right)
    bounds = (placed.left, placed.bottom, placed.right, placed.top)
    wide, high = margin * (extent.right - extent.left), margin * (extent.top - extent.bottom)
    left, bottom = max(bounds[0], extent.left - wide), max(bounds[1], extent.bottom - high)
    right, top = min(bounds[2], extent.right + wide), min(bounds[3], extent.top + high)
    if right <= left or top <= bottom:
        raise ImageryError(
            f"{name} shows nothing of the maps' area; give the imagery they were made from"
        )
    native = math.sqrt((bounds[2] - bounds[0]) * (bounds[3] - bounds[1]) / (shape[0] * shape[1]))
    pixel = max(max(right - left, top - bottom) / side_px, native)
    width, height = (max(1, round(length / pixel)) for length in (right - left, top - bottom))
    return Grid(left, bottom, right, top, width, height)


def _project_mosaic(imagery: Imagery, crs: Any, grid: Grid) -> NDArray[np.float32]:
    """Read imagery of several files strip by strip, each block of pixels averaged, onto a grid."""
    window = _window(crs, imagery.geobox.transform, imagery.shape, grid)
    block = max(1, int(min(window.width / grid.width, window.height / grid.height)))
    cols = math.ceil(window.width / block)
    strips = []
    for row in range(int(window.row_off), int(window.row_off + window.height), block):
        pixels, valid = imagery.read(row, int(window.col_off), block, cols * block)
        blocks = np.where(valid, pixels, 0).reshape(len(pixels), block, cols, block)
        count = valid.reshape(block, cols, block).sum(axis=(0, 2))
        total = blocks.sum(axis=(1, 3), dtype=np.float64)
        strips.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    values = np.stack(strips, axis=1).astype(np.float32)
    reduced = imagery.geobox.transform * Affine.translation(window.col_off, window.row_off)
    return _project(values, reduced * Affine.scale(block), crs, grid, Resampling.bilinear)


def _stretch(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Turn one or three bands into a picture; a pixel without any value is transparent."""
    valid = np.isfinite(values).any(axis=0)
    picture = np.zeros((*valid.shape, 4), np.uint8)
    if valid.any():
        low, high = np.nanpercentile(values[:, valid], (1, 99))
        share = (np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-6)
        shown = np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)
        picture[..., :3] = np.moveaxis(np.broadcast_to(shown, (3, *valid.shape)), 0, -1)
        picture[..., 3] = valid * 255
    return picture


def encode_webp(pixels: NDArray[np.uint8], limit_bytes: int) -> bytes:
    """Compress a picture to WebP, as well as a number of bytes allows.

    Args:
        pixels: Shape (row, column, 4).
        limit_bytes: The picture is coarsened until it fits.
    """
    image = Image.fromarray(pixels)
    for quality in (82, 70, 55, 40):
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=quality, method=4)
        if stream.tell() <= limit_bytes:
            return stream.getvalue()
    half = (max(1, image.width // 2), max(1, image.height // 2))
    return encode_webp(np.asarray(image.resize(half, Image.Resampling.BOX)), limit_bytes)
