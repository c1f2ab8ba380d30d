"""New species over an area that is encoded already: 100 queries, 512 dimensions, one pass.

`queries.py` scores a store of a million cells against 100 species in one pass, without and with
writing 100 maps, and compares the first with a matrix product over the same vectors in memory, in
the same process. Then it maps two species from stores of growing size, each in a process of its
own, for the peak of memory. Results go to queries.json and into README.md.

The stores hold 64 tiles of random unit vectors again and again, as hard links: the bytes read and
decoded are those of a full store, the disk holds 64 MB of them, and they stay in the system's
cache.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from page import put

from speciesmap.mapping.predict import _tiles, write_maps
from speciesmap.mapping.query import Query, score
from speciesmap.mapping.threads import abreast
from speciesmap.rasters.store import TILE, EmbeddingStore, Identity, open_store

HERE = Path(__file__).parent
DIM, SPECIES, DISTINCT = 512, 100, 64
SIDE = 1024  # cells: 1,048,576
SIDES = (512, 1024, 2048, 4096)
ROUNDS = 3


def make_store(path: Path, side: int) -> EmbeddingStore:
    """Write a store of so many cells a side, full."""
    geobox = GeoBox((side, side), Affine(64, 0, 500_000, 0, -64, 4_500_000), "EPSG:32610")
    identity = Identity("m", 256, 64, ("red", "green", "blue"), "i", 0.5)
    store = EmbeddingStore.create(path, identity, geobox, DIM, source="random")
    rng = np.random.default_rng(0)
    made: list[Path] = []
    for tile in store.tiles_in(slice(0, side), slice(0, side)):
        file = path / "vectors" / "c" / str(tile[0]) / str(tile[1]) / "0"
        if len(made) < DISTINCT:
            vectors = rng.standard_normal((TILE, TILE, DIM), np.float32)
            vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
            store.write(tile, vectors.astype(np.float16))
            made.append(file)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            os.link(made[(tile[0] * 7 + tile[1]) % DISTINCT], file)
    return store


def some_queries(count: int) -> list[Query]:
    """Random directions."""
    vectors = np.random.default_rng(1).standard_normal((count, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [
        Query(f"Species {k}", "taxon", v, 10.0, 0.0, "suitability") for k, v in enumerate(vectors)
    ]


def in_memory(store: EmbeddingStore, queries: list[Query]) -> float:
    """Seconds of the plain product: all vectors in memory, in single precision, in blocks."""
    quarter = store.read(slice(0, SIDE // 4), slice(0, SIDE))
    places = torch.from_numpy(quarter).reshape(-1, DIM).float()  # (N / 4, D)
    directions = torch.from_numpy(np.stack([query.vector for query in queries])).T.contiguous()
    values = torch.empty(len(places), len(queries))
    started = time.perf_counter()
    for _ in range(4):  # the quarter stands for the whole, which takes 2 GB in single precision
        torch.mm(places, directions, out=values)
    return time.perf_counter() - started


def from_store(store: EmbeddingStore, queries: list[Query]) -> float:
    """Seconds of one pass over the store: read, decode, score."""
    started = time.perf_counter()
    tiles = _tiles(store, slice(0, SIDE), slice(0, SIDE), None)
    for _ in abreast(lambda tile: score(store.read(*tile.cells), queries), tiles):
        pass
    return time.perf_counter() - started


def measure(path: str, out: str) -> None:
    """Map two species in this process and print the peak of memory."""
    store = open_store(path)
    Path(out).mkdir()
    started = time.perf_counter()
    write_maps(store, some_queries(2), Path(out))
    took = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"s": took, "memory_mb": peak}))


def main() -> None:
    """Measure, print and keep."""
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in SIDES:
            store = make_store(folder / f"{side}.zarr", side)
            words = [
                sys.executable,
                __file__,
                "--measure",
                str(store.path),
                str(folder / f"{side}"),
            ]
            run = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            found[f"{side} cells a side"] = json.loads(run.stdout)
            print(side, found[f"{side} cells a side"], flush=True)
        store, queries = open_store(folder / f"{SIDE}.zarr"), some_queries(SPECIES)
        pairs = [(in_memory(store, queries), from_store(store, queries)) for _ in range(ROUNDS)]
        product, stored = (float(np.median(column)) for column in zip(*pairs, strict=True))
        (folder / "maps").mkdir()
        started = time.perf_counter()
        write_maps(store, queries, folder / "maps")
        written = time.perf_counter() - started
    rate = float(np.median([p / s for p, s in pairs]))
    found["100 species, 1,048,576 cells"] = {
        "product_in_memory_s": product,
        "from_store_s": stored,
        "rate_of_product": rate,
        "with_100_maps_written_s": written,
    }
    peaks = ", ".join(f"{found[f'{s} cells a side']['memory_mb']:.0f} MB at {s:,}" for s in SIDES)
    put(
        "queries",
        f"100 species over 1,048,576 cells of 512 dimensions, one pass, {torch.get_num_threads()} "
        f"thread(s), median of {ROUNDS} rounds: {stored:.1f} s to read, decode and score, against "
        f"{product:.1f} s of a plain float32 matrix product over the same vectors in memory, so "
        f"{rate:.2f} of its rate (the aim was 0.5); with 100 maps written {written:.0f} s.\n\n"
        f"Peak of memory while two species are mapped, by cells a side: {peaks}.",
    )
    print(found["100 species, 1,048,576 cells"])
    (HERE / "queries.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
