"""Rows out of files: what a file is follows from its content, never from its name alone."""

from __future__ import annotations

import json
import logging
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from speciesmap.errors import ObservationsError
from speciesmap.observations.archive import archive
from speciesmap.observations.delimited import CHUNK_ROWS, Opener, delimited

log = logging.getLogger("speciesmap")

IMAGES = ("gl_image", "rs_image")
OLE = bytes.fromhex("d0cf11e0a1b11ae1")
"""First bytes of Excel's old workbooks."""
BINARY = {b"SQLite format 3\0": ".gpkg", b"fgb": ".fgb"}
"""First bytes of vector files, and the names that GDAL asks of them."""
MISNAMED = (".csv", ".tsv", ".txt")
"""Names by which GDAL takes anything for a table of text."""
PLACES = ("longitude", "latitude", "lon", "lat", "lng", "decimallongitude", "decimallatitude")
"""Columns that a geometry stands in for."""


def frames(path: Path) -> Iterator[pd.DataFrame]:
    """Yield the rows of a file of any known form, columns named as they are there.

    Points become the columns `longitude` and `latitude` (EPSG:4326). Text is read in chunks of
    50,000 rows, so that its size does not matter.

    Raises:
        ObservationsError: There is no such file, its form is not known, or it is damaged.
    """
    if not path.exists():
        raise ObservationsError(f"there is no file {path}; check the name")
    if path.is_dir():
        if (path / "meta.xml").exists():
            openers = {p.name: _opener(p) for p in path.iterdir() if p.is_file()}
            yield from archive(path, openers)
        else:
            yield _vector(path)
        return
    with path.open("rb") as file:
        head = file.read(65536)
    text = head.removeprefix(b"\xef\xbb\xbf").strip()
    if not text:
        raise ObservationsError(f"{path} is empty; export the observations again")
    if text[:200].lower().startswith((b"<!doctype html", b"<html")):
        raise ObservationsError(
            f"{path} is a web page, not a table; download the table itself, perhaps after a login"
        )
    if head.startswith(OLE):
        raise _workbook(path)
    if head.startswith(b"PK\x03\x04"):
        yield from _zipped(path)
    elif head.startswith(b"PAR1"):
        yield from _parquet(path)
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")) or not (
        b"\0" in head or text.startswith((b"{", b"<"))
    ):
        yield from delimited(_opener(path), str(path))
    else:
        yield _binary(path, head)


def _workbook(path: Path) -> ObservationsError:
    return ObservationsError(f"{path} is an Excel workbook; save its sheet as CSV UTF-8")


def _opener(path: Path) -> Opener:
    return lambda: path.open("rb")


def _zipped(path: Path) -> Iterator[pd.DataFrame]:
    """Yield a Darwin Core Archive, a table as GBIF zips it, or a zipped vector file."""
    try:
        with zipfile.ZipFile(path) as zipped:
            names = [n for n in zipped.namelist() if not n.endswith("/")]
            if any(PurePosixPath(n).name == "meta.xml" for n in names):
                openers: dict[str, Opener] = {}
                for n in names:
                    openers[PurePosixPath(n).name] = partial(zipped.open, n)
                yield from archive(path, openers)
                return
            if "xl/workbook.xml" in names:
                raise _workbook(path)
            tables = [n for n in names if n.lower().endswith((".csv", ".tsv", ".txt"))]
            tables = [n for n in tables if not PurePosixPath(n).name.lower().startswith("readme")]
            if len(tables) == 1:
                yield from delimited(partial(zipped.open, tables[0]), f"{path}/{tables[0]}")
                return
    except (
        zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError,
        ValueError,
    ) as error:  # fmt: skip
        raise ObservationsError(
            f"{path} is a damaged or locked zip file ({error}); download it again"
        ) from error
    yield _vector(path)


def _parquet(path: Path) -> Iterator[pd.DataFrame]:
    """Yield the rows of a Parquet file in chunks; points of GeoParquet as places."""
    import geopandas as gpd
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyproj.exceptions import CRSError
    from shapely.errors import ShapelyError

    rows = 0
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            geo = json.loads((schema.metadata or {}).get(b"geo", b"null"))
            name = geo["primary_column"] if geo else ""
            described = geo["columns"][name] if geo else {}
            if geo and described["encoding"] != "WKB":
                yield _located(gpd.read_parquet(path), path, rows)
                return
            columns = [n for n in schema.names if n not in IMAGES]
            for batch in file.iter_batches(CHUNK_ROWS, columns=columns):
                batch.validate(full=True)  # text that is no UTF-8 would fail where it is used
                part = batch.to_pandas(integer_object_nulls=True, ignore_metadata=True)
                if geo:
                    shapes = gpd.GeoSeries.from_wkb(
                        part[name], crs=described.get("crs", "OGC:CRS84")
                    )
                    part = gpd.GeoDataFrame(part.assign(**{name: shapes}), geometry=name)
                    part = _located(part, path, rows)
                rows += len(part)
                yield part
    except (
        pa.ArrowException, ShapelyError, CRSError, OSError, ValueError, TypeError, KeyError,
        AttributeError, RecursionError,
    ) as error:  # fmt: skip
        raise ObservationsError(
            f"{path} is a damaged Parquet file ({' '.join(str(error).split())[:200]}); copy or "
            "write it again"
        ) from error


def _binary(path: Path, head: bytes) -> pd.DataFrame:
    """Read a vector file of one of GDAL's binary forms, under a name that GDAL takes for it."""
    suffix = next((s for magic, s in BINARY.items() if head.startswith(magic)), "")
    if path.suffix.lower() not in MISNAMED and (not suffix or path.suffix):
        return _vector(path)
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"{path.stem}{suffix}"
        link.symlink_to(path.resolve())
        return _vector(path, link)


def _vector(path: Path, name: Path | None = None) -> pd.DataFrame:
    import geopandas as gpd

    try:
        layers = gpd.list_layers(name or path)
        shapes = layers["name"][layers["geometry_type"].notna()].tolist()  # others hold styles
        rows = gpd.read_file(name or path, layer=shapes[0] if shapes else None)
    except Exception as error:  # GDAL's drivers raise classes of their own
        reason = str(error).replace(str(name or path), path.name)
        raise ObservationsError(
            f"{path} is no table and no vector file that GDAL reads ({reason}); give an export of "
            "GBIF or iNaturalist, a CSV, a GeoPackage or GeoParquet"
        ) from error
    if len(shapes) > 1:
        log.warning("%s has the layers %s; %s is read", path, ", ".join(shapes), shapes[0])
    return _located(rows, path, 0)


def _located(rows: Any, path: Path, before: int) -> pd.DataFrame:
    """Turn a table of point geometries into one with longitude and latitude."""
    import shapely

    if getattr(rows, "_geometry_column_name", None) not in rows.columns:
        raise ObservationsError(
            f"{path} has no geometry; give a layer of points, or its table as CSV"
        )
    if rows.crs is None:
        raise ObservationsError(
            f"{path} does not say its coordinate reference system; assign it, for example with "
            "`ogr2ogr -a_srs EPSG:4326`"
        )
    shapes = rows.geometry.to_crs("EPSG:4326")
    there = shapes.notna() & ~shapes.is_empty
    odd = np.flatnonzero(there & ~shapes.geom_type.isin(["Point", "MultiPoint"]))
    if odd.size:
        raise ObservationsError(
            f"{path} row {before + odd[0] + 1} is a {shapes.geom_type.iloc[odd[0]]}; "
            "observations are points: take centroids or other points first"
        )
    points = shapely.centroid(shapes.to_numpy())  # of a multipoint; a point is its own
    table = pd.DataFrame(rows.drop(columns=rows.geometry.name))
    again = [c for c in table.columns if str(c).lower() in PLACES]
    return table.drop(columns=again).assign(
        longitude=shapely.get_x(points), latitude=shapely.get_y(points)
    )
