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
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from speciesmap.datasets.columns import AERIAL, GROUND, SIDECAR, decode_windows
from speciesmap.datasets.images import (
    ImageFiles,
    Images,
    cache_folder,
    damage_named,
    open_parquet,
)
from speciesmap.datasets.nature_multi_view import (
    lineage_of,
    of_split,
    read_taxonomy,
    remote_files,
)
from speciesmap.datasets.photos import open_photo
from speciesmap.datasets.splits import SPLITS
from speciesmap.errors import DatasetError
from speciesmap.outputs import replacing
from speciesmap.progress import track
from speciesmap.taxa import Taxon

NMV_BANDS = ("red", "green", "blue", "nir")
NMV_RESOLUTION_M = 0.6

log = logging.getLogger("speciesmap")


@dataclass
class PairedDataset:
    """Rows of aerial windows, ground photos and facts; images are read when asked for.

    Images are decoded from Parquet once: into memory where they take less than 256 MB, else into
    an Arrow file in the user's cache folder that is mapped, so that any row is one copy away and
    the data set itself may be read-only.

    Attributes:
        files: Where the images are.
        facts: All columns but the images, in row order. Without a column `observation_uuid` it is
            iNaturalist's number of the observation, or empty.
        taxa: Every taxon of the rows.
        bands: Names of the aerial bands.
        resolution_m: Side of an aerial pixel on the ground, in metres.
        has_aerial: Whether rows have windows, as they all do.
        has_ground: Whether rows have photos.
        notes: The whole of `dataset.json`, empty for a folder without one.
    """

    files: ImageFiles
    facts: pd.DataFrame = field(repr=False)
    taxa: tuple[Taxon, ...]
    bands: tuple[str, ...]
    resolution_m: float
    has_ground: bool
    notes: dict[str, Any] = field(default_factory=dict, repr=False)
    _arguments: tuple[Any, ...] = field(default=(), repr=False)
    _images: Images | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    has_aerial: ClassVar[bool] = True

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.facts)

    @property
    def path(self) -> Path | str:
        """The folder, file or address it was opened from."""
        return self.files.where

    @property
    def window_px(self) -> int:
        """Side of the aerial windows in pixels."""
        return self.files.shape[-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the aerial pixels."""
        return self.files.dtype

    def __reduce__(self) -> tuple[Callable[..., PairedDataset], tuple[Any, ...]]:
        """Travel to another process as a path, never with the images."""
        return open_paired, (self.path, *self._arguments)

    def rows_of(self, chosen: Callable[[str], bool]) -> NDArray[np.int64]:
        """Numbers of the rows in files chosen by their path in the data set, shape (N,)."""
        files = self.files
        wanted = [chosen(_inside(self.path, files.files[number])) for number, _, _ in files.groups]
        return np.flatnonzero(np.repeat(wanted, files.group_rows))

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
        pixels = np.empty((len(numbers), *self.files.shape), dtype=self.dtype)
        for k, row in enumerate(numbers):
            window = np.frombuffer(images.window(int(row)), self.dtype)
            pixels[k] = window.reshape(self.files.shape)
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
        photo = io.BytesIO(encoded)
        try:
            return open_photo(photo)
        except ValueError as error:
            reason = str(error).replace(f" {photo!r}", "")
            raise DatasetError(
                f"{self.path}: the photo of row {row} does not decode ({reason}); replace it, or "
                "leave the row out"
            ) from error

    def prepare(self) -> None:
        """Decode the images now, once, for example before worker processes start."""
        self._opened()

    def _opened(self) -> Images:
        with self._lock:
            if self._images is None:
                self._images = self.files.decoded()
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
        DatasetError: No Parquet file is there, one is damaged, a needed column is missing, or a
            place is not on the globe.
    """
    files: tuple[Path | str, ...]
    sidecar: Path | str | None
    if "://" in str(path):
        files = remote_files(str(path))
        sidecar = _remote_sidecar(str(path))
    elif Path(path).is_dir():
        path = Path(path)
        files = tuple(f for f in sorted(path.rglob("*.parquet")) if not f.name.startswith("."))
        sidecar = path / SIDECAR if (path / SIDECAR).exists() else None
    elif Path(path).is_file():
        path = Path(path)
        files = (path,)
        beside = (path.parent / SIDECAR, path.parent.parent / SIDECAR)
        sidecar = next((place for place in beside if place.exists()), None)
    else:
        raise DatasetError(f"there is no data set {path}; make one with `speciesmap chips`")
    if not files:
        raise DatasetError(f"{path} holds no Parquet file; make a data set with `speciesmap chips`")
    if split is not None:
        every, files = files, tuple(file for file in files if of_split(_inside(path, file), split))
        if not files:
            there = ", ".join(
                s for s in SPLITS if any(of_split(_inside(path, f), s) for f in every)
            )
            raise DatasetError(
                f"{path} has no files of the split {split!r}; "
                + (f"choose one of {there}" if there else "leave data.split out")
            )

    notes = {} if sidecar is None else _read_sidecar(sidecar)
    with ThreadPoolExecutor(16) as pool:
        parts = list(
            track(pool.map(_read_facts, files), f"Reading facts of {path}", len(files))
            if len(files) > 4
            else map(_read_facts, files)
        )
    with damage_named(str(path)):
        table = pa.concat_tables([part for part, _, _ in parts], promote_options="permissive")
    if not table.num_rows:
        raise DatasetError(f"{path} has no rows; make the data set again with other observations")
    facts = table.to_pandas()
    _check_places(facts, path)
    if "observation_uuid" not in facts:
        number = facts.get("gl_inat_id", pd.Series("", facts.index)).convert_dtypes()
        facts["observation_uuid"] = number.astype("string").fillna("").astype(object)
    groups = [
        (number, k, rows)
        for number, (_, _, counts) in enumerate(parts)
        for k, rows in enumerate(counts)
    ]

    with damage_named(files[0]):
        head = next(open_parquet(files[0]).iter_batches(1, columns=[AERIAL]))
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
        files=ImageFiles(
            path,
            files,
            tuple(groups),
            (window.shape[0], window.shape[1], window.shape[2]),
            np.dtype(notes.get("dtype", stored)),
        ),
        facts=facts,
        taxa=_taxa(facts, notes, path, taxonomy),
        bands=bands,
        resolution_m=float(notes.get("resolution_m", NMV_RESOLUTION_M)),
        has_ground=all(ground for _, ground, _ in parts) and bool(notes.get("photos", True)),
        notes=notes,
        _arguments=(split, taxonomy),
    )


def _check_places(facts: pd.DataFrame, path: Path | str) -> None:
    """Refuse coordinates that are none, and count rows without any."""
    for column, limit in (("latitude", 90), ("longitude", 180)):
        degrees = facts[column]
        if not pd.api.types.is_numeric_dtype(degrees):
            raise DatasetError(
                f"{path} has {column}s such as {degrees.iloc[0]!r:.80}; they must be numbers, in "
                "degrees"
            )
        wrong = np.flatnonzero(degrees.abs() > limit)
        if wrong.size:
            raise DatasetError(
                f"row {wrong[0]} of {path} has the {column} {degrees.iloc[wrong[0]]:g}, which is "
                f"beyond {limit} degrees; mend it, or leave it empty where it is not known"
            )
    unplaced = int(facts[["latitude", "longitude"]].isna().any(axis=1).sum())
    if unplaced:
        log.warning("%s: %d rows have no latitude or no longitude", path, unplaced)


def _inside(path: Path | str, file: Path | str) -> str:
    """Path of a file in its data set: folders above it are no splits."""
    return str(file).removeprefix(str(path)) or Path(file).name


def _read_facts(file: Path | str) -> tuple[pa.Table, bool, list[int]]:
    """All columns of a file but the images, whether it has photos, and rows of its row groups."""
    kept = None if isinstance(file, Path) else _kept_facts(file)
    if kept is not None and kept.exists():
        try:
            with damage_named(kept):
                parquet = open_parquet(kept)
                notes = json.loads(parquet.schema_arrow.metadata[b"speciesmap"])
                table, ground, rows = parquet.read(), bool(notes["ground"]), list(notes["rows"])
            if sum(rows) == len(table):
                return table, ground, rows
        except (DatasetError, ValueError, LookupError, TypeError, RecursionError):
            pass
        log.warning("%s was damaged and is made again", kept)
    parquet = open_parquet(file)
    names = parquet.schema_arrow.names
    for column in (AERIAL, "latitude", "longitude", "name"):
        if column not in names:
            raise DatasetError(
                f"{file} has no column {column!r}; a paired data set has the columns of "
                "Nature Multi-View"
            )
    with damage_named(file):
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
    return cache_folder() / "facts" / f"{digest}.parquet"


def _remote_sidecar(address: str) -> str | None:
    """Find `dataset.json` in a remote folder, or beside or above a remote file.

    Raises:
        DatasetError: Whether it is there cannot be told.
    """
    system, root = fsspec.core.url_to_fs(address)
    folders = [root]
    if root.endswith(".parquet"):
        folders = [root.rpartition("/")[0], root.rpartition("/")[0].rpartition("/")[0]]
    for folder in folders:
        file = f"{folder.rstrip('/')}/{SIDECAR}"
        try:
            system.info(file)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except Exception as error:  # each file system raises its own kinds
            raise DatasetError(
                f"{file} cannot be looked for ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); check the address and the network"
            ) from error
        return str(system.unstrip_protocol(file))
    return None


def _read_sidecar(path: Path | str) -> dict[str, Any]:
    try:
        with fsspec.open(str(path), encoding="utf-8", mode="rt") as file:
            notes = json.load(file)
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
