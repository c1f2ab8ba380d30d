"""The only door through which rasters are opened for reading."""

from __future__ import annotations

import glob
import hashlib
import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import rasterio
from numpy.typing import ArrayLike, NDArray
from odc.geo.geobox import GeoBox
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.env import set_gdal_config
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from speciesmap.errors import ImageryError
from speciesmap.rasters.bands import band_names, canonical
from speciesmap.rasters.windows import transformed

SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".img")
BLOCK_CACHE_BYTES = 64 << 20  # GDAL's default, 5% of memory, makes memory grow with rasters
OPEN_FILES = 32  # per thread; a mosaic may have thousands
SAMPLE_PX = 512  # side of the squares that `sample` reads
GRID_TOLERANCE_PX = 0.01  # of mosaic members against each other

if "GDAL_CACHEMAX" not in os.environ:
    set_gdal_config("GDAL_CACHEMAX", BLOCK_CACHE_BYTES)  # GDAL reads it once, at the first block


class _Handles:
    """Open rasters, a few per thread: GDAL's handles are not safe to share between threads.

    They do not travel: a pickled copy starts with none, so that a spawned process opens its own.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self, path: str) -> DatasetReader:
        """Return this thread's handle on a raster."""
        opened: OrderedDict[str, DatasetReader] | None = getattr(self._local, "opened", None)
        if opened is None:
            opened = self._local.opened = OrderedDict()
        if path not in opened:
            opened[path] = open_raster(path)
            if len(opened) > OPEN_FILES:
                opened.popitem(last=False)[1].close()
        opened.move_to_end(path)
        return opened[path]

    def __reduce__(self) -> tuple[type[_Handles], tuple[()]]:
        return _Handles, ()


@dataclass(frozen=True)
class _Member:
    """One file of the imagery and its place on the common grid, in pixels."""

    path: str
    row: int
    col: int
    height: int
    width: int
    masked: bool  # whether the file can have invalid pixels at all
    mislabelled_alpha: bool  # its "alpha" band is data and must not mask


@dataclass(frozen=True)
class Imagery:
    """A raster, or several on one grid, that is read by pixel windows.

    Safe to read from several threads and to pickle into other processes.

    Attributes:
        source: What the user named.
        bands: Names of the bands that `read` gives, in order.
        geobox: Grid: shape, transform and CRS.
        dtype: Type of the pixels.
        resolution_m: Geometric mean of the sides of the central pixel on the ground, metres.
    """

    source: str
    bands: tuple[str, ...]
    geobox: GeoBox
    dtype: np.dtype[Any]
    resolution_m: float
    _indexes: tuple[int, ...] = field(repr=False)
    _file_bands: tuple[str, ...] = field(repr=False)
    _members: tuple[_Member, ...] = field(repr=False)
    _handles: _Handles = field(default_factory=_Handles, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.geobox.shape
        return int(height), int(width)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the grid, the bands, the files' sizes and a sample of the pixels.

        Times and paths are left out: a copy of the imagery has the same fingerprint.
        """
        digest = hashlib.sha256()
        digest.update(repr((self.shape, tuple(self.geobox.transform), self.bands)).encode())
        digest.update(repr((str(self.geobox.crs), str(self.dtype), self._indexes)).encode())
        for m in self._members:
            file = Path(m.path)
            place = (m.row, m.col, m.height, m.width, file.stat().st_size if file.exists() else -1)
            digest.update(repr(place).encode())
        chosen = self._members[:: math.ceil(len(self._members) / 64)]
        per_axis = max(1, math.isqrt(64 // len(chosen)))
        for m in chosen:
            for down in np.linspace(0, 1, per_axis + 2)[1:-1]:
                for across in np.linspace(0, 1, per_axis + 2)[1:-1]:
                    row, col = m.row + int(down * m.height), m.col + int(across * m.width)
                    for array in self.read(row - 16, col - 16, 32, 32):
                        digest.update(array.tobytes())
        return digest.hexdigest()

    def select(self, bands: Sequence[str]) -> Imagery:
        """Give the same imagery with bands chosen, ordered and, where asked, named.

        Args:
            bands: Of each band its name (any case, `r` or `near infrared` too), its number in the
                file counted from 1, or `name=band` to say what the file does not.

        Raises:
            ImageryError: The file has no such band, or one name comes twice.
        """
        names: list[str] = []
        indexes: list[int] = []
        for wanted in bands:
            name, equals, place = wanted.partition("=")
            key = canonical(place if equals else name)
            if key.isdecimal() and 1 <= int(key) <= len(self._file_bands):
                index = int(key)
            elif key in self._file_bands:
                index = self._file_bands.index(key) + 1
            elif key in self.bands:
                index = self._indexes[self.bands.index(key)]
            else:
                raise ImageryError(
                    f"{self.source} has no band {wanted!r}: its bands are "
                    f"{', '.join(f'{n} {b}' for n, b in enumerate(self._file_bands, 1))}; "
                    "name or number one of these, or say what a band shows with name=number"
                )
            names.append(canonical(name) if equals else self._name_of(index))
            indexes.append(index)
        if not names or len(set(names)) < len(names):
            raise ImageryError(
                f"{self.source}: bands {', '.join(bands) or 'none'} do not name each band once"
            )
        if (tuple(names), tuple(indexes)) == (self.bands, self._indexes):
            return self
        return replace(self, bands=tuple(names), _indexes=tuple(indexes))

    def _name_of(self, index: int) -> str:
        if index in self._indexes:
            return self.bands[self._indexes.index(index)]
        return self._file_bands[index - 1]

    def read(
        self, row: int, col: int, height: int, width: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read a rectangle of pixels, which may leave the raster.

        Args:
            row: Of the first pixel; may be negative.
            col: Of the first pixel; may be negative.
            height: In pixels.
            width: In pixels.

        Returns:
            Pixels in the raster's type, shape (B, height, width), and where they are valid, shape
            (height, width). Outside the raster pixels are 0 and invalid. Inside, a pixel is invalid
            where the file's mask says so: where all of its bands are nodata, not one of them; and
            where a value is not finite. Where members of a mosaic overlap, the first valid one
            counts.

        Raises:
            ImageryError: The file cannot be read there.
        """
        pixels = np.zeros((len(self.bands), height, width), self.dtype)
        valid = np.zeros((height, width), np.bool_)
        for m in self._members:
            top, bottom = max(row, m.row), min(row + height, m.row + m.height)
            left, right = max(col, m.col), min(col + width, m.col + m.width)
            if top >= bottom or left >= right:
                continue
            place = (slice(top - row, bottom - row), slice(left - col, right - col))
            if len(self._members) > 1 and valid[place].all():
                continue
            window = Window(left - m.col, top - m.row, right - left, bottom - top)
            part, usable = self._read_member(m, window)
            if usable.all() and not valid[place].any():
                pixels[:, *place] = part
            else:
                fresh = ~valid[place] if len(self._members) == 1 else usable & ~valid[place]
                np.copyto(pixels[:, *place], part, where=fresh)
            valid[place] |= usable
        return pixels, valid

    def _read_member(self, m: _Member, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        try:
            raster = self._handles.get(m.path)
            part = raster.read(list(self._indexes), window=window)
            usable = np.ones(part.shape[1:], np.bool_)
            if m.masked and not m.mislabelled_alpha:
                usable = raster.dataset_mask(window=window) != 0
            elif m.masked:
                usable = (part != raster.nodata).any(axis=0)
        except (RasterioError, OSError) as error:
            raise ImageryError(
                f"{m.path} cannot be read at rows {window.row_off} to "
                f"{window.row_off + window.height}, columns {window.col_off} to "
                f"{window.col_off + window.width} ({_reason(error)}); the file is damaged or "
                "truncated: copy or download it again"
            ) from error
        if part.dtype.kind == "f":
            usable &= np.isfinite(part).all(axis=0)
        return part, usable

    def rowcol(
        self, x: ArrayLike, y: ArrayLike, crs: Any = "EPSG:4326"
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Convert places to continuous pixel coordinates.

        Args:
            x: Eastings or longitudes.
            y: Northings or latitudes, of the same shape.
            crs: CRS of the places.

        Returns:
            Rows and columns; (0, 0) is the outer corner of the first pixel, (0.5, 0.5) its centre.
            Infinite where a place cannot be projected.
        """
        to_grid = pyproj.Transformer.from_crs(crs, self.geobox.crs, always_xy=True)
        east, north = to_grid.transform(np.asarray(x, np.float64), np.asarray(y, np.float64))
        cols, rows = transformed(~self.geobox.transform, east, north)
        return rows, cols

    def xy(
        self, rows: ArrayLike, cols: ArrayLike, crs: Any = "EPSG:4326"
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Convert continuous pixel coordinates to places; the inverse of `rowcol`."""
        east, north = transformed(self.geobox.transform, cols, rows)
        from_grid = pyproj.Transformer.from_crs(self.geobox.crs, crs, always_xy=True)
        x, y = from_grid.transform(east, north)
        return np.asarray(x, np.float64), np.asarray(y, np.float64)

    def contains(self, x: ArrayLike, y: ArrayLike, crs: Any = "EPSG:4326") -> NDArray[np.bool_]:
        """Tell which places lie on the raster, valid or not, shape (N,); see `rowcol`."""
        rows, cols = self.rowcol(x, y, crs)
        height, width = self.shape
        inside: NDArray[np.bool_] = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
        return inside

    def sample(self, x: ArrayLike, y: ArrayLike, crs: Any = "EPSG:4326") -> NDArray[np.float64]:
        """Read the pixels under places.

        Args:
            x: Eastings or longitudes, shape (N,).
            y: Northings or latitudes, shape (N,).
            crs: CRS of the places.

        Returns:
            Values as float64, shape (B, N), NaN outside the raster and where it is invalid. The
            raster is read in squares of 512 pixels, each once, and only those that hold a place.

        Raises:
            ImageryError: The file cannot be read there.
        """
        rows, cols = self.rowcol(x, y, crs)
        on = np.flatnonzero(self.contains(x, y, crs))
        row, col = np.floor(rows[on]).astype(np.int64), np.floor(cols[on]).astype(np.int64)
        values = np.full((len(self.bands), rows.size), np.nan)
        _, block = np.unique(np.column_stack([row, col]) // SAMPLE_PX, axis=0, return_inverse=True)
        order = np.argsort(block.ravel(), kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(block.ravel()[order])) + 1):
            if not group.size:
                continue
            top, left = row[group].min(), col[group].min()
            height, width = row[group].max() - top + 1, col[group].max() - left + 1
            pixels, valid = self.read(int(top), int(left), int(height), int(width))
            there = row[group] - top, col[group] - left
            values[:, on[group]] = np.where(valid[there], pixels[:, *there], np.nan)
        return values  # (B, N)


def open_raster(path: Path | str) -> DatasetReader:
    """Open any raster for reading.

    Raises:
        ImageryError: It does not exist, is no raster, or its header is damaged.
    """
    try:
        return rasterio.open(path)
    except (RasterioError, OSError) as error:
        if not Path(path).exists():
            raise ImageryError(f"{path} does not exist; check the name") from error
        raise ImageryError(
            f"{path} cannot be opened as a raster ({_reason(error)}); it is damaged, truncated or "
            "of a format that GDAL does not read"
        ) from error


def open_imagery(src: str | Path, bands: Sequence[str] | None = None) -> Imagery:
    """Open imagery: a raster, a folder of rasters or a glob, all on one grid.

    Args:
        src: A GeoTIFF, VRT or other raster; a folder of them; or a pattern such as `naip/*.tif`.
        bands: Which bands to read, in order, as `Imagery.select` takes them; by default all that
            are not a mask. Bands have names: from their descriptions, else from their colour
            interpretation, else `band_1` and so on.

    Raises:
        ImageryError: There is nothing to read, the raster has no place on Earth, files of a mosaic
            do not share one grid and the same bands, or a band is unknown.
    """
    source = str(src)
    members: list[_Member] = []
    first: Imagery | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # `_describe` refuses such files
        for path in _files(source):
            with open_raster(path) as raster:
                if first is None:
                    first = _describe(raster, path, source)
                members.append(_place(raster, path, first))
    assert first is not None
    imagery = replace(_enclose(first, members), _handles=_Handles())
    return imagery if bands is None else imagery.select(bands)


def _files(source: str) -> list[str]:
    if "://" in source:
        raise ImageryError(f"{source} is an address; download the imagery and give its path")
    path = Path(source)
    if path.is_dir():
        found = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            raise ImageryError(f"{source} holds no rasters ({', '.join(SUFFIXES)}); check the name")
        return found
    if not path.exists() and glob.has_magic(source):
        found = sorted(glob.glob(source))  # noqa: PTH207  (the pattern may be absolute)
        if not found:
            raise ImageryError(f"no file matches {source}; check the pattern")
        return found
    return [source]


def _describe(raster: DatasetReader, path: str, source: str) -> Imagery:
    """Read names and grid of the first file."""
    if raster.crs is None:
        raise ImageryError(
            f"{path} has no coordinate reference system; if you know it, set it with "
            f"gdal_edit.py -a_srs EPSG:32610 {path}"
        )
    if raster.transform.is_identity or raster.transform.determinant == 0:
        raise ImageryError(
            f"{path} has no usable transform from pixels to {raster.crs}; set its corners with "
            f"gdal_edit.py -a_ullr WEST NORTH EAST SOUTH {path}, or warp it by its control points"
        )
    if raster.count == 0 or len(set(raster.dtypes)) > 1 or raster.dtypes[0].startswith("c"):
        raise ImageryError(
            f"{path} has bands of types {', '.join(raster.dtypes) or 'none'}; all must have the "
            "same real type: convert it with gdal_translate -ot"
        )
    names = band_names(raster, path)
    indexes = tuple(i for i, name in enumerate(names, 1) if name != "alpha")
    geobox = GeoBox(raster.shape, raster.transform, raster.crs)
    return Imagery(
        source=source,
        bands=tuple(names[i - 1] for i in indexes),
        geobox=geobox,
        dtype=np.dtype(raster.dtypes[0]),
        resolution_m=_resolution_m(geobox),
        _indexes=indexes,
        _file_bands=names,
        _members=(),
    )


def _place(raster: DatasetReader, path: str, first: Imagery) -> _Member:
    """Find a file's place on the first file's grid, and look whether its end is there."""
    try:
        raster.read(1, window=Window(raster.width - 1, raster.height - 1, 1, 1))
    except (RasterioError, OSError) as error:
        raise ImageryError(
            f"{path} is truncated or damaged: its last pixel, row {raster.height - 1}, column "
            f"{raster.width - 1}, cannot be read ({_reason(error)}); copy or download it again"
        ) from error
    grid = first.geobox
    names = band_names(raster, path)
    if raster.crs is None or grid.crs != raster.crs:
        raise ImageryError(
            f"{path} has the CRS {raster.crs}, {first.source} begins with {grid.crs}; warp them to "
            "one CRS with gdalwarp -t_srs first"
        )
    to_grid = ~grid.transform * raster.transform
    row, col = round(to_grid.f), round(to_grid.c)
    across, down = np.array([0, raster.width, 0]), np.array([0, 0, raster.height])
    cols, rows = transformed(to_grid, across, down)
    strays = np.abs([cols - across - col, rows - down - row]).max()
    if strays > GRID_TOLERANCE_PX:
        raise ImageryError(
            f"{path} does not lie on the pixel grid of the first file of {first.source} (pixels "
            f"of {raster.res} against {first.geobox.resolution}, offset {to_grid.f:.2f} rows, "
            f"{to_grid.c:.2f} columns); warp them to one grid with gdalwarp -tr -tap first"
        )
    if names != first._file_bands or raster.dtypes[0] != str(first.dtype):
        raise ImageryError(
            f"{path} has the bands {', '.join(names)} of {raster.dtypes[0]}, the first file of "
            f"{first.source} {', '.join(first._file_bands)} of {first.dtype}; a mosaic needs the "
            "same bands in every file"
        )
    mislabelled = "alpha" not in names and ColorInterp.alpha in raster.colorinterp
    if mislabelled:
        masked = raster.nodata is not None
    else:
        masked = any(MaskFlags.all_valid not in flags for flags in raster.mask_flag_enums)
    return _Member(path, row, col, raster.height, raster.width, masked, mislabelled)


def _enclose(first: Imagery, members: Sequence[_Member]) -> Imagery:
    """Move the members onto the smallest grid that holds them all."""
    top, left = min(m.row for m in members), min(m.col for m in members)
    height = max(m.row + m.height for m in members) - top
    width = max(m.col + m.width for m in members) - left
    grid = first.geobox.transform * first.geobox.transform.translation(left, top)
    geobox = GeoBox((height, width), grid, first.geobox.crs)
    moved = tuple(replace(m, row=m.row - top, col=m.col - left) for m in members)
    return replace(first, geobox=geobox, resolution_m=_resolution_m(geobox), _members=moved)


def _reason(error: BaseException) -> str:
    """GDAL's own words: rasterio's wrap them in "see previous exception"."""
    return str(error.__cause__ or error)


def _resolution_m(geobox: GeoBox) -> float:
    """Measure the central pixel on the ellipsoid: geometric mean of its sides, in metres."""
    col, row = geobox.shape[1] / 2, geobox.shape[0] / 2
    cols, rows = np.array([col, col + 1, col]), np.array([row, row, row + 1])
    x, y = transformed(geobox.transform, cols, rows)
    to_lonlat = pyproj.Transformer.from_crs(geobox.crs, "EPSG:4326", always_xy=True)
    lon, lat = to_lonlat.transform(x, y)
    if not np.isfinite([lon, lat]).all():
        raise ImageryError(
            f"the centre of the imagery, {x[0]:.6g} {y[0]:.6g}, has no longitude and latitude in "
            f"{geobox.crs}; its CRS or transform is wrong: set the right one with gdal_edit.py"
        )
    _, _, sides = pyproj.Geod(ellps="WGS84").inv(lon[[0, 0]], lat[[0, 0]], lon[1:], lat[1:])
    return math.sqrt(float(sides[0]) * float(sides[1]))
