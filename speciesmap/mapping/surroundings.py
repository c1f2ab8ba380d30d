"""The covariates of a model, found again where a map is made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from speciesmap.errors import ImageryError, ModelError
from speciesmap.models import SpeciesModel
from speciesmap.models.environment import Environment
from speciesmap.rasters.covariates import Covariates, open_covariates

PROBED = 40  # cells along either side of an area that are looked at beforehand

log = logging.getLogger("speciesmap")


@dataclass(frozen=True)
class Surroundings:
    """Covariates as a model's heads read them.

    Attributes:
        environment: What the model was trained with.
        covariates: Rasters of the area that is mapped.
    """

    environment: Environment
    covariates: Covariates

    def cells(self, geobox: GeoBox) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Features, shape (H, W, F), and scaled covariates, (H, W, S), NaN where unknown."""
        values = self.covariates.cells(geobox)
        return self.environment.features(values), self.environment.scaled(values)

    def probe(self, geobox: GeoBox) -> None:
        """Look at some cells of an area, and warn of covariates unlike those trained on.

        Raises:
            ImageryError: A covariate has no value anywhere in the area.
        """
        height, width = geobox.shape
        values = self.covariates.cells(
            geobox.zoom_to((min(height, PROBED), min(width, PROBED)))
        ).reshape(-1, len(self.environment.names))
        expansion = self.environment.expansion
        for column, name in enumerate(self.environment.names):
            known = values[np.isfinite(values[:, column]), column]
            if not known.size:
                raise ImageryError(
                    f"covariate {name} has no value in the area that is mapped; give a raster of "
                    "it with --covariates"
                )
            if column not in expansion.continuous:
                continue
            position = expansion.continuous.index(column)
            low, high = expansion.low[position], expansion.high[position]
            outside = float(((known < low) | (known > high)).mean())
            if outside > 0.5:
                log.warning(
                    "%s is outside the %.6g to %.6g that the model was trained on in %.0f%% of the "
                    "area, and is read as the nearest of these; is its unit the same?",
                    name,
                    low,
                    high,
                    100 * outside,
                )


def find_surroundings(model: SpeciesModel, given: Sequence[Path | str]) -> Surroundings | None:
    """Open the covariates that a model reads.

    Args:
        model: With or without covariates.
        given: Rasters; those that the model was trained with by default.

    Raises:
        ModelError: Rasters were given, and the model reads none.
        ImageryError: A raster cannot be opened or is not there.
    """
    environment = model.environment
    if environment is None:
        if given:
            raise ModelError(
                "the model was trained without covariates and reads none; leave --covariates "
                "out, or train with --covariates"
            )
        return None
    found = Surroundings(
        environment,
        open_covariates(
            given or environment.sources, crs=environment.crs, wanted=environment.names
        ),
    )
    if not given and found.covariates.fingerprint != environment.fingerprint:
        log.warning(
            "%s changed since the model was trained on them", ", ".join(environment.sources)
        )
    return found
