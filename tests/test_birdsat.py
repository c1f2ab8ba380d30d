"""BirdSAT's training stages: what they learn, hold still and refuse; every shipped config runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from birds import inat_birds
from tiny import TinyScene, tiny_model, tiny_scene

from speciesmap.config import DataConfig, PretrainConfig, load_config
from speciesmap.errors import ConfigError, ModelError
from speciesmap.learning.crossview import CveMae, CvmMae, masked_stage
from speciesmap.learning.data import PairedRows
from speciesmap.learning.modules import dates
from speciesmap.learning.pretrain import build
from speciesmap.learning.sources import open_sources
from speciesmap.learning.train import train
from speciesmap.models import SpeciesModel, load_model, read_facts, save_model

CPU = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("birdsat_*mae.yaml"))
VIT = {"backbone": "test_vit", "kwargs": {"patch_size": 4}}
GROUND = {"backbone": "test_vit", "kwargs": {"patch_size": 8}, "image_px": 16}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> TinyScene:
    return tiny_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inat_birds(tmp_path_factory.mktemp("birds"))


def config(scene: TinyScene, method: str, **changes: Any) -> PretrainConfig:
    base: dict[str, Any] = {
        "stage": "pretrain",
        "method": method,
        "data": {"dataset": str(scene.chips)},
        "model": {"dim": 16, "aerial": VIT, "ground": GROUND, "metadata": {}},
        "masked": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
        "crossview": {"freeze_aerial": False},
        "optim": {"epochs": 1, "batch_size": 12, "warmup": 0},
        "trainer": CPU,
    }
    loaded = load_config({**base, **changes})
    assert isinstance(loaded, PretrainConfig)
    return loaded


def ready(made: PretrainConfig) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A stage and a batch, outside of a trainer, and where it will report its losses."""
    torch.manual_seed(0)
    sources = open_sources(made.data)
    assert sources.dataset is not None
    rows = PairedRows(sources.dataset, sources.rows, sources.taxa, 16)
    model = build(made.model, sources, rows, matcher=made.method == "cvm_mae")
    stage = masked_stage(model, sources.taxa, made, 10)
    stage.log_dict = lambda parts, **_: reported.update(parts)  # type: ignore[method-assign]
    reported: dict[str, torch.Tensor] = {}
    return stage, rows.__getitems__(range(12)), reported


def test_cve_mae_is_contrast_of_views_and_painting_of_photos(scene: TinyScene) -> None:
    stage, batch, parts = ready(config(scene, "cve_mae"))
    assert isinstance(stage, CveMae)
    loss = stage.training_step(batch, 0)
    assert set(parts) == {"loss", "aerial_ground", "reconstruction"}
    assert torch.allclose(loss, 0.3 * parts["aerial_ground"] + parts["reconstruction"])
    loss.backward()  # type: ignore[no-untyped-call]
    model: Any = stage.network.model
    for learned in (
        model.log_scale,
        model.metadata.location.weight,
        model.metadata.date.weight,
        model.ground.backbone.patch_embed.proj.weight,
        model.aerial.backbone.patch_embed.proj.weight,
        stage.network.autoencoder.painter.embed.weight,
    ):
        assert learned.grad is not None


@pytest.mark.parametrize("weights", [(0.0, 1.0), (2.0, 0.0), (0.7, 0.4)])
def test_the_weights_of_cve_mae_are_those_configured(
    scene: TinyScene, weights: tuple[float, float]
) -> None:
    crossview = {"contrastive": weights[0], "reconstruction": weights[1], "freeze_aerial": False}
    stage, batch, parts = ready(config(scene, "cve_mae", crossview=crossview))
    loss = stage.training_step(batch, 0)
    wanted = weights[0] * parts["aerial_ground"] + weights[1] * parts["reconstruction"]
    assert torch.allclose(loss, wanted)


@pytest.fixture(scope="module")
def aerial(scene: TinyScene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = config(scene, "mae", model={"dim": 16, "aerial": VIT})
    return train(made, tmp_path_factory.mktemp("runs") / "aerial")


def test_a_frozen_aerial_encoder_rests_and_starts_from_another_model(
    scene: TinyScene, aerial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []
    original = CveMae.training_step

    def spy(self: CveMae, *call: Any) -> torch.Tensor:
        backbone: Any = self.network.model.aerial.backbone
        modes.extend(module.training for module in backbone.modules())
        assert self.network.model.ground is not None
        assert self.network.model.ground.backbone.training
        return original(self, *call)

    monkeypatch.setattr(CveMae, "training_step", spy)
    crossview = {"freeze_aerial": True, "aerial_init": str(aerial)}
    run = train(config(scene, "cve_mae", crossview=crossview), tmp_path / "run")
    assert modes
    assert not any(modes), "frozen means in evaluation mode too"
    before, after = load_model(aerial).aerial, load_model(run).aerial
    kept, rested = before.backbone, after.backbone
    assert isinstance(kept, torch.nn.Module)
    assert isinstance(rested, torch.nn.Module)
    for (name, old), new in zip(
        kept.state_dict().items(), rested.state_dict().values(), strict=True
    ):
        assert torch.equal(old, new), name
    assert not torch.equal(before.project.weight, after.project.weight)


def test_an_aerial_encoder_that_is_not_frozen_learns(
    scene: TinyScene, aerial: Path, tmp_path: Path
) -> None:
    crossview = {"freeze_aerial": False, "aerial_init": str(aerial)}
    run = train(config(scene, "cve_mae", crossview=crossview), tmp_path / "run")
    before: Any = load_model(aerial).aerial.backbone
    after: Any = load_model(run).aerial.backbone
    assert not torch.equal(before.patch_embed.proj.weight, after.patch_embed.proj.weight)


def test_a_factored_encoder_is_taken_and_frozen_whole_with_its_statistics(
    scene: TinyScene, tmp_path: Path
) -> None:
    shape = {"cell_px": 8, "width": 16, "layers": 2, "heads": 2}
    tower = {"backbone": "test_resnet", "kwargs": {}, "factored": shape}
    statistics = {"mean": (1.0, 2.0, 3.0, 4.0), "std": (5.0, 6.0, 7.0, 8.0)}
    start = tiny_model(seed=3, taxa=(), aerial=tower, **statistics)
    made = config(
        scene,
        "cve_mae",
        model={"dim": 16, "aerial": {**tower, "encoder": "factored"}, "ground": GROUND},
        crossview={"aerial_init": str(save_model(start, tmp_path / "start", {}))},
    )
    model = ready(made)[0].network.model
    taken = model.aerial.state_dict()
    for name, wanted in start.aerial.state_dict().items():
        assert torch.equal(taken[name], wanted) != name.startswith("project."), name
    assert (model.architecture.mean, model.architecture.std) == tuple(statistics.values())
    learned = {name for name, p in model.aerial.named_parameters() if p.requires_grad}
    assert learned == {"project.weight", "project.bias"}


def test_cvm_mae_is_matching_and_painting_of_both_views(scene: TinyScene) -> None:
    stage, batch, parts = ready(config(scene, "cvm_mae"))
    assert isinstance(stage, CvmMae)
    loss = stage.training_step(batch, 0)
    assert set(parts) == {"loss", "matching", "ground", "aerial"}
    wanted = parts["matching"] + (parts["ground"] + parts["aerial"]) / 2
    assert torch.allclose(loss, wanted)
    loss.backward()  # type: ignore[no-untyped-call]
    model: Any = stage.network.model
    assert model.matcher.metadata.date.weight.grad is not None


def test_a_negative_is_never_a_window_of_the_photos_own_place(scene: TinyScene) -> None:
    stage, batch, _ = ready(config(scene, "cvm_mae"))
    batch["place"] = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 0])
    other, known = stage.negatives(batch, None)
    assert (batch["place"][other] != batch["place"])[known].all()
    assert known.tolist() == [False, False] + [True] * 2 + [False] + [True] * 6 + [False]
    assert torch.equal(other, (torch.arange(12) + 1) % 12), "the shifted batch"


def test_the_hardest_negative_is_the_likeliest_of_those_tried(scene: TinyScene) -> None:
    crossview = {"negatives": 4, "freeze_aerial": False}
    stage, batch, _ = ready(config(scene, "cvm_mae", crossview=crossview))
    model: SpeciesModel = stage.network.model.eval()
    batch["place"][3] = batch["place"][1]
    with torch.no_grad():
        other, known = stage.negatives(batch, None)
        scores = torch.stack(
            [model.match(batch["ground"], batch["aerial"].roll(-s, 0)) for s in range(1, 5)]
        )
    scores[1, 1] = -torch.inf  # two on from row 1 is its own place
    assert torch.equal(other, (torch.arange(12) + 1 + scores.argmax(0)) % 12)
    assert known.all()
    assert len(set(((other - torch.arange(12)) % 12).tolist())) > 1


def test_cvm_mae_learns_which_photo_belongs_to_which_window() -> None:
    """Photos and windows of one brightness belong together: only both at once tell."""
    torch.manual_seed(0)
    model = tiny_model(aerial=VIT, ground=GROUND, matcher=True).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(150):
        kind = torch.randint(2, (2, 32))
        photos, windows = (
            (k * 2.0 - 1)[:, None, None, None] * 100 + 128 + 10 * torch.randn(32, bands, 16, 16)
            for k, bands in zip(kind, (3, 4), strict=True)
        )
        logits = model.match(photos, windows)
        loss = F.binary_cross_entropy_with_logits(logits, (kind[0] == kind[1]).float())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert ((logits > 0) == (kind[0] == kind[1])).float().mean() > 0.9


def test_a_step_without_metadata_takes_none(scene: TinyScene) -> None:
    bare = {"dim": 16, "aerial": VIT, "ground": GROUND}
    for method in ("cve_mae", "cvm_mae"):
        stage, batch, _ = ready(config(scene, method, model=bare))
        del batch["metadata"]
        if method == "cvm_mae":
            batch["metadata"] = torch.full((12, 4), torch.nan)
        assert stage.training_step(batch, 0).isfinite()
        assert stage.network.model.metadata is None


def test_background_has_the_dates_of_presences_and_no_place() -> None:
    torch.manual_seed(0)
    presences = torch.tensor([[40.0, -120.0, 5.0, 3.0], [41.0, -120.0, torch.nan, torch.nan]])
    rows = dates(presences, 200)
    assert rows[:, :2].isnan().all(), "a place would tell presences from background"
    assert torch.equal(rows[:2, 2:].nan_to_num(0), presences[:, 2:].nan_to_num(0))
    assert 60 < (rows[2:, 2] == 5).sum() < 140


@pytest.mark.parametrize(
    ("method", "changes", "kind", "message"),
    [
        ("cve_mae", {"crossview": {}}, ConfigError, "aerial encoder of random weights"),
        (
            "cve_mae",
            {"model": {"dim": 16, "aerial": VIT}},
            ConfigError,
            r"needs photos here; give model\.ground",
        ),
        ("cvm_mae", {"model": {"dim": 16, "aerial": VIT}}, ModelError, "needs a ground tower"),
        (
            "cvm_mae",
            {"model": {"dim": 16, "aerial": {"backbone": "test_resnet"}, "ground": GROUND}},
            ModelError,
            "needs a vision transformer",
        ),
        (
            "cve_mae",
            {"model": {"dim": 16, "aerial": VIT, "ground": {**GROUND, "backbone": "test_resnet"}}},
            ModelError,
            "timm cannot build|needs a vision transformer",
        ),
        (
            "mae",
            {"masked": {"view": "ground"}, "model": {"dim": 16, "aerial": VIT}},
            ConfigError,
            "needs photos here",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    scene: TinyScene,
    tmp_path: Path,
    method: str,
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message) as caught:
        train(config(scene, method, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_an_aerial_start_of_another_shape_is_refused(
    scene: TinyScene, aerial: Path, tmp_path: Path
) -> None:
    model = {
        "dim": 16,
        "aerial": {"backbone": "test_vit", "kwargs": {"patch_size": 8}},
        "ground": GROUND,
    }
    made = config(scene, "cve_mae", model=model, crossview={"aerial_init": str(aerial)})
    with pytest.raises(ModelError, match=r"aerial_init: .* has the aerial encoder"):
        train(made, tmp_path / "run")


def test_photos_alone_train_no_model(tmp_path: Path, scene: TinyScene) -> None:
    from birds import cub

    made = config(scene, "cve_mae", data={"dataset": str(cub(tmp_path / "cub"))})
    with pytest.raises(ConfigError, match="has photos only"):
        train(made, tmp_path / "run")


def small(path: Path, birds: Path, aerial: Path | None) -> list[str]:
    """Assignments that shrink a shipped configuration and keep all that it chooses."""
    changes = [
        f"data.dataset={birds}",
        "data.window_px=16",
        "model.dim=16",
        "model.aerial.backbone=test_vit",
        "model.aerial.kwargs={patch_size: 4}",
        "masked.decoder_dim=16",
        "masked.decoder_depth=1",
        "masked.decoder_heads=2",
        "optim.epochs=1",
        "optim.batch_size=13",
        f"trainer={json.dumps(CPU)}",
    ]
    if "ground:" in path.read_text():
        changes.append(f"model.ground={json.dumps(GROUND)}")
    if aerial is not None:
        changes.append(f"crossview.aerial_init={aerial}")
    return changes


@pytest.fixture(scope="module")
def overhead(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = next(path for path in CONFIGS if path.name == "birdsat_aerial_mae.yaml")
    out = tmp_path_factory.mktemp("runs") / "overhead"
    return train(load_config(path, small(path, birds, None)), out)


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "no metadata"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_birdsat_config_trains_two_steps_on_birds(
    path: Path, metadata: bool, birds: Path, overhead: Path, tmp_path: Path
) -> None:
    changes = small(path, birds, overhead if "aerial_init" in path.read_text() else None)
    if not metadata:
        changes.append("model.metadata=null")
    made = load_config(path, changes)
    assert isinstance(made, PretrainConfig)
    run = train(made, tmp_path / "run")
    assert read_facts(run)["metrics"]["steps"] == 2
    model = load_model(run)
    with_metadata = metadata and made.method in ("cve_mae", "cvm_mae")
    assert (model.metadata is not None) == with_metadata
    assert (model.matcher is not None) == (made.method == "cvm_mae")
    with torch.inference_mode():
        assert model.encode_aerial(torch.zeros(1, 3, 16, 16)).isfinite().all()


def test_a_split_that_birds_do_not_have_is_named(birds: Path) -> None:
    with pytest.raises(ConfigError, match="split 'trian'; choose one of test, train, validation"):
        open_sources(DataConfig(dataset=str(birds), split="trian"))


def test_the_same_seed_gives_the_same_weights(birds: Path, tmp_path: Path) -> None:
    path = next(path for path in CONFIGS if path.name == "birdsat_cvm_mae.yaml")
    made = load_config(path, small(path, birds, None))
    states = []
    for name in ("first", "again"):
        torch.manual_seed(len(name))
        states.append(load_model(train(made, tmp_path / name)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
