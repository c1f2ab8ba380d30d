"""Fit a network to batches with Lightning, and embed what it learned from."""

from __future__ import annotations

import logging
import math
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Sampler

from speciesmap.config import OptimConfig, TrainerConfig
from speciesmap.errors import ConfigError, DatasetError
from speciesmap.learning.data import Batch, Kept, PairedRows, Places, as_is
from speciesmap.learning.modules import Stage
from speciesmap.learning.sources import Sources
from speciesmap.models import SpeciesModel
from speciesmap.models.device import choose_device, computes_bfloat16
from speciesmap.models.encoders import ImageTower
from speciesmap.progress import at_level
from speciesmap.rasters.values import Values

log = logging.getLogger("speciesmap")

LIGHTNING = ("lightning.pytorch", "lightning.fabric")  # its loggers
LEAST_BFLOAT16_PX = 16  # sides up to this are not learned in bfloat16 on a CPU
MEASURED = 2048  # windows that statistics and histograms of bands are measured on
REFERENCES = 1024  # windows of the training landscape kept as the yardstick of untrained queries
STATE = Path("state", "last.ckpt")  # where an interrupted run goes on from, in its folder


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

    Raises:
        ConfigError: Lightning has no such device or precision here, the losses diverged, or the
            processes have no whole batch each.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    precision: str = config.precision
    if precision == "auto":
        precision = best_precision(config.accelerator, stage.network)
    stage.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = None if work is None else work / STATE
    with warnings.catch_warnings(), at_level(logging.WARNING, *LIGHTNING):
        warnings.simplefilter("ignore")
        trainer = _trainer(config, optim.epochs, precision, work, save_steps)
        ctrl_c = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(
                stage,
                loader,
                ckpt_path=state if state is not None and state.exists() else None,
                weights_only=True,
            )
        except SystemExit as end:
            if end.code != 1:
                raise
            signal.signal(signal.SIGINT, ctrl_c)  # Lightning took Ctrl-C for the process's end
            raise KeyboardInterrupt from end
    stage.network.eval()
    if not trainer.global_step:
        raise ConfigError(
            f"{trainer.world_size} processes share too few rows to fill a batch of "
            f"{optim.batch_size} each, so nothing was learned; lower optim.batch_size or "
            "trainer.devices"
        )
    losses = {name: round(value, 4) for name, value in stage.losses().items()}
    if not all(map(math.isfinite, losses.values())):
        raise ConfigError(
            f"training diverged: after {trainer.global_step} steps the losses are {losses}; lower "
            f"optim.lr = {optim.lr:g}, or look for pixels out of range"
        )
    return {"losses": losses, "steps": trainer.global_step, "precision": precision}


def _trainer(
    config: TrainerConfig, epochs: int, precision: str, work: Path | None, save_steps: int | None
) -> L.Trainer:
    """Lightning's, which logs, saves and shows its progress where there is a folder for it.

    Raises:
        ConfigError: It has no such device or precision here.
    """
    loud = log.isEnabledFor(logging.INFO)
    callbacks: list[Callback] = []
    if work is not None:
        for steps in (None,) if save_steps is None else (None, save_steps):
            callbacks.append(
                ModelCheckpoint(
                    dirpath=(work / STATE).parent,
                    filename=STATE.stem,
                    enable_version_counter=False,
                    every_n_train_steps=steps,
                )
            )
        callbacks.append(Randomness())
        if loud:
            callbacks.append(Progress(leave=True, console_kwargs={"stderr": True}))
    arguments: dict[str, Any] = {
        "accelerator": config.accelerator,
        "devices": config.devices,
        "precision": precision,
        "max_epochs": epochs,
        "gradient_clip_val": 1.0,
        "callbacks": callbacks,
        "logger": [CSVLogger(work, "logs", ""), TensorBoardLogger(work, "logs", "")]
        if work is not None
        else False,
        "log_every_n_steps": 10,
        "enable_checkpointing": work is not None,
        "enable_progress_bar": work is not None and loud,
        "enable_model_summary": False,
    }
    try:
        trainer = L.Trainer(**arguments)
        if trainer.world_size > 1:  # else it stops at parameters that no loss reaches
            trainer = L.Trainer(**arguments, strategy="ddp_find_unused_parameters_true")
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ConfigError(
            f"Lightning cannot train with trainer.accelerator = {config.accelerator!r}, "
            f"devices = {config.devices!r}, precision = {precision!r} ({error}); leave them at "
            "'auto'"
        ) from error
    return trainer


def process_rank() -> int:
    """Number of this process among those that train together, 0 for the first."""
    return int(getattr(rank_zero_only, "rank", 0))


def best_precision(accelerator: str, network: nn.Module) -> str:
    """Choose bfloat16 where a network can learn in it, else what Lightning has."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if learns_bfloat16(torch.device("cuda"), network) else "16-mixed"
    return "bf16-mixed" if learns_bfloat16(torch.device("cpu"), network) else "32-true"


def learns_bfloat16(device: torch.device, network: nn.Module) -> bool:
    """Whether a processor multiplies bfloat16 natively, and its gradients are right.

    On a CPU a convolution that strides over a map of one pixel gets weight gradients of any value
    (oneDNN of torch 2.13: of 180 trials 137 were not finite). Towers for 16 px or fewer come to
    that.
    """
    sides = (m.image_px for m in network.modules() if isinstance(m, ImageTower))
    if device.type == "cpu" and min(sides, default=math.inf) <= LEAST_BFLOAT16_PX:
        return False
    return computes_bfloat16(device)


class Progress(RichProgressBar):
    """Counts epochs from 1 up to their number, where Lightning ends one before it."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"


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


def batches(
    windows: PairedRows | Places,
    optim: OptimConfig,
    trainer: TrainerConfig,
    count: int | None = None,
    together: bool = False,
) -> DataLoader[Batch]:
    """Shuffle into batches: an epoch, or `count` batches drawn with replacement.

    With `together`, rows of one place follow each other.

    Raises:
        DatasetError: There are fewer than two windows.
    """
    if len(windows) < 2:
        what = "row" if isinstance(windows, PairedRows) else "background place"
        raise DatasetError(
            f"there is {len(windows)} {what} to learn from, and a batch needs 2; give more of them"
        )
    size = min(optim.batch_size, len(windows))
    sampler: Sampler[int] | None = None
    if count:
        sampler = Drawn(RandomSampler(windows, replacement=True, num_samples=count * size))
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


class Drawn(Sampler[int]):
    """Draws of torch's own sampler, which processes share out.

    In the place of torch's own Lightning puts one that shares out the data set, once.
    """

    def __init__(self, sampler: Sampler[int]) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        """Draw."""
        return iter(self.sampler)


class ByPlace(Sampler[int]):
    """Rows in an order whose places are shuffled, and so are the rows of each place.

    Processes that train together share out one order, which the first of them draws.

    Args:
        place: Of each row, shape (N,).
    """

    def __init__(self, place: NDArray[np.int64]) -> None:
        self.place = torch.from_numpy(np.unique(place, return_inverse=True)[1])

    def __len__(self) -> int:
        return len(self.place)

    def __iter__(self) -> Iterator[int]:
        """Draw an order."""
        seed = [int(torch.randint(1 << 62, ()))]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(seed, src=0)
        generator = torch.Generator().manual_seed(seed[0])
        rows = torch.randperm(len(self.place), generator=generator)
        rank = torch.randperm(int(self.place.max()) + 1, generator=generator)
        return iter(rows[rank[self.place[rows]].argsort(stable=True)].tolist())


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


def measure(
    windows: PairedRows | Places | Kept, sources: Sources
) -> tuple[list[float], list[float], Values]:
    """Measure the valid pixels of up to 2048 windows, which are read once.

    Args:
        windows: What a model learns from.
        sources: Of their type and scaling.

    Returns:
        Of each band mean and standard deviation, and histograms of every 29th pixel.

    Raises:
        DatasetError: A pixel is no number.
    """
    chosen = np.linspace(0, len(windows) - 1, min(MEASURED, len(windows))).astype(int)
    count = 0
    total, squares = np.zeros((2, len(sources.bands)))
    kept = []
    for pixels in windows.pixels(chosen):
        count += pixels.shape[1]
        total += pixels.sum(1, dtype=np.float64)  # (B,)
        squares += np.square(pixels, dtype=np.float64).sum(1)  # (B,)
        kept.append(pixels[:, ::29])
    mean = total / count
    if not np.isfinite(mean).all():
        band = sources.bands[int(np.argmin(np.isfinite(mean)))]
        raise DatasetError(
            f"windows hold pixels of band {band} that are no numbers; put values in their "
            "place, or leave such rows out"
        )
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    values = Values.of(np.concatenate(kept, axis=1), sources.dtype, sources.scaling)
    return mean.tolist(), std.tolist(), values
