"""Views for training: the ground from above has eight faces, photos stay photos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from speciesmap.learning.views import aerial_view, blurred, ground_view, turned_hue


def symmetries(window: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    turned = [np.rot90(window, k, (1, 2)) for k in range(4)]
    return [*turned, *(t[:, :, ::-1] for t in turned)]


def test_without_jitter_an_aerial_view_is_one_of_the_eight_symmetries_and_all_occur() -> None:
    torch.manual_seed(0)
    window = np.random.default_rng(0).integers(0, 255, (4, 6, 6)).astype(np.uint8)
    batch = torch.from_numpy(window).expand(200, -1, -1, -1)
    views = aerial_view(batch, torch.ones(4, 1, 1), jitter=0.0)
    assert (views.shape, views.dtype) == ((200, 4, 6, 6), torch.float32)
    faces = [face.astype(np.float32) for face in symmetries(window)]
    seen = [
        next(k for k, face in enumerate(faces) if np.array_equal(view, face))
        for view in views.numpy()
    ]
    assert set(seen) == set(range(8))


def test_jitter_relights_a_window_and_keeps_its_pattern() -> None:
    torch.manual_seed(0)
    windows = torch.randint(0, 255, (64, 3, 8, 8), dtype=torch.uint8)
    before = windows.clone()
    views = aerial_view(windows, torch.full((3, 1, 1), 50.0))
    assert torch.equal(windows, before), "the batch itself is not touched"
    assert views.isfinite().all()
    for view, window in zip(views, windows, strict=True):
        for band in range(3):
            sorted_view = view[band].flatten().sort().values
            sorted_window = window[band].float().flatten().sort().values
            both = torch.stack([sorted_view, sorted_window])
            assert torch.corrcoef(both)[0, 1] > 0.9999, "a gain and an offset per band"
    gains = views.mean((1, 2, 3)) / windows.float().mean((1, 2, 3))
    assert gains.std() > 0.05


def test_a_seed_fixes_the_views() -> None:
    photos = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(7)
    first = ground_view(photos), aerial_view(photos, torch.ones(3, 1, 1))
    torch.manual_seed(7)
    again = ground_view(photos), aerial_view(photos, torch.ones(3, 1, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_a_ground_view_is_a_photo_of_the_same_size_and_range() -> None:
    torch.manual_seed(0)
    photos = torch.randint(0, 256, (100, 3, 24, 24)).to(torch.uint8)
    views = ground_view(photos)
    assert (views.shape, views.dtype) == ((100, 3, 24, 24), torch.float32)
    assert views.min() >= 0
    assert views.max() <= 255
    assert (views - photos).abs().flatten(1).amax(1).min() > 1, "each photo is changed"


def test_a_crop_brings_nothing_from_outside_the_photo() -> None:
    torch.manual_seed(0)
    plain = torch.full((100, 3, 24, 24), 100, dtype=torch.uint8)
    views = ground_view(plain)
    flat = views.flatten(2)
    assert (flat.amax(2) - flat.amin(2)).max() < 1e-2, "one tone stays one tone up to the edges"
    assert (views.mean((1, 2, 3)) / 100 - 1).abs().max() < 0.21


def test_a_crop_is_mirrored_or_not_and_never_upside_down() -> None:
    torch.manual_seed(0)
    across = torch.linspace(0, 255, 32).expand(200, 3, 32, 32)
    down = across.transpose(2, 3)
    mirrored = ground_view(across)
    mirrored = mirrored[..., -1].mean((1, 2)) < mirrored[..., 0].mean((1, 2))
    assert 0.3 < mirrored.float().mean() < 0.7
    upright = ground_view(down)
    assert (upright[:, :, -1].mean((1, 2)) > upright[:, :, 0].mean((1, 2))).all()


def test_a_random_crop_keeps_the_pixels_and_reaches_everywhere() -> None:
    torch.manual_seed(0)
    window = torch.arange(10 * 10).reshape(1, 1, 10, 10).expand(400, -1, -1, -1)
    views = aerial_view(window, torch.ones(1, 1, 1), window_px=8, jitter=0.0)
    assert views.shape == (400, 1, 8, 8)
    corners = {float(view.min()) for view in views}
    assert corners == {10.0 * top + left for top in range(3) for left in range(3)}
    for view in views:
        wanted = window[0, 0][:8, :8].flatten() + view.min()
        assert torch.equal(view.flatten().sort().values, wanted.float())


@pytest.mark.parametrize("turn", [0.05, 1 / 3, -0.2])
def test_a_turned_hue_keeps_greys_and_brightness(turn: float) -> None:
    matrix = turned_hue(torch.tensor([turn]))[0]
    grey = torch.full((3,), 77.0)
    assert torch.allclose(matrix @ grey, grey, atol=1e-4)
    colour = torch.tensor([200.0, 40.0, 90.0])
    assert torch.allclose((matrix @ colour).mean(), colour.mean(), atol=1e-3)
    back = turned_hue(torch.tensor([-turn]))[0] @ matrix @ colour
    assert torch.allclose(back, colour, atol=1e-3)


def test_a_third_of_the_circle_exchanges_the_primaries() -> None:
    red = turned_hue(torch.tensor([1 / 3]))[0] @ torch.tensor([1.0, 0.0, 0.0])
    assert sorted(red.tolist()) == pytest.approx([0, 0, 1], abs=1e-5)


def test_blurring_is_by_each_images_own_gaussian() -> None:
    images = torch.zeros(2, 3, 33, 33)
    images[:, :, 16, 16] = 1.0
    spread = blurred(images, torch.tensor([1.0, 3.0]))
    distance = torch.arange(33) - 16.0
    for image, sigma in zip(spread, (1.0, 3.0), strict=True):
        assert image.sum(dim=(1, 2)) == pytest.approx(np.ones(3), abs=1e-3)
        variance = float((image[0].sum(1) * distance**2).sum())
        assert variance == pytest.approx(sigma**2, rel=0.06)
    assert torch.equal(blurred(images[:0], torch.ones(0)), images[:0])


def test_hue_and_blur_are_options_that_change_photos() -> None:
    photos = torch.rand(8, 3, 224, 224) * 255
    views = {}
    for name, options in {"plain": {}, "hue": {"hue": 0.1}, "blur": {"blur": 1.0}}.items():
        torch.manual_seed(1)
        views[name] = ground_view(photos, **options)
        assert views[name].min() >= 0
        assert views[name].max() <= 255

    def roughness(view: torch.Tensor) -> float:
        return float(view.diff(dim=3).abs().mean())

    assert roughness(views["blur"]) < 0.9 * roughness(views["plain"])
    assert not torch.equal(views["hue"], views["plain"])
