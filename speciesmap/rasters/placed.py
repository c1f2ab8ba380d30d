"""Scenes on a grid: where their pixels lie there, and how they are read, warped where they must."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.warp import reproject
from rasterio.windows import Window

from speciesmap.errors import ImageryError
from speciesmap.rasters.files import Files
from speciesmap.rasters.grid import offset, on_grid, to_pixels
from speciesmap.rasters.messages import public, reason
from speciesmap.rasters.remote import is_remote, retrying
from speciesmap.rasters.scenes import RasterFile, Scene

KERNEL_PX = 3  # source pixels around a warped one; a bilinear kernel reaches one, scaled
WARPED_BYTES = 64 << 20  # of source pixels held at once while a window is warped
DIVISIBLE_PX = 512  # sides up to which a window is warped at once whatever it holds
OPAQUE = 255
SHRUNK = 0.9  # of a source pixel's side on the grid; above it nothing is averaged
ROUNDING = 1e-3  # keeps ties, common where grids are half a pixel apart, from hanging on one bit

Rectangle = tuple[int, int, int, int]
"""Top, left, bottom and right in pixels of the grid."""

Part = tuple[NDArray[Any], NDArray[np.bool_]]
"""Pixels, shape (B, H, W), and where they are valid, shape (H, W)."""


@dataclass(frozen=True)
class PlacedFile:
    """One file on a grid, in its pixels; `warped` where its own do not coincide."""

    file: RasterFile
    row: int
    col: int
    height: int
    width: int
    warped: bool


@dataclass(frozen=True)
class PlacedScene:
    """A scene on a grid, and the rectangle that all its files fill."""

    name: str
    date: str
    files: tuple[PlacedFile, ...]
    row: int
    col: int
    height: int
    width: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that holds the pixels of all its files."""
        return np.dtype(np.result_type(*(p.file.dtype for p in self.files)))

    def shared(self, row: int, col: int, height: int, width: int) -> Rectangle | None:
        """What it shares with a rectangle of the grid."""
        top, bottom = max(row, self.row), min(row + height, self.row + self.height)
        left, right = max(col, self.col), min(col + width, self.col + self.width)
        return (top, left, bottom, right) if top < bottom and left < right else None

    def used(self, indexes: Sequence[int]) -> list[tuple[PlacedFile, list[int], list[int]]]:
        """Files that have chosen bands.

        Args:
            indexes: Numbers of the bands among those of all files, from 1.

        Returns:
            Of each file the numbers of the bands in it, from 1, and their positions in `indexes`.
        """
        used, before = [], 0
        for p in self.files:
            count = len(p.file.bands)
            here = [k for k, i in enumerate(indexes) if before < i <= before + count]
            if here:
                used.append((p, [indexes[k] - before for k in here], here))
            before += count
        return used

    def moved(self, row: int, col: int) -> PlacedScene:
        """The same on a grid whose first pixel is another one of this grid."""
        files = tuple(replace(p, row=p.row - row, col=p.col - col) for p in self.files)
        return replace(self, row=self.row - row, col=self.col - col, files=files)


def place_scene(scene: Scene, grid: GeoBox) -> PlacedScene | None:
    """Find a scene's place on a grid, if it has one; it may lie beyond the grid's edges."""
    placed = []
    for file in scene.files:
        at = offset(grid, file.geobox)
        if at is not None:
            height, width = file.geobox.shape
            placed.append(PlacedFile(file, *at, height, width, warped=False))
            continue
        whole = on_grid(file.geobox, grid, (0, 0, *file.geobox.shape))
        if whole is None:
            return None
        top, left, bottom, right = whole
        placed.append(PlacedFile(file, top, left, bottom - top, right - left, warped=True))
    row, col = max(p.row for p in placed), max(p.col for p in placed)
    height = min(p.row + p.height for p in placed) - row
    width = min(p.col + p.width for p in placed) - col
    if height <= 0 or width <= 0:
        return None
    return PlacedScene(scene.name, scene.date, tuple(placed), row, col, height, width)


@dataclass(frozen=True)
class Reader:
    """Reads bands of scenes on a grid.

    Attributes:
        grid: On which the scenes are placed.
        indexes: Numbers of the bands among those of a scene's files, from 1.
        scaling: Of each band of a scene the scale and offset that its values are given.
        alpha_is_data: Whether a band that a file calls alpha is one of the bands.
        files: Where open files are kept.
    """

    grid: GeoBox
    indexes: tuple[int, ...]
    scaling: tuple[tuple[float, float], ...]
    alpha_is_data: bool
    files: Files = field(repr=False)

    def read(self, scene: PlacedScene, rectangle: Rectangle) -> Part:
        """Read a rectangle that lies in a scene.

        Raises:
            ImageryError: A file cannot be read there.
            MemoryError: Not even its blocks can be held.
        """
        used = scene.used(self.indexes)
        if len(used) == 1:
            return self._read_file(*used[0], rectangle)
        top, left, bottom, right = rectangle
        shape = (bottom - top, right - left)
        pixels = np.zeros((len(self.indexes), *shape), scene.dtype)
        valid = np.ones(shape, np.bool_)
        for p, indexes, here in used:
            pixels[here], usable = self._read_file(p, indexes, here, rectangle)
            valid &= usable
        return pixels, valid

    def declares_invalid(self, scene: PlacedScene) -> bool:
        """Tell whether a nodata value, a mask or an alpha band of a scene marks invalid pixels."""
        for p, _, _ in scene.used(self.indexes):
            with self.files.using(p.file.path, p.file.signer, self.alpha_is_data) as opened:
                if opened.masked or opened.alpha or opened.nodata is not None:
                    return True
        return False

    def _read_file(
        self, p: PlacedFile, indexes: list[int], here: list[int], rectangle: Rectangle
    ) -> Part:
        """Read a rectangle of the grid from one file, warped where it must be."""
        if p.warped:
            part, usable = self._warp(p.file, indexes, *rectangle)
        else:
            top, left, bottom, right = rectangle
            window = Window(left - p.col, top - p.row, right - left, bottom - top)
            part, usable = self._read_window(p.file, indexes, window)
        for k, index in enumerate(indexes):
            scale, shift = p.file.scaling[index - 1]
            to_scale, to_shift = self.scaling[self.indexes[here[k]] - 1]
            if (scale, shift) != (to_scale, to_shift):
                values = (part[k].astype(np.float64) * scale + shift - to_shift) / to_scale
                if part.dtype.kind in "iu":
                    limits = np.iinfo(part.dtype)
                    values = np.clip(np.rint(values), limits.min, limits.max)
                part[k] = values
        return part, usable

    def _read_window(self, file: RasterFile, indexes: list[int], window: Window) -> Part:
        """Read a file's own pixels, tried again where it is on a server."""

        def attempt() -> Part:
            with self.files.using(file.path, file.signer, self.alpha_is_data) as opened:
                part = opened.raster.read(indexes, window=window)
                usable = opened.valid(part, window)
            return part, usable

        try:
            part, usable = retrying(attempt, file.path)
        except (RasterioError, OSError) as error:
            if "cannot allocate" in reason(error):
                raise MemoryError(f"{public(file.path)}: {reason(error)}") from error
            remedy = "the file is damaged or truncated: copy or download it again"
            if is_remote(file.path):
                remedy = "its server does not give it whole, or it is damaged there: try later"
            raise ImageryError(
                f"{public(file.path)} cannot be read at rows {window.row_off} to "
                f"{window.row_off + window.height}, columns {window.col_off} to "
                f"{window.col_off + window.width} ({reason(error)}); {remedy}"
            ) from error
        self.files.refuse_changed(file.path, file.signer)
        if part.dtype.kind == "f":
            usable &= np.isfinite(part).all(axis=0)
        return part, usable

    def _warp(
        self, file: RasterFile, indexes: list[int], top: int, left: int, bottom: int, right: int
    ) -> Part:
        """Warp a rectangle of the grid out of a file: bilinear, averaged where pixels shrink.

        GDAL interpolates places along a row where the projection is not linear, to an eighth of a
        pixel at worst, so that a pixel may depend a little on the rectangle that it is read with.
        """
        shape = (bottom - top, right - left)
        pixels = np.zeros((len(indexes), *shape), np.dtype(file.dtype))
        valid = np.zeros(shape, np.bool_)
        window, shrink = _source_window(self.grid, file.geobox, top, left, bottom, right)
        if window is None:
            return pixels, valid
        bytes_there = window.height * window.width * len(indexes) * pixels.itemsize
        if bytes_there > WARPED_BYTES and max(shape) > DIVISIBLE_PX:
            down = shape[0] >= shape[1]
            middle = (top + bottom) // 2 if down else (left + right) // 2
            halves = (
                [(top, left, middle, right), (middle, left, bottom, right)]
                if down
                else [(top, left, bottom, middle), (top, middle, bottom, right)]
            )
            for half in halves:
                place = (slice(half[0] - top, half[2] - top), slice(half[1] - left, half[3] - left))
                pixels[:, *place], valid[place] = self._warp(file, indexes, *half)
            return pixels, valid
        part, usable = self._read_window(file, indexes, window)
        if not usable.any():
            return pixels, valid
        kind = np.float64 if part.dtype.itemsize > 2 else np.float32
        clean = np.where(usable, part, 0)
        source = np.concatenate([clean, (usable * OPAQUE)[None]]).astype(kind)  # (B + 1, h, w)
        warped = np.zeros((len(source), *shape), kind)
        corner = file.geobox.transform.translation(window.col_off, window.row_off)
        reproject(
            source,
            warped,
            src_transform=file.geobox.transform * corner,
            src_crs=str(file.geobox.crs),
            dst_transform=self.grid.transform * self.grid.transform.translation(left, top),
            dst_crs=str(self.grid.crs),
            src_alpha=len(source),
            dst_alpha=len(source),
            resampling=Resampling.bilinear,
            XSCALE=shrink[1],
            YSCALE=shrink[0],
            SRC_ALPHA_MAX=OPAQUE,
            DST_ALPHA_MAX=OPAQUE,
        )
        valid = warped[-1] >= OPAQUE / 2 - ROUNDING
        values = np.where(valid, warped[:-1], 0)
        if pixels.dtype.kind in "iu":
            values = np.floor(values + (0.5 + ROUNDING))
        return values.astype(pixels.dtype), valid


def _source_window(
    grid: GeoBox, source: GeoBox, top: int, left: int, bottom: int, right: int
) -> tuple[Window | None, tuple[float, float]]:
    """Pixels of a file that a rectangle of the grid is warped from.

    Returns:
        The window, if there is one, and how many pixels of the grid a pixel of the file makes,
        down and across, at most 1: the same for all rectangles.
    """
    height, width = source.shape
    middle = np.array([height / 2, width / 2])
    rows, cols = np.array([middle[0] + np.array([0, 1, 0]), middle[1] + np.array([0, 0, 1])])
    down, across = to_pixels(source, grid, rows, cols)
    sides = np.hypot(np.diff(down[[0, 1, 0, 2]])[::2], np.diff(across[[0, 1, 0, 2]])[::2])
    shrink = (1.0, 1.0) if sides.min() > SHRUNK else (min(1.0, sides[0]), min(1.0, sides[1]))
    there = on_grid(grid, source, (top, left, bottom, right))
    if there is None:
        return None, shrink
    margins = [math.ceil(KERNEL_PX / scale) for scale in shrink]
    first_row, last_row = max(0, there[0] - margins[0]), min(height, there[2] + margins[0])
    first_col, last_col = max(0, there[1] - margins[1]), min(width, there[3] + margins[1])
    if first_row >= last_row or first_col >= last_col:
        return None, shrink
    return Window(first_col, first_row, last_col - first_col, last_row - first_row), shrink
