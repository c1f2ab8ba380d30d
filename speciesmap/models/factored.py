"""A window encoder in two parts, of which the heavy one can be shared between windows.

A cell encoder sees squares of the imagery one by one and nothing around them; a light transformer
then looks at the cells of one window. Overlapping windows that start on the same grid have cells
in common, and a cell's token does not depend on the window it is in: encoding each cell once and
running only the light part per window gives what encoding every window by itself gives. The
two-stage design follows hierarchical image pyramid transformers (Chen et al. 2022). The last layer
is asked by the window alone, as in class attention (Touvron et al. 2021, CaiT, section 3): what it
would make of the single cells is not needed.

A window begins as little more than the mean of its cells, as a plain encoder begins with the mean
of its features: layers add a tenth of what they find, and positions add nothing to the mean. The
sines and cosines of a few positions are nearly all ones and zeros, and drowned the cells' looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from speciesmap.errors import ModelError
from speciesmap.models.encoders import ImageTower
from speciesmap.models.masked import sincos_positions

SCALE = 0.1  # of what a layer adds at first (LayerScale: Touvron et al. 2021, CaiT, section 2)


class Overview(nn.Module):
    """A transformer layer over cells that the window as a whole asks, beginning as their mean."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.norm_mixed = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.scale_seen, self.scale_mixed = (
            nn.Parameter(torch.full((width,), SCALE)) for _ in range(2)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of the cells of N windows, (N, T, W), to one of each window, (N, W)."""
        window = tokens.mean(1, keepdim=True)  # (N, 1, W)
        query = self.query(self.norm(window)).unflatten(2, (self.heads, -1))  # (N, 1, H, W / H)
        pair = self.key_value(self.norm(tokens)).unflatten(2, (2, self.heads, -1))
        key, value = pair.transpose(1, 3).unbind(2)  # (N, H, T, W / H)
        seen = F.scaled_dot_product_attention(query.transpose(1, 2), key, value)
        mixed = self.project(seen.transpose(1, 2).flatten(2))
        window = window + self.scale_seen * mixed  # (N, 1, W)
        window = window + self.scale_mixed * self.mlp(self.norm_mixed(window))
        point: Tensor = window.squeeze(1)  # (N, W)
        return point


class FactoredTower(nn.Module):
    """Raw pixels of a window to a point of the joint space, by way of its cells.

    Args:
        backbone: Name of any timm model, which encodes cells.
        image_px: Side of the window, a multiple of `cell_px`.
        mean: Mean of each band in raw pixel units.
        std: Standard deviation of each band in raw pixel units.
        dim: Size of the joint space.
        cell_px: Side of a cell.
        width: Size of a cell's token, a multiple of `heads` and of 4.
        layers: Transformer layers over a window's cells, at least one.
        heads: Attention heads of a block.
        pretrained: Start the cell encoder from timm's weights.
        kwargs: Further arguments of `timm.create_model`.

    Attributes:
        cells: The cell encoder.
        side: Cells along a window's side.

    Raises:
        ModelError: The sizes do not fit each other, or timm cannot build the cell encoder.
    """

    def __init__(
        self,
        backbone: str,
        image_px: int,
        mean: Sequence[float],
        std: Sequence[float],
        dim: int,
        *,
        cell_px: int,
        width: int,
        layers: int,
        heads: int,
        pretrained: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if image_px % cell_px:
            raise ModelError(
                f"windows of {image_px} px hold no whole number of cells of {cell_px} px; choose "
                "a factored.cell_px that divides the window"
            )
        if width % heads or width % 4:
            raise ModelError(
                f"tokens of size {width} do not fit {heads} heads; choose a factored.width that "
                "is a multiple of factored.heads and of 4"
            )
        self.cell_px = cell_px
        self.side = image_px // cell_px
        self.cells = ImageTower(backbone, cell_px, mean, std, width, pretrained, kwargs)
        nn.init.orthogonal_(self.cells.project.weight)  # keeps angles: another one follows
        nn.init.zeros_(self.cells.project.bias)
        positions = sincos_positions(self.side, self.side, width)
        self.positions = nn.Parameter(positions - positions.mean(0))  # so that means are of looks
        between = (Block(width, heads, qkv_bias=True, init_values=SCALE) for _ in range(layers - 1))
        self.blocks = nn.Sequential(*between)
        self.overview = Overview(width, heads)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each band in raw pixel units, shape (B, 1, 1)."""
        return self.cells.std

    def encode_cells(self, cells: Tensor) -> Tensor:
        """Encode raw pixels of cells, (N, B, S, S), each by itself, to tokens (N, W)."""
        tokens: Tensor = self.cells(cells)
        return tokens

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Look at the cells of each window together.

        Args:
            tokens: Of the cells of N windows, row by row, shape (N, side * side, W).

        Returns:
            Points of the joint space, not normalised, shape (N, D).
        """
        mixed = self.blocks(tokens + self.positions)  # (N, side * side, W)
        point: Tensor = self.project(self.norm(self.overview(mixed)))  # (N, D)
        return point

    def forward(self, images: Tensor) -> Tensor:
        """Encode windows by themselves.

        Args:
            images: Any number type, raw pixel values, shape (N, B, P, P).

        Returns:
            Points of the joint space, not normalised, shape (N, D).
        """
        count, bands = images.shape[:2]
        side, px = self.side, self.cell_px
        cells = images.reshape(count, bands, side, px, side, px)
        cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # (N * side * side, B, S, S)
        tokens = self.encode_cells(cells).reshape(count, side * side, -1)  # (N, side * side, W)
        return self.encode_tokens(tokens)
