"""Masked image modelling (MAE, He et al. 2022) of either view, on any timm vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from speciesmap.errors import ModelError
from speciesmap.models.encoders import ImageTower


def sincos_positions(rows: int, columns: int, dim: int) -> Tensor:
    """Two-dimensional sine-cosine positions (Vaswani et al. 2017, applied per axis).

    Args:
        rows: Patches down.
        columns: Patches across.
        dim: Size of a token, a multiple of 4.

    Returns:
        Shape (rows * columns, dim), row by row.
    """
    quarter = torch.arange(dim // 4) / (dim // 4)
    frequency = 10_000.0**-quarter  # (dim / 4,)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (y, x)]  # each (rows * columns, dim / 4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


def maskable(tower: ImageTower) -> Any:
    """Give a tower's transformer if its patches can be hidden.

    Raises:
        ModelError: It is no timm `VisionTransformer` that cuts images into square patches, with one
            position per patch and at most a class token before them.
    """
    vit = tower.backbone
    if not isinstance(vit, VisionTransformer):
        raise ModelError(
            f"masked image modelling needs a vision transformer, got {type(vit).__name__}; "
            "choose a timm model such as vit_small_patch16_224"
        )
    cut = vit.patch_embed
    if not isinstance(cut, PatchEmbed) or cut.patch_size[0] != cut.patch_size[1]:
        raise ModelError(
            f"masked image modelling hides square patches, and the {type(cut).__name__} of this "
            f"transformer, {cut.patch_size}, makes none; choose a timm model such as "
            "vit_small_patch16_224"
        )
    rows, columns = vit.patch_embed.grid_size
    prefix = int(vit.cls_token is not None)
    if vit.pos_embed is None or vit.pos_embed.shape[1] != prefix + rows * columns:
        raise ModelError(
            "masked image modelling needs one learned position per patch and class token, and "
            "no register tokens; choose a timm model such as vit_small_patch16_224"
        )
    return vit


def start_positions(tower: ImageTower) -> None:
    """Set a new transformer's positions to two-dimensional sines and cosines."""
    vit = maskable(tower)
    rows, columns = vit.patch_embed.grid_size
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.pos_embed[0, vit.num_prefix_tokens :] = sincos_positions(rows, columns, vit.embed_dim)


def patch_tokens(vit: Any, pixels: Tensor) -> Tensor:
    """Turn standardised pixels (N, B, P, P) into tokens with their positions, shape (N, L, E)."""
    tokens = vit.patch_embed(pixels).flatten(1, -2)  # (N, L, E), also of a grid of tokens
    return tokens + vit.pos_embed[:, vit.num_prefix_tokens :]  # type: ignore[no-any-return]


def transform(vit: Any, tokens: Tensor) -> Tensor:
    """Encode patch tokens (N, K, E) behind the class token if there is one, (N, 1 + K, E)."""
    if vit.cls_token is not None:
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([first, tokens], 1)  # (N, 1 + K, E)
    return vit.norm(vit.blocks(vit.norm_pre(tokens)))  # type: ignore[no-any-return]


def kept(length: int, ratio: float) -> int:
    """How many of so many patches stay visible where a share is hidden."""
    return max(1, round(length * (1 - ratio)))


def draw_mask(
    tokens: Tensor, ratio: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hide a random share of each row's patches.

    Args:
        tokens: Shape (N, L, E).
        ratio: Share hidden, to the nearest patch; at least one is left.
        generator: Source of randomness.

    Returns:
        The visible tokens (N, K, E), their places in the row (N, K), and which of all places are
        hidden, bool (N, L).
    """
    count, length, width = tokens.shape
    keep = kept(length, ratio)
    noise = torch.rand(count, length, generator=generator, device=tokens.device)
    seen = noise.argsort(1)[:, :keep]  # (N, K)
    hidden = torch.ones_like(noise, dtype=torch.bool).scatter(1, seen, False)  # (N, L)
    return tokens.gather(1, seen[..., None].expand(-1, -1, width)), seen, hidden


class Painter(nn.Module):
    """The decoder: puts mask tokens where patches were hidden and paints the pixels of all.

    Args:
        towers: The views in the order of their patches; one pixel head for each.
        mask_ratio: Share of all patches hidden.
        dim: Token size.
        depth: Blocks.
        heads: Attention heads.
        standardise: Whether the pixels to paint are standardised patch by patch (He et al. 2022,
            section 3); BirdSAT paints them as they are.

    Raises:
        ModelError: A tower's transformer cannot be masked, or nothing would be hidden.
    """

    positions: Tensor

    def __init__(
        self,
        towers: Sequence[ImageTower],
        mask_ratio: float,
        dim: int,
        depth: int,
        heads: int,
        standardise: bool = True,
    ) -> None:
        super().__init__()
        vits = [maskable(tower) for tower in towers]
        grids = [vit.patch_embed.grid_size for vit in vits]
        self.patch = [vit.patch_embed.patch_size[0] for vit in vits]
        self.lengths = [rows * columns for rows, columns in grids]
        if kept(sum(self.lengths), mask_ratio) == sum(self.lengths):
            raise ModelError(
                f"masked.mask_ratio = {mask_ratio:g} hides none of {sum(self.lengths)} patches, so "
                "there is nothing to paint; give a larger share, or smaller patches"
            )
        self.standardise = standardise
        positions = torch.cat([sincos_positions(down, across, dim) for down, across in grids])
        self.register_buffer("positions", positions, persistent=False)  # (L, W)
        self.embed = nn.Linear(vits[0].embed_dim, dim)
        self.mask_tokens = nn.Parameter(torch.zeros(len(vits), dim))
        nn.init.normal_(self.mask_tokens, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleList(
            nn.Linear(dim, patch**2 * len(tower.mean))
            for patch, tower in zip(self.patch, towers, strict=True)
        )

    def forward(
        self, encoded: Tensor, seen: Tensor, hidden: Tensor, pixels: Sequence[Tensor]
    ) -> list[Tensor]:
        """Mean squared error on the hidden patches of each view.

        Args:
            encoded: Visible patches, shape (N, K, E).
            seen: Their places among the patches of all views, shape (N, K).
            hidden: Which patches to paint, bool, shape (N, L).
            pixels: Standardised images of each view, shape (N, B, P, P).

        Returns:
            One loss for each view.
        """
        repeats = torch.tensor(self.lengths, device=seen.device)
        full = self.mask_tokens.repeat_interleave(repeats, 0).expand(len(seen), -1, -1)  # (N, L, W)
        embedded = self.embed(encoded)
        at_seen = seen[..., None].expand(-1, -1, full.shape[2])
        full = full.to(embedded.dtype).scatter(1, at_seen, embedded) + self.positions  # (N, L, W)
        for block in self.blocks:
            full = block(full)
        losses = []
        for k, part in enumerate(torch.split(self.norm(full), self.lengths, 1)):
            painted = self.heads[k](part).float()  # (N, L_k, p * p * B)
            error = (painted - self.patches(pixels[k], self.patch[k])).square().mean(2)  # (N, L_k)
            counted = torch.split(hidden, self.lengths, 1)[k]  # (N, L_k)
            losses.append((error * counted).sum() / counted.sum().clamp(min=1))
        return losses

    def patches(self, pixels: Tensor, patch: int) -> Tensor:
        """Cut (N, B, P, P) into what is to be painted, shape (N, L, p * p * B)."""
        cut = nn.functional.unfold(pixels, patch, stride=patch).transpose(1, 2)
        if not self.standardise:
            return cut
        mean, var = cut.mean(2, keepdim=True), cut.var(2, keepdim=True)
        return (cut - mean) / (var + 1e-6).sqrt()  # (N, L, p * p * B)


class MaskedAutoencoder(nn.Module):
    """A tower's transformer sees a quarter of the patches; a small decoder paints the others.

    Only the visible patches are encoded, and the loss is over the hidden ones. Masking lives here
    alone: the tower itself always encodes every patch in its place.

    Args:
        tower: Image tower whose backbone is a timm `VisionTransformer` with a class token or none.
        mask_ratio: Share of patches hidden.
        dim: Decoder's token size.
        depth: Decoder's blocks.
        heads: Decoder's attention heads.
        standardise: As for `Painter`.
        keep_positions: Whether the tower's positions stay, as those of pre-trained weights must,
            instead of starting as sines and cosines.

    Raises:
        ModelError: The backbone is no such vision transformer, or nothing would be hidden.
    """

    def __init__(
        self,
        tower: ImageTower,
        mask_ratio: float,
        dim: int,
        depth: int,
        heads: int,
        standardise: bool = True,
        keep_positions: bool = False,
    ) -> None:
        super().__init__()
        self.painter = Painter([tower], mask_ratio, dim, depth, heads, standardise)
        self.tower = tower
        self.mask_ratio = mask_ratio
        if not keep_positions:
            start_positions(tower)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Reconstruction loss of one batch of raw pixels, shape (N, B, P, P)."""
        vit = self.tower.backbone
        pixels = self.tower.normalise(images)
        visible, seen, hidden = draw_mask(patch_tokens(vit, pixels), self.mask_ratio, generator)
        encoded = transform(vit, visible)[:, vit.num_prefix_tokens :]  # (N, K, E)
        loss: Tensor = self.painter(encoded, seen, hidden, [pixels])[0]
        return loss
