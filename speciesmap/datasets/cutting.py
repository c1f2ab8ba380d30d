"""Cutting aerial windows: several scenes at once from servers, none twice after an interruption."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speciesmap.outputs import replacing
from speciesmap.rasters.files import cached_blocks
from speciesmap.rasters.mosaic import Imagery, Origin

AT_ONCE = 8  # scenes read from servers
TOGETHER = 32  # windows that are kept in one file
CACHE_BYTES = 256 << 20  # of blocks; two rows of a strip of each scene that is read
PROVENANCE = "provenance.csv"


@dataclass(frozen=True)
class Window:
    """The aerial window of an observation.

    Attributes:
        row: Of the observation in its table.
        pixels: Shape (B, P, P).
        valid: Share of its pixels that are valid.
        scenes: Name, date and assets of the scenes that show it, the one that shows most first.
    """

    row: int
    pixels: NDArray[Any]
    valid: float
    scenes: list[Origin]

    @property
    def date(self) -> str:
        """When the scene that shows most was taken, without the time of day."""
        return self.scenes[0][1][:10] if self.scenes else ""


class Cutter:
    """Reads windows scene by scene, each file opened once and its blocks read one after another.

    Of imagery on servers several scenes are read at once, each by one thread, and their windows
    are kept in a folder beside the data set until it is done: a run that is interrupted and
    started again reads none of them again.

    Args:
        imagery: Where the windows are cut.
        starts: First pixel, row and column, of each observation's window, shape (N, 2).
        rows: Observations whose windows are read.
        window_px: Side of a window.
        out: The data set that is made.

    Raises:
        ImageryError: A window cannot be read.
    """

    def __init__(
        self,
        imagery: Imagery,
        starts: NDArray[np.int64],
        rows: NDArray[np.int64],
        window_px: int,
        out: Path,
    ) -> None:
        self._imagery, self._starts, self._window_px = imagery, starts, window_px
        self._scenes = [
            [part.tolist() for part in np.split(rows[group], range(TOGETHER, len(group), TOGETHER))]
            for group in imagery.by_scene(starts[rows], window_px)
        ]
        self._kept: Path | None = None
        self._ended = threading.Event()
        if imagery.remote:
            digest = hashlib.sha256(imagery.fingerprint.encode())
            digest.update(repr((imagery.bands, window_px)).encode() + starts.tobytes())
            name = f".{out.name}.{digest.hexdigest()[:12]}.windows"
            for stale in out.parent.glob(f".{escape(out.name)}.{'[0-9a-f]' * 12}.windows"):
                if stale.name != name:
                    shutil.rmtree(stale)
            self._kept = out.with_name(name)
            self._kept.mkdir(parents=True, exist_ok=True)
            self._imagery = imagery.taking_turns()

    def windows(self) -> Generator[Window]:
        """Give the windows, in an order that visits scene by scene."""
        if self._kept is None:
            for batches in self._scenes:
                for batch in batches:
                    yield from self._read(batch)
            return
        with cached_blocks(CACHE_BYTES), ThreadPoolExecutor(AT_ONCE, "chips") as pool:
            try:
                tasks = [[(batch, Future[Path]()) for batch in scene] for scene in self._scenes]
                for scene in tasks:
                    pool.submit(self._keep, scene)
                for scene in tasks:
                    for batch, file in scene:
                        yield from self._load(batch, file.result())
            finally:
                self._ended.set()

    def _keep(self, scene: list[tuple[list[int], Future[Path]]]) -> None:
        """Read a scene's windows, those that an interrupted run kept left out."""
        assert self._kept is not None
        for batch, kept in scene:
            name = hashlib.sha256(np.array(batch, np.int64).tobytes()).hexdigest()[:24]
            file = self._kept / f"{name}.npz"
            try:
                if self._ended.is_set():
                    return
                if not file.exists():
                    windows = self._read(batch)
                    with replacing(file) as beside:
                        np.savez(
                            beside,
                            pixels=np.stack([w.pixels for w in windows]),
                            valid=np.array([w.valid for w in windows]),
                            scenes=np.array(json.dumps([w.scenes for w in windows])),
                        )
                kept.set_result(file)
            except BaseException as error:  # raised again where the window is asked for
                kept.set_exception(error)
                return

    def _load(self, batch: Sequence[int], file: Path) -> Iterator[Window]:
        with np.load(file, allow_pickle=False) as kept:
            pixels, valid = kept["pixels"], kept["valid"]
            scenes = json.loads(str(kept["scenes"]))
        for row, p, v, shown in zip(batch, pixels, valid, scenes, strict=True):
            yield Window(row, p, float(v), [tuple(scene) for scene in shown])

    def _read(self, batch: Sequence[int]) -> list[Window]:
        starts = [(int(top), int(left)) for top, left in self._starts[batch]]
        cut = self._imagery.read_windows(starts, self._window_px)
        return [
            Window(row, pixels, float(valid.mean()), scenes)
            for row, (pixels, valid, scenes) in zip(batch, cut, strict=True)
        ]

    def finish(self) -> None:
        """Remove what was kept."""
        if self._kept is not None:
            shutil.rmtree(self._kept, ignore_errors=True)


def write_provenance(folder: Path, entries: Sequence[tuple[str, list[Origin]]]) -> None:
    """Write which scenes show each observation's window, one line for each scene."""
    with (folder / PROVENANCE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["observation_uuid", "rs_item", "rs_image_date", "rs_asset"])
        for identity, scenes in entries:
            for scene in scenes:
                table.writerow([identity, *scene])
