"""Held-out images of a data set without a test split: a share of the images, chosen by the hash of their pixels.

The pixels alone decide, before any resize. An image stays in its split when other images are added, removed or renamed.
Copies of an image are in one split. A folder, a zip archive and an npz file of the same images have the same splits.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffaccel.data.source import MissingSplit, Split
from diffaccel.errors import UsageError
from diffaccel.text.escape import printable

BITS = 64


def check_share(share: float | None, test_path: object) -> None:
    """Check the key ``test_share`` of a source.

    Raises:
        UsageError: The share is not between 0 and 1, or there is a test split already.
    """
    if share is None:
        return
    if not 0 < share < 1:
        raise UsageError(f"data.test_share={share:g}: set a share between 0 and 1, such as 0.1")
    if test_path is not None:
        raise UsageError("both data.test_share and data.test_path are set: remove one of them")


def digest_of(image: Image.Image) -> int:
    """Return the hash of an image's size and RGB pixels, an integer below 2^64."""
    return _hash(image.width, image.height, image.convert("RGB").tobytes())


def digest_of_array(image: np.ndarray[Any, Any]) -> int:
    """Return the same hash of an array (H, W) or (H, W, C) uint8, C = 1 or 3."""
    planes = image[..., None] if image.ndim == 2 else image
    height, width, _ = planes.shape
    return _hash(width, height, np.ascontiguousarray(np.broadcast_to(planes, (height, width, 3))).tobytes())


def _hash(width: int, height: int, pixels: bytes) -> int:
    found = hashlib.blake2b(pixels, digest_size=BITS // 8, salt=f"{width}x{height}".encode()[:16])
    return int.from_bytes(found.digest(), "big")


def chosen(digests: Sequence[int], share: float, split: Split, where: str) -> Tensor:
    """Return the indices of a split's images, (n,) int64.

    Args:
        digests: Hash of each image.
        share: Expected share of the test split.
        split: Name of the split.
        where: Name of the data, for messages.

    Raises:
        UsageError: The split has no images.
    """
    limit = int(share * 2**BITS)
    held_out = np.array([digest < limit for digest in digests], dtype=bool)
    indices = np.flatnonzero(held_out if split == "test" else ~held_out)
    if not len(indices):
        kind = MissingSplit if split == "test" else UsageError
        change = "raise" if split == "test" else "lower"
        raise kind(
            f"{printable(where)}: data.test_share={share:g} leaves none of the {len(digests)} images to the {split} "
            f"split: {change} it, or add images"
        )
    return torch.from_numpy(indices)


def note(total: int, held_out: int) -> str:
    """Note for the user on the size of the test split."""
    return f"{held_out} of {total} images are held out as the test split, by the hash of their pixels"
