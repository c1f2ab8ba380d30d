"""A map in full resolution, from a tile server on this machine."""

from __future__ import annotations

import tempfile
import threading
import warnings
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speciesmap.errors import DependencyError
from speciesmap.present.styles import read_legend, seasonal
from speciesmap.present.warp import open_map
from speciesmap.present.webmap import make_map


@contextmanager
def serving(raster: Path, *, host: str = "127.0.0.1", port: int | None = None) -> Iterator[Path]:
    """Serve a map's tiles while the block runs.

    Args:
        raster: Map GeoTIFF, also one of any size: tiles are read from its overviews.
        host: Address to bind to; others than this machine may look at it only if it says so.
        port: To bind to; a free one by default.

    Yields:
        A page that shows the map from the tiles, which goes with the block.

    Raises:
        DependencyError: localtileserver is not installed.
        ImageryError: The raster cannot be opened or shown.
    """
    with open_map(raster) as dataset:
        legend, months = read_legend(dataset), seasonal(dataset)
    try:
        from localtileserver import TileClient
    except ImportError as error:
        raise DependencyError(
            "speciesmap view needs localtileserver, which is not installed here; "
            "pip install 'speciesmap[demo]'"
        ) from error
    client = TileClient(str(raster), port=port or "default", host=host)
    try:
        tiles = client.get_tile_url(
            indexes=[1], colormap="viridis", vmin=legend.low, vmax=legend.high
        )
        with (
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory(prefix="speciesmap-") as folder,
        ):
            # The tile server casts cells without a value, which it then makes transparent.
            warnings.filterwarnings("ignore", "invalid value encountered in cast", RuntimeWarning)
            yield make_map(
                [raster],
                Path(folder) / "map.html",
                title=raster.name,
                detail="" if months else tiles,
            )
    finally:
        client.shutdown(force=True)


def view(
    raster: Path, *, host: str = "127.0.0.1", port: int | None = None, browser: bool = True
) -> None:
    """Serve a map and show it until interrupted; arguments and errors as for `serving`.

    Args:
        raster: Map GeoTIFF.
        host: Address to bind to.
        port: To bind to.
        browser: Whether to open the page in the user's browser.
    """
    with serving(raster, host=host, port=port) as page:
        print(page.as_uri(), flush=True)
        if browser:
            webbrowser.open(page.as_uri())
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return
