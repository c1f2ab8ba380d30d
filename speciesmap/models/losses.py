"""Losses: functions of tensors that know no config, no device and no logger."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    left: Tensor,
    right: Tensor,
    logit_scale: Tensor,
    positives: Tensor | None = None,
    ignored: Tensor | None = None,
) -> Tensor:
    """Symmetric contrastive loss between two sets of points.

    InfoNCE (van den Oord et al. 2018) in CLIP's symmetric form (Radford et al. 2021, section 2.3).
    A row with several positives takes the mean of their log-probabilities (Khosla et al. 2020,
    equation 2); a row without any, a pure negative, is not averaged over.

    Args:
        left: Unit-norm embeddings, shape (N, D).
        right: Unit-norm embeddings, shape (M, D).
        logit_scale: Positive scalar that multiplies the cosine.
        positives: Which pairs belong together, bool, shape (N, M); the diagonal by default.
        ignored: Pairs that are neither positive nor negative, such as two photos of one place,
            bool, shape (N, M). A positive is never ignored.

    Returns:
        Mean of both directions, in nats.
    """
    logits = logit_scale * left @ right.T  # (N, M)
    if positives is None:
        positives = torch.eye(len(left), len(right), dtype=torch.bool, device=left.device)
    if ignored is not None:
        logits = logits.masked_fill(ignored & ~positives, -torch.inf)
    return (_towards(logits, positives) + _towards(logits.T, positives.T)) / 2


def _towards(logits: Tensor, positives: Tensor) -> Tensor:
    """Mean negative log-probability of the positives, over the rows that have one."""
    log_probability = F.log_softmax(logits, dim=1)
    count = positives.sum(1)
    summed = log_probability.masked_fill(~positives, 0.0).sum(1)
    return -(summed / count.clamp(min=1))[count > 0].mean()


def assume_negative(
    logits: Tensor, taxon: Tensor, background_logits: Tensor, positive_weight: float
) -> Tensor:
    """Presence-only loss over taxa: what was not seen somewhere is assumed absent there.

    The full assume-negative loss of SINR (Cole et al. 2023, equation 4): at an observation's place
    its own taxon is positive and all others negative; at a background place all are negative.
    The other taxa's places act as target-group background, which cancels shared sampling bias.

    Args:
        logits: At the observations' places, shape (N, T).
        taxon: The taxon observed at each, int64, shape (N,).
        background_logits: At places drawn from the study area, shape (M, T).
        positive_weight: Weight of a presence against one assumed absence.

    Returns:
        Mean over places and taxa, in nats.
    """
    rows = torch.arange(len(taxon), device=logits.device)
    negatives = F.softplus(logits)  # (N, T)
    own = logits[rows, taxon]  # (N,)
    presence = F.softplus(-own)
    absence = negatives.sum(1) - negatives[rows, taxon]  # (N,)
    background = F.softplus(background_logits).sum(1)  # (M,)
    taxa = logits.shape[1]
    return ((positive_weight * presence + absence).mean() + background.mean()) / (2 * taxa)


def normalised_poisson(logits: Tensor, presences: Tensor, background: Tensor) -> Tensor:
    """Negative log-likelihood of where a taxon's records lie, among the places of its background.

    The loss of MaxEnt and of a Poisson point process whose total is left free (Phillips et al.
    2006, section 2.1; Renner & Warton 2013), over many taxa at once as in DeepMaxent (Estopinan
    et al. 2024). An offset of a taxon's logits changes nothing.

    Args:
        logits: Of relative intensity, shape (N, T).
        presences: Number of records, or weights, shape (N, T).
        background: Weight of each place in the taxon's background, shape (N, T); 0 leaves a
            place out, and a taxon with records has some.

    Returns:
        For each taxon the mean over its records, in nats, shape (T,); 0 without records.
    """
    count = presences.sum(0)  # (T,)
    level = torch.logsumexp(logits + background.clamp(min=1e-30).log(), 0)  # (T,)
    found = (presences * logits).sum(0)  # (T,)
    return (count * level - found) / count.clamp(min=1e-9)  # (T,)


def infinitely_weighted_logistic(
    logits: Tensor, presences: Tensor, background: Tensor, weight: float = 100.0
) -> Tensor:
    """Logistic regression of presences against background of great weight.

    Approaches the Poisson point process as the weight grows (Fithian & Hastie 2013, section 4);
    100 is maxnet's.

    Args:
        logits: Shape (N, T).
        presences: Number of records, or weights, shape (N, T).
        background: Weight of each place in the taxon's background, shape (N, T).
        weight: Of all the background, against one for all the presences.

    Returns:
        For each taxon, relative to the weight of its presences, shape (T,); 0 without records.
    """
    count = presences.sum(0)  # (T,)
    share = background / background.sum(0).clamp(min=1e-9)  # (N, T)
    away = (share * F.softplus(logits)).sum(0)  # (T,)
    here = (presences * F.softplus(-logits)).sum(0)  # (T,)
    return (here + weight * count * away) / count.clamp(min=1e-9)  # (T,)


def assumed_absences(logits: Tensor, presences: Tensor, background: Tensor) -> Tensor:
    """SINR's assume-negative loss in the form of a table: both classes weigh the same.

    As `assume_negative` (Cole et al. 2023, equation 4), where a taxon's background holds the
    other taxa's places and random ones.

    Args:
        logits: Shape (N, T).
        presences: Number of records, or weights, shape (N, T).
        background: Weight of each place assumed empty, shape (N, T).

    Returns:
        For each taxon, in nats, shape (T,); 0 without records.
    """
    return infinitely_weighted_logistic(logits, presences, background, weight=1.0)
