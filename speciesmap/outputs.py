"""Outputs land whole or not at all: everything is written beside its name, then renamed."""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from speciesmap.errors import OutputError


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Stop before work that would destroy an output.

    Raises:
        OutputError: The path exists and `overwrite` is false.
    """
    if path.exists() and not overwrite:
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
    token = uuid.uuid4().hex[:8]
    beside = path.with_name(f".{path.stem}.{token}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        if not (path.is_symlink() or path.exists()) or not (path.is_dir() or beside.is_dir()):
            beside.replace(path)
        elif not _exchange(beside, path):
            old = path.with_name(f".{path.stem}.{token}.old{path.suffix}")
            path.rename(old)
            try:
                beside.rename(path)
            except BaseException:
                old.rename(path)
                raise
            _remove(old)
    except PermissionError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; choose a folder that you may write"
        ) from error
    finally:
        _remove(beside)


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
