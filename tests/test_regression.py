"""Heads on tables: losses mean what they say, and nothing is chosen on what is held out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from speciesmap.errors import DatasetError
from speciesmap.models.losses import (
    assumed_absences,
    infinitely_weighted_logistic,
    normalised_poisson,
)
from speciesmap.statistics.regression import (
    LOSSES,
    Expansion,
    Records,
    choose_penalty,
    fit_covariates,
    fit_linear,
    fit_network,
    held_out_auc,
)


def world(seed: int = 0, places: int = 600, taxa: int = 3) -> tuple[Records, Any]:
    """Records of taxa whose intensity is log-quadratic in two of four features."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(places, 4))
    wanted = rng.normal(size=(taxa, 2))
    truth = -((features[:, None, :2] - wanted) ** 2).sum(2)  # (places, taxa)
    presences = np.zeros((places, taxa), np.float32)
    for k in range(taxa):
        share = np.exp(truth[:, k]) / np.exp(truth[:, k]).sum()
        presences[rng.choice(places, 60, p=share), k] = 1
    return Records(features, presences, np.ones_like(presences)), truth


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(-5, 5))
def test_normalised_poisson_is_the_mean_log_share_of_the_presences(seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(20, 2))
    presences, background = rng.integers(0, 3, (20, 2)), rng.random((20, 2))
    presences[0] = 1
    found = normalised_poisson(
        *(torch.from_numpy(a) for a in (logits + shift, presences, background))
    )
    for k in range(2):
        intensity = np.exp(logits[:, k])
        share = intensity / (intensity * background[:, k]).sum()
        wanted = -np.average(np.log(share), weights=presences[:, k])
        assert float(found[k]) == pytest.approx(wanted, abs=1e-6)


def test_logistic_losses_weigh_background_as_they_say() -> None:
    logits = torch.tensor([[0.3], [-1.2], [2.0]], dtype=torch.float64)
    presences = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    background = torch.tensor([[1.0], [3.0], [0.0]], dtype=torch.float64)
    z = logits[:, 0].numpy()
    here = (np.log1p(np.exp(-z[0])) + np.log1p(np.exp(-z[2]))) / 2
    away = (np.log1p(np.exp(z[0])) + 3 * np.log1p(np.exp(z[1]))) / 4
    assert float(assumed_absences(logits, presences, background)) == pytest.approx(here + away)
    heavy = infinitely_weighted_logistic(logits, presences, background, weight=50)
    assert float(heavy) == pytest.approx(here + 50 * away)


def test_infinite_weights_give_the_slopes_of_the_point_process() -> None:
    records, _ = world()
    a = fit_linear(records, 1.0, loss="poisson").logits(records.features)
    b = fit_linear(records, 1.0, loss="weighted_logistic").logits(records.features)
    assert np.corrcoef(a.T, b.T)[:3, 3:].diagonal().min() > 0.99


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_each_loss_finds_the_niche(loss: Any) -> None:
    records, truth = world()
    expansion = Expansion(records.features, hinges=3, quadratic=True)
    found = fit_linear(records, 3.0, expansion=expansion, loss=loss).logits(records.features)
    rho = [spearmanr(found[:, k], truth[:, k]).statistic for k in range(3)]
    assert min(rho) > 0.75


def test_all_taxa_at_once_are_as_each_alone() -> None:
    records, _ = world()
    together = fit_linear(records, 30.0).logits(records.features)
    for k in range(3):
        alone = Records(records.features, records.presences[:, [k]], records.background[:, [k]])
        found = fit_linear(alone, 30.0).logits(records.features)[:, 0]
        assert np.corrcoef(found, together[:, k])[0, 1] > 0.9999


def test_taxa_with_few_records_are_held_closer_to_no_preference() -> None:
    records, _ = world(taxa=1)
    few = records.presences.copy()
    few[np.flatnonzero(few)[5:]] = 0
    many = fit_linear(records, 30.0).spread
    assert fit_linear(Records(records.features, few, records.background), 30.0).spread < many / 2


def test_a_taxon_without_records_here_spoils_nothing() -> None:
    records, _ = world()
    presences = records.presences.copy()
    presences[:, 1] = 0
    empty = Records(records.features, presences, np.where(presences[:, [1]], 0, records.background))
    background = records.background.copy()
    background[:, 1] = 0
    for bare in (empty, Records(records.features, presences, background)):
        for heads in (fit_linear(bare, 10.0), fit_network(bare)):
            found = heads.standardised(records.features)
            assert np.isfinite(found).all()
            assert held_out_auc(bare, found)[0] > 0.6


@given(st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_places_beyond_the_training_range_are_clamped_to_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(50, 3))
    table[:, 2] = rng.integers(0, 3, 50)
    expansion = Expansion(table, [2], hinges=2, quadratic=True)
    low, high = table[:, :2].min(0), table[:, :2].max(0)
    beyond = np.column_stack([rng.normal(size=(20, 2)) * 100, rng.integers(0, 3, 20)])
    inside = beyond.copy()
    inside[:, :2] = np.clip(beyond[:, :2], low, high)
    assert torch.equal(expansion(beyond), expansion(inside))
    features = expansion(table)
    assert features.mean(0).abs().max() < 1e-5
    assert features.std(0, correction=0).max() < 1.01


def test_linear_heads_judge_places_beyond_the_training_range_as_a_map_by_their_weights_does() -> (
    None
):
    records, _ = world()
    heads = fit_linear(records, 30.0)
    weight, offset = heads.linear()
    beyond = torch.from_numpy(records.features).float() * 10
    np.testing.assert_allclose(
        heads.logits(beyond), beyond @ weight.T + offset, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("categorical", [[], [0], [0, 1]])
def test_an_expansion_comes_back_from_its_state(categorical: list[int]) -> None:
    table = np.random.default_rng(0).integers(0, 4, (50, 2)).astype(float)
    made = Expansion(table, categorical, hinges=3, quadratic=True)
    again = Expansion.restore(json.loads(json.dumps(made.state())))
    assert torch.equal(again(table), made(table))


def test_an_unknown_category_is_none_of_the_known() -> None:
    table = np.array([[1.0], [1.0], [2.0], [5.0]])
    expansion = Expansion(table, [0])
    known, unknown = expansion(table), expansion([[3.0]])
    assert known.shape == (4, 3)
    assert (unknown < 0).all()


def test_the_network_is_the_same_for_the_same_seed_and_leaves_the_generator_alone() -> None:
    records, _ = world(places=200)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    a, b = fit_network(records, seed=1), fit_network(records, seed=1)
    assert torch.equal(torch.rand(3), wanted)
    assert np.array_equal(a.logits(records.features), b.logits(records.features))


def test_the_ensemble_finds_the_niche_on_places_it_never_saw() -> None:
    records, truth = world(places=1200)
    train = np.arange(1200) < 800
    model = fit_covariates(records.subset(train), np.arange(800) % 4)
    assert model.penalty in (10.0, 30.0, 100.0, 300.0)
    found = model.standardised(records.features[~train])
    rho = [spearmanr(found[:, k], truth[~train, k]).statistic for k in range(3)]
    assert np.mean(rho) > 0.8


def test_a_signal_among_much_noise_is_penalised_and_a_clear_one_is_not() -> None:
    records, _ = world(places=400)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(400, 100))
    fold = np.arange(400) % 4
    buried = np.column_stack([records.features, noise])
    noisy = Records(buried, records.presences, records.background)
    assert choose_penalty(noisy, fold, penalties=(1e-3, 100)) == 100
    clear = np.column_stack(
        [records.presences[:, 0] + rng.normal(size=400) * 0.3, noise[:, :3] * 9]
    )
    one = Records(clear, records.presences[:, :1], records.background[:, :1])
    assert choose_penalty(one, fold, penalties=(1e-3, 1e9)) == 1e-3


def test_what_does_not_fit_is_refused_in_words() -> None:
    features, ones = np.zeros((5, 2)), np.ones((5, 1))
    with pytest.raises(DatasetError, match="do not fit"):
        Records(features, ones[:4], ones)
    features[3, 1] = np.nan
    with pytest.raises(DatasetError, match="feature 1 of place 3 is not finite"):
        Records(features, ones, ones)
    with pytest.raises(DatasetError, match="taxon 0 has records but no background"):
        Records(np.zeros((5, 2)), ones, np.zeros((5, 1)))
