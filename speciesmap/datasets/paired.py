"""Paired data sets: Parquet in the columns of Nature Multi-View, readable by Hugging Face.

A data set is a folder of Parquet files, each row one ground photo with the aerial window around
the place where it was taken. What this project writes carries a `dataset.json` with the facts that
the columns cannot hold (bands, resolution, taxa with their lineages); a folder downloaded from the
hub has none, and then Nature Multi-View's own values hold: red, green, blue, nir at 0.6 m.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from speciesmap.datasets.columns import AERIAL, GROUND, SIDECAR, decode_windows
from speciesmap.datasets.nature_multi_view import (
    lineage_of,
    of_split,
    read_taxonomy,
    remote_files,
)
from speciesmap.datasets.photos import open_photo
from speciesmap.errors import DatasetError
from speciesmap.outputs import replacing
from speciesmap.progress import track
from speciesmap.taxa import Taxon

NMV_BANDS = ("red", "green", "blue", "nir")
NMV_RESOLUTION_M = 0.6
IN_MEMORY_BYTES = 1 << 28
BATCH_ROWS = 32

log = logging.getLogger("speciesmap")


@dataclass
class PairedDataset:
    """Rows of aerial windows, ground photos and facts; images are read when asked for.

    Images are decoded from Parquet once: into memory where they take less than 256 MB, else into
    an Arrow file in the user's cache folder that is mapped, so that any row is one copy away and
    the data set itself may be read-only.

    Attributes:
        path: The folder, file or address it was opened from.
        facts: All columns but the images, in row order.
        taxa: Every taxon of the rows.
        bands: Names of the aerial bands.
        window_px: Side of the aerial windows in pixels.
        resolution_m: Side of an aerial pixel on the ground, in metres.
        dtype: Type of the aerial pixels.
        has_aerial: Whether rows have windows, as they all do.
        has_ground: Whether rows have photos.
        notes: The whole of `dataset.json`, empty for a folder without one.
        group_rows: Rows of each Parquet row group, in row order, shape (G,).
    """

    path: Path | str
    facts: pd.DataFrame = field(repr=False)
    taxa: tuple[Taxon, ...]
    bands: tuple[str, ...]
    window_px: int
    resolution_m: float
    dtype: np.dtype[Any]
    has_ground: bool
    notes: dict[str, Any] = field(default_factory=dict, repr=False)
    group_rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    _files: tuple[Path | str, ...] = field(default=(), repr=False)
    _groups: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    _arguments: tuple[Any, ...] = field(default=(), repr=False)
    _images: _Images | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    has_aerial: ClassVar[bool] = True

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.facts)

    def __reduce__(self) -> tuple[Callable[..., PairedDataset], tuple[Any, ...]]:
        """Travel to another process as a path, never with the images."""
        return open_paired, (self.path, *self._arguments)

    def rows_of(self, chosen: Callable[[str], bool]) -> NDArray[np.int64]:
        """Numbers of the rows in files chosen by their path in the data set, shape (N,)."""
        wanted = [chosen(_inside(self.path, self._files[number])) for number, _ in self._groups]
        return np.flatnonzero(np.repeat(wanted, self.group_rows))

    def aerial(self, rows: ArrayLike | None = None) -> NDArray[Any]:
        """Read aerial windows.

        Args:
            rows: Row numbers, in any order; all rows by default.

        Returns:
            Pixels in the data set's type, shape (N, B, P, P).

        Raises:
            DatasetError: A window is missing or ragged.
        """
        images = self._opened()
        numbers = self._rows(rows)
        shape = (len(self.bands), self.window_px, self.window_px)
        pixels = np.empty((len(numbers), *shape), dtype=self.dtype)
        for k, row in enumerate(numbers):
            pixels[k] = np.frombuffer(images.window(int(row)), self.dtype).reshape(shape)
        return pixels

    def ground(self, rows: ArrayLike | None = None) -> list[Image.Image | None]:
        """Read ground photos as RGB, upright; None where a row has none.

        Raises:
            DatasetError: A photo does not decode.
        """
        images = self._opened()
        return [self.decode(int(row), images.photo(int(row))) for row in self._rows(rows)]

    def decode(self, row: int, encoded: bytes | None) -> Image.Image | None:
        """Decode a row's photo as RGB, upright; None where it has none.

        Raises:
            DatasetError: It does not decode.
        """
        if encoded is None:
            return None
        try:
            return open_photo(io.BytesIO(encoded))
        except ValueError as error:
            raise DatasetError(
                f"{self.path}: the photo of row {row} does not decode ({error}); "
                "make the data set again with `speciesmap chips`"
            ) from error

    def prepare(self) -> None:
        """Decode the images now, once, for example before worker processes start."""
        self._opened()

    def _opened(self) -> _Images:
        with self._lock:
            if self._images is None:
                self._images = _Images.of(self)
            return self._images

    def _rows(self, rows: ArrayLike | None) -> NDArray[np.int64]:
        if rows is None:
            return np.arange(len(self))
        numbers = np.asarray(rows)
        if numbers.dtype == bool:
            numbers = np.flatnonzero(numbers)
        numbers = np.atleast_1d(numbers).astype(np.int64)
        wrong = numbers[(numbers < -len(self)) | (numbers >= len(self))]
        if wrong.size:
            raise DatasetError(f"{self.path} has {len(self)} rows; there is no row {wrong[0]}")
        return numbers % max(1, len(self))


class _Images:
    """Windows and photos of all rows as record batches of raw bytes."""

    def __init__(self, source: pa.NativeFile | pa.BufferReader) -> None:
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
        self._windows = [batch.column(0) for batch in batches]
        self._photos = [batch.column(1) for batch in batches]
        self._ends = np.cumsum([batch.num_rows for batch in batches])

    @classmethod
    def of(cls, dataset: PairedDataset) -> _Images:
        """Decode a data set's Parquet, or find what an earlier process decoded."""
        if not isinstance(dataset.path, Path):
            raise DatasetError(
                f"{dataset.path} is remote, and its rows can only be streamed; set data.stream, or "
                "download it"
            )
        window_bytes = len(dataset.bands) * dataset.window_px**2 * dataset.dtype.itemsize
        on_disk = sum(Path(file).stat().st_size for file in dataset._files)
        if len(dataset) * window_bytes + on_disk <= IN_MEMORY_BYTES:
            sink = pa.BufferOutputStream()
            cls._decode(dataset, sink)
            return cls(pa.BufferReader(sink.getvalue()))
        place = hashlib.sha256(str(dataset.path.resolve()).encode()).hexdigest()[:16]
        stats = [(f.name, f.stat()) for f in map(Path, dataset._files)]
        state = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        name = f"{place}-{hashlib.sha256(state.encode()).hexdigest()[:16]}.arrow"
        cache = _cache_folder() / name
        if not cache.exists():
            for stale in cache.parent.glob(f"{place}-*.arrow"):
                stale.unlink(missing_ok=True)
            with replacing(cache, overwrite=True) as beside, pa.OSFile(str(beside), "wb") as sink:
                cls._decode(dataset, sink)
        return cls(pa.memory_map(str(cache), "r"))

    @staticmethod
    def _decode(dataset: PairedDataset, sink: pa.NativeFile) -> None:
        shape = (len(dataset.bands), dataset.window_px, dataset.window_px)
        size = int(np.prod(shape)) * dataset.dtype.itemsize
        layout = pa.schema([("window", pa.binary(size)), ("photo", pa.large_binary())])
        with pa.ipc.new_file(sink, layout) as out:
            for windows, photos in track(
                _decoded(dataset, shape),
                f"Decoding {dataset.path}",
                total=-(-len(dataset) // BATCH_ROWS),
            ):
                pixels = pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(size), len(windows), [None, pa.py_buffer(windows)]
                )
                out.write_batch(pa.record_batch([pixels, photos], schema=layout))

    def window(self, row: int) -> memoryview:
        batch = int(np.searchsorted(self._ends, row, side="right"))
        column = self._windows[batch]
        k = row - (int(self._ends[batch]) - len(column))
        size = column.type.byte_width
        start = (column.offset + k) * size
        return memoryview(column.buffers()[1])[start : start + size]

    def photo(self, row: int) -> bytes | None:
        batch = int(np.searchsorted(self._ends, row, side="right"))
        column = self._photos[batch]
        encoded: bytes | None = column[row - (int(self._ends[batch]) - len(column))].as_py()
        return encoded


def _decoded(
    dataset: PairedDataset, shape: tuple[int, int, int]
) -> Iterator[tuple[NDArray[Any], pa.Array]]:
    """Decode a data set's files batch by batch: windows (n, B, P, P), photos as large binary."""
    first = 0
    for file in dataset._files:
        parquet = _open_parquet(file)
        columns = [AERIAL, *([GROUND] if GROUND in parquet.schema_arrow.names else [])]
        batches = parquet.iter_batches(BATCH_ROWS, columns=columns)
        while True:
            with _damage_named(file):
                batch = next(batches, None)
            if batch is None:
                break
            yield _images_of(dataset, batch, file, first, shape)
            first += batch.num_rows


def _images_of(
    dataset: PairedDataset,
    batch: pa.RecordBatch | pa.Table,
    file: Path | str,
    first: int,
    shape: tuple[int, int, int],
) -> tuple[NDArray[Any], pa.Array]:
    where = f"{AERIAL} of {file}"
    windows = decode_windows(batch.column(AERIAL), where, first)
    if windows.shape[1:] != shape:
        raise DatasetError(
            f"row {first} of {where} is a window of shape {windows.shape[1:]}, the data "
            f"set's is {shape}; all windows of a data set must have one shape"
        )
    windows = _narrow(windows, dataset.dtype, where, first)
    photos = pa.nulls(batch.num_rows, pa.large_binary())
    if GROUND in batch.schema.names:
        photos = _photo_bytes(batch.column(GROUND), file, first)
    return np.ascontiguousarray(windows), photos


def read_images(
    dataset: PairedDataset, group: int, rows: NDArray[np.int64]
) -> tuple[NDArray[Any], pa.Array]:
    """Read rows of one Parquet row group, also of a remote file.

    Args:
        dataset: Where to read.
        group: Number of the row group, as `group_rows` counts them.
        rows: Positions in the group, shape (N,).

    Returns:
        Windows in the data set's type, shape (N, B, P, P), and encoded photos as large binary.

    Raises:
        DatasetError: The file cannot be read, or a window or photo is not as it should be.
    """
    number, within = dataset._groups[group]
    file = dataset._files[number]
    parquet = _open_parquet(file)
    columns = [AERIAL, *([GROUND] if GROUND in parquet.schema_arrow.names else [])]
    first = int(dataset.group_rows[:group].sum())
    shape = (len(dataset.bands), dataset.window_px, dataset.window_px)
    windows, photos = [], []
    start = 0
    try:
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[within], columns=columns):
            inside = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
            if len(inside):
                pixels, encoded = _images_of(dataset, batch, file, first + start, shape)
                windows.append(pixels[inside])
                photos.append(encoded.take(pa.array(inside)))
            start += batch.num_rows
    except OSError as error:
        raise DatasetError(f"{file} cannot be read ({error}); check the file") from error
    return np.concatenate(windows), pa.concat_arrays(photos)


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


def _cache_folder() -> Path:
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
def _damage_named(file: Path | str) -> Iterator[None]:
    """Turn what Arrow meets in a damaged file into words."""
    try:
        yield
    except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{file} is damaged ({reason}); copy the data set again") from error


class _Lineage(BaseModel):
    name: Annotated[str, Field(pattern=r"\S")]
    lineage: list[str]


class _Sidecar(BaseModel):
    """What is read from `dataset.json`; further keys are other readers' business."""

    bands: list[str] = []
    resolution_m: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    dtype: Literal["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64"] = "uint8"
    photos: int = 0
    scaling: list[tuple[float, float]] = []
    taxa: list[_Lineage] = []


def _open_parquet(file: Path | str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file if isinstance(file, Path) else fsspec.open(file).open())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} is not a readable Parquet file: {error}") from error


def open_paired(
    path: str | Path, split: str | None = None, taxonomy: str | Path | None = None
) -> PairedDataset:
    """Open a paired data set: a folder of Parquet files, one such file, or an address.

    Only the facts are read; images wait until `aerial` or `ground` is called, or a `Stream`. Those
    of an address are kept in the user's cache folder.

    Args:
        path: What `speciesmap chips` wrote, a local copy of Nature Multi-View or of a part of it,
            or an address such as `hf://datasets/andyvhuynh/NatureMultiView`.
        split: `train`, `validation` or `test` where files are named so; all files by default.
        taxonomy: Table of iNaturalist's taxon numbers, see `read_taxonomy`, for lineages.

    Raises:
        DatasetError: No Parquet file is there, one is damaged, or a needed column is missing.
    """
    files: tuple[Path | str, ...]
    sidecar: Path | None = None
    if "://" in str(path):
        files = remote_files(str(path))
    elif Path(path).is_dir():
        path = Path(path)
        files = tuple(f for f in sorted(path.rglob("*.parquet")) if not f.name.startswith("."))
        sidecar = path / SIDECAR
    elif Path(path).is_file():
        path = Path(path)
        files = (path,)
        sidecar = path.parent / SIDECAR
        if not sidecar.exists():
            sidecar = path.parent.parent / SIDECAR
    else:
        raise DatasetError(f"there is no data set {path}; make one with `speciesmap chips`")
    if not files:
        raise DatasetError(f"{path} holds no Parquet file; make a data set with `speciesmap chips`")
    if split is not None:
        files = tuple(file for file in files if of_split(_inside(path, file), split))
        if not files:
            raise DatasetError(f"{path} has no files of the split {split!r}; leave data.split out")

    notes = _read_sidecar(sidecar) if sidecar is not None and sidecar.exists() else {}
    with ThreadPoolExecutor(16) as pool:
        parts = list(
            track(pool.map(_read_facts, files), f"Reading facts of {path}", len(files))
            if len(files) > 4
            else map(_read_facts, files)
        )
    with _damage_named(str(path)):
        table = pa.concat_tables([part for part, _, _ in parts], promote_options="permissive")
    if not table.num_rows:
        raise DatasetError(f"{path} has no rows; make the data set again with other observations")
    facts = table.to_pandas()
    groups = [
        (number, k, rows)
        for number, (_, _, counts) in enumerate(parts)
        for k, rows in enumerate(counts)
    ]

    with _damage_named(files[0]):
        head = next(_open_parquet(files[0]).iter_batches(1, columns=[AERIAL]))
    window = decode_windows(head.column(AERIAL), f"{AERIAL} of {files[0]}")[0]
    if window.shape[1] != window.shape[2]:
        raise DatasetError(
            f"{files[0]} has windows of {window.shape[1]} by {window.shape[2]} pixels; "
            "they must be square"
        )
    stored = np.dtype("uint8") if window.dtype == np.int64 else window.dtype
    bands = tuple(notes.get("bands", ()))
    if not bands:
        known = window.shape[0] <= len(NMV_BANDS)
        bands = NMV_BANDS[: window.shape[0]] if known else ()
        bands = bands or tuple(f"band_{k + 1}" for k in range(window.shape[0]))
    if len(bands) != window.shape[0]:
        raise DatasetError(
            f"{sidecar} names {len(bands)} bands, the windows have {window.shape[0]}; mend `bands`"
        )
    return PairedDataset(
        path=path,
        facts=facts,
        taxa=_taxa(facts, notes, path, taxonomy),
        bands=bands,
        window_px=int(window.shape[1]),
        resolution_m=float(notes.get("resolution_m", NMV_RESOLUTION_M)),
        dtype=np.dtype(notes.get("dtype", stored)),
        has_ground=all(ground for _, ground, _ in parts) and bool(notes.get("photos", True)),
        notes=notes,
        group_rows=np.array([rows for _, _, rows in groups], dtype=np.int64),
        _files=files,
        _groups=tuple((number, k) for number, k, _ in groups),
        _arguments=(split, taxonomy),
    )


def _inside(path: Path | str, file: Path | str) -> str:
    """Path of a file in its data set: folders above it are no splits."""
    return str(file).removeprefix(str(path)) or Path(file).name


def _read_facts(file: Path | str) -> tuple[pa.Table, bool, list[int]]:
    """All columns of a file but the images, whether it has photos, and rows of its row groups."""
    kept = None if isinstance(file, Path) else _kept_facts(file)
    if kept is not None and kept.exists():
        try:
            with _damage_named(kept):
                parquet = _open_parquet(kept)
                notes = json.loads(parquet.schema_arrow.metadata[b"speciesmap"])
                table, ground, rows = parquet.read(), bool(notes["ground"]), list(notes["rows"])
            if sum(rows) == len(table):
                return table, ground, rows
        except (DatasetError, ValueError, LookupError, TypeError, RecursionError):
            pass
        log.warning("%s was damaged and is made again", kept)
    parquet = _open_parquet(file)
    names = parquet.schema_arrow.names
    for column in (AERIAL, "latitude", "longitude", "name"):
        if column not in names:
            raise DatasetError(
                f"{file} has no column {column!r}; a paired data set has the columns of "
                "Nature Multi-View"
            )
    with _damage_named(file):
        table = parquet.read(columns=[n for n in names if n not in (AERIAL, GROUND)])
    rows = [parquet.metadata.row_group(k).num_rows for k in range(parquet.metadata.num_row_groups)]
    if kept is not None:
        notes = json.dumps({"ground": GROUND in names, "rows": rows})
        with replacing(kept, overwrite=True) as beside:
            pq.write_table(table.replace_schema_metadata({"speciesmap": notes}), beside)
    return table, GROUND in names, rows


def _kept_facts(address: str) -> Path:
    """Where the facts of a remote file are kept, by its address and state."""
    system, root = fsspec.core.url_to_fs(address)
    info = system.info(root)
    state = [address, *(str(info.get(key)) for key in ("size", "etag", "blob_id", "created"))]
    digest = hashlib.sha256(repr(state).encode()).hexdigest()[:24]
    return _cache_folder() / "facts" / f"{digest}.parquet"


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DatasetError(f"{path} is not readable JSON ({error}); make the data set again") from (
            error
        )
    try:
        _Sidecar.model_validate(notes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise DatasetError(
            f"{path} is damaged: {where} {first['msg'].lower()}; make the data set again"
        ) from error
    return dict(notes)


def _taxa(
    facts: pd.DataFrame,
    notes: Mapping[str, Any],
    path: Path | str,
    taxonomy: str | Path | None,
) -> tuple[Taxon, ...]:
    """List the taxa: those of `dataset.json`, else the names of the rows in alphabetical order."""
    names = facts["name"].fillna("")
    if "taxa" in notes:
        taxa = tuple(Taxon(t["name"], tuple(t["lineage"])) for t in notes["taxa"])
        unknown = set(names.unique()) - {t.name for t in taxa} - {""}
        if unknown:
            raise DatasetError(
                f"{path} has rows of {sorted(unknown)[0]!r}, which {SIDECAR} does not list; "
                "make the data set again"
            )
        return taxa
    rows = pd.DataFrame({"name": names, "ancestry": facts.get("ancestry", "")})
    rows = rows[rows["name"] != ""].drop_duplicates("name").sort_values("name")
    known = None if taxonomy is None else read_taxonomy(taxonomy)
    return tuple(
        Taxon(name, lineage_of(ancestry, known))
        for name, ancestry in zip(rows["name"], rows["ancestry"], strict=True)
    )
