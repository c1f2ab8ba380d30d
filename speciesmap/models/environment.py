"""What a model's heads read beside the embedding: covariates, standardised and expanded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


class Expansion:
    """Turns a table into standardised features, remembering the table it was made from.

    Continuous columns may be clamped to the range they were fitted on, as MaxEnt does. Hinges are
    two at each knot, one for either side; an unknown category is none of the known ones.

    Args:
        table: Shape (N, C).
        categorical: Columns that name categories.
        hinges: Knots per continuous column, at quantiles.
        quadratic: Whether squares are added.
        clamped: Whether other rows' values are clamped to the range of the table's.
    """

    def __init__(
        self,
        table: ArrayLike,
        categorical: Sequence[int] = (),
        *,
        hinges: int = 0,
        quadratic: bool = False,
        clamped: bool = True,
    ) -> None:
        values = np.asarray(table, np.float64)
        self.quadratic = quadratic
        self.continuous = [k for k in range(values.shape[1]) if k not in set(categorical)]
        part = values[:, self.continuous]
        self.low, self.high = part.min(0), part.max(0)
        if not clamped:
            self.low, self.high = np.full_like(self.low, -np.inf), np.full_like(self.high, np.inf)
        self.mean, self.sd = part.mean(0), part.std(0) + 1e-9
        levels = np.linspace(0, 1, hinges + 2)[1:-1]
        self.knots = np.quantile(part, levels, axis=0) if hinges else np.empty((0, part.shape[1]))
        self.categories = [(k, np.unique(values[:, k])) for k in categorical]
        raw = self._raw(values)
        self.centre, self.spread = raw.mean(0), raw.std(0) + 1e-6

    @property
    def expands(self) -> bool:
        """Whether there are other features than the table's own columns."""
        return bool(self.quadratic or len(self.knots) or self.categories)

    @property
    def width(self) -> int:
        """How many features there are."""
        return len(self.centre)

    def _raw(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        part = np.clip(values[:, self.continuous], self.low, self.high)
        scaled = (part - self.mean) / self.sd
        columns = [scaled]
        if self.quadratic:
            columns.append(scaled**2)
        for knot in self.knots:
            columns += [np.maximum(part - knot, 0) / self.sd, np.maximum(knot - part, 0) / self.sd]
        columns += [values[:, [k]] == known for k, known in self.categories]
        return np.concatenate(columns, axis=1, dtype=np.float64)

    def __call__(self, table: ArrayLike) -> Tensor:
        """Features of any rows, float32, shape (N, F)."""
        raw = self._raw(np.asarray(table, np.float64))
        return torch.from_numpy(((raw - self.centre) / self.spread).astype(np.float32))  # (N, F)

    def scaled(self, table: ArrayLike) -> NDArray[np.float32]:
        """Continuous columns in standard deviations, not clamped, shape (N, continuous)."""
        part = np.asarray(table, np.float64)[:, self.continuous]
        return np.asarray((part - self.mean) / self.sd, np.float32)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as plain numbers."""
        arrays = ("low", "high", "mean", "sd", "knots", "centre", "spread")
        return {
            **{name: getattr(self, name).tolist() for name in arrays},
            "quadratic": self.quadratic,
            "continuous": self.continuous,
            "categories": [[k, known.tolist()] for k, known in self.categories],
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Expansion:
        """Make it again from its state.

        Raises:
            KeyError: The state lacks something.
            ValueError: Its parts do not fit each other.
        """
        made = cls.__new__(cls)
        for name in ("low", "high", "mean", "sd", "centre", "spread"):
            setattr(made, name, np.asarray(state[name], np.float64))
        count = len(made.mean)
        made.knots = np.asarray(state["knots"], np.float64).reshape(len(state["knots"]), count)
        made.quadratic = bool(state["quadratic"])
        made.continuous = [int(k) for k in state["continuous"]]
        made.categories = [
            (int(k), np.asarray(known, np.float64)) for k, known in state["categories"]
        ]
        columns = count + len(made.categories)
        probe = np.zeros((1, columns))
        if made._raw(probe).shape[1] != len(made.centre) or len(made.centre) != len(made.spread):
            raise ValueError(f"{len(made.centre)} features do not fit {columns} covariates")
        return made


@dataclass(frozen=True)
class Environment:
    """Covariates that a model was trained with.

    Attributes:
        names: Of the columns.
        sources: Rasters that they were read from.
        crs: Of easting and northing, the last two columns, or None without location.
        fingerprint: Of the rasters.
        expansion: Of the columns.
    """

    names: tuple[str, ...]
    sources: tuple[str, ...]
    crs: str | None
    fingerprint: str
    expansion: Expansion

    def features(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Features that heads read, (..., C) to (..., F), NaN where any covariate is."""
        flat = values.reshape(-1, len(self.names))
        found = self.expansion(flat).numpy().copy()  # (N, F)
        found[~np.isfinite(flat).all(axis=1)] = np.nan
        return found.reshape(*values.shape[:-1], self.expansion.width)

    def scaled(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Continuous covariates in standard deviations trained on, (..., C) to (..., S)."""
        flat = values.reshape(-1, len(self.names))
        return self.expansion.scaled(flat).reshape(*values.shape[:-1], -1)

    def save(self) -> dict[str, Any]:
        """What a checkpoint's JSON keeps."""
        return {
            "names": list(self.names),
            "sources": list(self.sources),
            "crs": self.crs,
            "fingerprint": self.fingerprint,
            "expansion": self.expansion.state(),
        }

    @classmethod
    def load(cls, facts: dict[str, Any]) -> Environment:
        """Read what `save` gave."""
        return cls(
            tuple(facts["names"]),
            tuple(facts["sources"]),
            facts["crs"],
            facts["fingerprint"],
            Expansion.restore(facts["expansion"]),
        )
