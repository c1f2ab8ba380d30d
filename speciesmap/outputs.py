"""Outputs land whole or not at all: everything is written beside its name, then renamed."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from speciesmap.errors import OutputError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def refuse_existing(path: Path, overwrite: bool, *inputs: Path | str | None) -> None:
    """Stop before work whose output cannot be written, or would destroy something.

    Args:
        path: Of the output.
        overwrite: Whether an output that exists may be replaced.
        inputs: Files and folders that are read; addresses and patterns too. None says nothing.

    Raises:
        OutputError: The path exists and `overwrite` is false; or it is, or holds, an input or the
            working directory; or its folder cannot be written.
    """
    place = path.parent.resolve() / path.name if path.is_symlink() else path.resolve()
    if Path.cwd().is_relative_to(place):
        raise OutputError(f"{path} holds the folder you are in; give the output a name of its own")
    home = next(parent for parent in place.parents if parent.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        reason = "may not be written" if home.is_dir() else "is a file"
        raise OutputError(f"cannot write {path}: {home} {reason}; choose another folder")
    if not path.exists():
        return
    for source in inputs:
        if source is not None and Path(source).resolve().is_relative_to(place):
            raise OutputError(
                f"the output {path} would replace the input {source}; give it another name"
            )
    if not overwrite:
        raise OutputError(f"{path} exists already; pass --overwrite to replace it")


@contextmanager
def replacing(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling of a file or folder and rename it when the block ends well.

    The caller creates a file or a folder at the path it is given. If the block raises, what it
    wrote is removed and the old output, if any, stays as it was.

    Args:
        path: Final name.
        overwrite: Whether an existing output may be replaced.

    Yields:
        A path in the same folder, with the same suffix, that does not exist yet.

    Raises:
        OutputError: The output exists and may not be replaced, or its folder cannot be written.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "maps"
    >>> with replacing(out) as folder:
    ...     folder.mkdir()
    ...     out.exists()
    False
    >>> out.exists()
    True
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    beside = name_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        land(beside, path)
    except OSError as error:
        if not _is_of(error, beside):
            raise
        raise OutputError(
            f"cannot write {path}: {error.strerror}; choose a folder that you may write"
        ) from error
    finally:
        _remove(beside)


def name_beside(path: Path) -> Path:
    """Give a hidden name beside an output, and remove what killed processes left under such names.

    The name tells the process, and the machine it runs on: what belongs to one that may be alive
    stays.
    """
    tail = f".part{path.suffix}"
    theirs = re.compile(
        rf"\.{re.escape(path.stem)}\.{_machine()}-([1-9]\d*)-[0-9a-f]+{re.escape(tail)}"
    )
    with suppress(OSError):
        for left in path.parent.iterdir():
            named = theirs.fullmatch(left.name)
            if named and not _lives(int(named[1])):
                _remove(left)
    own = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    return path.with_name(f".{path.stem}.{own}{tail}")


def _machine() -> str:
    """Tell where numbers of processes mean the same: on one host, in one container."""
    processes = Path("/proc/self/ns/pid")
    space = processes.stat().st_ino if processes.exists() else 0
    told = f"{platform.node()} {space}".encode()
    return hashlib.blake2b(told, digest_size=3).hexdigest()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def land(beside: Path, path: Path) -> None:
    """Give a finished output its name; what had it is removed.

    Args:
        beside: The output, in the same folder under a name of its own.
        path: Final name.
    """
    if not (path.is_symlink() or path.exists()) or not (path.is_dir() or beside.is_dir()):
        beside.replace(path)
    elif _exchange(beside, path):
        _remove(beside)
    else:
        old = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.old{path.suffix}")
        path.rename(old)
        try:
            beside.rename(path)
        except BaseException:
            old.rename(path)
            raise
        _remove(old)


def _is_of(error: OSError, output: Path) -> bool:
    """Tell an error of writing an output, or of making its folder, from one of reading an input."""
    if error.errno in NO_ROOM:
        return True
    if not isinstance(error.filename, str | bytes):
        return False
    named, output = Path(os.fsdecode(error.filename)).absolute(), output.absolute()
    return named.is_relative_to(output) or output.is_relative_to(named)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux's renameat2), if the system and its disk can do that.

    A folder cannot be renamed onto another that holds files, and with two renames there is a
    moment without either.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return (
        rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
