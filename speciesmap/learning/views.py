"""Random views of raw pixels, drawn for a whole batch at once on the batch's device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def aerial_view(windows: Tensor, std: Tensor, jitter: float = 0.2) -> Tensor:
    """Turn, flip and re-light aerial windows; the ground seen from above has no up.

    Each window gets one of the eight symmetries of the square, a gain of the whole window, a
    smaller gain of each band, and an offset of each band.

    Args:
        windows: Raw pixels, shape (N, B, P, P).
        std: Of each band in raw units, shape (B, 1, 1), the unit of the offsets.
        jitter: Standard deviation of the common gain in nats; bands differ by a quarter of it
            and offsets by a quarter of it in units of `std`.

    Returns:
        Float32, shape (N, B, P, P).
    """
    count, bands = windows.shape[:2]
    device = windows.device
    turned = torch.empty_like(windows, dtype=torch.float32)
    symmetry = torch.randint(8, (count,), device=device)
    for k in range(8):
        chosen = (symmetry == k).nonzero()[:, 0]
        if len(chosen):
            part = torch.rot90(windows[chosen], k % 4, (2, 3))
            turned[chosen] = (part.flip(3) if k > 3 else part).to(torch.float32)
    common = torch.randn(count, 1, 1, 1, device=device)
    own = torch.randn(count, bands, 1, 1, device=device)
    shift = torch.randn(count, bands, 1, 1, device=device)
    gain = (jitter * common + jitter / 4 * own).exp()
    return turned * gain + jitter / 4 * shift * std  # (N, B, P, P)


def ground_view(photos: Tensor, smallest: float = 0.5) -> Tensor:
    """Crop, mirror and re-light ground photos, as SimCLR and CRISP do.

    Random resized crop (area from `smallest` to 1, aspect 3:4 to 4:3), mirroring, brightness,
    contrast and saturation of 0.2 with probability 0.8, greyscale with 0.2 (CRISP's prototype,
    whose smallest crop is 0.2; half of the photo keeps its surroundings, which tell the habitat).

    Args:
        photos: Raw RGB values, shape (N, 3, P, P).
        smallest: Least share of the photo's area that a crop keeps.

    Returns:
        Float32 raw RGB values, shape (N, 3, P, P).
    """
    count, device = len(photos), photos.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, device=device) * (high - low) + low

    area, aspect = uniform(smallest, 1.0), uniform(-0.29, 0.29).exp()
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    place = torch.zeros(count, 2, 3, device=device)
    place[:, 0, 0], place[:, 0, 2] = width * mirror, uniform(-1, 1) * (1 - width)
    place[:, 1, 1], place[:, 1, 2] = height, uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(place, list(photos.shape), align_corners=False)  # (N, P, P, 2)
    view = F.grid_sample(
        photos.to(torch.float32), grid, padding_mode="border", align_corners=False
    )  # (N, 3, P, P)

    lit = (uniform(0, 1) < 0.8).float()
    brightness, contrast, saturation = (
        (1 + lit * uniform(-0.2, 0.2)).reshape(-1, 1, 1, 1) for _ in range(3)
    )
    saturation = torch.where(uniform(0, 1).reshape(-1, 1, 1, 1) < 0.2, 0.0, saturation)
    view = view * brightness
    centre = view.mean((1, 2, 3), keepdim=True)
    view = (view - centre) * contrast + centre
    grey = view.mean(1, keepdim=True)
    return ((view - grey) * saturation + grey).clamp(0, 255)  # (N, 3, P, P)
