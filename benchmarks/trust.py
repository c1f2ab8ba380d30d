"""What maps say of themselves, held against simulated landscapes whose truth is known.

    speciesmap demo --scene simulated --out demo
    python benchmarks/trust.py demo/simulated/pretrained --seeds 1 2 3 4 5 --out runs/trust

The encoder is that of the demo, pre-trained on the landscape of seed 0 and frozen. Every other seed
is another landscape with other species, of which only biased records are given, and each species'
prevalence. A flora of 24 was recorded there, whose records are the target group. For each seed,
heads are fitted to seven species and the control, and these mapped; then

- `rho` is Spearman's correlation of the map with the true probability, mean over species;
- `calibration error` is the expected calibration error against it, in ten bins, mean over species;
- `control flagged` says whether the species that follows nothing visible was called uninformative,
  `others flagged` how many of the rest were;
- `omission` is the share of independently surveyed presences below the 5th percentile of the
  training presences, which was fixed at training;
- `flagged, withheld half` is the share of one half of the landscape's habitat that is outside the
  area of applicability of places drawn from the other half, `farthest quarter` that of the quarter
  least like them, and `flagged, known half` that of the half drawn from; halves are those of each
  latent field in turn (elevation, moisture, canopy, soil), and the figures their mean.

The first seed is trained twice: its thresholds must come out the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio
import torch
from scipy.stats import spearmanr

from speciesmap.atlas import predict
from speciesmap.config import load_config
from speciesmap.datasets.chips import make_chips
from speciesmap.learning.train import train
from speciesmap.mapping.applicability import applicable, learn_applicability
from speciesmap.models import read_facts
from speciesmap.observations.folds import spatial_blocks
from speciesmap.observations.read import read_observations
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.store import open_store
from speciesmap.rasters.windows import transformed
from speciesmap.simulate import Scene, simulate
from speciesmap.simulate.landscape import make_landscape
from speciesmap.simulate.species import Streams
from speciesmap.statistics.metrics import omission

WINDOW_PX, STRIDE_PX, BLOCK_M = 64, 16, 150.0
FLORA, MODELLED = 24, 8  # species, the control among both
KNOWN = 1000  # places that the area of applicability is learned from
BINS = 10


def fit(scene: Scene, encoder: Path, out: Path, seed: int) -> Path:
    """Fit heads to the records of a scene, with its prevalences stated."""
    taxa = modelled(json.loads(scene.description.read_text())["taxa"])
    settings = {
        "stage": "finetune",
        "init": str(encoder),
        "seed": seed,
        "freeze_encoder": True,
        "head": {"loss": "assume_negative"},
        "data": {
            "dataset": str(scene.path.parent / "chips"),
            "imagery": str(scene.aerial),
            "background": 2000,
            "target_group": str(scene.observations),
        },
        "validation": {
            "folds": 5,
            "block_m": BLOCK_M,
            "prevalence": {taxon["name"]: taxon["prevalence"] for taxon in taxa},
        },
    }
    return train(load_config(settings), out)


def modelled(taxa: Sequence[Any]) -> Sequence[Any]:
    """The first species, and the control, which is last."""
    return [*taxa[: MODELLED - 1], taxa[-1]]


def cells(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Values of a map's first band, where it has any, and the places of these cells."""
    with rasterio.open(path) as raster:
        values, transform, crs = raster.read(1), raster.transform, str(raster.crs)
    row, col = np.nonzero(np.isfinite(values))
    return values[row, col], *transformed(transform, col + 0.5, row + 0.5), crs


def agreement(path: Path, truth: Path) -> tuple[float, float]:
    """Spearman's rho and expected calibration error of a map against the true probability."""
    said, x, y, crs = cells(path)
    raster = open_imagery(truth)
    quarter = STRIDE_PX / 4 * 0.6  # metres from a cell's centre to those of its four truth cells
    around = [(a * quarter, b * quarter) for a in (-1, 1) for b in (-1, 1)]
    true = np.mean([raster.sample(x + dx, y + dy, crs)[0] for dx, dy in around], axis=0)
    said, true = said[np.isfinite(true)], true[np.isfinite(true)]  # at the margin there is none
    bins = np.clip((said * BINS).astype(int), 0, BINS - 1)
    table = pd.DataFrame({"bin": bins, "said": said, "true": true}).groupby("bin")
    gap, count = (table["said"].mean() - table["true"].mean()).abs(), table.size()
    rho = spearmanr(said, true).statistic if np.ptp(said) > 0 else 0.0  # of a flat map
    return float(rho), float(np.average(gap, weights=count))


def surveyed_omission(scene: Scene, maps: dict[str, Path], thresholds: dict[str, Any]) -> float:
    """Share of surveyed presences below the first threshold, mean over species."""
    sites = pd.read_csv(scene.sites)
    found = []
    for name, path in maps.items():
        here = sites[(sites["taxon"] == name) & (sites["present"] == 1)]
        value = open_imagery(path, bands=["1"]).sample(here["lon"], here["lat"])[0]
        share = omission(value[np.isfinite(value)], next(iter(thresholds[name].values())))
        found.append(np.nan if share is None else share)
    return float(np.nanmean(found))


def withheld(store_path: Path, seed: int, size_px: int) -> dict[str, float]:
    """How much of a withheld half is outside the area of applicability of the other half.

    Mean over the fields that make the landscape, each of which splits it in turn.
    """
    store = open_store(store_path)
    rows, cols = store.geobox.shape
    vectors = store.read(slice(0, rows), slice(0, cols)).astype(np.float32)
    landscape = make_landscape(Streams(seed)("landscape", 0), size_px)
    row, col = np.nonzero(np.isfinite(vectors[..., 0]))
    x, y = transformed(store.geobox.transform, col + 0.5, row + 0.5)
    j, i = (v.astype(int) for v in transformed(~landscape.cell_geobox.transform, x, y))
    vectors = vectors[row, col]
    rng = np.random.default_rng(seed)
    found = []
    for field in landscape.fields[:, i, j]:
        known = np.flatnonzero(field < 0)
        drawn = rng.permutation(known)[:KNOWN]
        fold = spatial_blocks(x[drawn], y[drawn], block_m=BLOCK_M, folds=5, seed=seed)
        area = learn_applicability(torch.from_numpy(vectors[drawn]), fold, rng)
        assert area is not None
        outside = applicable(vectors, area) == 0
        found.append(
            (
                outside[field > 0].mean(),
                outside[field > np.quantile(field, 0.75)].mean(),
                outside[np.setdiff1d(known, drawn)].mean(),
            )
        )
    names = ("flagged, withheld half", "flagged, farthest quarter", "flagged, known half")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


def one_seed(encoder: Path, out: Path, seed: int, size_px: int, twice: bool) -> dict[str, Any]:
    """All figures of one landscape."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    scene = simulate(out / "scene", size_px=size_px, seed=seed, species=FLORA)
    imagery = open_imagery(scene.aerial)
    records = read_observations(scene.observations)
    records = records[records["taxon"].isin([taxon.name for taxon in modelled(scene.taxa)])]
    make_chips(records, imagery, out / "chips", window_px=WINDOW_PX)
    model = fit(scene, encoder, out / "model", seed)
    facts = read_facts(model)
    made = predict(model, imagery=imagery, out=out / "maps", stride_px=STRIDE_PX)
    maps = {m.query.label: m.path for m in made.maps}
    found = {name: agreement(path, scene.truth[name]) for name, path in maps.items()}
    judged = {name: f["informative"] for name, f in facts["metrics"]["validation"].items()}
    others = [name for name in maps if name != scene.control]
    result: dict[str, Any] = {
        "rho": float(np.mean([found[name][0] for name in others])),
        "rho of the control": found[scene.control][0],
        "calibration error": float(np.mean([found[name][1] for name in others])),
        "worst calibration error": max(found[name][1] for name in others),
        "calibration error of the control": found[scene.control][1],
        "control flagged": judged[scene.control] is False,
        "others flagged": sum(judged[name] is False for name in others),
        "auc of the control": facts["metrics"]["validation"][scene.control]["auc_mean"],
        "auc of null maps": facts["metrics"]["validation"][scene.control]["auc_null"],
        "omission": surveyed_omission(scene, maps, facts["trust"]["thresholds"]),
        **withheld(made.store, seed, size_px),
    }
    if twice:
        again = read_facts(fit(scene, encoder, out / "again", seed))["trust"]["thresholds"]
        result["thresholds reproduce"] = again == facts["trust"]["thresholds"]
    return result


def main() -> None:
    """Print a table, a row for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--size-px", type=int, default=1536)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = {}
    for seed in options.seeds:
        twice = seed == options.seeds[0]
        runs[seed] = one_seed(
            options.encoder, options.out / str(seed), seed, options.size_px, twice
        )
        print(seed, json.dumps(runs[seed]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(runs, indent=2))
    print("| seed |", " | ".join(map(str, runs)), "|")
    print("|---" * (len(runs) + 1) + "|")
    for name in runs[options.seeds[0]]:
        values = [runs[seed].get(name, "") for seed in runs]
        shown = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in values]
        print(f"| {name} |", " | ".join(shown), "|")


if __name__ == "__main__":
    main()
