"""Rivals that need no learned features, on the same rows and folds as the models they stand beside.

Two questions of a sceptic: does a map say more than where the records lie, and more than band means
and textures say?
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from speciesmap.learning.data import Places
from speciesmap.observations.folds import separated


def window_statistics(places: Places) -> NDArray[np.float64]:
    """Mean, standard deviation and mean absolute gradient down and across, band by band.

    Args:
        places: Where to look.

    Returns:
        Shape (N, 4 * B).
    """
    parts = []
    for chosen in np.array_split(np.arange(len(places)), len(places) // 256 + 1):
        pixels = places.aerial(chosen).numpy().astype(np.float64)  # (n, B, P, P)
        down, across = np.diff(pixels, axis=2), np.diff(pixels, axis=3)
        statistics = [
            pixels.mean((2, 3)),
            pixels.std((2, 3)),
            np.abs(down).mean((2, 3)),
            np.abs(across).mean((2, 3)),
        ]
        parts.append(np.concatenate(statistics, axis=1))  # (n, 4 * B)
    return np.concatenate(parts)


def positions(places: Places) -> NDArray[np.float64]:
    """Row and column, shape (N, 2)."""
    return np.column_stack([places.rows, places.cols])


def logistic() -> Pipeline:
    """Logistic regression with both classes weighing the same, on standardised features."""
    return make_pipeline(
        StandardScaler(), LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000)
    )


def trend_surface() -> Pipeline:
    """Location only: logistic regression on a quadratic surface of the two coordinates."""
    return make_pipeline(
        StandardScaler(),
        PolynomialFeatures(2, include_bias=False),
        LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000),
    )


def fit_maxent(
    here: NDArray[np.float64], away: NDArray[np.float64], categorical: Sequence[int] = ()
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Fit elapid's MaxEnt with linear, quadratic and hinge features.

    Args:
        here: Covariates at presences, shape (N, C).
        away: Of the background, shape (M, C).
        categorical: Columns that name categories; one that was not seen in training adds nothing.

    Returns:
        Suitability (cloglog) of other places, shape (P,) from (P, C).
    """
    import elapid

    model = elapid.MaxentModel(feature_types=["linear", "quadratic", "hinge"], n_cpus=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(  # an array: of a data frame it tells categories by the columns' types alone
            np.concatenate([here, away]),
            np.r_[np.ones(len(here)), np.zeros(len(away))],
            categorical=list(categorical) or None,
        )
    if categorical:
        for encoder in model.transformer.estimators_["categorical"].estimators_:
            encoder.handle_unknown = "ignore"

    def suitability(places: NDArray[np.float64]) -> NDArray[np.float64]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(model.predict(places), np.float64)

    return suitability


def held_out_scores(
    features: NDArray[np.float64],
    present: NDArray[np.bool_],
    places: Places,
    fold: NDArray[np.int64],
    rival: Callable[[], Pipeline],
) -> NDArray[np.float64]:
    """Score each row by a rival that saw neither its fold nor any window that overlaps it.

    Args:
        features: Shape (N, F).
        present: Shape (N,).
        places: The rows' places, in order.
        fold: Fold of each row, shape (N,).
        rival: Makes an unfitted classifier.

    Returns:
        Log-odds, shape (N,).
    """
    scores = np.empty(len(present))
    for k in np.unique(fold):
        use = separated(places.cols, places.rows, fold, int(k), places.window_px + 1)
        fitted = rival().fit(features[use], present[use])
        held = fold == k
        scores[held] = fitted.decision_function(features[held])
    return scores


def trained_scores(
    features: NDArray[np.float64],
    present: NDArray[np.bool_],
    elsewhere: NDArray[np.float64],
    rival: Callable[[], Pipeline],
) -> NDArray[np.float64]:
    """Score other places by a rival trained on all rows, log-odds of shape (M,)."""
    scores: NDArray[np.float64] = rival().fit(features, present).decision_function(elsewhere)
    return scores


RIVALS: Sequence[tuple[str, Callable[[Places], NDArray[np.float64]], Callable[[], Pipeline]]] = (
    ("location only", positions, trend_surface),
    ("band means and textures", window_statistics, logistic),
)
