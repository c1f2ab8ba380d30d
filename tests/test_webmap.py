"""The HTML map: one file that works anywhere, in place, and shows data as text."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import pytest
import rasterio
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from PIL import Image
from present_maps import CONTRAST, HOSTILE, UTM, chromium, ramp, visit, write_bands, write_map
from rasterio.transform import Affine, from_origin

from speciesmap.cli.map import command
from speciesmap.errors import ImageryError, ObservationsError, OutputError
from speciesmap.present import markers, webmap
from speciesmap.present.markers import photo_origins
from speciesmap.present.styles import MONTHS, STEPS, colour_table
from speciesmap.present.warp import longitude_latitude, mercator
from speciesmap.present.webmap import make_map, script_json
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import Imagery, open_imagery

MERCATOR = from_origin(-13630000, 4540000, 500, 500)


def facts(html: Path) -> Any:
    text = html.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="sm-data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def pngs(html: Path) -> list[np.ndarray]:
    """The quantised values that the page holds, map by map."""
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", maps_part(html))
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def maps_part(html: Path) -> str:
    text = html.read_text(encoding="utf-8")
    return text[text.index("var image_overlay_map_0") :]


def records(count: int = 6, **columns: Any) -> gpd.GeoDataFrame:
    """Observations on the UTM test map."""
    rng = np.random.default_rng(0)
    to_degrees = pyproj.Transformer.from_crs(32610, 4326, always_xy=True)
    lon, lat = to_degrees.transform(
        560000 + rng.uniform(400, 1100, count), 4150000 - rng.uniform(300, 900, count)
    )
    table = {
        "taxon": ["Quercus agrifolia"] * count,
        "longitude": lon,
        "latitude": lat,
        "date": pd.to_datetime(["2019-05-04"] * (count - 1) + [None]),
        "uncertainty_m": [12.0] * count,
        "observer": ["somebody"] * count,
        "license": ["CC0"] * count,
        "photo": [""] * count,
        "source": ["a survey"] * count,
    } | columns
    return gpd.GeoDataFrame(table, geometry=gpd.points_from_xy(lon, lat), crs=4326)


FINE = from_origin(560000, 4150000, 20, 20)


def imagery(path: Path, *, transform: Affine = FINE, shape: tuple[int, int] = (48, 60)) -> Path:
    pixels = np.zeros((3, *shape), np.uint8)
    pixels[0], pixels[1], pixels[2] = 200, 90, 40
    pixels[:, : shape[0] // 2] //= 4
    grid = GeoBox(shape, transform, "EPSG:32610")
    return write_geotiff(path, pixels, grid, bands=["red", "green", "blue"])


# ---- without a browser


def test_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    html = make_map(
        [write_map(tmp_path / "a.tif", ramp())],
        tmp_path / "map.html",
        observations=records(),
        base=imagery(tmp_path / "rgb.tif"),
    )
    text = html.read_text(encoding="utf-8")
    assert not re.search(r"<(script|img|iframe)[^>]+src=[\"']?(?!data:)", text)
    assert "<link" not in text
    assert text.count("data:image/webp;base64,") == 1
    assert html.stat().st_size < 600_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "map.html", "rgb.tif"]


def test_same_input_gives_the_same_page(tmp_path: Path) -> None:
    path = write_map(tmp_path / "a.tif", ramp())
    first = make_map([path], tmp_path / "1.html", observations=records(30)).read_bytes()
    assert make_map([path], tmp_path / "2.html", observations=records(30)).read_bytes() == first


def test_map_in_web_mercator_keeps_its_cells_and_corners(tmp_path: Path) -> None:
    values = ramp()
    path = write_map(tmp_path / "a.tif", values, crs="EPSG:3857", transform=MERCATOR)
    html = make_map([path], tmp_path / "map.html")
    layer = facts(html)["layers"][0]
    assert layer["bounds_m"] == [-13630000, 4540000 - 500 * 24, -13630000 + 500 * 30, 4540000]
    [steps] = pngs(html)
    assert steps.shape == values.shape
    assert np.array_equal(steps == 0, np.isnan(values))
    hole = np.isnan(values)
    assert np.allclose((steps[~hole] - 1.0) / STEPS, values[~hole], atol=0.51 / STEPS)
    corners = re.search(r"L\.imageOverlay\(\s*\"[^\"]+\",\s*(\[\[.*?\]\])", maps_part(html))
    assert corners
    (south, west), (north, east) = json.loads(corners[1])
    to_degrees = pyproj.Transformer.from_crs(3857, 4326, always_xy=True)
    assert (west, south) == pytest.approx(to_degrees.transform(*layer["bounds_m"][:2]), abs=1e-7)
    assert (east, north) == pytest.approx(to_degrees.transform(*layer["bounds_m"][2:]), abs=1e-7)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32610", UTM),
        ("EPSG:4326", from_origin(-122.5, 38, 0.01, 0.004)),
        ("EPSG:3031", from_origin(1200000, 1500000, 20000, 20000)),
        ("EPSG:32633", Affine(81.6, 38, 500000, 38, -81.6, 7600000)),
    ],
    ids=["utm", "degrees", "antarctic", "rotated"],
)  # fmt: skip
def test_every_place_reads_its_own_cell(tmp_path: Path, crs: str, transform: Affine) -> None:
    rng = np.random.default_rng(3)
    values = rng.random((20, 26)).astype(np.float32)
    html = make_map(
        [write_map(tmp_path / "a.tif", values, crs=crs, transform=transform)],
        tmp_path / "map.html",
    )
    layer, [steps] = facts(html)["layers"][0], pngs(html)
    left, bottom, right, top = layer["bounds_m"]
    rows, cols = rng.uniform(-2, 22, 3000), rng.uniform(-2, 28, 3000)
    x = transform.a * cols + transform.b * rows + transform.c
    y = transform.d * cols + transform.e * rows + transform.f
    there = pyproj.Transformer.from_crs(crs, 3857, always_xy=True).transform(x, y)
    at_col = (there[0] - left) / (right - left) * steps.shape[1]
    at_row = (top - there[1]) / (top - bottom) * steps.shape[0]
    # A pixel of the page may straddle the edge of a cell; leave those out.
    near = 0.06 if crs == "EPSG:32610" else 0.12
    sure = (np.abs(rows - np.rint(rows)) > near) & (np.abs(cols - np.rint(cols)) > near)
    outside = (at_col < 0) | (at_row < 0) | (at_col >= steps.shape[1]) | (at_row >= steps.shape[0])
    read = np.zeros(3000)
    read[~outside] = steps[at_row[~outside].astype(int), at_col[~outside].astype(int)]
    inside = (rows >= 0) & (cols >= 0) & (rows < 20) & (cols < 26)
    assert (read[~inside & sure] == 0).all()
    wanted = 1 + np.rint(values[rows[inside].astype(int), cols[inside].astype(int)] * STEPS)
    assert (read[inside & sure] == wanted[sure[inside]]).mean() > (0.999 if near < 0.1 else 0.97)


def test_large_map_is_averaged_not_sampled(tmp_path: Path) -> None:
    values = np.tile([[0.0, 1.0], [1.0, 0.0]], (40, 2100)).astype(np.float32)
    path = write_map(tmp_path / "a.tif", values, crs="EPSG:3857", transform=MERCATOR)
    html = make_map([path], tmp_path / "map.html")
    [steps] = pngs(html)
    assert steps.shape[1] == 2048
    assert abs((steps.mean() - 1) / STEPS - 0.5) < 0.02
    assert html.stat().st_size < 1e6


def test_maps_are_coarsened_until_the_page_is_small_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).random((600, 600))
    paths = [write_map(tmp_path / f"{i}.tif", noise, label=f"Map {i}") for i in range(3)]
    monkeypatch.setattr(webmap, "PAGE_BYTES", 1_000_000)
    html = make_map(paths, tmp_path / "map.html")
    assert html.stat().st_size < 1_000_000
    assert all(min(steps.shape) > 200 for steps in pngs(html))
    monkeypatch.setattr(webmap, "PAGE_BYTES", 465_000)
    with pytest.raises(OutputError, match="fewer maps"):
        make_map(paths, tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


@given(st.dictionaries(st.text(max_size=40), st.text(max_size=80), max_size=4))
def test_script_json_cannot_leave_its_element(value: dict[str, str]) -> None:
    text = script_json(value)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value


def test_names_never_become_markup(tmp_path: Path) -> None:
    html = make_map(
        [write_map(tmp_path / "a&<b>.tif", ramp(), label=HOSTILE)],
        tmp_path / "map.html",
        observations=records(taxon=[HOSTILE] * 6, source=[HOSTILE] * 6, observer=[HOSTILE] * 6),
        title=HOSTILE,
    )
    text = html.read_text(encoding="utf-8")
    assert "window.hacked=1</script" not in text
    assert "<img src=x" not in text
    assert facts(html)["layers"][0]["label"] == HOSTILE
    assert facts(html)["observations"]["taxa"] == [HOSTILE]


def test_photos_are_linked_only_with_licence_and_https(tmp_path: Path) -> None:
    table = records(
        photo=["https://a/1.jpg | https://a/2.jpg", "javascript:alert(1)", "http://a/2.jpg",
               "local.jpg", "https://a/3.jpg", ""],
        license=["CC-BY", "CC0", "CC0", "CC0", "", "CC0"],
    )  # fmt: skip
    html = make_map(
        [write_map(tmp_path / "a.tif", ramp())], tmp_path / "m.html", observations=table
    )
    assert facts(html)["observations"]["photos"] == ["https://a/1.jpg", "", "", "", "", ""]


@pytest.mark.parametrize(
    ("licence", "open_"),
    [
        ("CC-BY-NC", True),
        ("CC_BY_4_0", True),
        ("cc0", True),
        ("http://creativecommons.org/licenses/by/4.0/legalcode", True),
        ("Public Domain", True),
        ("all rights reserved", False),
        ("\u00a9 somebody, accept no copies", False),
        ("", False),
    ],
)
def test_only_open_licences_show_a_photo(tmp_path: Path, licence: str, open_: bool) -> None:
    table = records(1, photo=["https://a/1.jpg"], license=[licence])
    html = make_map(
        [write_map(tmp_path / "a.tif", ramp())], tmp_path / "m.html", observations=table
    )
    assert bool(facts(html)["observations"]["photos"][0]) == open_


def test_thumbnails_come_from_the_folder_and_from_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    photo = Image.fromarray(np.full((700, 500, 3), (10, 200, 30), np.uint8))
    photo.getexif()[274] = 6  # taken with the camera on its side
    for path in (folder / "in.jpg", folder / "closed.jpg", tmp_path / "out.jpg"):
        photo.save(path, exif=photo.getexif())
    (folder / "no.jpg").write_text("no photo")
    (folder / "link.jpg").symlink_to(tmp_path / "out.jpg")
    table = records(
        9,
        photo=["in.jpg", "../out.jpg", str(tmp_path / "out.jpg"), "closed.jpg", "no.jpg",
               "link.jpg", "gone.jpg", "a" * 5000, "in\0.jpg"],
        license=["CC-BY"] * 3 + ["all rights reserved"] + ["CC-BY"] * 5,
    )  # fmt: skip
    html = make_map(
        [write_map(tmp_path / "a.tif", ramp())],
        tmp_path / "m.html",
        observations=table,
        photos=folder,
    )
    thumbnails = facts(html)["observations"]["thumbnails"]
    assert list(thumbnails) == ["0"]
    data = base64.b64decode(thumbnails["0"].partition(",")[2])
    small = Image.open(io.BytesIO(data))
    assert small.size == (200, 143)
    assert small.convert("RGB").getpixel((90, 70))[1] > 150  # type: ignore[index]


@given(st.lists(st.text(max_size=30), max_size=20), st.text(max_size=20))
def test_no_address_of_a_photo_changes_the_policy(tails: list[str], host: str) -> None:
    photos = ["https://photos.example.org/1.jpg", *("https://" + t for t in tails), host]
    for origin in photo_origins(photos):
        assert re.fullmatch(r"https?://[A-Za-z0-9.:-]+", origin)


def test_very_many_observations_are_thinned_and_counted(tmp_path: Path) -> None:
    table = records(25_000, latitude=np.r_[np.nan, np.linspace(37, 38, 24_999)])
    html = make_map(
        [write_map(tmp_path / "a.tif", ramp())], tmp_path / "m.html", observations=table
    )
    seen = facts(html)["observations"]
    assert seen["total"] == 24_999
    assert len(seen["at"]) == len(seen["date"]) == markers.OBSERVATIONS


@pytest.mark.parametrize("column", ["taxon", "latitude"])
def test_observations_without_a_column_are_refused(tmp_path: Path, column: str) -> None:
    table = records().drop(columns=column)
    with pytest.raises(ObservationsError, match=column):
        make_map([write_map(tmp_path / "a.tif", ramp())], tmp_path / "m.html", observations=table)


def test_imagery_of_many_files_looks_like_one_file(tmp_path: Path) -> None:
    path = write_map(tmp_path / "a.tif", ramp())
    whole = imagery(tmp_path / "whole.tif")
    folder = tmp_path / "tiles"
    with rasterio.open(whole) as source:
        pixels = source.read()
    for i, start in enumerate((0, 30)):
        grid = GeoBox((48, 30), FINE * Affine.translation(start, 0), "EPSG:32610")
        part = pixels[:, :, start : start + 30]
        write_geotiff(folder / f"{i}.tif", part, grid, bands=["red", "green", "blue"])

    def picture(base: Path | Imagery) -> np.ndarray:
        html = make_map([path], tmp_path / "m.html", base=base, overwrite=True)
        found = re.search(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", html.read_text())
        assert found
        image = Image.open(io.BytesIO(base64.b64decode(found[1])))
        return np.asarray(image.convert("RGBA").resize((50, 40))).astype(float)

    difference = np.abs(picture(whole) - picture(folder))[3:-3, 3:-3]
    assert difference.mean() < 3
    of_a_model = open_imagery(folder).select(["green", "red"])
    assert (picture(of_a_model) == picture(folder)).all(), "in the colours of the files"
    assert picture(whole)[30, 20, 0] > picture(whole)[30, 20, 2] + 60


def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    good, out = write_map(tmp_path / "good.tif", ramp()), tmp_path / "m.html"
    with rasterio.open(
        tmp_path / "nowhere.tif", "w", driver="GTiff", width=4, height=4, count=1, dtype="float32"
    ) as dataset:
        dataset.write(np.zeros((1, 4, 4), np.float32))
    with pytest.raises(ImageryError, match=r"nowhere\.tif.*coordinate reference system"):
        make_map([good, tmp_path / "nowhere.tif"], out)
    with pytest.raises(ImageryError, match=r"gone\.tif"):
        make_map([tmp_path / "gone.tif"], out)
    with pytest.raises(OutputError, match="no maps"):
        make_map([], out)
    elsewhere = imagery(tmp_path / "far.tif", transform=from_origin(300000, 5000000, 40, 40))
    with pytest.raises(ImageryError, match=r"far\.tif shows nothing"):
        make_map([good], out, base=elsewhere)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        make_map([good], out)
    assert out.read_text() == "mine"


def test_truncated_map_is_named(tmp_path: Path) -> None:
    path = write_map(tmp_path / "a.tif", np.random.default_rng(0).random((600, 600)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageryError, match=r"a\.tif"):
        make_map([path], tmp_path / "m.html")


@given(st.floats(-179.9, 179.9), st.floats(-85, 85))
def test_mercator_agrees_with_proj(longitude: float, latitude: float) -> None:
    x, y = mercator(longitude, latitude)
    assert longitude_latitude(x, y) == pytest.approx((longitude, latitude), abs=1e-9)
    proj = pyproj.Transformer.from_crs(4326, 3857, always_xy=True).transform(longitude, latitude)
    assert (x, y) == pytest.approx(proj, abs=1e-4)


def test_command_prints_the_path(tmp_path: Path) -> None:
    write_map(tmp_path / "a.tif", ramp())
    records().drop(columns="geometry").to_csv(tmp_path / "records.csv", index=False)
    out = tmp_path / "m.html"
    result = CliRunner().invoke(
        command,
        [str(tmp_path / "a.tif"), "--out", str(out), "-q", "--title", "Oaks",
         "--observations", str(tmp_path / "records.csv"),
         "--imagery", str(imagery(tmp_path / "i.tif"))],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.stdout.strip() == str(out)
    assert facts(out)["title"] == "Oaks"
    assert facts(out)["observations"]["total"] == 6


def test_maps_across_the_180th_meridian_lie_in_one_piece(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((24, 30))
    degrees_grid = from_origin(178, -16, 0.15, 0.15)
    maps = [
        write_map(tmp_path / "degrees.tif", values, crs="EPSG:4326", transform=degrees_grid),
        write_map(tmp_path / "utm.tif", values, crs="EPSG:32760",
                  transform=from_origin(800000, 8000000, 3000, 3000)),
        write_map(tmp_path / "beyond.tif", values, crs="EPSG:4326",
                  transform=from_origin(-178.5, -16, 0.02, 0.02)),
    ]  # fmt: skip
    table = records(2, longitude=[-179.5, 179.0], latitude=[-17.0, -17.0])
    html = make_map(maps, tmp_path / "m.html", observations=table)
    seen = facts(html)
    assert [at[1] for at in seen["observations"]["at"]] == [180.5, 179.0]
    assert seen["extent"][0][1] == pytest.approx(178)
    half = np.pi * 6378137
    for layer, steps, path in zip(seen["layers"], pngs(html), maps, strict=True):
        left, bottom, right, top = layer["bounds_m"]
        assert right - left < half / 20
        assert left > 0.98 * half
        with rasterio.open(path) as dataset:
            transform, crs = dataset.transform, dataset.crs
        rows, cols = np.mgrid[0:24, 0:30] + 0.5
        lon, lat = pyproj.Transformer.from_crs(crs, 4326, always_xy=True).transform(
            transform.a * cols + transform.c, transform.e * rows + transform.f
        )
        x = 6378137 * np.radians(lon % 360)
        y = np.vectorize(mercator)(lon, lat)[1]
        at_col = ((x - left) / (right - left) * steps.shape[1]).astype(int)
        at_row = ((top - y) / (top - bottom) * steps.shape[0]).astype(int)
        assert np.array_equal(steps[at_row, at_col], 1 + np.rint(values * STEPS))


@pytest.mark.chromium
def test_click_beyond_the_180th_meridian_reads_there(browser: Any, tmp_path: Path) -> None:
    grid = from_origin(178, -16, 0.15, 0.15)
    path = write_map(tmp_path / "a.tif", np.full((24, 30), 0.5), crs="EPSG:4326", transform=grid)
    with visit(browser, make_map([path], tmp_path / "m.html")) as seen:
        page = seen.page
        place = "(() => { const m = speciesmap.map, p = m.latLngToContainerPoint([-17, 181]);"
        x, y = page.evaluate(place + " return [p.x, p.y]; })()")
        page.mouse.click(x, y)
        page.wait_for_selector(".sm-values:not([aria-busy])")
        assert "0.50" in page.inner_text(".sm-values")
        assert "179.0" in page.inner_text(".sm-place")
        assert "W" in page.inner_text(".sm-place")
        assert page.evaluate(place + " return [p.x, p.y]; })()") == [x, y], "the map stayed"
        pin = page.locator(".sm-pin").bounding_box()
        assert abs(pin["x"] + pin["width"] / 2 - x) < 2
        assert seen.complaints == []


def year(values: np.ndarray) -> dict[str, np.ndarray]:
    """A map that is highest in June."""
    swing = 0.5 - 0.5 * np.cos((np.arange(12) + 1) / 12 * 2 * np.pi)
    return {month: values * share for month, share in zip(MONTHS, swing, strict=True)}


def test_page_holds_all_months_on_one_scale(tmp_path: Path) -> None:
    path = write_bands(tmp_path / "a.tif", year(np.full((24, 30), 40.0)), QUANTITY="abundance")
    layer = facts(make_map([path], tmp_path / "m.html"))["layers"][0]
    assert len(layer["months"]) == 11
    assert (layer["quantity"], layer["low"]) == ("abundance", 0)
    assert layer["high"] == pytest.approx(40, abs=0.1)


# ---- in Chromium, without a network


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three maps, of two quantities, with observations and imagery."""
    folder = tmp_path_factory.mktemp("scene")
    west = np.where(np.arange(30) < 15, 0.9, 0.1) * np.ones((24, 1))
    maps = [
        write_map(folder / "a.tif", ramp()),
        write_map(folder / "b.tif", west, label="Betula nana", quantity="probability"),
        write_map(folder / "c.tif", np.full((24, 30), 0.5), label=HOSTILE, query="text"),
    ]
    taxa = ["Quercus agrifolia"] * 9 + ["betula nana"] * 3
    return make_map(
        maps,
        folder / "map.html",
        observations=records(12, taxon=taxa, source=[HOSTILE] * 12),
        base=imagery(folder / "rgb.tif"),
        title="Three maps",
    )


def shot(page: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)


def degrees(row: float, col: float) -> list[float]:
    """Latitude and longitude of a place of the UTM test maps."""
    to_degrees = pyproj.Transformer.from_crs(32610, 4326, always_xy=True)
    lon, lat = to_degrees.transform(560000 + 40 * col, 4150000 - 40 * row)
    return [lat, lon]


def screen(page: Any, row: float, col: float) -> tuple[float, float]:
    """Where on the screen a place of the test maps lies, by Leaflet's own reckoning."""
    point = page.evaluate(
        "(at) => { const m = speciesmap.map, p = m.project(at).subtract(m.getPixelOrigin())"
        ".add(m._getMapPanePos()); return [p.x, p.y]; }",
        degrees(row, col),
    )
    return point[0], point[1]


def colour(value: float) -> np.ndarray:
    return colour_table()[1 + round(value * STEPS), :3].astype(int)


def read_at(page: Any, row: float, col: float) -> dict[str, str]:
    """Click a place and read the popup: values by name."""
    page.evaluate("speciesmap.map.closePopup()")
    page.wait_for_selector(".leaflet-popup", state="detached")
    page.mouse.click(*screen(page, row, col))
    page.wait_for_selector(".sm-values:not([aria-busy])")
    return {
        item.query_selector(".sm-label").inner_text().split("\n")[0]: item.query_selector(
            "b"
        ).inner_text()
        for item in page.query_selector_all(".sm-value")
    }


def bare(page: Any) -> None:
    """Show nothing but the map, opaque."""
    page.select_option("#sm-base", "off")
    page.uncheck("#sm-observations")
    page.evaluate(
        "() => { const o = document.getElementById('sm-opacity'); o.value = 100;"
        " o.dispatchEvent(new Event('input')); }"
    )
    page.wait_for_timeout(150)


@pytest.mark.chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_opens_without_network_or_complaint(browser: Any, scene: Path, scheme: str) -> None:
    with visit(browser, scene, color_scheme=scheme) as seen:
        page = seen.page
        assert page.title() == "Three maps"
        assert page.inner_text("#sm-name") == "Quercus agrifolia"
        assert page.inner_text("#sm-quantity") == "Suitability"
        assert page.inner_text("#sm-range") == "0 to 1"
        page.wait_for_timeout(150)
        assert seen.outside == []
        assert seen.complaints == []
        measured = page.evaluate(CONTRAST)
        assert measured[0][0] >= 4.5, measured[0]
        assert "Find one of 3 maps" in [text for _, text in measured]


@pytest.mark.chromium
def test_map_is_in_place_at_every_zoom(browser: Any, tmp_path: Path) -> None:
    values = np.full((24, 30), 0.9)
    html = make_map([write_map(tmp_path / "a.tif", values)], tmp_path / "m.html")
    with visit(browser, html) as seen:
        page = seen.page
        page.click("#sm-toggle")
        page.evaluate("speciesmap.layers[0].overlay.setOpacity(1)")
        zooms = page.evaluate("[speciesmap.map.getZoom(), speciesmap.map.getMaxZoom()]")
        checked = 0
        for zoom in np.linspace(zooms[0] - 1.5, zooms[1], 5).round(2):
            for row, col, down, right in (
                (0, 0, 1, 1),
                (0, 30, 1, -1),
                (24, 0, -1, 1),
                (24, 30, -1, -1),
            ):
                page.evaluate(
                    "([at, z]) => speciesmap.map.setView(at, z, { animate: false })",
                    [degrees(row, col), float(zoom)],
                )
                page.wait_for_timeout(60)
                image = shot(page)[..., 2]
                px, py = screen(page, row, col)
                # Count how far the map's colour reaches along lines five pixels inside; blended
                # pixels count in part. The sides slant by half a degree.
                ground, full = image[round(py - 9 * down), round(px - 9 * right)], colour(0.9)[2]
                across = image[round(py + 5 * down), round(px) - 8 : round(px) + 8]
                along = image[round(py) - 8 : round(py) + 8, round(px + 5 * right)]
                for line, at, way in ((across, px, right), (along, py, down)):
                    reach = ((line - ground) / (full - ground)).sum()
                    edge = round(at) + 8 - reach if way > 0 else round(at) - 8 + reach
                    assert abs(edge - at) <= 1.0 + 0.05, (zoom, row, col)
                checked += 1
        assert checked == 20


@pytest.mark.chromium
def test_click_reads_the_values_of_every_map_there(browser: Any, scene: Path) -> None:
    values = ramp()
    with visit(browser, scene) as seen:
        page = seen.page
        bare(page)
        for row, col in ((10.5, 14.5), (20.4, 27.6), (6.5, 17.5)):
            read = read_at(page, row, col)
            assert read["Quercus agrifolia"] == f"{values[int(row), int(col)]:.2f}"
            assert read["Betula nana"] == ("0.90" if col < 15 else "0.10")
            assert read[HOSTILE] == "0.50"
        assert read_at(page, 1.5, 2.5)["Quercus agrifolia"] == "no value"
        assert read_at(page, 12, 31) == {}
        assert "No map has a value here." in page.inner_text(".sm-values")
        page.keyboard.press("Escape")
        page.wait_for_selector(".sm-read", state="detached")
        assert page.evaluate("window.hacked") is None
        assert seen.complaints == []


@pytest.mark.chromium
def test_click_on_observations_reads_the_values_there_too(browser: Any, tmp_path: Path) -> None:
    values = ramp()
    lat_lon = np.array([degrees(12.5, 14.5)] * 3 + [degrees(12.5, 17.5), degrees(23.5, 29.5)])
    maps = [write_map(tmp_path / f"{k}.tif", values / k, label=f"map {k}") for k in (1, 2)]
    html = make_map(
        maps,
        tmp_path / "m.html",
        observations=records(5, latitude=lat_lon[:, 0], longitude=lat_lon[:, 1]),
    )
    with visit(browser, html) as seen:
        page = seen.page
        zoom = page.evaluate("speciesmap.map.getMaxZoom()") - 2
        page.evaluate("(z) => speciesmap.map.setZoom(z, { animate: false })", zoom)
        page.wait_for_selector(".sm-cluster:text-is('4')")
        for where in ((12.5, 14.5), (23.5, 29.5)):
            read = read_at(page, *where)
            row, col = (int(v) for v in where)
            page.evaluate("speciesmap.show(1)")
            assert list(read_at(page, *where)) == ["map 2", "map 1"], "the map shown comes first"
            page.evaluate("speciesmap.show(0)")
            for k in (1, 2):
                wanted = pytest.approx(values[row, col] / k, abs=0.5 / STEPS + 0.005)
                assert float(read[f"map {k}"]) == wanted
        assert page.locator(".sm-record").count() == 1, "the lone record is told as well"
        read_at(page, 12.5, 14.5)
        assert page.evaluate("speciesmap.map.getZoom()") == zoom
        page.click("text=Show these 4 observations")
        page.wait_for_selector(".sm-cluster:text-is('3')")
        assert page.evaluate("speciesmap.map.getZoom()") > zoom
        page.evaluate("(at) => speciesmap.map.setView(at, speciesmap.map.getMaxZoom(),"
                      " { animate: false })", degrees(12.5, 14.5))  # fmt: skip
        read_at(page, 12.5, 14.5)
        page.click("text=Show these 3 observations")
        page.wait_for_selector(".sm-dot >> nth=2")
        assert seen.complaints == []


@pytest.mark.chromium
def test_every_edge_and_corner_of_a_map_is_read(browser: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(1).random((24, 30)).astype(np.float32)
    html = make_map([write_map(tmp_path / "a.tif", values)], tmp_path / "m.html")
    with visit(browser, html, 900, 460) as seen:
        for row in (0, 9, 23):
            for col in (0, 14, 29):
                seen.page.evaluate("speciesmap.fit()")
                read = read_at(seen.page, row + 0.5, col + 0.5)
                value = float(read["Quercus agrifolia"])
                assert value == pytest.approx(values[row, col], abs=0.5 / STEPS + 0.005)
        for height in range(400, 560, 20):
            seen.page.set_viewport_size({"width": 900, "height": height})
            seen.page.evaluate("speciesmap.fit()")
            hit = "([x, y]) => document.elementFromPoint(x, y).className"
            at = seen.page.evaluate(hit, screen(seen.page, 23.5, 29.5))
            assert "folium-map" in at, f"{at} lies over the corner in a window of {height} px"
        assert seen.complaints == []


@pytest.mark.chromium
def test_maps_of_one_name_are_told_apart(browser: Any, tmp_path: Path) -> None:
    name = "Quercus agrifolia"
    maps = [
        write_map(tmp_path / "a" / "q.tif", ramp()),
        write_map(tmp_path / "photo_q.tif", ramp(), query="photo"),
        write_map(tmp_path / "b" / "q.tif", ramp()),
        write_map(tmp_path / "p.tif", ramp(), quantity="probability"),
        *(write_map(tmp_path / f"{i}.tif", ramp(), label=f"Alnus {i}") for i in range(6)),
    ]
    with visit(browser, make_map(maps, tmp_path / "m.html")) as seen:
        page = seen.page
        told = [
            "as learned, suitability, a/q.tif",
            "by photos",
            "as learned, suitability, b/q.tif",
            "as learned, probability",
        ]
        offered = page.locator("#sm-compare option").all_inner_texts()
        assert [f"{name} ({words})" for words in told[1:]] == offered[1:4]
        assert page.inner_text("#sm-apart") == "As learned, a/q.tif"
        rows = page.locator(".sm-row").all_inner_texts()
        assert rows[0] == f"{name}\nsuitability, a/q.tif"
        assert rows[3:5] == ["Alnus 0", "Alnus 1"]
        assert len(set(rows)) == 10
        page.select_option("#sm-compare", "1")
        for side, words in (("left", "as learned, a/q.tif"), ("right", "by photos")):
            assert page.inner_text(f"#sm-{side}") == f"{name}\n{words}", side
        assert page.get_attribute("#sm-handle", "aria-valuetext") == (
            f"{name} ({told[0]}) left, {name} ({told[1]}) right"
        )
        page.fill("#sm-search", "quercus photos")
        assert page.locator(".sm-row:visible").count() == 1
        page.fill("#sm-search", "quercus b/")
        assert page.locator(".sm-row:visible").count() == 1
        page.evaluate("speciesmap.compare(-1)")
        read_at(page, 12.5, 14.5)
        read = page.locator(".sm-value .sm-label").all_inner_texts()
        told[1] += ", suitability"
        assert {f"{name}\n{words}" for words in told} <= set(read)
        assert seen.complaints == []


@pytest.mark.chromium
def test_maps_are_switched_faded_and_cut(browser: Any, scene: Path) -> None:
    with visit(browser, scene) as seen:
        page = seen.page
        bare(page)
        west, east = screen(page, 12.5, 10.5), screen(page, 12.5, 20.5)

        def at(place: tuple[float, float]) -> np.ndarray:
            page.wait_for_timeout(150)
            return shot(page)[round(place[1]), round(place[0])]

        assert np.abs(at(west) - colour(float(ramp()[12, 10]))).max() <= 2
        ground = shot(page)[round(screen(page, 26, 10)[1]), round(west[0])]
        page.check("#sm-list input[value='1']")
        assert page.inner_text("#sm-name") == "Betula nana"
        assert page.inner_text("#sm-quantity") == "Probability"
        assert np.abs(at(west) - colour(0.9)).max() <= 2
        assert np.abs(at(east) - colour(0.1)).max() <= 2
        page.focus("#sm-threshold")
        for _ in range(5):
            page.keyboard.press("PageUp")
        assert page.inner_text("#sm-threshold-value") == "0.50"
        assert np.abs(at(west) - colour(0.9)).max() <= 2
        assert np.array_equal(at(east), ground)
        page.keyboard.press("Home")
        assert np.abs(at(east) - colour(0.1)).max() <= 2
        page.focus("#sm-opacity")
        page.keyboard.press("Home")
        assert np.array_equal(at(west), ground)
        assert seen.complaints == []


@pytest.mark.chromium
def test_what_speaks_against_a_map_stands_by_its_name(browser: Any, tmp_path: Path) -> None:
    caution = f"learned from 12 presences {HOSTILE}"
    maps = [
        write_map(tmp_path / "a.tif", ramp(), CAUTION=caution),
        write_map(tmp_path / "b.tif", ramp(), label="Betula nana"),
    ]
    html = make_map(maps, tmp_path / "m.html")
    for width in (1200, 390):
        with visit(browser, html, width) as seen:
            page = seen.page
            assert page.is_visible("#sm-caution")
            assert page.text_content("#sm-caution") == caution[0].upper() + caution[1:]
            if page.get_attribute("#sm-toggle", "aria-expanded") == "false":
                page.click("#sm-toggle")
            page.check("#sm-list input[value='1']")
            assert page.is_hidden("#sm-caution")
            assert seen.complaints == []


@pytest.mark.chromium
def test_two_maps_stand_beside_a_divider(browser: Any, scene: Path) -> None:
    with visit(browser, scene) as seen:
        page = seen.page
        bare(page)
        page.check("#sm-list input[value='2']")
        page.select_option("#sm-compare", "1")
        page.wait_for_timeout(200)
        middle = page.evaluate("speciesmap.map.getSize().x") / 2
        row = round(screen(page, 12.5, 0)[1])
        image = shot(page)
        assert np.abs(image[row, round(middle) - 20] - colour(0.5)).max() <= 2
        west_edge = screen(page, 12.5, 15)[0]
        for x, value in (
            (middle + 20, 0.9 if middle + 20 < west_edge else 0.1),
            (west_edge + 60, 0.1),
        ):
            if x > middle + 10:
                assert np.abs(image[row, round(x)] - colour(value)).max() <= 2
        assert "probability" in page.inner_text("#sm-right")
        page.focus("#sm-handle")
        before = page.get_attribute("#sm-handle", "aria-valuenow")
        page.keyboard.press("ArrowLeft")
        assert int(page.get_attribute("#sm-handle", "aria-valuenow")) == int(before) - 2
        page.check("#sm-list input[value='1']")
        assert page.inner_text("#sm-name") == "Betula nana"
        assert page.evaluate("speciesmap.state.beside") == 2
        page.select_option("#sm-compare", "-1")
        assert page.is_hidden("#sm-divider")
        assert seen.complaints == []


@pytest.mark.chromium
def test_everything_can_be_done_by_keyboard(browser: Any, scene: Path) -> None:
    with visit(browser, scene) as seen:
        page = seen.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('#sm-panel') !== null")
        page.focus("#sm-list input[value='0']")
        page.keyboard.press("ArrowDown")
        assert page.inner_text("#sm-name") == "Betula nana"
        reached = set()
        page.focus("#sm-toggle")
        for _ in range(14):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id"))
        wanted = {
            "sm-opacity",
            "sm-threshold",
            "sm-compare",
            "sm-observations",
            "sm-base",
            "sm-tiles",
        }
        assert wanted <= reached
        page.focus(".folium-map")
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(300)
        assert page.is_visible(".sm-cross")
        page.keyboard.press("Enter")
        page.wait_for_selector(".sm-value")
        assert seen.complaints == []


@pytest.mark.chromium
def test_observations_are_clustered_filtered_and_told(browser: Any, scene: Path) -> None:
    with visit(browser, scene) as seen:
        page = seen.page

        def shown() -> int:
            page.wait_for_timeout(120)
            clusters = page.eval_on_selector_all(
                ".sm-cluster", "all => all.map(e => +e.textContent)"
            )
            return sum(clusters) + page.locator(".sm-dot").count()

        assert shown() == 9
        assert "9 of this map" in page.inner_text("#sm-observations-text")
        page.check("#sm-list input[value='1']")
        assert shown() == 3
        page.uncheck("#sm-own")
        assert shown() == 12
        page.uncheck("#sm-observations")
        assert shown() == 0
        page.check("#sm-observations")
        page.check("#sm-own")
        page.evaluate(
            "() => { const m = speciesmap.map, at = speciesmap.data.observations.at[11];"
            " m.setView(at, m.getMaxZoom(), { animate: false }); }"
        )
        page.wait_for_timeout(150)
        size = page.viewport_size
        page.mouse.click(size["width"] / 2, size["height"] / 2)
        page.wait_for_selector(".sm-record")
        text = page.inner_text(".sm-record")
        assert HOSTILE in text
        assert "betula nana" in text
        assert "unknown" in text
        assert "within 12 m" in text
        assert page.evaluate("window.hacked") is None


@pytest.mark.chromium
def test_online_background_is_asked_for_only_when_chosen(browser: Any, scene: Path) -> None:
    with visit(browser, scene) as seen:
        assert seen.outside == []
        seen.page.select_option("#sm-tiles", "0")
        seen.page.wait_for_selector("#sm-offline:not([hidden])")
        assert seen.outside
        assert seen.page.input_value("#sm-base") == "off"
        assert not [c for c in seen.complaints if "ERR_INTERNET_DISCONNECTED" not in c]


@pytest.mark.chromium
def test_page_fits_a_phone(browser: Any, scene: Path) -> None:
    with visit(browser, scene, 360, 640, has_touch=True, is_mobile=True) as seen:
        page = seen.page
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.is_hidden("#sm-body")
        assert page.is_visible("#sm-bar")
        panel = page.locator("#sm-panel").bounding_box()
        for row, col in ((0.5, 8.5), (23.5, 0.5), (23.5, 29.5)):
            x, y = screen(page, row, col)
            assert 0 <= x <= 360
            assert 0 <= y <= panel["y"]
        page.touchscreen.tap(*screen(page, 20.5, 6.5))
        page.wait_for_selector(".sm-value")
        assert "0.90" in page.inner_text(".sm-values")
        page.tap("#sm-toggle")
        assert page.is_visible("#sm-opacity")
        for selector in ("#sm-toggle", ".sm-row", "#sm-compare"):
            assert page.locator(selector).first.bounding_box()["height"] >= 40
        assert seen.complaints == []


@pytest.mark.chromium
def test_many_maps_are_found_by_name_and_address(browser: Any, tmp_path: Path) -> None:
    maps = [
        write_map(tmp_path / f"{i}.tif", ramp(), label=f"Genus species-{i:02}") for i in range(12)
    ]
    html = make_map(maps, tmp_path / "m.html")
    with visit(browser, html) as seen:
        page = seen.page
        page.fill("#sm-search", "genus -07")
        assert page.locator(".sm-row:visible").count() == 1
        page.check(".sm-row:visible input")
        assert page.inner_text("#sm-name") == "Genus species-07"
        page.fill("#sm-search", "quercus")
        assert page.inner_text("#sm-none") == "No map has this name."
        page.goto("about:blank")
        page.goto(html.as_uri() + "#3")
        assert page.inner_text("#sm-name") == "Genus species-03"
        assert seen.complaints == []


@pytest.mark.chromium
def test_outside_is_masked_hatched_and_said(browser: Any, tmp_path: Path) -> None:
    inside = np.where(np.arange(30) < 15, 1.0, 0.0) * np.ones((24, 1))
    inside[:6, 20:] = np.nan
    bands = {"suitability": np.full((24, 30), 0.5), "uncertainty": np.full((24, 30), 0.25)}
    path = write_bands(tmp_path / "a.tif", bands | {"applicability": inside})
    plain = write_map(tmp_path / "b.tif", np.full((24, 30), 0.5), label="Alnus rubra")
    with visit(browser, make_map([path, plain], tmp_path / "m.html")) as seen:
        page = seen.page

        def around(row: float, col: float) -> np.ndarray:
            x, y = (round(v) for v in screen(page, row, col))
            return shot(page)[y - 14 : y + 14, x - 14 : x + 14]

        def masked(row: float, col: float) -> float:
            """Share of pixels around a place that are not the map's colour."""
            return float((np.abs(around(row, col) - colour(0.5)).max(axis=2) > 30).mean())

        page.evaluate("speciesmap.layers.forEach((l) => l.overlay.setOpacity(1))")
        for zoom in (0.0, 1.25):
            page.evaluate("(z) => speciesmap.map.setZoom(speciesmap.map.getZoom() + z,"
                          " { animate: false })", zoom)  # fmt: skip
            page.wait_for_timeout(150)
            assert masked(12, 12) == 0
            assert masked(12, 18) == 1
            assert np.ptp(around(12, 18), axis=(0, 1)).min() > 150, "no lines"
        page.evaluate("speciesmap.fit()")
        page.wait_for_timeout(100)
        assert masked(2, 27) == 0
        read_at(page, 12.5, 17.5)
        text = page.inner_text(".sm-values")
        assert "uncertainty 0.25" in text
        assert "extrapolated" in text
        read_at(page, 12.5, 12.5)
        assert "extrapolated" not in page.inner_text(".sm-values")
        page.keyboard.press("Escape")
        page.uncheck("#sm-outside")
        page.wait_for_timeout(100)
        assert masked(12, 18) == 0
        page.check("#sm-outside")
        page.check("#sm-list input[value='1']")
        assert page.is_hidden("#sm-outside-row")
        page.wait_for_timeout(100)
        assert masked(12, 18) == 0
        assert seen.complaints == []


@pytest.mark.chromium
def test_months_are_slid_played_and_read(browser: Any, tmp_path: Path) -> None:
    maps = [
        write_bands(tmp_path / "a.tif", year(np.full((24, 30), 0.9)), QUANTITY="suitability"),
        write_map(tmp_path / "b.tif", np.full((24, 30), 0.5), label="Alnus rubra"),
    ]
    with visit(browser, make_map(maps, tmp_path / "m.html")) as seen:
        page = seen.page
        page.evaluate("speciesmap.layers.forEach((l) => l.overlay.setOpacity(1))")
        assert page.inner_text("#sm-quantity") == "Suitability"
        assert page.inner_text("#sm-month-name") == "January"
        page.focus("#sm-month")
        for _ in range(5):
            page.keyboard.press("ArrowRight")
        assert page.inner_text("#sm-month-name") == "June"
        page.wait_for_timeout(200)
        x, y = (round(v) for v in screen(page, 12.5, 15.5))
        assert np.abs(shot(page)[y, x] - colour(0.9)).max() <= 2
        assert read_at(page, 12.5, 15.5)["Quercus agrifolia"] == "0.90"
        bars = page.locator(".sm-months div")
        assert bars.count() == 12
        tall = [bars.nth(k).bounding_box()["height"] for k in range(12)]
        assert max(tall) == tall[5] > 2 * tall[1]
        assert "December 0.00" in page.get_attribute(".sm-months", "aria-label")
        page.click("#sm-play")
        page.wait_for_selector("#sm-month-name:text-is('August')")
        page.keyboard.press("Enter")
        assert page.get_attribute("#sm-play", "aria-pressed") == "false"
        page.check("#sm-list input[value='1']")
        assert page.is_hidden("#sm-year")
        assert seen.complaints == []


@pytest.mark.chromium
def test_photos_are_shown_when_a_record_is_opened(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((90, 60, 3), 128, np.uint8)).save(tmp_path / "photos" / "a.jpg")
    table = records(2, photo=["a.jpg", "https://photos.example.org/b.jpg"], license="CC-BY")
    html = make_map(
        [write_map(tmp_path / "a.tif", ramp())],
        tmp_path / "m.html",
        observations=table,
        photos=tmp_path / "photos",
    )
    with visit(browser, html) as seen:
        page = seen.page

        def look(i: int) -> None:
            page.evaluate("(i) => speciesmap.map.setView(speciesmap.data.observations.at[i],"
                          " speciesmap.map.getMaxZoom(), { animate: false })", i)  # fmt: skip
            page.wait_for_timeout(150)
            size = page.viewport_size
            page.mouse.click(size["width"] / 2, size["height"] / 2)
            page.wait_for_selector(".sm-record")

        look(0)
        assert page.evaluate("document.querySelector('.sm-photo').naturalWidth") == 60
        assert seen.outside == []
        page.evaluate("speciesmap.map.closePopup()")
        page.wait_for_selector(".sm-record", state="detached")
        look(1)
        page.wait_for_selector(".sm-photo", state="detached")
        assert seen.outside == ["https://photos.example.org/b.jpg"]
        assert page.get_attribute(".sm-record a", "href") == "https://photos.example.org/b.jpg"
        assert not [c for c in seen.complaints if "ERR_INTERNET_DISCONNECTED" not in c]
