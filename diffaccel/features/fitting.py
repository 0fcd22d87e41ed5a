"""Fitting the small classifier whose features score: one loop, whose whole state is kept so that it can be stopped."""

import io
import signal
import statistics
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from diffaccel.errors import UsageError
from diffaccel.features.extractors import SmallClassifier, to_unit
from diffaccel.storage import write_whole
from diffaccel.text.terminal import PlainConsole, description_column
from diffaccel.weights import check_finite, read_checkpoint


class ImageSource(Protocol):
    """What is needed of a data module here: (C, H, W) of its images, its classes, and its images in fixed order."""

    @property
    def shape(self) -> tuple[int, int, int]: ...  # noqa: D102
    @property
    def classes(self) -> int: ...  # noqa: D102

    def batches(
        self, split: str, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield global batch index, images uint8 (n, C, H, W) and labels (n,); batch b goes to rank b % world."""


@dataclass
class ExtractorFit:
    """A fit between two steps: all that decides how it goes on.

    Attributes:
        recipe: What was asked for; a fit goes on from a state of the same recipe alone.
        model: The classifier.
        optimizer: With its momentum.
        schedule: Of the learning rate.
        generator: Draws the order and the augmentation.
        order: Indices of the training images in the order of the current epoch, (N,).
        step: Steps taken.
    """

    recipe: dict[str, Any]
    model: SmallClassifier
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    order: Tensor
    step: int = 0

    def advance(self, images: Tensor, labels: Tensor) -> float:
        """Take a step on the next of the training images (N, C, H, W) uint8 and labels (N,); returns its loss."""
        batch_size, shift, flip, bf16 = (self.recipe[key] for key in ("batch_size", "shift", "flip", "bf16"))
        device = self.model.head.weight.device
        begin = self.step % (len(images) // batch_size) * batch_size
        if begin == 0:
            self.order = torch.randperm(len(images), generator=self.generator)
        chosen = self.order[begin : begin + batch_size]
        batch = augment(to_unit(images[chosen]), shift, flip, self.generator)
        batch = batch.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(self.model(batch), labels[chosen].to(device), label_smoothing=0.1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all."""
        content = {
            "diffaccel": {"extractor": self.recipe, "step": self.step, "order": self.order},
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_whole(path, buffer.getbuffer())

    def load(self, path: Path) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            UsageError: The file is broken, holds code, or is not of a fit of this recipe.
        """
        content = read_checkpoint(path)
        own = content["diffaccel"]
        recipe = own.get("extractor") if isinstance(own, dict) else None
        if not isinstance(recipe, dict):
            raise UsageError(f"checkpoint {path} is none of an extractor's fit: give OUT/last.ckpt of one")
        if keys := [key for key in self.recipe if recipe.get(key) != self.recipe[key]]:
            there = ", ".join(f"{key}={recipe.get(key)} (not {self.recipe[key]})" for key in keys)
            raise UsageError(f"checkpoint {path} is of another fit, with {there}: set it so, or choose another out=")
        check_finite(content["state_dict"], f"checkpoint {path}", "take an older one")
        try:
            self.model.load_state_dict(content["state_dict"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["schedule"])
            self.generator.set_state(content["generator"])
            self.order, self.step = own["order"], own["step"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"checkpoint {path} holds no whole state ({error!r:.100}): take an older one") from None


class FitProgress(Progress):
    """A bar on a terminal, elsewhere a line at the end of each epoch.

    Args:
        epochs: Passes through the training images.
        steps: Steps an epoch.
        batch_size: Images a step.
        done: Steps taken before.
        console: Where to print.
    """

    def __init__(self, epochs: int, steps: int, batch_size: int, done: int, console: Console) -> None:
        columns = (description_column(), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
        self.lines = console.quiet or not console.is_terminal
        super().__init__(*columns, console=console, transient=True, disable=self.lines)
        self.epochs, self.epoch_steps, self.batch_size = epochs, steps, batch_size
        self.losses: deque[float] = deque(maxlen=100)
        self.task = self.add_task("", total=epochs * steps, completed=done)

    def show(self, done: int, loss: float) -> None:
        """Show that so many steps are done, the last one with this loss."""
        self.losses.append(loss)
        epoch = -(-done // self.epoch_steps)
        seen = f"{done * self.batch_size:,} images seen, loss {statistics.fmean(self.losses):.3f}"
        story = f"epoch {epoch}/{self.epochs}: {seen}"
        self.update(self.task, completed=done, description=story)
        if self.lines and done % self.epoch_steps == 0:
            left = timedelta(seconds=round(self.tasks[0].time_remaining or 0))
            self.console.print(f"{story}, {left} left")


def fit_extractor(
    data: ImageSource,
    dim: int = 64,
    widths: tuple[int, ...] = (32, 64),
    blocks: int = 1,
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 0.1,
    seed: int = 0,
    shift: int = 1,
    flip: bool = False,
    bf16: bool = False,
    device: str | torch.device = "cpu",
    state_path: Path | None = None,
    resume: Path | None = None,
    console: Console | None = None,
) -> tuple[SmallClassifier, float]:
    """Train a small classifier to take features from: SGD with Nesterov momentum on one cycle of learning rates.

    Args:
        data: Labelled images with the splits ``train`` and ``test``.
        dim: Number of features.
        widths: Channels of each stage.
        blocks: Residual blocks a stage.
        epochs: Passes through the training split.
        batch_size: Images a step; the last, incomplete batch of an epoch is left out.
        lr: Largest learning rate.
        seed: Of the weights, the order and the augmentation.
        shift: Move images by up to so many pixels, the border mirrored.
        flip: Mirror images left to right with probability 1/2.
        bf16: Compute in bfloat16 where autocast does.
        device: Where to train.
        state_path: Where to keep the state, at the end of each epoch and when Ctrl-C stops the fit.
        resume: A state to go on from; the end is the same to the last bit as without the stop.
        console: Where to show progress; nowhere by default.

    Returns:
        The classifier in eval mode on the CPU, with weights rounded to what ``save_classifier`` writes, and its
        accuracy on the test split, in [0, 1].

    Raises:
        UsageError: The data have no labels, are no uint8 images, or are fewer than a batch; ``resume`` is broken or of
            another fit.
        KeyboardInterrupt: On Ctrl-C, after the step that it fell into.
    """
    images, labels = _gather(data, "train")
    if len(images) < batch_size:
        raise UsageError(f"{len(images)} training images are less than batch_size={batch_size}: lower it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallClassifier(data.shape[0], data.classes, dim, widths, blocks)
    model = model.to(device).to(memory_format=torch.channels_last)  # batch norm is faster so
    recipe = {"images": len(images), **model.config, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    recipe |= {"shift": shift, "flip": flip, "bf16": bf16}
    steps = len(images) // batch_size
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    fit = ExtractorFit(recipe, model, optimizer, schedule, generator, order=torch.arange(len(images)))
    if resume is not None:
        fit.load(resume)
    progress = FitProgress(epochs, steps, batch_size, fit.step, console or PlainConsole(quiet=True))
    with _interrupts_held() as interrupts, progress:
        while fit.step < epochs * steps:
            loss = fit.advance(images, labels)
            progress.show(fit.step, loss)
            stop = bool(interrupts)  # looked at once, so that none comes between the two uses
            if state_path is not None and (stop or fit.step % steps == 0):
                fit.save(state_path)
            if stop:
                raise KeyboardInterrupt
    model = model.half().float().eval().cpu()
    return model, accuracy(model, *_gather(data, "test"))


@contextmanager
def _interrupts_held() -> Iterator[list[int]]:
    """Yield a list that Ctrl-C adds to, instead of breaking off a step, which would leave half of a new state.

    A second Ctrl-C isn't held: it doesn't wait for the step.
    """
    interrupts: list[int] = []

    def hold(number: int, _: object) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    # Only the main thread may set handlers; and whoever ignores Ctrl-C, or handles it, has a reason to.
    held = threading.current_thread() is threading.main_thread()
    held = held and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if held:
        signal.signal(signal.SIGINT, hold)
    try:
        yield interrupts
    finally:
        if held:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@torch.no_grad()
def accuracy(model: SmallClassifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Return the share of uint8 images (N, C, H, W) that are classified as their label (N,), in [0, 1]."""
    right = [model(to_unit(batch)).argmax(1) for batch in images.split(batch_size)]
    return (torch.cat(right) == labels).double().mean().item()


def augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift images (N, C, H, W) by up to ``shift`` pixels each way, mirrored at the border, and flip half of them."""
    n, _, height, width = images.shape
    padded = F.pad(images, [shift] * 4, mode="reflect")
    down, right = torch.randint(2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns.flip(1), columns)
    moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return rearrange(moved, "n h w c -> n c h w")


def _gather(data: ImageSource, split: str) -> tuple[Tensor, Tensor]:
    """Return all images (N, C, H, W) uint8 and labels (N,) of a split."""
    batches = [(images, labels) for _, images, labels in data.batches(split, batch_size=500)]
    images, labels = [images for images, _ in batches], [labels for _, labels in batches if labels is not None]
    if len(labels) < len(images) or images[0].dtype != torch.uint8:
        raise UsageError(f"an extractor is fitted to labelled uint8 images, which the {split} split does not hold")
    return torch.cat(images), torch.cat(labels)
