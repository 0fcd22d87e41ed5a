"""Size of the network and length of the training for images of a shape and number."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from diffaccel.errors import UsageError

FINEST = 16
"""Height and width at which the finest layers work, for images up to 32 pixels; twice as many for larger ones."""
COARSEST = 4
"""Smallest height and width of a layer."""


class Length(NamedTuple):
    """Length of a training, in images.

    Attributes:
        images: Total number.
        warmup: Number over which the learning rate increases.
        ema_half_life: Half-life of the average.
    """

    images: int
    warmup: int
    ema_half_life: int


def network_for(shape: tuple[int, int, int], resized_to: Callable[[int], str]) -> dict[str, Any]:
    """Return a U-Net that two CPU cores can train on images up to 64 pixels, as an experiment's ``network``.

    Images are unshuffled until their finest layers have about 16 x 16 pixels, or 32 x 32 for images of 64 pixels and
    more. Resolutions are added down to 4 x 4. For 32 x 32 pixels it is the network of ``cifar10_small``.

    Args:
        shape: Image shape (C, H, W).
        resized_to: Function height and width -> how to get such images, for the message.

    Raises:
        UsageError: The images can't be halved often enough.
    """
    _, height, width = shape
    side, even = max(height, width), math.gcd(height, width)
    finest = FINEST if side < 64 else 2 * FINEST
    unshuffle = 1
    while side // unshuffle > finest and even % (2 * unshuffle) == 0:
        unshuffle *= 2
    levels, halved = 1, even // unshuffle
    while halved % 2 == 0 and halved // 2 >= COARSEST:
        levels, halved = levels + 1, halved // 2
    if side // unshuffle > 2 * finest or (levels < 2 and side > 2 * COARSEST):
        raise UsageError(
            f"images of {width}x{height} pixels can't be halved often enough for the networks, which require multiples "
            f"of 16: {resized_to(max(16, min(height, width) // 16 * 16))}"
        )
    widths = [32, 48] if side <= 8 else [64, 96, 128, 128, 128]
    widths = widths[: min(levels, len(widths))]
    attention = [level for level in range(1, len(widths)) if side // unshuffle >> level <= 8]
    attention = attention[-1:] if side < 64 else attention
    network = {"name": "unet", "widths": widths, "blocks": 1, "attention": attention, "unshuffle": unshuffle}
    return {**network, "embedding": 64 if side <= 8 else 128}


def length_for(train: int) -> Length:
    """Return the length of a training on a number of images: a hundred passes, from 200,000 to 2,000,000 images."""
    images = min(2_000_000, max(200_000, 100 * train // 1000 * 1000))
    return Length(images, warmup=min(10_000, images // 20), ema_half_life=images // 40)


def lognormal_mean(shape: tuple[int, int, int]) -> float:
    """Return the mean of ln(sigma) in training: EDM's up to 64 pixels, and larger in proportion to the side beyond.

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Table 1;
        simple diffusion (Hoogeboom et al., 2023), https://arxiv.org/abs/2301.11093, section 3.1, for the shift
    """
    return round(-1.2 + math.log(max(1.0, max(shape[1:]) / 64)), 2)
