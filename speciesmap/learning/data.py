"""Training data as tensors: rows of paired data sets, and windows at places of an imagery."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from speciesmap.config import DataConfig
from speciesmap.datasets.birds import BirdDataset, open_dataset
from speciesmap.datasets.nature_multi_view import chosen_rows, unrepeated
from speciesmap.datasets.paired import PairedDataset
from speciesmap.errors import AreaError, ConfigError, DatasetError, ObservationsError
from speciesmap.mapping.fit import MOST_RESOLUTION_RATIO
from speciesmap.models.crisp import to_square
from speciesmap.observations.background import (
    biased_background,
    random_background,
    target_group,
    valid_windows,
)
from speciesmap.observations.read import read_places
from speciesmap.rasters.imagery import Imagery, open_imagery
from speciesmap.rasters.messages import public
from speciesmap.rasters.values import tagged_gains
from speciesmap.rasters.windows import cells_in, window_start
from speciesmap.taxa import Taxon, suggestion

log = logging.getLogger("speciesmap")

STAC = "stac+"
MARGIN_DEG = 0.01  # around a data set's places, as when chips are cut
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


@dataclass(frozen=True)
class Sources:
    """What a configuration's `data` section names, opened and checked against each other.

    Attributes:
        dataset: The paired data set, if any.
        rows: Its usable rows.
        taxa: The taxa of those rows; none withheld.
        imagery: The imagery, if any, with the data set's bands.
        window_px: Side of the aerial window of the model, at most that of the data set.
        bands: Names of the aerial bands.
        resolution_m: Side of an aerial pixel on the ground, in metres.
        dtype: Type of the aerial pixels.
        scaling: Of each band the scale and offset that make its values physical, where told.
    """

    dataset: PairedDataset | BirdDataset | None
    rows: NDArray[np.int64]
    taxa: tuple[Taxon, ...]
    imagery: Imagery | None
    window_px: int
    bands: tuple[str, ...]
    resolution_m: float
    dtype: np.dtype[Any]
    scaling: tuple[tuple[float, float], ...] | None

    def both(self) -> tuple[PairedDataset | BirdDataset, Imagery]:
        """The data set of presences, and the imagery that background is drawn from.

        Raises:
            ConfigError: One is missing.
        """
        if self.dataset is not None and self.imagery is not None:
            return self.dataset, self.imagery
        lacking = "dataset=CHIPS" if self.dataset is None else "imagery=RASTER"
        raise ConfigError(
            "presences come from data.dataset, background from data.imagery, and "
            f"data.{lacking.split('=')[0]} is not said; add it to the configuration (in training "
            f"also by --set data.{lacking}): the imagery is what the chips were cut from"
        )


def open_sources(data: DataConfig) -> Sources:
    """Open the data that a configuration names.

    Raises:
        ConfigError: Neither a data set nor imagery is named, the window's size is nowhere said,
            the two have pixels of different sizes, a withheld taxon is not in the data, nothing is
            left, or a STAC collection is to be read without a data set.
    """
    if data.dataset:
        dataset = open_dataset(data.dataset, data.split, data.taxonomy)
        if not dataset.has_aerial:
            raise ConfigError(
                f"{data.dataset} has photos only, and a model is trained on both views; train on "
                "iNat-2021 birds, and evaluate on this"
            )
        taxa, rows = usable(dataset, data)
        imagery = _around(dataset, rows, data) if data.imagery else None
        if imagery is not None and imagery.bands != dataset.bands:
            imagery = imagery.select(dataset.bands)
        scaling = dataset.notes.get("scaling")
        scaling = tuple((float(a), float(b)) for a, b in scaling) if scaling else None
        if imagery is not None and scaling:
            gains = tagged_gains(imagery.scaling, scaling)
            imagery = imagery if gains is None else imagery.rescaled(gains)
        if imagery is not None and not (
            1 / MOST_RESOLUTION_RATIO
            <= imagery.resolution_m / dataset.resolution_m
            <= MOST_RESOLUTION_RATIO
        ):
            raise ConfigError(
                f"{imagery.source} has pixels of {imagery.resolution_m:.3g} m, those of "
                f"{data.dataset} have {dataset.resolution_m:.3g} m; presences and background would "
                "differ by that alone: name the imagery that the chips were cut from"
            )
        return Sources(
            dataset,
            rows,
            taxa,
            imagery,
            window_side(dataset, data),
            dataset.bands,
            dataset.resolution_m,
            dataset.dtype,
            scaling,
        )
    if data.imagery is None:
        raise ConfigError("data names neither a dataset nor imagery; give at least one")
    if data.window_px is None:
        raise ConfigError("data.window_px is missing; without a dataset it must be given")
    if data.imagery.startswith(STAC):
        raise ConfigError(
            f"data.imagery = {public(data.imagery)} must not be read as a whole, and only a data "
            "set says where; add data.dataset, or name a folder of scenes"
        )
    imagery = _open(data)
    none = np.empty(0, dtype=np.int64)
    return Sources(
        None,
        none,
        (),
        imagery,
        data.window_px,
        imagery.bands,
        imagery.resolution_m,
        imagery.dtype,
        imagery.scaling,
    )


def window_side(dataset: PairedDataset | BirdDataset, data: DataConfig) -> int:
    """Side of the model's window in pixels: what is said, or that of the data set.

    Raises:
        ConfigError: The data set's windows are smaller.
    """
    window_px = data.window_px or dataset.window_px
    if window_px > dataset.window_px:
        raise ConfigError(
            f"data.window_px = {window_px} is more than the {dataset.window_px} px of "
            f"{data.dataset}; leave it out, or cut larger chips"
        )
    return window_px


def _around(
    dataset: PairedDataset | BirdDataset, rows: NDArray[np.int64], data: DataConfig
) -> Imagery:
    """Open the imagery that background is drawn from; of a STAC collection, around a data set."""
    if not str(data.imagery).startswith(STAC):
        return _open(data)
    places = dataset.facts.iloc[rows][["longitude", "latitude"]].to_numpy(np.float64)
    west, south = places.min(axis=0) - MARGIN_DEG
    east, north = places.max(axis=0) + MARGIN_DEG
    bbox = (west, south, east, north)
    imagery = _open(
        data,
        bbox=bbox,
        wanted=dataset.bands,
        preferred_m=dataset.resolution_m,
        around_m=dataset.window_px * dataset.resolution_m,
        datetime=data.datetime,
        query=data.query,
    )
    down, across = cells_in(bbox, imagery.geobox)
    return imagery.crop(
        down.start, across.start, down.stop - down.start, across.stop - across.start
    )


def _open(data: DataConfig, **more: Any) -> Imagery:
    """Open the imagery of a configuration, which has no grid to choose, and say so."""
    source = str(data.imagery)
    if not source.startswith(STAC) and (data.datetime is not None or data.query):
        raise ConfigError(
            f"data.datetime and data.query choose items of STAC; {public(source)} has none; leave "
            "them out"
        )
    try:
        return open_imagery(source, first=data.first, **more)
    except AreaError as error:
        fact, _, remedy = str(error).partition("; ")
        if "--crs" not in remedy:
            raise
        raise AreaError(
            f"{fact}; name scenes of one CRS, or a VRT of them, as data.imagery, or train on a "
            "smaller area"
        ) from error


def usable(
    dataset: PairedDataset | BirdDataset, data: DataConfig
) -> tuple[tuple[Taxon, ...], NDArray[np.int64]]:
    """Choose the rows of a data set that a configuration lets be seen, and the taxa they hold.

    Raises:
        ConfigError: A withheld taxon is not in the data, or nothing is left.
    """
    wanted = named(dataset, data)
    if "split" in dataset.facts:
        split = data.split or "train"
        wanted = wanted & (dataset.facts["split"] == split).to_numpy()
        if not wanted.any():
            known = ", ".join(sorted(dataset.facts["split"].unique()))
            raise ConfigError(
                f"{data.dataset} has no usable rows of the split {split!r}; choose one of {known}, "
                "or withhold fewer taxa"
            )
    wanted = wanted & unrepeated(dataset.facts, data.dataset)
    wanted &= chosen_rows(
        dataset.facts,
        data.dataset,
        one_per_observation=data.one_per_observation,
        supervised=data.supervised,
        percent=data.percent,
    )
    if not wanted.any():
        raise ConfigError(
            f"{data.dataset} has no rows left by data.one_per_observation, data.supervised and "
            "data.percent; choose fewer of them"
        )
    held = set(dataset.facts["name"][wanted])
    return tuple(taxon for taxon in dataset.taxa if taxon.name in held), np.flatnonzero(wanted)


def named(dataset: PairedDataset | BirdDataset, data: DataConfig) -> NDArray[np.bool_]:
    """Which rows are of a taxon, and of none that is withheld, shape (N,).

    Raises:
        ConfigError: A withheld taxon is not in the data, or no row is left.
    """
    names = {taxon.name for taxon in dataset.taxa}
    for name in data.withheld:
        if name not in names:
            raise ConfigError(
                f"data.withheld names {name!r}, which {data.dataset} lacks; "
                f"{suggestion(name, sorted(names))}"
            )
    wanted: NDArray[np.bool_] = (
        dataset.facts["name"].isin(names.difference(data.withheld)).to_numpy()
    )
    if not wanted.any():
        raise ConfigError(
            f"no row of {data.dataset} names a taxon that data.withheld leaves; fill the column "
            "`name`, or withhold fewer taxa"
        )
    return wanted


def draw_background(
    imagery: Imagery,
    window_px: int,
    background: int | str,
    rng: np.random.Generator,
    fill: Sequence[float] | None = None,
    *,
    bias: str | None = None,
) -> Places:
    """Give background places of an imagery.

    Args:
        imagery: The study area, where `background` is a number.
        window_px: Side of a window; at least half of it is valid at a drawn place.
        background: How many to draw at random, or a file of places.
        rng: Source of randomness.
        fill: What stands in for invalid pixels, per band in raw units; 0 by default.
        bias: Raster of relative sampling effort that a number is drawn in proportion to.

    Returns:
        The places.

    Raises:
        ObservationsError: The file cannot be read, none of its places is on the imagery, or the
            imagery is too small.
    """
    if not isinstance(background, int):
        places = read_places(background)
        rows, cols = _with_windows(imagery, places, window_px, f"places of {background}")
    elif bias is not None:
        rows, cols = biased_background(imagery, background, window_px, rng, open_imagery(bias))
    else:
        rows, cols = random_background(imagery, background, window_px, rng)
    return Places(
        imagery, rows, cols, window_px, [0.0] * len(imagery.bands) if fill is None else fill
    )


def target_group_places(sources: Sources, records: str | None, fill: Sequence[float]) -> Places:
    """Give the places where a whole group was recorded, one per cell of a quarter of a window.

    Args:
        sources: The study area, and the data set whose records count where there is no file.
        records: File of records of the group, any taxon; those less certain than half a window are
            left out.
        fill: What stands in for invalid pixels, per band in raw units.

    Returns:
        The places.

    Raises:
        ObservationsError: The file cannot be read, or none of its places is on the imagery.
    """
    dataset, imagery = sources.both()
    window_m = sources.window_px * sources.resolution_m
    if records is not None:
        places = read_places(records, uncertainty_max_m=window_m / 2)
    else:
        facts = dataset.facts.iloc[sources.rows]
        places = facts["longitude"].to_numpy(), facts["latitude"].to_numpy()
    rows, cols = _with_windows(
        imagery,
        places,
        sources.window_px,
        f"places of the group of {records or 'all taxa'}",
        cell_m=window_m / 4,  # the stride of maps, where none is given
    )
    return Places(imagery, rows, cols, sources.window_px, fill)


def _with_windows(
    imagery: Imagery,
    places: tuple[NDArray[np.float64], NDArray[np.float64]],
    window_px: int,
    what: str,
    cell_m: float | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows and columns of places that have a valid window, as places drawn at random have.

    Args:
        imagery: Where windows are read.
        places: Longitudes and latitudes.
        window_px: Side of a window.
        what: The places in words, for messages.
        cell_m: Keep one of those on the imagery per cell of this side.

    Raises:
        ObservationsError: No place is left.
    """
    shown = _told(imagery.contains(*places), f"{what} are on {imagery.source}", "its extent")
    longitude, latitude = (axis[shown] for axis in places)
    table = pd.DataFrame(
        {"longitude": longitude, "latitude": latitude, "taxon": "", "uncertainty_m": np.nan}
    )
    if cell_m is not None:
        table = target_group(table, cell_m)
    rows, cols = imagery.rowcol(table["longitude"].to_numpy(), table["latitude"].to_numpy())
    pixels = np.floor(rows).astype(np.int64) * imagery.shape[1] + np.floor(cols).astype(np.int64)
    valid = _told(
        valid_windows(imagery, pixels, window_px),
        f"{what} have a valid window on {imagery.source}",
        "where it has pixels",
    )
    return rows[valid], cols[valid]


def _told(kept: NDArray[np.bool_], found: str, remedy: str) -> NDArray[np.bool_]:
    """Say how many places are kept; stop where none is."""
    if not kept.any():
        raise ObservationsError(f"none of the {len(kept)} {found}; give background from {remedy}")
    if not kept.all():
        log.info("%d of %d %s", kept.sum(), len(kept), found)
    return kept
