"""The data module: exact pixel values, one order whatever the processes and restarts, one clear error for bad data."""

import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from diffaccel.data import SOURCES, Batch, DataModule, Stream
from diffaccel.errors import UsageError

N, SIDE, CLASSES = 12, 6, 3
RGB = np.random.default_rng(0).integers(256, size=(N, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.arange(N) // 4  # sorted, so that class folders keep the order of the arrays


def data(name: str, *, module: Mapping[str, Any] | None = None, **keys: Any) -> DataModule:
    return DataModule({"name": name, **keys}, **(module or {}))


def save_npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def image_name(i: int) -> str:
    return f"class{LABELS[i]}/{i:04d}.png"


def save_folder(path: Path, images: np.ndarray = RGB) -> str:
    for i, image in enumerate(images):
        target = path / image_name(i)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target)
    return str(path)


def save_zip(path: Path, folder: Path, labels: Any = "those of the images") -> str:
    pairs = [[image_name(i), int(LABELS[i])] for i in reversed(range(N))]
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png"), reverse=True):
            archive.write(file, file.relative_to(folder))
        archive.writestr("dataset.json", json.dumps({"labels": pairs if isinstance(labels, str) else labels}))
    return str(path)


def whole(module: DataModule, split: str = "train") -> tuple[Tensor, Tensor | None]:
    parts = list(module.batches(split, 5))
    labels = None if parts[0][2] is None else torch.cat([part[2] for part in parts if part[2] is not None])
    return torch.cat([images for _, images, _ in parts]), labels


def training(module: DataModule, steps: int, rank: int = 0, world: int = 1) -> list[Batch]:
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
    return list(islice(module.train_dataloader(), steps))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def npz(tmp_path: Path) -> str:
    return save_npz(tmp_path / "rgb.npz", images=RGB, labels=LABELS)


# ---------------------------------------------------------------------------------------------------- what is read


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
        index, _ = Stream(N, 3)(batch.index)
        expected = torch.from_numpy(RGB[index.numpy()].astype(np.float64) / 127.5 - 1).permute(0, 3, 1, 2)
        assert batch.image.dtype == torch.float32
        torch.testing.assert_close(batch.image.double(), expected, atol=1e-6, rtol=0)
        assert batch.condition is not None and batch.condition.tolist() == LABELS[index.numpy()].tolist()


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


def test_limit_takes_the_first_images_and_keeps_the_classes(tmp_path: Path, npz: str) -> None:
    folder = save_folder(tmp_path / "folder")
    (tmp_path / "folder" / image_name(N - 1)).write_bytes(b"not looked at")
    for module in (
        data("npz", path=npz, module={"limit": 5, "batch_size": 10}),
        data("folder", path=folder, module={"limit": 5, "batch_size": 10}),
    ):
        assert (module.size("train"), module.classes) == (5, CLASSES)
        assert np.array_equal(whole(module)[0].permute(0, 2, 3, 1).numpy(), RGB[:5])
        assert sorted(Stream(5)(training(module, 1)[0].index)[0].tolist()) == sorted([*range(5), *range(5)])
    assert data("npz", path=npz, module={"limit": 100}).size("train") == N


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
    assert torch.equal(batch.image, whole(module)[0][Stream(50)(batch.index)[0]])


def test_cifar10_is_read_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny files of the published layout; only the check of their MD5 sums is left out."""

    def write(name: str, content: dict[str, Any]) -> None:
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))

    (tmp_path / "cifar-10-batches-py").mkdir()
    pixels = np.random.default_rng(1).integers(256, size=(6, 2, 3072), dtype=np.uint8)
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        write(name, {"data": pixels[k], "labels": [k, 9 - k]})
    write("batches.meta", {"label_names": [str(k) for k in range(10)]})
    with pytest.raises(UsageError, match="download: true"):
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


# ------------------------------------------------------------------------------------------------ in which order


@pytest.mark.parametrize("batch_size", [1, 5, 12, 30])
def test_every_epoch_shows_every_image_once(npz: str, batch_size: int) -> None:
    """Batches may straddle epochs, or hold several of a tiny data set."""
    epochs = 5
    batches = training(data("npz", path=npz, module={"batch_size": batch_size}), N * epochs // batch_size)
    positions = torch.cat([batch.index for batch in batches])
    assert positions.tolist() == list(range(N * epochs))
    order = Stream(N)(positions)[0].view(epochs, N)
    assert all(sorted(epoch) == list(range(N)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == epochs
    images = torch.cat([batch.image for batch in batches]).view(epochs, N, -1)
    assert all(len(epoch.unique(dim=0)) == N for epoch in images)


def test_the_seed_makes_the_order() -> None:
    positions = torch.arange(100)
    assert torch.equal(Stream(100, 1)(positions)[0], Stream(100, 1)(positions)[0])
    assert not torch.equal(Stream(100, 1)(positions)[0], Stream(100, 2)(positions)[0])


@pytest.mark.parametrize("world", [2, 3])
def test_global_batches_do_not_depend_on_the_number_of_processes(npz: str, world: int) -> None:
    keys = {"batch_size": 6, "flip": True}
    alone = training(data("npz", path=npz, module=keys), 7)
    ranks = [training(data("npz", path=npz, module=keys), 7, rank, world) for rank in range(world)]
    for step, batch in enumerate(alone):
        shares = [ranks[rank][step] for rank in range(world)]
        assert all(len(share.image) == 6 // world for share in shares)
        assert same(batch, Batch(*(torch.cat(parts) for parts in zip(*shares, strict=True))))


@pytest.mark.parametrize("step", [1, 4, 11])
def test_resuming_goes_on_as_if_uninterrupted(npz: str, step: int) -> None:
    keys = {"batch_size": 5, "flip": True}
    uninterrupted = training(data("npz", path=npz, module=keys), step + 4)[step:]
    module = data("npz", path=npz, module=keys)
    module.setup("fit")
    loader = module.train_dataloader()
    module.start_step = step  # Lightning restores counters after it may have made the loader
    assert all(same(a, b) for a, b in zip(uninterrupted, islice(loader, 4), strict=True))


def test_flips_mirror_half_of_the_images(npz: str) -> None:
    """A flipped image is the stored one mirrored, others are untouched; fair to five standard errors."""
    steps = 250
    plain = training(data("npz", path=npz, module={"batch_size": 8}), steps)
    flipped = training(data("npz", path=npz, module={"batch_size": 8, "flip": True}), steps)
    mirrored = 0
    for a, b in zip(plain, flipped, strict=True):
        as_is = (a.image == b.image).flatten(1).all(1)
        mirror = (a.image.flip(-1) == b.image).flatten(1).all(1)
        assert (as_is ^ mirror).all()
        mirrored += int(mirror.sum())
    assert mirrored / (8 * steps) == pytest.approx(0.5, abs=5 * 0.5 / (8 * steps) ** 0.5)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_scoring_batches_cover_the_split_once_without_padding(npz: str, world: int) -> None:
    module = data("npz", path=npz)
    parts = [part for rank in range(world) for part in module.batches("train", 5, rank, world)]
    assert sorted(b for b, _, _ in parts) == [0, 1, 2]
    for b, images, labels in parts:
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), RGB[5 * b : 5 * b + 5])
        assert labels is not None and labels.tolist() == LABELS[5 * b : 5 * b + 5].tolist()


def test_lightning_trains_on_it_until_the_method_stops(npz: str) -> None:
    """The loader has no end; 30 steps of one epoch pass the data set more than once."""

    class Method(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.seen: list[int] = []

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            self.seen += batch.index.tolist()
            self.trainer.should_stop = len(self.seen) >= 120

        def configure_optimizers(self) -> None:
            return None

    method = Method()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, data("npz", path=npz, module={"batch_size": 4}))
    assert method.seen == list(range(120))


# --------------------------------------------------------------------------------------------- what can go wrong


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
        ({"images": RGB / 255}, ["float64", "give uint8"]),
        ({"images": RGB[0, 0]}, ["(6, 3)", "(N, H, W)"]),
        ({"images": RGB.transpose(0, 3, 1, 2)}, ["(12, 3, 6, 6)", "(N, H, W, C)"]),
        ({"images": RGB[:0]}, ["(0, 6, 6, 3)", "no size of 0"]),
        ({**GOOD, "labels": LABELS[1:]}, ["'labels'", "(11,)", "(12,)"]),
        ({**GOOD, "labels": LABELS / 2}, ["'labels'", "float64", "integer"]),
        ({**GOOD, "labels": LABELS - 1}, ["-1", "from 0"]),
        ({**GOOD, "classes": np.array(["a", "b"])}, ["goes to 2", "names 2"]),
        ({**GOOD, "classes": np.array("abc")}, ["'classes'", "one name per class"]),
        ({"images": np.array([None, "object"])}, ["can't be read as npz"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_npz_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], words: list[str]) -> None:
    refuses(data("npz", path=save_npz(tmp_path / "bad.npz", **arrays)), "bad.npz", *words)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_truncated_npz(tmp_path: Path, npz: str, kept: float) -> None:
    content = Path(npz).read_bytes()
    (tmp_path / "short.npz").write_bytes(content[: int(len(content) * kept)])
    refuses(data("npz", path=str(tmp_path / "short.npz")), "short.npz", "truncated", "write it anew")


def test_npz_with_a_flipped_byte(tmp_path: Path, npz: str) -> None:
    content = bytearray(Path(npz).read_bytes())
    content[700] ^= 255
    (tmp_path / "flipped.npz").write_bytes(content)
    refuses(data("npz", path=str(tmp_path / "flipped.npz")), "flipped.npz", "write it anew")


def test_archives_that_python_cannot_open(tmp_path: Path, npz: str) -> None:
    """A later zip version, as a flipped bit makes it, is no traceback."""
    archive = save_zip(tmp_path / "whole.zip", Path(save_folder(tmp_path / "images")))
    for source, path in (("npz", npz), ("zip", archive)):
        content = bytearray(Path(path).read_bytes())
        content[content.index(b"PK\x01\x02") + 6] = 99  # "version needed to extract" of the central directory
        Path(path).write_bytes(content)
        refuses(data(source, path=path), path, "zip file version 9.9", "write it anew")


def test_a_bare_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "bare.npy", RGB)
    refuses(data("npz", path=str(tmp_path / "bare.npy")), "bare.npy", "npz")


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        ("npz", "path", ["no file", "npz"]),
        ("zip", "path", ["no file", "zip"]),
        ("folder", "path", ["no folder"]),
        ("cifar10", "root", ["CIFAR-10", "download: true", "npz"]),
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
    refuses(data("zip", path=str(tmp_path / "short.zip")), "short.zip", "truncated", "write it anew")


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
    refuses(data("folder", path=str(tmp_path / "empty")), "empty holds no images", ".png")
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
