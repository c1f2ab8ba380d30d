"""Virtual taxa: names, niches, presences, and how they come to be observed.

The protocol is virtualspecies' (Leroy et al. 2016): environment to probability by a logistic
response, never a threshold; Bernoulli presence; sampling that is biased and misses some; and
an independent presence-absence survey.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import special

from speciesmap.simulate.landscape import (
    CELL_PX,
    FIELDS,
    RESOLUTION_M,
    Array,
    Landscape,
    normal_by_rank,
    spectral_noise,
)
from speciesmap.taxa import Taxon

MOST_SPECIES = 24
_KINGDOM = "Plantae"
# Invented names: nothing here is, or stands for, a real taxon. Two genera per family.
_FAMILIES = (
    "Clivaceae",
    "Umbrivolaceae",
    "Rivigenaceae",
    "Pratoreaceae",
    "Petrivolaceae",
    "Aurivagaceae",
)
_GENERA = (
    "Clivaria", "Montivaga", "Umbrivola", "Silvistella", "Rivigena", "Fontivaga",
    "Pratorea", "Campivola", "Petrivola", "Saxigena", "Aurivaga", "Lucivola",
)  # fmt: skip
_EPITHETS = (
    ("ficta", "conficta"), ("imaginaria", "somniata"), ("virtualis", "simulata"),
    ("putativa", "aleatoria"), ("numerica", "digitalis"), ("fabulosa", "commenticia"),
)  # fmt: skip
_CONTROL = Taxon("Nusquamia nullibi", (_KINGDOM, "Nusquamaceae", "Nusquamia"))
_CONTROL_LENGTH_M = 10.0

_OBSERVATIONS = 325  # per species over the default 2048 x 2048 px
_ACCESS_M, _ACCESS_FLOOR = 60.0, 0.35  # how visits thin out away from tracks
_DETECTION = (0.55, 0.90)


@dataclass(frozen=True)
class Streams:
    """Independent random generators of one seed, by purpose and number.

    What one purpose draws never changes what another gets (numpy's `SeedSequence` with a spawn
    key per purpose and number).

    Attributes:
        seed: Non-negative integer.
    """

    seed: int

    def __call__(self, purpose: str, number: int) -> np.random.Generator:
        """Give a fresh generator; the same arguments give the same stream."""
        key = (int.from_bytes(purpose.encode(), "big") % (2**61 - 1), number)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


@dataclass(frozen=True)
class VirtualSpecies:
    """A taxon with its true distribution.

    Attributes:
        taxon: Its names.
        genus: Index of its genus, which decides its leaf; -1 for the control.
        optimum: Preferred value of each latent field, shape (4,); None for the control.
        weight: How strongly it minds each field, shape (4,); None for the control.
        probability: Probability of presence per cell, float32, shape (rows, columns).
    """

    taxon: Taxon
    genus: int
    optimum: NDArray[np.float64] | None
    weight: NDArray[np.float64] | None
    probability: Array


@dataclass(frozen=True)
class Sightings:
    """Observations of one species, one row each.

    Attributes:
        x_m: True easting of the plant.
        y_m: True northing of the plant.
        reported_x_m: Easting as reported, off by a draw from its uncertainty.
        reported_y_m: Northing as reported.
        uncertainty_m: Radius that holds the plant, as reported, whole metres.
        date: Day of observation, datetime64[D].
        cell: Row and column of the truth cell, shape (N, 2).
    """

    x_m: NDArray[np.float64]
    y_m: NDArray[np.float64]
    reported_x_m: NDArray[np.float64]
    reported_y_m: NDArray[np.float64]
    uncertainty_m: NDArray[np.float64]
    date: NDArray[np.datetime64]
    cell: NDArray[np.intp]


def make_species(streams: Streams, landscape: Landscape, count: int) -> list[VirtualSpecies]:
    """Create `count` species, the last of them the control.

    A species does not depend on how many there are. Congeners share most of their optimum.

    Args:
        streams: Independent random generators by name and number.
        landscape: Where they live.
        count: 3 to `MOST_SPECIES`.
    """
    species = []
    for number in range(count - 1):
        genus = number // 2
        optimum, weight = _genus_niche(streams, genus)
        rng = streams("niche of a species", number)
        optimum = optimum + rng.normal(0, 0.15, len(FIELDS))
        weight = weight * rng.uniform(0.9, 1.1, len(FIELDS))
        distance = landscape.fields - optimum[:, None, None]
        cost = np.einsum("k,kij->ij", weight, distance.astype(np.float64) ** 2)
        probability = _logistic(-cost, rng.uniform(0.14, 0.32))
        epithet = _EPITHETS[genus % len(_EPITHETS)][number % 2]
        lineage = (_KINGDOM, _FAMILIES[genus // 2], _GENERA[genus])
        taxon = Taxon(f"{_GENERA[genus]} {epithet}", lineage)
        species.append(VirtualSpecies(taxon, genus, optimum, weight, probability))
    rng = streams("control", 0)
    cells = landscape.fields.shape[1]
    length = _CONTROL_LENGTH_M / (CELL_PX * RESOLUTION_M)
    hidden = normal_by_rank(spectral_noise(rng, cells, length)).astype(np.float64)
    species.append(VirtualSpecies(_CONTROL, -1, None, None, _logistic(1.5 * hidden, 0.22)))
    return species


def _genus_niche(streams: Streams, genus: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give a genus two fields that matter much and one that matters a little."""
    pairs = list(combinations(range(len(FIELDS)), 2))
    streams("order of niches", genus // len(pairs)).shuffle(pairs)
    rng = streams("niche of a genus", genus)
    main = list(pairs[genus % len(pairs)])
    minor = rng.choice([k for k in range(len(FIELDS)) if k not in main])
    optimum, weight = np.zeros(len(FIELDS)), np.zeros(len(FIELDS))
    optimum[main] = rng.uniform(0.2, 1.0, 2) * rng.choice([-1, 1], 2)
    weight[main] = rng.uniform(1.0, 1.5, 2)
    optimum[minor] = rng.uniform(-1, 1)
    weight[minor] = rng.uniform(0.1, 0.25)
    return optimum, weight


def _logistic(score: NDArray[np.float64], prevalence: float) -> Array:
    """Squash a score so that its mean over the cells is the prevalence (bisection)."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        if special.expit(score + middle).mean() < prevalence:
            low = middle
        else:
            high = middle
    return np.asarray(special.expit(score + low), np.float32)


def observe(rng: np.random.Generator, species: VirtualSpecies, landscape: Landscape) -> Sightings:
    """Visit places along the tracks more than others, and report the presences detected there.

    Each visit goes to one cell with a chance that falls with the distance to a track; the
    species is there by a Bernoulli draw, and is detected by another. Visits end when the quota
    is full.
    """
    middle = CELL_PX // 2
    track_m = landscape.track_m[middle::CELL_PX, middle::CELL_PX]
    access = np.exp(-track_m.astype(np.float64) / _ACCESS_M) + _ACCESS_FLOOR
    cumulated = np.cumsum(access.ravel())
    share = (landscape.size_px / 2048) ** 2
    wanted = max(30, round(share * _OBSERVATIONS * rng.uniform(0.92, 1.08)))
    probability = species.probability.ravel() * rng.uniform(*_DETECTION)
    found = np.empty(0, np.intp)
    while len(found) < wanted:
        visited = np.searchsorted(cumulated, rng.uniform(0, cumulated[-1], 4096))
        hit = visited[rng.uniform(size=4096) < probability[visited]]
        found = np.concatenate([found, hit.astype(np.intp)])
    cell = np.stack(np.unravel_index(found[:wanted], track_m.shape), axis=1)
    pixel = (cell + rng.uniform(0, 1, cell.shape)) * CELL_PX
    uncertainty = np.round(rng.uniform(3, 10, wanted))
    # A reported radius is read as the 95% circle of a round normal error: sigma = r / 2.448.
    error = rng.normal(0, 1, cell.shape) * uncertainty[:, None] / 2.448 / RESOLUTION_M
    reported = np.clip(pixel + error, 0.5, landscape.size_px - 0.5)
    x, y = landscape.place(*pixel.T)
    reported_x, reported_y = landscape.place(*reported.T)
    season = np.clip(rng.normal(135, 45, wanted), 1, 364).astype(int)
    years = rng.integers(2016, 2024, wanted) - 1970
    date = years.astype("datetime64[Y]").astype("datetime64[D]") + season
    return Sightings(x, y, reported_x, reported_y, uncertainty, date, cell)


@dataclass(frozen=True)
class Survey:
    """Presence-absence at random places, independent of the observations.

    Attributes:
        x_m: Eastings, shape (places,).
        y_m: Northings, shape (places,).
        present: Whether each species was there, shape (places, species).
    """

    x_m: NDArray[np.float64]
    y_m: NDArray[np.float64]
    present: NDArray[np.bool_]


def survey(
    streams: Streams, species: list[VirtualSpecies], landscape: Landscape, places: int
) -> Survey:
    """Visit random places, 24 m or more from the edge: a 64 px window around each is whole.

    Every species is recorded at every place, by a Bernoulli draw from its true probability.
    """
    margin = 24.0 / RESOLUTION_M
    rng = streams("survey", 0)
    rows, cols = rng.uniform(margin, landscape.size_px - margin, (2, places))
    i, j = (rows // CELL_PX).astype(int), (cols // CELL_PX).astype(int)
    chance = np.stack([s.probability[i, j] for s in species], axis=1)
    drawn = [
        streams("survey of the control" if s.genus < 0 else "survey of a species", n).uniform(
            size=places
        )
        for n, s in enumerate(species)
    ]
    x, y = landscape.place(rows, cols)
    return Survey(x, y, np.stack(drawn, axis=1) < chance)
