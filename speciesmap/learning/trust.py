"""How far maps can be trusted, measured once at training and kept in the checkpoint.

Uncertainty is the spread of heads fitted to parts of the training data: each leaves out one
spatial fold and draws the rest with replacement by its own seed. They are fitted on the final
encoder's embeddings, not on those of an encoder fine-tuned anew for each part, so that all of them
read the one store that maps are made from. What the encoder itself would have learned otherwise is
therefore not in the spread: with a fine-tuned encoder it is a lower bound.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from speciesmap.errors import ObservationsError
from speciesmap.learning.distribution import Records, choose_penalty, fit_linear
from speciesmap.learning.evaluate import FEWEST, Calibration
from speciesmap.learning.metrics import best_threshold
from speciesmap.mapping.applicability import learn_applicability
from speciesmap.models import SpeciesModel
from speciesmap.models.trust import Trust
from speciesmap.taxa import Taxon

SEEDS = 2  # members per fold
ROWS = 20_000  # places that members are fitted to, at most
CHOOSING = 4_000  # places that their penalty is chosen on, at most
COLUMNS = ("lon", "lat", "taxon", "present")

log = logging.getLogger("speciesmap")


def measure_trust(
    model: SpeciesModel,
    here: Tensor,
    labels: NDArray[np.int64],
    away: Tensor,
    fold: ArrayLike | None,
    held_out: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    curves: Mapping[str, tuple[list[float], list[float]]],
    seed: int,
    covariates: Tensor | None = None,
) -> Trust:
    """Measure a fine-tuned and calibrated model.

    Args:
        model: Whose head gives the maps.
        here: What its heads read at the presences, shape (N, D), or (N, D + F) with covariates.
        labels: Their taxa, shape (N,).
        away: Of the background, shape (M, D).
        fold: Spatial fold of presences, then background, shape (N + M,). Without folds members
            leave out fifths at random, and each place is a fold for the applicability.
        held_out: Values of the map, by taxon, at presences and at background, where possible by
            models that did not see them; thresholds are read from these.
        curves: Isotonic calibrations.
        seed: Of all that is random.
        covariates: At presences, then background, in standard deviations, shape (N + M, S).
    """
    rng = np.random.default_rng(seed)
    everything = torch.cat([here, away])
    parts = rng.integers(0, 5, len(everything)) if fold is None else np.asarray(fold)
    weight, offset = members(model, here, labels, away, parts, rng)
    names = [taxon.name for taxon in model.taxa]
    return Trust(
        weight,
        offset,
        learn_applicability(
            everything[:, : model.dim],
            np.arange(len(everything)) if fold is None else parts,
            rng,
            covariates,
        ),
        {name: thresholds(*held_out[name]) for name in names if len(held_out[name][0])},
        dict(curves),
        {name: int((labels == k).sum()) for k, name in enumerate(names)},
    )


def thresholds(presences: NDArray[np.float64], background: NDArray[np.float64]) -> dict[str, float]:
    """Bounds of a range: the default first.

    The 5th and the 10th percentile of presences, and the maximum of sensitivity plus specificity,
    which with background in the place of absences chooses as it would with them (Liu et al.
    2016).
    """
    present = np.arange(len(presences) + len(background)) < len(presences)
    bounds = {
        "5th percentile of presences": float(np.quantile(presences, 0.05, method="lower")),
        "10th percentile of presences": float(np.quantile(presences, 0.10, method="lower")),
    }
    if len(background):
        values = np.concatenate([presences, background])
        bounds["maximum sensitivity plus specificity"] = best_threshold(present, values)
    return bounds


def members(
    model: SpeciesModel,
    here: Tensor,
    labels: NDArray[np.int64],
    away: Tensor,
    fold: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Fit heads to parts of the data and bring them to the scale of the map.

    A member's logits over the background get the mean and the standard deviation that the map's
    have there, so that the spread is of where a taxon lives, not of how common it is.

    Returns:
        Weights of shape (T, M, D) and offsets of shape (T, M), in logits of the map.
    """
    taxa = len(model.taxa)
    taxon = np.r_[labels, np.full(len(away), -1)]
    vectors = torch.cat([here, away]).float()
    chosen = np.sort(rng.permutation(len(vectors))[:ROWS])
    taxon, vectors, fold = taxon[chosen], vectors[torch.from_numpy(chosen)], fold[chosen]
    presences = (taxon[:, None] == np.arange(taxa)).astype(np.float32)  # (N, T)
    features = vectors.numpy()
    records = Records(features, presences, 1 - presences)
    some = np.zeros(len(taxon), bool)
    some[rng.permutation(len(taxon))[:CHOOSING]] = True
    loss: Literal["assume_negative"] = "assume_negative"
    penalty = choose_penalty(records.subset(some), fold[some], loss=loss)
    with torch.inference_mode():
        mapped = model.head(away.float())  # (M, T)
    centre, spread = mapped.mean(0), mapped.std(0, correction=0)  # (T,)
    weights, offsets = [], []
    for k in np.unique(fold):
        rest = np.flatnonzero(fold != k)
        for _ in range(SEEDS):
            drawn = rng.choice(rest, len(rest))
            part = Records(features[drawn], presences[drawn], 1 - presences[drawn])
            weight, offset = fit_linear(part, penalty, loss=loss).linear()  # (T, D), (T,)
            logits = away.float() @ weight.T + offset  # (M, T)
            gain = spread / logits.std(0, correction=0).clamp(min=1e-6)
            weights.append(weight * gain[:, None])
            offsets.append((offset - logits.mean(0)) * gain + centre)
    return torch.stack(weights, 1), torch.stack(offsets, 1)  # (T, M, D), (T, M)


def read_surveys(path: Path | str) -> pd.DataFrame:
    """Read a presence-absence table: `lon`, `lat`, `taxon`, `present`; CSV or Parquet.

    Raises:
        ObservationsError: It cannot be read, a column is missing, or a value makes no sense.
    """
    path = Path(path)
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ObservationsError(
            f"surveys {path} cannot be read ({reason}); give a CSV or Parquet table with the "
            f"columns {', '.join(COLUMNS)}"
        ) from error
    lacking = [name for name in COLUMNS if name not in table]
    if lacking:
        raise ObservationsError(
            f"surveys {path} lack the column {lacking[0]!r}; they need {', '.join(COLUMNS)}"
        )
    wrong = ~table["present"].isin([0, 1])
    for name in ("lon", "lat"):
        table[name] = pd.to_numeric(table[name], errors="coerce")
        wrong |= ~np.isfinite(table[name])
    if wrong.any():
        raise ObservationsError(
            f"surveys {path} row {int(np.flatnonzero(wrong)[0])} has no position or a `present` "
            "other than 0 and 1; mend or remove it"
        )
    return table.astype({"present": bool, "taxon": str})


def clear_of(
    rows: NDArray[np.float64],
    cols: NDArray[np.float64],
    trained_rows: NDArray[np.float64],
    trained_cols: NDArray[np.float64],
    window_px: int,
) -> NDArray[np.bool_]:
    """Which places' windows share no ground with those of places trained on, shape (N,)."""
    tree = cKDTree(np.column_stack([trained_rows, trained_cols]))
    nearest, _ = tree.query(np.column_stack([rows, cols]), p=np.inf)
    return np.asarray(nearest >= window_px + 1)


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
