"""Surveys: places where somebody looked for taxa, and said which were absent."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from speciesmap.errors import ObservationsError
from speciesmap.learning.data import PairedRows, Places
from speciesmap.learning.heads import where, with_covariates
from speciesmap.models import SpeciesModel
from speciesmap.rasters.covariates import Covariates
from speciesmap.rasters.imagery import Imagery

COLUMNS = ("lon", "lat", "taxon", "present")

log = logging.getLogger("speciesmap")


def read_surveys(path: Path | str) -> pd.DataFrame:
    """Read a presence-absence table: `lon`, `lat`, `taxon`, `present`; CSV or Parquet.

    Raises:
        ObservationsError: It cannot be read, a column is missing, or a value makes no sense.
    """
    path = Path(path)
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ObservationsError(
            f"surveys {path} cannot be read ({reason}); give a CSV or Parquet table with the "
            f"columns {', '.join(COLUMNS)}"
        ) from error
    lacking = [name for name in COLUMNS if name not in table]
    if lacking:
        raise ObservationsError(
            f"surveys {path} lack the column {lacking[0]!r}; they need {', '.join(COLUMNS)}"
        )
    wrong = ~table["present"].isin([0, 1])
    for name in ("lon", "lat"):
        table[name] = pd.to_numeric(table[name], errors="coerce")
        wrong |= ~np.isfinite(table[name])
    if wrong.any():
        raise ObservationsError(
            f"surveys {path} row {int(np.flatnonzero(wrong)[0])} has no position or a `present` "
            "other than 0 and 1; mend or remove it"
        )
    return table.astype({"present": bool, "taxon": str})


def surveyed_places(
    model: SpeciesModel,
    surveys: pd.DataFrame,
    presences: PairedRows,
    imagery: Imagery,
    covariates: Covariates | None = None,
) -> tuple[pd.DataFrame, Places]:
    """Surveys on the imagery whose windows share no ground with a presence's, and their places.

    Those that lack a covariate are left out too; how many are left out is said aloud.

    Raises:
        ObservationsError: None is left.
    """
    rows, cols = imagery.rowcol(surveys["lon"].to_numpy(), surveys["lat"].to_numpy())
    height, width = imagery.shape
    inside = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    apart_px = (presences.dataset.window_px + model.window_px) / 2 + 1  # crops are of whole chips
    use = inside.copy()
    use[inside] = clear_of(rows[inside], cols[inside], *imagery.rowcol(*where(presences)), apart_px)
    told = (
        f"{(~use).sum()} of {len(surveys)} surveys are left out: {(~inside).sum()} are not on "
        f"{imagery.source}, {(inside & ~use).sum()} within a window of a presence"
    )
    if not use.any():
        raise ObservationsError(f"{told}; give surveys of the imagery's area, away from training")
    if not use.all():
        log.warning("%s", told)
    places = Places(imagery, rows[use], cols[use], model.window_px, model.fill)
    known = with_covariates(places, covariates)
    return surveys[use][known], places.subset(known)


def clear_of(
    rows: NDArray[np.float64],
    cols: NDArray[np.float64],
    trained_rows: NDArray[np.float64],
    trained_cols: NDArray[np.float64],
    apart_px: float,
) -> NDArray[np.bool_]:
    """Which places are so far from those trained on, along an axis, shape (N,)."""
    tree = cKDTree(np.column_stack([trained_rows, trained_cols]))
    nearest, _ = tree.query(np.column_stack([rows, cols]), p=np.inf)
    return np.asarray(nearest >= apart_px)
