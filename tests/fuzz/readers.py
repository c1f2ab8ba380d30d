"""Damaged and hostile input for every reader but that of observations.

Run all of them, each on many inputs:

    python tests/fuzz/readers.py --inputs 10000

A reader may refuse with a SpeciesmapError. Any other exception, more than ten seconds, more than
1 GB above the start, a file written outside its folder, or a program started is a finding.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import geopandas as gpd
import hypothesis.strategies as st
import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as repeatable
from odc.geo.geobox import GeoBox
from PIL import Image
from rasterio.transform import from_origin

sys.path.insert(0, str(Path(__file__).parent.parent))
from damage import JSON, ODD, Breach, Run, bounded, damaged, twisted
from sources import SOURCES
from tiny import tiny_model, tiny_scene

from speciesmap.config import load_config, shipped_config
from speciesmap.datasets.paired import open_paired
from speciesmap.describe import describe
from speciesmap.errors import SpeciesmapError
from speciesmap.mapping.applicability import applicable, learn_applicability
from speciesmap.mapping.query import make_queries, photo_query, score, spread
from speciesmap.models import SpeciesModel, load_model
from speciesmap.models.checkpoint import save_model
from speciesmap.models.trust import TRUST, Trust
from speciesmap.present.markers import pack_records
from speciesmap.present.styles import Legend, style_elements
from speciesmap.present.webmap import make_map, script_json
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.store import EmbeddingStore, Identity, open_store

# ---- readers: each prepares originals in a folder, and gives inputs and how to read one


def aliased(trees: list[Any]) -> list[Any]:
    """Configurations in which one value is many: YAML writes it once, and aliases of it."""
    many: Any = "x"
    for _ in range(12):
        many = [many] * 9
    keys = ("seed", "optim", "stage")
    return [{**tree, key: many} for tree, key in zip(trees, keys, strict=True)]


def config(folder: Path) -> tuple[Any, Run]:
    """Training configurations, as bytes and as YAML of the wrong kind."""
    names = ("demo_crisp.yaml", "demo_landsat_finetune.yaml", "demo_landsat_mae.yaml")
    files = [shipped_config(name).read_bytes() for name in names]
    trees = [yaml.safe_load(file) for file in files]
    pairs = zip("abcdef", "bcdefg", strict=True)
    levels = [f"{c}: &{c} [{chr(44).join([f'*{p}'] * 9)}]\n" for p, c in pairs]
    bomb = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(levels).encode()
    nested = b"[" * 5000
    path = folder / "config.yaml"

    def read(content: bytes | Any) -> None:
        if not isinstance(content, bytes):
            content = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "replace")
        path.write_bytes(content)
        load_config(path)

    rarely = [bomb, nested]  # PyYAML takes half a second to refuse so many brackets
    return st.one_of(damaged([*files * 30, *rarely]), twisted([*trees, *aliased(trees)])), read


def changes(folder: Path) -> tuple[Any, Run]:
    """Assignments of --set."""
    keys = st.sampled_from(
        ["optim.lr", "model.dim", "data", "stage", "seed", "model.aerial.kwargs"]
    )
    source = shipped_config("demo_crisp.yaml")
    nested = st.sampled_from(["[" * 3000, "{a: " * 3000, "&a [*a]", "!!python/name:os.system"])
    value = st.one_of(st.text(max_size=40), ODD.map(str), nested)
    change = st.one_of(st.text(max_size=60), st.builds("{}={}".format, keys, value))

    return st.lists(change, min_size=1, max_size=3), lambda words: load_config(source, words)


def images(folder: Path) -> list[bytes]:
    """Photos with EXIF, and one that is far larger than its file."""
    exif = Image.Exif()
    exif[274], exif[0x8769] = 6, {0x9003: "2020:01:01 00:00:00"}
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (40, 56, 3)).astype(np.uint8))
    found = []
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF"):
        buffer = io.BytesIO()
        photo.save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
        found.append(buffer.getvalue())
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    return [*found, buffer.getvalue()]


def photo(folder: Path) -> tuple[Any, Run]:
    """Ground photos of a query."""
    path = folder / "photo.jpg"
    model = SimpleNamespace(
        ground=True, joined=True, dim=4, reference=torch.zeros(0, 4), eval=lambda: None,
        encode_ground=lambda pictures: torch.ones(len(pictures), 4),
    )  # fmt: skip

    def read(content: bytes) -> None:
        path.write_bytes(content)
        photo_query(model, [path])  # type: ignore[arg-type]

    return damaged(images(folder)), read


def thumbnail(folder: Path) -> tuple[Any, Run]:
    """Photos of observations on a page, and the names that records give them."""
    (folder / "photos").mkdir()
    name = st.one_of(
        st.just("photo.jpg"), st.text(max_size=30),
        st.sampled_from(["../secret.jpg", "/etc/passwd", "photo.jpg/", "\0", "a" * 5000]),
    )  # fmt: skip

    table = gpd.GeoDataFrame(
        {"taxon": ["a"], "longitude": [0.0], "latitude": [0.0], "license": ["CC0"], "photo": [""]}
    )

    def read(content: tuple[str, bytes]) -> None:
        (folder / "photos" / "photo.jpg").write_bytes(content[1])
        table["photo"] = [content[0]]
        pack_records(table, folder / "photos")

    read(("photo.jpg", images(folder)[0]))

    return st.tuples(name, damaged(images(folder))), read


def tiffs(folder: Path) -> list[bytes]:
    """Imagery and a map."""
    rng = np.random.default_rng(0)
    grid = GeoBox((40, 48), from_origin(560000, 4150000, 10, 10), "EPSG:32610")
    pixels = rng.integers(0, 255, (3, 40, 48)).astype(np.uint8)
    write_geotiff(folder / "rgb.tif", pixels, grid, bands=["red", "green", "blue"], nodata=0)
    values = rng.random((1, 40, 48)).astype(np.float32)
    write_geotiff(folder / "map.tif", values, grid, bands=["suitability"], nodata=np.nan)
    return [(folder / name).read_bytes() for name in ("rgb.tif", "map.tif")]


def geotiff(folder: Path) -> tuple[Any, Run]:
    """Headers and pixels of imagery."""
    originals = tiffs(folder)
    path = folder / "x.tif"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        imagery = open_imagery(path)
        imagery.read(-4, -4, 32, 32)
        assert imagery.resolution_m > 0

    return damaged(originals), read


def map_page(folder: Path) -> tuple[Any, Run]:
    """Maps on their way into a page."""
    originals = tiffs(folder)
    path, out = folder / "x.tif", folder / "page.html"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        make_map([path], out, overwrite=True)

    return damaged(originals), read


def trusted(dim: int) -> SpeciesModel:
    """A model with all that a fine-tuned one has."""
    rng = np.random.default_rng(0)
    model = tiny_model(dim=dim)
    places = torch.nn.functional.normalize(torch.randn(40, dim), dim=1)
    model.trust = Trust(
        torch.randn(len(model.taxa), 3, dim), torch.randn(len(model.taxa), 3),
        learn_applicability(places, np.arange(40) % 4, rng),
        {model.taxa[0].name: {"5th percentile of presences": 0.2}},
        {model.taxa[0].name: ([0.0, 0.5, 1.0], [0.0, 0.1, 0.9])},
        {model.taxa[0].name: 40},
    )  # fmt: skip
    return model


def checkpoint(folder: Path) -> tuple[Any, Run]:
    """Configs, taxa and weights of models, also of other shapes."""
    source, place = folder / "source", folder / "model"
    save_model(trusted(16), source, {"training": {"seed": 0}})
    save_model(trusted(8), folder / "other", {})
    shutil.copytree(source, place)
    weights, trusts = (
        [(folder / name / file).read_bytes() for name in ("source", "other")]
        for file in ("model.safetensors", TRUST)
    )
    trees = {n: json.loads((source / n).read_text()) for n in ("config.json", "taxa.json")}
    content = st.one_of(
        st.tuples(st.just("model.safetensors"), st.one_of(damaged(weights), st.just(weights[1]))),
        st.tuples(st.just(TRUST), st.one_of(damaged(trusts), st.just(trusts[1]))),
        st.tuples(st.just("config.json"), twisted([trees["config.json"]])),
        st.tuples(st.just("config.json"), damaged([(source / "config.json").read_bytes()])),
        st.tuples(st.just("taxa.json"), twisted([trees["taxa.json"]])),
        st.tuples(st.sampled_from(sorted(trees)), JSON),
    )

    windows = torch.zeros(1, 4, 16, 16)

    @torch.inference_mode()
    def read(change: tuple[str, Any]) -> None:
        name, data = change
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        (place / name).write_bytes(data)
        try:
            model = load_model(place)
            query = make_queries(model, species=[model.taxa[0].name])[0]
            vectors = model.encode_aerial(windows).numpy()
            score(vectors, [query])
            if len(query.members):
                spread(vectors, query)
            if model.trust and model.trust.applicability:
                applicable(vectors, model.trust.applicability)
        finally:
            shutil.copyfile(source / name, place / name)

    return content, read


def store(folder: Path) -> tuple[Any, Run]:
    """Metadata and chunks of embedding stores."""
    source = folder / "source.zarr"
    identity = Identity("0" * 16, 16, 4, ("red",), "1" * 16, 0.5)
    grid = GeoBox((40, 40), from_origin(560000, 4150000, 10, 10), "EPSG:32610")
    made = EmbeddingStore.create(source, identity, grid, 8, source="a.tif")
    vectors = np.full((32, 32, 8), 0.25, np.float16)
    made.write((0, 0), vectors)
    files = [p.relative_to(source) for p in sorted(source.rglob("*")) if p.is_file()]
    place = folder / "store.zarr"
    shutil.copytree(source, place)

    def of(file: Path) -> Any:
        data = (source / file).read_bytes()
        broken = damaged([data])
        if file.name == "zarr.json":
            broken = st.one_of(broken, twisted([json.loads(data)]), JSON)
        return st.tuples(st.just(file), st.one_of(broken, st.just(None)))

    def read(change: tuple[Path, Any]) -> None:
        file, data = change
        if data is None:
            (place / file).unlink()
        else:
            (place / file).write_bytes(
                data if isinstance(data, bytes) else json.dumps(data).encode()
            )
        try:
            opened = open_store(place)
            opened.read(slice(0, 40), slice(0, 40))
            opened.done()
        finally:
            shutil.copyfile(source / file, place / file)

    return st.sampled_from(files).flatmap(of), read


def paired(folder: Path) -> tuple[Any, Run]:
    """Parquet files and notes of paired data sets."""
    scene = tiny_scene(folder, rows=12)
    source, place = scene.chips, folder / "place"
    shutil.copytree(source, place)
    files = [p.relative_to(source) for p in sorted(source.rglob("*")) if p.is_file()]

    def of(file: Path) -> Any:
        data = (source / file).read_bytes()
        broken = damaged([data, data[::-1]])  # its index lies at the end
        if file.suffix == ".json":
            broken = st.one_of(broken, twisted([json.loads(data)]), JSON)
        return st.tuples(st.just(file), broken)

    def read(change: tuple[Path, Any]) -> None:
        file, data = change
        if file.suffix == ".parquet" and data[:4] != b"PAR1":
            data = data[::-1]
        (place / file).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        try:
            dataset = open_paired(place)
            dataset.aerial([0, len(dataset) - 1])
            dataset.ground([0])
        finally:
            shutil.copyfile(source / file, place / file)

    return st.sampled_from(files).flatmap(of), read


def info(folder: Path) -> tuple[Any, Run]:
    """Whatever `speciesmap info` is pointed at."""
    tiffs(folder)
    save_model(tiny_model(), folder / "model", {"training": {"seed": 0}})
    scene = tiny_scene(folder, rows=6)
    tops = [folder / "map.tif", folder / "model", scene.chips]
    files = [
        (top, file)
        for top in tops
        for file in (sorted(top.rglob("*")) if top.is_dir() else [top])
        if file.is_file() and file.suffix != ".safetensors"
    ]

    def of(place: tuple[Path, Path]) -> Any:
        broken = damaged([place[1].read_bytes()])
        return st.tuples(
            st.just(place), st.one_of(broken, JSON) if place[1].suffix == ".json" else broken
        )

    def read(change: tuple[tuple[Path, Path], bytes]) -> None:
        (top, file), data = change
        whole = file.read_bytes()
        file.write_bytes(data)
        try:
            describe(top)
        finally:
            file.write_bytes(whole)

    return st.sampled_from(files).flatmap(of), read


TEXT = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        ["</script><script>alert(1)</script>", "<!--", "]]>", "&lt;", "\u2028", "\ud800", "{{7*7}}",
         "{% raw %}", "' onload='x", "\x00", "javascript:alert(1)", "<svg/onload=x>"]
    ),
).flatmap(lambda text: st.text(max_size=8).map(lambda more: text + more))  # fmt: skip


def html_text(folder: Path) -> tuple[Any, Run]:
    """Strings on their way into pages and QGIS files."""
    import html.parser
    import xml.etree.ElementTree as ElementTree

    class Tags(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__(convert_charrefs=True)
            self.seen: list[str] = []

        def handle_starttag(self, tag: str, attributes: Any) -> None:
            self.seen.append(tag)

    def read(text: str) -> None:
        page = f"<p><script type='application/json'>{script_json({text: [text]})}</script><b>x</b>"
        tags = Tags()
        tags.feed(page)
        assert tags.seen == ["p", "script", "b"], text
        for element in style_elements(Legend(text, text, text, 0.0, 1.0)):
            ElementTree.fromstring(ElementTree.tostring(element, encoding="unicode"))

    return TEXT, read


READERS: dict[str, Callable[[Path], tuple[Any, Run]]] = {
    "config": config,
    "changes": changes,
    "photo": photo,
    "thumbnail": thumbnail,
    "geotiff": geotiff,
    "map_page": map_page,
    "checkpoint": checkpoint,
    "store": store,
    "paired": paired,
    "info": info,
    "html_text": html_text,
    **SOURCES,
}


NO_MEMORY = re.compile("allocat|bad_alloc|MemoryError", re.IGNORECASE)


def reasons(error: BaseException | None) -> str:
    """What an error says, and those that it came from: one may hide that memory ran out."""
    return f"{error!r} {reasons(error.__cause__ or error.__context__)}" if error else ""


def fuzz(name: str, inputs: int, seed: int = 0) -> tuple[Counter[str], dict[str, str]]:
    """Read many inputs.

    Args:
        name: Of a reader.
        inputs: How many.
        seed: Of the inputs.

    Returns:
        How many were read and how many refused; and one input of each finding.
    """
    outcome: Counter[str] = Counter()
    findings: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        strategy, read = READERS[name](Path(folder))

        @repeatable(seed)
        @settings(
            max_examples=inputs,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def one(content: Any) -> None:
            try:
                with bounded(Path(folder)):
                    read(content)
                outcome["read"] += 1
            except SpeciesmapError as error:
                outcome["refused"] += 1
                if len(str(error)) > 4000 or NO_MEMORY.search(reasons(error)):
                    outcome["finding"] += 1
                    findings.setdefault(
                        f"says {error!s:.100}", f"{reasons(error):.600} <- {content!r:.400}"
                    )
            except (Exception, Breach) as error:
                outcome["finding"] += 1
                trace = error.__traceback__
                last = trace
                while trace is not None:
                    if "speciesmap/" in trace.tb_frame.f_code.co_filename:
                        last = trace
                    trace = trace.tb_next
                place = ""
                if last is not None:
                    file = Path(last.tb_frame.f_code.co_filename).name
                    place = f"{file}:{last.tb_lineno}"
                findings.setdefault(
                    f"{type(error).__name__} at {place}", f"{error!s:.160} <- {content!r:.400}"
                )

        try:
            one()
        finally:
            logging.disable(logging.NOTSET)
    return outcome, findings


def main() -> None:
    """Fuzz readers by name and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", default=list(READERS))
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="another one for each further slice")
    arguments = parser.parse_args()
    found = False
    for name in arguments.readers:
        start = time.perf_counter()
        outcome, findings = fuzz(name, arguments.inputs, arguments.seed)
        seconds = time.perf_counter() - start
        print(
            f"{name}: {sum(outcome.values())} inputs, {dict(outcome)}, {seconds:.0f} s", flush=True
        )
        for where, example in findings.items():
            print(f"  {where}: {example}", flush=True)
        found = found or bool(findings)
    sys.exit(int(found))


if __name__ == "__main__":
    main()
