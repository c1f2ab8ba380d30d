"""AUC on held-out places, and probabilities from presences and background."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from tiny import TAXA

from speciesmap.learning.validation import summarise
from speciesmap.statistics.calibration import calibrate
from speciesmap.statistics.chance import better_than_chance, fold_auc

NAMES = [taxon.name for taxon in TAXA]


def test_fold_auc_is_that_of_each_fold_and_of_all() -> None:
    rng = np.random.default_rng(0)
    present, fold = rng.random(90) < 0.4, np.arange(90) % 3
    score = rng.normal(size=90) + present
    found = fold_auc(present, score, fold)
    wanted = [roc_auc_score(present[fold == k], score[fold == k]) for k in range(3)]
    assert found["auc_folds"] == pytest.approx(wanted)
    assert found["auc_mean"] == pytest.approx(np.mean(wanted))
    assert found["auc_sd"] == pytest.approx(np.std(wanted, ddof=1))
    assert found["auc"] == pytest.approx(roc_auc_score(present, score))
    assert found["presences"] == present.sum()


def test_a_fold_without_presences_has_no_auc_and_spoils_nothing() -> None:
    found = fold_auc([True, False, False, False], [2.0, 1.0, 5.0, 6.0], [0, 0, 1, 1])
    assert found["auc_folds"] == [1.0, None]
    assert (found["auc_mean"], found["auc_sd"]) == (1.0, None)
    nothing = fold_auc([False, False], [1.0, 2.0], [0, 1])
    assert (nothing["auc"], nothing["auc_mean"], nothing["presences"]) == (None, None, 0)


def test_folds_that_scatter_around_a_half_tell_nothing() -> None:
    assert better_than_chance([0.7, 0.72, 0.69, 0.75]) is True
    assert better_than_chance([0.4, 0.62, 0.55, 0.49]) is False
    assert better_than_chance([0.9, None]) is None


def test_random_scores_are_flagged_and_good_ones_are_not() -> None:
    table = folds_table()
    assert [summarise(table, TAXA)[name]["informative"] for name in NAMES] == [True] * 3
    table[NAMES[1]] = np.random.default_rng(1).normal(size=len(table))
    assert [summarise(table, TAXA)[n]["informative"] for n in NAMES] == [True, False, True]


def folds_table(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    taxon = np.r_[np.repeat(NAMES, 40), np.repeat("", 200)]
    table = pd.DataFrame({"taxon": taxon, "fold": np.arange(len(taxon)) % 4})
    table["background"] = np.where(taxon == "", "random", "")
    table["longitude"], table["latitude"] = rng.normal(size=(2, len(taxon)))
    for name in NAMES:
        table[name] = rng.normal(size=len(taxon)) + (taxon == name)
    return table


def test_a_taxon_is_judged_against_background_and_not_against_other_taxa() -> None:
    table = folds_table()
    before = summarise(table, TAXA)
    assert set(before) == set(NAMES)
    assert before[NAMES[0]]["presences"] == 40
    others = table["taxon"].isin(NAMES[1:])
    table.loc[others, NAMES[0]] = 100.0
    after = summarise(table, TAXA)[NAMES[0]]
    assert after.pop("auc_target_group") == 0 < before[NAMES[0]].pop("auc_target_group") < 1
    assert before[NAMES[0]].pop("informative") and not after.pop("informative")
    assert after == before[NAMES[0]]
    assert after["auc"] == after["auc_random"]


def test_folds_that_had_no_presence_to_learn_from_are_left_out() -> None:
    table = folds_table()
    unlearnt = table["fold"] == 1
    table.loc[unlearnt, NAMES[0]] = np.nan
    found = summarise(table, TAXA)[NAMES[0]]
    assert found == summarise(table[~unlearnt], TAXA)[NAMES[0]]
    assert found["presences"] == 30
    nowhere = summarise(table.assign(**{NAMES[0]: np.nan}), TAXA)[NAMES[0]]
    assert (nowhere["presences"], nowhere["informative"]) == (0, None)
    assert calibrate(table, TAXA, 0.1)[NAMES[0]] == calibrate(table[~unlearnt], TAXA, 0.1)[NAMES[0]]


def test_both_kinds_of_background_are_judged_whichever_was_trained_on() -> None:
    table = folds_table()
    table.loc[table["background"] == "random", NAMES[0]] = -100.0
    group = table[table["taxon"] == ""].assign(background="target-group", **{NAMES[0]: 100.0})
    table = pd.concat([table, group], ignore_index=True)
    for kind, value in (("random", 1.0), ("target-group", 0.0)):
        found = summarise(table, TAXA, kind)[NAMES[0]]
        assert (found["auc_random"], found["auc_target_group"]) == (1.0, 0.0)
        assert found["auc"] == value
    alone = folds_table().query(f"taxon in ['', '{NAMES[0]}']")
    assert summarise(alone, TAXA[:1])[NAMES[0]]["auc_target_group"] is None


@pytest.mark.parametrize(("slope", "intercept"), [(2.0, -1.5), (0.6, -3.0), (1.0, -1.0)])
def test_calibration_recovers_the_truth_from_presences_and_background(
    slope: float, intercept: float
) -> None:
    """Presences drawn where the taxon is, background everywhere, as a survey would find them."""
    rng = np.random.default_rng(1)
    landscape = rng.normal(-0.5, 1.5, 400_000)  # the model's logit at each place
    present = rng.random(len(landscape)) < expit(slope * landscape + intercept)
    prevalence = float(present.mean())
    here = rng.choice(landscape[present], 5_000, replace=False)
    away = rng.choice(landscape, 20_000, replace=False)
    name = NAMES[0]
    table = pd.DataFrame(
        {"taxon": np.r_[np.repeat(name, 5_000), np.repeat("", 20_000)], name: np.r_[here, away]}
    )
    found = calibrate(table, TAXA[:1], prevalence)[name]
    assert found.prevalence == prevalence
    assert found.slope == pytest.approx(slope, rel=0.1)
    assert found.intercept == pytest.approx(intercept, abs=0.2)
    assert expit(found.slope * away + found.intercept).mean() == pytest.approx(prevalence, rel=1e-6)
    truth = expit(slope * landscape + intercept)
    error = np.abs(expit(found.slope * landscape + found.intercept) - truth)
    assert error.mean() < 0.02


def test_only_taxa_with_a_stated_prevalence_and_presences_are_calibrated() -> None:
    table = folds_table()
    assert calibrate(table, TAXA, None) == {}
    assert set(calibrate(table, TAXA, 0.1)) == set(NAMES)
    stated = calibrate(table, TAXA, {NAMES[1]: 0.3, "Nobody": 0.5})
    assert set(stated) == {NAMES[1]}
    assert stated[NAMES[1]].prevalence == 0.3
    table = table[table["taxon"] != NAMES[2]]
    assert set(calibrate(table, TAXA, 0.1)) == set(NAMES[:2])


def test_few_presences_make_no_probability(caplog: pytest.LogCaptureFixture) -> None:
    table = folds_table()
    seen = np.flatnonzero(table["taxon"] == NAMES[0])
    assert set(calibrate(table.drop(seen[10:]), TAXA, 0.1)) == set(NAMES)
    assert set(calibrate(table.drop(seen[9:]), TAXA, 0.1)) == set(NAMES[1:])
    assert f"{NAMES[0]} has 9 held-out presences" in caplog.text


def test_the_mean_is_the_prevalence_where_presences_are_far_from_all_background() -> None:
    table = folds_table()
    table[NAMES[0]] = np.where(table["taxon"] == NAMES[0], 40.0, -40.0)
    found = calibrate(table, TAXA, 0.02)[NAMES[0]]
    away = table.loc[table["taxon"] == "", NAMES[0]].to_numpy()
    assert expit(found.slope * away + found.intercept).mean() == pytest.approx(0.02, rel=1e-6)
