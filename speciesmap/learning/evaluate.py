"""How good a model is on places it never saw, and what its logits mean."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import expit, log_expit

from speciesmap.learning.chance import better_than_chance, bound_for, fold_auc
from speciesmap.taxa import Taxon

FEWEST = 10  # presences, and surveyed absences, that a calibration needs

log = logging.getLogger("speciesmap")


@dataclass(frozen=True)
class Calibration:
    """Logistic recalibration: probability is `sigmoid(slope * logit + intercept)`.

    Attributes:
        slope: Positive.
        intercept: In logits.
        prevalence: Stated share of places where the taxon is present.
    """

    slope: float
    intercept: float
    prevalence: float


def summarise(
    folds: pd.DataFrame,
    taxa: Sequence[Taxon],
    background: str = "random",
    bounds: Mapping[int, float] | None = None,
) -> dict[str, Any]:
    """Area under the ROC curve of held-out presences against held-out background.

    Args:
        folds: What `cross_validate` gives.
        taxa: Its taxa.
        background: The kind that the model was trained on.
        bounds: Of null maps of the same folds, by number of records, where there are any.

    Returns:
        For each taxon by name: `auc` over all folds' scores pooled, `auc_folds` one by one (None
        where a fold has no presence), `presences`, less those of folds whose training had none
        (a NaN score); and the pooled AUC against either kind of
        background, `auc_random` and `auc_target_group`. Without target-group places the records of
        the other taxa are these, one per place; of a single taxon it is None. `auc_null` is what
        null maps of as many records stay below against random background, and `informative` says
        whether the mean over folds is above it. Where there are no null maps to compare with, it
        says whether the folds tell the map from chance against both kinds of background; None
        where they cannot say.
    """
    kind = folds["background"].to_numpy()
    place = ~folds.duplicated(["longitude", "latitude"]).to_numpy()
    fold = folds["fold"].to_numpy()
    summary: dict[str, Any] = {}
    for taxon in taxa:
        score = folds[taxon.name].to_numpy()
        scored = np.isfinite(score)
        own = (folds["taxon"] == taxon.name).to_numpy()
        here = own & scored
        group = kind == "target-group"
        if not group.any():
            group = (kind == "") & ~own & place
        against = {"random": (kind == "random") & scored, "target-group": group & scored}
        judged = {
            name: fold_auc(here[here | away], score[here | away], fold[here | away])
            for name, away in against.items()
        }
        bound = bound_for(bounds or {}, int(own.sum()))
        mean = judged["random"]["auc_mean"]
        informative: bool | None
        if bound is not None and mean is not None:
            informative = bool(mean > bound)
        else:
            verdicts = [
                better_than_chance(judged[name]["auc_folds"])
                for name, away in against.items()
                if away.any()
            ]
            informative = None if not verdicts or None in verdicts else all(verdicts)
        summary[taxon.name] = {
            **judged[background],
            **{f"auc_{name.replace('-', '_')}": found["auc"] for name, found in judged.items()},
            "auc_null": bound,
            "informative": informative,
        }
    return summary


def calibrate(
    folds: pd.DataFrame, taxa: Sequence[Taxon], prevalence: float | dict[str, float] | None
) -> dict[str, Calibration]:
    """Calibrate held-out logits against stated prevalences.

    Presences are a sample of the places where a taxon is; background is a sample of all places,
    some of which it inhabits too. With the prevalence known, the probability follows from the
    likelihood of Lancaster & Imbens (1996, section 2) and Ward et al. (2009, equation 5): a row is
    a presence with odds `p * n1 / (prevalence * n0)`. It is then shifted so that its mean over
    the background is the prevalence.

    Args:
        folds: What `cross_validate` gives.
        taxa: Its taxa.
        prevalence: One for all, or by name; taxa without one stay uncalibrated.

    Returns:
        Calibrations by name of taxon; none of those with fewer than 10 held-out presences.
    """
    if prevalence is None:
        return {}
    stated = (
        prevalence
        if isinstance(prevalence, dict)
        else {taxon.name: float(prevalence) for taxon in taxa}
    )
    found = {}
    for taxon in taxa:
        logit = folds[taxon.name].to_numpy()
        away = (folds["taxon"] == "").to_numpy() & np.isfinite(logit)
        here = (folds["taxon"] == taxon.name).to_numpy() & np.isfinite(logit)
        if taxon.name not in stated:
            continue
        if here.sum() < FEWEST:
            log.warning(
                "%s has %d held-out presences, %d are needed to calibrate: its map is called "
                "suitability",
                taxon.name,
                here.sum(),
                FEWEST,
            )
            continue
        found[taxon.name] = _calibrate(logit[here], logit[away], stated[taxon.name])
    return found


def _calibrate(
    here: NDArray[np.float64], away: NDArray[np.float64], prevalence: float
) -> Calibration:
    ratio = np.log(len(here) / (prevalence * len(away)))

    def loss(parameters: NDArray[np.float64]) -> float:
        slope, intercept = np.exp(parameters[0]), parameters[1]
        odds_here = ratio + log_expit(slope * here + intercept)
        odds_away = ratio + log_expit(slope * away + intercept)
        return float(-log_expit(odds_here).sum() - log_expit(-odds_away).sum())

    start = np.array([0.0, np.log(prevalence / (1 - prevalence)) - away.mean()])
    fitted = minimize(loss, start, method="Nelder-Mead").x
    scaled = float(np.exp(fitted[0])) * away
    intercept = brentq(
        lambda shift: expit(scaled + shift).mean() - prevalence,
        -50.0 - scaled.max(),
        50.0 - scaled.min(),
    )
    return Calibration(float(np.exp(fitted[0])), intercept, prevalence)
