"""Pre-training: a joint space from paired views, or features from images of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from speciesmap.config import ModelConfig, PretrainConfig
from speciesmap.errors import ConfigError
from speciesmap.learning.crossview import masked_stage
from speciesmap.learning.data import Kept, PairedRows, Places
from speciesmap.learning.fit import REFERENCES, batches, fit, measure, set_reference
from speciesmap.learning.modules import Crisp, Stage, check_chunks
from speciesmap.learning.sources import Sources, draw_background
from speciesmap.learning.streaming import StreamedBatches
from speciesmap.models import Architecture, SpeciesModel
from speciesmap.models.text import TextTower
from speciesmap.taxa import every_name


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
    windows = _windows(config, sources, rng)
    stream = config.data.stream if isinstance(windows, PairedRows) else None
    streamed: StreamedBatches | None = None
    sample: PairedRows | Places | Kept = windows
    if stream is not None and isinstance(windows, PairedRows):
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
    if config.method == "crisp":
        choices = (config.optim, steps, config.contrastive, config.views)
        stage: Stage = Crisp(model, sources.taxa, *choices)
    else:
        stage = masked_stage(model, sources.taxa, config, steps)
    save_steps = stream.save_steps if stream is not None else None
    metrics = fit(stage, loader, config.optim, config.trainer, work, save_steps)
    if isinstance(model.text, TextTower):
        model.names = every_name(sources.taxa)
    set_reference(model, sample, rng, config.trainer.accelerator)
    return model, metrics


def _windows(
    config: PretrainConfig, sources: Sources, rng: np.random.Generator
) -> PairedRows | Places:
    """What a method learns from: rows with photos where it reads any, or places of the imagery."""
    paired = config.method != "mae" or config.masked.view == "ground"
    if paired and sources.dataset is None:
        raise ConfigError(
            f"method {config.method} learns from pairs here; give data.dataset, or method: mae "
            "with masked.view: aerial"
        )
    ground = config.model.ground
    if config.method == "crisp" and ground is None and config.model.text is None:
        raise ConfigError(
            "method crisp needs model.ground or model.text beside model.aerial; give one, or "
            "method: mae"
        )
    if sources.dataset is None:
        assert sources.imagery is not None
        return draw_background(sources.imagery, sources.window_px, config.data.background, rng)
    image_px = ground.image_px if paired and ground else None
    if image_px and not sources.dataset.has_ground:
        raise ConfigError(
            f"{config.data.dataset} has no photos (column gl_image), which model.ground learns "
            "from; leave model.ground out, or cut chips with --photos"
        )
    if config.data.stream is not None and config.contrastive.same_place == "positive":
        raise ConfigError(
            "data.stream cannot keep rows of one place together, as contrastive.same_place: "
            "positive needs; leave one of them out"
        )
    return PairedRows(sources.dataset, sources.rows, sources.taxa, image_px, sources.window_px)


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
