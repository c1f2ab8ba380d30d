"""Observations as a page holds them: columns, and thumbnails of photos that may be shown."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from speciesmap.datasets.photos import open_photo
from speciesmap.errors import ObservationsError

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

OBSERVATIONS = 20_000
THUMBNAIL_PX = 200
THUMBNAIL_BYTES = 1_500_000  # of all thumbnails together
PHOTO_HOSTS = 12  # that the page may ask for photos

OPEN_LICENCE = re.compile(
    r"\bcc\b|\bcc0|cc[-_ ]?by|creative ?commons|public ?domain|\bogl\b|\bodbl\b|\bpddl\b", re.I
)
"""Licences under which a photo may be shown with its credit; "all rights reserved" is none."""


def pack_records(observations: GeoDataFrame, photos: Path | None = None) -> dict[str, Any]:
    """Pack observations into columns; a very large table is thinned at random.

    Args:
        observations: Columns as `read_observations` gives them.
        photos: Folder of the files that the column `photo` names; thumbnails are made of those
            whose record states an open licence.

    Returns:
        What the page's script reads; positions, `at`, are longitude, latitude.

    Raises:
        ObservationsError: A column is missing.
    """
    for column in ("taxon", "longitude", "latitude"):
        if column not in observations:
            raise ObservationsError(
                f"the observations have no column {column!r}; read them with "
                "`speciesmap observations` first"
            )
    placed = np.isfinite(observations["longitude"].to_numpy(np.float64))
    placed &= np.isfinite(observations["latitude"].to_numpy(np.float64))
    table = observations[placed]
    total = len(table)
    if total > OBSERVATIONS:
        keep = np.random.default_rng(0).choice(total, OBSERVATIONS, replace=False)
        table = table.iloc[np.sort(keep)]
    lon_lat = table[["longitude", "latitude"]].to_numpy(np.float64).round(6)
    taxa, taxon = _coded(table, "taxon")
    sources, source = _coded(table, "source")
    observers, observer = _coded(table, "observer")
    licenses, license_code = _coded(table, "license")
    uncertainty: list[float | None] = [None] * len(table)
    if "uncertainty_m" in table:
        metres = table["uncertainty_m"].to_numpy(np.float64)
        uncertainty = [float(f"{m:.4g}") if math.isfinite(m) else None for m in metres]
    first = _first_photos(table)
    return {
        "total": total,
        "at": lon_lat.tolist(),
        "taxa": taxa,
        "taxon": taxon,
        "sources": sources,
        "source": source,
        "observers": observers,
        "observer": observer,
        "licenses": licenses,
        "license": license_code,
        "date": _dates(table),
        "uncertainty_m": uncertainty,
        "photos": [photo if photo.startswith("https://") else "" for photo in first],
        "thumbnails": {} if photos is None else dict(_thumbnails(first, photos)),
    }


def photo_origins(photos: Sequence[str]) -> list[str]:
    """Sites that a page must be allowed to ask for photos, the most frequent first.

    Args:
        photos: Addresses, or nothing.
    """
    count: dict[str, int] = {}
    for photo in filter(None, photos):
        if site := re.match(r"(https?://[A-Za-z0-9.-]+(?::[0-9]+)?)(?:/|$)", photo):
            count[site[1]] = count.get(site[1], 0) + 1
    return sorted(count, key=lambda origin: (-count[origin], origin))[:PHOTO_HOSTS]


def _coded(table: GeoDataFrame, column: str) -> tuple[list[str], list[int]]:
    """Write a column of repeated strings as its distinct values and their numbers."""
    if column not in table:
        return [""], [0] * len(table)
    values, codes = np.unique(_text(table, column), return_inverse=True)
    return [str(v) for v in values], [int(c) for c in codes]


def _text(table: GeoDataFrame, column: str) -> NDArray[np.str_]:
    return np.asarray(table[column].fillna("").astype(str), dtype=np.str_)


def _dates(table: GeoDataFrame) -> list[str]:
    if "date" not in table:
        return [""] * len(table)
    return ["" if str(d) == "NaT" else f"{d:%Y-%m-%d}" for d in table["date"]]


def _first_photos(table: GeoDataFrame) -> list[str]:
    """First photo of each record whose licence is open; else nothing."""
    if "photo" not in table or "license" not in table:
        return [""] * len(table)
    pairs = zip(_text(table, "photo"), _text(table, "license"), strict=True)
    return [
        str(photos).split(" | ")[0].strip() if OPEN_LICENCE.search(licence) else ""
        for photos, licence in pairs
    ]


def _thumbnails(photos: Sequence[str], folder: Path) -> Iterator[tuple[str, str]]:
    """Yield row numbers and small pictures, of a random choice where not all fit."""
    root = folder.resolve()
    local = [i for i, photo in enumerate(photos) if photo and "://" not in photo]
    left = THUMBNAIL_BYTES
    for i in np.random.default_rng(0).permutation(local):
        try:
            path = (root / photos[i]).resolve()
            if not path.is_relative_to(root) or not path.is_file():
                continue
        except (OSError, ValueError):  # a name that no file can have
            continue
        picture = _thumbnail(path)
        left -= len(picture)
        if left < 0:
            return
        if picture:
            yield str(i), "data:image/webp;base64," + picture


def _thumbnail(path: Path) -> str:
    """Reduce a photo to a small WebP in base64; nothing where it cannot be read."""
    try:
        small = open_photo(path, THUMBNAIL_PX)
    except ValueError:
        return ""
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=68)
    return base64.b64encode(stream.getvalue()).decode()
