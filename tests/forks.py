"""Processes of their own that start at once: forks of one that has imported everything.

That one has started no thread, so that no lock can be lost.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "interruptions"])


def server() -> ForkServerContext:
    """The process that is forked, with the path of this one."""
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return SERVER


def start(
    target: Callable[..., object],
    *arguments: Any,
    out: str | Path = os.devnull,
    err: str | Path | None = None,
    **variables: str,
) -> BaseProcess:
    """Run a module's function in a process of its own.

    Args:
        target: The function.
        arguments: Of it.
        out: File for what it prints.
        err: File for what it says on stderr, which is left as it is by default.
        variables: Of its environment, beside those of this process.
    """
    streams = {1: out, 2: err} if err else {1: out}
    place = (Path.cwd(), os.environ | variables, streams)
    process = server().Process(target=_run, args=(*place, target, arguments))
    process.start()
    return process


def _run(
    folder: Path,
    variables: dict[str, str],
    streams: dict[int, str | Path],
    target: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for number, path in streams.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    target(*arguments)


def ended(process: BaseProcess) -> int | None:
    """Wait for a process and give its exit status, negative where a signal ended it."""
    process.join(300)
    process.kill()  # it hangs
    process.join()
    return process.exitcode
