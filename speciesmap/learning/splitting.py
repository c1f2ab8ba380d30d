"""Labelled rows for training, validation and testing that share no observation and no ground."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from speciesmap.config import ClassifyConfig, SplitsConfig
from speciesmap.datasets.birds import BirdDataset
from speciesmap.datasets.nature_multi_view import chosen_rows, of_split, unrepeated
from speciesmap.datasets.paired import PairedDataset
from speciesmap.datasets.splits import SPLITS, leaks
from speciesmap.errors import ConfigError
from speciesmap.learning.data import PairedRows
from speciesmap.learning.sources import named
from speciesmap.observations.folds import spatial_blocks
from speciesmap.rasters.grid import METRES_PER_DEGREE

log = logging.getLogger("speciesmap")


def split_rows(
    dataset: PairedDataset | BirdDataset, config: ClassifyConfig
) -> tuple[dict[str, NDArray[np.int64]], dict[str, Any]]:
    """Choose labelled rows for training, validation and testing that share nothing.

    Rows of training whose observation or ground is in validation or testing are left out, and so
    are rows of validation whose observation or ground is in testing. Taxa that training does not
    have cannot be named, and their rows are left out of the others.

    Args:
        dataset: All rows.
        config: `data`, `splits` and what makes rows usable.

    Returns:
        Row numbers by split, and how many rows and taxa there are and were left out.

    Raises:
        ConfigError: A split has no rows.
    """
    facts = dataset.facts
    chosen = chosen_rows(
        facts,
        dataset.path,
        one_per_observation=config.data.one_per_observation,
        supervised=config.data.supervised,
    )
    chosen &= named(dataset, config.data)
    chosen &= unrepeated(facts, dataset.path)
    member = _member(dataset, config.splits, config.seed)
    rows = {name: np.flatnonzero(chosen & (member == k)) for k, name in enumerate(SPLITS)}
    notes: dict[str, Any] = {}
    if config.splits.block_m is not None:
        notes["rows left out of the blocks without a place"] = int((chosen & (member < 0)).sum())
    if isinstance(dataset, BirdDataset):  # opening it has left out what leaks
        notes |= {f"left out: {reason}": count for reason, count in dataset.left_out.items()}
    else:
        used = np.concatenate(list(rows.values()))
        unnumbered = facts["observation_uuid"].fillna("").eq("").to_numpy()[used]
        unplaced = facts[["latitude", "longitude"]].isna().any(axis=1).to_numpy()[used]
        for lacking, count in (
            ("observation_uuid, whose observation", int(unnumbered.sum())),
            ("a place, whose ground", int(unplaced.sum())),
        ):
            if count:
                notes[f"rows without {lacking} may be in two splits"] = count
        table = (
            facts[["latitude", "longitude"]]
            .iloc[used]
            .assign(
                split=np.repeat(SPLITS, [len(part) for part in rows.values()]),
                observation_uuid=identity(facts, used),
            )
        )
        leaking = leaks(table, dataset.window_px * dataset.resolution_m)
        notes |= {f"left out: {reason}": int(found.sum()) for reason, found in leaking.items()}
        free = ~np.any(list(leaking.values()), axis=0)
        rows = {name: used[free & (table["split"] == name).to_numpy()] for name in SPLITS}
    known = set(facts["name"].to_numpy()[rows["train"]])
    for name in ("validation", "test"):
        new = ~facts["name"].iloc[rows[name]].isin(known).to_numpy()
        rows[name] = rows[name][~new]
        notes[f"{name} rows left out of taxa without training rows"] = int(new.sum())
    told = "; ".join(f"{count} {text}" for text, count in notes.items() if count)
    for name in SPLITS:
        if not len(rows[name]):
            raise ConfigError(
                f"{dataset.path} has no rows for {name} ({told or 'nothing was left out'}); name "
                "other splits, or set splits.block_m to split by blocks"
            )
        notes[f"{name} rows"] = len(rows[name])
    notes["taxa"] = len(known)
    for text, count in notes.items():
        log.info("%s: %s", text, count)
    return rows, notes


def _member(
    dataset: PairedDataset | BirdDataset, splits: SplitsConfig, seed: int
) -> NDArray[np.int64]:
    """Split of each row, counted as in `SPLITS`, -1 for none, shape (N,)."""
    names = (splits.train, splits.validation, splits.test)
    if isinstance(dataset, BirdDataset):
        if splits.block_m is not None:
            raise ConfigError(f"{dataset.path} has its own splits; leave splits.block_m out")
        return np.asarray(pd.Categorical(dataset.facts["split"], names).codes, np.int64)
    if splits.block_m is None:
        member = np.full(len(dataset), -1)
        for k, name in enumerate(names):
            member[dataset.rows_of(partial(of_split, split=name))] = k
        return member
    x, y = _metres(dataset.facts)
    placed = np.isfinite(x) & np.isfinite(y)  # no block holds the others
    tenth = spatial_blocks(x[placed], y[placed], block_m=splits.block_m, folds=10, seed=seed)
    member = np.full(len(dataset), -1)
    member[placed] = np.where(tenth < 7, 0, np.where(tenth == 7, 1, 2))
    return member


def _metres(facts: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eastings and northings, true to scale along every parallel (sinusoidal projection)."""
    latitude = facts["latitude"].to_numpy(np.float64)
    x = facts["longitude"].to_numpy(np.float64) * METRES_PER_DEGREE * np.cos(np.radians(latitude))
    return x, latitude * METRES_PER_DEGREE


def observations_of(facts: pd.DataFrame, rows: PairedRows) -> NDArray[np.int64]:
    """How many observations of each taxon the rows have, shape (T,)."""
    first = np.unique(identity(facts, rows.rows), return_index=True)[1]
    return np.bincount(rows.taxon[first], minlength=len(rows.taxa))


def identity(facts: pd.DataFrame, rows: NDArray[np.int64]) -> NDArray[Any]:
    """What tells the rows of one observation, shape (N,); a row without it is one by itself."""
    alone = np.char.add("row ", rows.astype(str))
    told = facts["observation_uuid"].fillna("").astype(str).to_numpy()[rows].astype(str)
    return np.where(told == "", alone, told)
