"""Imagery as a model takes it: its bands, size of pixels and range of values."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from odc.geo.geobox import GeoBox

from speciesmap.errors import AreaError, ConfigError, ImageryError
from speciesmap.models import SpeciesModel
from speciesmap.rasters.imagery import Imagery, Opening, open_imagery
from speciesmap.rasters.values import (
    Values,
    conventional_factor,
    sample_values,
    tagged_gains,
    warn_of_black,
)
from speciesmap.rasters.windows import (
    MAX_LATITUDE,
    WindowGrid,
    bounds_in,
    bounds_of,
    cells_in,
    coverage,
)

MOST_RESOLUTION_RATIO = 1.5  # beyond it an encoder sees objects of sizes it was not shown
LEAST_COVERAGE = 0.95  # share of the area asked for; imagery that covers less is warned of

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
            around_m=model.window_px * model.resolution_m,
            **opening,
        )
    elif any(value not in (None, (), "newest") for value in opening.values()):
        raise ConfigError(
            f"{imagery.source} is open already; give {', '.join(opening)} to open_imagery"
        )
    if bands is not None:
        imagery = imagery.select(bands)
    wanted = tuple(model.bands)
    name = _name(imagery)
    if set(wanted) <= set(imagery.bands) and (bands is None or len(bands) == len(wanted)):
        imagery = imagery.select(wanted)
    elif bands is None or len(bands) != len(wanted):
        remedy = "use another model"
        if bands is not None:
            remedy = f"name {len(wanted)} bands with --bands, or {remedy}"
        elif len(imagery.bands) >= len(wanted):
            given = ",".join(f"{band}={k}" for k, band in enumerate(wanted, 1))
            remedy = f"say which is which, for example --bands {given}, or {remedy}"
        else:
            remedy = f"give imagery that has them, or {remedy}"
        raise ImageryError(
            f"{name} has the bands {', '.join(imagery.bands)}, the model was trained on "
            f"{', '.join(wanted)}; {remedy}"
        )
    if not any_resolution:
        _refuse_other_resolution(imagery, model.resolution_m, name)
    return imagery


def _name(imagery: Imagery) -> str:
    return imagery.source if imagery.remote else Path(imagery.source).name


def fit_values(
    model: SpeciesModel, imagery: Imagery, rectangle: tuple[int, int, int, int]
) -> Imagery:
    """Bring the values of imagery to what a model was trained on, and warn where they stay far.

    Values are given the training imagery's scale and offset where the files of both tell theirs.
    Otherwise, where the types of the pixels differ, they are multiplied by that factor between the
    customs of storing brightness (1, 255, 10000, 65535) that brings them nearest to what was
    trained on, if one brings them nearer.

    Args:
        model: Knows the histograms it was trained on, or is told nothing and checks nothing.
        imagery: With the model's bands.
        rectangle: Where a sample is read: first row and column, height and width, in pixels.

    Returns:
        The imagery, as float32 where its values change.
    """
    seen = model.values
    if seen is None:
        return imagery
    name = _name(imagery)
    pixels = sample_values(imagery, *rectangle)
    if pixels is not None:
        warn_of_black(imagery, rectangle, pixels)
    gains = tagged_gains(imagery.scaling, seen.scaling)
    if gains is not None:
        imagery = imagery.rescaled(gains)
        log.info("%s: values are given the scale and offset of the training imagery", name)
    if pixels is None:
        return imagery
    if gains is not None:
        factor, shift = np.array(gains).T[..., None]  # (B, 1)
        pixels = pixels * factor + shift
    factor = conventional_factor(seen, imagery.dtype, pixels) if gains is None else 1.0
    if factor != 1:
        log.warning(
            "%s has values of type %s, the model was trained on %s; they are multiplied by %.6g, "
            "which brings them nearest",
            name,
            imagery.dtype,
            seen.dtype,
            factor,
        )
        imagery, pixels = imagery.rescaled([(factor, 0.0)] * len(imagery.bands)), pixels * factor
    far = seen.far(Values.of(pixels, imagery.dtype), imagery.bands)
    if far:
        log.warning(
            "%s: %s; check its units (gdal_translate -scale changes them) and the order of "
            "--bands, or expect a poor map",
            name,
            far,
        )
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
    model: SpeciesModel,
    imagery: Imagery,
    stride_px: int,
    bbox: Sequence[float] | None = None,
    bbox_crs: Any = "EPSG:4326",
) -> tuple[Imagery, GeoBox, tuple[slice, slice]]:
    """Find the cells of an area and fit the values there; imagery on servers is cropped to it.

    Returns:
        The imagery, the grid of all its cells, which are in the same places if it is cropped, and
        the rows and columns of those in the area.

    Raises:
        AreaError: The area is malformed or misses the imagery.
        ImageryError: The raster is too small for a cell.
    """
    grid, words = WindowGrid(imagery.geobox, model.window_px, stride_px), imagery.in_words
    cells = grid.geobox
    rows, cols = (slice(0, count) for count in cells.shape)
    if bbox is not None:
        rows, cols = cells_in(bbox, cells, bbox_crs)
        share = coverage(bbox, imagery.geobox, bbox_crs)
        if share < LEAST_COVERAGE:
            log.warning(
                "%s covers %.2g%% of --bbox; the map ends where the imagery ends",
                imagery.source,
                100 * share,
            )
    rectangle = grid.pixels(rows, cols)
    if bbox is not None and imagery.remote:
        imagery, rectangle = imagery.crop(*rectangle), (0, 0, *rectangle[2:])
        cells = cells[rows, cols]
        rows, cols = (slice(0, count) for count in cells.shape)
    log.info("grid: %s", words)
    return fit_values(model, imagery, rectangle), cells, (rows, cols)


def refuse_poles(bbox: Sequence[float], crs: Any) -> None:
    """Stop where an area reaches beyond what a page can show.

    Raises:
        AreaError: It does.
    """
    _, south, _, north = bounds_of(bbox, crs)
    if south < -MAX_LATITUDE or north > MAX_LATITUDE:
        reached = south if south < -MAX_LATITUDE else north
        raise AreaError(
            f"the area reaches latitude {reached:.6g}, the page's Web Mercator ends at "
            f"{MAX_LATITUDE}; choose an area farther from the pole, or make a store of it with "
            "`speciesmap embed --crs`"
        )


def refuse_unseen(name: Path | str, grid: GeoBox) -> None:
    """Stop where a page can show nothing of a raster; of one that reaches there it shows a part.

    Raises:
        AreaError: It lies beyond the page's latitudes.
    """
    _, south, _, north = bounds_in(grid)
    if south >= MAX_LATITUDE or north <= -MAX_LATITUDE:
        reached = south if south > 0 else north
        raise AreaError(
            f"{name} lies beyond latitude {reached:.6g}, the page's Web Mercator ends at "
            f"{MAX_LATITUDE}; choose imagery farther from the pole, or make a store of it with "
            "`speciesmap embed`"
        )
