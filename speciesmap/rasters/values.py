"""Values of pixels: what a model saw, and whether other imagery is of that kind."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from speciesmap.errors import ImageryError
from speciesmap.rasters.messages import public
from speciesmap.rasters.remote import gdal_name, is_remote

if TYPE_CHECKING:
    from speciesmap.rasters.imagery import Imagery

SHARES = np.linspace(0.005, 0.995, 100)
"""Shares of pixels at whose values a histogram is cut, each part holding as many as any other."""

FAR = 1.25
"""Distance of histograms, in standard deviations, beyond which imagery is called unlike.

Of NAIP, other cities and years were at most 0.73 apart, and a twelfth of a city at most 0.48 from
the whole. Of one Landsat scene, land and all with the sea were 1.1 apart, and so were land and
the places of a forest species. Values halved were at least 1.03 away, which may pass unseen; a
forgotten factor of 255 at least 2.05.
"""

FULL = {"uint8": (255.0,), "uint16": (65535.0, 10000.0), "int16": (10000.0,)}
"""What full brightness is where a type tells it; 10000 is the custom of surface reflectance."""

SQUARES = 4  # along both axes of an area, where its histogram is measured
SQUARE_PX = 32
FEWEST = 256  # valid pixels that make a histogram

BLACK = 0.01
"""Share of pixels that are 0 in every band beyond which they are taken for edges without imagery.

Of 384 squares of NAIP over two cities, of Landsat scenes and of aerial photos none had one such
pixel, water and shadows included.
"""

Scaling = tuple[tuple[float, float], ...]

log = logging.getLogger("speciesmap")


@dataclass(frozen=True)
class Values:
    """Histograms of bands.

    Attributes:
        dtype: Type of the pixels.
        scaling: Of each band the scale and offset that make its values physical; (1, 0) where the
            files do not tell.
        quantiles: Of each band its values at `SHARES`, shape (B, 100).
        deviation: Of each band its standard deviation, positive.
    """

    dtype: str
    scaling: Scaling
    quantiles: tuple[tuple[float, ...], ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, pixels: ArrayLike, dtype: Any, scaling: Scaling | None = None) -> Values:
        """Measure pixels.

        Args:
            pixels: Shape (B, N), N at least 1.
            dtype: Their type in the imagery.
            scaling: Of each band; none told by default.
        """
        values = np.asarray(pixels, np.float64)
        cuts = np.quantile(values, SHARES, axis=1).T  # (B, 100)
        spread = np.maximum(values.std(axis=1), 1e-6)
        return cls(
            dtype=np.dtype(dtype).name,
            scaling=scaling or ((1.0, 0.0),) * len(values),
            quantiles=tuple(tuple(row) for row in np.round(cuts, 6).tolist()),
            deviation=tuple(spread.tolist()),
        )

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Values:
        """Read what `dataclasses.asdict` made and JSON kept."""
        return cls(
            dtype=stored["dtype"],
            scaling=tuple((float(scale), float(offset)) for scale, offset in stored["scaling"]),
            quantiles=tuple(tuple(map(float, cuts)) for cuts in stored["quantiles"]),
            deviation=tuple(map(float, stored["deviation"])),
        )

    def distance(self, quantiles: ArrayLike) -> NDArray[np.float64]:
        """How far other pixels lie, band by band, in this histogram's standard deviations.

        Args:
            quantiles: Of each band their values at `SHARES`, shape (B, 100).

        Returns:
            Mean difference of quantiles, which is Wasserstein's first distance, shape (B,).
        """
        apart = np.abs(np.subtract(quantiles, self.quantiles)).mean(axis=1)
        return np.asarray(apart / np.array(self.deviation))  # (B,)

    def far(self, other: Values, bands: Sequence[str]) -> str:
        """Tell of the band where other pixels lie farthest from these, if that is too far.

        Args:
            other: The others, of the same bands.
            bands: Their names.

        Returns:
            A clause with both ranges, or nothing where all bands are nearer than `FAR`.
        """
        distance = self.distance(other.quantiles)
        worst = int(distance.argmax())
        if distance[worst] <= FAR:
            return ""
        theirs, ours = (
            "{:.4g} to {:.4g} around {:.4g}".format(*np.interp([0, 1, 0.5], SHARES, cuts))
            for cuts in (other.quantiles[worst], self.quantiles[worst])
        )
        return (
            f"band {bands[worst]} is far from what the model was trained on: {theirs} against "
            f"{ours}, {distance[worst]:.2g} standard deviations apart"
        )


def tagged_gains(theirs: Scaling, ours: Scaling) -> Scaling | None:
    """Factor and shift of each band that give values another scale and offset.

    Returns:
        `None` where nothing is to be done: they are equal, or one of them is not told.
    """
    untold = ((1.0, 0.0),) * len(ours)
    if theirs == ours or untold in (theirs, ours):
        return None
    return tuple(
        (s / to, (o - shift) / to) for (s, o), (to, shift) in zip(theirs, ours, strict=True)
    )


def sample_values(
    imagery: Imagery, row: int, col: int, height: int, width: int
) -> NDArray[np.float64] | None:
    """Read valid pixels at places spread over a rectangle, shape (B, N).

    Returns:
        `None` where too few can be read to tell anything.
    """
    side = min(SQUARE_PX, height, width)
    found = []
    for top in np.linspace(row, row + height - side, SQUARES).astype(int).tolist():
        for left in np.linspace(col, col + width - side, SQUARES).astype(int).tolist():
            try:
                pixels, valid = imagery.read(top, left, side, side)
            except ImageryError:  # whoever needs these pixels hears of it
                return None
            found.append(pixels[:, valid].astype(np.float64))
    values = np.concatenate(found, axis=1)  # (B, N)
    return values if values.shape[1] >= FEWEST else None


def warn_of_black(
    imagery: Imagery,
    rectangle: tuple[int, int, int, int],
    pixels: NDArray[np.float64] | None = None,
) -> None:
    """Warn where imagery seems to end in black that its files do not declare as missing.

    In a single band a zero may well mean something: the sea, the night, a class.

    Args:
        imagery: With values as its files have them.
        rectangle: First row and column, height and width, in pixels.
        pixels: What `sample_values` gave for it, if that was asked already.
    """
    if len(imagery.bands) < 2:
        return
    pixels = sample_values(imagery, *rectangle) if pixels is None else pixels
    share = 0.0 if pixels is None else float((pixels == 0).all(axis=0).mean())
    path = imagery.undeclared(*rectangle) if share > BLACK else None
    if path is None:
        return
    remedy = f"gdal_edit.py -a_nodata 0 {shlex.quote(path)}"
    if is_remote(path):
        place = shlex.quote(gdal_name(public(path)))
        remedy = f"gdal_translate -of VRT -a_nodata 0 {place} scene.vrt, and give scene.vrt instead"
    log.warning(
        "%s: %.3g%% of a sample of its pixels are 0 in every band, and no nodata value, mask or "
        "alpha band says what is missing; if these are edges without imagery, declare them, or "
        "they count as land: %s%s",
        imagery.source,
        100 * share,
        remedy,
        " (and likewise its other scenes)" * (imagery.scenes > 1),
    )


def conventional_factor(seen: Values, dtype: Any, pixels: NDArray[np.float64]) -> float:
    """Factor between customs of storing brightness that brings pixels nearest to a histogram.

    Only where the types differ; the customs are those of `FULL`, and 1 for floats.

    Args:
        seen: The histogram.
        dtype: Type of the pixels.
        pixels: Shape (B, N).

    Returns:
        1 where the pixels fit as they are.
    """
    kind = np.dtype(dtype).name
    if kind == seen.dtype:
        return 1.0
    factors = {1.0}
    for ours in FULL.get(seen.dtype, (1.0,)):
        factors |= {ours / theirs for theirs in FULL.get(kind, (1.0,))}
    cuts = np.quantile(pixels, SHARES, axis=1).T  # (B, 100)
    return min(sorted(factors), key=lambda f: float(seen.distance(cuts * f).max()))
