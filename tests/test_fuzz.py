"""A short run of tests/fuzz/readers.py, and what its long runs found."""

from __future__ import annotations

import io
import json
import sys
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
import yaml
from odc.geo.geobox import GeoBox
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin
from safetensors.torch import load_file, save_file
from tiny import tiny_scene

from speciesmap.config import load_config, shipped_config
from speciesmap.datasets import paired
from speciesmap.datasets.paired import open_paired
from speciesmap.datasets.photos import MOST_PIXELS, open_photo
from speciesmap.describe import describe
from speciesmap.errors import (
    ConfigError,
    DatasetError,
    ImageryError,
    ModelError,
    ObservationsError,
    QueryError,
    SpeciesmapError,
    StoreError,
)
from speciesmap.learning.surveys import read_surveys
from speciesmap.mapping.query import photo_query
from speciesmap.models import load_model, save_model
from speciesmap.models.trust import TRUST
from speciesmap.present.webmap import make_map
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import open_imagery, open_raster
from speciesmap.rasters.stac import find_scenes
from speciesmap.rasters.store import EmbeddingStore, Identity, open_store

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
from damage import bounded
from readers import READERS, fuzz, trusted
from sources import BBOX, item


@pytest.mark.parametrize("name", READERS)
def test_no_reader_answers_damage_with_anything_but_words(name: str) -> None:
    outcome, findings = fuzz(name, 15)
    assert not findings
    assert sum(outcome.values()) >= 5


def bomb() -> bytes:
    buffer = io.BytesIO()
    side = int(MOST_PIXELS**0.5) + 9
    Image.new("1", (side, side)).save(buffer, "PNG")
    assert buffer.tell() < 100_000
    return buffer.getvalue()


def test_a_photo_that_explodes_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb())
    model = SimpleNamespace(ground=True, eval=lambda: None)
    with pytest.raises(QueryError, match="million are decoded"):
        photo_query(model, [tmp_path / "bomb.png"])  # type: ignore[arg-type]


def test_a_large_jpeg_is_decoded_at_a_fraction() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9000, 9000), (200, 30, 30)).save(buffer, "JPEG")
    photo = open_photo(buffer, 512)
    assert max(photo.size) < 1200
    assert photo.getpixel((5, 5))[0] > 150  # type: ignore[index]


@pytest.mark.parametrize("name", ["a.eps", "a.xbm", "a.txt"])
def test_formats_that_are_no_photos_are_not_tried(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match="cannot identify"):
        open_photo(tmp_path / name)


def test_a_raster_with_too_few_control_points_is_named(tmp_path: Path) -> None:
    path = tmp_path / "one.tif"
    points = [GroundControlPoint(0, 0, 1, 1)]
    with rasterio.open(
        path, "w", driver="GTiff", width=4, height=4, count=1, dtype="uint8", gcps=points,
        crs="EPSG:4326",
    ) as raster:  # fmt: skip
        raster.write(np.ones((1, 4, 4), np.uint8))
    with pytest.raises(ImageryError, match=r"one\.tif"):
        open_raster(path)


def test_a_crs_that_is_nowhere_on_earth_is_named(tmp_path: Path) -> None:
    path = tmp_path / "local.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=8, height=8, count=1, dtype="uint8",
        crs=rasterio.CRS.from_wkt('LOCAL_CS["site",UNIT["metre",1]]'),
        transform=from_origin(10, 10, 2, 2),
    ) as raster:  # fmt: skip
        raster.write(np.ones((1, 8, 8), np.uint8))
    with pytest.raises(ImageryError, match="no longitude and latitude"):
        assert open_imagery(path).resolution_m
    with pytest.raises(SpeciesmapError):
        describe(path)
    with pytest.raises(ImageryError, match="does not lie within"):
        make_map([path], tmp_path / "page.html")


def test_a_band_whose_description_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    grid = GeoBox((8, 8), from_origin(560000, 4150000, 10, 10), "EPSG:32610")
    write_geotiff(path, np.ones((1, 8, 8), np.uint8), grid, bands=["redwood"])
    assert path.read_bytes().count(b"redwood") == 1
    path.write_bytes(path.read_bytes().replace(b"redwood", b"\xffedwood"))
    with pytest.raises(ImageryError, match=r"a\.tif cannot be opened"):
        open_imagery(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"taxa": [{"lineage": []}]}, "taxa.0.name"),
        ({"taxa": [{"name": " ", "lineage": []}]}, "taxa.0.name"),
        ({"taxa": [{"name": "a", "lineage": [None]}]}, "taxa.0.lineage.0"),
        ({"taxa": 3}, "taxa"),
        ({"resolution_m": ["x"]}, "resolution_m"),
        ({"resolution_m": 0}, "resolution_m"),
        ({"dtype": "object"}, "dtype"),
        ({"bands": [1, 2, 3, 4]}, "bands.0"),
    ],
)
def test_notes_of_a_data_set_are_checked(tmp_path: Path, change: object, said: str) -> None:
    chips = tiny_scene(tmp_path, rows=6).chips
    notes = json.loads((chips / "dataset.json").read_text())
    (chips / "dataset.json").write_text(json.dumps(notes | change))  # type: ignore[operator]
    with pytest.raises(DatasetError, match=said):
        open_paired(chips)


def test_a_damaged_page_of_parquet_is_named(tmp_path: Path) -> None:
    chips = tiny_scene(tmp_path, rows=6).chips
    [file] = chips.rglob("*.parquet")
    data = bytearray(file.read_bytes())
    data[4:400] = b"\xff" * 396
    file.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match=r"train-.*parquet"):
        open_paired(chips).ground([0])


def test_a_name_of_a_column_that_is_no_text_is_named(tmp_path: Path) -> None:
    chips = tiny_scene(tmp_path, rows=6).chips
    [file] = chips.rglob("*.parquet")
    data = file.read_bytes()
    at = data.rindex(b"observation_uuid")
    assert at > len(data) // 2, "in the footer"
    for place in range(at, max(at - 60_000, 0), -1):
        if data[place : place + 16] == b"observation_uuid":
            data = data[:place] + b"\xb6" + data[place + 1 :]
    file.write_bytes(data)
    with pytest.raises(DatasetError, match="parquet"):
        open_paired(chips)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    grid = GeoBox((40, 40), from_origin(560000, 4150000, 10, 10), "EPSG:32610")
    identity = Identity("0" * 16, 16, 4, ("red",), "1" * 16, 0.5)
    made = EmbeddingStore.create(tmp_path / "s.zarr", identity, grid, 8, source="a.tif")
    made.write((0, 0), np.full((32, 32, 8), 0.25, np.float16))
    return made.path


@pytest.mark.parametrize(
    ("tensor", "shape"), [("weight", (3, 3, 8)), ("offset", (2, 3)), ("places", (40, 3))]
)
def test_figures_of_trust_that_do_not_fit_the_model_are_refused(
    tmp_path: Path, tensor: str, shape: tuple[int, ...]
) -> None:
    folder = save_model(trusted(16), tmp_path / "model", {})
    tensors = load_file(folder / TRUST)
    save_file(tensors | {tensor: torch.zeros(shape)}, folder / TRUST)
    with pytest.raises(ModelError, match=f"{tensor} in {TRUST} has shape"):
        load_model(folder)


@pytest.mark.parametrize(
    "curve",
    [
        [[0.1, 0.9], [0.2]],
        [[], []],
        [[0.9, 0.1], [0.2, 0.3]],
        [[0.1, float("nan")], [0.2, 0.3]],
        [[0.1, 0.9], [0.2, float("inf")]],
    ],
)
def test_a_calibration_that_is_no_curve_is_refused(
    tmp_path: Path, curve: list[list[float]]
) -> None:
    folder = save_model(trusted(16), tmp_path / "model", {})
    config = json.loads((folder / "config.json").read_text())
    config["trust"]["curves"] = {"Quercus agrifolia": curve}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the curve of Quercus agrifolia"):
        load_model(folder)


def test_heads_that_do_not_share_a_width_are_refused(tmp_path: Path) -> None:
    folder = save_model(trusted(16), tmp_path / "model", {})
    config = json.loads((folder / "config.json").read_text())
    config["architecture"]["text"]["heads"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"text.width 16 cannot be shared by 3 text.heads"):
        load_model(folder)


def test_damaged_taxa_are_told_by_info(tmp_path: Path) -> None:
    folder = save_model(trusted(16), tmp_path / "model", {})
    (folder / "taxa.json").write_bytes(b'[{"name": "\x87')
    with pytest.raises(ModelError, match="is damaged"):
        describe(folder)


@pytest.mark.parametrize("what", ["short", "huge", "other"])
def test_a_chunk_that_is_not_the_stores_is_not_decoded(store: Path, what: str) -> None:
    chunk = store / "vectors/c/0/0/0"
    data = bytearray(chunk.read_bytes())
    if what == "short":
        data = data[:1]
    elif what == "huge":
        data[4:8] = (2**31 - 1).to_bytes(4, "little")
    else:
        data[4:8] = (64).to_bytes(4, "little")
    chunk.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="does not hold 16384 bytes"):
        open_store(store).read(slice(0, 32), slice(0, 32))


def test_a_store_of_another_layout_is_refused(store: Path) -> None:
    for file in (store / "zarr.json", store / "vectors/zarr.json"):
        file.write_text(file.read_text().replace('"float16"', '"float64"'))
    with pytest.raises(StoreError, match="float64"):
        open_store(store)


@pytest.mark.parametrize("key", ["seed", "optim"])
def test_aliases_of_aliases_are_not_written_out(tmp_path: Path, key: str) -> None:
    tree = yaml.safe_load(shipped_config("demo_crisp.yaml").read_text())
    many: Any = "x"
    for _ in range(10):
        many = [many] * 9
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**tree, key: many}))
    assert (tmp_path / "a.yaml").stat().st_size < 10_000
    with pytest.raises(ConfigError, match="aliases stand for more than 100000 values") as caught:
        load_config(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["&a [*a]", "{a: &b {c: *b}}"])
def test_aliases_in_a_circle_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="not readable YAML"):
        load_config(shipped_config("demo_crisp.yaml"), [f"model.aerial.kwargs={value}"])


def test_aliases_as_people_use_them_are_read() -> None:
    change = "optim={epochs: &n 7, batch_size: *n}"
    optim = load_config(shipped_config("demo_crisp.yaml"), [change]).optim
    assert (optim.epochs, optim.batch_size) == (7, 7)


@pytest.mark.parametrize(
    ("tower", "change"),
    [
        ("text", {"layers": 2**31}),
        ("text", {"width": 2**31}),
        ("aerial", {"backbone": "vit_giant_patch14_dinov2"}),
        ("aerial", {"backbone": "vit_tiny_patch16_224", "kwargs": {"depth": 10**9}}),
        ("aerial", {"backbone": "vit_tiny_patch16_224", "kwargs": {"depth": 99_000}}),
        ("aerial", {"backbone": "test_resnet", "kwargs": {"checkpoint_path": "a.pth"}}),
    ],
)
def test_a_config_that_asks_for_more_than_its_weights_takes_no_memory(
    tmp_path: Path, tower: str, change: dict[str, Any]
) -> None:
    folder = save_model(trusted(16), tmp_path / "model", {})
    config = json.loads((folder / "config.json").read_text())
    config["architecture"][tower] |= change
    (folder / "config.json").write_text(json.dumps(config))
    said = "describes a larger model than|a number is over|checkpoint_path"
    with bounded(tmp_path), pytest.raises(ModelError, match=said):
        load_model(folder)


@pytest.mark.parametrize("file", ["config.json", "taxa.json"])
def test_brackets_too_deep_for_the_parser_are_damage(tmp_path: Path, file: str) -> None:
    folder = save_model(trusted(16), tmp_path / "model", {})
    (folder / file).write_text("[" * 100_000)
    for read in (load_model, describe):
        with pytest.raises(ModelError, match="is damaged"):
            read(folder)


def test_a_name_without_end_is_encoded_at_once(tmp_path: Path) -> None:
    model = trusted(16)
    with bounded(tmp_path), torch.inference_mode():
        one, other = model.encode_text(["abc" * 500, "abc" * 500_000])
    assert torch.equal(one, other)


def test_an_item_of_a_server_reads_no_file_of_this_machine(tmp_path: Path) -> None:
    for href in ("/etc/hostname", f"file://{tmp_path}/a.tif", "/vsizip/a.zip/a.tif", "a.tif"):
        page = {"features": [item(href)]}
        search = SimpleNamespace(pages_as_dicts=lambda page=page: iter([page]))
        client = SimpleNamespace(
            conforms_to=lambda what: True, search=lambda search=search, **_: search
        )
        with (
            patch("pystac_client.Client.open", lambda *_, client=client, **__: client),
            pytest.raises(ImageryError, match="would be a file of this machine"),
        ):
            find_scenes("stac+https://a.example/stac#naip", BBOX)


def test_a_server_whose_next_page_is_the_same_one_ends() -> None:
    page = {"features": [item("https://a.example/a.tif")]}
    search = SimpleNamespace(pages_as_dicts=lambda: repeat(page))
    client = SimpleNamespace(conforms_to=lambda what: True, search=lambda **_: search)
    with patch("pystac_client.Client.open", lambda *_, **__: client):
        assert len(find_scenes("stac+https://a.example/stac#naip", BBOX)) == 1


def test_facts_kept_of_a_remote_data_set_are_made_again_once_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    [file] = tiny_scene(tmp_path, rows=6).chips.rglob("*.parquet")
    address = f"file://{file}"
    kept = paired._kept_facts(address)
    assert len(paired._read_facts(address)[0]) == 6
    for damage in (b"", b"PAR1" * 100, kept.read_bytes()[:-1]):
        kept.write_bytes(damage)
        assert len(paired._read_facts(address)[0]) == 6
    assert len(kept.read_bytes()) > 1000


@pytest.mark.parametrize(
    ("crs", "pixel"),
    [("EPSG:32610", 1e-300), ("EPSG:32610", float("nan")), ('LOCAL_CS["s",UNIT["m",1]]', 2)],
)
def test_a_grid_that_imagery_cannot_be_put_on_is_refused(
    tmp_path: Path, crs: str, pixel: float
) -> None:
    paths = [tmp_path / "a.tif", tmp_path / "like.tif"]
    for path, name, side in zip(paths, ("EPSG:32610", crs), (10, pixel), strict=True):
        with rasterio.open(
            path, "w", driver="GTiff", width=8, height=8, count=1, dtype="uint8",
            crs=rasterio.CRS.from_user_input(name), transform=from_origin(5e5, 4e6, side, side),
        ) as raster:  # fmt: skip
            raster.write(np.ones((1, 8, 8), np.uint8))
    with pytest.raises(SpeciesmapError):
        open_imagery(paths[0], like=paths[1])


def test_pixels_too_small_for_their_coordinates_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=8, height=8, count=1, dtype="uint8", crs="EPSG:32610",
        transform=from_origin(5e5, 4e6, 1e-12, 1e-12),
    ) as raster:  # fmt: skip
        raster.write(np.ones((1, 8, 8), np.uint8))
    with pytest.raises(ImageryError, match="sides of 0 and 0 m"):
        open_imagery(path)


def test_blocks_that_take_much_memory_are_refused_before_one_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "vast.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=8, height=8, count=1, dtype="float64", tiled=True,
        blockxsize=16384, blockysize=16384, crs="EPSG:32610", transform=from_origin(5e5, 4e6, 1, 1),
        sparse_ok=True, compress="deflate",
    ):  # fmt: skip
        pass
    with bounded(tmp_path), pytest.raises(ImageryError, match=r"vast\.tif has blocks of 16384 x"):
        open_imagery(path)


def test_notes_in_a_table_that_name_no_type_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "surveys.parquet"
    table = pd.DataFrame({"lon": [1.0], "lat": [2.0], "taxon": ["a"], "present": [1]})
    whole = pa.Table.from_pandas(table)
    notes = {
        name: text.replace(b"unicode", b"uniKode") for name, text in whole.schema.metadata.items()
    }
    assert notes != whole.schema.metadata
    pq.write_table(whole.replace_schema_metadata(notes), path)
    with pytest.raises(ObservationsError, match=r"surveys\.parquet cannot be read"):
        read_surveys(path)
