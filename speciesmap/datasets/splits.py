"""Splits that do not leak: no observation, and no ground, is both learned from and tested on."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from speciesmap.observations.thin import EARTH_M, on_sphere

CELL_DEG = 0.25
SPLITS = ("train", "validation", "test")
SAME_OBSERVATION = "the observation is in a later split too"
OVERLAP = "the window may overlap one of a later split"


def rank_of(names: Iterable[str]) -> NDArray[np.int64]:
    """Give an order that looks random and depends on nothing but the names, shape (N,)."""
    return np.array([zlib.crc32(name.encode()) for name in names], dtype=np.int64)


def hold_out_places(facts: pd.DataFrame, share: float) -> NDArray[np.bool_]:
    """Choose whole cells of a quarter of a degree that hold about a share of the rows.

    Args:
        facts: `latitude` and `longitude` of N rows.
        share: Of the rows, reached or just exceeded; nothing is chosen where all rows are in one
            cell.

    Returns:
        Rows chosen, shape (N,).
    """
    corner = np.floor(facts[["latitude", "longitude"]].to_numpy() / CELL_DEG).astype(int)
    cells, cell = np.unique(corner, axis=0, return_inverse=True)
    if len(cells) < 2:
        return np.zeros(len(facts), dtype=bool)
    order = rank_of(f"{row}/{col}" for row, col in cells.tolist()).argsort(kind="stable")
    rows = np.bincount(cell.ravel())[order].cumsum()
    chosen = order[: min(len(cells) - 1, int(np.searchsorted(rows, share * len(facts))) + 1)]
    return np.isin(cell.ravel(), chosen)


def leaks(facts: pd.DataFrame, side_m: float) -> dict[str, NDArray[np.bool_]]:
    """Find rows whose observation or ground is in a later split too.

    Leaving them out makes the later split independent; the order is train, validation, test. A row
    of validation that is left out itself keeps none of training out.

    Args:
        facts: `split`, `observation_uuid`, `latitude` and `longitude` of N rows. Of rows without a
            place only the observation is known.
        side_m: Side of an aerial window. Two squares, however turned, may overlap where their
            centres are nearer than their diagonal, which also finds some that just do not.

    Returns:
        Rows by reason, each of shape (N,); a row has at most one.
    """
    same, near = (np.zeros(len(facts), dtype=bool) for _ in range(2))
    split = facts["split"].to_numpy()
    points = on_sphere(facts["longitude"], facts["latitude"])  # (N, 3)
    placed = np.isfinite(points).all(1)
    reach = 2 * np.sin(side_m * np.sqrt(2) / EARTH_M / 2)  # a chord of the unit sphere
    for earlier, *following in (SPLITS[1:], SPLITS):
        here = split == earlier
        later = np.isin(split, following) & ~same & ~near
        same |= here & facts["observation_uuid"].isin(facts["observation_uuid"][later]).to_numpy()
        if (later & placed).any() and (here & placed).any():
            tree = cKDTree(points[later & placed])
            distance, _ = tree.query(points[here & placed], distance_upper_bound=reach)
            near[here & placed] |= np.isfinite(distance)
    return {SAME_OBSERVATION: same, OVERLAP: near & ~same}
