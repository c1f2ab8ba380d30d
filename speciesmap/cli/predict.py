"""`speciesmap predict`: maps of species, photos or text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from speciesmap.cli.embed import encoding_options
from speciesmap.cli.options import (
    PATH,
    json_option,
    logging_options,
    out_option,
    overwrite_option,
    print_result,
)


@click.command("predict")
@click.argument("model", type=PATH)
@encoding_options
@click.option(
    "--store",
    type=PATH,
    metavar="STORE",
    help="Embeddings to use, and to fill from --imagery; DIR.store.zarr by default.",
)
@click.option(
    "--species", multiple=True, metavar="NAME", help="Taxon of the model, a map each; repeatable."
)
@click.option(
    "--photo",
    "photos",
    multiple=True,
    type=PATH,
    metavar="FILE",
    help="Ground photo, or a folder of them; several together ask for one map; repeatable.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="TEXT",
    help="Name or lineage, broadest first, a map each; repeatable.",
)
@click.option(
    "--covariates",
    multiple=True,
    metavar="[NAME=]RASTER",
    help="For a model trained with covariates; by default the rasters it was trained on; "
    "repeatable.",
)
@click.option("--qgis-project", is_flag=True, help="Also write DIR/maps.qgz, all maps grouped.")
@click.option(
    "--month",
    type=click.Choice([*(str(number) for number in range(1, 13)), "all"]),
    help="Map this month, or one band for each; of a model that was trained with dates.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print what would be read, encoded and stored, and how long."
)
@out_option("DIR", "Folder to create.")
@overwrite_option
@json_option
@logging_options
def command(
    model: Path,
    imagery: str | None,
    store: Path | None,
    month: str | None,
    out: Path,
    overwrite: bool,
    as_json: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Map species, photos or text over an area.

    MODEL is a folder that `speciesmap train` wrote. DIR gets a Cloud-Optimized GeoTIFF with a QGIS
    style for each query, ranges.gpkg and richness.tif where the model has thresholds and
    probabilities, map.html, run.json and a STAC item. Without --species, --photo and --text
    every taxon of the model is mapped. Embeddings are kept in DIR.store.zarr, or in --store, so
    that further maps of the same area encode nothing.

    \b
    Example:
      speciesmap predict runs/finetuned --imagery naip/ --species "Quercus agrifolia" --out maps
      speciesmap predict runs/finetuned --store maps.store.zarr --photo oak.jpg --out by_photo
      speciesmap predict runs/birds --store birds.zarr --photo jay.jpg --month all --out by_month
    """
    if imagery is None and store is None:
        raise click.UsageError("Missing option '--imagery' or '--store'.")
    if dry_run:
        if imagery is None:
            raise click.UsageError("--dry-run tells what --imagery costs; give it.")
        _print_plan(model, imagery, as_json, options)
        return
    from speciesmap.atlas import predict

    months = range(1, 13) if month == "all" else [int(month)] if month else []
    made = predict(
        model,
        imagery=imagery,
        store=store,
        months=months,
        out=out,
        overwrite=overwrite,
        **options,
    )
    print_result(
        made.path,
        as_json,
        maps={m.path.stem: str(m.path) for m in made.maps},
        html=made.html,
        run=made.run,
        item=made.item,
        store=made.store,
    )


PLANNED = {
    *("bbox", "bbox_crs", "stride_px", "bands", "batch_size", "device", "any_resolution"),
    *("crs", "resolution_m", "like", "datetime", "query", "first"),
}


def _print_plan(model: Path, imagery: str, as_json: bool, options: dict[str, Any]) -> None:
    from dataclasses import asdict
    from datetime import timedelta

    from speciesmap.mapping.plan import plan

    found = plan(model, imagery, **{name: options[name] for name in PLANNED})
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    read = f"{found.read_bytes / 1e6:,.1f} MB" if found.read_bytes else "unknown"
    for name, value in (
        ("imagery", f"{found.imagery}, {found.scenes} scene{'s' * (found.scenes != 1)}"),
        ("grid", found.grid),
        ("pixels", f"{found.pixels:,}"),
        ("windows", f"{found.windows:,}"),
        ("cells", f"{found.cells[0]} rows x {found.cells[1]} columns"),
        ("to read", read),
        ("store", f"{found.store_bytes / 1e6:,.1f} MB"),
        (
            "time",
            f"about {timedelta(seconds=round(found.seconds))} at "
            f"{found.windows_per_s:,.0f} windows/s",
        ),
    ):
        click.echo(f"{name:10} {value}")
