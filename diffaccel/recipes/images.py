"""What the experiments for new images depend on: shape, numbers of images, classes, standard deviation, copies."""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffaccel.data.files import MixedSizes
from diffaccel.data.given import kind_of
from diffaccel.data.held_out import digest_of_array
from diffaccel.data.source import SOURCES, Images, Source, build_source
from diffaccel.errors import UsageError
from diffaccel.text.escape import printable
from diffaccel.text.terminal import track

BATCH = 250
SHOW_PROGRESS_FROM = 20_000  # images
SPLIT_FOLDERS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
"""Names of folders that are splits and not classes."""


@dataclass(frozen=True)
class Facts:
    """What is known of the images.

    Attributes:
        data: Source of the images, as an experiment's ``data``.
        shape: Image shape (C, H, W).
        train: Number of training images.
        test: Number of held-out images.
        classes: Number of classes; 0 without labels.
        std: Standard deviation of the training pixels, in units of [-1, 1].
        copies: Number of images with the pixels of an earlier image, in either split.
        shared: Number of held-out images with the pixels of a training image.
        sha256: Hash of the pixels of both splits, whatever the order of the images.
    """

    data: dict[str, Any]
    shape: tuple[int, int, int]
    train: int
    test: int
    classes: int
    std: float
    copies: int
    shared: int
    sha256: str

    def resized_to(self, size: int) -> str:
        """Say how to get the images in a height and width: by ``size=``, or, of an npz file, before they are saved."""
        if "image_size" in SOURCES.keys_of(self.data["name"]):
            return f"set size={size} to resize them"
        return f"save them in {size}x{size} pixels, because the images of an {self.data['name']} file are not resized"

    def describe(self) -> list[str]:
        """Describe the images in a few lines."""
        channels, height, width = self.shape
        colour = "in colour" if channels == 3 else "in grey"
        classes = f", {self.classes} classes (not used: the networks are unconditional)" if self.classes else ""
        lines = [
            f"{self.train + self.test:,} images of {width}x{height} pixels {colour}{classes}: {self.train:,} for "
            f"training, {self.test:,} held out"
        ]
        if self.copies:
            lines.append(f"{self.copies:,} images have the same pixels as another image")
        if self.shared:
            lines.append(
                f"{self.shared:,} held-out images have the same pixels as a training image: remove them, or the floor "
                "and the memorisation are too low"
            )
        return lines


def source_of(
    images: str,
    test: str | None = None,
    size: int | None = None,
    share: float = 0.1,
    labels: bool = True,
    label: str | None = None,
) -> dict[str, Any]:
    """Return the source of images at a path, as an experiment's ``data``.

    Args:
        images: Folder, zip archive or npz file.
        test: Place of held-out images, of the same kind; None to hold out a share.
        size: Height and width to resize the central square to; None to keep the images.
        share: Share of the images that is held out.
        labels: Whether to read labels.
        label: Name of the data in tables; by default that of the file or folder.

    Raises:
        UsageError: The path has no images, or can't be resized.
    """
    path = os.path.abspath(os.path.expanduser(images))
    node: dict[str, Any] = {"name": kind_of(path), "path": path}
    if size is not None:
        if "image_size" not in SOURCES.keys_of(node["name"]):
            raise UsageError(f"size={size}: the images of an {node['name']} file are not resized: leave out size=")
        node["image_size"] = size
    if test is None:
        node["test_share"] = share
    else:
        node["test_path"] = os.path.abspath(os.path.expanduser(test))
        if (kind := kind_of(node["test_path"])) != node["name"]:
            raise UsageError(f"test={test} is of the kind {kind}, images={images} of the kind {node['name']}: use one")
    if not labels and "labels" in SOURCES.keys_of(node["name"]):
        node["labels"] = False
    return {**node, "label": label or Path(path).stem}


def inspect(data: dict[str, Any]) -> Facts:
    """Read all images of a source.

    Raises:
        UsageError: Some images can't be used, they have several sizes, or there are too few or no different ones.
    """
    _check_folders(data)
    source: Source = build_source(data)
    try:
        train, test = source.split("train"), source.split("test")
        train.check()
        test.check()
    except MixedSizes as error:
        raise UsageError(f"{error} (with size=, as in size=32)") from None
    if train.shape != test.shape:
        raise UsageError(f"the held-out images are {test.shape}, the training images {train.shape}: use one size")
    if min(len(train), len(test)) < 2:
        raise UsageError(
            f"{printable(data['label'])}: {len(train)} training and {len(test)} held-out images are too few: add "
            "images, or set test_share="
        )
    (seen, first, second), (held_out, _, _) = _read(train, data["label"]), _read(test, data["label"])
    std = (second / len(train) - (first / len(train)) ** 2) ** 0.5
    if not std > 0:
        raise UsageError(f"{printable(data['label'])}: all pixels of the training images are equal: use other images")
    both = seen + held_out
    content = hashlib.sha256(repr([sorted(seen.elements()), sorted(held_out.elements())]).encode()).hexdigest()
    return Facts(
        data,
        train.shape,
        len(train),
        len(test),
        train.classes,
        std,
        copies=sum(both.values()) - len(both),
        shared=sum(count for digest, count in held_out.items() if digest in seen),
        sha256=content,
    )


def _check_folders(data: dict[str, Any]) -> None:
    """Check that the folders of a data set are not its splits, which would be read as classes."""
    path = Path(data["path"])
    folders = {entry.name.lower(): entry for entry in path.iterdir() if entry.is_dir()} if path.is_dir() else {}
    if "test_path" not in data and len(folders) > 1 and folders.keys() <= SPLIT_FOLDERS:
        tests = [entry.name for name, entry in folders.items() if not name.startswith("train")]
        raise UsageError(
            f"{path} contains the folders {', '.join(sorted(entry.name for entry in folders.values()))}, which are "
            f"splits and not classes: set images={path / 'train'} test={path / tests[0]}, say"
        )


def _read(images: Images, label: str) -> tuple[Counter[int], float, float]:
    """Return the hashes of the pixels, and the sums over images of the means of pixels and squared pixels."""
    digests, first, second = Counter[int](), 0.0, 0.0
    starts = range(0, len(images), BATCH)
    for start in track(starts, f"reading {label}", len(starts), shown=len(images) >= SHOW_PROGRESS_FROM):
        pixels = images.read(torch.arange(start, min(start + BATCH, len(images))))
        digests.update(digest_of_array(one) for one in pixels.permute(0, 2, 3, 1).numpy())
        values = pixels.double().flatten(1) / 127.5 - 1
        first += float(values.mean(1).sum())
        second += float(values.square().mean(1).sum())
    return digests, first, second
