"""Chips hold the imagery's own pixels, and nothing is replaced or left out in silence."""

from __future__ import annotations

import csv
import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
from affine import Affine
from click.testing import CliRunner
from odc.geo.geobox import GeoBox
from PIL import Image

from speciesmap.cli.chips import command
from speciesmap.datasets import chips
from speciesmap.datasets.chips import make_chips
from speciesmap.datasets.columns import FACTS, FRACTIONS
from speciesmap.datasets.cutting import Cutter
from speciesmap.datasets.paired import open_paired
from speciesmap.datasets.photos import encode_photo
from speciesmap.datasets.writer import PairedWriter
from speciesmap.errors import DatasetError, OutputError
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import Imagery, open_imagery
from speciesmap.rasters.windows import window_start

SIDE = 120
WINDOW = 16


def write_raster(path: Path, dtype: str = "uint8", nodata: float | None = None) -> Path:
    rng = np.random.default_rng(7)
    high = 255 if dtype == "uint8" else 10_000
    pixels = rng.integers(1, high, (4, SIDE, SIDE)).astype(dtype)
    if nodata is not None:
        pixels[:, :30, :30] = nodata
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=SIDE,
        height=SIDE,
        count=4,
        dtype=dtype,
        crs="EPSG:32611",
        transform=Affine(0.6, 0, 380_000.0, 0, -0.6, 3_760_000.0),
        nodata=nodata,
    ) as raster:
        raster.write(pixels)
        raster.descriptions = ("red", "green", "blue", "nir")
    return path


def write_photo(path: Path, size: tuple[int, int] = (40, 30), **options: object) -> Path:
    rng = np.random.default_rng(len(path.name))
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(
        path, **options
    )
    return path


def observe(imagery: Imagery, rows: list[float], cols: list[float], **columns: object):
    """A table as `read_observations` gives it, at continuous pixel positions."""
    longitude, latitude = imagery.xy(np.array(rows), np.array(cols))
    count = len(rows)
    defaults: dict[str, object] = {
        "observation_id": [f"obs{k}" for k in range(count)],
        "taxon": "Quercus agrifolia",
        "lineage": "Plantae/Fagaceae/Quercus",
        "rank": "species",
        "longitude": longitude,
        "latitude": latitude,
        "date": pd.Timestamp("2018-05-04"),
        "uncertainty_m": 2.0,
        "quality_grade": "research",
        "obscured": False,
        "captive": False,
        "observer": "u1",
        "license": "CC0",
        "photo": [f"{k}.jpg" for k in range(count)],
        "photo_license": "",
        "source": "test",
        "status": "PRESENT",
        "basis": "",
    }
    table = pd.DataFrame({**defaults, **columns}, index=range(count))
    return gpd.GeoDataFrame(
        table, geometry=gpd.points_from_xy(longitude, latitude), crs="EPSG:4326"
    )


@pytest.fixture
def imagery(tmp_path: Path) -> Imagery:
    return open_imagery(write_raster(tmp_path / "scene.tif"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(12):
        write_photo(folder / f"{k}.jpg")
    return folder


@pytest.mark.parametrize("window", [15, 16])
def test_a_chip_is_the_window_of_the_raster_around_its_observation(
    imagery: Imagery, tmp_path: Path, window: int
) -> None:
    rng = np.random.default_rng(0)
    rows, cols = rng.uniform(window, SIDE - window, (2, 40))
    table = observe(imagery, rows.tolist(), cols.tolist())
    make_chips(table, imagery, tmp_path / "set", window_px=window)
    data = open_paired(tmp_path / "set")
    assert sorted(data.facts["observation_uuid"]) == sorted(table["observation_id"])
    pixels = data.aerial()
    for k, identity in enumerate(data.facts["observation_uuid"]):
        n = int(identity.removeprefix("obs"))
        top, left = window_start(rows[n], cols[n], window)
        assert abs(top + window / 2 - rows[n]) <= 0.5 + 1e-4
        assert abs(left + window / 2 - cols[n]) <= 0.5 + 1e-4
        expected, _ = imagery.read(top, left, window, window)
        np.testing.assert_array_equal(pixels[k], expected)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_hugging_face_reads_what_was_written(
    tmp_path: Path, photos: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    scene = open_imagery(write_raster(tmp_path / f"{dtype}.tif", dtype))
    table = observe(
        scene, [40.2, 60.7, 50], [40.9, 30.1, 80], date=[pd.NaT, *[pd.Timestamp(0)] * 2]
    )
    make_chips(table, scene, tmp_path / "set", window_px=WINDOW, photos=photos)
    ours = open_paired(tmp_path / "set")
    theirs = datasets.load_dataset(
        str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert theirs.column_names == [*FACTS, "gl_image", "rs_image"]
    files = str(tmp_path / "set" / "data" / "*.parquet")
    plain = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    np.testing.assert_array_equal(next(iter(plain))["rs_image"], ours.aerial([0])[0])
    assert isinstance(theirs.features["gl_image"], datasets.Image)
    for name, kind in FACTS.items():
        assert theirs.features[name].dtype == kind
    for k, row in enumerate(theirs):
        pixels = np.array(row["rs_image"])
        np.testing.assert_array_equal(pixels, ours.aerial([k])[0])
        np.testing.assert_array_equal(np.asarray(row["gl_image"]), np.asarray(ours.ground([k])[0]))
    assert ours.aerial().dtype == np.dtype(dtype)
    assert sorted(ours.facts["gl_image_date"]) == ["", "1970-01-01", "1970-01-01"]
    assert [t.name for t in ours.taxa] == ["Quercus agrifolia"]
    assert ours.taxa[0].lineage == ("Plantae", "Fagaceae", "Quercus")


def test_whatever_is_left_out_is_counted_and_named(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = open_imagery(write_raster(tmp_path / "holes.tif", nodata=0))
    (photos / "1.jpg").write_bytes((photos / "1.jpg").read_bytes()[:600])
    (photos / "2.jpg").unlink()
    (photos / "7.jpg").write_text("this is no image")
    table = observe(
        scene,
        [60, 60, 60, 60, 60, 3, 32, 60, 60, 500],
        [60, 61, 62, 63, 64, 60, 32, 65, 66, 60],
        uncertainty_m=[2, 2, 2, 4.9, 2, 2, 2, 2, np.nan, 2],
        obscured=[False] * 4 + [True] + [False] * 5,
    )
    with caplog.at_level("WARNING", "speciesmap"):
        report = make_chips(table, scene, tmp_path / "set", window_px=WINDOW, photos=photos)
    assert "2 of 10 observations kept" in caplog.text
    assert f"{chips.OUTSIDE}: 2" in caplog.text
    assert report.left_out == {
        chips.OBSCURED: 1,
        chips.UNCERTAIN: 1,
        chips.OUTSIDE: 2,
        chips.MISSING: 1,
        chips.BAD_PHOTO: 2,
        chips.NO_PHOTO: 1,
    }
    assert (report.observations, report.kept, report.rows) == (10, 2, 2)
    with (tmp_path / "set" / "report.csv").open() as file:
        named = {row["observation_id"]: row for row in csv.DictReader(file)}
    assert {i: row["reason"] for i, row in named.items()} == {
        "obs1": chips.BAD_PHOTO,
        "obs2": chips.NO_PHOTO,
        "obs3": chips.UNCERTAIN,
        "obs4": chips.OBSCURED,
        "obs5": chips.OUTSIDE,
        "obs6": chips.MISSING,
        "obs7": chips.BAD_PHOTO,
        "obs9": chips.OUTSIDE,
    }
    assert "1.jpg" in named["obs1"]["detail"]
    assert json.loads((tmp_path / "set" / "report.json").read_text())["rows"] == 2
    assert sorted(open_paired(tmp_path / "set").facts["observation_uuid"]) == ["obs0", "obs8"]


def test_each_photo_carries_its_own_licence_else_the_records(
    imagery: Imagery, tmp_path: Path, photos: Path
) -> None:
    table = observe(
        imagery, [60, 61], [60, 61], photo=["9.jpg | 1.jpg | 2.jpg", "3.jpg"],
        photo_license=["CC0 |  | CC-BY", ""], license="all rights reserved",
    )  # fmt: skip
    (photos / "9.jpg").unlink()
    make_chips(table, imagery, tmp_path / "set", window_px=WINDOW, photos=photos)
    facts = open_paired(tmp_path / "set").facts
    found = sorted(zip(facts["observation_uuid"], facts["license"], strict=True))
    reserved = "all rights reserved"
    assert found == [("obs0", "CC-BY"), ("obs0", reserved), ("obs1", reserved)]


def test_nothing_left_is_an_error_that_tells_why_and_leaves_no_output(
    imagery: Imagery, tmp_path: Path
) -> None:
    table = observe(imagery, [-50, 60], [60, 60], uncertainty_m=[1.0, 1000.0])
    with pytest.raises(
        DatasetError, match=r"position too uncertain: 1, window leaves the imagery: 1"
    ):
        make_chips(table, imagery, tmp_path / "set", window_px=WINDOW)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scene.tif"]


def test_an_existing_data_set_is_kept_unless_told_otherwise(
    imagery: Imagery, tmp_path: Path
) -> None:
    make_chips(observe(imagery, [60], [60]), imagery, tmp_path / "set", window_px=WINDOW)
    again = observe(imagery, [50, 60], [50, 60])
    with pytest.raises(OutputError, match="overwrite"):
        make_chips(again, imagery, tmp_path / "set", window_px=WINDOW)
    make_chips(again, imagery, tmp_path / "set", window_px=WINDOW, overwrite=True)
    assert len(open_paired(tmp_path / "set")) == 2


def test_photos_are_found_by_name_address_and_observation(imagery: Imagery, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jpg", "deep/b.png", "obs2.jpeg", "c.jpg", "d.jpg"):
        write_photo(folder / name)
    table = observe(
        imagery,
        [60, 61, 62, 63],
        [60, 61, 62, 63],
        photo=[
            "a.jpg",
            "https://host/x/b.png?size=1",
            "https://host/photos/9/medium.jpg",
            "c.jpg|d.jpg",
        ],
    )
    report = make_chips(table, imagery, tmp_path / "set", window_px=WINDOW, photos=folder)
    data = open_paired(tmp_path / "set")
    assert (report.kept, report.rows, report.left_out) == (4, 5, {})
    counts = data.facts.groupby("observation_uuid").size().to_dict()
    assert counts == {"obs0": 1, "obs1": 1, "obs2": 1, "obs3": 2}
    assert data.facts["rs_classification"].sum() == 4
    assert data.facts["gl_photo_id"].is_unique
    assert all(photo is not None for photo in data.ground())


def test_a_photo_is_never_guessed_among_two(imagery: Imagery, tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        write_photo(tmp_path / "photos" / place / "0.jpg", (20 if place == "a" else 30, 20))
    table = observe(imagery, [60], [60])
    options = {"window_px": WINDOW, "photos": tmp_path / "photos"}
    with pytest.raises(DatasetError, match=r"a/0\.jpg and .*b/0\.jpg have one name"):
        make_chips(table, imagery, tmp_path / "set", **options)
    make_chips(table.assign(photo="b/0.jpg"), imagery, tmp_path / "set", **options)
    photo = open_paired(tmp_path / "set").ground()[0]
    assert photo is not None and photo.width == 30


def test_a_table_without_the_usual_columns_is_refused(imagery: Imagery, tmp_path: Path) -> None:
    table = observe(imagery, [60], [60]).drop(columns="obscured")
    with pytest.raises(DatasetError, match="no column 'obscured'"):
        make_chips(table, imagery, tmp_path / "set", window_px=WINDOW)


def test_small_jpegs_are_kept_byte_for_byte_and_others_reduced(tmp_path: Path) -> None:
    small = write_photo(tmp_path / "small.jpg", (64, 48))
    assert encode_photo(small, 64) == small.read_bytes()

    large = encode_photo(write_photo(tmp_path / "large.jpg", (300, 150)), 64)
    assert Image.open(io.BytesIO(large)).size == (64, 32)

    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode_photo(write_photo(tmp_path / "turned.jpg", (64, 48), exif=exif), 64)
    assert Image.open(io.BytesIO(turned)).size == (48, 64)


def test_a_photo_too_large_to_be_sane_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_photo(tmp_path / "big.png", (64, 64))
    monkeypatch.setattr("speciesmap.datasets.photos.MOST_BYTES", 100)
    with pytest.raises(ValueError, match="MB, at most"):
        encode_photo(file, 64)
    monkeypatch.setattr("speciesmap.datasets.photos.MOST_BYTES", 10**9)
    monkeypatch.setattr("speciesmap.datasets.photos.MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match="64 x 64 pixels, at most"):
        encode_photo(file, 64)


def test_label_fractions_are_nested_seeded_and_shared_by_an_observations_photos(
    imagery: Imagery, tmp_path: Path, photos: Path
) -> None:
    count = 80
    rows = np.linspace(20, 100, count).tolist()
    grade = ["research"] * 60 + ["needs_id"] * 10 + [""] * 10
    table = observe(
        imagery, rows, rows, photo="1.jpg|2.jpg", quality_grade=grade,
        rank=["genus"] * 20 + ["species"] * 60,
    )  # fmt: skip
    make_chips(table, imagery, tmp_path / "a", window_px=WINDOW, photos=photos, seed=3)
    make_chips(table, imagery, tmp_path / "b", window_px=WINDOW, photos=photos, seed=3)
    make_chips(table, imagery, tmp_path / "c", window_px=WINDOW, photos=photos, seed=4)
    a, b, c = (open_paired(tmp_path / name).facts for name in "abc")
    pd.testing.assert_frame_equal(a, b)
    assert a["supervised"].sum() == 2 * 50
    names = [f"finetune_{percent}percent" for percent in FRACTIONS]
    for smaller, larger in itertools.pairwise(names):
        assert not (a[smaller] & ~a[larger]).any()
    assert (a[names[-1]] == a["supervised"]).all()
    assert a["finetune_20.0percent"].sum() == 2 * 10
    assert not a["finetune_20.0percent"].equals(c["finetune_20.0percent"])
    assert (a.groupby("observation_uuid")["finetune_20.0percent"].nunique() == 1).all()


def test_files_and_batches_of_any_size_hold_the_same_rows(
    imagery: Imagery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.linspace(20, 100, 70).tolist()
    table = observe(imagery, rows, rows)
    make_chips(table, imagery, tmp_path / "one", window_px=WINDOW)
    monkeypatch.setattr(PairedWriter, "FILE_BYTES", 1)
    monkeypatch.setattr(PairedWriter, "GROUP_BYTES", 1)
    monkeypatch.setattr(chips, "BATCH_OBSERVATIONS", 9)
    make_chips(table, imagery, tmp_path / "many", window_px=WINDOW)
    one, many = open_paired(tmp_path / "one"), open_paired(tmp_path / "many")
    files = sorted(p.name for p in (tmp_path / "many" / "data").iterdir())
    assert files == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    pd.testing.assert_frame_equal(one.facts, many.facts)
    np.testing.assert_array_equal(one.aerial(), many.aerial())


def test_windows_of_coarse_pixels_are_whole_where_scenes_need_a_grid(tmp_path: Path) -> None:
    for zone, west in ((10, 700_000), (11, 180_000)):
        pixels = np.random.default_rng(zone).integers(1, 255, (1, 400, 400)).astype(np.uint8)
        grid = GeoBox((400, 400), Affine(30, 0, west, 0, -30, 4_180_000), f"EPSG:326{zone}")
        write_geotiff(tmp_path / f"scenes/{zone}.tif", pixels, grid, bands=["red"])
    (longitude,), (latitude,) = open_imagery(tmp_path / "scenes/10.tif").xy([200.0], [200.0])
    export = tmp_path / "observations.csv"
    export.write_text(f"id,latitude,longitude,taxon\n1,{latitude},{longitude},Acer negundo\n")
    words = [export, "--imagery", tmp_path / "scenes", "--out", tmp_path / "set", "--window-px"]
    result = CliRunner().invoke(command, [*map(str, words), "256", "-q"], catch_exceptions=False)
    assert result.exit_code == 0
    assert open_paired(tmp_path / "set").window_px == 256


def test_the_command_takes_an_export_to_a_data_set(
    imagery: Imagery, tmp_path: Path, photos: Path
) -> None:
    longitude, latitude = imagery.xy(np.array([60.0, 2.0]), np.array([70.0, 2.0]))
    lines = ["id,observed_on,quality_grade,image_url,latitude,longitude,scientific_name"]
    for k in range(2):
        lines.append(f"{k},2020-05-01,research,{k}.jpg,{latitude[k]},{longitude[k]},Acer negundo")
    export = tmp_path / "observations.csv"
    export.write_text("\n".join(lines))
    words = [export, "--imagery", tmp_path / "scene.tif", "--photos", photos, "--out"]
    words += [tmp_path / "set", "--window-px", WINDOW, "--bands", "nir,red", "--json", "-q"]
    result = CliRunner().invoke(command, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["path"] == str(tmp_path / "set")
    assert (report["kept"], report["left_out"]) == (1, {chips.OUTSIDE: 1})
    data = open_paired(tmp_path / "set")
    assert data.bands == ("nir", "red")
    assert data.facts["supervised"].tolist() == [True]
    expected, _ = imagery.read(52, 62, WINDOW, WINDOW)
    np.testing.assert_array_equal(data.aerial()[0], expected[[3, 0]])

    wrong = CliRunner().invoke(command, [str(export), "--out", str(tmp_path / "b")])
    assert wrong.exit_code == 2 and "--imagery" in wrong.output


def test_what_a_data_set_of_a_longer_name_kept_stays(tmp_path: Path) -> None:
    """Windows of remote imagery are kept beside the data set until it is whole."""
    imagery: Any = SimpleNamespace(
        by_scene=lambda *_: [],
        remote=True,
        fingerprint="",
        bands=("red",),
        taking_turns=lambda: None,
    )
    nothing = np.zeros((0, 2), np.int64), np.zeros(0, np.int64), 16
    longer, stale = (f".{name}.0123456789ab.windows" for name in ("chips.v2", "chips"))
    for name in (longer, stale):
        (tmp_path / name).mkdir()
    Cutter(imagery, *nothing, tmp_path / "chips")
    kept = {path.name for path in tmp_path.iterdir()}
    assert longer in kept
    assert stale not in kept
    assert len(kept) == 2
