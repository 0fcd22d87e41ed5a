"""A share of the images is held out by the hash of the pixels, the same for every kind of source."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stored import data, save_npz, training, whole

from diffaccel.data import MissingSplit
from diffaccel.data.held_out import digest_of, digest_of_array
from diffaccel.data.source import random_order
from diffaccel.errors import UsageError

N, SIDE = 200, 6


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Images of which the last ten are copies of the first ten."""
    images = np.random.default_rng(0).integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
    images[-10:] = images[:10]
    return images


@pytest.fixture(scope="module")
def folder(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    for index, image in enumerate(pixels):
        (place / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(place / "ab"[index % 2] / f"{index:03d}.png")
    return place


def contents(images: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def test_the_splits_are_disjoint_and_complete_and_copies_stay_together(folder: Path, pixels: np.ndarray):
    module = data("folder", path=str(folder), test_share=0.25)
    train, test = contents(whole(module)[0]), contents(whole(module, "test")[0])
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(contents(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()))
    assert 0.15 * N < len(test) < 0.35 * N  # 50 expected, standard deviation 6


def test_a_folder_and_an_npz_have_the_same_splits(folder: Path, pixels: np.ndarray, tmp_path: Path):
    labels = np.arange(N) % 2
    file = save_npz(tmp_path / "same.npz", images=pixels, labels=labels)
    for split in ("train", "test"):
        files, file_labels = whole(data("folder", path=str(folder), test_share=0.25), split)
        array, array_labels = whole(data("npz", path=file, test_share=0.25), split)
        assert file_labels is not None and array_labels is not None
        found = [set(zip(contents(images), own.tolist(), strict=True)) for images, own in
                 ((files, file_labels), (array, array_labels))]  # fmt: skip
        assert found[0] == found[1]


def test_an_image_stays_in_its_split_when_others_come_and_go(folder: Path, pixels: np.ndarray, tmp_path: Path):
    before = set(contents(whole(data("folder", path=str(folder), test_share=0.25), "test")[0]))
    more = np.random.default_rng(1).integers(0, 256, (50, SIDE, SIDE, 3), dtype=np.uint8)
    file = save_npz(tmp_path / "more.npz", images=np.concatenate([more, pixels[20:]]))
    after = set(contents(whole(data("npz", path=file, test_share=0.25), "test")[0]))
    kept = set(contents(torch.from_numpy(pixels[20:190]).permute(0, 3, 1, 2).contiguous()))
    assert kept & before == kept & after


def test_the_size_of_the_images_does_not_change_the_splits(folder: Path):
    def names(image_size: int | None) -> list[str]:
        module = data("folder", path=str(folder), test_share=0.25, image_size=image_size)
        return list(module.images("test").names)  # type: ignore[attr-defined]

    assert names(None) == names(4)


def test_every_image_is_decoded_once_for_both_splits(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from diffaccel.data import files

    opened, decode = [], files.decode
    monkeypatch.setattr(files, "decode", lambda stream: opened.append(1) or decode(stream))
    module = data("folder", path=str(folder), test_share=0.25)
    module.images("train"), module.images("test")
    assert len(opened) == N


def test_limit_takes_images_of_a_split_with_the_channels_of_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(folder, tmp_path / "images0"))
    Image.new("L", (SIDE, SIDE), 7).save(folder / "a" / "000.png")
    all_of_it = data("folder", path=str(folder), test_share=0.25)
    first = data("folder", path=str(folder), test_share=0.25, module={"limit": 5})
    assert first.size("train") == first.size("test") == 5 and first.shape == (3, SIDE, SIDE)
    for split in ("train", "test"):
        chosen = random_order(all_of_it.size(split))[:5].sort().values
        assert torch.equal(whole(first, split)[0], whole(all_of_it, split)[0][chosen])
        assert first.images(split).classes == 2
    held_out = all_of_it.size("test")
    assert f"(train): {held_out} of {N} images are held out as the test split" in capsys.readouterr().err
    assert training(first, 1)[0].image.shape[1:] == (3, SIDE, SIDE)


def test_the_hash_is_of_pixels_and_size():
    image = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    assert digest_of(Image.fromarray(image)) == digest_of_array(image)
    assert digest_of_array(image) != digest_of_array(image.reshape(2, 4, 3))
    grey = image[..., 0]
    assert (
        digest_of(Image.fromarray(grey)) == digest_of_array(grey) == digest_of_array(np.repeat(grey[..., None], 3, 2))
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"test_share": 0.0}, "data.test_share=0: set a share between 0 and 1"),
        ({"test_share": 1.5}, "between 0 and 1"),
        ({"test_share": 0.1, "test_path": "elsewhere"}, "remove one of them"),
        ({"test_share": 1e-9}, "none of the 200 images to the test split: raise it"),
    ],
)
def test_a_share_that_cannot_be(folder: Path, keys: dict, message: str):
    with pytest.raises(UsageError, match=message) as caught:
        data("folder", path=str(folder), **keys).images("test")
    assert isinstance(caught.value, MissingSplit) == ("test split" in message)
