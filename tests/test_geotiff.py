"""Written rasters: read back alike everywhere, maps valid as COGs, nothing half-written."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from rasterio.enums import ColorInterp
from rio_cogeo.cogeo import cog_validate

from speciesmap.errors import OutputError
from speciesmap.rasters.geotiff import MapWriter, write_geotiff

GRID = GeoBox((600, 700), Affine(0.6, 0, 550_000, 0, -0.6, 4_180_000), "EPSG:32610")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_pixels_grid_and_meaning_come_back(tmp_path: Path, dtype: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (4, *GRID.shape)).astype(dtype)
    bands = ["red", "green", "blue", "nir"]
    path = write_geotiff(tmp_path / "deep" / "a.tif", pixels, GRID, bands=bands, nodata=0)
    with rasterio.open(path) as raster:
        assert (raster.read() == pixels).all()
        assert raster.transform == GRID.transform
        assert raster.crs.to_epsg() == 32610
        assert list(raster.descriptions) == bands
        assert [c.name for c in raster.colorinterp] == bands
        assert raster.nodata == 0
        assert raster.is_tiled
        assert raster.compression.name == "deflate"


def test_colours_may_be_said_and_a_single_band_is_grey(tmp_path: Path) -> None:
    one = np.zeros((1, *GRID.shape), np.float32)
    with rasterio.open(write_geotiff(tmp_path / "a.tif", one, GRID, bands=["truth"])) as raster:
        assert raster.colorinterp == (ColorInterp.gray,)
    path = write_geotiff(tmp_path / "b.tif", one, GRID, bands=["x"], colorinterp=[ColorInterp.swir])
    with rasterio.open(path) as raster:
        assert raster.colorinterp == (ColorInterp.swir,)


def test_an_existing_file_survives_unless_told_otherwise(tmp_path: Path) -> None:
    old, new = np.zeros((1, *GRID.shape), np.uint8), np.ones((1, *GRID.shape), np.uint8)
    path = write_geotiff(tmp_path / "a.tif", old, GRID, bands=["a"])
    with pytest.raises(OutputError, match=r"a\.tif exists already; pass --overwrite"):
        write_geotiff(path, new, GRID, bands=["a"])
    with rasterio.open(path) as raster:
        assert not raster.read().any()
    write_geotiff(path, new, GRID, bands=["a"], overwrite=True)
    with rasterio.open(path) as raster:
        assert raster.read().all()
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_pixels_that_do_not_fit_their_grid_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit 2 bands"):
        write_geotiff(tmp_path / "a.tif", np.zeros((1, 600, 700)), GRID, bands=["a", "b"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(3, 5), (300, 300), (600, 700)])
def test_a_map_written_in_blocks_is_a_valid_cog(tmp_path: Path, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random(shape, np.float32)
    values[: shape[0] // 2, : shape[1] // 2] = np.nan
    grid = GeoBox(shape, GRID.transform, GRID.crs)
    path = tmp_path / "map.tif"
    tags = {"TAXON": "Quercus lobata", "QUERY": "taxon", "MODEL": "abc"}
    with MapWriter(path, grid, bands=["suitability"], tags=tags) as writer:
        for row in range(0, shape[0], 100):
            for col in range(0, shape[1], 130):
                writer.write(row, col, values[None, row : row + 100, col : col + 130])
    valid, errors, warnings = cog_validate(path, strict=True)
    assert valid, (errors, warnings)
    with rasterio.open(path) as raster:
        assert np.array_equal(raster.read(1), values, equal_nan=True)
        assert np.isnan(raster.nodata)
        assert raster.descriptions == ("suitability",)
        assert {k: raster.tags()[k] for k in tags} == tags
        assert raster.tags()["AREA_OR_POINT"] == "Area"
        assert float(raster.tags(1)["STATISTICS_MAXIMUM"]) == pytest.approx(np.nanmax(values))
        assert raster.transform == GRID.transform
        for factor in raster.overviews(1):
            small = raster.read(1, out_shape=(shape[0] // factor, shape[1] // factor))
            assert np.nanmin(small) >= 0  # averages stay in range, cubic resampling does not
            assert np.nanmax(small) <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["map.tif"]


def test_a_map_of_nothing_but_nodata_is_still_a_cog(tmp_path: Path) -> None:
    with MapWriter(tmp_path / "map.tif", GRID, bands=["suitability"], tags={}) as writer:
        writer.write(0, 0, np.full((1, *GRID.shape), np.nan, np.float32))
    assert cog_validate(tmp_path / "map.tif", strict=True)[0]


def test_cells_that_were_never_written_are_nodata(tmp_path: Path) -> None:
    with MapWriter(tmp_path / "map.tif", GRID, bands=["suitability"], tags={}) as writer:
        writer.write(10, 20, np.ones((1, 5, 5), np.float32))
    with rasterio.open(tmp_path / "map.tif") as raster:
        assert np.isfinite(raster.read(1)).sum() == 25


def test_a_map_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="stop"),
        MapWriter(tmp_path / "map.tif", GRID, bands=["suitability"], tags={}),
    ):
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def _plainly(path: Path, pixels: NDArray[np.float32]) -> None:
    write_geotiff(path, pixels, GRID, bands=["a"])


def _as_a_map(path: Path, pixels: NDArray[np.float32]) -> None:
    with MapWriter(path, GRID, bands=["suitability"], tags={}) as writer:
        for row in range(0, GRID.shape[0], 32):
            writer.write(row, 0, pixels[:, row : row + 32])


@pytest.mark.parametrize("write", [_plainly, _as_a_map])
def test_a_disk_that_fills_up_is_said_and_leaves_nothing(
    tmp_path: Path, write: Callable[[Path, NDArray[np.float32]], None]
) -> None:
    path = tmp_path / "a.tif"
    pixels = np.random.default_rng(0).random((1, *GRID.shape), np.float32)
    write(path, pixels)
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    landed = []
    for most in (*range(0, size, size // 8), *range(size - 6000, size + 6000, 700)):
        path.unlink(missing_ok=True)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
            write(path, pixels)
        except OutputError as error:
            assert str(path) in str(error)
            assert not list(tmp_path.iterdir())
        else:
            landed.append(most)
            with rasterio.open(path) as raster:
                assert (raster.read() == pixels).all()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(landed) < 12
