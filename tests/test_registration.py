"""A landmark of known coordinates lies in the right cell, however the imagery is placed."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from fake_model import BlobModel
from odc.geo.geobox import GeoBox
from PIL import Image
from present_maps import chromium, visit
from shapely.geometry import Point, shape
from test_styles import run_qgis

from speciesmap.atlas import Prediction, predict
from speciesmap.errors import AreaError
from speciesmap.mapping.embed import embed
from speciesmap.mapping.plan import plan
from speciesmap.mapping.query import Query
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.windows import bounds_in

BANDS = ("red", "green", "blue")
GRID = GeoBox((240, 260), Affine(0.6, 0, 360_000, 0, -0.6, 3_770_000), "EPSG:26911")
ROW, COL = 141, 99
PLACE = pyproj.Transformer.from_crs(26911, 4326, always_xy=True).transform(
    *(GRID.transform * (COL + 0.5, ROW + 0.5))
)
WHERE = """
import json, sys
from qgis.core import *
app = QgsApplication([], False); app.initQgis()
layer = QgsRasterLayer(sys.argv[1], "map")
block = layer.dataProvider().block(1, layer.extent(), layer.width(), layer.height())
cells = [(i, j) for i in range(layer.height()) for j in range(layer.width())
         if not block.isNoData(i, j)]
row, col = max(cells, key=lambda cell: block.value(*cell))
side = layer.rasterUnitsPerPixelX(), layer.rasterUnitsPerPixelY()
to_map = QgsCoordinateTransform(
    QgsCoordinateReferenceSystem("EPSG:4326"), layer.crs(), QgsProject.instance())
place = to_map.transform(QgsPointXY(float(sys.argv[2]), float(sys.argv[3])))
x = layer.extent().xMinimum() + (col + 0.5) * side[0]
y = layer.extent().yMaximum() - (row + 0.5) * side[1]
print("JSON" + json.dumps([abs(x - place.x()) / side[0], abs(y - place.y()) / side[1]]))
"""


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Noise with one bright square."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(20, 120, (3, *GRID.shape)).astype(np.uint8)
    pixels[:, ROW - 4 : ROW + 5, COL - 4 : COL + 5] = 250
    return write_geotiff(tmp_path / "scene.tif", pixels, GRID, bands=BANDS)


OAK = Query(
    label="Quercus agrifolia",
    kind="taxon",
    vector=np.eye(8, dtype=np.float32)[0],
    gain=4.0,
    offset=0.0,
    quantity="suitability",
    thresholds={"near": 0.9},
)


def mapped(folder: Path, scene: Path, zone: str, **grid: Any) -> Prediction:
    """Map the square out of a copy of the scene in another zone."""
    filed = folder / "filed.tif"
    words = ["gdalwarp", "-q", "-t_srs", zone, "-tr", "0.6", "0.6", "-r", "bilinear"]
    subprocess.run([*words, "-dstnodata", "0", str(scene), str(filed)], check=True)
    return predict(
        BlobModel(bands=BANDS, resolution_m=0.6),
        imagery=filed,
        bbox=bounds_in(GRID[40:200, 40:220]),
        stride_px=2,
        queries=[OAK],
        out=folder / "maps",
        **grid,
    )


ZONES = pytest.mark.parametrize(
    ("zone", "grid"),
    [
        ("EPSG:26911", {}),
        ("EPSG:26910", {}),
        ("EPSG:26910", {"crs": "EPSG:32611", "resolution_m": 0.6}),
        ("EPSG:26911", {"crs": "EPSG:4326", "resolution_m": 0.6}),
    ],
    ids=["as it is", "filed under the next zone", "warped back", "in degrees"],
)


@ZONES
def test_files_show_a_landmark_within_half_a_cell(
    tmp_path: Path, scene: Path, zone: str, grid: dict[str, Any]
) -> None:
    made = mapped(tmp_path, scene, zone, **grid)
    with rasterio.open(made.maps[0].path) as raster:
        values = np.nan_to_num(raster.read(1), nan=-1)
        row, col = np.unravel_index(values.argmax(), values.shape)
        x, y = raster.transform * (col + 0.5, row + 0.5)
        there = pyproj.Transformer.from_crs(4326, raster.crs, always_xy=True).transform(*PLACE)
        assert np.abs(np.subtract((x, y), there) / raster.res).max() <= 0.5
        corners = [raster.transform * at for at in ((0, 0), (raster.width, raster.height))]
        res, crs = raster.res, raster.crs

    ranges = gpd.read_file(made.path / "ranges.gpkg", layer="ranges")
    assert ranges.crs == crs
    [near] = ranges.geometry
    assert near.contains(Point(there))
    assert np.abs(np.subtract((near.centroid.x, near.centroid.y), there) / res).max() <= 0.5

    item = json.loads(made.item.read_text())
    asset = item["assets"]["quercus_agrifolia"]
    x, y = rasterio.Affine(*asset["proj:transform"]) * (col + 0.5, row + 0.5)
    assert np.abs(np.subtract((x, y), there) / res).max() <= 0.5
    assert str(asset.get("proj:code") or asset.get("proj:epsg")).endswith(str(crs.to_epsg()))
    west, south, east, north = item["bbox"]
    assert west < PLACE[0] < east and south < PLACE[1] < north
    assert shape(item["geometry"]).contains(Point(PLACE))
    to_map = pyproj.Transformer.from_crs(4326, crs, always_xy=True)
    ring = np.array(item["geometry"]["coordinates"][0])
    x, y = to_map.transform(*ring.T)
    wanted = [corners[0][0], corners[1][1], corners[1][0], corners[0][1]]
    assert np.abs(np.subtract([x.min(), y.min(), x.max(), y.max()], wanted)).max() <= 0.5 * res[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


SCREEN = """at => {
  const m = speciesmap.map, p = m.project(at).subtract(m.getPixelOrigin()).add(m._getMapPanePos());
  return [p.x, p.y];
}"""
MOVE = "at => speciesmap.map.setView(at, 24, { animate: false })"
FADE = """share => {
  const slider = document.getElementById("sm-opacity");
  slider.value = share; slider.dispatchEvent(new Event("input"));
}"""


@pytest.mark.chromium
@pytest.mark.parametrize(
    ("crs", "down", "right"), [("EPSG:26910", 1, 0), ("EPSG:26910", 0, 1), ("EPSG:4326", 0, 1)]
)
def test_the_page_shows_and_reads_a_landmark_within_half_a_cell(
    browser: Any, tmp_path: Path, scene: Path, crs: str, down: int, right: int
) -> None:
    made = mapped(tmp_path, scene, "EPSG:26911", crs=crs, resolution_m=0.6)
    with rasterio.open(made.maps[0].path) as raster:
        top = np.nanmax(raster.read(1))
    lon, lat = PLACE
    north = 1.2 / 110_900  # a cell of 1.2 m in degrees of latitude
    east = north / np.cos(np.radians(lat))
    steps = range(-8, 9)
    with visit(browser, made.html) as seen:
        page = seen.page
        page.click("#sm-toggle")
        page.evaluate(MOVE, [lat, lon])
        page.wait_for_timeout(100)
        here = np.array(page.evaluate(SCREEN, [lat, lon]))
        cell_px = page.evaluate(SCREEN, [lat, lon + east])[0] - here[0]
        assert cell_px > 4
        for share, shown in ((100, "map"), (0, "imagery")):
            page.evaluate(FADE, share)
            page.wait_for_timeout(150)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            red, green, _ = np.moveaxis(np.asarray(picture).astype(float), -1, 0)
            bright = red + green  # the palette ends in yellow, the landmark is white
            around = tuple(
                slice(max(0, round(v - 8 * cell_px)), round(v + 8 * cell_px)) for v in here[::-1]
            )
            ys, xs = np.nonzero(bright[around] >= bright[around].max() - 2)
            middle = np.array([xs.mean() + around[1].start, ys.mean() + around[0].start]) + 0.5
            assert np.abs(middle - here).max() / cell_px <= 0.5, shown
        read = []
        for cells in steps:
            at = [lat - down * cells * north, lon + right * cells * east]
            page.evaluate("speciesmap.map.closePopup()")
            page.wait_for_selector(".sm-read", state="detached")
            page.evaluate(MOVE, [lat, lon])
            page.mouse.click(*page.evaluate(SCREEN, at))
            page.wait_for_selector(".sm-value b")
            read.append(float(page.inner_text(".sm-value b")))
        assert read[8] == max(read) == pytest.approx(top, abs=0.02)
        weight = np.array(read) - min(read)
        assert abs((weight * steps).sum() / weight.sum()) <= 0.5


@pytest.mark.qgis
def test_qgis_reads_a_landmark_within_half_a_cell(tmp_path: Path, scene: Path) -> None:
    made = mapped(tmp_path, scene, "EPSG:26910", crs="EPSG:32611", resolution_m=0.6)
    assert max(run_qgis(tmp_path, WHERE, str(made.maps[0].path), *map(str, PLACE))) <= 0.5


def test_an_area_of_a_window_a_cell_or_less_is_mapped_or_refused(
    tmp_path: Path, scene: Path
) -> None:
    model = BlobModel(bands=BANDS, resolution_m=0.6)
    window = embed(model, scene, tmp_path / "a.zarr", bbox=bounds_in(GRID[100:116, 90:106]))
    assert sum(r.stop - r.start for r in window.done() or ()) > 0
    unlike = {"crs": "EPSG:32611", "resolution_m": 0.6}
    small = embed(
        model, scene, tmp_path / "b.zarr", bbox=bounds_in(GRID[100:116, 90:106]), **unlike
    )
    assert max(small.geobox.shape) <= 64
    middle = embed(model, scene, tmp_path / "c.zarr").geobox[20:21, 30:31].boundingbox
    x, y = (middle.left + middle.right) / 2, (middle.bottom + middle.top) / 2
    tiny = (x - 1e-3, y - 1e-3, x + 1e-3, y + 1e-3)
    store = embed(model, scene, tmp_path / "d.zarr", bbox=tiny, bbox_crs="EPSG:26911")
    assert store.done() is not None
    corner = (middle.left - 0.1, middle.top - 0.1, middle.left + 0.1, middle.top + 0.1)
    with pytest.raises(AreaError, match="holds the centre of no cell"):
        embed(model, scene, tmp_path / "e.zarr", bbox=corner, bbox_crs="EPSG:26911")


def test_a_map_across_the_antimeridian_is_described_where_it_lies(tmp_path: Path) -> None:
    to_lonlat = pyproj.Transformer.from_crs(32660, 4326, always_xy=True)
    x, y = to_lonlat.transform(180, 51.5, direction="INVERSE")
    grid = GeoBox(GRID.shape, Affine(0.6, 0, x - 0.6 * COL - 3, 0, -0.6, y), "EPSG:32660")
    pixels = np.random.default_rng(0).integers(20, 120, (3, *grid.shape)).astype(np.uint8)
    pixels[:, ROW - 4 : ROW + 5, COL - 4 : COL + 5] = 250
    scene = write_geotiff(tmp_path / "scene.tif", pixels, grid, bands=BANDS)
    made = predict(
        BlobModel(bands=BANDS, resolution_m=0.6),
        imagery=scene,
        bbox=(179.9995, 51.4985, -179.999, 51.5),
        stride_px=2,
        queries=[OAK],
        out=tmp_path / "maps",
    )
    with rasterio.open(made.maps[0].path) as raster:
        values = np.nan_to_num(raster.read(1), nan=-1)
        row, col = np.unravel_index(values.argmax(), values.shape)
        there = raster.transform * (col + 0.5, row + 0.5)
        wanted = grid.transform * (COL + 0.5, ROW + 0.5)
        assert np.abs(np.subtract(there, wanted) / raster.res).max() <= 0.5
    item = json.loads(made.item.read_text())
    outline = shape(item["geometry"])
    assert outline.geom_type == "MultiPolygon" and outline.area < 1e-5
    assert outline.contains(Point(to_lonlat.transform(*wanted)))
    west, south, east, north = item["bbox"]
    assert 179.99 < west <= 180 and -180 <= east < -179.99 and south < north


@pytest.mark.parametrize(
    ("bbox", "reached"), [((10, 85, 11, 85.2), "85.2"), ((10, -86, 11, -85), "-86")]
)
def test_areas_that_a_web_map_cannot_show_are_refused_before_anything_is_read(
    tmp_path: Path, bbox: Any, reached: str
) -> None:
    with pytest.raises(AreaError, match=f"reaches latitude {reached}, .* ends at 85.0511"):
        predict(BlobModel(), imagery=tmp_path / "none.tif", bbox=bbox, out=tmp_path / "maps")
    with pytest.raises(AreaError, match=f"reaches latitude {reached}, .* ends at 85.0511"):
        plan(tmp_path / "no_model", tmp_path / "none.tif", bbox=bbox)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("crs", "corner", "reached"),
    [("EPSG:3413", (-150, 150), "89.99"), ("EPSG:3031", (300_000, 300_000), "-86.09")],
)
def test_imagery_that_a_web_map_cannot_show_is_refused_before_it_is_encoded(
    tmp_path: Path, crs: str, corner: tuple[float, float], reached: str
) -> None:
    grid = GeoBox((300, 300), Affine(1, 0, corner[0], 0, -1, corner[1]), crs)
    scene = write_geotiff(
        tmp_path / "pole.tif", np.ones((3, 300, 300), np.uint8), grid, bands=BANDS
    )
    model = BlobModel(bands=BANDS, resolution_m=1.0)
    with pytest.raises(AreaError, match=f"pole.tif lies beyond latitude {reached}.* ends at 85.05"):
        predict(model, imagery=scene, queries=[OAK], out=tmp_path / "maps")
    with pytest.raises(AreaError, match=f"pole.tif lies beyond latitude {reached}.* ends at 85.05"):
        plan(model, scene)
    assert [path.name for path in tmp_path.iterdir()] == ["pole.tif"]
    store = embed(model, scene, tmp_path / "s.zarr", stride_px=32)
    with pytest.raises(AreaError, match=f"s.zarr lies beyond latitude {reached}"):
        predict(model, store=store, queries=[OAK], out=tmp_path / "maps")
