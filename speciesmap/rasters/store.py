"""Embedding stores: the unit vectors of all cells of some imagery, in Zarr.

A store is a Zarr v3 group that xarray opens. Its array `vectors` has the dimensions y, x and
embedding, float16, NaN where nothing was encoded, and one chunk for each tile of cells. A chunk's
file lies under its name only when it is whole, so a tile is done when its chunk exists: that is
all the book-keeping that resuming needs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import shutil
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import pyproj
import zarr
from affine import Affine
from numcodecs import blosc
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from zarr.codecs import BloscCodec

from speciesmap import __version__, outputs
from speciesmap.errors import OutputError, StoreError, within_memory

if TYPE_CHECKING:
    import xarray

TILE = 32  # cells along a tile's side: 1,024 windows, many batches, about 1 MB of vectors
METADATA = "zarr.json"
VECTORS = "vectors"
BLOSC_HEADER = struct.Struct("<4sIII")  # flags, bytes decoded, block size, bytes of the file
SPATIAL_REF = "spatial_ref"


@dataclass(frozen=True)
class Identity:
    """What the vectors of a store depend on; a store serves nothing else.

    Attributes:
        model: Fingerprint of the model.
        window_px: Side of the windows.
        stride_px: Side of the cells, in the imagery's pixels.
        bands: Of the imagery, in the model's order.
        imagery: Fingerprint of the imagery.
        min_valid: Smallest share of valid pixels of a window that was encoded.
    """

    model: str
    window_px: int
    stride_px: int
    bands: tuple[str, ...]
    imagery: str
    min_valid: float


class EmbeddingStore:
    """An opened store; `create` or `open` one.

    Several threads and processes may read and write one store: each tile is replaced at once.

    Attributes:
        path: Of the Zarr group.
        identity: What it was made from.
        geobox: Grid of its cells.
        dim: Size of the embeddings.
        source: What the user called the imagery.
        gains: Of each band the factor and the shift that its values were given before they were
            encoded, where they were.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not (path / METADATA).is_file():  # Zarr would make a folder
                raise FileNotFoundError(f"no {METADATA}")
            self._group = zarr.open_group(path, mode="r+", zarr_format=3)
            self._vectors = cast("zarr.Array[Any]", self._group[VECTORS])
            facts: dict[str, Any] = dict(self._group.attrs)
            facts["bands"] = tuple(facts["bands"])
            self.identity = Identity(**{f.name: facts[f.name] for f in fields(Identity)})
            self.source = str(facts["source"])
            gains = facts.get("gains")
            self.gains = gains and tuple((float(factor), float(shift)) for factor, shift in gains)
            georeference = dict(self._group[SPATIAL_REF].attrs)
            transform = Affine.from_gdal(*map(float, str(georeference["GeoTransform"]).split()))
            rows, cols, self.dim = self._vectors.shape
            self.geobox = GeoBox((rows, cols), transform, str(georeference["crs_wkt"]))
            layout = (self._vectors.dtype, self._vectors.chunks)
            if layout != (np.dtype(np.float16), (TILE, TILE, self.dim)):
                raise ValueError(f"{layout[0]} vectors in chunks of {layout[1]}")
            coding: Any = self._vectors.metadata.to_dict()["codecs"]
            if (codecs := [codec["name"] for codec in coding]) != ["bytes", "blosc"]:
                raise ValueError(f"chunks coded by {', '.join(codecs)}")
        except StoreError:
            raise
        except Exception as error:  # zarr, odc-geo and pyproj raise classes of their own
            raise StoreError(
                f"{path} is not an embedding store ({error}); make one with `speciesmap embed`"
            ) from error
        self._vectors = self._vectors.with_config({"write_empty_chunks": True})

    @classmethod
    def create(
        cls,
        path: Path,
        identity: Identity,
        geobox: GeoBox,
        dim: int,
        *,
        source: str,
        gains: Sequence[tuple[float, float]] | None = None,
    ) -> EmbeddingStore:
        """Write an empty store.

        Where another process lands the same store first, that one is opened.

        Args:
            path: Of the group.
            identity: What its vectors will be made from.
            geobox: Grid of the cells.
            dim: Size of the embeddings.
            source: What the user calls the imagery.
            gains: What its values are multiplied by and shifted by, band by band.

        Raises:
            OutputError: The path cannot be written.
            StoreError: Another store is there, or another process landed one first.
        """
        outputs.refuse_existing(path, overwrite=True)
        beside = outputs.name_beside(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            group = zarr.create_group(beside, zarr_format=3)
            group.attrs.update(
                {
                    **asdict(identity),
                    "source": source,
                    "gains": gains,
                    "speciesmap_version": __version__,
                }
            )
            vectors = group.create_array(
                VECTORS,
                shape=(*geobox.shape, dim),
                chunks=(TILE, TILE, dim),
                dtype="float16",
                fill_value=np.nan,
                dimension_names=("y", "x", "embedding"),
                # near the speed of raw reads; unit vectors hardly compress
                compressors=BloscCodec(typesize=2, cname="lz4", clevel=5, shuffle="bitshuffle"),
            )
            vectors.attrs.update({"grid_mapping": SPATIAL_REF, "coordinates": SPATIAL_REF})
            _write_georeference(group, geobox)
            with warnings.catch_warnings():  # xarray wants it, Zarr's specification not yet
                warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
                zarr.consolidate_metadata(beside)
            beside.rename(path)  # fails where another process landed its own before
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputError(
                    f"cannot write {path} ({error}); make room or choose another folder"
                ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        store = cls(path)
        store.refuse_other(identity)
        return store

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        rows, cols = self.geobox.shape
        return math.ceil(rows / TILE), math.ceil(cols / TILE)

    def cells(self, tile: tuple[int, int]) -> tuple[slice, slice]:
        """Ranges of the cells of a tile."""
        rows, cols = (
            slice(t * TILE, min((t + 1) * TILE, side))
            for t, side in zip(tile, self.geobox.shape, strict=True)
        )
        return rows, cols

    def tiles_in(self, rows: slice, cols: slice) -> Iterator[tuple[int, int]]:
        """Give the tiles that ranges of cells touch, row by row."""
        for i in range(rows.start // TILE, math.ceil(rows.stop / TILE)):
            for j in range(cols.start // TILE, math.ceil(cols.stop / TILE)):
                yield i, j

    def has(self, tile: tuple[int, int]) -> bool:
        """Tell whether a tile is done."""
        key = self._vectors.metadata.encode_chunk_key((*tile, 0))
        return (self.path / VECTORS / key).exists()

    def done(self) -> tuple[slice, slice] | None:
        """Smallest ranges of cells that hold every tile that is done, or `None`."""
        high, wide = self.tiles
        names = [file.parts[-3:-1] for file in (self.path / VECTORS / "c").glob("*/*/0")]
        tiles = [(int(i), int(j)) for i, j in names if i.isdecimal() and j.isdecimal()]
        tiles = [(i, j) for i, j in tiles if i < high and j < wide]
        if not tiles:
            return None
        corners = [self.cells(tile) for tile in tiles]
        rows, cols = (
            slice(min(c[axis].start for c in corners), max(c[axis].stop for c in corners))
            for axis in (0, 1)
        )
        return rows, cols

    def write(self, tile: tuple[int, int], vectors: NDArray[np.float16]) -> None:
        """Write a tile's vectors, shape (rows, columns, D), NaN where nothing was encoded.

        Raises:
            OutputError: The disk is full or may not be written.
        """
        try:
            self._vectors[self.cells(tile)] = vectors
        except OSError as error:
            raise self._unwritable(f"tile {tile}", error) from error

    def read(self, rows: slice, cols: slice) -> NDArray[np.float16]:
        """Read the vectors of ranges of cells, shape (rows, columns, D), NaN where none are.

        Chunks are decoded here, in the caller's thread: Zarr's own way takes three times as long,
        and threads that read beside one another wait for its event loop.

        Raises:
            StoreError: A chunk is damaged.
        """
        found = np.empty((rows.stop - rows.start, cols.stop - cols.start, self.dim), np.float16)
        for tile in self.tiles_in(rows, cols):
            pairs = zip(self.cells(tile), (rows, cols), strict=True)
            inside, there = zip(*(shared(cells, wanted) for cells, wanted in pairs), strict=True)
            found[there] = self._chunk(tile)[inside]
        return found

    def _chunk(self, tile: tuple[int, int]) -> NDArray[np.float16]:
        """Decode a chunk, shape (TILE, TILE, D), all NaN where it is not there.

        Raises:
            StoreError: It is damaged, or it is not a chunk of this store's size: its header says
                how much memory decoding takes (Blosc 1 format).
        """
        path = self.path / VECTORS / self._vectors.metadata.encode_chunk_key((*tile, 0))
        shape = self._vectors.chunks
        try:
            coded = path.read_bytes()
            size = math.prod(shape) * 2
            if len(coded) < BLOSC_HEADER.size or BLOSC_HEADER.unpack_from(coded)[1::2] != (
                size,
                len(coded),
            ):
                raise ValueError(f"it does not hold {size} bytes")
            return np.frombuffer(blosc.decompress(coded), "<f2").reshape(shape)
        except FileNotFoundError:
            return np.full(shape, np.nan, np.float16)
        except (OSError, RuntimeError, ValueError) as error:
            raise StoreError(
                f"{path} cannot be read ({error}); delete it and run `speciesmap embed` again"
            ) from error

    @property
    def precision(self) -> str | None:
        """Arithmetic that its vectors were encoded in, once any were."""
        stated = self._group.attrs.get("precision")
        return None if stated is None else str(stated)

    def settle(self, precision: str) -> str:
        """Record the arithmetic of its vectors, unless another process has: the first wins.

        Args:
            precision: What this process would take.

        Returns:
            What stands from now on.

        Raises:
            OutputError: The disk is full or may not be written.
        """
        try:
            with (self.path / SPATIAL_REF / METADATA).open("rb+") as file:
                _lock(file, fcntl.LOCK_EX)
                self._group = zarr.open_group(self.path, mode="r+", zarr_format=3)
                if self.precision is None:
                    self._group.attrs["precision"] = precision
        except OSError as error:
            raise self._unwritable("its attributes", error) from error
        return self.precision or precision

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Mark that a process writes tiles.

        Where no other does, temporary files that killed processes left are removed at the start,
        and so is the store at the end if an error left it without a tile.

        Raises:
            OutputError: The store may not be written.
        """
        try:
            file = (self.path / VECTORS / METADATA).open("rb+")
        except OSError as error:
            raise self._unwritable("tiles", error) from error
        with file:
            if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                for left in self.path.rglob("*.partial"):
                    left.unlink(missing_ok=True)
            _lock(file, fcntl.LOCK_SH)
            try:
                yield
            except BaseException:
                if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) and self.done() is None:
                    shutil.rmtree(self.path, ignore_errors=True)
                raise

    def _unwritable(self, what: str, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write {what} in {self.path} ({error}); make room or choose another folder, "
            "then run again: tiles that are done are kept"
        )

    def refuse_other(self, wanted: Identity) -> None:
        """Stop before a store is used with what it was not made from.

        Raises:
            StoreError: Naming all that differs.
        """
        mine, other = asdict(self.identity), asdict(wanted)
        differences = [
            f"{name} {_words(mine[name])}, not {_words(other[name])}"
            for name in mine
            if mine[name] != other[name]
        ]
        if differences:
            raise StoreError(
                f"{self.path} was made with {'; '.join(differences)}; use another path for the "
                "store, or delete this one"
            )

    def to_xarray(self) -> xarray.DataArray:
        """Open the vectors lazily, with coordinates and CRS, dimensions y, x and embedding."""
        import rioxarray  # noqa: F401  (registers the accessor)
        import xarray

        opened: xarray.Dataset = xarray.open_zarr(self.path, chunks=None)
        return opened[VECTORS]


def shared(cells: slice, wanted: slice) -> tuple[slice, slice]:
    """What two ranges have in common, counted from the start of the one and of the other."""
    first, last = max(cells.start, wanted.start), min(cells.stop, wanted.stop)
    inside = slice(first - cells.start, last - cells.start)
    return inside, slice(first - wanted.start, last - wanted.start)


@within_memory()
def open_store(path: Path | str) -> EmbeddingStore:
    """Open a store that exists.

    Raises:
        ResourceError: Memory or threads ran out.
        StoreError: There is none, or it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(f"{path} does not exist; make it with `speciesmap embed`")
    return EmbeddingStore(path)


def _lock(file: BinaryIO, how: int) -> bool:
    """Lock a file until it is closed; tell whether that worked.

    Some file systems of clusters have no locks: there, left-overs stay and the rest works.
    """
    try:
        fcntl.flock(file, how)
    except OSError:
        return False
    return True


def _words(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | tuple) else str(value)


def _write_georeference(group: zarr.Group, geobox: GeoBox) -> None:
    """Write CRS and transform as CF and rioxarray have them, and coordinates where there are any.

    A rotated grid has no one-dimensional coordinates; its transform alone places it.
    """
    crs = pyproj.CRS.from_user_input(geobox.crs)
    wkt = crs.to_wkt()
    reference = group.create_array(SPATIAL_REF, shape=(), dtype="int64", dimension_names=())
    reference[...] = 0
    transform = " ".join(repr(float(v)) for v in geobox.transform.to_gdal())
    reference.attrs.update(
        {**crs.to_cf(), "crs_wkt": wkt, SPATIAL_REF: wkt, "GeoTransform": transform}
    )
    if not geobox.axis_aligned:
        return
    t = geobox.transform
    rows, cols = geobox.shape
    axes = crs.cs_to_cf()
    for name, values, axis in (
        ("y", t.f + t.e * (np.arange(rows) + 0.5), "Y"),
        ("x", t.c + t.a * (np.arange(cols) + 0.5), "X"),
    ):
        array = group.create_array(
            name, shape=values.shape, dtype="float64", dimension_names=(name,)
        )
        array[:] = values
        array.attrs.update(next((a for a in axes if a.get("axis") == axis), {}))
