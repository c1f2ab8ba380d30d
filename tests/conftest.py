"""What all tests need of the process they run in."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# a shell starts jobs of the background with Ctrl-C ignored, which programs started here inherit
signal.signal(signal.SIGINT, signal.default_int_handler)

# the same examples each time, so that a change is judged by itself; tests/fuzz draws others
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """Give back what commands set for their whole process: the log's level, variables."""
    log = logging.getLogger("speciesmap")
    level, variables = log.level, dict(os.environ)
    yield
    log.setLevel(level)
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
