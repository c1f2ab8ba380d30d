"""A landmark of known coordinates lies in the right cell, however the imagery is placed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from fake_model import BlobModel
from odc.geo.geobox import GeoBox
from test_styles import run_qgis

from speciesmap.atlas import predict
from speciesmap.errors import AreaError
from speciesmap.mapping.embed import embed
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


def mapped(folder: Path, scene: Path, zone: str, **grid: Any) -> Path:
    """Map the square out of a copy of the scene in another zone."""
    filed = folder / "filed.tif"
    words = ["gdalwarp", "-q", "-t_srs", zone, "-tr", "0.6", "0.6", "-r", "bilinear"]
    subprocess.run([*words, "-dstnodata", "0", str(scene), str(filed)], check=True)
    made = predict(
        BlobModel(bands=BANDS, resolution_m=0.6),
        imagery=filed,
        bbox=bounds_in(GRID[40:200, 40:220]),
        stride_px=2,
        species=["Quercus agrifolia"],
        out=folder / "maps",
        **grid,
    )
    return made.maps[0].path


@pytest.mark.parametrize(
    ("zone", "grid"),
    [
        ("EPSG:26911", {}),
        ("EPSG:26910", {}),
        ("EPSG:26910", {"crs": "EPSG:32611", "resolution_m": 0.6}),
        ("EPSG:26911", {"crs": "EPSG:4326", "resolution_m": 0.6}),
    ],
    ids=["as it is", "filed under the next zone", "warped back", "in degrees"],
)
def test_a_landmark_is_within_half_a_cell(
    tmp_path: Path, scene: Path, zone: str, grid: dict[str, Any]
) -> None:
    with rasterio.open(mapped(tmp_path, scene, zone, **grid)) as raster:
        values = np.nan_to_num(raster.read(1), nan=-1)
        row, col = np.unravel_index(values.argmax(), values.shape)
        x, y = raster.transform * (col + 0.5, row + 0.5)
        there = pyproj.Transformer.from_crs(4326, raster.crs, always_xy=True).transform(*PLACE)
        assert np.abs(np.subtract((x, y), there) / raster.res).max() <= 0.5


@pytest.mark.qgis
def test_qgis_reads_a_landmark_within_half_a_cell(tmp_path: Path, scene: Path) -> None:
    path = mapped(tmp_path, scene, "EPSG:26910", crs="EPSG:32611", resolution_m=0.6)
    assert max(run_qgis(tmp_path, WHERE, str(path), *map(str, PLACE))) <= 0.5


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
