"""Progress bars with an ETA, on stderr, only where somebody listens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")
log = logging.getLogger("speciesmap")


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate while a bar on stderr shows how far and how long still.

    Silent unless the `speciesmap` logger is at INFO or below, as the command line sets it.
    """
    if not log.isEnabledFor(logging.INFO):
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield from bars.track(items, total=total, description=description)
