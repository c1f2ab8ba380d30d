"""Cutting tiles of imagery into batches of windows, or of their cells, ahead of the encoder."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speciesmap.errors import ImageryError, ResourceError, is_out_of_memory
from speciesmap.rasters.imagery import Imagery
from speciesmap.rasters.store import TILE, EmbeddingStore
from speciesmap.rasters.windows import WindowGrid

BLOCK_BYTES = 8 << 20  # of pixels read at once; a tile of larger windows is read in strips
log = logging.getLogger("speciesmap")

EXACT_IN_TORCH = ("uint8", "int8", "int16", "int32", "int64", "float32", "float64")


@dataclass(frozen=True)
class Layout:
    """How the windows of a tile are made of the pieces that were cut from it.

    Attributes:
        slots: Number of each window's cell in the tile, row by row, shape (W,).
        pieces: Numbers of the pieces of each window, in the order they were cut, shape (W, T);
            T is 1 where windows are cut whole.
    """

    slots: NDArray[np.int64]
    pieces: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Pieces of one tile, ready to be encoded: whole windows, or squares that windows share.

    Attributes:
        tile: Its row and column.
        pixels: Raw, shape (N, B, S, S), or `None` where there are none.
        layout: Of the whole tile, with its last batch; `None` before.
        readable: Whether the tile could be read; what came of it before is void if not.
        shared: Whether a neighbouring tile needs these very pieces, and in this order.
    """

    tile: tuple[int, int]
    pixels: Tensor | None
    layout: Layout | None = None
    readable: bool = True
    shared: bool = False


def cut_windows(
    imagery: Imagery,
    store: EmbeddingStore,
    tiles: Iterable[tuple[int, int]],
    fill: Sequence[float],
    batch_size: int,
    *,
    piece_px: int | None = None,
    pin: bool = False,
    skip_unreadable: bool = False,
    reuse: int | None = None,
) -> Iterator[Batch]:
    """Read tiles and cut them into batches of windows, or of the squares that make up windows.

    Every pixel is read once for each tile (or strip of a tile, where a tile's pixels exceed
    8 MiB), not for each window. A square that several windows of a tile hold is cut once; those
    that windows of neighbouring tiles hold too come in batches of their own.

    Args:
        imagery: To read.
        store: Says where the windows are, and which share of a window must be valid.
        tiles: Row and column of each.
        fill: Value that invalid pixels take, per band.
        batch_size: Most pieces of a batch.
        piece_px: Side of the squares, which divides the window; whole windows by default.
        pin: Use page-locked memory, for copies to a GPU.
        skip_unreadable: Go on where a tile cannot be read, and name it.
        reuse: A batch's memory is written again after so many more batches. Memory that is given
            back and asked for again leaves holes between what stays, and the process grows.

    Yields:
        Batches in the order of the tiles; a tile ends with the batch that has its layout, or that
        says it is not readable.

    Raises:
        ImageryError: A tile cannot be read.
        ResourceError: A tile cannot be read in the memory there is.
    """
    piece = piece_px or store.identity.window_px
    buffers = _buffers((batch_size, len(imagery.bands), piece, piece), imagery.dtype, pin, reuse)
    for tile in tiles:
        try:
            yield from _cut_tile(imagery, store, tile, fill, piece, buffers)
        except ImageryError as error:
            if not skip_unreadable:
                raise ImageryError(
                    f"tile {tile} cannot be encoded: {error}; or pass --skip-unreadable to leave "
                    "such tiles empty"
                ) from error
            log.warning("tile %s stays empty: %s", tile, error)
            yield Batch(tile, None, readable=False)
        except MemoryError as error:
            raise ResourceError(
                f"tile {tile} cannot be read in the memory there is "
                f"({str(error) or 'none is left'}); use a smaller --batch-size, fewer workers or a "
                "machine with more memory, and run again: tiles that are done are kept"
            ) from error


def _cut_tile(
    imagery: Imagery,
    store: EmbeddingStore,
    tile: tuple[int, int],
    fill: Sequence[float],
    piece: int,
    buffers: Iterator[Tensor],
) -> Iterator[Batch]:
    identity = store.identity
    side, stride = identity.window_px, identity.stride_px
    grid = WindowGrid(imagery.geobox, side, stride)
    rows, cols = store.cells(tile)
    wide = (cols.stop - cols.start - 1) * stride + side
    # strips of all tiles are alike, so that neighbours cut the pieces they share alike
    row_bytes = ((TILE - 1) * stride + side) * len(imagery.bands) * imagery.dtype.itemsize
    most = max(1, (BLOCK_BYTES // row_bytes - side) // stride + 1)
    strip = math.ceil(TILE / math.ceil(TILE / most))
    within = np.arange(0, side, piece)
    slots: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    pieces: list[NDArray[np.int64]] = [np.empty((0, len(within) ** 2), np.int64)]
    numbers: dict[int, int] = {}  # of the pieces by their place in the tile
    buffer: Tensor | None = None
    filled, sharing = 0, 0
    for top in range(rows.start, rows.stop, strip):
        high = min(strip, rows.stop - top)
        row, col = grid.start(top, cols.start)
        pixels, valid = imagery.read(row, col, (high - 1) * stride + side, wide)
        usable = _usable(valid, side, stride, identity.min_valid)
        if not usable.any():
            continue
        pixels = _filled(pixels, valid, fill)
        i, j = np.nonzero(usable)
        slots.append((top - rows.start + i) * (cols.stop - cols.start) + j)
        offset = (top - rows.start) * stride  # of the strip in the tile, pixels
        down = offset + i[:, None, None] * stride + within[:, None]
        across = j[:, None, None] * stride + within
        places, inverse = np.unique((down * wide + across).reshape(-1), return_inverse=True)
        beside = 4 * _neighbours(places // wide, within, stride)
        beside += _neighbours(places % wide, within, stride)
        for k in np.argsort(beside, kind="stable").tolist():
            place = int(places[k])
            if place in numbers:
                continue
            if buffer is not None and beside[k] != sharing:
                yield Batch(tile, buffer[:filled], shared=sharing > 0)
                buffer, filled = None, 0
            numbers[place], sharing = len(numbers), int(beside[k])
            y, x = place // wide - offset, place % wide
            if buffer is None:
                buffer = next(buffers)
            buffer.numpy()[filled] = pixels[:, y : y + piece, x : x + piece]
            filled += 1
            if filled == len(buffer):
                yield Batch(tile, buffer, shared=sharing > 0)
                buffer, filled = None, 0
        cut = np.array([numbers[place] for place in places.tolist()])
        pieces.append(cut[inverse].reshape(len(i), -1))
    layout = Layout(np.concatenate(slots), np.concatenate(pieces))
    yield Batch(tile, None if buffer is None else buffer[:filled], layout, shared=sharing > 0)


def _neighbours(
    starts: NDArray[np.int64], within: NDArray[np.int64], stride: int
) -> NDArray[np.int64]:
    """Tell which tiles along an axis have windows that hold a piece besides the tile in question.

    Args:
        starts: First pixels of pieces, counted from the tile's first window, shape (N,).
        within: Where pieces lie in a window, pixels, shape (T,).
        stride: Distance between windows.

    Returns:
        0 for none, 1 for the tile before, 2 for the one after, 3 for both, shape (N,).
    """
    windows = starts[:, None] - within  # (N, T)
    aligned = windows % stride == 0
    before = (aligned & (windows < 0)).any(1)
    after = (aligned & (windows >= TILE * stride)).any(1)
    return np.where(before, 1, 0) + np.where(after, 2, 0)


def _buffers(
    shape: tuple[int, ...], dtype: np.dtype[Any], pin: bool, reuse: int | None
) -> Iterator[Tensor]:
    """Memory for batches: always other, or so many by turns; for half of one where it runs out."""
    kind = torch.from_numpy(np.empty(0, _torch_type(dtype))).dtype
    ring: list[Tensor] = []
    most, *piece = shape
    while reuse is None or len(ring) < reuse:
        try:
            buffer = torch.empty((most, *piece), dtype=kind, pin_memory=pin)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if most == 1:
                raise MemoryError(str(error).partition("\n")[0]) from error
            log.warning("no memory for batches of %d; going on with %d", most, most // 2)
            most //= 2
            continue
        if reuse is not None:
            ring.append(buffer)
        yield buffer
    yield from itertools.cycle(ring)


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


def _torch_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Type that torch has and that holds the values of one it may lack."""
    if dtype.name in EXACT_IN_TORCH:
        return dtype
    return np.dtype({"uint16": np.int32, "uint32": np.int64}.get(dtype.name, np.float32))


def _filled(pixels: NDArray[Any], valid: NDArray[np.bool_], fill: Sequence[float]) -> NDArray[Any]:
    """Give invalid pixels the fill value, in a type that torch has."""
    pixels = pixels.astype(_torch_type(pixels.dtype), copy=False)
    invalid = ~valid
    if invalid.any():
        for band, value in zip(pixels, fill, strict=True):
            if band.dtype.kind in "iu":
                limits = np.iinfo(band.dtype)
                band[invalid] = np.clip(round(value), limits.min, limits.max)
            else:
                band[invalid] = value
    return pixels
