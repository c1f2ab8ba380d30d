"""Background: places drawn from the study area, against which presences are told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from speciesmap.errors import ObservationsError
from speciesmap.rasters.windows import window_start

if TYPE_CHECKING:
    import geopandas as gpd

    from speciesmap.rasters.imagery import Imagery

BLOCK_PX = 512
MIN_VALID = 0.5  # share of a window's pixels
ROUNDS = 60

Land = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]


def random_background(
    imagery: Imagery,
    count: int,
    window_px: int,
    rng: np.random.Generator,
    *,
    min_valid: float = MIN_VALID,
    land: Land | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw pixel centres uniformly over the valid pixels of an imagery, without repetition.

    Candidates are drawn over the whole raster and refused where the pixel is not valid or too
    much of its window is missing. Only the neighbourhoods of candidates are read, at most a
    block of 512 pixels and one window around it at a time.

    Args:
        imagery: Where to draw; its extent is the study area.
        count: How many places (10,000 is usual: Wallace, ENMeval).
        window_px: Side of the window that will be cut there, in pixels.
        rng: Source of randomness.
        min_valid: Least share of valid pixels in a window, 0 to 1.
        land: Says which places belong to the study area, from their continuous rows and columns;
            everywhere by default.

    Returns:
        Continuous rows and columns of the places, shape (count,) each, in the order drawn.

    Raises:
        ObservationsError: The imagery has fewer such places than asked for.
    """
    height, width = imagery.geobox.shape
    size = height * width
    found: list[NDArray[np.int64]] = []
    kept = 0
    tried = np.empty(0, dtype=np.int64)
    for _ in range(ROUNDS):
        share = max(kept / tried.size, 0.02) if tried.size else 1.0
        wanted = int(min(size, 1.1 * (count - kept) / share + 32))
        if tried.size + 2 * wanted < size:
            drawn = rng.choice(size, size=wanted, replace=False, shuffle=True)
            drawn = drawn[~np.isin(drawn, tried)].astype(np.int64)
        else:
            drawn = rng.permutation(np.setdiff1d(np.arange(size), tried))
        tried = np.concatenate([tried, drawn])
        good = drawn[valid_windows(imagery, drawn, window_px, min_valid, land)]
        found.append(good)
        kept += good.size
        if kept >= count or tried.size >= size:
            break
    if kept < count:
        raise ObservationsError(
            f"{imagery.source} has only {kept} of {count} background places among "
            f"{tried.size} pixels tried (window {window_px} px, {min_valid:.0%} of it valid); "
            "ask for fewer"
        )
    rows, cols = np.divmod(np.concatenate(found)[:count], width)
    return rows.astype(np.float64) + 0.5, cols.astype(np.float64) + 0.5


def biased_background(
    imagery: Imagery,
    count: int,
    window_px: int,
    rng: np.random.Generator,
    bias: Imagery,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw pixel centres in proportion to a raster of sampling effort, without repetition.

    Background with the presences' own sampling bias cancels it (Phillips et al. 2009). Places are
    chosen among at most 200,000 pixels, or twenty times as many as are asked for, drawn uniformly.

    Args:
        imagery: Where to draw; its extent is the study area.
        count: How many places.
        window_px: Side of the window that will be cut there, in pixels.
        rng: Source of randomness.
        bias: Relative effort in its first band, on any grid; where it is 0, missing or the raster
            ends, nothing is drawn.

    Returns:
        Continuous rows and columns of the places, shape (count,) each.

    Raises:
        ObservationsError: An effort is negative, or too few places have any.
    """
    height, width = imagery.shape
    pool = rng.choice(
        height * width, size=min(height * width, max(200_000, 20 * count)), replace=False
    ).astype(np.int64)
    effort = bias.sample(*imagery.xy(pool // width + 0.5, pool % width + 0.5))[0]
    if np.nanmin(effort, initial=0.0) < 0:
        raise ObservationsError(
            f"{bias.source} holds {np.nanmin(effort):g} as an effort; give 0 or more, in "
            "proportion to how much a place was visited"
        )
    pool, effort = pool[effort > 0], effort[effort > 0]
    # the largest of log(effort) + Gumbel noise are a draw in proportion without replacement
    order = pool[np.argsort(-np.log(effort) - rng.gumbel(size=len(pool)))]
    found: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    for part in np.array_split(order, max(1, len(order) // (2 * count))):
        found.append(part[valid_windows(imagery, part, window_px)])
        if sum(map(len, found)) >= count:
            break
    chosen = np.concatenate(found)[:count]
    if len(chosen) < count:
        raise ObservationsError(
            f"only {len(chosen)} of {count} background places have any effort in {bias.source} and "
            f"a valid window of {imagery.source}; ask for fewer, or check that the rasters overlap"
        )
    rows, cols = np.divmod(chosen, width)
    return rows.astype(np.float64) + 0.5, cols.astype(np.float64) + 0.5


def valid_windows(
    imagery: Imagery,
    pixels: NDArray[np.int64],
    window_px: int,
    min_valid: float = MIN_VALID,
    land: Land | None = None,
) -> NDArray[np.bool_]:
    """Tell which pixels are valid, on land, and have enough of a window around them.

    Args:
        imagery: Whose pixels.
        pixels: Their flat numbers, row by row, shape (N,).
        window_px: Side of the window, in pixels.
        min_valid: Least share of valid pixels in a window, 0 to 1.
        land: As for `random_background`.

    Returns:
        Shape (N,).
    """
    width = imagery.geobox.shape[1]
    rows, cols = pixels // width, pixels % width
    found = np.ones(pixels.size, dtype=bool)
    if land is not None:
        found &= np.asarray(land(rows + 0.5, cols + 0.5), dtype=bool)
    across = width // BLOCK_PX + 1
    block = (rows // BLOCK_PX) * across + cols // BLOCK_PX
    candidates = np.flatnonzero(found)
    candidates = candidates[np.argsort(block[candidates], kind="stable")]
    cuts = np.flatnonzero(np.diff(block[candidates])) + 1
    for group in np.split(candidates, cuts):
        if not group.size:
            continue
        starts = np.array(
            [
                window_start(r + 0.5, c + 0.5, window_px)
                for r, c in zip(rows[group], cols[group], strict=True)
            ]
        )  # (n, 2)
        top, left = starts.min(axis=0)
        bottom, right = starts.max(axis=0) + window_px
        _, valid = imagery.read(int(top), int(left), int(bottom - top), int(right - left))
        total = np.zeros((valid.shape[0] + 1, valid.shape[1] + 1), dtype=np.int64)
        total[1:, 1:] = valid.cumsum(axis=0).cumsum(axis=1)
        r, c = starts[:, 0] - top, starts[:, 1] - left
        inside = (
            total[r + window_px, c + window_px]
            - total[r, c + window_px]
            - total[r + window_px, c]
            + total[r, c]
        )
        centre = valid[rows[group] - top, cols[group] - left]
        found[group] = centre & (inside >= min_valid * window_px**2)
    return found


def target_group(observations: gpd.GeoDataFrame, cell_m: float) -> gpd.GeoDataFrame:
    """Take one observation per cell of a whole group as background.

    Places where observers of the group have been carry the presences' own sampling bias
    (Phillips et al. 2009); one per cell is the usual form (Wallace, ENMeval).

    Args:
        observations: All records of the group, any taxon, as `read_observations` gives them.
        cell_m: Side of a cell, in metres, in the equal-area grid EPSG:6933.

    Returns:
        The first most certain row of each occupied cell, in the input's order.

    Raises:
        ObservationsError: `cell_m` is not above 0.
    """
    from speciesmap.observations.thin import first_per_cell

    return observations[first_per_cell(observations, cell_m)]
