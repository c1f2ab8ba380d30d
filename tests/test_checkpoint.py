"""Checkpoints: what was saved comes back, and what is damaged is refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TAXA, architecture, tiny_model

from speciesmap.errors import ModelError
from speciesmap.models import SpeciesModel, load_model, read_facts, save_model
from speciesmap.models.trust import Trust


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_model(tiny_model(), tmp_path / "run", {"metrics": {"auc": 0.9}})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = SpeciesModel(architecture(), TAXA, {TAXA[0].name: 0.2}, references=5).eval()
    model.reference.normal_()
    save_model(model, tmp_path / "run", {"training": {"seed": 3}})
    again = load_model(tmp_path / "run")
    assert not again.training
    assert again.architecture == model.architecture
    assert again.taxa == TAXA
    assert again.prevalence == {TAXA[0].name: 0.2}
    assert again.fingerprint == model.fingerprint
    assert torch.equal(again.reference, model.reference)
    assert torch.equal(again.head.vectors, model.head.vectors)
    windows = torch.randint(0, 255, (3, 4, 16, 16), dtype=torch.uint8)
    photo = [Image.new("RGB", (30, 20), "green")]
    with torch.inference_mode():
        assert torch.equal(again.encode_aerial(windows), model.encode_aerial(windows))
        assert torch.equal(again.encode_ground(photo), model.encode_ground(photo))
        assert torch.equal(again.encode_text(["Quercus"]), model.encode_text(["Quercus"]))


def test_facts_are_read_without_weights_and_nothing_is_pickled(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "model.safetensors",
        "taxa.json",
    ]
    (run / "model.safetensors").unlink()
    facts = read_facts(run)
    assert facts["metrics"] == {"auc": 0.9}
    assert facts["fingerprint"] == tiny_model().fingerprint


def test_who_may_read_the_facts_may_read_the_weights(tmp_path: Path) -> None:
    model = tiny_model()
    model.trust = Trust(torch.zeros(len(TAXA), 2, model.architecture.dim), torch.zeros(2, 2))
    before = os.umask(0o027)
    try:
        made = save_model(model, tmp_path / "run", {})
    finally:
        os.umask(before)
    names = ("config.json", "model.safetensors", "taxa.json", "trust.safetensors")
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in made.iterdir()}
    assert modes == dict.fromkeys(names, "0o640")


def test_taxa_of_any_alphabet_come_back(tmp_path: Path) -> None:
    from speciesmap.taxa import Taxon

    taxa = (Taxon("Épilobe à feuilles"), Taxon("橡树", ("植物",)))
    save_model(tiny_model(taxa=taxa), tmp_path / "run", {})
    assert load_model(tmp_path / "run").taxa == taxa


def truncate(run: Path) -> None:
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def cut_header(run: Path) -> None:
    (run / "model.safetensors").write_bytes(b"\x08\x00")


def other_shape(run: Path) -> None:
    state = load_file(run / "model.safetensors")
    state["aerial.project.weight"] = torch.zeros(3, 3)
    save_file(state, run / "model.safetensors")


def lacking(run: Path) -> None:
    state = load_file(run / "model.safetensors")
    del state["head.weight"]
    save_file(state, run / "model.safetensors")


def no_reference(run: Path) -> None:
    state = load_file(run / "model.safetensors")
    del state["reference"]
    save_file(state, run / "model.safetensors")


def fewer_taxa(run: Path) -> None:
    taxa = json.loads((run / "taxa.json").read_text())
    (run / "taxa.json").write_text(json.dumps(taxa[:1]))


def rewrite(name: str, content: Any) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return damage


def amend(**changes: Any) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        config["architecture"].update(changes)
        (run / "config.json").write_text(json.dumps(config))

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is damaged"),
        (cut_header, "is damaged"),
        (other_shape, "is damaged"),
        (lacking, "is damaged.*head.weight"),
        (no_reference, "is damaged.*reference"),
        (fewer_taxa, "is damaged"),
        (remove("model.safetensors"), "lacks model.safetensors"),
        (remove("taxa.json"), "lacks taxa.json"),
        (remove("config.json"), "is not a model: it has no config.json.*speciesmap train"),
        (rewrite("config.json", {"format": 99}), "has format 99, this version reads 1; upgrade"),
        (rewrite("config.json", {"model_type": "bert"}), "config.json is damaged"),
        (rewrite("config.json", [1, 2]), "config.json is damaged"),
        (rewrite("config.json", {"format": 1, "architecture": "vit"}), "config.json is damaged"),
        (rewrite("config.json", "{"), "config.json is damaged"),
        (rewrite("taxa.json", "{"), "is damaged"),
        (rewrite("taxa.json", [3]), "is damaged"),
        (rewrite("taxa.json", [{"name": 3, "lineage": []}]), "is damaged"),
        (amend(dim="many"), "is damaged"),
        (amend(aerial=None), "is damaged"),
        (amend(aerial={"backbone": "test_resnt"}), "timm has no model 'test_resnt'"),
        (amend(mean=[1.0]), "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    run: Path, damage: Callable[[Path], None], message: str
) -> None:
    load_model(run)
    damage(run)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(run)
    assert "\n" not in str(caught.value)
    assert "run" in str(caught.value) or "timm" in str(caught.value)


def test_a_folder_or_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match="is not a model"):
            load_model(path)
