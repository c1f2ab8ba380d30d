"""Batches of a streamed data set, over processes and workers, resumable in the middle of an epoch.

Lightning asks a loader for its state when it saves a run and gives it back when the run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from speciesmap.datasets.paired import PairedDataset
from speciesmap.datasets.stream import Stream
from speciesmap.errors import ConfigError
from speciesmap.learning.data import Batch, PairedRows, as_is, middle

SAMPLE_EPOCH = 2**31  # none that training comes to


class StreamedBatches:
    """One process's batches, epoch after epoch.

    Worker k of process r is one consumer of the stream. Workers take turns, so that the order of
    the batches is the same at every run.

    Args:
        rows: What to stream.
        batch_size: Rows of a batch in this process.
        buffer_rows: Rows in each worker among which the next is drawn.
        seed: Same seed, same order.
        workers: Worker processes; the images are read in this one by default.
        rank: Number of this process.
        world: How many processes train together; read from the environment by default, where
            Lightning, torchrun and SLURM tell it.

    Raises:
        ConfigError: The rows are no paired data set's.
    """

    def __init__(
        self,
        rows: PairedRows,
        batch_size: int,
        buffer_rows: int,
        seed: int,
        workers: int = 0,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        if not isinstance(rows.dataset, PairedDataset):
            raise ConfigError(
                f"data.stream reads Parquet in Nature Multi-View's columns, and "
                f"{rows.dataset.path} is a folder of images; leave data.stream out"
            )
        self.rows = rows
        self.stream = Stream(rows.dataset, rows.rows, batch_size, buffer_rows, seed)
        self.workers = workers
        self._rank, self._world = rank, world
        self.epoch, self.given = 0, 0
        self._resumed = False

    def _place(self) -> tuple[int, int]:
        """Number of this process, and how many there are."""
        if self._rank is not None and self._world is not None:
            return self._rank, self._world
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def __len__(self) -> int:
        """Batches of an epoch in this process."""
        return self.batches(self._place()[1])

    def batches(self, world: int) -> int:
        """Batches of an epoch in each of so many processes."""
        workers = max(1, self.workers)
        return self.stream.batches(world * workers) * workers

    def __iter__(self) -> Iterator[Batch]:
        """Begin the next epoch, or go on where a state that was loaded stopped."""
        if (self.given and not self._resumed) or self.given >= len(self):
            self.epoch, self.given = self.epoch + 1, 0
        self._resumed = False
        part = _Part(self.rows, self.stream, self.epoch, self.given, *self._place(), self.workers)
        loader: DataLoader[Batch] = DataLoader(
            part,
            batch_size=None,
            collate_fn=as_is,
            num_workers=self.workers,
            generator=torch.Generator(),  # leaves the run's own random numbers alone
            multiprocessing_context="spawn" if self.workers else None,
        )
        for batch in loader:
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the epoch, and how many of its batches were given out."""
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state at the next iteration."""
        self.epoch, self.given = int(state["epoch"]), int(state["given"])
        self._resumed = True

    def first_windows(self, count: int) -> Tensor:
        """Middles of the first windows of another order, for statistics, shape (N, B, P, P)."""
        parts, found = [], 0
        for _, windows, _ in self.stream.read(SAMPLE_EPOCH):
            parts.append(middle(torch.from_numpy(windows), self.rows.window_px))
            found += len(windows)
            if found >= count:
                break
        return torch.cat(parts)[:count]


class _Part(IterableDataset[Batch]):
    """What one worker reads."""

    def __init__(
        self,
        rows: PairedRows,
        stream: Stream,
        epoch: int,
        start: int,
        rank: int,
        world: int,
        workers: int,
    ) -> None:
        self.rows, self.stream = rows, stream
        self.epoch, self.start = epoch, start
        self.rank, self.world, self.workers = rank, world, max(1, workers)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        turn = self.start + (info.id if info else 0)  # the batch that this worker gives first
        mine, skipped = turn % self.workers, turn // self.workers
        consumer, consumers = self.rank * self.workers + mine, self.world * self.workers
        for rows, windows, photos in self.stream.read(self.epoch, consumer, consumers, skipped):
            yield self.rows.assemble(rows, windows, photos)
