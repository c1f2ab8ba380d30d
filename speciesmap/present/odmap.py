"""The ODMAP protocol: what a report of a species distribution model should say.

Overview, Data, Model, Assessment and Prediction (Zurell et al. 2020, Ecography 43:1261), with the
84 elements of version 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

TO_BE_FILLED = "to be filled"
ELEMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Overview": {
        "Authorship": ("Study title", "Author names", "Contact", "Study link"),
        "Model objective": ("Model objective", "Target output"),
        "Focal taxon": ("Focal taxon",),
        "Location": ("Location",),
        "Scale of analysis": (
            "Spatial extent",
            "Spatial resolution",
            "Temporal extent",
            "Temporal resolution",
            "Boundary",
        ),
        "Biodiversity data": ("Observation type", "Response data type"),
        "Predictors": ("Predictor types",),
        "Hypotheses": ("Hypotheses",),
        "Assumptions": ("Model assumptions",),
        "Algorithms": ("Modelling techniques", "Model complexity", "Model averaging"),
        "Workflow": ("Model workflow",),
        "Software": ("Software", "Code availability", "Data availability"),
    },
    "Data": {
        "Biodiversity data": (
            "Taxon names",
            "Taxonomic reference system",
            "Ecological level",
            "Data sources",
            "Sampling design",
            "Sample size",
            "Clipping",
            "Scaling",
            "Cleaning",
            "Absence data",
            "Background data",
            "Errors and biases",
        ),
        "Data partitioning": ("Training data", "Validation data", "Test data"),
        "Predictor variables": (
            "Predictor variables",
            "Data sources",
            "Spatial extent",
            "Spatial resolution",
            "Coordinate reference system",
            "Temporal extent",
            "Temporal resolution",
            "Data processing",
            "Errors and biases",
            "Dimension reduction",
        ),
        "Transfer data": (
            "Data sources",
            "Spatial extent",
            "Spatial resolution",
            "Temporal extent",
            "Temporal resolution",
            "Models and scenarios",
            "Data processing",
            "Quantification of novelty",
        ),
    },
    "Model": {
        "Variable pre-selection": ("Variable pre-selection",),
        "Multicollinearity": ("Multicollinearity",),
        "Model settings": ("Model settings (fitting)", "Model settings (extrapolation)"),
        "Model estimates": ("Coefficients", "Parameter uncertainty", "Variable importance"),
        "Model selection, averaging, ensembles": (
            "Model selection",
            "Model averaging",
            "Model ensembles",
        ),
        "Non-independence": ("Spatial autocorrelation", "Temporal autocorrelation", "Nested data"),
        "Threshold selection": ("Threshold selection",),
    },
    "Assessment": {
        "Performance statistics": (
            "Performance on training data",
            "Performance on validation data",
            "Performance on test data",
        ),
        "Plausibility check": ("Response shapes", "Expert judgement"),
    },
    "Prediction": {
        "Prediction output": ("Prediction unit", "Post-processing"),
        "Uncertainty quantification": (
            "Algorithmic uncertainty",
            "Input data uncertainty",
            "Parameter uncertainty",
            "Scenario uncertainty",
            "Novel environments",
        ),
    },
}


def protocol(known: Mapping[tuple[str, str, str], str]) -> pd.DataFrame:
    """Fill the protocol.

    Args:
        known: Values by section, subsection and element.

    Returns:
        84 rows of `section`, `subsection`, `element`, `value`; what is not known is marked
        "to be filled".

    Raises:
        ValueError: A key is no element of the protocol.
    """
    keys = [
        (section, subsection, element)
        for section, subsections in ELEMENTS.items()
        for subsection, elements in subsections.items()
        for element in elements
    ]
    strange = set(known) - set(keys)
    if strange:
        raise ValueError(f"ODMAP has no element {sorted(strange)[0]}")
    rows = [(*key, known.get(key) or TO_BE_FILLED) for key in keys]
    return pd.DataFrame(rows, columns=["section", "subsection", "element", "value"])


def write_protocol(table: pd.DataFrame, path: Path) -> Path:
    """Write a filled protocol as CSV."""
    table.to_csv(path, index=False)
    return path
