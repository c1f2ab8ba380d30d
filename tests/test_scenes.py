"""One map whatever the tiling: scenes read as one, warped where their pixels do not coincide."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp

from speciesmap.errors import AreaError, ConfigError, ImageryError
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.grid import choose_grid, offset
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.windows import bounds_in, bounds_of, cells_in

SHAPE = (180, 240)
GRID = GeoBox(SHAPE, Affine(0.6, 0, 550_000, 0, -0.6, 4_180_000), "EPSG:32610")
BANDS = ("red", "green", "blue", "nir")


def landscape(grid: GeoBox, bands: int = 4) -> np.ndarray:
    """Waves of some 12 m fixed to the ground: the same picture on any grid, uint8."""
    rows, cols = np.mgrid[: grid.shape[0], : grid.shape[1]] + 0.5
    x, y = grid.transform * (cols, rows)
    to_ground = pyproj.Transformer.from_crs(grid.crs, "EPSG:32610", always_xy=True)
    x, y = to_ground.transform(x, y)
    x, y = x - 550_000, y - 4_180_000
    layers = [
        130 + 50 * np.sin(x / (2 + 0.3 * k)) + 50 * np.cos((y + 0.5 * x) / (2.5 + 0.2 * k))
        for k in range(bands)
    ]
    return np.rint(layers).astype(np.uint8)


def similar(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two pictures."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def write(path: Path, grid: GeoBox, pixels: np.ndarray | None = None, **options: object) -> Path:
    pixels = landscape(grid) if pixels is None else pixels
    return write_geotiff(path, pixels, grid, bands=BANDS[: len(pixels)], **options)  # type: ignore[arg-type]


def ragged(folder: Path, count: int, seed: int = 0) -> Path:
    """Cut the landscape into overlapping rectangles that together hold all of it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    whole = landscape(GRID)
    down = max(1, int(count**0.5))
    edges = np.linspace(0, SHAPE[0], down + 1).astype(int)
    number = 0
    for k in range(down):
        across = count // down + (k < count % down)
        cuts = np.linspace(0, SHAPE[1], across + 1).astype(int)
        for j in range(across):
            top, left = (max(0, v - rng.integers(0, 9)) for v in (edges[k], cuts[j]))
            bottom = min(SHAPE[0], edges[k + 1] + rng.integers(0, 9))
            right = min(SHAPE[1], cuts[j + 1] + rng.integers(0, 9))
            part = (slice(top, bottom), slice(left, right))
            write(folder / f"{number}.tif", GRID[part], whole[:, *part])
            number += 1
    assert number == count
    return folder


@pytest.mark.parametrize("count", [1, 7, 50])
def test_however_a_raster_is_cut_its_pixels_are_the_same(tmp_path: Path, count: int) -> None:
    folder = ragged(tmp_path / "cut", count)
    whole = landscape(GRID)
    vrt, index = tmp_path / "mosaic.vrt", tmp_path / "index.gpkg"
    files = sorted(map(str, folder.glob("*.tif")))
    subprocess.run(["gdalbuildvrt", "-q", str(vrt), *files], check=True)
    subprocess.run(["gdaltindex", str(index), *files], check=True, stdout=subprocess.DEVNULL)
    for source in (folder, f"{folder}/*.tif", vrt, index):
        imagery = open_imagery(source)
        assert imagery.shape == SHAPE
        assert offset(GRID, imagery.geobox) == (0, 0)
        assert imagery.bands[:3] == BANDS[:3]
        pixels, valid = imagery.read(0, 0, *SHAPE)
        assert valid.all()
        assert (pixels == whole).all()


def test_the_first_that_is_valid_counts_by_name(tmp_path: Path) -> None:
    bright, dark = np.full((1, *SHAPE), 200, np.uint8), np.full((1, *SHAPE), 50, np.uint8)
    dark[:, 100:] = 0
    write(tmp_path / "a.tif", GRID, dark, nodata=0)
    write(tmp_path / "b.tif", GRID, bright, nodata=0)
    pixels, valid = open_imagery(tmp_path).read(0, 0, *SHAPE)
    assert valid.all()
    assert (pixels[0, :100] == 50).all()
    assert (pixels[0, 100:] == 200).all()


@pytest.mark.parametrize(
    "other",
    [
        GRID.translate_pix(0.5, -0.25),
        GeoBox((150, 210), GRID.transform * Affine.rotation(20), "EPSG:32610"),
        GeoBox((400, 500), Affine(0.3, 0, 549_999, 0, -0.3, 4_180_001), "EPSG:32610"),
        GeoBox((300, 400), Affine(0.75, 0, -13_629_110, 0, -0.75, 4_546_420), "EPSG:3857"),
        GeoBox((400, 400), Affine(6e-6, 0, -122.4315, 0, -6e-6, 37.7665), "EPSG:4326"),
    ],
    ids=["half a pixel", "rotated", "finer", "Mercator", "degrees"],
)
def test_a_warped_scene_shows_the_same_ground(tmp_path: Path, other: GeoBox) -> None:
    path = write(tmp_path / "other.tif", other)
    like = write(tmp_path / "like.tif", GRID)
    imagery = open_imagery(path, like=like)
    assert imagery.geobox == GRID
    pixels, valid = imagery.read(0, 0, *SHAPE)
    assert valid.mean() > 0.1
    inside = np.where(valid, pixels, 0)[:, valid], landscape(GRID)[:, valid]
    assert similar(*inside) > 0.995
    shifted = np.roll(landscape(GRID), 1, axis=2)[:, valid]
    assert similar(inside[0], shifted) < 0.985, "a shift by a pixel would show"
    # a pixel hardly depends on the rectangle that it is read with
    part, usable = imagery.read(37, 61, 50, 71)
    assert np.abs(part.astype(int) - pixels[:, 37:87, 61:132]).max() <= 1
    assert (usable == valid[37:87, 61:132]).all()


@settings(max_examples=25, deadline=None)
@given(
    row=st.integers(-30, 190), col=st.integers(-30, 250), high=st.integers(1, 90),
    wide=st.integers(1, 90),
)  # fmt: skip
def test_any_rectangle_of_warped_scenes_is_cut_from_one_picture(
    row: int, col: int, high: int, wide: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "unlike"
    if not folder.exists():
        folder.mkdir()
        write(folder / "a.tif", GRID[:, :150])
        write(folder / "b.tif", GRID[:, 130:].translate_pix(0.3, 0.4))
    imagery = open_imagery(folder, like=folder / "a.tif")
    whole, valid = imagery.read(-30, -30, 310, 370)
    part, usable = imagery.read(row, col, high, wide)
    place = (slice(row + 30, row + 30 + high), slice(col + 30, col + 30 + wide))
    assert (part == whole[:, *place]).all()
    assert (usable == valid[place]).all()


def test_scenes_of_two_zones_become_one_map_without_a_gap(tmp_path: Path) -> None:
    # the border of the zones 10 and 11 runs through the middle
    x, y = pyproj.Transformer.from_crs(4326, 32610, always_xy=True).transform(-120.0, 37.7)
    west = GeoBox((200, 150), Affine(0.6, 0, round(x) - 80, 0, -0.6, round(y)), "EPSG:32610")
    x, y = pyproj.Transformer.from_crs(4326, 32611, always_xy=True).transform(-120.0, 37.7)
    east = GeoBox((200, 150), Affine(0.6, 0, round(x) - 10, 0, -0.6, round(y)), "EPSG:32611")
    for name, grid in (("east", east), ("west", west)):
        write(tmp_path / f"{name}.tif", grid)
    bbox = (-120.0005, 37.6994, -119.9995, 37.6998)
    imagery = open_imagery(tmp_path, bbox=bbox)
    assert imagery.geobox.crs == "EPSG:32611", "the zone of the centre, zones begin in the west"
    assert imagery.geobox.resolution.x == 0.6
    rows, cols = imagery.rowcol([bbox[0], bbox[2]], [bbox[3], bbox[1]])
    top, left, bottom, right = int(rows[0]), int(cols[0]), int(rows[1]), int(cols[1])
    pixels, valid = imagery.read(top, left, bottom - top, right - left)
    assert valid.all()
    truth = landscape(imagery.geobox)[:, top:bottom, left:right]
    assert similar(pixels, truth) > 0.99


def test_the_grid_is_that_of_the_zone_the_model_and_whole_pixels(tmp_path: Path) -> None:
    degrees = GeoBox((300, 300), Affine(6e-6, 0, -122.4315, 0, -6e-6, 37.7665), "EPSG:4326")
    other = GRID.translate_pix(0.5, 0.5)
    bbox = (-122.431, 37.7655, -122.4305, 37.766)
    grid = choose_grid([degrees, other], bbox=bbox, preferred_m=0.7)
    assert (grid.crs, grid.resolution.x) == ("EPSG:32610", 0.7)
    assert grid.transform.c / 0.7 == pytest.approx(round(grid.transform.c / 0.7))
    left, bottom, right, top = bounds_of(bbox, "EPSG:4326", "EPSG:32610")
    box = grid.boundingbox
    assert box.left <= left and box.bottom <= bottom and box.right >= right and box.top >= top
    # the datum of the scenes in the zone, and their own pixels where size and CRS agree
    nad83 = GeoBox(SHAPE, GRID.transform, "EPSG:26910")
    grid = choose_grid([nad83, degrees], bbox=bbox, preferred_m=0.6)
    assert grid.crs == "EPSG:26910"
    shift = (~nad83.transform * grid.transform).c
    assert shift == pytest.approx(round(shift))
    # detail that is not there is not made
    assert choose_grid([degrees, other], bbox=bbox, preferred_m=0.1).resolution.x > 0.5
    mercator = choose_grid([other], crs="EPSG:3857", resolution_m=1.0)
    assert mercator.resolution.x == pytest.approx(1 / np.cos(np.radians(37.76)), rel=0.01)


def test_areas_that_utm_does_not_show_are_refused_with_a_crs_that_does(tmp_path: Path) -> None:
    arctic = GeoBox((90, 90), Affine(1e-4, 0, 20, 0, -1e-4, 85), "EPSG:4326")
    odd = GeoBox((90, 90), Affine(1e-4, 0, 20.00003, 0, -1e-4, 85), "EPSG:4326")
    with pytest.raises(AreaError, match=r"reaches latitude 85.*--crs EPSG:3413"):
        choose_grid([arctic, odd])
    assert choose_grid([arctic, odd], crs="EPSG:3413").crs == "EPSG:3413"
    south = GeoBox((90, 90), Affine(1e-4, 0, 20, 0, -1e-4, -83), "EPSG:4326")
    with pytest.raises(AreaError, match=r"--crs EPSG:3031"):
        choose_grid([south, odd])
    with pytest.raises(AreaError, match=r"40 degrees wide"):
        choose_grid([GRID, odd], bbox=(0, 0, 40, 1))
    with pytest.raises(ConfigError, match="--crs nowhere is not a CRS"):
        choose_grid([GRID], crs="nowhere")
    with pytest.raises(ConfigError, match="--resolution-m -1"):
        choose_grid([GRID], resolution_m=-1)
    path = write(tmp_path / "a.tif", GRID)
    with pytest.raises(ConfigError, match="--like gives CRS"):
        open_imagery(path, like=path, crs="EPSG:3857")
    with pytest.raises(ConfigError, match="items of STAC"):
        open_imagery(path, datetime="2018")
    far = write(tmp_path / "far.tif", GRID.translate_pix(10_000, 0))
    with pytest.raises(AreaError, match="nothing on the grid"):
        open_imagery(path, like=far).read(0, 0, 1, 1)


def test_an_area_across_the_antimeridian_is_one_area(tmp_path: Path) -> None:
    x, y = pyproj.Transformer.from_crs(4326, 32601, always_xy=True).transform(-180.0, -16.8 + 33)
    grid = GeoBox((300, 400), Affine(1, 0, round(x) - 200, 0, -1, round(y)), "EPSG:32601")
    west, south, east, north = bounds_in(grid)
    assert 179 < west < 180 < east < 181
    rows, cols = cells_in((west + 1e-3, south, east - 360 - 1e-3, north), grid)
    assert (rows.stop - rows.start, cols.stop - cols.start) != grid.shape
    assert cols.start > 50 and cols.stop < 350 and rows.stop - rows.start > 290
    assert cells_in((west, south, east - 360, north), grid)[1] == slice(0, 400)
    path = write(tmp_path / "a.tif", grid)
    write(tmp_path / "b.tif", grid.translate_pix(0.5, 0))
    imagery = open_imagery(tmp_path, bbox=(west + 1e-3, south, east - 360 - 1e-3, north))
    assert imagery.geobox.crs == "EPSG:32601"
    assert imagery.geobox.shape[1] < 400
    assert open_imagery(path).read(0, 0, *grid.shape)[1].all()
    with pytest.raises(AreaError, match=r"west -122.1 is not below its east -122.6"):
        cells_in((-122.1, 37, -122.6, 38), grid)


def test_holes_masks_alpha_nodata_and_nan_stay_holes_when_warped(tmp_path: Path) -> None:
    hole = (slice(60, 100), slice(90, 140))
    pixels = landscape(GRID, 3)
    nodata, alpha, masked, nan = (tmp_path / f"{n}.tif" for n in ("nodata", "alpha", "mask", "nan"))
    holed = pixels.copy()
    holed[:, *hole] = 0
    write(nodata, GRID, np.where(holed == 0, 0, np.maximum(holed, 1)), nodata=0)
    floats = pixels.astype(np.float32)
    floats[1, *hole] = np.nan
    write(nan, GRID, floats)
    opaque = np.full(SHAPE, 255, np.uint8)
    opaque[hole] = 0
    profile = {
        "driver": "GTiff", "height": SHAPE[0], "width": SHAPE[1], "dtype": "uint8",
        "crs": "EPSG:32610", "transform": GRID.transform,
    }  # fmt: skip
    with rasterio.open(alpha, "w", count=4, photometric="RGB", alpha="YES", **profile) as raster:
        raster.write(np.concatenate([pixels, opaque[None]]))
        raster.colorinterp = (*raster.colorinterp[:3], ColorInterp.alpha)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(masked, "w", count=3, **profile) as raster,
    ):
        raster.write(pixels)
        raster.write_mask(opaque)
    like = write(tmp_path / "like.tif", GRID.translate_pix(0.5, 0.5), pixels)
    for path in (nodata, alpha, masked, nan):
        imagery = open_imagery(path, like=like)
        read, valid = imagery.read(0, 0, *SHAPE)
        assert not valid[62:98, 92:138].any(), path
        assert valid[2:-2, 2:-2].sum() > (SHAPE[0] - 4) * (SHAPE[1] - 4) - 42 * 52
        good = valid.copy()
        good[55:105, 85:145] = False
        assert similar(read[:3, good], landscape(imagery.geobox, 3)[:, good]) > 0.98
        rim = valid & ~good & (np.abs(read[0].astype(int) - pixels[0]) > 90)
        assert not rim.any(), "what lies under the hole does not bleed into its rim"


def test_near_infrared_that_a_file_calls_alpha_is_warped_as_data(tmp_path: Path) -> None:
    profile = {
        "driver": "GTiff", "height": SHAPE[0], "width": SHAPE[1], "dtype": "uint8", "count": 4,
        "crs": "EPSG:32610", "transform": GRID.transform, "photometric": "RGB", "alpha": "YES",
    }  # fmt: skip
    with rasterio.open(tmp_path / "naip.tif", "w", **profile) as raster:
        raster.write(landscape(GRID))
    like = write(tmp_path / "like.tif", GRID.translate_pix(0.5, 0.5))
    imagery = open_imagery(tmp_path / "naip.tif", like=like)
    assert imagery.bands == BANDS
    pixels, valid = imagery.read(0, 0, *SHAPE)
    assert valid[2:-2, 2:-2].all()
    assert similar(pixels[3, 2:-2, 2:-2], landscape(imagery.geobox)[3, 2:-2, 2:-2]) > 0.98


def test_a_raster_with_control_points_alone_is_placed_by_them(tmp_path: Path) -> None:
    path = tmp_path / "gcps.tif"
    corners = [(r, c) for r in (0, 90, 180) for c in (0, 120, 240)]
    points = [GroundControlPoint(r, c, *(GRID.transform * (c, r))) for r, c in corners]
    with rasterio.open(
        path, "w", driver="GTiff", height=SHAPE[0], width=SHAPE[1], count=4, dtype="uint8"
    ) as raster:
        raster.write(landscape(GRID))
        raster.gcps = (points, rasterio.CRS.from_epsg(32610))
    imagery = open_imagery(path)
    assert imagery.geobox.crs == "EPSG:32610"
    read, valid = imagery.read(0, 0, *imagery.shape)
    assert valid.mean() > 0.95
    there = landscape(imagery.geobox)
    assert similar(read[:, valid], there[:, valid]) > 0.98


def test_pixel_is_point_and_axis_order_do_not_move_the_picture(tmp_path: Path) -> None:
    # EPSG:2193 has northing first; GDAL and pyproj are told x first everywhere
    zealand = GeoBox((90, 120), Affine(1, 0, 1_750_000, 0, -1, 5_920_000), "EPSG:2193")
    plain = write(tmp_path / "plain.tif", zealand, np.full((1, 90, 120), 9, np.uint8))
    point = tmp_path / "point.tif"
    subprocess.run(
        ["gdal_translate", "-q", "-mo", "AREA_OR_POINT=Point", str(plain), str(point)], check=True
    )
    assert open_imagery(point).geobox == open_imagery(plain).geobox == zealand
    lon, lat = open_imagery(point).xy(0, 0)
    assert (float(lon), float(lat)) == pytest.approx((174.7, -36.9), abs=0.5)


def test_a_grid_smaller_than_its_scenes_still_reads_what_lies_around(tmp_path: Path) -> None:
    imagery = open_imagery(write(tmp_path / "a.tif", GRID))
    part = imagery.crop(50, 60, 40, 30)
    assert part.shape == (40, 30)
    assert (part.read(-10, -10, 60, 60)[0] == landscape(GRID)[:, 40:100, 50:110]).all()
    assert part.fingerprint != imagery.fingerprint


def test_what_is_no_tile_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gpkg").write_text("no")
    with pytest.raises(ImageryError, match="cannot be read as a tile index"):
        open_imagery(tmp_path / "a.gpkg")
    (tmp_path / "b.geojson").write_text(
        '{"type":"FeatureCollection","features":[{"type":"Feature","properties":{"a":1},'
        '"geometry":{"type":"Point","coordinates":[0,0]}}]}'
    )
    with pytest.raises(ImageryError, match=r"no column 'location'.*gdaltindex"):
        open_imagery(tmp_path / "b.geojson")
