"""A virtual landscape: latent fields, tracks, and the aerial raster rendered from them.

The fields live on the cells of the truth grid, `CELL_PX` pixels wide. Everything that the fields
say is drawn as structure (how many crowns, how large, how much of the ground is green, how
stony), because structure survives what aerial surveys do to tones: flight lines of different
gain and colour cast, illumination that drifts, slopes that face the sun or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from affine import Affine
from numpy.typing import ArrayLike, NDArray
from odc.geo.geobox import GeoBox
from scipy import ndimage, special, stats
from scipy.interpolate import CubicSpline

Array = NDArray[np.float32]
Points = NDArray[np.float64]

RESOLUTION_M = 0.6
CELL_PX = 8
BANDS = ("red", "green", "blue", "nir")
FIELDS = ("elevation", "moisture", "canopy", "soil")
_LENGTH_PX = (240.0, 190.0, 170.0, 200.0)  # distance at which a field's correlation is about 1/e
_CRS = "EPSG:32610"
_LEFT_M, _TOP_M = 664_800.0, 4_268_400.0
_TONE = np.array([305, 305, 315, 250], np.float32)  # digital number of reflectance 1, per band
_HAZE = np.array([0.9, 1.0, 1.25, 0.5], np.float32)  # scattering is stronger in the blue
_SUN = (0.64, 0.48, 0.60)  # unit vector to the sun: rows (south), columns (east), up

# Reflectance of surfaces in red, green, blue, near infrared; magnitudes as in common spectral
# libraries, tuned by eye to the look of summer imagery of the Californian foothills.
_OCHRE = np.array([0.33, 0.245, 0.150, 0.40], np.float32)
_GREY = np.array([0.245, 0.238, 0.195, 0.31], np.float32)
_GRASS = np.array([0.125, 0.175, 0.075, 0.43], np.float32)
_STONE = np.array([0.54, 0.52, 0.48, 0.56], np.float32)
_TRACK = np.array([0.42, 0.365, 0.285, 0.46], np.float32)
_DRY_CROWN = np.array([0.110, 0.115, 0.062, 0.24], np.float32)
_MOIST_CROWN = np.array([0.045, 0.098, 0.035, 0.46], np.float32)


@dataclass(frozen=True)
class Landscape:
    """What is hidden behind the imagery.

    Attributes:
        size_px: Side of the square aerial raster.
        fields: Latent fields in the order of `FIELDS`, standard normal by rank, shape
            (4, rows, columns) over cells of `CELL_PX` pixels.
        looks: Appearance that no taxon minds, the tone of bare ground and the vigour of green,
            standard normal, shape (2, rows, columns).
        track_m: Distance of each pixel to the nearest track, metres, shape (size_px, size_px).
    """

    size_px: int
    fields: Array
    looks: Array
    track_m: Array

    @property
    def geobox(self) -> GeoBox:
        """Pixel grid of the aerial raster."""
        place = Affine(RESOLUTION_M, 0, _LEFT_M, 0, -RESOLUTION_M, _TOP_M)
        return GeoBox((self.size_px, self.size_px), place, _CRS)

    def place(self, rows: ArrayLike, cols: ArrayLike) -> tuple[Points, Points]:
        """Eastings and northings, in metres, of continuous pixel coordinates."""
        x = _LEFT_M + RESOLUTION_M * np.asarray(cols, np.float64)
        y = _TOP_M - RESOLUTION_M * np.asarray(rows, np.float64)
        return x, y

    @property
    def cell_geobox(self) -> GeoBox:
        """Grid of the truth: cells of `CELL_PX` pixels with the same upper-left corner."""
        return self.geobox.zoom_out(CELL_PX)


def crown_cover(canopy: ArrayLike) -> Array:
    """Share of the ground under crowns, 0.06 to 0.60, for a canopy field."""
    return np.asarray(0.06 + 0.54 * special.ndtr(1.1 * np.asarray(canopy)), np.float32)


def crown_radius_px(elevation: ArrayLike) -> Array:
    """Mean crown radius in pixels: large trees low down (6.2), small ones high up (1.7)."""
    return np.asarray(1.7 * (6.2 / 1.7) ** special.ndtr(-np.asarray(elevation)), np.float32)


def green_share(moisture: ArrayLike) -> Array:
    """Share of open ground that is green, 0 to 1, for a moisture field."""
    return np.asarray(special.ndtr(1.1 * np.asarray(moisture)), np.float32)


def stoniness(soil: ArrayLike) -> Array:
    """Stones per pixel of open ground, 0.0005 to 0.018, for a soil field (poor soils are low)."""
    return np.asarray(0.0005 + 0.0175 * special.ndtr(-1.2 * np.asarray(soil)) ** 1.5, np.float32)


def stone_radius_px(soil: ArrayLike) -> Array:
    """Mean radius of stones in pixels, from 1.0 on rich soils to 1.8 on poor ones."""
    return np.asarray(1.0 + 0.8 * special.ndtr(-1.2 * np.asarray(soil)), np.float32)


def ground_tone(soil: ArrayLike, tone: ArrayLike) -> Array:
    """Bare ground's tone from grey (0) to ochre (1); soil explains a part of it only."""
    return np.asarray(special.ndtr(0.8 * np.asarray(soil) + 0.8 * np.asarray(tone)), np.float32)


def green_vigour(vigour: ArrayLike) -> Array:
    """How green the green is, 0.7 to 1: the season's progress, which no taxon minds."""
    return np.asarray(0.7 + 0.3 * special.ndtr(vigour), np.float32)


def spectral_noise(
    rng: np.random.Generator, cells: int, length: float, smoothness: float = 3.5
) -> NDArray[np.float64]:
    """Draw a stationary random field by filtering white noise in the Fourier domain.

    The power spectrum is Matern's, flat and then a power law (Whittle 1954). The field is cut
    from a larger one, so that opposite edges have nothing in common.

    Args:
        rng: Source of the white noise.
        cells: Side of the square.
        length: Distance, in cells, at which the correlation is about 1/e.
        smoothness: Exponent of the power law, half of it for the amplitude.

    Returns:
        Zero mean, unit variance, shape (cells, cells).
    """
    side = cells + 8 * -(-int(2 * length) // 8)
    white = np.fft.rfft2(rng.standard_normal((side, side)))
    frequency = 2 * np.pi * np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    amplitude = (1 + (frequency * length / 3) ** 2) ** (-smoothness / 2)
    field = np.fft.irfft2(white * amplitude, s=(side, side))[:cells, :cells]
    return np.asarray((field - field.mean()) / field.std())


def normal_by_rank(field: NDArray[np.float64]) -> Array:
    """Replace values by the normal quantiles of their ranks; shape stays."""
    ranks = stats.rankdata(field.ravel()).reshape(field.shape)
    return np.asarray(special.ndtri((ranks - 0.5) / field.size), np.float32)


def make_landscape(rng: np.random.Generator, size_px: int) -> Landscape:
    """Draw the latent fields, made uncorrelated over the raster, their looks and the tracks."""
    cells = size_px // CELL_PX
    drawn = [spectral_noise(rng, cells, length / CELL_PX).ravel() for length in _LENGTH_PX]
    independent = np.linalg.qr(np.stack([np.ones(cells * cells), *drawn], axis=1))[0][:, 1:]
    signs = np.sign(np.sum(independent * np.stack(drawn, axis=1), axis=0))
    fields = np.stack([normal_by_rank(f.reshape(cells, cells)) for f in (independent * signs).T])
    looks = np.stack([spectral_noise(rng, cells, 130.0 / CELL_PX) for _ in range(2)])
    return Landscape(size_px, fields, looks.astype(np.float32), _draw_tracks(rng, size_px))


def _draw_tracks(rng: np.random.Generator, size: int) -> Array:
    """Let a few tracks wander across; give each pixel's distance to them in metres."""
    free = np.ones((size, size), bool)
    along = np.arange(0, size, 0.25)
    for number in range(max(2, round(3 * size / 2048))):
        knots = np.cumsum(rng.normal(0, 0.10, 7)) + rng.uniform(0.2, 0.8)
        course = CubicSpline(np.linspace(0, size, 7), size * knots)(along)
        for wave in (640.0, 270.0, 120.0):
            phase = rng.uniform(0, 2 * np.pi)
            course += 0.035 * wave * np.sin(2 * np.pi * along / wave + phase)
        inside = (course >= 0) & (course < size)
        rows, cols = course[inside].astype(int), along[inside].astype(int)
        if number % 2:
            rows, cols = cols, rows
        free[rows, cols] = False
    return np.asarray(ndimage.distance_transform_edt(free) * RESOLUTION_M, np.float32)


def to_pixels(cells: NDArray[np.floating]) -> Array:
    """Interpolate cell values linearly to pixel centres; shape grows by `CELL_PX`."""
    count = cells.shape[0]
    position = (np.arange(count * CELL_PX) + 0.5) / CELL_PX - 0.5
    low = np.clip(np.floor(position), 0, count - 2).astype(int)
    weight = np.clip(position - low, 0, 1)
    spread = np.zeros((len(position), count), np.float32)
    spread[np.arange(len(position)), low] = 1 - weight
    spread[np.arange(len(position)), low + 1] += weight
    return np.asarray(spread @ cells.astype(np.float32) @ spread.T, np.float32)


def render_aerial(rng: np.random.Generator, landscape: Landscape) -> NDArray[np.uint8]:
    """Photograph the landscape from the air.

    Returns:
        Digital numbers of `BANDS`, shape (4, size_px, size_px).
    """
    scene = _ground(rng, landscape)
    shadow = np.zeros(scene.shape[1:], np.float32)
    grain = rng.normal(1, 0.10, scene.shape[1:]).astype(np.float32)
    sun = np.array(_SUN, np.float32)
    for d in (_stones(rng, landscape), _crowns(rng, landscape)):
        _paint(scene, shadow, grain, d.rows, d.cols, d.radius, d.phase, d.tone, d.height, sun)
    scene *= 1 - 0.62 * np.minimum(ndimage.gaussian_filter(shadow, 0.5), 1)
    scene *= to_pixels(_hill_shade(landscape))
    scene = _TONE[:, None, None] * scene ** (1 / 1.6)
    gain, haze, blur = _exposure(rng, landscape.size_px)
    for band, value in enumerate(scene):
        sharp, soft = (ndimage.gaussian_filter(value, sigma) for sigma in (0.4, 1.0))
        value[:] = (sharp + (soft - sharp) * blur) * gain[band] + haze * _HAZE[band]
        value += rng.normal(0, 2.0, value.shape).astype(np.float32)
    return np.clip(np.rint(scene), 1, 255).astype(np.uint8)


def _hill_shade(landscape: Landscape) -> Array:
    """Lambert's cosine relative to flat ground, per cell, between 0.6 and 1.4."""
    south, east = np.gradient(landscape.fields[0].astype(np.float64) * 1.3)
    up = 1 / np.sqrt(1 + south**2 + east**2)
    cosine = (-_SUN[0] * south - _SUN[1] * east + _SUN[2]) * up / _SUN[2]
    return np.asarray(1 + 0.4 * np.tanh((cosine - 1) / 0.4), np.float32)


def _ground(rng: np.random.Generator, landscape: Landscape) -> Array:
    """Open ground: bare soil by soil, green patches by moisture, mottles, rills and tracks."""
    size = landscape.size_px
    _, moisture, _, soil = (to_pixels(field) for field in landscape.fields)

    def noise(*sigma: float) -> Array:
        field = ndimage.gaussian_filter(rng.standard_normal((size, size), np.float32), sigma)
        return np.asarray(field / field.std(), np.float32)

    rich = special.ndtr(1.2 * soil)
    ochre = ground_tone(soil, to_pixels(landscape.looks[0]))
    vigour = green_vigour(to_pixels(landscape.looks[1]))
    rills = ndimage.rotate(noise(1.4, 10.0), 35, reshape=False, order=1, mode="mirror")
    mottle = np.exp(0.05 * noise(1.0, 1.0) + 0.26 * rich * rills + 0.05 * noise(5.0, 5.0))
    patches = noise(2.6, 2.6) + 0.35 * noise(1.0, 1.0)
    threshold = special.ndtri(np.clip(green_share(moisture), 0.01, 0.99)) * np.hypot(1, 0.35)
    green = special.expit((threshold - patches) * 7)
    path = special.expit((1.9 - landscape.track_m / RESOLUTION_M) * 2)
    albedo = np.exp(0.10 * to_pixels(spectral_noise(rng, size // CELL_PX, 20.0)))
    scene = np.empty((4, size, size), np.float32)
    for band in range(4):
        bare = _GREY[band] + (_OCHRE[band] - _GREY[band]) * ochre
        scene[band] = (bare + (_GRASS[band] - bare) * vigour * green) * mottle * albedo
        scene[band] += (_TRACK[band] - scene[band]) * path
    return scene


@dataclass(frozen=True)
class _Discs:
    """Round things to draw, each array with one entry per thing, in drawing order.

    Attributes:
        rows: Centres, continuous pixel coordinates.
        cols: Centres.
        radius: Pixels.
        phase: Angle of the outline's wobble, radians.
        tone: Reflectance, shape (N, 4).
        height: Length of the shadow in radii.
    """

    rows: Points
    cols: Points
    radius: Points
    phase: Points
    tone: NDArray[np.float64]
    height: Points


def _scatter(
    rng: np.random.Generator, landscape: Landscape, density: Array, spread: float, clear_px: float
) -> tuple[Points, Points, NDArray[np.intp]]:
    """Scatter points that keep their distance (random sequential adsorption).

    Each point has a territory of `spread / sqrt(density)` that no later one enters, so that a
    window's count tells the density more exactly than a Poisson pattern's would. Four candidates
    per wanted point nearly fill the ground: spreads of 0.65 to 0.8 give about the density.

    Args:
        rng: Source of the candidates.
        landscape: Its tracks stay clear.
        density: Wanted points per pixel, for each cell.
        spread: Territory's radius relative to the mean distance.
        clear_px: Distance to keep from tracks.

    Returns:
        Rows and columns, continuous pixel coordinates, and the index of each point's cell in
        the flattened grid.
    """
    size = landscape.size_px
    most = 4 * float(density.max())
    count = rng.poisson(most * size * size)
    rows, cols = rng.uniform(0, size, (2, count))
    cell = (rows // CELL_PX).astype(np.intp) * density.shape[1] + (cols // CELL_PX).astype(np.intp)
    keep = rng.uniform(0, most, count) < 4 * density.ravel()[cell]
    keep &= landscape.track_m[rows.astype(int), cols.astype(int)] > clear_px * RESOLUTION_M
    rows, cols, cell = rows[keep], cols[keep], cell[keep]
    settled = _settle(rows, cols, spread / np.sqrt(density.ravel()[cell]), size)
    return rows[settled], cols[settled], cell[settled]


def _stones(rng: np.random.Generator, landscape: Landscape) -> _Discs:
    """Boulders: small bright discs with short shadows."""
    soil = landscape.fields[3]
    rows, cols, cell = _scatter(rng, landscape, stoniness(soil), 0.66, 3.0)
    radius = stone_radius_px(soil).ravel()[cell] * rng.lognormal(0, 0.25, len(rows))
    tone = _STONE * rng.lognormal(0, 0.10, (len(rows), 1))
    phase = rng.uniform(0, 2 * np.pi, len(rows))
    return _Discs(rows, cols, radius, phase, tone, np.full(len(rows), 0.9))


def _crowns(rng: np.random.Generator, landscape: Landscape) -> _Discs:
    """Trees and shrubs, shortest first."""
    elevation, moisture, canopy, _ = landscape.fields
    mean_radius = crown_radius_px(elevation)
    density = crown_cover(canopy) / (np.pi * mean_radius**2)
    rows, cols, cell = _scatter(rng, landscape, density, 0.76, 4.0)
    radius = mean_radius.ravel()[cell] * rng.lognormal(0, 0.10, len(rows))
    order = np.argsort(radius, kind="stable")
    rows, cols, cell, radius = rows[order], cols[order], cell[order], radius[order]
    # Most crowns are either green or dry, and moisture decides how many are green.
    moist = special.expit(4 * (1.1 * moisture.ravel()[cell] + rng.normal(0, 1, len(rows))))
    moist *= green_vigour(landscape.looks[1].ravel()[cell])
    tone = _DRY_CROWN + (_MOIST_CROWN - _DRY_CROWN) * moist[:, None]
    tone = tone * rng.lognormal(0, 0.10, (len(rows), 1))
    phase = rng.uniform(0, 2 * np.pi, len(rows))
    height = 0.9 + 1.2 * special.ndtr(-elevation.ravel()[cell])
    return _Discs(rows, cols, radius, phase, tone, height)


def _exposure(rng: np.random.Generator, size: int) -> tuple[Array, Array, Array]:
    """Nuisance of the survey: flight lines with seams, slow drift, haze, focus.

    Returns:
        Gain around 1 per band, shape (4, size, size); haze to add, in digital numbers, and
        blur, 0 to 1, shapes (size, size). Flight lines differ by up to 30%, bands within a line
        by up to 7%; drift adds about 15% overall and 3% per band.
    """
    lines = max(2, round(size / 340))
    edges = np.linspace(0, size, lines + 1)[1:-1] + rng.uniform(-40, 40, lines - 1)
    tilt = rng.uniform(-0.06, 0.06) * np.arange(size)[:, None]
    position = np.arange(size)[None, :] + tilt
    line = np.searchsorted(edges, position)
    common = rng.permutation(np.linspace(0.74, 1.28, lines))[:, None]
    gain = common * rng.uniform(0.93, 1.07, (lines, 4))
    starts, ends = np.r_[0.0, edges], np.r_[edges, float(size)]
    across = (position - starts[line]) / (ends - starts)[line] - 0.5
    swath = 1 + rng.uniform(-0.22, 0.22, lines)[line] * across
    cells = size // CELL_PX
    drift = 0.15 * to_pixels(spectral_noise(rng, cells, 50.0))
    exposure = np.empty((4, size, size), np.float32)
    for band in range(4):
        cast = 0.035 * to_pixels(spectral_noise(rng, cells, 40.0))
        exposure[band] = gain[line, band] * swath * np.exp(drift + cast)
    thick = special.ndtr(to_pixels(spectral_noise(rng, cells, 40.0)))
    haze = 12 * (thick + rng.uniform(0, 1, lines)[line])
    blur = rng.permutation(np.linspace(0, 0.6, lines))[line]
    return exposure, np.asarray(haze, np.float32), np.asarray(blur, np.float32)


@numba.njit(cache=True)
def _settle(
    rows: Points,
    cols: Points,
    territory: Points,
    size: int,
) -> NDArray[np.bool_]:
    """Refuse each point that falls within the territory, in pixels, of one accepted before."""
    taken = np.zeros((size, size), np.bool_)
    keep = np.zeros(len(rows), np.bool_)
    for n in range(len(rows)):
        if taken[int(rows[n]), int(cols[n])]:
            continue
        keep[n] = True
        far = territory[n]
        for row in range(max(0, int(rows[n] - far)), min(size, int(rows[n] + far) + 1)):
            for col in range(max(0, int(cols[n] - far)), min(size, int(cols[n] + far) + 1)):
                if (row + 0.5 - rows[n]) ** 2 + (col + 0.5 - cols[n]) ** 2 < far * far:
                    taken[row, col] = True
    return keep


@numba.njit(cache=True)
def _paint(
    scene: Array,
    shadow: Array,
    grain: Array,
    rows: Points,
    cols: Points,
    radius: Points,
    phase: Points,
    tone: NDArray[np.float64],
    height: Points,
    sun: Array,
) -> None:
    """Draw shaded discs in order, each over its predecessors, with their cast shadows.

    Args:
        scene: Reflectance, shape (4, H, W); changed in place.
        shadow: Share of each pixel in shadow, shape (H, W); changed in place.
        grain: Texture that multiplies the tone, shape (H, W).
        rows: Centres, shape (N,).
        cols: Centres, shape (N,).
        radius: Pixels, shape (N,).
        phase: Angle of the outline's wobble, radians, shape (N,).
        tone: Reflectance, shape (N, 4).
        height: Shadow length in radii, shape (N,).
        sun: Unit vector to the sun (rows, columns, up), shape (3,).
    """
    size = scene.shape[1]
    for n in range(len(rows)):
        r, y, x = radius[n], rows[n], cols[n]
        reach = 1.2 * r + 1
        down, right = -sun[0] * height[n] * r, -sun[1] * height[n] * r
        for row in range(
            max(0, int(y - reach + min(down, 0))), min(size, int(y + reach + max(down, 0)) + 1)
        ):
            for col in range(
                max(0, int(x - reach + min(right, 0))),
                min(size, int(x + reach + max(right, 0)) + 1),
            ):
                dy, dx = row + 0.5 - y, col + 0.5 - x
                # The shadow is the disc swept along the sun's azimuth.
                along = (dy * down + dx * right) / (down * down + right * right)
                along = min(max(along, 0.0), 1.0)
                off = np.sqrt((dy - along * down) ** 2 + (dx - along * right) ** 2)
                cast = min(max(r * (1 - 0.25 * along) - off + 0.5, 0.0), 1.0)
                if cast > shadow[row, col]:
                    shadow[row, col] = cast
        for row in range(max(0, int(y - reach)), min(size, int(y + reach) + 1)):
            for col in range(max(0, int(x - reach)), min(size, int(x + reach) + 1)):
                dy, dx = row + 0.5 - y, col + 0.5 - x
                angle = np.arctan2(dy, dx)
                edge = r * (
                    1
                    + 0.09 * np.sin(3 * angle + phase[n])
                    + 0.06 * np.sin(5 * angle - 2 * phase[n])
                )
                distance = np.sqrt(dy * dy + dx * dx)
                alpha = min(max(edge - distance + 0.5, 0.0), 1.0)
                if alpha <= 0:
                    continue
                u = min(distance / edge, 1.0)
                up = np.sqrt(1 - 0.9 * u * u)
                lit = (dy * sun[0] + dx * sun[1]) / edge * 0.95 + up * sun[2]
                light = (0.42 + 0.95 * max(lit, 0.0)) * grain[row, col]
                for band in range(4):
                    value = tone[n, band] * light
                    scene[band, row, col] += (value - scene[band, row, col]) * alpha
                shadow[row, col] *= 1 - alpha
