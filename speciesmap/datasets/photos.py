"""The door through which photos are opened: few formats, bounded size, upright."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp")
GEO_KEYS = 34735  # tag of a TIFF that lies somewhere on Earth (GeoTIFF 1.1, section 7.1)
MOST_PIXELS = 64_000_000  # decoded, 200 MB; a JPEG is decoded at a fraction where that is enough
ENOUGH_PX = 2048


def open_photo(source: Path | BinaryIO, side_px: int = ENOUGH_PX) -> Image.Image:
    """Read a photo as RGB, upright as its EXIF says.

    Args:
        source: File of one of `FORMATS`.
        side_px: A JPEG may be decoded at a half, a quarter or an eighth, not below this side.

    Raises:
        ValueError: It is no such photo, damaged, or too large to be decoded; the message says why.
    """
    try:
        with warnings.catch_warnings(), Image.open(source, formats=FORMATS) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if GEO_KEYS in getattr(image, "tag_v2", ()):
                raise ValueError("it is a map, with a place on Earth, and no photo")
            image.draft("RGB", (side_px, side_px))
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, at most {MOST_PIXELS / 1e6:.0f} "
                    "million are decoded"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise ValueError(str(error) or type(error).__name__) from error
