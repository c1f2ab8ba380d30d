"""Two scenes from raw input to maps, real output, nothing precomputed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speciesmap.outputs import replacing

SCENES = ("sf-bay", "simulated")
WITH_PATHS = (".json", ".yaml", ".csv", ".html")
"""Suffixes of the files in which runs say where their inputs and outputs lie."""


def demo(
    out: Path | str, scenes: Sequence[str] = SCENES, *, seed: int = 0, overwrite: bool = False
) -> dict[str, Any]:
    """Run scenes and write one page that links their maps.

    Args:
        out: Folder to create.
        scenes: Names among `SCENES`.
        seed: Of everything random.
        overwrite: Replace the folder, once the new one is whole.

    Returns:
        `html` and, for each scene by name, its files and metrics.

    Raises:
        DependencyError: The packages that carry the real scene are not installed.
        OutputError: The folder exists.
    """
    from speciesmap.demo import sf_bay, simulated
    from speciesmap.present.page import write_index

    out = Path(out)
    runs = {"sf-bay": sf_bay.run, "simulated": simulated.run}
    with replacing(out, overwrite=overwrite) as beside:
        results = {name: runs[name](beside / name, seed) for name in scenes}
        write_index(
            beside / "index.html", "speciesmap", [result.page for result in results.values()]
        )
        told = {name: result.to_json() for name, result in results.items()}
        for file in beside.rglob("*"):
            if file.suffix in WITH_PATHS:
                file.write_text(_renamed(file.read_text("utf-8"), beside, out), encoding="utf-8")
    return {
        "html": str((out / "index.html").resolve()),
        "scenes": json.loads(_renamed(json.dumps(told, ensure_ascii=False), beside, out)),
    }


def _renamed(text: str, old: Path, new: Path) -> str:
    """Write a folder's new name in place of its old one, also where JSON escapes it."""
    for plain in (False, True):
        one, other = (json.dumps(p.name, ensure_ascii=plain)[1:-1] for p in (old, new))
        text = text.replace(one, other)
    return text
