"""An area's embeddings: a store that is begun or gone on with, filled here or on a cluster."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from speciesmap.errors import ConfigError, StoreError, within_memory
from speciesmap.mapping.cluster import Job, encode_on_cluster
from speciesmap.mapping.fit import fit_imagery, lay_out
from speciesmap.mapping.tiles import Precision, encode_tiles
from speciesmap.models import SpeciesModel, load_model
from speciesmap.outputs import land
from speciesmap.rasters.imagery import Imagery, Opening
from speciesmap.rasters.store import EmbeddingStore, Identity, open_store

MIN_VALID = 0.5

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
    imagery, cells, area = lay_out(model, imagery, stride_px, bbox, bbox_crs)
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
