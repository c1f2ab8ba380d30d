"""Measures agree with independent implementations and with what their names promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from speciesmap.statistics.metrics import (
    auc,
    average_precision,
    best_threshold,
    boyce,
    brier_skill,
    calibration_error,
    measure,
    omission,
    paired_difference,
    reliability,
    true_skill,
)


@st.composite
def scored(draw: st.DrawFn) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Labels with both classes, and scores with many ties."""
    size = draw(st.integers(2, 60))
    present = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    present[0], present[1] = True, False
    levels = draw(st.integers(1, 12))
    values = draw(st.lists(st.integers(0, levels), min_size=size, max_size=size))
    return present, np.array(values) / levels


@given(scored())
def test_auc_is_the_share_of_pairs_in_order(data: Any) -> None:
    present, score = data
    pairs = score[present][:, None] - score[~present][None]
    assert auc(present, score) == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)


@given(scored())
def test_average_precision_sums_precision_over_steps_of_recall(data: Any) -> None:
    present, score = data
    total, recall = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        chosen = score >= threshold
        reached = present[chosen].sum() / present.sum()
        total += (reached - recall) * present[chosen].mean()
        recall = reached
    assert average_precision(present, score) == pytest.approx(total)


@given(scored())
def test_the_best_threshold_is_not_beaten_by_any(data: Any) -> None:
    present, score = data
    best = true_skill(present, score, best_threshold(present, score))
    assert best is not None
    for threshold in set(score):
        skill = true_skill(present, score, threshold)
        chosen = score >= threshold
        hit, false = (chosen & present).sum(), (chosen & ~present).sum()
        assert skill == pytest.approx(hit / present.sum() - false / (~present).sum())
        assert best >= skill - 1e-12


def boyce_by_hand(here: NDArray[np.float64], away: NDArray[np.float64]) -> float | None:
    """Window by window, with ranks counted one by one."""
    values = np.r_[here, away]
    low, high = values.min(), values.max()
    width = 0.1 * (high - low)
    steps = []
    for k in range(101):
        start = low + k * (high - width - low) / 100
        stop = high if k == 100 else start + width
        away_share = np.mean([start <= v <= stop for v in away])
        if away_share > 0:
            steps.append((start, np.mean([start <= v <= stop for v in here]) / away_share))
    ratios = [ratio for _, ratio in steps]
    kept = [
        step for k, step in enumerate(steps) if k + 1 == len(steps) or ratios[k] != ratios[k + 1]
    ]
    if len(kept) < 3:
        return None

    def ranks(numbers: list[float]) -> NDArray[np.float64]:
        a = np.array(numbers)
        return np.array([(a < v).sum() + ((a == v).sum() + 1) / 2 for v in a])

    return float(np.corrcoef(ranks([s[0] for s in kept]), ranks([s[1] for s in kept]))[0, 1])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 80), st.integers(3, 200), st.floats(-2, 2))
def test_boyce_agrees_with_counting_by_hand(seed: int, here: int, away: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    presences, background = rng.normal(shift, 1, here), rng.normal(0, 1, away)
    wanted = boyce_by_hand(presences, background)
    found = boyce(presences, background)
    assert (found is None) == (wanted is None)
    if wanted is not None:
        assert found == pytest.approx(wanted, abs=1e-9)


def test_boyce_tells_a_good_map_from_chance_and_from_a_reversed_one() -> None:
    rng = np.random.default_rng(0)
    background = rng.random(20_000)
    presences = np.sqrt(rng.random(5_000))  # twice as dense at 1 as on average, none at 0
    good, reversed_ = boyce(presences, background), boyce(1 - presences, background)
    assert good is not None and good > 0.97
    assert reversed_ is not None and reversed_ < -0.97
    chance = [boyce(rng.random(300), background) for _ in range(40)]
    assert abs(np.mean([c for c in chance if c is not None])) < 0.2
    assert boyce([0.5, 0.5], [0.5]) is None
    assert boyce([], [0.5, 0.6]) is None


@given(st.integers(0, 1_000), st.integers(1, 300))
def test_the_reliability_table_loses_no_place(seed: int, places: int) -> None:
    rng = np.random.default_rng(seed)
    said = np.r_[rng.random(places), 0.0, 1.0]
    present = rng.random(len(said)) < said
    table = reliability(present, said)
    assert table["count"].sum() == len(said)
    assert ((table["lower"] <= table["predicted"]) & (table["predicted"] <= table["upper"])).all()
    assert (table["observed"] * table["count"]).sum() == pytest.approx(present.sum())
    by_hand = sum(
        abs(said[inside].mean() - present[inside].mean()) * inside.mean()
        for k in range(10)
        if (inside := (np.minimum(said * 10, 9).astype(int) == k)).any()
    )
    assert calibration_error(present, said) == pytest.approx(by_hand)


def test_calibrated_forecasts_have_little_error_and_shifted_ones_have_theirs() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(200_000) * 0.7
    present = rng.random(len(truth)) < truth
    assert calibration_error(present, truth) < 0.01  # type: ignore[operator]
    assert calibration_error(present, truth + 0.3) == pytest.approx(0.3, abs=0.01)


def test_brier_skill_is_1_for_certainty_0_for_the_base_rate_and_negative_for_worse() -> None:
    present = np.array([True, False, False, False])
    assert brier_skill(present, present.astype(float)) == 1
    assert brier_skill(present, np.full(4, 0.25)) == pytest.approx(0)
    assert brier_skill(present, np.full(4, 0.9)) < 0  # type: ignore[operator]
    assert brier_skill([True, True], [0.5, 0.5]) is None


def test_omission_is_the_share_of_presences_below_the_threshold() -> None:
    assert omission([0.1, 0.5, 0.9, 0.5], 0.5) == 0.25
    assert omission([], 0.5) is None


def test_one_class_alone_measures_nothing_and_breaks_nothing() -> None:
    nothing = measure([False, False], [0.1, 0.2], 0.5, probability=True)
    assert [nothing[name] for name in ("auc", "tss", "brier_skill", "omission")] == [None] * 4
    assert nothing["places"] == 2


def test_only_probabilities_are_judged_as_such() -> None:
    present, score = np.array([True, False, True]), np.array([0.9, 0.2, 0.4])
    relative = measure(present, score, 0.3, probability=False)
    assert relative["brier_skill"] is None and relative["calibration_error"] is None
    assert measure(present, score, 0.3, probability=True)["calibration_error"] is not None


def test_paired_differences_leave_out_unknown_pairs() -> None:
    found = paired_difference([0.8, 0.7, np.nan, 0.9], [0.7, 0.7, 0.1, 0.7])
    gaps = np.array([0.1, 0.0, 0.2])
    assert found["difference"] == pytest.approx(gaps.mean())
    assert found["standard_error"] == pytest.approx(gaps.std(ddof=1) / np.sqrt(3))
    assert (found["pairs"], found["better"]) == (3, 2)
    alone = paired_difference([0.8], [0.7])
    assert alone["standard_error"] is None
    assert paired_difference([], [])["difference"] is None
