"""Images as files and data sets hold them, read as upright RGB images, or refused by name.

Pillow's ``convert("RGB")`` alone clips what is larger than 8 bits to white, and shows what lies under transparent pixels.
Here

- 16-bit greys are scaled by their range, 0 to 65535. Integers of 32 bits and floating-point numbers are refused: nothing
  says which of them is white, and a range taken from each image would let the same value mean another grey in the next;
- transparent pixels show the white behind them, as on a page;
- an image lies as its EXIF orientation says, and of an animation or several pages the first image counts.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


# Pillow knows more formats. Of the others some start a program (EPS) or hold images larger than they say (ICO).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# Pillow's own limit: 256 MiB of pixels in memory. Pillow itself warns there, and raises at twice as many.
MAX_PIXELS = 89_478_485
_SMALLER = "Make it smaller, remove it, or raise the limit if it is meant to be so large."


class _Refused(ValueError):
    """What is wrong with an image, still without its name."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Whatever goes wrong with an image becomes one ValueError that begins with its name."""
    try:
        yield
    except _Refused as error:
        raise ValueError(f"{name}: {error}") from error
    # Pillow's readers raise what a damaged file makes them stumble over: OSError, SyntaxError, struct.error, KeyError.
    except Exception as error:
        raise ValueError(
            f"{name}: expected a whole image, got one that cannot be read ({type(error).__name__}: {str(error)[:200]}). "
            "Replace or remove it."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB and upright, transparent pixels on white; see the top of this file. Left as it is.

    Raises:
        ValueError: It holds numbers that are no colours, or cannot be decoded.
    """
    image.load()
    _check_values(image)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _grey_of_16_bits(image)
    if image.has_transparency_data:
        # Pillow converts premultiplied greys to nothing else.
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _check_values(image: Image.Image) -> None:
    """Refuse numbers of which nothing says what colour they are. Looks at the header alone."""
    # Of graymaps, Pillow gives every range beyond 8 bits as 0 to 65535, in 32-bit integers.
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode.startswith(("I", "F")) and not sixteen_bits:
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise _Refused(
            f"expected 8 or 16 bits for each grey or colour, got {kind}, of which nothing says which is white. Save the "
            "images with 8 or 16 bits, all of them scaled by the same range."
        )
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        raise _Refused(
            "expected 8 bits for each colour where one of them stands for transparency, got 16. Save it with an alpha "
            "channel instead."
        )


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """Greys from 0 to 65535, scaled to 8 bits."""
    values, white = np.asarray(image).astype(np.uint32), 65535
    if image.format == "TIFF":
        # Pillow leaves 12-bit values as they are, and those where zero is white.
        if image.tag_v2.get(ExifTags.Base.BitsPerSample) == (12,):
            white = 4095
        if image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0:
            values = white - values
    grey = ((255 * values + white // 2) // white).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


class StoredImages(Sequence):
    """Images as a data set stores them, each read with `to_rgb` when it is asked for.

    Args:
        entries: Of each image the path of its file, or what an undecoded column of `datasets` holds:
            ``{"path": ..., "bytes": ...}``.
        split: Which images these are, for messages about those that have no file: ``"train"``, ``"test"``.
        max_pixels: How many pixels an image may have. One with more is refused before memory is spent on it.
        folder: Where all of them lie, as files; None for any others.

    Raises:
        ValueError: (on access, and in `check`) An image is damaged, too large, or none. The message names it.
    """

    def __init__(
        self,
        entries: Sequence[str | dict[str, Any]],
        split: str,
        max_pixels: int = MAX_PIXELS,
        folder: str | Path | None = None,
    ):
        self.entries = entries
        self.split = split
        self.max_pixels = max_pixels
        self.folder = folder

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Image.Image:
        with self._opened(index) as image:
            return to_rgb(image)

    @property
    def paths(self) -> list[str]:
        """Of images in a folder; none of others."""
        return [] if self.folder is None else list(self.entries)

    def names(self) -> list[str]:
        """What each image is called: its path in the folder; where there is none, its number, from 0."""
        return [os.path.relpath(path, self.folder) for path in self.paths] or [
            str(index) for index in range(len(self))
        ]

    def check(self) -> None:
        """Read every header, and the checksums of formats that have them: minutes for a million images, not hours."""
        for index in range(len(self)):
            with self._opened(index) as image:
                image.verify()

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image.Image]:
        """The image with its header read and found right; its pixels are still to come."""
        name, file = self._stored(index)
        with naming(name), _pillow_limit(self.max_pixels):
            # Opening a pipe would wait for its other end.
            if isinstance(file, str) and not os.path.isfile(file):
                raise _Refused("expected a file of an image, got a folder, a pipe, a device or a link to nothing.")
            try:
                image = Image.open(file, formats=FORMATS)
            except UnidentifiedImageError as error:
                raise _Refused(
                    f"expected an image ({', '.join(FORMATS)}), got something else or one whose beginning is damaged. "
                    "Convert, replace or remove it."
                ) from error
            except Image.DecompressionBombError as error:
                raise _Refused(f"{self._limit()}, got more than twice as many ({error}). {_SMALLER}") from error
            with image:
                pixels = image.width * image.height
                if pixels > self.max_pixels:
                    raise _Refused(f"{self._limit()}, got {image.width} x {image.height} = {pixels}. {_SMALLER}")
                _check_values(image)
                yield image

    def _limit(self) -> str:
        return f"expected at most {self.max_pixels} pixels (--max_image_pixels)"

    def _stored(self, index: int) -> tuple[str, str | BytesIO]:
        """Name for messages, and what Pillow opens."""
        entry = self.entries[index]
        if isinstance(entry, str):
            return repr(entry), entry
        name = f"image {index} of {self.split}"
        if entry is None or entry["bytes"] is None:
            raise ValueError(f"{name}: expected the bytes of an image, got none. Load the data set again.")
        return name, BytesIO(entry["bytes"])


@contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Pillow's limit, which is global, for as long as one of our images is read."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
