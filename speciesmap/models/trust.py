"""What a checkpoint knows about how far its maps can be trusted, fixed at training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, field_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from speciesmap.models.environment import Environment

TRUST = "trust.safetensors"

Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Applicability:
    """The training places, as distances to them are measured.

    Attributes:
        centre: Mean of the training embeddings, shape (D,); with covariates these follow, weighed,
            and D counts them.
        axes: Their principal directions, shape (P, D).
        places: Coordinates along the axes and, last, the length of what the axes leave over,
            shape (R, P + 1).
        mean_distance: Between two training places, on average.
        threshold: Largest dissimilarity index that counts as known.
        beside: Distance that a standard deviation of a covariate counts for.
    """

    centre: Tensor
    axes: Tensor
    places: Tensor
    mean_distance: float
    threshold: float
    beside: float = 0.0


@dataclass(frozen=True)
class Trust:
    """Figures of a fine-tuned model, by name of taxon.

    Attributes:
        weight: Heads fitted to parts of the training data, in logits of the map, shape (T, M, D);
            features of covariates count in D.
        offset: Theirs, shape (T, M).
        applicability: Of all maps of the model, where it was measured.
        thresholds: Values of the map that bound a range, by rule.
        curves: Isotonic calibration: suitability and the probability it stands for.
        presences: Number of records trained on.
        uninformative: Taxa whose maps held-out folds did not tell from chance.
    """

    weight: Tensor
    offset: Tensor
    applicability: Applicability | None = None
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    presences: dict[str, int] = field(default_factory=dict)
    uninformative: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the tensors into a checkpoint's folder and give what its JSON keeps."""
        tensors = {"weight": self.weight, "offset": self.offset}
        known: dict[str, Any] | None = None
        if self.applicability is not None:
            a = self.applicability
            tensors |= {"centre": a.centre, "axes": a.axes, "places": a.places}
            known = {name: getattr(a, name) for name in ("mean_distance", "threshold", "beside")}
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, folder / TRUST)
        return {
            "applicability": known,
            "thresholds": self.thresholds,
            "curves": self.curves,
            "presences": self.presences,
            "uninformative": self.uninformative,
        }

    @classmethod
    def load(
        cls,
        folder: Path,
        facts: dict[str, Any],
        taxa: int,
        dim: int,
        environment: Environment | None = None,
    ) -> Trust:
        """Read what `save` wrote.

        Args:
            folder: Of the checkpoint.
            facts: What `save` gave.
            taxa: How many the model knows, T.
            dim: Of its embeddings, D.
            environment: Its covariates, if any.

        Raises:
            ValueError: A tensor has another shape than the model's, or a figure another type.
        """
        noted = _Facts.model_validate(facts)
        tensors = load_file(folder / TRUST)
        members = tensors["offset"].shape[-1]
        read = dim + (environment.expansion.width if environment else 0)
        wanted = {"weight": (taxa, members, read), "offset": (taxa, members)}
        if noted.applicability is not None:
            axes = len(tensors["axes"])
            known = dim + (len(environment.expansion.mean) if environment else 0)
            wanted |= {"centre": (known,), "axes": (axes, known)}
            wanted["places"] = (len(tensors["places"]), axes + 1)
        for name, shape in wanted.items():
            if tensors[name].shape != shape or not tensors[name].is_floating_point():
                found = tuple(tensors[name].shape)
                raise ValueError(f"{name} in {TRUST} has shape {found}, not {shape} of floats")
        applicability = None
        if noted.applicability is not None:
            applicability = Applicability(
                tensors["centre"], tensors["axes"], tensors["places"], **noted.applicability
            )
        return cls(
            tensors["weight"],
            tensors["offset"],
            applicability,
            noted.thresholds,
            noted.curves,
            noted.presences,
            noted.uninformative,
        )


class _Facts(BaseModel):
    """What `Trust.save` leaves to a checkpoint's JSON, checked."""

    applicability: dict[Literal["mean_distance", "threshold", "beside"], float] | None
    thresholds: dict[str, dict[str, float]]
    curves: dict[str, Curve]
    presences: dict[str, int]
    uninformative: list[str] = []

    @field_validator("curves")
    @classmethod
    def _curves_rise(cls, curves: dict[str, Curve]) -> dict[str, Curve]:
        for name, (suitability, probability) in curves.items():
            finite = np.isfinite([*suitability, *probability]).all()
            if not suitability or len(suitability) != len(probability) or not finite:
                raise ValueError(f"the curve of {name} is no row of pairs of numbers")
            if (np.diff(suitability) < 0).any():
                raise ValueError(f"the curve of {name} does not rise")
        return curves
