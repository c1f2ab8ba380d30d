"""Cleaning rules for observations: each may be turned off, each counts what it drops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from speciesmap.errors import ObservationsError, OutputError
from speciesmap.observations.read import read_observations
from speciesmap.outputs import refuse_existing, replacing

if TYPE_CHECKING:
    import geopandas as gpd

NOT_IN_THE_WILD = ("FOSSIL_SPECIMEN", "LIVING_SPECIMEN")
PLACEHOLDER_UNCERTAINTIES_M = (301.0, 999.0, 3036.0, 9999.0)


@dataclass(frozen=True)
class Rules:
    """Which observations to keep. The defaults are the field's usual ones.

    Attributes:
        present: Drop records of absence (Darwin Core `occurrenceStatus`); GBIF data blog,
            "(Almost) everything you want to know about the GBIF Species API / Common things to
            look out for in post-processing GBIF downloads", Waller 2020.
        wild: Drop fossil and living (zoo, garden) specimens (`basisOfRecord`); same source.
        zero: Drop longitude and latitude both 0, the commonest placeholder; same source.
        captive: Drop captive and cultivated individuals (iNaturalist `captive_cultivated`, Darwin
            Core `establishmentMeans` managed or introduced); same source.
        year_min: Drop records known to be older; 1900, same source. None keeps all. Records
            without a date stay.
        uncertainty_max_m: Drop records known to be less certain, and GBIF's placeholder values
            301, 999, 3036 and 9999 m; 10 km, same source. None keeps all. Records without a
            stated uncertainty stay.
        obscured: Drop records whose published place is a random point of a 0.2 degree cell
            (iNaturalist). Off by default: coarse work can use them. Chips never do.
        research: Drop iNaturalist records that are not research grade. Off by default.
        cell_m: Keep one record per taxon and cell of this side (ENMeval and Wallace thin to one
            per raster cell). None, the default, keeps all.
    """

    present: bool = True
    wild: bool = True
    zero: bool = True
    captive: bool = True
    year_min: int | None = 1900
    uncertainty_max_m: float | None = 10_000.0
    obscured: bool = False
    research: bool = False
    cell_m: float | None = None


def clean_files(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    rules: Rules | None = None,
    taxon: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read records, apply the rules and write one GeoParquet table with a report beside it.

    Args:
        paths: Files and folders of any form that `read_observations` knows.
        out: The table, `*.parquet`; the report has the same stem and ends in `.report.json`.
        rules: What to keep; the defaults of `Rules` if None.
        taxon: Scientific name for rows that carry none.
        overwrite: Whether an existing table may be replaced.

    Returns:
        The report: `read` and `kept` rows, `dropped` rows by rule, `taxa`, and, for citation,
        `sources` (GBIF dataset keys or file names) and `licenses` with their rows.

    Raises:
        ObservationsError: An input cannot be read, or no row is left.
        OutputError: The output exists, or its name does not end in `.parquet`.
    """
    out = Path(out)
    if out.suffix != ".parquet":
        raise OutputError(f"{out} should be a Parquet file; call it {out.with_suffix('.parquet')}")
    refuse_existing(out, overwrite)
    rows = read_observations(paths, taxon=taxon)
    missed = dict(rows.attrs["dropped"])
    kept, dropped = clean(rows, rules)
    dropped = {**missed, **dropped}
    if kept.empty:
        raise ObservationsError(
            f"no observation of {', '.join(map(str, paths))} is left: "
            + ", ".join(f"{count} dropped by {rule}" for rule, count in dropped.items() if count)
            + "; relax a rule"
        )
    report = {
        "path": str(out),
        "read": len(rows) + sum(missed.values()),
        "kept": len(kept),
        "dropped": dropped,
        "taxa": kept["taxon"].value_counts().to_dict(),
        "sources": kept["source"].value_counts().to_dict(),
        "licenses": kept["license"].value_counts().to_dict(),
    }
    kept.attrs = {}
    with replacing(out, overwrite=overwrite) as beside:
        kept.to_parquet(beside)
    with replacing(out.with_suffix(".report.json"), overwrite=True) as beside:
        text = json.dumps(report, indent=1, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")
    return report


def clean(
    observations: gpd.GeoDataFrame, rules: Rules | None = None
) -> tuple[gpd.GeoDataFrame, dict[str, int]]:
    """Apply the rules one after the other.

    Args:
        observations: As `read_observations` gives them.
        rules: What to keep; the defaults of `Rules` if None.

    Returns:
        The rows kept, and for each rule that ran, in order, how many rows it dropped.
    """
    rules = rules or Rules()
    kept = observations
    dropped: dict[str, int] = {}
    for rule in fields(rules):
        setting = getattr(rules, rule.name)
        if setting is None or setting is False:
            continue
        keep = _keep(kept, rule.name, setting)
        dropped[rule.name] = int(len(kept) - keep.sum())
        kept = kept[keep]
    return kept.reset_index(drop=True), dropped


def _keep(rows: gpd.GeoDataFrame, rule: str, setting: float) -> NDArray[np.bool_]:
    if rule == "present":
        keep = rows["status"].str.upper() != "ABSENT"
    elif rule == "wild":
        keep = ~rows["basis"].isin(NOT_IN_THE_WILD)
    elif rule == "zero":
        keep = (rows["longitude"] != 0) | (rows["latitude"] != 0)
    elif rule == "year_min":
        keep = ~(rows["date"].dt.year < setting)
    elif rule == "uncertainty_max_m":
        placeholder = rows["uncertainty_m"].isin(PLACEHOLDER_UNCERTAINTIES_M)
        keep = ~(rows["uncertainty_m"] > setting) & ~placeholder
    elif rule == "research":
        keep = rows["quality_grade"].isin(["research", ""])
    elif rule == "cell_m":
        return first_per_cell(rows, setting, by_taxon=True)
    else:
        keep = ~rows[rule]
    answer: NDArray[np.bool_] = keep.to_numpy(dtype=bool)
    return answer


def first_per_cell(
    observations: gpd.GeoDataFrame, cell_m: float, *, by_taxon: bool = False
) -> NDArray[np.bool_]:
    """Mark the most certain observation of each occupied cell.

    Args:
        observations: As `read_observations` gives them.
        cell_m: Side of a cell, in metres, in the equal-area grid EPSG:6933.
        by_taxon: One per cell for each taxon rather than one for all.

    Returns:
        True for the rows to keep, shape (N,). Among equals the first row wins.

    Raises:
        ObservationsError: `cell_m` is not above 0.
    """
    if not cell_m > 0:
        raise ObservationsError(f"a cell of {cell_m} m has no area; give a side above 0 m")
    from pyproj import Transformer

    x, y = Transformer.from_crs("EPSG:4326", "EPSG:6933", always_xy=True).transform(
        observations["longitude"].to_numpy(), observations["latitude"].to_numpy()
    )
    cells = pd.DataFrame(
        {
            "column": np.floor(np.asarray(x) / cell_m),
            "row": np.floor(np.asarray(y) / cell_m),
            "taxon": observations["taxon"].to_numpy() if by_taxon else "",
        }
    )
    uncertainty = observations["uncertainty_m"].fillna(np.inf).to_numpy()
    order = np.argsort(uncertainty, kind="stable")
    repeated = cells.iloc[order].duplicated().to_numpy()
    keep = np.empty(len(cells), dtype=bool)
    keep[order] = ~repeated
    return keep
