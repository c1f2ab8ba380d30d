"""The only door through which rasters are written: plain GeoTIFFs, and maps as COGs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.windows import Window

from speciesmap import outputs
from speciesmap.errors import ImageryError, OutputError
from speciesmap.rasters.files import open_raster

TILE_PX = 256
COLORS = {
    "red": ColorInterp.red,
    "green": ColorInterp.green,
    "blue": ColorInterp.blue,
    "nir": ColorInterp.nir,
}


def write_geotiff(
    path: Path | str,
    pixels: NDArray[Any],
    geobox: GeoBox,
    *,
    bands: Sequence[str],
    nodata: float | None = None,
    colorinterp: Sequence[ColorInterp] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an array as a tiled, deflated GeoTIFF.

    Args:
        path: Of the file.
        pixels: Shape (bands, rows, columns).
        geobox: Grid of the pixels.
        bands: Name of each band, kept as its description.
        nodata: Value that means nothing is known.
        colorinterp: Of each band; by default red, green, blue and near infrared by name, else
            undefined, or grey for a single band.
        overwrite: Replace an existing file.

    Returns:
        The path.

    Raises:
        OutputError: The file exists or cannot be written.
        ValueError: Pixels, bands and grid do not fit together.
    """
    if pixels.shape != (len(bands), *geobox.shape):
        raise ValueError(
            f"pixels of shape {pixels.shape} do not fit {len(bands)} bands on a grid of "
            f"{tuple(geobox.shape)}"
        )
    path = Path(path)
    alone = ColorInterp.gray if len(bands) == 1 else ColorInterp.undefined
    colors = colorinterp or [COLORS.get(name.lower(), alone) for name in bands]
    with _naming(path), outputs.replacing(path, overwrite=overwrite) as beside:
        with rasterio.open(
            beside,
            "w",
            driver="GTiff",
            **_grid(geobox),
            count=len(bands),
            dtype=pixels.dtype,
            nodata=nodata,
            tiled=True,
            blockxsize=TILE_PX,
            blockysize=TILE_PX,
            compress="deflate",
            predictor=3 if pixels.dtype.kind == "f" else 2,
            photometric="MINISBLACK",
            alpha="NO",
            bigtiff="IF_SAFER",
        ) as raster:
            raster.descriptions = tuple(bands)
            raster.colorinterp = tuple(colors)
            raster.write(pixels)
        with open_raster(beside) as landed:
            same = (
                np.array_equal(landed.read(k), band, equal_nan=True)
                for k, band in enumerate(pixels, 1)
            )
            _refuse_changed(path, all(same))
    return path


class MapWriter:
    """One map, written block by block and finished as a Cloud-Optimized GeoTIFF.

    Blocks go into a plain tiled file beside the map, so that memory does not grow with the map.
    Used as a context manager; the map appears when the block ends well.

    Args:
        path: Of the map; must not exist.
        geobox: Grid of the cells.
        bands: Descriptions of its bands; the first is `"suitability"` or `"probability"`.
        tags: Kept in the file's default namespace.
    """

    def __init__(
        self, path: Path | str, geobox: GeoBox, *, bands: Sequence[str], tags: Mapping[str, str]
    ) -> None:
        self.path = Path(path)
        self._beside = self.path.with_name(f".{self.path.stem}.part.tif")
        with _naming(self.path):
            self._raster = rasterio.open(
                self._beside,
                "w",
                driver="GTiff",
                **_grid(geobox),
                count=len(bands),
                dtype="float32",
                nodata=np.nan,
                tiled=True,
                blockxsize=TILE_PX,
                blockysize=TILE_PX,
                bigtiff="IF_SAFER",
            )
        self._raster.descriptions = tuple(bands)
        self._tally = 0
        self._raster.update_tags(AREA_OR_POINT="Area", **tags)

    def write(self, row: int, col: int, values: NDArray[np.float32]) -> None:
        """Write a block, shape (bands, rows, columns), whose first cell is at (row, col).

        No cell is written twice.
        """
        _, height, width = values.shape
        with _naming(self.path):
            self._raster.write(values, window=Window(col, row, width, height))
        self._tally += _tally(values)

    def __enter__(self) -> MapWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        whole = False
        try:
            with _naming(self.path):
                self._raster.close()
                if kind is None:
                    rasterio.shutil.copy(
                        self._beside,
                        self.path,
                        driver="COG",
                        compress="DEFLATE",
                        predictor="YES",
                        blocksize=TILE_PX,
                        overview_resampling="AVERAGE",
                        bigtiff="IF_SAFER",
                        statistics="YES",
                        num_threads="ALL_CPUS",
                    )
                    with open_raster(self.path) as landed:
                        windows = (window for _, window in landed.block_windows(1))
                        found = sum(_tally(landed.read(window=window)) for window in windows)
                    _refuse_changed(self.path, found == self._tally)
                    whole = True
        finally:
            self._beside.unlink(missing_ok=True)
            if not whole:
                self.path.unlink(missing_ok=True)


def _tally(values: NDArray[np.float32]) -> int:
    """Sum up the bits of all values that are no NaN, in whatever order they come."""
    known = values[~np.isnan(values)].astype(np.float32, copy=False)
    return int(known.view(np.uint32).sum(dtype=np.uint64))


def _refuse_changed(path: Path, same: bool) -> None:
    """Stop where a file does not hold what was written: GDAL closes files on full disks silently.

    Raises:
        OutputError: It does not.
    """
    if not same:
        raise OutputError(f"cannot write {path} (it does not hold what was written); check space")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file that could not be written; some of GDAL's errors are no `RasterioError`."""
    try:
        yield
    except (RasterioError, CPLE_BaseError, ImageryError) as error:
        raise OutputError(f"cannot write {path} ({error}); check space and permission") from error


def _grid(geobox: GeoBox) -> dict[str, Any]:
    height, width = geobox.shape
    return {
        "height": height,
        "width": width,
        "transform": geobox.transform,
        "crs": geobox.crs,
    }
