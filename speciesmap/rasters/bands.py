"""What the bands of a raster show, as its file tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from speciesmap.errors import ImageryError
from speciesmap.rasters.messages import no_error_lost

SYNONYMS = {
    "r": "red",
    "g": "green",
    "b": "blue",
    "n": "nir",
    "near infrared": "nir",
    "near-infrared": "nir",
    "near_infrared": "nir",
    "nearinfrared": "nir",
    "infrared": "nir",
    "nir1": "nir",
    "red edge": "rededge",
    "red-edge": "rededge",
}
COLORS = {"coastal", "blue", "green", "red", "rededge", "nir", "swir", "pan"}


def canonical(name: str) -> str:
    """Give a band's name in the one spelling that is compared."""
    key = " ".join(name.lower().split())
    return SYNONYMS.get(key, key)


def band_names(raster: DatasetReader, path: str, *, remote: bool = False) -> tuple[str, ...]:
    """Name bands by description, else by colour, else by number.

    Args:
        raster: Open for reading.
        path: What to call it.
        remote: Look at an overview where pixels must be seen, which reads little of it.
    """
    names: list[str] = []
    for index, (text, color) in enumerate(
        zip(raster.descriptions, raster.colorinterp, strict=True), 1
    ):
        described = canonical(text or "")
        if color == ColorInterp.alpha and described not in COLORS:
            names.append("nir" if _mislabelled_alpha(raster, path, remote) else "alpha")
        elif described:
            names.append(described)
        else:
            names.append(color.name if color.name in COLORS else f"band_{index}")
    seen = Counter(names)
    return tuple(n if seen[n] == 1 or n == "alpha" else f"band_{i}" for i, n in enumerate(names, 1))


def _mislabelled_alpha(raster: DatasetReader, path: str, remote: bool) -> bool:
    """Tell whether the fourth band, marked alpha, is near infrared, as in many copies of NAIP.

    Writers mark the fourth band of a red, green, blue file as alpha by default. A mask is almost
    everywhere 0 or opaque; reflectance is almost nowhere.
    """
    if raster.count != 4 or raster.colorinterp[3] != ColorInterp.alpha:
        return False
    if raster.dtypes[3] not in ("uint8", "uint16"):
        return False
    opaque = np.iinfo(raster.dtypes[3]).max
    partly = visible = 0
    for window, shape in _places(raster, whole=remote and bool(raster.overviews(4))):
        try:
            with no_error_lost():
                alpha = raster.read(4, window=window, out_shape=shape)
        except (RasterioError, OSError) as error:
            raise ImageryError(
                f"{path} cannot be read at row {window.row_off}, column {window.col_off} "
                f"({error.__cause__ or error}); the file is damaged or truncated: copy or download "
                "it again"
            ) from error
        visible += int((alpha > 0).sum())
        partly += int(((alpha > 0) & (alpha < opaque)).sum())
    return partly > 0.5 * visible


def _places(raster: DatasetReader, *, whole: bool) -> Iterator[tuple[Window, tuple[int, int]]]:
    """Windows to look at with the shapes to read them in: the whole in little, or three places."""
    height, width = raster.shape
    if whole:
        yield Window(0, 0, width, height), (min(64, height), min(64, width))
        return
    for share in (0.25, 0.5, 0.75):
        row, col = int(height * share), int(width * share)
        shape = min(64, height - row), min(64, width - col)
        yield Window(col, row, shape[1], shape[0]), shape
