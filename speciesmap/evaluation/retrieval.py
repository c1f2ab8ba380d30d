"""Cross-modal retrieval: the window of a photo, the photo of a window, the species of either."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from speciesmap.datasets.birds import BirdDataset, open_dataset
from speciesmap.datasets.nature_multi_view import of_split
from speciesmap.datasets.paired import PairedDataset
from speciesmap.datasets.splits import SPLITS
from speciesmap.errors import ConfigError, DatasetError, ModelError
from speciesmap.learning.data import PairedRows, middle
from speciesmap.models import SpeciesModel, load_model
from speciesmap.outputs import refuse_existing, replacing
from speciesmap.progress import track

log = logging.getLogger("speciesmap")

TOP = 50  # candidates that are scored again, as in BirdSAT
AT = (1, 5, 10)
QUERIES = 256  # scored against the gallery at once
RESULTS = "retrieval"


def evaluate_retrieval(
    model: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    split: str = "test",
    reranker: Path | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Measure retrieval on the rows of one split and write one table.

    Args:
        model: Folder of a model with a ground tower, such as CRISP's or CVE-MAE's.
        data: Data set with photos and windows.
        out: Folder for `retrieval.csv` and `retrieval.json`.
        split: Which rows, where the data set has several splits; else all rows are taken.
        reranker: Folder of a CVM-MAE, which scores the 50 best of each query again.
        overwrite: Replace an existing output.

    Returns:
        The folder.

    Raises:
        SpeciesmapError: An input or the output does not allow it.
    """
    out = Path(out)
    refuse_existing(out, overwrite, model, data, reranker)
    dataset = open_dataset(data)
    chosen = rows_of_split(dataset, split)
    wanted = (dataset.facts["name"].fillna("") != "").to_numpy()
    if chosen is not None:
        wanted = wanted & chosen
    if not wanted.any():
        raise DatasetError(f"{data} has no named rows of split {split!r}; name another")
    loaded = [load_model(folder) for folder in (model, reranker) if folder is not None]
    for one, folder in zip(loaded, (model, reranker), strict=False):
        if one.bands != dataset.bands or one.window_px > dataset.window_px:
            raise ModelError(
                f"{folder} takes windows of {one.window_px} px with bands {', '.join(one.bands)}; "
                f"{data} has {dataset.window_px} px and {', '.join(dataset.bands) or 'none'}"
            )
        if one.ground is None:
            raise ModelError(f"{folder} has no ground tower, so it pairs nothing with photos")
    if reranker is not None and loaded[1].matcher is None:
        raise ModelError(f"{reranker} does not score pairs; give a model of method cvm_mae")
    numbers = np.flatnonzero(wanted)
    rows = [
        PairedRows(dataset, numbers, dataset.taxa, one.ground.image_px, one.window_px)
        for one in loaded
        if one.ground is not None
    ]
    table = retrieval(loaded[0], rows[0], *((loaded[1], rows[1]) if reranker else ()))
    with replacing(out, overwrite=overwrite) as folder:
        folder.mkdir()
        table.to_csv(folder / f"{RESULTS}.csv", index=False)
        content = {
            "model": str(model),
            "reranker": None if reranker is None else str(reranker),
            "data": str(data),
            "split": None if chosen is None else split,
            "table": json.loads(table.to_json(orient="records")),
        }
        (folder / f"{RESULTS}.json").write_text(json.dumps(content, indent=1))
    return out


def rows_of_split(dataset: PairedDataset | BirdDataset, split: str) -> NDArray[np.bool_] | None:
    """Tell which rows are of a split, shape (N,), or None where the data set is not split.

    Birds have the column `split`; other files are named by split. Those of chips are all named
    `train`, as the hub wants of a data set without splits.
    """
    if isinstance(dataset, BirdDataset):
        return np.asarray(dataset.facts["split"] == split)
    rows = {name: dataset.rows_of(partial(of_split, split=name)) for name in {split, *SPLITS}}
    if sum(len(found) > 0 for found in rows.values()) < 2:
        return None
    return np.isin(np.arange(len(dataset)), rows[split])


def read_retrieval(folder: Path | str) -> dict[str, Any]:
    """Read what `evaluate_retrieval` wrote: what was measured, and `table`."""
    content: dict[str, Any] = json.loads((Path(folder) / f"{RESULTS}.json").read_text())
    return content


def retrieval(
    model: SpeciesModel,
    rows: PairedRows,
    reranker: SpeciesModel | None = None,
    reranked: PairedRows | None = None,
) -> pd.DataFrame:
    """Retrieve both ways, at instance and at species level.

    At instance level every row of the query's place is right, at species level every row of its
    taxon. Metadata belong to the window's side: each window, as a query or in the gallery, carries
    those of its own row. A model with metadata is measured with and without them; beside the
    window itself they tell where and when, as a photo's record would.

    Args:
        model: Whose embeddings are compared.
        rows: Photos and windows.
        reranker: Scores the best candidates of each query again.
        reranked: The same rows as the reranker takes them.

    Returns:
        One row for each direction, level, method and use of metadata: R@1, R@5, R@10, median rank,
        and the number of queries and of candidates.
    """
    aerial, ground, metadata = embed_rows(model, rows)
    kept = rows.rows
    groups = {
        "instance": torch.from_numpy(rows.place[kept]),
        "species": torch.from_numpy(rows.labels[kept]),
    }
    table = []
    for known in [True, False] if model.metadata is not None else [False]:
        with torch.inference_mode():
            windows = model.add_metadata(aerial, metadata) if known else aerial
        rescore = None
        if reranker is not None and reranked is not None:
            rescore = pair_scorer(reranker, reranked, known)
        for direction, queries, gallery in (
            ("ground to aerial", ground, windows),
            ("aerial to ground", windows, ground),
        ):
            again = None if rescore is None else rescore(direction == "ground to aerial")
            ranks = rank_groups(queries, gallery, groups, again)
            for method, by_level in ranks.items():
                for level, rank in by_level.items():
                    table.append(
                        {
                            "direction": direction,
                            "level": level,
                            "method": method,
                            "metadata": known,
                            **recalls(rank),
                            "queries": len(queries),
                            "gallery": len(gallery),
                        }
                    )
    return pd.DataFrame(table)


@torch.inference_mode()
def embed_rows(model: SpeciesModel, rows: PairedRows) -> tuple[Tensor, Tensor, Tensor]:
    """Embed windows without metadata (N, D) and photos (N, D), and give the metadata (N, 4)."""
    if len(rows) < 2:
        raise ConfigError(f"{len(rows)} rows are nothing to retrieve from; choose another split")
    model.eval()
    parts = []
    for chosen in np.array_split(np.arange(len(rows)), -(-len(rows) // 64)):
        batch = rows.__getitems__(chosen.tolist())
        windows = middle(batch["aerial"], rows.window_px)
        parts.append((model.encode_aerial(windows), model.encode_ground(batch["ground"])))
    aerial, ground = (torch.cat(views) for views in zip(*parts, strict=True))
    return aerial, ground, rows.metadata[rows.rows]


Rescore = Callable[[int, NDArray[np.int64]], Tensor]


def pair_scorer(model: SpeciesModel, rows: PairedRows, metadata: bool) -> Callable[[bool], Rescore]:
    """Give, for a direction, what scores candidates of one query by pairs, each a logit."""
    model.eval()

    def of_direction(from_ground: bool) -> Rescore:
        @torch.inference_mode()
        def rescore(query: int, candidates: NDArray[np.int64]) -> Tensor:
            one = np.array([query])
            photo, window = (one, candidates) if from_ground else (candidates, one)
            photos, windows = rows.ground(photo), rows.aerial(window)
            facts = rows.metadata[rows.rows[window]]
            pairs = [
                part.expand(len(candidates), *part.shape[1:]) for part in (photos, windows, facts)
            ]  # (candidates, ...)
            return model.match(*pairs[: 3 if metadata else 2])  # (candidates,)

        return rescore

    return of_direction


@torch.inference_mode()
def rank_groups(
    queries: Tensor, gallery: Tensor, groups: dict[str, Tensor], rescore: Rescore | None = None
) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Rank of the best right candidate of every query.

    Args:
        queries: Unit embeddings, shape (N, D).
        gallery: Unit embeddings, shape (N, D); row i is of the same row as query i.
        groups: By level, the group of each row, shape (N,); candidates of the query's group are
            right.
        rescore: Scores candidates of a query again: the 50 best are ordered anew, the others stay
            behind them.

    Returns:
        By method (`embeddings`, and `re-ranked` where there is a rescore) and level, shape (N,).
    """
    methods = ["embeddings", *(["re-ranked"] if rescore else [])]
    ranks: dict[str, dict[str, list[Tensor]]] = {m: {g: [] for g in groups} for m in methods}
    starts = range(0, len(queries), QUERIES)
    for start in track(starts, "Retrieving") if rescore else starts:
        chosen = slice(start, start + QUERIES)
        scores = {"embeddings": (queries[chosen] @ gallery.T).double()}  # (n, N)
        if rescore is not None:
            again = scores["embeddings"].clone()
            best = again.topk(min(TOP, len(gallery)), 1).indices  # (n, 50)
            for k, candidates in enumerate(best):
                logits = rescore(start + k, candidates.numpy()).double()
                again[k, candidates] = 2 + logits.sigmoid()  # above every cosine
            scores["re-ranked"] = again
        for method, score in scores.items():
            for level, group in groups.items():
                right = group[chosen][:, None] == group  # (n, N)
                ranks[method][level].append(rank_of_right(score, right))
    return {m: {g: torch.cat(r).numpy() for g, r in by.items()} for m, by in ranks.items()}


def rank_of_right(scores: Tensor, right: Tensor) -> Tensor:
    """Rank of each row's best right candidate, 1 the first; wrong ones that tie come before it.

    Args:
        scores: Shape (N, M).
        right: Which candidates are right, at least one in each row, bool, shape (N, M).

    Returns:
        Shape (N,).
    """
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # (N, 1)
    return 1 + ((scores >= best) & ~right).sum(1)  # (N,)


def recalls(ranks: NDArray[np.int64]) -> dict[str, Any]:
    """Share of queries with a right candidate among the first 1, 5 and 10, and the median rank."""
    shares = {f"R@{k}": float((ranks <= k).mean()) for k in AT}
    return {**shares, "median_rank": float(np.median(ranks))}
