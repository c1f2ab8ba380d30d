"""Rows out of files: what a file is follows from its content, never from its name alone."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from speciesmap.errors import ObservationsError

CHUNK_ROWS = 50_000
EMPTY = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "\\N")
IMAGES = ("gl_image", "rs_image")
PHOTO_TABLES = ("multimedia", "image")
"""Ends of the row types of Darwin Core extensions that hold photos (GBIF's multimedia, images,
Audubon Core's multimedia)."""

Opener = Callable[[], IO[bytes]]


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
            yield from _archive(path, openers)
        else:
            yield _vector(path)
        return
    with path.open("rb") as file:
        head = file.read(65536)
    text = head.removeprefix(b"\xef\xbb\xbf").strip()
    if not text:
        raise ObservationsError(f"{path} is empty; export the observations again")
    if head.startswith(b"PK\x03\x04"):
        yield from _zipped(path)
    elif head.startswith(b"PAR1"):
        yield _parquet(path)
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")) or not (
        b"\0" in head or text.startswith((b"{", b"<"))
    ):
        yield from _delimited(_opener(path), str(path))
    else:
        yield _vector(path)


def _opener(path: Path) -> Opener:
    return lambda: path.open("rb")


def _zipped(path: Path) -> Iterator[pd.DataFrame]:
    """Yield a Darwin Core Archive, a table as GBIF zips it, or a zipped vector file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/")]
            if any(PurePosixPath(n).name == "meta.xml" for n in names):
                openers: dict[str, Opener] = {}
                for n in names:
                    openers[PurePosixPath(n).name] = partial(archive.open, n)
                yield from _archive(path, openers)
                return
            tables = [n for n in names if n.lower().endswith((".csv", ".tsv", ".txt"))]
            tables = [n for n in tables if not PurePosixPath(n).name.lower().startswith("readme")]
            if len(tables) == 1:
                yield from _delimited(partial(archive.open, tables[0]), f"{path}/{tables[0]}")
                return
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ObservationsError(
            f"{path} is a damaged or locked zip file ({error}); download it again"
        ) from error
    yield _vector(path)


def _delimited(opener: Opener, name: str) -> Iterator[pd.DataFrame]:
    """Yield a text table whose first line names its columns."""
    with opener() as file:
        head = file.read(65536)
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    header = io.StringIO(head.decode(encoding, errors="ignore")).readline().rstrip("\r\n")
    counts = {mark: header.count(mark) for mark in "\t;,|"}
    delimiter = max(counts, key=lambda mark: counts[mark])
    columns = next(csv.reader([header], delimiter=delimiter), [])
    if len(columns) < 2 or not all(columns[:2]):
        raise ObservationsError(
            f"{name} begins with {header[:60]!r}, which is no line of column names; it needs "
            "latitude, longitude and scientific_name, or the columns of GBIF or iNaturalist"
        )
    # GBIF's tables are separated by tabs and never quoted: a quotation mark there is a letter
    quoted = delimiter != "\t" or '"' in header
    yield from _chunks(opener, name, delimiter, '"' if quoted else "", encoding, columns, 1)


def _chunks(
    opener: Opener,
    name: str,
    delimiter: str,
    quote: str,
    encoding: str,
    columns: Sequence[str],
    header_lines: int,
) -> Iterator[pd.DataFrame]:
    rows = 0
    try:
        with (
            opener() as file,
            pd.read_csv(
                file,
                sep=delimiter,
                quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
                quotechar=quote or '"',
                encoding=encoding,
                header=None,
                names=_distinct(columns),
                skiprows=header_lines,
                index_col=False,
                dtype=str,
                keep_default_na=False,
                na_values=list(EMPTY),
                chunksize=CHUNK_ROWS,
            ) as chunks,
        ):
            for chunk in chunks:
                rows += len(chunk)
                yield chunk
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1]
        raise ObservationsError(
            f"{name} is not {error.encoding.upper()} (byte {byte!r} after row {rows}); convert "
            "it, for example with `iconv -f WINDOWS-1252 -t UTF-8`"
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, csv.Error) as error:
        raise ObservationsError(
            f"{name} is damaged: {' '.join(str(error).split())}; mend that line or export it again"
        ) from error


def _distinct(columns: Sequence[str]) -> list[str]:
    """Keep the first of equal names and number the rest."""
    seen: dict[str, int] = {}
    names = []
    for column in (c.strip() for c in columns):
        seen[column] = seen.get(column, 0) + 1
        names.append(column if seen[column] == 1 else f"{column}.{seen[column] - 1}")
    return names


@dataclass(frozen=True)
class _Table:
    """One text file of a Darwin Core Archive, as its meta.xml describes it."""

    name: str
    opener: Opener
    delimiter: str
    quote: str
    encoding: str
    header_lines: int
    identity: int
    columns: tuple[str, ...]
    kind: str

    def chunks(self) -> Iterator[pd.DataFrame]:
        """Yield its rows; the identifier that joins the archive's files is the column `_id`."""
        for chunk in _chunks(
            self.opener, self.name, self.delimiter, self.quote, self.encoding,
            self.columns, self.header_lines,
        ):  # fmt: skip
            yield chunk.assign(_id=chunk.iloc[:, self.identity])


def _archive(path: Path, openers: dict[str, Opener]) -> Iterator[pd.DataFrame]:
    """Yield the occurrences of a Darwin Core Archive with the addresses of their photos.

    The standard is TDWG's Darwin Core text guide. Identifiers of photos of one occurrence are
    joined by `|` in `photo`; the photos' licence, where given, stands in for the record's.
    """
    with openers["meta.xml"]() as file:
        described = file.read()
    if b"<!DOCTYPE" in described or b"<!ENTITY" in described:
        raise ObservationsError(f"{path}: meta.xml declares entities; remove its DOCTYPE")
    try:
        root = ElementTree.fromstring(described)
    except ElementTree.ParseError as error:
        raise ObservationsError(f"{path}: meta.xml is no XML ({error}); download it again") from (
            error
        )
    cores = [_table(path, node, openers) for node in root if _end(node.tag) == "core"]
    if len(cores) != 1 or cores[0].kind != "occurrence":
        raise ObservationsError(
            f"{path} has a core of {cores[0].kind if cores else 'nothing'}; only archives of "
            "occurrences hold observations"
        )
    photos: dict[str, list[str]] = {}
    licences: dict[str, str] = {}
    for node in root:
        if _end(node.tag) == "extension" and _end(node.get("rowType", "")) in PHOTO_TABLES:
            for chunk in _table(path, node, openers).chunks():
                _collect(chunk, photos, licences)
    for chunk in cores[0].chunks():
        chunk["observation_id"] = chunk["_id"]
        if photos:
            chunk["photo"] = [" | ".join(photos.get(i, [])) for i in chunk["_id"]]
            given = chunk["_id"].map(licences)
            chunk["license"] = given.where(given.notna(), chunk.get("license"))
        yield chunk


def _collect(chunk: pd.DataFrame, photos: dict[str, list[str]], licences: dict[str, str]) -> None:
    """Note the still images of one chunk of a multimedia table."""
    blank = pd.Series("", index=chunk.index)
    address = chunk.get("accessURI", chunk.get("identifier", blank)).fillna("")
    kind = (chunk.get("type", blank).fillna("") + chunk.get("format", blank).fillna("")).str.lower()
    still = kind.str.contains("image") | (kind == "")
    licence = chunk.get("license", chunk.get("rights", blank)).fillna("")
    rows = zip(chunk["_id"][still], address[still], licence[still], strict=True)
    for identity, place, terms in rows:
        if place:
            photos.setdefault(identity, []).append(place)
            if terms:
                licences.setdefault(identity, terms)


def _table(path: Path, node: ElementTree.Element, openers: dict[str, Opener]) -> _Table:
    location = next((n.text or "" for n in node.iter() if _end(n.tag) == "location"), "").strip()
    if location not in openers:
        raise ObservationsError(f"{path} lacks its file {location!r}; download the archive again")
    named: dict[int, str] = {}
    identity = 0
    for child in node:
        if child.get("index") is None:
            continue
        index = int(child.get("index", "0"))
        if _end(child.tag) in ("id", "coreid"):
            identity = index
            named.setdefault(index, "_key")
        elif _end(child.tag) == "field":
            named[index] = child.get("term", "").rsplit("/", 1)[-1]
    marks = {"\\t": "\t", "\\n": "\n", "\\r\\n": "\r\n"}
    delimiter = node.get("fieldsTerminatedBy", ",")
    return _Table(
        name=f"{path}/{location}",
        opener=openers[location],
        delimiter=marks.get(delimiter, delimiter),
        quote=node.get("fieldsEnclosedBy", '"'),
        encoding="utf-8-sig" if node.get("encoding", "").upper() in ("", "UTF-8") else
        node.get("encoding", ""),
        header_lines=int(node.get("ignoreHeaderLines", "0")),
        identity=identity,
        columns=tuple(named.get(k, f"_{k}") for k in range(max(named, default=0) + 1)),
        kind=_end(node.get("rowType", "")),
    )  # fmt: skip


def _end(name: str) -> str:
    """Last part of a namespaced tag or address, in lower case."""
    return name.rsplit("}", 1)[-1].rsplit("/", 1)[-1].lower()


def _parquet(path: Path) -> pd.DataFrame:
    import geopandas as gpd
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        if b"geo" in (schema.metadata or {}):
            return _located(gpd.read_parquet(path), path)
        return pd.read_parquet(path, columns=[n for n in schema.names if n not in IMAGES])
    except (pa.ArrowException, OSError) as error:
        raise ObservationsError(
            f"{path} is a damaged Parquet file ({error}); copy or write it again"
        ) from error


def _vector(path: Path) -> pd.DataFrame:
    import geopandas as gpd

    try:
        rows = gpd.read_file(path)
    except Exception as error:  # GDAL's drivers raise classes of their own
        raise ObservationsError(
            f"{path} is no table and no vector file that GDAL reads ({error}); give an export of "
            "GBIF or iNaturalist, a CSV, a GeoPackage or GeoParquet"
        ) from error
    return _located(rows, path)


def _located(rows: Any, path: Path) -> pd.DataFrame:
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
            f"{path} row {odd[0] + 1} is a {shapes.geom_type.iloc[odd[0]]}; observations are "
            "points: take centroids or other points first"
        )
    points = shapely.centroid(shapes.to_numpy())  # of a multipoint; a point is its own
    table = pd.DataFrame(rows.drop(columns=rows.geometry.name))
    again = [c for c in table.columns if str(c).lower() in ("longitude", "latitude", "lon", "lat")]
    return table.drop(columns=again).assign(
        longitude=shapely.get_x(points), latitude=shapely.get_y(points)
    )
