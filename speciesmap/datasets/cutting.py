"""Cutting aerial windows: several at once from servers, and none twice after an interruption."""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speciesmap.outputs import replacing
from speciesmap.rasters.imagery import Imagery

AT_ONCE = 8  # windows read from servers
PROVENANCE = "provenance.csv"


@dataclass(frozen=True)
class Window:
    """The aerial window of an observation.

    Attributes:
        pixels: Shape (B, P, P).
        valid: Share of its pixels that are valid.
        scenes: Name, date and assets of the scenes that show it, the one that counts most first.
    """

    pixels: NDArray[Any]
    valid: float
    scenes: list[tuple[str, str, str]]

    @property
    def date(self) -> str:
        """When the scene that counts most was taken, without the time of day."""
        return self.scenes[0][1][:10] if self.scenes else ""


class Cutter:
    """Reads windows in batches.

    Batches of imagery on servers are kept in a folder beside the data set until it is done: a run
    that is interrupted and started again reads none of them again.

    Args:
        imagery: Where the windows are cut.
        starts: First pixel, row and column, of each window, shape (N, 2).
        window_px: Their side.
        out: The data set that is made.
    """

    def __init__(
        self, imagery: Imagery, starts: NDArray[np.int64], window_px: int, out: Path
    ) -> None:
        self._imagery, self._starts, self._window_px = imagery, starts, window_px
        self._kept: Path | None = None
        if imagery.remote:
            digest = hashlib.sha256(imagery.fingerprint.encode())
            digest.update(repr((imagery.bands, window_px)).encode() + starts.tobytes())
            name = f".{out.name}.{digest.hexdigest()[:12]}.windows"
            for stale in out.parent.glob(f".{out.name}.*.windows"):
                if stale.name != name:
                    shutil.rmtree(stale)
            self._kept = out.with_name(name)
            self._kept.mkdir(parents=True, exist_ok=True)
        # threads that last, as each keeps its files open
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="chips")

    def __enter__(self) -> Cutter:
        return self

    def __exit__(self, *exception: object) -> None:
        """End the threads; what was kept stays for a run that goes on."""
        self._pool.shutdown(cancel_futures=True)

    def cut(self, rows: Sequence[int]) -> list[Window]:
        """Read the windows of a batch; the same batches must be asked for after an interruption.

        Raises:
            ImageryError: A window cannot be read.
        """
        if self._kept is None:
            return self._read(rows)
        name = hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()[:24]
        file = self._kept / f"{name}.npz"
        if file.exists():
            with np.load(file, allow_pickle=False) as kept:
                pixels, valid = kept["pixels"], kept["valid"]
            return [
                Window(p, float(v), self._scenes(row))
                for p, v, row in zip(pixels, valid, rows, strict=True)
            ]
        neighbours = [part.tolist() for part in np.array_split(rows, AT_ONCE) if len(part)]
        windows = [window for part in self._pool.map(self._read, neighbours) for window in part]
        with replacing(file) as beside:
            np.savez(
                beside,
                pixels=np.stack([w.pixels for w in windows]),
                valid=np.array([w.valid for w in windows]),
            )
        return windows

    def finish(self) -> None:
        """Remove what was kept."""
        if self._kept is not None:
            shutil.rmtree(self._kept, ignore_errors=True)

    def _read(self, rows: Sequence[int]) -> list[Window]:
        starts = [(int(top), int(left)) for top, left in self._starts[list(rows)]]
        return [
            Window(pixels, float(valid.mean()), self._scenes(row))
            for row, (pixels, valid) in zip(
                rows, self._imagery.read_windows(starts, self._window_px), strict=True
            )
        ]

    def _scenes(self, row: int) -> list[tuple[str, str, str]]:
        top, left = self._starts[row].tolist()
        return self._imagery.provenance(top, left, self._window_px, self._window_px)


def write_provenance(
    folder: Path, entries: Sequence[tuple[str, list[tuple[str, str, str]]]]
) -> None:
    """Write which scenes show each observation's window, one line for each scene."""
    with (folder / PROVENANCE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["observation_uuid", "rs_item", "rs_image_date", "rs_asset"])
        for identity, scenes in entries:
            for scene in scenes:
                table.writerow([identity, *scene])
