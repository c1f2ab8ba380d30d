"""Spatial folds: held out in turn, scored by models that did not see them, and summed up."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from speciesmap.config import DataConfig, FinetuneConfig, HeadConfig
from speciesmap.errors import ConfigError
from speciesmap.learning.data import PairedRows, Places, on_ground
from speciesmap.learning.fit import process_rank
from speciesmap.learning.heads import fit_taxa, read_places
from speciesmap.learning.sources import draw_background
from speciesmap.models import SpeciesModel
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
from speciesmap.statistics.chance import (
    bound_for,
    draw_null_maps,
    fold_auc,
    informative,
    null_bounds,
    null_scores,
)
from speciesmap.statistics.regression import Records
from speciesmap.taxa import Taxon, listed

FOLDS = "folds"  # scores of the folds of a validation that are done
AREA = 1000  # places of the imagery that folds by `knndm` are matched to

log = logging.getLogger("speciesmap")


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
    laid = _lay(presences, [background] if other is None else [background, other], config)
    end = laid.end
    logits = np.empty((len(laid.rows), len(presences.taxa) + laid.drawn.shape[1]))
    trained = np.empty(len(laid.rows), dtype=np.int64)
    window_px = presences.dataset.window_px
    taxon = np.repeat([-1, -2], [end - len(presences), len(laid.rows) - end])
    taxon = np.concatenate([presences.taxon, taxon])
    names = [taxon.name for taxon in presences.taxa]
    uses = rows_to_train_on(laid.rows, laid.cols, laid.folds, window_px, taxon, names)
    for k, use in track(list(uses.items()), "Cross-validating"):
        held = laid.folds == k
        trained[held] = use[:end].sum()
        kept = None if work is None else work / FOLDS / f"{k}.npy"
        if kept is not None and kept.exists():
            logits[held] = np.load(kept)
            continue
        logits[held] = _score_held_out(base, laid, use, held, config, covariates)
        if kept is not None and process_rank() == 0:
            with replacing(kept, overwrite=True) as beside:
                np.save(beside, logits[held])
    table = laid.table(background_kind(config.data)).assign(trained=trained)
    random = (table["background"] == "random").to_numpy()
    return (
        table.join(pd.DataFrame(logits[:, : len(names)], columns=names)),
        null_bounds(laid.drawn, logits[:, len(names) :], random, laid.folds),
    )


@dataclass(frozen=True)
class _Laid:
    """Presences, then background to train on, then the other kind, as rows of one table.

    Attributes:
        presences: The first rows.
        background: One or two kinds.
        rows: Continuous rows in the imagery, shape (N,).
        cols: Continuous columns, shape (N,).
        folds: Shape (N,).
        drawn: Records of each null map, shape (N, M).
    """

    presences: PairedRows
    background: list[Places]
    rows: NDArray[np.float64]
    cols: NDArray[np.float64]
    folds: NDArray[np.int64]
    drawn: NDArray[np.bool_]

    @property
    def end(self) -> int:
        """Where the rows that may be trained on end."""
        return len(self.presences) + len(self.background[0])

    def read(
        self,
        model: SpeciesModel,
        wanted: NDArray[np.bool_],
        covariates: Covariates | None,
        accelerator: str,
    ) -> Tensor:
        """What a model's heads read at the rows of a mask, shape (n, D + F)."""
        count = len(self.presences)
        parts = [read_places(model, self.presences.subset(wanted[:count]), covariates, accelerator)]
        cuts = [self.end - count]
        for places, part in zip(self.background, np.split(wanted[count:], cuts), strict=False):
            parts.append(read_places(model, places.subset(part), covariates, accelerator))
        return torch.cat(parts)

    def table(self, kind: str) -> pd.DataFrame:
        """The rows as `cross_validate` gives them, with background of a kind, but for scores."""
        count = len(self.presences)
        facts = self.presences.dataset.facts.iloc[self.presences.rows]
        x, y = self.background[0].imagery.xy(self.rows, self.cols)
        nothing = np.full(len(self.rows) - count, "", object)
        kinds = ["", kind, "target-group" if kind == "random" else "random"]
        return pd.DataFrame(
            {
                "observation_id": np.r_[facts["observation_uuid"].to_numpy(dtype=object), nothing],
                "longitude": x,
                "latitude": y,
                "taxon": np.r_[facts["name"].to_numpy(dtype=object), nothing],
                "background": np.repeat(
                    kinds, [count, self.end - count, len(self.rows) - self.end]
                ),
                "fold": self.folds,
            }
        )


def _lay(presences: PairedRows, background: list[Places], config: FinetuneConfig) -> _Laid:
    """Deal all places into folds, and draw null maps where background is random."""
    imagery, count = background[0].imagery, len(presences)
    end = count + len(background[0])
    facts = presences.dataset.facts.iloc[presences.rows]
    rows, cols = imagery.rowcol(facts["longitude"].to_numpy(), facts["latitude"].to_numpy())
    rows = np.concatenate([rows, *(places.rows for places in background)])
    cols = np.concatenate([cols, *(places.cols for places in background)])
    drawn = np.zeros((len(rows), 0), bool)
    if background_kind(config.data) == "random":
        group = np.arange(len(rows)) >= end
        if not group.any():
            group[:count] = ~facts.duplicated(["longitude", "latitude"]).to_numpy()
        counts = np.bincount(presences.taxon, minlength=len(presences.taxa)).tolist()
        drawn = draw_null_maps(group, counts, np.random.default_rng(config.seed))  # (N, M)
    folds = make_folds(rows, cols, count, background[0], config)
    return _Laid(presences, background, rows, cols, folds, drawn)


def _score_held_out(
    base: SpeciesModel,
    laid: _Laid,
    use: NDArray[np.bool_],
    held: NDArray[np.bool_],
    config: FinetuneConfig,
    covariates: Covariates | None,
) -> NDArray[np.floating]:
    """Logits of the taxa, then of null maps, at held-out rows, shape (n, T + M)."""
    count, end, presences = len(laid.presences), laid.end, laid.presences
    model, fitted = fit_taxa(
        base,
        presences.subset(use[:count]),
        laid.background[0].subset(use[count:end]),
        config,
        covariates=covariates,
        fold=laid.folds[:end][use[:end]],
    )
    maps = laid.drawn.shape[1]
    wanted = held | use if maps else held
    features = laid.read(model, wanted, covariates, config.trainer.accelerator)  # (n, D + F)
    with torch.inference_mode():
        logits = model.head(features[torch.from_numpy(held[wanted])]).numpy()  # (n, T)
    known = presences.taxon[use[:count]]
    logits[:, np.setdiff1d(np.arange(len(presences.taxa)), known)] = np.nan
    if not maps:
        return np.asarray(logits)
    trainable = np.arange(len(laid.rows)) < end
    negative = trainable[:, None] & ~laid.drawn  # (N, M)
    learned = use & (laid.drawn.any(1) | trainable)
    table = features.numpy()
    null = null_scores(
        Records(
            table[learned[wanted]],
            laid.drawn[learned].astype(np.float32),
            negative[learned].astype(np.float32),
        ),
        table[held[wanted]],
        fitted.get("penalty"),
        laid.folds[learned],
        (config.head or HeadConfig()).loss,
    )
    return np.concatenate([logits, null], axis=1)


def rows_to_train_on(
    rows: NDArray[np.float64],
    cols: NDArray[np.float64],
    folds: NDArray[np.int64],
    window_px: int,
    taxon: NDArray[np.int64],
    names: Sequence[str],
) -> dict[int, NDArray[np.bool_]]:
    """For each fold, the rows outside it whose windows overlap none of its windows.

    Taxa of which some fold leaves no record are named in a warning.

    Args:
        rows: Of the places, in pixels, shape (N,).
        cols: Shape (N,).
        folds: Shape (N,).
        window_px: Side of what is cut around a place.
        taxon: Position in `names`, -1 for background to train on, less for others, shape (N,).
        names: Of the taxa.

    Returns:
        Masks of shape (N,) by fold.

    Raises:
        ConfigError: A fold leaves fewer than two presences, or places of background.
    """
    uses = {int(k): separated(cols, rows, folds, int(k), window_px + 1) for k in np.unique(folds)}
    lost: set[int] = set()
    for k, use in uses.items():
        here, away = int((taxon[use] >= 0).sum()), int((taxon[use] == -1).sum())
        if min(here, away) < 2:
            raise ConfigError(
                f"fold {k} leaves {here} presences and {away} background places to train on, "
                "since windows that overlap a held-out one are left out; give larger blocks in "
                "validation.block_m, fewer folds, or more places"
            )
        held_out = taxon[(folds == k) & (taxon >= 0)]
        lost.update(np.setdiff1d(held_out, taxon[use]).tolist())
    if lost:
        log.warning(
            "some fold leaves no record of %s to train on, and nothing can be said of those that "
            "it holds out; give fewer folds, or more records",
            listed([names[k] for k in sorted(lost)]),
        )
    return uses


def background_kind(data: DataConfig) -> str:
    """How background is drawn: `random`, `target-group`, or `biased` by a raster of effort."""
    return data.background_kind if data.bias is None else "biased"


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
    x, y = on_ground(imagery, rows, cols)
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
        wanted = on_ground(imagery, area.rows, area.cols)
        fold = knndm(x[:count], y[:count], *wanted, folds=chosen.folds, seed=config.seed)
    rest = nearest_fold(x[:count], y[:count], fold, x[count:], y[count:])
    return np.concatenate([fold, rest])


def summarise(
    folds: pd.DataFrame,
    taxa: Sequence[Taxon],
    background: str = "random",
    bounds: Mapping[int, float] | None = None,
) -> dict[str, Any]:
    """Area under the ROC curve of held-out presences against held-out background.

    Args:
        folds: What `cross_validate` gives.
        taxa: Its taxa.
        background: The kind that the model was trained on.
        bounds: Of null maps of the same folds, by number of records, where there are any.

    Returns:
        For each taxon by name: `auc` over all folds' scores pooled, `auc_folds` one by one (None
        where a fold has no presence), `presences`, less those of folds whose training had none
        (a NaN score); and the pooled AUC against either kind of
        background, `auc_random` and `auc_target_group`. Without target-group places the records of
        the other taxa are these, one per place; of a single taxon it is None. `auc_null` is what
        null maps of as many records stay below against random background, and `informative` is
        the verdict of `speciesmap.statistics.chance.informative`.
    """
    kind = folds["background"].to_numpy()
    place = ~folds.duplicated(["longitude", "latitude"]).to_numpy()
    fold = folds["fold"].to_numpy()
    summary: dict[str, Any] = {}
    for taxon in taxa:
        score = folds[taxon.name].to_numpy()
        scored = np.isfinite(score)
        own = (folds["taxon"] == taxon.name).to_numpy()
        here = own & scored
        group = kind == "target-group"
        if not group.any():
            group = (kind == "") & ~own & place
        against = {"random": (kind == "random") & scored, "target-group": group & scored}
        against.setdefault(background, (kind == background) & scored)
        judged = {
            name: fold_auc(here[here | away], score[here | away], fold[here | away])
            for name, away in against.items()
        }
        bound = bound_for(bounds or {}, int(own.sum()))
        by_fold = {k: judged[k]["auc_folds"] for k, away in against.items() if away.any()}
        summary[taxon.name] = {
            **judged[background],
            **{f"auc_{name.replace('-', '_')}": found["auc"] for name, found in judged.items()},
            "auc_null": bound,
            "informative": informative(by_fold, bound),
        }
    return summary
