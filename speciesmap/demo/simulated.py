"""The simulated scene: the full method on a landscape whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from speciesmap.atlas import Prediction, predict
from speciesmap.config import load_config, shipped_config
from speciesmap.datasets.chips import make_chips
from speciesmap.demo.scene import SceneResult, assigned, rounded
from speciesmap.evaluation.baselines import logistic, trained_scores, window_statistics
from speciesmap.learning.data import Places
from speciesmap.learning.sources import draw_background
from speciesmap.learning.train import train
from speciesmap.mapping.query import Query, photo_query, taxon_query, text_query
from speciesmap.models import SpeciesModel, load_model
from speciesmap.observations.read import read_observations
from speciesmap.present.page import Scene
from speciesmap.rasters.imagery import open_imagery
from speciesmap.simulate import Scene as Landscape
from speciesmap.simulate import simulate
from speciesmap.statistics.metrics import auc
from speciesmap.taxa import Taxon

WINDOW_PX = 64
PHOTOS = 5  # of each taxon, kept out of training, ask for its map
WAYS = {"taxon": "learned", "photo": "photos", "text": "name"}


@dataclass(frozen=True)
class Study:
    """A simulated landscape and how its observations are used.

    Attributes:
        landscape: Its files.
        withheld: Name of the taxon that no training sees.
        observations: What may be trained on, and the withheld taxon's.
        photos: Ground photos that ask for a map, by taxon; none belongs to `observations`.
        chips: Paired data set of `observations`.
        seed: Of everything random.
    """

    landscape: Landscape
    withheld: str
    observations: gpd.GeoDataFrame
    photos: Mapping[str, list[Path]]
    chips: Path
    seed: int

    @property
    def data(self) -> list[str]:
        """Assignments to the shipped configurations that name this study's data."""
        return [
            f"seed={self.seed}",
            assigned("data.dataset", self.chips),
            f"data.withheld=[{self.withheld}]",
            assigned("data.imagery", self.landscape.aerial),
        ]


def run(out: Path, seed: int = 0) -> SceneResult:
    """Simulate, pre-train on pairs and names, fine-tune, and map every taxon in three ways.

    One species is withheld from all training and asked for by its name, a known genus with an
    unknown epithet, and by photos.

    Args:
        out: Folder of the scene, made here.
        seed: Of everything random.

    Returns:
        Files, figures and the scene's part of the page.
    """
    study = prepare(out, seed)
    landscape, withheld, observations = study.landscape, study.withheld, study.observations
    observations.to_parquet(out / "observations.parquet")
    pre_train = load_config(shipped_config("demo_crisp.yaml"), study.data)
    pretrained = train(pre_train, out / "pretrained")
    tune = load_config(
        shipped_config("demo_finetune.yaml"), [*study.data, assigned("init", pretrained)]
    )
    folder = train(tune, out / "model")
    prediction, maps = map_taxa(study, folder, out)
    table = measure(study, maps, baseline(study, load_model(folder).fill))
    means = mean_rho(table)
    control = next(row for row in table if row["role"] == "control")
    unseen = next(row for row in table if row["role"] == "withheld")
    return SceneResult(
        imagery=landscape.aerial,
        observations=landscape.observations,
        model=folder,
        store=prediction.store,
        maps=maps["learned"],
        maps_by_photo=maps["photos"],
        maps_by_name=maps["name"],
        html=prediction.html,
        truth=landscape.truth,
        sites=landscape.sites,
        metrics={
            "mean_rho": rounded(means),
            "control": landscape.control,
            "withheld": withheld,
            "taxa": table,
        },
        page=Scene(
            title="A simulated landscape, where the truth is known",
            text=(
                "Windows, ground photos and names share one space, learned from "
                f"{len(observations)} observations that crowd along roads. Each species is asked "
                "for by its learned embedding, by five photos that training never saw, and by its "
                f"name. {withheld} was withheld from all training: its genus is known, its epithet "
                f"and its photos are not. {landscape.control} is a control that follows nothing "
                "visible. Baseline: logistic regression on band means and textures, same labels."
            ),
            map=prediction.html,
            rasters=list(maps["learned"].values()),
            imagery=landscape.aerial,
            figures=[
                (f"{means['learned']:.2f}", "mean Spearman's rho to the truth, learned embedding"),
                (f"{means['photos']:.2f}", "asked by five photos"),
                (f"{means['name']:.2f}", "asked by name"),
                (f"{means['baseline']:.2f}", "band means and textures"),
                (f"{unseen['rho name']:.2f}", "a species never seen, by its name"),
                (f"{control['rho learned']:.2f}", "control species"),
            ],
            tables={"At 600 independent random sites": table},
            files={"sites": landscape.sites, "observations": landscape.observations},
        ),
    )


def prepare(out: Path, seed: int) -> Study:
    """Simulate a landscape, keep five photos of each taxon to ask with, and cut chips.

    Args:
        out: Folder to work in.
        seed: Of the landscape and of all training on it.
    """
    landscape = simulate(out / "scene", seed=seed)
    everything = read_observations(landscape.observations)
    asking = everything.groupby("taxon").head(PHOTOS).index
    observations = everything.drop(index=asking).reset_index(drop=True)
    imagery = open_imagery(landscape.aerial)
    make_chips(observations, imagery, out / "chips", window_px=WINDOW_PX, photos=landscape.photos)
    photos = {
        str(name): [landscape.photos / file for file in rows["photo"]]
        for name, rows in everything.loc[asking].groupby("taxon")
    }
    return Study(landscape, landscape.taxa[1].name, observations, photos, out / "chips", seed)


def map_taxa(
    study: Study, folder: Path, out: Path
) -> tuple[Prediction, dict[str, dict[str, Path]]]:
    """Map every taxon of a study in each way that a model can be asked in.

    Args:
        study: What to ask for.
        folder: The model; taxa that it did not learn are asked for by photos and name only.
        out: Gets `store.zarr` and `maps`.

    Returns:
        The prediction, and its maps by way and taxon.
    """
    prediction = predict(
        folder,
        imagery=study.landscape.aerial,
        store=out / "store.zarr",
        out=out / "maps",
        queries=ask(load_model(folder), study.landscape.taxa, study.photos),
        observations=study.observations,
        title="A simulated landscape",
    )
    maps: dict[str, dict[str, Path]] = {way: {} for way in WAYS.values()}
    for made in prediction.maps:
        maps[WAYS[made.query.kind]][made.query.label] = made.path
    return prediction, maps


def ask(
    model: SpeciesModel, taxa: tuple[Taxon, ...], photos: Mapping[str, list[Path]]
) -> list[Query]:
    """Ask for each taxon by its learned embedding where there is one, by photos and by name."""
    known = {taxon.name for taxon in model.taxa}
    queries = [taxon_query(model, taxon.name) for taxon in taxa if taxon.name in known]
    queries += [photo_query(model, photos[taxon.name], label=taxon.name) for taxon in taxa]
    queries += [text_query(model, taxon.prompt(), label=taxon.name) for taxon in taxa]
    return queries


def baseline(study: Study, fill: tuple[float, ...]) -> dict[str, pd.Series]:
    """Log-odds of a regression on band means and textures, by taxon, indexed by lon and lat."""
    imagery = open_imagery(study.landscape.aerial)
    rng = np.random.default_rng(study.seed)
    away = window_statistics(draw_background(imagery, WINDOW_PX, 4000, rng, fill))
    places = pd.read_csv(study.landscape.sites)[["lon", "lat"]].drop_duplicates()
    there = Places(imagery, *imagery.rowcol(places["lon"], places["lat"]), WINDOW_PX, fill)
    elsewhere = window_statistics(there)
    scores = {}
    for name, rows in study.observations.groupby("taxon"):
        if name == study.withheld:
            continue
        here = Places(
            imagery, *imagery.rowcol(rows["longitude"], rows["latitude"]), WINDOW_PX, fill
        )
        features = np.concatenate([window_statistics(here), away])
        present = np.arange(len(features)) < len(here)
        scored = trained_scores(features, present, elsewhere, logistic)
        scores[str(name)] = pd.Series(scored, pd.MultiIndex.from_frame(places))
    return scores


def measure(
    study: Study, maps: Mapping[str, Mapping[str, Path]], rival: Mapping[str, pd.Series]
) -> list[dict[str, Any]]:
    """Spearman's rho to the truth and AUC of the survey, for each taxon and way of asking."""
    landscape = study.landscape
    sites = pd.read_csv(landscape.sites)
    table = []
    for taxon in landscape.taxa:
        part = sites[sites["taxon"] == taxon.name]
        at = part["lon"].to_numpy(), part["lat"].to_numpy()
        truth = open_imagery(landscape.truth[taxon.name]).sample(*at)[0]
        present = part["present"].to_numpy().astype(bool)
        row: dict[str, Any] = {"taxon": taxon.name}
        scores = {
            way: open_imagery(maps[way][taxon.name]).sample(*at)[0]
            for way in WAYS.values()
            if taxon.name in maps[way]
        }
        if taxon.name in rival:
            scores["baseline"] = rival[taxon.name].loc[list(zip(*at, strict=True))].to_numpy()
        for way, score in scores.items():
            there = np.isfinite(score) & np.isfinite(truth)
            row[f"rho {way}"] = float(spearmanr(score[there], truth[there]).statistic)
            row[f"AUC {way}"] = auc(present[there], score[there])
        row["role"] = (
            "control"
            if taxon.name == landscape.control
            else "withheld"
            if taxon.name == study.withheld
            else ""
        )
        table.append(rounded(row))
    return table


def mean_rho(table: list[dict[str, Any]]) -> dict[str, float]:
    """Mean over the taxa that were trained and follow the landscape, by way of asking."""
    known = [row for row in table if not row["role"]]
    ways = [key for key in known[0] if key.startswith("rho ")]
    return {way.removeprefix("rho "): float(np.mean([row[way] for row in known])) for way in ways}
