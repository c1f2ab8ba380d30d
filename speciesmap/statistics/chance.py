"""What a map must beat before it says anything: chance, and null maps.

Observers crowd along roads, and roads can be seen from above, so that records of a taxon that
follows nothing visible are told from random places better than by a coin. Raes & ter Steege (2007,
Ecography 30:727) compare the map of a taxon with null maps: as many records are drawn at random
from all places where its group was recorded, and have the observers' habits and no taxon's habitat.
A map that does no better than 95 of 100 such maps is called uninformative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

from speciesmap.statistics.metrics import auc
from speciesmap.statistics.regression import Loss, Records, choose_penalty, fit_linear

MAPS = 40  # null maps of each number of records
LEVEL = 0.95
NEAR = 1.25  # a number of records is as good as another within this factor


def better_than_chance(by_fold: Sequence[float | None]) -> bool | None:
    """Whether folds' AUCs are above 0.5: a one-sided t-test at 5%; None with fewer than two folds.

    Folds share training rows, so the test is a little too ready to say yes.
    """
    known = np.array([value for value in by_fold if value is not None])
    if len(known) < 2:
        return None
    bound = known.mean() - t.ppf(0.95, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known))
    return bool(bound > 0.5)


def informative(by_fold: Mapping[str, Sequence[float | None]], bound: float | None) -> bool | None:
    """Whether a taxon's map says more than null maps do, or than chance where there are none.

    Args:
        by_fold: AUC of each fold against each kind of background, `random` and `target-group`.
        bound: What null maps of as many records stay below, if any, against random background.

    Returns:
        Whether the mean over folds is above the bound. Without one, whether the folds tell the map
        from chance against every kind of background; None where they cannot say.
    """
    known = [value for value in by_fold.get("random", []) if value is not None]
    if bound is not None and known:
        return bool(np.mean(known) > bound)
    verdicts = [better_than_chance(values) for values in by_fold.values()]
    return None if not verdicts or None in verdicts else all(verdicts)


def fold_auc(present: ArrayLike, score: ArrayLike, fold: ArrayLike) -> dict[str, Any]:
    """AUC of held-out scores, pooled and by fold.

    Args:
        present: Shape (N,), bool.
        score: From a model that did not see the row, shape (N,).
        fold: Shape (N,).

    Returns:
        `auc`, `auc_folds`, `auc_mean` and `auc_sd` over folds, and `presences`.
    """
    present, score, fold = np.asarray(present, bool), np.asarray(score), np.asarray(fold)
    by_fold = [auc(present[fold == k], score[fold == k]) for k in np.unique(fold)]
    known = [value for value in by_fold if value is not None]
    return {
        "auc": auc(present, score),
        "auc_mean": float(np.mean(known)) if known else None,
        "auc_sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "auc_folds": by_fold,
        "presences": int(present.sum()),
    }


def draw_null_maps(
    group: NDArray[np.bool_], counts: Sequence[int], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw the records of null maps, 40 for every number of records within a fifth.

    Taxa with more than half as many records as the group has places get none: theirs would be
    their own map.

    Args:
        group: Rows that are places of the group, shape (N,).
        counts: Records of each taxon.
        rng: Source of randomness.

    Returns:
        The records of each null map, shape (N, M).
    """
    places = np.flatnonzero(group)
    sizes = sorted({_class(n) for n in counts if 0 < 2 * n <= len(places)})
    drawn = np.zeros((len(group), MAPS * len(sizes)), bool)
    for column, size in enumerate(np.repeat(sizes, MAPS)):
        drawn[rng.choice(places, min(size, len(places)), replace=False), column] = True
    return drawn  # (N, M)


def null_scores(
    trained: Records,
    held_out: NDArray[np.float32],
    penalty: float | None,
    fold: NDArray[np.int64],
    loss: Loss,
) -> NDArray[np.float32]:
    """Fit null maps by linear heads, and score held-out places.

    Args:
        trained: Places to train on, with the records of each null map in the place of a taxon's.
        held_out: Features of other places, shape (n, D).
        penalty: Of the taxa's own heads; chosen on the null maps where they have none.
        fold: Of the places trained on, shape (N,).
        loss: Of the taxa's own heads.

    Returns:
        Logits, shape (n, M).
    """
    if penalty is None:
        penalty = choose_penalty(trained, fold, rng=np.random.default_rng(0), loss=loss)
    return fit_linear(trained, penalty, loss=loss).logits(held_out)  # (n, M)


def null_bounds(
    drawn: NDArray[np.bool_],
    score: NDArray[np.floating],
    away: NDArray[np.bool_],
    fold: NDArray[np.int64],
) -> dict[int, float]:
    """AUC that 95 of 100 null maps stay below, by their number of records.

    From the mean and the spread of those drawn, each a mean over folds against background.

    Args:
        drawn: Records of each null map, shape (N, M).
        score: Held-out scores of each, shape (N, M).
        away: Rows of random background, shape (N,).
        fold: Shape (N,).
    """
    size = drawn.sum(0)
    found: dict[int, float] = {}
    for records in np.unique(size):
        means = []
        for k in np.flatnonzero(size == records):
            part = drawn[:, k] | away
            mean = fold_auc(drawn[part, k], score[part, k], fold[part])["auc_mean"]
            if mean is not None:
                means.append(mean)
        if len(means) > 1:
            spread = float(np.std(means, ddof=1))
            found[int(records)] = float(np.mean(means)) + float(norm.ppf(LEVEL)) * spread
    return found


def bound_for(bounds: Mapping[int, float], records: int) -> float | None:
    """The bound of null maps with as many records; None without them."""
    near = [size for size in bounds if 1 / NEAR <= size / max(records, 1) <= NEAR]
    return bounds[min(near, key=lambda size: abs(np.log(size / records)))] if near else None


def _class(records: int) -> int:
    """The nearest whole power of the root of two."""
    return round(2 ** (round(2 * math.log2(records)) / 2))
