"""A paired data set reads the same whoever wrote it, and damage is named by row."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_scene

from speciesmap.datasets import images
from speciesmap.datasets.columns import SIDECAR, decode_windows
from speciesmap.datasets.paired import NMV_RESOLUTION_M, open_paired
from speciesmap.errors import DatasetError
from speciesmap.learning.data import PairedRows

ROWS, BANDS, SIDE = 7, 4, 6


def jpeg(tone: int) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (8, 6), (tone, 20, 30)).save(stored, "JPEG")
    return stored.getvalue()


def pixels(rows: int = ROWS, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(0, 256, (rows, BANDS, SIDE, SIDE))


def hub_table(windows: Any, kind: pa.DataType | None = None) -> pa.Table:
    """Rows as the hub holds them: iNaturalist numbers for ancestry, nested lists of int64."""
    count = len(windows)
    nested = kind or pa.list_(pa.list_(pa.list_(pa.int64())))
    photo = [{"bytes": jpeg(10 * k), "path": f"{k}.jpg"} for k in range(count)]
    return pa.table(
        {
            "observation_uuid": [f"uuid-{k}" for k in range(count)],
            "latitude": pa.array(np.linspace(36, 37, count), pa.float32()),
            "longitude": pa.array(np.linspace(-120, -119, count), pa.float32()),
            "ancestry": ["48460/47126/211194"] * count,
            "name": [("Quercus agrifolia", "Acer negundo")[k % 2 or k == 6] for k in range(count)],
            "gl_image": pa.array(photo, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "rs_image": pa.array([w.tolist() for w in windows], nested),
        }
    )  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    table = hub_table(pixels())
    pq.write_table(table.slice(0, 4), folder / "data" / "train-00000-of-00002.parquet")
    pq.write_table(table.slice(4), folder / "data" / "train-00001-of-00002.parquet")
    return folder


def test_a_folder_from_the_hub_reads_as_it_is(hub: Path) -> None:
    data = open_paired(hub)
    assert len(data) == ROWS
    assert data.bands == ("red", "green", "blue", "nir")
    assert (data.window_px, data.resolution_m, data.dtype) == (SIDE, 0.6, np.dtype(np.uint8))
    windows = data.aerial()
    assert windows.dtype == np.uint8
    np.testing.assert_array_equal(windows, pixels())
    np.testing.assert_array_equal(data.aerial([6, 0, -1, 4]), pixels()[[6, 0, 6, 4]])
    chosen = (data.facts["name"] == "Acer negundo").to_numpy()
    np.testing.assert_array_equal(data.aerial(chosen), pixels()[chosen])
    tones = [np.asarray(photo)[0, 0, 0] for photo in data.ground([3, 1]) if photo]
    assert np.allclose(tones, [30, 10], atol=3)
    assert [taxon.name for taxon in data.taxa] == ["Acer negundo", "Quercus agrifolia"]
    assert all(taxon.lineage == () for taxon in data.taxa), "numbers are no names"


@pytest.mark.parametrize("limit", [0, 1 << 28])
def test_images_are_the_same_from_memory_and_from_the_cache(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", limit)
    monkeypatch.setattr(images, "BATCH_ROWS", 3)
    before = sorted(hub.rglob("*"))
    data = open_paired(hub)
    np.testing.assert_array_equal(data.aerial([5, 2]), pixels()[[5, 2]])
    copy = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(copy.aerial(), pixels())
    assert sum(photo is not None for photo in copy.ground()) == ROWS
    assert sorted(hub.rglob("*")) == before, "reading writes nothing into the data set"
    cached = list((tmp_path / "xdg").rglob("*.arrow"))
    assert len(cached) == (1 if limit == 0 else 0)


def test_a_data_set_that_changed_is_decoded_again(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", 0)
    open_paired(hub).aerial([0])
    for file in (hub / "data").iterdir():
        file.unlink()
    pq.write_table(hub_table(pixels(5, seed=9)), hub / "data" / "train.parquet")
    np.testing.assert_array_equal(open_paired(hub).aerial(), pixels(5, seed=9))
    assert len(list((tmp_path / "xdg").rglob("*.arrow"))) == 1


LIST_KINDS = {
    "list": lambda value: pa.list_(pa.list_(pa.list_(value))),
    "large": lambda value: pa.large_list(pa.large_list(pa.large_list(value))),
    "fixed": lambda value: pa.list_(pa.list_(pa.list_(value, SIDE), SIDE), BANDS),
    "mixed": lambda value: pa.large_list(pa.list_(pa.list_(value), SIDE)),
}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(LIST_KINDS)),
    value=st.sampled_from([pa.uint8(), pa.uint16(), pa.int64(), pa.float32()]),
    start=st.integers(0, ROWS - 1),
    length=st.integers(1, ROWS),
)
def test_any_list_layout_and_slice_decodes_to_the_same_pixels(
    kind: str, value: pa.DataType, start: int, length: int
) -> None:
    column = pa.array(pixels().tolist(), LIST_KINDS[kind](value)).slice(start, length)
    decoded = decode_windows(column)
    np.testing.assert_array_equal(decoded, pixels()[start : start + length])
    assert decoded.dtype == value.to_pandas_dtype()


def write(path: Path, windows: list[Any], **replaced: Any) -> Path:
    table = hub_table(pixels(len(windows)))
    table = table.set_column(
        table.schema.get_field_index("rs_image"),
        "rs_image",
        pa.array(windows, pa.list_(pa.list_(pa.list_(pa.int64())))),
    )
    for name, value in replaced.items():
        table = table.set_column(table.schema.get_field_index(name), name, value)
    pq.write_table(table, path)
    return path


def ragged(position: tuple[int, ...]) -> list[Any]:
    windows: list[Any] = pixels(5).tolist()
    inner: Any = windows
    for k in position:
        inner = inner[k]
    inner.pop()
    return windows


@pytest.mark.parametrize("position", [(3,), (3, 1), (3, 2, 4)])
def test_a_ragged_window_is_named_by_its_row(tmp_path: Path, position: tuple[int, ...]) -> None:
    data = open_paired(write(tmp_path / "a.parquet", ragged(position)))
    with pytest.raises(DatasetError, match=r"row 3 of rs_image of .*a\.parquet"):
        data.aerial()


def test_a_missing_window_or_pixel_is_named_by_its_row(tmp_path: Path) -> None:
    windows: list[Any] = pixels(5).tolist()
    windows[2] = None
    with pytest.raises(DatasetError, match="row 2 of rs_image"):
        open_paired(write(tmp_path / "a.parquet", windows)).aerial()
    windows = pixels(5).tolist()
    windows[4][3][5][5] = None
    with pytest.raises(DatasetError, match="row 4 of rs_image"):
        open_paired(write(tmp_path / "b.parquet", windows)).aerial()


def test_pixels_that_would_change_are_refused(tmp_path: Path) -> None:
    windows = pixels(5)
    windows[1, 0, 0, 0] = 300
    with pytest.raises(DatasetError, match=r"row 1 .* to 300, which do not fit uint8"):
        open_paired(write(tmp_path / "a.parquet", windows.tolist())).aerial()


def test_a_truncated_photo_is_named_by_its_row(tmp_path: Path) -> None:
    photos = [{"bytes": jpeg(k), "path": "x"} for k in range(5)]
    photos[3]["bytes"] = photos[3]["bytes"][:-200]
    photos[4]["bytes"] = b"no photo"
    file = write(tmp_path / "a.parquet", pixels(5).tolist(), gl_image=pa.array(photos))
    data = open_paired(file)
    assert data.ground([2])[0] is not None
    with pytest.raises(DatasetError, match="photo of row 3"):
        data.ground()
    with pytest.raises(DatasetError, match=r"photo of row 4 .* \(cannot identify image file\);"):
        data.ground([4])


def test_absent_photos_are_none(tmp_path: Path) -> None:
    photos = pa.array([None, {"bytes": jpeg(1), "path": "x"}, None, None, None])
    data = open_paired(write(tmp_path / "a.parquet", pixels(5).tolist(), gl_image=photos))
    assert [photo is None for photo in data.ground()] == [True, False, True, True, True]


@pytest.mark.parametrize("column", ["rs_image", "name", "latitude"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    pq.write_table(hub_table(pixels()).drop_columns([column]), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match=f"a.parquet has no column '{column}'"):
        open_paired(tmp_path)


def with_column(folder: Path, name: str, values: Any) -> Path:
    table = hub_table(pixels())
    table = table.drop_columns([name]) if name in table.column_names else table
    pq.write_table(table.append_column(name, pa.array(values)), folder / "a.parquet")
    return folder


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("latitude", 999.0, r"row 2 of .* has the latitude 999, which is beyond 90 degrees"),
        ("longitude", -181.0, r"row 2 of .* has the longitude -181, which is beyond 180 degrees"),
        ("longitude", np.inf, r"row 2 of .* has the longitude inf"),
    ],
)
def test_a_place_that_is_not_on_the_globe_is_named(
    column: str, value: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=message):
        open_paired(with_column(tmp_path, column, [0.0, 0.0, value, 0.0, 0.0, 0.0, 0.0]))


def test_places_in_words_are_refused_and_absent_ones_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DatasetError, match="latitudes such as 'north'; they must be numbers"):
        open_paired(with_column(tmp_path, "latitude", ["north"] * ROWS))
    dataset = open_paired(with_column(tmp_path, "latitude", [None, np.nan, *[1.0] * 5]))
    assert "2 rows have no latitude or no longitude" in caplog.text
    place = PairedRows(dataset, range(ROWS), dataset.taxa).place
    assert len(set(place)) == ROWS, "rows without a place share none, nor have two others here"


def test_an_observation_is_told_by_inaturalists_number_where_it_has_no_other(
    tmp_path: Path,
) -> None:
    table = hub_table(pixels()).drop_columns(["observation_uuid"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert set(open_paired(tmp_path).facts["observation_uuid"]) == {""}
    numbers = pa.array([7, 7, 8, None, 9, 9, 9], pa.int64())
    pq.write_table(table.append_column("gl_inat_id", numbers), tmp_path / "a.parquet")
    told = open_paired(tmp_path).facts["observation_uuid"].tolist()
    assert told == ["7", "7", "8", "", "9", "9", "9"]


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="there is no data set"):
        open_paired(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="holds no Parquet"):
        open_paired(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DatasetError, match=r"not a readable Parquet .*copy the data set again"):
        open_paired(tmp_path)


def test_a_row_that_does_not_exist_is_refused(hub: Path) -> None:
    with pytest.raises(DatasetError, match="7 rows; there is no row 7"):
        open_paired(hub).aerial([7])


def test_a_data_set_at_an_address_is_the_one_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tiny_scene(tmp_path, bands=("nir", "red", "green")).chips
    local = open_paired(folder)
    [file] = folder.rglob("*.parquet")
    for address in (f"file://{folder}", f"file://{folder}/", f"file://{file}"):
        there = open_paired(address)
        assert there.bands == local.bands == ("nir", "red", "green")
        assert (there.resolution_m, there.dtype) == (local.resolution_m, local.dtype)
        assert (there.taxa, there.notes) == (local.taxa, local.notes)
    (folder / SIDECAR).write_text("{")
    with pytest.raises(DatasetError, match=r"dataset\.json is not readable JSON"):
        open_paired(f"file://{folder}")
    (folder / SIDECAR).unlink()
    assert open_paired(f"file://{folder}").resolution_m == NMV_RESOLUTION_M
