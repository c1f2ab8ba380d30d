"""What all tests need of the process they run in."""

import signal

# a shell starts jobs of the background with Ctrl-C ignored, which programs started here inherit
signal.signal(signal.SIGINT, signal.default_int_handler)
