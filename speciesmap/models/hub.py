"""Weights of the Hugging Face hub, or of its cache where the hub does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from speciesmap.errors import causes


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Ask the hub once whether it answers, and if not, look into its cache alone meanwhile.

    Its client would ask six times for each file, with pauses of 1 to 8 s.

    Raises:
        ConnectionError: The hub does not answer, and the cache lacks what was asked for.
    """
    if constants.HF_HUB_OFFLINE or _answers():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        lacking = (LocalEntryNotFoundError, OfflineModeIsEnabled)
        if not any(isinstance(cause, lacking) for cause in causes(error)):
            raise
        raise ConnectionError(
            f"{constants.ENDPOINT} does not answer, and {constants.HF_HUB_CACHE} lacks them"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = False


def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # the errors of whatever client the library comes with
        return False
    return True
