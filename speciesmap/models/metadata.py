"""Where and when: latitude, longitude, month and day as a vector added to an embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from speciesmap.errors import ConfigError

FIELDS = ("latitude", "longitude", "month", "day")
"""Columns of metadata, in order: degrees, degrees, 1 to 12, 1 to 31; NaN where not known."""


def location_waves(metadata: Tensor) -> Tensor:
    """Sines and cosines of latitude and longitude, shape (N, 4); NaN where either is missing.

    Latitude spans half a turn from pole to pole, so that the poles are opposite and every latitude
    has its own sine. (BirdSAT's released code takes a whole turn, which makes both poles one.)

    Args:
        metadata: Columns as in `FIELDS`, shape (N, 4).
    """
    angles = metadata[:, :2].double() * (math.pi / 180)  # (N, 2)
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (N, 4)
    return waves.float().masked_fill(waves.isnan().any(1, keepdim=True), torch.nan)


def date_waves(metadata: Tensor) -> Tensor:
    """Sines and cosines of month and day, shape (N, 4); NaN where the month is missing.

    Month over 12 and day over 31 (Sastry et al. 2024, BirdSAT). Without a day its two waves are 0,
    which is their mean over days 1 to 31: through a linear layer, the mean of the month's days.

    Args:
        metadata: Columns as in `FIELDS`, shape (N, 4).
    """
    turns = metadata[:, 2:].double() / torch.tensor([12, 31], device=metadata.device)
    waves = torch.cat([(turns * math.tau).sin(), (turns * math.tau).cos()], 1)  # (N, 4)
    known = torch.where(waves.isnan(), 0.0, waves).float()
    return known.masked_fill(metadata[:, 2:3].isnan(), torch.nan)


class MetadataEncoder(nn.Module):
    """A learned vector for a place and a date; zero before training.

    Location and date pass through one linear layer each, and their sum is added to an embedding.
    What is missing (NaN) adds nothing. In training each is dropped from a row with probability
    `dropout`, so that both stay optional; never at evaluation.

    Args:
        dim: Size of the embedding.
        dropout: Probability that a row loses its location, and that it loses its date.
    """

    def __init__(self, dim: int, dropout: float = 0.25) -> None:
        super().__init__()
        self.location, self.date = nn.Linear(4, dim), nn.Linear(4, dim)
        for layer in (self.location, self.date):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.dropout = dropout

    def forward(self, metadata: Tensor) -> Tensor:
        """Vectors to add.

        Args:
            metadata: Columns as in `FIELDS`, shape (N, 4).

        Returns:
            Shape (N, D).
        """
        total = torch.zeros((), device=metadata.device)
        for layer, waves in (
            (self.location, location_waves(metadata)),
            (self.date, date_waves(metadata)),
        ):
            known = ~waves.isnan().any(1, keepdim=True)  # (N, 1)
            if self.training:
                known &= torch.rand(len(waves), 1, device=waves.device) >= self.dropout
            total = total + layer(waves.nan_to_num(0.0)) * known  # (N, D)
        return total

    def month(self, number: int) -> Tensor:
        """Vector of a month at no place in particular, the mean of its days, shape (D,).

        Args:
            number: 1 to 12.

        Raises:
            ConfigError: There is no such month.
        """
        if not 1 <= number <= 12:
            raise ConfigError(f"there is no month {number}; give 1 to 12")
        fields = torch.tensor([[torch.nan, torch.nan, number, torch.nan]])
        with torch.inference_mode():
            vector: Tensor = self.date(date_waves(fields.to(self.date.weight.device)))[0]  # (D,)
        return vector
