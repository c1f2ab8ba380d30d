"""Writing paired data sets in files of bounded size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from speciesmap.datasets.columns import FACTS, GROUND, SIDECAR, encode_windows, schema
from speciesmap.errors import DatasetError
from speciesmap.taxa import Taxon


class PairedWriter:
    """Write a paired data set into a folder, batch by batch, in files of bounded size.

    Use it as a context manager and call `finish` before the block ends.

    Args:
        folder: Where to write; it is created.
        bands: Names of the aerial bands.
        window_px: Side of the aerial windows in pixels.
        dtype: Type of the aerial pixels.
    """

    FILE_BYTES = 1 << 29
    GROUP_BYTES = 1 << 24

    def __init__(
        self, folder: Path, bands: Sequence[str], window_px: int, dtype: np.dtype[Any]
    ) -> None:
        self.folder = folder
        self.bands = tuple(bands)
        self.window_px = window_px
        self.dtype = np.dtype(dtype)
        self.rows = 0
        self.photos = 0
        self._schema = schema(self.dtype)
        window_bytes = len(self.bands) * window_px**2 * self.dtype.itemsize
        self._file_rows = max(64, self.FILE_BYTES // window_bytes)
        self._group_rows = min(max(16, self.GROUP_BYTES // window_bytes), self._file_rows)
        self._parts: list[Path] = []
        self._writer: pq.ParquetWriter | None = None
        self._in_file = 0
        (folder / "data").mkdir(parents=True)

    def __enter__(self) -> PairedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the open file; nothing is renamed if the block failed."""
        self._close()

    def write(
        self,
        facts: pd.DataFrame,
        windows: NDArray[Any],
        photos: Sequence[Mapping[str, Any] | None],
    ) -> None:
        """Append rows.

        Args:
            facts: The columns of `FACTS`, N rows.
            windows: Aerial pixels, shape (N, B, P, P).
            photos: Per row the encoded image as `{"bytes": ..., "path": name}`, or None.

        Raises:
            DatasetError: The three do not fit each other.
        """
        wanted = (len(facts), len(self.bands), self.window_px, self.window_px)
        if windows.shape != wanted or len(photos) != len(facts):
            raise DatasetError(
                f"{len(facts)} rows of facts, {len(photos)} photos and windows of shape "
                f"{windows.shape} do not fit; expected {wanted}"
            )
        columns = [
            pa.array(facts[name], pa.type_for_alias(kind), from_pandas=True)
            for name, kind in FACTS.items()
        ]
        columns += [
            pa.array(list(photos), self._schema.field(GROUND).type),
            encode_windows(np.ascontiguousarray(windows, dtype=self.dtype)),
        ]
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self.rows += len(facts)
        self.photos += sum(photo is not None for photo in photos)
        while table.num_rows:
            if self._writer is None or self._in_file == self._file_rows:
                self._open()
            assert self._writer is not None
            part = table.slice(0, self._file_rows - self._in_file)
            self._writer.write_table(part, row_group_size=self._group_rows)
            self._in_file += part.num_rows
            table = table.slice(part.num_rows)

    def finish(self, taxa: Sequence[Taxon], resolution_m: float, **facts: Any) -> None:
        """Close the files, give them the hub's names and write `dataset.json`.

        Args:
            taxa: All taxa of the rows; `taxon_id` counts in this order.
            resolution_m: Side of an aerial pixel on the ground, in metres.
            facts: Whatever else a reader should know, as JSON values.
        """
        self._close()
        total = len(self._parts)
        for k, part in enumerate(self._parts):
            part.rename(part.with_name(f"train-{k:05d}-of-{total:05d}.parquet"))
        sidecar = {
            "rows": self.rows,
            "photos": self.photos,
            "bands": list(self.bands),
            "window_px": self.window_px,
            "resolution_m": resolution_m,
            "dtype": str(self.dtype),
            "taxa": [{"name": t.name, "lineage": list(t.lineage)} for t in taxa],
            **facts,
        }
        text = json.dumps(sidecar, indent=1, ensure_ascii=False)
        (self.folder / SIDECAR).write_text(text + "\n", encoding="utf-8")

    def _open(self) -> None:
        self._close()
        part = self.folder / "data" / f"part-{len(self._parts):05d}.parquet"
        self._parts.append(part)
        self._writer = pq.ParquetWriter(part, self._schema, compression="zstd")
        self._in_file = 0

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
