"""How far maps can be trusted, measured once at training and kept in the checkpoint.

Uncertainty is the spread of heads fitted to parts of the training data: each leaves out one
spatial fold and draws the rest with replacement by its own seed. They are fitted on the final
encoder's embeddings, not on those of an encoder fine-tuned anew for each part, so that all of them
read the one store that maps are made from. What the encoder itself would have learned otherwise is
therefore not in the spread: with a fine-tuned encoder it is a lower bound.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from speciesmap.mapping.applicability import learn_applicability
from speciesmap.models import SpeciesModel
from speciesmap.models.trust import Trust
from speciesmap.statistics.metrics import best_threshold
from speciesmap.statistics.regression import Records, choose_penalty, fit_linear

SEEDS = 2  # members per fold
ROWS = 20_000  # places that members are fitted to, at most

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
    loss: Literal["assume_negative"] = "assume_negative"
    penalty = choose_penalty(records, fold, rng=rng, loss=loss)
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
