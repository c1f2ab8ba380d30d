"""Reading observations: one table from whatever a user has."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from speciesmap.errors import ObservationsError
from speciesmap.observations.files import frames
from speciesmap.taxa import RANKS, scientific_name, well_cased

if TYPE_CHECKING:
    import geopandas as gpd

log = logging.getLogger("speciesmap")

COLUMNS = (
    "observation_id",
    "taxon",
    "lineage",
    "rank",
    "longitude",
    "latitude",
    "date",
    "uncertainty_m",
    "quality_grade",
    "obscured",
    "captive",
    "observer",
    "license",
    "photo",
    "photo_license",
    "source",
    "status",
    "basis",
)
"""What `read_observations` gives, beside the geometry."""

BELOW_SPECIES = ("subspecies", "variety", "form", "subvariety", "subform", "infraspecific")

ALIASES: dict[str, tuple[str, ...]] = {
    "observation_id": ("observationid", "observationuuid", "gbifid", "id", "uuid", "occurrenceid"),
    "taxon": ("taxon", "scientificname", "taxonname", "speciesname", "name"),
    "species": ("taxonspeciesname", "species"),
    "rank": ("rank", "taxonrank"),
    "lineage": ("lineage", "ancestry"),
    "longitude": ("decimallongitude", "longitude", "lon", "long", "lng"),
    "latitude": ("decimallatitude", "latitude", "lat"),
    "date": ("date", "eventdate", "observedon", "glimagedate", "year", "timestamp"),
    "uncertainty_m": (
        "uncertaintym",
        "coordinateuncertaintyinmeters",
        "positionalaccuracy",
        "publicpositionalaccuracy",
    ),
    "quality_grade": ("qualitygrade",),
    "obscured": ("obscured", "coordinatesobscured"),
    "geoprivacy": ("geoprivacy",),
    "taxon_geoprivacy": ("taxongeoprivacy",),
    "withheld": ("informationwithheld",),
    "generalised": ("datageneralizations",),
    "captive": ("captive", "captivecultivated"),
    "establishment": ("establishmentmeans",),
    "degree": ("degreeofestablishment",),
    "observer": ("observer", "recordedby", "userlogin", "observerid", "userid"),
    "license": ("license",),
    "photo": ("photo", "imageurl", "associatedmedia", "filename"),
    "photo_id": ("photoid",),
    "photo_license": ("photolicense",),
    "extension": ("extension",),
    "source": ("source", "datasetkey"),
    "status": ("status", "occurrencestatus"),
    "basis": ("basis", "basisofrecord"),
    "presence": ("presence",),
    **{rank: (f"taxon{rank}name", rank) for rank in RANKS},
}
"""Column names of each fact, best first, in lower case without punctuation: those of GBIF, Darwin
Core, iNaturalist's export and open data, Nature Multi-View and this project."""

YES = ("true", "t", "yes", "1", "1.0")
NO = ("false", "f", "no", "0", "0.0", "")
BLURRED = r"uncertainty increased|obscured|generali[sz]ed|\bgrid|blurred|rounded"
"""What publishers write in informationWithheld and dataGeneralizations of a displaced position."""

NO_POSITION = "no position"
NO_NAME = "no name"
BACKGROUND = "presence is not 1"


def read_observations(
    path: str | Path | Sequence[str | Path], *, taxon: str | None = None
) -> gpd.GeoDataFrame:
    """Read species records of any common form into one table.

    Known are GBIF's simple CSV (tab-separated and unquoted, also zipped as downloaded), Darwin
    Core Archives with the photos of their multimedia extension, iNaturalist's exports and open
    data, vector files of points, Parquet and GeoParquet, and delimited text with recognisable
    columns; decimal commas are understood. The content decides, not the file's name.

    Records of subspecies, varieties and forms count for their species. Of a table with a column
    `presence` only the rows with 1 are observations. Rows without a position or a name are left
    out and counted in `result.attrs["dropped"]`.

    Args:
        path: A file or folder, or several.
        taxon: Scientific name for rows that carry none.

    Returns:
        One row per record in EPSG:4326 with the columns of `COLUMNS`: `lineage` holds the names of
        the higher ranks, broadest first, joined by `/`; positions are in degrees; `date` is a day,
        the first of January where only a year is known; `uncertainty_m` is NaN where unknown;
        `photo` holds file names or addresses joined by ` | `, `photo_license` their own licences in
        the same order where known, `license` the record's; `source` is GBIF's dataset key or
        the file's name; `status` is PRESENT or ABSENT; `basis` is Darwin Core's basisOfRecord.
        Text is "" where unknown.

    Raises:
        ObservationsError: A file cannot be read or understood, or a row holds an impossible
            position; the message names file, rows (counted from 1 after the header) and values.
    """
    import geopandas as gpd

    reading = Reading(path, taxon=taxon)
    table = pd.concat(reading, ignore_index=True)
    if table.empty:
        counts = ", ".join(f"{count} {reason}" for reason, count in reading.dropped.items())
        raise ObservationsError(
            f"{reading.named} holds no observation: {counts}; give rows with a name and a position"
        )
    for reason, count in reading.dropped.items():
        log.info("%d rows left out: %s", count, reason)
    points = gpd.points_from_xy(table["longitude"], table["latitude"])
    result = gpd.GeoDataFrame(table, geometry=points, crs="EPSG:4326")
    result.attrs["dropped"] = reading.dropped
    return result


class Reading:
    """Observations of files, chunk by chunk, with what was left out so far.

    Iterating gives tables with the columns of `COLUMNS`; memory holds one chunk at a time.

    Args:
        path: A file or folder, or several.
        taxon: Scientific name for rows that carry none.

    Attributes:
        named: The files, for messages.
        rows: How many rows were read so far.
        dropped: How many of them were left out, by reason.
        doi: DOIs of GBIF downloads that the files state.

    Raises:
        ObservationsError: As `read_observations`, while iterating.
    """

    def __init__(
        self, path: str | Path | Sequence[str | Path], *, taxon: str | None = None
    ) -> None:
        self._paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(p) for p in path]
        self._taxon = taxon
        if not self._paths:
            raise ObservationsError("no file of observations was given; name at least one")
        self.named = ", ".join(map(str, self._paths))
        self.rows = 0
        self.dropped: dict[str, int] = {}
        self.doi: list[str] = []

    def __iter__(self) -> Iterator[pd.DataFrame]:
        for file in self._paths:
            first = 1
            for frame in frames(file):
                table, missed = _Rows(frame, file, first).standard(self._taxon)
                first += len(frame)
                self.rows += len(frame)
                for reason, count in missed.items():
                    if count:
                        self.dropped[reason] = self.dropped.get(reason, 0) + count
                self.doi = list(dict.fromkeys([*self.doi, *frame.attrs.get("doi", [])]))
                yield table
            if first == 1:
                raise ObservationsError(f"{file} has no rows; export the observations again")


def read_places(
    path: str | Path, *, uncertainty_max_m: float = math.inf
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read the places of a table whatever was seen there, for use as background.

    Args:
        path: A file or folder of any form that `read_observations` knows; it need not name taxa.
            Of a table with a column `presence` the rows with 0 count.
        uncertainty_max_m: Rows known to be less certain are left out, and so are obscured ones.

    Returns:
        Longitudes and latitudes in degrees, shape (N,).

    Raises:
        ObservationsError: The file cannot be read, or none of its rows is such a place.
    """
    parts, first = [np.empty((0, 2))], 1
    for frame in frames(Path(path)):
        parts.append(_Rows(frame, Path(path), first).places(uncertainty_max_m))
        first += len(frame)
    places = np.concatenate(parts)
    if not len(places):
        raise ObservationsError(
            f"{path} has no place to use as background among {first - 1} rows; give rows with a "
            "position that is not obscured, and with 0 in the column presence where there is one"
        )
    return places[:, 0], places[:, 1]


class _Rows:
    """Rows of one file, found by what their columns mean."""

    def __init__(self, frame: pd.DataFrame, path: Path, first: int) -> None:
        self.frame = frame.loc[:, ~frame.columns.duplicated()].reset_index(drop=True)
        self.path = path
        self.first = first
        self._columns = {
            re.sub(r"[^a-z0-9]", "", str(column).lower()): column
            for column in reversed(self.frame.columns)
        }
        if path.suffix.lower() == ".shp":
            self._lengthen()

    def _lengthen(self) -> None:
        """Know columns whose names a shapefile cut to ten letters, where only one can be meant."""
        cut = {name: column for name, column in self._columns.items() if len(str(column)) == 10}
        for name, column in cut.items():
            whole = [a for known in ALIASES.values() for a in known if a.startswith(name)]
            if len(whole) == 1:
                self._columns.setdefault(whole[0], column)
            elif whole and name not in whole and self.first == 1:
                log.warning(
                    "%s: the column %s may be %s, cut to ten letters, and is not read; save the "
                    "records as a GeoPackage",
                    self.path,
                    column,
                    " or ".join(whole),
                )

    def has(self, fact: str) -> bool:
        return any(alias in self._columns for alias in ALIASES[fact])

    def text(self, fact: str) -> pd.Series:
        """The first value that is not empty among a fact's columns, as text."""
        answer = pd.Series("", index=self.frame.index, dtype=object)
        for alias in ALIASES[fact]:
            if alias not in self._columns:
                continue
            values = self.frame[self._columns[alias]]
            if values.dtype.kind == "f" and (values.dropna() % 1 == 0).all():
                values = values.astype("Int64")
            words = values.astype(object).where(values.notna(), "").map(str).str.strip()
            answer = answer.where(answer != "", words)
        return answer

    def true(self, fact: str) -> pd.Series:
        return self.text(fact).str.lower().isin(YES)

    def standard(self, taxon: str | None) -> tuple[pd.DataFrame, dict[str, int]]:
        """Give the rows in the columns of `COLUMNS`, and the counts of those left out."""
        self._need_position()
        if taxon is None and not (self.has("taxon") or self.has("species")):
            raise ObservationsError(
                f"{self.path} names no taxa among {self._named()}; say what was observed with "
                '--taxon "Genus species", or add a column `scientific_name`'
            )
        present = pd.Series(True, index=self.frame.index)
        if self.has("presence"):
            present = self._presence()
        longitude, latitude, commas = self._position(present)
        names, rank = self._names(taxon)
        placed = longitude.notna() & latitude.notna()
        keep = present & placed & (names != "")
        dropped = {
            BACKGROUND: int((~present).sum()),
            NO_POSITION: int((present & ~placed).sum()),
            NO_NAME: int((present & placed & (names == "")).sum()),
        }
        uncertainty = self._numbers("uncertainty_m", commas, present)
        own = pd.Series(
            [f"{self.path.stem}-{self.first + k}" for k in range(len(self.frame))], dtype=object
        )
        photo_id = self.text("photo_id")
        suffix = self.text("extension").where(lambda s: s != "", "jpg")
        photo, identity = self.text("photo"), self.text("observation_id")
        source = self.text("source")
        status = self.text("status").str.upper()
        table = pd.DataFrame(
            {
                "observation_id": identity.where(identity != "", own),
                "taxon": names,
                "lineage": self._lineage(names, rank),
                "rank": rank,
                "longitude": longitude,
                "latitude": latitude,
                "date": self._dates(),
                "uncertainty_m": uncertainty.where(uncertainty > 0),
                "quality_grade": self.text("quality_grade").str.lower(),
                "obscured": self._obscured(),
                "captive": self.true("captive")
                | self.text("establishment").str.lower().isin(["managed", "introduced"])
                | self.text("degree").str.lower().isin(["captive", "cultivated", "released"]),
                "observer": self.text("observer"),
                "license": self.text("license"),
                "photo": photo.where((photo != "") | (photo_id == ""), photo_id + "." + suffix),
                "photo_license": self.text("photo_license"),
                "source": source.where(source != "", self.path.name),
                "status": status.where(status != "", "PRESENT"),
                "basis": self.text("basis")
                .str.replace(r"(?<=[a-z])(?=[A-Z])", "_", regex=True)
                .str.upper(),
            }
        )
        return table[keep], dropped

    def places(self, uncertainty_max_m: float) -> NDArray[np.float64]:
        """Longitude and latitude of the rows that may be background, shape (n, 2)."""
        self._need_position()
        wanted = pd.Series(True, index=self.frame.index)
        if self.has("presence"):
            wanted = ~self._presence()
        longitude, latitude, commas = self._position(wanted)
        uncertain = self._numbers("uncertainty_m", commas, wanted) > uncertainty_max_m
        wanted &= longitude.notna() & latitude.notna() & ~self._obscured() & ~uncertain
        return np.column_stack([longitude[wanted], latitude[wanted]])

    def _need_position(self) -> None:
        for fact in ("longitude", "latitude"):
            if not self.has(fact):
                raise ObservationsError(
                    f"{self.path} has no column for {fact} among {self._named()}; name one "
                    f"`{fact}`, in decimal degrees, or give a vector file that says its CRS"
                )

    def _presence(self) -> pd.Series:
        """Whether a row is a presence; a table of presences and background says so by 1 and 0."""
        words = self.text("presence").str.lower()
        known = words.isin([*YES, *NO])
        if not known.all():
            wrong = np.flatnonzero(~known)
            raise self._wrong(wrong, words, "presence is neither 1 nor 0", "write 1 or 0")
        return words.isin(YES)

    def _obscured(self) -> pd.Series:
        private = ["obscured", "private"]
        said = (self.text("withheld") + " " + self.text("generalised")).str.lower()
        return (
            self.true("obscured")
            | self.text("geoprivacy").str.lower().isin(private)
            | self.text("taxon_geoprivacy").str.lower().isin(private)
            | said.str.contains(BLURRED)
        )

    def _named(self) -> str:
        names = [str(c) for c in self.frame.columns]
        return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")

    def _wrong(self, rows: Any, values: pd.Series, what: str, remedy: str) -> ObservationsError:
        shown = ", ".join(f"{self.first + k} ({values.iloc[k]})" for k in rows[:5])
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        plural = "s" if len(rows) > 1 else ""
        return ObservationsError(f"{self.path} row{plural} {shown}{more}: {what}; {remedy}")

    def _numbers(self, fact: str, commas: bool, needed: pd.Series) -> pd.Series:
        words = self.text(fact)
        read = words.str.replace(",", ".", n=1, regex=False) if commas else words
        numbers = pd.to_numeric(read.where(words != ""), errors="coerce").astype(np.float64)
        wrong = np.flatnonzero(needed & (words != "") & ~np.isfinite(numbers))
        if wrong.size:
            remedy = "mend or remove these rows"
            if fact in ("longitude", "latitude"):
                remedy = "write decimal degrees, such as -122.25, or remove these rows"
            raise self._wrong(wrong, words, f"{fact} is no number", remedy)
        return numbers

    def _position(self, needed: pd.Series) -> tuple[pd.Series, pd.Series, bool]:
        """Longitude and latitude in degrees, and whether the file writes decimal commas."""
        pattern = r"[+-]?\d{1,3},\d+"
        commas = any(self.text(f).str.fullmatch(pattern).any() for f in ("longitude", "latitude"))
        longitude = self._numbers("longitude", commas, needed)
        latitude = self._numbers("latitude", commas, needed)
        for fact, degrees, limit in (("latitude", latitude, 90), ("longitude", longitude, 180)):
            wrong = np.flatnonzero(needed & (degrees.abs() > limit))
            if not wrong.size:
                continue
            remedy = "give decimal degrees (EPSG:4326), or a vector file that says its CRS"
            swapped = fact == "latitude" and (longitude.iloc[wrong].abs() <= 90).all()
            if swapped and (latitude.iloc[wrong].abs() <= 180).all():
                remedy = "latitude and longitude look swapped: exchange the two columns' names"
                if (latitude.abs() <= 90).any():
                    remedy = "latitude and longitude look swapped in these rows: exchange them"
            what = f"{fact} is out of range, -{limit} to {limit}"
            raise self._wrong(wrong, degrees, what, remedy)
        return longitude, latitude, commas

    def _dates(self) -> pd.Series:
        words = self.text("date")
        days = words.str.extract(r"^(\d{4})(?:-(\d{2}))?(?:-(\d{2}))?(?:$|[T /])")
        iso = days[0] + "-" + days[1].fillna("01") + "-" + days[2].fillna("01")
        dates = pd.to_datetime(iso, format="%Y-%m-%d", errors="coerce").astype("datetime64[s]")
        unread = int(((words != "") & dates.isna()).sum())
        if unread:
            example = words[(words != "") & dates.isna()].iloc[0]
            log.warning(
                "%s: %d dates are not written YYYY-MM-DD, for example %r; they count as unknown",
                self.path, unread, example,
            )  # fmt: skip
        return dates

    def _names(self, taxon: str | None) -> tuple[pd.Series, pd.Series]:
        """Scientific name and rank of each row; infraspecific taxa as their species."""
        rank = self.text("rank").str.lower()
        species = self.text("species")
        genus = self.text("genus")
        epithet = species.str.fullmatch(r"[a-z-]+") & (genus != "")
        species = species.where(~epithet, genus + " " + species)
        cased = {name: well_cased(name) for name in species.unique()}
        names = pd.Series([cased[name] for name in species], dtype=object)
        for higher in reversed(RANKS):
            own = self.text(higher)
            names = names.where((names != "") | (rank != higher), own)
        scientific = "scientificname" in self._columns
        written = pd.DataFrame({"name": self.text("taxon"), "rank": rank})
        each = written.drop_duplicates()
        short = [
            scientific_name(name, trinomial=scientific or below in BELOW_SPECIES)
            for name, below in each.itertuples(index=False)
        ]
        lookup = dict(zip(each.itertuples(index=False, name=None), short, strict=True))
        plain = pd.Series(
            [lookup[key] for key in written.itertuples(index=False, name=None)], dtype=object
        )
        names = names.where(names != "", plain)
        if taxon is not None:
            names = names.where(names != "", " ".join(taxon.split()))
        names = names.str.split().str.join(" ").fillna("")
        binomial = names.str.fullmatch(r"[^\W\d_][\w-]+ [^\W\d_A-Z][\w-]+")
        unranked = rank.isin(["", *BELOW_SPECIES]) | ((species != "") & ~rank.isin(RANKS))
        rank = rank.where(~(binomial & unranked), "species")
        return names, rank

    def _lineage(self, names: pd.Series, rank: pd.Series) -> pd.Series:
        """Names of the ranks above each row's own, joined by `/`."""
        known = [r for r in RANKS if self.has(r)]
        parts = pd.DataFrame({"name": names, "rank": rank, "given": self.text("lineage")})
        for higher in known:
            parts[higher] = self.text(higher)
        each = parts.drop_duplicates()
        lookup: dict[tuple[str, ...], str] = {}
        for row in each.itertuples(index=False, name=None):
            name, own, given, *higher_names = row
            above = known[: known.index(own)] if own in known else known
            lineage = given.split("/") if given else higher_names[: len(above)]
            clean = [part.strip() for part in lineage]
            # iNaturalist's ancestry is numbers, which name nothing
            clean = [part for part in clean if part and part != name and not part.isdigit()]
            lookup[row] = "/".join(clean)
        return pd.Series(
            [lookup[row] for row in parts.itertuples(index=False, name=None)], dtype=object
        )
