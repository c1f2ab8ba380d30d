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
SEED = click.IntRange(0, 2**32 - 1)


class _PathOrAddress(click.Path):
    """A path as `Path`; an address stays text, of which `Path` would drop a slash."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if "://" in str(value) else super().convert(value, param, ctx)


PATH_OR_ADDRESS = _PathOrAddress(path_type=Path)


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
    "--imagery",
    metavar="SRC",
    help="GeoTIFF, VRT or tile index; folder or glob of them; https:// or s3:// address of a "
    "GeoTIFF; STAC collection, stac+https://host/path#collection.",
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


def split_bands(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    """Read `red,green,nir=4`."""
    if value is None:
        return None
    names = tuple(name.strip() for name in value.replace(",", " ").split())
    if not names:
        raise click.BadParameter("name at least one band")
    return names


def imagery_options(command: F) -> F:
    """Add what says which imagery is read, where, on which grid and which of its bands."""
    for option in reversed(
        (
            imagery_option,
            click.option(
                "--bands",
                metavar="B,B,...",
                callback=split_bands,
                help="Bands, in a model's order if there is one: names, numbers or name=number; by "
                "default those of the model's names, else all.",
            ),
            bbox_option,
            bbox_crs_option,
            click.option("--datetime", metavar="WHEN", help="STAC: 2018, 2018-06 or FROM/TO."),
            click.option(
                "--query",
                multiple=True,
                metavar="CONDITION",
                help="STAC: a property, such as eo:cloud_cover<10; repeatable.",
            ),
            click.option(
                "--first",
                type=click.Choice(["newest", "least-cloudy"]),
                default="newest",
                show_default=True,
                help="Which scene counts where several overlap.",
            ),
            click.option(
                "--crs",
                metavar="CRS",
                help="CRS of the grid that scenes are read on; their own by default, of "
                "unlike scenes the UTM zone.",
            ),
            click.option(
                "--resolution-m",
                type=click.FloatRange(min=0, min_open=True),
                metavar="M",
                help="Side of that grid's pixels, metres on the ground; their own by default, "
                "of unlike scenes the model's or the finest.",
            ),
            click.option(
                "--like",
                type=PATH_OR_ADDRESS,
                metavar="RASTER",
                help="Take this raster's grid, instead of --crs and --resolution-m.",
            ),
        )
    ):
        command = option(command)
    return command


def out_option(metavar: str, help: str = "Where to write.") -> Callable[[F], F]:
    """Add the required `--out`."""
    return click.option("--out", type=PATH, required=True, metavar=metavar, help=help)


def print_result(path: Path | str, as_json: bool = False, **facts: Any) -> None:
    """Print the result on stdout: its path, or one JSON object that holds it."""
    click.echo(json.dumps({"path": str(path), **facts}, default=str) if as_json else str(path))
