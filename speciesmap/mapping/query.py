"""Queries: what a map is asked for, as a unit vector and a logistic curve over its cosine."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from speciesmap.datasets.photos import SUFFIXES, open_photo
from speciesmap.errors import QueryError
from speciesmap.models import SpeciesModel
from speciesmap.taxa import find, slug, suggestion, words

TOGETHER = 16  # queries of one matrix product
PLACES = 1024  # places of one are a multiple; a tile has as many
FEW = 25  # presences below which spatial folds say little (ENMeval leaves one out there)
OPENED = 32  # photos in memory at once
PROBIT_TO_LOGIT = 1.702  # the logistic curve nearest to the normal's (Camilli 1994)

log = logging.getLogger("speciesmap")


@dataclass(frozen=True)
class Query:
    """One map to be made; its value at a place is `sigmoid(gain * cosine + offset)`.

    The features of covariates, if it has weights for them, add to the logit.

    Attributes:
        label: What a reader calls it, for a taxon its scientific name.
        kind: How it was asked for.
        vector: Unit embedding, float32, shape (D,).
        gain: Positive slope, in logits per unit of cosine.
        offset: In logits.
        quantity: What the values are.
        members: Heads fitted to parts of the training data, whose spread is the map's
            uncertainty, in logits, float32, shape (M, D + F); M is 0 where there are none.
        member_offsets: Theirs, shape (M,).
        curve: Isotonic calibration, if any: values of the logistic curve, and the probabilities
            they stand for.
        thresholds: Values that bound a range, by rule, fixed at training.
        caution: Why a reader should be wary of the map, if anything is known.
        covariates: Weights of features of covariates, in logits, float32, shape (F,); F is 0 of
            queries that read the embedding alone.
        photos: Files of the photos that it was made from, if any.
    """

    label: str
    kind: Literal["taxon", "photo", "text"]
    vector: NDArray[np.float32]
    gain: float
    offset: float
    quantity: Literal["suitability", "probability"]
    members: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    member_offsets: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    curve: tuple[Sequence[float], Sequence[float]] | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    caution: str = ""
    covariates: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    photos: tuple[Path, ...] = ()

    @property
    def stem(self) -> str:
        """File name of its map without the suffix; photos and text say that they are that."""
        return slug(self.label) if self.kind == "taxon" else f"{self.kind}_{slug(self.label)}"


def without_calibration(query: Query) -> Query:
    """Give a query whose values only rank places, for embeddings other than calibrated on."""
    return replace(
        query,
        quantity="suitability",
        members=np.empty((0, 0), np.float32),
        member_offsets=np.empty(0, np.float32),
        curve=None,
        thresholds={},
    )


def make_queries(
    model: SpeciesModel,
    *,
    species: Sequence[str] = (),
    photos: Sequence[Path | str] = (),
    texts: Sequence[str] = (),
) -> list[Query]:
    """Make one query for each species, one for all photos together and one for each text.

    With nothing asked for, every taxon that the model knows.

    Raises:
        QueryError: A species is unknown, a photo cannot be read, the model lacks the tower that
            is needed, or nothing was asked of a model that knows no taxa.
    """
    if not species and not photos and not texts:
        species = [taxon.name for taxon in model.taxa]
        if not species:
            raise QueryError(
                f"the model knows no taxa, so there is no default map; {instead(model)} fine-tune "
                "it with `speciesmap train`"
            )
    queries = [taxon_query(model, name) for name in dict.fromkeys(species)]
    if photos:
        queries.append(photo_query(model, photos))
    queries += [text_query(model, text) for text in dict.fromkeys(texts)]
    return queries


def instead(model: SpeciesModel) -> str:
    """Say what a model can be asked with, to go before what else could be done."""
    ways = []
    if model.taxa:
        more = ", ..." if len(model.taxa) > 1 else ""
        ways.append(f"--species ({model.taxa[0].name}{more})")
    if model.joined:
        ways += ["--photo"] * (model.ground is not None) + ["--text"] * (model.text is not None)
    return f"ask with {' or '.join(ways)}, or" if ways else "it answers no query yet:"


def taxon_query(model: SpeciesModel, name: str) -> Query:
    """Ask for a taxon by its learned embedding.

    Args:
        model: Fine-tuned on the taxon.
        name: Scientific name, in any letter case.

    Raises:
        QueryError: The model does not know it; the message gives the nearest known names.
    """
    if not model.taxa:
        raise QueryError(
            f"the model knows no taxa, so it cannot map {name!r:.80}; {instead(model)} fine-tune "
            "it with `speciesmap train`"
        )
    position = find(name, model.taxa)
    label = model.taxa[position].name
    trust = model.trust
    known: dict[str, Any] = {}
    if model.head.covariates is not None:
        known["covariates"] = _array(model.head.covariates[position])
    if trust is not None:
        known |= {
            "members": _array(trust.weight[position]),
            "member_offsets": _array(trust.offset[position]),
            "curve": trust.curves.get(label),
            "thresholds": trust.thresholds.get(label, {}),
        }
        cautions = []
        if trust.presences.get(label, FEW) < FEW:
            cautions.append(
                f"learned from {trust.presences[label]} presences, fewer than {FEW}: read its map "
                "as a sketch"
            )
        if label in trust.uninformative:
            cautions.append(
                "uninformative: on held-out blocks its map does no better than chance, or than "
                "maps of random records of its group"
            )
        known["caution"] = _warned(label, cautions)
    return Query(
        label=label,
        kind="taxon",
        vector=_array(model.head.vectors[position]),
        gain=float(model.head.gain[position].detach()),
        offset=float(model.head.offset[position].detach()),
        quantity="probability" if label in model.prevalence else "suitability",
        **known,
    )


def photo_query(
    model: SpeciesModel, photos: Sequence[Path | str], *, label: str | None = None
) -> Query:
    """Ask for places that look as if these photos were taken there.

    Args:
        model: With a ground tower.
        photos: Image files, or folders of them; the unit embeddings of all are averaged. What is
            no photo in a folder is left out and named.
        label: The first one's stem, and how many more, by default.

    Raises:
        QueryError: A file is missing or no image, a folder holds none, or the model has no ground
            tower.
    """
    if model.ground is None:
        raise QueryError(
            f"the model has no ground tower, so it cannot be asked with --photo {photos[0]}; "
            f"{instead(model)} use a model that `speciesmap train` pre-trained on photos"
        )
    files = _photo_files(photos)
    if not files:
        raise QueryError("a photo query needs at least one photo; pass --photo FILE")
    more = f" and {len(photos) - 1} more" if len(photos) > 1 else ""
    model.eval()
    used, left, parts = list[Path](), list[str](), []
    with torch.inference_mode():
        for start in range(0, len(files), OPENED):
            images = []
            for file in files[start : start + OPENED]:
                try:
                    images.append(open_photo(file))
                    used.append(file)
                except ValueError as error:
                    left.append(f"{file} cannot be read ({error})")
                    if file in map(Path, photos):
                        raise QueryError(
                            f"photo {left[-1]}; give a JPEG, PNG or WebP file that opens"
                        ) from error
            if images:
                parts.append(model.encode_ground(images).float())  # (n, D)
    if not used:
        raise QueryError(f"{left[0]}, nor can any other; give JPEG, PNG or WebP files that open")
    if left:
        others = f", nor can {len(left) - 1} more" if len(left) > 1 else ""
        log.warning("%s%s; going on with the other %d photos", left[0], others, len(used))
    vector = F.normalize(torch.cat(parts).mean(dim=0), dim=0)
    label = label or Path(photos[0]).absolute().stem + more
    return replace(_relative(model, label, "photo", vector), photos=tuple(used))


def text_query(model: SpeciesModel, text: str, *, label: str | None = None) -> Query:
    """Ask in words, best in the form trained on: a lineage, broadest name first.

    Args:
        model: With a text tower.
        text: For example `"Fagaceae Quercus agrifolia"`.
        label: The text by default.

    Raises:
        QueryError: The text is empty or the model has no text tower.
    """
    if model.text is None:
        raise QueryError(
            f"the model has no text tower, so it cannot be asked with --text {text!r:.80}; "
            f"{instead(model)} use a model that was trained with model.text"
        )
    if not text.strip():
        raise QueryError("a text query is empty; pass --text 'a name or a lineage'")
    model.eval()
    with torch.inference_mode():
        vector = model.encode_text([text])[0].float()
    cautions = []
    if model.names and words(text).isdisjoint(words(" ".join(model.names))):
        cautions.append(
            "the model saw no word of this name in training, so its map says nothing; "
            + suggestion(text, model.names)
        )
    return _relative(model, label or " ".join(text.split()), "text", vector, cautions)


def _warned(label: str, cautions: Sequence[str]) -> str:
    """Give cautions as a query keeps them, after telling each."""
    for caution in cautions:
        log.warning("%s: %s", label, caution)
    return "; ".join(cautions)


def _relative(
    model: SpeciesModel,
    label: str,
    kind: Literal["photo", "text"],
    vector: Tensor,
    cautions: Sequence[str] = (),
) -> Query:
    """Scale a query's cosines by those it has over the training landscape.

    A value is then about the share of that landscape that is less similar to the query, so that
    values compare between areas and queries.
    """
    if not model.joined:
        cautions = [
            "no contrastive loss has brought photos, names and windows together in this model, so "
            "its map says nothing; train one with method: crisp or cve_mae"
        ]
    if len(model.reference):
        cosines = model.reference.float() @ vector.to(model.reference.device)
        mean, spread = float(cosines.mean()), float(cosines.std(correction=0))
    else:
        # random directions have cosines of mean 0 and variance 1 / D
        mean, spread = 0.0, 0.0
        log.warning("the model keeps no reference landscape: values of %r rank places only", label)
    gain = PROBIT_TO_LOGIT / (spread if spread > 1e-6 else 1 / math.sqrt(model.dim))
    return Query(
        label,
        kind,
        _array(vector),
        gain,
        -gain * mean,
        "suitability",
        caution=_warned(label, cautions),
    )


def _photo_files(photos: Sequence[Path | str]) -> list[Path]:
    """Name the files of photos, where a folder stands for those in it, in the order of their names.

    Raises:
        QueryError: A file is missing, or a folder holds none.
    """
    files: list[Path] = []
    for path in map(Path, photos):
        found = [path]
        if path.is_dir():
            seen = (file for file in path.glob("[!.]*") if file.is_file())
            found = sorted(file for file in seen if file.suffix.lower() in SUFFIXES)
        elif not path.is_file():
            raise QueryError(f"photo {path} does not exist; check the name")
        if not found:
            raise QueryError(f"{path} holds no photo ({', '.join(SUFFIXES)}); name its files")
        files += found
    return files


def score(
    vectors: NDArray[Any],
    queries: Sequence[Query],
    covariates: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Score places against all queries by matrix products.

    A product's last bit depends on the shapes of its factors. Queries and places are therefore
    taken in blocks of one size, so that a place's value does not depend on what else is asked for,
    nor on where in its store it lies.

    Args:
        vectors: Unit embeddings, shape (..., D); NaN where nothing is known.
        queries: Any number.
        covariates: Features of covariates at the places, shape (..., F); NaN where one is unknown.

    Returns:
        Values in [0, 1], shape (queries, ...), NaN where the embedding is, or a covariate that
        the query reads.
    """
    count = math.prod(vectors.shape[:-1])
    places = _in_blocks(vectors)
    padded = -(-len(queries) // TOGETHER) * TOGETHER
    directions = torch.zeros(padded, places.shape[1])  # (Q, D)
    offsets = torch.zeros(padded, 1)
    some = slice(len(queries))
    gains = np.array([query.gain for query in queries], np.float32)[:, None]
    stacked = np.array([query.vector for query in queries]).reshape(-1, places.shape[1]) * gains
    directions[some] = torch.from_numpy(stacked)
    offsets[some, 0] = torch.tensor([query.offset for query in queries])
    values = torch.empty(padded, len(places))  # (Q, N)
    for start in range(0, padded, TOGETHER):
        block = slice(start, start + TOGETHER)
        torch.addmm(offsets[block], directions[block], places.T, out=values[block])
    beside = None
    if covariates is not None:
        beside = _in_blocks(covariates)  # (N, F)
    for value, query in zip(values, queries, strict=False):
        if query.covariates.size:
            assert beside is not None
            value += beside @ torch.from_numpy(query.covariates)
    scored = values[: len(queries)].sigmoid_().numpy()[:, :count]
    for value, query in zip(scored, queries, strict=True):
        if query.curve is not None:
            value[:] = np.interp(value, *query.curve)
    return scored.reshape(len(queries), *vectors.shape[:-1])


def spread(
    vectors: NDArray[Any], query: Query, covariates: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Standard deviation of a query's members at places, in the unit of its map.

    Args:
        vectors: Unit embeddings, shape (..., D); NaN where nothing is known.
        query: With at least two members.
        covariates: As for `score`.

    Returns:
        0 or more, shape (...), NaN where the embedding is.
    """
    count = math.prod(vectors.shape[:-1])
    places = _in_blocks(vectors)
    if covariates is not None:
        places = torch.cat([places, _in_blocks(covariates)], 1)  # (N, D + F)
    offsets = torch.from_numpy(query.member_offsets)[:, None]
    values = torch.addmm(offsets, torch.from_numpy(query.members), places.T).sigmoid_()  # (M, N)
    values = values[:, :count]
    if query.curve is not None:
        values = torch.from_numpy(np.interp(values.numpy(), *query.curve))
    return np.asarray(values.std(0, correction=1).float().numpy().reshape(vectors.shape[:-1]))


def _in_blocks(rows: NDArray[Any]) -> Tensor:
    """Rows of the last axis in float32, with zeros up to a whole number of blocks."""
    flat = torch.from_numpy(np.ascontiguousarray(rows)).flatten(0, -2).float()  # D may be 0
    missing = -len(flat) % PLACES
    return F.pad(flat, (0, 0, 0, missing)) if missing else flat  # (N, D)


def _array(vector: Tensor) -> NDArray[np.float32]:
    return np.asarray(vector.detach().float().cpu().numpy(), np.float32)
