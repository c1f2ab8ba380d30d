"""Species distribution maps from aerial imagery, ground photos and species names.

The names below are loaded when they are first used, so that `import speciesmap` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speciesmap.atlas import predict
    from speciesmap.config import load_config
    from speciesmap.datasets.chips import make_chips
    from speciesmap.datasets.paired import open_paired
    from speciesmap.learning.train import train
    from speciesmap.mapping.embed import embed
    from speciesmap.models import load_model
    from speciesmap.observations.read import read_observations
    from speciesmap.present.webmap import make_map
    from speciesmap.rasters.imagery import open_imagery
    from speciesmap.rasters.store import open_store

__version__ = "0.1.0"

_HOMES = {
    "embed": "speciesmap.mapping.embed",
    "load_config": "speciesmap.config",
    "load_model": "speciesmap.models",
    "make_chips": "speciesmap.datasets.chips",
    "make_map": "speciesmap.present.webmap",
    "open_imagery": "speciesmap.rasters.imagery",
    "open_paired": "speciesmap.datasets.paired",
    "open_store": "speciesmap.rasters.store",
    "predict": "speciesmap.atlas",
    "read_observations": "speciesmap.observations.read",
    "train": "speciesmap.learning.train",
}
__all__ = [
    "__version__",
    "embed",
    "load_config",
    "load_model",
    "make_chips",
    "make_map",
    "open_imagery",
    "open_paired",
    "open_store",
    "predict",
    "read_observations",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'speciesmap' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
