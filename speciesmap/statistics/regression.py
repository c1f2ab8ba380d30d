"""Heads on any table of features: embeddings, covariates, or both side by side.

All taxa are fitted together, by full batches on one matrix, so that a hundred taxa take about as
long as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from speciesmap.errors import DatasetError
from speciesmap.models.environment import Expansion
from speciesmap.models.losses import (
    assumed_absences,
    infinitely_weighted_logistic,
    normalised_poisson,
)
from speciesmap.statistics.metrics import auc

Loss = Literal["poisson", "weighted_logistic", "assume_negative"]
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "poisson": normalised_poisson,
    "weighted_logistic": infinitely_weighted_logistic,
    "assume_negative": assumed_absences,
}
PENALTIES = (10.0, 30.0, 100.0, 300.0)
CHOOSING = 4_000  # places that a penalty is chosen on, at most, where it says so
ITERATIONS = 60  # of L-BFGS
HINGES = 5  # knots per covariate, at quantiles
HIDDEN, DROPOUT, EPOCHS, BATCH, RATE, DECAY = 64, 0.3, 20, 256, 3e-3, 0.1
NETWORKS = 3  # in an ensemble


@dataclass(frozen=True)
class Records:
    """What was found where, for many taxa on the same places.

    Attributes:
        features: Shape (N, C), finite; numbers of categories where `categorical` says so.
        presences: Records of each taxon at each place, shape (N, T).
        background: Weight of each place in each taxon's background, shape (N, T).
        categorical: Columns of `features` that name categories.

    Raises:
        DatasetError: Shapes differ, a feature is not finite, or a taxon has records but no
            background.
    """

    features: NDArray[Any]
    presences: NDArray[Any]
    background: NDArray[Any]
    categorical: Sequence[int] = ()

    def __post_init__(self) -> None:
        rows = {len(self.features), len(self.presences), len(self.background)}
        if len(rows) > 1 or self.presences.shape != self.background.shape:
            raise DatasetError(
                f"features {self.features.shape}, presences {self.presences.shape} and background "
                f"{self.background.shape} do not fit; give one row per place in each"
            )
        wrong = np.argwhere(~np.isfinite(self.features))
        if len(wrong):
            raise DatasetError(
                f"feature {wrong[0, 1]} of place {wrong[0, 0]} is not finite, nor are "
                f"{len(wrong) - 1} more values; leave such places out"
            )
        empty = np.flatnonzero((self.presences > 0).any(0) & ~(self.background > 0).any(0))
        if empty.size:
            raise DatasetError(
                f"taxon {empty[0]} has records but no background; draw some, or leave it out"
            )

    def subset(self, chosen: NDArray[np.bool_]) -> Records:
        """Keep some places, by a mask of shape (N,)."""
        return Records(
            self.features[chosen],
            self.presences[chosen],
            self.background[chosen],
            self.categorical,
        )


@dataclass(frozen=True)
class Heads:
    """Fitted heads of many taxa.

    Attributes:
        expansion: Of the table.
        network: From features (N, F) to logits (N, T).
        centre: Mean logit over the places trained on, shape (T,).
        spread: Standard deviation of the logit over them, shape (T,).
    """

    expansion: Expansion
    network: nn.Module
    centre: Tensor
    spread: Tensor

    def logits(self, table: ArrayLike) -> NDArray[np.float32]:
        """Logits of relative suitability, shape (N, T)."""
        with torch.inference_mode():
            return np.asarray(self.network(self.expansion(table)).numpy())  # (N, T)

    def linear(self) -> tuple[Tensor, Tensor]:
        """Weights (T, F) and offsets (T,) on the raw table, of linear heads on `as_they_are`."""
        layer = self.network
        if not isinstance(layer, nn.Linear) or self.expansion.expands:
            raise ValueError("only linear heads on the table itself have weights on it")
        e = self.expansion
        scale = torch.from_numpy(e.sd * e.spread).float()  # (F,)
        centre = torch.from_numpy(e.mean + e.sd * e.centre).float()  # (F,)
        weight = layer.weight / scale  # (T, F)
        return weight, layer.bias - weight @ centre

    def standardised(self, table: ArrayLike) -> NDArray[np.float32]:
        """Logits in standard deviations over the places trained on, shape (N, T)."""
        centre, spread = self.centre.numpy(), self.spread.numpy()
        return np.asarray((self.logits(table) - centre) / spread)


def as_they_are(records: Records) -> Expansion:
    """Standardise features, and neither expand nor clamp them.

    A map of embeddings is one product of theirs with `Heads.linear`.
    """
    return Expansion(records.features, records.categorical, clamped=False)


def fit_linear(
    records: Records, penalty: float, *, expansion: Expansion | None = None, loss: Loss = "poisson"
) -> Heads:
    """Fit a linear head for each taxon, by L-BFGS.

    Args:
        records: What was found where.
        penalty: Weight of the squared coefficients against the sum over a taxon's records, so
            that taxa with few records are held closer to no preference at all.
        expansion: Of the table; `as_they_are` by default.
        loss: Which.
    """
    expansion = expansion or as_they_are(records)
    features = expansion(records.features)  # (N, F)
    head = nn.Linear(features.shape[1], records.presences.shape[1])
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    _optimise(head, features, records, penalty, loss)
    return _finished(expansion, head, features)


def _optimise(
    head: nn.Linear, features: Tensor, records: Records, penalty: float, loss: Loss
) -> None:
    """Bring a head to its optimum from where it is."""
    presences = torch.from_numpy(np.asarray(records.presences, np.float32))
    background = torch.from_numpy(np.asarray(records.background, np.float32))
    count = presences.sum(0).clamp(min=1)  # (T,)
    criterion = LOSSES[loss]
    optimiser = torch.optim.LBFGS(
        head.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimiser.zero_grad()
        each = criterion(head(features), presences, background)
        each = each + penalty / count * head.weight.square().sum(1)
        total = (each * count.sqrt()).sum()  # separate problems; many records deserve more steps
        total.backward()  # type: ignore[no-untyped-call]
        return float(total.detach())

    optimiser.step(closure)  # type: ignore[no-untyped-call]


def fit_network(
    records: Records, *, expansion: Expansion | None = None, seed: int = 0, loss: Loss = "poisson"
) -> Heads:
    """Fit a small network that all taxa share up to its last layer, after DeepMaxent.

    Two hidden layers of 64 with dropout, 20 epochs of AdamW in batches of 256 places, so that more
    records are more steps. Taxa weigh by the root of their number of records.

    Args:
        records: What was found where.
        expansion: Of the table; `as_they_are` by default.
        seed: Of weights, dropout and batches.
        loss: Which; of a batch it is that of its records among its own background.
    """
    expansion = expansion or as_they_are(records)
    features = expansion(records.features)  # (N, F)
    presences = torch.from_numpy(np.asarray(records.presences, np.float32))
    background = torch.from_numpy(np.asarray(records.background, np.float32))
    root = presences.sum(0).clamp(min=1).sqrt()  # (T,)
    count = max(1, round(len(features) / BATCH))
    criterion = LOSSES[loss]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(features.shape[1], HIDDEN),
            nn.SiLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN, len(root)),
        )
        optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, RATE, total_steps=EPOCHS * count, pct_start=0.2
        )
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(features)).chunk(count):
                here, away = presences[batch], background[batch]  # (n, T)
                each = criterion(network(features[batch]), here, away)  # (T,)
                total = (here.sum(0) / root * each).sum() * count / root.sum()
                optimiser.zero_grad()
                total.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
    return _finished(expansion, network, features)


def _finished(expansion: Expansion, network: nn.Module, features: Tensor) -> Heads:
    network.eval().requires_grad_(False)
    with torch.inference_mode():
        logits = network(features)  # (N, T)
    return Heads(expansion, network, logits.mean(0), logits.std(0, correction=0).clamp(min=1e-6))


@dataclass(frozen=True)
class Ensemble:
    """The mean of linear heads' and of networks' standardised logits, each half of it.

    Attributes:
        linear: Linear heads on hinges and squares.
        networks: Of different seeds.
        penalty: That was chosen for the linear heads.
    """

    linear: Heads
    networks: Sequence[Heads]
    penalty: float

    def standardised(self, table: ArrayLike) -> NDArray[np.float32]:
        """Relative suitability in standard deviations over the places trained on, (N, T)."""
        shared = np.mean([network.standardised(table) for network in self.networks], axis=0)
        return np.asarray((self.linear.standardised(table) + shared) / 2)


def fit_covariates(records: Records, fold: ArrayLike, *, seed: int = 0) -> Ensemble:
    """Model many taxa on covariates, on hinges and squares: linear heads and shared networks.

    The networks' size, batches and number were chosen by spatial cross-validation within the
    presence-only records of three regions of Elith et al. (2020).

    Args:
        records: What was found where.
        fold: Of each place, shape (N,); the penalty is chosen on these.
        seed: Of the networks.
    """

    def expand(part: Records) -> Expansion:
        return Expansion(part.features, part.categorical, hinges=HINGES, quadratic=True)

    penalty = choose_penalty(records, fold, expand=expand, penalties=PENALTIES[1:])
    expansion = expand(records)
    linear = fit_linear(records, penalty, expansion=expansion)
    networks = [
        fit_network(records, expansion=expansion, seed=NETWORKS * seed + k) for k in range(NETWORKS)
    ]
    return Ensemble(linear, networks, penalty)


def choose_penalty(
    records: Records,
    fold: ArrayLike,
    *,
    rng: np.random.Generator | None = None,
    expand: Callable[[Records], Expansion] | None = None,
    penalties: Sequence[float] = PENALTIES,
    loss: Loss = "poisson",
) -> float:
    """Choose the penalty with the highest AUC of held-out presences against held-out background.

    Args:
        records: To train on; none of what is reported later.
        fold: Of each place, shape (N,); where all are in one, every fifth place makes a fold.
        rng: Draws the 4,000 places that are looked at where there are more; without it all are.
        expand: Makes the expansion from the training part; `as_they_are` by default.
        penalties: To choose from.
        loss: Which.

    Returns:
        The best by the mean over folds and taxa; the strongest of those that tie.
    """
    folds = np.asarray(fold)
    if rng is not None:
        some = rng.permutation(len(folds)) < CHOOSING
        records, folds = records.subset(some), folds[some]
    if len(np.unique(folds)) < 2:
        folds = np.arange(len(folds)) % 5
    found: dict[float, list[float]] = {penalty: [] for penalty in penalties}
    for k in np.unique(folds):
        train, held = records.subset(folds != k), records.subset(folds == k)
        expansion = (expand or as_they_are)(train)
        features, there = expansion(train.features), expansion(held.features)  # (n, F), (m, F)
        head = nn.Linear(features.shape[1], train.presences.shape[1])
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        for penalty in sorted(penalties, reverse=True):  # each starts where the stronger one ended
            _optimise(head, features, train, penalty, loss)
            with torch.inference_mode():
                found[penalty] += held_out_auc(held, head(there).numpy())
    scores = {penalty: np.mean(values) if values else 0.5 for penalty, values in found.items()}
    return max(penalties, key=lambda penalty: (scores[penalty], penalty))


def held_out_auc(records: Records, logits: NDArray[Any]) -> list[float]:
    """AUC of presences against background for each taxon that has both."""
    found = []
    for taxon in range(records.presences.shape[1]):
        here = logits[records.presences[:, taxon] > 0, taxon]
        away = logits[records.background[:, taxon] > 0, taxon]
        value = auc(np.arange(len(here) + len(away)) < len(here), np.r_[here, away])
        if value is not None:
            found.append(value)
    return found
