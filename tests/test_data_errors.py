"""The data module answers bad data with one clear error."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stored import LABELS, RGB, SIDE, N, data, image_name, save_folder, save_npz, save_zip, training, whole

from diffaccel.data import DataModule
from diffaccel.errors import UsageError


def refuses(module: DataModule, *words: str) -> None:
    """One error, of one line, that says all of ``words``."""
    with pytest.raises(UsageError) as caught:
        module.setup("fit")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


GOOD = {"images": RGB, "labels": LABELS}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pixels": RGB}, ["no array 'images'"]),
        ({"images": RGB / 255}, ["float64", "save uint8"]),
        ({"images": RGB[0, 0]}, ["(6, 3)", "(N, H, W)"]),
        ({"images": RGB.transpose(0, 3, 1, 2)}, ["(12, 3, 6, 6)", "(N, H, W, C)"]),
        ({"images": RGB[:0]}, ["(0, 6, 6, 3)", "no size of 0"]),
        ({**GOOD, "labels": LABELS[1:]}, ["'labels'", "(11,)", "(12,)"]),
        ({**GOOD, "labels": LABELS / 2}, ["'labels'", "float64", "integer"]),
        ({**GOOD, "labels": LABELS - 1}, ["-1", "from 0"]),
        ({**GOOD, "classes": np.array(["a", "b"])}, ["goes to 2", "names 2"]),
        ({**GOOD, "classes": np.array("abc")}, ["'classes'", "one name per class"]),
        ({"images": np.array([None, "object"])}, ["'images' contains Python objects"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_npz_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], words: list[str]) -> None:
    refuses(data("npz", path=save_npz(tmp_path / "bad.npz", **arrays)), "bad.npz", *words)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_truncated_npz(tmp_path: Path, npz: str, kept: float) -> None:
    content = Path(npz).read_bytes()
    (tmp_path / "short.npz").write_bytes(content[: int(len(content) * kept)])
    refuses(data("npz", path=str(tmp_path / "short.npz")), "short.npz", "truncated", "write it again")


def test_npz_with_a_flipped_byte(tmp_path: Path, npz: str) -> None:
    content = bytearray(Path(npz).read_bytes())
    content[700] ^= 255
    (tmp_path / "flipped.npz").write_bytes(content)
    refuses(data("npz", path=str(tmp_path / "flipped.npz")), "flipped.npz", "write it again")


def test_archives_that_python_cannot_open(tmp_path: Path, npz: str) -> None:
    """A later zip version, as a flipped bit makes it, is no traceback."""
    archive = save_zip(tmp_path / "whole.zip", Path(save_folder(tmp_path / "images")))
    for source, path in (("npz", npz), ("zip", archive)):
        content = bytearray(Path(path).read_bytes())
        content[content.index(b"PK\x01\x02") + 6] = 99  # "version needed to extract" of the central directory
        Path(path).write_bytes(content)
        refuses(data(source, path=path), path, "zip file version 9.9", "write it again")


def test_a_bare_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "bare.npy", RGB)
    refuses(data("npz", path=str(tmp_path / "bare.npy")), "bare.npy", "npz")


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        ("npz", "path", ["no file", "npz"]),
        ("zip", "path", ["no file", "zip"]),
        ("folder", "path", ["no folder"]),
        ("cifar10", "root", ["CIFAR-10", "data.download=true", "npz"]),
    ],
)
def test_data_that_are_not_there(tmp_path: Path, name: str, key: str, words: list[str]) -> None:
    refuses(data(name, **{key: str(tmp_path / "nowhere")}), "nowhere", *words)


@pytest.mark.parametrize("source", ["folder", "zip"])
def test_all_broken_images_are_named_in_one_error(tmp_path: Path, source: str) -> None:
    folder = Path(save_folder(tmp_path / "images"))
    whole_png = (folder / image_name(3)).read_bytes()
    (folder / image_name(3)).write_bytes(whole_png[: len(whole_png) - 30])
    (folder / image_name(5)).write_bytes(b"no png at all")
    (folder / image_name(6)).write_bytes(b"")
    Image.fromarray(RGB[0, :4]).save(folder / image_name(8))
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(folder / image_name(9))
    path = folder if source == "folder" else Path(save_zip(tmp_path / "images.zip", folder))
    bad = [image_name(i) for i in (3, 5, 6, 8, 9)]
    module = data(source, path=str(path))
    refuses(module, str(path), "5 of 12", *bad, "6x4, most are 6x6", "I;16", "remove or replace", "image_size")
    with pytest.raises(UsageError) as caught:
        module.setup("fit")
    assert not any(image_name(i) in str(caught.value) for i in (0, 1, 2, 4, 7, 10, 11))


def test_only_the_first_ten_broken_images_are_named(tmp_path: Path) -> None:
    for i in range(14):
        (tmp_path / f"{i:02d}.png").write_bytes(b"broken")
    module = data("folder", path=str(tmp_path))
    refuses(module, "14 of 14", "00.png", "09.png", "...")
    with pytest.raises(UsageError) as caught:
        module.setup("fit")
    assert "10.png" not in str(caught.value)


def test_an_image_that_breaks_after_the_check_is_named(tmp_path: Path) -> None:
    folder = Path(save_folder(tmp_path / "images"))
    module = data("folder", path=str(folder))
    module.setup("fit")
    (folder / image_name(2)).unlink()
    with pytest.raises(UsageError, match="0002.png has changed"):
        whole(module)


def test_truncated_zip(tmp_path: Path) -> None:
    archive = Path(save_zip(tmp_path / "whole.zip", Path(save_folder(tmp_path / "images"))))
    (tmp_path / "short.zip").write_bytes(archive.read_bytes()[:-40])
    refuses(data("zip", path=str(tmp_path / "short.zip")), "short.zip", "truncated", "write it again")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[image_name(i), 0] for i in range(N - 1)], [image_name(N - 1)]),
        ([[image_name(i), [0.0, 1.0]] for i in range(N)], [image_name(0), "[0.0, 1.0]"]),
        ([[image_name(i), -1] for i in range(N)], [image_name(0), "-1"]),
        (7, ["can't be read"]),
    ],
    ids=["one missing", "vectors", "negative", "no list"],
)
def test_zip_labels_that_do_not_fit(tmp_path: Path, labels: Any, words: list[str]) -> None:
    archive = save_zip(tmp_path / "labels.zip", Path(save_folder(tmp_path / "images")), labels)
    refuses(data("zip", path=archive), "labels.zip: dataset.json", "labels: false", *words)
    data("zip", path=archive, labels=False).setup("fit")


def test_folders_without_images_or_with_stray_ones(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("no image")
    (tmp_path / "empty" / ".hidden.png").write_text("passed over")
    refuses(data("folder", path=str(tmp_path / "empty")), "empty contains no images", ".png")
    folder = Path(save_folder(tmp_path / "images"))
    Image.fromarray(RGB[0]).save(folder / "stray.png")
    refuses(data("folder", path=str(folder)), "stray.png", "labels: false")
    assert data("folder", path=str(folder), labels=False).size("train") == N + 1


def test_splits_that_do_not_fit_together(tmp_path: Path, npz: str) -> None:
    small = save_npz(tmp_path / "small.npz", images=RGB[:, :4, :4])
    more = save_npz(tmp_path / "more.npz", images=RGB, labels=LABELS + 1)
    folder, other = save_folder(tmp_path / "images"), tmp_path / "other"
    (other / "unheard_of").mkdir(parents=True)
    Image.fromarray(RGB[0]).save(other / "unheard_of" / "a.png")
    for module, split, words in (
        (data("npz", path=npz), "test", "no test split.*test_path"),
        (data("npz", path=npz), "validation", "no split is called 'validation'"),
        (data("npz", path=npz, test_path=small), "test", "one size"),
        (data("npz", path=npz, test_path=more), "test", "4 classes, training 3"),
        (data("folder", path=folder, test_path=str(other)), "test", "unheard_of"),
    ):
        with pytest.raises(UsageError, match=words):
            module.size(split)


def test_numbers_out_of_range(tmp_path: Path, npz: str) -> None:
    for key, value in (("batch_size", 0), ("seed", -1), ("limit", 0), ("num_workers", -1)):
        with pytest.raises(UsageError, match=f"data.{key}={value}"):
            data("npz", path=npz, module={key: value})
    with pytest.raises(UsageError, match="image_size=0"):
        data("folder", path=save_folder(tmp_path / "images"), image_size=0).setup("fit")
    with pytest.raises(UsageError, match="n=0"):
        data("toy", n=0).setup("fit")


def test_a_batch_that_the_processes_cannot_share(npz: str) -> None:
    with pytest.raises(UsageError, match="batch_size=10 .* multiple of 3"):
        training(data("npz", path=npz, module={"batch_size": 10}), 1, 0, 3)


def test_unknown_names_are_answered_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        data("digit")
    with pytest.raises(UsageError, match="did you mean 'path'"):
        data("npz", pth="x")
