"""The simulated scene: the full method on a landscape whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from speciesmap.atlas import predict
from speciesmap.config import load_config, shipped_config
from speciesmap.datasets.chips import make_chips
from speciesmap.demo.scene import SceneResult, rounded
from speciesmap.learning.baselines import logistic, trained_scores, window_statistics
from speciesmap.learning.data import Places, draw_background
from speciesmap.learning.evaluate import auc
from speciesmap.learning.train import train
from speciesmap.mapping.query import Query, photo_query, taxon_query, text_query
from speciesmap.models import SpeciesModel, load_model
from speciesmap.observations.read import read_observations
from speciesmap.present.page import Scene
from speciesmap.present.webmap import make_map
from speciesmap.rasters.imagery import open_imagery
from speciesmap.simulate import Scene as Landscape
from speciesmap.simulate import simulate
from speciesmap.taxa import Taxon

WINDOW_PX = 64
PHOTOS = 5  # of each taxon, kept out of training, ask for its map
WAYS = {"taxon": "learned", "photo": "photos", "text": "name"}


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
    landscape = simulate(out / "scene", seed=seed)
    withheld = landscape.taxa[1].name
    everything = read_observations(landscape.observations)
    asking = everything.groupby("taxon").head(PHOTOS).index
    observations = everything.drop(index=asking).reset_index(drop=True)
    observations.to_parquet(out / "observations.parquet")
    imagery = open_imagery(landscape.aerial)
    make_chips(observations, imagery, out / "chips", window_px=WINDOW_PX, photos=landscape.photos)
    shared = [
        f"seed={seed}",
        f"data.dataset={out / 'chips'}",
        f"data.withheld=[{withheld}]",
        f"data.imagery={landscape.aerial}",
    ]
    pretrained = train(load_config(shipped_config("demo_crisp.yaml"), shared), out / "pretrained")
    tune = load_config(shipped_config("demo_finetune.yaml"), [*shared, f"init={pretrained}"])
    folder = train(tune, out / "model")
    model = load_model(folder)
    photos = {
        name: [landscape.photos / file for file in rows["photo"]]
        for name, rows in everything.loc[asking].groupby("taxon")
    }
    prediction = predict(
        folder,
        imagery=landscape.aerial,
        store=out / "store.zarr",
        out=out / "maps",
        queries=ask(model, landscape.taxa, photos),
    )
    maps: dict[str, dict[str, Path]] = {way: {} for way in WAYS.values()}
    for made in prediction.maps:
        maps[WAYS[made.query.kind]][made.query.label] = made.path
    make_map(
        [made.path for made in prediction.maps],
        prediction.html,
        observations=observations,
        base=landscape.aerial,
        title="A simulated landscape",
        overwrite=True,
    )

    sites = pd.read_csv(landscape.sites)
    rival = baseline(observations, landscape, sites, withheld, seed, model.fill)
    table = measure(landscape, sites, maps, rival, withheld)
    control = next(row for row in table if row["taxon"] == landscape.control)
    known = [row for row in table if row["taxon"] not in (landscape.control, withheld)]
    means = {
        way: float(np.mean([row[f"rho {way}"] for row in known]))
        for way in (*WAYS.values(), "baseline")
    }
    unseen = next(row for row in table if row["taxon"] == withheld)
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


def ask(
    model: SpeciesModel, taxa: tuple[Taxon, ...], photos: Mapping[str, list[Path]]
) -> list[Query]:
    """Ask for each taxon by its learned embedding where there is one, by photos and by name."""
    known = {taxon.name for taxon in model.taxa}
    queries = [taxon_query(model, taxon.name) for taxon in taxa if taxon.name in known]
    queries += [photo_query(model, photos[taxon.name], label=taxon.name) for taxon in taxa]
    queries += [text_query(model, taxon.prompt(), label=taxon.name) for taxon in taxa]
    return queries


def baseline(
    observations: gpd.GeoDataFrame,
    landscape: Landscape,
    sites: pd.DataFrame,
    withheld: str,
    seed: int,
    fill: tuple[float, ...],
) -> dict[str, pd.Series]:
    """Log-odds of a regression on band means and textures, by taxon, indexed by lon and lat."""
    imagery = open_imagery(landscape.aerial)
    rng = np.random.default_rng(seed)
    away = window_statistics(draw_background(imagery, WINDOW_PX, 4000, rng, fill))
    places = sites[["lon", "lat"]].drop_duplicates()
    there = Places(imagery, *imagery.rowcol(places["lon"], places["lat"]), WINDOW_PX, fill)
    elsewhere = window_statistics(there)
    scores = {}
    for name, rows in observations.groupby("taxon"):
        if name == withheld:
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
    landscape: Landscape,
    sites: pd.DataFrame,
    maps: Mapping[str, Mapping[str, Path]],
    rival: Mapping[str, pd.Series],
    withheld: str,
) -> list[dict[str, Any]]:
    """Spearman's rho to the truth and AUC of the survey, for each taxon and way of asking."""
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
            if taxon.name == withheld
            else ""
        )
        table.append(rounded(row))
    return table
