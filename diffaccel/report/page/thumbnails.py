"""Samples of the page, as small pictures inside of it."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffaccel.report.rows import Row
from diffaccel.report.strips import joined, strips_of

ROOM = 2_400_000
"""Number of bytes that all pictures of a page may take, as text."""
SIDE = 96
"""Largest side of an image of a strip, in pixels."""


def thumbnails(views: Sequence[Sequence[Row]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the strips of several views of rows.

    The quality is lowered until all pictures fit into the page; without sample grids, the strips are empty.

    Returns:
        Pictures as ``data:`` addresses, and the strip of each view: a title, and cells of label, budget and picture.
    """
    strips = [strips_of(rows) for rows in views]
    for scale, quality in ((1.0, 90), (1.0, 75), (0.66, 75), (0.5, 60), (0.33, 50), (0.0, 0)):
        pictures: dict[str, int] = {}  # several views show the same images
        found = []
        for strip, title in strips:
            cells = [
                (*place, pictures.setdefault(_address(joined(images), scale, quality), len(pictures)))
                for place, images in (strip.items() if scale else ())
            ]
            found.append({"title": title, "cells": cells})
        if sum(map(len, pictures)) <= ROOM:
            break
    return list(pictures), found


def _address(picture: "np.ndarray[Any, Any]", scale: float, quality: int) -> str:
    image = Image.fromarray(picture)
    factor = min(1.0, SIDE / image.height) * scale
    if factor < 1:
        image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
