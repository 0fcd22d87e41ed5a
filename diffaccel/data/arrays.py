"""Sources in memory: digits, npz arrays, CIFAR-10, toy points."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.data import held_out, npz
from diffaccel.data.decode import listed
from diffaccel.data.labels import MAX_CLASSES
from diffaccel.data.source import SOURCES, ArrayImages, Source, Split, path_of
from diffaccel.errors import UsageError
from diffaccel.parts.optional import extra


def channels_first(images: np.ndarray[Any, Any]) -> Tensor:
    """(N, H, W) or (N, H, W, C) uint8 -> (N, C, H, W)."""
    if images.ndim == 3:
        images = images[..., None]
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@SOURCES.register("digits")
class Digits(Source):
    """Scikit-learn's 8x8 digits, rescaled from 0..16 to 0..255. Every fifth image is in the test split (360 of 1797).

    Args:
        label: Provenance, for tables and plots.
    """

    discrete, fixed_shape = True, (1, 8, 8)

    def __init__(self, label: str | None = None) -> None:
        self.label = label or "digits 8x8"

    @override
    def split(self, name: Split) -> ArrayImages:
        """Open a split.

        Raises:
            UsageError: scikit-learn, which contains the images, is not installed.
        """
        with extra("sklearn", needed_by="source 'digits'"):  # imported late: it takes a second
            from sklearn.datasets import load_digits

        digits = load_digits()
        chosen = (np.arange(len(digits.images)) % 5 == 0) == (name == "test")
        images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        return ArrayImages(channels_first(images), torch.from_numpy(digits.target[chosen]), classes=10)


@SOURCES.register("npz")
class Npz(Source):
    """Arrays of an npz file: ``images`` uint8 (N, H, W) or (N, H, W, C), and optionally ``labels`` (N,) integers.

    Without these names, ``arr_0`` and ``arr_1`` are read instead, which are the names in ADM's samples. The number of
    classes is the length of an optional array ``classes`` (of names), otherwise the largest training label plus 1. An
    optional array ``captions`` has one or more captions of each image, (N,) or (N, K) text.

    Args:
        path: File of the training images.
        test_path: File of the test images; None for no test split.
        test_share: Expected share of the images of ``path`` that are the test split, chosen by the hash of their
            pixels; None for no such split. No image is in both splits, copies included.
        label: Provenance, for tables and plots; the file's name by default.

    Raises:
        UsageError: ``test_share`` is not between 0 and 1, or ``test_path`` is set too.
    """

    discrete = True

    def __init__(
        self,
        path: Path,
        test_path: Path | None = None,
        test_share: float | None = None,
        label: str | None = None,
    ) -> None:
        held_out.check_share(test_share, test_path)
        self.test_share = test_share
        self.path, self.test_path = str(path), None if test_path is None else str(test_path)
        self.label = label or os.path.basename(path)

    @override
    def split(self, name: Split) -> ArrayImages:
        """Open a split.

        Raises:
            UsageError: The file is missing or damaged, or has arrays of the wrong name, type or shape.
        """
        share = self.test_share
        file = npz.ArrayFile(self.path if share is not None else path_of(name, self.path, self.test_path))
        image_key, label_key = _keys(file)
        images = _checked_images(file, image_key)
        classes = _classes(file) if label_key else None
        labels = _checked_labels(file, label_key, len(images), classes) if label_key else None
        captions = _captions(file, len(images)) if "captions" in file.names else None
        read = {"images", "arr_0", "captions"} | ({label_key, "classes"} if label_key else set())  # arr_0 may repeat
        notes = file.unread(read)
        if share is None:
            return ArrayImages(channels_first(images), labels, classes, notes, captions)
        if labels is not None and classes is None:
            classes = int(labels.max()) + 1  # of all images
        own = held_out.chosen([held_out.digest_of_array(image) for image in images], share, name, self.path)
        notes = [*notes, held_out.note(len(images), len(images) - len(own))] if name == "train" else []
        chosen = None if captions is None else [captions[index] for index in own.tolist()]
        labels = None if labels is None else labels[own]
        return ArrayImages(channels_first(images[own.numpy()]), labels, classes, notes, chosen)


def _keys(file: npz.ArrayFile) -> tuple[str, str | None]:
    """Names of the array of images, and of the array of labels or None."""
    for images, labels in (("images", "labels"), ("arr_0", "arr_1")):
        if images in file.names:
            return images, labels if labels in file.names else None
    for statistics in (("mu", "sigma"), ("mean", "covariance")):
        if set(statistics) <= set(file.names):
            raise UsageError(
                f"{file.where} contains statistics of images ({' and '.join(statistics)}) and no images: use an npz "
                f"with an array 'images', uint8 (N, H, W, C)"
            )
    raise UsageError(
        f"{file.where} has no array 'images' or 'arr_0', only {listed(file.names) or 'nothing'}: save the images as "
        f"'images', uint8 (N, H, W, C)"
    )


def _checked_images(file: npz.ArrayFile, key: str) -> np.ndarray[Any, Any]:
    images = file.read(key)
    if images.dtype != np.uint8:
        raise UsageError(
            f"{file.where}: '{key}' is {images.dtype}{_range(images)}: save uint8, 0 to 255{_recipe(images)}"
        )
    shape = images.shape
    remedy = "save (N, H, W) or (N, H, W, C), C = 1 or 3, and no size of 0"
    if images.ndim == 4 and shape[-1] not in (1, 3) and shape[1] in (1, 3):
        remedy = "save images.transpose(0, 2, 3, 1), with channels last, (N, H, W, C)"
    elif images.ndim == 3 and shape[-1] == 3:
        remedy = "save a single RGB image as (1, H, W, 3), and images as (N, H, W) or (N, H, W, C)"
    elif images.ndim in (3, 4) and (images.ndim == 3 or shape[-1] in (1, 3)) and images.size > 0:
        return images
    raise UsageError(f"{file.where}: '{key}' has shape {shape}: {remedy}")


def _range(images: np.ndarray[Any, Any]) -> str:
    if images.size == 0 or images.dtype.kind not in "fiu":
        return ""
    return f" from {images.min():.4g} to {images.max():.4g}"


def _recipe(images: np.ndarray[Any, Any]) -> str:
    """Expression that converts numbers in [0, 1] or [-1, 1] to uint8, for the message."""
    if images.size == 0 or images.dtype.kind != "f" or not -1 <= images.min() <= images.max() <= 1:
        return ""
    scaled = "255 * images" if images.min() >= 0 else "127.5 * images + 127.5"
    return f", ({scaled}).round().astype('uint8')"


def _classes(file: npz.ArrayFile) -> int | None:
    if "classes" not in file.names:
        return None
    classes = file.read("classes")
    if classes.ndim != 1 or len(classes) > MAX_CLASSES:
        raise UsageError(f"{file.where}: 'classes' has shape {classes.shape}: save one name per class, or omit it")
    return len(classes)


def _captions(file: npz.ArrayFile, n: int) -> list[tuple[str, ...]]:
    captions = file.read("captions")
    if captions.dtype.kind != "U" or captions.ndim not in (1, 2) or len(captions) != n:
        raise UsageError(
            f"{file.where}: 'captions' is {captions.dtype} {captions.shape}: save text, ({n},) or ({n}, K), "
            "which np.array makes of a list of texts"
        )
    rows = captions.reshape(n, -1).tolist()
    found = [tuple(text.strip() for text in row if text.strip()) for row in rows]  # shorter rows end in empty texts
    if empty := [index for index, row in enumerate(found) if not row]:
        raise UsageError(f"{file.where}: {len(empty)} images, the first is {empty[0]}, have no caption: add them")
    return found


def _checked_labels(file: npz.ArrayFile, key: str, n: int, classes: int | None) -> Tensor:
    labels = file.read(key)
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"{file.where}: '{key}' is {labels.dtype} {labels.shape}: save one integer per image, ({n},)")
    least, largest = int(labels.min()), int(labels.max())
    if least < 0 or largest >= MAX_CLASSES:
        raise UsageError(
            f"{file.where}: '{key}' has the value {least if least < 0 else largest}: number the classes from 0"
        )
    if classes is not None and largest >= classes:
        raise UsageError(
            f"{file.where}: '{key}' goes to {largest}, 'classes' names {classes}: number classes from 0, or name all"
        )
    return torch.from_numpy(labels.astype(np.int64))


@SOURCES.register("cifar10")
class Cifar10(Source):
    """CIFAR-10 in torchvision's format: 50,000 training and 10,000 test images.

    Args:
        root: Folder that contains ``cifar-10-batches-py``.
        download: Whether to download missing files.
        label: Provenance, for tables and plots.

    References:
        Learning Multiple Layers of Features from Tiny Images (Krizhevsky, 2009)
    """

    discrete, fixed_shape = True, (3, 32, 32)

    def __init__(self, root: Path, download: bool = False, label: str | None = None) -> None:
        self.root, self.download = str(root), download
        self.label = label or "CIFAR-10"

    @override
    def split(self, name: Split) -> ArrayImages:
        """Open a split.

        Raises:
            UsageError: The data set is missing or incomplete, or can't be downloaded, or torchvision is not installed.
        """
        with extra("vision", needed_by="source 'cifar10'"):  # imported here, because it takes a second
            from torchvision.datasets import CIFAR10

        # torchvision unpickles the files, but only after checking their MD5 sums.
        try:
            data = CIFAR10(self.root, train=name == "train", download=self.download)
        except (RuntimeError, OSError) as error:
            remedy = "check the connection" if self.download else "set data.download=true"
            raise UsageError(
                f"no complete CIFAR-10 under {self.root} ({error}): {remedy}, or use the source npz"
            ) from None
        return ArrayImages(channels_first(data.data), torch.tensor(data.targets), classes=10)


@SOURCES.register("toy")
class Toy(Source):
    """Gaussian mixture in the plane, for tests against the closed form.

        x ~ sum_k w_k N(m_k, std^2 I),    x of shape (2, 1, 1), in its own units, not in [-1, 1]

    The label is the component k. The test split has the same size and another seed.

    Args:
        n: Number of points in each split.
        seed: Seed of the points.
        label: Provenance, for tables and plots.
    """

    discrete = False

    means = ((-2.0, -2.0), (2.0, -2.0), (0.0, 2.5))
    weights = (0.2, 0.3, 0.5)
    std = 0.3

    def __init__(self, n: int = 10_000, seed: int = 0, label: str | None = None) -> None:
        self.n, self.seed = n, seed
        self.label = label or "toy mixture"

    @override
    def split(self, name: Split) -> ArrayImages:
        """Draw a split.

        Raises:
            UsageError: ``n`` is less than 1, or ``seed`` is negative.
        """
        if self.n < 1 or self.seed < 0:
            raise UsageError(f"source 'toy': n={self.n}, seed={self.seed}: set n to 1 or more and seed to 0 or more")
        rng = np.random.default_rng((self.seed, name == "test"))
        components = rng.choice(len(self.weights), size=self.n, p=self.weights)
        points = np.array(self.means)[components] + self.std * rng.standard_normal((self.n, 2))
        images = torch.from_numpy(points).float()[:, :, None, None]
        return ArrayImages(images, torch.from_numpy(components), classes=len(self.weights))
