"""Virtual landscapes with known truth, written as ordinary inputs.

The files are what a real project starts from: a GeoTIFF, an iNaturalist-style table, JPEG
photos. Beside them lie what a real project never has: the true probabilities, and a random
presence-absence survey.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.warp import transform

from speciesmap import outputs
from speciesmap.errors import ConfigError
from speciesmap.progress import track
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.simulate import landscape as land
from speciesmap.simulate.photos import leaf_of, take_photo
from speciesmap.simulate.species import (
    MOST_SPECIES,
    Sightings,
    Streams,
    VirtualSpecies,
    make_species,
    observe,
    survey,
)
from speciesmap.taxa import Taxon

__all__ = ["Scene", "simulate"]

_SMALLEST_PX = 256
_PLACES = 600
_OBSERVERS = 24
_LICENSES = ("CC0", "CC-BY", "CC-BY-NC")
log = logging.getLogger("speciesmap")


@dataclass(frozen=True)
class Scene:
    """Files of a simulated scene.

    Attributes:
        path: The folder.
        aerial: Four-band raster, uint8, 0.6 m.
        observations: iNaturalist-style CSV.
        photos: Folder of JPEG files that the observations name.
        sites: CSV of the survey: lon, lat, taxon, present.
        truth: True probability raster by taxon name.
        description: JSON with the seed, the taxa and the files.
        taxa: All taxa, the control last.
        control: Name of the taxon that follows nothing visible.
    """

    path: Path
    aerial: Path
    observations: Path
    photos: Path
    sites: Path
    truth: Mapping[str, Path]
    description: Path
    taxa: tuple[Taxon, ...]
    control: str


def simulate(
    out: Path | str,
    *,
    size_px: int = 2048,
    species: int = 8,
    seed: int = 0,
    overwrite: bool = False,
) -> Scene:
    """Write a virtual landscape, its species and their observations.

    Args:
        out: Folder to create.
        size_px: Side of the aerial raster, a multiple of 8, at least 256.
        species: Number of species, 3 to 24, the control among them.
        seed: Non-negative; the same seed gives the same files, byte for byte. The number of
            species changes neither the landscape nor the species before.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        Where everything is.

    Raises:
        ConfigError: A number is out of its range.
        OutputError: The folder exists and may not be replaced.
    """
    _check(size_px, species, seed)
    out = Path(out)
    streams = Streams(seed)
    with outputs.replacing(out, overwrite=overwrite) as folder:
        (folder / "truth").mkdir(parents=True)
        (folder / "photos").mkdir()
        landscape = land.make_landscape(streams("landscape", 0), size_px)
        log.info("rendering %d x %d px", size_px, size_px)
        pixels = land.render_aerial(streams("aerial", 0), landscape)
        write_geotiff(folder / "aerial.tif", pixels, landscape.geobox, bands=land.BANDS)
        flora = make_species(streams, landscape, species)
        for one in flora:
            write_geotiff(
                folder / "truth" / f"{one.taxon.slug}.tif",
                one.probability[None],
                landscape.cell_geobox,
                bands=("probability",),
            )
        rows = []
        for number, one in enumerate(track(flora, "observations and photos")):
            label = number if one.genus >= 0 else MOST_SPECIES
            seen = observe(streams("observations", label), one, landscape)
            leaf = leaf_of(streams, one, label)
            rng = streams("photos", label)
            for row in _observation_rows(streams, one, label, seen, landscape):
                i, j = row.pop("cell")
                photo = take_photo(rng, leaf, landscape.fields[:, i, j], landscape.looks[:, i, j])
                photo.save(folder / "photos" / row["image_url"], quality=88)
                rows.append(row)
        rows.sort(key=lambda row: (row["observed_on"], row["id"]))
        _write_csv(folder / "observations.csv", rows)
        _write_csv(folder / "sites.csv", _site_rows(streams, flora, landscape))
        scene = _scene(out, [one.taxon for one in flora])
        (folder / "scene.json").write_text(_describe(scene, flora, landscape, seed) + "\n")
    return scene


def _check(size_px: int, species: int, seed: int) -> None:
    if size_px < _SMALLEST_PX or size_px % land.CELL_PX:
        raise ConfigError(
            f"size_px is {size_px}; choose a multiple of {land.CELL_PX} of at least {_SMALLEST_PX}"
        )
    if not 3 <= species <= MOST_SPECIES:
        raise ConfigError(f"species is {species}; choose 3 to {MOST_SPECIES}")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; choose 0 or a positive integer")


def _lonlat(
    landscape: land.Landscape, x_m: Sequence[float], y_m: Sequence[float]
) -> Iterable[tuple[float, float]]:
    lon, lat = transform(str(landscape.geobox.crs), "EPSG:4326", list(x_m), list(y_m))[:2]
    return zip(lon, lat, strict=True)


def _observation_rows(
    streams: Streams,
    species: VirtualSpecies,
    label: int,
    seen: Sightings,
    landscape: land.Landscape,
) -> Iterable[dict[str, Any]]:
    """Give a row per observation in the columns of an iNaturalist export, and its cell."""
    rng = streams("records", label)
    kingdom, family, genus = species.taxon.lineage
    places = _lonlat(landscape, seen.reported_x_m.tolist(), seen.reported_y_m.tolist())
    for n, (lon, lat) in enumerate(places):
        number = 1_000_000 + 10_000 * label + n
        yield {
            "id": number,
            "uuid": rng.bytes(16).hex(),
            "observed_on": str(seen.date[n]),
            "user_login": f"observer_{rng.integers(_OBSERVERS) + 1:02d}",
            "quality_grade": "research",
            "license": _LICENSES[rng.integers(len(_LICENSES))],
            "url": "",
            "image_url": f"{species.taxon.slug}_{n:04d}.jpg",
            "captive_cultivated": "false",
            "latitude": f"{lat:.7f}",
            "longitude": f"{lon:.7f}",
            "positional_accuracy": int(seen.uncertainty_m[n]),
            "public_positional_accuracy": int(seen.uncertainty_m[n]),
            "geoprivacy": "",
            "taxon_geoprivacy": "",
            "coordinates_obscured": "false",
            "scientific_name": species.taxon.name,
            "common_name": "",
            "iconic_taxon_name": kingdom,
            "taxon_id": 9_000_000 + label,
            "taxon_kingdom_name": kingdom,
            "taxon_family_name": family,
            "taxon_genus_name": genus,
            "taxon_species_name": species.taxon.name,
            "cell": (int(seen.cell[n, 0]), int(seen.cell[n, 1])),
        }


def _site_rows(
    streams: Streams, flora: list[VirtualSpecies], landscape: land.Landscape
) -> list[dict[str, Any]]:
    sites = survey(streams, flora, landscape, _PLACES)
    places = _lonlat(landscape, sites.x_m.tolist(), sites.y_m.tolist())
    return [
        {"lon": f"{lon:.7f}", "lat": f"{lat:.7f}", "taxon": one.taxon.name, "present": int(here)}
        for (lon, lat), found in zip(places, sites.present, strict=True)
        for one, here in zip(flora, found, strict=True)
    ]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _scene(path: Path, taxa: Sequence[Taxon]) -> Scene:
    return Scene(
        path=path,
        aerial=path / "aerial.tif",
        observations=path / "observations.csv",
        photos=path / "photos",
        sites=path / "sites.csv",
        truth={taxon.name: path / "truth" / f"{taxon.slug}.tif" for taxon in taxa},
        description=path / "scene.json",
        taxa=tuple(taxa),
        control=taxa[-1].name,
    )


def _describe(
    scene: Scene, flora: Sequence[VirtualSpecies], landscape: land.Landscape, seed: int
) -> str:
    facts = {
        "seed": seed,
        "size_px": landscape.size_px,
        "resolution_m": land.RESOLUTION_M,
        "crs": str(landscape.geobox.crs),
        "bounds": list(landscape.geobox.boundingbox),
        "control": scene.control,
        "files": {
            "aerial": "aerial.tif",
            "observations": "observations.csv",
            "photos": "photos",
            "sites": "sites.csv",
            "truth": {name: f"truth/{path.name}" for name, path in scene.truth.items()},
        },
        "taxa": [
            {
                "name": one.taxon.name,
                "lineage": list(one.taxon.lineage),
                "prevalence": round(float(np.mean(one.probability)), 4),
                "niche": None
                if one.optimum is None or one.weight is None
                else {
                    field: {"optimum": round(float(m), 3), "weight": round(float(w), 3)}
                    for field, m, w in zip(land.FIELDS, one.optimum, one.weight, strict=True)
                    if w
                },
            }
            for one in flora
        ],
    }
    return json.dumps(facts, indent=2)
