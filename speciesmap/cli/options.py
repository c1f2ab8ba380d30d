"""Options that several commands share, each defined once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)


def _set_level(ctx: click.Context, param: click.Parameter, value: int | bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    logging.getLogger("speciesmap").setLevel(
        logging.WARNING if param.name == "quiet" else logging.DEBUG
    )


def logging_options(command: F) -> F:
    """Add `-v/-q`; logs and progress go to stderr at INFO unless told otherwise."""
    command = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_set_level,
        help="Log details and keep tracebacks.",
    )(command)
    return click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_set_level,
        help="No progress bars, warnings only.",
    )(command)


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
imagery_option = click.option(
    "--imagery", metavar="SRC", help="GeoTIFF or VRT, or a folder or glob of them."
)
bbox_option = click.option(
    "--bbox",
    nargs=4,
    type=float,
    metavar="W S E N",
    help="Area of interest; longitude and latitude unless --bbox-crs says otherwise.",
)
bbox_crs_option = click.option(
    "--bbox-crs", default="EPSG:4326", show_default=True, help="CRS of --bbox."
)


def out_option(metavar: str, help: str = "Where to write.") -> Callable[[F], F]:
    """Add the required `--out`."""
    return click.option("--out", type=PATH, required=True, metavar=metavar, help=help)


def print_result(path: Path | str, as_json: bool = False, **facts: Any) -> None:
    """Print the result on stdout: its path, or one JSON object that holds it."""
    click.echo(json.dumps({"path": str(path), **facts}, default=str) if as_json else str(path))
