"""Sources that fit in memory: digits, npz arrays, CIFAR-10, toy points."""

import os
import zipfile
import zlib
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from diffaccel.data.source import SOURCES, ArrayImages, Source, Split, path_of
from diffaccel.errors import UsageError


def channels_first(images: np.ndarray[Any, Any]) -> Tensor:
    """(N, H, W) or (N, H, W, C) uint8 -> (N, C, H, W)."""
    if images.ndim == 3:
        images = images[..., None]
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@SOURCES.register("digits")
class Digits(Source):
    """Scikit-learn's 8x8 digits, 0..16 brought to 0..255; every fifth image is the test split (1437 and 360 images).

    Args:
        label: Provenance, for tables and plots.
    """

    def __init__(self, label: str | None = None) -> None:
        self.label = label or "digits 8x8"

    def split(self, name: Split) -> ArrayImages:
        """Open a split."""
        from sklearn.datasets import load_digits  # imported late: it takes a second that other sources needn't wait

        digits = load_digits()
        chosen = (np.arange(len(digits.images)) % 5 == 0) == (name == "test")
        images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        return ArrayImages(channels_first(images), torch.from_numpy(digits.target[chosen]), classes=10)


@SOURCES.register("npz")
class Npz(Source):
    """Arrays of an npz file: ``images`` uint8 (N, H, W) or (N, H, W, C), and optionally ``labels`` (N,) integers.

    An array ``classes`` (names, one a class), if there is one, says how many classes there are; else the largest
    training label does.

    Args:
        path: The training images.
        test_path: The test images, if any.
        label: Provenance, for tables and plots; the file's name by default.
    """

    def __init__(self, path: str, test_path: str | None = None, label: str | None = None) -> None:
        self.path, self.test_path = path, test_path
        self.label = label or os.path.basename(path)

    def split(self, name: Split) -> ArrayImages:
        """Open a split.

        Raises:
            UsageError: No such file, a broken one, or arrays of the wrong name, type or shape.
        """
        path = path_of(name, self.path, self.test_path)
        arrays = _read_npz(path)
        images, classes = _images_of(path, arrays), _classes_of(path, arrays)
        return ArrayImages(images, _labels_of(path, arrays, classes), classes)


_WANTED = ("images", "labels", "classes")


def _read_npz(path: str) -> dict[str, np.ndarray[Any, Any]]:
    if not os.path.isfile(path):
        raise UsageError(f"no file {path}: give the source an npz file with an array 'images'")
    try:
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            # a .npy file gives a bare array
            arrays = {key: file[key] for key in _WANTED if key in file} if isinstance(file, NpzFile) else {}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} can't be read as npz ({error}): it is truncated or no npz; write it anew") from None
    if "images" not in arrays:
        raise UsageError(f"{path} has no array 'images': save the images, uint8 (N, H, W, C), in an npz by that name")
    return arrays


def _images_of(path: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Tensor:
    images = arrays["images"]
    if images.dtype != np.uint8:
        raise UsageError(f"{path}: 'images' is {images.dtype}: give uint8, 0 to 255")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)) or images.size == 0:
        raise UsageError(
            f"{path}: 'images' has shape {images.shape}: give (N, H, W) or (N, H, W, C), C = 1 or 3, and no size of 0"
        )
    return channels_first(images)


def _classes_of(path: str, arrays: dict[str, np.ndarray[Any, Any]]) -> int | None:
    if "classes" not in arrays or "labels" not in arrays:
        return None
    if arrays["classes"].ndim != 1:
        raise UsageError(
            f"{path}: 'classes' has shape {arrays['classes'].shape}: give one name per class, or leave it out"
        )
    return len(arrays["classes"])


def _labels_of(path: str, arrays: dict[str, np.ndarray[Any, Any]], classes: int | None) -> Tensor | None:
    if "labels" not in arrays:
        return None
    labels, n = arrays["labels"], len(arrays["images"])
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"{path}: 'labels' is {labels.dtype} {labels.shape}: give one integer per image, ({n},)")
    if labels.min() < 0:
        raise UsageError(f"{path}: 'labels' has the value {labels.min()}: number the classes from 0")
    if classes is not None and labels.max() >= classes:
        raise UsageError(
            f"{path}: 'labels' goes to {labels.max()}, 'classes' names {classes}: number from 0, or name them all"
        )
    return torch.from_numpy(labels.astype(np.int64))


@SOURCES.register("cifar10")
class Cifar10(Source):
    """CIFAR-10 as torchvision keeps it: 50,000 training and 10,000 test images.

    Args:
        root: The folder that holds ``cifar-10-batches-py``.
        download: Fetch it if it isn't there.
        label: Provenance, for tables and plots.

    References:
        Learning Multiple Layers of Features from Tiny Images (Krizhevsky, 2009)
    """

    def __init__(self, root: str, download: bool = False, label: str | None = None) -> None:
        self.root, self.download = root, download
        self.label = label or "CIFAR-10"

    def split(self, name: Split) -> ArrayImages:
        """Open a split.

        Raises:
            UsageError: The data set isn't there or not whole, or can't be downloaded.
        """
        from torchvision.datasets import CIFAR10  # imported late: it takes a second that other sources needn't wait

        # torchvision unpickles the files, but only once their MD5 sums are the published ones.
        try:
            data = CIFAR10(self.root, train=name == "train", download=self.download)
        except (RuntimeError, OSError) as error:
            remedy = "check the connection" if self.download else "set download: true"
            raise UsageError(
                f"no whole CIFAR-10 under {self.root} ({error}): {remedy}, or use the source npz"
            ) from None
        return ArrayImages(channels_first(data.data), torch.tensor(data.targets), classes=10)


@SOURCES.register("toy")
class Toy(Source):
    """A Gaussian mixture in the plane, for tests against its closed form.

        x ~ sum_k w_k N(m_k, std^2 I),    x of shape (2, 1, 1), in its own units: not brought to [-1, 1]

    The label is the component k. The test split is as large, from a seed of its own.

    Args:
        n: Number of points in each split.
        seed: Seed of the points.
        label: Provenance, for tables and plots.
    """

    means = ((-2.0, -2.0), (2.0, -2.0), (0.0, 2.5))
    weights = (0.2, 0.3, 0.5)
    std = 0.3

    def __init__(self, n: int = 10_000, seed: int = 0, label: str | None = None) -> None:
        self.n, self.seed = n, seed
        self.label = label or "toy mixture"

    def split(self, name: Split) -> ArrayImages:
        """Draw a split.

        Raises:
            UsageError: No points asked for.
        """
        if self.n < 1 or self.seed < 0:
            raise UsageError(f"source 'toy': n={self.n}, seed={self.seed}: give n of 1 or more and a seed of 0 or more")
        rng = np.random.default_rng((self.seed, name == "test"))
        components = rng.choice(len(self.weights), size=self.n, p=self.weights)
        points = np.array(self.means)[components] + self.std * rng.standard_normal((self.n, 2))
        images = torch.from_numpy(points).float()[:, :, None, None]
        return ArrayImages(images, torch.from_numpy(components), classes=len(self.weights))
