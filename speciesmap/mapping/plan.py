"""What a run would do and cost, told before it begins."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from speciesmap.mapping.benchmark import benchmark
from speciesmap.mapping.fit import fit_imagery, lay_out, refuse_poles, refuse_unseen
from speciesmap.models import SpeciesModel, load_model
from speciesmap.progress import at_level
from speciesmap.rasters.imagery import Imagery, Opening
from speciesmap.rasters.store import TILE
from speciesmap.rasters.windows import WindowGrid

MEASURED_S = 3.0

log = logging.getLogger("speciesmap")


@dataclass(frozen=True)
class Plan:
    """The size and cost of a map.

    Attributes:
        imagery: Source.
        grid: Its CRS, pixels, origin and shape, in words.
        scenes: Scenes found.
        pixels: That are read, those that several windows share counted once.
        windows: That are encoded at most; those without enough valid pixels are not.
        cells: Rows and columns of the map.
        read_bytes: Of the files, as compressed as they are; 0 where no size is known.
        store_bytes: Of the embeddings.
        windows_per_s: What `benchmark` measured on this machine, with noise.
        seconds: Of encoding at that rate.
    """

    imagery: str
    grid: str
    scenes: int
    pixels: int
    windows: int
    cells: tuple[int, int]
    read_bytes: int
    store_bytes: int
    windows_per_s: float
    seconds: float


def plan(
    model: SpeciesModel | Path | str,
    imagery: Imagery | Path | str,
    *,
    bbox: Sequence[float] | None = None,
    bbox_crs: Any = "EPSG:4326",
    stride_px: int | None = None,
    bands: Sequence[str] | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    any_resolution: bool = False,
    **opening: Unpack[Opening],
) -> Plan:
    """Find the scenes of an area and reckon what mapping it takes; of its pixels a sample is read.

    Args:
        model: A model or its folder.
        imagery: As for `embed`.
        bbox: As for `embed`.
        bbox_crs: As for `embed`.
        stride_px: As for `embed`.
        bands: As for `embed`.
        batch_size: As for `embed`.
        device: As for `embed`.
        any_resolution: As for `embed`.
        opening: As for `embed`.

    Raises:
        SpeciesmapError: As `predict` does, where an input does not fit.
    """
    if bbox is not None:
        refuse_poles(bbox, bbox_crs)
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
    refuse_unseen(imagery.source, imagery.geobox)
    side = model.window_px
    stride = max(1, side // 4) if stride_px is None else stride_px
    imagery, cells, (rows, cols) = lay_out(model, imagery, stride, bbox, bbox_crs)
    # tiles that the area touches are encoded whole
    rows, cols = (
        slice(r.start // TILE * TILE, min(count, -(-r.stop // TILE) * TILE))
        for r, count in zip((rows, cols), cells.shape, strict=True)
    )
    shape = (rows.stop - rows.start, cols.stop - cols.start)
    rectangle = (
        *WindowGrid(imagery.geobox, side, stride).start(rows.start, cols.start),
        (shape[0] - 1) * stride + side,
        (shape[1] - 1) * stride + side,
    )
    # what is said of noise is not said of the area
    with at_level(max(log.getEffectiveLevel(), logging.WARNING), log.name):
        rate = benchmark(
            model, stride_px=stride, batch_size=batch_size, device=device, seconds=MEASURED_S
        )["windows_per_s"]
    windows = shape[0] * shape[1]
    return Plan(
        imagery=imagery.source,
        grid=imagery.grid_in_words,
        scenes=len(imagery.provenance(*rectangle)),
        pixels=rectangle[2] * rectangle[3],
        windows=windows,
        cells=shape,
        read_bytes=imagery.bytes_in(*rectangle),
        store_bytes=windows * model.dim * np.dtype(np.float16).itemsize,
        windows_per_s=rate,
        seconds=windows / rate,
    )
