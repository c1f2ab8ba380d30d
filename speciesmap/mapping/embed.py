"""The tiled engine: encode every window of an area once, into a store that can be resumed.

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
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from speciesmap.errors import ConfigError, StoreError, within_memory
from speciesmap.mapping.cut import Batch, Layout, cut_windows
from speciesmap.mapping.encode import Encoder, Stopwatch
from speciesmap.mapping.fit import fit_imagery, fit_values, lay_out
from speciesmap.mapping.threads import ahead
from speciesmap.models import SpeciesModel, load_model
from speciesmap.outputs import land
from speciesmap.progress import track
from speciesmap.rasters.imagery import Imagery, Opening
from speciesmap.rasters.store import EmbeddingStore, Identity, open_store
from speciesmap.rasters.windows import WindowGrid

Precision = Literal["auto", "float32", "bfloat16"]

MIN_VALID = 0.5
SAMPLE_WINDOWS = 32  # on which bfloat16 is compared with float32
WAITING_BATCHES = 3
WAITING_TILES = 2

log = logging.getLogger("speciesmap")


@within_memory()
def embed(
    model: SpeciesModel | Path | str,
    imagery: Imagery | Path | str,
    out: Path | str,
    *,
    bbox: Sequence[float] | None = None,
    bbox_crs: Any = "EPSG:4326",
    stride_px: int | None = None,
    bands: Sequence[str] | None = None,
    min_valid: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    compiled: bool = False,
    skip_unreadable: bool = False,
    any_resolution: bool = False,
    workers: int = 0,
    scheduler: str | None = None,
    overwrite: bool = False,
    **opening: Unpack[Opening],
) -> EmbeddingStore:
    """Encode the windows of some imagery into an embedding store.

    A store that exists is filled where it lacks tiles of the area; nothing is encoded twice.

    Args:
        model: A model or its folder.
        imagery: Imagery, or what `open_imagery` takes.
        out: The store, a folder named `*.zarr`.
        bbox: Area of interest: west, south, east, north. All of the imagery by default. Tiles of
            32 x 32 cells that it touches are encoded whole. Of imagery on servers the store holds
            the area alone, and nothing else is read.
        bbox_crs: CRS of `bbox`.
        stride_px: Side of a cell in pixels; a quarter of the window by default, or what an
            existing store has.
        bands: Bands of the imagery in the model's order, as `Imagery.select` takes them.
        min_valid: Windows with a smaller share of valid pixels are not encoded and come out as
            NaN. In other windows invalid pixels take the model's mean colour. 0.5 by default, or
            what an existing store has.
        batch_size: Windows encoded at once; by default as many pixels as 8 windows of 256 px have
            on a CPU, 256 of them on a GPU, and 256 at most.
        device: Of torch, for example `"cuda"`; a GPU by default where there is one.
        precision: `"auto"` takes bfloat16 where the processor computes in it and it agrees with
            float32 (cosine at least 0.999) on the first 32 windows.
        compiled: Let `torch.compile` make the encoder faster, which takes a while to start.
        skip_unreadable: Leave tiles empty whose pixels cannot be read, and name them; another run
            tries them again. By default the first one stops the run.
        any_resolution: Accept pixels more than 1.5 times as large or small as the model's.
        workers: Encode in so many processes on this machine, each on a GPU of its own where there
            are several; in this process by default. Model and imagery must be given as paths.
        scheduler: Address of a Dask scheduler, whose workers encode; they must see the same files.
        overwrite: Start an existing store afresh, in a hidden folder beside it that takes its
            place once it is whole; interrupted and called again, it goes on there.
        opening: Which scenes and which grid, as for `open_imagery`.

    Returns:
        The store.

    Raises:
        ModelError: The model cannot be read.
        ImageryError: The imagery cannot be read or does not fit the model.
        AreaError: The area is malformed or misses the imagery.
        StoreError: The store was made from something else.
        ClusterError: A cluster does not answer or loses its workers.
        ResourceError: Memory or threads ran out; tiles that are done are kept.
    """
    folder = Path(model).absolute() if isinstance(model, str | Path) else None
    if (workers or scheduler) and (folder is None or isinstance(imagery, Imagery)):
        raise ConfigError(
            "workers open the model and the imagery themselves; give both as paths, or leave out "
            "workers and scheduler"
        )
    if isinstance(model, str | Path):
        model = load_model(model)
    imagery = fit_imagery(
        model,
        imagery,
        bands=bands,
        bbox=bbox,
        bbox_crs=bbox_crs,
        any_resolution=any_resolution,
        **opening,
    )
    out = Path(out)
    afresh = overwrite and out.exists()
    if afresh:
        open_store(out)  # nothing but a store is replaced
    place = out.with_name(f".{out.stem}.fresh{out.suffix}") if afresh else out
    existing = open_store(out) if out.exists() and not afresh else None
    if existing is not None:
        stride_px = stride_px or existing.identity.stride_px
        min_valid = existing.identity.min_valid if min_valid is None else min_valid
    stride_px = max(1, model.window_px // 4) if stride_px is None else stride_px
    imagery, cells, area = lay_out(imagery, model.window_px, stride_px, bbox, bbox_crs)
    grid = WindowGrid(imagery.geobox, model.window_px, stride_px)
    imagery = fit_values(model, imagery, grid.pixels(*area))
    identity = Identity(
        model=model.fingerprint,
        window_px=model.window_px,
        stride_px=stride_px,
        bands=imagery.bands,
        imagery=imagery.fingerprint,
        min_valid=MIN_VALID if min_valid is None else min_valid,
    )
    if not 0 <= identity.min_valid <= 1:
        raise ConfigError(f"--min-valid {min_valid} is not a share; give a number from 0 to 1")
    if existing is not None:
        existing.refuse_other(identity)
    store = (_begun(place, identity) if afresh else existing) or EmbeddingStore.create(
        place, identity, cells, model.dim, source=imagery.source, gains=imagery.gains
    )
    todo = [tile for tile in store.tiles_in(*area) if not store.has(tile)]
    log.debug("%d of %d tiles to encode", len(todo), len(list(store.tiles_in(*area))))
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
        "compiled": compiled,
        "skip_unreadable": skip_unreadable,
    }
    if workers or scheduler:
        from speciesmap.mapping.cluster import Job, encode_on_cluster

        job = Job(
            model=str(folder),
            imagery=imagery,
            store=str(place.absolute()),
            identity=identity,
            bands=None if bands is None else tuple(bands),
            any_resolution=any_resolution,
            **settings,
        )
        encode_on_cluster(job, store, todo, workers=workers, scheduler=scheduler)
    else:
        encode_tiles(model, imagery, store, todo, **settings)
    if not afresh:
        return store
    land(place, out)
    return open_store(out)


def _begun(place: Path, identity: Identity) -> EmbeddingStore | None:
    """A store that an interrupted run began, if it was of the same; else it is removed."""
    try:
        store = open_store(place)
        store.refuse_other(identity)
    except StoreError:
        shutil.rmtree(place, ignore_errors=True)
        return None
    return store


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


def choose_device(name: str | None) -> torch.device:
    """Take the device asked for, else a GPU where there is one.

    Raises:
        ConfigError: There is no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"there is no device {name!r} here ({reason}); try cpu") from error
    return device
