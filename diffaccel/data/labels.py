"""Class labels of image files, from a ``dataset.json`` or else from the folders of the files.

``dataset.json`` has the format of EDM and StyleGAN, ``{"labels": [[name, integer], ...]}`` or ``{"labels": null}``,
with names relative to the folder of ``dataset.json``. Otherwise, the class of an image is its first-level folder;
classes are numbered in sorted order of the training folders. A common parent folder of all folders is ignored. A single
folder gives no labels.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffaccel.data.decode import UNREADABLE, listed
from diffaccel.data.places import LABELS_FILE, Files
from diffaccel.errors import UsageError
from diffaccel.text.escape import printable

MAX_CLASSES = 1_000_000
NO_LABELS = "set labels: false"


class Labels(NamedTuple):
    """Labels of one split.

    Attributes:
        labels: Labels in the order of the files' names, (N,) int64, or None.
        classes: Number of classes; 0 without labels.
        notes: Notes for the user.
    """

    labels: Tensor | None
    classes: int
    notes: list[str]


def read_labels(files: Files, train: Files) -> Labels:
    """Read the labels of a split.

    Args:
        files: Files of the split.
        train: Files of the training split, whose folders determine the class numbers; may be ``files``.

    Raises:
        UsageError: The labels don't fit the images or the training split.
    """
    if (files.labels_file is None) != (train.labels_file is None):
        has, lacks = (files, train) if files.labels_file else (train, files)
        raise UsageError(
            f"{printable(has.path)} has a {LABELS_FILE}, {printable(lacks.path)} has none: add one to both, "
            f"or {NO_LABELS}"
        )
    if files.labels_file is not None:
        return _from_json(files, files.labels_file)
    folders = _folders(train)
    classes = sorted(set(folders))
    if len(classes) < 2:
        return Labels(None, 0, [f"all images are in the folder {folder}: no labels" for folder in classes])
    if files is not train:
        folders = _folders(files, classes)
    numbers = {folder: k for k, folder in enumerate(classes)}
    if unknown := sorted(set(folders) - set(classes)):
        raise UsageError(
            f"{printable(files.path)} has subfolders that {printable(train.path)} lacks ({listed(unknown)}): "
            f"use the same names of classes, or {NO_LABELS}"
        )
    return Labels(torch.tensor([numbers[folder] for folder in folders]) if folders else None, len(classes), [])


def _folders(files: Files, known: Sequence[str] = ()) -> list[str]:
    """Class folder of each image, or an empty list if there are no class folders."""
    names = files.names
    while True:
        folders = [name.partition("/")[0] for name in names if "/" in name]
        if folders and len(folders) < len(names):
            stray = printable(next(name for name in names if "/" not in name))
            raise UsageError(
                f"{printable(files.path)}: {stray} is not in a subfolder of a class, other images are: move it, or "
                f"{NO_LABELS}"
            )
        wraps = len(set(folders)) == 1 and folders[0] not in known and all(name.count("/") > 1 for name in names)
        if not wraps:
            return folders
        names = [name.partition("/")[2] for name in names]


def _from_json(files: Files, file: str) -> Labels:
    where = f"{printable(files.path)}: {printable(file)}"
    remedy = f'write {{"labels": [[name, integer], ...]}} or {{"labels": null}}, or {NO_LABELS}'
    most = 2**20 + 1000 * len(files.names)  # bytes; valid entries take much less than 1000 each
    try:
        with files.open(file) as stream:
            content = stream.read(most + 1)
        if len(content) > most:
            raise ValueError(f"more than {most} bytes for {len(files.names)} images")
        pairs: Any = json.loads(content)["labels"]
        if pairs is None:
            return Labels(None, 0, [])
        pairs = [(name.replace("\\", "/"), label) for name, label in (pairs.items() if type(pairs) is dict else pairs)]
    except UNREADABLE as error:
        raise UsageError(f"{where} can't be read ({type(error).__name__}: {printable(str(error))}): {remedy}") from None
    found: dict[str, Any] = {}
    for name, label in pairs:
        if found.setdefault(name, label) != label:
            raise UsageError(f"{where} gives {printable(name)} the labels {found[name]} and {label}: {remedy}")
    return _in_order(files, file.rpartition("/")[0], found, where, remedy)


def _in_order(files: Files, folder: str, found: dict[str, Any], where: str, remedy: str) -> Labels:
    """Labels in the order of the images, by names relative to the folder of ``dataset.json`` or to the whole place."""
    prefix = f"{folder}/" if folder else ""
    short = [name.removeprefix(prefix) for name in files.names]
    keys = [key if key in found else name for key, name in zip(short, files.names, strict=True)]
    if lacking := [key for key in keys if key not in found]:
        raise UsageError(f"{where} gives {len(lacking)} of {len(keys)} images no label ({listed(lacking)}): {remedy}")
    for key in keys:
        if type(found[key]) is not int or not 0 <= found[key] < MAX_CLASSES:
            label = printable(f"{found[key]!r:.100}")
            raise UsageError(f"{where} gives {printable(key)} the label {label}, which is not a class number: {remedy}")
    labels = torch.tensor([found[key] for key in keys])
    extra = sorted(found.keys() - set(keys))
    notes = [f"{len(extra)} labels of {LABELS_FILE} have no image ({listed(extra, 3)})"] if extra else []
    return Labels(labels, int(labels.max()) + 1, notes)
