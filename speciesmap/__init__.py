"""Species distribution maps from aerial imagery, ground photos and species names.

The names below are loaded when they are first used, so that `import speciesmap` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speciesmap.rasters.imagery import open_imagery

__version__ = "0.1.0"

_HOMES = {
    "open_imagery": "speciesmap.rasters.imagery",
}
__all__ = ["__version__", "open_imagery"]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'speciesmap' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
