"""From a store to maps: all queries in one pass, in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speciesmap.errors import QueryError, StoreError, within_memory
from speciesmap.mapping.applicability import applicable
from speciesmap.mapping.query import Query, score, spread
from speciesmap.mapping.surroundings import Surroundings
from speciesmap.mapping.threads import abreast
from speciesmap.models.trust import Applicability
from speciesmap.progress import track
from speciesmap.rasters.geotiff import MapWriter
from speciesmap.rasters.store import EmbeddingStore, shared
from speciesmap.rasters.windows import cells_in

MOST_OPEN_MAPS = 256  # in one pass; systems let a process open about 1,000 files

log = logging.getLogger("speciesmap")


@dataclass(frozen=True)
class Map:
    """One map that was written.

    Attributes:
        path: Of the GeoTIFF.
        query: What it shows.
    """

    path: Path
    query: Query


@within_memory()
def write_maps(
    store: EmbeddingStore,
    queries: Sequence[Query],
    folder: Path,
    *,
    bbox: Sequence[float] | None = None,
    bbox_crs: Any = "EPSG:4326",
    applicability: Applicability | None = None,
    richness: Path | None = None,
    months: Mapping[str, NDArray[np.float32]] | None = None,
    surroundings: Surroundings | None = None,
) -> list[Map]:
    """Score a store against queries and write a Cloud-Optimized GeoTIFF for each.

    Band 1 is the query's quantity, `uncertainty` follows where the query has members, and
    `applicability`, 1 inside and 0 outside, where it is given.

    Args:
        store: Of embeddings.
        queries: Of the store's model.
        folder: Where to write; exists.
        bbox: Area of interest: west, south, east, north. By default all that is encoded.
        bbox_crs: CRS of `bbox`.
        applicability: Of the store's model.
        richness: Where to write the number of taxa to be expected in each cell, the sum of the
            probabilities of all taxa that have one (Calabrese et al. 2014); empty outside the
            area of applicability.
        months: Vector that each month adds to every embedding, by the month's name. Several take
            the place of band 1, by their names, and the tag QUANTITY tells what they are; a single
            one is named in the tag MONTH.
        surroundings: Covariates, of a model that reads some.

    Returns:
        The maps, in the order of the queries.

    Raises:
        AreaError: The area is malformed or misses the imagery.
        ImageryError: A covariate has no value anywhere in the area.
        StoreError: The store has nothing in the area, or is damaged.
        OutputError: A map cannot be written.
        QueryError: A query has another dimension than the store.
        ResourceError: Memory or threads ran out.
    """
    for query in queries:
        if query.vector.shape != (store.dim,):
            raise QueryError(
                f"query {query.label!r} has {query.vector.size} dimensions, {store.path} has "
                f"{store.dim}; ask with the model that made the store"
            )
    area = store.done() if bbox is None else cells_in(bbox, store.geobox, bbox_crs)
    tiles = [] if area is None else list(store.tiles_in(*area))
    lacking = sum(not store.has(tile) for tile in tiles)
    if area is None or lacking == len(tiles):
        raise StoreError(
            f"{store.path} holds nothing yet of the area asked for; encode it with `speciesmap "
            "embed`, or pass --imagery too"
        )
    if lacking:
        log.warning(
            "%d of %d tiles of the area are not in %s and stay empty; --imagery would encode them",
            lacking,
            len(tiles),
            store.path,
        )
    rows, cols = area
    if surroundings is not None:
        surroundings.probe(store.geobox[rows, cols])
    maps = [
        Map(folder / f"{stem}.tif", query)
        for stem, query in zip(_unique([q.stem for q in queries]), queries, strict=True)
    ]
    for start in range(0, len(maps), MOST_OPEN_MAPS):
        some = maps[start : start + MOST_OPEN_MAPS]
        _write_maps(store, some, rows, cols, applicability, months or {}, surroundings)
    if richness is not None:
        taxa = [q for q in queries if q.kind == "taxon" and q.quantity == "probability"]
        _write_richness(store, taxa, richness, rows, cols, applicability, surroundings)
    return maps


def _write_maps(
    store: EmbeddingStore,
    maps: Sequence[Map],
    rows: slice,
    cols: slice,
    known: Applicability | None,
    months: Mapping[str, NDArray[np.float32]],
    surroundings: Surroundings | None,
) -> None:
    """Write maps in one pass over the store."""
    geobox = store.geobox[rows, cols]
    empty = True
    queries = [m.query for m in maps]
    uncertain = [len(query.members) > 1 for query in queries]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                MapWriter(
                    m.path,
                    geobox,
                    bands=[
                        *(months if len(months) > 1 else [m.query.quantity]),
                        *(["uncertainty"] if spreads else []),
                        *(["applicability"] if known else []),
                    ],
                    tags={
                        "TAXON": m.query.label,
                        "QUERY": m.query.kind,
                        "MODEL": store.identity.model,
                        **({"QUANTITY": m.query.quantity} if len(months) > 1 else {}),
                        **({"CAUTION": m.query.caution} if m.query.caution else {}),
                        **({"MONTH": next(iter(months))} if len(months) == 1 else {}),
                    },
                )
            )
            for m, spreads in zip(maps, uncertain, strict=True)
        ]

        def drawn(tile: _Tile) -> tuple[_Tile, list[NDArray[np.float32]]]:
            # tiles are scored whole: a product's last bit depends on the shapes of its factors
            vectors, inside = store.read(*tile.cells), tile.inside
            shown: list[NDArray[Any]] = [moved(vectors, month) for month in months.values()]
            shown = shown or [vectors]
            values = np.stack([score(v, queries, tile.features) for v in shown], 1)  # (Q, M, ...)
            inner = applicable(vectors, known, tile.scaled) if known else None
            parts = []
            for query, value, spreads in zip(queries, values, uncertain, strict=True):
                bands = [month[inside] for month in value]
                if spreads:
                    bands.append(spread(vectors, query, tile.features)[inside])
                if inner is not None:
                    bands.append(inner[inside])
                parts.append(np.stack(bands))  # (B, rows, columns)
            return tile, parts

        for tile, parts in abreast(drawn, _tiles(store, rows, cols, surroundings)):
            empty = empty and bool(np.isnan(parts[0][0]).all())
            for writer, part in zip(writers, parts, strict=True):
                writer.write(tile.row, tile.col, part)
    if empty:
        log.warning(
            "the maps are empty: no window of the area has %.0f%% of valid pixels; choose another "
            "area, a smaller --min-valid, or imagery larger than the window of %d px",
            100 * store.identity.min_valid,
            store.identity.window_px,
        )


def moved(vectors: NDArray[Any], month: NDArray[np.float32]) -> NDArray[np.float32]:
    """Add a month's vector to unit embeddings and make them unit again, shape (..., D) as given.

    This is what `SpeciesModel.add_metadata` does, so nothing is encoded for another month.
    """
    shifted = vectors.astype(np.float32) + month
    moved: NDArray[np.float32] = shifted / np.linalg.norm(shifted, axis=-1, keepdims=True)
    return moved


def _write_richness(
    store: EmbeddingStore,
    queries: Sequence[Query],
    path: Path,
    rows: slice,
    cols: slice,
    known: Applicability | None,
    surroundings: Surroundings | None,
) -> None:
    """Sum probabilities in a pass of its own, whatever the number of taxa."""
    tags = {"TAXON": "Species richness", "QUERY": "richness", "MODEL": store.identity.model}
    with MapWriter(path, store.geobox[rows, cols], bands=["richness"], tags=tags) as writer:

        def summed(tile: _Tile) -> tuple[_Tile, NDArray[np.float32]]:
            vectors = store.read(*tile.cells)
            total = score(vectors, queries, tile.features).sum(0)
            if known is not None:
                total[applicable(vectors, known, tile.scaled) == 0] = np.nan
            return tile, total[tile.inside][None]

        for tile, total in abreast(summed, _tiles(store, rows, cols, surroundings)):
            writer.write(tile.row, tile.col, total)


@dataclass(frozen=True)
class _Tile:
    """Cells of a whole tile, where they come in the wanted range, and what of them is wanted."""

    cells: tuple[slice, slice]
    row: int
    col: int
    inside: tuple[slice, slice]
    features: NDArray[np.float32] | None = None
    scaled: NDArray[np.float32] | None = None


def _tiles(
    store: EmbeddingStore, rows: slice, cols: slice, surroundings: Surroundings | None
) -> Iterator[_Tile]:
    """Give the tiles that hold the wanted cells, with the covariates beside them."""
    tiles = list(store.tiles_in(rows, cols))
    for tile in track(tiles, "Scoring"):
        cells = store.cells(tile)
        inner_rows, there_rows = shared(cells[0], rows)
        inner_cols, there_cols = shared(cells[1], cols)
        beside: Sequence[NDArray[np.float32] | None] = (None, None)
        if surroundings is not None:
            beside = surroundings.cells(store.geobox[cells])
        yield _Tile(cells, there_rows.start, there_cols.start, (inner_rows, inner_cols), *beside)


def _unique(stems: Sequence[str]) -> list[str]:
    """Number the names that come again."""
    taken: list[str] = []
    for stem in stems:
        name, count = stem, 1
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.append(name)
    return taken
