"""Heads on covariates against elapid's MaxEnt, on the NCEAS benchmark (Elith et al. 2020).

Trains on presence-only records, tests on independent presence-absence surveys. Nothing is chosen
on the surveys: penalties come from spatial folds of the training sites.

    python benchmarks/sdm/disdat.py PATH/TO/disdat [--regions AWT NSW SWI] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import rdata
import torch

from speciesmap.evaluation.baselines import fit_maxent
from speciesmap.observations.folds import spatial_blocks
from speciesmap.statistics.metrics import auc, paired_difference
from speciesmap.statistics.regression import Records, fit_covariates

CATEGORICAL = {"ontveg", "vegsys", "toxicats", "age", "calc"}
FACTS = 6  # columns before the covariates: siteid, spid, x, y, occ, group
FOLDS = 4
BLOCKS = 20  # along the longer side of a region
RIVALS = ("MaxEnt, random", "MaxEnt, target group", "heads, random", "heads, target group")


@dataclass(frozen=True)
class Region:
    """Training sites and surveys of one region.

    Attributes:
        covariates: Their names.
        categorical: Positions of those that name categories.
        species: Codes.
        sites: Distinct training sites, then random background.
        presences: Bool, shape (sites, species).
        target: Sites where anything of the species' own group was recorded, same shape.
        random: Sites drawn at random from the region, shape (sites,).
        surveys: Covariates at surveyed sites, and which species were present.
    """

    covariates: list[str]
    categorical: list[int]
    species: list[str]
    sites: pd.DataFrame
    presences: np.ndarray
    target: np.ndarray
    random: np.ndarray
    surveys: list[tuple[pd.DataFrame, pd.DataFrame]]


def read(path: Path) -> pd.DataFrame:
    """Read a table, everything but codes as numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = rdata.read_rds(str(path))
    codes = {"siteid", "spid", "group"}
    return table.astype({c: str if c in codes else float for c in table}).reset_index(drop=True)


def read_region(folder: Path, name: str) -> Region:
    """Read all tables of a region."""
    records, random = read(folder / f"{name}train_po.rds"), read(folder / f"{name}train_bg.rds")
    covariates = list(records.columns[FACTS:])
    surveys = []
    for path in sorted(folder.glob(f"{name}test_pa*.rds")):
        found, where = read(path), read(path.with_name(path.name.replace("_pa", "_env")))
        if not (found["siteid"] == where["siteid"]).all():
            raise SystemExit(f"{path}: sites are in another order than their covariates")
        surveys.append((where[covariates], found.iloc[:, 4:].astype(bool)))
    species = [code for _, found in surveys for code in found]
    spots = records.drop_duplicates(["x", "y"])
    number = pd.MultiIndex.from_frame(spots[["x", "y"]])
    site = number.get_indexer(pd.MultiIndex.from_frame(records[["x", "y"]]))
    sites = pd.concat([spots, random], ignore_index=True)
    presences = np.zeros((len(sites), len(species)), bool)
    target = np.zeros_like(presences)
    for k, code in enumerate(species):
        own = (records["spid"] == code).to_numpy()
        group = records.loc[own, "group"].iloc[0]
        presences[site[own], k] = True
        target[site[(records["group"] == group).to_numpy()], k] = True
    return Region(
        covariates,
        [k for k, c in enumerate(covariates) if c in CATEGORICAL],
        species,
        sites,
        presences,
        target,
        np.arange(len(sites)) >= len(spots),
        surveys,
    )


def heads(region: Region, background: np.ndarray) -> list[np.ndarray]:
    """Scores at each survey, shape (sites, its species), by one model of all species."""
    use = region.presences.any(1) | background.any(1)
    sites = region.sites[use]
    records = Records(
        sites[region.covariates].to_numpy(),
        region.presences[use].astype(np.float32),
        background[use].astype(np.float32),
        region.categorical,
    )
    extent = float(np.ptp(sites[["x", "y"]].to_numpy(), axis=0).max())
    fold = spatial_blocks(
        sites["x"], sites["y"], block_m=extent / BLOCKS, folds=FOLDS, seed=0,
        weight=records.presences.sum(1),
    )  # fmt: skip
    model = fit_covariates(records, fold)
    print(f"    penalty {model.penalty:g} chosen on folds", flush=True)
    position = {code: k for k, code in enumerate(region.species)}
    return [
        model.standardised(where.to_numpy())[:, [position[code] for code in found]]
        for where, found in region.surveys
    ]


def maxent(region: Region, background: np.ndarray) -> list[np.ndarray]:
    """Scores of elapid's MaxEnt, species by species."""
    values = region.sites[region.covariates].to_numpy()
    scores = []
    for where, found in region.surveys:
        columns = []
        for code in found:
            k = region.species.index(code)
            here, away = values[region.presences[:, k]], values[background[:, k]]
            columns.append(fit_maxent(here, away, region.categorical)(where.to_numpy()))
        scores.append(np.column_stack(columns))
    return scores


def survey_auc(region: Region, scores: list[np.ndarray]) -> list[float]:
    """AUC of each species at its surveyed sites."""
    return [
        auc(found[code], score[:, j]) or np.nan
        for (_, found), score in zip(region.surveys, scores, strict=True)
        for j, code in enumerate(found)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--regions", nargs="+", default=["AWT", "NSW", "SWI"])
    parser.add_argument("--methods", nargs="+", choices=RIVALS, default=RIVALS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {}
    print("| region | species | method | mean AUC | CPU seconds | last method minus it |")
    print("|---|---|---|---|---|---|")
    for name in options.regions:
        region = read_region(options.folder, name)
        everywhere = np.repeat(region.random[:, None], len(region.species), axis=1)
        runs = {}
        for label in options.methods:
            run = heads if label.startswith("heads") else maxent
            started = time.process_time()
            scores = run(region, everywhere if label.endswith("random") else region.target)
            seconds = time.process_time() - started  # of one thread, whatever else runs
            runs[label] = {"auc": survey_auc(region, scores), "seconds": seconds}
        ours = runs[options.methods[-1]]["auc"]
        for label, found in runs.items():
            gap = paired_difference(ours, found["auc"])
            found |= gap
            text = "" if label == options.methods[-1] else (
                f"{gap['difference']:+.4f} ± {gap['standard_error']:.4f} "
                f"(higher in {gap['better']} of {gap['pairs']})"
            )  # fmt: skip
            figures = f"{np.nanmean(found['auc']):.4f} | {found['seconds']:.1f}"
            print(f"| {name} | {len(ours)} | {label} | {figures} | {text} |", flush=True)
        result[name] = dict(runs)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
