"""Views for training: the ground from above has eight faces, photos stay photos."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from speciesmap.learning.views import aerial_view, ground_view


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
