"""Environmental rasters beside the imagery, and location: what else is known of a place."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
from numpy.typing import ArrayLike, NDArray
from odc.geo.geobox import GeoBox

from speciesmap.errors import ImageryError
from speciesmap.rasters.files import open_raster
from speciesmap.rasters.imagery import Imagery, open_imagery
from speciesmap.rasters.messages import public
from speciesmap.rasters.scenes import list_files
from speciesmap.rasters.windows import transformed

LOCATION = ("easting", "northing")


@dataclass(frozen=True)
class Covariates:
    """Rasters of any grid and CRS, read at places.

    The value of a place is that of the pixel under it, in the unit that the file's scale and
    offset make of it.

    Attributes:
        names: Of the columns.
        sources: What was given, without aliases.
        crs: Of the easting and northing that are the last two columns, or None without location.
    """

    names: tuple[str, ...]
    sources: tuple[str, ...]
    crs: str | None
    _bands: tuple[tuple[Imagery, float | None], ...]

    def at(self, longitude: ArrayLike, latitude: ArrayLike) -> NDArray[np.float64]:
        """Values at places, NaN where a raster has none, shape (N, C).

        Raises:
            ImageryError: A raster cannot be read, or has a value at none of the places.
        """
        values = self._at(longitude, latitude, "EPSG:4326")
        lacking = np.flatnonzero(~np.isfinite(values).any(axis=0))
        if len(values) and lacking.size:
            raise ImageryError(
                f"covariate {self.names[lacking[0]]} has no value at any of {len(values)} places; "
                "give a raster of the area"
            )
        return values

    def cells(self, geobox: GeoBox) -> NDArray[np.float64]:
        """Values at the centres of a grid's cells, NaN where there is none, shape (H, W, C)."""
        height, width = geobox.shape
        row, col = np.mgrid[0:height, 0:width] + 0.5
        x, y = transformed(geobox.transform, col.ravel(), row.ravel())
        return self._at(x, y, geobox.crs).reshape(height, width, -1)

    def _at(self, x: ArrayLike, y: ArrayLike, crs: Any) -> NDArray[np.float64]:
        columns = []
        for raster, nodata in self._bands:
            value = raster.sample(x, y, crs)[0]  # (N,)
            scale, shift = raster.scaling[0]
            columns.append(np.where(value == nodata, np.nan, value) * scale + shift)
        if self.crs is not None:
            projected = pyproj.Transformer.from_crs(crs, self.crs, always_xy=True)
            columns += projected.transform(np.asarray(x, float), np.asarray(y, float))
        values = np.column_stack(columns).astype(np.float64)  # (N, C)
        values[~np.isfinite(values)] = np.nan
        return values

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the names and of what the rasters hold, in hex."""
        digest = hashlib.sha256(repr((self.names, self.crs)).encode())
        for raster, _ in self._bands:
            digest.update(raster.fingerprint.encode())
        return digest.hexdigest()[:16]


def open_covariates(
    sources: Sequence[Path | str],
    *,
    crs: str | None = None,
    wanted: Sequence[str] | None = None,
) -> Covariates:
    """Open covariates.

    A raster of one band is called after its file, a band of several after file and band:
    `elevation`, `climate_band_2`. `NAME=FILE` says another name than the file's.

    Args:
        sources: Rasters, folders or patterns, as `open_imagery` takes them.
        crs: That easting and northing are added in; without it location is left out.
        wanted: Names of the columns, in order; all by default.

    Raises:
        ImageryError: A raster cannot be opened, two covariates have one name, or one that is
            wanted is not there.
    """
    found: list[tuple[str, Imagery, float | None]] = []
    plain = []
    for source in map(str, sources):
        name, equals, file = source.partition("=")
        if not equals or Path(source).exists() or "/" in name:
            name, file = Path(source).stem, source
        raster = open_imagery(file)
        plain.append(public(file))
        nodata = _nodata(file)
        for band in raster.bands:
            label = name if len(raster.bands) == 1 else f"{name}_{band}"
            found.append((label, raster.select([band]), nodata.get(band)))
    names = [name for name, _, _ in found]
    counted = Counter([*names, *(LOCATION if crs else ())])
    twice = [name for name, count in counted.items() if count > 1]
    if twice:
        raise ImageryError(
            f"two covariates are called {twice[0]!r}; give one of them another name with NAME=FILE"
        )
    if wanted is not None:
        lacking = [name for name in wanted if name not in {*names, *LOCATION}]
        if lacking:
            raise ImageryError(
                f"the model needs the covariate {lacking[0]!r}, and those given are "
                f"{', '.join(names) or 'none'}; add it, or say which file it is with "
                f"--covariates {lacking[0]}=FILE"
            )
        found = [found[names.index(name)] for name in wanted if name in names]
    return Covariates(
        (*(name for name, _, _ in found), *(LOCATION if crs else ())),
        tuple(plain),
        crs,
        tuple((raster, nodata) for _, raster, nodata in found),
    )


def _nodata(source: str) -> dict[str, float]:
    """What each band says instead of a value; a file's mask only tells where all bands do."""
    if source.startswith("stac+"):
        return {}
    raster = open_imagery(source)
    with open_raster(list_files(source)[0]) as file:
        values = file.nodatavals
    if len(values) != len(raster.bands):
        return {}
    return {
        band: value for band, value in zip(raster.bands, values, strict=True) if value is not None
    }
