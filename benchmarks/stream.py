"""Rows per second of Nature Multi-View's images: plain `dataset[i]` of Hugging Face, and ours.

Rows in the true schema are made on the spot: `rs_image` as nested lists of int64, (4, 256, 256),
and a JPEG of 500 x 375 px as `gl_image`. All give decoded pixels, in one process; each is compared
with `dataset[i]` that gives the same columns.

In `results/stream.csv`, taken on a busy machine with two cores, decoding through Arrow's buffers is
79 times as fast, and rows that were decoded once come 699 times as fast. Streaming as a whole is
held up by Parquet itself, which unpacks 2 MB of int64 for each window: 2 to 3 times.

    python benchmarks/stream.py [--rows 300] [--csv FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from PIL import Image

from speciesmap.datasets.columns import decode_windows
from speciesmap.datasets.paired import open_paired
from speciesmap.datasets.stream import Stream

BANDS, SIDE = 4, 256


def make(path: Path, rows: int, group: int) -> None:
    """Write rows in the hub's schema, smooth scenes that compress as photographs do."""
    rng = np.random.default_rng(0)
    features = {
        **{name: {"dtype": "float32", "_type": "Value"} for name in ("latitude", "longitude")},
        "name": {"dtype": "string", "_type": "Value"},
        "gl_image": {"_type": "Image"},
        "rs_image": [[[{"dtype": "int64", "_type": "Value"}]]],
    }
    nested = pa.list_(pa.list_(pa.list_(pa.int64())))
    schema = pa.schema(
        [
            ("latitude", pa.float32()),
            ("longitude", pa.float32()),
            ("name", pa.string()),
            ("gl_image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("rs_image", nested),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, group):
            count = min(group, rows - start)
            scenes = rng.integers(0, 256, (count, BANDS, SIDE // 8, SIDE // 8))
            scenes = scenes.repeat(8, 2).repeat(8, 3) + rng.integers(
                -8, 8, (count, BANDS, SIDE, SIDE)
            )
            photos = []
            for _ in range(count):
                small = Image.fromarray(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8))
                stored = io.BytesIO()
                small.resize((500, 375)).save(stored, "JPEG", quality=85)
                photos.append({"bytes": stored.getvalue(), "path": "x.jpg"})
            columns = [
                pa.array(np.full(count, 37), pa.float32()),
                pa.array(np.full(count, -122), pa.float32()),
                pa.array(["Quercus agrifolia"] * count),
                pa.array(photos, schema.field("gl_image").type),
                pa.array(scenes.clip(0, 255).tolist(), nested),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=group)


def per_second(items: Iterator[int]) -> float:
    """Rows per second of what gives how many rows it has read."""
    started, rows = time.perf_counter(), 0
    for count in items:
        rows += count
    return rows / (time.perf_counter() - started)


def main() -> None:
    """Measure all ways on the same rows, in one run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows: int = arguments.rows
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train-00000-of-00001.parquet"
        make(file, rows, 100)
        plain = load_dataset(
            "parquet", data_files=str(file), split="train", cache_dir=f"{folder}/cache"
        )
        few = min(40, rows)

        def by_item(columns: list[str]) -> Iterator[int]:
            chosen = plain.select_columns(columns)
            for i in range(few):
                row = chosen[i]
                np.asarray(row["rs_image"], np.uint8)
                if "gl_image" in row:
                    row["gl_image"].load()
                yield 1

        def through_buffers() -> Iterator[int]:
            for batch in plain.select_columns(["rs_image"]).data.table.to_batches(20):
                decode_windows(batch.column("rs_image")).astype(np.uint8)
                yield len(batch)

        data = open_paired(file)

        def streamed(photos: bool) -> Iterator[int]:
            for numbers, _, encoded in Stream(data, np.arange(rows), 20, 100, seed=0).read(0):
                if photos:
                    for row, photo in zip(numbers.tolist(), encoded, strict=True):
                        data.decode(row, photo)
                yield len(numbers)

        data.prepare()
        order = np.random.default_rng(0).permutation(rows)

        def kept(photos: bool) -> Iterator[int]:
            for chosen in np.array_split(order, max(1, rows // 20)):
                data.aerial(chosen)
                if photos:
                    data.ground(chosen)
                yield len(chosen)

        window = per_second(by_item(["rs_image"]))
        both = per_second(by_item(["rs_image", "gl_image"]))
        measured = [
            ("window", "dataset[i]", window, window),
            (
                "window",
                "the same Arrow rows through their buffers",
                per_second(through_buffers()),
                window,
            ),
            ("window", "streamed from Parquet", per_second(streamed(False)), window),
            ("window", "random rows, once decoded", per_second(kept(False)), window),
            ("window and photo", "dataset[i]", both, both),
            ("window and photo", "streamed from Parquet", per_second(streamed(True)), both),
            ("window and photo", "random rows, once decoded", per_second(kept(True)), both),
        ]
    table = pd.DataFrame(
        [
            (columns, way, round(speed), round(speed / base, 1))
            for columns, way, speed, base in measured
        ],
        columns=["columns", "read", "rows per second", "times dataset[i]"],
    )
    print(table.to_string(index=False))
    if arguments.csv:
        table.to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()
