"""The text tower: names to points of the joint space.

Either a small transformer trained jointly with the images on lineage prompts, or the frozen text
tower of an open_clip model such as BioCLIP, by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import open_clip
import torch
from torch import Tensor, nn

from speciesmap.errors import ModelError
from speciesmap.models.hub import hub_or_cache

MOST_CHARACTERS = 1000
"""Of a prompt; the time of splitting a word into tokens grows with the square of its length."""


@cache
def _tokenizer(context_length: int) -> open_clip.SimpleTokenizer:
    """Read open_clip's vocabulary once; it takes longer than building a small model."""
    return open_clip.SimpleTokenizer(context_length=context_length)


class TextTower(nn.Module):
    """open_clip's text transformer, small and trained from scratch.

    Args:
        dim: Size of the joint space.
        width: Token size.
        layers: Transformer blocks.
        heads: Attention heads.
        context_length: Longest prompt in tokens; longer ones are cut.

    Raises:
        ModelError: `width` is not a multiple of `heads`.
    """

    def __init__(
        self, dim: int, width: int = 128, layers: int = 2, heads: int = 4, context_length: int = 32
    ) -> None:
        super().__init__()
        if width % heads:
            raise ModelError(
                f"text.width {width} cannot be shared by {heads} text.heads; give a multiple"
            )
        self.tokenizer = _tokenizer(context_length)
        self.transformer = open_clip.transformer.TextTransformer(
            context_length=context_length,
            vocab_size=self.tokenizer.vocab_size,
            width=width,
            layers=layers,
            heads=heads,
            output_dim=dim,
        )

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts, N strings to shape (N, D), not normalised."""
        tokens = self.tokenizer([prompt[:MOST_CHARACTERS] for prompt in prompts]).to(
            self.transformer.token_embedding.weight.device
        )
        return self.transformer(tokens)  # type: ignore[no-any-return]  # (N, L) -> (N, D)


class HubTextTower(nn.Module):
    """The frozen text tower of an open_clip model, and a learned projection.

    Its weights are the hub's and are not stored in checkpoints; the name is.

    Args:
        dim: Size of the joint space.
        name: What `open_clip.create_model` takes: `hf-hub:imageomics/bioclip`, or
            `local-dir:PATH` for a folder in the hub's layout.

    Raises:
        ModelError: The model or its weights cannot be had.
    """

    def __init__(self, dim: int, name: str) -> None:
        super().__init__()
        try:
            with nullcontext() if name.startswith("local-dir:") else hub_or_cache():
                model = open_clip.create_model(name, require_pretrained=True)
                self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # the hub's client raises many kinds
            raise ModelError(
                f"text model {name!r} cannot be loaded ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); check the name and the network, or give "
                "local-dir:PATH"
            ) from error
        self.frozen = [model.eval().requires_grad_(False)]  # in a list: no part of the state
        with torch.no_grad():
            width = model.encode_text(self.tokenizer(["a"])).shape[-1]
        self.project = nn.Linear(width, dim)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts, N strings to shape (N, D), not normalised."""
        device = self.project.weight.device
        model = self.frozen[0].to(device)
        with torch.no_grad():
            features = model.encode_text(
                self.tokenizer([prompt[:MOST_CHARACTERS] for prompt in prompts]).to(device)
            )  # (N, F)
        return self.project(features)  # type: ignore[no-any-return]  # (N, D)
