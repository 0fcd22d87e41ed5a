"""Files of generated images for other programs, written with one batch in memory at a time."""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor

ARRAYS = ("images", "arr_0")
"""Names of the array of images in an npz: for this package, and for ADM's evaluation suite."""


def write_png(folder: Path, batches: Iterable[Tensor], n: int) -> None:
    """Write image i as ``{i:06d}.png``, lossless and grey for grey images.

    Args:
        folder: Folder to write to.
        batches: Images in order, (b, C, H, W) uint8, with C = 1 or 3.
        n: Number of images, which determines the number of digits of the names.
    """
    digits = max(6, len(str(n - 1)))
    images = (image for batch in batches for image in batch)
    for i, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.contiguous().numpy()).save(folder / f"{i:0{digits}d}.png")


def write_npz(path: Path, batches: Callable[[], Iterator[Tensor]], n: int, labels: Tensor | None = None) -> None:
    """Write images as ``images`` and ``arr_0``, (n, H, W, C), and class labels as ``labels``, (n,).

    Args:
        path: File to write.
        batches: Function that iterates over all images in order, (b, C, H, W); called once per array.
        n: Number of images.
        labels: Class labels, (n,), or None.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ARRAYS:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                for first, batch in enumerate(batches()):
                    array = np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy())
                    if first == 0:
                        header = {"shape": (n, *array.shape[1:]), "fortran_order": False}
                        npy.write_array_header_1_0(file, {**header, "descr": npy.dtype_to_descr(array.dtype)})
                    file.write(array.tobytes())
        if labels is not None:
            with archive.open("labels.npy", "w") as file:
                np.save(file, labels.cpu().numpy())
