"""Rivals see neither the held-out fold nor any window that overlaps it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import tiny_scene

from speciesmap.evaluation.baselines import (
    RIVALS,
    fit_maxent,
    held_out_scores,
    logistic,
    positions,
    trained_scores,
    trend_surface,
    window_statistics,
)
from speciesmap.learning.data import Places
from speciesmap.observations.folds import spatial_blocks
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.windows import window_start

WINDOW_PX = 16


def places(count: int = 300, side: float = 200.0, seed: int = 0) -> Places:
    """Places that nobody reads pixels at."""
    rows, cols = np.random.default_rng(seed).uniform(10, side, (2, count))
    nothing: Any = None
    return Places(nothing, rows, cols, WINDOW_PX, [0.0])


class Spy:
    """A rival that remembers what it was shown."""

    made: list[Spy]

    def fit(self, features: NDArray[np.float64], present: NDArray[np.bool_]) -> Spy:
        self.trained, self.labels = features, present
        Spy.made.append(self)
        return self

    def decision_function(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        self.judged = features
        return features[:, 0]


def test_no_training_window_shares_a_pixel_with_a_held_out_one() -> None:
    where = places()
    present = np.arange(300) % 3 == 0
    fold = spatial_blocks(where.cols, where.rows, block_m=50, folds=4, seed=0)
    features = np.column_stack([np.arange(300.0), where.rows, where.cols])
    Spy.made = []
    rival: Any = Spy
    scores = held_out_scores(features, present, where, fold, rival)
    assert np.array_equal(scores, np.arange(300.0)), "each row gets its own score"
    assert len(Spy.made) == 4
    start = np.array(
        [window_start(r, c, WINDOW_PX) for r, c in zip(where.rows, where.cols, strict=True)]
    )
    left_out = 0
    for spy in Spy.made:
        trained, judged = spy.trained[:, 0].astype(int), spy.judged[:, 0].astype(int)
        assert len(set(fold[judged])) == 1
        assert fold[judged][0] not in fold[trained]
        assert np.array_equal(spy.labels, present[trained])
        apart = np.abs(start[trained][:, None] - start[judged][None]).max(2)
        assert apart.min() >= WINDOW_PX, "windows overlap"
        left_out += 300 - len(trained) - len(judged)
    assert left_out > 0, "the test must have had something to leave out"


def test_window_statistics_are_those_of_each_band(tmp_path: Any) -> None:
    imagery = open_imagery(tiny_scene(tmp_path, rows=3).imagery)
    rows, cols = np.random.default_rng(0).uniform(20, 140, (2, 5))
    where = Places(imagery, rows, cols, WINDOW_PX, [0.0] * 4)
    found = window_statistics(where)
    assert found.shape == (5, 16)
    top, left = window_start(rows[3], cols[3], WINDOW_PX)
    pixels = imagery.read(top, left, WINDOW_PX, WINDOW_PX)[0][2].astype(float)
    assert found[3, 2] == pytest.approx(pixels.mean())
    assert found[3, 6] == pytest.approx(pixels.std())
    assert found[3, 10] == pytest.approx(np.abs(pixels[1:] - pixels[:-1]).mean())
    assert found[3, 14] == pytest.approx(np.abs(pixels[:, 1:] - pixels[:, :-1]).mean())


def test_location_only_learns_a_hill_and_logistic_regression_a_slope() -> None:
    where = places()
    hill = np.hypot(where.rows - 100, where.cols - 100) < 45
    scores = trained_scores(positions(where), hill, positions(where), trend_surface)
    assert scores[hill].mean() > scores[~hill].mean() + 2
    slope = where.rows > 100
    scores = trained_scores(positions(where), slope, positions(where), logistic)
    assert ((scores > 0) == slope).mean() > 0.95


def test_there_are_two_named_rivals() -> None:
    assert [name for name, _, _ in RIVALS] == ["location only", "band means and textures"]


def test_maxent_reads_classes_as_classes_and_takes_one_that_it_never_saw() -> None:
    pytest.importorskip("elapid")
    rng = np.random.default_rng(0)
    soil = rng.integers(1, 5, 900).astype(float)
    table = np.column_stack([rng.normal(size=900), soil])
    here = np.isin(soil, [1, 4]) & (rng.random(900) < 0.5)  # neither end of the numbers alone
    said = fit_maxent(table[here], table, [1])(np.array([[0.0, k] for k in (1, 2, 3, 4, 9)]))
    assert min(said[0], said[3]) > max(said[1], said[2]) + 0.2
    assert np.isfinite(said).all()
