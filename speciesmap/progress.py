"""What is said while work goes on: bars with an ETA, and how much of the logs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def at_level(level: int, *names: str) -> Iterator[None]:
    """Let loggers say only what is of a level or graver while a block runs.

    Args:
        level: Of `logging`.
        names: Of the loggers.
    """
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    try:
        for logger in levels:
            logger.setLevel(level)
        yield
    finally:
        for logger, earlier in levels.items():
            logger.setLevel(earlier)


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
