"""Text tables in chunks: any delimiter, mixed encodings, and damage named by its line."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import pandas as pd

from speciesmap.errors import ObservationsError

log = logging.getLogger("speciesmap")

CHUNK_ROWS = 50_000
HEAD_BYTES = 65_536
BLOCK_BYTES = 1 << 20
LONGEST_LINE_BYTES = 1 << 24
QUOTE = "quote fields that hold the delimiter or a decimal comma, or export the table again"
EMPTY = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "\\N")

Opener = Callable[[], IO[bytes]]


def _windows_1252(error: UnicodeError) -> tuple[str, int]:
    """Decode what is not UTF-8 as Windows-1252, where all but five bytes are letters."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return wrong.decode("cp1252", errors="replace"), error.end


codecs.register_error("speciesmap.windows-1252", _windows_1252)


class Utf8(io.RawIOBase):
    """A stream of bytes in UTF-8, where bytes that are not are read as Windows-1252.

    Spreadsheets and old databases leave such bytes in files that are mostly UTF-8. How many lines
    were mended is logged at the end, with the first one's number.

    Args:
        file: Where to read.
        name: What messages call it.
        quote: The mark that encloses fields, "" for none.
        fields: How many fields, separated by `delimiter`, the last line needs; 0 for any number.
            A file whose last line lacks both its end and some fields was cut off.
        delimiter: What separates fields.

    Raises:
        ObservationsError: On reading, where a line is longer than 16 MiB, a quotation mark never
            ends, or the file was cut off.
    """

    def __init__(
        self, file: IO[bytes], name: str, quote: str = "", fields: int = 0, delimiter: str = "\t"
    ) -> None:
        self._file, self._name = file, name
        self._quote, self._fields, self._delimiter = quote.encode(), fields, delimiter.encode()
        self._rest = self._ready = b""
        self._lines = self._mended = self._first = 0
        self._open_since = 0
        self._ended = False

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill a buffer with whole lines of UTF-8; 0 at the end."""
        while not self._ready and not self._ended:
            self._ready = self._next()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _next(self) -> bytes:
        block = self._file.read(BLOCK_BYTES)
        if not block:
            self._ended = True
            text, self._rest = self._rest, b""
            fields = text.count(self._delimiter) + 1
            if text.strip() and fields < self._fields:
                raise ObservationsError(
                    f"{self._name} ends in the middle of line {self._lines + 1}, which has "
                    f"{fields} of {self._fields} fields; download it again"
                )
            whole = self._utf8(text)
            if self._mended:
                log.warning(
                    "%s: %d line%s not UTF-8 read as Windows-1252, the first is line %d",
                    self._name, self._mended, "s"[: self._mended > 1], self._first,
                )  # fmt: skip
            return whole
        end = block.rfind(b"\n") + 1
        if not end:
            self._rest += block
            if len(self._rest) > LONGEST_LINE_BYTES:
                raise ObservationsError(
                    f"{self._name} line {self._lines + 1} is longer than "
                    f"{LONGEST_LINE_BYTES >> 20} MiB; this is no table of observations"
                )
            return b""
        text, self._rest = self._rest + block[:end], block[end:]
        self._follow_quotes(text)
        return self._utf8(text)

    def _follow_quotes(self, text: bytes) -> None:
        """Refuse a quotation mark that nothing ends: the parser would swallow the whole file."""
        if not self._quote:
            return
        marks = text.count(self._quote)
        if self._open_since and not marks:
            raise ObservationsError(
                f"{self._name}: a quotation mark opened after line {self._open_since} is not "
                "closed; close it, or double it where it is a letter"
            )
        if (marks + bool(self._open_since)) % 2:
            self._open_since = self._lines + text[: text.rfind(self._quote)].count(b"\n") + 1
        else:
            self._open_since = 0

    def _utf8(self, text: bytes) -> bytes:
        try:
            text.decode()
        except UnicodeDecodeError:
            text = b"".join(self._mend(k, line) for k, line in enumerate(text.splitlines(True), 1))
        self._lines += text.count(b"\n")
        return text

    def _mend(self, k: int, line: bytes) -> bytes:
        mended = line.decode(errors="speciesmap.windows-1252").encode()
        if mended != line:
            self._mended += 1
            self._first = self._first or self._lines + k
        return mended


def delimited(opener: Opener, name: str) -> Iterator[pd.DataFrame]:
    """Yield a text table whose first line names its columns, in chunks of 50,000 rows.

    Raises:
        ObservationsError: The first line names no columns, or a line is damaged.
    """
    with opener() as file:
        head = file.read(HEAD_BYTES)
    utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if utf16:
        start = head.decode("utf-16", errors="ignore")
    else:
        start = head.decode("utf-8-sig", errors="speciesmap.windows-1252")
    header = re.split(r"\r\n|\n|\r", start, maxsplit=1)[0]
    counts = {mark: header.count(mark) for mark in "\t;,|"}
    delimiter = max(counts, key=lambda mark: counts[mark])
    try:
        columns = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:
        columns = []
    if len(columns) < 2 or not all(columns[:2]):
        raise ObservationsError(
            f"{name} begins with {header[:60]!r}, which is no line of column names; it needs "
            "latitude, longitude and scientific_name, or the columns of GBIF or iNaturalist"
        )
    # GBIF's tables are separated by tabs and never quoted: a quotation mark there is a letter
    quoted = delimiter != "\t" or '"' in header
    encoding = "utf-16" if utf16 else "utf-8"
    yield from chunks(opener, name, delimiter, '"' if quoted else "", encoding, columns, 1)


def chunks(
    opener: Opener,
    name: str,
    delimiter: str,
    quote: str,
    encoding: str,
    columns: Sequence[str],
    header_lines: int,
) -> Iterator[pd.DataFrame]:
    """Yield the rows of a text table as text, empty fields as missing.

    Args:
        opener: Opens its bytes.
        name: What messages call it.
        delimiter: One character between fields.
        quote: One character around fields, or "".
        encoding: Of the bytes; for UTF-8, strays of Windows-1252 are understood.
        columns: Their names, in order.
        header_lines: How many lines to skip.

    Raises:
        ObservationsError: A line is damaged, or the bytes do not fit the encoding.
    """
    try:
        with opener() as file:
            fields = 0 if quote else len(columns)
            stream: IO[bytes] = file
            if encoding.lower() in ("utf-8", "utf8"):
                raw = Utf8(file, name, quote, fields, delimiter)
                stream = io.BufferedReader(raw, BLOCK_BYTES)
                encoding = "utf-8-sig"
            text = io.TextIOWrapper(stream, encoding, newline="")
            with pd.read_csv(
                text,
                sep=delimiter,
                quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
                quotechar=quote or '"',
                header=None,
                names=_distinct(columns),
                skiprows=header_lines,
                index_col=False,
                dtype=str,
                keep_default_na=False,
                na_values=list(EMPTY),
                chunksize=CHUNK_ROWS,
            ) as rows:
                while (chunk := _next(rows)) is not None:
                    yield chunk
    except UnicodeError as error:
        raise ObservationsError(
            f"{name} is not {encoding.upper()} throughout ({error.args[-1]}); convert it, for "
            f"example with `iconv -f {encoding.upper()} -t UTF-8 -c`"
        ) from error
    except pd.errors.ParserWarning as error:
        raise ObservationsError(
            f"{name} line {header_lines + 1} and those below have more than the header's "
            f"{len(columns)} fields; {QUOTE}"
        ) from error
    except (pd.errors.ParserError, csv.Error) as error:
        raise ObservationsError(f"{name} {_damage(str(error))}") from error
    except pd.errors.EmptyDataError:
        return
    except (EOFError, zlib.error, OSError) as error:
        raise ObservationsError(
            f"{name} cannot be read ({error}); it is damaged: download it again"
        ) from error


def _next(rows: Iterator[pd.DataFrame]) -> pd.DataFrame | None:
    """Parse the next chunk; pandas only warns before it cuts the ends off rows that are long."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return next(rows, None)


def _damage(message: str) -> str:
    """Say in words what pandas' parser met."""
    ragged = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", message)
    if ragged:
        wanted, line, seen = ragged.groups()
        return f"line {line} has {seen} fields, the header {wanted}; {QUOTE}"
    return f"is damaged: {' '.join(message.split())}; mend that line or export it again"


def _distinct(columns: Sequence[str]) -> list[str]:
    """Keep the first of equal names and number the rest."""
    seen: dict[str, int] = {}
    names = []
    for column in (c.strip() for c in columns):
        name = column
        while name in seen:
            name = f"{column}.{seen[column]}"
            seen[column] += 1
        seen[name] = 1
        names.append(name)
    return names
