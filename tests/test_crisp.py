"""The joint space: unit vectors from windows, photos and names, and what identifies a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import TAXA, tiny_model
from torch import Tensor

from speciesmap.errors import ModelError
from speciesmap.models import load_model, save_model
from speciesmap.models.crisp import to_square
from speciesmap.models.text import HubTextTower


def windows(count: int = 3, bands: int = 4, seed: int = 0) -> Tensor:
    generator = torch.manual_seed(seed)
    return torch.randint(0, 255, (count, bands, 16, 16), generator=generator, dtype=torch.uint8)


def assert_unit(vectors: Tensor, count: int) -> None:
    assert vectors.shape == (count, 16)
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1), torch.ones(count), atol=1e-5)


@pytest.mark.parametrize("bands", [1, 3, 4, 7])
def test_windows_of_any_number_of_bands_become_unit_vectors(bands: int) -> None:
    model = tiny_model(bands=bands)
    assert len(model.bands) == bands
    with torch.inference_mode():
        assert_unit(model.encode_aerial(windows(bands=bands)), 3)


def test_photos_and_names_become_unit_vectors_alone_or_in_a_batch() -> None:
    model = tiny_model()
    photos = [
        Image.new("RGB", size, color)
        for size, color in [((40, 30), "red"), ((16, 90), "green"), ((7, 5), "blue")]
    ]
    with torch.inference_mode():
        assert_unit(model.encode_ground(photos), 3)
        assert_unit(model.encode_ground(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), 2)
        together = model.encode_text([taxon.prompt() for taxon in TAXA])
        assert_unit(together, 3)
        alone = model.encode_text([TAXA[1].prompt()])
    assert torch.allclose(alone[0], together[1], atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_encoding_is_deterministic_and_rows_do_not_mix_in_evaluation() -> None:
    model = tiny_model()
    with torch.inference_mode():
        first = model.encode_aerial(windows())
        assert torch.equal(first, model.encode_aerial(windows()))
        one = model.encode_aerial(windows()[1:2])
    assert torch.allclose(one[0], first[1], atol=1e-5)


def test_a_missing_tower_is_said_so() -> None:
    model = tiny_model(ground=None, text=None)
    with pytest.raises(ModelError, match="no ground tower"):
        model.encode_ground([Image.new("RGB", (20, 20))])
    with pytest.raises(ModelError, match="no text tower"):
        model.encode_text(["Quercus"])


def test_the_logit_scale_starts_as_in_clip_and_is_capped() -> None:
    model = tiny_model()
    assert math.isclose(float(model.logit_scale.detach()), 1 / 0.07, rel_tol=1e-5)
    with torch.no_grad():
        model.log_scale.fill_(50.0)
    assert float(model.logit_scale.detach()) == 100.0


def test_the_fingerprint_follows_aerial_embeddings_only() -> None:
    model = tiny_model()
    before = model.fingerprint
    assert before == tiny_model().fingerprint
    assert before == tiny_model(taxa=TAXA[:1]).fingerprint, "taxa leave embeddings as they are"
    with torch.no_grad():
        model.head.weight.add_(1)
        model.log_scale.add_(1)
        for part in (model.ground, model.text):
            assert part is not None
            next(part.parameters()).add_(1)
    assert model.fingerprint == before
    with torch.no_grad():
        model.aerial.project.bias[0] += 1e-6
    assert model.fingerprint != before
    assert tiny_model(seed=1).fingerprint != before
    assert tiny_model(mean=(1.0,) * 4).fingerprint != before
    model = tiny_model()
    with torch.no_grad():
        for name, buffer in model.aerial.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(1)
    assert model.fingerprint != before, "batch norm's statistics count"


def test_a_photo_covers_the_square_from_its_centre() -> None:
    photo = Image.new("RGB", (60, 20), "red")
    photo.paste((0, 255, 0), (20, 0, 40, 20))  # the middle third
    square = to_square([photo, photo.rotate(90, expand=True)], 20)
    assert (square.shape, square.dtype) == ((2, 3, 20, 20), torch.uint8)
    for pixels in square:
        assert (pixels[1] == 255).all()
        assert (pixels[0] == 0).all()
    grey = to_square([Image.new("L", (9, 9), 77), Image.new("RGBA", (9, 9), (77, 77, 77, 0))], 16)
    assert (grey == 77).all()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the layout of open_clip models on the hub."""
    import open_clip  # after speciesmap.models

    folder = tmp_path_factory.mktemp("hub")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    text = {"model_cfg": config, "preprocess_cfg": {"size": [16, 16]}}
    (folder / "open_clip_config.json").write_text(json.dumps(text))
    torch.manual_seed(5)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_a_hub_text_tower_is_frozen_and_stays_out_of_checkpoints(hub: Path, tmp_path: Path) -> None:
    model = tiny_model(text={"hub": f"local-dir:{hub}"})
    assert isinstance(model.text, HubTextTower)
    prompts = ["Quercus agrifolia", "Pinus"]
    vectors = model.encode_text(prompts)
    assert_unit(vectors, 2)
    vectors.sum().backward()  # type: ignore[no-untyped-call]
    trained = {name for name, value in model.text.named_parameters() if value.grad is not None}
    assert trained == {"project.weight", "project.bias"}
    assert all(value.grad is None for value in model.text.frozen[0].parameters())
    assert set(model.text.state_dict()) == trained
    save_model(model, tmp_path / "run", {})
    with torch.inference_mode():
        again = load_model(tmp_path / "run").encode_text(prompts)
    assert torch.allclose(again, vectors, atol=1e-6)


def test_a_hub_text_tower_that_cannot_be_had_is_one_line(hub: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            ModelError, match=r"text model 'local-dir:.* cannot be loaded"
        ) as caught:
            tiny_model(text={"hub": f"local-dir:{folder}"})
        assert "\n" not in str(caught.value)
    (tmp_path / "open_clip_config.json").write_bytes((hub / "open_clip_config.json").read_bytes())
    with pytest.raises(ModelError, match="cannot be loaded"):  # random weights would be no tower
        tiny_model(text={"hub": f"local-dir:{tmp_path}"})


def test_a_hub_name_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="check the name and the network") as caught:
        tiny_model(text={"hub": "hf-hub:nobody/no-such-model"})
    assert "\n" not in str(caught.value)
