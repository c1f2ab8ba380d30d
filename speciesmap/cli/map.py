"""`speciesmap map`: maps into one interactive HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from speciesmap.cli.options import (
    PATH,
    imagery_option,
    json_option,
    logging_options,
    out_option,
    overwrite_option,
    print_result,
)


@click.command("map")
@click.argument("rasters", metavar="RASTER.tif...", nargs=-1, required=True, type=PATH)
@out_option("FILE.html", "Page to write.")
@click.option(
    "--observations",
    type=PATH,
    metavar="FILE",
    help="Records to show as markers: GBIF, iNaturalist, Parquet, GeoPackage or CSV.",
)
@click.option(
    "--photos",
    type=PATH,
    metavar="DIR",
    help="Photo files of the observations, shown as thumbnails where their licence is open.",
)
@imagery_option
@click.option("--title", default="", help="Heading of the page.")
@overwrite_option
@json_option
@logging_options
def command(
    rasters: tuple[Path, ...],
    out: Path,
    observations: Path | None,
    photos: Path | None,
    imagery: str | None,
    title: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Put maps into one interactive HTML page.

    The page opens in any browser, also without a network, and holds all it shows: the maps,
    reduced where they are large, the observations, and the imagery as a background. Maps of the
    twelve months get a slider that plays; a band `applicability` is hatched where it is 0.

    \b
    Example:
      speciesmap map maps/*.tif --out map.html --observations slugs.parquet --imagery scene.tif
    """
    if photos is not None and observations is None:
        raise click.UsageError("--photos are those of --observations; give them too.")
    if photos is not None and not photos.is_dir():
        raise click.UsageError(f"--photos {photos} is no folder; check the name.")
    from speciesmap.observations.read import read_observations
    from speciesmap.outputs import refuse_existing
    from speciesmap.present.webmap import make_map

    refuse_existing(out, overwrite, *rasters, observations, photos, imagery)
    records = None if observations is None else read_observations(observations)
    make_map(
        rasters,
        out,
        observations=records,
        photos=photos,
        base=imagery,
        title=title,
        overwrite=overwrite,
    )
    print_result(out, as_json)
