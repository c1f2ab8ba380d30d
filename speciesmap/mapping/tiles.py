"""The tiled engine: encode every window of some tiles once, each tile written when it is whole.

A reader thread cuts windows from blocks of pixels while the encoder works and a writer thread
stores what is done. Batches cross the rows of a tile and end with it: a tile's vectors then depend
on nothing but its pixels, and a run that was interrupted ends in the same bytes as one that was
not. A tile is 1,024 windows, so the short batch at its end costs little.

Where the aerial encoder is factored, the reader cuts the cells that the windows of a tile are made
of, each once; they are encoded, and then the light part of the encoder runs for each window. Cells
at a tile's margin belong to windows of its neighbours too. What came of them is kept for a while
and found again by their pixels, not their place: this way, too, bytes depend on pixels alone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from speciesmap.errors import StoreError
from speciesmap.mapping.cut import Batch, Layout, cut_windows
from speciesmap.mapping.encode import Encoder, Stopwatch
from speciesmap.mapping.threads import ahead
from speciesmap.models import SpeciesModel
from speciesmap.models.device import choose_device
from speciesmap.progress import track
from speciesmap.rasters.imagery import Imagery
from speciesmap.rasters.store import EmbeddingStore

Precision = Literal["auto", "float32", "bfloat16"]

SAMPLE_WINDOWS = 32  # on which bfloat16 is compared with float32
WAITING_BATCHES = 3
WAITING_TILES = 2

log = logging.getLogger("speciesmap")


def encode_tiles(
    model: SpeciesModel,
    imagery: Imagery,
    store: EmbeddingStore,
    tiles: Sequence[tuple[int, int]],
    *,
    batch_size: int | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    compiled: bool = False,
    skip_unreadable: bool = False,
    stopwatch: Stopwatch | None = None,
) -> int:
    """Encode tiles into a store, each written when it is whole.

    Args:
        model: Whose aerial tower encodes; its device and mode are those asked for meanwhile.
        imagery: With the model's bands, the very imagery the store is of.
        store: To fill.
        tiles: Row and column of each.
        batch_size: As for `embed`.
        device: As for `embed`.
        precision: As for `embed`; a store that was begun keeps to its own.
        compiled: As for `embed`.
        skip_unreadable: As for `embed`.
        stopwatch: Told of what the time goes into.

    Returns:
        Number of windows encoded.

    Raises:
        ImageryError: A block of pixels cannot be read.
        ResourceError: Not even one window fits into memory.
        OutputError: A tile cannot be written.
        StoreError: The store was begun in another precision than the one asked for.
    """
    if not tiles:
        return 0
    spent = stopwatch or Stopwatch()
    windows, lost, was_training = 0, 0, model.training
    with store.writing(), ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        place = choose_device(device)
        if precision != "auto" and store.precision not in (None, precision):
            raise StoreError(
                f"{store.path} was begun in {store.precision}, not {precision}; leave --precision "
                "out, or use another path for the store"
            )
        encoder = Encoder(model, place, batch_size, compiled, spent)
        cut = partial(cut_windows, imagery, store, fill=model.fill, skip_unreadable=skip_unreadable)

        def encoded() -> Iterator[tuple[Batch, Tensor | None]]:
            pin, parts = place.type == "cuda", list[Tensor]()
            source = cut(
                tiles,
                batch_size=encoder.pieces,
                piece_px=encoder.piece_px,
                pin=pin,
                # one that is encoded, those that wait, one that is filled; a GPU copies later
                reuse=None if pin else WAITING_BATCHES + 2,
            )
            for batch in spent.waiting(ahead(spent.reading(source), WAITING_BATCHES)):
                if batch.pixels is not None:
                    if encoder.precision is None:
                        some = cut([batch.tile], batch_size=SAMPLE_WINDOWS)
                        settle_precision(encoder, store, precision, some)
                    with spent("encode", encoder.stream):
                        parts.append(encoder.encode(batch.pixels, batch.shared))
                if batch.layout is not None:
                    with spent("encode", encoder.stream):
                        vectors = encoder.assemble(parts, batch.layout)
                    yield batch, vectors
                elif not batch.readable:
                    yield batch, None
                else:
                    continue
                parts = []

        try:
            model.eval()
            written: deque[Future[None]] = deque()
            with torch.autocast(place.type, enabled=False):  # outermost: keeps what it casts
                for batch, vectors in track(encoded(), "Encoding tiles", total=len(tiles)):
                    if batch.layout is None:
                        lost += 1
                        continue
                    windows += len(batch.layout.slots)
                    written.append(
                        writer.submit(_write, store, batch.tile, batch.layout, vectors, spent)
                    )
                    if len(written) > WAITING_TILES:
                        written.popleft().result()
            for future in written:
                future.result()
        finally:
            model.train(was_training)
    how = f" in {encoder.precision}" if windows else ""
    log.info("encoded %d windows of %d tiles%s", windows, len(tiles), how)
    if lost:
        log.warning("%d tiles could not be read and stay empty; another run tries them again", lost)
    return windows


def settle_precision(
    encoder: Encoder, store: EmbeddingStore, precision: Precision, some: Iterator[Batch]
) -> None:
    """Give the encoder the store's precision; the first process to encode chooses it.

    Args:
        encoder: To set.
        store: To keep the choice.
        precision: As for `embed`.
        some: Real windows, of which the first batch is taken to compare bfloat16 with float32 on.
    """
    if store.precision is None:
        wanted: str = precision
        if precision == "auto":
            windows = next(some).pixels
            assert windows is not None
            wanted = encoder.agreed(windows)
        store.settle(wanted)
    encoder.precision = store.precision


def _write(
    store: EmbeddingStore,
    tile: tuple[int, int],
    layout: Layout,
    encoded: Tensor | None,
    spent: Stopwatch,
) -> None:
    with spent("write"):
        rows, cols = store.cells(tile)
        shape = (rows.stop - rows.start, cols.stop - cols.start, store.dim)
        vectors = np.full(shape, np.nan, np.float16)
        if encoded is not None:
            # waits for a GPU here, not in the encoding thread
            vectors.reshape(-1, store.dim)[layout.slots] = encoded.half().cpu().numpy()
        store.write(tile, vectors)
