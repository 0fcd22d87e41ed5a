"""The data module reads every kind of source to the exact pixel."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from stored import (
    CLASSES,
    LABELS,
    RGB,
    SIDE,
    N,
    data,
    image_name,
    same,
    save_folder,
    save_npz,
    save_zip,
    training,
    whole,
)

from diffaccel.data import SOURCES, Stream, build_source
from diffaccel.data.source import random_order
from diffaccel.errors import UsageError


def test_digits_are_scikit_learns() -> None:
    """Golden sizes; 16 shades brought to 0..255; every fifth image is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    module = data("digits")
    assert (module.size("train"), module.size("test")) == (1437, 360)
    assert (module.shape, module.classes, module.name, module.label) == ((1, 8, 8), 10, "digits", "digits 8x8")
    images, labels = whole(module, "test")
    assert images.dtype == torch.uint8
    assert images[1, 0].tolist() == [[math.floor(v * 255 / 16 + 0.5) for v in row] for row in digits.images[5]]
    assert labels is not None and labels.tolist() == digits.target[::5].tolist()
    train, _ = whole(module)
    assert set(train.unique().tolist()) == {math.floor(v * 255 / 16 + 0.5) for v in range(17)}
    assert torch.equal(train[3:5, 0].double(), torch.from_numpy(np.rint(digits.images[[4, 6]] * 255 / 16)))


def test_npz_comes_back_as_saved(npz: str) -> None:
    images, labels = whole(data("npz", path=npz))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), RGB)
    assert labels is not None and labels.tolist() == LABELS.tolist()


def test_training_images_are_the_stored_ones_in_minus_one_to_one(npz: str) -> None:
    """Images and labels stay together: position -> index -> the stored pixels, x / 127.5 - 1."""
    module = data("npz", path=npz, module={"batch_size": 8, "seed": 3})
    for batch in training(module, 5):
        index = Stream(N, 3)(batch.index)
        expected = torch.from_numpy(RGB[index.numpy()].astype(np.float64) / 127.5 - 1).permute(0, 3, 1, 2)
        assert batch.image.dtype == torch.float32
        torch.testing.assert_close(batch.image.double(), expected, atol=1e-6, rtol=0)
        assert batch.condition is not None and batch.condition.labels.tolist() == LABELS[index.numpy()].tolist()


def test_ends_of_the_range_are_exact(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "ends.npz", images=np.stack([np.zeros((2, 2)), np.full((2, 2), 255)]).astype(np.uint8))
    batch = training(data("npz", path=path, module={"batch_size": 2}), 1)[0]
    assert batch.image.unique().tolist() == [-1.0, 1.0]
    assert batch.condition is None


@pytest.mark.parametrize("shape", [(N, SIDE, SIDE), (N, SIDE, SIDE, 1)])
def test_grey_has_one_channel(tmp_path: Path, shape: tuple[int, ...]) -> None:
    grey = RGB[..., 0].copy()
    arrays = data("npz", path=save_npz(tmp_path / "grey.npz", images=grey.reshape(shape)))
    folder = data("folder", path=save_folder(tmp_path / "grey", grey))
    assert arrays.shape == folder.shape == (1, SIDE, SIDE)
    assert arrays.classes == 0
    assert np.array_equal(whole(arrays)[0][:, 0].numpy(), grey)
    assert torch.equal(whole(arrays)[0], whole(folder)[0])


def test_npz_folder_and_zip_of_the_same_images_agree(tmp_path: Path, npz: str) -> None:
    folder = save_folder(tmp_path / "folder")
    archive = save_zip(tmp_path / "archive.zip", Path(folder))
    modules = [data("npz", path=npz), data("folder", path=folder), data("zip", path=archive)]
    expected, labels = whole(modules[0])
    batch = training(modules[0], 1)[0]
    for module in modules[1:]:
        assert (module.shape, module.classes) == (modules[0].shape, CLASSES)
        assert torch.equal(whole(module)[0], expected)
        assert torch.equal(whole(module)[1], labels)
        assert same(training(module, 1)[0], batch)


def test_files_are_read_alike_in_loader_workers(tmp_path: Path) -> None:
    """Each worker opens the archive for itself: a shared file position would mix images up."""
    archive = save_zip(tmp_path / "archive.zip", Path(save_folder(tmp_path / "folder")))
    here = training(data("zip", path=archive, module={"batch_size": 6}), 6)
    workers = training(data("zip", path=archive, module={"batch_size": 6, "num_workers": 2}), 6)
    assert all(same(a, b) for a, b in zip(here, workers, strict=True))


def test_an_archive_travels_to_a_spawned_worker(tmp_path: Path) -> None:
    module = data("zip", path=save_zip(tmp_path / "archive.zip", Path(save_folder(tmp_path / "folder"))))
    everything = torch.arange(N)
    expected = module.images("train").read(everything)
    assert torch.equal(pickle.loads(pickle.dumps(module.images("train"))).read(everything), expected)


def test_labels_can_be_left_out(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "folder")
    null = save_zip(tmp_path / "null.zip", Path(folder), labels=None)
    for module in (data("folder", path=folder, labels=False), data("zip", path=null)):
        assert module.classes == 0
        assert whole(module)[1] is None


def test_folder_classes_are_numbered_alike_in_both_splits(tmp_path: Path) -> None:
    """A test folder that lacks the first class must not shift the numbers of the others."""
    train, test = save_folder(tmp_path / "train"), save_folder(tmp_path / "test")
    for file in (tmp_path / "test" / "class0").iterdir():
        file.unlink()
    module = data("folder", path=train, test_path=test)
    labels = whole(module, "test")[1]
    assert labels is not None and labels.tolist() == [1] * 4 + [2] * 4


def test_image_size_crops_the_middle_square_and_resizes(tmp_path: Path) -> None:
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = [200, 100, 50]
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2).copy()).save(tmp_path / "tall.png")
    images, _ = whole(data("folder", path=str(tmp_path), image_size=2))
    assert images.shape == (2, 3, 2, 2)
    assert (images == torch.tensor([200, 100, 50]).view(3, 1, 1)).all()


def test_one_colour_image_makes_the_grey_ones_rgb(tmp_path: Path) -> None:
    Image.fromarray(RGB[0]).save(tmp_path / "a.png")
    Image.fromarray(RGB[1, ..., 0].copy()).save(tmp_path / "b.png")
    images, _ = whole(data("folder", path=str(tmp_path)))
    assert np.array_equal(images[1].numpy(), np.broadcast_to(RGB[1, ..., 0], (3, SIDE, SIDE)))


def test_limit_takes_the_same_random_images_and_keeps_the_classes(tmp_path: Path, npz: str) -> None:
    folder = save_folder(tmp_path / "folder")
    chosen = random_order(N)[:5].sort().values
    other = next(index for index in range(N) if index not in chosen)
    (tmp_path / "folder" / image_name(other)).write_bytes(b"not looked at")
    for module in (
        data("npz", path=npz, module={"limit": 5, "batch_size": 10}),
        data("folder", path=folder, module={"limit": 5, "batch_size": 10}),
    ):
        assert (module.size("train"), module.classes) == (5, CLASSES)
        images, labels = whole(module)
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), RGB[chosen])
        assert labels is not None and labels.tolist() == LABELS[chosen].tolist()
        assert sorted(Stream(5)(training(module, 1)[0].index).tolist()) == sorted([*range(5), *range(5)])
    assert data("npz", path=npz, module={"limit": 100}).size("train") == N


def test_limit_of_a_sorted_file_takes_all_classes(tmp_path: Path) -> None:
    """The images of a smaller limit are among those of a larger one."""
    labels = np.repeat(np.arange(10), 100)
    np.savez(
        tmp_path / "sorted.npz",
        images=np.broadcast_to(np.arange(1000)[:, None, None] % 256, (1000, 4, 4)).astype(np.uint8),
        labels=labels,
    )
    images = build_source({"name": "npz", "path": str(tmp_path / "sorted.npz")}).split("train")
    few, more = images.some(100), images.some(300)
    counts = torch.bincount(few.labels, minlength=10)
    assert counts.min() >= 3 and counts.max() <= 20  # 10 on average, within 3.3 standard deviations
    assert few.chosen is not None and more.chosen is not None and few.chosen[1] == 1000
    assert set(few.chosen[0].tolist()) < set(more.chosen[0].tolist())


def test_toy_points_have_the_moments_of_the_mixture() -> None:
    """Mean sum w m and covariance std^2 I + sum w m m^T - mean mean^T, within five standard errors."""
    n = 20_000
    module = data("toy", n=n)
    points, labels = whole(module)
    assert (points.shape, points.dtype, module.classes) == ((n, 2, 1, 1), torch.float32, 3)
    w, m = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([[-2.0, -2.0], [2.0, -2.0], [0.0, 2.5]])
    mean = w @ m
    covariance = 0.09 * torch.eye(2) + (m.T * w) @ m - mean.outer(mean)
    torch.testing.assert_close(points.flatten(1).mean(0), mean, atol=5 * 2.3 / n**0.5, rtol=0)
    torch.testing.assert_close(points.flatten(1).T.cov(), covariance, atol=5 * 5 / n**0.5, rtol=0)
    assert labels is not None
    assert (points.flatten(1) - m[labels]).std().item() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(whole(data("toy", n=n))[0], points)
    assert not torch.equal(whole(module, "test")[0], points)


def test_toy_points_train_in_their_own_units() -> None:
    module = data("toy", n=50, module={"batch_size": 50, "flip": True})
    batch = training(module, 1)[0]
    assert torch.equal(batch.image, whole(module)[0][Stream(50)(batch.index)])


def test_cifar10_is_read_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny files of the published layout; only the check of their MD5 sums is left out."""

    def write(name: str, content: dict[str, Any]) -> None:
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))

    (tmp_path / "cifar-10-batches-py").mkdir()
    pixels = np.random.default_rng(1).integers(256, size=(6, 2, 3072), dtype=np.uint8)
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        write(name, {"data": pixels[k], "labels": [k, 9 - k]})
    write("batches.meta", {"label_names": [str(k) for k in range(10)]})
    with pytest.raises(UsageError, match="data.download=true"):
        data("cifar10", root=str(tmp_path)).setup("fit")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    module = data("cifar10", root=str(tmp_path))
    assert (module.shape, module.classes, module.label) == ((3, 32, 32), 10, "CIFAR-10")
    train, labels = whole(module)
    assert np.array_equal(train.flatten(1).numpy(), pixels[:5].reshape(10, -1))
    assert labels is not None and labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert np.array_equal(whole(module, "test")[0].flatten(1).numpy(), pixels[5])


def test_label_says_where_the_data_come_from(npz: str) -> None:
    assert data("npz", path=npz).label == "rgb.npz"
    assert data("npz", path=npz, label="CIFAR-10 (JPEG)").label == "CIFAR-10 (JPEG)"


def test_every_source_takes_a_label() -> None:
    """Figures name their data by it."""
    import inspect

    assert set(SOURCES) == {"digits", "npz", "cifar10", "folder", "zip", "toy"}
    assert all("label" in inspect.signature(source).parameters for source in SOURCES.values())
