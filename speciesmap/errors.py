"""The one tree of errors that speciesmap raises on purpose.

Every message gives the fact, the offending value and the remedy, on one line. The command line
prints it and exits with status 1; anything outside this tree is a bug and keeps its traceback.
"""

from __future__ import annotations


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
