"""Ground photos: a plant's leaves in the foreground, its surroundings behind.

A leaf is drawn from a few numbers that its genus fixes and its species shifts a little, so that
congeners look alike. The surroundings repeat what the aerial view shows of the spot: how many
trees and how large, how green the ground, how stony, which soil.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from speciesmap.simulate.landscape import (
    Array,
    crown_cover,
    crown_radius_px,
    green_share,
    green_vigour,
    ground_tone,
    stone_radius_px,
    stoniness,
)
from speciesmap.simulate.species import Streams, VirtualSpecies

SIDE_PX = 96
_SCALE = 2  # drawn larger, then averaged
_VIEW_SPREAD = 0.5  # a photo looks one way and past its spot: fields differ by as many deviations
_FORMS = ("lobed", "pinnate", "lance", "round", "palmate", "needles")
_HUES = (
    (78, 128, 52),
    (122, 138, 58),
    (66, 122, 96),
    (58, 108, 44),
    (128, 108, 50),
    (104, 96, 84),
    (86, 112, 112),
)

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Leaf:
    """A leaf form in numbers.

    Attributes:
        form: One of lobed, pinnate, lance, round, palmate, needles.
        width: Width of a blade as a share of its length.
        parts: Number of lobes, leaflets or needles.
        depth: Depth of lobes or teeth as a share of the half width.
        colour: Red, green, blue of the lit blade, 0 to 255.
        length: Length as a share of the photo's side.
        leaves: How many leaves a sprig shows.
    """

    form: str
    width: float
    parts: int
    depth: float
    colour: tuple[float, float, float]
    length: float
    leaves: int


def leaf_of(streams: Streams, species: VirtualSpecies, number: int) -> Leaf:
    """Give a species its leaf: form by family, proportions by genus, a little by species."""
    genus = species.genus
    family = genus // 2
    form = "needles" if genus < 0 else _FORMS[family % 5]
    width, parts, depth = {
        "lobed": (0.62, 4, 0.40),
        "pinnate": (0.30, 5, 0.0),
        "lance": (0.20, 0, 0.0),
        "round": (0.88, 12, 0.07),
        "palmate": (0.26, 5, 0.0),
        "needles": (0.05, 6, 0.0),
    }[form]
    sign = 1 if genus % 2 else -1
    of_genus = streams("leaf of a genus", genus + 1)
    of_species = streams("leaf of a species", number if genus >= 0 else 10_000)
    hue = np.array(_HUES[-1 if genus < 0 else family % len(_HUES)], float)
    hue = (
        hue + sign * np.array([14, 4, -12]) + of_genus.normal(0, 6, 3) + of_species.normal(0, 4, 3)
    )
    return Leaf(
        form=form,
        width=width * (1 + 0.22 * sign) * of_species.uniform(0.93, 1.07),
        parts=parts + (1 if sign > 0 else 0) * (2 if form in ("palmate", "needles") else 1),
        depth=depth * (1 + 0.2 * sign) * of_species.uniform(0.9, 1.1),
        colour=(float(hue[0]), float(hue[1]), float(hue[2])),
        length=float(of_genus.uniform(0.50, 0.62)),
        leaves={"lobed": 1, "round": 1, "lance": 3}.get(form, int(of_genus.integers(1, 3))),
    )


def take_photo(rng: np.random.Generator, leaf: Leaf, fields: Array, looks: Array) -> Image.Image:
    """Photograph one plant.

    Args:
        rng: Weather, pose, exposure and all that differs between two photos.
        leaf: The taxon's leaf.
        fields: Latent fields at the spot, shape (4,).
        looks: Tone of the ground and vigour of green at the spot, shape (2,).

    Returns:
        RGB image, `SIDE_PX` square.
    """
    side = SIDE_PX * _SCALE
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    overcast = float(rng.beta(0.7, 0.9))
    light = 1.0 - 0.25 * overcast
    horizon = int(side * rng.uniform(0.34, 0.46))
    _sky(draw, side, horizon, overcast, rng)
    seen = fields + rng.normal(0, _VIEW_SPREAD, len(fields)).astype(np.float32)
    _surroundings(draw, side, horizon, light, seen, looks, rng)
    image = image.filter(ImageFilter.BoxBlur(1))
    _sprig(ImageDraw.Draw(image), side, leaf, light, rng)
    image = image.reduce(_SCALE)
    gain = rng.uniform(0.82, 1.18) * rng.uniform(0.94, 1.06, 3)
    ramp = np.arange(256.0)
    table = np.clip(np.concatenate([ramp * g for g in gain]), 0, 255).astype(int).tolist()
    return image.point(table)


def _mix(a: Points, b: Points, share: float, light: float = 1.0) -> tuple[int, int, int]:
    colour = np.clip((a + (b - a) * share) * light, 0, 255).astype(int)
    return int(colour[0]), int(colour[1]), int(colour[2])


def _sky(
    draw: ImageDraw.ImageDraw, side: int, horizon: int, overcast: float, rng: np.random.Generator
) -> None:
    zenith = np.array([92, 146, 214.0]) * (1 - overcast) + np.array([176, 182, 190.0]) * overcast
    haze = np.array([206, 224, 240.0]) * (1 - overcast) + np.array([214, 216, 218.0]) * overcast
    for top in range(0, horizon, 6):
        draw.rectangle((0, top, side, top + 6), fill=_mix(zenith, haze, top / horizon))
    for _ in range(rng.poisson(2.5)):
        x, y, w = rng.uniform(0, side), rng.uniform(0, 0.7 * horizon), rng.uniform(10, 40)
        draw.ellipse((x - w, y - w / 5, x + w, y + w / 5), fill=_mix(haze, haze, 0, 1.04))


def _surroundings(
    draw: ImageDraw.ImageDraw,
    side: int,
    horizon: int,
    light: float,
    fields: Array,
    looks: Array,
    rng: np.random.Generator,
) -> None:
    """Ground with green patches, rills and stones, then trees from far to near.

    Counts follow the fields without further noise; places are random.
    """
    elevation, moisture, canopy, soil = (float(f) for f in fields)
    ochre, vigour = float(ground_tone(soil, looks[0])), float(green_vigour(looks[1]))
    bare = np.array([150, 143, 134.0]) * (1 - ochre) + np.array([186, 150, 104.0]) * ochre
    grass = bare + (np.array([98, 136, 56.0]) - bare) * vigour
    depth = side - horizon
    draw.rectangle((0, horizon, side, side), fill=_mix(bare, bare, 0, light))
    for across, near in _spread(rng, round(80 * float(green_share(moisture)))):
        x, y, w = across * side, horizon + 3 + near**1.5 * depth, 5 + 24 * near**1.5
        fill = _mix(grass, bare, 0.15 * rng.uniform(), light * rng.uniform(0.88, 1.05))
        draw.ellipse((x - w, y - w / 4, x + w, y + w / 4), fill=fill)
    for across, near in _spread(rng, round(26 / (1 + np.exp(-2.0 * soil)))):
        x, y, w = across * side, horizon + 2 + near * depth, 14 + 40 * near
        tone = _mix(bare, bare, 0, 0.72 * light)
        draw.line((x - w, y + 0.16 * w, x + w, y - 0.16 * w), fill=tone, width=2)
    for across, near in _spread(rng, round(2600 * float(stoniness(soil)))):
        x, y = across * side, horizon + 3 + near**1.3 * depth
        w = float(stone_radius_px(soil)) * (1 + 3 * near)
        fill = _mix(np.array([214, 210, 204.0]), bare, 0.2 * rng.uniform(), light)
        draw.ellipse((x - w, y - w * 0.6, x + w, y + w * 0.6), fill=fill)
    cover, radius = float(crown_cover(canopy)), float(crown_radius_px(elevation))
    dry, green = np.array([112, 104, 66.0]), np.array([46, 88, 42.0])
    # The denser the canopy and the smaller its crowns, the more trunks stand along the skyline.
    trees = list(_spread(rng, max(1, round(-1.6 * np.log1p(-1.4 * cover) * side / (4 * radius)))))
    for across, distance in sorted(trees, key=lambda tree: tree[1]):
        near = distance**2.5
        size = radius * (1.6 + 4.0 * near) * rng.uniform(0.9, 1.1)
        x, foot = across * side, horizon + 2 + 0.35 * depth * near
        tone = light * (1 - 0.25 * near) * rng.uniform(0.9, 1.1)
        crown = dry + (green - dry) * vigour / (1 + np.exp(-4 * (1.1 * moisture + rng.normal())))
        draw.ellipse((x - size, foot - 2, x + size, foot + size / 3), fill=_mix(bare, bare, 0, 0.5))
        draw.rectangle((x - size / 8, foot - size, x + size / 8, foot + 1), fill=(66, 52, 40))
        y = foot - 1.5 * size
        draw.ellipse((x - size, y - size, x + size, y + size), fill=_mix(crown, crown, 0, tone))
        lit = (x - 0.7 * size, y - 0.85 * size, x + 0.35 * size, y + 0.1 * size)
        draw.ellipse(lit, fill=_mix(crown, crown, 0, 1.18 * tone))


def _spread(rng: np.random.Generator, count: int) -> Iterator[tuple[float, float]]:
    """Give places in the unit square, evenly spread across and from far (0) to near (1)."""
    steps = (np.arange(count) + rng.uniform(0, 1, (2, count))) / max(count, 1)
    across, near = rng.permutation(steps[0]), steps[1]
    yield from zip(across.tolist(), near.tolist(), strict=True)


def _blade(leaf: Leaf, length: float, rng: np.random.Generator) -> Points:
    """Outline of one blade from its base at the origin along +x, shape (N, 2)."""
    t = np.linspace(0, 1, 40)
    half = 0.5 * leaf.width * length * rng.uniform(0.92, 1.08)
    profile = np.sin(np.pi * t**0.8)
    if leaf.form == "round":
        profile = np.sqrt(profile)
    if leaf.depth:
        profile = profile * (1 - leaf.depth * (0.5 - 0.5 * np.cos(2 * np.pi * leaf.parts * t)))
    upper = np.stack([t * length, half * profile], axis=1)
    return np.concatenate([upper, upper[::-1] * [1, -1]])


def _turned(points: Points, angle: float, at: Points) -> Points:
    c, s = np.cos(angle), np.sin(angle)
    return np.asarray(points @ np.array([[c, s], [-s, c]]) + at)


def _leaf_parts(leaf: Leaf, length: float, rng: np.random.Generator) -> list[Points]:
    """Blades of one leaf, base at the origin, pointing along +x."""
    if leaf.form == "pinnate":
        small = 0.42 * length
        blades = []
        for k in range(leaf.parts):
            at = np.array([length * (0.18 + 0.72 * k / leaf.parts), 0.0])
            angle = np.radians(rng.normal(58, 4))
            blades += [_turned(_blade(leaf, small, rng), side * angle, at) for side in (1, -1)]
        return [*blades, _turned(_blade(leaf, small, rng), 0.0, np.array([0.85 * length, 0.0]))]
    if leaf.form in ("palmate", "needles"):
        spread = 2.2 if leaf.form == "palmate" else 0.8
        angles = np.linspace(-spread, spread, leaf.parts) + rng.normal(0, 0.05, leaf.parts)
        at = np.array([0.25 * length, 0.0]) if leaf.form == "palmate" else np.zeros(2)
        return [
            _turned(_blade(leaf, length * (0.75 - 0.12 * abs(a)), rng), float(a), at)
            for a in angles
        ]
    return [_blade(leaf, length, rng)]


def _sprig(
    draw: ImageDraw.ImageDraw, side: int, leaf: Leaf, light: float, rng: np.random.Generator
) -> None:
    """Leaves in the lower half, at a random pose, darker rims and a pale midrib."""
    base = np.array([side * rng.uniform(0.25, 0.75), side * rng.uniform(0.82, 0.98)])
    heading = -np.pi / 2 + rng.normal(0, 0.35)
    colour = np.array(leaf.colour) + rng.normal(0, 5, 3)
    for k in range(leaf.leaves):
        fan = (k - (leaf.leaves - 1) / 2) * 1.0
        angle = heading + fan + rng.normal(0, 0.12)
        length = leaf.length * side * rng.uniform(0.88, 1.12)
        tone = light * rng.uniform(0.95, 1.15)
        tip = _turned(np.array([[length, 0.0]]), angle, base)[0]
        rim, rib = _mix(colour, colour, 0, 0.55 * tone), _mix(colour, colour, 0, 1.35 * tone)
        fill = _mix(colour, colour, 0, tone)
        for outline in _leaf_parts(leaf, length, rng):
            points = _turned(outline, angle, base)
            draw.polygon([(float(x), float(y)) for x, y in points], fill=fill, outline=rim)
        if leaf.form != "needles":
            line = (float(base[0]), float(base[1]), float(tip[0]), float(tip[1]))
            draw.line(line, fill=rib, width=2)
