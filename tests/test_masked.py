"""Masked image modelling: hidden patches are predicted, and only from the visible ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from speciesmap.errors import ModelError
from speciesmap.models.encoders import ImageTower
from speciesmap.models.masked import MaskedAutoencoder, draw_mask, sincos_positions

NO_CLASS: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
both = pytest.mark.parametrize("kwargs", [{}, NO_CLASS], ids=["class token", "no class token"])


def autoencoder(
    kwargs: dict[str, Any], mask_ratio: float = 0.75, backbone: str = "test_vit"
) -> MaskedAutoencoder:
    torch.manual_seed(0)
    tower = ImageTower(
        backbone, 32, [0.0] * 3, [1.0] * 3, dim=8, kwargs={"patch_size": 8, **kwargs}
    )
    return MaskedAutoencoder(tower, mask_ratio, dim=16, depth=1, heads=2).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.manual_seed(1))


def shuffle(count: int, seed: int) -> Tensor:
    """The order of patches that a generator of this seed draws, shape (N, 16)."""
    return torch.rand(count, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)


def loss(model: MaskedAutoencoder, pixels: Tensor, seed: int) -> Tensor:
    with torch.inference_mode():
        value: Tensor = model(pixels, torch.Generator().manual_seed(seed))
    return value


@both
def test_visible_patches_are_encoded_as_by_the_transformer_itself(kwargs: dict[str, Any]) -> None:
    """With nothing hidden, whatever the shuffle, the encoding is timm's, patch by patch."""
    model = autoencoder(kwargs)
    model.mask_ratio = 0.0
    vit = model.tower.backbone
    pixels = images()
    with torch.inference_mode():
        wanted = vit.forward_features(pixels)[:, vit.num_prefix_tokens :]  # (N, 16, E)
    seen: list[Tensor] = []
    vit.norm.register_forward_hook(lambda *call: seen.append(call[2]))
    for seed in (0, 1):
        loss(model, pixels, seed)
        order = shuffle(2, seed)[..., None].expand_as(wanted)
        encoded = seen.pop()[:, vit.num_prefix_tokens :]
        assert torch.allclose(encoded, wanted.gather(1, order), atol=1e-4)


@both
def test_what_is_hidden_is_not_seen(kwargs: dict[str, Any]) -> None:
    """Hidden patches brightened and stretched have the same standardised target, so the same
    loss, unless the encoder looked at them; visible ones stretched change it."""
    model = autoencoder(kwargs)
    pixels = images(1)
    order = shuffle(1, seed=3)[0]

    def stretched(patches: Tensor) -> Tensor:
        other = pixels.clone()
        for patch in patches.tolist():
            row, col = 8 * (patch // 4), 8 * (patch % 4)
            other[:, :, row : row + 8, col : col + 8] *= 3
            other[:, :, row : row + 8, col : col + 8] += 5
        return other

    before = loss(model, pixels, 3)
    assert torch.allclose(loss(model, stretched(order[4:]), 3), before, rtol=1e-4)
    assert not torch.allclose(loss(model, stretched(order[:4]), 3), before, rtol=1e-4)


@both
def test_the_loss_is_over_hidden_patches_only(kwargs: dict[str, Any]) -> None:
    model = autoencoder(kwargs)
    pixels = images()
    painted: list[Tensor] = []
    model.painter.heads[0].register_forward_hook(lambda *call: painted.append(call[2]))
    value = loss(model, pixels, 5)
    errors = []
    for image, order, guess in zip(pixels, shuffle(2, seed=5), painted[0], strict=True):
        for patch in order[4:].tolist():
            row, col = 8 * (patch // 4), 8 * (patch % 4)
            cut = image[:, row : row + 8, col : col + 8].flatten()
            errors.append(((cut - cut.mean()) / cut.std() - guess[patch]).square().mean())
    assert torch.allclose(value, torch.stack(errors).mean(), rtol=1e-4)


@both
def test_training_moves_tower_and_decoder_to_a_lower_loss(kwargs: dict[str, Any]) -> None:
    model = autoencoder(kwargs).train()
    ramp = torch.linspace(-1, 1, 32).expand(8, 3, 32, 32)
    start = model.tower.backbone.patch_embed.proj.weight.detach().clone()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        optimiser.zero_grad()
        value = model(ramp, torch.Generator().manual_seed(step))
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model.tower.backbone.patch_embed.proj.weight, start)


def test_positions_are_distinct_and_bounded() -> None:
    positions = sincos_positions(5, 7, 16)
    assert positions.shape == (35, 16)
    assert positions.abs().max() <= 1
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1
    grid = sincos_positions(2, 3, 16).reshape(2, 3, 16)
    assert torch.equal(grid[0, :, :8], grid[0, :1, :8].expand(3, 8)), "first half tells the row"
    assert torch.equal(grid[:, 2, 8:], grid[:1, 2, 8:].expand(2, 8)), "second half the column"


def test_a_flat_window_has_a_finite_loss() -> None:
    model = autoencoder({}).train()
    value = model(torch.zeros(2, 3, 32, 32))
    value.backward()
    assert value.isfinite()


def test_other_backbones_are_refused() -> None:
    convolutions = ImageTower("test_resnet", 32, [0.0] * 3, [1.0] * 3, dim=8)
    with pytest.raises(ModelError, match=r"needs a vision transformer, got ResNet; choose"):
        MaskedAutoencoder(convolutions, 0.75, 16, 1, 2)
    hybrid = ImageTower("vit_tiny_r_s16_p8_224", 32, [0.0] * 3, [1.0] * 3, dim=8)
    with pytest.raises(ModelError, match=r"hides square patches, and the HybridEmbed .* makes no"):
        MaskedAutoencoder(hybrid, 0.75, 16, 1, 2)
    with pytest.raises(ModelError, match=r"hides square patches, .* \(4, 8\), makes none"):
        autoencoder({"patch_size": (4, 8)})
    for kwargs in ({"reg_tokens": 2}, {"no_embed_class": True}, {"pos_embed": "none"}):
        with pytest.raises(ModelError, match="one learned position per patch"):
            autoencoder(kwargs)


@pytest.mark.parametrize("ratio", [0.001, 0.03, 0.04, 0.5, 0.999])
def test_a_share_that_hides_no_patch_is_refused(ratio: float) -> None:
    hidden = draw_mask(torch.zeros(1, 16, 4), ratio)[2].sum()
    if hidden:
        assert autoencoder({}, ratio)(images(1)) > 0
        return
    with pytest.raises(ModelError, match=rf"mask_ratio = {ratio} hides none of 16 patches"):
        autoencoder({}, ratio)
    assert round(16 * ratio) == 0


@both
def test_an_image_has_one_embedding_whatever_stands_beside_it(kwargs: dict[str, Any]) -> None:
    """Nothing is hidden or shuffled outside of training, so batch and seed do not matter."""
    tower = autoencoder(kwargs).tower.eval()
    pixels = images(6)
    with torch.inference_mode():
        wanted = tower(pixels)
        torch.manual_seed(99)
        assert torch.equal(tower(pixels), wanted)
        order = torch.tensor([5, 3, 1, 0, 2, 4])
        assert torch.equal(tower(pixels[order]), wanted[order])
        others = torch.cat([pixels[:1], images(5) * 3])
        assert torch.equal(tower(others)[0], wanted[0])
        assert torch.allclose(tower(pixels[:1])[0], wanted[0], atol=1e-5)


def test_positions_of_trained_weights_can_be_kept() -> None:
    tower = ImageTower("test_vit", 32, [0.0] * 3, [1.0] * 3, dim=8, kwargs={"patch_size": 8})
    before = tower.backbone.pos_embed.detach().clone()
    MaskedAutoencoder(tower, 0.75, 16, 1, 2, keep_positions=True)
    assert torch.equal(tower.backbone.pos_embed, before)
    MaskedAutoencoder(tower, 0.75, 16, 1, 2)
    assert torch.equal(tower.backbone.pos_embed[0, 1:], sincos_positions(4, 4, before.shape[2]))


def test_pixels_may_be_painted_as_they_are() -> None:
    """Without standardising patches, brighter hidden pixels are a harder target."""
    torch.manual_seed(0)
    tower = ImageTower("test_vit", 32, [0.0] * 3, [1.0] * 3, dim=8, kwargs={"patch_size": 8})
    plain = MaskedAutoencoder(tower, 0.75, 16, 1, 2, standardise=False).eval()
    flat = torch.full((1, 3, 32, 32), 3.0)
    assert torch.allclose(plain.painter.patches(flat, 8), torch.tensor(3.0))
    assert loss(plain, flat, 0) == pytest.approx(9, rel=0.5)
