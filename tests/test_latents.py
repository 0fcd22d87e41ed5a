"""Latents: scale, cache, training batches, and samples whose decoding is counted apart."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coders import Shuffle, kl
from torch import Tensor

from diffaccel.data.module import DataModule
from diffaccel.data.source import ArrayImages, Images
from diffaccel.data.stream import coins, to_float
from diffaccel.denoiser import GaussianDenoiser
from diffaccel.errors import UsageError
from diffaccel.latents import Latents
from diffaccel.latents import base as latents_base
from diffaccel.latents.cache import AT_ONCE, LatentCache
from diffaccel.latents.data import LatentData
from diffaccel.nfe import FlopCounter
from diffaccel.noise import NoiseStreams
from diffaccel.process import EDMVarianceExploding
from diffaccel.sampling import Sampler, to_uint8

IMAGES = torch.randint(0, 256, (150, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def latents_of(network: Any, std: float = 1.0, mean: float = 0.3, spread: float = 2.0) -> Latents:
    network.latent_mean.fill_(mean)
    network.latent_std.fill_(spread)
    return Latents(network, std)


def test_standardised_latents_and_their_inverse():
    """x = std (z - mean) / spread, and its inverse before the decoder."""
    latents = latents_of(Shuffle((1, 8, 8), std=0.5), std=0.7)
    images = to_float(IMAGES[:5])
    found, raw = latents.encode(images), latents.autoencoder.encode(images)
    torch.testing.assert_close(found.mean, 0.7 * (raw.mean - 0.3) / 2.0)
    torch.testing.assert_close(found.std, torch.full_like(raw.std, 0.7 * 0.5 / 2.0))
    torch.testing.assert_close(latents(found.mean), images)
    assert latents.shape == (4, 4, 4) and latents.image_shape == (1, 8, 8)


def test_few_at_a_time_is_all_at_once(monkeypatch: pytest.MonkeyPatch):
    latents = latents_of(kl())
    images = to_float(IMAGES[:7])
    whole, decoded = latents.encode(images), latents.decode(latents.encode(images).mean)
    monkeypatch.setattr(latents_base, "DECODED", 2 * 64)
    assert latents._at_once == 2
    torch.testing.assert_close(latents.encode(images).mean, whole.mean)
    torch.testing.assert_close(latents.decode(whole.mean), decoded)


def test_the_auto_encoder_is_frozen():
    latents = Latents(kl())
    assert not latents.train().autoencoder.training
    assert not any(parameter.requires_grad for parameter in latents.parameters())


@pytest.mark.parametrize(("keys", "words"), [
    ({"widths": [8, 16, 16, 16, 16]}, "images of 8x8 can't be divided by the auto-encoder's factor 16"),
    ({"widths": [8, 18]}, "width 18 is not a multiple of groups=4"),
    ({"channels": 0}, "it must be from 1"),
])  # fmt: skip
def test_what_can_not_be_built(keys: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words):
        kl(**keys)


# Cache


def cache_of(folder: Path, latents: Latents | None = None, images: Images | None = None, **keys: Any) -> LatentCache:
    return LatentCache(latents or latents_of(kl()), images or ArrayImages(IMAGES), folder, **keys)


def test_cached_moments_are_those_of_the_encoder(tmp_path: Path):
    """Of images and of mirrored images: mirrored latents would be others."""
    latents = latents_of(kl(), std=0.5)
    encoded = cache_of(tmp_path, latents, mirrored=True).open()
    indices, mirrored = torch.tensor([149, 3, 70]), torch.tensor([True, False, True])
    images = to_float(IMAGES[indices])
    expected = latents.encode(torch.where(mirrored[:, None, None, None], images.flip(-1), images))
    found = encoded.read(indices, mirrored)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.std, expected.std, rtol=1e-3, atol=1e-4)
    flipped = latents.encode(images).mean.flip(-1)
    assert (flipped - latents.encode(images.flip(-1)).mean).abs().max() > 0.01


def test_the_name_follows_from_weights_and_images(tmp_path: Path):
    own, other = latents_of(kl()), latents_of(kl())
    images = IMAGES.clone()
    images[20, 0, 3, 3] ^= 1
    one = cache_of(tmp_path, own)
    same = [cache_of(tmp_path, own), cache_of(tmp_path, Latents(own.autoencoder, 0.5))]
    others = [
        cache_of(tmp_path, other),
        cache_of(tmp_path, own, ArrayImages(images)),
        cache_of(tmp_path, own, ArrayImages(IMAGES[:149])),
        cache_of(tmp_path, own, mirrored=True),
        cache_of(tmp_path, own, sample=False),
    ]
    assert all(cache.path == one.path for cache in same)
    assert len({one.path, *(cache.path for cache in others)}) == 6


class Counted(ArrayImages):
    """Images that count what is read."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(images)
        self.indices: list[int] = []

    def fingerprint(self) -> str:
        return "counted"

    def read(self, indices: Tensor) -> Tensor:
        self.indices += indices.tolist()
        return super().read(indices)


def test_a_half_written_cache_goes_on(tmp_path: Path):
    """After the last whole batch; the bytes are those of an encoding without interrupt."""
    latents, images = latents_of(kl()), Counted(IMAGES)
    whole = cache_of(tmp_path / "a", latents, images)
    whole.open()
    half = cache_of(tmp_path / "b", latents, images)
    half.folder.mkdir()
    content = whole.path.read_bytes()
    size = len(content) // len(IMAGES)
    half.path.with_suffix(".part").write_bytes(content[: AT_ONCE * size + size // 2] + b"x")
    images.indices.clear()
    half.open()
    assert images.indices == list(range(AT_ONCE, len(IMAGES)))
    assert half.path.read_bytes() == content
    assert not half.path.with_suffix(".part").exists()
    images.indices.clear()
    half.open()
    assert not images.indices


def test_files_that_change_are_encoded_anew(tmp_path: Path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(IMAGES[:3]):
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    first = DataModule({"name": "folder", "path": str(folder)}).images("train").fingerprint()
    assert DataModule({"name": "folder", "path": str(folder)}).images("train").fingerprint() == first
    os.utime(folder / "1.png", (1, 1))
    assert DataModule({"name": "folder", "path": str(folder)}).images("train").fingerprint() != first


def test_a_resumed_fit_recognises_files_by_name_and_size(tmp_path: Path):
    """A copy of the folder, whose times differ, has the same images."""
    from PIL import Image

    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        for number, image in enumerate(IMAGES[:3]):
            Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    os.utime(folders[0] / "1.png", (1, 1))
    first, copied = (DataModule({"name": "folder", "path": str(folder)}).identify() for folder in folders)
    assert first == copied and first["n"] == 3
    shutil.copy(folders[0] / "1.png", folders[0] / "3.png")
    other, limited = (DataModule({"name": "folder", "path": str(folders[0])}, limit=n).identify() for n in (None, 3))
    assert other["n"] == 4 and other["sha256"] != first["sha256"]
    assert limited["n"] == 3 and limited["sha256"] != other["sha256"]


def test_latents_that_are_not_finite_are_an_error(tmp_path: Path):
    latents = latents_of(kl(), spread=1e-8)
    with pytest.raises(UsageError, match="NaN or infinite, or too large for float16"):
        cache_of(tmp_path, latents).open()
    assert not cache_of(tmp_path, latents).path.exists()


def test_latents_of_another_scale_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The shuffled pixels have a standard deviation of 0.58 times gains of 1 to 3, about 1.2 in all."""
    cache_of(tmp_path, latents_of(Shuffle((1, 8, 8)), mean=0.0, spread=1.2)).open()
    assert "standard deviation" not in capsys.readouterr().err
    cache_of(tmp_path, latents_of(Shuffle((1, 8, 8)), mean=0.0, spread=0.3)).open()
    assert "times latents.std" in capsys.readouterr().err


# Training batches


def data_of(folder: Path, latents: Latents, **keys: Any) -> LatentData:
    np.savez(folder / "data.npz", images=IMAGES[:, 0].numpy(), labels=np.arange(150) % 3)
    source = {"name": "npz", "path": str(folder / "data.npz")}
    return LatentData(latents, folder / "cache", **{"sample": True, "source": source, "seed": 5, **keys})


class Ranks:
    """What a data module asks of a trainer."""

    def __init__(self, rank: int, world: int) -> None:
        self.global_rank, self.world_size = rank, world


def first_batches(data: LatentData, rank: int = 0, world: int = 1, count: int = 3) -> list[Any]:
    data.trainer = Ranks(rank, world)  # type: ignore[assignment]
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(count)]


def test_batches_are_draws_from_the_posterior_of_the_right_images(tmp_path: Path):
    latents = latents_of(Shuffle((1, 8, 8), std=0.4))
    data = data_of(tmp_path, latents, batch_size=40, flip=True)
    for batch in first_batches(data, count=8):
        z = NoiseStreams(5, batch.index, "posterior").normal(batch.image)
        images = latents(batch.image - 0.4 / 2.0 * z)  # the posterior's mean, decoded: exact in this auto-encoder
        found = to_uint8(images)[:, 0].reshape(40, -1)
        originals, mirrored = (part[:, 0].reshape(150, -1) for part in (IMAGES, IMAGES.flip(-1)))
        flipped = coins(batch.index, 5)
        assert 0 < flipped.sum() < 40
        for image, is_flipped, label in zip(found, flipped, batch.condition.labels, strict=True):
            distances = ((mirrored if is_flipped else originals).float() - image.float()).abs().mean(1)
            assert distances.min() < 0.5 and distances.argmin() % 3 == label


def test_batches_do_not_depend_on_the_number_of_ranks(tmp_path: Path):
    latents = latents_of(kl())
    one = first_batches(data_of(tmp_path, latents, batch_size=40, flip=True))
    two = [first_batches(data_of(tmp_path, latents, batch_size=40, flip=True), rank, 2) for rank in (0, 1)]
    for whole, *halves in zip(one, *two, strict=True):
        assert torch.equal(whole.image, torch.cat([half.image for half in halves]))
        assert torch.equal(whole.condition.labels, torch.cat([half.condition.labels for half in halves]))


def test_means_alone_are_the_same_in_every_epoch(tmp_path: Path):
    latents = latents_of(Shuffle((1, 8, 8), std=0.4))
    data = data_of(tmp_path, latents, batch_size=150, sample=False)
    first, second, _ = first_batches(data)
    by_label = [batch.image[batch.index.argsort()].flatten(1).sum().item() for batch in (first, second)]
    assert by_label[0] == pytest.approx(by_label[1], rel=1e-5)
    sampled = data_of(tmp_path, latents, batch_size=150)
    first, second, _ = first_batches(sampled)
    assert not torch.allclose(first.image.sum(), second.image.sum(), rtol=1e-5)


def test_one_pass_over_the_latents_has_half_of_the_images_mirrored(tmp_path: Path):
    latents = latents_of(Shuffle((1, 8, 8)))
    data = data_of(tmp_path, latents, flip=True)
    for _, found, labels in data.batches("train", 50):
        assert labels is not None and found.shape == (50, 4, 4, 4)
    for b, found, _ in data.batches("train", 150):
        images = to_uint8(latents(found))
        mirrored = coins(torch.arange(150), 5)[:, None, None, None]
        assert b == 0 and torch.equal(mirrored.any(), torch.tensor(True))
        expected = torch.where(mirrored, IMAGES.flip(-1), IMAGES)
        assert (images.int() - expected.int()).abs().max() <= 1  # float16


def test_images_of_another_size_or_on_the_device_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"images have shape \(1, 8, 8\), but the auto-encoder encodes \(1, 16, 16\)"):
        data_of(tmp_path, latents_of(kl((1, 16, 16)))).prepare()
    with pytest.raises(UsageError, match="latents are read from files"):
        data_of(tmp_path, latents_of(kl()), source={"name": "digits", "resident": True})


# Samples


def sampler_of(latents: Latents | None) -> Sampler:
    shape = (3, 4, 4) if latents is None else latents.shape
    denoiser = GaussianDenoiser(torch.zeros(shape), 1.0, EDMVarianceExploding())
    return Sampler(denoiser, "gaussian", "heun", shape, latents=latents)


def test_decoding_is_counted_apart():
    """NFE, evaluations and FLOPs are those without decoding; the decoder's are those of the FLOP counter."""
    latents = latents_of(kl((3, 8, 8)))
    plain, decoded = sampler_of(None), sampler_of(latents)
    plain(6, 9), decoded(6, 9)
    one, other = plain.spent, decoded.spent
    assert one is not None and other is not None
    assert (one.nfe, one.evaluations, one.gflops_per_image) == (other.nfe, other.evaluations, other.gflops_per_image)
    with FlopCounter() as counter, torch.no_grad():
        latents(torch.zeros(1, 3, 4, 4))
    assert other.gflops_decoding == pytest.approx(counter.total / 1e9) and other.seconds_decoding > 0
    assert one.gflops_decoding == one.seconds_decoding == 0


def test_images_are_the_decoded_samples():
    latents = latents_of(kl((3, 8, 8)))
    sampler = sampler_of(latents)
    images = sampler(5, 9, seed=2)
    plan = sampler.plan(9, 5)
    ((_, x_0),) = sampler.draw(plan, 2, [range(5)])
    with torch.no_grad():
        assert torch.equal(images, to_uint8(latents.autoencoder.decode(2.0 * x_0 + 0.3)))
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.uint8


def test_images_do_not_depend_on_the_batch_size():
    sampler = sampler_of(latents_of(kl((3, 8, 8))))
    one, other = sampler(7, 9, batch_size=7), sampler(7, 9, batch_size=3)
    assert (one.int() - other.int()).abs().max() <= 1 and (one != other).float().mean() < 0.01
    assert torch.equal(one, sampler(7, 9, batch_size=7))


def test_another_prior_keeps_the_decoder():
    sampler = sampler_of(latents_of(kl((3, 8, 8))))
    assert sampler.using(sampler.prior).latents is sampler.latents


def test_nan_is_reported_after_decoding():
    latents = latents_of(kl((3, 8, 8)))
    with torch.no_grad():
        latents.autoencoder.last_layer.fill_(float("nan"))
    with pytest.raises(UsageError, match="an image contains NaN"):
        sampler_of(latents)(2, 9)
