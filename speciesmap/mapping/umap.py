"""UMAP: a store's embeddings as colours, and those of photos as points coloured by taxonomy."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from rasterio.enums import ColorInterp
from torch import Tensor

from speciesmap.datasets.birds import BirdDataset
from speciesmap.datasets.paired import PairedDataset
from speciesmap.errors import DependencyError, QueryError, StoreError
from speciesmap.models import SpeciesModel
from speciesmap.outputs import refuse_existing, replacing
from speciesmap.progress import track
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.store import open_store

log = logging.getLogger("speciesmap")

BLOCK = 1024  # vectors whose neighbours are sought at once
FEWEST = 8
DEFAULT_RANK = -2  # the name above the genus, the family in iNaturalist's lineages


def umap_colours(
    store: Path | str,
    out: Path | str,
    *,
    sample: int = 20_000,
    neighbours: int = 30,
    min_distance: float = 0.1,
    percentiles: tuple[float, float] = (2.0, 98.0),
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Colour every cell by its place in a three-dimensional UMAP of the embeddings.

    UMAP (McInnes et al. 2018) with the cosine is fitted on a random sample of cells and then
    places all others. Each of its axes becomes a colour, stretched between two percentiles of the
    sample; cells that look alike from above have like colours, and colours mean nothing else.

    Args:
        store: What `speciesmap embed` wrote.
        out: GeoTIFF of three bands, uint8 from 1 to 255, and 0 where nothing was encoded.
        sample: How many cells the fit sees at most.
        neighbours: Size of the neighbourhood that UMAP keeps, at most the sample less one.
        min_distance: Least distance of points in the map.
        percentiles: Of the sample, which become the darkest and the lightest tone.
        seed: Of the sample and the fit; the same seed gives the same colours.
        overwrite: Replace an existing file.

    Returns:
        The GeoTIFF.

    Raises:
        StoreError: The store is damaged or has too few cells.
        OutputError: The file exists already.
        DependencyError: umap-learn is not installed.
    """
    refuse_existing(Path(out), overwrite, store)
    opened = open_store(store)
    height, width = opened.geobox.shape
    rng = np.random.default_rng(seed)
    tiles = list(opened.tiles_in(slice(0, height), slice(0, width)))
    there = {
        tile: np.isfinite(opened.read(*opened.cells(tile))[..., 0])
        for tile in tiles
        if opened.has(tile)
    }
    total = sum(int(mask.sum()) for mask in there.values())
    if total < FEWEST:
        raise StoreError(
            f"{store} has {total} encoded cells, too few for UMAP; embed a larger area"
        )
    chosen = np.sort(rng.choice(total, min(sample, total), replace=False))
    fitted_on, first = [], 0
    for tile, mask in there.items():
        inside = chosen[(chosen >= first) & (chosen < first + mask.sum())] - first
        if len(inside):
            fitted_on.append(opened.read(*opened.cells(tile))[mask][inside])
        first += int(mask.sum())
    fitted = torch.from_numpy(np.concatenate(fitted_on)).float()
    places = fit_umap(fitted, 3, neighbours, min_distance, seed)
    low, high = np.percentile(places, percentiles, axis=0)

    pixels = np.zeros((3, height, width), np.uint8)
    for tile, mask in track(there.items(), "Placing cells", len(there)):
        rows, cols = cells = opened.cells(tile)
        vectors = torch.from_numpy(opened.read(*cells)[mask]).float()
        placed = place(vectors, fitted, torch.from_numpy(places), neighbours).numpy()
        tone = np.clip((placed - low) / np.maximum(high - low, 1e-9), 0, 1)  # (n, 3)
        pixels[:, rows, cols][:, mask] = (1 + np.rint(254 * tone)).astype(np.uint8).T
    return write_geotiff(
        out,
        pixels,
        opened.geobox,
        bands=("red", "green", "blue"),
        nodata=0,
        colorinterp=(ColorInterp.red, ColorInterp.green, ColorInterp.blue),
        overwrite=overwrite,
    )


def fit_umap(
    vectors: Tensor, dimensions: int, neighbours: int, min_distance: float, seed: int
) -> NDArray[np.float32]:
    """Place vectors of any length, shape (N, D), by UMAP with the cosine.

    Neighbours are found here, exactly: umap-learn's search for them compiles itself anew in each
    process, which takes minutes.

    Returns:
        Places, shape (N, dimensions).

    Raises:
        DependencyError: umap-learn is not installed.
    """
    log.info("Fitting UMAP to %d vectors", len(vectors))
    try:
        import umap
    except ImportError as error:
        raise DependencyError(
            "umap-learn is not installed; run `pip install 'speciesmap[umap]'`"
        ) from error
    neighbours = max(2, min(neighbours, len(vectors) - 1))
    vectors = F.normalize(vectors, dim=1)
    found = [nearest(block, vectors, neighbours) for block in torch.split(vectors, BLOCK)]
    numbers, cosines = (torch.cat(part) for part in zip(*found, strict=True))  # (N, neighbours)
    itself = numbers == torch.arange(len(vectors))[:, None]  # (N, neighbours)
    distances = (1 - cosines).clamp(min=0).masked_fill(itself, 0)  # (N, neighbours)
    threads = torch.get_num_threads()
    with warnings.catch_warnings():  # it will not place other vectors, nor is it asked to
        warnings.filterwarnings("ignore", "precomputed_knn")
        reducer = umap.UMAP(
            n_components=dimensions,
            n_neighbors=neighbours,
            min_dist=min_distance,
            metric="cosine",
            init="random" if len(vectors) < 10 * dimensions else "spectral",
            random_state=seed,
            n_jobs=1,
            precomputed_knn=(numbers.int().numpy(), distances.numpy()),
        )
        placed: NDArray[np.float32] = reducer.fit_transform(vectors.numpy())
    torch.set_num_threads(threads)  # numba set its own number for both
    return placed


def nearest(vectors: Tensor, fitted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers of the fitted vectors nearest to each of others, and cosines, shape (N, count)."""
    cosines, numbers = (vectors @ fitted.T).topk(count)
    return numbers, cosines


def place(vectors: Tensor, fitted: Tensor, places: Tensor, neighbours: int) -> Tensor:
    """Place unit vectors, shape (N, D), among those that UMAP placed: where their neighbours are.

    Neighbours count by how much farther they are than the nearest one, as where umap-learn begins
    to place new vectors.

    Returns:
        Places, shape (N, dimensions).
    """
    numbers, cosines = nearest(vectors, fitted, min(neighbours, len(fitted)))
    beyond = cosines[:, :1] - cosines  # (N, neighbours)
    weights = torch.softmax(-beyond / beyond.mean(1, keepdim=True).clamp(min=1e-6), 1)
    return (weights[..., None] * places[numbers]).sum(1)


def photo_points(
    model: SpeciesModel,
    dataset: PairedDataset | BirdDataset,
    rank: int,
    most: int = 3000,
    seed: int = 0,
) -> tuple[NDArray[np.float32], list[str], list[str]]:
    """Embed the photos of a data set, with what colours and names each.

    Args:
        model: With a ground tower.
        dataset: With photos.
        rank: Which name of the lineage colours: 0 the broadest, -1 the last before the species'
            own. A taxon without such a name is coloured by its genus; with the default of the
            command, `DEFAULT_RANK`, all may be.
        most: Photos embedded at most, drawn at random.
        seed: Of the draw.

    Returns:
        Unit embeddings, shape (N, D), groups and names, for `umap_points`.

    Raises:
        QueryError: No taxon has a name of that rank.
    """
    taxa = {taxon.name: taxon for taxon in dataset.taxa}
    fullest: tuple[str, ...] = max((taxon.lineage for taxon in dataset.taxa), key=len, default=())
    length = len(fullest)
    if rank not in (DEFAULT_RANK, *range(-length, length)):
        has = f"at most {length} names, as {'/'.join(fullest)}" if length else "no names"
        few = f"give {-length} to {length - 1}" if length else "leave --rank out to colour by genus"
        raise QueryError(f"--rank {rank} is beyond the lineages of {dataset.path}, of {has}; {few}")
    named = np.flatnonzero(dataset.facts["name"].isin(list(taxa)).to_numpy())
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(named, min(most, len(named)), replace=False))
    parts, groups, names = [], [], []
    for chosen in track(np.array_split(rows, -(-len(rows) // 64) or 1), "Embedding photos"):
        photos = dataset.ground(chosen)
        kept = [(row, photo) for row, photo in zip(chosen, photos, strict=True) if photo]
        if kept:
            with torch.inference_mode():
                parts.append(model.encode_ground([photo for _, photo in kept]).cpu().numpy())
        for row, _ in kept:
            taxon = taxa[dataset.facts["name"].iloc[row]]
            lineage = taxon.lineage
            there = -len(lineage) <= rank < len(lineage)
            groups.append(lineage[rank] if there else taxon.genus)
            names.append(taxon.name)
    empty = np.empty((0, model.dim), np.float32)
    return np.concatenate([empty, *parts]), groups, names


def umap_points(
    vectors: NDArray[np.floating[Any]],
    groups: Sequence[str],
    names: Sequence[str],
    out: Path | str,
    *,
    title: str = "",
    neighbours: int = 15,
    min_distance: float = 0.1,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Draw embeddings, for example of ground photos, as points coloured by taxonomy.

    Args:
        vectors: Unit embeddings, shape (N, D).
        groups: What colours each point, such as its family, N of them. The twelve largest groups
            have colours of their own, others are grey.
        names: What each point is called, N of them.
        out: A page `.html`, whose points tell their names, or a picture `.png`.
        title: Heading.
        neighbours: Size of the neighbourhood that UMAP keeps.
        min_distance: Least distance of points.
        seed: The same seed gives the same picture.
        overwrite: Replace an existing file.

    Returns:
        The file.

    Raises:
        QueryError: There are too few points, or names or groups do not fit them, or the file is
            neither a page nor a picture.
        OutputError: The file exists already.
        DependencyError: umap-learn is not installed.
    """
    out = Path(out)
    refuse_existing(out, overwrite)
    if out.suffix not in (".html", ".png"):
        raise QueryError(f"{out} is neither .html nor .png; choose one of them")
    if len(vectors) < FEWEST or not len(vectors) == len(groups) == len(names):
        raise QueryError(
            f"UMAP needs {FEWEST} points or more with a group and a name each, got {len(vectors)} "
            f"points, {len(groups)} groups and {len(names)} names"
        )
    given = torch.from_numpy(np.asarray(vectors, np.float32))
    places = fit_umap(given, 2, neighbours, min_distance, seed)
    low, high = places.min(0), places.max(0)
    places = (places - low) / np.maximum(high - low, 1e-9)
    colours = group_colours(groups)
    write = _page if out.suffix == ".html" else _picture
    with replacing(out, overwrite=overwrite) as beside:
        write(beside, places, [colours.get(g, GREY) for g in groups], names, colours, title)
    return out


GREY = "#9aa0a6"
COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377",
    "#332288", "#ee7733", "#009988", "#882255", "#999933", "#0077bb",
)  # fmt: skip
"""Told apart also by most who confuse red and green (schemes of Paul Tol)."""


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """Colours of the largest groups, by name, largest first."""
    names, counts = np.unique(np.asarray(groups, dtype=str), return_counts=True)
    order = np.lexsort((names, -counts))[: len(COLOURS)]
    return dict(zip(names[order].tolist(), COLOURS, strict=False))


def _picture(
    path: Path,
    places: NDArray[np.floating[Any]],
    tones: Sequence[str],
    names: Sequence[str],
    colours: dict[str, str],
    title: str,
) -> None:
    from PIL import Image, ImageDraw, ImageFont

    side, margin, legend = 1200, 60, 420
    image = Image.new("RGB", (side + legend, side), "white")
    draw = ImageDraw.Draw(image)
    font, heading = ImageFont.load_default(22), ImageFont.load_default(30)
    for (x, y), tone in zip(_inside(places, side, margin), tones, strict=True):
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=tone)
    draw.text((margin, 14), title, "black", heading)
    shown = [*colours.items(), *([("others", GREY)] if GREY in tones else [])]
    for k, (name, tone) in enumerate(shown):
        y = margin + 40 * k
        draw.ellipse((side + 10, y, side + 28, y + 18), fill=tone)
        draw.text((side + 40, y - 4), name, "black", font)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def _inside(places: ArrayLike, side: int, margin: int) -> list[tuple[float, float]]:
    """Places of the unit square in pixels, y upwards."""
    points = margin + np.asarray(places) * (side - 2 * margin)
    return [(float(x), float(side - y)) for x, y in points]


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title></title><style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #202124; }
main { display: flex; flex-wrap: wrap; gap: 1.5rem; }
svg { width: min(85vh, 95vw); height: auto; border: 1px solid #dadce0; }
button { display: block; border: 0; background: none; font: inherit; cursor: pointer; }
button[aria-pressed="true"] { font-weight: 600; }
i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em; }
.faint { opacity: .08; } output { display: block; min-height: 1.5em; }
</style></head><body><h1></h1><main><svg viewBox="0 0 1000 1000" role="img"></svg>
<div><output></output><div id="legend"></div></div></main>
<script type="application/json" id="facts">FACTS</script><script>
const facts = JSON.parse(document.getElementById("facts").textContent);
document.title = facts.title; document.querySelector("h1").textContent = facts.title;
const svg = document.querySelector("svg"), said = document.querySelector("output");
svg.setAttribute("aria-label", facts.title);
const dots = facts.points.map(([x, y, tone, name]) => {
  const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  for (const [key, value] of [["cx", x], ["cy", y], ["r", 5], ["fill", tone]])
    dot.setAttribute(key, value);
  const text = document.createElementNS("http://www.w3.org/2000/svg", "title");
  text.textContent = name; dot.append(text);
  dot.addEventListener("mouseenter", () => { said.textContent = name; });
  return svg.appendChild(dot);
});
let only = null;
for (const [name, tone] of facts.legend) {
  const entry = document.createElement("button"), mark = document.createElement("i");
  mark.style.background = tone; entry.append(mark, name); entry.ariaPressed = "false";
  entry.onclick = () => {
    only = only === tone ? null : tone;
    dots.forEach(d => d.classList.toggle("faint", only && d.getAttribute("fill") !== only));
    for (const other of document.querySelectorAll("button"))
      other.ariaPressed = String(only !== null && other === entry);
  };
  document.getElementById("legend").append(entry);
}
</script></body></html>
"""


def _page(
    path: Path,
    places: NDArray[np.floating[Any]],
    tones: Sequence[str],
    names: Sequence[str],
    colours: dict[str, str],
    title: str,
) -> None:
    points = [
        [round(x, 1), round(y, 1), tone, name]
        for (x, y), tone, name in zip(_inside(places, 1000, 30), tones, names, strict=True)
    ]
    legend = [*colours.items(), *([("others", GREY)] if GREY in tones else [])]
    facts = json.dumps({"title": title or "UMAP", "points": points, "legend": legend})
    escaped = facts.replace("<", "\\u003c").replace("&", "\\u0026")
    path.write_text(PAGE.replace("FACTS", escaped), encoding="utf-8")
