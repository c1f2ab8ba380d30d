"""Raster files, here or on a server: opened, kept open, and read in one version.

Servers are read through GDAL's virtual file systems, by ranges.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.env import set_gdal_config
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from speciesmap.errors import ImageryError
from speciesmap.rasters.messages import no_error_lost, public, reason
from speciesmap.rasters.remote import (
    AT_ONCE,
    CLOUDS,
    Version,
    gdal_name,
    is_remote,
    plain_address,
    remote_version,
    signed,
)

OPEN_FILES = 32  # per thread; a mosaic may have thousands
SHARED_FILES = 256  # where threads take turns at them
GDAL_DEFAULTS = {
    "GDAL_CACHEMAX": 32 << 20,  # GDAL's 5% of memory makes memory grow with rasters
    "GDAL_HTTP_MAX_RETRY": 3,
    "GDAL_HTTP_RETRY_DELAY": 0.25,  # seconds, doubled at each further try
    "GDAL_HTTP_CONNECTTIMEOUT": 15,
    "GDAL_HTTP_LOW_SPEED_TIME": 30,  # seconds under the limit below end a stalled transfer
    "GDAL_HTTP_LOW_SPEED_LIMIT": 1024,
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_INGESTED_BYTES_AT_OPEN": 32768,  # a COG's header in one request
    "CPL_VSIL_CURL_CACHE_SIZE": 64 << 20,
    # what a closed file gave is not believed again
    "CPL_VSIL_CURL_NON_CACHED": "/vsicurl:/vsis3:/vsigs:/vsiaz",
}

for _name, _value in GDAL_DEFAULTS.items():
    if _name not in os.environ:
        set_gdal_config(_name, _value)  # some are read once, at the first block


@contextmanager
def cached_blocks(size: int) -> Iterator[None]:
    """Let GDAL keep so many bytes of decoded blocks, unless the user says how many."""
    if "GDAL_CACHEMAX" in os.environ:
        yield
        return
    set_gdal_config("GDAL_CACHEMAX", size)
    try:
        yield
    finally:
        set_gdal_config("GDAL_CACHEMAX", GDAL_DEFAULTS["GDAL_CACHEMAX"])


def open_raster(path: Path | str, signer: str | None = None) -> DatasetReader:
    """Open any raster for reading, also one on a server.

    A raster that is placed by ground control points alone is warped to their CRS as it is read.

    Raises:
        ImageryError: It does not exist, is no raster, or its header is damaged.
        DependencyError: It must be signed and the package that does is not installed.
    """
    name = str(path)
    try:
        with no_error_lost():
            raster = _open(gdal_name(signed(name, signer)))
            _ = raster.descriptions, raster.tags()  # bytes that are no text are met here, not later
        if raster.crs is None and raster.gcps[0]:
            return WarpedVRT(
                raster,
                src_crs=raster.gcps[1],
                crs=raster.gcps[1],
                resampling=Resampling.bilinear,
                add_alpha="alpha" not in (c.name for c in raster.colorinterp),
            )
        return raster
    except UnicodeEncodeError as error:
        raise ImageryError(f"{path} has a name that is not UTF-8; rename it") from error
    except (RasterioError, CPLE_BaseError, OSError, UnicodeDecodeError) as error:
        if is_remote(name):
            raise ImageryError(
                f"{public(name)} cannot be opened ({reason(error)}); check the address, the right "
                "to read it, and that its server answers requests for ranges"
            ) from error
        if not Path(path).exists():
            raise ImageryError(f"{path} does not exist; check the name") from error
        if Path(path).is_dir():
            raise ImageryError(
                f"{path} is a folder; name the rasters in it, such as {path}/*.tif"
            ) from error
        raise ImageryError(
            f"{path} cannot be opened as a raster ({reason(error)}); it is damaged, truncated or "
            "of a format that GDAL does not read"
        ) from error


def _open(path: str) -> DatasetReader:
    """Open what GDAL calls by this name, with files beside it (masks) unless it is in a cloud."""
    remote = path.startswith(tuple(f"/{cloud}/" for cloud in CLOUDS.values()))
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR" if remote else "FALSE"):
        return rasterio.open(path)


@dataclass(frozen=True)
class Opened:
    """A raster that is open, with what tells its invalid pixels.

    Attributes:
        raster: For one thread at a time.
        masked: Whether GDAL knows a mask of it.
        alpha: Number of a band that masks and that GDAL does not take for that; 0 if there is none.
        nodata: Value that alone masks, where the "alpha" band is data.
    """

    raster: DatasetReader
    masked: bool
    alpha: int
    nodata: float | None

    @classmethod
    def of(cls, raster: DatasetReader, alpha_is_data: bool) -> Opened:
        """Look at how a raster is masked.

        GDAL masks by an alpha band only where it is the second of two bands or the fourth of four
        (GDALRasterBand::GetMaskBand), and there also where the fourth is near infrared.
        """
        first = raster.mask_flag_enums[0]
        own = MaskFlags.per_dataset in first and MaskFlags.alpha not in first
        alpha = next((k for k, c in enumerate(raster.colorinterp, 1) if c == ColorInterp.alpha), 0)
        if alpha and alpha_is_data and not own:
            return cls(raster, False, 0, raster.nodata)
        masked = any(MaskFlags.all_valid not in flags for flags in raster.mask_flag_enums)
        unseen = alpha and not alpha_is_data and not own and MaskFlags.alpha not in first
        return cls(raster, masked, alpha if unseen else 0, None)

    def valid(self, part: NDArray[Any], window: Window) -> NDArray[np.bool_]:
        """Where pixels of a window are valid, shape (H, W).

        Args:
            part: The window's pixels, shape (B, H, W).
            window: Of the raster.
        """
        usable = np.ones(part.shape[1:], np.bool_)
        if self.nodata is not None:
            usable = (part != self.nodata).any(axis=0)
        if self.masked:
            usable = self.raster.dataset_mask(window=window) != 0
        if self.alpha:
            usable &= self.raster.read(self.alpha, window=window) != 0
        return usable


class _Handle:
    """A place for an open raster, which one thread at a time may use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.opened: Opened | None = None

    def close(self) -> None:
        if self.opened is not None:
            self.opened.raster.close()
            self.opened = None


class Files:
    """Open rasters, a few per thread: GDAL's handles must not be used by two threads at once.

    Where they are shared, a raster is opened once for all threads, which take turns at it. A
    pickled copy starts with none open, so that a spawned process opens its own, but remembers
    which version of each remote file was read first.
    """

    def __init__(self, versions: dict[str, Version] | None = None, *, shared: bool = False) -> None:
        self._local = threading.local()
        self._versions = {} if versions is None else versions
        self._common: OrderedDict[str, _Handle] | None = OrderedDict() if shared else None
        self._lock = threading.Lock()

    def shared(self) -> Files:
        """Others, for threads that take turns, of the same versions."""
        return Files(self._versions, shared=True)

    @contextmanager
    def using(self, path: str, signer: str | None, alpha_is_data: bool) -> Iterator[Opened]:
        """Lend a raster; where reading it fails it is closed, so that what it gave is forgotten."""
        handle = self._handle(path)
        with handle.lock:
            try:
                with no_error_lost():
                    if handle.opened is None:
                        handle.opened = Opened.of(open_raster(path, signer), alpha_is_data)
                    yield handle.opened
            except (RasterioError, OSError):
                handle.close()
                raise

    def _handle(self, path: str) -> _Handle:
        """Place of a raster, the one that was used longest ago being closed for it."""
        handles, most = self._common, SHARED_FILES
        if handles is None:
            most = OPEN_FILES
            handles = getattr(self._local, "handles", None)
            if handles is None:
                handles = self._local.handles = OrderedDict()
        oldest = None
        with self._lock:
            handle = handles.setdefault(path, _Handle())
            handles.move_to_end(path)
            if len(handles) > most:
                oldest = handles.popitem(last=False)[1]
        if oldest is not None:
            with oldest.lock:
                oldest.close()
        return handle

    def version(self, path: str, signer: str | None) -> Version:
        """Which version of a remote file is read."""
        if path not in self._versions:
            self._versions[path] = remote_version(path, signer)
        return self._versions[path]

    def versions(self, paths: Mapping[str, str | None]) -> None:
        """Learn the versions of several remote files at once; values are their signers."""
        if paths:
            with ThreadPoolExecutor(min(AT_ONCE, len(paths))) as pool:
                list(pool.map(self.version, paths, paths.values()))

    @contextmanager
    def checked_at_end(self) -> Iterator[None]:
        """Let this thread's `refuse_changed` wait for the block's end, and ask once for a file."""
        waiting: dict[str, str | None] = {}
        self._local.waiting = waiting
        try:
            yield
        finally:
            self._local.waiting = None
        for path, signer in waiting.items():
            self.refuse_changed(path, signer)

    def refuse_changed(self, path: str, signer: str | None) -> None:
        """Stop where a file is no longer the one that was read first.

        Only files that have a `plain_address` are asked for; a change in a bucket that takes
        signed requests is not noticed.

        Raises:
            ImageryError: It changed on its server, or the server does not answer.
        """
        if plain_address(path) is None:
            return
        waiting: dict[str, str | None] | None = getattr(self._local, "waiting", None)
        if waiting is not None:
            self.version(path, signer)
            waiting[path] = signer
            return
        first, now = self.version(path, signer), remote_version(path, signer)
        if now != first:
            raise ImageryError(
                f"{public(path)} changed on its server while it was read ({first} before, {now} "
                "now); run again, into another store, to read the new version throughout"
            )

    def __reduce__(self) -> tuple[type[Files], tuple[dict[str, Version]]]:
        return Files, (dict(self._versions),)
