"""`speciesmap view`: a map in full resolution in the browser."""

from __future__ import annotations

from pathlib import Path

import click

from speciesmap.cli.options import PATH, logging_options


@click.command("view")
@click.argument("raster", metavar="RASTER.tif", type=PATH)
@click.option("--port", type=int, metavar="N", help="To serve at; a free one by default.")
@click.option("--browser/--no-browser", default=True, help="Open the page, or print its address.")
@logging_options
def command(raster: Path, port: int | None, browser: bool) -> None:
    """Show a map in full resolution in the browser, until Ctrl-C.

    A page of `speciesmap map` holds large maps reduced; here the tiles come from the GeoTIFF itself
    through localtileserver, which only this machine can reach.

    \b
    Example:
      speciesmap view maps/quercus_agrifolia.tif
    """
    from speciesmap.present.view import view

    view(raster, port=port, browser=browser)
