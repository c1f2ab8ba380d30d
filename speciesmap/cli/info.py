"""`speciesmap info`: what is this."""

from __future__ import annotations

import json
from pathlib import Path

import click

from speciesmap.cli.options import PATH_OR_ADDRESS, json_option, logging_options


@click.command("info")
@click.argument("path", type=PATH_OR_ADDRESS)
@json_option
@logging_options
def command(path: Path | str, as_json: bool) -> None:
    """Tell what a model, store, data set or map is.

    PATH may also be imagery, a folder that `speciesmap predict` wrote, a table of observations, or
    the address of a raster or data set.

    \b
    Example:
      speciesmap info maps/quercus_agrifolia.tif
      speciesmap info runs/finetuned --json
    """
    from speciesmap.describe import as_text, describe

    facts = describe(path)
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else as_text(facts))
