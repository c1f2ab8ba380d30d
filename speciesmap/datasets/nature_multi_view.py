"""What is particular to Nature Multi-View: its home on the hub, its subsets, its taxon numbers."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from speciesmap.datasets.columns import FRACTIONS
from speciesmap.datasets.splits import SPLITS
from speciesmap.errors import DatasetError
from speciesmap.taxa import RANKS

log = logging.getLogger("speciesmap")


def remote_files(address: str) -> tuple[str, ...]:
    """List the Parquet files below an address, such as `hf://datasets/OWNER/NAME`.

    Args:
        address: Of any file system that fsspec knows.

    Raises:
        DatasetError: The address cannot be reached or holds no Parquet file.
    """
    try:
        system, root = fsspec.core.url_to_fs(address)
        found = system.find(root)
    except Exception as error:  # each file system raises its own kinds
        raise DatasetError(
            f"{address} cannot be listed ({type(error).__name__}: {' '.join(str(error).split())});"
            " check the address and the network, or download the files and give their folder"
        ) from error
    files = sorted(system.unstrip_protocol(file) for file in found if file.endswith(".parquet"))
    if not files:
        raise DatasetError(f"{address} holds no Parquet file; check the address")
    return tuple(files)


def of_split(file: str, split: str) -> bool:
    """Tell whether a file belongs to a split, by its name or folder, as the hub does.

    Args:
        file: Its path in the data set.
        split: `train`, `validation` or `test`, or another name that files have.

    Raises:
        DatasetError: Folder and name say different splits.
    """
    parts = Path(file).parts
    said = [
        name
        for name in {split, *SPLITS}
        if parts[-1].startswith(f"{name}-") or parts[-1] == f"{name}.parquet" or name in parts[:-1]
    ]
    if split in said and len(said) > 1:
        raise DatasetError(
            f"{file} is of {' and '.join(sorted(said))} by its folder and name; rename one of them"
        )
    return split in said


def chosen_rows(
    facts: pd.DataFrame,
    where: object,
    *,
    one_per_observation: bool = False,
    supervised: bool = False,
    percent: float | None = None,
) -> NDArray[np.bool_]:
    """Choose rows by the columns that Nature Multi-View marks them with.

    Args:
        facts: Columns beside the images.
        where: What to call the data set in an error.
        one_per_observation: One row of each observation, whose photos share a window
            (`rs_classification`).
        supervised: Rows of research grade identified to species (`supervised`).
        percent: A share of labelled rows, one of `FRACTIONS` (`finetune_*percent`).

    Returns:
        Shape (N,).

    Raises:
        DatasetError: A column is missing, or there is no such share.
    """
    wanted = np.ones(len(facts), dtype=bool)
    columns = ["rs_classification"] * one_per_observation + ["supervised"] * supervised
    if percent is not None:
        names = {float(share): share for share in FRACTIONS}
        if float(percent) not in names:
            raise DatasetError(
                f"there is no share of {percent:g} percent; choose one of {', '.join(FRACTIONS)}"
            )
        columns.append(f"finetune_{names[float(percent)]}percent")
    for column in columns:
        if column not in facts:
            raise DatasetError(
                f"{where} has no column {column!r}, by which rows are to be chosen; leave the "
                "choice out, or make the data set with `speciesmap chips`"
            )
        wanted &= facts[column].fillna(False).to_numpy(dtype=bool)
    return wanted


def unrepeated(facts: pd.DataFrame, where: object) -> NDArray[np.bool_]:
    """Which rows come for the first time, by the numbers of observation and photo, shape (N,).

    Rows without either number are taken to differ. What repeats is counted in a warning.

    Args:
        facts: Columns beside the images.
        where: What to call the data set in the warning.
    """
    if not facts["observation_uuid"].fillna("").ne("").any():
        log.warning(
            "%s does not tell which rows are of one observation (no observation_uuid, no "
            "gl_inat_id): neither photos that come twice can be found, nor observations that two "
            "splits share; overlapping windows can",
            where,
        )
    if "gl_photo_id" not in facts:
        return np.ones(len(facts), dtype=bool)
    keys = facts[["observation_uuid", "gl_photo_id"]]
    known = keys["observation_uuid"].fillna("").ne("") & keys["gl_photo_id"].fillna(0).ne(0)
    again: NDArray[np.bool_] = (keys.duplicated() & known).to_numpy()
    if again.any():
        log.warning(
            "%s: %d rows left out that repeat a photo of their observation", where, again.sum()
        )
    return np.logical_not(again)


def read_taxonomy(path: Path | str) -> dict[int, tuple[str, str]]:
    """Read a table that tells rank and name of iNaturalist's taxon numbers.

    iNaturalist Open Data gives one, `taxa.csv.gz`.

    Args:
        path: CSV or TSV, also compressed, or Parquet, with the columns `taxon_id`, `rank`, `name`.

    Returns:
        Rank and name by number.

    Raises:
        DatasetError: The file cannot be read or lacks a column.
    """
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, sep=None, engine="python")
    except (
        OSError, ValueError, TypeError, LookupError, NotImplementedError, csv.Error,
    ) as error:  # fmt: skip
        raise DatasetError(
            f"taxonomy {path} cannot be read ({' '.join(str(error).split())}); give a CSV, TSV or "
            "Parquet file"
        ) from error
    for column in ("taxon_id", "rank", "name"):
        if column not in table:
            raise DatasetError(
                f"taxonomy {path} has no column {column!r}; it needs taxon_id, rank and name"
            )
    table = table.dropna(subset=["taxon_id", "rank", "name"])
    doubled = table["taxon_id"][table["taxon_id"].duplicated()]
    if len(doubled):
        raise DatasetError(f"taxonomy {path} lists taxon {doubled.iloc[0]} twice; keep one")
    return {
        int(number): (str(rank), str(name))
        for number, rank, name in zip(table["taxon_id"], table["rank"], table["name"], strict=True)
    }


def lineage_of(
    ancestry: str | None, taxonomy: Mapping[int, tuple[str, str]] | None = None
) -> tuple[str, ...]:
    """Split an ancestry into names, broadest first.

    iNaturalist's numbers become names of `RANKS` by a taxonomy; without one they name nothing.
    """
    names = []
    for part in (part.strip() for part in str(ancestry or "").split("/")):
        if part.isdigit():
            rank, name = (taxonomy or {}).get(int(part), ("", ""))
            part = name if rank in RANKS else ""
        if part:
            names.append(part)
    return tuple(names)
