"""One image file is read by the rules that decode.py lists, to the exact pixel."""

import io
import struct
import subprocess
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diffaccel.data.decode import (
    CMYK,
    FIRST_FRAME,
    MAX_PIXELS,
    NO_EXIF,
    OVER_WHITE,
    UPRIGHT,
    decode,
    is_colour,
    is_image,
)

RGB = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)
GREY = RGB[..., 0].copy()
RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    stream.seek(0)
    return stream


def png16(kind: int, channels: int) -> io.BytesIO:
    """A PNG of 16 bits a channel, which Pillow writes for grey alone."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 2, 2, 16, kind, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(4 * channels)) * 2)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def tiff16() -> io.BytesIO:
    """A TIFF of 2 x 2 RGB pixels with 16 bits a channel."""
    tags = {256: (3, 1, 2), 257: (3, 1, 2), 258: (3, 3, 122), 259: (3, 1, 1), 262: (3, 1, 2)}
    tags |= {273: (4, 1, 128), 277: (3, 1, 3), 278: (3, 1, 2), 279: (4, 1, 24)}
    ifd = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in tags.items())
    content = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + ifd + bytes(4)
    return io.BytesIO(content.ljust(122, b"\0") + struct.pack("<HHH", 16, 16, 16) + bytes(24))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_a_picture_stored_in_any_orientation_reads_the_same(format: str, orientation: int) -> None:
    stored = {  # what a camera held that way writes of RAMP
        1: RAMP,
        2: RAMP[:, ::-1],
        3: RAMP[::-1, ::-1],
        4: RAMP[::-1],
        5: RAMP.T,
        6: RAMP.T[::-1],
        7: RAMP.T[::-1, ::-1],
        8: RAMP.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    colour = Image.fromarray(np.repeat(stored[..., None], 3, axis=2).copy())
    image, changes = decode(saved(colour, format, exif=exif, **({"lossless": True} if format == "WEBP" else {})))
    assert np.array_equal(np.asarray(image)[..., 0], RAMP)
    if format != "TIFF":  # Pillow itself turns those
        assert changes == (() if orientation == 1 else (UPRIGHT,))


def test_unreadable_exif_data_leave_the_pixels() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n8\nno hexadecimal")
    image, changes = decode(saved(Image.fromarray(RGB), pnginfo=info))
    assert np.array_equal(np.asarray(image), RGB)
    assert changes == (NO_EXIF,)


def test_transparent_pixels_are_composited_over_white() -> None:
    """alpha c + (1 - alpha) 255, whatever colour lies under alpha 0; opaque alpha changes nothing."""
    alpha = np.zeros((4, 6), np.uint8)
    alpha[:, 2:4], alpha[:, 4:] = 51, 255
    image, changes = decode(saved(Image.fromarray(np.dstack([RGB, alpha]))))
    share = alpha[..., None] / 255
    assert np.abs(np.asarray(image) - (share * RGB + (1 - share) * 255)).max() <= 1
    assert (np.asarray(image)[:, :2] == 255).all()
    assert np.array_equal(np.asarray(image)[:, 4:], RGB[:, 4:])
    assert changes == (OVER_WHITE,)
    image, changes = decode(saved(Image.fromarray(np.dstack([RGB, np.full_like(alpha, 255)]))))
    assert np.array_equal(np.asarray(image), RGB)
    assert changes == ()


def test_every_kind_of_transparency_is_seen() -> None:
    grey_alpha = Image.fromarray(np.dstack([GREY, np.where(GREY > 99, 255, 0).astype(np.uint8)]), "LA")
    image, changes = decode(saved(grey_alpha))
    assert (image.mode, changes) == ("L", (OVER_WHITE,))
    assert np.array_equal(np.asarray(image), np.where(GREY > 99, GREY, 255))
    image, changes = decode(saved(Image.fromarray(GREY), transparency=int(GREY[0, 0])))
    assert (image.mode, changes) == ("L", (OVER_WHITE,))
    assert np.array_equal(np.asarray(image), np.where(GREY[0, 0] == GREY, 255, GREY))
    image, changes = decode(saved(Image.fromarray(RGB), transparency=tuple(int(v) for v in RGB[0, 0])))
    assert (np.asarray(image)[0, 0] == 255).all()
    assert changes == (OVER_WHITE,)
    palette = Image.fromarray(RGB).quantize(8)
    image, changes = decode(saved(palette, transparency=3))
    expected = np.where(np.asarray(palette)[..., None] == 3, 255, np.asarray(palette.convert("RGB")))
    assert np.array_equal(np.asarray(image), expected)
    assert changes == (OVER_WHITE,)


def test_a_palette_is_grey_if_its_pixels_are() -> None:
    grey = Image.fromarray(GREY).convert("P")
    colour = Image.fromarray(RGB).quantize(8)
    assert np.array_equal(np.asarray(decode(saved(grey)).image), GREY)
    assert (decode(saved(grey)).image.mode, decode(saved(colour)).image.mode) == ("L", "RGB")
    assert (is_colour(saved(grey)), is_colour(saved(colour))) == (False, True)


@pytest.mark.parametrize(
    "stream",
    [
        saved(Image.fromarray(np.zeros((2, 2), np.uint16))),
        saved(Image.fromarray(np.zeros((2, 2), np.uint16)), "TIFF"),
        saved(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"),
        png16(2, 3),
        png16(4, 2),
        png16(6, 4),
        tiff16(),
        io.BytesIO(b"P5 2 2 65535\n" + bytes(8)),
        io.BytesIO(b"P6 2 2 1023\n" + bytes(24)),
    ],
)
def test_more_than_eight_bits_are_refused_and_not_cut(stream: io.BytesIO) -> None:
    with pytest.raises(ValueError, match="more than 8 bits per channel .*convert to 8 bits"):
        decode(stream)
    assert not is_colour(stream)


def test_fewer_bits_are_scaled() -> None:
    assert np.asarray(decode(saved(Image.fromarray(GREY > 99))).image).tolist() == np.where(GREY > 99, 255, 0).tolist()
    image = decode(io.BytesIO(b"P5 2 1 3\n\x00\x03")).image
    assert np.asarray(image).tolist() == [[0, 255]]


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_of_several_frames_the_first_is_read(format: str, options: dict[str, Any]) -> None:
    first, other = Image.fromarray(GREY).convert("RGB"), Image.fromarray(255 - GREY).convert("RGB")
    image, changes = decode(saved(first, format, save_all=True, append_images=[other, other], **options))
    assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(first))
    assert changes == (FIRST_FRAME,)
    assert decode(saved(first, format, **options)).changes == ()


def test_cmyk_is_said() -> None:
    image, changes = decode(saved(Image.fromarray(RGB).convert("CMYK"), "TIFF"))
    assert (image.mode, changes) == ("RGB", (CMYK,))
    assert np.array_equal(np.asarray(image), RGB)


def test_only_formats_that_are_images_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript; no external program is started, whatever a file holds."""

    def started(*args: Any, **keys: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    for format in ("EPS", "ICO", "PCX", "TGA", "PDF"):
        stream = saved(Image.fromarray(RGB), format)
        with pytest.raises(ValueError, match="not a complete PNG"):
            decode(stream)
        assert not is_image(stream)
    assert np.array_equal(np.asarray(decode(saved(Image.fromarray(RGB), "BMP")).image), RGB)


def test_pixels_are_bounded_before_they_are_unpacked() -> None:
    for width, words in ((MAX_PIXELS // 1000 + 1, f"the limit is {MAX_PIXELS}"), (10**6, "bomb")):
        with pytest.raises((ValueError, Image.DecompressionBombError), match=words):
            decode(io.BytesIO(b"P6 %d 1000 255\n" % width))


def test_text_in_a_png_is_bounded() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 5_000_000, zip=True)
    with pytest.raises(ValueError, match="too large"):
        decode(saved(Image.fromarray(RGB), pnginfo=info))


def test_images_are_known_by_their_header() -> None:
    assert is_image(saved(Image.fromarray(RGB), "JPEG"))
    for text in (b"", b"P", b"Python is a language", b"P1 is what a text may begin with", b"BMs are no bitmaps"):
        assert not is_image(io.BytesIO(text))
