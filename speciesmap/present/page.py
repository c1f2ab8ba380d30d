"""Pictures of maps beside their imagery, and the page that leads to the maps of a demo."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rasterio.enums import Resampling

from speciesmap.errors import OutputError
from speciesmap.outputs import refuse_existing, replacing
from speciesmap.present.styles import PALETTE, STEPS, Legend, colour_table, quantise, read_legend
from speciesmap.present.warp import Grid, longitude_latitude, open_map, read_picture, union, warp

PAPER, INK, EMPTY, DARK = (255, 255, 255), (22, 33, 27), (226, 232, 228), (11, 16, 14)


@dataclass(frozen=True)
class Scene:
    """One scene of the page.

    Attributes:
        title: Heading.
        text: What it is, in plain words.
        map: Its HTML map.
        rasters: Its map GeoTIFFs, in the order of the HTML map; their pictures are shown.
        imagery: What `open_imagery` takes, shown beside the maps.
        figures: What matters most, as short value and words: `("0.91", "AUC on held-out blocks")`.
        tables: Captions and their rows; a row maps column names to values.
        files: Names and paths of other results to link.
    """

    title: str
    text: str
    map: Path
    rasters: Sequence[Path] = ()
    imagery: Path | str | None = None
    figures: Sequence[tuple[str, str]] = ()
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class _Panels:
    """Imagery and maps on one grid, ready to be looked at."""

    grid: Grid
    imagery: Image.Image | None
    maps: list[tuple[Legend, Image.Image]]


def _panels(rasters: Sequence[Path], base: Path | str | None, side_px: int) -> _Panels:
    """Draw maps in the palette, over muted imagery where they have no value."""
    extent = union(rasters)
    pixel = max(extent.right - extent.left, extent.top - extent.bottom) / side_px
    shape = (
        max(1, round((extent.top - extent.bottom) / pixel)),
        max(1, round((extent.right - extent.left) / pixel)),
    )
    grid = Grid(extent.left, extent.bottom, extent.right, extent.top, shape[1], shape[0])
    ground = np.full((*shape, 3), EMPTY, np.uint8)
    imagery = None
    if base is not None:
        shown = _place(read_picture(base, extent, side_px), grid)
        ground = _over(shown, np.full((*shape, 3), DARK, np.uint8))
        imagery = Image.fromarray(ground)
        grey = ground @ np.array([0.299, 0.587, 0.114])
        ground = np.rint(0.5 * grey[..., None] + 0.5 * np.array(EMPTY)).astype(np.uint8)
    maps = []
    for path in rasters:
        with open_map(path) as dataset:
            legend = read_legend(dataset)
            values = warp(dataset, [1], grid, Resampling.nearest)[0]
        colours = colour_table()[quantise(values, legend.low, legend.high)]
        maps.append((legend, Image.fromarray(_over(colours, ground))))
    return _Panels(grid, imagery, maps)


def _place(picture: Any, grid: Grid) -> NDArray[np.uint8]:
    """Put imagery, which may show less than the maps, onto their grid."""
    canvas = Image.new("RGBA", (grid.width, grid.height))
    x = (grid.right - grid.left) / grid.width
    y = (grid.top - grid.bottom) / grid.height
    left, top = round((picture.grid.left - grid.left) / x), round((grid.top - picture.grid.top) / y)
    right = round((picture.grid.right - grid.left) / x)
    bottom = round((grid.top - picture.grid.bottom) / y)
    size = (max(1, right - left), max(1, bottom - top))
    image = Image.fromarray(picture.pixels).resize(size, Image.Resampling.LANCZOS)
    canvas.paste(image, (left, top))
    return np.asarray(canvas)


def _over(picture: NDArray[np.uint8], ground: NDArray[np.uint8]) -> NDArray[np.uint8]:
    alpha = picture[..., 3:].astype(np.float32) / 255
    return np.rint(picture[..., :3] * alpha + ground * (1 - alpha)).astype(np.uint8)


def picture(
    rasters: Sequence[Path],
    base: Path | str | None,
    out_png: Path,
    *,
    columns: int | None = None,
    side_px: int = 420,
    overwrite: bool = False,
) -> Path:
    """Draw imagery and maps side by side, with names, a scale bar and a colour bar.

    Args:
        rasters: Map GeoTIFFs.
        base: Imagery for the first panel; none is drawn without it.
        out_png: The picture.
        columns: Panels in a row; all in one row up to four, by default.
        side_px: Longer side of a panel.
        overwrite: Whether `out_png` may be replaced.

    Returns:
        `out_png`.

    Raises:
        ImageryError: A raster cannot be read or shown.
        OutputError: The picture exists, or there is nothing to draw.
    """
    refuse_existing(Path(out_png), overwrite)
    if not rasters:
        raise OutputError(f"no maps for {out_png}; name at least one GeoTIFF")
    panels = _panels(rasters, base, side_px)
    tiles = [(_caption(legend), legend.query == "taxon", image) for legend, image in panels.maps]
    if panels.imagery is not None:
        tiles.insert(0, ("Imagery", False, panels.imagery))
    columns = max(1, columns or (len(tiles) if len(tiles) <= 4 else math.ceil(len(tiles) / 2)))
    columns = min(columns, 4) if columns > 4 and len(tiles) > 8 else columns
    rows = math.ceil(len(tiles) / columns)
    gap, margin, head, foot = 20, 24, 34, 46
    wide, high = panels.grid.width, panels.grid.height
    size = (
        2 * margin + columns * wide + (columns - 1) * gap,
        margin + rows * (head + high + gap) + foot,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (text, scientific, image) in enumerate(tiles):
        x = margin + (i % columns) * (wide + gap)
        y = margin // 2 + (i // columns) * (head + high + gap)
        _write(sheet, (x, y + 4), _shorten(text, wide, 20), 20, scientific)
        sheet.paste(image, (x, y + head))
    y = margin // 2 + rows * (head + high + gap)
    _scale_bar(draw, panels.grid, margin, y)
    quantities = " and ".join(sorted({legend.quantity for legend, _ in panels.maps}))
    ranges = {(legend.low, legend.high) for legend, _ in panels.maps}
    ends = [_signed(v) for v in ranges.pop()] if len(ranges) == 1 else ["lowest", "highest"]
    bar = max(80, min(320, size[0] - 2 * margin - wide // 3 - 60))
    _colour_bar(draw, (size[0] - margin - bar, y), bar, quantities.capitalize(), *ends)
    with replacing(out_png, overwrite=overwrite) as beside:
        sheet.save(beside, "PNG", optimize=True)
    return Path(out_png)


def _signed(value: float) -> str:
    return f"{value:.3g}".replace("-", "\u2212")


def _caption(legend: Legend) -> str:
    asked = {"photo": " (by photos)", "text": " (in words)"}.get(legend.query, "")
    return legend.label + asked


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _shorten(text: str, width: int, size: int) -> str:
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _write(
    sheet: Image.Image, at: tuple[int, int], text: str, size: int, slanted: bool = False
) -> None:
    """Write a line; scientific names are slanted, for want of an italic font in Pillow."""
    font = _font(size)
    width, height = math.ceil(font.getlength(text)) + size, round(size * 1.5)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).text((size // 4, 0), text, font=font, fill=255)
    if slanted:
        shear = 0.2
        mask = mask.transform(
            mask.size, Image.Transform.AFFINE, (1, shear, -shear * height * 0.8, 0, 1, 0),
            Image.Resampling.BICUBIC,
        )  # fmt: skip
    sheet.paste(Image.new("RGB", mask.size, INK), (at[0] - size // 4, at[1]), mask)


def _scale_bar(draw: ImageDraw.ImageDraw, grid: Grid, x: int, y: int) -> None:
    """Draw a round length that fits in a third of a panel, true at its middle latitude."""
    _, latitude = longitude_latitude(grid.left, (grid.bottom + grid.top) / 2)
    ground_m = (grid.right - grid.left) / grid.width * math.cos(math.radians(latitude))
    longest = max(grid.width, 60) / 3 * ground_m
    power = 10.0 ** math.floor(math.log10(longest))
    length = max(step * power for step in (1, 2, 5) if step * power <= longest)
    pixels = round(length / ground_m)
    draw.line([(x, y + 4), (x, y + 12), (x + pixels, y + 12), (x + pixels, y + 4)], INK, 2)
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    draw.text((x, y + 20), text, INK, _font(16))


def _colour_bar(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, title: str, low: str, high: str
) -> None:
    x, y = at
    table = colour_table()
    for i in range(width):
        colour = table[1 + round(i / max(1, width - 1) * STEPS), :3]
        draw.line([(x + i, y + 4), (x + i, y + 16)], tuple(int(c) for c in colour))
    font = _font(16)
    draw.text((x, y + 20), low, INK, font)
    draw.text((x + width, y + 20), high, INK, font, anchor="ra")
    draw.text((x + width / 2, y + 20), title, INK, font, anchor="ma")


def write_index(
    out: Path,
    title: str,
    scenes: Sequence[Scene],
    *,
    text: str = "",
    overwrite: bool = False,
) -> Path:
    """Write a page that shows scenes and links their maps; it needs no network.

    Args:
        out: The HTML file; links are relative to its folder.
        title: Heading.
        scenes: In the order to show them.
        text: A paragraph below the heading.
        overwrite: Whether `out` may be replaced.

    Returns:
        `out`.

    Raises:
        ImageryError: A raster or the imagery of a scene cannot be read.
        OutputError: `out` exists.
    """
    refuse_existing(Path(out), overwrite)
    folder = Path(out).parent
    template = files("speciesmap.present").joinpath("index.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=html.escape(title),
        text=f"<p class='lead'>{html.escape(text)}</p>" if text else "",
        scenes="\n".join(_scene(scene, folder) for scene in scenes),
        ramp=", ".join(PALETTE),
    )
    with replacing(out, overwrite=overwrite) as beside:
        beside.write_text(page, encoding="utf-8")
    return Path(out)


def _scene(scene: Scene, folder: Path) -> str:
    link = _link(scene.map, folder)
    parts = [
        f"<section><div class='words'><h2>{html.escape(scene.title)}</h2>",
        f"<p>{html.escape(scene.text)}</p></div>",
    ]
    if scene.figures:
        figures = "".join(
            f"<div><dt>{html.escape(words)}</dt>"
            f"<dd>{html.escape(value).replace('-', '&minus;')}</dd></div>"
            for value, words in scene.figures
        )
        parts.append(f"<dl class='figures'>{figures}</dl>")
    if scene.rasters:
        parts.append(_gallery(scene, link))
    more = "".join(
        f"<a class='file' href='{_link(path, folder)}'>{html.escape(name)}</a>"
        for name, path in scene.files.items()
    )
    parts.append(f"<p class='links'><a class='open' href='{link}'>Open the map</a>{more}</p>")
    parts += [_table(caption, rows) for caption, rows in scene.tables.items() if rows]
    parts.append("</section>")
    return "\n".join(parts)


def _link(path: Path, folder: Path) -> str:
    return html.escape(quote(Path(os.path.relpath(path, folder)).as_posix()), quote=True)


def _gallery(scene: Scene, link: str) -> str:
    """Pictures of the imagery and of every map, each a link to that map."""
    panels = _panels(scene.rasters, scene.imagery, 560 if len(scene.rasters) < 4 else 380)
    cards = []
    if panels.imagery is not None:
        cards.append(_card(f"{link}", panels.imagery, "<span>Imagery</span>", "Imagery"))
    for i, (legend, image) in enumerate(panels.maps):
        tag = "i" if legend.query == "taxon" else "span"
        asked = {"photo": "by photos", "text": "in words"}.get(legend.query, "")
        words = f"<{tag}>{html.escape(legend.label)}</{tag}>"
        words += f" <small>{asked}</small>" if asked else ""
        alt = f"Map of {legend.quantity}: {legend.label} {asked}".strip()
        cards.append(_card(f"{link}#{i}", image, words, alt))
    legends = sorted({(lg.quantity, lg.low, lg.high) for lg, _ in panels.maps})
    scales = "".join(
        f"<p class='scale'><span>{html.escape(quantity.capitalize())}</span>"
        f"<span>{_signed(low)}</span><span class='ramp'></span><span>{_signed(high)}</span></p>"
        for quantity, low, high in legends
    )
    few = " few" if len(cards) <= 2 else ""
    return f"<div class='gallery{few}'>{''.join(cards)}</div>{scales}"


def _card(link: str, image: Image.Image, words: str, alt: str) -> str:
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=86, method=4)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f"<a class='card' href='{link}'><img src='data:image/webp;base64,{data}' "
        f"width='{image.width}' height='{image.height}' alt='{html.escape(alt, quote=True)}'>"
        f"<span class='name'>{words}</span></a>"
    )


def _table(caption: str, rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {
        n for n in names if all(isinstance(row.get(n), (int, float, type(None))) for row in rows)
    }
    kind = {n: " class='number'" if n in numeric else "" for n in names}
    head = "".join(
        f"<th scope='col'{kind[n]}>{html.escape(n.replace('_', ' '))}</th>" for n in names
    )
    body = "".join(
        "<tr>" + "".join(f"<td{kind[n]}>{_cell(row.get(n))}</td>" for n in names) + "</tr>"
        for row in rows
    )
    return (
        f"<div class='table' tabindex='0'><table>"
        f"<caption><span>{html.escape(caption)}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}".replace("-", "&minus;")
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))
