"""Naming taxa: figures as one counts them by hand, splits that share nothing, one table."""

from __future__ import annotations

import gc
import json
import math
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from birds import OVERHEAD_PX, cub, inat_birds
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from tiny import BANDS, TAXA, tiny_model
from torch import Tensor

from speciesmap.cli import main
from speciesmap.config import ClassifyConfig, load_config
from speciesmap.datasets.birds import open_birds
from speciesmap.datasets.columns import FACTS, FRACTIONS
from speciesmap.datasets.paired import PairedDataset, open_paired
from speciesmap.datasets.splits import OVERLAP, SAME_OBSERVATION, leaks
from speciesmap.datasets.writer import PairedWriter
from speciesmap.errors import ConfigError, ModelError, OutputError
from speciesmap.learning.classify import read_results
from speciesmap.learning.data import PairedRows
from speciesmap.learning.splitting import observations_of, split_rows
from speciesmap.learning.train import train
from speciesmap.models import SpeciesModel, load_model, save_model
from speciesmap.statistics.metrics import classification_figures

SIDE = 16
CPU = {"accelerator": "cpu", "devices": 1}


def by_hand(
    scores: NDArray[np.float64], label: NDArray[np.int64], observation: NDArray[Any], k: int
) -> tuple[float, dict[int, float]]:
    """Share of observations whose taxon is among the k best, and the same taxon by taxon."""
    right: dict[int, list[bool]] = {}
    for name in dict.fromkeys(observation.tolist()):
        rows = observation == name
        votes = scores[rows].mean(0)
        own = int(label[rows][0])
        better = sum(votes[t] >= votes[own] for t in range(len(votes)) if t != own)
        right.setdefault(own, []).append(better < k)
    every = [value for values in right.values() for value in values]
    return float(np.mean(every)), {taxon: float(np.mean(v)) for taxon, v in right.items()}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(2, 40), st.integers(0, 1000))
def test_figures_are_what_one_counts_by_hand(rows: int, taxa: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    observation = rng.integers(0, max(1, rows // 2), rows)
    label = rng.integers(0, taxa, rows)[observation]
    scores = rng.normal(size=(rows, taxa))
    counts = rng.integers(0, 150, taxa)
    figures = classification_figures(scores, label, observation, counts)
    for k in (1, 5, 30):
        share, by_taxon = by_hand(scores, label, observation, k)
        if k < 30:
            assert figures[f"top{k}"] == pytest.approx(share)
        groups = {
            "": list(by_taxon),
            "frequent_": [t for t in by_taxon if counts[t] >= 100],
            "common_": [t for t in by_taxon if 20 <= counts[t] < 100],
            "rare_": [t for t in by_taxon if counts[t] < 20],
        }
        for prefix, members in groups.items():
            found = figures[f"{prefix}species_top{k}"]
            if members:
                assert found == pytest.approx(np.mean([by_taxon[t] for t in members]))
            else:
                assert found is None


def test_a_classifier_that_says_the_same_of_all_is_never_right_by_a_tie() -> None:
    figures = classification_figures(np.zeros((4, 8)), np.arange(4), np.arange(4), np.full(8, 10))
    assert figures["top1"] == figures["top5"] == 0.0
    assert figures["species_top30"] == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"modes": ["probe"], "probe_lr": 1e36},
        {"modes": ["finetune"], "optim": {"epochs": 2, "batch_size": 16, "lr": 1e36}},
    ],
    ids=["probe", "finetune"],
)
def test_a_network_that_diverged_is_refused_and_not_the_best(
    chips: Path, init: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"training diverged: .* lower probe_lr = .* optim\.lr"):
        train(load_config(config(chips, init, views=["aerial"], **changes)), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def telling(folder: Path, rows: int = 120) -> Path:
    """Chips of three taxa, told apart by a tone of photos and windows; two photos a place."""
    rng = np.random.default_rng(0)
    spot = np.arange(rows) // 2
    species = spot % len(TAXA)
    windows = rng.integers(0, 60, (rows, 4, SIDE, SIDE)) + 60 * species[:, None, None, None]
    tones = rng.integers(0, 60, (rows, 20, 20, 3)) + 60 * species[:, None, None, None]
    columns: dict[str, Any] = {
        name: True if kind == "bool" else 0 if "int" in kind else "" for name, kind in FACTS.items()
    }
    order = rng.permutation(rows)
    columns |= {
        "observation_uuid": [f"o{k}" for k in spot],
        "latitude": 37 + spot // 12 * 0.01,
        "longitude": -122 + spot % 12 * 0.01,
        "name": [TAXA[k].name for k in species],
        "rank": "species",
        **{f"finetune_{p}percent": order < float(p) / 100 * rows for p in FRACTIONS},
    }
    facts = pd.DataFrame(columns, index=range(rows))
    photos = [stored(tone.astype(np.uint8)) for tone in tones]
    chips = folder / "chips"
    with PairedWriter(chips, BANDS, SIDE, np.dtype(np.uint8)) as writer:
        writer.write(facts, windows.astype(np.uint8), photos)
        writer.finish(TAXA, 1.0)
    return chips


def stored(pixels: NDArray[np.uint8]) -> dict[str, Any]:
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "photo.png"}


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return telling(tmp_path_factory.mktemp("telling"))


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(taxa=())
    object.__setattr__(model.architecture, "bands", BANDS)
    return save_model(model, tmp_path_factory.mktemp("runs") / "init", {})


def config(chips: Path, init: Any, **changes: Any) -> dict[str, Any]:
    base = {
        "stage": "classify",
        "init": init if isinstance(init, dict) else str(init),
        "data": {"dataset": str(chips)},
        "splits": {"block_m": 1100},
        "percent": [100.0],
        "optim": {"epochs": 8, "batch_size": 16, "lr": 0.002},
        "trainer": CPU,
    }
    return {**base, **changes}


def test_every_combination_is_in_one_table_and_learns_what_can_be_seen(
    chips: Path, init: Path, tmp_path: Path
) -> None:
    run = train(load_config(config(chips, init, percent=[20.0, 100.0])), tmp_path / "run")
    table = pd.read_csv(run / "classification.csv")
    combinations = table[["percent", "view", "mode"]].itertuples(index=False)
    assert {tuple(c) for c in combinations} == {
        (p, v, m)
        for p in (20.0, 100.0)
        for v in ("ground", "aerial", "both")
        for m in ("probe", "finetune")
    }
    assert table["species_top5"].eq(1.0).all(), "of three taxa"
    labels = table.groupby("percent")["labels"].first()
    assert 0 < labels[20.0] < labels[100.0]
    full = table[table["percent"] == 100.0]
    assert (full["species_top1"] > 0.7).all(), full
    text = (run / "classification.md").read_text()
    assert text.count("\n| ") >= 13
    assert "train rows: " in text
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_the_table_is_the_same_twice_and_several_models_stand_in_one(
    chips: Path, init: Path, tmp_path: Path
) -> None:
    inits = {"one": str(init), "again": str(init)}
    content = config(chips, inits, views=["aerial"], optim={"epochs": 2, "batch_size": 16})
    table = pd.read_csv(train(load_config(content), tmp_path / "run") / "classification.csv")
    one, again = (table[table["init"] == name].drop(columns="init") for name in inits)
    assert len(one) == 2
    assert one.reset_index(drop=True).equals(again.reset_index(drop=True))


@pytest.mark.parametrize(("precision", "halves"), [("32-true", False), ("auto", True)])
def test_the_precision_is_the_configured_one(
    chips: Path,
    init: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    halves: bool,
) -> None:
    seen: set[bool] = set()
    original = SpeciesModel.encode_aerial

    def spy(self: SpeciesModel, windows: Tensor, metadata: Tensor | None = None) -> Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return original(self, windows, metadata)

    monkeypatch.setattr("speciesmap.learning.classify.computes_bfloat16", lambda device: True)
    monkeypatch.setattr("speciesmap.learning.fit.computes_bfloat16", lambda device: True)
    monkeypatch.setattr("speciesmap.learning.fit.LEAST_BFLOAT16_PX", 1)
    monkeypatch.setattr(SpeciesModel, "encode_aerial", spy)
    content = config(chips, init, views=["aerial"], optim={"epochs": 1, "batch_size": 64})
    content["trainer"] = {**CPU, "precision": precision}
    train(load_config(content), tmp_path / "run")
    assert seen == {halves}


def test_training_stops_when_validation_no_longer_rises(
    chips: Path, init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from speciesmap.learning import classify

    seen: list[float] = []
    original = classify._Best.over

    def over(self: Any, figure: float, network: Any) -> bool:
        seen.append(figure)
        return original(self, figure, network)

    monkeypatch.setattr(classify._Best, "over", over)
    content = config(chips, init, views=["aerial"], modes=["probe"], patience=2)
    content["optim"] = {"epochs": 60, "batch_size": 16}
    train(load_config(content), tmp_path / "run")
    best = int(np.argmax(seen))
    assert len(seen) == best + 3 < 60


def test_splits_share_no_observation_and_no_ground(chips: Path, init: Path) -> None:
    dataset = open_paired(chips)
    close = pd.DataFrame(dataset.facts)
    close.loc[[0, 119], "longitude"] = close.loc[60, "longitude"] + 5e-5
    close.loc[[0, 119], "latitude"] = close.loc[60, "latitude"]
    close.loc[7, "observation_uuid"] = "o50"
    dataset.facts = close
    checked = load_config(config(chips, init))
    assert isinstance(checked, ClassifyConfig)
    rows, notes = split_rows(dataset, checked)
    facts = dataset.facts
    metres = 111_320 * np.column_stack(
        [facts["longitude"] * math.cos(math.radians(37)), facts["latitude"]]
    )
    names = list(rows)
    for k, name in enumerate(names):
        for other in names[k + 1 :]:
            mine, theirs = rows[name], rows[other]
            ids = facts["observation_uuid"]
            assert not set(ids.iloc[mine]) & set(ids.iloc[theirs])
            apart = np.abs(metres[mine][:, None] - metres[theirs]).max(-1)
            assert apart.min() > SIDE
    left = sum(count for text, count in notes.items() if "left out" in text)
    assert left > 0
    assert sum(map(len, rows.values())) + left == 120
    assert notes["taxa"] == 3


def test_rows_without_the_number_of_an_observation_are_each_their_own(
    chips: Path, init: Path
) -> None:
    dataset = open_paired(chips)
    checked = load_config(config(chips, init))
    assert isinstance(checked, ClassifyConfig)
    numbered, _ = split_rows(dataset, checked)
    dataset.facts = dataset.facts.assign(observation_uuid=[None, ""] * 60)
    rows, notes = split_rows(dataset, checked)
    told = "rows without observation_uuid, whose observation may be in two splits"
    assert notes[told] == 120
    assert {name: part.tolist() for name, part in rows.items()} == {
        name: part.tolist() for name, part in numbered.items()
    }
    windows = PairedRows(dataset, rows["train"], TAXA)
    assert observations_of(dataset.facts, windows).sum() == len(rows["train"])


def test_rows_without_a_place_are_in_no_block_and_leak_by_their_observation_only(
    chips: Path, init: Path
) -> None:
    dataset = open_paired(chips)
    dataset.facts = facts = dataset.facts.copy()
    facts.loc[[3, 60], "latitude"] = np.nan
    checked = load_config(config(chips, init))
    assert isinstance(checked, ClassifyConfig)
    rows, notes = split_rows(dataset, checked)
    assert not {3, 60} & set(np.concatenate(list(rows.values())).tolist())
    assert notes["rows left out of the blocks without a place"] == 2
    facts.loc[[2, 3], "observation_uuid"] = "of both"
    facts.loc[5, "observation_uuid"] = "alone"
    told = facts.iloc[[2, 3, 60, 5, 4]].assign(
        split=["train", "validation", "train", "validation", "test"]
    )
    assert {reason: found.tolist() for reason, found in leaks(told, SIDE).items()} == {
        SAME_OBSERVATION: [True, False, False, False, False],
        OVERLAP: [False, False, False, True, False],
    }


def test_windows_in_order_are_read_once(chips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from speciesmap.learning.classify import _in_order

    read: list[int] = []
    original = PairedDataset.aerial
    monkeypatch.setattr(
        PairedDataset, "aerial", lambda self, rows: read.extend(rows) or original(self, rows)
    )
    dataset = open_paired(chips)
    rows = PairedRows(dataset, np.arange(36), TAXA, window_px=12)
    batches = list(_in_order(rows, 16, torch.device("cpu")))
    assert sorted(read) == list(range(36))
    assert torch.equal(torch.cat([batch["aerial"] for batch in batches]), rows.aerial(range(36)))


def test_a_withheld_taxon_is_neither_trained_nor_tested(chips: Path, init: Path) -> None:
    data = {"dataset": str(chips), "withheld": [TAXA[0].name]}
    checked = load_config(config(chips, init, data=data))
    assert isinstance(checked, ClassifyConfig)
    rows, notes = split_rows(open_paired(chips), checked)
    names = open_paired(chips).facts["name"]
    assert notes["taxa"] == 2
    assert all(TAXA[0].name not in set(names.iloc[part]) for part in rows.values())


def test_what_cannot_be_compared_is_refused(chips: Path, init: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"no rows for validation \(nothing was left out\); name"):
        train(load_config(config(chips, init, splits={})), out)
    with pytest.raises(ModelError, match="none is not a model"):
        train(load_config(config(chips, {"good": str(init), "bad": str(tmp_path / "none")})), out)
    with pytest.raises(
        ConfigError, match=r"data\.withheld names 'Quercus agrifola'.* did you mean"
    ):
        data = {"dataset": str(chips), "withheld": ["Quercus agrifola"]}
        train(load_config(config(chips, init, data=data)), out)
    wide = tiny_model(taxa=(), window_px=32)
    object.__setattr__(wide.architecture, "bands", BANDS)
    save_model(wide, tmp_path / "wide", {})
    with pytest.raises(ConfigError, match=r"data\.window_px = 32 is more than the 16 px"):
        data = {"dataset": str(chips), "window_px": 32}
        train(load_config(config(chips, tmp_path / "wide", data=data)), out)
    with pytest.raises(
        ConfigError, match=r"of 0\.25, 0\.5 percent .* fewer than 2 are for training"
    ):
        train(load_config(config(chips, init, modes=["probe"], percent=[0.25, 0.5])), out)
    blind = tiny_model(taxa=(), ground=None)
    object.__setattr__(blind.architecture, "bands", BANDS)
    save_model(blind, tmp_path / "blind", {})
    with pytest.raises(ModelError, match="no photos to name taxa from"):
        train(load_config(config(chips, tmp_path / "blind")), out)
    other = save_model(tiny_model(taxa=(), bands=3), tmp_path / "other", {})
    with pytest.raises(ModelError, match=r"windows of 16 px with bands band_0, .*red"):
        train(load_config(config(chips, other)), out)
    with pytest.raises(ConfigError, match=r"needs data\.dataset"):
        train(load_config(config(chips, init, data={})), out)
    with pytest.raises(ConfigError, match="did you mean 'views'"):
        load_config(config(chips, init, view=["both"]))
    with pytest.raises(ConfigError, match="keeps nothing to go on from; leave --resume out"):
        train(load_config(config(chips, init)), out, resume=True)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        train(load_config(config(chips, init)), out)


def test_one_model_is_in_memory_at_a_time(
    chips: Path, init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[SpeciesModel] = weakref.WeakSet()

    def load(folder: Path | str) -> SpeciesModel:
        gc.collect()
        assert not alive
        model = load_model(folder)
        alive.add(model)
        return model

    monkeypatch.setattr("speciesmap.learning.classify.load_model", load)
    inits = {name: str(init) for name in ("a", "b", "c")}
    settled = config(chips, inits, views=["aerial"], modes=["probe"])
    train(load_config(settled), tmp_path / "run")
    assert {row["init"] for row in read_results(tmp_path / "run")["table"]} == set(inits)


def test_the_command_prints_the_table(
    chips: Path, init: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config(chips, init, views=["ground"], modes=["probe"])
    file = tmp_path / "classify.yaml"
    file.write_text(json.dumps(content))
    main_call = ["train", str(file), "--out", str(tmp_path / "run"), "--json", "-q"]
    with pytest.raises(SystemExit) as end:
        main(main_call)
    assert end.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["table"] == read_results(tmp_path / "run")["table"]
    assert printed["table"][0]["view"] == "ground"
    assert printed["splits"]["taxa"] == 3


def test_a_configuration_evaluates_any_model(
    chips: Path, init: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "classify.yaml"
    content = config(chips, "a model that is not there", views=["aerial"], modes=["probe"])
    file.write_text(json.dumps(content))
    call = ["evaluate", str(init), "--data", str(file), "--out", str(tmp_path / "run")]
    for option in ("covariates", "split"):
        with pytest.raises(SystemExit) as end:
            main([*call, f"--{option}", "rain.tif"])
        assert end.value.code == 1
        assert f"--{option} is not read to name taxa; leave it out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([*call, "--json", "-q"])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["table"][0]["view"] == "aerial"


def test_the_shipped_configuration_runs(chips: Path, init: Path, tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "configs" / "crisp_nmv_classify.yaml"
    changes = [
        f"init={init}",
        f"data.dataset={chips}",
        "data.window_px=16",
        "splits={block_m: 1100}",
        "percent=[100.0]",
        "views=[both]",
        "optim={epochs: 1, batch_size: 16}",
        f"trainer={json.dumps(CPU)}",
    ]
    table = read_results(train(load_config(path, changes), tmp_path / "run"))["table"]
    assert [row["mode"] for row in table] == ["probe", "finetune"]
    assert torch.tensor([row["top1"] for row in table]).isfinite().all()


@pytest.fixture(scope="module")
def bird_init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(taxa=(), bands=3)
    object.__setattr__(model.architecture, "bands", ("red", "green", "blue"))
    return save_model(model, tmp_path_factory.mktemp("runs") / "birds", {})


def test_birds_are_named_in_their_own_splits_at_nested_shares_of_labels(
    bird_init: Path, tmp_path: Path
) -> None:
    birds = inat_birds(tmp_path / "birds", train=60, test=12)
    path = Path(__file__).parent.parent / "configs" / "birdsat_classify.yaml"
    changes = [
        f"init={bird_init}",
        f"data.dataset={birds}",
        f"data.window_px={SIDE}",
        "percent=[20.0, 100.0]",
        "optim={epochs: 2, batch_size: 16, lr: 0.002}",
        f"trainer={json.dumps(CPU)}",
    ]
    run = train(load_config(path, changes), tmp_path / "run")
    table = pd.DataFrame(read_results(run)["table"])
    assert len(table) == 2 * 3 * 2
    dataset = open_birds(birds)
    trained = dataset.facts["split"] == "train"
    labels = table.groupby("percent")["labels"].first()
    assert labels[100.0] == trained.sum()
    assert labels[20.0] == round(0.2 * trained.sum())
    assert OVERHEAD_PX > SIDE, "windows are the middles of overhead images"
    for share, more in pairwise(FRACTIONS):
        chosen = dataset.facts[f"finetune_{share}percent"]
        assert not (chosen & ~dataset.facts[f"finetune_{more}percent"]).any()
        assert not (chosen & ~trained).any()


def test_birds_without_overhead_images_are_named_from_photos(
    bird_init: Path, tmp_path: Path
) -> None:
    birds = cub(tmp_path / "cub")
    content = config(birds, bird_init, splits={}, views=["ground"])
    content["optim"] = {"epochs": 1, "batch_size": 16}
    table = read_results(train(load_config(content), tmp_path / "run"))["table"]
    assert [(row["view"], row["mode"]) for row in table] == [
        ("ground", "probe"),
        ("ground", "finetune"),
    ]
    with pytest.raises(ConfigError, match=r"has photos only; set views: \[ground\]"):
        train(load_config({**content, "views": ["both"]}), tmp_path / "two")
    with pytest.raises(ConfigError, match=r"its own splits; leave splits\.block_m out"):
        train(load_config({**content, "splits": {"block_m": 100}}), tmp_path / "two")
