"""Models of the engine's protocol whose embeddings are known in closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speciesmap.taxa import Taxon


class FakeModel(nn.Module):
    """What the engine and queries need of a model; counts the windows that it encodes."""

    def __init__(
        self,
        bands: tuple[str, ...] = ("red", "green", "blue"),
        window_px: int = 16,
        resolution_m: float = 1.0,
        dim: int = 8,
        fingerprint: str = "fake",
    ) -> None:
        super().__init__()
        self.bands, self.window_px, self.resolution_m = bands, window_px, resolution_m
        self.dim, self.fingerprint = dim, fingerprint
        self.fill = tuple(100.0 + 10 * i for i in range(len(bands)))
        self.taxa = (
            Taxon("Quercus agrifolia"),
            Taxon("Quercus lobata"),
            Taxon("Ariolimax dolichophallus"),
        )
        vectors = F.normalize(torch.eye(len(self.taxa), dim) + 0.1, dim=1)
        self.head = SimpleNamespace(
            vectors=vectors,
            gain=torch.full((3,), 4.0),
            offset=torch.tensor([0.0, -1.0, 1.0]),
            covariates=None,
        )
        self.prevalence = {"Quercus lobata": 0.5}
        self.reference = F.normalize(torch.randn(64, dim, generator=torch.manual_seed(1)), dim=1)
        self.ground = self.text = self.factored = None
        self.joined, self.names = True, ()
        self.trust = self.environment = self.values = None
        self.architecture = SimpleNamespace(aerial={"backbone": "fake"})
        self.batches: list[int] = []

    @property
    def encoded(self) -> int:
        return sum(self.batches)

    def encode_aerial(self, windows: Tensor) -> Tensor:
        self.batches.append(len(windows))
        return self.embed_windows(windows)

    def embed_windows(self, windows: Tensor) -> Tensor:
        """A fixed random projection of all raw pixels: any pixel out of place shows."""
        pixels = windows.float().flatten(1) / 255
        weight = torch.randn(pixels.shape[1], self.dim, generator=torch.manual_seed(0))
        return F.normalize(pixels.to(weight) @ weight, dim=1)


class BlobModel(FakeModel):
    """Taxon 0's cosine grows with how near the window's centre its bright pixels lie."""

    def embed_windows(self, windows: Tensor) -> Tensor:
        bright = (windows.float().amin(dim=1) > 200).float()  # (N, P, P)
        place = torch.arange(self.window_px) + 0.5 - self.window_px / 2
        distance = torch.hypot(place[:, None], place[None, :])
        weight = (1 - distance / distance.max()).clamp(min=0)
        share = (bright * weight).sum(dim=(1, 2)) / (bright.sum(dim=(1, 2)) + 1e-6)
        angle = (1 - share) * math.pi / 2
        vectors = torch.zeros(len(windows), self.dim)
        vectors[:, 0], vectors[:, 3] = angle.cos(), angle.sin()
        return vectors

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.head.vectors = torch.eye(3, self.dim)
