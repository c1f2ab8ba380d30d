"""Clean a generated GBIF table of any size; print its time and peak memory.

    python benchmarks/large_observations.py --size-mb 400

The table has GBIF's 50 columns, places at random, and a few strays of Windows-1252. Memory is the
most that the process held resident, what Python and its libraries need to start with included and
told apart. Thinning by distance is timed on 1,000,000 records in memory besides.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from speciesmap.observations.clean import Rules, clean_files
from speciesmap.observations.thin import apart

HEADER = """
gbifID datasetKey occurrenceID kingdom phylum class order family genus species
infraspecificEpithet taxonRank scientificName verbatimScientificName
verbatimScientificNameAuthorship countryCode locality stateProvince occurrenceStatus
individualCount publishingOrgKey decimalLatitude decimalLongitude coordinateUncertaintyInMeters
coordinatePrecision elevation elevationAccuracy depth depthAccuracy eventDate day month year
taxonKey speciesKey basisOfRecord institutionCode collectionCode catalogNumber recordNumber
identifiedBy dateIdentified license rightsHolder recordedBy typeStatus establishmentMeans
lastInterpreted mediaType issue
"""
COLUMNS = HEADER.split()


def generate(path: Path, size_mb: int) -> int:
    """Write a table of about that size; give its rows."""
    rng = np.random.default_rng(0)
    rows = 0
    with path.open("wb") as file:
        file.write("\t".join(COLUMNS).encode() + b"\n")
        while file.tell() < size_mb * 1_000_000:
            for lon, lat, species, day in zip(
                rng.uniform(-124, -114, 10_000), rng.uniform(32, 42, 10_000),
                rng.integers(0, 300, 10_000), rng.integers(1, 29, 10_000), strict=True,
            ):  # fmt: skip
                rows += 1
                name = f"Quercus fictitia{chr(97 + species % 26)}{chr(97 + species // 26)}"
                observer = "José Observer" if rows % 3 else "A. Person"
                file.write(
                    f"{rows}\t50c9509d-22c7-4a22-a47d-8c48425ef4a7\thttps://host/observations/{rows}"
                    f"\tPlantae\tTracheophyta\tMagnoliopsida\tFagales\tFagaceae\tQuercus\t{name}\t"
                    f"\tSPECIES\t{name} Author\t{name}\t\tUS\t\tCalifornia\tPRESENT\t\t"
                    f"28eb1a3f-1c15-4a95-931a-4af90ecb574d\t{lat:.6f}\t{lon:.6f}\t12.0\t\t\t\t\t\t"
                    f"2019-05-{day:02d}T10:12:00\t{day}\t5\t2019\t2879098\t2879098\t"
                    f"HUMAN_OBSERVATION\tiNaturalist\tObservations\t{rows}\t\t{observer}\t"
                    f"2019-06-01T00:00:00\tCC_BY_NC_4_0\t{observer}\t{observer}\t\t\t"
                    "2024-01-01T00:00:00.000Z\tStillImage\tCOORDINATE_ROUNDED\n".encode(
                        "cp1252" if rows % 100_000 == 0 else "utf-8"
                    )
                )
    return rows


def peak_mb() -> float:
    """Most resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    """Generate, clean and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mb", type=int, default=400)
    parser.add_argument("--thin-m", type=float, default=500.0)
    size_mb, thin_m = vars(parser.parse_args()).values()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gbif.csv"
        rows = generate(path, size_mb)
        start_mb, started = peak_mb(), time.process_time()
        report = clean_files([path], Path(folder) / "out.parquet", rules=Rules(thin_m=thin_m))
        seconds = time.process_time() - started
    print(f"{rows} rows, {size_mb} MB: {seconds:.0f} s of processor, {rows / seconds:.0f} rows/s")
    print(f"peak {peak_mb():.0f} MB, {start_mb:.0f} MB of it before reading")
    print(f"{report['kept']} kept, dropped {report['dropped']}")
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "longitude": rng.uniform(-124, -114, 1_000_000),
            "latitude": rng.uniform(32, 42, 1_000_000),
            "taxon": "Quercus",
            "uncertainty_m": 10.0,
        }
    )
    started = time.perf_counter()
    kept = apart(table, 1000).sum()
    print(f"1000000 records thinned to 1 km: {time.perf_counter() - started:.1f} s, {kept} kept")


if __name__ == "__main__":
    main()
