"""Imagery: rasters on one grid, read by pixel windows as if they were one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
from numpy.typing import ArrayLike, NDArray
from odc.geo.geobox import GeoBox

from speciesmap.errors import ImageryError
from speciesmap.rasters.bands import canonical
from speciesmap.rasters.files import Files
from speciesmap.rasters.grid import in_words
from speciesmap.rasters.messages import public
from speciesmap.rasters.placed import PlacedScene, Reader, Rectangle
from speciesmap.rasters.remote import is_remote
from speciesmap.rasters.scenes import RasterFile
from speciesmap.rasters.windows import transformed

SAMPLE_PX = 512  # side of the squares that `sample` reads
BLOCK_PX = 512  # of Cloud-Optimized GeoTIFFs by default
STRIP_PX = 4096  # two rows of blocks across it fit in a cache

Origin = tuple[str, str, str]
"""Name of a scene, its date where that is known, and the assets it is read from."""


@dataclass(frozen=True)
class Imagery:
    """A raster, or several scenes on one grid, that is read by pixel windows.

    Safe to read from several threads and to pickle into other processes.

    Attributes:
        source: What the user named, without what may be a credential.
        bands: Names of the bands that `read` gives, in order.
        geobox: Grid: shape, transform and CRS.
        dtype: Type of the pixels.
        resolution_m: Geometric mean of the sides of the central pixel on the ground, metres.
        detail_m: The same of the coarsest scene before any was warped.
        gains: Of each band a factor and what is added afterwards, where values are changed.
    """

    source: str
    bands: tuple[str, ...]
    geobox: GeoBox
    dtype: np.dtype[Any]
    resolution_m: float
    detail_m: float
    gains: tuple[tuple[float, float], ...] | None
    _indexes: tuple[int, ...] = field(repr=False)
    _file_bands: tuple[str, ...] = field(repr=False)
    _scaling: tuple[tuple[float, float], ...] = field(repr=False)
    _members: tuple[PlacedScene, ...] = field(repr=False)
    _files: Files = field(default_factory=Files, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.geobox.shape
        return int(height), int(width)

    @property
    def scenes(self) -> int:
        """How many scenes it is made of."""
        return len(self._members)

    @property
    def grid_in_words(self) -> str:
        """A line that tells its CRS, pixels, origin and shape."""
        return in_words(self.geobox)

    @property
    def in_words(self) -> str:
        """The same, how many scenes there are, and whether any is warped."""
        warped = any(p.warped for m in self._members for p in m.files)
        scenes = f"{self.scenes} scene{'s' * (self.scenes > 1)}"
        return f"{self.grid_in_words}; {scenes}{', warped' * warped}"

    def bytes_in(self, row: int, col: int, height: int, width: int) -> int:
        """Estimate how many bytes of its files are read for a rectangle, by shares of their areas.

        Files are taken to have blocks of 512 pixels, which are read whole.
        """
        total = 0.0
        touching = list(self._touching(row, col, height, width))
        self._learn_versions([m for m, _ in touching])
        for m, (top, left, bottom, right) in touching:
            rows = _in_blocks(top - m.row, bottom - m.row, m.height)
            cols = _in_blocks(left - m.col, right - m.col, m.width)
            share = rows * cols / (m.height * m.width)
            total += share * sum(self._bytes(p.file) for p, _, _ in m.used(self._indexes))
        return round(total)

    def _bytes(self, file: RasterFile) -> int:
        """Size of a file, 0 where it is not known."""
        if is_remote(file.path):
            return self._files.version(file.path, file.signer).size
        path = Path(file.path)
        return path.stat().st_size if path.exists() else 0

    def _learn_versions(self, members: Sequence[PlacedScene]) -> None:
        files = [p.file for m in members for p, _, _ in m.used(self._indexes)]
        self._files.versions({f.path: f.signer for f in files if is_remote(f.path)})

    @property
    def remote(self) -> bool:
        """Whether any of it is read over a network."""
        return any(is_remote(p.file.path) for m in self._members for p in m.files)

    @property
    def scaling(self) -> tuple[tuple[float, float], ...]:
        """Of each band the scale and offset that make its values physical; (1, 0) if untold."""
        if self.gains is not None:
            return ((1.0, 0.0),) * len(self.bands)
        return tuple(self._scaling[i - 1] for i in self._indexes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the grid, the bands, the files' sizes and a sample of the pixels.

        Times and paths are left out: a copy of the imagery has the same fingerprint. Of files on
        servers that tell an ETag, or date, that stands for the pixels. Of others, in a bucket that
        takes signed requests for one, the address counts too.
        """
        digest = hashlib.sha256()
        digest.update(repr((self.shape, tuple(self.geobox.transform), self.bands)).encode())
        digest.update(repr((str(self.geobox.crs), str(self.dtype), self._indexes)).encode())
        if self.gains is not None:
            digest.update(repr(self.gains).encode())
        sampled = []
        self._learn_versions(self._members)
        for m in self._members:
            for p, _, _ in m.used(self._indexes):
                path = p.file.path
                known: Any = self._bytes(p.file) or -1
                tag = self._files.version(path, p.file.signer).tag if is_remote(path) else ""
                if tag:
                    known = tag
                else:
                    sampled.append(m)
                    known = (public(path), known) if is_remote(path) else known
                digest.update(repr((p.row, p.col, p.height, p.width, known)).encode())
        chosen = sampled[:: math.ceil(len(sampled) / 64) or 1]
        per_axis = max(1, math.isqrt(64 // max(1, len(chosen))))
        for m in chosen:
            for down in np.linspace(0, 1, per_axis + 2)[1:-1]:
                for across in np.linspace(0, 1, per_axis + 2)[1:-1]:
                    row, col = m.row + int(down * m.height), m.col + int(across * m.width)
                    try:
                        sample = self.read(row - 16, col - 16, 32, 32)
                    except ImageryError:  # whoever needs these pixels hears of it
                        digest.update(b"unreadable")
                        continue
                    for array in sample:
                        digest.update(array.tobytes())
        return digest.hexdigest()

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        """Top, left, bottom and right of the scenes, shape (4, N)."""
        return np.array(
            [(m.row, m.col, m.row + m.height, m.col + m.width) for m in self._members]
        ).T

    def _touching(
        self, row: int, col: int, height: int, width: int
    ) -> Iterator[tuple[PlacedScene, Rectangle]]:
        """Scenes that share pixels with a rectangle, and what they share, in their order."""
        top, left, bottom, right = self._edges
        near = (top < row + height) & (bottom > row) & (left < col + width) & (right > col)
        for k in np.flatnonzero(near).tolist():
            shared = self._members[k].shared(row, col, height, width)
            if shared is not None:
                yield self._members[k], shared

    @cached_property
    def _reader(self) -> Reader:
        alpha_is_data = "alpha" not in self._file_bands
        return Reader(self.geobox, self._indexes, self._scaling, alpha_is_data, self._files)

    def crop(self, row: int, col: int, height: int, width: int) -> Imagery:
        """Give the imagery a smaller grid; pixels around it can still be read.

        Args:
            row: First row of the new grid, in this one.
            col: First column.
            height: In pixels.
            width: In pixels.
        """
        transform = self.geobox.transform * self.geobox.transform.translation(col, row)
        return replace(
            self,
            geobox=GeoBox((height, width), transform, self.geobox.crs),
            _members=tuple(m.moved(row, col) for m in self._members),
        )

    def rescaled(self, gains: Sequence[tuple[float, float]]) -> Imagery:
        """Give the same imagery with values multiplied and shifted, as float32.

        Args:
            gains: Of each band a factor and what is added afterwards.
        """
        if self.gains is not None:
            earlier = zip(self.gains, gains, strict=True)
            gains = [(a * gain, b * gain + shift) for (a, b), (gain, shift) in earlier]
        return replace(self, dtype=np.dtype(np.float32), gains=tuple(gains))

    def provenance(self, row: int, col: int, height: int, width: int) -> list[Origin]:
        """Scenes that reach into a rectangle, the one that counts first at the front."""
        return [self._origin(m) for m, _ in self._touching(row, col, height, width)]

    def undeclared(self, row: int, col: int, height: int, width: int) -> str | None:
        """Path of a file in a rectangle whose scene does not say which pixels are invalid, if any.

        Raises:
            ImageryError: A file cannot be opened.
        """
        for m, _ in self._touching(row, col, height, width):
            if not self._reader.declares_invalid(m):
                return m.used(self._indexes)[0][0].file.path
        return None

    def _origin(self, m: PlacedScene) -> Origin:
        assets = [p.file.asset for p, _, _ in m.used(self._indexes) if p.file.asset]
        return m.name, m.date, "+".join(assets)

    def by_scene(self, starts: NDArray[np.int64], side_px: int) -> list[NDArray[np.int64]]:
        """Group squares by the scene that counts first where their centre lies.

        Args:
            starts: First row and column of each, shape (N, 2).
            side_px: Their side.

        Returns:
            Numbers of the squares of each group, scenes from top to bottom, and in each in an order
            that needs a scene's blocks one after another: down strips of 4096 columns.
        """
        centre = starts + side_px // 2  # (N, 2)
        scene = np.zeros(len(starts), np.int64)
        edges = self._edges
        for number in range(len(self._members) - 1, -1, -1):
            top, left, bottom, right = edges[:, number]
            inside = (centre >= [top, left]) & (centre < [bottom, right])
            scene[inside.all(axis=1)] = number
        row, col = starts.T - edges[:2, scene]
        order = np.lexsort((col, row // BLOCK_PX, col // STRIP_PX, scene, *edges[1::-1, scene]))
        cuts = np.flatnonzero(np.diff(scene[order])) + 1
        return [group for group in np.split(order, cuts) if group.size]

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
        if self.gains is not None:
            raise ImageryError(f"{self.source}: choose bands before their values are scaled")
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
        pixels, valid, _ = self._compose(row, col, height, width)
        return pixels, valid

    def _compose(
        self, row: int, col: int, height: int, width: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_], list[tuple[int, PlacedScene]]]:
        """Read a rectangle, and count the valid pixels that each scene gave it."""
        kind = self.dtype if self.gains is None else self._members[0].dtype
        pixels = np.zeros((len(self.bands), height, width), kind)
        valid = np.zeros((height, width), np.bool_)
        gave = []
        for m, shared in self._touching(row, col, height, width):
            top, left, bottom, right = shared
            place = (slice(top - row, bottom - row), slice(left - col, right - col))
            if len(self._members) > 1 and valid[place].all():
                continue
            part, usable = self._reader.read(m, shared)
            new = usable & ~valid[place]
            if new.all():
                pixels[:, *place] = part
            else:
                fresh = ~valid[place] if len(self._members) == 1 else new
                np.copyto(pixels[:, *place], part, where=fresh)
            gave.append((int(np.count_nonzero(new)), m))
            valid[place] |= usable
        if self.gains is not None:
            gain, shift = np.array(self.gains, np.float32).T[:, :, None, None]
            pixels = pixels.astype(np.float32) * gain + shift
        return pixels, valid, gave

    def read_windows(
        self, starts: Sequence[tuple[int, int]], side_px: int
    ) -> list[tuple[NDArray[Any], NDArray[np.bool_], list[Origin]]]:
        """Read squares, asking servers only once whether their files have changed meanwhile.

        Args:
            starts: First row and column of each; neighbours together are read fastest.
            side_px: Their side.

        Returns:
            Of each what `read` gives, and the scenes whose pixels it shows, most of them first:
            name, date where that is known, and assets.

        Raises:
            ImageryError: A file cannot be read, or changed.
        """
        squares = []
        with self._files.checked_at_end():
            for row, col in starts:
                pixels, valid, gave = self._compose(row, col, side_px, side_px)
                shown = sorted((g for g in gave if g[0]), key=lambda g: -g[0])
                squares.append((pixels, valid, [self._origin(m) for _, m in shown]))
        return squares

    def taking_turns(self) -> Imagery:
        """The same, of which threads share the open files, so that each is opened once."""
        return replace(self, _files=self._files.shared())

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


def _in_blocks(first: int, last: int, side: int) -> int:
    """Length of the blocks that hold a part of a side."""
    return min(side, -(-last // BLOCK_PX) * BLOCK_PX) - first // BLOCK_PX * BLOCK_PX
