"""Streaming: rows of a paired data set in a random order, by reading whole row groups.

Nature Multi-View takes a terabyte; neither its images nor a decoded copy fit on most disks. Its
facts do, so the order of an epoch is drawn over row numbers alone, before any image is read: row
groups are shuffled, their rows dealt to the consumers (processes times their workers) in equal
shares, and each share passes through a shuffle buffer. A run that goes on draws the same order,
leaves out what was seen, and reads only the row groups that are still asked for; the streams of
Hugging Face `datasets` lose what their buffer held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speciesmap.datasets.paired import PairedDataset
from speciesmap.errors import DatasetError


class Stream:
    """The order in which some rows of a data set come by, and their images.

    Every consumer gives the same number of batches; what does not fill them is left out of that
    epoch, another part in each.

    Args:
        dataset: Where to read, local or remote.
        rows: Which rows, ascending.
        batch_size: Rows of a batch.
        buffer_rows: Rows among which the next is drawn.
        seed: Same seed, same order.
    """

    def __init__(
        self,
        dataset: PairedDataset,
        rows: NDArray[np.int64],
        batch_size: int,
        buffer_rows: int,
        seed: int,
    ) -> None:
        self.dataset = dataset
        self.batch_size, self.buffer_rows, self.seed = batch_size, buffer_rows, seed
        group_rows = dataset.files.group_rows
        ends = np.cumsum(group_rows)
        self._starts = ends - group_rows
        self._rows = np.split(rows, np.searchsorted(rows, ends))[:-1]

    def batches(self, consumers: int) -> int:
        """How many batches each consumer gives in an epoch.

        Raises:
            DatasetError: It would have none.
        """
        total = sum(map(len, self._rows))
        if total < consumers * self.batch_size:
            raise DatasetError(
                f"{self.dataset.path} has {total} rows, too few for batches of {self.batch_size} "
                f"in {consumers} processes and workers; use fewer workers or smaller batches"
            )
        return total // consumers // self.batch_size

    def order(self, epoch: int, consumer: int = 0, consumers: int = 1) -> NDArray[np.int64]:
        """Give the row numbers of one consumer's epoch in order.

        Args:
            epoch: Each has another order.
            consumer: Number of the process and worker.
            consumers: How many there are.

        Returns:
            A whole number of batches, shape (batches * batch_size,).
        """
        wanted = self.batches(consumers) * self.batch_size
        groups = np.random.default_rng([self.seed, epoch]).permutation(len(self._rows))
        coming = np.concatenate([self._rows[group] for group in groups])
        share = len(coming) // consumers
        rng = np.random.default_rng([self.seed, epoch, consumer, 1])
        places = rng.integers(self.buffer_rows, size=share).tolist()
        buffer: list[int] = []
        drawn: list[int] = []
        for row, place in zip(coming[consumer * share :][:share].tolist(), places, strict=True):
            if len(buffer) == self.buffer_rows:
                drawn.append(buffer[place])
                buffer[place] = row
            else:
                buffer.append(row)
        drawn += [buffer[k] for k in rng.permutation(len(buffer))]
        return np.array(drawn[:wanted], dtype=np.int64)

    def read(
        self, epoch: int, consumer: int = 0, consumers: int = 1, start: int = 0
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[Any], list[bytes | None]]]:
        """Read one consumer's batches.

        Args:
            epoch: Each has another order.
            consumer: Number of the process and worker.
            consumers: How many there are.
            start: How many batches to leave out, whose images are not read.

        Yields:
            Row numbers, shape (N,), their windows, shape (N, B, P, P), and encoded photos.

        Raises:
            DatasetError: A window is missing, ragged or does not fit the data set's type.
        """
        order = self.order(epoch, consumer, consumers)[start * self.batch_size :]
        awaited = set(order.tolist())
        held: dict[int, tuple[NDArray[Any], bytes | None]] = {}
        for batch in order.reshape(-1, self.batch_size):
            for row in batch.tolist():
                if row not in held:
                    held.update(self._group(row, awaited))
            images = [held.pop(row) for row in batch.tolist()]
            yield batch, np.stack([window for window, _ in images]), [photo for _, photo in images]

    def _group(
        self, row: int, awaited: set[int]
    ) -> Iterator[tuple[int, tuple[NDArray[Any], bytes | None]]]:
        """Read the row group of a row, and give of it what is still awaited."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        first = int(self._starts[group])
        chosen = [k for k in self._rows[group].tolist() if k in awaited]
        awaited.difference_update(chosen)
        windows, photos = self.dataset.files.read(group, np.array(chosen) - first)
        encoded: list[bytes | None] = photos.to_pylist()
        for k, window, photo in zip(chosen, windows, encoded, strict=True):
            yield k, (window.copy(), photo)
