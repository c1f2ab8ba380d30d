"""Feed damaged files to the readers of observations; only a SpeciesmapError may come out.

    python tests/fuzz_observations.py --inputs 10000

Of each form that is read, a whole small file is damaged over and over (bytes changed, cut,
repeated, moved, replaced by words that parsers trip over) and read. Whatever is not read must be
refused by a SpeciesmapError of one line, within 10 s and 1 GB, and leave no file behind.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import pandas as pd

from speciesmap.errors import SpeciesmapError
from speciesmap.observations.read import read_observations, read_places

META = b"""<archive xmlns="http://rs.tdwg.org/dwc/text/" metadata="metadata.xml">
<core encoding="UTF-8" fieldsTerminatedBy="\\t" linesTerminatedBy="\\n" fieldsEnclosedBy=""
ignoreHeaderLines="1" rowType="http://rs.tdwg.org/dwc/terms/Occurrence">
<files><location>occurrence.txt</location></files><id index="0"/>
<field index="1" term="http://rs.tdwg.org/dwc/terms/decimalLatitude"/>
<field index="2" term="http://rs.tdwg.org/dwc/terms/decimalLongitude"/>
<field index="3" term="http://rs.tdwg.org/dwc/terms/scientificName"/>
<field default="PRESENT" term="http://rs.tdwg.org/dwc/terms/occurrenceStatus"/></core>
<extension encoding="UTF-8" fieldsTerminatedBy="," linesTerminatedBy="\\n" fieldsEnclosedBy='"'
ignoreHeaderLines="1" rowType="http://rs.gbif.org/terms/1.0/Multimedia">
<files><location>multimedia.txt</location></files><coreid index="0"/>
<field index="1" term="http://purl.org/dc/terms/identifier"/>
<field index="2" term="http://purl.org/dc/terms/license"/></extension></archive>
"""
OCCURRENCES = b"id\tlat\tlon\tname\n1\t37.5\t-122.1\tAcer rubrum L.\n2\t37.6\t-122\tAcer sp.\n"
PHOTOS = b'id,identifier,license\n1,"https://h/a,b.jpg",CC0\n2,https://h/c.jpg,CC-BY\n'
GBIF = (
    "gbifID\tdatasetKey\tkingdom\tgenus\tspecies\ttaxonRank\tscientificName\toccurrenceStatus\t"
    "decimalLatitude\tdecimalLongitude\tcoordinateUncertaintyInMeters\teventDate\tbasisOfRecord\n"
    "1\tk-1\tPlantae\tAcer\tAcer rubrum\tSPECIES\tAcer rubrum L.\tPRESENT\t37.5\t-122.25\t12.0\t"
    "2019-05-04T10:12\tHUMAN_OBSERVATION\n"
    "2\tk-1\tPlantae\tAcer\t\tGENUS\tAcer Né\tABSENT\t37.25\t-122.5\t\t2019\tFOSSIL_SPECIMEN\n"
).encode()
INAT = (
    b"id,observed_on,quality_grade,license,image_url,captive_cultivated,latitude,longitude,"
    b"positional_accuracy,geoprivacy,coordinates_obscured,scientific_name,common_name\n"
    b'7,2021-03-09,research,CC-BY,h/1.jpg,false,36.1,-121.2,8,,false,Acer rubrum,"a ""b"""\n'
    b"8,2021-03-10,casual,,,true,36.2,-121.3,,obscured,true,Acer rubrum minus,\n"
)
COMMAS = "species;presence;latitude;longitude\nAcer rubrum;1;37,5;-122,5\nAcer rubrum;0;1,5;2\n"
WORDS = (
    b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b'"', b'""', b"'", b"\t", b"\r", b"\r\n",
    b"\n\n", b",", b";", b"|", b"inf", b"-inf", b"nan", b"NA", b"1e999", b"-0", b"9" * 40, b"0x1f",
    b"1_000", b"\xc3", b"\xe9", b"\xf0\x9f\x8c\xb2", b"\xed\xa0\x80", b"../../../etc/passwd",
    b"<!DOCTYPE a>", b"&lt;", b"]]>", b"-1", b"99999999999", b"<!--",
    b"encoding=\"utf-7\"", b"index=\"-1\"",
    b"2019-13-45", b"0000-00-00", b"latitude", b"longitude", b"POINT", b"\\N", b" " * 300,
)  # fmt: skip


def archive(parts: dict[str, bytes]) -> bytes:
    """Zip files in memory."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in parts.items():
            zipped.writestr(name, content)
    return held.getvalue()


def tables() -> dict[str, bytes]:
    """Small whole files of every form, by name."""
    rows = {"species": ["Acer rubrum", "Acer negundo"], "uncertainty_m": [1.5, None], "n": [1, 2]}
    points = gpd.points_from_xy([-122.5, -122.25], [37.0, 37.25], crs="EPSG:4326")
    table = gpd.GeoDataFrame(rows, geometry=points)
    plain = pd.DataFrame(rows).assign(latitude=[1.0, 2.0], longitude=[3.0, 4.0])
    made: dict[str, bytes] = {
        "gbif": GBIF,
        "inaturalist": INAT,
        "decimal commas": COMMAS.encode(),
        "utf-16": INAT.decode().encode("utf-16"),
        "zipped table": archive({"0001.csv": GBIF}),
    }
    with tempfile.TemporaryDirectory() as folder:
        writers: dict[str, Callable[[Path], object]] = {
            "points.parquet": table.to_parquet,
            "plain.parquet": plain.to_parquet,
            "points.gpkg": table.to_crs("EPSG:32610").to_file,
            "points.geojson": table.to_file,
        }
        for name, write in writers.items():
            path = Path(folder, name)
            write(path)
            made[name] = path.read_bytes()
    return made


def damage(whole: bytes, rng: random.Random) -> bytes:
    """Change a file in one to a few places."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 16, 64, 500))
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size] * rng.choice((1, 2, 50))
            case 3:
                data[at:at] = rng.choice(WORDS)
            case 4:
                data[at : at + size] = rng.choice(WORDS)
            case 5:
                other = rng.randrange(len(data) + 1)
                data[at:at] = data[other : other + size]
            case _:
                del data[at:]
        data = data or bytearray(b"\n")
    return bytes(data)


def damaged_archive(rng: random.Random) -> bytes:
    """A Darwin Core Archive with one damaged part, or damaged as a whole."""
    parts = {"meta.xml": META, "occurrence.txt": OCCURRENCES, "multimedia.txt": PHOTOS}
    name = rng.choice([*parts, "", "name"])
    if name in parts:
        parts[name] = damage(parts[name], rng)
    elif name:
        parts[rng.choice(["../escaped.txt", "/tmp/escaped.txt", "a/meta.xml", "x\\y"])] = b"x"
        parts["meta.xml"] = META.replace(b"occurrence.txt", b"../escaped.txt")
    return damage(archive(parts), rng) if not name else archive(parts)


def read(path: Path) -> bool:
    """Read a file as observations and as places; tell whether it was understood."""
    understood = 0
    for reader in (lambda: read_observations(path, taxon="Acer rubrum"), lambda: read_places(path)):
        try:
            reader()
            understood += 1
        except SpeciesmapError as error:
            assert "\n" not in str(error), f"a message of several lines: {error}"
    return understood > 0


def main() -> None:
    """Fuzz every form and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="of each form")
    parser.add_argument("--forms", default="", help="only those whose names begin so")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("speciesmap").setLevel(logging.CRITICAL)
    logging.getLogger("pyogrio").setLevel(logging.CRITICAL)
    forms: dict[str, Callable[[random.Random], bytes]] = {
        name: lambda rng, whole=whole: damage(whole, rng) for name, whole in tables().items()
    }
    forms["darwin core archive"] = damaged_archive
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "inside", "input")
        path.parent.mkdir()
        for name, make in forms.items():
            if not name.startswith(chosen.forms):
                continue
            rng, understood, slowest, wrong = random.Random(chosen.seed), 0, 0.0, {}
            for _ in range(chosen.inputs):
                data = make(rng)
                path.write_bytes(data)
                started = time.perf_counter()
                try:
                    understood += read(path)
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    wrong.setdefault(
                        f"{type(error).__name__} at {where.filename}:{where.lineno}", (error, data)
                    )
                slowest = max(slowest, time.perf_counter() - started)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            strays = [p.name for p in Path(folder).rglob("*") if p not in (path, path.parent)]
            failures += len(wrong) + bool(strays) + (slowest > 10) + (peak > 1000)
            report = {
                "form": name, "inputs": chosen.inputs, "understood": understood,
                "other errors": len(wrong), "slowest_s": round(slowest, 2),
                "peak_mb": round(peak), "files left": strays,
            }  # fmt: skip
            print(json.dumps(report), flush=True)
            for where, (error, data) in wrong.items():
                print(f"  {where}: {error!r}\n  {data[:600]!r}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
