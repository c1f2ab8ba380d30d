"""STAC collections as sources of scenes: searched by place, date and properties.

A source is `stac+https://host/path#collection`: an API, or a static catalog, whose items are then
visited one by one.
"""

from __future__ import annotations

import importlib
import logging
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from affine import Affine
from odc.geo.geobox import GeoBox

from speciesmap.errors import (
    AreaError,
    ConfigError,
    DependencyError,
    ImageryError,
    SpeciesmapError,
)
from speciesmap.rasters.bands import canonical
from speciesmap.rasters.grid import grown
from speciesmap.rasters.messages import public, reason
from speciesmap.rasters.remote import AT_ONCE, CLOUDS, SIGNED_HOST
from speciesmap.rasters.scenes import RasterFile, Scene, describe_file
from speciesmap.rasters.windows import bounds_of

PREFIX = "stac+"
RASTERS = ("tiff", "jp2", "geotiff", "cog")  # of media types and suffixes
NOT_DATA = {"thumbnail", "overview", "visual", "metadata"}  # roles, and keys of assets
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
QUERY_NAMES = {"<=": "lte", ">=": "gte", "!=": "neq", "<": "lt", ">": "gt", "=": "eq"}

log = logging.getLogger("speciesmap")

Condition = tuple[str, str, str | float]


def find_scenes(
    source: str,
    bbox: Sequence[float] | None,
    bbox_crs: Any = "EPSG:4326",
    *,
    datetime: str | None = None,
    query: Sequence[str] = (),
    bands: Sequence[str] = (),
    around_m: float = 0.0,
) -> list[Scene]:
    """Find the scenes of a collection that touch an area.

    Args:
        source: `stac+https://host/path#collection`.
        bbox: Area of interest.
        bbox_crs: CRS of `bbox`.
        datetime: A date, month or year, or two with a slash between them; either may be `..`.
        query: Conditions on the items' properties, such as `eo:cloud_cover<10`.
        bands: What is wanted of each scene; all that its assets show by default. They are taken
            from one asset that has them all where there is one, else from an asset each.
        around_m: How far beyond the area scenes are looked for too.

    Returns:
        At least one scene, in no order that means anything.

    Raises:
        AreaError: No area is given, or nothing is there.
        ConfigError: The source or a condition is malformed.
        DependencyError: pystac-client is not installed.
        ImageryError: The server does not answer, or items have no rasters with these bands.
    """
    address, _, collection = source.removeprefix(PREFIX).partition("#")
    if not collection:
        raise ConfigError(
            f"{public(source)} names no collection; write it after a #, as in "
            f"{PREFIX}https://{SIGNED_HOST}/api/stac/v1#naip"
        )
    if bbox is None:
        raise AreaError(f"{public(source)} must not be read as a whole; say where with --bbox")
    conditions = [_condition(text) for text in query]
    area = bounds_of(bbox, bbox_crs)
    try:
        pystac_client = importlib.import_module("pystac_client")
    except ImportError as error:
        raise DependencyError(
            "STAC is searched by the package pystac-client, which is not installed; "
            "pip install 'speciesmap[stac]'"
        ) from error
    interval = _interval(pystac_client, datetime)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pystac_client.warnings.PystacClientWarning)
            looked = grown(area, around_m)
            items = list(_search(pystac_client, address, collection, looked, interval, conditions))
    except Exception as error:  # what a server may send knows no bounds
        raise ImageryError(
            f"{public(source)} cannot be searched ({reason(error)[:300]}); check the address, the "
            "name of the collection and the network"
        ) from error
    if not items:
        asked = "".join([f" in {datetime}" * bool(datetime), *(f" with {c}" for c in query)])
        place = " ".join(f"{value:.6g}" for value in area)
        raise AreaError(
            f"{public(source)} has nothing in {place} (west south east north){asked}; check "
            f"that it has a collection {collection}, or ask for another area, date or property"
        )
    host = urlsplit(address).hostname
    signer = SIGNED_HOST if host == SIGNED_HOST else None
    wanted = [canonical(band) for band in bands]

    def scene(item: Mapping[str, Any]) -> Scene:
        try:
            return _scene(item, wanted, signer, address.startswith(("http://", "https://")))
        except SpeciesmapError:
            raise
        except Exception as error:
            raise ImageryError(
                f"{public(source)} has an item {item.get('id')!r:.100} that is not in STAC "
                f"({reason(error)[:200]}); tell those who keep it, or ask for another date"
            ) from error

    with ThreadPoolExecutor(min(AT_ONCE, len(items))) as pool:  # headers may have to be read
        return list(pool.map(scene, items))


def _interval(pystac_client: Any, datetime: str | None) -> str:
    """Write a date, month, year or two of them as pystac-client does: in full."""
    try:
        asked = pystac_client.ItemSearch(url="", datetime=datetime).get_parameters()
    except Exception as error:  # pystac-client raises no narrower one
        raise ConfigError(
            f"--datetime {datetime} is no date that STAC knows ({error}); give 2018, 2018-06-01 "
            "or 2018-01-01/2019-12-31"
        ) from error
    return str(asked.get("datetime", ""))


def _search(
    pystac_client: Any,
    address: str,
    collection: str,
    area: Sequence[float],
    interval: str,
    conditions: Sequence[Condition],
) -> Iterator[dict[str, Any]]:
    """Items of an area as plain dictionaries, each once."""
    retry = importlib.import_module("urllib3").Retry(
        total=10,
        connect=2,
        backoff_factor=0.2,
        backoff_max=10,
        status_forcelist=[429, 500, 502, 503, 504],
    )
    api = pystac_client.stac_api_io.StacApiIO(max_retries=retry)
    place = address.removeprefix("file://")
    try:
        catalog = pystac_client.Client.open(place, stac_io=api)
        searchable = catalog.conforms_to("ITEM_SEARCH")
        filterable = catalog.conforms_to("QUERY")
    except pystac_client.errors.ClientTypeError:  # a collection that belongs to no API
        catalog = importlib.import_module("pystac").Collection.from_file(place, stac_io=api)
        searchable = filterable = False
    seen = set()
    for west, south, east, north in _halves(area):
        if searchable:
            query: dict[str, dict[str, Any]] = {}
            for name, comparison, value in conditions if filterable else ():
                query.setdefault(name, {})[QUERY_NAMES[comparison]] = value
            pages = catalog.search(
                collections=[collection],
                bbox=[west, south, east, north],
                datetime=interval or None,
                query=query or None,
            ).pages_as_dicts()
            found: Iterable[Mapping[str, Any]] = _until_repeated(pages)
        else:
            held = catalog.get_child(collection, recursive=True)
            if held is None and catalog.id == collection:
                held = catalog
            if held is None:
                raise LookupError(f"there is no collection {collection}")
            found = (_absolute(item) for item in held.get_items(recursive=True))
        for item in found:
            box = item.get("bbox") or [west, south, east, north]
            low, high = len(box) // 2, len(box) // 2 + 1
            apart = box[0] > east or box[low] < west or box[1] > north or box[high] < south
            if box[0] <= box[low] and apart:
                continue
            facts = item["properties"]
            if not searchable and not _within(facts, interval):
                continue
            if item["id"] in seen or not all(_holds(facts, c) for c in conditions):
                continue
            seen.add(item["id"])
            yield dict(item)


def _until_repeated(pages: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Items of pages up to one with nothing new: the next page of some servers is the same one."""
    told: set[str] = set()
    for page in pages:
        new = [item for item in page["features"] if item["id"] not in told]
        if not new:
            return
        told.update(item["id"] for item in new)
        yield from new


def _absolute(item: Any) -> dict[str, Any]:
    item.make_asset_hrefs_absolute()
    plain: dict[str, Any] = item.to_dict(include_self_link=False, transform_hrefs=False)
    return plain


def _halves(area: Sequence[float]) -> list[tuple[float, float, float, float]]:
    """An area, or its parts on either side of the antimeridian."""
    west, south, east, north = area
    if east <= 180:
        return [(west, south, east, north)]
    return [(west, south, 180.0, north), (-180.0, south, east - 360, north)]


def _condition(text: str) -> Condition:
    found = re.fullmatch(r"\s*([\w:.-]+)\s*(<=|>=|!=|=|<|>)\s*(.+?)\s*", text)
    if found is None:
        raise ConfigError(f"--query {text} is no condition; write one such as eo:cloud_cover<10")
    name, comparison, value = found.groups()
    try:
        return name, comparison, float(value)
    except ValueError:
        return name, comparison, value


def _holds(facts: Mapping[str, Any], condition: Condition) -> bool:
    """Tell whether an item has a property and it is as asked."""
    name, comparison, wanted = condition
    value = facts.get(name)
    if value is None:
        return False
    try:
        return COMPARISONS[comparison](type(wanted)(value), wanted)
    except (TypeError, ValueError):
        return COMPARISONS[comparison](str(value), f"{wanted:g}" if value else str(wanted))


def _within(facts: Mapping[str, Any], interval: str) -> bool:
    """Tell whether an item was taken in an interval that pystac-client wrote in full."""
    if not interval:
        return True
    first, _, last = interval.partition("/")
    start = facts.get("datetime") or facts.get("start_datetime") or ""
    end = facts.get("datetime") or facts.get("end_datetime") or ""
    after = first == ".." or str(end)[:19] >= first[:19]
    return after and (last == ".." or str(start)[:19] <= (last or first)[:19])


def _scene(
    item: Mapping[str, Any], wanted: Sequence[str], signer: str | None, remote: bool
) -> Scene:
    facts = item["properties"]
    shows: dict[str, tuple[str, ...]] = {}
    spare: dict[str, tuple[str, ...]] = {}
    for key, asset in item["assets"].items():
        kind = str(asset.get("type", "")) + urlsplit(asset["href"]).path[-5:]
        if not any(name in kind.lower() for name in RASTERS):
            continue
        roles = {key, *asset.get("roles", ())}
        (spare if roles & NOT_DATA else shows)[key] = _bands(asset)
    shows = shows or spare
    keys = _choose(shows, wanted)
    if not keys:
        there = [f"{key} ({', '.join(names)})" if names else key for key, names in shows.items()]
        raise ImageryError(
            f"item {item['id']} has no assets that show {', '.join(wanted) or 'bands'}; its "
            f"rasters are {', '.join(there) or 'none'}"
        )
    hrefs = [item["assets"][key]["href"] for key in keys]
    here = [href for href in hrefs if urlsplit(href).scheme not in ("http", "https", *CLOUDS)]
    if remote and here:
        raise ImageryError(
            f"item {item['id']} names {here[0]}, which would be a file of this machine; only "
            "addresses are read from a catalog on a server"
        )
    files = tuple(_file(item, key, shows[key], signer) for key in keys)
    date = facts.get("datetime") or facts.get("start_datetime") or ""
    clouds = facts.get("eo:cloud_cover")
    return Scene(
        name=str(item["id"]),
        files=_unique(files),
        date=str(date),
        clouds=math.nan if clouds is None else float(clouds),
    )


def _bands(asset: Mapping[str, Any]) -> tuple[str, ...]:
    """What the bands of an asset show; nothing where its metadata do not tell."""
    names = []
    for band in asset.get("eo:bands") or asset.get("bands") or ():
        name = band.get("common_name") or band.get("eo:common_name") or band.get("name") or ""
        names.append(canonical(name))
    return tuple(names) if all(names) else ()


def _choose(shows: Mapping[str, tuple[str, ...]], wanted: Sequence[str]) -> list[str]:
    """Keys of the assets that show what is wanted: one that has it all, else one for each band."""
    if len(shows) == 1:
        return list(shows)
    if not wanted:
        richest = max(shows.values(), key=len, default=())
        return [key for key, bands in shows.items() if len(bands) == len(richest)]
    whole = [key for key, bands in shows.items() if set(wanted) <= set(bands)]
    if whole:
        return whole[:1]
    keys: list[str] = []
    for band in wanted:
        having = [k for k, bands in shows.items() if band in bands or band == canonical(k)]
        if not having:
            return []
        keys.append(min(having, key=lambda k: len(shows[k])))
    return list(dict.fromkeys(keys))


def _unique(files: tuple[RasterFile, ...]) -> tuple[RasterFile, ...]:
    """Let no two bands of a scene have one name: those that would get their asset's."""
    names = [name for file in files for name in file.bands]
    if len(set(names)) == len(names):
        return files
    return tuple(
        replace(
            file, bands=tuple(file.asset.lower() if names.count(n) > 1 else n for n in file.bands)
        )
        for file in files
    )


def _file(
    item: Mapping[str, Any], key: str, bands: tuple[str, ...], signer: str | None
) -> RasterFile:
    """Describe an asset from its metadata, or where they do not suffice from its header."""
    asset = item["assets"][key]
    facts = {**item["properties"], **asset}
    path = asset["href"]
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    code = facts.get("proj:code") or facts.get("proj:epsg")
    shape, transform = facts.get("proj:shape"), facts.get("proj:transform")
    values = facts.get("raster:bands") or facts.get("bands") or [{}]
    types = {band.get("data_type") or facts.get("data_type") for band in values}
    if not (code and shape and transform and bands and len(types) == 1 and None not in types):
        told = describe_file(path, signer, key)
        return replace(told, bands=bands) if len(bands) == len(told.bands) else told
    grid = GeoBox(
        tuple(shape), Affine(*transform[:6]), f"EPSG:{code}" if isinstance(code, int) else code
    )
    dtype = np.dtype(types.pop())
    sound = dtype.kind in "iuf" and math.isfinite(grid.transform.determinant)
    if not sound or not grid.transform.determinant or not 0 < max(shape) < 1 << 31:
        raise ValueError(f"{key} has pixels of {dtype} on the grid {shape} {transform}")
    scaling = tuple((float(b.get("scale", 1)), float(b.get("offset", 0))) for b in values)
    return RasterFile(
        path=path,
        geobox=grid,
        bands=bands,
        dtype=str(dtype),
        scaling=scaling if len(scaling) == len(bands) else scaling[:1] * len(bands),
        asset=key,
        signer=signer,
    )
