"""A small folder of images of one's own, and the experiments for it."""

from pathlib import Path

import numpy as np
from PIL import Image

from diffaccel.__main__ import main

N, SIDE = 160, 8


def save_images(folder: Path, n: int = N, side: int = SIDE, classes: int = 2, seed: int = 0) -> Path:
    """Discs of random colour, place and size, in a folder per class."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:side, :side]
    for index in range(n):
        colour, ground = rng.integers(128, 256, 3), rng.integers(0, 128, 3)
        (y, x), radius = rng.uniform(0.2 * side, 0.8 * side, 2), rng.uniform(0.2, 0.45) * side
        disc = ((row - y) ** 2 + (column - x) ** 2 < radius**2)[..., None]
        place = folder / "abcdefghij"[index % classes]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(disc, colour, ground).astype(np.uint8)).save(place / f"{index:03d}.png")
    return folder


JUDGES = "judges=[{name: identity, dim: 192}]"
"""The pixels, which cost nothing."""


def make(folder: Path, images: Path, *words: str) -> int:
    """Run `diffaccel new`, judged by the pixels."""
    return main(["new", str(folder), f"images={images}", JUDGES, "test_share=0.2", *words])
