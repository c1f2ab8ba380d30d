"""The factored encoder: cells by themselves, then the window; trained and kept as any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_scene

from speciesmap.config import load_config
from speciesmap.errors import ConfigError, ModelError
from speciesmap.learning.train import train
from speciesmap.models import SpeciesModel, load_model, save_model
from speciesmap.models.factored import FactoredTower

SHAPE = {"cell_px": 8, "width": 16, "layers": 2, "heads": 2}


def factored(window_px: int = 24, backbone: str = "test_resnet", **shape: int) -> SpeciesModel:
    aerial = {"backbone": backbone, "factored": {**SHAPE, **shape}}
    return tiny_model(aerial=aerial, window_px=window_px)


@pytest.mark.parametrize(("backbone", "px"), [("test_resnet", 8), ("test_convnext", 32)])
def test_a_window_is_made_of_the_tokens_of_its_cells(backbone: str, px: int) -> None:
    model = factored(3 * px, backbone, cell_px=px)
    tower = model.factored
    assert tower is not None
    windows = torch.randint(0, 255, (2, 4, 3 * px, 3 * px), generator=torch.manual_seed(0)).byte()
    with torch.inference_mode():
        whole = model.encode_aerial(windows)
        tokens = torch.stack(
            [
                tower.encode_cells(windows[:, :, r : r + px, c : c + px])
                for r in (0, px, 2 * px)
                for c in (0, px, 2 * px)
            ],
            dim=1,
        )
        parts = torch.nn.functional.normalize(tower.encode_tokens(tokens), dim=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_a_token_sees_nothing_around_its_cell_and_the_window_sees_where_it_lies() -> None:
    model = factored(backbone="test_vit", cell_px=16, window_px=32)
    windows = torch.randint(0, 255, (1, 4, 32, 32), generator=torch.manual_seed(0)).float()
    tower = model.factored
    assert tower is not None
    moved = torch.cat([windows[..., 16:], windows[..., :16]], dim=3)
    with torch.inference_mode():
        same = tower.encode_cells(windows[..., :16, :16]), tower.encode_cells(moved[..., :16, 16:])
        assert torch.equal(*same)
        cosine = (model.encode_aerial(windows) * model.encode_aerial(moved)).sum()
    assert cosine < 1 - 1e-5, "the same cells in other places make another window"


def test_before_training_tokens_lie_as_the_features_of_their_cells_do() -> None:
    tower = factored(width=96).factored
    assert tower is not None and tower.cells.backbone.num_features == 96
    cells = torch.randint(0, 255, (5, 4, 8, 8), generator=torch.manual_seed(0)).byte()
    with torch.inference_mode():
        features = tower.cells.backbone(tower.cells.normalise(cells))
        tokens = tower.encode_cells(cells)
    torch.testing.assert_close(torch.cdist(tokens, tokens), torch.cdist(features, features))


def test_a_plain_model_says_that_it_shares_nothing() -> None:
    assert tiny_model().factored is None


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match=r"windows of 20 px hold no whole number of cells of 8 px"):
        factored(window_px=20)
    with pytest.raises(ModelError, match=r"tokens of size 16 do not fit 3 heads"):
        factored(heads=3)


def test_it_survives_its_checkpoint_and_the_fingerprint_knows_its_shape(tmp_path: Path) -> None:
    model = factored()
    save_model(model, tmp_path / "m", {})
    again = load_model(tmp_path / "m")
    assert isinstance(again.aerial, FactoredTower)
    assert again.fingerprint == model.fingerprint
    windows = torch.zeros(1, 4, 24, 24, dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(again.encode_aerial(windows), model.encode_aerial(windows))
    assert factored(layers=1).fingerprint != model.fingerprint
    with torch.no_grad():
        model.aerial.positions[0, 0] += 1  # type: ignore[index]
    assert again.fingerprint != model.fingerprint


def test_it_is_trained_by_window_as_any_other(tmp_path: Path) -> None:
    chips = tiny_scene(tmp_path).chips
    content = {
        "stage": "pretrain",
        "data": {"dataset": str(chips)},
        "model": {
            "dim": 16,
            "aerial": {"backbone": "test_resnet", "encoder": "factored", "factored": SHAPE},
            "ground": {"backbone": "test_resnet", "image_px": 16},
            "text": {"width": 16, "layers": 1, "heads": 2},
        },
        "optim": {"epochs": 1, "batch_size": 12},
        "trainer": {"accelerator": "cpu", "devices": 1, "precision": "32-true"},
    }
    model = load_model(train(load_config(content), tmp_path / "run"))
    tower = model.factored
    assert tower is not None
    assert (tower.cell_px, tower.side, len(tower.blocks)) == (8, 2, 1)
    torch.manual_seed(0)
    start = SpeciesModel(model.architecture).factored
    assert start is not None
    assert not torch.equal(tower.positions, start.positions), "the light part learns too"

    masked = load_config({**content, "method": "mae"})
    with pytest.raises(ConfigError, match=r"model\.aerial\.encoder: plain"):
        train(masked, tmp_path / "masked")


def test_its_section_is_checked_like_the_others() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown key 'model.aerial.factored.cel_px'; .*'cell_px'"
    ):
        load_config(
            {
                "stage": "pretrain",
                "data": {"dataset": "chips"},
                "model": {"aerial": {"backbone": "test_resnet", "factored": {"cel_px": 8}}},
            }
        )
