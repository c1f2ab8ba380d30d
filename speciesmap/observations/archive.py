"""Darwin Core Archives: occurrences joined with the photos of their multimedia extension."""

from __future__ import annotations

import codecs
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import pandas as pd

from speciesmap.errors import ObservationsError
from speciesmap.observations.delimited import Opener, chunks

PHOTO_TABLES = ("multimedia", "image")
"""Ends of the row types of Darwin Core extensions that hold photos (GBIF's multimedia, images,
Audubon Core's multimedia)."""
MOST_COLUMNS = 2000
MOST_DESCRIPTION_BYTES = 1 << 24
CITED = ("metadata.xml", "citations.txt", "eml.xml")
DOI = re.compile(rb"10\.15468/dl\.[a-z0-9]+")
"""DOI of a download from GBIF; those of single data sets have no `dl`."""


@dataclass(frozen=True)
class _Table:
    """One text file of an archive, as its meta.xml describes it."""

    name: str
    opener: Opener
    delimiter: str
    quote: str
    encoding: str
    header_lines: int
    identity: int
    columns: tuple[str, ...]
    constant: dict[str, str]
    kind: str

    def chunks(self) -> Iterator[pd.DataFrame]:
        """Yield its rows; the identifier that joins the archive's files is the column `_id`."""
        for chunk in chunks(
            self.opener, self.name, self.delimiter, self.quote, self.encoding,
            self.columns, self.header_lines,
        ):  # fmt: skip
            for name, value in self.constant.items():
                chunk[name] = chunk[name].fillna(value) if name in chunk else value
            yield chunk.assign(_id=chunk.iloc[:, self.identity].fillna(""))


def archive(path: Path, openers: Mapping[str, Opener]) -> Iterator[pd.DataFrame]:
    """Yield the occurrences of a Darwin Core Archive with the addresses of their photos.

    The standard is TDWG's Darwin Core text guide. Photos of one occurrence are joined by ` | ` in
    `photo`, their licences in the same order in `photo_license`. They wait in a temporary database
    on disk, so that the size of the archive does not matter. The download's DOIs are in the
    chunks' `attrs["doi"]`.

    Args:
        path: What messages call it.
        openers: Of its files by name, `meta.xml` among them.

    Raises:
        ObservationsError: meta.xml or a file it describes is missing or malformed.
    """
    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    with openers["meta.xml"]() as file:
        described = file.read(MOST_DESCRIPTION_BYTES)
    try:
        root = fromstring(described, forbid_dtd=True)
    except DefusedXmlException as error:
        raise ObservationsError(
            f"{path}: meta.xml declares a document type or entities; remove its DOCTYPE"
        ) from error
    except (ParseError, ValueError, LookupError) as error:
        raise ObservationsError(
            f"{path}: meta.xml is no XML ({error}); download it again"
        ) from error
    cores = [_table(path, node, openers) for node in root if _end(node.tag) == "core"]
    if len(cores) != 1 or cores[0].kind != "occurrence":
        raise ObservationsError(
            f"{path} has a core of {cores[0].kind if cores else 'nothing'}; only archives of "
            "occurrences hold observations"
        )
    dois = sorted({doi for name in CITED if name in openers for doi in _dois(openers[name])})
    with closing(sqlite3.connect("")) as photos:  # "" is a temporary file that nobody else sees
        photos.execute("CREATE TABLE photo (id TEXT, address TEXT, license TEXT)")
        joined = False
        for node in root:
            if _end(node.tag) == "extension" and _end(node.get("rowType", "")) in PHOTO_TABLES:
                for chunk in _table(path, node, openers).chunks():
                    photos.executemany("INSERT INTO photo VALUES (?, ?, ?)", _stills(chunk))
                joined = True
        photos.execute("CREATE INDEX by_id ON photo (id)")
        for chunk in cores[0].chunks():
            chunk["observation_id"] = chunk["_id"]
            if joined:
                _join(chunk, photos)
            chunk.attrs["doi"] = dois
            yield chunk


def _stills(chunk: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Identifier, address and licence of the still images of one chunk of a multimedia table."""
    blank = pd.Series("", index=chunk.index)

    def text(*names: str) -> pd.Series:
        found = [chunk[name].fillna("") for name in names if name in chunk]
        answer = found[0] if found else blank
        for other in found[1:]:
            answer = answer.where(answer != "", other)
        return answer

    address = text("accessURI", "identifier")
    kind = (text("type") + " " + text("format")).str.strip().str.lower()
    still = (address != "") & (kind.str.contains("image") | (kind == ""))
    return zip(chunk["_id"][still], address[still], text("license", "rights")[still], strict=True)


def _join(chunk: pd.DataFrame, photos: sqlite3.Connection) -> None:
    """Add the photos of a chunk's occurrences, in the order of the multimedia table."""
    photos.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (id TEXT PRIMARY KEY)")
    photos.execute("DELETE FROM wanted")
    photos.executemany("INSERT OR IGNORE INTO wanted VALUES (?)", zip(chunk["_id"], strict=True))
    found: dict[str, list[tuple[str, str]]] = {}
    for identity, address, terms in photos.execute(
        "SELECT id, address, license FROM photo JOIN wanted USING (id) ORDER BY photo.rowid"
    ):
        found.setdefault(identity, []).append((address, terms))
    of_row = [found.get(identity, []) for identity in chunk["_id"]]
    chunk["photo"] = [" | ".join(address for address, _ in row) for row in of_row]
    chunk["photo_license"] = [
        " | ".join(terms for _, terms in row) if any(terms for _, terms in row) else ""
        for row in of_row
    ]


def _dois(opener: Opener) -> list[str]:
    with opener() as file:
        return [found.decode() for found in DOI.findall(file.read(MOST_DESCRIPTION_BYTES).lower())]


def _table(path: Path, node: Element, openers: Mapping[str, Opener]) -> _Table:
    location = next((n.text or "" for n in node.iter() if _end(n.tag) == "location"), "").strip()
    if location not in openers:
        raise ObservationsError(f"{path} lacks its file {location!r}; download the archive again")
    named: dict[int, str] = {}
    constant: dict[str, str] = {}
    identity = 0
    for child in node:
        term = child.get("term", "").rsplit("/", 1)[-1]
        if child.get("index") is not None:
            index = _number(path, child, "index", MOST_COLUMNS)
            if _end(child.tag) in ("id", "coreid"):
                identity = index
                named.setdefault(index, "_key")
            elif _end(child.tag) == "field":
                named[index] = term
        if _end(child.tag) == "field" and child.get("default"):
            constant[term] = child.get("default", "")
    marks = {"\\t": "\t", "\\n": "\n", "\\r\\n": "\r\n"}
    delimiter = node.get("fieldsTerminatedBy", ",")
    delimiter = marks.get(delimiter, delimiter)
    quote = node.get("fieldsEnclosedBy", '"')
    if len(delimiter) != 1 or len(quote) > 1 or not (delimiter + quote).isascii():
        raise ObservationsError(
            f"{path}: meta.xml separates the fields of {location} by {delimiter!r} and encloses "
            f"them by {quote!r}; each must be one plain character"
        )
    encoding = node.get("encoding", "") or "UTF-8"
    try:
        codecs.lookup(encoding)
        "".encode(encoding)
    except (LookupError, ValueError) as error:
        raise ObservationsError(
            f"{path}: meta.xml gives {location} the unknown encoding {encoding!r}; write UTF-8"
        ) from error
    return _Table(
        name=f"{path}/{location}",
        opener=openers[location],
        delimiter=delimiter,
        quote=quote,
        encoding=encoding,
        header_lines=_number(path, node, "ignoreHeaderLines", 1000),
        identity=identity,
        columns=tuple(named.get(k, f"_{k}") for k in range(max(named, default=0) + 1)),
        constant=constant,
        kind=_end(node.get("rowType", "")),
    )


def _number(path: Path, node: Element, name: str, most: int) -> int:
    written = node.get(name, "0")
    if not (written.isascii() and written.isdecimal() and int(written[:9]) <= most):
        raise ObservationsError(
            f"{path}: meta.xml has {name}={written!r}; it must be a number from 0 to {most}"
        )
    return int(written)


def _end(name: object) -> str:
    """Last part of a namespaced tag or address, in lower case; comments have none."""
    return name.rsplit("}", 1)[-1].rsplit("/", 1)[-1].lower() if isinstance(name, str) else ""
