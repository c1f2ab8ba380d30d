"""Learned embeddings of taxa."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TaxonHead(nn.Module):
    """A unit vector for each taxon; suitability is logistic in its cosine with a place.

    Args:
        taxa: How many.
        dim: Size of the joint space.
        gain: Slope at the start, in logits per unit of cosine.

    Attributes:
        gain: Shape (T,), positive.
        offset: Shape (T,).
    """

    def __init__(self, taxa: int, dim: int, gain: float = 10.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(taxa, dim))
        self.gain = nn.Parameter(torch.full((taxa,), gain))
        self.offset = nn.Parameter(torch.zeros(taxa))

    @property
    def vectors(self) -> Tensor:
        """Unit vectors, shape (T, D)."""
        return F.normalize(self.weight, dim=1)

    def forward(self, places: Tensor) -> Tensor:
        """Logits of suitability at unit embeddings (N, D), shape (N, T)."""
        return places @ self.vectors.T * self.gain + self.offset  # (N, T)
