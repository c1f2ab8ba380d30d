"""The whole way from a model and imagery to a folder of maps that people open."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd
import rasterio
from numpy.typing import NDArray

from speciesmap import __version__, outputs
from speciesmap.errors import (
    AreaError,
    ConfigError,
    ImageryError,
    ModelError,
    StoreError,
    within_memory,
)
from speciesmap.mapping.embed import embed
from speciesmap.mapping.fit import fit_imagery, refuse_poles, refuse_unseen
from speciesmap.mapping.predict import Map, write_maps
from speciesmap.mapping.query import Query, make_queries, without_calibration
from speciesmap.mapping.ranges import draw_range, write_ranges
from speciesmap.mapping.surroundings import Surroundings, find_surroundings
from speciesmap.mapping.tiles import Precision
from speciesmap.models import SpeciesModel, load_model, read_facts
from speciesmap.present.qgis import write_project
from speciesmap.present.stac import write_item
from speciesmap.present.styles import MONTHS, style_ranges, write_qml
from speciesmap.present.webmap import make_map
from speciesmap.rasters.imagery import Imagery, Opening
from speciesmap.rasters.store import EmbeddingStore, open_store

if TYPE_CHECKING:
    import geopandas as gpd
    import xarray

PAGE_MAPS = 48  # more do not fit in a page at a useful size; the GeoTIFFs are all there
STORE_SUFFIX = ".store.zarr"
RANGES = "ranges.gpkg"
RICHNESS = "richness.tif"

log = logging.getLogger("speciesmap")


@dataclass(frozen=True)
class Prediction:
    """A folder of maps.

    Attributes:
        path: Of the folder.
        maps: Each GeoTIFF with what it shows, in the order asked for.
        html: The interactive map.
        run: What made it: inputs, hashes, versions, timings.
        item: STAC item.
        store: Embedding store that the maps were scored from.
    """

    path: Path
    maps: tuple[Map, ...]
    html: Path
    run: Path
    item: Path
    store: Path

    def to_xarray(self) -> xarray.Dataset:
        """Open the maps lazily, with coordinates and CRS.

        A map is a variable by its file's stem, with a dimension `month` where it has months; its
        other bands are variables beside it, such as `quercus_lobata_uncertainty`.
        """
        import rioxarray  # noqa: F401  (registers the engine)
        import xarray

        variables = {}
        for m in self.maps:
            raster = xarray.open_dataarray(m.path, engine="rasterio", band_as_variable=False)
            names = np.atleast_1d(raster.attrs.pop("long_name", m.query.quantity)).tolist()
            months = [name for name in names if name in MONTHS]
            first = raster[: len(months)].rename(band="month").assign_coords(month=months)
            others = raster[len(months) :].drop_vars("band")
            rest = dict(zip(names[len(months) :], others, strict=True))
            if not months:
                first = rest.pop(names[0])
            variables[m.path.stem] = first.assign_attrs(long_name=m.query.label)
            for name, band in rest.items():
                variables[f"{m.path.stem}_{name}"] = band.assign_attrs(long_name=name)
        return xarray.Dataset(variables)


@within_memory()
def predict(
    model: SpeciesModel | Path | str,
    *,
    out: Path | str,
    imagery: Imagery | Path | str | None = None,
    store: EmbeddingStore | Path | str | None = None,
    bbox: Sequence[float] | None = None,
    bbox_crs: Any = "EPSG:4326",
    species: Sequence[str] = (),
    photos: Sequence[Path | str] = (),
    texts: Sequence[str] = (),
    queries: Sequence[Query] = (),
    months: Sequence[int] = (),
    stride_px: int | None = None,
    bands: Sequence[str] | None = None,
    min_valid: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    compiled: bool = False,
    skip_unreadable: bool = False,
    any_resolution: bool = False,
    qgis_project: bool = False,
    covariates: Sequence[Path | str] = (),
    observations: gpd.GeoDataFrame | None = None,
    title: str = "",
    overwrite: bool = False,
    **opening: Unpack[Opening],
) -> Prediction:
    """Map species, photos or text over an area.

    The folder gets a Cloud-Optimized GeoTIFF and a QGIS style for each query, `map.html`,
    `run.json` and `item.json`, and appears when all of them are there. Where thresholds were fixed
    at training, `ranges.gpkg` holds polygons; where several taxa have probabilities,
    `richness.tif` is their sum. Embeddings are kept in a
    store, so that asking again encodes nothing.

    Args:
        model: A model or its folder.
        out: Folder to create.
        imagery: Imagery, or what `open_imagery` takes; may be left out where a store is given.
        store: Embeddings to use and, where imagery is given, to fill. `OUT.store.zarr`, beside
            the folder, by default.
        bbox: Area of interest: west, south, east, north. By default all of the imagery, or all
            that the store holds.
        bbox_crs: CRS of `bbox`.
        species: Scientific names that the model was trained on. Where nothing at all is asked
            for, all that it knows.
        photos: Ground photos, or folders of them, that together ask for one map.
        texts: Names or lineages, one map each.
        queries: Further queries, made by hand.
        months: 1 to 12, for a model with metadata: each adds its vector to the stored embeddings,
            and a map has a band for each. Values of a month are suitabilities: calibration,
            uncertainty and thresholds were fitted without dates.
        stride_px: As for `embed`.
        bands: As for `embed`.
        min_valid: As for `embed`.
        batch_size: As for `embed`.
        device: As for `embed`.
        precision: As for `embed`.
        compiled: As for `embed`.
        skip_unreadable: As for `embed`.
        any_resolution: As for `embed`.
        qgis_project: Also write `maps.qgz`, a QGIS project that groups all maps.
        covariates: Rasters for a model that reads covariates beside imagery, as `NAME=FILE` where
            their names are others than at training; by default those trained on.
        observations: Records to show on the page, as `read_observations` gives them.
        title: Heading of the page.
        overwrite: Replace the folder.
        opening: Which scenes and which grid, as for `open_imagery`.

    Returns:
        The files.

    Raises:
        SpeciesmapError: An input is missing, damaged or does not fit; nothing is left of the
            folder, and tiles that were encoded stay in the store.
    """
    started = time.perf_counter()
    out = Path(out)
    pixels = imagery.source if isinstance(imagery, Imagery) else imagery
    kept = store.path if isinstance(store, EmbeddingStore) else store
    source = str(model) if isinstance(model, str | Path) else None
    outputs.refuse_existing(out, overwrite, source, pixels, kept, *photos)
    if bbox is not None:
        refuse_poles(bbox, bbox_crs)
    seed: int | None = None
    if isinstance(model, str | Path):
        seed = read_facts(model).get("training", {}).get("seed")
        model = load_model(model)
    asked = list(queries)
    if species or photos or texts or not queries:
        asked = [*make_queries(model, species=species, photos=photos, texts=texts), *asked]
    season = seasonal_vectors(model, months)
    if season:
        asked = [without_calibration(query) for query in asked]
    around = find_surroundings(model, covariates)
    shown: Imagery | None = None
    if imagery is not None:
        shown = fit_imagery(
            model,
            imagery,
            bands=bands,
            bbox=bbox,
            bbox_crs=bbox_crs,
            any_resolution=any_resolution,
            **opening,
        )
        refuse_unseen(shown.source, shown.geobox)
        encode = partial(
            embed,
            model,
            shown,
            kept or out.with_name(out.name + STORE_SUFFIX),
            bbox=bbox,
            bbox_crs=bbox_crs,
            stride_px=stride_px,
            bands=bands,
            min_valid=min_valid,
            batch_size=batch_size,
            device=device,
            precision=precision,
            compiled=compiled,
            skip_unreadable=skip_unreadable,
            any_resolution=any_resolution,
        )
        try:
            filled = encode()
        except StoreError:
            if store is not None or not overwrite:
                raise
            filled = encode(overwrite=True)
    elif store is None:
        raise ConfigError("there is nothing to map; pass --imagery or --store")
    else:
        filled = store if isinstance(store, EmbeddingStore) else open_store(store)
        _refuse_other_model(filled, model.fingerprint)
        refuse_unseen(filled.path, filled.geobox)
    encoded = time.perf_counter()
    with outputs.replacing(out, overwrite=overwrite) as folder:
        folder.mkdir()
        maps = _score(
            filled, model, asked, folder, bbox=bbox, bbox_crs=bbox_crs, months=season, around=around
        )
        scored = time.perf_counter()
        tifs, total = [m.path for m in maps], [*folder.glob(RICHNESS)]
        _present(tifs, total, folder, shown, observations, title)
        if qgis_project:
            ranges = next(folder.glob(RANGES), None)
            write_project(folder / "maps.qgz", [*tifs, *total], ranges=ranges, title=out.name)
        spent = {
            "encode": round(encoded - started, 3),
            "score": round(scored - encoded, 3),
            "present": round(time.perf_counter() - scored, 3),
        }
        facts = {
            "bbox": None if bbox is None else {"bounds": list(bbox), "crs": str(bbox_crs)},
            "seed": seed,
            "months": list(season),
            "covariates": None if around is None else _of_surroundings(around),
            "photos": {str(photo): _sha256(photo) for query in asked for photo in query.photos},
        }
        _record(maps, folder, filled, model, source, facts, spent, item_id=out.name)
    return Prediction(
        path=out,
        maps=tuple(Map(out / m.path.name, m.query) for m in maps),
        html=out / "map.html",
        run=out / "run.json",
        item=out / "item.json",
        store=filled.path,
    )


def _score(
    store: EmbeddingStore,
    model: SpeciesModel,
    queries: Sequence[Query],
    folder: Path,
    *,
    bbox: Sequence[float] | None,
    bbox_crs: Any,
    months: Mapping[str, NDArray[np.float32]],
    around: Surroundings | None,
) -> list[Map]:
    """Write the maps, their sum where several are probabilities, and the ranges they bound."""
    likely = [q for q in queries if q.kind == "taxon" and q.quantity == "probability"]
    maps = write_maps(
        store,
        queries,
        folder,
        bbox=bbox,
        bbox_crs=bbox_crs,
        applicability=model.trust.applicability if model.trust else None,
        richness=folder / RICHNESS if len(likely) > 1 else None,
        months=months,
        surroundings=around,
    )
    bounded = [m for m in maps if m.query.thresholds]
    if bounded:
        ranges = [draw_range(m.path, m.query.label, m.query.thresholds) for m in bounded]
        style_ranges(write_ranges(pd.concat(ranges, ignore_index=True), folder / RANGES))
    return maps


def _present(
    tifs: Sequence[Path],
    total: Sequence[Path],
    folder: Path,
    imagery: Imagery | None,
    observations: gpd.GeoDataFrame | None,
    title: str,
) -> None:
    """Write the maps' styles and their page, with imagery under them where that can be had."""
    for tif in (*tifs, *total):
        write_qml(tif)
    if len(tifs) > PAGE_MAPS:
        log.warning("map.html shows the first %d of %d maps", PAGE_MAPS, len(tifs))
    page = partial(
        make_map,
        [*tifs[:PAGE_MAPS], *total],
        folder / "map.html",
        observations=observations,
        title=title,
    )
    if imagery is not None and imagery.remote:
        log.info("map.html has no imagery under the maps, which would be read from afar again")
        page()
        return
    try:
        page(base=imagery)
    except (ImageryError, AreaError) as error:
        log.warning("map.html has no imagery under the maps: %s", error)
        page()


def _record(
    maps: Sequence[Map],
    folder: Path,
    store: EmbeddingStore,
    model: SpeciesModel,
    source: str | None,
    facts: Mapping[str, Any],
    seconds: Mapping[str, float],
    *,
    item_id: str,
) -> None:
    """Write what the maps were made from: run.json and a STAC item."""
    record = {
        "speciesmap": __version__,
        "model": {"path": source, "fingerprint": store.identity.model},
        **_of_store(store),
        **facts,
        "maps": {m.path.name: _of_map(m) for m in maps},
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "timm": version("timm"),
            "gdal": rasterio.__gdal_version__,
        },
        "seconds": seconds,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / "run.json").write_text(text + "\n", encoding="utf-8")
    write_item(
        folder,
        [m.path for m in maps],
        model={
            "name": Path(source).name if source else None,
            "path": source,
            "architecture": model.architecture.aerial["backbone"],
            "bands": model.bands,
            "window_px": model.window_px,
            "resolution_m": model.resolution_m,
            "fingerprint": store.identity.model,
        },
        imagery=store.source,
        datetime=datetime.now(UTC),
        item_id=item_id,
    )


def seasonal_vectors(model: SpeciesModel, months: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """Give the vector that each month adds to embeddings, by the month's name, in float32.

    Raises:
        ModelError: The model was trained without metadata.
        ConfigError: There is no such month.
    """
    if not months:
        return {}
    if model.metadata is None or not model.dated:
        raise ModelError(
            "the model was trained without dates, so it has no maps by month; leave --month out, "
            "or train one with model.metadata, of method crisp or cve_mae"
        )
    vectors = [model.metadata.month(m).cpu().numpy() for m in months]
    return {MONTHS[m - 1]: vector for m, vector in zip(months, vectors, strict=True)}


def _refuse_other_model(store: EmbeddingStore, fingerprint: str) -> None:
    if store.identity.model != fingerprint:
        raise StoreError(
            f"{store.path} was made with model {store.identity.model}, not {fingerprint}; give "
            "that model, or make a store of this one with `speciesmap embed`"
        )


def _of_store(store: EmbeddingStore) -> dict[str, Any]:
    values = None
    if store.gains:
        gains = zip(store.identity.bands, store.gains, strict=True)
        values = {band: {"factor": factor, "shift": shift} for band, (factor, shift) in gains}
    return {
        "imagery": {
            "source": store.source,
            "fingerprint": store.identity.imagery,
            "values": values,
        },
        "store": {"path": str(store.path), "precision": store.precision},
        "window_px": store.identity.window_px,
        "stride_px": store.identity.stride_px,
        "bands": list(store.identity.bands),
        "min_valid": store.identity.min_valid,
    }


def _of_surroundings(around: Surroundings) -> dict[str, Any]:
    return {
        "names": list(around.covariates.names),
        "sources": list(around.covariates.sources),
        "fingerprint": around.covariates.fingerprint,
        "trained_on": around.environment.fingerprint,
    }


def _of_map(m: Map) -> dict[str, Any]:
    return {
        "label": m.query.label,
        "query": m.query.kind,
        "quantity": m.query.quantity,
        "gain": m.query.gain,
        "offset": m.query.offset,
        "thresholds": dict(m.query.thresholds),
        "caution": m.query.caution or None,
        "sha256": _sha256(m.path),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
