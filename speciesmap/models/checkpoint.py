"""Checkpoints: safetensors weights beside JSON config and taxa; nothing that unpickles."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch.utils._python_dispatch import TorchDispatchMode

from speciesmap.errors import ModelError
from speciesmap.models.crisp import START_LOG_SCALE, Architecture, SpeciesModel
from speciesmap.models.environment import Environment
from speciesmap.models.trust import Trust
from speciesmap.rasters.values import Values
from speciesmap.taxa import Taxon

WEIGHTS, CONFIG, TAXA = "model.safetensors", "config.json", "taxa.json"
DATE = "metadata.date.weight"
FORMAT = 1


def save_model(model: SpeciesModel, folder: Path | str, facts: Mapping[str, Any]) -> Path:
    """Write a checkpoint into a folder, which the caller makes appear at once.

    Args:
        model: What to save.
        folder: Made if absent.
        facts: How the model came about: configuration, metrics, data; any JSON.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, str(folder / WEIGHTS))  # what two towers share is stored once
    config = {
        "format": FORMAT,
        "architecture": asdict(model.architecture),
        "prevalence": model.prevalence,
        "fingerprint": model.fingerprint,
        "environment": model.environment.save() if model.environment else None,
        "trust": model.trust.save(folder) if model.trust else None,
        "values": asdict(model.values) if model.values else None,
        "names": model.names,
        **facts,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, default=str))
    for weights in folder.glob("*.safetensors"):  # which safetensors lets their owner alone read
        weights.chmod((folder / CONFIG).stat().st_mode)
    taxa = [{"name": t.name, "lineage": list(t.lineage)} for t in model.taxa]
    (folder / TAXA).write_text(json.dumps(taxa, indent=2, ensure_ascii=False), encoding="utf-8")
    return folder


def read_facts(folder: Path | str) -> dict[str, Any]:
    """Read a checkpoint's JSON config without its weights.

    Raises:
        ModelError: The folder is not a checkpoint or its config is damaged.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ModelError(
            f"{folder} is not a model: it has no {CONFIG}; give a folder that `speciesmap train` "
            "wrote"
        )
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ModelError(
                f"{path} has format {facts['format']}, this version reads {FORMAT}; upgrade "
                "speciesmap or train again"
            )
        facts["architecture"]["dim"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error!r}); copy the checkpoint again") from error
    return facts


def what_was_learned(folder: Path | str) -> tuple[bool, bool]:
    """Tell `SpeciesModel.joined` and `SpeciesModel.dated` without building the model.

    Raises:
        ModelError: The weights are missing or damaged.
    """
    try:
        with safe_open(Path(folder) / WEIGHTS, "pt") as stored:
            scale = stored.get_tensor("log_scale")
            date = DATE in stored.keys() and bool(stored.get_tensor(DATE).any())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{Path(folder) / WEIGHTS} cannot be read ({error}); copy the checkpoint again"
        ) from error
    return float(scale) != float(torch.tensor(START_LOG_SCALE)), date


class _NoMoreThan(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse to build what a checkpoint's weights could not fill, before it takes memory.

    Without it a config of a few bytes may ask for two thousand million layers. Towers that share
    a transformer are built with one each, so twice the weights may be asked for; the frozen text
    tower of a hub is not among the weights.
    """

    def __init__(self, weights: int, facts: Mapping[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        hub = "hub" in (facts["architecture"].get("text") or {})
        self.left = 2 * weights + 10**6 + hub * 10**9

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the elements of each tensor that is made of a shape alone."""
        if args and isinstance(args[0], list | tuple):
            shape = [side for side in args[0] if isinstance(side, int)]
            self.left -= math.prod(shape) if len(shape) == len(args[0]) else 0
        if self.left < 0:
            raise ModelError(
                f"{CONFIG} describes a larger model than {WEIGHTS} holds; copy both from one "
                "checkpoint"
            )
        return func(*args, **(kwargs or {}))


def load_model(folder: Path | str) -> SpeciesModel:
    """Read a checkpoint.

    Args:
        folder: What `speciesmap train` wrote.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        ModelError: The checkpoint is missing, damaged, or its weights do not fit its config.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    try:
        with safe_open(folder / WEIGHTS, "pt") as stored:
            held = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
        entries = json.loads((folder / TAXA).read_text(encoding="utf-8"))
        taxa = [Taxon(entry["name"], tuple(entry["lineage"])) for entry in entries]
        raw = facts["architecture"]
        known = {field.name for field in fields(Architecture)}
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in raw.items()
            if name in known
        }
        environment = Environment.load(stated) if (stated := facts.get("environment")) else None
        with _NoMoreThan(sum(map(math.prod, held.values())), facts):
            model = SpeciesModel(
                Architecture(**arguments),
                taxa,
                facts["prevalence"],
                references=held["reference"][0],
                environment=environment,
            )
        load_weights(model, folder / WEIGHTS)
        if facts.get("trust"):
            model.trust = Trust.load(
                folder, facts["trust"], len(taxa), model.dim, model.environment
            )
        if facts.get("values"):
            model.values = Values.read(facts["values"])
        model.names = tuple(map(str, facts.get("names", ())))
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} lacks {Path(error.filename or WEIGHTS).name}; copy the checkpoint again"
        ) from error
    except (
        SafetensorError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder} is damaged ({reason}); copy the checkpoint again") from error
    return model.eval()
