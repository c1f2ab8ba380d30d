"""What `speciesmap chips` asks of a server: openings of files, bytes, and time by threads.

Scenes that overlap are made on the spot, as Cloud-Optimized GeoTIFFs in blocks of 256 pixels, and
served on loopback, with a pause before every answer as networks have one, beside a STAC catalog
whose items tell what a header would. Observations lie anywhere in them. The server counts.

In `results/chips.csv`, taken on a busy machine with two cores, eight threads open each of 25 files
once, read 1.03 times their bytes and take 0.43 of one thread's time. Before each scene had a thread
of its own, they opened a file up to eight times and read 1.72 times the bytes.

    python benchmarks/chips.py [--scenes 25] [--observations 10000] [--delay-ms 20] [--csv FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio.shutil
from affine import Affine
from odc.geo.geobox import GeoBox

from speciesmap.datasets import cutting
from speciesmap.datasets.chips import make_chips
from speciesmap.observations.read import read_observations
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.windows import bounds_in

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loopback import Server, serving

BANDS = ("red", "green", "blue", "nir")
SCENE_PX, OVERLAP_PX, BLOCK_PX, WINDOW_PX = 1536, 128, 256, 64
CORNER = Affine(0.6, 0, 550_000, 0, -0.6, 4_180_000)
NAIP = {"id": "naip", "type": "Collection", "stac_version": "1.0.0", "license": "proprietary"}


def make_scene(path: Path, grid: GeoBox, rng: np.random.Generator) -> int:
    """Write a scene that compresses as photographs do, and give its size in bytes."""
    coarse = rng.integers(0, 200, (4, SCENE_PX // 32, SCENE_PX // 32)).repeat(32, 1).repeat(32, 2)
    pixels = (coarse + rng.integers(0, 32, (4, SCENE_PX, SCENE_PX))).astype(np.uint8)
    plain = path.with_suffix(".plain.tif")
    write_geotiff(plain, pixels, grid, bands=BANDS)
    rasterio.shutil.copy(
        plain, path, driver="COG", blocksize=BLOCK_PX, compress="deflate", overviews="none"
    )
    plain.unlink()
    return path.stat().st_size


def make_catalog(server: Server, grids: dict[str, GeoBox]) -> str:
    """Write a static catalog of the scenes and give the source that names it."""
    links = [{"rel": "root", "href": "./catalog.json", "type": "application/json"}]
    for name, grid in grids.items():
        west, south, east, north = bounds_in(grid)
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        item = {
            "type": "Feature",
            "stac_version": "1.0.0",
            "id": name,
            "collection": "naip",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "bbox": [west, south, east, north],
            "properties": {
                "datetime": "2020-06-01T00:00:00Z",
                "proj:code": str(grid.crs),
                "proj:shape": list(grid.shape),
                "proj:transform": list(grid.transform)[:6],
            },
            "links": [],
            "assets": {
                "image": {
                    "href": f"{server.address}/{name}.tif",
                    "type": "image/tiff; application=geotiff; profile=cloud-optimized",
                    "eo:bands": [{"name": band, "common_name": band} for band in BANDS],
                    "raster:bands": [{"data_type": "uint8"}] * len(BANDS),
                }
            },
        }
        (server.folder / f"{name}.json").write_text(json.dumps(item))
        links.append({"rel": "item", "href": f"./{name}.json", "type": "application/geo+json"})
    extent = {
        "spatial": {"bbox": [[-180, -90, 180, 90]]},
        "temporal": {"interval": [["2010-01-01T00:00:00Z", None]]},
    }
    collection = {**NAIP, "description": "scenes", "extent": extent, "links": links}
    (server.folder / "collection.json").write_text(json.dumps(collection))
    catalog = {
        "id": "root",
        "type": "Catalog",
        "stac_version": "1.0.0",
        "description": "all",
        "links": [{"rel": "child", "href": "./collection.json", "type": "application/json"}],
    }
    (server.folder / "catalog.json").write_text(json.dumps(catalog))
    return f"stac+{server.address}/catalog.json#naip"


def openings(lines: list[str]) -> Counter[str]:
    """How often GDAL asked for each file's size, as it does when it opens one."""
    words = [line.split() for line in lines]
    return Counter(path for method, path, *_ in words if method == "HEAD")


def main() -> None:
    """Make the scenes, cut by one thread and by several, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=25)
    parser.add_argument("--observations", type=int, default=10_000)
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    across = max(1, round(options.scenes**0.5))
    step = SCENE_PX - OVERLAP_PX
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "served").mkdir()
        grids, size = {}, 0
        for k in range(options.scenes):
            at = Affine.translation(k % across * step, k // across * step)
            grids[f"s{k:03}"] = GeoBox((SCENE_PX, SCENE_PX), CORNER * at, "EPSG:32610")
            size += make_scene(folder / f"served/s{k:03}.tif", grids[f"s{k:03}"], rng)
        whole = open_imagery(folder / "served")
        margin = WINDOW_PX
        rows, cols = (rng.uniform(margin, s - margin, options.observations) for s in whole.shape)
        longitude, latitude = whole.xy(rows, cols)
        table = folder / "observations.csv"
        pd.DataFrame(
            {
                "id": np.arange(options.observations),
                "observed_on": "2020-05-01",
                "quality_grade": "research",
                "latitude": latitude,
                "longitude": longitude,
                "scientific_name": "Acer negundo",
            }
        ).to_csv(table, index=False)
        records = read_observations(table)
        bbox = bounds_in(whole.geobox)
        found = []
        with serving(folder / "served") as server:
            source = make_catalog(server, grids)
            for threads in (1, cutting.AT_ONCE):
                cutting.AT_ONCE = threads
                server.forget()
                server.set(delay_s=options.delay_ms / 1000)
                started = time.perf_counter()
                imagery = open_imagery(source, bbox=bbox)
                made = make_chips(records, imagery, folder / f"set{threads}", window_px=WINDOW_PX)
                seconds = time.perf_counter() - started
                state = server.state
                opened = openings(state.lines)
                read = sum(n for name, n in state.sent.items() if name.endswith(".tif"))
                found.append(
                    {
                        "threads": threads,
                        "scenes": options.scenes,
                        "windows": made.rows,
                        "openings_per_file": round(sum(opened.values()) / options.scenes, 2),
                        "most_openings": max(opened.values()),
                        "requests": sum(".tif" in line for line in state.lines),
                        "bytes_per_file_byte": round(read / size, 3),
                        "seconds": round(seconds, 1),
                    }
                )
    result = pd.DataFrame(found)
    print(result.to_string(index=False))
    if options.csv:
        result.to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
