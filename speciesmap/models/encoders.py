"""Image towers: any timm backbone, with its normalisation inside and a projection on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from speciesmap.errors import ModelError
from speciesmap.models.hub import hub_or_cache
from speciesmap.taxa import nearest

MOST_OF_KWARGS = 100_000
OF_TIMM = {"cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Arguments of `timm.create_model` that read files, which configs and checkpoints may not name."""


def _largest(value: Any) -> float:
    """The largest number in the arguments of a backbone."""
    if isinstance(value, Mapping | list | tuple):
        parts = value.values() if isinstance(value, Mapping) else value
        return max(map(_largest, parts), default=0)
    return value if isinstance(value, int | float) else 0


class ImageTower(nn.Module):
    """Raw pixels of one view to a point of the joint space.

    Args:
        backbone: Name of any timm model.
        image_px: Side of the square input.
        mean: Mean of each band in raw pixel units; its length is the number of bands.
        std: Standard deviation of each band in raw pixel units.
        dim: Size of the joint space.
        pretrained: Start from timm's weights (from the hub; timm adapts them to the number of
            bands by repeating and rescaling the first layer).
        kwargs: Further arguments of `timm.create_model`, for example `patch_size`.

    Raises:
        ModelError: timm has no such model or weights, or does not take these arguments, or patches
            do not fill the image.
    """

    backbone: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str,
        image_px: int,
        mean: Sequence[float],
        std: Sequence[float],
        dim: int,
        pretrained: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not timm.is_model(backbone):
            close = nearest(backbone, timm.list_models()) or ["vit_small_patch16_224", "resnet50"]
            raise ModelError(f"timm has no model {backbone!r}; did you mean {', '.join(close)}?")
        options = dict(kwargs or {})
        if _largest(options) > MOST_OF_KWARGS or options.keys() & OF_TIMM:
            raise ModelError(
                f"{backbone!r} cannot be built with {options!r:.200}: a number is over "
                f"{MOST_OF_KWARGS}, or one of {', '.join(sorted(OF_TIMM))} is set"
            )
        try:
            fixed = getattr(timm.get_pretrained_cfg(backbone), "fixed_input_size", False)
        except RuntimeError:
            fixed = False
        if fixed:
            options.setdefault("img_size", image_px)
        try:
            with hub_or_cache() if pretrained else nullcontext():
                self.backbone = timm.create_model(
                    backbone, pretrained=pretrained, in_chans=len(mean), num_classes=0, **options
                )
        except (TypeError, AssertionError, ValueError) as error:
            raise ModelError(f"timm cannot build {backbone!r} with {options}: {error}") from error
        except Exception as error:  # the hub's client raises many kinds
            if not pretrained:
                raise
            raise ModelError(
                f"timm's weights of {backbone!r} cannot be had ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); check the network, or set pretrained: false"
            ) from error
        cut = getattr(self.backbone, "patch_embed", None)
        grid = getattr(cut, "grid_size", None)
        if grid is not None and 0 in grid:
            raise ModelError(
                f"{backbone!r} with {options} cuts patches larger than the image of {image_px} px; "
                "give a smaller patch_size in kwargs, or larger images"
            )
        if isinstance(cut, PatchEmbed) and not (cut.strict_img_size or cut.dynamic_img_pad):
            patch_px = cut.patch_size[0]
            if image_px % patch_px:
                raise ModelError(
                    f"{backbone!r} cuts patches of {patch_px} px, which do not fill an image of "
                    f"{image_px} px; give one of {image_px - image_px % patch_px} px, or another "
                    "patch_size in kwargs"
                )
        self.image_px = image_px
        self.project = nn.Linear(self.backbone.num_features, dim)
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """Standardise raw pixels band by band, (N, B, P, P) to (N, B, P, P) float32."""
        return (images.to(torch.float32) - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Encode raw pixels.

        Args:
            images: Any number type, raw pixel values, shape (N, B, P, P).

        Returns:
            Points of the joint space, not normalised, shape (N, D).
        """
        features = self.backbone(self.normalise(images))  # (N, F)
        return self.project(features)  # type: ignore[no-any-return]  # (N, D)
