"""Every method learns in two processes what one learns from the joined batch."""

from __future__ import annotations

import json
import os
import socket
import zlib
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ended, start
from tiny import BANDS, tiny_model, tiny_scene
from torch import Tensor
from torch.utils.data import SequentialSampler

from speciesmap.config import load_config
from speciesmap.datasets.paired import open_paired
from speciesmap.errors import ConfigError
from speciesmap.learning import crossview, fit, modules
from speciesmap.learning.train import train
from speciesmap.models import crossview as pairs
from speciesmap.models import load_model, masked, read_facts, save_model

ROWS = 36
VIT = {"backbone": "test_vit", "kwargs": {"patch_size": 8}}
GROUND = {**VIT, "image_px": 16}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
TEXT = {"width": 16, "layers": 1, "heads": 2}
MODEL: dict[str, Any] = {"dim": 16, "aerial": VIT, "ground": GROUND, "metadata": {"dropout": 0}}
PRETRAIN = {"stage": "pretrain", "model": {**MODEL, "text": TEXT}, "masked": DECODER}
METHODS: dict[str, dict[str, Any]] = {
    "crisp": {**PRETRAIN, "contrastive": {"same_place": "positive"}},
    "aerial_mae": {**PRETRAIN, "method": "mae"},
    "ground_mae": {**PRETRAIN, "method": "mae", "masked": {**DECODER, "view": "ground"}},
    "cve_mae": {**PRETRAIN, "method": "cve_mae", "crossview": {"freeze_aerial": False}},
    "cvm_mae": {**PRETRAIN, "method": "cvm_mae"},
    "finetune": {"stage": "finetune"},
    "finetune_heads_only": {"stage": "finetune", "align": 0},
}


def learn(folder: Path, processes: int) -> None:
    """Train by every method, all rows in each step, with the same views and masks everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (modules, crossview):
            patch.setattr(module, "ground_view", as_they_are)
            patch.setattr(module, "aerial_view", as_they_are)
            patch.setattr(module, "Prompts", partial(modules.Prompts, full=1.0))
        for module in (masked, pairs):
            patch.setattr(module, "draw_mask", hide_the_last)
        patch.setattr(fit, "RandomSampler", lambda windows, **_: SequentialSampler(windows))

        def draw(stage: modules.Stage) -> None:
            (folder / f"drawn_{processes}_{stage.global_rank}").write_text(str(torch.rand(())))

        patch.setattr(modules.Stage, "on_train_end", draw)
        for name, method in METHODS.items():
            train(configured(method, folder, processes), folder / f"{name}_{processes}")
        stream_in(folder, processes, patch)
    few = configured(METHODS["finetune"], folder, processes, batch=6, background=8)
    train(few, folder / f"few_{processes}")


def learn_together(folder: Path) -> None:
    """Be one of two processes."""
    fit.rank_zero_only.rank = int(os.environ["RANK"])  # Lightning has asked as it was imported
    learn(folder, 2)


def stream_in(folder: Path, processes: int, patch: pytest.MonkeyPatch) -> None:
    """Train on a stream, three batches an epoch, and keep what each process saw at what rate."""
    seen: dict[int, list[int]] = defaultdict(list)
    rates: list[float] = []
    step = crossview.Masked.training_step

    def watched(stage: crossview.Masked, batch: dict[str, Tensor], index: int) -> Tensor:
        seen[stage.current_epoch] += digests(batch["aerial"])
        rates.append(stage.trainer.optimizers[0].param_groups[0]["lr"])
        return step(stage, batch, index)

    def write(stage: modules.Stage) -> None:
        content = {"seen": list(seen.values()), "rates": rates}
        (folder / f"streamed_{processes}_{stage.global_rank}").write_text(json.dumps(content))

    patch.setattr(crossview.Masked, "training_step", watched)
    patch.setattr(modules.Stage, "on_train_end", write)
    config = configured(METHODS["aerial_mae"], folder, processes, batch=ROWS // 3, stream={})
    train(config, folder / f"streamed_{processes}")


def digests(windows: Tensor) -> list[int]:
    return [zlib.crc32(window.numpy().tobytes()) for window in windows]


def configured(
    method: dict[str, Any], folder: Path, processes: int, batch: int = ROWS, **data: Any
) -> Any:
    data |= {"dataset": str(folder / "chips")}
    if method["stage"] == "finetune":
        data = {"imagery": str(folder / "aerial.tif"), "background": ROWS, **data}
        method = {**method, "init": str(folder / "init")}
    optim = {"epochs": 2, "batch_size": batch // processes, "lr": 1e-4, "warmup": 0}
    trainer = {"accelerator": "cpu", "devices": processes, "precision": "32-true"}
    return load_config({**method, "data": data, "optim": optim, "trainer": trainer})


def as_they_are(images: Tensor, *_: Any, **__: Any) -> Tensor:
    return images.float()


def hide_the_last(tokens: Tensor, ratio: float, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    keep = max(1, round(tokens.shape[1] * (1 - ratio)))
    places = torch.arange(tokens.shape[1]).expand(tokens.shape[:2])
    return tokens[:, :keep], places[:, :keep], places >= keep


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_scene(folder, rows=ROWS)
    base = tiny_model(taxa=(), aerial=VIT, ground=GROUND)
    object.__setattr__(base.architecture, "bands", BANDS)
    save_model(base, folder / "init", {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "both"}
    told |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}  # by torchrun
    both = [
        start(learn_together, folder, err=folder / f"err_{k}", **told, RANK=k, LOCAL_RANK=k)
        for k in "01"
    ]
    assert [ended(process) for process in both] == [0, 0], (folder / "err_0").read_text()[-3000:]
    learn(folder, 1)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_what_one_learns_from_the_joined_batch(method: str, runs: Path) -> None:
    one, two = (runs / f"{method}_{processes}" for processes in (1, 2))
    wanted, found = (read_facts(run)["metrics"] for run in (one, two))
    assert found["steps"] == wanted["steps"] == 2
    assert set(found["losses"]) == set(wanted["losses"])
    # negatives of CVM-MAE stand beside a photo in the batch of its own process
    own = {"loss", "matching"} if method == "cvm_mae" else set()
    for name in set(found["losses"]) - own:
        assert found["losses"][name] == pytest.approx(wanted["losses"][name], abs=3e-4), name
    first, second = (load_model(run).state_dict() for run in (one, two))
    if not own:
        for name in first:
            assert torch.allclose(first[name], second[name], atol=2e-3), name


def test_processes_learn_from_every_presence_beside_background_of_fewer_places(runs: Path) -> None:
    one, two = (read_facts(runs / f"few_{processes}")["metrics"] for processes in (1, 2))
    assert two["steps"] == one["steps"] == 2 * ROWS // 6


def test_each_process_draws_its_own_views(runs: Path) -> None:
    first, second = ((runs / f"drawn_2_{rank}").read_text() for rank in range(2))
    assert first != second


def test_of_a_stream_each_process_sees_its_own_rows_and_every_epoch_all(runs: Path) -> None:
    every = sorted(digests(torch.from_numpy(open_paired(runs / "chips").aerial())))
    assert len(set(every)) == ROWS
    first, second = (json.loads((runs / f"streamed_2_{rank}").read_text()) for rank in range(2))
    assert len(first["seen"]) == len(second["seen"]) == 2
    for mine, theirs in zip(first["seen"], second["seen"], strict=True):
        assert len(mine) == len(theirs) == ROWS // 2
        assert sorted(mine + theirs) == every
    assert first["seen"][0] != first["seen"][1]


def test_of_a_stream_the_learning_rate_falls_as_in_one_process(runs: Path) -> None:
    one, first, second = (
        json.loads((runs / f"streamed_{told}").read_text())["rates"]
        for told in ("1_0", "2_0", "2_1")
    )
    assert first == second == one
    assert len(one) == read_facts(runs / "streamed_2")["metrics"]["steps"] == 6
    assert one == sorted(one, reverse=True)
    assert 0 < one[-1] < 0.2 * one[0]


def test_processes_that_cannot_fill_a_batch_each_learn_nothing_and_say_so(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = configured(METHODS["aerial_mae"], runs, 1)
    monkeypatch.setattr(fit, "batches", lambda *_, **__: [])
    monkeypatch.setattr("speciesmap.learning.pretrain.batches", lambda *_, **__: [])
    with pytest.raises(ConfigError, match=r"share too few rows .* lower optim\.batch_size"):
        train(made, tmp_path / "run")
    assert not list(tmp_path.iterdir())
