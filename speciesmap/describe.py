"""What a path is: a model, a store, a data set, a folder of maps, a raster or observations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odc.geo.geobox import GeoBox

from speciesmap.errors import ModelError, OutputError
from speciesmap.rasters.files import Opened
from speciesmap.rasters.imagery import SUFFIXES, open_imagery, open_raster
from speciesmap.rasters.messages import public
from speciesmap.rasters.scenes import is_one_file
from speciesmap.rasters.store import open_store
from speciesmap.rasters.windows import bounds_in

if TYPE_CHECKING:
    import pandas as pd


MOST_SHOWN = 12  # entries of a list in text; JSON has all


def describe(path: Path | str) -> dict[str, Any]:
    """Tell what lies at a path.

    Args:
        path: A file or folder that speciesmap reads or wrote, a pattern of rasters, or the address
            of a raster or of a data set.

    Returns:
        Facts that JSON can hold; `kind` is `"model"`, `"store"`, `"run"`, `"dataset"`, `"map"`,
        `"imagery"` or `"observations"`.

    Raises:
        SpeciesmapError: Nothing is there, it is damaged, or it is none of these.
    """
    if "://" in str(path):
        address = str(path)
        is_raster = Path(public(address)).suffix.lower() in SUFFIXES or address.startswith("stac+")
        return _raster(address) if is_raster else _dataset(address)
    path = Path(path)
    if path.is_dir():
        if (path / "zarr.json").exists():
            return _store(path)
        if (path / "config.json").exists():
            return _model(path)
        if (path / "run.json").exists():
            return _run(path)
        if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
            return _dataset(path)
        if not any(file.suffix.lower() in SUFFIXES for file in path.iterdir()):
            raise OutputError(
                f"{path} is no model, store, data set, folder of maps or of rasters; give one of "
                "these, or a file"
            )
    elif path.suffix.lower() == ".parquet" and path.exists():
        import pyarrow.parquet as pq
        from pyarrow import ArrowException

        try:
            names = pq.read_schema(path).names
        except (ArrowException, OSError, ValueError):
            names = []
        return _dataset(path) if "rs_image" in names else _observations(path)
    elif path.suffix.lower() in (".csv", ".tsv", ".txt", ".gpkg", ".geojson", ".shp", ".zip"):
        return _observations(path)
    return _raster(path)


def as_text(facts: Mapping[str, Any], indent: str = "") -> str:
    """Lay facts out for reading, one to a line; those that hold further ones head a block.

    Long lists are cut short and say so.
    """
    width = max(len(name) for name in facts)
    lines = []
    for name, value in facts.items():
        if isinstance(value, Mapping) and any(isinstance(v, Mapping) for v in value.values()):
            shown = dict(islice(value.items(), MOST_SHOWN))
            lines += [f"{indent}{name}", as_text(shown, indent + "  ")]
            if len(shown) < len(value):
                lines.append(f"{indent}  and {len(value) - len(shown)} more; --json gives all")
        else:
            lines.append(f"{indent}{name:<{width}}  {_plain(value, 3 if indent else 9)}")
    return "\n".join(lines)


def _plain(value: Any, digits: int) -> str:
    if isinstance(value, Mapping):
        return _listed([f"{name} {_plain(v, digits)}" for name, v in value.items()])
    if isinstance(value, list | tuple):
        return _listed([_plain(item, digits) for item in value])
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "none" if value is None else str(value)


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - MOST_SHOWN} more" if len(items) > MOST_SHOWN else ""
    return ", ".join(items[:MOST_SHOWN]) + more or "none"


def _place(geobox: GeoBox) -> dict[str, Any]:
    epsg = geobox.crs.to_epsg() if geobox.crs else None
    bounds = bounds_in(geobox)
    return {
        "rows": int(geobox.shape[0]),
        "columns": int(geobox.shape[1]),
        "crs": f"EPSG:{epsg}" if epsg else str(geobox.crs),
        "west_south_east_north": [round(value, 6) for value in bounds],
    }


def _model(path: Path) -> dict[str, Any]:
    from speciesmap.models import read_facts
    from speciesmap.models.checkpoint import TAXA, what_was_learned
    from speciesmap.models.metadata import FIELDS

    facts = read_facts(path)
    joined, dated = what_was_learned(path)
    try:
        a, training = facts["architecture"], facts.get("training", {})
        taxa = json.loads((path / TAXA).read_text(encoding="utf-8"))
        return {
            "kind": "model",
            "path": str(path),
            "fingerprint": facts.get("fingerprint"),
            "aerial": a["aerial"]["backbone"],
            "ground": a["ground"]["backbone"] if a.get("ground") else None,
            "text": (a["text"].get("hub") or "trained jointly") if a.get("text") else None,
            "metadata": list(FIELDS) if a.get("metadata") else [],
            "scores_pairs": bool(a.get("matcher")),
            "queries": [
                option
                for option, works in (
                    ("--species", bool(taxa)),
                    ("--photo", joined and bool(a.get("ground"))),
                    ("--text", joined and bool(a.get("text"))),
                    ("--month", dated),
                )
                if works
            ],
            "dim": a["dim"],
            "bands": a["bands"],
            "window_px": a["window_px"],
            "resolution_m": a["resolution_m"],
            "taxa": [taxon["name"] for taxon in taxa],
            "calibrated": sorted(facts.get("prevalence", {})),
            "covariates": list((facts.get("environment") or {}).get("names", [])),
            "stage": training.get("stage"),
            "seed": training.get("seed"),
            "metrics": facts.get("metrics", {}),
            "versions": facts.get("versions", {}),
        }
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        raise ModelError(f"{path} is damaged ({error!r}); copy the checkpoint again") from error


def _store(path: Path) -> dict[str, Any]:
    store = open_store(path)
    rows, cols = (slice(0, side) for side in store.geobox.shape)
    tiles = [store.has(tile) for tile in store.tiles_in(rows, cols)]
    identity = store.identity
    return {
        "kind": "store",
        "path": str(path),
        "tiles_done": sum(tiles),
        "tiles": len(tiles),
        "dim": store.dim,
        "precision": store.precision,
        "model": identity.model,
        "imagery": store.source,
        "imagery_fingerprint": identity.imagery,
        "imagery_gains": store.gains,
        "bands": list(identity.bands),
        "window_px": identity.window_px,
        "stride_px": identity.stride_px,
        "min_valid": identity.min_valid,
        **_place(store.geobox),
    }


def _run(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
        maps = {name: entry["label"] for name, entry in facts.pop("maps").items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OutputError(
            f"{path / 'run.json'} is damaged ({error!r}); make the maps again with `speciesmap "
            "predict`"
        ) from error
    return {"kind": "run", "path": str(path), "maps": maps, **facts}


def _dataset(path: Path | str) -> dict[str, Any]:
    from speciesmap.datasets.paired import open_paired

    dataset = open_paired(path)
    return {
        "kind": "dataset",
        "path": str(path),
        "rows": len(dataset),
        "photos": dataset.has_ground,
        "bands": list(dataset.bands),
        "window_px": dataset.window_px,
        "resolution_m": float(dataset.resolution_m),
        "taxa": _counts(dataset.facts["name"]),
    }


def _observations(path: Path) -> dict[str, Any]:
    from speciesmap.observations.read import read_observations

    table = read_observations(path)
    bounds = table.total_bounds if len(table) else []
    return {
        "kind": "observations",
        "path": str(path),
        "rows": len(table),
        "taxa": _counts(table["taxon"]),
        "west_south_east_north": [round(float(value), 6) for value in bounds],
    }


def _counts(taxa: pd.Series[Any]) -> dict[str, int]:
    """Number of rows of each taxon, most frequent first."""
    return {str(name): int(count) for name, count in taxa.value_counts().items()}


def _missing(opened: Opened) -> str:
    """Say how a file marks pixels that hold nothing."""
    if not (opened.masked or opened.alpha or opened.nodata is not None):
        return "not marked, every pixel counts"
    nodata = opened.raster.nodata
    return "by a mask or an alpha band" if nodata is None else f"nodata {nodata:g}"


def _raster(path: Path | str) -> dict[str, Any]:
    imagery = open_imagery(path)
    facts = {
        "kind": "imagery",
        "path": imagery.source,
        "bands": list(imagery.bands),
        "pixel_type": str(imagery.dtype),
        "resolution_m": round(imagery.resolution_m, 4),
        **_place(imagery.geobox),
    }
    if is_one_file(str(path)):
        with open_raster(path) as raster:
            tags, statistics = raster.tags(), raster.tags(1)
            facts["missing"] = _missing(Opened.of(raster, len(imagery.bands) == raster.count))
        if "QUERY" in tags:
            facts |= {
                "kind": "map",
                "label": tags.get("TAXON"),
                "query": tags["QUERY"],
                "model": tags.get("MODEL"),
                **({"caution": tags["CAUTION"]} if "CAUTION" in tags else {}),
                **{
                    word: float(statistics[f"STATISTICS_{word.upper()}"])
                    for word in ("minimum", "mean", "maximum")
                    if f"STATISTICS_{word.upper()}" in statistics
                },
            }
    facts["fingerprint"] = imagery.fingerprint
    return facts
