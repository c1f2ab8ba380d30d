"""`speciesmap observations`: species records of any form into one clean table."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import click

from speciesmap.cli.options import (
    PATH,
    json_option,
    logging_options,
    out_option,
    overwrite_option,
    print_result,
)

WORDS = {
    "present": "recorded as absent",
    "wild": "fossil, zoo or garden specimens",
    "zero": "at longitude 0, latitude 0",
    "centroids": "at a country's central point",
    "institutions": "near an institution",
    "captive": "captive, cultivated or introduced",
    "year_min": "too old",
    "uncertainty_max_m": "too uncertain",
    "obscured": "at an obscured place",
    "research": "not research grade",
    "duplicates": "repeats of taxon, place and day",
    "cell_m": "others in the same cell",
    "thin_m": "nearer than the distance asked for",
}


@click.command("observations")
@click.argument("inputs", nargs=-1, required=True, type=PATH, metavar="INPUT...")
@out_option("FILE.parquet", "Table to write; the report goes beside it.")
@click.option("--taxon", metavar="NAME", help="Scientific name for rows that carry none.")
@click.option(
    "--year-min", default=1900, show_default=True, help="Drop older records; 0 keeps all."
)
@click.option(
    "--uncertainty-max-m",
    default=10_000.0,
    type=click.FloatRange(min=0),
    show_default=True,
    help="Drop records less certain than this, and placeholders; inf keeps all.",
)
@click.option("--cell-m", type=float, help="Keep one record per taxon and cell of this side.")
@click.option("--thin-m", type=float, help="Keep records of a taxon at least this far apart.")
@click.option(
    "--institutions",
    type=PATH,
    metavar="FILE",
    help="Drop records within 2 km of these places, for example GRSciColl's institutions.",
)
@click.option("--doi", metavar="DOI", help="DOI of the download, kept in the report for citation.")
@click.option("--keep-absent", is_flag=True, help="Keep records of absence.")
@click.option("--keep-specimens", is_flag=True, help="Keep fossil, zoo and garden specimens.")
@click.option("--keep-zero", is_flag=True, help="Keep records at longitude 0, latitude 0.")
@click.option("--keep-centroids", is_flag=True, help="Keep records at a country's central point.")
@click.option("--keep-duplicates", is_flag=True, help="Keep repeats of taxon, place and day.")
@click.option("--keep-captive", is_flag=True, help="Keep captive, cultivated and introduced ones.")
@click.option("--drop-obscured", is_flag=True, help="Drop places that iNaturalist obscured.")
@click.option("--research-only", is_flag=True, help="Drop what is not research grade.")
@overwrite_option
@json_option
@logging_options
def command(
    inputs: tuple[Path, ...],
    out: Path,
    taxon: str | None,
    year_min: int,
    uncertainty_max_m: float,
    cell_m: float | None,
    thin_m: float | None,
    institutions: Path | None,
    doi: str | None,
    keep_absent: bool,
    keep_specimens: bool,
    keep_zero: bool,
    keep_centroids: bool,
    keep_duplicates: bool,
    keep_captive: bool,
    drop_obscured: bool,
    research_only: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Clean species records into one table.

    INPUT is what GBIF or iNaturalist exports (also zipped, also a Darwin Core Archive), a vector
    file of points, GeoParquet or a CSV with latitude, longitude and scientific_name. How many rows
    each rule dropped is printed and written to FILE.report.json.

    \b
    Example:
      speciesmap observations gbif.csv inat.csv --out oaks.parquet --uncertainty-max-m 100
    """
    from speciesmap.observations.clean import Rules, clean_files

    rules = Rules(
        present=not keep_absent,
        wild=not keep_specimens,
        zero=not keep_zero,
        centroids=not keep_centroids,
        institutions=institutions,
        captive=not keep_captive,
        year_min=year_min or None,
        uncertainty_max_m=None if math.isinf(uncertainty_max_m) else uncertainty_max_m,
        obscured=drop_obscured,
        research=research_only,
        duplicates=not keep_duplicates,
        cell_m=cell_m,
        thin_m=thin_m,
    )
    report = clean_files(inputs, out, rules=rules, taxon=taxon, doi=doi, overwrite=overwrite)
    log = logging.getLogger("speciesmap")
    log.info("%d of %d rows kept", report["kept"], report["read"])
    for rule, count in report["dropped"].items():
        log.info("%8d dropped: %s", count, WORDS.get(rule, rule))
    print_result(report.pop("path"), as_json, **report)
