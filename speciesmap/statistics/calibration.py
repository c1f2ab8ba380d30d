"""What logits mean: probabilities, where a prevalence or surveys say how common a taxon is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import expit, log_expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

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


def calibrate_on_surveys(
    logits: NDArray[np.float64],
    surveys: pd.DataFrame,
    taxa: Sequence[Taxon],
    method: Literal["platt", "isotonic"],
) -> tuple[dict[str, Calibration], dict[str, tuple[list[float], list[float]]]]:
    """Calibrate against surveyed presence and absence.

    Platt's logistic curve (1999) needs few sites; isotonic regression (Zadrozny & Elkan 2002)
    follows any rising curve and wants some hundred.

    Args:
        logits: Of each taxon at each row's place, shape (rows, T).
        surveys: What `read_surveys` gives, of places that training did not see.
        taxa: What the columns of `logits` are.
        method: Which.

    Returns:
        By name of taxon, logistic recalibrations and, for isotonic regression, curves from
        `sigmoid(logit)` to probability. Taxa with fewer than 10 surveyed presences or absences,
        or whose map falls where presence rises, are left out, and said to be.
    """
    found, curves = {}, {}
    for k, taxon in enumerate(taxa):
        own = (surveys["taxon"] == taxon.name).to_numpy()
        present = surveys["present"].to_numpy()[own]
        if min(present.sum(), (~present).sum()) < FEWEST:
            log.warning("%s has too few surveyed sites to be calibrated on", taxon.name)
            continue
        score = logits[own, k]
        fitted = LogisticRegression(C=1e6).fit(score[:, None], present)
        slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
        if slope <= 0:
            log.warning("%s is not calibrated: surveys contradict its map", taxon.name)
            continue
        share = float(present.mean())
        if method == "platt":
            found[taxon.name] = Calibration(slope, intercept, share)
        else:
            steps = IsotonicRegression(y_min=0, y_max=1).fit(expit(score), present)
            found[taxon.name] = Calibration(1.0, 0.0, share)
            curves[taxon.name] = (steps.X_thresholds_.tolist(), steps.y_thresholds_.tolist())
    return found, curves
