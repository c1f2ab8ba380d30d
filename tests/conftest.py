"""What all tests need of the process they run in."""

import logging
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
def same_level() -> Iterator[None]:
    """Give back the level of the log, which each call of the command line sets."""
    log = logging.getLogger("speciesmap")
    level = log.level
    yield
    log.setLevel(level)
