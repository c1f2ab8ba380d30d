"""`speciesmap chips`: observations, photos and imagery into a paired data set."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from speciesmap.cli.options import (
    PATH,
    SEED,
    imagery_options,
    json_option,
    logging_options,
    out_option,
    overwrite_option,
    print_result,
)

MARGIN_M = 1_000  # around the observations, or a window's side where that is more


@click.command("chips")
@click.argument("observations", type=PATH)
@imagery_options
@click.option("--photos", type=PATH, metavar="DIR", help="Folder of ground photos.")
@out_option("DATASET", "Folder to create.")
@click.option("--window-px", default=256, show_default=True, help="Side of a window in pixels.")
@click.option("--taxon", metavar="NAME", help="Scientific name for rows that carry none.")
@click.option("--photo-px", default=512, show_default=True, help="Longest side of a stored photo.")
@click.option(
    "--min-valid",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Least share of valid pixels in a window.",
)
@click.option(
    "--uncertainty-max-m", type=float, help="Largest uncertainty; half a window by default."
)
@click.option(
    "--imagery-date",
    default="",
    metavar="DATE",
    help="When the imagery was taken; else as its scenes say.",
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Decides the label fractions."
)
@overwrite_option
@json_option
@logging_options
def command(
    observations: Path,
    imagery: str | None,
    photos: Path | None,
    out: Path,
    window_px: int,
    bands: tuple[str, ...] | None,
    bbox: tuple[float, ...] | None,
    bbox_crs: str,
    taxon: str | None,
    photo_px: int,
    min_valid: float,
    uncertainty_max_m: float | None,
    imagery_date: str,
    seed: int,
    overwrite: bool,
    as_json: bool,
    **opening: Any,
) -> None:
    """Cut a paired photo and aerial data set.

    OBSERVATIONS is what `speciesmap observations` wrote, or anything it reads. DATASET gets
    Parquet files in the columns of Nature Multi-View, dataset.json, and report.csv, which names
    every observation that was left out and why. A STAC collection is searched around the
    observations, unless --bbox says where.

    \b
    Example:
      speciesmap simulate --out scene --size-px 512
      speciesmap chips scene/observations.csv --imagery scene/aerial.tif \\
          --photos scene/photos --window-px 128 --out pairs
    """
    if imagery is None:
        raise click.UsageError("Missing option '--imagery'.")
    from speciesmap.datasets.chips import make_chips
    from speciesmap.observations.read import read_observations
    from speciesmap.outputs import refuse_existing
    from speciesmap.rasters.grid import grown
    from speciesmap.rasters.imagery import open_imagery

    refuse_existing(out, overwrite, observations, imagery, photos)
    records = read_observations(observations, taxon=taxon)
    if bbox is not None or records.empty:
        opened = open_imagery(imagery, bands, bbox=bbox, bbox_crs=bbox_crs, **opening)
    else:
        around = grown(records.total_bounds, MARGIN_M)
        opened = open_imagery(imagery, bands, bbox=around, **opening)
        side_m = window_px * opened.resolution_m
        if side_m > MARGIN_M:
            around = grown(records.total_bounds, side_m)
            opened = open_imagery(imagery, bands, bbox=around, **opening)
    report = make_chips(
        records,
        opened,
        out,
        window_px=window_px,
        photos=photos,
        photo_px=photo_px,
        min_valid=min_valid,
        uncertainty_max_m=uncertainty_max_m,
        imagery_date=imagery_date,
        seed=seed,
        overwrite=overwrite,
    )
    facts = asdict(report)
    print_result(facts.pop("path"), as_json, **facts)
