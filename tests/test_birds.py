"""Birds in official layouts: paired by id, split in three; the unusable counted or refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from birds import OVERHEAD_PX, SPECIES, cub, inat_birds, nabirds, read_json, write_image, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_scene

from speciesmap.datasets.birds import BirdDataset, open_birds, open_dataset
from speciesmap.datasets.paired import PairedDataset
from speciesmap.datasets.splits import OVERLAP, SAME_OBSERVATION, hold_out_places, leaks
from speciesmap.errors import DatasetError


@pytest.fixture
def inat(tmp_path: Path) -> Path:
    return inat_birds(tmp_path / "inat")


def change(path: Path, part: str, edit: Callable[[Any], object]) -> Path:
    file = path / f"{part}_birds.json"
    content = read_json(file)
    edit(content)
    write_json(file, content)
    return path


def assert_paired_by_id(dataset: BirdDataset) -> None:
    """Pixels were drawn from the image's id, so a pair that was mixed up shows."""
    windows = dataset.aerial()
    for row, image in enumerate(dataset.facts["image_id"].astype(int)):
        drawn = np.random.default_rng(image + 5000)
        wanted = drawn.integers(0, 255, (OVERHEAD_PX, OVERHEAD_PX, 3)).transpose(2, 0, 1)
        assert np.corrcoef(windows[row].ravel(), wanted.ravel())[0, 1] > 0.5
        assert f"/{image}.jpg" in dataset.facts["ground"][row]


def test_inat_birds_are_paired_by_id_with_their_facts(inat: Path) -> None:
    dataset = open_birds(inat)
    assert len(dataset) == 36
    assert [taxon.name for taxon in dataset.taxa] == list(SPECIES)
    assert dataset.taxa[1].lineage[-1] == "Calypte"
    assert (dataset.window_px, dataset.bands) == (OVERHEAD_PX, ("red", "green", "blue"))
    images = {str(i["id"]): i for i in read_json(inat / "train_birds.json")["images"]}
    for _, row in dataset.facts[dataset.facts["split"] != "test"].iterrows():
        assert row["latitude"] == images[row["image_id"]]["latitude"]
        assert row["gl_image_date"] == images[row["image_id"]]["date"][:10]
    assert dataset.aerial().shape == (36, 3, OVERHEAD_PX, OVERHEAD_PX)
    assert_paired_by_id(dataset)
    assert dataset.left_out == {}


def renumbered(inat: Path) -> None:
    """Turn names into those of the release: numbers of rows that were left after filtering."""
    for part in ("train", "val"):
        images = [image["id"] for image in read_json(inat / f"{part}_birds.json")["images"]]
        folder = inat / f"{part}_overhead" / "images_sentinel"
        kept = [k for k in range(len(images)) if k % 5]
        for number, position in enumerate(kept):
            (folder / f"{images[position]}.jpeg").rename(folder / f"n{number}.jpeg")
        for file in folder.glob("[!n]*"):
            file.unlink()
        for file in folder.iterdir():
            file.rename(folder / file.name[1:])
        pd.DataFrame({"idx": kept}).to_csv(inat / f"{part}_birds_labels.csv")


def test_the_published_table_tells_which_image_a_numbered_file_belongs_to(inat: Path) -> None:
    renumbered(inat)
    dataset = open_birds(inat)
    assert dataset.left_out == {"no overhead image": 8}
    assert_paired_by_id(dataset)


def test_a_table_of_ids_is_taken_by_its_ids(inat: Path) -> None:
    for part in ("train", "val"):
        folder = inat / f"{part}_overhead" / "images_sentinel"
        rows = []
        for k, file in enumerate(sorted(folder.iterdir())):
            rows.append({"image_id": int(file.stem), "overhead": f"s{k}.jpeg"})
            file.rename(folder / f"s{k}.jpeg")
        pd.DataFrame(rows[::-1]).to_csv(inat / f"{part}_birds_labels.csv", index=False)
    assert_paired_by_id(open_birds(inat))


def test_numbered_files_without_a_table_are_refused_rather_than_guessed(inat: Path) -> None:
    renumbered(inat)
    (inat / "train_birds_labels.csv").unlink()
    with pytest.raises(DatasetError, match=r"numbered by position.*add train_birds_labels.csv"):
        open_birds(inat)


def test_a_table_that_lost_rows_is_refused(inat: Path) -> None:
    renumbered(inat)
    file = inat / "val_birds_labels.csv"
    pd.read_csv(file).drop(index=1).to_csv(file, index=False)
    with pytest.raises(DatasetError, match="neither as published"):
        open_birds(inat)


def test_three_splits_share_no_cell_and_the_official_test_stays(inat: Path) -> None:
    dataset = open_birds(inat)
    count = dataset.facts["split"].value_counts()
    assert count["test"] == 6
    assert 3 <= count["validation"] <= 6
    assert count["train"] + count["validation"] == 30
    again = open_birds(inat).facts
    assert (again["split"] == dataset.facts["split"]).all(), "no draw of a moment"


def test_leaking_rows_leave_the_earlier_split_and_are_counted(inat: Path) -> None:
    tested = read_json(inat / "val_birds.json")["images"]

    def leak(content: Any) -> None:
        near, same = content["images"][0], content["images"][3]
        near["latitude"], near["longitude"] = tested[0]["latitude"] + 0.001, tested[0]["longitude"]
        for key in ("latitude", "longitude", "date", "rights_holder"):
            same[key] = tested[0][key]

    dataset = open_birds(change(inat, "train", leak))
    assert dataset.left_out == {SAME_OBSERVATION: 1, OVERLAP: 1}
    ids = {str(read_json(inat / "train_birds.json")["images"][k]["id"]) for k in (0, 3)}
    assert not ids & set(dataset.facts["image_id"])
    assert (dataset.facts["split"] == "test").sum() == 6


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_after_leaving_leaks_out_no_ground_is_shared(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, side_m = 60, 2000.0
    facts = pd.DataFrame(
        {
            "split": rng.choice(["train", "validation", "test"], count),
            "observation_uuid": rng.integers(0, 50, count).astype(str),
            "latitude": 60 + rng.uniform(0, 0.2, count),
            "longitude": rng.choice([-180, 179.8]) + rng.uniform(0, 0.4, count),
        }
    )
    leaking = leaks(facts, side_m)
    kept = facts[~np.any(list(leaking.values()), axis=0)]
    assert (facts["split"] == "test").sum() == (kept["split"] == "test").sum()
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        a, b = kept[kept["split"] == one], kept[kept["split"] == other]
        assert not set(a["observation_uuid"]) & set(b["observation_uuid"])
        north = np.abs(np.subtract.outer(a["latitude"].to_numpy(), b["latitude"].to_numpy()))
        east = np.abs(np.subtract.outer(a["longitude"].to_numpy(), b["longitude"].to_numpy()))
        east = np.minimum(east, 360 - east) * np.cos(np.radians(60.1))
        assert not ((north * 111_194 < side_m * 0.99) & (east * 111_194 < side_m * 0.99)).any()


def test_a_row_of_validation_that_leaks_keeps_none_of_training_out() -> None:
    north = np.array([0.0, 1000.0, 2000.0]) / 111_194
    facts = pd.DataFrame(
        {
            "split": ["train", "validation", "test"],
            "observation_uuid": ["a", "b", "c"],
            "latitude": 60 + north,
            "longitude": 10.0,
        }
    )
    assert leaks(facts, 1000 / 1.4)[OVERLAP].tolist() == [False, True, False]


@given(st.integers(0, 1000), st.floats(0.01, 0.9))
def test_held_out_places_are_whole_cells_and_never_all(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    facts = pd.DataFrame({"latitude": rng.uniform(0, 2, 200), "longitude": rng.uniform(0, 2, 200)})
    held = hold_out_places(facts, share)
    assert 0 < held.sum() < 200
    cell = (facts // 0.25).apply(tuple, axis=1)
    assert not set(cell[held]) & set(cell[~held])


def test_cub_and_nabirds_are_read_with_three_splits(tmp_path: Path) -> None:
    birds = open_birds(cub(tmp_path / "cub"))
    assert birds.taxa[0].name == "Black footed Albatross"
    assert len(birds) == 30
    assert birds.facts["split"].value_counts().to_dict() == {
        "train": 15,
        "test": 12,
        "validation": 3,
    }
    per_class = birds.facts.groupby(["name", "split"]).size()
    assert (per_class.xs("validation", level=1) == 1).all()
    with pytest.raises(DatasetError, match="has photos only"):
        birds.aerial([0])

    north = open_birds(nabirds(tmp_path / "nabirds"))
    assert {taxon.name for taxon in north.taxa} == {"Mallard (Male)", "Mallard (Female)"}
    assert north.taxa[0].lineage == ("Birds", "Ducks, Geese, and Swans")
    assert (north.facts["split"] == "test").sum() == 4
    assert north.left_out == {}, "inner nodes of the hierarchy are no classes without images"


def test_greyscale_photos_are_converted_not_skipped(tmp_path: Path) -> None:
    dataset = open_birds(cub(tmp_path))
    grey = dataset.facts["image_id"].astype(int) % 4 == 0
    assert grey.sum() == 7
    for photo in dataset.ground(np.flatnonzero(grey)):
        assert photo is not None
        bands = np.asarray(photo)
        assert bands.shape == (22, 26, 3)
        assert (bands == bands[..., :1]).all()


def test_a_data_set_travels_to_a_worker_as_its_path(inat: Path) -> None:
    dataset = open_birds(inat)
    packed = pickle.dumps(dataset)
    assert len(packed) < 1000
    assert np.array_equal(pickle.loads(packed).aerial([5, 2]), dataset.aerial([5, 2]))


def test_any_data_set_is_opened_by_what_lies_in_its_folder(inat: Path, tmp_path: Path) -> None:
    assert isinstance(open_dataset(inat), BirdDataset)
    assert isinstance(open_dataset(tiny_scene(tmp_path).chips), PairedDataset)
    with pytest.raises(DatasetError, match=r"neither train_birds.json"):
        open_birds(tmp_path)


def test_missing_files_places_and_categories_are_counted(inat: Path) -> None:
    images = read_json(inat / "train_birds.json")["images"]
    (inat / images[0]["file_name"]).unlink()
    (inat / "train_overhead" / "images_sentinel" / f"{images[1]['id']}.jpeg").unlink()

    def edit(content: Any) -> None:
        content["images"][2]["latitude"] = None
        content["images"][3]["longitude"] = 999
        content["categories"].append({"id": 99, "name": "Raphus cucullatus"})

    dataset = open_birds(change(inat, "train", edit))
    assert dataset.left_out == {
        "no photo file": 1,
        "no overhead image": 1,
        "no place": 1,
        "place beyond 90 or 180 degrees": 1,
        "category without images": 1,
    }
    assert len(dataset) == 32
    assert len(dataset.taxa) == 3

    def nowhere(content: Any) -> None:
        for image in content["images"]:
            image["latitude"] = None

    with pytest.raises(DatasetError, match=r"no training image left \(.*29 no place"):
        open_birds(change(inat, "train", nowhere))


def test_a_taxon_that_is_only_tested_is_left_out_and_counted(inat: Path) -> None:
    def edit(content: Any) -> None:
        for annotation in content["annotations"]:
            annotation["category_id"] = min(annotation["category_id"], 41)

    dataset = open_birds(change(inat, "train", edit))
    assert dataset.left_out == {"category without training images": 1}
    assert [taxon.name for taxon in dataset.taxa] == list(SPECIES[:2])


def test_an_image_that_does_not_decode_is_named_when_it_is_read(inat: Path) -> None:
    dataset = open_birds(inat)
    for column, read in (("ground", dataset.ground), ("overhead", dataset.aerial)):
        file = inat / dataset.facts[column][4]
        file.write_bytes(file.read_bytes()[:200])
        with pytest.raises(
            DatasetError, match=rf"{file.name} does not decode.*delete it"
        ) as caught:
            read([3, 4])
        assert "\n" not in str(caught.value)


def test_an_overhead_image_of_another_size_is_refused(inat: Path) -> None:
    dataset = open_birds(inat)
    write_image(inat / dataset.facts["overhead"][2], 0, size=(9, 9))
    with pytest.raises(DatasetError, match="9 x 9 pixels where others have 20 x 20"):
        dataset.aerial([2])


def drop(key: str, column: str) -> Callable[[Any], object]:
    return lambda content: [row.pop(column) for row in content[key]]


def twice(key: str, column: str) -> Callable[[Any], object]:
    return lambda content: content[key][1].update({column: content[key][0][column]})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("images", "file_name"), "images have no 'file_name'"),
        (drop("images", "date"), "images have no 'date'"),
        (drop("annotations", "category_id"), "annotations have no 'category_id'"),
        (drop("categories", "name"), "categories have no 'name'"),
        (lambda content: content.pop("images"), "has no list 'images'"),
        (twice("images", "id"), r"id \d+ comes twice"),
        (twice("images", "file_name"), "file_name .* comes twice"),
        (twice("annotations", "image_id"), r"image_id \d+ comes twice"),
        (lambda c: c["annotations"][0].update(category_id=7), "no annotation with a known"),
        (lambda c: c["images"][0].update(id=310), "310 is in train_birds.json and in val"),
    ],
)
def test_an_inat_file_that_contradicts_itself_is_refused(
    inat: Path, edit: Callable[[Any], object], message: str
) -> None:
    assert read_json(inat / "val_birds.json")["images"][0]["id"] == 310
    if "310" in message:
        first = read_json(inat / "train_birds.json")["images"][0]["id"]
        change(inat, "train", lambda c: c["annotations"][0].update(image_id=310))
        assert first != 310
    with pytest.raises(DatasetError, match=message) as caught:
        open_birds(change(inat, "train", edit))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("images.txt", "2 001", "1 001", "id '1' comes twice"),
        ("image_class_labels.txt", "2 1\n", "", r"image 2 is not in .*image_class_labels.txt"),
        ("train_test_split.txt", "2 1\n", "", r"image 2 is not in .*train_test_split.txt"),
        ("train_test_split.txt", "2 1\n", "2 x\n", "holds 'x'; 1 is training"),
        ("image_class_labels.txt", "2 1\n", "2 9\n", "class 9 is not in"),
        ("classes.txt", "1 001.Black_footed_Albatross", "1", "line '1' without a second column"),
    ],
)
def test_lists_that_contradict_each_other_are_refused(
    tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    path = cub(tmp_path)
    text = (path / file).read_text()
    assert old in text
    (path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(DatasetError, match=message):
        open_birds(path)


@pytest.mark.parametrize(
    ("layout", "outside"),
    [
        ("inat", "train/../../private.jpg"),
        ("inat", "{}/private.jpg"),
        ("cub", "../../private.jpg"),
        ("nabirds", "../../cub/../private.jpg"),
    ],
)
def test_an_image_outside_the_folder_is_refused(tmp_path: Path, layout: str, outside: str) -> None:
    write_image(tmp_path / "private.jpg", 0)
    path, name = tmp_path / layout, outside.format(tmp_path)
    if layout == "inat":
        content = read_json(inat_birds(path) / "train_birds.json")
        content["images"][3]["file_name"] = name
        write_json(path / "train_birds.json", content)
    else:
        file = {"cub": cub, "nabirds": nabirds}[layout](path) / "images.txt"
        rows = file.read_text().splitlines()
        file.write_text("\n".join([*rows[:3], f"{rows[3].split()[0]} {name}", *rows[4:]]))
    with pytest.raises(DatasetError, match=r"private\.jpg'.* outside the folder") as refused:
        open_birds(path)
    assert "\n" not in str(refused.value)


def test_names_with_dots_inside_the_folder_are_read(tmp_path: Path) -> None:
    path = cub(tmp_path / "cub")
    text = (path / "images.txt").read_text()
    (path / "images.txt").write_text(text.replace(" 001.", " 002.Laysan_Albatross/../001.", 1))
    assert not open_birds(path).left_out


def test_a_list_that_is_missing_and_json_that_is_broken_are_one_line(tmp_path: Path) -> None:
    path = cub(tmp_path / "cub")
    (path / "classes.txt").unlink()
    with pytest.raises(DatasetError, match=r"classes.txt cannot be read"):
        open_birds(path)
    path = inat_birds(tmp_path / "inat", 6, 3)
    (path / "val_birds.json").write_text("{")
    with pytest.raises(DatasetError, match="not readable JSON"):
        open_birds(path)
    (path / "val_birds.json").unlink()
    with pytest.raises(DatasetError, match=r"val_birds.json is not readable"):
        open_birds(path)


def test_a_data_set_without_a_usable_image_is_refused(tmp_path: Path) -> None:
    path = cub(tmp_path)
    for file in (path / "images").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(DatasetError, match=r"no image that can be used .30 no photo file"):
        open_birds(path)


def test_photos_are_upright(tmp_path: Path) -> None:
    dataset = open_birds(cub(tmp_path))
    turned = Image.new("RGB", (10, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / dataset.facts["ground"][0], exif=exif)
    photo = dataset.ground([0])[0]
    assert photo is not None
    assert photo.size == (30, 10)
