"""Imagery as a model takes it: its bands, size of pixels and range of values."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from odc.geo.geobox import GeoBox

from speciesmap.errors import ConfigError, ImageryError
from speciesmap.models import SpeciesModel
from speciesmap.rasters.imagery import Imagery, Opening, open_imagery
from speciesmap.rasters.windows import WindowGrid, cells_in

MOST_RESOLUTION_RATIO = 1.5  # beyond it an encoder sees objects of sizes it was not shown

log = logging.getLogger("speciesmap")


def fit_imagery(
    model: SpeciesModel,
    imagery: Imagery | Path | str,
    *,
    bands: Sequence[str] | None = None,
    bbox: Sequence[float] | None = None,
    bbox_crs: Any = "EPSG:4326",
    any_resolution: bool = False,
    **opening: Unpack[Opening],
) -> Imagery:
    """Open imagery and give its bands in the model's order.

    Args:
        model: Says which bands and which size of pixels it was trained on.
        imagery: Imagery, or what `open_imagery` takes.
        bands: As `Imagery.select` takes them. Names that are the model's may come in any order;
            other bands are taken in the order given.
        bbox: Area of interest, where scenes are looked for.
        bbox_crs: CRS of `bbox`.
        any_resolution: Accept pixels of another size.
        opening: As for `open_imagery`.

    Raises:
        ImageryError: Bands or resolution do not fit the model.
        ConfigError: The imagery is open already and says itself what `opening` would.
    """
    if not isinstance(imagery, Imagery):
        imagery = open_imagery(
            imagery,
            bbox=bbox,
            bbox_crs=bbox_crs,
            wanted=[b.partition("=")[2] or b for b in bands] if bands else model.bands,
            preferred_m=model.resolution_m,
            **opening,
        )
    elif any(value not in (None, (), "newest") for value in opening.values()):
        raise ConfigError(
            f"{imagery.source} is open already; give {', '.join(opening)} to open_imagery"
        )
    if bands is not None:
        imagery = imagery.select(bands)
    wanted = tuple(model.bands)
    name = imagery.source if imagery.remote else Path(imagery.source).name
    if set(wanted) <= set(imagery.bands) and (bands is None or len(bands) == len(wanted)):
        imagery = imagery.select(wanted)
    elif bands is None or len(bands) != len(wanted):
        raise ImageryError(
            f"{name} has {len(imagery.bands)} bands ({', '.join(imagery.bands)}), the model was "
            f"trained on {len(wanted)} ({', '.join(wanted)}); choose with --bands or use another "
            "model"
        )
    if not any_resolution:
        _refuse_other_resolution(imagery, model.resolution_m, name)
    return imagery


def _refuse_other_resolution(imagery: Imagery, trained_m: float, name: str) -> None:
    """Stop where objects have other sizes in pixels than the model was shown, or lack detail."""
    coarsest_m = max(imagery.resolution_m, imagery.detail_m)
    if coarsest_m > MOST_RESOLUTION_RATIO * trained_m:
        pixel_m, words, remedy = coarsest_m, "finer", "use finer imagery"
    elif trained_m > MOST_RESOLUTION_RATIO * imagery.resolution_m:
        pixel_m, words = imagery.resolution_m, "coarser"
        remedy = f"resample it as it is read with --resolution-m {trained_m:.3g}"
    else:
        return
    raise ImageryError(
        f"{name} has pixels of {pixel_m:.3g} m, the model was trained on {trained_m:.3g} m, "
        f"{max(pixel_m / trained_m, trained_m / pixel_m):.3g} times {words}; {remedy}, or pass "
        "--any-resolution to go on regardless"
    )


def lay_out(
    imagery: Imagery,
    window_px: int,
    stride_px: int,
    bbox: Sequence[float] | None = None,
    bbox_crs: Any = "EPSG:4326",
) -> tuple[Imagery, GeoBox, tuple[slice, slice]]:
    """Find the cells of an area; imagery on servers is cropped to them, in the same places.

    Returns:
        The imagery, the grid of all its cells, and the rows and columns of those in the area.

    Raises:
        AreaError: The area is malformed or misses the imagery.
        ImageryError: The raster is too small for a cell.
    """
    grid = WindowGrid(imagery.shape, window_px, stride_px)
    cells = grid.geobox(imagery.geobox)
    if bbox is not None:
        rows, cols = cells_in(bbox, cells, bbox_crs)
        if not imagery.remote:
            return imagery, cells, (rows, cols)
        imagery = imagery.crop(*grid.pixels(rows, cols))
        cells = cells[rows, cols]
    return imagery, cells, (slice(0, cells.shape[0]), slice(0, cells.shape[1]))
