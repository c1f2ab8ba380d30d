"""A model beside simpler ways to make the same map, on identical rows and folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from speciesmap.config import FinetuneConfig
from speciesmap.evaluation.rungs import (
    HEAD,
    RANDOM,
    SHUFFLED,
    WITH_COVARIATES,
    WITH_LOCATION,
    Rows,
    gather,
    headed,
    rungs,
)
from speciesmap.learning.data import PairedRows
from speciesmap.learning.heads import read_places
from speciesmap.learning.sources import Sources
from speciesmap.learning.surveys import read_surveys, surveyed_places
from speciesmap.mapping.query import FEW, score, taxon_query
from speciesmap.models import SpeciesModel
from speciesmap.progress import track
from speciesmap.rasters.covariates import open_covariates
from speciesmap.statistics.chance import (
    bound_for,
    draw_null_maps,
    fold_auc,
    informative,
    null_bounds,
)
from speciesmap.statistics.metrics import (
    measure,
    omission,
    paired_difference,
    reliability,
    true_skill,
)


def climb(
    model: SpeciesModel,
    encoder: SpeciesModel,
    config: FinetuneConfig,
    sources: Sources,
    surveys: Path | str | None = None,
) -> dict[str, Any]:
    """Evaluate every rung on held-out spatial blocks.

    Scores of a fold come from rows outside it whose windows share no ground with the fold's.
    Thresholds, and the logistic curve that turns scores into odds of a record against background
    for the Brier skill and the calibration error, are fitted on the other folds' held-out scores.

    Args:
        model: What is evaluated.
        encoder: Whose embeddings the heads of the ladder are fitted on: `model`, or what it was
            fine-tuned from, which has not seen which taxon lives where.
        config: Background, folds and seed.
        sources: Its data.
        surveys: Table of presence and absence, `lon, lat, taxon, present`.

    Returns:
        What `report.json` holds: `rungs`, `head`, the rung that the model itself stands on,
        `differences`, `shuffle`, `surveys` and what was left out and why.

    Raises:
        ConfigError: The configuration has no folds, or its data is incomplete.
        SpeciesmapError: Data cannot be read.
    """
    rows = gather(encoder, config, sources)
    ways, skipped = rungs(encoder, rows, config.seed)
    result: dict[str, Any] = {
        "taxa": {
            name: {"presences": count, "few": count < FEW}
            for name, count in zip(rows.names, rows.presences, strict=True)
        },
        "background": int((rows.taxon == RANDOM).sum()),
        "folds": {
            str(k): {"held_out": int((rows.fold == k).sum()), "trained": int(use.sum())}
            for k, use in rows.uses.items()
        },
        "rungs": {},
        "skipped": skipped,
    }
    for name, make in track(list(ways.items()), "Climbing"):
        result["rungs"][name] = _judge(rows, make())
    reads = model.environment is not None and WITH_COVARIATES in result["rungs"]
    head = WITH_COVARIATES if reads else HEAD
    bounds = _null_bounds(rows, config.seed, rows.covariates if reads else None)
    for name, count in zip(rows.names, rows.presences, strict=True):
        found = result["rungs"][head]["taxa"][name]
        bound = bound_for(bounds, count)
        by_fold = {"random": found["auc_folds"], "target-group": found["auc_folds_target_group"]}
        found |= {"auc_null": bound, "informative": informative(by_fold, bound)}
    result["head"] = head
    result["differences"] = _differences(result["rungs"], head)
    with_, without = result["rungs"][WITH_LOCATION], result["rungs"][SHUFFLED]
    result["shuffle"] = {
        "auc": with_["mean"]["auc"],
        "auc_shuffled": without["mean"]["auc"],
        **paired_difference(_aucs(with_), _aucs(without)),
    }
    if surveys is not None:
        result["surveys"] = on_surveys(model, config, sources, surveys)
    return result


def _judge(rows: Rows, scores: NDArray[np.float64]) -> dict[str, Any]:
    """Measures of each taxon against random background, and AUC against the target group."""
    by_taxon: dict[str, Any] = {}
    said: list[NDArray[np.float64]] = []
    truth: list[NDArray[np.bool_]] = []
    for k, name in enumerate(rows.names):
        own = (rows.taxon == k) | (rows.taxon == RANDOM)
        present, value, fold = rows.taxon[own] == k, scores[own, k], rows.fold[own]
        odds, threshold = np.full(len(value), np.nan), np.full(len(value), np.nan)
        for held_out in np.unique(fold):
            held, other = fold == held_out, fold != held_out
            if not present[other].any() or present[other].all():
                continue
            seen = _scaled(value[other], value[other])
            curve = LogisticRegression(C=1e6).fit(seen, present[other])
            odds[held] = curve.predict_proba(_scaled(value[held], value[other]))[:, 1]
            threshold[held] = np.quantile(value[other][present[other]], 0.05, method="lower")
        known = np.isfinite(odds)
        found = measure(present[known], odds[known], 0.5, probability=True)
        if all(np.ptp(value[fold == j]) == 0 for j in np.unique(fold)):
            found["boyce"] = None  # it ranks nothing
        above = (value - threshold)[known]  # each fold's own threshold is at 0
        found["omission"] = omission(above[present[known]], 0.0)
        found["tss"] = true_skill(present[known], above, 0.0)
        found |= fold_auc(present, value, fold)
        group = rows.group | (rows.taxon == k)
        among = fold_auc(rows.taxon[group] == k, scores[group, k], rows.fold[group])
        found |= {f"{key}_target_group": among[key] for key in ("auc", "auc_folds")}
        by_taxon[name] = found
        said.append(odds[known])
        truth.append(present[known])
    table = reliability(np.concatenate(truth), np.concatenate(said))
    keys = (
        "auc", "auc_target_group", "average_precision", "boyce", "tss", "omission",
        "brier_skill", "calibration_error",
    )  # fmt: skip
    return {
        "mean": {key: _mean([found[key] for found in by_taxon.values()]) for key in keys},
        "taxa": by_taxon,
        "reliability": table.to_dict("records"),
    }


def _null_bounds(rows: Rows, seed: int, beside: NDArray[np.float64] | None) -> dict[int, float]:
    """AUC that heads reach with records drawn from the group's places."""
    drawn = draw_null_maps(rows.group, rows.presences, np.random.default_rng(seed))
    if not drawn.shape[1]:
        return {}
    scores = headed(rows, rows.embedding, seed, beside, drawn)
    return null_bounds(drawn, scores, rows.taxon == RANDOM, rows.fold)


def _scaled(value: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    spread = float(reference.std())
    scaled = (value - reference.mean()) / (spread if spread > 1e-12 else 1.0)
    return np.asarray(scaled[:, None])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def _aucs(rung: Mapping[str, Any]) -> list[float]:
    """AUC of each taxon in each fold, in one order for all rungs."""
    return [
        np.nan if value is None else value
        for found in rung["taxa"].values()
        for value in found["auc_folds"]
    ]


def _differences(rungs: Mapping[str, Any], head: str) -> dict[str, Any]:
    """The model's own rung minus every other, paired by taxon and fold."""
    return {
        name: paired_difference(_aucs(rungs[head]), _aucs(rung))
        for name, rung in rungs.items()
        if name != head
    }


def on_surveys(
    model: SpeciesModel, config: FinetuneConfig, sources: Sources, path: Path | str
) -> dict[str, Any]:
    """Judge a model's own maps at surveyed places, by the thresholds fixed at its training.

    Places whose window overlaps a presence's are left out.
    """
    dataset, imagery = sources.both()
    presences = PairedRows(dataset, sources.rows, sources.taxa, None, sources.window_px)
    environment, covariates = model.environment, None
    if environment is not None:
        covariates = open_covariates(
            environment.sources, crs=environment.crs, wanted=environment.names
        )
    everything = read_surveys(path)
    surveys, places = surveyed_places(model, everything, presences, imagery, covariates)
    read = read_places(model, places, covariates, config.trainer.accelerator).numpy()
    vectors, features = read[:, : model.dim], read[:, model.dim :]
    found: dict[str, Any] = {}
    said, truth = [], []
    for taxon in model.taxa:
        own = (surveys["taxon"] == taxon.name).to_numpy()
        if not own.any():
            continue
        query = taxon_query(model, taxon.name)
        value = score(vectors[own], [query], features[own])[0].astype(np.float64)
        present = surveys["present"].to_numpy()[own]
        threshold = next(iter(query.thresholds.values()), None)
        probable = query.quantity == "probability"
        found[taxon.name] = {
            "quantity": query.quantity,
            "threshold": threshold,
            **measure(present, value, threshold or 0.0, probability=probable),
        }
        if threshold is None:  # none was fixed at training
            found[taxon.name] |= {"tss": None, "omission": None}
        if probable:
            said.append(value)
            truth.append(present)
    table = reliability(np.concatenate(truth), np.concatenate(said)) if said else pd.DataFrame()
    return {
        "places": len(surveys),
        "left_out": len(everything) - len(surveys),
        "taxa": found,
        "reliability": table.to_dict("records"),
    }
