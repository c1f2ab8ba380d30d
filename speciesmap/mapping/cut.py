"""Cutting tiles of imagery into batches of windows, ahead of the encoder."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from speciesmap.rasters.imagery import Imagery
from speciesmap.rasters.store import EmbeddingStore
from speciesmap.rasters.windows import WindowGrid

Item = TypeVar("Item")

BLOCK_BYTES = 16 << 20  # of pixels read at once; a tile of larger windows is read in strips
EXACT_IN_TORCH = ("uint8", "int8", "int16", "int32", "int64", "float32", "float64")


@dataclass(frozen=True)
class Batch:
    """Windows of one tile, ready to be encoded.

    Attributes:
        tile: Its row and column.
        slots: Number of each window's cell in the tile, row by row, shape (N,).
        windows: Raw pixels, shape (N, B, P, P), or `None` where there are none.
        last: Whether the tile has no more.
    """

    tile: tuple[int, int]
    slots: NDArray[np.int64]
    windows: Tensor | None
    last: bool


def cut_windows(
    imagery: Imagery,
    store: EmbeddingStore,
    tiles: Iterable[tuple[int, int]],
    fill: Sequence[float],
    batch_size: int,
    *,
    pin: bool = False,
) -> Iterator[Batch]:
    """Read tiles and cut them into batches of windows.

    Every pixel is read once for each tile (or strip of a tile, where a tile's pixels exceed
    16 MiB), not for each window.

    Args:
        imagery: To read.
        store: Says where the windows are, and which share of a window must be valid.
        tiles: Row and column of each.
        fill: Value that invalid pixels take, per band.
        batch_size: Most windows of a batch.
        pin: Use page-locked memory, for copies to a GPU.

    Yields:
        Batches in the order of the tiles; a tile ends with a batch that is marked as its last.
    """
    identity = store.identity
    side, stride = identity.window_px, identity.stride_px
    grid = WindowGrid(imagery.shape, side, stride)
    for tile in tiles:
        rows, cols = store.cells(tile)
        wide = (cols.stop - cols.start - 1) * stride + side
        affordable = BLOCK_BYTES // (wide * len(imagery.bands) * imagery.dtype.itemsize)
        strip = max(1, (affordable - side) // stride + 1)
        slots: list[int] = []
        buffer: Tensor | None = None
        for top in range(rows.start, rows.stop, strip):
            high = min(strip, rows.stop - top)
            row, col = grid.start(top, cols.start)
            pixels, valid = imagery.read(row, col, (high - 1) * stride + side, wide)
            usable = _usable(valid, side, stride, identity.min_valid)
            if not usable.any():
                continue
            windows = _as_windows(_filled(pixels, valid, fill), side, stride)
            for i, j in np.argwhere(usable):
                if buffer is None:
                    kind = torch.from_numpy(np.empty(0, windows.dtype)).dtype
                    buffer = torch.empty(
                        (batch_size, *windows.shape[2:]), dtype=kind, pin_memory=pin
                    )
                buffer.numpy()[len(slots)] = windows[i, j]
                slots.append((top - rows.start + i) * (cols.stop - cols.start) + j)
                if len(slots) == batch_size:
                    yield Batch(tile, np.array(slots), buffer, last=False)
                    slots, buffer = [], None
        rest = None if buffer is None else buffer[: len(slots)]
        yield Batch(tile, np.array(slots, np.int64), rest, last=True)


def _usable(
    valid: NDArray[np.bool_], side: int, stride: int, min_valid: float
) -> NDArray[np.bool_]:
    """Tell which windows of a block have enough valid pixels, and any."""
    height, width = valid.shape
    if valid.all():
        return np.ones(((height - side) // stride + 1, (width - side) // stride + 1), np.bool_)
    sums = np.zeros((height + 1, width + 1), np.int32)  # summed-area table (Crow 1984)
    np.cumsum(np.cumsum(valid, axis=0, dtype=np.int32), axis=1, out=sums[1:, 1:])
    low_rows, low_cols = sums[: height - side + 1 : stride], sums[side::stride]
    counts = (
        low_cols[:, side::stride]
        - low_cols[:, : width - side + 1 : stride]
        - low_rows[:, side::stride]
        + low_rows[:, : width - side + 1 : stride]
    )
    return np.asarray((counts > 0) & (counts >= min_valid * side * side))


def _filled(pixels: NDArray[Any], valid: NDArray[np.bool_], fill: Sequence[float]) -> NDArray[Any]:
    """Give invalid pixels the fill value, in a type that torch has."""
    if pixels.dtype.name not in EXACT_IN_TORCH:
        exact = {"uint16": np.int32, "uint32": np.int64}.get(pixels.dtype.name, np.float32)
        pixels = pixels.astype(exact)
    invalid = ~valid
    if invalid.any():
        for band, value in zip(pixels, fill, strict=True):
            if band.dtype.kind in "iu":
                limits = np.iinfo(band.dtype)
                band[invalid] = np.clip(round(value), limits.min, limits.max)
            else:
                band[invalid] = value
    return pixels


def _as_windows(pixels: NDArray[Any], side: int, stride: int) -> NDArray[Any]:
    """View a block (B, H, W) as windows (rows, columns, B, side, side) without a copy."""
    bands, height, width = pixels.shape
    b, r, c = pixels.strides
    shape = ((height - side) // stride + 1, (width - side) // stride + 1, bands, side, side)
    return as_strided(pixels, shape, (r * stride, c * stride, b, r, c), writeable=False)


def ahead(items: Iterator[Item], count: int) -> Iterator[Item]:
    """Work on the next few items in a thread while the caller uses one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        waiting = deque(reader.submit(next, items, end) for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(reader.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            for future in waiting:
                future.cancel()
