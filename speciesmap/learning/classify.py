"""How well photos, windows and both name taxa: probes and fine-tuning, with few labels or many."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from speciesmap.config import ClassifyConfig, ViewsConfig
from speciesmap.datasets.birds import BirdDataset, open_dataset
from speciesmap.datasets.nature_multi_view import chosen_rows
from speciesmap.datasets.paired import PairedDataset
from speciesmap.errors import ConfigError, ModelError
from speciesmap.learning.data import Batch, PairedRows, middle
from speciesmap.learning.fit import batches, learns_bfloat16
from speciesmap.learning.modules import seen
from speciesmap.learning.sources import window_side
from speciesmap.learning.splitting import identity, observations_of, split_rows
from speciesmap.models import SpeciesModel, load_model
from speciesmap.models.device import choose_device, computes_bfloat16
from speciesmap.outputs import refuse_existing, replacing
from speciesmap.progress import track
from speciesmap.rasters.messages import without_credentials
from speciesmap.statistics.metrics import classification_figures

log = logging.getLogger("speciesmap")

RESULTS = "classification"


class Classifier(nn.Module):
    """A linear layer on the unit embeddings of one view or both, standardised over the batch.

    The standardisation without weights before a probe is that of MAE (He et al. 2022, appendix
    A.1).

    Args:
        model: Its aerial and ground towers embed; copied where they are to be trained.
        view: `ground`, `aerial` or `both`.
        taxa: How many.
    """

    def __init__(self, model: SpeciesModel, view: str, taxa: int) -> None:
        super().__init__()
        self.model, self.view = model, view
        width = model.dim * (2 if view == "both" else 1)
        self.standardise = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, taxa)

    def embed(self, batch: Batch) -> Tensor:
        """Embed what the view sees of a batch, shape (N, D) or (N, 2 D)."""
        parts = []
        if self.view != "ground":
            parts.append(self.model.encode_aerial(batch["aerial"]))
        if self.view != "aerial":
            parts.append(self.model.encode_ground(batch["ground"]))
        return torch.cat(parts, 1)

    def classify(self, embedded: Tensor) -> Tensor:
        """Logits of embeddings, shape (N, T)."""
        return self.linear(self.standardise(embedded.float()))  # type: ignore[no-any-return]


def classify(config: ClassifyConfig, out: Path | str, *, overwrite: bool = False) -> Path:
    """Train and test every combination of views, modes and label fractions, into one table.

    Args:
        config: What to compare.
        out: Folder for `classification.csv`, `classification.md` and `classification.json`.
        overwrite: Replace an existing output.

    Returns:
        The folder.

    Raises:
        SpeciesmapError: The configuration, its data or the output do not allow it.
    """
    out = Path(out)
    inits = config.init if isinstance(config.init, Mapping) else {"": config.init}
    refuse_existing(out, overwrite, *config.data.inputs, *inits.values())
    if config.data.dataset is None:
        raise ConfigError("stage classify needs data.dataset with labelled rows")
    dataset = open_dataset(config.data.dataset, None, config.data.taxonomy)
    for folder in inits.values():
        _check(load_model(folder), dataset, config, folder)
    part, notes = split_rows(dataset, config)
    table = []
    for name, folder in inits.items():  # one in memory at a time
        compared = _compare(load_model(folder), dataset, part, config)
        table += [{"init": name, **row} for row in compared]
    if not table:
        raise ConfigError(
            f"of {', '.join(f'{share:g}' for share in config.percent)} percent of the labels of "
            f"{config.data.dataset} fewer than 2 are for training; give larger shares in percent"
        )
    results = pd.DataFrame(table)
    if not isinstance(config.init, Mapping):
        results = results.drop(columns="init")
    with replacing(out, overwrite=overwrite) as beside:
        beside.mkdir()
        results.to_csv(beside / f"{RESULTS}.csv", index=False)
        (beside / f"{RESULTS}.md").write_text(markdown(results, notes))
        content = {"splits": notes, "table": json.loads(results.to_json(orient="records"))}
        (beside / f"{RESULTS}.json").write_text(json.dumps(content, indent=1))
        recorded = without_credentials(config.model_dump(mode="json"))
        described = yaml.safe_dump(recorded, sort_keys=False)
        (beside / "config.yaml").write_text(described)
    return out


def read_results(folder: Path | str) -> dict[str, Any]:
    """Read what `classify` wrote: `splits`, and `table`, one entry for each combination."""
    content: dict[str, Any] = json.loads((Path(folder) / f"{RESULTS}.json").read_text())
    return content


def _check(
    model: SpeciesModel, dataset: PairedDataset | BirdDataset, config: ClassifyConfig, init: str
) -> None:
    if not dataset.has_aerial and set(config.views) != {"ground"}:
        raise ConfigError(f"{config.data.dataset} has photos only; set views: [ground]")
    wanted = window_side(dataset, config.data) if dataset.has_aerial else model.window_px
    if dataset.has_aerial and (model.bands, model.window_px) != (dataset.bands, wanted):
        raise ModelError(
            f"{init} takes windows of {model.window_px} px with bands {', '.join(model.bands)}; "
            f"{config.data.dataset} has {wanted} px and {', '.join(dataset.bands)}; set "
            "data.window_px, cut chips to fit, or pre-train on these"
        )
    if set(config.views) != {"aerial"} and (model.ground is None or not dataset.has_ground):
        raise ModelError(
            f"{init} with {config.data.dataset} has no photos to name taxa from; set "
            "views: [aerial]"
        )


def _compare(
    model: SpeciesModel,
    dataset: PairedDataset | BirdDataset,
    part: Mapping[str, NDArray[np.int64]],
    config: ClassifyConfig,
) -> list[dict[str, Any]]:
    """One row of figures for each label fraction, view and mode."""
    facts = dataset.facts
    known = set(facts["name"].to_numpy()[part["train"]])
    taxa = [taxon for taxon in dataset.taxa if taxon.name in known]
    device = choose_device("cpu" if config.trainer.accelerator == "cpu" else None)
    photos = set(config.views) != {"aerial"}
    image_px = model.ground.image_px if photos and model.ground is not None else None
    windows = {
        name: PairedRows(dataset, rows, taxa, image_px, model.window_px)
        for name, rows in part.items()
    }
    counts = observations_of(facts, windows["train"])
    table = []
    kept: dict[str, dict[str, Tensor]] = {}
    if "probe" in config.modes:
        kept = {name: _embedded(model, rows, config, device) for name, rows in windows.items()}
    settings = [(p, v, m) for p in config.percent for v in config.views for m in config.modes]
    for percent, view, mode in track(settings, "Comparing"):
        share = chosen_rows(facts, dataset.path, percent=percent)[part["train"]]
        if share.sum() < 2:
            log.warning("%d labels at %g percent; left out of the table", share.sum(), percent)
            continue
        torch.manual_seed(config.seed)
        labels = {name: torch.from_numpy(rows.taxon) for name, rows in windows.items()}
        if mode == "probe":
            features = {name: _joined(parts, view) for name, parts in kept.items()}
            network = Classifier(model, view, len(taxa)).to(device)
            _probe(network, features, labels, share, facts, windows, config, counts)
            logits = network.classify(features["test"].to(device)).detach().cpu()
        else:
            network = Classifier(copy.deepcopy(model), view, len(taxa)).to(device)
            _finetune(network, windows, share, config, counts, device)
            logits = _logits(network, windows["test"], config, device)
        figures = _figures(logits, windows["test"], facts, counts, config)
        table.append(
            {"percent": percent, "labels": int(share.sum()), "view": view, "mode": mode, **figures}
        )
    model.cpu()
    return table


@torch.no_grad()
def _embedded(
    model: SpeciesModel, rows: PairedRows, config: ClassifyConfig, device: torch.device
) -> dict[str, Tensor]:
    """Embeddings of both views without augmentation, each of shape (N, D), on the CPU."""
    model.eval().to(device)
    parts: dict[str, list[Tensor]] = {"aerial": [], "ground": []}
    quick = _halves(config, computes_bfloat16(device))
    for batch in _in_order(rows, config.optim.batch_size, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=quick):
            if set(config.views) != {"ground"}:
                parts["aerial"].append(model.encode_aerial(batch["aerial"]).cpu())
            if "ground" in batch:
                parts["ground"].append(model.encode_ground(batch["ground"]).cpu())
    return {view: torch.cat(embedded) for view, embedded in parts.items() if embedded}


def _halves(config: ClassifyConfig, able: bool) -> bool:
    """Whether to multiply in bfloat16: as configured, else where the processor is able to."""
    precision = config.trainer.precision
    return able if precision == "auto" else precision.startswith("bf16")


def _in_order(rows: PairedRows, size: int, device: torch.device) -> Any:
    """Batches in order, whose windows are the middles of the chips."""
    for chosen in np.array_split(np.arange(len(rows)), -(-len(rows) // size)):
        batch = rows.__getitems__(chosen.tolist())
        if "aerial" in batch:
            batch["aerial"] = middle(batch["aerial"], rows.window_px)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _joined(parts: Mapping[str, Tensor], view: str) -> Tensor:
    return torch.cat([parts["aerial"], parts["ground"]], 1) if view == "both" else parts[view]


def _probe(
    network: Classifier,
    features: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    share: NDArray[np.bool_],
    facts: pd.DataFrame,
    windows: Mapping[str, PairedRows],
    config: ClassifyConfig,
    counts: NDArray[np.int64],
) -> None:
    """Fit the linear layer on kept embeddings."""
    device = network.linear.weight.device
    use = torch.from_numpy(np.flatnonzero(share))
    optimiser = torch.optim.AdamW(
        network.linear.parameters(), config.probe_lr, weight_decay=config.optim.weight_decay
    )
    best = _Best(config.patience)
    for _ in range(config.optim.epochs):
        network.train()
        for chosen in _batches_of(use[torch.randperm(len(use))], config.optim.batch_size):
            logits = network.classify(features["train"][chosen].to(device))
            _step(optimiser, F.cross_entropy(logits, labels["train"][chosen].to(device)))
        network.eval()
        with torch.no_grad():
            logits = network.classify(features["validation"].to(device)).cpu()
        figures = _figures(logits, windows["validation"], facts, counts, config)
        if best.over(figures["species_top1"] or 0.0, network):
            break
    best.restore(network)


def _finetune(
    network: Classifier,
    windows: Mapping[str, PairedRows],
    share: NDArray[np.bool_],
    config: ClassifyConfig,
    counts: NDArray[np.int64],
    device: torch.device,
) -> None:
    """Train towers and layer together, on random views."""
    used = [
        tower
        for tower, view in ((network.model.aerial, "aerial"), (network.model.ground, "ground"))
        if tower is not None and network.view in (view, "both")
    ]
    parts = (*used, network.linear)
    weights = list(dict.fromkeys(p for part in parts for p in part.parameters()))  # towers share
    optimiser = torch.optim.AdamW(weights, config.optim.lr, weight_decay=config.optim.weight_decay)
    best = _Best(config.patience)
    loader = batches(windows["train"].subset(share), config.optim, config.trainer)
    facts = windows["train"].dataset.facts
    quick = _halves(config, learns_bfloat16(device, network))
    for _ in range(config.optim.epochs):
        network.train()
        for batch in loader:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            drawn = _seen_by(network, batch, config.augment)
            with torch.autocast(device.type, torch.bfloat16, enabled=quick):
                embedded = network.embed(drawn)
            logits = network.classify(embedded)
            _step(optimiser, F.cross_entropy(logits, batch["taxon"]))
        logits = _logits(network, windows["validation"], config, device)
        figures = _figures(logits, windows["validation"], facts, counts, config)
        if best.over(figures["species_top1"] or 0.0, network):
            break
    best.restore(network)


def _seen_by(network: Classifier, batch: Batch, views: ViewsConfig) -> Batch:
    """Random views of what the network looks at."""
    if network.view == "aerial":
        batch = {name: tensor for name, tensor in batch.items() if name != "ground"}
    return seen(network.model, batch, views)


def _batches_of(order: Tensor, size: int) -> Sequence[Tensor]:
    """Cut an order into batches of two rows or more, as the standardisation needs."""
    parts = list(torch.split(order, size))
    if len(parts) > 1 and len(parts[-1]) < 2:
        parts[-2:] = [torch.cat(parts[-2:])]
    return [part for part in parts if len(part) > 1]


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


@torch.no_grad()
def _logits(
    network: Classifier, rows: PairedRows, config: ClassifyConfig, device: torch.device
) -> Tensor:
    """Logits of rows without augmentation, on the CPU, shape (N, T)."""
    network.eval()
    parts = []
    quick = _halves(config, computes_bfloat16(device))
    for batch in _in_order(rows, config.optim.batch_size, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=quick):
            embedded = network.embed(batch)
        parts.append(network.classify(embedded).cpu())
    return torch.cat(parts)


class _Best:
    """The weights of the best epoch so far, and when to stop looking for better ones."""

    def __init__(self, patience: int) -> None:
        self.patience, self.waited = patience, 0
        self.figure = -1.0
        self.state: dict[str, Tensor] = {}

    def over(self, figure: float, network: Classifier) -> bool:
        """Take an epoch's figure, and tell whether patience is at its end."""
        if figure > self.figure:
            self.figure, self.waited = figure, 0
            self.state = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
        else:
            self.waited += 1
        return self.waited >= self.patience

    def restore(self, network: Classifier) -> None:
        network.load_state_dict(self.state)
        network.eval()


def _figures(
    logits: Tensor,
    rows: PairedRows,
    facts: pd.DataFrame,
    counts: NDArray[np.int64],
    config: ClassifyConfig,
) -> dict[str, float | None]:
    """Figures of merit of logits, shape (N, T), which must be finite: NaN compares with nothing."""
    if not logits.isfinite().all():
        raise ConfigError(
            "training diverged: scores of held-out rows are not finite; lower probe_lr = "
            f"{config.probe_lr:g} or optim.lr = {config.optim.lr:g}, or mend pixels out of range"
        )
    return classification_figures(
        F.log_softmax(logits, 1).double().numpy(),
        rows.taxon,
        identity(facts, rows.rows),
        counts,
        config.frequent_from,
        config.common_from,
    )


def markdown(results: pd.DataFrame, notes: Mapping[str, Any]) -> str:
    """One table in Markdown, in percent, and what the splits hold."""
    shown = results.copy()
    for column in shown.columns[shown.columns.str.contains("top")]:
        shown[column] = [f"{100 * v:.1f}" if pd.notna(v) else "" for v in shown[column]]
    rows = [shown.columns.tolist(), ["---"] * shown.shape[1], *shown.to_numpy().tolist()]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {text}: {count}" for text, count in notes.items()), ""])
