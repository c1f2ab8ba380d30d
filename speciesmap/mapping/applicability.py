"""Where a model has seen the like: the area of applicability in embedding space.

Meyer & Pebesma (2021, Methods in Ecology and Evolution 12:1620): the dissimilarity index of a place
is its distance to the nearest training place over the mean distance between training places. Its
threshold is the upper whisker of the index of the training places themselves, each measured to
those of other folds (their section 2.4; `CAST::trainDI`).

Distances are Euclidean between unit embeddings, in which no direction needs another weight: the
encoder was trained to make them mean likeness. For speed they are taken along the training
embeddings' first principal directions, with one further coordinate for the length of what those
leave over; a distance is never overstated by that.

Covariates of a model that reads some are further coordinates, in standard deviations and not
clamped; all together they vary as much over the training places as the embedding does.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from speciesmap.models.trust import Applicability

AXES = 32
PLACES = 1024  # training places that are kept


def learn_applicability(
    embeddings: Tensor,
    fold: ArrayLike,
    rng: np.random.Generator,
    covariates: Tensor | None = None,
) -> Applicability | None:
    """Measure the training places.

    Args:
        embeddings: Of presences and background trained on, shape (N, D).
        fold: Of each, shape (N,).
        rng: Picks the places that are kept, where there are more than 1,024.
        covariates: Theirs, in standard deviations, shape (N, S).

    Returns:
        The measure, or None where there is a single fold or all places are alike.
    """
    folds = np.asarray(fold)
    chosen = np.sort(rng.permutation(len(embeddings))[:PLACES])
    vectors, folds = embeddings[torch.from_numpy(chosen)].float(), folds[chosen]
    if len(np.unique(folds)) < 2:
        return None
    beside = 0.0
    if covariates is not None and covariates.shape[1]:
        there = covariates[torch.from_numpy(chosen)].float()
        varied = float(there.var(0, correction=0).sum())
        if varied > 0:
            beside = math.sqrt(float(vectors.var(0, correction=0).sum()) / varied)
        vectors = torch.cat([vectors, beside * there], 1)  # (R, D + S)
    centre = vectors.mean(0)  # (D,)
    count = min(AXES, len(vectors) - 1, vectors.shape[1])
    axes = torch.linalg.svd(vectors - centre, full_matrices=False)[2][:count]  # (P, D)
    places = _coordinates(vectors, centre, axes)  # (R, P + 1)
    between = torch.cdist(places, places)  # (R, R)
    mean = float(between.sum()) / (len(places) * (len(places) - 1))
    if not mean > 1e-6:
        return None
    same = torch.from_numpy(folds[:, None] == folds)
    index = (between.masked_fill(same, torch.inf).amin(1) / mean).numpy()  # (R,)
    lower, upper = np.quantile(index, [0.25, 0.75])
    whisker = index[index <= upper + 1.5 * (upper - lower)].max()
    return Applicability(centre, axes, places, mean, float(whisker), beside)


def dissimilarity(
    vectors: NDArray[np.floating],
    known: Applicability,
    covariates: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Dissimilarity index of places.

    Args:
        vectors: Unit embeddings, shape (..., D); NaN where nothing is known.
        known: The training places.
        covariates: In standard deviations, shape (..., S), of a model that reads some.

    Returns:
        0 or more, shape (...), NaN where the embedding is.
    """
    places = torch.from_numpy(np.ascontiguousarray(vectors)).reshape(-1, vectors.shape[-1]).float()
    if covariates is not None:
        there = torch.from_numpy(covariates).reshape(-1, covariates.shape[-1])
        places = torch.cat([places, known.beside * there], 1)  # (N, D + S)
    at = _coordinates(places, known.centre, known.axes)  # (N, P + 1)
    # by a matrix product: |a - b|^2 = |a|^2 - 2 ab + |b|^2
    squares = torch.addmm(known.places.square().sum(1), at, known.places.T, alpha=-2)  # (N, R)
    nearest = (squares.amin(1) + at.square().sum(1)).clamp(min=0).sqrt()  # (N,)
    return np.asarray((nearest / known.mean_distance).numpy().reshape(vectors.shape[:-1]))


def applicable(
    vectors: NDArray[np.floating],
    known: Applicability,
    covariates: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """1 inside the area of applicability, 0 outside, NaN where nothing is known, shape (...)."""
    index = dissimilarity(vectors, known, covariates)
    inside = (index <= known.threshold).astype(np.float32)
    return np.where(np.isnan(index), np.float32(np.nan), inside)


def _coordinates(vectors: Tensor, centre: Tensor, axes: Tensor) -> Tensor:
    along = torch.addmm(-(axes @ centre), vectors, axes.T)  # (N, P)
    whole = vectors.square().sum(1) - 2 * vectors @ centre + centre.square().sum()  # (N,)
    left = (whole - along.square().sum(1)).clamp(min=0).sqrt()  # (N,)
    return torch.cat([along, left[:, None]], 1)  # (N, P + 1)
