"""Fine-tuning: presences against background, held-out folds, calibration and trust."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from numpy.typing import NDArray
from scipy.special import expit

from speciesmap.config import FinetuneConfig, HeadConfig
from speciesmap.errors import ConfigError, ModelError, ObservationsError
from speciesmap.learning.chance import draw_null_maps, null_bounds, null_scores
from speciesmap.learning.data import (
    PairedRows,
    Places,
    Sources,
    draw_background,
    target_group_places,
)
from speciesmap.learning.distribution import Records
from speciesmap.learning.evaluate import Calibration, calibrate, summarise
from speciesmap.learning.fit import (
    REFERENCES,
    batches,
    embeddings,
    fit,
    measure,
    process_rank,
    set_reference,
)
from speciesmap.learning.heads import (
    find_covariates,
    fit_heads,
    read_places,
    where,
    with_covariates,
)
from speciesmap.learning.modules import Finetune
from speciesmap.learning.trust import (
    calibrate_on_surveys,
    clear_of,
    measure_trust,
    read_surveys,
)
from speciesmap.mapping.fit import MOST_RESOLUTION_RATIO
from speciesmap.models import SpeciesModel, load_model, read_facts
from speciesmap.models.heads import TaxonHead
from speciesmap.models.trust import Trust
from speciesmap.observations.folds import (
    kmeans_folds,
    knndm,
    nearest_fold,
    separated,
    spatial_blocks,
)
from speciesmap.outputs import replacing
from speciesmap.progress import track
from speciesmap.rasters.covariates import Covariates
from speciesmap.rasters.imagery import Imagery
from speciesmap.rasters.values import Values
from speciesmap.taxa import nearest

log = logging.getLogger("speciesmap")

FOLDS = "folds"  # scores of the folds of a validation that are done
AREA = 1000  # places of the imagery that folds by `knndm` are matched to


def finetune(
    config: FinetuneConfig, sources: Sources, work: Path | None = None
) -> tuple[SpeciesModel, dict[str, Any]]:
    """Learn embeddings of taxa from presences against background.

    Where the configuration asks for validation, whole blocks are held out in turn first, and
    what each fold's model says of them is written to `folds.parquet` in `work`.

    Args:
        config: The stage.
        sources: Its data: a paired data set, and the imagery that background is drawn from.
        work: Folder for logs, folds and for resuming, if any.

    Returns:
        The model, in evaluation mode, and metrics of training and validation.

    Raises:
        ConfigError: The data set or the imagery is missing, or a prevalence is stated of a taxon
            that is not there.
        ModelError: The initial model does not fit the data.
    """
    rng = np.random.default_rng(config.seed)
    base = load_model(config.init)
    if sources.dataset is None or sources.imagery is None:
        raise ConfigError(
            "stage finetune needs data.dataset for presences and data.imagery for background, and "
            f"data.{'dataset' if sources.dataset is None else 'imagery'} is not said; add "
            "--set data.dataset=CHIPS or --set data.imagery=RASTER, what the chips were cut from"
        )
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
    if config.validation is not None:
        check_validation(config, sources)
    image_px = base.ground.image_px if base.ground and sources.dataset.has_ground else None
    presences = PairedRows(sources.dataset, sources.rows, sources.taxa, image_px, sources.window_px)
    refuse_elsewhere(presences, sources.imagery, config)
    data, area = config.data, (sources.imagery, sources.window_px)
    grouped = data.background_kind == "target-group"
    background = (
        target_group_places(sources, data.target_group, base.fill)
        if grouped
        else draw_background(*area, data.background, rng, base.fill, bias=data.bias)
    )
    covariates = find_covariates(data, sources.imagery)
    presences = presences.subset(with_covariates(presences, covariates))
    background = background.subset(with_covariates(background, covariates))
    values = compare_values(base, presences, background, config, sources)
    metrics: dict[str, Any] = {}
    calibrations: dict[str, Calibration] = {}
    own = None
    if config.validation is not None:
        other = None
        if grouped:
            other = draw_background(*area, data.background, rng, base.fill)
        elif data.target_group is not None:
            other = target_group_places(sources, data.target_group, base.fill)
        if other is not None:
            other = other.subset(with_covariates(other, covariates))
        folds, bounds = cross_validate(base, presences, background, config, work, other, covariates)
        metrics["validation"] = summarise(folds, sources.taxa, data.background_kind, bounds)
        if work is not None:
            folds.to_parquet(work / "folds.parquet")
        own = folds[folds["background"].isin(["", data.background_kind])]
        calibrations = calibrate(own, sources.taxa, config.validation.prevalence)
    fold = None if own is None else own["fold"].to_numpy()
    model, fitted = fit_taxa(base, presences, background, config, work, covariates, fold)
    set_reference(model, background, rng, config.trainer.accelerator)
    model.values = values
    curves: dict[str, tuple[list[float], list[float]]] = {}
    if config.validation is not None and config.validation.surveys is not None:
        surveyed, curves = on_surveys(model, presences, background, config, covariates)
        calibrations |= surveyed
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


def check_validation(config: FinetuneConfig, sources: Sources) -> None:
    """Refuse prevalences of taxa that are not there; say where folds hold out nothing new.

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
    before = read_facts(config.init).get("training", {})
    if (
        before.get("method") != "mae"
        and before.get("data", {}).get("dataset") == config.data.dataset
    ):
        log.warning(
            "%s learned from the records of %s with their photos and names, so folds hold out "
            "nothing that it has not seen: validation will look better than it is; pre-train with "
            "method: mae, or on other records, to measure it",
            config.init,
            config.data.dataset,
        )


def on_surveys(
    model: SpeciesModel,
    presences: PairedRows,
    background: Places,
    config: FinetuneConfig,
    covariates: Covariates | None = None,
) -> tuple[dict[str, Calibration], dict[str, tuple[list[float], list[float]]]]:
    """Calibrate on surveyed places whose windows share no ground with a presence's."""
    assert config.validation is not None and config.validation.surveys is not None
    surveys = read_surveys(config.validation.surveys)
    surveys, places = surveyed_places(model, surveys, presences, background.imagery, covariates)
    read = read_places(model, places, covariates, config.trainer.accelerator)
    with torch.inference_mode():
        logits = model.head(read).double().numpy()  # (N, T)
    return calibrate_on_surveys(logits, surveys, model.taxa, config.validation.calibration)


def surveyed_places(
    model: SpeciesModel,
    surveys: pd.DataFrame,
    presences: PairedRows,
    imagery: Imagery,
    covariates: Covariates | None = None,
) -> tuple[pd.DataFrame, Places]:
    """Surveys on the imagery whose windows share no ground with a presence's, and their places.

    Those that lack a covariate are left out too; how many are left out is said aloud.

    Raises:
        ObservationsError: None is left.
    """
    rows, cols = imagery.rowcol(surveys["lon"].to_numpy(), surveys["lat"].to_numpy())
    height, width = imagery.shape
    inside = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    use = inside & clear_of(rows, cols, *imagery.rowcol(*where(presences)), model.window_px)
    told = (
        f"{(~use).sum()} of {len(surveys)} surveys are left out: {(~inside).sum()} are not on "
        f"{imagery.source}, {(inside & ~use).sum()} within a window of a presence"
    )
    if not use.any():
        raise ObservationsError(f"{told}; give surveys of the imagery's area, away from training")
    if not use.all():
        log.warning("%s", told)
    places = Places(imagery, rows[use], cols[use], model.window_px, model.fill)
    known = with_covariates(places, covariates)
    return surveys[use][known], places.subset(known)


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
    labels = presences.labels[presences.rows]
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
    accelerator = config.trainer.accelerator
    refits = config.head is not None or covariates is not None
    metrics: dict[str, Any] = {}
    if not (refits and config.freeze_encoder):
        metrics = _fine_tune(model, presences, background, config, work)
    if refits:
        metrics["penalty"] = fit_heads(
            model,
            presences,
            background,
            covariates,
            fold,
            config.data,
            config.head or HeadConfig(),
            config.seed,
            accelerator,
        )
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
    labels = torch.from_numpy(presences.labels[presences.rows])  # (N,)
    away = embeddings(model, background, REFERENCES, accelerator).mean(0)  # (D,)
    with torch.no_grad():
        for k in torch.unique(labels).tolist():
            model.head.weight[k] = F.normalize(here[labels == k].mean(0) - away, dim=0)
    model.train()
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


def cross_validate(
    base: SpeciesModel,
    presences: PairedRows,
    background: Places,
    config: FinetuneConfig,
    work: Path | None = None,
    other: Places | None = None,
    covariates: Covariates | None = None,
) -> tuple[pd.DataFrame, dict[int, float]]:
    """Fine-tune with whole folds held out in turn, and score what was held out.

    Training windows that overlap a held-out window are left out.

    Args:
        base: The model to start from, left as it is.
        presences: Rows of taxa.
        background: Places of the study area; its imagery gives the grid.
        config: The stage, with `validation`.
        work: Folder where each fold's scores are kept, so that a run that goes on repeats none.
        other: Places of the other kind of background, scored and never trained on.
        covariates: To read beside the embedding, if any; all places have them.

    Returns:
        One row per presence and background place: observation_id and taxon (empty for
        background), longitude, latitude, background (its kind, empty for presences), fold, trained
        (windows trained on in that fold), and a logit per taxon, by its name, NaN where the fold's
        training had no presence of it. And the bounds of null maps of linear heads on the folds'
        encoders, as `null_bounds` gives them; none of models trained on target-group background.

    Raises:
        ConfigError: A fold leaves nothing to train on.
    """
    assert config.validation is not None
    imagery = background.imagery
    facts = presences.dataset.facts.iloc[presences.rows]
    rows, cols = imagery.rowcol(facts["longitude"].to_numpy(), facts["latitude"].to_numpy())
    others = [background] if other is None else [background, other]
    rows = np.concatenate([rows, *(places.rows for places in others)])
    cols = np.concatenate([cols, *(places.cols for places in others)])
    count, end = len(presences), len(presences) + len(background)
    folds = make_folds(rows, cols, count, background, config)
    taxa = len(presences.taxa)
    labels = presences.labels[presences.rows]
    drawn = np.zeros((len(rows), 0), bool)
    if config.data.background_kind == "random":
        group = np.arange(len(rows)) >= end
        if not group.any():
            group[:count] = ~facts.duplicated(["longitude", "latitude"]).to_numpy()
        counts = np.bincount(labels, minlength=taxa).tolist()
        drawn = draw_null_maps(group, counts, np.random.default_rng(config.seed))  # (N, M)
    negative = (np.arange(len(rows)) < end)[:, None] & ~drawn  # (N, M)
    logits = np.empty((len(rows), taxa + drawn.shape[1]))
    trained = np.empty(len(rows), dtype=np.int64)
    uses = [
        separated(cols, rows, folds, k, presences.dataset.window_px + 1)
        for k in range(config.validation.folds)
    ]
    for k, use in enumerate(uses):
        if min(use[:count].sum(), use[count:end].sum()) < 2:
            raise ConfigError(
                f"fold {k} leaves {use[:count].sum()} presences and {use[count:end].sum()} "
                "background places to train on, since windows that overlap a held-out one are left "
                "out; give larger blocks in validation.block_m, fewer folds, or more places"
            )
    for k, use in enumerate(track(uses, "Cross-validating")):
        held = folds == k
        trained[held] = use[:end].sum()
        kept = None if work is None else work / FOLDS / f"{k}.npy"
        if kept is not None and kept.exists():
            logits[held] = np.load(kept)
            continue
        model, fitted = fit_taxa(
            base,
            presences.subset(use[:count]),
            background.subset(use[count:end]),
            config,
            covariates=covariates,
            fold=folds[:end][use[:end]],
        )
        accelerator = config.trainer.accelerator
        wanted = held | use if drawn.shape[1] else held
        parts = [read_places(model, presences.subset(wanted[:count]), covariates, accelerator)]
        for places, part in zip(others, np.split(wanted[count:], [end - count]), strict=False):
            parts.append(read_places(model, places.subset(part), covariates, accelerator))
        features = torch.cat(parts)  # (n, D + F)
        with torch.inference_mode():
            logits[held, :taxa] = model.head(features[torch.from_numpy(held[wanted])]).numpy()
        untrained = np.setdiff1d(np.arange(taxa), labels[use[:count]])
        logits[np.ix_(held, untrained)] = np.nan
        if drawn.shape[1]:
            usable = (use & (drawn.any(1) | (np.arange(len(rows)) < end)))[wanted]
            table = features.numpy()
            logits[held, taxa:] = null_scores(
                Records(
                    table[usable],
                    drawn[wanted][usable].astype(np.float32),
                    negative[wanted][usable].astype(np.float32),
                ),
                table[held[wanted]],
                fitted.get("penalty"),
                folds[wanted][usable],
                (config.head or HeadConfig()).loss,
            )
        if kept is not None and process_rank() == 0:
            with replacing(kept, overwrite=True) as beside:
                np.save(beside, logits[held])
    x, y = imagery.xy(rows, cols)
    nothing = np.full(len(rows) - count, "", object)
    names = np.r_[facts["name"].to_numpy(dtype=object), nothing]
    kinds = ["random", "target-group"]
    if config.data.background_kind != "random":
        kinds.reverse()
    table = pd.DataFrame(
        {
            "observation_id": np.r_[facts["observation_uuid"].to_numpy(dtype=object), nothing],
            "longitude": x,
            "latitude": y,
            "taxon": names,
            "background": np.repeat(["", *kinds], [count, end - count, len(rows) - end]),
            "fold": folds,
            "trained": trained,
        }
    )
    columns = [taxon.name for taxon in presences.taxa]
    random = (table["background"] == "random").to_numpy()
    return (
        table.join(pd.DataFrame(logits[:, :taxa], columns=columns)),
        null_bounds(drawn, logits[:, taxa:], random, folds),
    )


def make_folds(
    rows: NDArray[np.float64],
    cols: NDArray[np.float64],
    count: int,
    background: Places,
    config: FinetuneConfig,
) -> NDArray[np.int64]:
    """Make the folds of the presences, the first `count` places, and of the rest, shape (N,)."""
    chosen = config.validation
    assert chosen is not None
    imagery = background.imagery
    x, y = cols * imagery.resolution_m, rows * imagery.resolution_m
    if chosen.block_m is not None and chosen.method == "blocks":
        return spatial_blocks(
            x,
            y,
            block_m=chosen.block_m,
            folds=chosen.folds,
            seed=config.seed,
            weight=np.arange(len(rows)) < count,
        )
    if chosen.method == "kmeans":
        fold = kmeans_folds(x[:count], y[:count], folds=chosen.folds, seed=config.seed)
    else:
        area = draw_background(imagery, 1, AREA, np.random.default_rng(config.seed))
        fold = knndm(
            x[:count],
            y[:count],
            area.cols * imagery.resolution_m,
            area.rows * imagery.resolution_m,
            folds=chosen.folds,
            seed=config.seed,
        )
    rest = nearest_fold(x[:count], y[:count], fold, x[count:], y[count:])
    return np.concatenate([fold, rest])
