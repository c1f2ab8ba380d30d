"""One page with one picture on a map: a GeoTIFF whose bands are red, green and blue."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

import offlinefolium as folium
from branca.element import Element
from offlinefolium.plugins import Fullscreen
from offlinefolium.raster_layers import ImageOverlay

from speciesmap.outputs import refuse_existing, replacing
from speciesmap.present.warp import encode_webp, longitude_latitude, read_picture, union

SIDE_PX = 4096
PICTURE_BYTES = 6_000_000
LABEL = (
    "position:fixed;top:12px;left:60px;z-index:1000;max-width:32em;padding:8px 12px;"
    "background:#fffffff0;border-radius:6px;font:14px/1.4 system-ui,sans-serif"
)


def picture_map(
    raster: Path | str,
    out: Path | str,
    *,
    title: str = "",
    caption: str = "",
    overwrite: bool = False,
) -> Path:
    """Put a picture into an interactive HTML page that needs no network.

    Args:
        raster: GeoTIFF with bands red, green and blue; in any CRS.
        out: The page.
        title: Name of the picture.
        caption: What is seen on it, in a sentence.
        overwrite: Replace an existing page.

    Returns:
        The page.

    Raises:
        ImageryError: The raster cannot be opened or has no place on Earth.
        OutputError: The page exists already.
    """
    out = Path(out)
    refuse_existing(out, overwrite)
    picture = read_picture(raster, union([Path(raster)]), SIDE_PX)
    webp = encode_webp(picture.pixels, PICTURE_BYTES)
    url = "data:image/webp;base64," + base64.b64encode(webp).decode()
    (west, south), (east, north) = (
        longitude_latitude(x, y)
        for x, y in (
            (picture.grid.left, picture.grid.bottom),
            (picture.grid.right, picture.grid.top),
        )
    )
    page = folium.Map(location=[(south + north) / 2, (west + east) / 2], tiles=None, zoom_snap=0.1)
    corners = [[south, west], [north, east]]
    ImageOverlay(url, corners, name=title or Path(raster).stem, pixelated=True).add_to(page)
    page.fit_bounds(corners)
    Fullscreen().add_to(page)  # type: ignore[no-untyped-call]
    figure: Any = page.get_root()
    figure.title = title or Path(raster).stem
    words = f"<b>{escape(figure.title)}</b><br>{escape(caption)}"
    figure.html.add_child(Element(f"<div style='{LABEL}'>{words}</div>"))
    with replacing(out, overwrite=overwrite) as beside:
        beside.write_text(figure.render(), encoding="utf-8")
    return out
