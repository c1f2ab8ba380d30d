"""Run the notebooks on less, and skip those whose data or packages are not here, aloud."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

PACKAGES = {
    "1_quickstart": ("elapid", "localtileserver"),
    "4_a_look_into_the_embedding_space": ("umap",),
}
IDTREES = "3_two_views_one_absent"

os.environ["SPECIESMAP_QUICK"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what cannot run."""
    beside = Path(__file__).parents[2] / "shared/data/idtrees_mlbs"
    data = Path(os.environ.setdefault("SPECIESMAP_IDTREES", str(beside)))
    for item in items:
        lacking = [p for p in PACKAGES.get(item.path.stem, ()) if not importlib.util.find_spec(p)]
        if lacking:
            item.add_marker(pytest.mark.skip(reason=f"{', '.join(lacking)} not installed"))
        if item.path.stem == IDTREES and not (data / "Field/train_data.csv").is_file():
            item.add_marker(pytest.mark.skip(reason=f"no IDTReeS data in {data}"))
