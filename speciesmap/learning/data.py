"""Training data as tensors: rows of paired data sets, and windows at places of an imagery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from speciesmap.datasets.birds import BirdDataset
from speciesmap.datasets.paired import PairedDataset
from speciesmap.errors import DatasetError
from speciesmap.models.crisp import to_square
from speciesmap.rasters.grid import sides_m
from speciesmap.rasters.imagery import Imagery
from speciesmap.rasters.windows import window_start
from speciesmap.taxa import Taxon

KEEP_BELOW = 1 << 30  # bytes of decoded images that are kept rather than read again each epoch

Batch = dict[str, Tensor]


class PairedRows(Dataset[Batch]):
    """Rows of a paired data set, fetched by the batch.

    A batch has `aerial` (N, B, W, W) raw pixels of the data set's whole windows, which views crop,
    `taxon` (N,) positions in `taxa`, `place` (N,) equal for rows of one spot, `metadata` (N, 4)
    where and when, and `ground` (N, 3, S, S) raw RGB where photos are asked for.

    Args:
        dataset: Where to read.
        rows: Which rows; each of one of `taxa`.
        taxa: What `taxon` counts.
        image_px: Side of the photos; none are read if absent.
        window_px: Side of the windows that `aerial` gives, cut from the middle; whole by default.
    """

    def __init__(
        self,
        dataset: PairedDataset | BirdDataset,
        rows: ArrayLike,
        taxa: Sequence[Taxon],
        image_px: int | None = None,
        window_px: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.window_px = window_px or dataset.window_px
        self.rows = np.asarray(rows, dtype=np.int64)
        self.taxa = tuple(taxa)
        self.image_px = image_px
        facts = dataset.facts
        position = {taxon.name: k for k, taxon in enumerate(taxa)}
        self.labels = facts["name"].map(position).fillna(-1).to_numpy(dtype=np.int64)
        spot = pd.factorize(facts["latitude"].astype(str) + " " + facts["longitude"].astype(str))[0]
        unplaced = facts[["latitude", "longitude"]].isna().any(axis=1).to_numpy()
        spot[unplaced] = len(facts) + np.arange(unplaced.sum())  # each is of a place of its own
        self.place = np.asarray(spot, dtype=np.int64)
        self.metadata = where_and_when(facts)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def taxon(self) -> NDArray[np.int64]:
        """Position of each row's taxon in `taxa`, shape (N,)."""
        found: NDArray[np.int64] = self.labels[self.rows]
        return found

    def subset(self, chosen: NDArray[np.bool_]) -> PairedRows:
        """Keep some of the rows, by a mask of shape (N,)."""
        return PairedRows(self.dataset, self.rows[chosen], self.taxa, self.image_px, self.window_px)

    def aerial(self, positions: ArrayLike) -> Tensor:
        """Read the middle of raw windows by positions in `rows`, shape (N, B, P, P)."""
        windows = torch.from_numpy(self.dataset.aerial(self.rows[np.asarray(positions)]))
        return middle(windows, self.window_px)

    def pixels(self, positions: ArrayLike) -> Iterator[NDArray[Any]]:
        """Read the pixels of windows one by one, shape (B, P * P)."""
        return (self.aerial([k])[0].flatten(1).numpy() for k in np.asarray(positions))

    def ground(self, positions: ArrayLike) -> Tensor:
        """Read raw photos by positions in `rows`, shape (N, 3, S, S)."""
        kept = self._photos
        chosen = np.asarray(positions)
        return (
            self._read_photos(self.rows[chosen]) if kept is None else kept[torch.from_numpy(chosen)]
        )

    @cached_property
    def _photos(self) -> Tensor | None:
        side = self.image_px or 0
        if len(self.rows) * 3 * side**2 > KEEP_BELOW:
            return None
        parts = [self._read_photos(part) for part in np.array_split(self.rows, 64) if len(part)]
        return torch.cat(parts)  # (rows, 3, S, S)

    def _read_photos(self, rows: NDArray[np.int64]) -> Tensor:
        return self._squares(rows, self.dataset.ground(rows))

    def _squares(self, rows: NDArray[np.int64], photos: Sequence[Image | None]) -> Tensor:
        missing = [int(row) for row, photo in zip(rows, photos, strict=True) if photo is None]
        if missing:
            raise DatasetError(
                f"{self.dataset.path} row {missing[0]} has no photo; leave such rows out, or "
                "train without a ground tower"
            )
        return to_square([photo for photo in photos if photo is not None], self.image_px or 0)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Fetch one batch by positions in `rows`."""
        rows = self.rows[list(positions)]
        windows = self.dataset.aerial(rows) if self.dataset.has_aerial else None
        batch = self._batch(rows, windows)
        if self.image_px:
            batch["ground"] = self.ground(positions)  # (N, 3, S, S)
        return batch

    def assemble(
        self, rows: NDArray[np.int64], windows: NDArray[Any], photos: Sequence[bytes | None]
    ) -> Batch:
        """Make a batch of images that a stream has read.

        Args:
            rows: Numbers in the data set, shape (N,).
            windows: Shape (N, B, W, W).
            photos: Encoded, N of them.
        """
        batch = self._batch(rows, windows)
        if self.image_px and isinstance(self.dataset, PairedDataset):
            decode = self.dataset.decode
            decoded = [decode(int(row), photo) for row, photo in zip(rows, photos, strict=True)]
            batch["ground"] = self._squares(rows, decoded)  # (N, 3, S, S)
        return batch

    def _batch(self, rows: NDArray[np.int64], windows: NDArray[Any] | None) -> Batch:
        aerial = {} if windows is None else {"aerial": torch.from_numpy(windows)}  # (N, B, W, W)
        return {
            **aerial,
            "taxon": torch.from_numpy(self.labels[rows]),  # (N,)
            "place": torch.from_numpy(self.place[rows]),  # (N,)
            "metadata": self.metadata[rows],  # (N, 4)
        }


def where_and_when(facts: pd.DataFrame) -> Tensor:
    """Latitude, longitude, month and day of rows, NaN where missing, float32, shape (N, 4)."""
    dates = facts.get("gl_image_date", pd.Series("", facts.index)).fillna("").astype(str)
    parts = dates.str.extract(r"^\d{4}-(0[1-9]|1[0-2])(?:-(0[1-9]|[12]\d|3[01]))?").astype(float)
    columns = [facts["latitude"], facts["longitude"], parts[0], parts[1]]
    return torch.from_numpy(np.column_stack(columns).astype(np.float32))  # (N, 4)


def middle(windows: Tensor, window_px: int) -> Tensor:
    """Cut the middle out of windows, (N, B, W, W) to (N, B, P, P)."""
    start = (windows.shape[-1] - window_px) // 2
    return windows[:, :, start : start + window_px, start : start + window_px]


class Places(Dataset[Batch]):
    """Aerial windows centred on places of an imagery; a batch has `aerial` (N, B, P, P) raw pixels.

    Args:
        imagery: Where to read.
        rows: Continuous rows of the places, shape (N,).
        cols: Continuous columns of the places, shape (N,).
        window_px: Side of a window.
        fill: What stands in for invalid pixels, per band in raw units.
    """

    def __init__(
        self,
        imagery: Imagery,
        rows: NDArray[np.float64],
        cols: NDArray[np.float64],
        window_px: int,
        fill: ArrayLike,
    ) -> None:
        self.imagery, self.window_px = imagery, window_px
        self.rows, self.cols = rows, cols
        self.fill = np.asarray(fill).reshape(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def filled(self, fill: ArrayLike) -> Places:
        """The same places with another stand-in for invalid pixels."""
        return Places(self.imagery, self.rows, self.cols, self.window_px, fill)

    def subset(self, chosen: NDArray[np.bool_]) -> Places:
        """Keep some of the places, by a mask of shape (N,)."""
        return Places(
            self.imagery, self.rows[chosen], self.cols[chosen], self.window_px, self.fill.ravel()
        )

    def aerial(self, positions: ArrayLike) -> Tensor:
        """Read raw windows by positions in `rows`, shape (N, B, P, P)."""
        kept = self._windows
        chosen = np.asarray(positions)
        return self._read(chosen) if kept is None else kept[torch.from_numpy(chosen)]

    def pixels(self, positions: ArrayLike) -> Iterator[NDArray[Any]]:
        """Read the valid pixels of windows one by one, shape (B, n)."""
        return (pixels[:, valid] for pixels, valid in self._parts(positions))

    def _parts(self, positions: ArrayLike) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
        side = self.window_px
        for k in np.asarray(positions):
            yield self.imagery.read(*window_start(self.rows[k], self.cols[k], side), side, side)

    @cached_property
    def _windows(self) -> Tensor | None:
        size = len(self) * len(self.fill) * self.window_px**2 * self.imagery.dtype.itemsize
        return None if size > KEEP_BELOW else self._read(np.arange(len(self)))

    def _read(self, positions: NDArray[np.int64]) -> Tensor:
        side = self.window_px
        bands = len(self.fill)
        windows = np.empty((len(positions), bands, side, side), self.imagery.dtype)
        for window, (pixels, valid) in zip(windows, self._parts(positions), strict=True):
            window[:] = np.where(valid, pixels, self.fill.astype(pixels.dtype))
        return torch.from_numpy(windows)  # (N, B, P, P)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Fetch one batch by positions in `rows`."""
        return {"aerial": self.aerial(positions)}


def on_ground(
    imagery: Imagery, rows: NDArray[np.float64], cols: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Metres from the imagery's corner, across and down, by the sides of its central pixel.

    Of imagery in degrees far from the equator pixels are narrower than high. Sides that differ by
    under 1%, as those of Mercator's squares do on the ellipsoid, count as their mean.

    Args:
        imagery: Whose pixels.
        rows: Continuous rows of places, shape (N,).
        cols: Continuous columns, shape (N,).

    Returns:
        Both of shape (N,).
    """
    width_m, height_m = sides_m(imagery.geobox)
    if abs(width_m / height_m - 1) < 0.01:
        width_m = height_m = imagery.resolution_m
    return cols * width_m, rows * height_m


class Kept(Dataset[Batch]):
    """Windows in memory.

    Args:
        windows: Raw pixels, shape (N, B, P, P).
    """

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def subset(self, chosen: NDArray[np.bool_]) -> Kept:
        """Keep some of the windows, by a mask of shape (N,)."""
        return Kept(self.windows[torch.from_numpy(chosen)])

    def aerial(self, positions: ArrayLike) -> Tensor:
        """Raw windows by position, shape (N, B, P, P)."""
        return self.windows[torch.from_numpy(np.asarray(positions))]

    def pixels(self, positions: ArrayLike) -> Iterator[NDArray[Any]]:
        """Pixels of windows one by one, shape (B, P * P)."""
        return (self.windows[k].flatten(1).numpy() for k in np.asarray(positions))

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Fetch one batch by positions."""
        return {"aerial": self.aerial(positions)}


def as_is(batch: Any) -> Any:
    """Collate what is a batch already."""
    return batch
