"""Models and scenes so small that training one takes a moment."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from PIL import Image

from speciesmap.datasets.columns import FACTS
from speciesmap.datasets.writer import PairedWriter
from speciesmap.models import Architecture, SpeciesModel
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import open_imagery
from speciesmap.taxa import Taxon

BANDS = ("red", "green", "blue", "nir")
WINDOW_PX = 16
SIDE = 160
TAXA = (
    Taxon("Quercus agrifolia", ("Plantae", "Fagaceae", "Quercus")),
    Taxon("Quercus lobata", ("Plantae", "Fagaceae", "Quercus")),
    Taxon("Pinus sabiniana", ("Plantae", "Pinaceae", "Pinus")),
)


def architecture(bands: int = 4, **changes: Any) -> Architecture:
    """All three towers, unless changed."""
    parts: dict[str, Any] = {
        "dim": 16,
        "bands": tuple(f"band_{k}" for k in range(bands)),
        "window_px": WINDOW_PX,
        "resolution_m": 1.0,
        "mean": (128.0,) * bands,
        "std": (64.0,) * bands,
        "aerial": {"backbone": "test_resnet"},
        "ground": {"backbone": "test_resnet", "image_px": 16},
        "text": {"width": 16, "layers": 1, "heads": 2},
    }
    return Architecture(**{**parts, **changes})


def tiny_model(seed: int = 0, taxa: tuple[Taxon, ...] = TAXA, **changes: Any) -> SpeciesModel:
    """An untrained model in evaluation mode."""
    torch.manual_seed(seed)
    return SpeciesModel(architecture(**changes), taxa).eval()


@dataclass(frozen=True)
class TinyScene:
    """Paths of what one landscape gives to learn from."""

    imagery: Path
    chips: Path


def jpeg(rng: np.random.Generator) -> dict[str, Any]:
    pixels = rng.integers(0, 255, (20, 24, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return {"bytes": buffer.getvalue(), "path": "photo.jpg"}


def tiny_scene(
    folder: Path,
    *,
    rows: int = 36,
    bands: tuple[str, ...] = BANDS,
    photos: bool = True,
    dtype: type[np.generic] = np.uint8,
    missing: float | None = None,
) -> TinyScene:
    """Write an imagery, and chips of three taxa cut from it; one pixel of the chips may lack."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 255, (len(bands), SIDE, SIDE)).astype(dtype)
    grid = GeoBox((SIDE, SIDE), Affine(1, 0, 550_000, 0, -1, 4_180_000), "EPSG:32610")
    imagery = write_geotiff(folder / "aerial.tif", pixels, grid, bands=bands)
    row, col = rng.integers(8, SIDE - 8, (2, rows))
    x, y = open_imagery(imagery).xy(row, col)
    species = np.arange(rows) % len(TAXA)
    half = WINDOW_PX // 2
    windows: NDArray[Any] = np.stack(
        [pixels[:, r - half : r + half, c - half : c + half] for r, c in zip(row, col, strict=True)]
    )
    if missing is not None:
        windows[0, -1, 0, 0] = missing
    columns: dict[str, Any] = {
        name: False if kind == "bool" else 0 if "int" in kind else ""
        for name, kind in FACTS.items()
    }
    columns |= {
        "observation_uuid": [f"o{k}" for k in range(rows)],
        "latitude": y,
        "longitude": x,
        "taxon_id": species,
        "name": [TAXA[k].name for k in species],
        "ancestry": ["/".join(TAXA[k].lineage) for k in species],
        "rank": "species",
    }
    facts = pd.DataFrame(columns, index=range(rows))
    chips = folder / "chips"
    with PairedWriter(chips, bands, WINDOW_PX, np.dtype(dtype)) as writer:
        writer.write(facts, windows, [jpeg(rng) if photos else None for _ in range(rows)])
        writer.finish(TAXA, 1.0)
    return TinyScene(imagery, chips)
