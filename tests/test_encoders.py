"""Image towers: any timm backbone, any bands, raw pixels of any type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from speciesmap.errors import ModelError
from speciesmap.models import encoders
from speciesmap.models.device import computes_bfloat16
from speciesmap.models.encoders import ImageTower
from speciesmap.models.text import HubTextTower


def tower(
    backbone: str = "test_resnet", bands: int = 4, side: int = 16, **more: object
) -> ImageTower:
    torch.manual_seed(0)
    return ImageTower(
        backbone,
        side,
        [100.0] * bands,
        [50.0] * bands,
        8,
        **more,  # type: ignore[arg-type]
    ).eval()


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("bands", [1, 3, 13])
def test_any_backbone_takes_any_bands(backbone: str, bands: int) -> None:
    encoder = tower(backbone, bands, 32)
    assert encoder(torch.zeros(2, bands, 32, 32)).shape == (2, 8)


def test_a_transformer_takes_a_window_it_was_not_made_for() -> None:
    encoder = tower("test_vit", side=48, kwargs={"patch_size": 8})
    assert encoder.backbone.patch_embed.grid_size == (6, 6)
    assert encoder(torch.zeros(2, 4, 48, 48)).shape == (2, 8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float64])
def test_pixels_mean_the_same_in_any_number_type(dtype: torch.dtype) -> None:
    encoder = tower()
    windows = torch.randint(0, 128, (3, 4, 16, 16))
    assert torch.equal(encoder(windows.to(dtype)), encoder(windows.float()))


def test_normalisation_is_inside_and_per_band() -> None:
    encoder = ImageTower("test_resnet", 16, [0.0, 10.0], [1.0, 2.0], 8)
    pixels = torch.stack([torch.full((16, 16), 3.0), torch.full((16, 16), 14.0)])[None]
    normal = encoder.normalise(pixels)
    assert (normal[0, 0] == 3).all()
    assert (normal[0, 1] == 2).all()


def test_a_misspelt_backbone_names_the_nearest() -> None:
    with pytest.raises(
        ModelError, match=r"timm has no model 'test_resnt'; did you mean .*test_resnet"
    ):
        tower("test_resnt")
    with pytest.raises(ModelError, match="resnet50"):
        tower("\u6a61")


def test_arguments_that_the_backbone_does_not_take_are_refused() -> None:
    with pytest.raises(ModelError, match=r"timm cannot build 'test_resnet' with .*patch_sze"):
        tower(kwargs={"patch_sze": 8})


@pytest.mark.parametrize("bands", [1, 4, 13])
def test_weights_learned_on_rgb_are_spread_over_any_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bands: int
) -> None:
    learned = tower(bands=3).backbone.state_dict()
    save_file(learned, tmp_path / "rgb.safetensors")
    file = {"file": str(tmp_path / "rgb.safetensors")}  # in place of the hub
    create = partial(encoders.timm.create_model, pretrained_cfg_overlay=file)
    monkeypatch.setattr(encoders.timm, "create_model", create)
    taken = tower(bands=bands, pretrained=True).backbone.state_dict()
    rgb = learned["conv1.0.weight"]
    spread = taken["conv1.0.weight"]
    assert spread.shape[1] == bands
    if bands == 4:  # red again, and less of each, so that a grey image excites as much
        torch.testing.assert_close(spread, rgb[:, [0, 1, 2, 0]] * 3 / 4)
    torch.testing.assert_close(taken["layer1.0.conv1.weight"], learned["layer1.0.conv1.weight"])


def test_a_patch_larger_than_the_image_is_refused() -> None:
    with pytest.raises(ModelError, match=r"patches larger than the image of 16 px; give a smaller"):
        ImageTower("test_vit", 16, [0.0], [1.0], dim=8, kwargs={"patch_size": 32})


def test_patches_that_do_not_fill_the_image_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"patches of 4 px, .* an image of 18 px; give one of 16 px"
    ):
        ImageTower("test_vit", 18, [0.0], [1.0], dim=8, kwargs={"patch_size": 4})
    padded = ImageTower(
        "test_vit", 18, [0.0], [1.0], dim=8, kwargs={"patch_size": 4, "dynamic_img_pad": True}
    )
    assert padded(torch.zeros(1, 1, 18, 18)).shape == (1, 8)


def test_weights_that_cannot_be_had_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, pretrained: bool = False, **more: object) -> torch.nn.Module:
        assert pretrained
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("speciesmap.models.encoders.timm.create_model", offline)
    with pytest.raises(ModelError, match=r"no route to the hub.*pretrained: false") as caught:
        tower(pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose hub does not answer, and its empty cache; nothing may wait for it."""

    def refuse(seconds: float) -> None:
        raise AssertionError(f"asks again after {seconds} s")

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", refuse)
    return tmp_path


@pytest.mark.parametrize(
    "make",
    [lambda: tower(pretrained=True), lambda: HubTextTower(8, "hf-hub:imageomics/bioclip")],
    ids=["image", "text"],
)
def test_a_hub_that_does_not_answer_is_asked_once(no_hub: Path, make: Callable[[], Any]) -> None:
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9 does not answer, and .* lacks them\)"):
        make()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE, "others may ask again"


def test_weights_in_the_cache_are_taken_where_the_hub_does_not_answer(no_hub: Path) -> None:
    learned = tower(bands=3).backbone.state_dict()
    kept = (
        no_hub
        / f"models--{encoders.timm.get_pretrained_cfg('test_resnet').hf_hub_id.replace('/', '--')}"
    )
    (kept / "snapshots" / "0").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0")
    save_file(learned, kept / "snapshots" / "0" / "model.safetensors")
    taken = tower(bands=3, pretrained=True).backbone.state_dict()
    torch.testing.assert_close(taken["conv1.0.weight"], learned["conv1.0.weight"])


def test_bfloat16_is_reported_where_the_processor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for capabilities, says in (
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_f": True}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        assert computes_bfloat16(cpu) is says
    for capability, says in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert computes_bfloat16(torch.device("cuda")) is says
    assert not computes_bfloat16(torch.device("meta"))
