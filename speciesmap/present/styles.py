"""What a map looks like: its words, its range, its colours, and the QGIS style that carries them.

The palette is defined here once; the QGIS style, the HTML map and the pictures all take it.
"""

from __future__ import annotations

import html
import math
import sqlite3
import struct
import xml.etree.ElementTree as ET
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rasterio.errors import RasterioError

from speciesmap.errors import ImageryError
from speciesmap.outputs import replacing
from speciesmap.rasters.imagery import open_raster

PALETTE: tuple[str, ...] = (
    "#440154",
    "#482475",
    "#414487",
    "#355f8d",
    "#2a788e",
    "#21918c",
    "#22a884",
    "#44bf70",
    "#7ad151",
    "#bddf26",
    "#fde725",
)
"""Viridis (van der Walt & Smith 2015, CC0) at every tenth of the range, low to high.

Perceptually uniform, readable in grey and with any common colour blindness. Between two breaks
the colour is interpolated linearly in sRGB, which is also what QGIS does.
"""

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
"""Descriptions of the twelve bands of a seasonal map."""

UNIT_QUANTITIES = ("suitability", "probability")
"""Quantities that live in [0, 1] by definition, whatever a raster happens to hold."""

DOCTYPE = "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
"""First line of QGIS's styles and projects."""

STEPS = 254
"""Intervals that the range is divided into where values are shown or stored as eight bits."""


@dataclass(frozen=True)
class Legend:
    """What a map says about itself.

    Attributes:
        label: What was mapped: a scientific name, or a query in words.
        query: How it was asked for: `taxon`, `photo` or `text`; empty when the file does not say.
        quantity: What the values are, for example `suitability`; `value` when unnamed.
        low: Value at the lower end of the colour scale.
        high: Value at the upper end of the colour scale.
        model: Fingerprint of the model that made it; may be empty.
        caution: Why it should not be relied on, from the tag CAUTION; mostly empty.
    """

    label: str
    query: str
    quantity: str
    low: float
    high: float
    model: str = ""
    caution: str = ""

    @property
    def breaks(self) -> list[float]:
        """Values at which the palette's colours stand, evenly over the range.

        >>> Legend("Quercus lobata", "taxon", "suitability", 0.0, 1.0).breaks[:3]
        [0.0, 0.1, 0.2]
        """
        return [float(v) for v in np.linspace(self.low, self.high, len(PALETTE))]


def read_legend(dataset: Any) -> Legend:
    """Read what an open map is: its tags, its band's name and its range.

    Suitability and probability always span 0 to 1, so that the colours of two maps compare.
    Any other quantity spans its own smallest and largest value, of all months where it has those.

    Args:
        dataset: Open rasterio dataset; band 1 is the map, or its first month. Bands that are
            months are named after them, so the quantity then stands in the tag QUANTITY.
    """
    tags = dataset.tags()
    months = seasonal(dataset)
    quantity = tags.get("QUANTITY") or (not months and dataset.descriptions[0]) or "value"
    quantity = quantity.strip().lower()
    low, high = 0.0, 1.0
    if quantity not in UNIT_QUANTITIES:
        ranges = [band_range(dataset, band) for band in (range(1, 13) if months else (1,))]
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        high = high if high > low else low + 1.0
    return Legend(
        label=tags.get("TAXON", "").strip() or Path(dataset.name).stem.replace("_", " "),
        query=tags.get("QUERY", "").strip().lower(),
        quantity=quantity,
        low=low,
        high=high,
        model=tags.get("MODEL", "").strip(),
        caution=tags.get("CAUTION", "").strip(),
    )


def seasonal(dataset: Any) -> bool:
    """Whether an open raster's first twelve bands are the months of a year, in order."""
    names = [(text or "").strip().lower() for text in dataset.descriptions[:12]]
    return names == [month.lower() for month in MONTHS]


def band_range(dataset: Any, band: int) -> tuple[float, float]:
    """Smallest and largest value of a band, from its statistics or a reduced reading.

    Raises:
        ImageryError: It cannot be read.
    """
    statistics = dataset.tags(band)
    try:
        low = float(statistics["STATISTICS_MINIMUM"])
        high = float(statistics["STATISTICS_MAXIMUM"])
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError
    except (KeyError, ValueError):
        reduce = max(1.0, max(dataset.shape) / 1024)
        shape = tuple(max(1, round(side / reduce)) for side in dataset.shape)
        try:
            pixels = dataset.read(band, out_shape=shape, masked=True).astype(np.float64)
        except (RasterioError, OSError) as error:
            raise ImageryError(
                f"{dataset.name} cannot be read ({error}); it is damaged or truncated: copy or "
                "make it again"
            ) from error
        values = pixels.filled(np.nan)
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    return low, high


def quantise(values: ArrayLike, low: float, high: float) -> NDArray[np.uint8]:
    """Turn values into eight bits: 0 where there is none, 1 to 255 from low to high.

    Args:
        values: Any shape; not finite means no value.
        low: Lower end of the range; values outside take its ends.
        high: Upper end.

    Returns:
        Same shape; `low + (q - 1) / 254 * (high - low)` undoes it to within 1/508 of the range.

    >>> quantise([0.0, 0.5, 1.0, float("nan")], 0.0, 1.0).tolist()
    [1, 128, 255, 0]
    """
    array = np.asarray(values, dtype=np.float64)
    valid = np.isfinite(array)
    share = (np.where(valid, array, low) - low) / (high - low)
    steps = np.rint(np.clip(share, 0.0, 1.0) * STEPS) + 1
    return np.where(valid, steps, 0).astype(np.uint8)


def colour_table() -> NDArray[np.uint8]:
    """Colours of `quantise`'s numbers.

    Returns:
        Red, green, blue and alpha, shape (256, 4); row 0 is transparent.
    """
    breaks = np.linspace(0.0, 1.0, len(PALETTE))
    anchors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in PALETTE])
    share = np.arange(STEPS + 1) / STEPS
    table = np.zeros((256, 4), dtype=np.uint8)
    for channel in range(3):
        table[1:, channel] = np.rint(np.interp(share, breaks, anchors[:, channel]))
    table[1:, 3] = 255
    return table


def encode_png(steps: NDArray[np.uint8]) -> bytes:
    """Write quantised values as a PNG in the palette's colours.

    The picture is also the data: its pixels are the numbers of `quantise`, stored as palette
    indices without row filters, so that a page can read values from the very file it shows.

    Args:
        steps: Shape (row, column).

    Returns:
        An eight-bit indexed PNG; index 0 is transparent.
    """
    height, width = steps.shape
    table = colour_table()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    unfiltered = np.zeros((height, width + 1), dtype=np.uint8)
    unfiltered[:, 1:] = steps
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", table[:, :3].tobytes()),
            chunk(b"tRNS", table[:, 3].tobytes()),
            chunk(b"IDAT", zlib.compress(unfiltered.tobytes(), 9)),
            chunk(b"IEND", b""),
        )
    )


def write_qml(tif: Path) -> Path:
    """Write the QGIS style of a map beside it, so that it opens in colour.

    QGIS loads `<stem>.qml` by itself. The style is single-band pseudocolour over band 1, with
    the palette's breaks labelled, no value transparent, and the legend's title from the tag TAXON
    and the band's name. An existing style is replaced: it belongs to the raster.

    Args:
        tif: A map GeoTIFF.

    Returns:
        Path of the style.

    Raises:
        ImageryError: The map cannot be opened.
    """
    with open_raster(tif) as dataset:
        legend = read_legend(dataset)
    out = tif.with_suffix(".qml")
    with replacing(out, overwrite=True) as beside:
        beside.write_text(_qml(style_elements(legend)), encoding="utf-8")
    return out


def _qml(elements: list[ET.Element]) -> str:
    root = ET.Element("qgis", version="3.22", styleCategories="AllStyleCategories")
    root.extend(elements)
    ET.indent(root)
    return f"{DOCTYPE}{ET.tostring(root, encoding='unicode')}\n"


def style_elements(legend: Legend) -> list[ET.Element]:
    """Build the parts of a QGIS style, which a project's layer holds too."""
    properties = ET.Element("customproperties")
    custom = ET.SubElement(properties, "Option", type="Map")
    title = f"{legend.label} ({legend.quantity})"
    words = {"identify/format": "Value", "legend/title-label": title}
    if legend.caution:
        words["userNotes"] = html.escape(legend.caution)  # QGIS marks the layer, notes are HTML
    for name, value in words.items():
        ET.SubElement(custom, "Option", type="QString", name=name, value=xml_text(value))
    pipe = ET.Element("pipe")
    renderer = ET.SubElement(
        pipe,
        "rasterrenderer",
        type="singlebandpseudocolor",
        band="1",
        opacity="1",
        alphaBand="-1",
        nodataColor="",
        classificationMin=repr(legend.low),
        classificationMax=repr(legend.high),
    )
    origin = ET.SubElement(renderer, "minMaxOrigin")
    ET.SubElement(origin, "limits").text = "None"
    ET.SubElement(origin, "extent").text = "WholeRaster"
    ramp = ET.SubElement(
        ET.SubElement(renderer, "rastershader"),
        "colorrampshader",
        colorRampType="INTERPOLATED",
        classificationMode="1",
        clip="0",
        labelPrecision="2",
        minimumValue=repr(legend.low),
        maximumValue=repr(legend.high),
    )
    for at, colour in zip(legend.breaks, PALETTE, strict=True):
        label = f"{at:.3g}" if abs(at) >= 1e-9 else "0"
        ET.SubElement(ramp, "item", value=f"{at:.12g}", color=colour, alpha="255", label=label)
    ET.SubElement(ramp, "rampLegendSettings", useContinuousLegend="0")
    blend = ET.Element("blendMode")
    blend.text = "0"
    return [properties, pipe, blend]


def style_ranges(path: Path) -> None:
    """Put the QGIS style of ranges into their GeoPackage, where QGIS looks for it.

    Its table `layer_styles` is that of QGIS's own "save style in database".

    Args:
        path: GeoPackage that `mapping.ranges.write_ranges` wrote.
    """
    columns = (
        "id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, f_table_catalog TEXT(256), "
        "f_table_schema TEXT(256), f_table_name TEXT(256), f_geometry_column TEXT(256), "
        "styleName TEXT(30), styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN, "
        "description TEXT, owner TEXT(30), ui TEXT(30), "
        "update_time DATETIME DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))"
    )
    style = _qml(range_elements(path))
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"CREATE TABLE layer_styles ({columns})")
        database.execute(
            "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, "
            "f_geometry_column, styleName, styleQML, useAsDefault) "
            "SELECT '', '', table_name, column_name, table_name, ?, 1 FROM gpkg_geometry_columns",
            [style],
        )
        database.execute(
            "INSERT INTO gpkg_contents (table_name, data_type, identifier) "
            "VALUES ('layer_styles', 'attributes', 'layer_styles')"
        )


def range_elements(path: Path) -> list[ET.Element]:
    """Build the parts of a QGIS style of ranges, which a project's layer holds too.

    Taxa are switched on and off by themselves, the first is on; each rule has a colour of the
    palette, through which the larger ranges and the map below are seen.
    """
    with closing(sqlite3.connect(path)) as database:
        found = database.execute(
            "SELECT taxon, rule FROM ranges GROUP BY taxon, rule ORDER BY min(fid)"
        ).fetchall()
    rules = list(dict.fromkeys(rule for _, rule in found))
    renderer = ET.Element("renderer-v2", type="RuleRenderer", symbollevels="0")
    root = ET.SubElement(renderer, "rules", key="root")
    symbols = ET.SubElement(renderer, "symbols")
    groups: dict[str, ET.Element] = {}
    for taxon, rule in found:
        if taxon not in groups:
            groups[taxon] = _rule(root, f"t{len(groups)}", "taxon", taxon)
            groups[taxon].set("checkstate", "0" if len(groups) > 1 else "1")
        number = str(len(symbols))
        _rule(groups[taxon], f"r{number}", "rule", rule).set("symbol", number)
        rank = (rules.index(rule) + 1) / (len(rules) + 1)
        red, green, blue = bytes.fromhex(PALETTE[int(rank * (len(PALETTE) - 1))][1:])
        symbol = ET.SubElement(symbols, "symbol", type="fill", name=number, alpha="1")
        layer = ET.SubElement(symbol, "layer", {"class": "SimpleFill", "enabled": "1"})
        options = ET.SubElement(layer, "Option", type="Map")
        for name, value in (
            ("color", f"{red},{green},{blue},90"),
            ("outline_color", f"{red},{green},{blue},255"),
            ("outline_style", "solid"),
            ("outline_width", "0.4"),
            ("outline_width_unit", "MM"),
            ("style", "solid"),
        ):
            ET.SubElement(options, "Option", type="QString", name=name, value=value)
    blend, kind = ET.Element("blendMode"), ET.Element("layerGeometryType")
    blend.text, kind.text = "0", "2"
    return [renderer, blend, kind]


def _rule(parent: ET.Element, key: str, column: str, value: str) -> ET.Element:
    """Add a rule for the rows that have a value, which an expression quotes as QGIS does."""
    quoted = value.replace("\\", "\\\\").replace("'", "''")
    found = xml_text(f"\"{column}\" = '{quoted}'")
    return ET.SubElement(parent, "rule", key=key, filter=found, label=xml_text(value))


def xml_text(text: str) -> str:
    """Drop the control characters that XML cannot hold."""
    return "".join(
        c for c in text if c in "\t\n\r" or (ord(c) >= 32 and not 0xD800 <= ord(c) < 0xE000)
    )
