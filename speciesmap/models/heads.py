"""Learned embeddings of taxa."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TaxonHead(nn.Module):
    """A unit vector for each taxon; suitability is logistic in its cosine with a place.

    Where the model reads covariates too, their features add to the logit.

    Args:
        taxa: How many.
        dim: Size of the joint space.
        beside: Number of features of covariates.

    Attributes:
        gain: Slope in logits per unit of cosine, 10 at the start, positive, shape (T,).
        offset: Shape (T,).
        covariates: Weights of the features of covariates, in logits, shape (T, F); None without.
    """

    def __init__(self, taxa: int, dim: int, beside: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(taxa, dim))
        self.gain = nn.Parameter(torch.full((taxa,), 10.0))
        self.offset = nn.Parameter(torch.zeros(taxa))
        self.covariates = nn.Parameter(torch.zeros(taxa, beside)) if beside else None

    @classmethod
    def of_weights(cls, weight: Tensor, offset: Tensor, dim: int) -> TaxonHead:
        """The head of linear weights.

        Args:
            weight: On unit embeddings and then features of covariates, shape (T, D + F).
            offset: In logits, shape (T,).
            dim: D.
        """
        head = cls(len(weight), dim, beside=weight.shape[1] - dim)
        with torch.no_grad():
            head.weight.copy_(F.normalize(weight[:, :dim], dim=1))
            head.gain.copy_(weight[:, :dim].norm(dim=1).clamp(min=1e-6))
            head.offset.copy_(offset)
            if head.covariates is not None:
                head.covariates.copy_(weight[:, dim:])
        return head

    @property
    def vectors(self) -> Tensor:
        """Unit vectors, shape (T, D)."""
        return F.normalize(self.weight, dim=1)

    def forward(self, places: Tensor) -> Tensor:
        """Logits of suitability, shape (N, T).

        Args:
            places: Unit embeddings, shape (N, D), and with covariates their features, (N, D + F).
        """
        dim = self.weight.shape[1]
        logits = places[:, :dim] @ self.vectors.T * self.gain + self.offset  # (N, T)
        if self.covariates is None:
            return logits
        return logits + places[:, dim:] @ self.covariates.T  # (N, T)

    @torch.no_grad()
    def recalibrate(self, taxon: int, slope: float, intercept: float) -> None:
        """Replace a taxon's logit by `slope * logit + intercept`."""
        self.gain[taxon] *= slope
        self.offset[taxon] = slope * self.offset[taxon] + intercept
        if self.covariates is not None:
            self.covariates[taxon] *= slope
