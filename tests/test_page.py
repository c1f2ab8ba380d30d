"""The page of scenes and the pictures of maps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odc.geo.geobox import GeoBox
from PIL import Image
from present_maps import CONTRAST, HOSTILE, chromium, visit, write_map
from rasterio.transform import from_origin

from speciesmap.errors import ImageryError, OutputError
from speciesmap.present.page import Scene, picture, write_index
from speciesmap.present.styles import STEPS, colour_table
from speciesmap.rasters.geotiff import write_geotiff

EQUATOR = from_origin(500000, 100000, 40, 40)


def imagery(path: Path) -> Path:
    pixels = np.zeros((3, 48, 60), np.uint8)
    pixels[0, :24], pixels[2, 24:] = 220, 220
    grid = GeoBox((48, 60), from_origin(500000, 100000, 20, 20), "EPSG:32631")
    return write_geotiff(path, pixels, grid, bands=["red", "green", "blue"])


def write_flat(path: Path, value: float, **words: Any) -> Path:
    """A map of one value with a hole in the north-west quarter, on the equator."""
    values = np.full((24, 30), value)
    values[:12, :15] = np.nan
    return write_map(path, values, crs="EPSG:32631", transform=EQUATOR, **words)


def panels(sheet: np.ndarray, side: int) -> list[np.ndarray]:
    """Cut the one-row sheet of `picture` into its panels."""
    high = round(side * 24 / 30)
    return [
        sheet[46 : 46 + high, x : x + side] for x in range(24, sheet.shape[1] - side, side + 20)
    ]


def test_picture_shows_imagery_and_maps_in_the_palette(tmp_path: Path) -> None:
    maps = [
        write_flat(tmp_path / f"{i}.tif", v, label=f"Map {i}") for i, v in enumerate((0.2, 0.9))
    ]
    out = picture(maps, imagery(tmp_path / "rgb.tif"), tmp_path / "p.png", side_px=300)
    sheet = np.asarray(Image.open(out).convert("RGB")).astype(int)
    seen = panels(sheet, 300)
    assert len(seen) == 3
    north, south = seen[0][60, 150], seen[0][180, 150]
    assert north[0] > 200 > 60 > north[2]
    assert south[2] > 200 > 60 > south[0]
    for panel, value in zip(seen[1:], (0.2, 0.9), strict=True):
        wanted = colour_table()[1 + round(value * STEPS), :3]
        assert np.abs(panel[180, 150] - wanted).max() <= 2
        hole = panel[60, 75]
        assert np.ptp(hole) <= 10
        assert np.abs(hole - wanted).max() > 30


def test_scale_bar_is_as_long_as_it_says(tmp_path: Path) -> None:
    out = picture([write_flat(tmp_path / "a.tif", 0.5)], None, tmp_path / "p.png", side_px=300)
    sheet = np.asarray(Image.open(out).convert("L"))
    below = sheet[46 + 240 + 4 :]
    longest = (below[:, :140] < 90).sum(axis=1).max()
    # 1,200 m are 300 pixels; the longest round length in a third of that is 200 m.
    assert longest == pytest.approx(200 / 1200 * 300, abs=3)


def test_pictures_wrap_into_rows(tmp_path: Path) -> None:
    maps = [write_flat(tmp_path / f"{i}.tif", 0.5, label=HOSTILE) for i in range(5)]
    six = Image.open(picture(maps, imagery(tmp_path / "i.tif"), tmp_path / "6.png", side_px=120))
    two = Image.open(picture(maps, None, tmp_path / "2.png", side_px=120, columns=2))
    assert six.width == 2 * 24 + 3 * 120 + 2 * 20
    assert two.width == 2 * 24 + 2 * 120 + 20
    assert two.height > six.height


def test_picture_refuses_bad_input(tmp_path: Path) -> None:
    out = tmp_path / "p.png"
    with pytest.raises(OutputError, match="no maps"):
        picture([], None, out)
    with pytest.raises(ImageryError, match=r"gone\.tif"):
        picture([tmp_path / "gone.tif"], None, out)
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        picture([write_flat(tmp_path / "a.tif", 0.5)], None, out)
    assert out.read_text() == "mine"


def scenes(folder: Path) -> list[Scene]:
    maps = [
        write_flat(folder / "a scene" / "a.tif", 0.2, label=HOSTILE),
        write_flat(folder / "a scene" / "b.tif", 0.9, query="photo"),
    ]
    return [
        Scene(
            title="First & <best>",
            text=HOSTILE,
            map=folder / "a scene" / "map #1.html",
            rasters=maps,
            imagery=imagery(folder / "a scene" / "rgb.tif"),
            figures=[("0.91", "AUC <held out>")],
            tables={
                "Scores of all methods on the same folds, on the encoder before it was tuned": [
                    {"species": HOSTILE, "AUC": 0.91234, "n": 1234},
                    {"species": "b", "AUC": float("nan"), "rank_by_rho": -0.5, "n": None},
                ],
                "Empty": [],
            },
            files={"The GeoTIFF": maps[0]},
        ),
        Scene(title="Second", text="Without maps.", map=folder / "other.html"),
    ]


def test_index_holds_everything_and_escapes_it(tmp_path: Path) -> None:
    out = write_index(tmp_path / "index.html", "Title </title>", scenes(tmp_path), text="a < b")
    text = out.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=x" not in text
    assert not re.search(r"(src|href)=['\"](https?:|//)", text)
    assert "Title &lt;/title&gt;" in text
    assert "First &amp; &lt;best&gt;" in text
    assert text.count("src='data:image/webp;base64,") == 3
    links = re.findall(r"href='([^']+)'", text)
    assert links == [
        "a%20scene/map%20%231.html",
        "a%20scene/map%20%231.html#0",
        "a%20scene/map%20%231.html#1",
        "a%20scene/map%20%231.html",
        "a%20scene/a.tif",
        "other.html",
    ]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    assert cells[1:] == ["0.912", "1,234", "&ndash;", "b", "&ndash;", "&ndash;", "&minus;0.500"]
    assert "rank by rho" in text
    assert "Empty" not in text


def test_index_is_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "index.html"
    out.write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        write_index(out, "t", [])
    write_index(out, "t", [], overwrite=True)
    assert "<h1>t</h1>" in out.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.mark.chromium
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 340)])
def test_index_reads_well_on_any_screen(
    browser: Any, tmp_path: Path, scheme: str, width: int
) -> None:
    html = write_index(tmp_path / "index.html", "Maps", scenes(tmp_path))
    with visit(browser, html, width, 700, color_scheme=scheme) as seen:
        page = seen.page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
        lowest = page.evaluate(CONTRAST)[0]
        assert lowest[0] >= 4.5, lowest
        assert HOSTILE in page.inner_text("main")
        box = page.locator("caption span").bounding_box()
        assert box["x"] + box["width"] <= width, "the caption is cut"
        assert page.evaluate("window.hacked") is None
        assert seen.outside == []
        assert seen.complaints == []
