"""speciesmap demo."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from speciesmap.cli import options


@click.command()
@click.option(
    "--scene",
    type=click.Choice(["sf-bay", "simulated", "all"]),
    default="all",
    show_default=True,
    help="Which scene to run.",
)
@click.option(
    "--out",
    type=options.PATH,
    default=Path("demo"),
    show_default=True,
    metavar="DIR",
    help="Where to write.",
)
@click.option(
    "--seed", type=options.SEED, default=0, show_default=True, help="Of everything random."
)
@options.overwrite_option
@options.json_option
@options.logging_options
def command(scene: str, out: Path, seed: int, overwrite: bool, as_json: bool) -> None:
    """Map two scenes from raw input to HTML, in minutes on two cores.

    sf-bay: banana slugs on Landsat 7 over San Francisco Bay, real data from installed packages.
    simulated: the full method, photos and names too, where the truth is known.

    \b
    Example:
      speciesmap demo --scene sf-bay --out demo
    """
    from speciesmap.demo import SCENES, demo

    result = demo(out, SCENES if scene == "all" else (scene,), seed=seed, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, facts in result["scenes"].items():
        for caption, rows in facts["metrics"].items():
            if isinstance(rows, list):
                _print_table(f"{name}: {caption.replace('_', ' ')}", rows)
    click.echo(result["html"])


def _print_table(caption: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=caption)
    for row in rows:
        table.add_row(*("" if row.get(key) is None else str(row[key]) for key in columns))
    Console(stderr=True, width=140).print(table)
