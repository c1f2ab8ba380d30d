"""Ways to make a map, from none to all of what is known, each scored on places it never saw."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speciesmap.config import FinetuneConfig
from speciesmap.errors import ConfigError
from speciesmap.evaluation.baselines import (
    fit_maxent,
    logistic,
    positions,
    trend_surface,
    window_statistics,
)
from speciesmap.learning.data import PairedRows, Places
from speciesmap.learning.fit import embeddings
from speciesmap.learning.heads import expand, where, with_covariates
from speciesmap.learning.sources import Sources, draw_background, target_group_places
from speciesmap.learning.validation import make_folds, rows_to_train_on
from speciesmap.models import SpeciesModel
from speciesmap.models.environment import Expansion
from speciesmap.statistics.regression import (
    Records,
    choose_penalty,
    fit_covariates,
    fit_linear,
)
from speciesmap.taxa import Taxon

RANDOM, GROUP = -1, -2  # in the place of a taxon: random background, target-group places
ASKING = 5  # photos of a query
HEAD = "embedding + head"
WITH_COVARIATES = "embedding + covariates + head"
WITH_LOCATION = "embedding + location + head"
SHUFFLED = "the same, imagery shuffled between places"

log = logging.getLogger("speciesmap")


@dataclass(frozen=True)
class Rows:
    """Presences of all taxa, then background, with all that a rung may look at.

    Attributes:
        taxa: All.
        taxon: Position in `taxa`, `RANDOM` or `GROUP` for background, shape (N,).
        fold: Shape (N,).
        uses: Rows to train on for each fold, none of whose windows overlaps a held-out one.
        places: Where the windows are.
        embedding: Of the encoder, shape (N, D).
        covariates: Shape (N, C); C may be 0.
        categorical: Those of them that hold classes.
        photos: Embeddings of a few ground photos by taxon and fold, each (n, D).
    """

    taxa: tuple[Taxon, ...]
    taxon: NDArray[np.int64]
    fold: NDArray[np.int64]
    uses: Mapping[int, NDArray[np.bool_]]
    places: Places
    embedding: NDArray[np.float32]
    covariates: NDArray[np.float64]
    categorical: list[int]
    photos: Mapping[tuple[int, int], NDArray[np.float32]]

    @property
    def group(self) -> NDArray[np.bool_]:
        """Places of the target group: those given, or else the records of all taxa, shape (N,)."""
        given = self.taxon == GROUP
        return given if given.any() else self.taxon >= 0

    @property
    def names(self) -> list[str]:
        """Of the taxa."""
        return [taxon.name for taxon in self.taxa]

    @property
    def presences(self) -> list[int]:
        """Records of each taxon."""
        return [int((self.taxon == k).sum()) for k in range(len(self.taxa))]

    def by_fold(
        self, scored: Callable[[NDArray[np.bool_], NDArray[np.bool_]], NDArray[Any]]
    ) -> NDArray[np.float64]:
        """Scores of every row by what `scored` learns from the rows it may use, shape (N, ...)."""
        parts = {k: scored(use, self.fold == k) for k, use in self.uses.items()}
        found = np.full((len(self.taxon), next(iter(parts.values())).shape[1]), np.nan)
        for k, part in parts.items():
            found[self.fold == k] = part
        return found


def gather(encoder: SpeciesModel, config: FinetuneConfig, sources: Sources) -> Rows:
    """Draw random background of the data of a configuration, and make folds as training does.

    Raises:
        ConfigError: There are no folds, or a fold leaves nothing to train on; data is incomplete.
        SpeciesmapError: Data cannot be read.
    """
    if config.validation is None:
        raise ConfigError(
            "evaluation needs spatial folds; add validation: {folds: 5, block_m: ...} to the "
            "configuration"
        )
    data, beside = config.data, sources.covariates
    dataset, imagery = sources.both()
    rng = np.random.default_rng(config.seed)
    image_px = encoder.ground.image_px if encoder.ground and dataset.has_ground else None
    presences = PairedRows(dataset, sources.rows, sources.taxa, image_px, sources.window_px)
    background = draw_background(imagery, sources.window_px, data.background, rng, encoder.fill)
    drawn = [background]
    if data.target_group is not None:
        drawn.append(target_group_places(sources, data.target_group, encoder.fill))
    presences = presences.subset(with_covariates(presences, beside))
    drawn = [places.subset(with_covariates(places, beside)) for places in drawn]
    parts: list[PairedRows | Places] = [presences, *drawn]
    rows, cols = imagery.rowcol(*where(presences))
    rows = np.concatenate([rows, *(places.rows for places in drawn)])
    cols = np.concatenate([cols, *(places.cols for places in drawn)])
    kinds = [np.full(len(d), kind) for d, kind in zip(drawn, (RANDOM, GROUP), strict=False)]
    taxon = np.concatenate([presences.taxon, *kinds])
    fold = make_folds(rows, cols, len(presences), background, config)
    window_px = presences.dataset.window_px
    names = [taxon.name for taxon in sources.taxa]
    uses = rows_to_train_on(rows, cols, fold, window_px, taxon, names)
    accelerator = config.trainer.accelerator
    vectors = torch.cat([embeddings(encoder, part, accelerator=accelerator) for part in parts])
    values, categorical = np.empty((len(rows), 0)), []
    if beside is not None:
        values = np.concatenate([beside.at(*where(part)) for part in parts])
        categorical = [beside.names.index(name) for name in data.categorical]
    photos: dict[tuple[int, int], NDArray[np.float32]] = {}
    if encoder.ground is not None and dataset.has_ground:
        photos = _photos(encoder, presences, fold[: len(presences)], rng)
    return Rows(
        sources.taxa,
        taxon,
        fold,
        uses,
        Places(imagery, rows, cols, sources.window_px, encoder.fill),
        vectors.numpy(),
        values,
        categorical,
        photos,
    )


def _photos(
    encoder: SpeciesModel,
    presences: PairedRows,
    fold: NDArray[np.int64],
    rng: np.random.Generator,
) -> dict[tuple[int, int], NDArray[np.float32]]:
    """Embed up to five photos of each taxon in each fold."""
    labels = presences.taxon
    found = {}
    with torch.inference_mode():
        for k in range(len(presences.taxa)):
            for j in np.unique(fold):
                own = np.flatnonzero((labels == k) & (fold == j))
                if own.size:
                    photos = presences.ground(rng.permutation(own)[:ASKING])
                    found[k, int(j)] = np.asarray(encoder.encode_ground(photos).numpy())
    return found


def rungs(
    encoder: SpeciesModel, rows: Rows, seed: int
) -> tuple[dict[str, Callable[[], NDArray[np.float64]]], dict[str, str]]:
    """What can be climbed, lowest first, and why the rest cannot."""
    features = rows.covariates
    shown = "covariates"
    if not features.shape[1]:
        features, shown = window_statistics(rows.places), "band means and textures"
    categorical = rows.categorical if features is rows.covariates else []
    plain = Expansion(features, categorical)(features).numpy()  # (N, F)
    location = positions(rows.places)
    rng = np.random.default_rng(seed)
    mixed = rng.permutation(len(rows.taxon))
    found: dict[str, Callable[[], NDArray[np.float64]]] = {
        "prevalence only": lambda: rows.by_fold(
            lambda use, held: np.log(
                [[(rows.taxon[use] == k).mean() + 1e-9 for k in range(len(rows.names))]]
            ).repeat(held.sum(), 0)
        ),
        "location only": lambda: _classified(rows, location, trend_surface),
        f"logistic regression on {shown}": lambda: _classified(rows, plain, logistic),
    }
    skipped: dict[str, str] = {}
    if importlib.util.find_spec("elapid") is None:
        skipped["MaxEnt"] = "elapid is not installed; pip install elapid"
    else:
        found[f"MaxEnt on {shown}, random background"] = lambda: _maxent(rows, features, False)
        if len(rows.names) > 1 or (rows.taxon == GROUP).any():
            found[f"MaxEnt on {shown}, target-group background"] = lambda: _maxent(
                rows, features, True
            )
        else:
            skipped["MaxEnt, target-group background"] = (
                "the data set has a single taxon; give data.target_group in the configuration"
            )
    found[f"heads on {shown}, random background"] = lambda: _tabular(rows, features, seed, False)
    if len(rows.names) > 1 or (rows.taxon == GROUP).any():
        found[f"heads on {shown}, target-group background"] = lambda: _tabular(
            rows, features, seed, True
        )
    if encoder.text is not None:
        found["query by text"] = lambda: _by_text(encoder, rows)
    else:
        skipped["query by text"] = "the model has no text tower"
    if rows.photos:
        found["query by photo"] = lambda: _by_photo(rows)
    else:
        skipped["query by photo"] = "the model has no ground tower, or the data set no photos"
    if not rows.covariates.shape[1]:
        skipped[WITH_COVARIATES] = "no covariates were given; pass --covariates RASTER"
    looks = rows.embedding
    found[HEAD] = lambda: headed(rows, looks, seed)
    if rows.covariates.shape[1]:
        found[WITH_COVARIATES] = lambda: headed(rows, looks, seed, rows.covariates)
    found[WITH_LOCATION] = lambda: headed(rows, looks, seed, location)
    found[SHUFFLED] = lambda: headed(rows, looks[mixed], seed, location)
    return found, skipped


def _classified(rows: Rows, features: NDArray[Any], make: Callable[[], Any]) -> NDArray[np.float64]:
    def scored(use: NDArray[np.bool_], held: NDArray[np.bool_]) -> NDArray[Any]:
        found = np.zeros((held.sum(), len(rows.names)))
        for k in range(len(rows.names)):
            part = use & ((rows.taxon == k) | (rows.taxon == RANDOM))
            present = rows.taxon[part] == k
            if present.any() and not present.all():
                found[:, k] = make().fit(features[part], present).decision_function(features[held])
        return found

    return rows.by_fold(scored)


def _maxent(rows: Rows, features: NDArray[Any], group: bool) -> NDArray[np.float64]:
    """Elapid's MaxEnt, taxon by taxon."""
    categorical = rows.categorical if features is rows.covariates else []

    def scored(use: NDArray[np.bool_], held: NDArray[np.bool_]) -> NDArray[Any]:
        found = np.zeros((held.sum(), len(rows.names)))
        away = features[use & (rows.group if group else rows.taxon == RANDOM)]
        for k in range(len(rows.names)):
            here = features[use & (rows.taxon == k)]
            if len(here) and len(away):
                suitability = fit_maxent(here, away, categorical)
                found[:, k] = np.log(np.clip(suitability(features[held]), 1e-9, 1))
        return found

    return rows.by_fold(scored)


def _tabular(rows: Rows, features: NDArray[Any], seed: int, group: bool) -> NDArray[np.float64]:
    """Heads on covariates alone, with MaxEnt's loss and background."""
    categorical = rows.categorical if features is rows.covariates else []
    truth = rows.taxon[:, None] == np.arange(len(rows.names))  # (N, T)
    away = rows.group if group else rows.taxon == RANDOM

    def scored(use: NDArray[np.bool_], held: NDArray[np.bool_]) -> NDArray[Any]:
        use = use & (truth.any(1) | away)
        there = np.broadcast_to(away[use, None], (int(use.sum()), len(rows.names)))
        records = Records(features[use], truth[use].astype(np.float32), there, categorical)
        model = fit_covariates(records, rows.fold[use], seed=seed)
        return model.standardised(features[held])

    return rows.by_fold(scored)


def headed(
    rows: Rows,
    embedding: NDArray[np.float32],
    seed: int,
    beside: NDArray[np.float64] | None = None,
    drawn: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """Linear heads on embeddings, and on covariates or location, assume-negative as the default.

    They are what `fit_heads` makes for maps: covariates are clamped, embeddings are not.

    Of the taxa, or of null maps with the records `drawn`.
    """
    truth = rows.taxon[:, None] == np.arange(len(rows.names)) if drawn is None else drawn  # (N, K)
    negative = (rows.taxon != GROUP)[:, None] & ~truth  # (N, K)

    def scored(use: NDArray[np.bool_], held: NDArray[np.bool_]) -> NDArray[Any]:
        use = use & (negative | truth).any(1)
        features = embedding
        if beside is not None:
            categorical = rows.categorical if beside is rows.covariates else []
            there = expand(beside[use], categorical)(beside).numpy()  # (N, F)
            features = np.concatenate([embedding, there], axis=1)
        records = Records(
            features[use], truth[use].astype(np.float32), negative[use].astype(np.float32)
        )
        rng = np.random.default_rng(seed)
        penalty = choose_penalty(records, rows.fold[use], rng=rng, loss="assume_negative")
        return fit_linear(records, penalty, loss="assume_negative").logits(features[held])

    return rows.by_fold(scored)


def _by_text(encoder: SpeciesModel, rows: Rows) -> NDArray[np.float64]:
    """Cosines with the taxa's lineages, shape (N, T)."""
    with torch.inference_mode():
        named = encoder.encode_text([taxon.prompt() for taxon in rows.taxa]).numpy()  # (T, D)
    return np.asarray(rows.embedding @ named.T, np.float64)


def _by_photo(rows: Rows) -> NDArray[np.float64]:
    """Cosines with the mean of a few photos of the folds that are trained on, shape (N, T)."""

    def scored(use: NDArray[np.bool_], held: NDArray[np.bool_]) -> NDArray[Any]:
        out = int(rows.fold[held][0])
        found = np.zeros((held.sum(), len(rows.taxa)))
        for k in range(len(rows.taxa)):
            parts = [photo for (t, j), photo in rows.photos.items() if t == k and j != out]
            if parts:
                mean = np.concatenate(parts)[:ASKING].mean(0)
                found[:, k] = rows.embedding[held] @ (mean / np.linalg.norm(mean))
        return found

    return rows.by_fold(scored)
