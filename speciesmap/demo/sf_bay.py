"""The real scene: banana slugs on Landsat 7 over San Francisco Bay."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd

from speciesmap.appraise import evaluate
from speciesmap.atlas import predict
from speciesmap.config import load_config, shipped_config
from speciesmap.datasets.chips import make_chips
from speciesmap.demo.scene import SceneResult, assigned, rounded
from speciesmap.errors import DependencyError
from speciesmap.evaluation.baselines import RIVALS, held_out_scores
from speciesmap.learning.data import Places
from speciesmap.learning.train import train
from speciesmap.models import load_model, read_facts
from speciesmap.observations.background import random_background
from speciesmap.observations.read import read_observations
from speciesmap.present.page import Scene
from speciesmap.rasters.imagery import Imagery, open_imagery
from speciesmap.statistics.chance import fold_auc

TAXON = "Ariolimax"
LINEAGE = "Animalia/Mollusca/Gastropoda/Ariolimacidae"
BACKGROUND = 3000
SHOWN = {
    "auc": "AUC",
    "average_precision": "average precision",
    "boyce": "Boyce index",
    "brier_skill": "Brier skill",
}  # measures of the ladder
LAND_ABOVE = 45  # the first band is near infrared, where water is black: histogram's trough


def run(out: Path, seed: int = 0) -> SceneResult:
    """Pre-train on the raster's own windows, fine-tune on presences, evaluate by blocks, map.

    Args:
        out: Folder of the scene, made here.
        seed: Of everything random.

    Returns:
        Files, figures and the scene's part of the page.

    Raises:
        DependencyError: The packages that carry the data are not installed.
    """
    source = packaged("localtileserver", "tiler/data/landsat7.tif")
    records = packaged("elapid", "data/ariolimax.gpkg")
    out.mkdir(parents=True, exist_ok=True)
    imagery = open_imagery(source)
    pre_config = shipped_config("demo_landsat_mae.yaml")
    window_px = load_config(pre_config).data.window_px or 32

    observations = read_observations(records, taxon=TAXON)
    observations["lineage"] = LINEAGE
    inside = imagery.contains(observations["longitude"], observations["latitude"])
    observations = observations[inside].reset_index(drop=True)
    observations.to_parquet(out / "observations.parquet")
    make_chips(observations, imagery, out / "chips", window_px=window_px, min_valid=0.5)

    rng = np.random.default_rng(seed)
    rows, cols = random_background(imagery, BACKGROUND, window_px, rng, land=land_of(imagery))
    x, y = imagery.xy(rows, cols)
    background = out / "background.parquet"
    gpd.GeoDataFrame(geometry=gpd.points_from_xy(x, y), crs="EPSG:4326").to_parquet(background)

    shared = [assigned("data.imagery", source), f"seed={seed}"]
    pretrained = train(load_config(pre_config, shared), out / "pretrained")
    tune = load_config(
        shipped_config("demo_landsat_finetune.yaml"),
        [
            *shared,
            assigned("data.background", background),
            assigned("data.dataset", out / "chips"),
            assigned("init", pretrained),
        ],
    )
    model = train(tune, out / "model")
    prediction = predict(
        model,
        imagery=source,
        out=out / "maps",
        store=out / "store.zarr",
        observations=observations,
        title="Banana slugs around San Francisco Bay",
    )
    maps = {TAXON: prediction.maps[0].path}

    folds = pd.read_parquet(model / "folds.parquet")
    table = [{"method": "speciesmap", **figures(read_facts(model)["metrics"]["validation"][TAXON])}]
    present = (folds["taxon"] == TAXON).to_numpy()
    fold = folds["fold"].to_numpy()
    at = Places(
        imagery,
        *imagery.rowcol(folds["longitude"], folds["latitude"]),
        window_px,
        load_model(model).fill,
    )
    for name, features, rival in RIVALS:
        scores = held_out_scores(features(at), present, at, fold, rival)
        table.append({"method": name, **figures(fold_auc(present, scores, fold))})
    trained = folds.groupby("fold")["trained"].first() / (len(folds) - folds["fold"].value_counts())
    left_out = 1 - float(trained.mean())
    evaluation = evaluate(model, data=out / "chips", out=out / "evaluation")
    ladder = [
        {"method": name, **rounded({SHOWN[key]: rung["mean"][key] for key in SHOWN})}
        for name, rung in evaluation.result["rungs"].items()
    ]
    return SceneResult(
        imagery=Path(source),
        observations=out / "observations.parquet",
        model=model,
        store=prediction.store,
        maps=maps,
        html=prediction.html,
        metrics={"cross_validation": table, "ladder": ladder, "presences": int(present.sum())},
        page=Scene(
            title="San Francisco Bay: banana slugs on Landsat 7",
            text=(
                f"{int(present.sum())} presences of the genus Ariolimax against {BACKGROUND} "
                "random places on land. The scene's bands are near infrared, red and green, which "
                "its file labels red, green and blue: the picture is in false colour. The encoder "
                "was pre-trained on the raster's own windows by masked image modelling, then "
                "fine-tuned. Whole blocks of 4 km were held out in turn, in six folds; training "
                "windows that overlap a held-out one were left "
                f"out ({left_out:.0%}). The map is relative suitability: presences alone do not "
                "tell a probability."
            ),
            map=prediction.html,
            rasters=list(maps.values()),
            imagery=source,
            figures=[(f"{table[0]['AUC']:.2f}", "AUC on held-out blocks, all folds pooled")],
            tables={
                "Held-out blocks of 4 km, six folds": table,
                "The ladder on the same folds, on the encoder before fine-tuning": ladder,
            },
            files={
                "evaluation": evaluation.html,
                "observations": out / "observations.parquet",
                "map as GeoTIFF": maps[TAXON],
            },
        ),
    )


def packaged(package: str, inside: str) -> str:
    """Path of a data file in an installed package.

    Raises:
        DependencyError: The package is not installed, or does not carry the file.
    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / inside if spec and spec.origin else None
    if path is None or not path.is_file():
        raise DependencyError(
            f"the demo reads {inside} from the package {package}, which is not installed here; "
            "pip install 'speciesmap[demo]'"
        )
    return str(path)


def land_of(imagery: Imagery) -> Any:
    """Make the test for land that `random_background` takes: bright in near infrared nearby."""
    pixels, _ = imagery.read(0, 0, *imagery.shape)
    from scipy.ndimage import uniform_filter

    land = uniform_filter((pixels[0] > LAND_ABOVE).astype(np.float32), 5) > 0.5

    def is_land(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        found: np.ndarray = land[rows.astype(int), cols.astype(int)]
        return found

    return is_land


def figures(scored: dict[str, Any]) -> dict[str, float]:
    """The columns that the demo prints of a method."""
    return rounded(
        {"AUC": scored["auc"], "mean over folds": scored["auc_mean"], "sd": scored["auc_sd"]}
    )
