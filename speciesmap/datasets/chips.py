"""Chips: cut the aerial window of every observation and store it with its ground photos."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from speciesmap.datasets.columns import FACTS, FRACTIONS
from speciesmap.datasets.cutting import Cutter, Window, write_provenance
from speciesmap.datasets.photos import PhotoFolder, encode_photo
from speciesmap.datasets.writer import PairedWriter
from speciesmap.errors import DatasetError
from speciesmap.observations.read import COLUMNS
from speciesmap.outputs import replacing
from speciesmap.progress import track
from speciesmap.rasters.windows import window_start
from speciesmap.taxa import Taxon

if TYPE_CHECKING:
    import geopandas as gpd

    from speciesmap.rasters.mosaic import Imagery, Origin

log = logging.getLogger("speciesmap")

BATCH_OBSERVATIONS = 256
Photo = tuple[dict[str, Any] | None, str]
"""An encoded photo as the writer takes it, if there is any, and its licence."""

ABSENT = "not a presence"
OUTSIDE = "window leaves the imagery"
MISSING = "window has missing pixels"
UNCERTAIN = "position too uncertain"
OBSCURED = "position obscured"
NO_PHOTO = "photo missing"
BAD_PHOTO = "photo unreadable"


@dataclass(frozen=True)
class ChipsReport:
    """What became of the observations.

    Attributes:
        path: The data set.
        observations: How many were given.
        kept: How many of them are in the data set.
        rows: Rows of the data set; one per photo, so an observation may have several.
        taxa: How many taxa the rows hold.
        left_out: For each reason, how many observations or photos it excluded.
    """

    path: Path
    observations: int
    kept: int
    rows: int
    taxa: int
    left_out: dict[str, int]


def make_chips(
    observations: gpd.GeoDataFrame,
    imagery: Imagery,
    out: str | Path,
    *,
    window_px: int = 256,
    photos: Path | None = None,
    photo_px: int = 512,
    min_valid: float = 1.0,
    uncertainty_max_m: float | None = None,
    imagery_date: str = "",
    seed: int = 0,
    overwrite: bool = False,
) -> ChipsReport:
    """Write a paired data set: for each observation its aerial window and its photos.

    The window is the one whose centre is nearest to the observation. An observation is left out,
    never replaced, and named in the data set's `report.csv` when its window leaves the imagery or
    has too many missing pixels, when its position is obscured or less certain than half a window,
    when it is an absence, or when photos are asked for and it has none that can be read.

    A photo is looked for in `photos` by the file name in the column `photo` (several are separated
    by `|`; of an address its last part counts, or, as on iNaturalist, the photo's number), else as
    `<observation_id>.<jpg, png, ...>`; nothing is downloaded. A JPEG whose long side is at most
    `photo_px` is stored byte for byte, any other photo is turned upright, reduced to `photo_px` and
    stored as JPEG of quality 90.

    A row is `supervised` when its taxon is a species and its record research grade (or from a
    source that does not grade). The columns `finetune_*percent` are nested random subsets of the
    supervised observations; all photos of an observation share them.

    Args:
        observations: As `read_observations` gives them.
        imagery: Where the windows are cut.
        out: The data set's folder.
        window_px: Side of a window in pixels.
        photos: Folder of ground photos; without it the data set has aerial windows only.
        photo_px: Longest side of a stored photo.
        min_valid: Least share of a window's pixels that must be valid.
        uncertainty_max_m: Largest uncertainty of a position; half a window by default.
        imagery_date: When the imagery was taken, for the column `rs_image_date`; by default the
            date of the scene that each window was cut from, where that is known. Which scenes show
            each window is told by `provenance.csv` in the data set.
        seed: Decides the label fractions.
        overwrite: Whether an existing data set may be replaced.

    Returns:
        The counts, also in the data set's `report.json`.

    Raises:
        DatasetError: Nothing is left, or an argument is out of range.
        OutputError: The output exists and may not be replaced.
    """
    out = Path(out)
    if window_px < 1 or photo_px < 1:
        raise DatasetError(f"window_px={window_px}, photo_px={photo_px}; both must be at least 1")
    if photos is not None and not photos.is_dir():
        raise DatasetError(f"there is no folder of photos {photos}; check --photos")
    missing = [column for column in COLUMNS if column not in observations.columns]
    if missing:
        raise DatasetError(
            f"the observations have no column {missing[0]!r}; make the table with "
            "read_observations, which gives all of them"
        )
    limit_m = window_px * imagery.resolution_m / 2
    if uncertainty_max_m is not None:
        limit_m = uncertainty_max_m
    observations = observations.reset_index(drop=True)
    log.info("grid: %s", imagery.in_words)
    taxa = _taxa(observations)
    facts = _facts(observations, taxa, seed, imagery_date)
    starts = _starts(observations, imagery, window_px)
    left_out = _Left(observations)
    candidates = _candidates(observations, imagery, starts, window_px, limit_m, left_out)

    folder = None if photos is None else PhotoFolder(photos)
    cutter = Cutter(imagery, starts, candidates, window_px, out)
    batches = -(-len(candidates) // BATCH_OBSERVATIONS)
    with (
        closing(cutter.windows()) as cut,
        replacing(out, overwrite=overwrite) as beside,
        PairedWriter(beside, imagery.bands, window_px, imagery.dtype) as writer,
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
    ):
        rows = _Rows(writer, facts, dated=not imagery_date)
        for _ in track(range(batches), f"Cutting chips from {imagery.source}"):
            windows = []
            for window in islice(cut, BATCH_OBSERVATIONS):
                if window.valid < min_valid:
                    left_out.add(window.row, MISSING, f"{window.valid:.1%} valid")
                else:
                    windows.append(window)
            chosen = [window.row for window in windows]
            encoded = _encode(folder, observations, chosen, photo_px, pool, left_out)
            rows.write(windows, encoded)
        if not writer.rows:
            raise DatasetError(
                f"none of {len(observations)} observations could be paired with "
                f"{imagery.source}: {left_out.summary() or 'there are none'}; check that imagery, "
                "observations and photos belong together"
            )
        writer.finish(
            taxa,
            imagery.resolution_m,
            imagery={"source": imagery.source, "fingerprint": imagery.fingerprint},
            scaling=imagery.scaling,
            min_valid=min_valid,
            uncertainty_max_m=limit_m,
            photo_px=photo_px,
            seed=seed,
        )
        report = ChipsReport(
            path=out,
            observations=len(set(facts["observation_uuid"])),
            kept=len(rows.provenance),
            rows=writer.rows,
            taxa=len(rows.taxa),
            left_out=left_out.counts(),
        )
        left_out.write(beside, report)
        write_provenance(beside, list(rows.provenance.items()))
    cutter.finish()
    tell = log.warning if report.left_out else log.info
    tell("%d of %d observations kept in %s", report.kept, report.observations, out)
    if report.left_out:
        log.warning("left out, by reason: %s", left_out.summary())
    if report.left_out.get(OUTSIDE, 0) > report.kept:
        log.warning("smaller windows than %d px would leave the imagery less often", window_px)
    return report


class _Rows:
    """Writes a row for each photo of an observation, or one where none is asked for.

    Attributes:
        provenance: Scenes that show each observation written, by its id.
        taxa: Numbers of the taxa written.
    """

    def __init__(self, writer: PairedWriter, facts: pd.DataFrame, *, dated: bool) -> None:
        self._writer, self._facts, self._dated = writer, facts, dated
        self.provenance: dict[str, list[Origin]] = {}
        self.taxa: set[int] = set()

    def write(self, windows: Sequence[Window], photos: Sequence[Sequence[Photo]]) -> None:
        """Write windows with the photos of each."""
        pairs = [
            (window, *photo) for window, its in zip(windows, photos, strict=True) for photo in its
        ]
        if not pairs:
            return
        part = self._facts.iloc[[window.row for window, _, _ in pairs]].copy()
        identity = part["observation_uuid"]
        part["rs_classification"] = ~identity.isin(self.provenance.keys()) & ~identity.duplicated()
        part["gl_photo_id"] = np.arange(self._writer.rows, self._writer.rows + len(part))
        part["license"] = [terms for _, _, terms in pairs]
        if self._dated:
            part["rs_image_date"] = [window.date for window, _, _ in pairs]
        for name, (window, _, _) in zip(identity, pairs, strict=True):
            self.provenance.setdefault(name, window.scenes)
        self.taxa.update(part["taxon_id"])
        pixels = np.stack([window.pixels for window, _, _ in pairs])
        self._writer.write(part, pixels, [photo for _, photo, _ in pairs])


class _Left:
    """What was left out, by observation and reason."""

    def __init__(self, observations: gpd.GeoDataFrame) -> None:
        self._observations = observations
        self._entries: list[tuple[int, str, str]] = []

    def add(self, row: int, reason: str, detail: str = "") -> None:
        self._entries.append((row, reason, detail))

    def counts(self) -> dict[str, int]:
        reasons = [reason for _, reason, _ in self._entries]
        return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}

    def summary(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in self.counts().items())

    def write(self, folder: Path, report: ChipsReport) -> None:
        text = json.dumps(asdict(report), indent=1, default=str)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        with (folder / "report.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["observation_id", "taxon", "longitude", "latitude", "reason", "detail"])
            facts = self._observations[["observation_id", "taxon", "longitude", "latitude"]]
            for row, reason, detail in sorted(self._entries):
                table.writerow([*facts.iloc[row].tolist(), reason, detail])


def _taxa(observations: gpd.GeoDataFrame) -> tuple[Taxon, ...]:
    """List the observations' taxa in alphabetical order, each with its fullest lineage."""
    rows = observations[["taxon", "lineage"]].drop_duplicates()
    rows = rows.assign(length=rows["lineage"].str.len())
    rows = rows.sort_values(["taxon", "length"], ascending=[True, False]).drop_duplicates("taxon")
    return tuple(
        Taxon(name, tuple(part for part in lineage.split("/") if part))
        for name, lineage in zip(rows["taxon"], rows["lineage"], strict=True)
    )


def _starts(observations: gpd.GeoDataFrame, imagery: Imagery, window_px: int) -> NDArray[np.int64]:
    """First pixel (row, column) of each observation's window, shape (N, 2)."""
    rows, cols = imagery.rowcol(
        observations["longitude"].to_numpy(), observations["latitude"].to_numpy()
    )
    outside = -10 * (window_px + 1)
    starts = [
        window_start(r, c, window_px) if np.isfinite(r) and np.isfinite(c) else (outside, outside)
        for r, c in zip(rows.tolist(), cols.tolist(), strict=True)
    ]
    return np.array(starts, dtype=np.int64).reshape(-1, 2)


def _candidates(
    observations: gpd.GeoDataFrame,
    imagery: Imagery,
    starts: NDArray[np.int64],
    window_px: int,
    limit_m: float,
    left_out: _Left,
) -> NDArray[np.int64]:
    """Rows that may be cut."""
    height, width = imagery.geobox.shape
    inside = (starts >= 0).all(axis=1) & (starts + window_px <= [height, width]).all(axis=1)
    uncertainty = observations["uncertainty_m"].to_numpy()
    uncertain = uncertainty > limit_m
    absent = (observations["status"] == "ABSENT").to_numpy()
    obscured = observations["obscured"].to_numpy(dtype=bool)
    rest = np.ones(len(observations), dtype=bool)
    for refused, reason in (
        (absent, ABSENT),
        (obscured, OBSCURED),
        (uncertain, UNCERTAIN),
        (~inside, OUTSIDE),
    ):
        for row in np.flatnonzero(refused & rest).tolist():
            detail = f"{uncertainty[row]:g} m, at most {limit_m:g} m" if reason == UNCERTAIN else ""
            left_out.add(row, reason, detail)
        rest &= ~refused
    return np.flatnonzero(rest)


def _facts(
    observations: gpd.GeoDataFrame, taxa: Sequence[Taxon], seed: int, imagery_date: str
) -> pd.DataFrame:
    """The columns of `FACTS` for every observation."""
    position = {taxon.name: k for k, taxon in enumerate(taxa)}
    names = observations["taxon"].map(lambda name: " ".join(name.split()))
    identity = observations["observation_id"].astype(str)
    supervised = (observations["rank"] == "species") & observations["quality_grade"].isin(
        ["research", ""]
    )
    facts = pd.DataFrame(
        {
            "observation_uuid": identity,
            "latitude": observations["latitude"],
            "longitude": observations["longitude"],
            "positional_accuracy": np.ceil(observations["uncertainty_m"]).astype("Int64"),
            "taxon_id": names.map(position),
            "quality_grade": observations["quality_grade"],
            "gl_image_date": observations["date"].dt.strftime("%Y-%m-%d").fillna(""),
            "ancestry": observations["lineage"],
            "rank": observations["rank"],
            "name": names,
            "gl_inat_id": identity,
            "gl_photo_id": 0,
            "license": observations["license"],
            "observer_id": observations["observer"],
            "rs_classification": False,
            "ecoregion": "",
            "supervised": supervised,
            "rs_image_date": imagery_date,
        }
    )
    labelled = identity[supervised].unique()
    rank = np.random.default_rng(seed).permutation(len(labelled)) + 0.5
    order = identity.map(dict(zip(labelled, rank, strict=True)))
    for percent in FRACTIONS:
        chosen = order <= float(percent) / 100 * len(labelled)
        facts[f"finetune_{percent}percent"] = chosen & supervised
    return facts[list(FACTS)]


def _encode(
    folder: PhotoFolder | None,
    observations: gpd.GeoDataFrame,
    rows: Sequence[int],
    photo_px: int,
    pool: ThreadPoolExecutor,
    left_out: _Left,
) -> list[list[Photo]]:
    """Encoded photos of each row with the licence of each: its own, else the record's.

    One without a photo where photos are not wanted, an empty list where none can be read.
    """
    if folder is None:
        return [[(None, observations["license"].iloc[row])] for row in rows]
    encoded: list[list[Photo]] = [[] for _ in rows]
    jobs: list[tuple[int, str, Path, str]] = []
    for k, row in enumerate(rows):
        observation = observations.iloc[row]
        found = folder.find(str(observation["photo"]), str(observation["observation_id"]))
        terms = [part.strip() for part in str(observation["photo_license"]).split("|")]
        terms += [""] * (len(found) - len(terms))
        for (name, file), own in zip(found, terms, strict=False):
            if file is None:
                left_out.add(row, NO_PHOTO, name)
            else:
                jobs.append((k, name, file, own or str(observation["license"])))

    def stored(job: tuple[int, str, Path, str]) -> bytes | ValueError:
        try:
            return encode_photo(job[2], photo_px)
        except ValueError as error:
            return error

    for (k, name, _, terms_of_photo), result in zip(jobs, pool.map(stored, jobs), strict=True):
        if isinstance(result, ValueError):
            left_out.add(rows[k], BAD_PHOTO, f"{name}: {result}")
        else:
            photo = {"bytes": result, "path": PurePosixPath(name).name}
            encoded[k].append((photo, terms_of_photo))
    return encoded
