"""The data module keeps one order, whatever the processes and restarts."""

from itertools import islice

import lightning
import numpy as np
import pytest
import torch
from stored import LABELS, RGB, N, data, same, together, training

from diffaccel.data import Batch, Stream
from diffaccel.data.source import random_order
from diffaccel.data.stream import mirrored


@pytest.mark.parametrize("batch_size", [1, 5, 12, 30])
def test_every_epoch_shows_every_image_once(npz: str, batch_size: int) -> None:
    """Batches may straddle epochs, or hold several of a tiny data set."""
    epochs = 5
    batches = training(data("npz", path=npz, module={"batch_size": batch_size}), N * epochs // batch_size)
    positions = torch.cat([batch.index for batch in batches])
    assert positions.tolist() == list(range(N * epochs))
    order = Stream(N)(positions).view(epochs, N)
    assert all(sorted(epoch) == list(range(N)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == epochs
    images = torch.cat([batch.image for batch in batches]).view(epochs, N, -1)
    assert all(len(epoch.unique(dim=0)) == N for epoch in images)


def test_the_seed_makes_the_order() -> None:
    positions = torch.arange(100)
    assert torch.equal(Stream(100, 1)(positions), Stream(100, 1)(positions))
    assert not torch.equal(Stream(100, 1)(positions), Stream(100, 2)(positions))


@pytest.mark.parametrize("world", [2, 3])
def test_global_batches_do_not_depend_on_the_number_of_processes(npz: str, world: int) -> None:
    keys = {"batch_size": 6, "flip": True}
    alone = training(data("npz", path=npz, module=keys), 7)
    ranks = [training(data("npz", path=npz, module=keys), 7, rank, world) for rank in range(world)]
    for step, batch in enumerate(alone):
        shares = [ranks[rank][step] for rank in range(world)]
        assert all(len(share.image) == 6 // world for share in shares)
        assert same(batch, together(shares))


@pytest.mark.parametrize("step", [1, 4, 11])
def test_resuming_goes_on_as_if_uninterrupted(npz: str, step: int) -> None:
    keys = {"batch_size": 5, "flip": True}
    uninterrupted = training(data("npz", path=npz, module=keys), step + 4)[step:]
    module = data("npz", path=npz, module=keys)
    module.setup("fit")
    loader = module.train_dataloader()
    module.start = 5 * step  # Lightning restores counters after it may have made the loader
    assert all(same(a, b) for a, b in zip(uninterrupted, islice(loader, 4), strict=True))


def test_coins_are_tossed_anew_for_every_image_and_epoch() -> None:
    """Agreement by chance alone, within four deviations of 1/2: with the epoch before, and with the neighbour."""
    images = torch.tensor([0.0, 1.0]).expand(3 * 2000, 1, 1, 2)
    coins = mirrored(images, torch.arange(3 * 2000), seed=1)[:, 0, 0, 0].reshape(3, 2000)
    for one, other in ((coins[0], coins[1]), (coins[1], coins[2]), (coins[:, 1:], coins[:, :-1])):
        assert (one == other).double().mean().item() == pytest.approx(0.5, abs=2 / 2000**0.5)
    assert coins.double().mean().item() == pytest.approx(0.5, abs=2 / 6000**0.5)


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


@pytest.mark.parametrize("world", [1, 3])
def test_some_images_of_a_split_are_typical_of_sorted_files(npz: str, world: int) -> None:
    """A number of images is drawn in random order, the same for every batch size and number of processes."""
    order = random_order(N)
    assert sorted(order.tolist()) == list(range(N)) and order.tolist() != list(range(N))
    module = data("npz", path=npz)
    for size in (2, 4):
        parts = sorted((part for rank in range(world) for part in module.batches("train", size, rank, world, n=7)),
                       key=lambda part: part[0])  # fmt: skip
        found = torch.cat([images for _, images, _ in parts])
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), RGB[order[:7].numpy()])
    spread = random_order(10_000)[:500] // 1000
    assert torch.bincount(spread, minlength=10).min() >= 25, "ten sorted classes"


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
