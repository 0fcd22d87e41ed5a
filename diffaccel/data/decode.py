"""Decoding of image files to 8-bit grey or RGB pixels, by the same rules for every image of a source.

- Formats: PNG, JPEG, WebP, BMP, GIF, TIFF, PPM and AVIF, recognised by content. Pillow's other decoders are not used,
  because some start external programs.
- The EXIF orientation is applied. Unreadable EXIF data are ignored.
- Transparent pixels are composited over white.
- Images with more than 8 bits per channel are rejected: Pillow truncates RGB to the upper bits, and grey images often
  use a part of the range only.
- A palette image is grey if all its pixels are grey.
- CMYK is converted by Pillow's formula. Colour profiles (ICC) are ignored, as by EDM, torchvision and pytorch-fid.
- The first of several frames or pages is read.
- Sizes are bounded by ``MAX_PIXELS`` and ``MAX_BYTES``.

The changes to an image (``UPRIGHT``, ``OVER_WHITE``, ...) are returned with the image, so that a source can report
them.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from diffaccel.text.escape import printable

SUFFIXES = {
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    ".webp": "WEBP",
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    ".gif": "GIF",
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    ".avif": "AVIF",
}
"""Pillow's name of the format for each lower-case suffix of image files."""

MAX_PIXELS = 2**26
"""Maximum number of pixels of an image, 8192 x 8192."""
MAX_BYTES = 2**28
"""Maximum size of an unpacked file in bytes: ``MAX_PIXELS`` without compression, with four channels."""

GREY_MODES = frozenset({"1", "L", "LA"})
MODES = GREY_MODES | {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}

UPRIGHT = "rotated or mirrored by their EXIF orientation"
OVER_WHITE = "with transparency, composited over white"
FIRST_FRAME = "with several frames, of which the first is read"
CMYK = "in CMYK, converted to RGB without a colour profile"
NO_EXIF = "with unreadable EXIF data, not rotated"

# Exceptions of Pillow and zipfile for damaged or foreign files.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoded(NamedTuple):
    """Decoded image and changes by decoding.

    Attributes:
        image: Image of mode L or RGB.
        changes: Changes, out of ``UPRIGHT``, ``OVER_WHITE``, ``FIRST_FRAME``, ``CMYK``, ``NO_EXIF``.
    """

    image: Image.Image
    changes: tuple[str, ...]


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats of ``SUFFIXES`` that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in dict.fromkeys(SUFFIXES.values()) if name in Image.OPEN)


def listed(names: Iterable[str], most: int = 10) -> str:
    """Join at most ``most`` names for a message."""
    names = list(names)
    return ", ".join(map(printable, names[:most])) + (", ..." if len(names) > most else "")


def has_image_suffix(name: str) -> bool:
    """Whether the suffix of a file is that of a supported image format."""
    return SUFFIXES.get(os.path.splitext(name)[1].lower()) in formats()


def is_image(stream: IO[bytes]) -> bool:
    """Whether the header of a file is that of a supported image format, for files without a suffix."""
    try:
        with Image.open(stream, formats=formats()):
            return True
    except Image.DecompressionBombError:  # an image that decode() rejects
        return True
    except UNREADABLE:
        return False


def decode(stream: IO[bytes]) -> Decoded:
    """Decode one image.

    Raises:
        UNREADABLE: The image is damaged, too large, or of an unsupported kind, as stated in the message.
    """
    with _open(stream) as image:
        if _is_deep(image):
            raise ValueError(f"more than 8 bits per channel (mode {image.mode}): convert to 8 bits")
        if image.mode not in MODES:
            raise ValueError(f"pixels of mode {image.mode}, neither 8-bit grey nor 8-bit colour")
        changes = [FIRST_FRAME] if getattr(image, "is_animated", False) else []
        image.load()
        try:
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        except UNREADABLE:  # the pixels are valid
            turn = None
            changes.append(NO_EXIF)
        changes += [CMYK] if image.mode == "CMYK" else []
        flat, composited = _flatten(image)
    if turn is not None:
        flat = flat.transpose(turn)
        changes.append(UPRIGHT)
    return Decoded(flat, (*changes, OVER_WHITE) if composited else tuple(changes))


def is_colour(stream: IO[bytes]) -> bool:
    """Whether an image is a colour image, by its header if this is sufficient; False for unreadable images."""
    try:
        with _open(stream) as image:
            if _is_deep(image) or image.mode not in MODES:
                return False
            return _flatten(image)[0].mode == "RGB" if image.mode in ("P", "PA") else image.mode not in GREY_MODES
    except UNREADABLE:
        return False


def _open(stream: IO[bytes]) -> Any:
    """Open an image and check its format and size, without decoding pixels."""
    try:
        image = Image.open(stream, formats=formats())
    except Image.UnidentifiedImageError:
        raise ValueError(f"not a complete {', '.join(formats())} file") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, the limit is {MAX_PIXELS}")
    return image


def _is_deep(image: Any) -> bool:
    """Whether an image has more than 8 bits per channel, which Pillow's mode shows for grey images only."""
    if image.mode.startswith(("I", "F")):
        return True
    if image.format == "TIFF":
        return bool(np.max(image.tag_v2.get(ExifTags.Base.BitsPerSample, 1)) > 8)
    layouts = [tile[3] for tile in image.tile]
    if image.format == "PPM":  # (pixel layout, largest value), or the layout only
        return any(isinstance(layout, tuple) and layout[1] > 255 for layout in layouts)
    return image.format == "PNG" and any(";16" in str(layout) for layout in layouts)


def _flatten(image: Any) -> tuple[Image.Image, bool]:
    """Convert an image to L or RGB, and return whether some of its pixels are transparent."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image, False
    grey, composited = image.mode in GREY_MODES, False
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        composited = layered.getchannel("A").getextrema()[0] < 255
        if composited:
            layered = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
        flat = layered.convert("RGB")
    else:
        flat = image.convert("L" if grey else "RGB")
    if image.mode in ("P", "PA"):
        pixels = np.asarray(flat)
        grey = bool((pixels == pixels[..., :1]).all())
    return flat.convert("L") if grey else flat, composited
