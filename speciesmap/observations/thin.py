"""Thinning: how close together records may stand, in the same cell or within a distance."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from speciesmap.errors import ObservationsError

if TYPE_CHECKING:
    import geopandas as gpd

EARTH_M = 6_371_008.8
"""Mean radius of the Earth (IUGG): distances on this sphere are within 0.6% of the ellipsoid's."""


def first_per_cell(
    observations: pd.DataFrame | gpd.GeoDataFrame, cell_m: float, *, by_taxon: bool = False
) -> NDArray[np.bool_]:
    """Mark the most certain observation of each occupied cell.

    Args:
        observations: With columns longitude, latitude, uncertainty_m and taxon, as
            `read_observations` gives them.
        cell_m: Side of a cell, in metres, in the equal-area grid EPSG:6933.
        by_taxon: One per cell for each taxon rather than one for all.

    Returns:
        True for the rows to keep, shape (N,). Among equals the first row wins.

    Raises:
        ObservationsError: `cell_m` is not above 0.
    """
    if not cell_m > 0:
        raise ObservationsError(f"a cell of {cell_m} m has no area; give a side above 0 m")
    from pyproj import Transformer

    x, y = Transformer.from_crs("EPSG:4326", "EPSG:6933", always_xy=True).transform(
        observations["longitude"].to_numpy(), observations["latitude"].to_numpy()
    )
    cells = pd.DataFrame(
        {
            "column": np.floor(np.asarray(x) / cell_m),
            "row": np.floor(np.asarray(y) / cell_m),
            "taxon": pd.factorize(observations["taxon"])[0] if by_taxon else 0,
        }
    )
    order = most_certain_first(observations)
    keep = np.empty(len(cells), dtype=bool)
    keep[order] = ~cells.iloc[order].duplicated().to_numpy()
    return keep


def apart(observations: pd.DataFrame | gpd.GeoDataFrame, distance_m: float) -> NDArray[np.bool_]:
    """Mark observations no two of a taxon nearer than a distance, as many as a pass finds.

    The most certain come first; each is kept unless one kept before it is nearer. What is dropped
    is therefore within the distance of something kept. Distance thinning is spThin's
    (Aiello-Lammens et al. 2015); that package tries many random orders, this takes one, with a
    hashed grid in place of all pairs.

    Args:
        observations: With columns longitude, latitude, uncertainty_m and taxon.
        distance_m: Least great-circle distance, in metres.

    Returns:
        True for the rows to keep, shape (N,).

    Raises:
        ObservationsError: `distance_m` is not from a millimetre to a quarter of the Earth's girth.
    """
    if not 0.001 <= distance_m < EARTH_M * np.pi / 2:
        raise ObservationsError(
            f"records cannot be thinned to {distance_m} m; give a distance from 0.001 m to "
            "10,000,000 m"
        )
    points = on_sphere(observations["longitude"], observations["latitude"])  # (N, 3)
    taxon = pd.factorize(observations["taxon"])[0]
    chord = 2 * np.sin(distance_m / EARTH_M / 2)
    order = most_certain_first(observations)
    keep: NDArray[np.bool_] = _sieve()(points, taxon.astype(np.int64), order, chord)
    return keep


def most_certain_first(observations: pd.DataFrame | gpd.GeoDataFrame) -> NDArray[np.int64]:
    """Row numbers by `uncertainty_m`, unknown last, else in the order given, shape (N,)."""
    uncertainty = observations["uncertainty_m"].to_numpy(dtype=np.float64)
    return np.argsort(uncertainty, kind="stable")


def on_sphere(longitude: ArrayLike, latitude: ArrayLike) -> NDArray[np.float64]:
    """Places as unit vectors, shape (N, 3); the chord between two is 2 sin(angle / 2)."""
    lam = np.radians(np.asarray(longitude, np.float64))
    phi = np.radians(np.asarray(latitude, np.float64))
    return np.column_stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])


@cache
def _sieve() -> Any:
    """Compile the pass over all records, when it is first needed."""
    import numba

    @numba.njit(inline="always")
    def bucket_of(x, y, z, t, size):  # type: ignore[no-untyped-def]
        return ((x * 73856093) ^ (y * 19349663) ^ (z * 83492791) ^ (t * 49979687)) & (size - 1)

    @numba.njit(cache=True)
    def sieve(points, taxon, order, chord):  # type: ignore[no-untyped-def]
        count = len(points)
        size = 1
        while size < 2 * count:
            size *= 2
        newest = np.full(size, -1, np.int64)  # of each bucket's kept records
        before = np.full(count, -1, np.int64)  # the one kept earlier in the same bucket
        keep = np.zeros(count, np.bool_)
        cells = np.floor(points / chord).astype(np.int64)
        for i in order:
            near = False
            for dx in range(-1, 2):
                for dy in range(-1, 2):
                    for dz in range(-1, 2):
                        bucket = bucket_of(
                            cells[i, 0] + dx, cells[i, 1] + dy, cells[i, 2] + dz, taxon[i], size
                        )
                        j = newest[bucket]
                        while j >= 0 and not near:
                            if taxon[j] == taxon[i]:
                                square = 0.0
                                for axis in range(3):
                                    square += (points[i, axis] - points[j, axis]) ** 2
                                near = square < chord * chord
                            j = before[j]
                        if near:
                            break
                    if near:
                        break
                if near:
                    break
            if not near:
                keep[i] = True
                bucket = bucket_of(cells[i, 0], cells[i, 1], cells[i, 2], taxon[i], size)
                before[i] = newest[bucket]
                newest[bucket] = i
        return keep

    return sieve
