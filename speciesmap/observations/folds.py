"""Spatial folds: held-out places that share no ground with the training places.

Positions are metres in one projected CRS, normally that of the imagery, so that a window is an
axis-aligned square.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from speciesmap.errors import ObservationsError

CANDIDATES = 20
"""How many numbers of clusters `knndm` tries."""


def _positions(x_m: ArrayLike, y_m: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(x_m, dtype=np.float64)
    y = np.asarray(y_m, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ObservationsError(
            f"folds need one x and one y per row, got shapes {x.shape} and {y.shape}; "
            "give two arrays of the same length"
        )
    wrong = np.flatnonzero(~(np.isfinite(x) & np.isfinite(y)))
    if wrong.size:
        raise ObservationsError(
            f"row {wrong[0]} has the position ({x[wrong[0]]}, {y[wrong[0]]}), and {wrong.size - 1} "
            "more rows are not finite; remove rows without a place before making folds"
        )
    return np.column_stack([x, y])


def spatial_blocks(
    x_m: ArrayLike,
    y_m: ArrayLike,
    *,
    block_m: float,
    folds: int,
    seed: int,
    weight: ArrayLike | None = None,
) -> NDArray[np.int64]:
    """Assign points to folds by whole square blocks, balanced on presences.

    Blocks are squares of `block_m` anchored at the CRS's origin. In a random order that favours
    heavy blocks, each goes to the fold that is lightest so far (blockCV, Valavi et al. 2019,
    balances likewise; five folds are its default). Blocks without weight follow, to the fold
    with the fewest rows.

    Args:
        x_m: Eastings in metres, shape (N,).
        y_m: Northings in metres, shape (N,).
        block_m: Side of a block in metres.
        folds: How many folds, at least 2.
        seed: Same seed, same folds.
        weight: What to balance, shape (N,), for example 1 for a presence and 0 for background;
            1 everywhere by default.

    Returns:
        Fold of each point, 0 to `folds` - 1, shape (N,). Every fold has some weight.

    Raises:
        ObservationsError: Fewer blocks with weight than folds, or an argument out of range.
    """
    points = _positions(x_m, y_m)
    if folds < 2:
        raise ObservationsError(f"{folds} folds cannot hold anything out; ask for at least 2")
    if not block_m > 0:
        raise ObservationsError(f"a block of {block_m} m has no area; give a side above 0 m")
    load = np.ones(len(points)) if weight is None else np.asarray(weight, dtype=np.float64)
    if load.shape != (len(points),) or not np.all(np.isfinite(load)) or np.any(load < 0):
        raise ObservationsError(
            f"weights of shape {load.shape} do not fit {len(points)} points; "
            "give one finite number of 0 or more per point"
        )

    corners = np.floor(points / block_m).astype(np.int64)
    _, block = np.unique(corners, axis=0, return_inverse=True)
    block = block.reshape(-1)
    rows_of_block = np.bincount(block)
    load_of_block = np.bincount(block, weights=load)
    loaded = int(np.count_nonzero(load_of_block))
    if loaded < folds:
        raise ObservationsError(
            f"only {loaded} blocks of {block_m:g} m hold presences, fewer than {folds} folds; "
            "use smaller blocks or fewer folds"
        )

    rng = np.random.default_rng(seed)
    jitter = rng.lognormal(sigma=0.5, size=len(load_of_block))
    order = np.lexsort((-rows_of_block * jitter, -load_of_block * jitter))
    fold_of_block = np.empty(len(order), dtype=np.int64)
    fold_load = np.zeros(folds)
    fold_rows = np.zeros(folds, dtype=np.int64)
    for b in order:
        if load_of_block[b] > 0:
            k = int(np.lexsort((fold_rows, fold_load))[0])
        else:
            k = int(np.argmin(fold_rows))
        fold_of_block[b] = k
        fold_load[k] += load_of_block[b]
        fold_rows[k] += rows_of_block[b]
    return fold_of_block[block]  # (N,)


def kmeans_folds(x_m: ArrayLike, y_m: ArrayLike, *, folds: int, seed: int) -> NDArray[np.int64]:
    """Assign points to folds by k-means clusters of their positions.

    Each fold is one region (blockCV's `cv_cluster`, Valavi et al. 2019), so that testing asks for
    places farther from training than blocks do; folds differ in size.

    Args:
        x_m: Eastings in metres, shape (N,).
        y_m: Northings in metres, shape (N,).
        folds: How many folds, at least 2.
        seed: Same seed, same folds.

    Returns:
        Fold of each point, 0 to `folds` - 1, shape (N,). No fold is empty.

    Raises:
        ObservationsError: Fewer distinct places, to the nearest metre, than folds, or an argument
            out of range.
    """
    points = _positions(x_m, y_m).round()
    _enough(points, folds)
    return _clusters(points, folds, seed)


def knndm(
    x_m: ArrayLike,
    y_m: ArrayLike,
    area_x_m: ArrayLike,
    area_y_m: ArrayLike,
    *,
    folds: int,
    seed: int,
) -> NDArray[np.int64]:
    """Assign points to folds so that testing is as far from training as mapping will be.

    k-fold nearest-neighbour-distance matching (Linnenbrink et al. 2024, section 2): positions are
    clustered ever more finely, clusters are dealt to folds in their order along the first principal
    component, and of all these candidates, a random assignment among them, the one is taken whose
    distances from held-out points to training points are nearest, by Wasserstein's W, to those from
    the prediction area to all points. Candidates with more than half of the points in one fold are
    left out, as there (three quarters where there are two folds); clusters are k-means, one of the
    two kinds there.

    Args:
        x_m: Eastings in metres, shape (N,).
        y_m: Northings in metres, shape (N,).
        area_x_m: Eastings of places drawn uniformly from the area to be mapped, shape (P,).
        area_y_m: Their northings, shape (P,).
        folds: How many folds, at least 2.
        seed: Same seed, same folds.

    Returns:
        Fold of each point, 0 to `folds` - 1, shape (N,). No fold is empty.

    Raises:
        ObservationsError: Fewer distinct places, to the nearest metre, than folds, no place in the
            area, or an argument out of range.
    """
    from scipy.stats import wasserstein_distance

    points, area = _positions(x_m, y_m).round(), _positions(area_x_m, area_y_m)
    distinct = _enough(points, folds)
    if not len(area):
        raise ObservationsError("the prediction area has no place; give some to match distances to")
    wanted, _ = cKDTree(points).query(area)
    rng = np.random.default_rng(seed)
    best = rng.permutation(np.arange(len(points)) % folds)
    least = wasserstein_distance(fold_distances(points, best), wanted)
    for count in np.unique(np.geomspace(folds, max(folds, distinct // 2), CANDIDATES).astype(int)):
        fold = _dealt(points, _clusters(points, int(count), seed), folds)
        if np.bincount(fold).max() > len(points) * max(0.5, 1.5 / folds):
            continue
        distance = wasserstein_distance(fold_distances(points, fold), wanted)
        if distance < least:
            best, least = fold, distance
    return best


def fold_distances(points: NDArray[np.float64], fold: NDArray[np.int64]) -> NDArray[np.float64]:
    """Distance of each point to the nearest one of another fold.

    Args:
        points: Positions in metres, shape (N, 2).
        fold: Fold of each point, shape (N,).

    Returns:
        In metres, shape (N,); infinite where there is no other fold.
    """
    distance = np.full(len(points), np.inf)
    for k in np.unique(fold):
        held_out = fold == k
        if not held_out.all():
            distance[held_out], _ = cKDTree(points[~held_out]).query(points[held_out])
    return distance  # (N,)


def nearest_fold(
    x_m: ArrayLike, y_m: ArrayLike, fold: ArrayLike, other_x_m: ArrayLike, other_y_m: ArrayLike
) -> NDArray[np.int64]:
    """Give other places, such as background, the fold of the point nearest to each.

    Args:
        x_m: Eastings of the points in metres, shape (N,).
        y_m: Northings, shape (N,).
        fold: Their folds, shape (N,).
        other_x_m: Eastings of the other places, shape (M,).
        other_y_m: Their northings, shape (M,).

    Returns:
        Shape (M,).

    Raises:
        ObservationsError: A position is not finite.
    """
    _, nearest = cKDTree(_positions(x_m, y_m)).query(_positions(other_x_m, other_y_m))
    found: NDArray[np.int64] = np.asarray(fold, dtype=np.int64)[nearest]
    return found  # (M,)


def _enough(points: NDArray[np.float64], folds: int) -> int:
    """How many distinct places there are; fewer than folds are refused."""
    distinct = len(np.unique(points, axis=0))
    if folds < 2:
        raise ObservationsError(f"{folds} folds cannot hold anything out; ask for at least 2")
    if distinct < folds:
        raise ObservationsError(
            f"{distinct} distinct places cannot make {folds} folds; use fewer folds"
        )
    return distinct


def _clusters(points: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
    """Numbers of k-means clusters, none of them empty, shape (N,)."""
    from sklearn.cluster import KMeans

    centred = points - points.mean(axis=0)  # northings of millions would cost digits
    labels = KMeans(count, n_init=3 if count < 50 else 1, random_state=seed).fit_predict(centred)
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _dealt(
    points: NDArray[np.float64], cluster: NDArray[np.int64], folds: int
) -> NDArray[np.int64]:
    """Deal clusters to folds in their order along the first principal component, shape (N,)."""
    size = np.bincount(cluster)
    centres = np.column_stack([np.bincount(cluster, weights=axis) / size for axis in points.T])
    centred = centres - centres.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    rank = np.argsort(np.argsort(centred @ axes[0], kind="stable"), kind="stable")
    fold: NDArray[np.int64] = rank[cluster] % folds
    return fold


def separated(
    x_m: ArrayLike, y_m: ArrayLike, fold: ArrayLike, k: int, window_m: float
) -> NDArray[np.bool_]:
    """Select the training rows of a fold whose windows share no ground with its test windows.

    Windows are squares of side `window_m` centred on the points, parallel to the axes; two of
    them overlap when both |dx| and |dy| are less than `window_m`. Windows cut from a raster are
    centred to the nearest half pixel: add one pixel's side to `window_m` to be exact there too,
    and turn positions to the raster's axes where it is rotated.

    Args:
        x_m: Eastings in metres, shape (N,).
        y_m: Northings in metres, shape (N,).
        fold: Fold of each point, shape (N,).
        k: The test fold.
        window_m: Side of a window on the ground, in metres.

    Returns:
        True for rows to train on, shape (N,): not in fold `k` and clear of all its windows.

    Raises:
        ObservationsError: The arrays differ in length or a position is not finite.
    """
    points = _positions(x_m, y_m)
    folds = np.asarray(fold, dtype=np.int64)
    if folds.shape != (len(points),):
        raise ObservationsError(
            f"{folds.shape} fold ids for {len(points)} points; give one fold id per point"
        )
    held_out: NDArray[np.bool_] = folds == k
    training = ~held_out
    if held_out.any() and training.any():
        nearest, _ = cKDTree(points[held_out]).query(points[training], p=np.inf)
        training[training] = nearest >= window_m
    return training  # (N,)
