"""One self-contained HTML page with maps that opens anywhere, also without a network.

Every raster is warped onto an EPSG:3857 grid, because the browser stretches an image linearly
between its corners in that projection: a picture in another one would be out of place between
them. The warped values are stored once per raster, as an indexed PNG that is both what is shown
and what a click reads.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import offlinefolium as folium
from branca.element import MacroElement
from offlinefolium.plugins import Fullscreen, MarkerCluster, MousePosition
from offlinefolium.raster_layers import ImageOverlay
from offlinefolium.template import Template

from speciesmap.errors import OutputError
from speciesmap.outputs import refuse_existing, replacing
from speciesmap.present.markers import pack_records, photo_origins
from speciesmap.present.overlays import SIDE_PX, Overlay, make_overlays
from speciesmap.present.styles import MONTHS, PALETTE, STEPS
from speciesmap.present.warp import (
    HALF_M,
    Grid,
    encode_webp,
    longitude_latitude,
    read_picture,
    union,
)

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from speciesmap.rasters.imagery import Imagery

PAGE_BYTES = 9_500_000
"""Largest page, a little under the 10 MB that a mail server or a phone still takes."""

BASE_BYTES = 1_600_000
CODE_BYTES = 460_000  # of Leaflet, its helpers and the page's own

TILES = {"Topographic (Esri)": "Esri WorldTopoMap", "Aerial (Esri)": "Esri WorldImagery"}
"""Online backgrounds, by the name that the page shows; none is asked for until chosen."""


class _Map(folium.Map):
    """A folium map that carries Leaflet alone, without jQuery, Bootstrap and icon fonts."""

    default_js = [pair for pair in folium.Map.default_js if pair[0] == "leaflet"]  # noqa: RUF012
    default_css = [  # noqa: RUF012
        pair for pair in folium.Map.default_css if pair[0] == "leaflet_css"
    ]


class _Panel(MacroElement):
    """The panel, its style and its script, and the facts they show."""

    _template = Template(
        """
        {% macro header(this, kwargs) %}<style>{{ this.css }}</style>{% endmacro %}
        {% macro html(this, kwargs) %}{{ this.html }}
        <script type="application/json" id="sm-data">{{ this.facts }}</script>{% endmacro %}
        {% macro script(this, kwargs) %}{{ this.js }}
        speciesmapPage({{ this._parent.get_name() }}, {
            overlays: [{{ this.overlays | map(attribute="script_name") | join(", ") }}],
            base: {{ this.base.script_name if this.base else "null" }},
            cluster: {{ this.cluster.get_name() if this.cluster else "null" }},
            detail: {{ this.detail.script_name if this.detail else "null" }},
            tiles: [{{ this.tiles | map(attribute="script_name") | join(", ") }}],
        });{% endmacro %}
        """
    )

    def __init__(
        self,
        facts: Mapping[str, Any],
        overlays: Sequence[Any],
        base: Any | None,
        cluster: Any | None,
        tiles: Sequence[Any],
        detail: Any | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name = "Panel"
        self.facts = script_json(facts)
        room = files("speciesmap.present")
        self.html, self.css, self.js = (
            room.joinpath(name).read_text(encoding="utf-8")
            for name in ("map.html", "map.css", "map.js")
        )
        self.overlays, self.base, self.cluster, self.tiles = overlays, base, cluster, tiles
        self.detail = detail
        for layer in (*overlays, *tiles, base, detail):
            if layer is not None:
                layer.script_name = layer.get_name()


PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none';
 form-action 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; font-src data:;
 img-src data: blob: https://server.arcgisonline.com {{ this.photo_origins }}">
<title>{{ this.title }}</title>
{{ this.header.render(**kwargs) }}
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
</head>
<body>
{{ this.html.render(**kwargs) }}
<script>
{{ this.script.render(**kwargs) }}
</script>
</body>
</html>
"""
)


def make_map(
    rasters: Sequence[Path],
    out: Path,
    *,
    observations: GeoDataFrame | None = None,
    photos: Path | None = None,
    base: Imagery | Path | str | None = None,
    title: str = "",
    detail: str = "",
    overwrite: bool = False,
) -> Path:
    """Put maps into one interactive HTML page that needs no network.

    The page shows one map at a time or two beside a divider, lets the user find, fade and cut
    them, and reads every map's value at a place. A map whose bands are the twelve months gets a
    slider that plays; one with a band `applicability` is hatched where that is 0; a band
    `uncertainty` is read with the value. The page stays under 10 MB: maps larger than fit are
    reduced from their overviews.

    Args:
        rasters: Map GeoTIFFs, in the order of the list; the first is shown at the start. Band 1
            is the map, its description the quantity, the tag TAXON its name. Any CRS, any extent.
        out: The HTML file.
        observations: Records to show as markers; columns as `read_observations` gives them.
        photos: Folder of the observations' photo files; small copies of those with an open
            licence are put into the page. Photos at an address are asked for when looked at.
        base: Imagery to show under the maps, reduced: open, or whatever `open_imagery` takes.
        title: Heading; by default what the maps are.
        detail: Address of tiles, with {z}, {x} and {y}, of the first map in full resolution, which
            are shown above it.
        overwrite: Whether `out` may be replaced.

    Returns:
        `out`.

    Raises:
        ImageryError: A raster cannot be opened or has no place on Earth.
        ObservationsError: The observations lack a column.
        OutputError: `out` exists, there is nothing to show, or the maps do not fit in a page.
    """
    refuse_existing(Path(out), overwrite)
    if not rasters:
        raise OutputError(f"no maps for {out}; name at least one GeoTIFF")
    records = None if observations is None else pack_records(observations, photos)
    extent = union(rasters)
    picture = None if base is None else read_picture(base, extent, SIDE_PX, margin=0.12)
    webp = b"" if picture is None else encode_webp(picture.pixels, BASE_BYTES)
    page_bytes = CODE_BYTES + len(webp) * 4 / 3 + (len(json.dumps(records)) if records else 0)
    overlays = make_overlays(rasters, extent, max(1, int(PAGE_BYTES - page_bytes)))

    south_west = _lat_first(*longitude_latitude(extent.left, extent.bottom))
    north_east = _lat_first(*longitude_latitude(extent.right, extent.top))
    title = title or _title(overlays)
    page = _Map(
        location=[(a + b) / 2 for a, b in zip(south_west, north_east, strict=True)],
        tiles=None,
        zoom_control="topright",
        zoom_snap=0.25,
        zoom_delta=0.5,
        wheel_px_per_zoom_level=90,
        world_copy_jump=False,
    )
    page._id = "page"
    page.options["max_zoom"] = _max_zoom([o.grid for o in overlays], extent)
    layers = [
        _image(o.urls[0], o.grid, f"map_{i}", name=o.legend.label) for i, o in enumerate(overlays)
    ]
    under = None
    if picture is not None:
        url = "data:image/webp;base64," + base64.b64encode(webp).decode()
        under = _image(url, picture.grid, "base", name="Imagery")
    cluster = None
    if records is not None:
        records["at"] = [_lat_first(_reached(x, extent), y) for x, y in records["at"]]
        cluster = MarkerCluster(  # type: ignore[no-untyped-call]
            control=False,
            show=False,
            show_coverage_on_hover=False,
            zoom_to_bounds_on_click=False,  # a click reads the maps, a button zooms
            spiderfy_on_max_zoom=False,
            max_cluster_radius=52,
            chunked_loading=True,
        )
        cluster._id = "observations"
    tiles = []
    for i, provider in enumerate(TILES.values()):
        tiles.append(folium.TileLayer(provider, control=False, show=False, max_zoom=22))
        tiles[-1]._id = f"tiles_{i}"
    sharp = None
    if detail:
        sharp = folium.TileLayer(
            detail, attr="localtileserver", control=False, show=False, max_zoom=24
        )
        sharp._id = "detail"
        page.options["max_zoom"] = 22
    position = MousePosition(  # type: ignore[no-untyped-call]
        position="bottomright", separator=", ", num_digits=5, empty_string="latitude, longitude"
    )
    position._id = "position"
    facts = {
        "title": title,
        "layers": [o.facts() for o in overlays],
        "observations": records,
        "extent": [south_west, north_east],
        "palette": PALETTE,
        "steps": STEPS,
        "months": MONTHS,
        "tiles": list(TILES),
        "attribution": "Leaflet, speciesmap",
    }
    panel = _Panel(facts, layers, under, cluster, tiles, sharp)
    panel._id = "panel"
    fullscreen = Fullscreen(  # type: ignore[no-untyped-call]
        position="topright", fullscreen_element=folium.JsCode("document.documentElement")
    )
    fullscreen._id = "fullscreen"
    for child in (*layers, under, cluster, *tiles, sharp, fullscreen, position, panel):
        if child is not None:
            page.add_child(child)
    figure: Any = page.get_root()
    figure.title = html.escape(title)
    origins = [*photo_origins(records["photos"] if records else []), *photo_origins([detail])]
    figure.photo_origins = " ".join(origins)
    figure._template = PAGE
    text = figure.render()
    with replacing(out, overwrite=overwrite) as beside:
        beside.write_text(text, encoding="utf-8")
    return Path(out)


def script_json(value: Any) -> str:
    """Write JSON that may stand inside a script element, whatever its strings hold.

    Args:
        value: Anything JSON can hold; numbers must be finite.

    Returns:
        JSON without any `<`, `>` or `&`, and without the two line separators that end a line of
        JavaScript.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")


def _lat_first(longitude: float, latitude: float) -> list[float]:
    """Turn x, y into Leaflet's order: the one place where latitude comes first."""
    return [round(latitude, 8), round(longitude, 8)]


def _reached(longitude: float, extent: Grid) -> float:
    """Take a longitude once around the Earth, if an extent reaches it over the 180th meridian."""
    return longitude + 360 if longitude < 0 and extent.right > HALF_M else longitude


def _image(url: str, grid: Grid, name_id: str, name: str) -> ImageOverlay:
    corners = [
        _lat_first(*longitude_latitude(x, y))
        for x, y in ((grid.left, grid.bottom), (grid.right, grid.top))
    ]
    overlay = ImageOverlay(
        url, corners, name=name, show=False, control=False, pixelated=False, opacity=1.0
    )
    overlay._id = name_id
    return overlay


def _max_zoom(grids: Sequence[Grid], extent: Grid) -> int:
    """Deepest zoom at which every warped map is still right to one screen pixel.

    Warping moves a cell's edge by up to half a pixel of the overlay. A raster whose own grid lies
    in Web Mercator is not warped, only its cells limit the zoom: to 64 screen pixels each.
    """
    equator_m = 2 * math.pi * 6378137 / 256
    deepest = min(math.log2(equator_m / g.pixel_m * (64 if g.exact else 2)) for g in grids)
    whole = math.log2(equator_m / max(extent.right - extent.left, extent.top - extent.bottom) * 512)
    return math.floor(min(22.0, max(deepest, whole)))


def _title(overlays: Sequence[Overlay]) -> str:
    if len(overlays) == 1:
        return f"{overlays[0].legend.quantity.capitalize()} map"
    *others, last = sorted({o.legend.quantity for o in overlays})
    quantities = f"{', '.join(others)} and {last}" if others else last
    return f"{len(overlays)} maps of {quantities}"
