"""The only door through which rasters are opened for reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from speciesmap.errors import AreaError, ConfigError
from speciesmap.rasters.files import open_raster as open_raster
from speciesmap.rasters.grid import choose_grid, ground_m, in_words
from speciesmap.rasters.messages import public
from speciesmap.rasters.mosaic import Imagery as Imagery
from speciesmap.rasters.placed import place_scene
from speciesmap.rasters.scenes import SUFFIXES as SUFFIXES
from speciesmap.rasters.scenes import (
    Scene,
    describe_file,
    describe_files,
    list_files,
    refuse_unlike,
)


class Opening(TypedDict, total=False):
    """What says which scenes are read and on which grid; see `open_imagery`."""

    crs: Any
    resolution_m: float | None
    like: Path | str | None
    datetime: str | None
    query: Sequence[str]
    first: str


def open_imagery(
    src: str | Path,
    bands: Sequence[str] | None = None,
    *,
    bbox: Sequence[float] | None = None,
    bbox_crs: Any = "EPSG:4326",
    crs: Any = None,
    resolution_m: float | None = None,
    like: Path | str | None = None,
    datetime: str | None = None,
    query: Sequence[str] = (),
    first: str = "newest",
    wanted: Sequence[str] = (),
    preferred_m: float | None = None,
    around_m: float = 0.0,
) -> Imagery:
    """Open imagery: a raster or many, here or on servers, on one grid.

    A raster has its own grid, and so have scenes whose pixels coincide; nothing is warped and
    pixels are those of the files. Other scenes are warped as they are read, bilinearly, onto the
    grid that `speciesmap.rasters.grid.choose_grid` chooses. Where scenes overlap, the first valid
    pixel counts: of the newest scene, or the least cloudy, then by name.

    Args:
        src: A GeoTIFF, VRT or other raster; a folder of them; a pattern such as `naip/*.tif`; a
            tile index of gdaltindex; the address of a raster, `https://...` or `s3://...`; or a
            STAC collection, `stac+https://host/path#collection`.
        bands: Which bands to read, in order, as `Imagery.select` takes them; by default all that
            are not a mask. Bands have names: in STAC from their metadata, else from their
            descriptions, else from their colour interpretation, else `band_1` and so on.
        bbox: Area of interest: west, south, east, north. STAC is searched there, and unlike scenes
            get a grid of that area; otherwise it is not looked at.
        bbox_crs: CRS of `bbox`.
        crs: CRS of the grid.
        resolution_m: Side of the grid's pixels on the ground, metres.
        like: A raster whose grid is taken.
        datetime: For STAC: a date, month or year, or two of them with a slash between.
        query: For STAC: conditions on properties, such as `eo:cloud_cover<10`.
        first: Which scene counts where several overlap: `newest` or `least-cloudy`.
        wanted: For STAC: what is looked for among the assets where `bands` does not say.
        preferred_m: Size of pixels for unlike scenes where `resolution_m` does not say.
        around_m: For STAC: how far around `bbox` pixels are needed too, as by windows at its edge.

    Raises:
        ImageryError: There is nothing to read, a raster has no place on Earth, scenes do not have
            the same bands, or a band is unknown.
        AreaError: The area is malformed, needs another CRS than UTM, or has no scenes.
        ConfigError: An argument makes no sense, or contradicts another.
        DependencyError: A package that the source needs is not installed.
    """
    given = str(src)
    source = public(given)
    if given.startswith("stac+"):
        from speciesmap.rasters.stac import find_scenes

        named = [b.partition("=")[2] or b for b in bands or wanted]
        found = find_scenes(
            given,
            bbox,
            bbox_crs,
            datetime=datetime,
            query=query,
            bands=named,
            around_m=around_m,
        )
    elif datetime is not None or query:
        raise ConfigError(
            f"--datetime and --query choose items of STAC; {source} has none, leave them out"
        )
    else:
        files = describe_files(list_files(given))
        found = [Scene(public(f.path).replace("\\", "/").rpartition("/")[2], (f,)) for f in files]
    scenes = _ordered(found, first)
    refuse_unlike(scenes, source)
    finest = [min((f.geobox for f in scene.files), key=ground_m) for scene in scenes]
    if like is not None:
        if crs is not None or resolution_m is not None:
            raise ConfigError("--like gives CRS and resolution; leave out --crs and --resolution-m")
        grid = describe_file(str(like)).geobox
    else:
        grid = choose_grid(
            finest,
            bbox=bbox,
            bbox_crs=bbox_crs,
            crs=crs,
            resolution_m=resolution_m,
            preferred_m=preferred_m,
        )
    names = scenes[0].bands
    indexes = tuple(i for i, name in enumerate(names, 1) if name != "alpha")
    members = [member for scene in scenes if (member := place_scene(scene, grid)) is not None]
    if all(member.shared(0, 0, *grid.shape) is None for member in members):
        raise AreaError(f"{source} has nothing on the grid asked for ({in_words(grid)})")
    imagery = Imagery(
        source=source,
        bands=tuple(names[i - 1] for i in indexes),
        geobox=grid,
        dtype=members[0].dtype,
        resolution_m=ground_m(grid),
        detail_m=max(ground_m(geobox) for geobox in finest),
        gains=None,
        _indexes=indexes,
        _file_bands=names,
        _scaling=scenes[0].scaling,
        _members=tuple(members),
    )
    return imagery if bands is None else imagery.select(bands)


def _ordered(scenes: Sequence[Scene], first: str) -> list[Scene]:
    """Scenes in the order in which they count."""
    if first not in ("newest", "least-cloudy"):
        raise ConfigError(f"scenes cannot be ordered by {first!r}; say newest or least-cloudy")
    dated = any(scene.date for scene in scenes)
    named = sorted(scenes, key=lambda s: s.name) if dated else list(scenes)
    ordered = sorted(named, key=lambda s: s.date, reverse=True)
    if first == "newest":
        return ordered
    return sorted(ordered, key=lambda s: (math.isnan(s.clouds), s.clouds))
