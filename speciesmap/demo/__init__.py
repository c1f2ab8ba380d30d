"""Two scenes from raw input to maps, real output, nothing precomputed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speciesmap.outputs import refuse_existing

SCENES = ("sf-bay", "simulated")


def demo(
    out: Path | str, scenes: Sequence[str] = SCENES, *, seed: int = 0, overwrite: bool = False
) -> dict[str, Any]:
    """Run scenes and write one page that links their maps.

    Args:
        out: Folder to create.
        scenes: Names among `SCENES`.
        seed: Of everything random.
        overwrite: Replace the folder.

    Returns:
        `html` and, for each scene by name, its files and metrics.

    Raises:
        DependencyError: The packages that carry the real scene are not installed.
        OutputError: The folder exists.
    """
    from speciesmap.demo import sf_bay, simulated
    from speciesmap.present.page import write_index

    out = Path(out)
    index = out / "index.html"
    runs = {"sf-bay": sf_bay.run, "simulated": simulated.run}
    for old in (index, *(out / name for name in scenes)):
        refuse_existing(old, overwrite)
    index.unlink(missing_ok=True)
    for name in scenes:
        shutil.rmtree(out / name, ignore_errors=True)
    results = {name: runs[name](out / name, seed) for name in scenes}
    write_index(index, "speciesmap", [result.page for result in results.values()])
    return {
        "html": str(index.resolve()),
        "scenes": {name: result.to_json() for name, result in results.items()},
    }
