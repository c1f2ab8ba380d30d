"""Random views of raw pixels, drawn for a whole batch at once on the batch's device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def aerial_view(
    windows: Tensor, std: Tensor, window_px: int | None = None, jitter: float = 0.2
) -> Tensor:
    """Crop, turn, flip and re-light aerial windows; the ground seen from above has no up.

    Each window gets one of the eight symmetries of the square, a gain of the whole window, a
    smaller gain of each band, and an offset of each band. A crop keeps the size of a pixel on the
    ground, which tells a tree from a shrub.

    Args:
        windows: Raw pixels, shape (N, B, W, W).
        std: Of each band in raw units, shape (B, 1, 1), the unit of the offsets.
        window_px: Side P of a random crop, at most W; none is cropped by default.
        jitter: Standard deviation of the common gain in nats; bands differ by a quarter of it
            and offsets by a quarter of it in units of `std`.

    Returns:
        Float32, shape (N, B, P, P).
    """
    windows = windows if window_px is None else random_crop(windows, window_px)
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


def random_crop(windows: Tensor, window_px: int) -> Tensor:
    """Cut a square of `window_px` out of each window, (N, B, W, W) to (N, B, P, P)."""
    side = windows.shape[-1]
    if window_px >= side:
        return windows
    corners = torch.randint(side - window_px + 1, (len(windows), 2)).tolist()
    crops = [
        window[:, top : top + window_px, left : left + window_px]
        for window, (top, left) in zip(windows, corners, strict=True)
    ]
    return torch.stack(crops)  # (N, B, P, P)


def ground_view(
    photos: Tensor, smallest: float = 0.5, hue: float = 0.0, blur: float = 0.0
) -> Tensor:
    """Crop, mirror and re-light ground photos, as SimCLR and CRISP do.

    Random resized crop (area from `smallest` to 1, aspect 3:4 to 4:3), mirroring, brightness,
    contrast and saturation of 0.2 with probability 0.8, greyscale with 0.2 (CRISP's prototype,
    whose smallest crop is 0.2; half of the photo keeps its surroundings, which tell the habitat).
    The prototype also turns the hue by up to 0.05, with those 0.8, and blurs half of the photos.

    Args:
        photos: Raw RGB values, shape (N, 3, P, P).
        smallest: Least share of the photo's area that a crop keeps.
        hue: Largest turn of the hue, as a share of the circle.
        blur: Share of photos that are blurred, by a Gaussian of 0.1 to 2 px at 224 px.

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
    view = ((view - grey) * saturation + grey).clamp(0, 255)  # (N, 3, P, P)
    if hue:
        turn = turned_hue(lit * uniform(-hue, hue))  # (N, 3, 3)
        view = torch.einsum("nij,njhw->nihw", turn, view).clamp(0, 255)
    if blur:
        chosen = (uniform(0, 1) < blur).nonzero()[:, 0]
        sigma = uniform(0.1, 2.0)[chosen] * photos.shape[-1] / 224
        view[chosen] = blurred(view[chosen], sigma)
    return view


def turned_hue(turn: Tensor) -> Tensor:
    """Matrices that turn the hue of RGB values about the axis of greys.

    Args:
        turn: Shares of the circle, shape (N,).

    Returns:
        Shape (N, 3, 3); a grey stays as it is, and so does the mean of the three values.
    """
    angle = 2 * math.pi * turn
    kept = torch.full((3, 3), 1 / 3, device=turn.device)
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=turn.device) / 3**0.5
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return kept + cos * (torch.eye(3, device=turn.device) - kept) + sin * across  # (N, 3, 3)


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image by a Gaussian of its own.

    Args:
        images: Shape (N, B, P, P).
        sigma: In pixels, shape (N,).

    Returns:
        Shape (N, B, P, P).
    """
    count, bands = images.shape[:2]
    if not count:
        return images
    reach = min(max(1, math.ceil(3 * float(sigma.max()))), images.shape[-1] - 1)
    offset = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None].clamp(min=1e-3)) ** 2)  # (N, K)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(bands, 0)[:, None]
    flat = F.pad(images, (reach,) * 4, mode="reflect").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernel[..., None], groups=count * bands)  # (1, N * B, P, P + 2 reach)
    flat = F.conv2d(flat, kernel[:, :, None], groups=count * bands)
    return flat.reshape(images.shape)  # (N, B, P, P)
