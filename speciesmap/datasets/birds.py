"""The data sets of BirdSAT in their official folder layouts: iNat-2021 birds, CUB, NABirds.

What pairs a photo with its label, its split and its overhead image is an id, never a position in a
list. What cannot be used is left out and counted by reason; what contradicts itself is an error.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from speciesmap.datasets.columns import FRACTIONS
from speciesmap.datasets.paired import PairedDataset, open_paired
from speciesmap.datasets.photos import open_photo
from speciesmap.datasets.splits import hold_out_places, leaks, rank_of
from speciesmap.errors import DatasetError
from speciesmap.taxa import RANKS, Taxon

BANDS = ("red", "green", "blue")
OVERHEAD_M = 10.0  # Sentinel-2 cloudless (Sastry et al. 2024, section 4)
VALIDATION = 0.1  # share of the official training images, set apart for choices
NO_PHOTO, NO_OVERHEAD = "no photo file", "no overhead image"
NO_PLACE, OFF_GLOBE = "no place", "place beyond 90 or 180 degrees"
NO_IMAGES, NO_TRAINING = "category without images", "category without training images"

log = logging.getLogger("speciesmap")


@dataclass
class BirdDataset:
    """Photos of birds, with overhead images of the same places where there are any.

    It answers to the same names as `PairedDataset`; files are read when asked for.

    Attributes:
        path: The folder.
        facts: One row per photo: `image_id`, `observation_uuid`, `latitude`, `longitude`,
            `gl_image_date`, `name`, `ancestry`, `split` (train, validation or test) and the files
            `ground` and `overhead`, relative to the folder; and `finetune_*percent`, nested
            shares of the training rows as Nature Multi-View has them.
        taxa: Every taxon of the rows.
        has_aerial: Whether there are overhead images.
        window_px: Side of the overhead images in pixels, 0 without them.
        left_out: For each reason, how many images or categories were left out.
    """

    path: Path
    facts: pd.DataFrame = field(repr=False)
    taxa: tuple[Taxon, ...]
    has_aerial: bool
    window_px: int
    left_out: dict[str, int]
    bands: tuple[str, ...] = BANDS
    resolution_m: float = OVERHEAD_M
    dtype: np.dtype[Any] = np.dtype(np.uint8)  # noqa: RUF009
    has_ground: bool = True

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.facts)

    def __reduce__(self) -> tuple[Callable[..., BirdDataset], tuple[Path]]:
        """Travel to another process as a path."""
        return open_birds, (self.path,)

    @property
    def notes(self) -> dict[str, Any]:
        """What a reader should know beside the facts."""
        return {"left_out": self.left_out}

    @property
    def labels(self) -> NDArray[np.int64]:
        """Position in `taxa` of each row's taxon, shape (N,)."""
        position = {taxon.name: k for k, taxon in enumerate(self.taxa)}
        return np.asarray(self.facts["name"].map(position), dtype=np.int64)

    def aerial(self, rows: ArrayLike | None = None) -> NDArray[Any]:
        """Read overhead images, uint8, shape (N, 3, P, P).

        Raises:
            DatasetError: There are none, or one does not decode or has another size.
        """
        if not self.has_aerial:
            raise DatasetError(
                f"{self.path} has photos only; overhead images come with iNat-2021 birds"
            )
        side = self.window_px
        windows = np.empty((len(self._rows(rows)), len(BANDS), side, side), dtype=self.dtype)
        for window, (file, image) in zip(windows, self._read("overhead", rows), strict=True):
            if image.size != (side, side):
                raise DatasetError(
                    f"{file} has {image.width} x {image.height} pixels where others have {side} x "
                    f"{side}; resample it, or delete it to have its row left out"
                )
            window[:] = np.asarray(image).transpose(2, 0, 1)
        return windows

    def ground(self, rows: ArrayLike | None = None) -> list[Image.Image | None]:
        """Read photos as RGB, upright; greyscale ones get three equal bands.

        Raises:
            DatasetError: A photo does not decode.
        """
        return [image for _, image in self._read("ground", rows)]

    def prepare(self) -> None:
        """Do nothing: files are read as they are."""

    def _rows(self, rows: ArrayLike | None) -> NDArray[np.int64]:
        return np.atleast_1d(
            np.arange(len(self))[slice(None) if rows is None else np.asarray(rows)]
        )

    def _read(self, column: str, rows: ArrayLike | None) -> list[tuple[Path, Image.Image]]:
        files = [self.path / name for name in self.facts[column].to_numpy()[self._rows(rows)]]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(zip(files, pool.map(_open_image, files), strict=True))


def _open_image(file: Path) -> Image.Image:
    try:
        return open_photo(file)
    except ValueError as error:
        raise DatasetError(
            f"{file} does not decode ({error}); fetch it again, or delete it to have its row left "
            "out and counted"
        ) from error


def open_dataset(
    path: str | Path, split: str | None = None, taxonomy: str | Path | None = None
) -> PairedDataset | BirdDataset:
    """Open a folder of birds in an official layout, or a paired data set.

    Args:
        path: The folder; of a paired data set also a file or an address.
        split: See `open_paired`; birds are opened with all their splits.
        taxonomy: See `open_paired`.

    Raises:
        DatasetError: It is neither, or is damaged.
    """
    return open_birds(path) if reader_of(Path(path)) else open_paired(path, split, taxonomy)


def open_birds(path: str | Path) -> BirdDataset:
    """Open iNat-2021 birds with overhead images, CUB-200-2011 or NABirds.

    The official test images (iNat-2021's validation images) are the split `test`. A tenth of the
    official training images is `validation`: whole cells of a quarter of a degree where there are
    places, else some of each category. Images of earlier splits that share an observation or ground
    with a later one are left out, so results on iNat-2021 are not those of the leaking official
    split.

    Args:
        path: A folder that holds `train_birds.json`, `val_birds.json`, `train_overhead/` and
            `val_overhead/`; or the `images.txt` of CUB-200-2011 or NABirds.

    Raises:
        DatasetError: The layout is none of these, a file or column is missing, ids come twice, an
            image lies outside the folder, or nothing is left.
    """
    path = Path(path)
    reader = reader_of(path)
    if reader is None:
        raise DatasetError(
            f"{path} holds neither train_birds.json (iNat-2021 birds) nor images.txt (CUB-200-2011,"
            " NABirds); check the folder"
        )
    try:
        facts, taxa, left_out = reader(path)
    except DatasetError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(
            f"{path} holds values that its layout does not know ({reason}); unpack "
            "the data set again"
        ) from error
    if facts.empty:
        raise DatasetError(
            f"{path} has no image that can be used ({_listed(left_out)}); check the folder"
        )
    named = set(facts["name"])
    left_out[NO_IMAGES] += sum(taxon.name not in named for taxon in taxa)
    has_aerial = bool((facts["overhead"] != "").any())
    window_px = 0
    if has_aerial:
        window_px = _open_image(path / facts["overhead"].iloc[0]).width
        facts = _split_by_place(facts, window_px * OVERHEAD_M, left_out)
    learned = facts["name"].isin(facts["name"][facts["split"] == "train"])
    left_out[NO_TRAINING] += facts["name"][~learned].nunique()
    facts = facts[learned].reset_index(drop=True)
    counted = {reason: count for reason, count in left_out.items() if count}
    if facts.empty:
        raise DatasetError(
            f"{path} has no training image left ({_listed(counted)} left out); check the folder "
            "and its splits"
        )
    for reason, count in counted.items():
        log.warning("%s: %d left out: %s", path, count, reason)
    trained = (facts["split"] == "train").to_numpy()
    place = rank_of(facts["image_id"][trained]).argsort(kind="stable").argsort() + 0.5
    for percent in FRACTIONS:
        chosen = trained.copy()
        chosen[trained] = place <= float(percent) / 100 * trained.sum()
        facts[f"finetune_{percent}percent"] = chosen
    kept = set(facts["name"])
    return BirdDataset(
        path, facts, tuple(t for t in taxa if t.name in kept), has_aerial, window_px, counted
    )


def _listed(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)


Read = tuple[pd.DataFrame, list[Taxon], Counter[str]]


def reader_of(path: Path) -> Callable[[Path], Read] | None:
    """Find what reads a folder, by the files in it."""
    if (path / "train_birds.json").is_file():
        return _read_inat
    if (path / "images.txt").is_file():
        return _read_lists
    return None


def _split_by_place(facts: pd.DataFrame, side_m: float, left_out: Counter[str]) -> pd.DataFrame:
    training = (facts["split"] == "train").to_numpy()
    held = np.flatnonzero(training)[hold_out_places(facts[training], VALIDATION)]
    facts = facts.assign(
        split=np.where(np.isin(np.arange(len(facts)), held), "validation", facts["split"])
    )
    leaking = leaks(facts, side_m)
    for reason, rows in leaking.items():
        left_out[reason] += int(rows.sum())
    return facts[~np.any(list(leaking.values()), axis=0)]


def _read_inat(path: Path) -> Read:
    left_out: Counter[str] = Counter()
    tables, seen = [], dict[Any, str]()
    taxa: dict[str, Taxon] = {}
    for split, part in (("train", "train"), ("test", "val")):
        file = path / f"{part}_birds.json"
        content = _read_json(file, ("images", "annotations", "categories"))
        images = _table(
            content["images"], ("id", "file_name", "latitude", "longitude", "date"), file
        )
        labels = _table(content["annotations"], ("image_id", "category_id"), file, "annotations")
        categories = _table(content["categories"], ("id", "name"), file, "categories")
        for table, column in (
            (images, "id"),
            (images, "file_name"),
            (labels, "image_id"),
            (categories, "id"),
        ):
            _refuse_repeats(table[column], f"{file}: {column}")
        for image in images["id"]:
            if seen.setdefault(image, split) != split:
                raise DatasetError(
                    f"{path}: image id {image} is in train_birds.json and in val_birds.json: the "
                    "split leaks; remove it from one"
                )
        names = _distinct(dict(zip(categories["id"], categories["name"], strict=True)))
        for row in categories.to_dict("records"):
            lineage = tuple(str(row[rank]) for rank in RANKS if row.get(rank))
            taxa.setdefault(names[row["id"]], Taxon(names[row["id"]], lineage))
        category = dict(zip(labels["image_id"], labels["category_id"], strict=True))
        images["category"] = images["id"].map(category)
        unknown = images["id"][~images["category"].isin(categories["id"])]
        if len(unknown):
            raise DatasetError(
                f"{file}: image {unknown.iloc[0]} has no annotation with a known category_id; "
                "mend the file"
            )
        overhead = _overhead_files(path, part, images["id"].tolist())
        images["overhead"] = images["id"].map(overhead).fillna("")
        present = _present(path, images["file_name"])
        places = images[["latitude", "longitude"]].astype(float)
        placed = places.notna().all(axis=1)
        on_globe = (places.abs() <= [90, 180]).all(axis=1)
        for reason, lacking in (
            (NO_PHOTO, ~present),
            (NO_PLACE, present & ~placed),
            (OFF_GLOBE, present & placed & ~on_globe),
            (NO_OVERHEAD, present & on_globe & (images["overhead"] == "")),
        ):
            left_out[reason] += int(lacking.sum())
        images = images[present & on_globe & (images["overhead"] != "")]
        owner = images.get("rights_holder", pd.Series("", images.index)).fillna("")
        date = images["date"].fillna("").astype(str)
        name = images["category"].map(names)
        place = images["latitude"].astype(str) + " " + images["longitude"].astype(str)
        tables.append(
            pd.DataFrame(
                {
                    "image_id": images["id"].astype(str),
                    # photos by one person of one taxon at one place and time are one observation
                    "observation_uuid": place + " " + date + " " + owner + " " + name,
                    "latitude": images["latitude"].astype(float),
                    "longitude": images["longitude"].astype(float),
                    "gl_image_date": date.str.slice(0, 10),
                    "name": name,
                    "ancestry": name.map(lambda n: "/".join(taxa[n].lineage)),
                    "split": split,
                    "ground": images["file_name"],
                    "overhead": images["overhead"],
                }
            )
        )
    return pd.concat(tables, ignore_index=True), list(taxa.values()), left_out


def _overhead_files(path: Path, part: str, images: Sequence[Any]) -> dict[Any, str]:
    """Overhead file of each image id, for those that exist.

    A table `<part>_birds_labels.csv` with columns `image_id` and `overhead` says it by id. In the
    table as published, row k is the file number k and the second column an index into `images`.
    Without a table a file is named by the image's id.
    """
    folder, table = path / f"{part}_overhead" / "images_sentinel", path / f"{part}_birds_labels.csv"
    if not folder.is_dir():
        raise DatasetError(f"{path} has no {part}_overhead/images_sentinel; unpack it there")
    files = {file.stem: str(file.relative_to(path)) for file in folder.iterdir()}
    if not table.is_file():
        stems = set(files)
        if stems == {str(k) for k in range(len(stems))} and stems != {str(i) for i in images}:
            raise DatasetError(
                f"{folder} is numbered by position, which pairs nothing safely; add {table.name} "
                "as published, or with columns image_id and overhead"
            )
        return {image: files[str(image)] for image in images if str(image) in files}
    rows = pd.read_csv(table)
    if {"image_id", "overhead"} <= set(rows.columns):
        _refuse_repeats(rows["image_id"], f"{table}: image_id")
        named = zip(rows["image_id"], rows["overhead"].astype(str), strict=True)
        return {image: files[Path(n).stem] for image, n in named if Path(n).stem in files}
    index = (
        pd.to_numeric(rows.iloc[:, 1], errors="coerce") if rows.shape[1] > 1 else pd.Series(-1.0)
    )
    numbered = rows.columns[0].startswith("Unnamed") and (rows.iloc[:, 0] != range(len(rows))).any()
    if numbered or not index.between(0, len(images) - 1).all() or not index.is_unique:
        raise DatasetError(
            f"{table} is neither as published (row k of the file number k, second column an index "
            "into images) nor has columns image_id and overhead; fetch it again"
        )
    pairs = zip(index.astype(int), range(len(rows)), strict=True)
    return {images[position]: files[str(k)] for position, k in pairs if str(k) in files}


def _read_lists(path: Path) -> Read:
    """Read CUB-200-2011 or NABirds, whose `hierarchy.txt` gives lineages."""
    files, label = _read_list(path / "images.txt"), _read_list(path / "image_class_labels.txt")
    trained, classes = _read_list(path / "train_test_split.txt"), _read_list(path / "classes.txt")
    parent = {}
    if (path / "hierarchy.txt").is_file():
        parent = _read_list(path / "hierarchy.txt")
    for name, listed in (("image_class_labels.txt", label), ("train_test_split.txt", trained)):
        lacking = [image for image in files if image not in listed]
        if lacking:
            raise DatasetError(f"image {lacking[0]} is not in {path / name}; mend the file")
    unknown = [label[image] for image in files if label[image] not in classes]
    if unknown:
        raise DatasetError(f"class {unknown[0]} is not in {path / 'classes.txt'}; mend the file")
    odd = [value for value in trained.values() if value not in ("0", "1")]
    if odd:
        raise DatasetError(
            f"{path / 'train_test_split.txt'} holds {odd[0]!r}; 1 is training, 0 is test"
        )
    # CUB writes "001.Black_footed_Albatross", NABirds "Mallard (Breeding male)"
    plain = {
        k: name.partition(".")[2] if name[:3].isdigit() else name for k, name in classes.items()
    }
    plain = {k: name.replace("_", " ") for k, name in plain.items()}
    used = set(label.values())
    names = _distinct({k: name for k, name in plain.items() if k in used or not parent})
    taxa = {k: Taxon(name, _lineage(k, parent, plain)) for k, name in names.items()}
    facts = pd.DataFrame(
        {"image_id": list(files), "ground": [f"images/{f}" for f in files.values()]}
    )
    _refuse_repeats(facts["ground"], f"{path / 'images.txt'}: file")
    facts["name"] = [taxa[label[image]].name for image in files]
    facts["ancestry"] = ["/".join(taxa[label[image]].lineage) for image in files]
    facts["split"] = np.where([trained[image] == "1" for image in files], "train", "test")
    facts = facts.assign(
        observation_uuid=facts["image_id"],
        latitude=np.nan,
        longitude=np.nan,
        gl_image_date="",
        overhead="",
    )
    present = _present(path, facts["ground"])
    left_out = Counter({NO_PHOTO: int((~present).sum())})
    facts = facts[present].reset_index(drop=True)
    order = rank_of(facts["image_id"])
    for _, rows in facts[facts["split"] == "train"].groupby("name"):
        held = max(min(1, len(rows) - 1), round(VALIDATION * len(rows)))
        facts.loc[rows.index[order[rows.index].argsort(kind="stable")[:held]], "split"] = (
            "validation"
        )
    return facts, list(taxa.values()), left_out


def _lineage(node: str, parent: Mapping[str, str], names: Mapping[str, str]) -> tuple[str, ...]:
    above: list[str] = []
    while node in parent and parent[node] in names and len(above) < len(parent):
        node = parent[node]
        above.insert(0, names[node])
    return tuple(above)


def _read_list(file: Path) -> dict[str, str]:
    """Read lines of an id and a value."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} cannot be read ({error}); unpack the data set again") from error
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    short = [pair for pair in pairs if len(pair) < 2]
    if short:
        raise DatasetError(f"{file} has a line {short[0][0]!r} without a second column; mend it")
    _refuse_repeats(pd.Series([pair[0] for pair in pairs]), f"{file}: id")
    return {key: value.strip() for key, value in pairs}


def _read_json(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file} is not readable JSON ({error}); fetch it again") from error
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DatasetError(f"{file} has no list {key!r}; it must be in iNat-2021's format")
    return dict(content)


def _table(
    rows: list[Any], columns: Sequence[str], file: Path, key: str = "images"
) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    for column in columns:
        if column not in table.columns:
            raise DatasetError(
                f"{file}: {key} have no {column!r}; it must be in iNat-2021's format"
            )
    return table


def _refuse_repeats(ids: pd.Series[Any], where: str) -> None:
    repeated = ids[ids.duplicated()].tolist()
    if repeated:
        raise DatasetError(f"{where} {repeated[0]!r} comes twice; each must be unique")


def _distinct(names: Mapping[Any, str]) -> dict[Any, str]:
    """Tell categories of one name apart by their ids."""
    count = Counter(names.values())
    return {k: name if count[name] == 1 else f"{name} ({k})" for k, name in names.items()}


def _present(path: Path, files: pd.Series[str]) -> pd.Series[bool]:
    """Which files exist; each folder is listed once. None may lie outside the data set."""
    for name in files:
        if Path(os.path.normpath(path / name)).is_relative_to(os.path.normpath(path)):
            continue
        raise DatasetError(
            f"{path} lists the image {str(name)!r}, which lies outside the folder; unpack the data "
            "set again, from a source you trust"
        )
    listed: dict[Path, set[str]] = {}
    found = []
    for file in (path / name for name in files):
        if file.parent not in listed:
            there = file.parent.is_dir()
            listed[file.parent] = (
                {entry.name for entry in os.scandir(file.parent)} if there else set()
            )
        found.append(file.name in listed[file.parent])
    return pd.Series(found, files.index, dtype=bool)
