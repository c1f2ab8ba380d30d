"""What is on a server: its address, with a token where one is needed, its version, tried again.

What may hold a credential, the query and the user part of an address, is used to read and never
shown or written.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from rasterio.env import get_gdal_config
from rasterio.errors import RasterioError

from speciesmap.errors import DependencyError, ImageryError
from speciesmap.rasters.messages import public, reason

Result = TypeVar("Result")

AT_ONCE = 16  # requests to servers
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses between whole attempts at a server; GDAL makes `GDAL_HTTP_MAX_RETRY` within each."""

HOPELESS = ("response code: 400", "response code: 401", "response code: 403", "code: 404")
SIGNED_HOST = "planetarycomputer.microsoft.com"
CLOUDS = {"s3": "vsis3", "gs": "vsigs", "az": "vsiaz"}

log = logging.getLogger("speciesmap")


def is_remote(path: str) -> bool:
    """Tell whether reading a path needs a network."""
    return "://" in path or path.startswith(("/vsicurl", "/vsis3", "/vsigs", "/vsiaz"))


def plain_address(path: str) -> str | None:
    """Address that requests without a signature find a remote file at, if GDAL's settings tell one.

    That is the file's own on http servers, and that of files in buckets of s3 open to all.
    """
    scheme, _, rest = path.partition("://")
    if scheme in ("http", "https"):
        return path
    if scheme != "s3" or not _set("AWS_NO_SIGN_REQUEST", False):
        return None
    bucket, _, key = rest.partition("/")
    host = get_gdal_config("AWS_S3_ENDPOINT")
    if host is None and "." in bucket:  # its name fits no certificate, and its region is not known
        return None
    host = (host or "s3.amazonaws.com").rpartition("://")[2]  # which knows a region by the name
    place = f"{bucket}.{host}" if _set("AWS_VIRTUAL_HOSTING", True) else f"{host}/{bucket}"
    return f"{'https' if _set('AWS_HTTPS', True) else 'http'}://{place}/{quote(key)}"


def _set(option: str, default: bool) -> bool:
    """Whether an option of GDAL is set, or its default."""
    value = get_gdal_config(option)
    return default if value is None else str(value).upper() in ("YES", "TRUE", "ON", "1")


def signed(address: str, signer: str | None) -> str:
    """Add the token that a host asks for; tokens expire, so this is done at each opening."""
    if signer is None:
        return address
    try:
        planetary_computer = importlib.import_module("planetary_computer")
    except ImportError as error:
        raise DependencyError(
            f"imagery of {SIGNED_HOST} must be signed by the package planetary-computer, which is "
            "not installed; pip install 'speciesmap[stac]'"
        ) from error
    return str(planetary_computer.sign_url(address))


def gdal_name(path: str) -> str:
    """Name that GDAL knows a file by."""
    scheme, separator, rest = path.partition("://")
    if separator and scheme in ("http", "https"):
        # no sidecar files are looked for
        return f"/vsicurl?empty_dir=yes&url={quote(path, safe='')}"
    return f"/{CLOUDS[scheme]}/{rest}" if separator and scheme in CLOUDS else path


def retrying(action: Callable[[], Result], path: str) -> Result:
    """Act on a file; where it is on a server, again after pauses if that fails.

    Raises:
        Exception: What `action` raised at the last attempt, or at the first that tells that no
            other can do better.
    """
    waits = list(WAITS_S) if is_remote(path) else []
    while True:
        try:
            return action()
        except (RasterioError, OSError, ImageryError) as error:
            if not waits or any(code in reason(error) for code in HOPELESS):
                raise
            log.debug("%s: %s; trying again in %g s", public(path), reason(error), waits[0])
            time.sleep(waits.pop(0))


@dataclass(frozen=True)
class Version:
    """What a server says of a file.

    Attributes:
        tag: Its ETag or date, and its size; empty where it has neither of the first two.
        size: In bytes; 0 where that is not known.
    """

    tag: str
    size: int

    def __str__(self) -> str:
        return self.tag or f"{self.size:,} bytes"


_sessions = threading.local()


def remote_version(path: str, signer: str | None = None) -> Version:
    """Ask a server for a file's ETag or date, and its size, by a request for its first byte.

    Of files without a `plain_address`, which need signed requests, nothing is known.

    Raises:
        ImageryError: The server does not answer, or has no such file.
    """
    address = plain_address(path)
    if address is None:
        return Version("", 0)
    import requests

    session: Any = getattr(_sessions, "session", None)
    if session is None:
        session = _sessions.session = requests.Session()

    def ask() -> Version:
        try:
            with session.get(
                signed(address, signer), headers={"Range": "bytes=0-0"}, timeout=30, stream=True
            ) as answer:
                if answer.status_code not in (200, 206):
                    raise ImageryError(
                        f"{public(path)} cannot be read (HTTP response code: "
                        f"{answer.status_code}); check the address and the right to read it"
                    )
                told = answer.headers
                total = told.get("Content-Range", "").rpartition("/")[2]
                size = total if total.isdecimal() else told.get("Content-Length", "0")
                tag = told.get("ETag") or told.get("Last-Modified")
                return Version(f"{tag} {size}" if tag else "", int(size))
        except requests.RequestException as error:
            host = urlsplit(address).hostname
            raise ImageryError(
                f"{host} does not answer for {public(path)} ({type(error).__name__}); check the "
                "address and the network"
            ) from error

    return retrying(ask, path)
