"""Masked image modelling (MAE, He et al. 2022) of windows, on any timm vision transformer."""

from __future__ import annotations

import torch
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


class MaskedAutoencoder(nn.Module):
    """A tower's transformer sees a quarter of the patches; a small decoder paints the others.

    Only the visible patches are encoded. Loss is the mean squared error on masked patches, whose
    pixels are standardised patch by patch (He et al. 2022, section 3).

    Args:
        tower: Image tower whose backbone is a timm `VisionTransformer` with a class token or none.
        mask_ratio: Share of patches hidden.
        dim: Decoder's token size.
        depth: Decoder's blocks.
        heads: Decoder's attention heads.

    Raises:
        ModelError: The backbone is no such vision transformer.
    """

    positions: Tensor

    def __init__(
        self, tower: ImageTower, mask_ratio: float, dim: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        vit = tower.backbone
        if not isinstance(vit, VisionTransformer):
            raise ModelError(
                f"masked image modelling needs a vision transformer, got {type(vit).__name__}; "
                "choose a timm model such as vit_small_patch16_224"
            )
        rows, columns = vit.patch_embed.grid_size
        prefix = int(vit.cls_token is not None)
        if vit.pos_embed is None or vit.pos_embed.shape[1] != prefix + rows * columns:
            raise ModelError(
                "masked image modelling needs one learned position per patch and class token, and "
                "no register tokens; choose a timm model such as vit_small_patch16_224"
            )
        self.tower = tower
        self.mask_ratio = mask_ratio
        self.patch = vit.patch_embed.patch_size[0]
        with torch.no_grad():
            vit.pos_embed.zero_()
            vit.pos_embed[0, prefix:] = sincos_positions(rows, columns, vit.embed_dim)
        self.embed = nn.Linear(vit.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("positions", sincos_positions(rows, columns, dim), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.paint = nn.Linear(dim, self.patch**2 * len(tower.mean))

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Reconstruction loss of one batch of raw pixels, shape (N, B, P, P)."""
        vit = self.tower.backbone
        pixels = self.tower.normalise(images)
        tokens = vit.patch_embed(pixels).flatten(1, -2)  # (N, L, E), also of a grid of tokens
        prefix = vit.num_prefix_tokens
        tokens = tokens + vit.pos_embed[:, prefix:]
        count, length, width = tokens.shape
        keep = max(1, round(length * (1 - self.mask_ratio)))
        noise = torch.rand(count, length, generator=generator, device=tokens.device)
        order = noise.argsort(1)  # (N, L)
        seen, hidden = order[:, :keep], order[:, keep:]
        visible = tokens.gather(1, seen[..., None].expand(-1, -1, width))  # (N, K, E)
        if vit.cls_token is not None:
            first = (vit.cls_token + vit.pos_embed[:, :1]).expand(count, -1, -1)
            visible = torch.cat([first, visible], 1)  # (N, 1 + K, E)
        encoded = vit.norm(vit.blocks(visible))[:, prefix:]  # (N, K, E)

        full = self.mask_token.expand(count, length, -1)
        at_seen = seen[..., None].expand(-1, -1, full.shape[2])
        embedded = self.embed(encoded)
        full = full.to(embedded.dtype).scatter(1, at_seen, embedded) + self.positions  # (N, L, W)
        for block in self.blocks:
            full = block(full)
        at_hidden = hidden[..., None].expand(-1, -1, full.shape[2])
        painted = self.paint(self.norm(full.gather(1, at_hidden)))  # (N, L - K, p * p * B)
        wanted = self.patches(pixels).gather(
            1, hidden[..., None].expand(-1, -1, painted.shape[2])
        )  # (N, L - K, p * p * B)
        loss: Tensor = (painted.float() - wanted).square().mean()
        return loss

    def patches(self, pixels: Tensor) -> Tensor:
        """Cut (N, B, P, P) into standardised patches, shape (N, L, p * p * B)."""
        cut = nn.functional.unfold(pixels, self.patch, stride=self.patch).transpose(1, 2)
        mean, var = cut.mean(2, keepdim=True), cut.var(2, keepdim=True)
        return (cut - mean) / (var + 1e-6).sqrt()  # (N, L, p * p * B)
