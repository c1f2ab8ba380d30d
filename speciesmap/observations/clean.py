"""Cleaning rules for observations: each may be turned off, each counts what it drops."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from speciesmap.errors import ObservationsError, OutputError
from speciesmap.observations.read import COLUMNS, Reading, read_places
from speciesmap.observations.thin import EARTH_M, apart, first_per_cell, on_sphere
from speciesmap.outputs import refuse_existing, replacing
from speciesmap.progress import track

if TYPE_CHECKING:
    import geopandas as gpd
    import pyarrow as pa

NOT_IN_THE_WILD = ("FOSSIL_SPECIMEN", "LIVING_SPECIMEN")
PLACEHOLDER_UNCERTAINTIES_M = (301.0, 999.0, 3036.0, 9999.0)
NEAR_M = 2000.0
"""How near to a country's centroid or an institution a record is suspect; GBIF data blog."""

ALONE = (
    "present", "wild", "zero", "centroids", "institutions", "captive", "year_min",
    "uncertainty_max_m", "obscured", "research",
)  # fmt: skip
"""Rules that look at one record by itself, in the order in which they are applied."""
TOGETHER = ("duplicates", "cell_m", "thin_m")
"""Rules that compare records with each other; they follow, over all files."""
COMPARED = (
    "taxon", "longitude", "latitude", "date", "uncertainty_m", "source", "license",
    "photo_license",
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """Which observations to keep. The defaults are the field's usual ones.

    Attributes:
        present: Drop records of absence (Darwin Core `occurrenceStatus`); GBIF data blog,
            "(Almost) everything you want to know about the GBIF Species API / Common things to
            look out for in post-processing GBIF downloads", Waller 2020.
        wild: Drop fossil and living (zoo, garden) specimens (`basisOfRecord`); same source.
        zero: Drop longitude and latitude both 0, the commonest placeholder; same source.
        centroids: Drop records within 2 km of the point that gazetteers give for a country, where
            databases put records of which only the country is known; same source. The points, of
            the style of the CIA World Factbook (whole or half degrees as a rule), come from the
            package countryinfo.
        institutions: Drop records within 2 km of the places in this file (zoos, gardens, museums;
            GBIF's registry GRSciColl exports one); same source. None, the default, keeps all: no
            library carries such a list.
        captive: Drop captive and cultivated individuals (iNaturalist `captive_cultivated`, Darwin
            Core `establishmentMeans` managed or introduced); same source.
        year_min: Drop records known to be older; 1900, same source. None keeps all. Records
            without a date stay.
        uncertainty_max_m: Drop records known to be less certain, and GBIF's placeholder values
            301, 999, 3036 and 9999 m; 10 km, same source. None keeps all. Records without a
            stated uncertainty stay. Chips ask for half a window besides.
        obscured: Drop records whose published place is a random point of a 0.2 degree cell
            (iNaturalist). Off by default: coarse work can use them. Chips and background never do.
        research: Drop iNaturalist records that are not research grade. Off by default.
        duplicates: Keep one record per taxon, place and day, as overlapping downloads repeat them
            (`cc_dupl` of CoordinateCleaner, Zizka et al. 2019).
        cell_m: Keep one record per taxon and cell of this side (ENMeval and Wallace thin to one
            per raster cell). None, the default, keeps all: the map's cell is not known here.
        thin_m: Keep records of a taxon at least this far apart (spThin, Aiello-Lammens et al.
            2015). None, the default, keeps all, as in ENMeval.
    """

    present: bool = True
    wild: bool = True
    zero: bool = True
    centroids: bool = True
    institutions: str | Path | None = None
    captive: bool = True
    year_min: int | None = 1900
    uncertainty_max_m: float | None = 10_000.0
    obscured: bool = False
    research: bool = False
    duplicates: bool = True
    cell_m: float | None = None
    thin_m: float | None = None


def clean_files(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    rules: Rules | None = None,
    taxon: str | None = None,
    doi: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read records, apply the rules and write one GeoParquet table with a report beside it.

    Files are read in chunks. What stays in memory of each record kept so far is what the rules
    compare: its taxon, place, day and uncertainty, about 50 bytes.

    Args:
        paths: Files and folders of any form that `read_observations` knows.
        out: The table, `*.parquet`; the report has the same stem and ends in `.report.json`.
        rules: What to keep; the defaults of `Rules` if None.
        taxon: Scientific name for rows that carry none.
        doi: DOI of the download, for citation; a Darwin Core Archive of GBIF states its own.
        overwrite: Whether an existing table may be replaced.

    Returns:
        The report: `read` and `kept` rows, `dropped` rows by rule, `taxa`, and, for citation,
        `doi`, `sources` (GBIF dataset keys or file names) and `licenses` with their rows, and
        `photo_licenses` with their photos.

    Raises:
        ObservationsError: An input cannot be read, or no row is left.
        OutputError: The output exists, or its name does not end in `.parquet`.
    """
    out = Path(out)
    if out.suffix != ".parquet":
        raise OutputError(f"{out} should be a Parquet file; call it {out.with_suffix('.parquet')}")
    refuse_existing(out, overwrite, *paths)
    reading = Reading(paths, taxon=taxon)
    cleaning = _Cleaning(rules or Rules())
    with (
        replacing(out.with_suffix(".report.json"), overwrite=True) as told,
        replacing(out, overwrite=overwrite) as beside,
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.") as folder,
    ):
        alone = Path(folder) / "alone.parquet"
        compared = _write(alone, (cleaning.alone(chunk) for chunk in track(reading, "Reading")))
        keep = cleaning.together(compared)
        dropped = {**reading.dropped, **cleaning.dropped}
        if not keep.any():
            raise ObservationsError(
                f"no observation of {reading.named} is left: "
                + ", ".join(
                    f"{count} dropped by {rule}" for rule, count in dropped.items() if count
                )
                + "; relax a rule"
            )
        if keep.all():
            alone.rename(beside)
        else:
            _write(beside, _chosen(alone, keep))
        kept = compared[keep]
        report = {
            "path": str(out),
            "read": reading.rows,
            "kept": len(kept),
            "dropped": dropped,
            "taxa": _counts(kept["taxon"]),
            "doi": [*([doi] if doi else []), *reading.doi],
            "sources": _counts(kept["source"]),
            "licenses": _counts(kept["license"]),
            "photo_licenses": _counts(kept["photo_license"], separator="|"),
        }
        text = json.dumps(report, indent=1, ensure_ascii=False)
        told.write_text(text + "\n", encoding="utf-8")
    return report


def clean(
    observations: gpd.GeoDataFrame, rules: Rules | None = None
) -> tuple[gpd.GeoDataFrame, dict[str, int]]:
    """Apply the rules one after the other.

    Args:
        observations: As `read_observations` gives them.
        rules: What to keep; the defaults of `Rules` if None.

    Returns:
        The rows kept, and for each rule that ran, in order, how many rows it dropped.
    """
    cleaning = _Cleaning(rules or Rules())
    kept = cleaning.alone(observations)
    kept = kept[cleaning.together(kept)]
    return kept.reset_index(drop=True), cleaning.dropped


class _Cleaning:
    """Rules at work, with the counts of what each dropped."""

    def __init__(self, rules: Rules) -> None:
        self._settings = {
            name: setting
            for name in (*ALONE, *TOGETHER)
            if (setting := getattr(rules, name)) is not None and setting is not False
        }
        self.dropped = dict.fromkeys(self._settings, 0)
        if rules.institutions is not None:
            self._institutions = np.column_stack(read_places(rules.institutions))

    def alone(self, rows: Any) -> Any:
        """Apply the rules that look at one record by itself to a table."""
        return self._apply(rows, ALONE)

    def together(self, rows: Any) -> NDArray[np.bool_]:
        """Mark what the rules that compare records keep of all of them."""
        keep = np.zeros(len(rows), dtype=bool)
        keep[self._apply(rows.reset_index(drop=True), TOGETHER).index] = True
        return keep

    def _apply(self, rows: Any, names: Sequence[str]) -> Any:
        for name in names:
            if name in self._settings:
                keep = np.asarray(self._keep(rows, name, self._settings[name]), dtype=bool)
                self.dropped[name] += int(len(keep) - keep.sum())
                rows = rows[keep]
        return rows

    def _keep(self, rows: Any, rule: str, setting: Any) -> Any:
        match rule:
            case "present":
                return rows["status"] != "ABSENT"
            case "wild":
                return ~rows["basis"].isin(NOT_IN_THE_WILD)
            case "zero":
                return (rows["longitude"] != 0) | (rows["latitude"] != 0)
            case "centroids":
                return ~near(rows, country_centroids())
            case "institutions":
                return ~near(rows, self._institutions)
            case "year_min":
                return ~(rows["date"].dt.year < setting)
            case "uncertainty_max_m":
                placeholder = rows["uncertainty_m"].isin(PLACEHOLDER_UNCERTAINTIES_M)
                return ~(rows["uncertainty_m"] > setting) & ~placeholder
            case "research":
                return rows["quality_grade"].isin(["research", ""])
            case "duplicates":
                return ~rows.duplicated(["taxon", "longitude", "latitude", "date"])
            case "cell_m":
                return first_per_cell(rows, setting, by_taxon=True)
            case "thin_m":
                return apart(rows, setting)
            case _:  # captive and obscured are columns
                return ~rows[rule]


def near(
    observations: pd.DataFrame | gpd.GeoDataFrame, places: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Mark observations within `NEAR_M` of any of some places.

    Args:
        observations: With columns longitude and latitude.
        places: Longitudes and latitudes, shape (P, 2).

    Returns:
        Shape (N,).
    """
    from scipy.spatial import cKDTree

    points = on_sphere(observations["longitude"], observations["latitude"])
    chord = 2 * np.sin(NEAR_M / EARTH_M / 2)
    distance, _ = cKDTree(on_sphere(*places.T)).query(points, distance_upper_bound=chord)
    answer: NDArray[np.bool_] = np.isfinite(distance)
    return answer


@cache
def country_centroids() -> NDArray[np.float64]:
    """Longitudes and latitudes that gazetteers give for countries, shape (P, 2)."""
    from countryinfo import CountryInfo

    places = [country.get("latlng") for country in CountryInfo.all().values()]
    return np.array([(lon, lat) for lat, lon in filter(None, places)], dtype=np.float64)


def _write(path: Path, parts: Iterator[Any]) -> pd.DataFrame:
    """Write tables as one GeoParquet file, and give the columns `COMPARED` of all of them."""
    import pyarrow.parquet as pq

    compared: list[pd.DataFrame] = []
    writer: pq.ParquetWriter | None = None
    try:
        for part in parts:
            table = _geoparquet(part)
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            compared.append(_compact(part[list(COMPARED)]))
    finally:
        if writer is not None:
            writer.close()
    return _joined(compared)


def _geoparquet(rows: pd.DataFrame) -> pa.Table:
    """Turn a table of observations into Arrow with points as WKB (GeoParquet 1.1)."""
    import pyarrow as pa
    import shapely
    from pyproj import CRS

    points = shapely.to_wkb(shapely.points(rows["longitude"], rows["latitude"]))
    types = {
        **dict.fromkeys(("longitude", "latitude", "uncertainty_m"), pa.float64()),
        **dict.fromkeys(("obscured", "captive"), pa.bool_()),
        "date": pa.timestamp("s"),
    }
    schema = pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])
    table = pa.Table.from_pandas(rows[list(COLUMNS)], schema, preserve_index=False)
    table = table.append_column("geometry", pa.array(points, pa.binary()))
    geometry = {
        "encoding": "WKB",
        "geometry_types": ["Point"],
        "crs": CRS("EPSG:4326").to_json_dict(),
    }
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    return table.replace_schema_metadata({"geo": json.dumps(geo)})


def _chosen(path: Path, keep: NDArray[np.bool_]) -> Iterator[pd.DataFrame]:
    """Yield the kept rows of a written table, a row group at a time."""
    import pyarrow.parquet as pq

    start = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group).to_pandas()
            yield rows[keep[start : start + len(rows)]]
            start += len(rows)


def _compact(rows: pd.DataFrame) -> pd.DataFrame:
    texts = ("taxon", "source", "license", "photo_license")
    return rows.astype(dict.fromkeys(texts, "str")).astype(dict.fromkeys(texts, "category"))


def _joined(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate tables of categories, which pandas would otherwise widen to text."""
    from pandas.api.types import union_categoricals

    return pd.DataFrame(
        {
            name: union_categoricals([part[name] for part in parts])
            if isinstance(parts[0][name].dtype, pd.CategoricalDtype)
            else np.concatenate([part[name].to_numpy() for part in parts])
            for name in COMPARED
        }
    )


def _counts(values: pd.Series, separator: str | None = None) -> dict[str, int]:
    """Rows by value, the most frequent first; values may hold several."""
    found: Counter[str] = Counter()
    for value, count in values.value_counts().items():
        for part in str(value).split(separator) if separator else [str(value)]:
            if count and (part.strip() or not separator):
                found[part.strip()] += int(count)
    return dict(found.most_common())
