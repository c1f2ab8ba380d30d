"""Fine-tuning: presences against background, held-out folds, calibration and trust."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from speciesmap.config import FinetuneConfig
from speciesmap.errors import ConfigError, ModelError
from speciesmap.learning.data import PairedRows, Places
from speciesmap.learning.fit import measure, set_reference
from speciesmap.learning.heads import (
    fit_taxa,
    read_places,
    where,
    with_covariates,
)
from speciesmap.learning.modules import check_chunks
from speciesmap.learning.seen import share_seen
from speciesmap.learning.sources import Sources, draw_background, target_group_places
from speciesmap.learning.surveys import read_surveys, surveyed_places
from speciesmap.learning.trust import measure_trust
from speciesmap.learning.validation import background_kind, cross_validate, summarise
from speciesmap.mapping.fit import MOST_RESOLUTION_RATIO
from speciesmap.models import SpeciesModel, load_model
from speciesmap.models.trust import Trust
from speciesmap.rasters.covariates import Covariates
from speciesmap.rasters.imagery import Imagery
from speciesmap.rasters.values import Values
from speciesmap.statistics.calibration import Calibration, calibrate, calibrate_on_surveys
from speciesmap.taxa import nearest

log = logging.getLogger("speciesmap")


def finetune(
    config: FinetuneConfig,
    sources: Sources,
    initial: Mapping[str, Any],
    work: Path | None = None,
) -> tuple[SpeciesModel, dict[str, Any]]:
    """Learn embeddings of taxa from presences against background.

    Where the configuration asks for validation, whole blocks are held out in turn first, and
    what each fold's model says of them is written to `folds.parquet` in `work`.

    Args:
        config: The stage.
        sources: Its data: a paired data set, and the imagery that background is drawn from.
        initial: Facts of the checkpoint that it starts from.
        work: Folder for logs, folds and for resuming, if any.

    Returns:
        The model, in evaluation mode, and metrics of training and validation.

    Raises:
        ConfigError: The data set or the imagery is missing, or a prevalence is stated of a taxon
            that is not there.
        ModelError: The initial model does not fit the data.
        ObservationsError: Surveys cannot be read, or none is away from the records.
    """
    rng = np.random.default_rng(config.seed)
    base = load_model(config.init)
    dataset, imagery = sources.both()
    refuse_unfit(base, config, sources)
    if config.validation is not None:
        check_validation(config, sources, initial)
    image_px = base.ground.image_px if base.ground and dataset.has_ground else None
    presences = PairedRows(dataset, sources.rows, sources.taxa, image_px, sources.window_px)
    refuse_elsewhere(presences, imagery, config)
    data, kind = config.data, background_kind(config.data)
    if kind == "target-group":
        background = target_group_places(sources, data.target_group, base.fill)
    else:
        background = draw_background(
            imagery, sources.window_px, data.background, rng, base.fill, bias=sources.bias
        )
    covariates = sources.covariates
    presences = presences.subset(with_covariates(presences, covariates))
    background = background.subset(with_covariates(background, covariates))
    values = compare_values(base, presences, background, config, sources)
    surveyed = None
    if config.validation is not None and config.validation.surveys is not None:
        surveys = read_surveys(config.validation.surveys)  # before the long work
        surveyed = surveyed_places(base, surveys, presences, imagery, covariates)
    metrics: dict[str, Any] = {}
    calibrations: dict[str, Calibration] = {}
    own = None
    if config.validation is not None:
        other = _other_background(base, config, sources, rng)
        folds, bounds = cross_validate(base, presences, background, config, work, other, covariates)
        metrics["validation"] = summarise(folds, sources.taxa, kind, bounds)
        if work is not None:
            folds.to_parquet(work / "folds.parquet")
        own = folds[folds["background"].isin(["", kind])]
        everywhere = folds[folds["background"].isin(["", "random"])]
        calibrations = calibrate(everywhere, sources.taxa, config.validation.prevalence)
    fold = None if own is None else own["fold"].to_numpy()
    model, fitted = fit_taxa(base, presences, background, config, work, covariates, fold)
    set_reference(model, background, rng, config.trainer.accelerator)
    model.values = values
    curves: dict[str, tuple[list[float], list[float]]] = {}
    if surveyed is not None:
        found, curves = _calibrate_on_surveys(model, *surveyed, config, covariates)
        calibrations |= found
    model.prevalence = {name: c.prevalence for name, c in calibrations.items()}
    for k, taxon in enumerate(sources.taxa):
        if taxon.name in calibrations:
            c = calibrations[taxon.name]
            model.head.recalibrate(k, c.slope, c.intercept)
    trust = judge(model, presences, background, own, calibrations, curves, config, covariates)
    judged = metrics.get("validation", {})
    dark = [name for name, found in judged.items() if found["informative"] is False]
    model.trust = replace(trust, uninformative=dark)
    return model, {**fitted, **metrics}


def _other_background(
    base: SpeciesModel, config: FinetuneConfig, sources: Sources, rng: np.random.Generator
) -> Places | None:
    """Background of the kind that is not trained on, which is evaluated too, if there is any."""
    data = config.data
    if background_kind(data) != "random":
        imagery = sources.both()[1]
        places = draw_background(imagery, sources.window_px, data.background, rng, base.fill)
    elif data.target_group is not None:
        places = target_group_places(sources, data.target_group, base.fill)
    else:
        return None
    return places.subset(with_covariates(places, sources.covariates))


def _calibrate_on_surveys(
    model: SpeciesModel,
    surveys: pd.DataFrame,
    places: Places,
    config: FinetuneConfig,
    covariates: Covariates | None,
) -> tuple[dict[str, Calibration], dict[str, tuple[list[float], list[float]]]]:
    """Calibrate a model's heads as `calibrate_on_surveys` does, on what they say of places."""
    assert config.validation is not None
    read = read_places(model, places, covariates, config.trainer.accelerator)  # (N, D + F)
    with torch.inference_mode():
        logits = model.head(read).double().numpy()  # (N, T)
    return calibrate_on_surveys(logits, surveys, model.taxa, config.validation.calibration)


def refuse_unfit(base: SpeciesModel, config: FinetuneConfig, sources: Sources) -> None:
    """Stop where the initial model does not fit the data.

    Raises:
        ConfigError: Its batch norm would see chunks of a single row.
        ModelError: It has other bands, windows or pixels.
    """
    if (base.bands, base.window_px) != (sources.bands, sources.window_px):
        raise ModelError(
            f"{config.init} takes windows of {base.window_px} px with bands "
            f"{', '.join(base.bands)}; {config.data.dataset} has {sources.window_px} px and "
            f"{', '.join(sources.bands)}; cut chips to fit, or pre-train on these"
        )
    trained_m, given_m = base.resolution_m, sources.resolution_m
    if not 1 / MOST_RESOLUTION_RATIO <= given_m / trained_m <= MOST_RESOLUTION_RATIO:
        raise ModelError(
            f"{config.init} was trained on pixels of {trained_m:.3g} m, those of "
            f"{config.data.dataset} have {given_m:.3g} m; cut chips with --resolution-m "
            f"{trained_m:.3g}, or pre-train on these"
        )
    if not config.freeze_encoder:
        check_chunks(base, config.optim.chunk_size)


def refuse_elsewhere(presences: PairedRows, imagery: Imagery, config: FinetuneConfig) -> None:
    """Stop where no presence is on the imagery that background is drawn from; count the others.

    Raises:
        ConfigError: The two show different places.
    """
    inside = imagery.contains(*where(presences))
    if not inside.any():
        raise ConfigError(
            f"none of the {len(inside)} records of {config.data.dataset} is on "
            f"{imagery.source}, so background would come from elsewhere; name the imagery that the "
            "chips were cut from with data.imagery"
        )
    if not inside.all():
        log.warning(
            "%d of %d records of %s are not on %s, where background is drawn: maps will tell one "
            "area from the other",
            (~inside).sum(),
            len(inside),
            config.data.dataset,
            imagery.source,
        )


def compare_values(
    base: SpeciesModel,
    presences: PairedRows,
    background: Places,
    config: FinetuneConfig,
    sources: Sources,
) -> Values:
    """Measure the pixels of the background, and warn where any are unlike those of the model."""
    values = {}
    for name, windows in (
        (config.data.dataset, presences),
        (config.data.imagery, background),
    ):
        values[name] = measure(windows, sources)[2]
        far = base.values.far(values[name], base.bands) if base.values else ""
        if far:
            log.warning(
                "%s: %s; give its pixels the units and the order of bands that %s was trained on, "
                "or expect that training has to make up for it",
                name,
                far,
                config.init,
            )
    return values[config.data.imagery]


def check_validation(config: FinetuneConfig, sources: Sources, initial: Mapping[str, Any]) -> None:
    """Refuse prevalences of taxa that are not there; say where folds may hold out nothing new.

    Raises:
        ConfigError: A prevalence is stated of a taxon that the data set lacks.
    """
    assert config.validation is not None
    names = [taxon.name for taxon in sources.taxa]
    stated = config.validation.prevalence
    for name in stated if isinstance(stated, dict) else ():
        if name not in names:
            raise ConfigError(
                f"validation.prevalence names {name!r}, which {config.data.dataset} lacks; it has "
                f"{', '.join(nearest(name, names) or names[:5])}"
            )
    share = share_seen(initial, sources)
    if share != 0:
        log.warning(
            "%s %s the records of %s with their names, which folds hold out as if it had not: "
            "validation %s look better than it is",
            config.init,
            f"learned from {100 * share:.3g}% of" if share else "may have learned from",
            config.data.dataset,
            "will" if share else "may",
        )


def judge(
    model: SpeciesModel,
    presences: PairedRows,
    background: Places,
    folds: pd.DataFrame | None,
    calibrations: Mapping[str, Calibration],
    curves: Mapping[str, tuple[list[float], list[float]]],
    config: FinetuneConfig,
    covariates: Covariates | None = None,
) -> Trust:
    """Measure how far the maps of a calibrated model can be trusted."""
    accelerator = config.trainer.accelerator
    here = read_places(model, presences, covariates, accelerator)  # (N, D + F)
    away = read_places(model, background, covariates, accelerator)  # (M, D + F)
    scaled = None
    if model.environment is not None and covariates is not None:
        table = np.concatenate([covariates.at(*where(w)) for w in (presences, background)])
        scaled = torch.from_numpy(model.environment.scaled(table))  # (N + M, S)
    labels = presences.taxon
    with torch.inference_mode():
        logits = model.head(torch.cat([here, away])).double().numpy()  # (N + M, T)
    taxon = np.r_[labels, np.full(len(away), -1)]
    values = {}
    for k, name in enumerate(t.name for t in model.taxa):
        value = logits[:, k]
        if folds is not None:
            c = calibrations.get(name, Calibration(1.0, 0.0, 0.0))
            held_out = c.slope * folds[name].to_numpy() + c.intercept
            value = np.where(np.isfinite(held_out), held_out, value)
        value = expit(value)
        if name in curves:
            value = np.interp(value, *curves[name])
        values[name] = value[taxon == k], value[taxon == -1]
    fold = None if folds is None else folds["fold"].to_numpy()
    return measure_trust(model, here, labels, away, fold, values, curves, config.seed, scaled)
