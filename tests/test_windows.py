"""Windows and cells: exact, anchored to the imagery, and placed at the windows' centres."""

from __future__ import annotations

import numpy as np
import pyproj
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from speciesmap.errors import AreaError, ImageryError
from speciesmap.rasters.windows import WindowGrid, bounds_in, cells_in, coverage, window_start

UTM = GeoBox((1000, 1200), Affine(0.6, 0, 550_000, 0, -0.6, 4_180_000), "EPSG:32610")
ROTATED = Affine(2, 0, 550_000, 0, -3, 4_180_000) * Affine.rotation(20)
DEGREES = GeoBox((300, 400), Affine(5.4e-6, 0, -122.43, 0, -5.4e-6, 37.8), "EPSG:4326")
ASKEW = GeoBox((300, 200), ROTATED, "EPSG:32610")
sides, rasters = st.integers(1, 400), st.integers(64, 500)


@given(
    height=st.integers(64, 500),
    width=st.integers(64, 500),
    row=st.integers(-999, 999),
    col=st.integers(-999, 999),
    window=sides,
    stride=st.integers(1, 64),
)
def test_every_cell_whose_centre_lies_in_the_raster_is_there_and_no_other(
    height: int, width: int, row: int, col: int, window: int, stride: int
) -> None:
    transform = UTM.transform * Affine.translation(col, row)
    grid = WindowGrid(GeoBox((height, width), transform, UTM.crs), window, stride)
    for axis, side in enumerate((height, width)):
        count = grid.cells[axis]
        centres = np.array([grid.start(k, k)[axis] for k in range(-1, count + 1)]) + window / 2
        inside = (centres >= 0) & (centres < side)
        assert inside.tolist() == [False, *[True] * count, False]


@given(window=st.integers(1, 64), stride=st.integers(1, 64))
def test_a_cell_is_the_square_at_its_windows_centre(window: int, stride: int) -> None:
    grid = WindowGrid(UTM, window, stride)
    cells = grid.geobox
    for cell in ((0, 0), (grid.cells[0] - 1, 3)):
        row, col = grid.start(*cell)
        expected = UTM.transform * (col + window / 2, row + window / 2)
        assert cells.transform * (cell[1] + 0.5, cell[0] + 0.5) == pytest.approx(expected, abs=1e-6)
        corner = cells.transform * (cell[1], cell[0])
        opposite = cells.transform * (cell[1] + 1, cell[0] + 1)
        assert opposite[0] - corner[0] == pytest.approx(stride * 0.6)


@pytest.mark.parametrize("imagery", [UTM, ASKEW, DEGREES], ids=["metres", "rotated", "degrees"])
@pytest.mark.parametrize("shift", [0, 0.5, 0.27])
@given(data=st.data(), window=st.integers(1, 64), stride=st.integers(1, 40))
def test_parts_of_a_raster_have_the_cells_of_the_whole(
    imagery: GeoBox, shift: float, data: st.DataObject, window: int, stride: int
) -> None:
    """Wherever pixels begin in the CRS: at whole numbers of pixels, at halves, or anywhere."""
    moved = imagery.transform * Affine.translation(shift, shift)
    whole = GeoBox(imagery.shape, moved, imagery.crs)
    top, left = data.draw(st.integers(0, 150)), data.draw(st.integers(0, 80))
    part = whole[top : top + 120, left : left + 110]
    grid, inner = WindowGrid(whole, window, stride), WindowGrid(part, window, stride)
    for axis, (begin, side) in enumerate(((top, 120), (left, 110))):
        starts = np.array([grid.start(k, k)[axis] for k in range(grid.cells[axis])])
        centres = starts + window / 2 - begin
        found = [inner.start(k, k)[axis] + begin for k in range(inner.cells[axis])]
        assert found == starts[(centres >= 0) & (centres < side)].tolist()
    rows, cols = slice(1, grid.cells[0]), slice(0, grid.cells[1] - 1)
    row, col, height, width = grid.pixels(rows, cols)
    cropped = WindowGrid(whole[row : row + height, col : col + width], window, stride)
    assert cropped.cells == (grid.cells[0] - 1, grid.cells[1] - 1)
    assert cropped.geobox.transform.almost_equals(grid.geobox[rows, cols].transform, 1e-6)


@given(row=st.floats(-500, 500), col=st.floats(-500, 500), window=st.integers(1, 300))
def test_the_window_of_a_place_is_the_one_centred_nearest(
    row: float, col: float, window: int
) -> None:
    start = window_start(row, col, window)
    for place, first in zip((row, col), start, strict=True):
        assert abs(first + window / 2 - place) <= 0.5 + 1e-12


@pytest.mark.parametrize("imagery", [UTM, ASKEW], ids=["north up", "rotated"])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32610", "EPSG:3857"])
def test_an_area_takes_every_cell_whose_centre_it_holds(imagery: GeoBox, crs: str) -> None:
    cells = WindowGrid(imagery, 32, 8).geobox
    left, bottom, right, top = bounds_in(imagery, crs)
    bbox = (
        left + 0.303 * (right - left),
        bottom + 0.253 * (top - bottom),
        left + 0.607 * (right - left),
        bottom + 0.507 * (top - bottom),
    )
    rows, cols = cells_in(bbox, cells, crs)
    j, i = np.meshgrid(np.arange(cells.shape[1]), np.arange(cells.shape[0]))
    t = cells.transform
    x = t.a * (j + 0.5) + t.b * (i + 0.5) + t.c
    y = t.d * (j + 0.5) + t.e * (i + 0.5) + t.f
    x, y = pyproj.Transformer.from_crs(cells.crs, crs, always_xy=True).transform(x, y)
    within = (x > bbox[0]) & (x < bbox[2]) & (y > bbox[1]) & (y < bbox[3])
    assert within.any()
    found = np.zeros_like(within)
    found[rows, cols] = True
    assert found[within].all()
    if imagery is UTM and crs == "EPSG:32610":
        assert (found == within).all()


def test_a_box_around_everything_takes_everything() -> None:
    cells = WindowGrid(UTM, 256, 64).geobox
    assert cells_in((-180, -90, 180, 90), cells) == (
        slice(0, cells.shape[0]),
        slice(0, cells.shape[1]),
    )


@pytest.mark.parametrize("turns", [0, 360, -360])
@pytest.mark.parametrize(("right", "up"), [(1, 1), (2, 1), (4, 5)])
def test_the_share_of_an_area_that_imagery_covers(right: int, up: int, turns: int) -> None:
    west, south, east, north = bounds_in(UTM, "EPSG:4326")
    bbox = (west + turns, south, west + right * (east - west) + turns, south + up * (north - south))
    assert coverage(bbox, UTM) == pytest.approx(1 / (right * up))
    assert coverage((west, south, (west + east) / 2, north), UTM) == pytest.approx(1)


@pytest.mark.parametrize(
    ("bbox", "says"),
    [
        ((37.76, -122.43, 37.77, -122.42), "did you mean --bbox -122.43 37.76 -122.42 37.77 ?"),
        ((37.6, -122.6, 38.0, -122.1), "did you mean --bbox -122.6 37.6 -122.1 38.0 ?"),
        ((10, 10, 11, 11), "misses the imagery, which covers -122.4"),
        ((-122.42, 37.76, -122.43, 37.77), "its west -122.42 is not below its east -122.43"),
        ((-122.43, 37.77, -122.42, 37.76), "its south 37.77 is not below its north 37.76"),
        ((550_000, 4_179_000, 551_000, 4_180_000), "the CRS of numbers that are no degrees as"),
        ((float("nan"), 37, 38, 39), "not four numbers"),
        ((-122.43, 37.764, -122.4299999, 37.7640001), "holds the centre of no cell"),
    ],
)
def test_an_area_that_cannot_be_mapped_says_why(bbox: tuple[float, ...], says: str) -> None:
    cells = WindowGrid(UTM, 256, 64).geobox
    with pytest.raises(AreaError) as caught:
        cells_in(bbox, cells)
    assert says in str(caught.value)


def test_an_unknown_crs_of_the_area_is_named() -> None:
    with pytest.raises(AreaError, match="EPSG:1 is not a CRS"):
        cells_in((0, 0, 1, 1), UTM, "EPSG:1")


def test_a_raster_without_a_single_cell_is_refused() -> None:
    with pytest.raises(ImageryError, match="too small for cells of 90 px"):
        WindowGrid(UTM[:20, :500], 100, 90)
