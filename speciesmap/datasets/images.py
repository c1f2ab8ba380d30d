"""Images in the Parquet of paired data sets: decoded once for any row, or read by row groups."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from speciesmap.datasets.columns import AERIAL, GROUND, SIDECAR, decode_windows
from speciesmap.errors import DatasetError
from speciesmap.outputs import replacing
from speciesmap.progress import track

IN_MEMORY_BYTES = 1 << 28
BATCH_ROWS = 32


@dataclass(frozen=True)
class ImageFiles:
    """Where windows and photos are, and what windows are like.

    Attributes:
        where: The folder, file or address of the data set.
        files: Its Parquet files.
        groups: Of each row group, in row order: the number of its file, its number there, its rows.
        shape: Of a window, (B, P, P).
        dtype: Type of its pixels.
    """

    where: Path | str
    files: tuple[Path | str, ...]
    groups: tuple[tuple[int, int, int], ...]
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]

    @cached_property
    def group_rows(self) -> NDArray[np.int64]:
        """Rows of each row group, shape (G,)."""
        return np.array([rows for _, _, rows in self.groups], dtype=np.int64)

    def read(self, group: int, rows: NDArray[np.int64]) -> tuple[NDArray[Any], pa.Array]:
        """Read rows of one row group, also of a remote file.

        Args:
            group: Its number.
            rows: Positions in the group, shape (N,).

        Returns:
            Windows, shape (N, B, P, P), and encoded photos as large binary.

        Raises:
            DatasetError: The file cannot be read, or a window or photo is not as it should be.
        """
        number, within, _ = self.groups[group]
        file = self.files[number]
        parquet, columns = _open_images(file)
        first = int(self.group_rows[:group].sum())
        windows, photos = [], []
        start = 0
        with damage_named(file):
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[within], columns=columns):
                inside = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
                if len(inside):
                    pixels, encoded = self._images_of(batch, file, first + start)
                    windows.append(pixels[inside])
                    photos.append(encoded.take(pa.array(inside)))
                start += batch.num_rows
        return np.concatenate(windows), pa.concat_arrays(photos)

    def decoded(self) -> Images:
        """Decode all rows, or find what an earlier process decoded.

        Raises:
            DatasetError: The data set is remote, or an image is not as it should be.
        """
        if not isinstance(self.where, Path):
            raise DatasetError(
                f"{self.where} is remote, and its images can only be streamed, which stage "
                "pretrain does with data.stream; download it"
            )
        window_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        stats = [(file.name, file.stat()) for file in map(Path, self.files)]
        on_disk = sum(stat.st_size for _, stat in stats)
        if int(self.group_rows.sum()) * window_bytes + on_disk <= IN_MEMORY_BYTES:
            sink = pa.BufferOutputStream()
            self._decode(sink)
            return Images(pa.BufferReader(sink.getvalue()))
        place = hashlib.sha256(str(self.where.resolve()).encode()).hexdigest()[:16]
        state = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        name = f"{place}-{hashlib.sha256(state.encode()).hexdigest()[:16]}.arrow"
        cache = cache_folder() / name
        if not cache.exists():
            for stale in cache.parent.glob(f"{place}-*.arrow"):
                stale.unlink(missing_ok=True)
            with replacing(cache, overwrite=True) as beside, pa.OSFile(str(beside), "wb") as sink:
                self._decode(sink)
        return Images(pa.memory_map(str(cache), "r"))

    def _decode(self, sink: pa.NativeFile) -> None:
        """Write the windows and photos of all rows as record batches of raw bytes."""
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        layout = pa.schema([("window", pa.binary(size)), ("photo", pa.large_binary())])
        rows_of_file = np.bincount([number for number, _, _ in self.groups], self.group_rows)
        with pa.ipc.new_file(sink, layout) as out:
            for windows, photos in track(
                self._batches(),
                f"Decoding {self.where}",
                total=int(np.ceil(rows_of_file / BATCH_ROWS).sum()),
            ):
                pixels = pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(size), len(windows), [None, pa.py_buffer(windows)]
                )
                out.write_batch(pa.record_batch([pixels, photos], schema=layout))

    def _batches(self) -> Iterator[tuple[NDArray[Any], pa.Array]]:
        first = 0
        for file in self.files:
            parquet, columns = _open_images(file)
            batches = parquet.iter_batches(BATCH_ROWS, columns=columns)
            while True:
                with damage_named(file):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield self._images_of(batch, file, first)
                first += batch.num_rows

    def _images_of(
        self, batch: pa.RecordBatch, file: Path | str, first: int
    ) -> tuple[NDArray[Any], pa.Array]:
        """Windows (n, B, P, P) of a batch and its photos, still encoded."""
        where = f"{AERIAL} of {file}"
        windows = decode_windows(batch.column(AERIAL), where, first)
        if windows.shape[1:] != self.shape:
            raise DatasetError(
                f"row {first} of {where} is a window of shape {windows.shape[1:]}, the data "
                f"set's is {self.shape}; all windows of a data set must have one shape"
            )
        windows = _narrow(windows, self.dtype, where, first)
        photos = pa.nulls(batch.num_rows, pa.large_binary())
        if GROUND in batch.schema.names:
            photos = _photo_bytes(batch.column(GROUND), file, first)
        return np.ascontiguousarray(windows), photos


class Images:
    """Windows and photos of all rows as raw bytes.

    Args:
        source: Arrow record batches of `window` and `photo`.
    """

    def __init__(self, source: pa.NativeFile | pa.BufferReader) -> None:
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
        self._windows = [batch.column(0) for batch in batches]
        self._photos = [batch.column(1) for batch in batches]
        self._ends = np.cumsum([batch.num_rows for batch in batches])

    def window(self, row: int) -> memoryview:
        """Pixels of a row."""
        batch = int(np.searchsorted(self._ends, row, side="right"))
        column = self._windows[batch]
        k = row - (int(self._ends[batch]) - len(column))
        size = column.type.byte_width
        start = (column.offset + k) * size
        return memoryview(column.buffers()[1])[start : start + size]

    def photo(self, row: int) -> bytes | None:
        """Encoded photo of a row, if it has one."""
        batch = int(np.searchsorted(self._ends, row, side="right"))
        column = self._photos[batch]
        encoded: bytes | None = column[row - (int(self._ends[batch]) - len(column))].as_py()
        return encoded


def open_parquet(file: Path | str) -> pq.ParquetFile:
    """Open a Parquet file or the address of one.

    Raises:
        DatasetError: It is none that can be read.
    """
    try:
        return pq.ParquetFile(file if isinstance(file, Path) else fsspec.open(file).open())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"{file} is not a readable Parquet file ({reason}); copy the data set again"
        ) from error


def _open_images(file: Path | str) -> tuple[pq.ParquetFile, list[str]]:
    """Open a file, and name its columns of images."""
    parquet = open_parquet(file)
    return parquet, [name for name in (AERIAL, GROUND) if name in parquet.schema_arrow.names]


def _narrow(windows: NDArray[Any], dtype: np.dtype[Any], where: str, first: int) -> NDArray[Any]:
    """Store wide integers in the data set's own type, never changing a value."""
    if windows.dtype == dtype:
        return windows
    narrow = windows.astype(dtype)
    changed = np.flatnonzero((narrow != windows).reshape(len(windows), -1).any(axis=1))
    if changed.size:
        worst = windows[changed[0]]
        raise DatasetError(
            f"row {first + changed[0]} of {where} has pixels from {worst.min()} to {worst.max()}, "
            f"which do not fit {dtype}; scale them, or name their type as `dtype` in {SIDECAR}"
        )
    return narrow


def _photo_bytes(column: pa.Array, file: Path | str, first: int) -> pa.Array:
    """Take the encoded photos out of a Hugging Face image column."""
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return column.cast(pa.large_binary())
    if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
        raise DatasetError(
            f"{GROUND} of {file} is {column.type}; expected a Hugging Face Image column, "
            "a struct of bytes and path"
        )
    encoded = pc.struct_field(column, "bytes")
    if column.type.get_field_index("path") >= 0:
        paths = pc.struct_field(column, "path")
        lost = pc.and_(encoded.is_null(), paths.is_valid())
        if pc.any(lost).as_py():
            row = int(np.flatnonzero(lost.to_numpy(zero_copy_only=False))[0])
            raise DatasetError(
                f"row {first + row} of {file} names the photo {paths[row].as_py()!r} without its "
                "bytes; embed the files, for example with datasets' `push_to_hub` or `chips`"
            )
    return encoded.cast(pa.large_binary())


def cache_folder() -> Path:
    """The user's cache folder, or a temporary one where that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(home) if home else Path.home() / ".cache") / "speciesmap"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"speciesmap-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextmanager
def damage_named(file: Path | str) -> Iterator[None]:
    """Turn what Arrow meets in a damaged file into words."""
    try:
        yield
    except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{file} is damaged ({reason}); copy the data set again") from error
