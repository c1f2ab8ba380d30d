"""What a configuration names as data, opened and checked, and background drawn from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from speciesmap.config import DataConfig
from speciesmap.datasets.birds import BirdDataset, open_dataset
from speciesmap.datasets.nature_multi_view import chosen_rows, unrepeated
from speciesmap.datasets.paired import PairedDataset
from speciesmap.errors import AreaError, ConfigError, ObservationsError
from speciesmap.learning.data import Places
from speciesmap.mapping.fit import MOST_RESOLUTION_RATIO
from speciesmap.observations.background import (
    biased_background,
    random_background,
    target_group,
    valid_windows,
)
from speciesmap.observations.read import read_places
from speciesmap.rasters.covariates import Covariates, open_covariates
from speciesmap.rasters.imagery import Imagery, open_imagery
from speciesmap.rasters.messages import public
from speciesmap.rasters.values import tagged_gains, warn_of_black
from speciesmap.rasters.windows import cells_in
from speciesmap.taxa import Taxon, suggestion

log = logging.getLogger("speciesmap")

STAC = "stac+"
MARGIN_DEG = 0.01  # around a data set's places, as when chips are cut


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
        bias: The raster of sampling effort, if any.
        covariates: What heads read beside the embedding, if anything; location in the imagery's
            CRS.
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
    bias: Imagery | None = None
    covariates: Covariates | None = None

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
            left, a STAC collection is to be read without a data set, or `categorical` names none
            of the covariates.
        SpeciesmapError: Something cannot be opened.
    """
    if data.dataset:
        dataset = open_dataset(data.dataset, data.split, data.taxonomy)
        if not dataset.has_aerial:
            raise ConfigError(
                f"{data.dataset} has photos only, and a model is trained on both views; train on "
                "iNat-2021 birds, and evaluate on this"
            )
        taxa, rows = usable(dataset, data)
        scaling = dataset.notes.get("scaling")
        scaling = tuple((float(a), float(b)) for a, b in scaling) if scaling else None
        imagery = _matching(dataset, rows, data, scaling) if data.imagery else None
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
            open_imagery(data.bias) if data.bias is not None else None,
            _covariates(data, imagery) if imagery is not None else None,
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
    warn_of_black(imagery, (0, 0, *imagery.shape))
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


def _covariates(data: DataConfig, imagery: Imagery) -> Covariates | None:
    """Open what a configuration gives beside the imagery, None without."""
    if not (data.covariates or data.location or data.categorical):
        return None
    found = open_covariates(data.covariates, crs=str(imagery.geobox.crs) if data.location else None)
    strange = [name for name in data.categorical if name not in found.names]
    if strange:
        raise ConfigError(
            f"data.categorical names {strange[0]!r}, and the covariates are "
            f"{', '.join(found.names) or 'none'}; name some of these, or add it"
        )
    return found


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


def _matching(
    dataset: PairedDataset | BirdDataset,
    rows: NDArray[np.int64],
    data: DataConfig,
    scaling: tuple[tuple[float, float], ...] | None,
) -> Imagery:
    """Open the imagery that background is drawn from, with the bands and units of a data set."""
    imagery = _around(dataset, rows, data)
    if imagery.bands != dataset.bands:
        imagery = imagery.select(dataset.bands)
    warn_of_black(imagery, (0, 0, *imagery.shape))
    gains = tagged_gains(imagery.scaling, scaling) if scaling else None
    if gains is not None:
        imagery = imagery.rescaled(gains)
    ratio = imagery.resolution_m / dataset.resolution_m
    if not 1 / MOST_RESOLUTION_RATIO <= ratio <= MOST_RESOLUTION_RATIO:
        raise ConfigError(
            f"{imagery.source} has pixels of {imagery.resolution_m:.3g} m, those of "
            f"{data.dataset} have {dataset.resolution_m:.3g} m; presences and background would "
            "differ by that alone: name the imagery that the chips were cut from"
        )
    return imagery


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
    bias: Imagery | None = None,
) -> Places:
    """Give background places of an imagery.

    Args:
        imagery: The study area, where `background` is a number.
        window_px: Side of a window; at least half of it is valid at a drawn place.
        background: How many to draw at random, or a file of places.
        rng: Source of randomness.
        fill: What stands in for invalid pixels, per band in raw units; 0 by default.
        bias: Relative sampling effort that a number is drawn in proportion to.

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
        rows, cols = biased_background(imagery, background, window_px, rng, bias)
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
