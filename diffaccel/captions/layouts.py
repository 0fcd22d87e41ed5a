"""Captions of the images of a split: generated from labels, or read from text files, COCO's JSON, or the data.

Text files and JSON are paired with images by the names of the files, with folders and without suffixes: the captions
of ``001.Albatross/a.jpg`` are those of ``001.Albatross/a.txt``, as in CUB's ``text_c10``. One name may lack leading
folders of the other, as for ``a.txt``, or for an image ``train/001.Albatross/a.jpg``, if that leaves a single pair.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffaccel.data.decode import UNREADABLE, listed
from diffaccel.data.source import Images
from diffaccel.errors import UsageError
from diffaccel.text.escape import printable

MAX_BYTES = 2**20
"""Size of a text file of captions; larger ones are no captions."""
COCO = "captions_*.json"
"""Names of the files of COCO's captions."""

Captions = list[tuple[str, ...]]
"""One or more captions of each image."""


def generated(images: Images, templates: Sequence[str], names: Sequence[str], label: str) -> Captions:
    """Generate captions from class labels: each template with the name of the class in place of ``{label}``.

    Args:
        images: Images with labels.
        templates: Sentences with ``{label}``.
        names: Name of each class; empty for their numbers.
        label: Name of the data, for messages.

    Raises:
        UsageError: There are no labels, or more classes than names.
    """
    if images.labels is None:
        raise UsageError(f"condition.templates: the images of {label} have no labels: set condition.path= to captions")
    names = names or [str(number) for number in range(images.classes)]
    if images.classes > len(names):
        raise UsageError(
            f"condition.names: {label} has {images.classes} classes, but there are {len(names)} names: name every class"
        )
    sentences = [tuple(template.replace("{label}", name) for template in templates) for name in names]
    return [sentences[number] for number in images.labels.tolist()]


def read_captions(images: Images, path: Path | None, label: str) -> Captions:
    """Read the captions of a split.

    Args:
        images: Images.
        path: Folder of text files, one caption a line; folder with COCO's ``captions_*.json``, or one such file; None
            for the captions of the data themselves: the array ``captions`` of an npz file, or text files beside the
            images.
        label: Name of the data, for messages.

    Raises:
        UsageError: Captions are missing or can't be read, or are paired by name with images without file names.
    """
    if path is None and images.captions is not None:
        return list(images.captions)
    names = getattr(images, "names", None)
    if names is None:
        what = "no captions" if path is None else "no file names, by which captions are paired with images"
        raise UsageError(
            f"condition 'captions': the images of {label} have {what}: save an array 'captions' in the npz file of the "
            "images, or set condition.templates= to sentences about the classes"
        )
    if path is None:
        return _each(names, lambda stem: _beside(images, stem), f"the images of {label}")
    where = printable(str(path))
    if Path(path).is_dir():
        files = sorted(Path(path).glob(COCO))
        found = _from_coco(files) if files else _text_files(Path(path))
    elif Path(path).is_file():
        found = _from_coco([Path(path)])
    else:
        raise UsageError(
            f"condition 'captions': there is no {where}: set condition.path= to a folder of .txt files, or to COCO's "
            f"{COCO}"
        )
    pairs = _pairs([os.path.splitext(name)[0] for name in names], found)

    def read(stem: str) -> tuple[str, ...] | None:
        value = found[pairs[stem]] if stem in pairs else None
        return value() if callable(value) else value

    return _each(names, read, where)


def _each(names: Sequence[str], read: Callable[[str], tuple[str, ...] | None], where: str) -> Captions:
    """Read the captions of each image by the name of its file.

    Raises:
        UsageError: Some images have no captions.
    """
    found = [read(os.path.splitext(name)[0]) for name in names]
    missing = [name for name, captions in zip(names, found, strict=True) if not captions]
    if missing:
        raise UsageError(
            f"condition 'captions': {where}: {len(missing)} of {len(names)} images have no caption "
            f"({listed(missing)}): add them, one caption a line, or remove the images"
        )
    return [captions for captions in found if captions]


def _pairs(images: Sequence[str], texts: Mapping[str, Any]) -> dict[str, str]:
    """Pair names of images with names of texts, both without suffixes.

    The names of a pair are equal, or one is the other without leading folders. Of the latter, a name in several pairs
    is in none.
    """
    last: dict[str, list[str]] = {}
    for text in texts:
        last.setdefault(text.rpartition("/")[2], []).append(text)
    pairs, shortened = {}, dict[str, str]()
    for image in images:
        if image in texts:
            pairs[image] = image
            continue
        own = [text for text in last.get(image.rpartition("/")[2], []) if _ends(image, text) or _ends(text, image)]
        if len(own) == 1:
            shortened[image] = own[0]
    used = Counter([*pairs.values(), *shortened.values()])
    return pairs | {image: text for image, text in shortened.items() if used[text] == 1}


def _ends(name: str, end: str) -> bool:
    """Whether a name ends in another one, by whole folders."""
    return name.endswith(f"/{end}")


def _text_files(folder: Path) -> dict[str, Callable[[], tuple[str, ...] | None]]:
    """Return functions that read the captions of each text file, by its name relative to the folder."""
    found: dict[str, Callable[[], tuple[str, ...] | None]] = {}
    for file in sorted(folder.rglob("*.txt")):
        stem = file.relative_to(folder).with_suffix("").as_posix()
        found[stem] = lambda file=file: _lines(_content(file), str(file))  # type: ignore[misc]
    return found


def _content(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{printable(str(file))} can't be read ({error.strerror}): check its permissions") from None


def _beside(images: Any, stem: str) -> tuple[str, ...] | None:
    """Read the text file beside an image, in a folder or an archive; None if there is none."""
    try:
        with images.files.open(f"{stem}.txt") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (*UNREADABLE, LookupError):
        return None
    return _lines(content, f"{stem}.txt")


def _lines(content: bytes, name: str) -> tuple[str, ...]:
    """Split a text into captions, one a line, without empty lines.

    Raises:
        UsageError: The text is too large, or not UTF-8.
    """
    if len(content) > MAX_BYTES:
        raise UsageError(f"{printable(name)} has more than {MAX_BYTES} bytes, which are no captions: check the file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{printable(name)} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _from_coco(files: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Read COCO's captions of images by name, ``images`` (id, file_name) and ``annotations`` (image_id, caption).

    References:
        Microsoft COCO Captions (Chen et al., 2015), https://arxiv.org/abs/1504.00325

    Raises:
        UsageError: A file is damaged, or has another layout.
    """
    found: dict[str, list[str]] = {}
    for file in files:
        try:
            content = json.loads(file.read_bytes())
            stems = {image["id"]: os.path.splitext(image["file_name"])[0] for image in content["images"]}
            for one in content["annotations"]:
                if caption := " ".join(one["caption"].split()):
                    found.setdefault(stems[one["image_id"]], []).append(caption)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{printable(str(file))} can't be read as COCO's captions ({type(error).__name__}: "
                f"{printable(str(error)):.100}): it must have 'images' (id, file_name) and 'annotations' (image_id, "
                "caption)"
            ) from None
    return {stem: tuple(captions) for stem, captions in found.items()}
