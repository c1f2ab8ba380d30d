"""What a map must beat: chance, and maps of records drawn from the whole group."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from speciesmap.errors import DatasetError
from speciesmap.statistics.chance import (
    LEVEL,
    MAPS,
    bound_for,
    draw_null_maps,
    fold_auc,
    informative,
    null_bounds,
    null_scores,
)
from speciesmap.statistics.regression import Records


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.integers(0, 9))
def test_null_maps_have_as_many_records_as_taxa_that_are_not_most_of_the_group(
    counts: list[int], seed: int
) -> None:
    group = np.arange(500) % 5 > 1
    drawn = draw_null_maps(group, counts, np.random.default_rng(seed))
    assert not drawn[~group].any()
    sizes = drawn.sum(0)
    for size in set(sizes):
        assert (sizes == size).sum() == MAPS
    bounds = dict.fromkeys(set(sizes.tolist()), 0.6)
    for count in counts:
        if 0 < 2 * count <= group.sum():
            assert np.abs(np.log(sizes / count)).min() < np.log(1.25)
            assert bound_for(bounds, count) == 0.6
    if not any(0 < 2 * count <= group.sum() for count in counts):
        assert drawn.shape == (500, 0)


def test_numbers_of_records_that_nobody_drew_have_no_bound() -> None:
    assert bound_for({}, 10) is None
    bounds = {8: 0.7, 90: 0.6}
    assert [bound_for(bounds, n) for n in (0, 1, 8, 9, 50, 100, 400)] == [
        None, None, 0.7, 0.7, None, 0.6, None,
    ]  # fmt: skip


def test_a_map_says_something_above_its_bound_or_else_above_chance_everywhere() -> None:
    good, poor = [0.8, 0.7, 0.75], [0.5, 0.45, 0.55]
    assert informative({"random": good, "target-group": poor}, 0.7) is True
    assert informative({"random": good, "target-group": poor}, 0.76) is False
    assert informative({"random": good, "target-group": poor}, None) is False
    assert informative({"random": good, "target-group": good}, None) is True
    assert informative({"random": good}, None) is True
    assert informative({"random": [None, 0.9], "target-group": good}, None) is None
    assert informative({"random": [None, 0.9]}, 0.7) is True
    assert informative({"random": [None, None]}, 0.7) is None
    assert informative({}, 0.7) is None


def test_few_maps_of_noise_are_above_the_bound() -> None:
    rng = np.random.default_rng(0)
    away, fold = np.arange(1000) >= 300, np.arange(1000) % 5
    above = []
    for _ in range(8):
        drawn = draw_null_maps(~away, [60], rng)
        assert drawn.shape == (1000, MAPS)
        bound = null_bounds(drawn, rng.normal(size=drawn.shape), away, fold)[64]
        for k in range(MAPS):
            part = drawn[:, k] | away
            found = fold_auc(drawn[part, k], rng.normal(size=part.sum()), fold[part])
            above.append(found["auc_mean"] > bound)
    assert np.mean(above) == pytest.approx(1 - LEVEL, abs=0.035)


def landscape(seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Places with a road and a wood, that both can be seen; taxa; and random background.

    Observers keep to the road. Taxa 0 to 3 live in the wood or out of it; the last anywhere.
    """
    rng = np.random.default_rng(seed)
    places = rng.normal(size=(40_000, 2))
    road, wood = places.T
    taxon = np.full(len(places), -2)
    for k, liking in enumerate([2.0, 1.5, -1.5, -2.0, 0.0]):
        free = np.flatnonzero(taxon == -2)
        chance = np.exp(0.6 * road + liking * wood)[free]
        taxon[rng.choice(free, 120, replace=False, p=chance / chance.sum())] = k
    taxon[rng.choice(np.flatnonzero(taxon == -2), 1000, replace=False)] = -1
    kept = taxon > -2
    return places[kept].astype(np.float32), taxon[kept]


@pytest.mark.parametrize("seed", range(3))
def test_a_taxon_that_follows_only_the_observers_does_not_beat_null_maps(seed: int) -> None:
    places, taxon = landscape(seed)
    fold = np.random.default_rng(seed).integers(0, 4, len(places))
    drawn = draw_null_maps(taxon >= 0, [120], np.random.default_rng(seed))
    own = taxon[:, None] == np.arange(5)
    both = np.concatenate([own, drawn], axis=1)
    score = np.empty(both.shape)
    for k in range(4):
        use = fold != k
        trained = Records(places[use], both[use].astype(np.float32), 1.0 - both[use])
        score[~use] = null_scores(trained, places[~use], 10.0, fold[use], "assume_negative")
    away = taxon == -1
    bound = bound_for(null_bounds(drawn, score[:, 5:], away, fold), 120)
    assert bound is not None
    found = []
    for k in range(5):
        part = own[:, k] | away
        found.append(fold_auc(own[part, k], score[part, k], fold[part])["auc_mean"])
    assert min(found[:4]) > bound > found[4] > 0.55, "chance alone would not have told"


def test_null_maps_choose_a_penalty_where_the_taxa_have_none() -> None:
    places, taxon = landscape(0)
    drawn = draw_null_maps(taxon >= 0, [30], np.random.default_rng(0))[:, :4]
    trained = Records(places, drawn.astype(np.float32), 1.0 - drawn)
    scores = null_scores(trained, places[:7], None, np.arange(len(places)) % 3, "poisson")
    assert scores.shape == (7, 4) and np.isfinite(scores).all()
    with pytest.raises(DatasetError, match="no background"):
        null_scores(
            Records(places, drawn.astype(np.float32), 0.0 * drawn), places, 1.0, taxon, "poisson"
        )
