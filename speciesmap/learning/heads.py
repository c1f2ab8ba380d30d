"""A model fitted to taxa: fine-tuned, and its heads brought to their optimum."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from numpy.typing import NDArray
from torch import Tensor

from speciesmap.config import DataConfig, FinetuneConfig, HeadConfig
from speciesmap.errors import DatasetError
from speciesmap.learning.data import PairedRows, Places, on_ground
from speciesmap.learning.fit import REFERENCES, batches, embeddings, fit
from speciesmap.learning.modules import Finetune
from speciesmap.models import SpeciesModel
from speciesmap.models.environment import Environment, Expansion
from speciesmap.models.heads import TaxonHead
from speciesmap.observations.folds import kmeans_folds
from speciesmap.rasters.covariates import Covariates
from speciesmap.statistics.regression import HINGES, Loss, Records, choose_penalty, fit_linear
from speciesmap.taxa import every_name

INNER_FOLDS = 4  # where none are given

log = logging.getLogger("speciesmap")


def where(windows: PairedRows | Places) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Longitude and latitude of the middle of windows."""
    if isinstance(windows, Places):
        return windows.imagery.xy(windows.rows, windows.cols)
    facts = windows.dataset.facts.iloc[windows.rows]
    return facts["longitude"].to_numpy(), facts["latitude"].to_numpy()


def with_covariates(
    windows: PairedRows | Places, covariates: Covariates | None
) -> NDArray[np.bool_]:
    """Which windows have all covariates, shape (N,), said aloud where some have not.

    Raises:
        DatasetError: None has.
        ImageryError: A covariate has no value at any of them.
    """
    if covariates is None:
        return np.ones(len(windows), bool)
    known = np.asarray(np.isfinite(covariates.at(*where(windows))).all(axis=1))
    if not known.any():
        raise DatasetError(
            f"none of {len(known)} places has all of the covariates "
            f"{', '.join(covariates.names)}; give rasters that overlap"
        )
    if not known.all():
        log.warning("%d of %d places lack a covariate and are left out", (~known).sum(), len(known))
    return known


def learn_environment(
    covariates: Covariates, table: NDArray[np.float64], data: DataConfig
) -> Environment:
    """Standardise and expand covariates over the places trained on, shape (N, C)."""
    return Environment(
        covariates.names,
        covariates.sources,
        covariates.crs,
        covariates.fingerprint,
        expand(table, [covariates.names.index(name) for name in data.categorical]),
    )


def expand(table: NDArray[np.float64], categorical: list[int]) -> Expansion:
    """Squares and hinges of covariates, as everywhere in this package."""
    return Expansion(table, categorical, hinges=HINGES, quadratic=True)


def read_places(
    model: SpeciesModel,
    windows: PairedRows | Places,
    covariates: Covariates | None,
    accelerator: str = "auto",
) -> Tensor:
    """What a model's heads read at places.

    Args:
        model: With or without covariates.
        windows: Where.
        covariates: That it was trained with, if any.
        accelerator: As for `embeddings`.

    Returns:
        Unit embeddings, shape (N, D), and features of covariates beside, (N, D + F).
    """
    vectors = embeddings(model, windows, accelerator=accelerator)
    if model.environment is None or covariates is None:
        return vectors
    table = covariates.at(*where(windows))
    return torch.cat([vectors, torch.from_numpy(model.environment.features(table))], 1)


def fit_heads(
    model: SpeciesModel,
    presences: PairedRows,
    background: Places,
    covariates: Covariates | None,
    fold: NDArray[np.int64] | None,
    config: FinetuneConfig,
) -> float:
    """Replace a model's heads by linear ones at their optimum.

    Args:
        model: Its encoder stays as it is; gets `head` and `environment`.
        presences: Of its taxa.
        background: Of the study area.
        covariates: To read beside the embedding, if any; all places have them.
        fold: Of presences, then background, shape (N + M,), that the penalty is chosen on; regions
            by k-means without.
        config: The stage: which loss, which covariates hold classes, and the seed of the places
            that the penalty is chosen on.

    Returns:
        The penalty.
    """
    accelerator, seed = config.trainer.accelerator, config.seed
    x, y = (np.concatenate(pair) for pair in zip(where(presences), where(background), strict=True))
    if covariates is not None:
        model.environment = learn_environment(covariates, covariates.at(x, y), config.data)
    parts = [read_places(model, w, covariates, accelerator) for w in (presences, background)]
    features = torch.cat(parts).numpy()  # (N + M, D + F)
    taxon = np.r_[presences.taxon, np.full(len(background), -1)]
    records = np.asarray(taxon[:, None] == np.arange(len(model.taxa)), np.float32)  # (N + M, T)
    loss: Loss = (config.head or HeadConfig()).loss
    everything = Records(features, records, 1 - records)
    if fold is None or len(np.unique(fold)) < 2:
        places = on_ground(background.imagery, *background.imagery.rowcol(x, y))
        fold = kmeans_folds(*places, folds=INNER_FOLDS, seed=seed)
    penalty = choose_penalty(everything, fold, rng=np.random.default_rng(seed), loss=loss)
    weight, offset = fit_linear(everything, penalty, loss=loss).linear()  # (T, D + F), (T,)
    if loss == "poisson":  # which knows no level: the mean place of the background gets 0
        offset = -(parts[1] @ weight.T).mean(0)
    model.head = TaxonHead.of_weights(weight, offset, model.dim)
    return penalty


def fit_taxa(
    base: SpeciesModel,
    presences: PairedRows,
    background: Places,
    config: FinetuneConfig,
    work: Path | None = None,
    covariates: Covariates | None = None,
    fold: NDArray[np.int64] | None = None,
) -> tuple[SpeciesModel, dict[str, Any]]:
    """Fine-tune a copy of a model on presences against background.

    A taxon's vector starts where its windows differ from the background on average. With
    `config.head` or covariates, heads are fitted anew at the end.

    Args:
        base: The model to start from, left as it is.
        presences: Rows of taxa.
        background: Places of the study area.
        config: The stage.
        work: Folder for logs and for resuming, if any.
        covariates: To read beside the embedding, if any; all places have them.
        fold: Of presences, then background, that a penalty is chosen on, shape (N + M,).

    Returns:
        The fine-tuned model, in evaluation mode, and metrics of the fit.
    """
    torch.manual_seed(config.seed)
    model = copy.deepcopy(base)
    model.taxa = presences.taxa
    model.head = TaxonHead(len(model.taxa), model.dim)
    model.trust, model.environment = None, None
    refits = config.head is not None or covariates is not None
    metrics: dict[str, Any] = {}
    if not (refits and config.freeze_encoder):
        metrics = _fine_tune(model, presences, background, config, work)
    if refits:
        metrics["penalty"] = fit_heads(model, presences, background, covariates, fold, config)
    return model.requires_grad_(True).eval(), metrics


def _fine_tune(
    model: SpeciesModel,
    presences: PairedRows,
    background: Places,
    config: FinetuneConfig,
    work: Path | None,
) -> dict[str, Any]:
    """Train a model in place, and give the metrics of the fit."""
    accelerator = config.trainer.accelerator
    here = embeddings(model, presences, accelerator=accelerator)  # (N, D)
    labels = torch.from_numpy(presences.taxon)  # (N,)
    away = embeddings(model, background, REFERENCES, accelerator).mean(0)  # (D,)
    with torch.no_grad():
        for k in torch.unique(labels).tolist():
            model.head.weight[k] = F.normalize(here[labels == k].mean(0) - away, dim=0)
    model.train()
    if model.names and config.align > 0 and not config.freeze_encoder:
        model.names = tuple(dict.fromkeys((*model.names, *every_name(model.taxa))))
    if config.freeze_encoder:
        for tower in (model.aerial, model.ground, model.text):
            if tower is not None:
                tower.requires_grad_(False).eval()
    loader = batches(presences, config.optim, config.trainer)
    other = batches(background, config.optim, config.trainer, count=len(loader))
    both = CombinedLoader({"presences": loader, "background": other}, mode="min_size")
    steps = config.optim.epochs * len(loader)
    stage = Finetune(model, config.optim, steps, config.positive_weight, config.align, config.views)
    return fit(stage, both, config.optim, config.trainer, work)
