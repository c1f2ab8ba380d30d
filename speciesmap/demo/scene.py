"""What a scene of the demo gives back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speciesmap.present.page import Scene


@dataclass(frozen=True)
class SceneResult:
    """Files and figures of one scene; the keys of `demo --json`.

    Attributes:
        imagery: The raster.
        observations: The records.
        model: Fine-tuned checkpoint.
        store: Embedding store.
        maps: Map of the learned embedding, by taxon.
        html: Interactive map.
        metrics: What was measured.
        page: The scene's part of the index page.
        maps_by_photo: Map asked for by photos, by taxon.
        maps_by_name: Map asked for by name, by taxon.
        truth: True probability, by taxon, where it is known.
        sites: Table of lon, lat, taxon, present, where there is one.
    """

    imagery: Path
    observations: Path
    model: Path
    store: Path
    maps: Mapping[str, Path]
    html: Path
    metrics: Mapping[str, Any]
    page: Scene
    maps_by_photo: Mapping[str, Path] = field(default_factory=dict)
    maps_by_name: Mapping[str, Path] = field(default_factory=dict)
    truth: Mapping[str, Path] | None = None
    sites: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """All but the page, with absolute paths as strings."""

        def plain(value: Any) -> Any:
            if isinstance(value, Path):
                return str(value.resolve())
            if isinstance(value, Mapping):
                return {key: plain(item) for key, item in value.items()}
            return value

        return {key: plain(value) for key, value in vars(self).items() if key != "page"}


def assigned(key: str, value: Path | str) -> str:
    """Assign a path or name to a configuration's key, whatever it means in YAML.

    >>> assigned("data.dataset", "demo #1: ü/chips")
    'data.dataset="demo #1: ü/chips"'
    """
    return f"{key}={json.dumps(str(value), ensure_ascii=False)}"


def rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Round floats to three places for print."""
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}
