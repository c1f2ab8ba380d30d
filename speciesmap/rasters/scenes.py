"""Scenes: the source rasters of some imagery, found and described before any is read."""

from __future__ import annotations

import glob
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from odc.geo.geobox import GeoBox
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from speciesmap.errors import ImageryError
from speciesmap.rasters.bands import band_names
from speciesmap.rasters.files import open_raster
from speciesmap.rasters.messages import no_error_lost, public, reason
from speciesmap.rasters.remote import AT_ONCE, is_remote, retrying

SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".img")
TILE_INDEXES = (".gpkg", ".shp", ".geojson", ".fgb")
BLOCK_BYTES = 512 << 20  # decoded; a window in it takes all of it
LOCATION = "location"  # column of a tile index that gdaltindex writes

Item = TypeVar("Item")


@dataclass(frozen=True)
class RasterFile:
    """One file, with what is known of it.

    Attributes:
        path: Where it is read; an address may hold a credential.
        geobox: Its own grid.
        bands: Names of all its bands.
        dtype: Type of its pixels.
        scaling: Of each band the scale and offset that make its values physical.
        asset: Its key in a STAC item.
        signer: Host whose token its address needs.
    """

    path: str
    geobox: GeoBox
    bands: tuple[str, ...]
    dtype: str
    scaling: tuple[tuple[float, float], ...]
    asset: str = ""
    signer: str | None = None


@dataclass(frozen=True)
class Scene:
    """Files that were taken together and show other bands of one place.

    Attributes:
        name: Identifier of a STAC item, or the file's name.
        files: In the order of the imagery's bands.
        date: When it was taken, ISO 8601, where that is known.
        clouds: Share of it under cloud in percent, where that is known.
    """

    name: str
    files: tuple[RasterFile, ...]
    date: str = ""
    clouds: float = float("nan")

    @property
    def bands(self) -> tuple[str, ...]:
        """Names of the bands of all its files."""
        return tuple(name for file in self.files for name in file.bands)

    @property
    def scaling(self) -> tuple[tuple[float, float], ...]:
        """Scale and offset of each of these bands."""
        return tuple(pair for file in self.files for pair in file.scaling)


def list_files(source: str) -> list[str]:
    """Paths of the rasters that a source names, in order; of files absolute, for other processes.

    Args:
        source: A raster here or on a server, a folder, a glob, or a tile index.

    Raises:
        ImageryError: There are none.
    """
    if is_remote(source):
        return [source]
    path = Path(source)
    if path.is_dir():
        found = sorted(str(p.absolute()) for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if not found and (path / "zarr.json").exists():
            raise ImageryError(f"{source} is an embedding store, not imagery; give it as --store")
        if not found:
            raise ImageryError(f"{source} holds no rasters ({', '.join(SUFFIXES)}); check the name")
        return found
    if not path.exists() and glob.has_magic(source):
        found = sorted(str(Path(p).absolute()) for p in glob.glob(source))  # noqa: PTH207
        if not found:
            raise ImageryError(f"no file matches {source}; check the pattern")
        return found
    if path.exists() and path.suffix.lower() in TILE_INDEXES:
        return _indexed(path.absolute())
    return [str(path.absolute()) if path.exists() else source]


def is_one_file(source: str) -> bool:
    """Tell whether a source is one raster, not a folder, a pattern or a tile index."""
    return list_files(source) in ([source], [str(Path(source).absolute())])


def _indexed(index: Path) -> list[str]:
    """Rasters of a GDAL tile index, whose relative places are beside it or where one works."""
    import geopandas as gpd

    try:
        table = gpd.read_file(index, ignore_geometry=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ImageryError(f"{index} cannot be read as a tile index ({error})") from error
    if LOCATION not in table.columns or table.empty:
        raise ImageryError(
            f"{index} has no column {LOCATION!r} that names rasters; make a tile index with "
            f"gdaltindex {index} *.tif"
        )
    found = []
    for place in table[LOCATION].astype(str):
        beside = index.parent / place
        found.append(place if is_remote(place) or not beside.exists() else str(beside))
    return found


def describe_files(paths: Sequence[str], signer: str | None = None) -> list[RasterFile]:
    """Describe several files; those on servers several at once."""
    if not any(is_remote(path) for path in paths):
        return [describe_file(path, signer) for path in paths]
    with ThreadPoolExecutor(min(AT_ONCE, len(paths))) as pool:
        return list(pool.map(lambda path: describe_file(path, signer), paths))


def describe_file(path: str, signer: str | None = None, asset: str = "") -> RasterFile:
    """Read what a file's header says, and look whether its end is there.

    Raises:
        ImageryError: It cannot be read, has no place on Earth, or its bands differ in type.
    """

    def describe() -> RasterFile:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # `_placed` refuses such files
            with open_raster(path, signer) as raster:
                _refuse_placeless(raster, path)
                _refuse_vast_blocks(raster, path)
                if not is_remote(path):
                    _refuse_truncated(raster, path)
                return RasterFile(
                    path=path,
                    geobox=GeoBox(raster.shape, raster.transform, raster.crs),
                    bands=band_names(raster, public(path), remote=is_remote(path)),
                    dtype=raster.dtypes[0],
                    scaling=tuple(zip(raster.scales, raster.offsets, strict=True)),
                    asset=asset,
                    signer=signer,
                )

    return retrying(describe, path)


def _refuse_placeless(raster: DatasetReader, path: str) -> None:
    name = public(path)
    if raster.crs is None:
        raise ImageryError(
            f"{name} has no coordinate reference system; if you know it, set it with "
            f"gdal_edit.py -a_srs EPSG:32610 {name}"
        )
    t = raster.transform
    if t.is_identity or not math.isfinite(t.determinant) or t.determinant == 0:
        raise ImageryError(
            f"{name} has no usable transform from pixels to {raster.crs}; set its corners with "
            f"gdal_edit.py -a_ullr WEST NORTH EAST SOUTH {name}, or its control points with "
            "gdal_translate -gcp"
        )
    if raster.count == 0 or len(set(raster.dtypes)) > 1 or raster.dtypes[0].startswith("c"):
        raise ImageryError(
            f"{name} has bands of types {', '.join(raster.dtypes) or 'none'}; all must have the "
            "same real type: convert it with gdal_translate -ot"
        )


def _refuse_vast_blocks(raster: DatasetReader, path: str) -> None:
    height, width = raster.block_shapes[0]
    together = raster.count if raster.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL" else 1
    size = height * width * together * np.dtype(raster.dtypes[0]).itemsize
    if size > BLOCK_BYTES:
        name = public(path)
        raise ImageryError(
            f"{name} has blocks of {height} x {width} px, {size / 1e6:,.0f} MB each, and they are "
            f"read whole, or it is damaged; cut it into tiles with gdal_translate -of COG {name}"
        )


def _refuse_truncated(raster: DatasetReader, path: str) -> None:
    try:
        with no_error_lost():
            raster.read(1, window=Window(raster.width - 1, raster.height - 1, 1, 1))
    except (RasterioError, OSError) as error:
        raise ImageryError(
            f"{path} is truncated or damaged: its last pixel, row {raster.height - 1}, column "
            f"{raster.width - 1}, cannot be read ({reason(error)}); copy or download "
            f"{'the files that it names' if raster.driver == 'VRT' else 'it'} again"
        ) from error


def refuse_unlike(scenes: Sequence[Scene], source: str) -> None:
    """Stop where scenes differ in their bands or in the type of their pixels.

    Raises:
        ImageryError: Naming the scene and what differs.
    """
    first = scenes[0]
    for scene in scenes:
        types = {file.dtype for file in scene.files}, {file.dtype for file in first.files}
        if scene.bands != first.bands or types[0] != types[1]:
            raise ImageryError(
                f"{scene.name} has the bands {', '.join(scene.bands)} of "
                f"{', '.join(sorted(types[0]))}, the first scene of {source} "
                f"{', '.join(first.bands)} of {', '.join(sorted(types[1]))}; a mosaic needs the "
                "same bands in every scene: name those that go together, by a pattern for one"
            )
