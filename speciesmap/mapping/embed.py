"""The tiled engine: encode every window of an area once, into a store that can be resumed.

A reader thread cuts windows from blocks of pixels while the encoder works and a writer thread
stores what is done. Batches cross the rows of a tile and end with it: a tile's vectors then depend
on nothing but its pixels, and a run that was interrupted ends in the same bytes as one that was
not. A tile is 1,024 windows, so the short batch at its end costs little.
"""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from speciesmap.errors import ConfigError, ImageryError, StoreError
from speciesmap.mapping.cut import ahead, cut_windows
from speciesmap.models import SpeciesModel, load_model
from speciesmap.models.encoders import computes_bfloat16
from speciesmap.progress import track
from speciesmap.rasters.imagery import Imagery, open_imagery
from speciesmap.rasters.store import EmbeddingStore, Identity, open_store
from speciesmap.rasters.windows import WindowGrid, cells_in

Precision = Literal["auto", "float32", "bfloat16"]

MIN_VALID = 0.5
MOST_RESOLUTION_RATIO = 1.5  # beyond it an encoder sees objects of sizes it was not shown
LEAST_COSINE = 0.999  # of bfloat16 against float32, on every window of a real batch
WAITING_BATCHES = 3
WAITING_TILES = 2

log = logging.getLogger("speciesmap")


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
    any_resolution: bool = False,
    overwrite: bool = False,
) -> EmbeddingStore:
    """Encode the windows of some imagery into an embedding store.

    A store that exists is filled where it lacks tiles of the area; nothing is encoded twice.

    Args:
        model: A model or its folder.
        imagery: Imagery, or what `open_imagery` takes.
        out: The store, a folder named `*.zarr`.
        bbox: Area of interest: west, south, east, north. All of the imagery by default. Tiles of
            32 x 32 cells that it touches are encoded whole.
        bbox_crs: CRS of `bbox`.
        stride_px: Side of a cell in pixels; a quarter of the window by default, or what an
            existing store has.
        bands: Bands of the imagery in the model's order, as `Imagery.select` takes them.
        min_valid: Windows with a smaller share of valid pixels are not encoded and come out as
            NaN. In other windows invalid pixels take the model's mean colour. 0.5 by default, or
            what an existing store has.
        batch_size: Windows encoded at once; 32 on a CPU, 256 on a GPU by default.
        device: Of torch, for example `"cuda"`; a GPU by default where there is one.
        precision: `"auto"` takes bfloat16 where the processor computes in it and it agrees with
            float32 (cosine at least 0.999) on the first batch of windows.
        any_resolution: Accept pixels more than 1.5 times as large or small as the model's.
        overwrite: Start an existing store afresh.

    Returns:
        The store.

    Raises:
        ModelError: The model cannot be read.
        ImageryError: The imagery cannot be read or does not fit the model.
        AreaError: The area is malformed or misses the imagery.
        StoreError: The store was made from something else.
    """
    if isinstance(model, str | Path):
        model = load_model(model)
    imagery = fit_imagery(model, imagery, bands=bands, any_resolution=any_resolution)
    out = Path(out)
    if overwrite and out.exists():
        shutil.rmtree(open_store(out).path)
    existing = open_store(out) if out.exists() else None
    if existing is not None:
        stride_px = stride_px or existing.identity.stride_px
        min_valid = existing.identity.min_valid if min_valid is None else min_valid
    identity = Identity(
        model=model.fingerprint,
        window_px=model.window_px,
        stride_px=max(1, model.window_px // 4) if stride_px is None else stride_px,
        bands=imagery.bands,
        imagery=imagery.fingerprint,
        min_valid=MIN_VALID if min_valid is None else min_valid,
    )
    if not 0 <= identity.min_valid <= 1:
        raise ConfigError(f"--min-valid {min_valid} is not a share; give a number from 0 to 1")
    cells = WindowGrid(imagery.shape, identity.window_px, identity.stride_px).geobox(imagery.geobox)
    area = (
        (slice(0, cells.shape[0]), slice(0, cells.shape[1]))
        if bbox is None
        else cells_in(bbox, cells, bbox_crs)
    )
    if existing is not None:
        existing.refuse_other(identity)
    store = existing or EmbeddingStore.create(
        out, identity, cells, model.dim, source=imagery.source
    )
    todo = [tile for tile in store.tiles_in(*area) if not store.has(tile)]
    log.debug("%d of %d tiles to encode", len(todo), len(list(store.tiles_in(*area))))
    try:
        encode_tiles(
            model, imagery, store, todo, batch_size=batch_size, device=device, precision=precision
        )
    except BaseException:
        if existing is None and store.done() is None:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return store


def fit_imagery(
    model: SpeciesModel,
    imagery: Imagery | Path | str,
    *,
    bands: Sequence[str] | None = None,
    any_resolution: bool = False,
) -> Imagery:
    """Open imagery and give its bands in the model's order.

    Args:
        model: Says which bands and which size of pixels it was trained on.
        imagery: Imagery, or what `open_imagery` takes.
        bands: As `Imagery.select` takes them. Names that are the model's may come in any order;
            other bands are taken in the order given.
        any_resolution: Accept pixels of another size.

    Raises:
        ImageryError: Bands or resolution do not fit the model.
    """
    if not isinstance(imagery, Imagery):
        imagery = open_imagery(imagery)
    if bands is not None:
        imagery = imagery.select(bands)
    wanted = tuple(model.bands)
    name = Path(imagery.source).name
    if set(wanted) <= set(imagery.bands) and (bands is None or len(bands) == len(wanted)):
        imagery = imagery.select(wanted)
    elif bands is None or len(bands) != len(wanted):
        raise ImageryError(
            f"{name} has {len(imagery.bands)} bands ({', '.join(imagery.bands)}), the model was "
            f"trained on {len(wanted)} ({', '.join(wanted)}); choose with --bands or use another "
            "model"
        )
    ratio = imagery.resolution_m / model.resolution_m
    if not any_resolution and not 1 / MOST_RESOLUTION_RATIO <= ratio <= MOST_RESOLUTION_RATIO:
        raise ImageryError(
            f"{name} has pixels of {imagery.resolution_m:.3g} m, the model was trained on "
            f"{model.resolution_m:.3g} m; resample the imagery with gdalwarp -tr, or pass "
            "--any-resolution to go on regardless"
        )
    return imagery


def encode_tiles(
    model: SpeciesModel,
    imagery: Imagery,
    store: EmbeddingStore,
    tiles: Sequence[tuple[int, int]],
    *,
    batch_size: int | None = None,
    device: str | None = None,
    precision: Precision = "auto",
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

    Returns:
        Number of windows encoded.

    Raises:
        ImageryError: A block of pixels cannot be read.
        OutputError: A tile cannot be written.
        StoreError: The store was begun in another precision than the one asked for.
    """
    if not tiles:
        return 0
    place = choose_device(device)
    if batch_size is None:
        batch_size = 32 if place.type == "cpu" else 256
    if precision != "auto" and store.precision not in (None, precision):
        raise StoreError(
            f"{store.path} was begun in {store.precision}, not {precision}; leave --precision out, "
            "or use another path for the store"
        )
    encoder = _Encoder(model, place, store.precision or precision)
    was_training, windows = model.training, 0
    model.to(place).eval()

    def encoded() -> Iterator[tuple[tuple[int, int], list[tuple[NDArray[np.int64], Tensor]]]]:
        nonlocal windows
        parts: list[tuple[NDArray[np.int64], Tensor]] = []
        source = cut_windows(
            imagery, store, tiles, model.fill, batch_size, pin=place.type == "cuda"
        )
        for batch in ahead(source, WAITING_BATCHES):
            if batch.windows is not None:
                parts.append((batch.slots, encoder(batch.windows)))
                windows += len(batch.slots)
            if batch.last:
                yield batch.tile, parts
                parts = []

    try:
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            written: deque[Future[None]] = deque()
            for tile, parts in track(encoded(), "Encoding tiles", total=len(tiles)):
                if encoder.precision != store.precision and parts:
                    store.precision = encoder.precision
                written.append(writer.submit(_write, store, tile, parts))
                if len(written) > WAITING_TILES:
                    written.popleft().result()
            for future in written:
                future.result()
    finally:
        model.train(was_training)
    log.info("encoded %d windows of %d tiles in %s", windows, len(tiles), encoder.precision)
    return windows


def _write(
    store: EmbeddingStore,
    tile: tuple[int, int],
    parts: Iterable[tuple[NDArray[np.int64], Tensor]],
) -> None:
    rows, cols = store.cells(tile)
    shape = (rows.stop - rows.start, cols.stop - cols.start, store.dim)
    vectors = np.full(shape, np.nan, np.float16)
    flat = vectors.reshape(-1, store.dim)
    for slots, encoded in parts:
        flat[slots] = encoded.cpu().numpy()  # waits for a GPU here, not in the encoding thread
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


class _Encoder:
    """Encodes batches in the precision asked for; `auto` is settled by the first batch."""

    def __init__(self, model: SpeciesModel, device: torch.device, precision: str) -> None:
        self.model, self.device, self.precision = model, device, precision

    def __call__(self, windows: Tensor) -> Tensor:
        """Give unit vectors, float16 on the device, shape (N, D)."""
        windows = windows.to(self.device, non_blocking=True)
        with torch.inference_mode():
            if self.precision == "auto":
                return self._settle(windows).half()
            return self._encode(windows, self.precision).half()

    def _encode(self, windows: Tensor, precision: str) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            vectors = self.model.encode_aerial(windows)
        return F.normalize(vectors.float(), dim=1)

    def _settle(self, windows: Tensor) -> Tensor:
        """Choose the precision by a first batch, and give its vectors."""
        self.precision = "float32"
        exact = self._encode(windows, "float32")
        if not computes_bfloat16(self.device):
            return exact
        quick = self._encode(windows, "bfloat16")
        cosine = float((exact * quick).sum(dim=1).min())
        if cosine >= LEAST_COSINE:
            self.precision = "bfloat16"
        log.info("encoding in %s; bfloat16 has a cosine of %.5f to float32", self.precision, cosine)
        return quick if self.precision == "bfloat16" else exact
