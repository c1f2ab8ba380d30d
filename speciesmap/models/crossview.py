"""The pair encoder of CVM-MAE: one transformer over a class token, a photo and a window.

Cross-view metadata-aware masked autoencoder (Sastry et al. 2024, BirdSAT). It scores whether a
photo and a window show one place, so it re-ranks what separate towers retrieve.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from speciesmap.errors import ModelError
from speciesmap.models.encoders import ImageTower
from speciesmap.models.masked import (
    Painter,
    draw_mask,
    maskable,
    patch_tokens,
    start_positions,
    transform,
)
from speciesmap.models.metadata import MetadataEncoder


def tie(aerial: ImageTower, ground: ImageTower) -> None:
    """Make two towers share one transformer: its blocks, its last norm and its class token.

    Each keeps its own patches, positions and projection, so that either view can still be encoded
    alone.

    Raises:
        ModelError: Their transformers are not of one shape, or have no class token.
    """
    above, below = maskable(aerial), maskable(ground)
    shapes = [
        {n: tuple(p.shape) for n, p in vit.blocks.named_parameters()} for vit in (above, below)
    ]
    if above.cls_token is None or below.cls_token is None or shapes[0] != shapes[1]:
        raise ModelError(
            "one encoder of both views needs two vision transformers with a class token and the "
            f"same width, depth and heads; these are {above.embed_dim} wide with "
            f"{len(above.blocks)} blocks and {below.embed_dim} wide with {len(below.blocks)}"
        )
    below.blocks, below.norm, below.norm_pre = above.blocks, above.norm, above.norm_pre
    below.cls_token = above.cls_token


class PairMatcher(nn.Module):
    """Tells from the joint class token, and from where and when, whether two views match.

    Args:
        aerial: Aerial tower; its transformer becomes that of both.
        ground: Ground tower.
        metadata: Arguments of the `MetadataEncoder`, if there is one; its vector is added to the
            class token.

    Raises:
        ModelError: The towers cannot share a transformer.
    """

    def __init__(
        self, aerial: ImageTower, ground: ImageTower, metadata: dict[str, Any] | None
    ) -> None:
        super().__init__()
        tie(aerial, ground)
        self.towers = [ground, aerial]  # in a list: their state is the model's
        width = aerial.backbone.embed_dim
        self.metadata = MetadataEncoder(width, **metadata) if metadata else None
        self.match = nn.Linear(width, 1)

    def forward(self, photos: Tensor, windows: Tensor, metadata: Tensor | None) -> Tensor:
        """Logits of a match, pair by pair, with nothing hidden.

        Args:
            photos: Raw pixels, shape (N, 3, P, P).
            windows: Raw pixels, shape (N, B, W, W).
            metadata: Of the windows, as `MetadataEncoder` takes it, shape (N, 4).

        Returns:
            Shape (N,).
        """
        tokens = [
            patch_tokens(tower.backbone, tower.normalise(images))
            for tower, images in zip(self.towers, (photos, windows), strict=True)
        ]
        token = transform(self.towers[1].backbone, torch.cat(tokens, 1))[:, 0]  # (N, E)
        if metadata is not None and self.metadata is not None:
            token = token + self.metadata(metadata)
        return self.match(token)[:, 0]  # type: ignore[no-any-return]  # (N,)


class CrossViewAutoencoder(nn.Module):
    """Hides patches of both views jointly and paints each with its own pixel head.

    Args:
        aerial: Aerial tower, tied to `ground`.
        ground: Ground tower.
        mask_ratio: Share hidden of all patches of a pair.
        dim: Decoder's token size.
        depth: Decoder's blocks.
        heads: Decoder's attention heads.
        standardise: As for `Painter`.
        keep_positions: As for `MaskedAutoencoder`.
    """

    def __init__(
        self,
        aerial: ImageTower,
        ground: ImageTower,
        mask_ratio: float,
        dim: int,
        depth: int,
        heads: int,
        standardise: bool = True,
        keep_positions: bool = False,
    ) -> None:
        super().__init__()
        self.painter = Painter([ground, aerial], mask_ratio, dim, depth, heads, standardise)
        self.aerial, self.ground = aerial, ground
        self.mask_ratio = mask_ratio
        if not keep_positions:
            start_positions(aerial)
            start_positions(ground)

    def forward(
        self, photos: Tensor, windows: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction losses of ground and aerial views, given raw pixels."""
        pixels = [self.ground.normalise(photos), self.aerial.normalise(windows)]
        towers = (self.ground, self.aerial)
        tokens = torch.cat(
            [patch_tokens(t.backbone, p) for t, p in zip(towers, pixels, strict=True)], 1
        )  # (N, L, E)
        visible, seen, hidden = draw_mask(tokens, self.mask_ratio, generator)
        encoded = transform(self.aerial.backbone, visible)[:, 1:]  # (N, K, E)
        ground, aerial = self.painter(encoded, seen, hidden, pixels)
        return ground, aerial
