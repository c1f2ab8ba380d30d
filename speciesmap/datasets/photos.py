"""Photos as files: found by name, opened by one door that bounds their size, stored as JPEG."""

from __future__ import annotations

import io
import warnings
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlsplit

from PIL import ExifTags, Image, ImageOps

from speciesmap.errors import DatasetError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp")
GEO_KEYS = 34735  # tag of a TIFF that lies somewhere on Earth (GeoTIFF 1.1, section 7.1)
MOST_PIXELS = 64_000_000  # decoded, 200 MB; a JPEG is decoded at a fraction where that is enough
ENOUGH_PX = 2048
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # sizes are bounded here
MOST_BYTES = 100_000_000


def open_photo(source: Path | BinaryIO, side_px: int = ENOUGH_PX) -> Image.Image:
    """Read a photo as RGB, upright as its EXIF says.

    Args:
        source: File of one of `FORMATS`.
        side_px: A JPEG may be decoded at a half, a quarter or an eighth, not below this side.

    Raises:
        ValueError: It is no such photo, damaged, or too large to be decoded; the message says why.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
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


def encode_photo(file: Path, photo_px: int) -> bytes:
    """Read a photo whole and give it as a JPEG of bounded size; one that is such stays as it is.

    Args:
        file: Of one of `FORMATS`.
        photo_px: Longest side of the result.

    Raises:
        ValueError: It cannot be read, or is too large to be sane; the message says why.
    """
    try:
        size = file.stat().st_size
        original = file.read_bytes() if size <= MOST_BYTES else b""
    except OSError as error:
        raise ValueError(str(error)) from error
    if size > MOST_BYTES:
        raise ValueError(f"{size / 1e6:.0f} MB, at most {MOST_BYTES / 1e6:.0f} MB")
    photo = open_photo(io.BytesIO(original), photo_px)
    with Image.open(io.BytesIO(original)) as image:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        fits = max(image.size) <= photo_px and image.mode in ("RGB", "L")
        if image.format == "JPEG" and upright and fits:
            return original
    photo.thumbnail((photo_px, photo_px), Image.Resampling.LANCZOS)
    stored = io.BytesIO()
    photo.save(stored, "JPEG", quality=90)
    return stored.getvalue()


class PhotoFolder:
    """A folder of photos, listed once, in which those of an observation are found.

    Args:
        folder: Looked through with all that is inside of it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                self._by_name.setdefault(file.name, []).append(file)
                self._by_stem.setdefault(file.stem, []).append(file)

    def find(self, photo: str, identity: str) -> list[tuple[str, Path | None]]:
        """Find an observation's photos.

        Args:
            photo: File names or addresses, separated by `|`; of an address its last part counts, or
                the photo's number before it.
            identity: Of the observation, after which its photo may be named.

        Returns:
            Names, each with its file, or None where there is none.

        Raises:
            DatasetError: Two files have one name.
        """
        found: list[tuple[str, Path | None]] = []
        for name in (part.strip() for part in photo.split("|")):
            if name:
                found.append((name, self._named(name)))
        if all(file is None for _, file in found):
            own = self._only(self._by_stem.get(identity, []))
            if own is not None:
                return [(own.name, own)]
        return found or [(f"{identity}.jpg", None)]

    def _named(self, name: str) -> Path | None:
        address = "://" in name
        place = PurePosixPath(urlsplit(name).path if address else name)
        files = self._by_name.get(place.name, [])
        inside = [file for file in files if file == self._folder / place]
        if inside or files:
            return self._only(inside or files)
        return self._only(self._by_stem.get(place.parent.name, [])) if address else None

    @staticmethod
    def _only(files: list[Path]) -> Path | None:
        if len(files) > 1:
            raise DatasetError(
                f"{files[0]} and {files[1]} have one name, and no observation says which it means; "
                "rename one, or give paths inside the folder in the column `photo`"
            )
        return files[0] if files else None
