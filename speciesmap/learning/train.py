"""Training: a configuration in, a checkpoint out."""

from __future__ import annotations

import copy
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from numpy.typing import NDArray
from scipy.special import expit
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, RandomSampler, Sampler

from speciesmap.config import (
    AnyConfig,
    ClassifyConfig,
    FinetuneConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    TrainerConfig,
)
from speciesmap.errors import ConfigError, ModelError, OutputError
from speciesmap.learning.crossview import crossview_stage
from speciesmap.learning.data import (
    Batch,
    Kept,
    PairedRows,
    Places,
    Sources,
    as_is,
    draw_background,
    open_sources,
    target_group_places,
)
from speciesmap.learning.evaluate import Calibration, calibrate, summarise
from speciesmap.learning.modules import Crisp, Finetune, Masked, Stage
from speciesmap.learning.streaming import StreamedBatches
from speciesmap.learning.trust import (
    calibrate_on_surveys,
    clear_of,
    measure_trust,
    read_surveys,
)
from speciesmap.mapping.embed import choose_device
from speciesmap.models import Architecture, SpeciesModel, load_model, save_model
from speciesmap.models.encoders import ImageTower, computes_bfloat16
from speciesmap.models.heads import TaxonHead
from speciesmap.models.masked import MaskedAutoencoder
from speciesmap.models.trust import Trust
from speciesmap.observations.folds import (
    kmeans_folds,
    knndm,
    nearest_fold,
    separated,
    spatial_blocks,
)
from speciesmap.outputs import refuse_existing, replacing
from speciesmap.progress import track

log = logging.getLogger("speciesmap")

REFERENCES = 1024  # windows of the training landscape kept as the yardstick of untrained queries
STATE = Path("state", "last.ckpt")  # where an interrupted run goes on from, in its folder
FOLDS = "folds"  # scores of the folds of a validation that are done
AREA = 1000  # places of the imagery that folds by `knndm` are matched to
STATISTICS = 2048  # windows that band means and deviations are measured on


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
        from speciesmap.learning.classify import classify

        return classify(config, out, overwrite=overwrite)
    out = Path(out)
    first = process_rank() == 0  # further processes of a run only train
    if first:
        refuse_existing(out, overwrite)
    work = out.with_name(f".{out.name}.training")
    described = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
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
    work.mkdir(parents=True, exist_ok=True)
    if first:
        (work / "config.yaml").write_text(described)

    L.seed_everything(config.seed, verbose=False)
    started = time.perf_counter()
    try:
        sources = open_sources(config.data)
        procedure = pretrain if isinstance(config, PretrainConfig) else finetune
        model, metrics = procedure(config, sources, work)  # type: ignore[arg-type]
    except BaseException:
        if first and not (work / STATE).exists() and not (work / FOLDS).exists():
            shutil.rmtree(work)  # nothing to go on from
        raise
    if not first:
        return out
    facts = {
        "training": config.model_dump(mode="json"),
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
    return out


def process_rank() -> int:
    """Number of this process among those that train together, 0 for the first."""
    return int(getattr(rank_zero_only, "rank", 0))


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
    if config.optim.chunk_size and any(isinstance(m, _BatchNorm) for m in model.modules()):
        log.warning(
            "optim.chunk_size: batch norm takes its statistics from a chunk, not from the batch; "
            "a backbone with layer or group norm learns the same in chunks"
        )
    if isinstance(windows, Places):
        sample = windows = windows.filled(model.fill)
    loader = streamed or batches(
        windows, config.optim, config.trainer, together=config.contrastive.same_place == "positive"
    )
    steps = config.optim.epochs * len(loader)
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
        stage = Masked(network, config.optim, steps)
    save_steps = stream.save_steps if stream is not None else None
    metrics = fit(stage, loader, config.optim, config.trainer, work, save_steps)
    set_reference(model, sample, rng, config.trainer.accelerator)
    return model, metrics


def finetune(
    config: FinetuneConfig, sources: Sources, work: Path | None = None
) -> tuple[SpeciesModel, dict[str, Any]]:
    """Learn embeddings of taxa from presences against background.

    Where the configuration asks for validation, whole blocks are held out in turn first, and
    what each fold's model says of them is written to `folds.parquet` in `work`.

    Args:
        config: The stage.
        sources: Its data: a paired data set, and the imagery that background is drawn from.
        work: Folder for logs, folds and for resuming, if any.

    Returns:
        The model, in evaluation mode, and metrics of training and validation.

    Raises:
        ConfigError: The data set or the imagery is missing.
        ModelError: The initial model does not fit the data.
    """
    rng = np.random.default_rng(config.seed)
    base = load_model(config.init)
    if sources.dataset is None or sources.imagery is None:
        raise ConfigError(
            "stage finetune needs data.dataset for presences and data.imagery for background"
        )
    if (base.bands, base.window_px) != (sources.bands, sources.window_px):
        raise ModelError(
            f"{config.init} takes windows of {base.window_px} px with bands "
            f"{', '.join(base.bands)}; {config.data.dataset} has {sources.window_px} px and "
            f"{', '.join(sources.bands)}; cut chips to fit, or pre-train on these"
        )
    image_px = base.ground.image_px if base.ground and sources.dataset.has_ground else None
    presences = PairedRows(sources.dataset, sources.rows, sources.taxa, image_px, sources.window_px)
    data, area = config.data, (sources.imagery, sources.window_px)
    grouped = data.background_kind == "target-group"
    background = (
        target_group_places(sources, data.target_group, base.fill)
        if grouped
        else draw_background(*area, data.background, rng, base.fill, bias=data.bias)
    )
    metrics: dict[str, Any] = {}
    calibrations: dict[str, Calibration] = {}
    own = None
    if config.validation is not None:
        other = None
        if grouped:
            other = draw_background(*area, data.background, rng, base.fill)
        elif data.target_group is not None:
            other = target_group_places(sources, data.target_group, base.fill)
        folds = cross_validate(base, presences, background, config, work, other)
        metrics["validation"] = summarise(folds, sources.taxa, data.background_kind)
        if work is not None:
            folds.to_parquet(work / "folds.parquet")
        own = folds[folds["background"].isin(["", data.background_kind])]
        calibrations = calibrate(own, sources.taxa, config.validation.prevalence)
    model, fitted = fit_taxa(base, presences, background, config, work)
    set_reference(model, background, rng, config.trainer.accelerator)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    if config.validation is not None and config.validation.surveys is not None:
        surveyed, curves = on_surveys(model, presences, background, config)
        calibrations |= surveyed
    model.prevalence = {name: c.prevalence for name, c in calibrations.items()}
    with torch.no_grad():
        for k, taxon in enumerate(sources.taxa):
            if taxon.name in calibrations:
                c = calibrations[taxon.name]
                model.head.gain[k] *= c.slope
                model.head.offset[k] = c.slope * model.head.offset[k] + c.intercept
    model.trust = judge(model, presences, background, own, calibrations, curves, config)
    return model, {**fitted, **metrics}


def on_surveys(
    model: SpeciesModel, presences: PairedRows, background: Places, config: FinetuneConfig
) -> tuple[dict[str, Calibration], dict[str, tuple[list[float], list[float]]]]:
    """Calibrate on surveyed places whose windows share no ground with a presence's."""
    assert config.validation is not None and config.validation.surveys is not None
    surveys = read_surveys(config.validation.surveys)
    imagery = background.imagery
    facts = presences.dataset.facts.iloc[presences.rows]
    rows, cols = imagery.rowcol(surveys["lon"].to_numpy(), surveys["lat"].to_numpy())
    trained = imagery.rowcol(facts["longitude"].to_numpy(), facts["latitude"].to_numpy())
    height, width = imagery.shape
    use = clear_of(rows, cols, *trained, model.window_px)
    use &= (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    places = Places(imagery, rows[use], cols[use], model.window_px, model.fill)
    vectors = embeddings(model, places, accelerator=config.trainer.accelerator)
    with torch.inference_mode():
        logits = model.head(vectors).double().numpy()  # (N, T)
    return calibrate_on_surveys(logits, surveys[use], model.taxa, config.validation.calibration)


def judge(
    model: SpeciesModel,
    presences: PairedRows,
    background: Places,
    folds: pd.DataFrame | None,
    calibrations: Mapping[str, Calibration],
    curves: Mapping[str, tuple[list[float], list[float]]],
    config: FinetuneConfig,
) -> Trust:
    """Measure how far the maps of a calibrated model can be trusted."""
    accelerator = config.trainer.accelerator
    here = embeddings(model, presences, accelerator=accelerator)  # (N, D)
    away = embeddings(model, background, accelerator=accelerator)  # (M, D)
    labels = presences.labels[presences.rows]
    with torch.inference_mode():
        logits = model.head(torch.cat([here, away])).double().numpy()  # (N + M, T)
    taxon = np.r_[labels, np.full(len(away), -1)]
    values = {}
    for k, name in enumerate(t.name for t in model.taxa):
        value = logits[:, k]
        if folds is not None:
            c = calibrations.get(name, Calibration(1.0, 0.0, 0.0))
            held_out = c.slope * folds[name].to_numpy() + c.intercept
            value = np.where(np.isfinite(held_out), held_out, value)
        value = expit(value)
        if name in curves:
            value = np.interp(value, *curves[name])
        values[name] = value[taxon == k], value[taxon == -1]
    fold = None if folds is None else folds["fold"].to_numpy()
    return measure_trust(model, here, labels, away, fold, values, curves, config.seed)


def fit_taxa(
    base: SpeciesModel,
    presences: PairedRows,
    background: Places,
    config: FinetuneConfig,
    work: Path | None = None,
) -> tuple[SpeciesModel, dict[str, Any]]:
    """Fine-tune a copy of a model on presences against background.

    A taxon's vector starts where its windows differ from the background on average.

    Args:
        base: The model to start from, left as it is.
        presences: Rows of taxa.
        background: Places of the study area.
        config: The stage.
        work: Folder for logs and for resuming, if any.

    Returns:
        The fine-tuned model, in evaluation mode, and metrics of the fit.
    """
    torch.manual_seed(config.seed)
    model = copy.deepcopy(base)
    model.taxa = presences.taxa
    model.head = TaxonHead(len(model.taxa), model.dim)
    model.trust = None
    accelerator = config.trainer.accelerator
    here = embeddings(model, presences, accelerator=accelerator)  # (N, D)
    labels = torch.from_numpy(presences.labels[presences.rows])  # (N,)
    away = embeddings(model, background, REFERENCES, accelerator).mean(0)  # (D,)
    with torch.no_grad():
        for k in torch.unique(labels).tolist():
            model.head.weight[k] = F.normalize(here[labels == k].mean(0) - away, dim=0)
    model.train()
    if config.freeze_encoder:
        for tower in (model.aerial, model.ground, model.text):
            if tower is not None:
                tower.requires_grad_(False).eval()
    loader = batches(presences, config.optim, config.trainer)
    other = batches(background, config.optim, config.trainer, count=len(loader))
    both = CombinedLoader({"presences": loader, "background": other}, mode="min_size")
    steps = config.optim.epochs * len(loader)
    stage = Finetune(model, config.optim, steps, config.positive_weight, config.align, config.views)
    metrics = fit(stage, both, config.optim, config.trainer, work)
    return model.requires_grad_(True).eval(), metrics


def cross_validate(
    base: SpeciesModel,
    presences: PairedRows,
    background: Places,
    config: FinetuneConfig,
    work: Path | None = None,
    other: Places | None = None,
) -> pd.DataFrame:
    """Fine-tune with whole folds held out in turn, and score what was held out.

    Training windows that overlap a held-out window are left out.

    Args:
        base: The model to start from, left as it is.
        presences: Rows of taxa.
        background: Places of the study area; its imagery gives the grid.
        config: The stage, with `validation`.
        work: Folder where each fold's scores are kept, so that a run that goes on repeats none.
        other: Places of the other kind of background, scored and never trained on.

    Returns:
        One row per presence and background place: observation_id and taxon (empty for
        background), longitude, latitude, background (its kind, empty for presences), fold, trained
        (windows trained on in that fold), and a logit per taxon, by its name, NaN where the fold's
        training had no presence of it.
    """
    assert config.validation is not None
    imagery = background.imagery
    facts = presences.dataset.facts.iloc[presences.rows]
    rows, cols = imagery.rowcol(facts["longitude"].to_numpy(), facts["latitude"].to_numpy())
    others = [background] if other is None else [background, other]
    rows = np.concatenate([rows, *(places.rows for places in others)])
    cols = np.concatenate([cols, *(places.cols for places in others)])
    count, end = len(presences), len(presences) + len(background)
    folds = _folds(rows, cols, count, background, config)
    logits = np.empty((len(rows), len(presences.taxa)))
    trained = np.empty(len(rows), dtype=np.int64)
    for k in track(range(config.validation.folds), "Cross-validating"):
        use = separated(cols, rows, folds, k, presences.dataset.window_px + 1)
        held = folds == k
        trained[held] = use[:end].sum()
        kept = None if work is None else work / FOLDS / f"{k}.npy"
        if kept is not None and kept.exists():
            logits[held] = np.load(kept)
            continue
        model, _ = fit_taxa(
            base, presences.subset(use[:count]), background.subset(use[count:end]), config
        )
        accelerator = config.trainer.accelerator
        parts = [
            embeddings(model, presences.subset(held[:count]), accelerator=accelerator),
            embeddings(model, background.subset(held[count:end]), accelerator=accelerator),
        ]
        if other is not None:
            parts.append(embeddings(model, other.subset(held[end:]), accelerator=accelerator))
        with torch.inference_mode():
            logits[held] = model.head(torch.cat(parts)).numpy()
        known = presences.labels[presences.rows[use[:count]]]
        untrained = np.setdiff1d(np.arange(len(presences.taxa)), known)
        logits[np.ix_(held, untrained)] = np.nan
        if kept is not None and process_rank() == 0:
            with replacing(kept, overwrite=True) as beside:
                np.save(beside, logits[held])
    x, y = imagery.xy(rows, cols)
    nothing = np.full(len(rows) - count, "", object)
    names = np.r_[facts["name"].to_numpy(dtype=object), nothing]
    kinds = ["random", "target-group"]
    if config.data.background_kind != "random":
        kinds.reverse()
    table = pd.DataFrame(
        {
            "observation_id": np.r_[facts["observation_uuid"].to_numpy(dtype=object), nothing],
            "longitude": x,
            "latitude": y,
            "taxon": names,
            "background": np.repeat(["", *kinds], [count, end - count, len(rows) - end]),
            "fold": folds,
            "trained": trained,
        }
    )
    return table.join(pd.DataFrame(logits, columns=[taxon.name for taxon in presences.taxa]))


def _folds(
    rows: NDArray[np.float64],
    cols: NDArray[np.float64],
    count: int,
    background: Places,
    config: FinetuneConfig,
) -> NDArray[np.int64]:
    """Make the folds of the presences, the first `count` places, and of the rest, shape (N,)."""
    chosen = config.validation
    assert chosen is not None
    imagery = background.imagery
    x, y = cols * imagery.resolution_m, rows * imagery.resolution_m
    if chosen.block_m is not None and chosen.method == "blocks":
        return spatial_blocks(
            x,
            y,
            block_m=chosen.block_m,
            folds=chosen.folds,
            seed=config.seed,
            weight=np.arange(len(rows)) < count,
        )
    if chosen.method == "kmeans":
        fold = kmeans_folds(x[:count], y[:count], folds=chosen.folds, seed=config.seed)
    else:
        area = draw_background(imagery, 1, AREA, np.random.default_rng(config.seed))
        fold = knndm(
            x[:count],
            y[:count],
            area.cols * imagery.resolution_m,
            area.rows * imagery.resolution_m,
            folds=chosen.folds,
            seed=config.seed,
        )
    rest = nearest_fold(x[:count], y[:count], fold, x[count:], y[count:])
    return np.concatenate([fold, rest])


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
        windows: Where statistics are measured.
        matcher: Whether one transformer encodes both views and scores pairs.
    """
    mean, std = config.aerial.mean, config.aerial.std
    if mean is None or std is None:
        chosen = np.linspace(0, len(windows) - 1, min(STATISTICS, len(windows))).astype(int)
        pixels = windows.__getitems__(chosen.tolist())["aerial"].double()
        mean = mean or pixels.mean((0, 2, 3)).tolist()
        std = std or pixels.std((0, 2, 3)).clamp(min=1e-6).tolist()
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != len(sources.bands):
            raise ConfigError(
                f"model.aerial.{name} has {len(values)} values, the data has "
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
    return SpeciesModel(
        architecture,
        references=REFERENCES,
        pretrained=[name for name, tower in towers.items() if tower and tower.pretrained],
    )


def batches(
    windows: PairedRows | Places,
    optim: OptimConfig,
    trainer: TrainerConfig,
    count: int | None = None,
    together: bool = False,
) -> DataLoader[Batch]:
    """Shuffle into batches: an epoch, or `count` batches drawn with replacement.

    With `together`, rows of one place follow each other.
    """
    size = min(optim.batch_size, len(windows))
    sampler: Sampler[int] | None = None
    if count:
        sampler = RandomSampler(windows, replacement=True, num_samples=count * size)
    elif together and isinstance(windows, PairedRows):
        sampler = ByPlace(windows.place[windows.rows])
    return DataLoader(
        windows,
        batch_size=size,
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
        collate_fn=as_is,
        num_workers=trainer.workers,
        persistent_workers=trainer.workers > 0,
        multiprocessing_context="spawn" if trainer.workers else None,
    )


class ByPlace(Sampler[int]):
    """Rows in an order whose places are shuffled, and so are the rows of each place.

    Args:
        place: Of each row, shape (N,).
    """

    def __init__(self, place: NDArray[np.int64]) -> None:
        self.place = torch.from_numpy(np.unique(place, return_inverse=True)[1])

    def __len__(self) -> int:
        return len(self.place)

    def __iter__(self) -> Iterator[int]:
        """Draw an order."""
        rows = torch.randperm(len(self.place))
        rank = torch.randperm(int(self.place.max()) + 1)
        return iter(rows[rank[self.place[rows]].argsort(stable=True)].tolist())


def fit(
    stage: Stage,
    loader: Any,
    optim: OptimConfig,
    config: TrainerConfig,
    work: Path | None,
    save_steps: int | None = None,
) -> dict[str, Any]:
    """Run Lightning's Trainer on one stage.

    Args:
        stage: What to train.
        loader: Its batches.
        optim: How many epochs.
        config: Devices and precision.
        work: Folder for logs and for a state to resume from, if any.
        save_steps: Save that state after so many steps too, not only after an epoch; the loader
            must then be able to go on in the middle of one.

    Returns:
        The last losses by name, the number of steps, and the precision.
    """
    precision = (
        config.precision if config.precision != "auto" else best_precision(config.accelerator)
    )
    callbacks: list[Callback] = []
    loud = log.isEnabledFor(logging.INFO)
    state = None
    if work is not None:
        state = work / STATE
        place: dict[str, Any] = {"dirpath": state.parent, "filename": state.stem}
        callbacks.append(ModelCheckpoint(**place, enable_version_counter=False))
        if save_steps is not None:
            callbacks.append(
                ModelCheckpoint(
                    **place, enable_version_counter=False, every_n_train_steps=save_steps
                )
            )
        callbacks.append(Randomness())
        if loud:
            callbacks.append(RichProgressBar(leave=True, console_kwargs={"stderr": True}))
    stage.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if process_rank():  # other views than in the first process
        torch.manual_seed(torch.initial_seed() + process_rank())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            precision=precision,  # type: ignore[arg-type]
            max_epochs=optim.epochs,
            gradient_clip_val=1.0,
            callbacks=callbacks,
            logger=[CSVLogger(work, "logs", ""), TensorBoardLogger(work, "logs", "")]
            if work is not None
            else False,
            log_every_n_steps=10,
            enable_checkpointing=work is not None,
            enable_progress_bar=work is not None and loud,
            enable_model_summary=False,
        )
        trainer.fit(
            stage,
            loader,
            ckpt_path=state if state is not None and state.exists() else None,
            weights_only=True,
        )
    stage.network.eval()
    losses = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
    return {"losses": losses, "steps": trainer.global_step, "precision": precision}


def best_precision(accelerator: str) -> str:
    """Choose bfloat16 where the processor multiplies it natively, else what Lightning has."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if computes_bfloat16(torch.device("cuda")) else "16-mixed"
    return "bf16-mixed" if computes_bfloat16(torch.device("cpu")) else "32-true"


@torch.inference_mode()
def embeddings(
    model: SpeciesModel,
    windows: PairedRows | Places | Kept,
    limit: int | None = None,
    accelerator: str = "auto",
) -> torch.Tensor:
    """Embed the first `limit` windows, or all, without augmentation.

    Args:
        model: Left where it is and as it is.
        windows: What to embed.
        limit: How many at most.
        accelerator: Of `TrainerConfig`: a GPU is used where there is one, unless this is `cpu`.

    Returns:
        On the CPU, float32, shape (N, D).
    """
    training, home = model.training, model.log_scale.device
    device = choose_device("cpu" if accelerator == "cpu" else None)
    model.eval().to(device)
    count = min(len(windows), limit or len(windows))
    parts = [torch.empty(0, model.dim)]
    quick = computes_bfloat16(device)
    for chosen in np.array_split(np.arange(count), max(1, count // 256)):
        if len(chosen):
            with torch.autocast(device.type, torch.bfloat16, enabled=quick):
                parts.append(model.encode_aerial(windows.aerial(chosen).to(device)).cpu())  # (n, D)
    model.train(training).to(home)
    return torch.cat(parts)


def set_reference(
    model: SpeciesModel,
    windows: PairedRows | Places | Kept,
    rng: np.random.Generator,
    accelerator: str = "auto",
) -> None:
    """Embed windows of the training landscape as the yardstick of untrained queries."""
    chosen = np.zeros(len(windows), dtype=bool)
    chosen[rng.permutation(len(windows))[:REFERENCES]] = True
    model.reference = embeddings(model, windows.subset(chosen), accelerator=accelerator).clone()


class Randomness(Callback):
    """Keeps the state of the random numbers, so that a resumed run draws what it would have.

    It is that of the first process; others draw anew.
    """

    def state_dict(self) -> dict[str, Any]:
        """Take the states, one of the CPU and one of each GPU."""
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the states back."""
        if process_rank():
            return
        torch.set_rng_state(state_dict["cpu"])
        if len(state_dict["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state_dict["cuda"])
