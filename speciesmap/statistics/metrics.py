"""Measures of maps: discrimination, calibration, thresholds; and of naming, how much is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import average_precision_score, roc_curve

RELIABILITY_BINS = 10


def auc(present: ArrayLike, score: ArrayLike) -> float | None:
    """Area under the ROC curve, or None where only one class is there.

    The share of pairs of a presence and another place that the score ranks rightly, ties counting
    half (Hanley & McNeil 1982): from the sum of the presences' ranks.
    """
    present, score = np.asarray(present, bool), np.asarray(score, np.float64)
    here = int(present.sum())
    away = len(present) - here
    if not here or not away:
        return None
    if np.isnan(score).any():
        raise ValueError("a score is not a number")
    ranks = rankdata(score)
    return float((ranks[present].sum() - here * (here + 1) / 2) / (here * away))


def average_precision(present: ArrayLike, score: ArrayLike) -> float | None:
    """Precision averaged over recall; its chance level is the base rate. None without presences."""
    present = np.asarray(present, bool)
    return float(average_precision_score(present, score)) if present.any() else None


def boyce(presences: ArrayLike, background: ArrayLike) -> float | None:
    """Continuous Boyce index: do presences grow denser as the prediction rises?

    Spearman's correlation between a window's position on the scale of the prediction and the
    ratio of the share of presences to the share of background inside it (Hirzel et al. 2006).
    Windows without background are left out; of successive equal ratios the last is kept. As in
    `ecospat.boyce`, a window is a tenth of the range of all predictions wide, and takes 100 steps.

    Args:
        presences: Predictions at presences, shape (N,).
        background: Predictions over the study area, shape (M,).

    Returns:
        From -1 (presences avoid high values) over 0 (chance) to 1; None where either set is
        empty or the predictions or the ratios do not vary.
    """
    here = np.sort(np.asarray(presences, np.float64))
    away = np.sort(np.asarray(background, np.float64))
    if not len(here) or not len(away):
        return None
    low, high = min(here[0], away[0]), max(here[-1], away[-1])
    if not high > low:
        return None
    width = 0.1 * (high - low)
    start = np.linspace(low, high - width, 101)
    stop = start + width
    stop[-1] = high

    def share(values: NDArray[np.float64]) -> NDArray[np.float64]:
        inside = np.searchsorted(values, stop, "right") - np.searchsorted(values, start, "left")
        return np.asarray(inside / len(values), np.float64)

    expected, found = share(away), share(here)
    filled = expected > 0
    ratio, position = found[filled] / expected[filled], start[filled]
    last = np.append(ratio[1:] != ratio[:-1], True)
    ratio, position = ratio[last], position[last]
    if len(ratio) < 3:
        return None
    return float(spearmanr(position, ratio).statistic)


def true_skill(present: ArrayLike, score: ArrayLike, threshold: float) -> float | None:
    """Sensitivity plus specificity minus 1 of `score >= threshold` (Allouche et al. 2006)."""
    present, chosen = np.asarray(present, bool), np.asarray(score) >= threshold
    if present.all() or not present.any():
        return None
    return float(chosen[present].mean() - chosen[~present].mean())


def best_threshold(present: ArrayLike, score: ArrayLike) -> float:
    """Threshold of maximum sensitivity plus specificity, the highest where several tie."""
    false_rate, true_rate, thresholds = roc_curve(np.asarray(present, bool), score)
    return float(thresholds[1:][np.argmax((true_rate - false_rate)[1:])])


def omission(presences: ArrayLike, threshold: float) -> float | None:
    """Share of presences below a threshold; None without presences."""
    values = np.asarray(presences)
    return float((values < threshold).mean()) if values.size else None


def brier_skill(present: ArrayLike, probability: ArrayLike) -> float | None:
    """How much lower the mean squared error is than that of always saying the base rate.

    Returns:
        1 for a perfect forecast, 0 for the base rate, below 0 for worse; None where only one
        class is there.
    """
    truth = np.asarray(present, np.float64)
    reference = truth.var()
    if reference == 0:
        return None
    return float(1 - np.mean((np.asarray(probability) - truth) ** 2) / reference)


def reliability(
    present: ArrayLike, probability: ArrayLike, bins: int = RELIABILITY_BINS
) -> pd.DataFrame:
    """Compare predicted with observed frequency in bins of equal width.

    Args:
        present: Shape (N,).
        probability: In [0, 1], shape (N,).
        bins: How many; a value on an edge belongs to the upper bin.

    Returns:
        A row for each bin that holds places: `lower`, `upper`, `count`, mean `predicted`, and
        `observed` frequency.
    """
    truth, said = np.asarray(present, np.float64), np.asarray(probability, np.float64)
    which = np.clip((said * bins).astype(np.int64), 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    filled = np.flatnonzero(count)
    return pd.DataFrame(
        {
            "lower": filled / bins,
            "upper": (filled + 1) / bins,
            "count": count[filled],
            "predicted": np.bincount(which, said, bins)[filled] / count[filled],
            "observed": np.bincount(which, truth, bins)[filled] / count[filled],
        }
    )


def calibration_error(present: ArrayLike, probability: ArrayLike) -> float | None:
    """Expected calibration error (Naeini et al. 2015): mean gap of the bins of `reliability`.

    Returns:
        From 0 to 1, weighted by the places in each bin; None without places.
    """
    table = reliability(present, probability)
    if table.empty:
        return None
    gap = (table["predicted"] - table["observed"]).abs()
    return float(np.average(gap, weights=table["count"]))


def measure(
    present: ArrayLike, score: ArrayLike, threshold: float, *, probability: bool
) -> dict[str, Any]:
    """All measures of one map at places that its model did not see.

    Args:
        present: Presence against background, or against surveyed absence, shape (N,).
        score: Shape (N,).
        threshold: Fixed beforehand, on other places.
        probability: Whether scores are probabilities of the very labels in `present`; only then
            do `brier_skill` and `calibration_error` mean something, and they are None otherwise.

    Returns:
        `auc`, `average_precision`, `boyce`, `tss`, `omission`, `brier_skill`,
        `calibration_error`, `presences` and `places`; a measure that the data do not allow is
        None.
    """
    present, score = np.asarray(present, bool), np.asarray(score, np.float64)
    return {
        "auc": auc(present, score),
        "average_precision": average_precision(present, score),
        "boyce": boyce(score[present], score[~present]),
        "tss": true_skill(present, score, threshold),
        "omission": omission(score[present], threshold),
        "brier_skill": brier_skill(present, score) if probability else None,
        "calibration_error": calibration_error(present, score) if probability else None,
        "presences": int(present.sum()),
        "places": len(present),
    }


def paired_difference(ours: ArrayLike, theirs: ArrayLike) -> dict[str, float | int | None]:
    """Mean of paired differences and its standard error.

    Args:
        ours: One figure per species or fold, shape (N,); pairs with a NaN are left out.
        theirs: Shape (N,), in the same order.

    Returns:
        `difference`, `standard_error` (None below two pairs), `pairs`, and `better`, the number
        of pairs in which ours is higher.
    """
    gap = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    gap = gap[np.isfinite(gap)]
    return {
        "difference": float(gap.mean()) if gap.size else None,
        "standard_error": float(gap.std(ddof=1) / np.sqrt(gap.size)) if gap.size > 1 else None,
        "pairs": int(gap.size),
        "better": int((gap > 0).sum()),
    }


def classification_figures(
    scores: NDArray[np.float64],
    label: NDArray[np.int64],
    observation: ArrayLike,
    counts: NDArray[np.int64],
    frequent_from: int = 100,
    common_from: int = 20,
) -> dict[str, float | None]:
    """Figures of merit as CRISP's evaluation has them.

    The photos of one observation vote by the mean of their log-probabilities. Species-averaged
    figures are the mean over taxa of the share of their observations that are right.

    Args:
        scores: Log-probabilities, shape (N, T).
        label: Shape (N,).
        observation: What tells the rows of one observation, shape (N,).
        counts: Training observations of each taxon, shape (T,).
        frequent_from: Fewest training observations of a frequent taxon.
        common_from: Fewest training observations of a common taxon; others are rare.

    Returns:
        `top1`, `top5` over observations; `species_top1`, `species_top5`, `species_top30`, also of
        `frequent_`, `common_` and `rare_` taxa (None where no such taxon is tested).
    """
    _, first, member = np.unique(np.asarray(observation), return_index=True, return_inverse=True)
    summed = np.zeros((len(first), scores.shape[1]))
    np.add.at(summed, member, scores)
    scores = summed / np.bincount(member)[:, None]  # (O, T)
    label = label[first]
    own = scores[np.arange(len(label)), label]
    rank = (scores >= own[:, None]).sum(1) - 1  # ties count against
    tested = np.bincount(label, minlength=len(counts))
    there = tested > 0
    groups = {
        "": there,
        "frequent_": there & (counts >= frequent_from),
        "common_": there & (counts < frequent_from) & (counts >= common_from),
        "rare_": there & (counts < min(common_from, frequent_from)),
    }
    figures: dict[str, float | None] = {f"top{k}": float((rank < k).mean()) for k in (1, 5)}
    for prefix, group in groups.items():
        for k in (1, 5, 30):
            right = np.bincount(label, rank < k, len(counts))[group] / tested[group]
            figures[f"{prefix}species_top{k}"] = float(right.mean()) if group.any() else None
    return figures
