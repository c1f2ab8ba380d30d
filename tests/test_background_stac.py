"""Background from a STAC collection: the scenes that are asked for, around the data set alone."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely.geometry import box, mapping
from tiny import BANDS, SIDE, TinyScene, tiny_scene

from speciesmap.config import load_config
from speciesmap.errors import AreaError, ConfigError
from speciesmap.learning.sources import Sources, draw_background, open_sources
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.windows import bounds_in

BESIDE = 1500  # pixels of the collection's scenes on each side of the data set's
YEARS = {2018: 0, 2020: 100}
"""What the scenes of each year have around the data set's."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> TinyScene:
    return tiny_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def collection(scene: TinyScene, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A static catalog with a scene of each year, larger than the data set.

    Beside the collection of one UTM zone there is one that has scenes of two.
    """
    folder = tmp_path_factory.mktemp("catalog")
    with rasterio.open(scene.imagery) as raster:
        middle, transform = raster.read(), raster.transform
    side = SIDE + 2 * BESIDE
    grid = GeoBox((side, side), transform * Affine.translation(-BESIDE, -BESIDE), "EPSG:32610")
    bounds = bounds_in(grid)
    extent = pystac.Extent(
        pystac.SpatialExtent([list(bounds)]), pystac.TemporalExtent([[None, None]])
    )
    naip = pystac.Collection("naip", "aerial photos", extent)
    for year, around in YEARS.items():
        pixels = np.full((len(BANDS), side, side), around, np.uint8)
        if year == 2018:
            pixels[:, BESIDE : BESIDE + SIDE, BESIDE : BESIDE + SIDE] = middle
        path = write_geotiff(folder / f"{year}.tif", pixels, grid, bands=BANDS)
        item = pystac.Item(
            str(year), mapping(box(*bounds)), list(bounds), datetime(year, 6, 1, tzinfo=UTC), {}
        )
        item.add_asset("image", pystac.Asset(str(path), media_type=pystac.MediaType.COG))
        naip.add_item(item)
    mixed = naip.clone()
    mixed.id, mixed.links = "mixed", []
    neighbour = grid.to_crs("EPSG:32611", resolution=20)
    older = np.full((len(BANDS), *neighbour.shape), 7, np.uint8)
    path = write_geotiff(folder / "zone11.tif", older, neighbour, bands=BANDS)
    item = pystac.Item("zone11", mapping(box(*bounds)), list(bounds), datetime(2010, 6, 1), {})
    item.add_asset("image", pystac.Asset(str(path), media_type=pystac.MediaType.COG))
    mixed.add_items([item, *(other.clone() for other in naip.get_items())])
    catalog = pystac.Catalog("here", "scenes")
    catalog.add_children([naip, mixed])
    catalog.normalize_and_save(str(folder / "stac"), pystac.CatalogType.SELF_CONTAINED)
    return f"stac+{folder}/stac/catalog.json#naip"


def opened(scene: TinyScene, **data: Any) -> Sources:
    content = {
        "stage": "finetune",
        "init": "unused",
        "data": {"dataset": str(scene.chips), **data},
    }
    return open_sources(load_config(content).data)


@pytest.mark.parametrize("year", ["2018", 2018, "2018-01/2019-12", date(2018, 6, 1)])
def test_background_is_of_the_year_asked_for_and_around_the_data_set(
    scene: TinyScene, collection: str, year: Any
) -> None:
    sources = opened(scene, imagery=collection, datetime=year)
    assert sources.imagery is not None and sources.dataset is not None
    assert sources.imagery.bands == BANDS
    facts = sources.dataset.facts.iloc[sources.rows]
    height, width = sources.imagery.shape
    assert max(height, width) < SIDE + 2 * BESIDE, "a kilometre around the places"
    assert min(height, width) > SIDE
    assert sources.imagery.contains(facts["longitude"], facts["latitude"]).all()
    rows, cols = sources.imagery.rowcol(facts["longitude"], facts["latitude"])
    side = sources.window_px
    for k, row, col in zip(sources.rows, np.rint(rows), np.rint(cols), strict=True):
        there, _ = sources.imagery.read(int(row) - side // 2, int(col) - side // 2, side, side)
        np.testing.assert_array_equal(there, sources.dataset.aerial([k])[0])
    newest = opened(scene, imagery=collection).imagery
    assert newest is not None and (newest.read(0, 0, 9, 9)[0] == YEARS[2020]).all()
    drawn = draw_background(newest, side, 20, np.random.default_rng(0))
    assert ((drawn.rows >= 0) & (drawn.rows < newest.shape[0])).all()


def test_scenes_of_two_utm_zones_are_read_on_one_grid_and_too_wide_an_area_is_told(
    scene: TinyScene, collection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = collection.replace("#naip", "#mixed")
    sources = opened(scene, imagery=mixed, datetime="2010/2018")
    assert sources.imagery is not None and sources.dataset is not None
    assert str(sources.imagery.geobox.crs) == "EPSG:32610"
    facts = sources.dataset.facts.iloc[sources.rows]
    rows, cols = sources.imagery.rowcol(facts["longitude"], facts["latitude"])
    side = sources.window_px
    for k, row, col in zip(sources.rows, np.rint(rows), np.rint(cols), strict=True):
        there, _ = sources.imagery.read(int(row) - side // 2, int(col) - side // 2, side, side)
        np.testing.assert_array_equal(there, sources.dataset.aerial([k])[0])
    monkeypatch.setattr("speciesmap.rasters.grid.WIDEST_UTM_DEG", 0.001)
    with pytest.raises(AreaError, match=r"degrees wide, .*; name scenes of one CRS") as caught:
        opened(scene, imagery=mixed, datetime="2010/2018")
    assert "--" not in str(caught.value), "a configuration has no such option"


def test_what_cannot_be_found_is_said(scene: TinyScene, collection: str) -> None:
    with pytest.raises(
        AreaError, match=r"has nothing in .* in 2010; check that it has a collection naip"
    ):
        opened(scene, imagery=collection, datetime="2010")
    with pytest.raises(ConfigError, match=r"data\.query choose items of STAC; .*tif has none"):
        opened(scene, imagery=str(scene.imagery), query=["eo:cloud_cover<10"])
    with pytest.raises(ConfigError, match=r"only a data set says where; add data\.dataset"):
        opened(scene, dataset=None, imagery=collection, window_px=16)
