"""Retrieval: ranks that can be counted by hand, own metadata, re-ranking of the top only."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from birds import inat_birds
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, tiny_scene
from torch import Tensor

from speciesmap.cli import main
from speciesmap.datasets.paired import PairedDataset, open_paired
from speciesmap.errors import DatasetError, ModelError
from speciesmap.evaluation import retrieval as module
from speciesmap.evaluation.retrieval import (
    evaluate_retrieval,
    rank_groups,
    rank_of_right,
    recalls,
    retrieval,
)
from speciesmap.learning.data import PairedRows
from speciesmap.models import SpeciesModel, load_model, save_model

VIT = {"backbone": "test_vit", "kwargs": {"patch_size": 4}}
GROUND = {"backbone": "test_vit", "kwargs": {"patch_size": 8}, "image_px": 16}


def units(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 6, generator=torch.manual_seed(seed)), dim=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PairedRows:
    dataset = open_paired(tiny_scene(tmp_path_factory.mktemp("scene")).chips)
    return PairedRows(dataset, np.arange(len(dataset)), dataset.taxa, 16)


@given(st.integers(0, 10_000))
def test_a_rank_is_the_place_in_the_sorted_list(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, (5, 12)).astype(float)
    right = rng.random((5, 12)) < 0.3
    right[:, 3] = True
    ranks = rank_of_right(torch.from_numpy(scores), torch.from_numpy(right))
    for score, good, rank in zip(scores, right, ranks.tolist(), strict=True):
        order = sorted(range(12), key=lambda k: (-score[k], good[k]))
        assert rank == 1 + next(k for k, item in enumerate(order) if good[item])


def test_a_model_that_says_the_same_of_all_finds_nothing() -> None:
    same = torch.ones(20, 6)
    ranks = rank_groups(same, same, {"instance": torch.arange(20)})["embeddings"]["instance"]
    assert (ranks == 20).all(), "ties count against it"
    assert recalls(ranks) == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0, "median_rank": 20.0}


def test_recalls_and_median_rank_are_those_of_the_ranks() -> None:
    ranks = np.array([1, 1, 4, 5, 6, 10, 11, 100])
    assert recalls(ranks) == {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75, "median_rank": 5.5}


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, gallery = units(50, 0), units(50, 1)
    groups = {"instance": torch.arange(50), "species": torch.arange(50) % 4}
    whole = rank_groups(queries, gallery, groups)["embeddings"]
    monkeypatch.setattr(module, "QUERIES", 7)
    parts = rank_groups(queries, gallery, groups)["embeddings"]
    for level in groups:
        np.testing.assert_array_equal(whole[level], parts[level])
    assert (whole["species"] <= whole["instance"]).all()


def test_reranking_orders_the_best_anew_and_leaves_the_rest_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TOP", 10)
    queries, gallery = units(40, 0), units(40, 1)
    asked: list[int] = []

    def oracle(query: int, candidates: np.ndarray[Any, Any]) -> Tensor:
        asked.append(len(candidates))
        return torch.from_numpy(np.where(candidates == query, 5.0, -5.0))

    made = rank_groups(queries, gallery, {"instance": torch.arange(40)}, oracle)
    before, after = (made[m]["instance"] for m in ("embeddings", "re-ranked"))
    assert asked == [10] * 40
    assert (after[before <= 10] == 1).all()
    np.testing.assert_array_equal(after[before > 10], before[before > 10])


def test_photos_and_windows_that_match_are_found_both_ways(
    rows: PairedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    truth = F.normalize(torch.randn(len(rows), 16, generator=torch.manual_seed(0)), dim=1)
    nowhere = torch.zeros(len(rows), 4)
    monkeypatch.setattr(module, "embed_rows", lambda *_: (truth, truth, nowhere))
    table = retrieval(model, rows)
    assert set(table["direction"]) == {"ground to aerial", "aerial to ground"}
    assert set(table["level"]) == {"instance", "species"}
    assert (table["R@1"] == 1).all()
    assert (table["median_rank"] == 1).all()
    assert (table["gallery"] == 36).all()
    assert not table["metadata"].any()


def test_rows_of_one_place_and_of_one_taxon_are_right(
    rows: PairedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photo i lies where window i + 3 does: another place, but in this scene the same taxon."""
    truth = torch.eye(36)[:, :36]
    shifted = truth.roll(3, 0)
    monkeypatch.setattr(module, "embed_rows", lambda *_: (shifted, truth, torch.zeros(36, 4)))
    table = retrieval(tiny_model(), rows).set_index(["direction", "level"])
    assert table.loc[("ground to aerial", "species"), "R@1"] == 1
    assert table.loc[("ground to aerial", "instance"), "R@1"] == 0
    twin = PairedRows(rows.dataset, rows.rows, rows.taxa, 16)
    twin.place = np.arange(36) % 3
    table = retrieval(tiny_model(), twin).set_index(["direction", "level"])
    assert table.loc[("ground to aerial", "instance"), "R@1"] == 1


def with_metadata() -> SpeciesModel:
    model = tiny_model(metadata={"dropout": 0.25})
    assert model.metadata is not None
    for parameter in model.metadata.parameters():
        torch.nn.init.normal_(parameter)
    return model


def test_each_window_carries_the_metadata_of_its_own_row_and_photos_none(
    rows: PairedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every window alike, the months of the rows decide, and they are each row's own."""
    model = with_metadata()
    assert model.metadata is not None
    own = torch.full((36, 4), torch.nan)
    own[:, 2] = torch.arange(36) % 12 + 1
    own[:, 3] = torch.arange(36) // 12 + 1
    alike = F.normalize(torch.ones(36, 16), dim=1)
    photos = model.add_metadata(alike, own).detach()  # what only row i's own metadata leads to
    monkeypatch.setattr(module, "embed_rows", lambda *_: (alike, photos, own))
    table = retrieval(model, rows).set_index(["metadata", "level", "direction"])
    for direction in ("ground to aerial", "aerial to ground"):
        assert table.loc[(True, "instance", direction), "R@1"] == 1
        assert table.loc[(False, "instance", direction), "R@1"] < 0.2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    towers: dict[str, Any] = {
        "bands": 3,
        "aerial": VIT,
        "ground": GROUND,
        "metadata": {"dropout": 0.25},
    }
    models = {
        "cve": tiny_model(**towers),
        "cvm": tiny_model(**towers, matcher=True),
        "aerial only": tiny_model(bands=3, ground=None),
        "four bands": tiny_model(),
    }
    for model in models.values():
        names = ("red", "green", "blue", "nir")[: len(model.bands)]
        object.__setattr__(model.architecture, "bands", names)
    return {name: save_model(model, folder / name, {}) for name, model in models.items()}


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inat_birds(tmp_path_factory.mktemp("birds"))


def test_one_call_measures_a_model_and_its_reranker_on_the_test_split(
    saved: dict[str, Path], birds: Path, tmp_path: Path
) -> None:
    out = evaluate_retrieval(saved["cve"], birds, tmp_path / "out", reranker=saved["cvm"])
    table = pd.read_csv(out / "retrieval.csv")
    assert len(table) == 16, "2 directions, 2 levels, 2 methods, with metadata and without"
    assert (table["queries"] == 6).all(), "the official test images only"
    assert set(table["method"]) == {"embeddings", "re-ranked"}
    assert table[["R@1", "R@5", "R@10"]].apply(lambda r: r.is_monotonic_increasing, axis=1).all()
    content = json.loads((out / "retrieval.json").read_text())
    assert content["split"] == "test"
    assert content["table"][0]["direction"] == "ground to aerial"


@pytest.mark.parametrize(
    ("model", "reranker", "message"),
    [
        ("aerial only", None, "has no ground tower"),
        ("four bands", None, "has 20 px and red, green, blue"),
        ("cve", "cve", "does not score pairs; give a model of method cvm_mae"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    saved: dict[str, Path],
    birds: Path,
    tmp_path: Path,
    model: str,
    reranker: str | None,
    message: str,
) -> None:
    second = saved[reranker] if reranker else None
    with pytest.raises(ModelError, match=message):
        evaluate_retrieval(saved[model], birds, tmp_path / "out", reranker=second)
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_not_there_is_refused(
    saved: dict[str, Path], birds: Path, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="no named rows of split 'dev'"):
        evaluate_retrieval(saved["cve"], birds, tmp_path / "out", split="dev")


@pytest.mark.parametrize(("names", "rows"), [(("train", "test"), 12), (("train", "train"), 24)])
def test_files_named_by_split_are_retrieved_apart(
    tmp_path: Path, names: tuple[str, str], rows: int
) -> None:
    """Rows of training are no queries; chips, whose files are all named so, have no splits."""
    bands = tuple(f"band_{k}" for k in range(4))
    chips = tiny_scene(tmp_path / "scene", rows=24, bands=bands).chips
    (file,) = chips.rglob("*.parquet")
    table = pq.read_table(file)
    file.unlink()
    for k, name in enumerate(names):
        part = file.with_name(f"{name}-{k:05d}-of-00002.parquet")
        pq.write_table(table.slice(12 * k, 12), part)
    model = save_model(tiny_model(), tmp_path / "model", {})
    out = evaluate_retrieval(model, chips, tmp_path / "out")
    assert (pd.read_csv(out / "retrieval.csv")["queries"] == rows).all()
    split = "test" if rows == 12 else None
    assert json.loads((out / "retrieval.json").read_text())["split"] == split


@pytest.mark.parametrize("reranked", [False, True])
def test_the_command_retrieves_with_what_was_pretrained(
    saved: dict[str, Path],
    birds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reranked: bool,
) -> None:
    trained = {"training": {"stage": "pretrain"}}
    model = save_model(load_model(saved["cve"]), tmp_path / "model", trained)
    call = ["evaluate", str(model), "--data", str(birds), "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as end:
        main([*call, "-q", *(["--reranker", str(saved["cvm"])] if reranked else [])])
    assert end.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["table"]) == (16 if reranked else 8)
    assert pd.read_csv(tmp_path / "out" / "retrieval.csv").shape[0] == len(printed["table"])


def test_images_are_read_once(rows: PairedRows, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    for name in ("aerial", "ground"):
        original = getattr(PairedDataset, name)

        def spy(self: Any, chosen: Any, name: str = name, original: Any = original) -> Any:
            read[name] += len(np.atleast_1d(chosen))
            return original(self, chosen)

        monkeypatch.setattr(PairedDataset, name, spy)
    monkeypatch.setattr("speciesmap.learning.data.KEEP_BELOW", 0)
    again = PairedRows(rows.dataset, rows.rows, rows.taxa, 16, 12)
    windows, photos = again.aerial(range(36)).float(), again.ground(range(36))
    read.clear()
    model = tiny_model(seed=1, window_px=12)
    aerial, _, _ = module.embed_rows(model, again)
    assert read == {"aerial": 36, "ground": 36}
    assert torch.allclose(aerial, model.encode_aerial(windows), atol=1e-5)

    def match(photos: Tensor, windows: Tensor) -> Tensor:
        return photos.float().mean((1, 2, 3)) + 1000 * windows.float().mean((1, 2, 3))

    monkeypatch.setattr(model, "match", match)
    score = module.pair_scorer(model, again, metadata=False)
    candidates = np.arange(1, 31)
    read.clear()
    scores = score(True)(0, candidates)
    assert read == {"aerial": 30, "ground": 1}
    assert torch.allclose(scores, match(photos[:1], windows[1:31]))
    read.clear()
    scores = score(False)(0, candidates)
    assert read == {"aerial": 1, "ground": 30}
    assert torch.allclose(scores, match(photos[1:31], windows[:1]))
