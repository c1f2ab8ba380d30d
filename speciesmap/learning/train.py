"""Training: a configuration in, a checkpoint out."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
import yaml

from speciesmap.config import AnyConfig, ClassifyConfig, FinetuneConfig, ModelConfig, PretrainConfig
from speciesmap.datasets.paired import PairedDataset
from speciesmap.errors import ConfigError, OutputError
from speciesmap.learning.classify import classify
from speciesmap.learning.crossview import crossview_stage
from speciesmap.learning.data import Kept, PairedRows, Places
from speciesmap.learning.finetune import finetune
from speciesmap.learning.fit import (
    REFERENCES,
    STATE,
    batches,
    fit,
    measure,
    process_rank,
    set_reference,
)
from speciesmap.learning.modules import Crisp, Masked, Stage, check_chunks
from speciesmap.learning.seen import NOTHING, sample_seen
from speciesmap.learning.sources import Sources, draw_background, open_sources
from speciesmap.learning.streaming import StreamedBatches
from speciesmap.learning.validation import FOLDS
from speciesmap.models import Architecture, SpeciesModel, read_facts, save_model
from speciesmap.models.encoders import ImageTower
from speciesmap.models.masked import MaskedAutoencoder
from speciesmap.models.text import TextTower
from speciesmap.outputs import refuse_existing, replacing
from speciesmap.rasters.messages import without_credentials
from speciesmap.taxa import every_name

log = logging.getLogger("speciesmap")


def train(
    config: AnyConfig,
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Run one training stage.

    The work lies in a hidden folder beside `out` until it is done, with logs, and what is needed
    to go on after an interruption.

    Args:
        config: What to do; see `load_config`.
        out: Folder for the checkpoint, or for the tables of stage `classify`.
        resume: Go on with an interrupted run of the same configuration.
        overwrite: Replace an existing output, or an interrupted run.

    Returns:
        The folder.

    Raises:
        SpeciesmapError: The configuration, its data or the output do not allow it.
    """
    if isinstance(config, ClassifyConfig):
        if resume:
            raise ConfigError("stage classify keeps nothing to go on from; leave --resume out")
        return classify(config, out, overwrite=overwrite)
    out = Path(out)
    first = process_rank() == 0  # further processes of a run only train
    start = surveys = None
    if isinstance(config, FinetuneConfig):
        start, surveys = config.init, config.validation.surveys if config.validation else None
    elif config.method == "cve_mae":
        start = config.crossview.aerial_init
    if first:
        refuse_existing(out, overwrite, *config.data.inputs, start, surveys)
    work = unfinished(out)
    recorded = without_credentials(config.model_dump(mode="json"))
    described = yaml.safe_dump(recorded, sort_keys=False)
    if first and work.exists() and not resume:
        if not overwrite:
            raise OutputError(
                f"an interrupted run lies in {work}; pass --resume to go on, or --overwrite to "
                "start anew"
            )
        shutil.rmtree(work)
    if first and work.exists() and (work / "config.yaml").read_text() != described:
        raise ConfigError(
            f"the interrupted run in {work} had another configuration; pass --overwrite to start "
            "anew, or the configuration in its config.yaml"
        )
    if first:
        work.mkdir(parents=True, exist_ok=True)
        (work / "config.yaml").write_text(described)

    L.seed_everything(config.seed, verbose=False)
    started = time.perf_counter()
    try:
        sources = open_sources(config.data)
        if first:
            refuse_other_data(work, config, sources)
        before = NOTHING if start is None else read_facts(start)  # which may be gone in the end
        origin = {
            "seen": sample_seen(config, sources, before),
            "initial": before.get("fingerprint"),
        }
        if isinstance(config, PretrainConfig):
            model, metrics = pretrain(config, sources, work)
        else:
            model, metrics = finetune(config, sources, before, work)
    except BaseException:
        if first and not (work / STATE).exists() and not (work / FOLDS).exists():
            shutil.rmtree(work)  # nothing to go on from
        raise
    if not first:
        return out
    facts = {
        "training": recorded,
        **origin,
        "metrics": metrics,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"torch": torch.__version__, "lightning": L.__version__},
    }
    with replacing(out, overwrite=overwrite) as folder:
        save_model(model, folder, facts)
        (folder / "config.yaml").write_text(described)
        for kept in ("logs", "folds.parquet"):
            if (work / kept).exists():
                (work / kept).rename(folder / kept)
    shutil.rmtree(work)
    log.info(told(metrics))
    return out


def told(metrics: Mapping[str, Any]) -> str:
    """Say in one line how good a model is, or how far its training came where nothing judged it."""
    judged = {
        name: found
        for name, found in metrics.get("validation", {}).items()
        if found["auc"] is not None
    }
    if judged:
        mean = float(np.mean([found["auc"] for found in judged.values()]))
        several = len(judged) > 1
        of = f"mean of {len(judged)} taxa" if several else next(iter(judged))
        dark = sum(found["informative"] is False for found in judged.values())
        if dark:
            of += f"; {dark} of them uninformative" if several else "; uninformative"
        return f"validation on held-out folds: AUC {mean:.2f} ({of})"
    if "losses" in metrics:
        return f"training: loss {metrics['losses']['loss']:.3g} after {metrics['steps']} steps"
    return "training: heads at their optimum"


def refuse_other_data(
    work: Path, config: PretrainConfig | FinetuneConfig, sources: Sources
) -> None:
    """Keep what tells a run's data apart in its folder, and stop where it was kept of others.

    It is that of rasters, the bytes of tables and of the initial model, and of a data set the names
    and places of its rows and the sizes of its files.

    Raises:
        ConfigError: Of the interrupted run something of the same name was another.
    """
    found = dict(_digests(config, sources))
    kept = work / "data.json"
    before = json.loads(kept.read_text()) if kept.exists() else found
    changed = [name for name in found if found[name] != before.get(name, found[name])]
    if changed:
        raise ConfigError(
            f"the interrupted run in {work} had another {' and '.join(changed)} than lies there "
            "now; pass --overwrite to start anew, or put back what it had"
        )
    with replacing(kept, overwrite=True) as file:
        file.write_text(json.dumps(found))


def _digests(
    config: PretrainConfig | FinetuneConfig, sources: Sources
) -> Iterator[tuple[str, str]]:
    """What tells apart whatever a configuration names, by its key."""
    data, dataset = config.data, sources.dataset
    if dataset is not None:
        told = dataset.facts[["name", "latitude", "longitude"]]
        rows = pd.util.hash_pandas_object(told, index=False).to_numpy().tobytes()
        files = dataset.files.files if isinstance(dataset, PairedDataset) else []
        sizes = [file.stat().st_size for file in files if isinstance(file, Path)]
        yield "data.dataset", hashlib.sha256(rows + repr(sizes).encode()).hexdigest()
    if sources.imagery is not None:
        yield "data.imagery", sources.imagery.fingerprint
    if sources.bias is not None:
        yield "data.bias", sources.bias.fingerprint
    if sources.covariates is not None:
        yield "data.covariates", sources.covariates.fingerprint
    named = {"data.background": data.background, "data.target_group": data.target_group}
    if isinstance(config, FinetuneConfig):
        named["init"] = config.init
        named["validation.surveys"] = config.validation.surveys if config.validation else None
    else:
        named["crossview.aerial_init"] = config.crossview.aerial_init
    for name, path in named.items():
        if isinstance(path, str):
            digest = hashlib.sha256()
            with suppress(OSError, ValueError):  # whoever needs it says why it cannot be read
                for file in sorted([Path(path), *Path(path).rglob("*")]):
                    if file.is_file():
                        with file.open("rb") as content:
                            digest.update(hashlib.file_digest(content, "sha256").digest())
            yield name, digest.hexdigest()


def unfinished(out: Path) -> Path:
    """Folder beside an output where a run keeps what it needs to go on, until it is done."""
    return out.with_name(f".{out.name}.training")


def pretrain(
    config: PretrainConfig, sources: Sources, work: Path | None = None
) -> tuple[SpeciesModel, dict[str, Any]]:
    """Learn a joint space from paired views, or features from imagery alone.

    Args:
        config: The stage.
        sources: Its data.
        work: Folder for logs and for resuming, if any.

    Returns:
        The model, in evaluation mode, and metrics of the training.

    Raises:
        ConfigError: The method lacks the data it learns from.
    """
    rng = np.random.default_rng(config.seed)
    contrastive = config.method == "crisp"
    paired = config.method != "mae" or config.masked.view == "ground"
    if paired and sources.dataset is None:
        raise ConfigError(
            f"method {config.method} learns from pairs here; give data.dataset, or method: mae "
            "with masked.view: aerial"
        )
    if contrastive and config.model.ground is None and config.model.text is None:
        raise ConfigError(
            "method crisp needs model.ground or model.text beside model.aerial; give one, or "
            "method: mae"
        )
    windows: PairedRows | Places
    if sources.dataset is not None:
        ground = config.model.ground
        image_px = ground.image_px if paired and ground else None
        if image_px and not sources.dataset.has_ground:
            raise ConfigError(
                f"{config.data.dataset} has no photos (column gl_image), which model.ground learns "
                "from; leave model.ground out, or cut chips with --photos"
            )
        windows = PairedRows(
            sources.dataset, sources.rows, sources.taxa, image_px, sources.window_px
        )
    else:
        assert sources.imagery is not None
        windows = draw_background(sources.imagery, sources.window_px, config.data.background, rng)
    stream = config.data.stream if isinstance(windows, PairedRows) else None
    streamed: StreamedBatches | None = None
    sample: PairedRows | Places | Kept = windows
    if stream is not None and isinstance(windows, PairedRows):
        if config.contrastive.same_place == "positive":
            raise ConfigError(
                "data.stream cannot keep rows of one place together, as contrastive.same_place: "
                "positive needs; leave one of them out"
            )
        streamed = StreamedBatches(
            windows,
            batch_size=config.optim.batch_size,
            buffer_rows=stream.buffer_rows,
            seed=config.seed,
            workers=config.trainer.workers,
        )
        sample = Kept(streamed.first_windows(REFERENCES))
    model = build(config.model, sources, sample, matcher=config.method == "cvm_mae")
    check_chunks(model, config.optim.chunk_size)
    if isinstance(windows, Places):
        sample = windows = windows.filled(model.fill)
    loader = streamed or batches(
        windows, config.optim, config.trainer, together=config.contrastive.same_place == "positive"
    )
    alone = len(loader) if streamed is None else streamed.batches(world=1)
    steps = config.optim.epochs * alone  # of one process, whoever started how many
    if contrastive:
        stage: Stage = Crisp(
            model, sources.taxa, config.optim, steps, config.contrastive, config.views
        )
    elif paired:
        stage = crossview_stage(model, sources.taxa, config, steps)
    else:
        masked = config.masked
        if not isinstance(model.aerial, ImageTower):
            raise ConfigError(
                "method mae hides patches of whole windows, which a factored encoder never sees; "
                "choose model.aerial.encoder: plain, or method: crisp"
            )
        network = MaskedAutoencoder(
            model.aerial,
            masked.mask_ratio,
            masked.decoder_dim,
            masked.decoder_depth,
            masked.decoder_heads,
            masked.standardise,
            keep_positions=config.model.aerial.pretrained,
        )
        stage = Masked(network, config.optim, steps, config.views)
    save_steps = stream.save_steps if stream is not None else None
    metrics = fit(stage, loader, config.optim, config.trainer, work, save_steps)
    if isinstance(model.text, TextTower):
        model.names = every_name(sources.taxa)
    set_reference(model, sample, rng, config.trainer.accelerator)
    return model, metrics


def build(
    config: ModelConfig,
    sources: Sources,
    windows: PairedRows | Places | Kept,
    matcher: bool = False,
) -> SpeciesModel:
    """Make an untrained model for data, with the data's own band statistics unless given.

    Args:
        config: Of the model.
        sources: What it learns from.
        windows: Where statistics and histograms are measured.
        matcher: Whether one transformer encodes both views and scores pairs.
    """
    mean, std, values = measure(windows, sources)
    mean, std = config.aerial.mean or mean, config.aerial.std or std
    for name, given in (("mean", mean), ("std", std)):
        if len(given) != len(sources.bands):
            raise ConfigError(
                f"model.aerial.{name} has {len(given)} values, the data has "
                f"{len(sources.bands)} bands ({', '.join(sources.bands)})"
            )
    towers = {"aerial": config.aerial, "ground": config.ground}
    architecture = Architecture(
        dim=config.dim,
        bands=sources.bands,
        window_px=sources.window_px,
        resolution_m=sources.resolution_m,
        mean=tuple(mean),
        std=tuple(std),
        aerial=config.aerial.model_dump(
            include={"backbone", "kwargs"}
            | ({"factored"} if config.aerial.encoder == "factored" else set())
        ),
        ground=config.ground.model_dump(include={"backbone", "kwargs", "image_px"})
        if config.ground
        else None,
        text=config.text.model_dump(exclude_none=True) if config.text else None,
        metadata=config.metadata.model_dump() if config.metadata else None,
        matcher=matcher,
    )
    model = SpeciesModel(
        architecture,
        references=REFERENCES,
        pretrained=[name for name, tower in towers.items() if tower and tower.pretrained],
    )
    model.values = values
    return model
