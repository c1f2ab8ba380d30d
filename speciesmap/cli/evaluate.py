"""`speciesmap evaluate`: how good a model is, beside simpler methods."""

from __future__ import annotations

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


@click.command("evaluate")
@click.argument("model", type=PATH)
@click.option(
    "--data",
    type=PATH,
    required=True,
    metavar="DATASET|CONFIG",
    help="Paired data set, or a fine-tuning configuration.",
)
@click.option(
    "--covariates", multiple=True, type=PATH, metavar="RASTER", help="Environmental; repeatable."
)
@click.option(
    "--surveys", type=PATH, metavar="FILE", help="Presence and absence: lon, lat, taxon, present."
)
@out_option("DIR", "Folder to create.")
@overwrite_option
@json_option
@logging_options
def command(
    model: Path,
    data: Path,
    covariates: tuple[Path, ...],
    surveys: Path | None,
    out: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Evaluate a model beside simpler methods, on identical spatial folds.

    MODEL is a folder that `speciesmap train` wrote. DIR gets report.html, report.json and an ODMAP
    protocol, odmap.csv. The ladder: prevalence only, location only, MaxEnt with random and with
    target-group background (needs elapid), queries by text and by photo, embedding and head, with
    --covariates too. A data set is evaluated with the imagery and folds of the model's training.

    \b
    Example:
      speciesmap evaluate runs/model --data configs/demo_landsat_finetune.yaml --out evaluation
      speciesmap evaluate runs/model --data chips --covariates elevation.tif --out evaluation
    """
    from speciesmap.appraise import evaluate

    made = evaluate(
        model, data=data, out=out, covariates=covariates, surveys=surveys, overwrite=overwrite
    )
    print_result(made.path, as_json, html=made.html, odmap=made.odmap, report=made.result)
