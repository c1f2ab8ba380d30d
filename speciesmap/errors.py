"""The one tree of errors that speciesmap raises on purpose.

Every message gives the fact, the offending value and the remedy, on one line. The command line
prints it and exits with status 1; anything outside this tree is a bug and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

NO_MEMORY = (
    "can't allocate memory",  # torch
    "could not create a primitive",  # oneDNN
    "out of memory",  # CUDA, GDAL
    "alloc_failed",  # cuBLAS, cuDNN
    "cannot allocate",  # the system, GDAL
    "bad_alloc",
    "failed to map segment",  # the loader of libraries
    "can't start new thread",
)


class SpeciesmapError(Exception):
    """Base of every error a user can mend."""


class ConfigError(SpeciesmapError):
    """A training configuration is malformed or contradicts its data."""


class ObservationsError(SpeciesmapError):
    """An observation table cannot be read or holds values that make no sense."""


class ImageryError(SpeciesmapError):
    """A raster cannot be opened, read or used as the model needs it."""


class AreaError(SpeciesmapError):
    """A bounding box is malformed or misses the imagery."""


class DatasetError(SpeciesmapError):
    """A training data set is missing, malformed or empty."""


class ModelError(SpeciesmapError):
    """A checkpoint cannot be read, or does not fit what is asked of it."""


class StoreError(SpeciesmapError):
    """An embedding store is damaged or was made from other inputs."""


class QueryError(SpeciesmapError):
    """A map was asked for something the model does not know."""


class OutputError(SpeciesmapError):
    """An output exists already or cannot be written."""


class ClusterError(SpeciesmapError):
    """A cluster does not answer or loses its workers."""


class DependencyError(SpeciesmapError):
    """An optional dependency is not installed."""


class ResourceError(SpeciesmapError):
    """Memory or threads ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell failures to allocate memory or to start a thread; few libraries raise MemoryError."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in NO_MEMORY)


def causes(error: BaseException, earlier: BaseException | None = None) -> Iterator[BaseException]:
    """Give an error and what led to it, without what was being handled `earlier`."""
    seen: set[int] = {id(earlier)}
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


@contextmanager
def within_memory() -> Iterator[None]:
    """Tell a lack of memory or threads as such, wherever it strikes, also as a decorator.

    Errors of the tree that come from one are told anew: what they blame is not at fault.

    Raises:
        ResourceError: What the block raises comes from such a lack.
    """
    earlier = sys.exception()  # what is being handled already, and is no cause of what follows
    try:
        yield
    except ResourceError:
        raise
    except Exception as error:
        lacks = [cause for cause in causes(error, earlier) if is_out_of_memory(cause)]
        if not lacks:
            raise
        told = " ".join(str(lacks[-1]).split())[:300] or "none is left"
        raise ResourceError(
            f"memory or threads ran out ({told}); ask for less at once, such as a smaller area or "
            "--batch-size, raise the limits that `ulimit -a` tells, or use a machine with more "
            "memory"
        ) from error
