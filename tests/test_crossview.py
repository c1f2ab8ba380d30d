"""CVM-MAE: one encoder for both views, alone or in pairs, and what it hides and paints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from speciesmap.errors import ModelError
from speciesmap.models import SpeciesModel, load_model, save_model
from speciesmap.models.crossview import CrossViewAutoencoder
from speciesmap.models.encoders import ImageTower
from speciesmap.models.masked import sincos_positions

VIT = {"backbone": "test_vit", "kwargs": {"patch_size": 4}}


def matcher(**changes: Any) -> SpeciesModel:
    """Windows of 16 px in patches of 4, photos of 32 px in patches of 8."""
    towers = {
        "aerial": VIT,
        "ground": {"backbone": "test_vit", "kwargs": {"patch_size": 8}, "image_px": 32},
        "matcher": True,
        "metadata": {"dropout": 0.25},
    }
    return tiny_model(**{**towers, **changes})


def views(count: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.manual_seed(seed)
    photos = torch.randint(0, 255, (count, 3, 32, 32), generator=generator)
    return photos, torch.randint(0, 255, (count, 4, 16, 16), generator=generator)


def autoencoder(model: SpeciesModel, ratio: float = 0.75) -> CrossViewAutoencoder:
    assert model.ground is not None
    assert isinstance(model.aerial, ImageTower)
    return CrossViewAutoencoder(model.aerial, model.ground, ratio, dim=16, depth=1, heads=2)


def test_both_views_share_one_transformer_and_keep_their_own_patches() -> None:
    model = matcher()
    assert model.ground is not None
    above: Any = model.aerial.backbone
    below: Any = model.ground.backbone
    assert above.blocks is below.blocks
    assert above.cls_token is below.cls_token
    assert above.patch_embed is not below.patch_embed
    photos, windows = views()
    with torch.inference_mode():
        assert model.encode_aerial(windows).shape == model.encode_ground(photos).shape == (3, 16)


def test_a_shared_transformer_is_stored_once_and_shared_again_when_read(tmp_path: Path) -> None:
    model = matcher()
    save_model(model, tmp_path / "run", {})
    again = load_model(tmp_path / "run")
    assert again.ground is not None
    above: Any = again.aerial.backbone
    below: Any = again.ground.backbone
    assert above.blocks is below.blocks
    photos, windows = views()
    rows = torch.tensor([[40.0, -120.0, 5.0, 3.0]]).expand(3, 4)
    with torch.inference_mode():
        assert torch.equal(again.match(photos, windows, rows), model.match(photos, windows, rows))
        assert torch.equal(again.encode_ground(photos), model.encode_ground(photos))
    stored = (tmp_path / "run" / "model.safetensors").stat().st_size
    values = sum(parameter.numel() for parameter in model.parameters())
    assert stored < 4 * values * 1.2


def test_a_pair_is_scored_by_both_of_its_views_and_by_nothing_else() -> None:
    model = matcher()
    photos, windows = views()
    with torch.inference_mode():
        logits = model.match(photos, windows)
        assert logits.shape == (3,)
        assert torch.equal(logits, model.match(photos, windows)), "nothing is hidden or shuffled"
        other = photos.clone()
        other[1] = 255 - other[1]
        changed = model.match(other, windows) - logits
        assert changed[1].abs() > 1e-6
        assert torch.allclose(changed[[0, 2]], torch.zeros(2), atol=1e-5)
        assert not torch.allclose(model.match(photos, windows.roll(1, 0)), logits, atol=1e-6)


def test_metadata_move_the_score_and_may_be_absent() -> None:
    model = matcher()
    assert model.matcher is not None
    assert model.matcher.metadata is not None
    for parameter in model.matcher.metadata.parameters():
        torch.nn.init.normal_(parameter)
    photos, windows = views()
    nowhere = torch.full((3, 4), torch.nan)
    with torch.inference_mode():
        bare = model.match(photos, windows)
        assert torch.allclose(model.match(photos, windows, nowhere), bare)
        assert not torch.allclose(model.match(photos, windows, nowhere.nan_to_num(3.0)), bare)


def test_patches_of_both_views_are_hidden_jointly() -> None:
    network = autoencoder(matcher())
    seen: list[Tensor] = []
    network.painter.register_forward_pre_hook(lambda module, call: seen.append(call[2]))
    network(*views(64), torch.Generator().manual_seed(0))
    hidden = seen[0]
    assert hidden.shape == (64, 32), "16 patches of each"
    assert (hidden.sum(1) == 24).all(), "three quarters of all"
    ground = hidden[:, :16].sum(1)
    assert ground.float().std() > 0, "not three quarters of each"
    assert ground.float().mean() == pytest.approx(12, abs=0.6)


def test_hidden_patches_are_painted_from_the_other_view_too() -> None:
    """The windows' loss changes with visible photo patches: the views meet in one encoder."""
    model = matcher()
    network = autoencoder(model).eval()
    photos, windows = views(2)
    with torch.inference_mode():
        before = network(photos, windows, torch.Generator().manual_seed(3))
        after = network(photos.flip(3), windows, torch.Generator().manual_seed(3))
    assert not torch.equal(before[1], after[1])


def test_one_head_paints_each_view_and_both_are_trained() -> None:
    model = matcher()
    network = autoencoder(model).train()
    assert [head.out_features for head in network.painter.heads] == [8 * 8 * 3, 4 * 4 * 4]
    ground, aerial = network(*views(8))
    (ground + aerial).backward()
    for name, parameter in network.named_parameters():
        if "project" not in name:
            assert parameter.grad is not None, name
    assert ground.isfinite()
    assert aerial.isfinite()


def test_positions_of_both_views_start_as_sines_and_cosines() -> None:
    model = matcher()
    autoencoder(model)
    assert model.ground is not None
    for tower in (model.aerial, model.ground):
        backbone: Any = tower.backbone
        position = backbone.pos_embed
        assert torch.equal(position[0, 1:], sincos_positions(4, 4, position.shape[2]))
        assert not position[0, 0].any()


def test_a_copy_of_a_model_scores_with_its_own_towers() -> None:
    model = matcher()
    copied = copy.deepcopy(model)
    assert copied.matcher is not None
    assert copied.matcher.towers[1] is copied.aerial
    assert copied.matcher.towers[0] is copied.ground


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ground": None}, "needs a ground tower"),
        ({"aerial": {"backbone": "test_resnet"}}, "needs a vision transformer"),
        (
            {"aerial": {"backbone": "test_vit", "kwargs": {"patch_size": 4, "embed_dim": 32}}},
            "32 wide with .* blocks and 64 wide",
        ),
        (
            {
                "aerial": {
                    "backbone": "test_vit",
                    "kwargs": {"patch_size": 4, "class_token": False, "global_pool": "avg"},
                }
            },
            "with a class token",
        ),
    ],
)
def test_towers_that_cannot_share_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        matcher(**changes)


def test_a_model_that_scores_no_pairs_says_so() -> None:
    with pytest.raises(ModelError, match="does not score pairs; train one with method: cvm_mae"):
        tiny_model().match(*views())
