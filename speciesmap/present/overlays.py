"""Maps as a page holds them: warped, quantised, and as fine as a number of bytes allows."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.io import DatasetReader

from speciesmap.errors import OutputError
from speciesmap.present.styles import (
    MONTHS,
    Legend,
    band_range,
    encode_png,
    quantise,
    read_legend,
    seasonal,
)
from speciesmap.present.warp import Grid, beside, map_grid, open_map, warp
from speciesmap.progress import track

SIDE_PX = 2048
PIXELS = 48_000_000  # of all pictures together: what a phone can hold decoded
SMALLEST_PX = 64


@dataclass(frozen=True)
class Overlay:
    """One map as the page holds it; every picture is an indexed PNG that is also the data.

    Attributes:
        legend: What the map says about itself.
        file: Name of the GeoTIFF, with its folder's where two are called the same.
        grid: Where its pixels lie.
        pictures: Values of `legend`, one picture or one for each month.
        outside: 1 where the map is outside its area of applicability, where it says so.
        uncertainty: Values from 0 to `uncertainty_high`, where the map has them.
        uncertainty_high: Largest uncertainty.
    """

    legend: Legend
    file: str
    grid: Grid
    pictures: tuple[bytes, ...]
    outside: bytes | None = None
    uncertainty: bytes | None = None
    uncertainty_high: float = 1.0

    @cached_property
    def urls(self) -> list[str]:
        """Pictures as the page writes them."""
        return [data_url(picture) for picture in self.pictures]

    @property
    def page_bytes(self) -> int:
        """What it takes of the page."""
        extra = sum(len(picture) for picture in (self.outside, self.uncertainty) if picture)
        return sum(map(len, self.urls)) + extra * 4 // 3

    def facts(self) -> dict[str, Any]:
        """What the page's script needs, all but the first picture."""
        legend, grid = self.legend, self.grid
        return {
            "label": legend.label,
            "query": legend.query,
            "quantity": legend.quantity,
            "low": legend.low,
            "high": legend.high,
            "model": legend.model,
            "caution": legend.caution,
            "file": self.file,
            "bounds_m": [grid.left, grid.bottom, grid.right, grid.top],
            "width": grid.width,
            "height": grid.height,
            "months": self.urls[1:],
            "outside": data_url(self.outside) if self.outside else None,
            "uncertainty": data_url(self.uncertainty) if self.uncertainty else None,
            "uncertainty_high": self.uncertainty_high,
        }


def data_url(png: bytes) -> str:
    """Write a picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def make_overlays(rasters: Sequence[Path], extent: Grid, budget: int) -> list[Overlay]:
    """Warp all maps, as finely as their pictures fit into a number of bytes.

    Args:
        rasters: Map GeoTIFFs.
        extent: What holds them all, as `union` gives it.
        budget: Bytes for all.

    Raises:
        ImageryError: A raster cannot be read or shown.
        OutputError: They do not fit, however coarse.
    """
    side = min(SIDE_PX, math.isqrt(PIXELS // len(rasters)))
    count = Counter(Path(path).name for path in rasters)
    names = ["/".join(Path(p).absolute().parts[-min(2, count[Path(p).name]) :]) for p in rasters]
    while True:
        overlays = [
            _overlay(path, name, extent, side)
            for path, name in track(list(zip(rasters, names, strict=True)), "Maps to the page")
        ]
        total = sum(overlay.page_bytes for overlay in overlays)
        if total <= budget:
            return overlays
        if side <= SMALLEST_PX:
            raise OutputError(
                f"{len(rasters)} maps take {total / 1e6:.1f} MB even when reduced to {side} "
                f"pixels, a page holds {budget / 1e6:.1f} MB; put fewer maps into a page"
            )
        side = max(SMALLEST_PX, int(side * min(0.85, math.sqrt(budget / total))))


def _overlay(path: Path, name: str, extent: Grid, side_px: int) -> Overlay:
    with open_map(path) as dataset:
        legend = read_legend(dataset)
        months = seasonal(dataset)
        if months:
            side_px = max(SMALLEST_PX, math.isqrt(side_px**2 // len(MONTHS)))
        grid = beside(map_grid(dataset, side_px), extent.right)
        bands = range(1, 13) if months else (1,)
        pictures = tuple(
            encode_png(quantise(_values(dataset, band, grid), legend.low, legend.high))
            for band in bands
        )
        names = [(text or "").strip().lower() for text in dataset.descriptions]
        outside = uncertainty = None
        high = 1.0
        if "applicability" in names:
            inside = _values(dataset, names.index("applicability") + 1, grid)
            outside = encode_png((inside < 0.5).astype(np.uint8))  # not a number is not outside
        if "uncertainty" in names:
            band = names.index("uncertainty") + 1
            high = max(band_range(dataset, band)[1], 1e-6)
            uncertainty = encode_png(quantise(_values(dataset, band, grid), 0.0, high))
    return Overlay(legend, name, grid, pictures, outside, uncertainty, high)


def _values(dataset: DatasetReader, band: int, grid: Grid) -> NDArray[np.float32]:
    """One band on the page's grid, shape (row, column)."""
    values: NDArray[np.float32] = warp(dataset, [band], grid, Resampling.nearest)[0]
    return values
