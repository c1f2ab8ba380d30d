"""One raster, whole or cut up, here or on servers: the same map from every kind of source."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from fake_model import FakeModel
from loopback import rustac, serving, stac_api
from odc.geo.geobox import GeoBox
from rasterio._env import del_gdal_config
from rasterio.env import set_gdal_config
from test_remote import BANDS, COLLECTION, cog, item

from speciesmap.atlas import predict
from speciesmap.mapping.embed import embed
from speciesmap.present.warp import Grid, read_picture
from speciesmap.rasters.windows import bounds_in, bounds_of

GRID = GeoBox((300, 380), Affine(0.6, 0, 550_000, 0, -0.6, 4_180_000), "EPSG:32610")
WHOLE = bounds_in(GRID)
PART = bounds_in(GRID[60:250, 50:330])
CUTS = (1, 7, 50)


def landscape() -> np.ndarray:
    """Smooth enough that a warp keeps what a window shows."""
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[: GRID.shape[0], : GRID.shape[1]]
    waves = [
        np.sin(rows / a + p) * np.cos(cols / b - p)
        for a, b, p in rng.uniform(4, 15, (len(BANDS), 3))
    ]
    return np.rint(125 + 100 * np.array(waves)).astype(np.uint8)


def cut_up(folder: Path, count: int, address: str) -> list[dict[str, Any]]:
    """Write ragged overlapping scenes that together hold all of the landscape, and their items."""
    folder.mkdir()
    whole, rng, items = landscape(), np.random.default_rng(count), []
    down = max(1, int(count**0.5))
    edges = np.linspace(0, GRID.shape[0], down + 1).astype(int)
    for k in range(down):
        cuts = np.linspace(0, GRID.shape[1], count // down + (k < count % down) + 1).astype(int)
        for left, right in pairwise(cuts):
            grow = rng.integers(0, 9, 4)
            top, bottom = max(0, edges[k] - grow[0]), min(GRID.shape[0], edges[k + 1] + grow[1])
            left, right = max(0, left - grow[2]), min(GRID.shape[1], right + grow[3])
            place = (slice(top, bottom), slice(left, right))
            name = f"{len(items):02}"
            path = cog(folder / f"{name}.tif", whole[:, *place], GRID[place], block=128)
            items.append(item(name, path, f"{address}/{name}.tif", told=count == 50))
            items[-1]["collection"] = folder.name
    assert len(items) == count
    return items


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Every kind of source, by name, while their servers run."""
    folder = tmp_path_factory.mktemp("sources")
    served = folder / "bucket"
    served.mkdir()
    found = {"a GeoTIFF": str(cog(served / "whole.tif", landscape(), GRID))}
    with ExitStack() as running:
        server = running.enter_context(serving(folder))
        found["http"] = f"{server.address}/bucket/whole.tif"
        found["s3"] = "s3://bucket/whole.tif"
        for name, value in {
            "AWS_S3_ENDPOINT": server.address.removeprefix("http://"),
            "AWS_HTTPS": "NO",
            "AWS_VIRTUAL_HOSTING": "FALSE",
            "AWS_NO_SIGN_REQUEST": "YES",
        }.items():
            set_gdal_config(name, value)
            running.callback(del_gdal_config, name)
        for count in CUTS:
            cut = served / f"cut{count}"
            items = cut_up(cut, count, f"{server.address}/bucket/cut{count}")
            files = sorted(map(str, cut.glob("*.tif")))
            found |= {f"a folder of {count}": str(cut), f"a glob of {count}": f"{cut}/*.tif"}
            for kind, suffix, words in (("VRT", "vrt", ["gdalbuildvrt", "-q"]),
                                        ("tile index", "gpkg", ["gdaltindex"])):  # fmt: skip
                made = folder / f"{count}.{suffix}"
                subprocess.run([*words, str(made), *files], check=True, capture_output=True)
                found[f"a {kind} of {count}"] = str(made)
            if rustac() is None or find_spec("pystac_client") is None:
                continue
            (folder / f"api{count}").mkdir()
            described = {**COLLECTION, "id": cut.name}
            api = stac_api(folder / f"api{count}", described, items)
            found[f"a STAC API of {count}"] = running.enter_context(api)
            if count == 7:
                pystac = pytest.importorskip("pystac")
                catalog = pystac.Catalog("root", "all there is")
                catalog.add_child(pystac.Collection.from_dict(described))
                catalog.get_child(cut.name).add_items(map(pystac.Item.from_dict, items))
                catalog.normalize_and_save(str(folder / "cat"), pystac.CatalogType.SELF_CONTAINED)
                address = f"{server.address}/cat/catalog.json"
                found["a static catalog of 7"] = f"stac+{address}#{cut.name}"
        yield found


def mapped(source: str, out: Path, bbox: tuple[float, ...]) -> tuple[np.ndarray, Any]:
    made = predict(
        FakeModel(BANDS, resolution_m=0.6),
        imagery=source,
        bbox=bbox,
        stride_px=16,
        bands=("red", "green", "blue", "nir=4"),  # gdalbuildvrt forgets what the fourth shows
        species=["Quercus agrifolia"],
        out=out,
    )
    with rasterio.open(made.maps[0].path) as raster:
        return raster.read(), (raster.transform, raster.crs)


def same(one: tuple[np.ndarray, Any], other: tuple[np.ndarray, Any], kind: str) -> None:
    assert one[1][1] == other[1][1] and one[1][0].almost_equals(other[1][0], 1e-6), kind
    np.testing.assert_array_equal(one[0], other[0], err_msg=kind)


def test_every_source_gives_the_same_map(sources: dict[str, str], tmp_path: Path) -> None:
    expected = mapped(sources["a GeoTIFF"], tmp_path / "expected", WHOLE)
    assert np.isfinite(expected[0]).all() and np.ptp(expected[0]) > 0.01
    for number, (kind, source) in enumerate(sources.items()):
        same(mapped(source, tmp_path / str(number), WHOLE), expected, kind)


def test_every_source_gives_the_same_picture_under_maps(sources: dict[str, str]) -> None:
    left, bottom, right, top = bounds_of(WHOLE, "EPSG:4326", "EPSG:3857")
    pictures = {
        kind: read_picture(source, Grid(left, bottom, right, top, 1, 1), 64).pixels.astype(int)
        for kind, source in sources.items()
    }
    expected = pictures["a GeoTIFF"]
    for kind, picture in pictures.items():
        assert picture.shape == expected.shape, kind
        assert np.median(np.abs(picture - expected)) < 10, kind


def test_a_part_of_every_source_is_the_same(sources: dict[str, str], tmp_path: Path) -> None:
    """Though of STAC only the scenes of the area are known, and their first pixel differs."""
    expected = mapped(sources["a GeoTIFF"], tmp_path / "expected", PART)
    assert np.isfinite(expected[0]).all()
    whole = mapped(sources["a GeoTIFF"], tmp_path / "whole", WHOLE)
    offset = ~whole[1][0] * expected[1][0] * (0, 0)
    col, row = (round(value) for value in offset)
    assert offset == pytest.approx((col, row), abs=1e-6)
    height, width = expected[0].shape[1:]
    np.testing.assert_array_equal(
        expected[0], whole[0][:, row : row + height, col : col + width], err_msg="cells moved"
    )
    kinds = [f"a STAC API of {count}" for count in CUTS]
    for number, kind in enumerate((*kinds, "a tile index of 7", "a folder of 50", "http")):
        if kind in sources:
            same(mapped(sources[kind], tmp_path / str(number), PART), expected, kind)


def test_warped_sources_give_nearly_the_same_vectors(
    sources: dict[str, str], tmp_path: Path
) -> None:
    """Scenes of zone 10 on a grid of zone 11, each warped for itself."""
    found = {}
    for number, kind in enumerate(
        ("a GeoTIFF", "a folder of 7", "a VRT of 50", "a STAC API of 50")
    ):
        if kind not in sources:
            continue
        store = embed(
            FakeModel(BANDS, resolution_m=0.6),
            sources[kind],
            tmp_path / f"{number}.zarr",
            bbox=PART,
            stride_px=16,
            bands=("red", "green", "blue", "nir=4"),
            crs="EPSG:32611",
        )
        rows, cols = (slice(0, side) for side in store.geobox.shape)
        vectors = store.read(rows, cols).astype(np.float64)
        at = [
            store.geobox.transform * (c + 0.5, r + 0.5) for r, c in np.ndindex(*vectors.shape[:2])
        ]
        found[kind] = {
            (round(x, 2), round(y, 2)): vector
            for (x, y), vector in zip(at, vectors.reshape(-1, vectors.shape[2]), strict=True)
        }
    whole = found.pop("a GeoTIFF")
    for kind, vectors in found.items():
        both = [p for p in vectors if p in whole and np.isfinite([vectors[p], whole[p]]).all()]
        assert len(both) > 100, kind
        cosines = [float(vectors[p] @ whole[p]) for p in both]
        norms = [np.linalg.norm(vectors[p]) * np.linalg.norm(whole[p]) for p in both]
        assert np.divide(cosines, norms).min() > 0.999, kind
