"""What all tests need of the process they run in."""

import signal

from hypothesis import settings

# a shell starts jobs of the background with Ctrl-C ignored, which programs started here inherit
signal.signal(signal.SIGINT, signal.default_int_handler)

# the same examples each time, so that a change is judged by itself; tests/fuzz draws others
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")
