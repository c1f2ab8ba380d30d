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
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import offlinefolium as folium
from branca.element import MacroElement
from numpy.typing import NDArray
from offlinefolium.plugins import Fullscreen, MarkerCluster, MousePosition
from offlinefolium.raster_layers import ImageOverlay
from offlinefolium.template import Template
from rasterio.enums import Resampling

from speciesmap.errors import ObservationsError, OutputError
from speciesmap.outputs import refuse_existing, replacing
from speciesmap.present.styles import (
    PALETTE,
    STEPS,
    Legend,
    encode_png,
    quantise,
    read_legend,
)
from speciesmap.present.warp import (
    Grid,
    encode_webp,
    longitude_latitude,
    map_grid,
    open_map,
    read_picture,
    union,
    warp,
)
from speciesmap.progress import track

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

PAGE_BYTES = 9_500_000
"""Largest page, a little under the 10 MB that a mail server or a phone still takes."""

BASE_BYTES = 1_600_000
OVERLAY_SIDE_PX = 2048
OVERLAY_PIXELS = 48_000_000  # of all rasters together: what a phone can hold decoded
OBSERVATIONS = 20_000

TILES = {"Topographic (Esri)": "Esri WorldTopoMap", "Aerial (Esri)": "Esri WorldImagery"}
"""Online backgrounds, by the name that the page shows; none is asked for until chosen."""


@dataclass(frozen=True)
class _Overlay:
    """One raster as the page holds it."""

    legend: Legend
    file: str
    grid: Grid
    png: bytes

    @property
    def url(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


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
        for layer in (*overlays, *tiles, *([base] if base else [])):
            layer.script_name = layer.get_name()


PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none';
 form-action 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; font-src data:;
 img-src data: blob: https://server.arcgisonline.com">
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
    base: Path | str | None = None,
    title: str = "",
    overwrite: bool = False,
) -> Path:
    """Put maps into one interactive HTML page that needs no network.

    The page shows one map at a time or two beside a divider, lets the user find, fade and cut
    them, and reads every map's value at a place. It stays under 10 MB: maps larger than fit are
    reduced from their overviews.

    Args:
        rasters: Map GeoTIFFs, in the order of the list; the first is shown at the start. Band 1
            is the map, its description the quantity, the tag TAXON its name. Any CRS, any extent.
        out: The HTML file.
        observations: Records to show as markers; columns as `read_observations` gives them.
        base: Imagery to show under the maps, reduced: whatever `open_imagery` takes.
        title: Heading; by default what the maps are.
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
    records = None if observations is None else _records(observations)
    extent = union(rasters)
    picture = None if base is None else read_picture(base, extent, OVERLAY_SIDE_PX, margin=0.12)
    webp = b"" if picture is None else encode_webp(picture.pixels, BASE_BYTES)
    page_bytes = 450_000 + len(webp) * 4 / 3 + (len(json.dumps(records)) if records else 0)
    overlays = _overlays(rasters, int(PAGE_BYTES - page_bytes))

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
        _image(o.url, o.grid, f"map_{i}", name=o.legend.label) for i, o in enumerate(overlays)
    ]
    under = None
    if picture is not None:
        url = "data:image/webp;base64," + base64.b64encode(webp).decode()
        under = _image(url, picture.grid, "base", name="Imagery")
    cluster = None
    if records is not None:
        cluster = MarkerCluster(  # type: ignore[no-untyped-call]
            control=False,
            show=False,
            show_coverage_on_hover=False,
            max_cluster_radius=52,
            chunked_loading=True,
        )
        cluster._id = "observations"
    tiles = []
    for i, provider in enumerate(TILES.values()):
        tiles.append(folium.TileLayer(provider, control=False, show=False, max_zoom=22))
        tiles[-1]._id = f"tiles_{i}"
    position = MousePosition(  # type: ignore[no-untyped-call]
        position="bottomright", separator=", ", num_digits=5, empty_string="latitude, longitude"
    )
    position._id = "position"
    facts = {
        "title": title,
        "layers": [_facts(o) for o in overlays],
        "observations": records,
        "extent": [south_west, north_east],
        "palette": PALETTE,
        "steps": STEPS,
        "tiles": list(TILES),
        "attribution": "Leaflet, speciesmap",
    }
    panel = _Panel(facts, layers, under, cluster, tiles)
    panel._id = "panel"
    fullscreen = Fullscreen(  # type: ignore[no-untyped-call]
        position="topright", fullscreen_element=folium.JsCode("document.documentElement")
    )
    fullscreen._id = "fullscreen"
    for child in (*layers, under, cluster, *tiles, fullscreen, position, panel):
        if child is not None:
            page.add_child(child)
    figure: Any = page.get_root()
    figure.title = html.escape(title)
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


def _overlays(rasters: Sequence[Path], budget: int) -> list[_Overlay]:
    """Warp all maps, as finely as their PNGs fit into a number of bytes."""
    side = min(OVERLAY_SIDE_PX, math.isqrt(OVERLAY_PIXELS // len(rasters)))
    while True:
        overlays = [_overlay(path, side) for path in track(rasters, "Maps to the page")]
        total = sum(len(o.url) for o in overlays)
        if total <= budget:
            return overlays
        if side <= 64:
            raise OutputError(
                f"{len(rasters)} maps take {total / 1e6:.0f} MB even when reduced to {side} "
                f"pixels, a page holds {budget / 1e6:.0f} MB; put fewer maps into a page"
            )
        side = max(64, int(side * min(0.85, math.sqrt(budget / total))))


def _overlay(path: Path, side_px: int) -> _Overlay:
    with open_map(path) as dataset:
        legend = read_legend(dataset)
        grid = map_grid(dataset, side_px)
        values = warp(dataset, [1], grid, Resampling.nearest)[0]
    return _Overlay(legend, Path(path).name, grid, encode_png(quantise(values, legend)))


def _facts(overlay: _Overlay) -> dict[str, Any]:
    legend, grid = overlay.legend, overlay.grid
    return {
        "label": legend.label,
        "query": legend.query,
        "quantity": legend.quantity,
        "low": legend.low,
        "high": legend.high,
        "model": legend.model,
        "file": overlay.file,
        "bounds_m": [grid.left, grid.bottom, grid.right, grid.top],
        "width": grid.width,
        "height": grid.height,
    }


def _max_zoom(grids: Sequence[Grid], extent: Grid) -> int:
    """Deepest zoom at which every warped map is still right to one screen pixel.

    Warping moves a cell's edge by up to half a pixel of the overlay. A raster whose own grid lies
    in Web Mercator is not warped, only its cells limit the zoom: to 64 screen pixels each.
    """
    equator_m = 2 * math.pi * 6378137 / 256
    deepest = min(math.log2(equator_m / g.pixel_m * (64 if g.exact else 2)) for g in grids)
    whole = math.log2(equator_m / max(extent.right - extent.left, extent.top - extent.bottom) * 512)
    return math.floor(min(22.0, max(deepest, whole)))


def _title(overlays: Sequence[_Overlay]) -> str:
    if len(overlays) == 1:
        return f"{overlays[0].legend.quantity.capitalize()} map"
    quantities = sorted({o.legend.quantity for o in overlays})
    return f"{len(overlays)} maps of {' and '.join(quantities)}"


def _records(observations: GeoDataFrame) -> dict[str, Any]:
    """Pack observations into columns; a very large table is thinned at random.

    Raises:
        ObservationsError: A column is missing.
    """
    for column in ("taxon", "longitude", "latitude"):
        if column not in observations:
            raise ObservationsError(
                f"the observations have no column {column!r}; read them with "
                "`speciesmap observations` first"
            )
    placed = np.isfinite(observations["longitude"].to_numpy(np.float64))
    placed &= np.isfinite(observations["latitude"].to_numpy(np.float64))
    table = observations[placed]
    total = len(table)
    if total > OBSERVATIONS:
        keep = np.random.default_rng(0).choice(total, OBSERVATIONS, replace=False)
        table = table.iloc[np.sort(keep)]
    lon_lat = table[["longitude", "latitude"]].to_numpy(np.float64).round(6)
    taxa, taxon = _coded(table, "taxon")
    sources, source = _coded(table, "source")
    observers, observer = _coded(table, "observer")
    licenses, license_code = _coded(table, "license")
    uncertainty: list[float | None] = [None] * len(table)
    if "uncertainty_m" in table:
        metres = table["uncertainty_m"].to_numpy(np.float64)
        uncertainty = [float(f"{m:.4g}") if math.isfinite(m) else None for m in metres]
    return {
        "total": total,
        "at": [_lat_first(float(x), float(y)) for x, y in lon_lat],
        "taxa": taxa,
        "taxon": taxon,
        "sources": sources,
        "source": source,
        "observers": observers,
        "observer": observer,
        "licenses": licenses,
        "license": license_code,
        "date": _dates(table),
        "uncertainty_m": uncertainty,
        "photos": _photos(table),
    }


def _coded(table: GeoDataFrame, column: str) -> tuple[list[str], list[int]]:
    """Write a column of repeated strings as its distinct values and their numbers."""
    if column not in table:
        return [""], [0] * len(table)
    values, codes = np.unique(_text(table, column), return_inverse=True)
    return [str(v) for v in values], [int(c) for c in codes]


def _text(table: GeoDataFrame, column: str) -> NDArray[np.str_]:
    return np.asarray(table[column].fillna("").astype(str), dtype=np.str_)


def _dates(table: GeoDataFrame) -> list[str]:
    if "date" not in table:
        return [""] * len(table)
    return ["" if str(d) == "NaT" else f"{d:%Y-%m-%d}" for d in table["date"]]


def _photos(table: GeoDataFrame) -> list[str]:
    """Addresses of photos whose licence is stated; files and other schemes are left out."""
    if "photo" not in table or "license" not in table:
        return [""] * len(table)
    pairs = zip(_text(table, "photo"), _text(table, "license"), strict=True)
    first = [(str(photos).split(" | ")[0].strip(), licence) for photos, licence in pairs]
    return [photo if photo.startswith("https://") and licence else "" for photo, licence in first]
