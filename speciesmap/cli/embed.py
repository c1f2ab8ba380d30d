"""`speciesmap embed`: encode an area once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from speciesmap.cli.options import (
    PATH,
    imagery_options,
    json_option,
    logging_options,
    out_option,
    overwrite_option,
    print_result,
)

F = TypeVar("F", bound=Callable[..., Any])


def encoding_options(command: F) -> F:
    """Add what decides how imagery is encoded."""
    for option in reversed(
        (
            click.option(
                "--stride-px",
                type=click.IntRange(min=1),
                metavar="N",
                help="Side of a cell in pixels; a quarter of the window by default.",
            ),
            click.option(
                "--min-valid",
                type=click.FloatRange(0, 1),
                metavar="SHARE",
                help="Least share of valid pixels in a window; 0.5 by default.",
            ),
            click.option(
                "--any-resolution",
                is_flag=True,
                help="Accept pixels more than 1.5 times as large or small as the model's.",
            ),
            click.option(
                "--batch-size",
                type=click.IntRange(min=1),
                metavar="N",
                help="Windows at once; by default 8 of 256 px on a CPU, 256 on a GPU, more of "
                "smaller ones up to 256.",
            ),
            click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1; chosen by default."),
            click.option(
                "--precision",
                type=click.Choice(["auto", "float32", "bfloat16"]),
                default="auto",
                show_default=True,
                help="auto: bfloat16 where the processor has it and it agrees with float32.",
            ),
            click.option(
                "--compile",
                "compiled",
                is_flag=True,
                help="Compile the encoder: slow to start (it says how slow), faster after.",
            ),
            click.option(
                "--skip-unreadable",
                is_flag=True,
                help="Leave tiles empty whose pixels cannot be read, and name them.",
            ),
        )
    ):
        command = option(command)
    return imagery_options(command)


@click.command("embed")
@click.argument("model", type=PATH)
@encoding_options
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Encode in N processes of this machine, each on a GPU of its own where there are several; "
    "by default in this one.",
)
@click.option(
    "--scheduler", metavar="ADDRESS", help="Encode on a Dask cluster, for example tcp://node1:8786."
)
@out_option("STORE.zarr", "Store to create or to fill.")
@overwrite_option
@json_option
@logging_options
def command(
    model: Path, imagery: str | None, out: Path, overwrite: bool, as_json: bool, **options: Any
) -> None:
    """Encode an area once into an embedding store.

    MODEL is a folder that `speciesmap train` wrote. A store that exists is filled where it lacks
    tiles of the area, so that an interrupted run goes on where it stopped; --overwrite starts it
    afresh. xarray opens the store, with coordinates and CRS.

    \b
    Example:
      speciesmap embed runs/finetuned --imagery naip/ --bbox -122.3 37.7 -122.2 37.8 \\
          --out bay.zarr
    """
    if imagery is None:
        raise click.UsageError("Missing option '--imagery'.")
    from speciesmap.mapping.embed import embed

    try:
        store = embed(model, imagery, out, overwrite=overwrite, **options)
    except KeyboardInterrupt:
        click.echo("stopped; run again to go on: tiles that are done are kept", err=True)
        raise
    print_result(store.path, as_json, cells=store.geobox.shape, dim=store.dim)
