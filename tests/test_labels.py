"""Labels of image files are read wherever they are written, or their absence is said."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stored import CLASSES, LABELS, RGB, N, data, save_folder, save_npz

from diffaccel.data import DataModule
from diffaccel.data.labels import MAX_CLASSES
from diffaccel.data.module import check_labels
from diffaccel.errors import UsageError


def save(path: Path, names: list[str], labels: Any = None, labels_file: str = "dataset.json") -> Path:
    """Write images by these names, in an archive or a folder by the path's suffix, and labels beside them."""
    files = path.parent / f"{path.name}.files" if path.suffix == ".zip" else path
    for i, name in enumerate(names):
        target = files / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB[i]).save(target)
    if labels is not None:
        (files / labels_file).write_text(labels if isinstance(labels, str) else json.dumps(labels))
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files.rglob("*.*"):
                archive.write(file, file.relative_to(files))
    return path


def opened(path: Path, **keys: Any) -> DataModule:
    return data("zip" if path.suffix == ".zip" else "folder", path=str(path), **keys)


def labels_of(module: DataModule, split: str = "train") -> list[int] | None:
    labels = module.images(split).labels
    return None if labels is None else labels.tolist()


KINDS = pytest.mark.parametrize("place", ["images.zip", "images"])


@KINDS
def test_labels_one_folder_down(tmp_path: Path, place: str) -> None:
    """Names are relative to the folder of dataset.json; EDM's own folders 00000, 00001 are no classes."""
    names = [f"ds/0000{i}/img.png" for i in range(4)]
    relative = {"labels": [[name[3:], i % 2] for i, name in enumerate(names)]}
    module = opened(save(tmp_path / place, names, relative, "ds/dataset.json"))
    assert (labels_of(module), module.classes) == ([0, 1, 0, 1], 2)


@KINDS
def test_null_labels_are_none_though_there_are_folders(tmp_path: Path, place: str) -> None:
    module = opened(save(tmp_path / place, ["00000/a.png", "00001/b.png"], {"labels": None}))
    assert (labels_of(module), module.classes) == (None, 0)


@KINDS
def test_class_folders(tmp_path: Path, place: str) -> None:
    """First-level folders, sorted as folders are and not as paths; a folder around all of them is left out."""
    module = opened(save(tmp_path / place, ["ds/cat-2/deep/a.png", "ds/cat/b.png", "ds/dog/c.png"]))
    assert module.images("train").files.names == ["ds/cat-2/deep/a.png", "ds/cat/b.png", "ds/dog/c.png"]  # type: ignore
    assert (labels_of(module), module.classes) == ([1, 0, 2], 3)


@KINDS
def test_one_folder_is_no_class(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = opened(save(tmp_path / place, ["all/a.png", "all/b.png"]))
    assert (labels_of(module), module.classes) == (None, 0)
    assert "all images are in the folder all: no labels" in capsys.readouterr().err


def test_a_test_split_with_one_class_has_the_training_number(tmp_path: Path) -> None:
    train = save(tmp_path / "train.zip", ["a/0.png", "b/0.png"])
    test = save(tmp_path / "test.zip", ["b/deep/0.png", "b/deep/1.png"])
    assert labels_of(opened(train, test_path=str(test)), "test") == [1, 1]


def test_splits_with_and_without_a_labels_file(tmp_path: Path) -> None:
    with_file = save(tmp_path / "with.zip", ["a/0.png", "b/0.png"], {"labels": [["a/0.png", 1], ["b/0.png", 0]]})
    without = save(tmp_path / "without.zip", ["a/0.png", "b/0.png"])
    for train, test in ((with_file, without), (without, with_file)):
        with pytest.raises(UsageError, match="with.zip has a dataset.json, .*without.zip has none"):
            opened(train, test_path=str(test)).images("test")


@pytest.mark.parametrize(
    "labels",
    [
        {"labels": {"a.png": 1, "b.png": 0}},
        '\ufeff{"labels": [["a.png", 1], ["b.png", 0]]}',
        {"labels": [["a.png", 1], ["b.png", 0], ["a.png", 1]]},
    ],
    ids=["mapping", "byte order mark", "twice the same"],
)
def test_labels_as_people_write_them(tmp_path: Path, labels: Any) -> None:
    assert labels_of(opened(save(tmp_path / "a.zip", ["a.png", "b.png"], labels))) == [1, 0]


def test_backslashes_in_labels(tmp_path: Path) -> None:
    labels = {"labels": [["x\\a.png", 1], ["x\\b.png", 0]]}
    assert labels_of(opened(save(tmp_path / "a.zip", ["x/a.png", "x/b.png"], labels))) == [1, 0]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ('{"labels": ' + "[" * 100_000, "can't be read .RecursionError"),
        ('{"labels": null, "more": "' + "a" * (2**20 + 2001) + '"}', "more than 1050576 bytes for 2 images"),
        ("[1, 2]", "can't be read"),
        ("{}", "can't be read"),
        ({"labels": [[["a.png"], 1]]}, "can't be read"),
        ({"labels": [["a.png", 1]]}, "gives 1 of 2 images no label .b.png"),
        ({"labels": [["a.png", 1], ["b.png", 1.0]]}, "gives b.png the label 1.0, which is not a class number"),
        ({"labels": [["a.png", 1], ["b.png", "1"]]}, "gives b.png the label '1'"),
        ({"labels": [["a.png", 1], ["b.png", True]]}, "gives b.png the label True"),
        ({"labels": [["a.png", 1], ["b.png", 10**30]]}, "gives b.png the label 10{30}"),
        ({"labels": [["a.png", 1], ["b.png", MAX_CLASSES]]}, "gives b.png the label"),
        ({"labels": [["a.png", 1], ["a.png", 0], ["b.png", 0]]}, "gives a.png the labels 1 and 0"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path: Path, labels: Any, words: str) -> None:
    path = save(tmp_path / "a.zip", ["a.png", "b.png"], labels)
    with pytest.raises(UsageError, match=words) as caught:
        opened(path).setup("fit")
    assert "labels: false" in str(caught.value)
    assert len(str(caught.value)) < 500
    opened(path, labels=False).setup("fit")


def test_labels_of_images_that_are_not_there_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"labels": [["a.png", 1], ["b.png", 0], ["gone.png", 3]]}
    opened(save(tmp_path / "a.zip", ["a.png", "b.png"], labels)).setup("fit")
    assert "1 labels of dataset.json have no image (gone.png)" in capsys.readouterr().err


def test_a_network_and_the_labels_of_its_data(tmp_path: Path, npz: str, capsys: pytest.CaptureFixture[str]) -> None:
    labelled, bare = data("npz", path=npz), data("npz", path=save_npz(tmp_path / "bare.npz", images=RGB))
    for module, classes in ((labelled, 0), (bare, 0), (labelled, CLASSES)):
        check_labels(module, classes)
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="bare.npz: the images have no labels, the network has 10 classes"):
        check_labels(bare, 10)
    with pytest.raises(UsageError, match="labels have 3 classes, the network 2: set network.classes=3"):
        check_labels(labelled, 2)
    check_labels(labelled, 10)
    assert "the labels have 3 classes, the network 10" in capsys.readouterr().err


def test_a_limit_keeps_labels_and_classes(tmp_path: Path) -> None:
    module = data("folder", path=save_folder(tmp_path / "images"), module={"limit": N - 1})
    assert (labels_of(module), module.classes) == (LABELS[:-1].tolist(), CLASSES)
