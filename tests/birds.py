"""Small data sets in the official layouts of iNat-2021 birds, CUB-200-2011 and NABirds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPECIES = ("Cyanocitta stelleri", "Calypte anna", "Zonotrichia leucophrys")
OVERHEAD_PX = 20


def write_image(file: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (26, 22)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)
    Image.fromarray(pixels).save(file)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def inat_birds(path: Path, train: int = 30, test: int = 6) -> Path:
    """Images a degree apart; ids do not follow their order; overhead images are named by id."""
    categories = [
        {
            "id": 40 + k,
            "name": name,
            "kingdom": "Animalia",
            "phylum": "Chordata",
            "class": "Aves",
            "order": "Passeriformes",
            "family": "Familidae",
            "genus": name.split()[0],
        }
        for k, name in enumerate(SPECIES)
    ]
    number = 0
    for part, count in (("train", train), ("val", test)):
        images, annotations = [], []
        for k in range(count):
            image = (7 * number) % 1009 + 100
            name = f"{part}/{40 + k % 3:05d}_Aves/{image}.jpg"
            images.append(
                {
                    "id": image,
                    "file_name": name,
                    "latitude": 30.0 + number // 8,
                    "longitude": -120.0 + number % 8,
                    "date": f"2020-{k % 12 + 1:02d}-{k % 28 + 1:02d} 10:00:00+00:00",
                    "rights_holder": f"person {number}",
                }
            )
            annotations.append({"id": number, "image_id": image, "category_id": 40 + k % 3})
            write_image(path / name, image)
            overhead = path / f"{part}_overhead" / "images_sentinel" / f"{image}.jpeg"
            write_image(overhead, image + 5000, size=(OVERHEAD_PX, OVERHEAD_PX))
            number += 1
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_json(path / f"{part}_birds.json", content)
    return path


def lists(path: Path, rows: dict[str, list[tuple[str, str]]]) -> None:
    for name, pairs in rows.items():
        text = "".join(f"{key} {value}\n" for key, value in pairs)
        (path / f"{name}.txt").write_text(text)


def cub(path: Path, per_class: int = 10) -> Path:
    """Three classes, of whose images every fourth is greyscale and the last four are test."""
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    rows: dict[str, list[tuple[str, str]]] = {
        "classes": [(str(k + 1), name) for k, name in enumerate(classes)],
        "images": [],
        "image_class_labels": [],
        "train_test_split": [],
    }
    for k in range(3 * per_class):
        image, label, number = str(k + 1), k // per_class, k % per_class
        file = f"{classes[label]}/{classes[label][4:]}_{number:04d}.jpg"
        rows["images"].append((image, file))
        rows["image_class_labels"].append((image, str(label + 1)))
        rows["train_test_split"].append((image, "01"[number < per_class - 4]))
        write_image(path / "images" / file, k, mode="L" if k % 4 == 3 else "RGB")
    lists(path, rows)
    return path


def nabirds(path: Path) -> Path:
    """Two leaf classes under one family; ids are UUIDs with dashes."""
    rows: dict[str, list[tuple[str, str]]] = {
        "classes": [
            ("0", "Birds"),
            ("21", "Ducks, Geese, and Swans"),
            ("817", "Mallard (Male)"),
            ("818", "Mallard (Female)"),
        ],
        "hierarchy": [("21", "0"), ("817", "21"), ("818", "21")],
        "images": [],
        "image_class_labels": [],
        "train_test_split": [],
    }
    for k in range(12):
        image, label = f"0139e21{k:x}-dc2c-4a91-8f25-{k:012x}", ("817", "818")[k % 2]
        file = f"0{label}/{image.replace('-', '')}.jpg"
        rows["images"].append((image, file))
        rows["image_class_labels"].append((image, label))
        rows["train_test_split"].append((image, "10"[k >= 8]))
        write_image(path / "images" / file, k)
    lists(path, rows)
    return path
