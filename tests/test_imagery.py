"""Imagery: bands by meaning, masks by all bands, mosaics on one grid, refusals that help."""

from __future__ import annotations

import pickle
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning

from speciesmap.errors import ImageryError
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import open_imagery, open_raster

GRID = GeoBox((120, 150), Affine(0.6, 0, 550_000, 0, -0.6, 4_180_000), "EPSG:32610")
BANDS = ("red", "green", "blue", "nir")
NAIP = Path(__file__).parents[2] / "shared/data/naip_pairs"


def noise(bands: int, grid: GeoBox = GRID, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 255, (bands, *grid.shape)).astype(np.uint8)


def plain(path: Path, pixels: np.ndarray, **profile: object) -> Path:
    """Write a raster as other people's tools do, without our descriptions."""
    count, height, width = pixels.shape
    options = {"crs": "EPSG:32610", "transform": GRID.transform, **profile}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype=pixels.dtype,
        **options,
    ) as raster:
        raster.write(pixels)
    return path


def test_values_under_places_are_those_of_their_pixels(tmp_path: Path) -> None:
    grid = GeoBox((700, 1100), GRID.transform, GRID.crs)
    pixels = noise(2, grid)
    pixels[:, 100:300] = 0
    path = plain(tmp_path / "a.tif", pixels, nodata=0)
    imagery = open_imagery(path)
    rng = np.random.default_rng(0)
    rows, cols = rng.uniform(-50, 750, 3000), rng.uniform(-50, 1150, 3000)
    x, y = imagery.xy(rows, cols)
    on = (rows >= 0) & (rows < 700) & (cols >= 0) & (cols < 1100)
    np.testing.assert_array_equal(imagery.contains(x, y), on)
    expected = np.full((2, 3000), np.nan)
    row, col = rows[on].astype(int), cols[on].astype(int)
    expected[:, on] = np.where(pixels[:, row, col] > 0, pixels[:, row, col], np.nan)
    np.testing.assert_array_equal(imagery.sample(x, y), expected)
    assert imagery.sample([], []).shape == (2, 0)
    assert not imagery.contains([np.nan, -179.0], [np.nan, 12.0]).any()
    assert np.isnan(imagery.sample([np.nan], [40.0])).all()


def test_any_rectangle_reads_and_outside_is_zero_and_invalid(
    tmp_path: Path,
) -> None:
    pixels = noise(4)
    imagery = open_imagery(write_geotiff(tmp_path / "a.tif", pixels, GRID, bands=BANDS))
    assert imagery.bands == BANDS
    assert imagery.shape == (120, 150)
    read, valid = imagery.read(-7, 140, 20, 30)
    assert (read[:, 7:, :10] == pixels[:, :13, 140:]).all()
    assert valid[7:, :10].all()
    assert valid.sum() == 130
    assert not read[:, ~valid].any()


def test_the_size_of_a_pixel_is_measured_on_the_ground(tmp_path: Path) -> None:
    mercator = GeoBox((10, 10), Affine(30, 0, -13_600_000, 0, -30, 4_550_000), "EPSG:3857")
    degrees = GeoBox((10, 10), Affine(1e-4, 0, -122, 0, -1e-4, 60), "EPSG:4326")
    for grid, expected in ((GRID, 0.6), (mercator, 30 * 0.793), (degrees, 11.13 * 0.5**0.5)):
        path = write_geotiff(tmp_path / "a.tif", noise(1, grid), grid, bands=["a"], overwrite=True)
        assert open_imagery(path).resolution_m == pytest.approx(expected, rel=5e-3)


def test_pixel_coordinates_and_places_are_inverse(tmp_path: Path) -> None:
    rotated = GeoBox((120, 150), GRID.transform * Affine.rotation(30), "EPSG:32610")
    imagery = open_imagery(write_geotiff(tmp_path / "a.tif", noise(1), rotated, bands=["a"]))
    rows, cols = np.array([0, 10.5, -3]), np.array([0, 99.25, 200])
    x, y = imagery.xy(rows, cols)
    assert x[0] == pytest.approx(-122.43, abs=0.01)
    back = imagery.rowcol(x, y)
    assert np.allclose(back, (rows, cols), atol=1e-4)
    x, y = imagery.xy(0, 0, "EPSG:32610")
    assert (x, y) == (550_000, 4_180_000)


def test_bands_are_named_by_description_then_colour_then_number(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.tif", noise(5))
    with rasterio.open(path, "r+") as raster:
        raster.colorinterp = [
            ColorInterp.red,
            ColorInterp.green,
            ColorInterp.blue,
            ColorInterp.undefined,
            ColorInterp.undefined,
        ]
        raster.set_band_description(1, "Near Infrared")
        raster.set_band_description(2, "Red")
    imagery = open_imagery(path)
    assert imagery.bands == ("nir", "red", "blue", "band_4", "band_5")


def test_bands_are_chosen_by_name_number_or_said_meaning(tmp_path: Path) -> None:
    pixels = noise(4)
    path = write_geotiff(tmp_path / "a.tif", pixels, GRID, bands=BANDS)
    imagery = open_imagery(path, ["NIR", "r", "swir=3"])
    assert imagery.bands == ("nir", "red", "swir")
    assert (imagery.read(0, 0, 120, 150)[0] == pixels[[3, 0, 2]]).all()
    assert open_imagery(path, ["2"]).bands == ("green",)
    with pytest.raises(ImageryError, match=r"no band 'thermal'.*1 red, 2 green, 3 blue, 4 nir"):
        open_imagery(path, ["thermal"])
    with pytest.raises(ImageryError, match="do not name each band once"):
        open_imagery(path, ["red", "r"])


def test_a_pixel_is_invalid_only_where_all_bands_are_nodata(tmp_path: Path) -> None:
    pixels = noise(3)
    pixels[0, :50], pixels[:, 60:70] = 0, 0
    imagery = open_imagery(
        write_geotiff(tmp_path / "a.tif", pixels, GRID, bands=BANDS[:3], nodata=0)
    )
    _, valid = imagery.read(0, 0, 120, 150)
    assert not valid[60:70].any()
    assert valid[:60].all()
    assert valid[70:].all()


def test_values_that_are_not_finite_are_invalid_in_any_band(tmp_path: Path) -> None:
    pixels = noise(2).astype(np.float32)
    pixels[1, 3, 4] = np.nan
    _, valid = open_imagery(write_geotiff(tmp_path / "a.tif", pixels, GRID, bands=["a", "b"])).read(
        0, 0, 120, 150
    )
    assert np.argwhere(~valid).tolist() == [[3, 4]]


def test_a_true_alpha_band_masks_and_a_mislabelled_one_is_near_infrared(tmp_path: Path) -> None:
    pixels = noise(4)
    infrared = plain(tmp_path / "naip.tif", pixels, photometric="RGB", alpha="YES")
    imagery = open_imagery(infrared)
    assert imagery.bands == BANDS
    assert imagery.read(0, 0, 120, 150)[1].all()
    pixels[3] = 255
    pixels[3, :40] = 0
    with rasterio.open(plain(tmp_path / "said.tif", pixels, alpha="YES"), "r+") as raster:
        raster.set_band_description(4, "NIR")
    assert open_imagery(tmp_path / "said.tif").read(0, 0, 120, 150)[1].all()
    masked = open_imagery(plain(tmp_path / "cut.tif", pixels, photometric="RGB", alpha="YES"))
    assert masked.bands == BANDS[:3]
    assert masked.read(0, 0, 120, 150)[1].any(axis=1).tolist() == [False] * 40 + [True] * 80


@pytest.mark.parametrize("internal", ["YES", "NO"])
def test_a_mask_of_the_data_set_counts_where_near_infrared_is_called_alpha(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, internal: str
) -> None:
    """GDAL calls the fourth band alpha unless told otherwise.

    A mask beside the file counts also where the environment tells GDAL to look for none, as many
    set it for reading from clouds (and localtileserver does).
    """
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")
    path, hole = tmp_path / "a.tif", np.zeros(GRID.shape, bool)
    hole[10:30, 20:50] = True
    height, width = GRID.shape
    layout = {"height": height, "width": width, "count": 4, "dtype": "uint8"}
    place = {"crs": str(GRID.crs), "transform": GRID.transform}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        with rasterio.open(path, "w", driver="GTiff", **layout, **place) as raster:
            raster.write(noise(4))
            assert raster.colorinterp[3] == ColorInterp.alpha
        with rasterio.open(path, "r+") as raster:
            raster.write_mask(~hole)
    assert path.with_suffix(".tif.msk").exists() == (internal == "NO")
    imagery = open_imagery(path)
    assert imagery.bands == ("red", "green", "blue", "nir")
    pixels, valid = imagery.read(0, 0, *GRID.shape)
    assert (valid == ~hole).all() and (pixels == noise(4)).all()


def test_an_alpha_band_beside_near_infrared_masks(tmp_path: Path) -> None:
    """As gdalwarp -dstalpha makes; GDAL itself masks by the fourth of four bands at most."""
    plain, path = tmp_path / "a.tif", tmp_path / "b.tif"
    bands = ("red", "green", "blue", "nir=4")  # GDAL forgets the fourth's name
    write_geotiff(plain, noise(4), GRID, bands=BANDS)
    words = ["gdalwarp", "-q", "-t_srs", "EPSG:32611", "-dstalpha", str(plain), str(path)]
    subprocess.run(words, check=True)
    imagery = open_imagery(path, bands)
    assert imagery.bands == BANDS
    with rasterio.open(path) as raster:
        assert raster.count == 5
        alpha = raster.read(5)
    pixels, valid = imagery.read(0, 0, *imagery.shape)
    assert 0.02 < (alpha == 0).mean() < 0.9
    assert (valid == (alpha > 0)).all()
    points = [(0, 0), (width := GRID.shape[1], 0), (width, GRID.shape[0]), (0, GRID.shape[0])]
    words = ["gdal_translate", "-q", "-a_srs", str(GRID.crs)]
    for col, row in points:  # turned by 30 degrees
        x, y = GRID.transform * (Affine.rotation(30) * (col, row))
        words += ["-gcp", str(col), str(row), str(x), str(y)]
    turned = tmp_path / "turned.tif"
    subprocess.run([*words, str(plain), str(turned)], check=True)
    imagery = open_imagery(turned, bands)
    assert imagery.bands == BANDS
    pixels, valid = imagery.read(0, 0, *imagery.shape)
    assert 0.3 < valid.mean() < 0.7
    assert pixels[:, valid].min() > 0


@pytest.mark.skipif(not NAIP.exists(), reason="real NAIP chips (shared/data/naip_pairs) are absent")
def test_real_naip_has_four_bands_and_no_mask() -> None:
    path = sorted(NAIP.glob("*.tif"))[0]
    imagery = open_imagery(path)
    assert imagery.bands == BANDS
    assert imagery.resolution_m == pytest.approx(0.6, rel=0.01)
    assert imagery.read(0, 0, 256, 256)[1].all()


@pytest.mark.skipif(find_spec("localtileserver") is None, reason="localtileserver is not installed")
def test_real_landsat_keeps_the_files_own_colours_and_mask() -> None:
    spec = find_spec("localtileserver")
    assert spec is not None and spec.origin is not None
    imagery = open_imagery(Path(spec.origin).parent / "tiler/data/landsat7.tif")
    assert imagery.bands == ("red", "green", "blue")
    assert imagery.resolution_m == pytest.approx(30 * 0.79, rel=0.01)
    pixels, valid = imagery.read(0, 0, *imagery.shape)
    assert (valid == (pixels != 0).any(axis=0)).all()


def test_a_folder_of_rasters_reads_as_one(tmp_path: Path) -> None:
    whole = noise(3)
    folder = tmp_path / "quads"
    folder.mkdir()
    for n, (rows, cols) in enumerate(
        [
            (slice(0, 70), slice(0, 80)),
            (slice(60, 120), slice(0, 80)),
            (slice(0, 70), slice(80, 150)),
        ]
    ):
        write_geotiff(folder / f"{n}.tif", whole[:, rows, cols], GRID[rows, cols], bands=BANDS[:3])
    for source in (folder, f"{folder}/*.tif"):
        imagery = open_imagery(source)
        assert imagery.geobox == GRID
        pixels, valid = imagery.read(0, 0, 120, 150)
        assert not valid[70:, 80:].any()
        assert valid.sum() == 120 * 150 - 50 * 70
        assert (pixels == np.where(valid, whole, 0)).all()


def test_where_quads_overlap_valid_pixels_win_over_nodata(tmp_path: Path) -> None:
    whole = noise(1)
    first = whole.copy()
    first[:, 20:30] = 0
    write_geotiff(tmp_path / "0.tif", first, GRID, bands=["a"], nodata=0)
    write_geotiff(tmp_path / "1.tif", whole, GRID, bands=["a"], nodata=0)
    pixels, valid = open_imagery(tmp_path).read(0, 0, 120, 150)
    assert valid.all()
    assert (pixels == whole).all()


def test_a_mosaic_of_other_bands_is_refused(tmp_path: Path) -> None:
    write_geotiff(tmp_path / "0.tif", noise(1), GRID, bands=["a"])
    write_geotiff(tmp_path / "1.tif", noise(1), GRID, bands=["b"])
    with pytest.raises(
        ImageryError, match=r"1\.tif has the bands blue of uint8.*same bands in every"
    ):
        open_imagery(tmp_path)


def test_the_fingerprint_follows_content_grid_and_bands_not_names(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "a.tif", noise(3), GRID, bands=BANDS[:3])
    same = tmp_path / "b.tif"
    same.write_bytes(path.read_bytes())
    mine = open_imagery(path).fingerprint
    assert open_imagery(same).fingerprint == mine
    assert open_imagery(path, ["red", "green"]).fingerprint != mine
    moved = write_geotiff(tmp_path / "c.tif", noise(3), GRID.translate_pix(1, 0), bands=BANDS[:3])
    other = write_geotiff(tmp_path / "d.tif", noise(3, seed=1), GRID, bands=BANDS[:3])
    assert len({mine, open_imagery(moved).fingerprint, open_imagery(other).fingerprint}) == 3


def test_one_imagery_is_read_from_many_threads_and_survives_pickling(tmp_path: Path) -> None:
    pixels = noise(3)
    imagery = open_imagery(write_geotiff(tmp_path / "a.tif", pixels, GRID, bands=BANDS[:3]))
    copy = pickle.loads(pickle.dumps(imagery))
    assert copy == imagery
    with ThreadPoolExecutor(4) as pool:
        rows = list(range(0, 120, 3)) * 4
        for row, (read, _) in zip(
            rows, pool.map(lambda r: copy.read(r, 5, 3, 100), rows), strict=True
        ):
            assert (read == pixels[:, row : row + 3, 5:105]).all()


@pytest.mark.filterwarnings("error::rasterio.errors.NotGeoreferencedWarning")
def test_what_cannot_be_read_is_refused_by_name_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ImageryError, match=r"nowhere\.tif does not exist"):
        open_imagery(tmp_path / "nowhere.tif")
    text = tmp_path / "notes.tif"
    text.write_text("not a raster")
    with pytest.raises(ImageryError, match=r"notes\.tif cannot be opened as a raster"):
        open_raster(text)
    with pytest.raises(ImageryError, match=r"is a folder; name the rasters in it, such as .*/\*\."):
        open_raster(tmp_path)
    metres = plain(tmp_path / "metres.tif", noise(1), crs="EPSG:4326")
    with pytest.raises(ImageryError, match=r"no longitude and latitude in EPSG:4326.*-a_srs"):
        open_imagery(metres)
    homeless = plain(tmp_path / "homeless.tif", noise(1), crs=None)
    with pytest.raises(ImageryError, match=r"homeless\.tif has no coord.*gdal_edit\.py -a_srs"):
        open_imagery(homeless)
    with pytest.warns(NotGeoreferencedWarning):
        placeless = plain(tmp_path / "placeless.tif", noise(1), transform=Affine.identity())
    with pytest.raises(ImageryError, match=r"placeless\.tif has no usable transform"):
        open_imagery(placeless)
    with pytest.raises(ImageryError, match="no file matches"):
        open_imagery(f"{tmp_path}/*.jp2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageryError, match="empty holds no rasters"):
        open_imagery(tmp_path / "empty")
    (tmp_path / "empty" / "zarr.json").touch()
    with pytest.raises(ImageryError, match=r"is an embedding store.*--store"):
        open_imagery(tmp_path / "empty")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_a_truncated_raster_is_refused_at_the_door(tmp_path: Path, share: float) -> None:
    grid = GeoBox((600, 600), GRID.transform, GRID.crs)
    path = write_geotiff(tmp_path / "cut.tif", noise(3, grid), grid, bands=BANDS[:3])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ImageryError, match=r"cut\.tif.*(truncated|damaged)"):
        open_imagery(path)


def test_a_hole_in_the_middle_is_named_with_its_pixels(tmp_path: Path) -> None:
    grid = GeoBox((600, 600), GRID.transform, GRID.crs)
    path = write_geotiff(tmp_path / "hole.tif", noise(3, grid), grid, bands=BANDS[:3])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 60_000] = bytes(60_000)
    path.write_bytes(content)
    imagery = open_imagery(path)
    with pytest.raises(ImageryError, match=r"hole\.tif cannot be read at rows 0 to 600, columns 0"):
        imagery.read(0, 0, 600, 600)
