"""What GDAL and other libraries say: shown without credentials, and no error of it lost."""

from __future__ import annotations

import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from rasterio._err import CPLE_BaseError
from rasterio.errors import NodataShadowWarning, RasterioIOError

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

TALKATIVE = (  # libraries that log addresses
    "rasterio._err",
    "rasterio._env",
    "rasterio._base",
    "rasterio._filepath",
    "urllib3.connectionpool",
    "urllib3.util.retry",
    "pystac_client.stac_api_io",
)
LISTENERS = ("rasterio._err.", "rasterio._env.")  # functions that GDAL calls with its messages
ERRORS = "chaining_error_handler"  # the one of them that collects errors

log = logging.getLogger("speciesmap")


def public(text: str) -> str:
    """Give an address, or a text that holds some, without queries and user parts."""
    text = re.sub(r"/?vsicurl\?\S*?url=([^\s&'\",]+)", lambda m: unquote(m[1]), text)
    text = re.sub(r"((?:GET|HEAD|POST) [^\s?]*)\?\S*", r"\1", text)
    text = re.sub(r"([a-zA-Z][\w+.-]*://)[^\s/@?#'\"]*@", r"\1", text)
    return re.sub(r"([a-zA-Z][\w+.-]*://[^\s?#'\"]*)\?[^\s#'\",]*", r"\1", text)


def without_credentials(facts: Any) -> Any:
    """Make every text of some facts public, at any depth of lists and dictionaries."""
    if isinstance(facts, str):
        return public(facts)
    if isinstance(facts, list):
        return [without_credentials(fact) for fact in facts]
    if isinstance(facts, dict):
        return {key: without_credentials(fact) for key, fact in facts.items()}
    return facts


def reason(error: BaseException) -> str:
    """GDAL's own words, without credentials: rasterio's wrap them in "see previous exception"."""
    return public(str(error.__cause__ or error))


class _Discreet(logging.Filter):
    """Takes credentials out of what libraries log."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = public(record.getMessage()), ()
        return True


warnings.simplefilter("ignore", NodataShadowWarning)  # of NAIP's near infrared, called alpha

for _name in TALKATIVE:
    logging.getLogger(_name).addFilter(_Discreet())


class _Heard(threading.local):
    errors: list[str] | None = None


_heard = _Heard()


@contextmanager
def no_error_lost() -> Iterator[None]:
    """Raise the errors of GDAL that rasterio drops, so that a block that failed is not zeros.

    rasterio takes GDAL's messages for UTF-8. One that is not, as it names a file in Latin-1, raises
    where nothing can catch it, and the call that failed seems to have succeeded.

    Raises:
        RasterioIOError: There was one in the block.
    """
    outer, errors = _heard.errors, list[str]()
    _heard.errors = errors
    try:
        yield
    except CPLE_BaseError as error:  # some calls of rasterio let GDAL's own errors through
        raise RasterioIOError(str(error)) from error
    finally:
        _heard.errors = outer
    if errors:
        raise RasterioIOError(errors[0])


def _listen() -> None:
    """Hear messages that are not UTF-8 through the hooks that Python calls instead of raising."""
    unraisable, uncaught = sys.unraisablehook, sys.excepthook

    def hear(args: UnraisableHookArgs) -> None:
        error, where = args.exc_value, str(args.object)
        if not (isinstance(error, UnicodeDecodeError) and where.startswith(LISTENERS)):
            unraisable(args)
            return
        message = error.object.decode("latin-1")
        log.debug("GDAL: %s", public(message))
        if where.endswith(ERRORS) and _heard.errors is not None:
            _heard.errors.append(message)

    def show(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if kind is not UnicodeDecodeError or traceback is not None:  # Cython's print before `hear`
            uncaught(kind, error, traceback)

    sys.unraisablehook, sys.excepthook = hear, show


_listen()
