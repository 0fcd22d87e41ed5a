"""Training of the small classifier used as an extractor, with a state that can be saved and resumed."""

import io
import statistics
from collections import deque
from collections.abc import Iterator
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
from diffaccel.interrupts import interrupts_held
from diffaccel.storage import write_whole
from diffaccel.text.terminal import PlainConsole, description_column
from diffaccel.weights import check_finite, read_checkpoint, tensors_sha256


class ImageSource(Protocol):
    """Interface of the data module that the fit uses."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Image shape (C, H, W)."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes."""
        ...

    def batches(
        self, split: str, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield global batch index b, images (n, C, H, W) uint8 and labels (n,), for batches with rank = b % world."""
        ...


@dataclass
class ExtractorFit:
    """State of a fit between two steps, which determines all later steps.

    Attributes:
        recipe: Settings of the fit; a fit resumes only from a state with the same settings.
        model: Classifier.
        optimizer: Optimizer, including its momentum.
        schedule: Schedule of the learning rate.
        generator: Random generator of the order and the augmentation.
        order: Indices of the training images in the order of the current epoch, (N,).
        step: Number of completed steps.
    """

    recipe: dict[str, Any]
    model: SmallClassifier
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    order: Tensor
    step: int = 0

    def advance(self, images: Tensor, labels: Tensor) -> float:
        """Take a training step on the next batch and return its loss.

        Args:
            images: All training images, (N, C, H, W) uint8.
            labels: All training labels, (N,).
        """
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
        """Write the state to a file atomically."""
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
        """Restore the state from a file written by :meth:`save`.

        Raises:
            UsageError: The file is damaged, contains code, or is from a fit with other settings.
        """
        content = read_checkpoint(path)
        own = content["diffaccel"]
        recipe = own.get("extractor") if isinstance(own, dict) else None
        if not isinstance(recipe, dict):
            raise UsageError(f"checkpoint {path} is not from a fit of an extractor: use its OUT/last.ckpt")
        recipe = {"images_sha256": self.recipe["images_sha256"], **recipe}  # which earlier versions did not record
        if keys := [key for key in self.recipe if recipe.get(key) != self.recipe[key]]:
            other = ", ".join(f"{key}={recipe.get(key)} (not {self.recipe[key]})" for key in keys)
            raise UsageError(
                f"checkpoint {path} is from a fit with {other}: use the same settings, or choose another out="
            )
        check_finite(content["state_dict"], f"checkpoint {path}", "use an older one")
        try:
            self.model.load_state_dict(content["state_dict"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["schedule"])
            self.generator.set_state(content["generator"])
            self.order, self.step = own["order"], own["step"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"checkpoint {path} has no complete state ({error!r:.100}): use an older one") from None


class FitProgress(Progress):
    """Progress of a fit: a bar on a terminal, otherwise a line at the end of each epoch.

    Args:
        epochs: Number of epochs.
        steps: Steps per epoch.
        batch_size: Images per step.
        done: Number of steps completed before a resume.
        console: Console to print to.
    """

    def __init__(self, epochs: int, steps: int, batch_size: int, done: int, console: Console) -> None:
        columns = (description_column(), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
        self.lines = console.quiet or not console.is_terminal
        super().__init__(*columns, console=console, transient=True, disable=self.lines)
        self.epochs, self.epoch_steps, self.batch_size = epochs, steps, batch_size
        self.losses: deque[float] = deque(maxlen=100)
        self.task = self.add_task("", total=epochs * steps, completed=done)

    def show(self, done: int, loss: float) -> None:
        """Show the number of completed steps and the mean loss of the last 100.

        Args:
            done: Number of completed steps.
            loss: Loss of the last step.
        """
        self.losses.append(loss)
        epoch = -(-done // self.epoch_steps)
        seen = f"{done * self.batch_size:,} images seen, loss {statistics.fmean(self.losses):.3f}"
        description = f"epoch {epoch}/{self.epochs}: {seen}"
        self.update(self.task, completed=done, description=description)
        if self.lines and done % self.epoch_steps == 0:
            left = timedelta(seconds=round(self.tasks[0].time_remaining or 0))
            self.console.print(f"{description}, {left} left")


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
    """Train a small classifier as an extractor, by SGD with Nesterov momentum and a one-cycle learning rate.

    Args:
        data: Labelled images with the splits ``train`` and ``test``.
        dim: Number of features.
        widths: Channels of each stage.
        blocks: Residual blocks per stage.
        epochs: Number of epochs.
        batch_size: Images per step; an incomplete last batch of an epoch is skipped.
        lr: Maximum learning rate.
        seed: Seed of the weights, the order and the augmentation.
        shift: Maximum shift of the augmentation in pixels, with mirrored borders.
        flip: Whether to mirror images left to right with probability 1/2.
        bf16: Whether to use bfloat16 autocast.
        device: Device to train on.
        state_path: File for the state, written at the end of each epoch and after Ctrl-C; None to write no state.
        resume: File with a state to resume from. The result is bit-identical to an uninterrupted fit.
        console: Console for progress; None for no progress.

    Returns:
        The classifier in eval mode on the CPU, with weights rounded to the precision of ``save_classifier``, and its
        accuracy on the test split, in [0, 1].

    Raises:
        UsageError: The data have no test split, no labels, are not uint8 images, or are fewer than a batch; or
            ``resume`` is damaged, or from a fit with other settings or images.
        KeyboardInterrupt: Ctrl-C was pressed; raised after the current step.
    """
    images, labels = _gather(data, "train")
    held_out = _gather(data, "test")  # before hours of training, whose result is judged by these images
    if len(images) < batch_size:
        raise UsageError(f"{len(images)} training images are less than batch_size={batch_size}: lower batch_size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallClassifier(data.shape[0], data.classes, dim, widths, blocks)
    model = model.to(device).to(memory_format=torch.channels_last)  # faster batch norm
    recipe = {"images": len(images), **model.config, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    recipe |= {"shift": shift, "flip": flip, "bf16": bf16, "images_sha256": _sha256(images, labels)}
    steps = len(images) // batch_size
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    fit = ExtractorFit(recipe, model, optimizer, schedule, generator, order=torch.arange(len(images)))
    if resume is not None:
        fit.load(resume)
    progress = FitProgress(epochs, steps, batch_size, fit.step, console or PlainConsole(quiet=True))
    with interrupts_held() as interrupts, progress:
        while fit.step < epochs * steps:
            loss = fit.advance(images, labels)
            progress.show(fit.step, loss)
            stop = bool(interrupts)  # read once, because an interrupt may occur between the two uses
            if state_path is not None and (stop or fit.step % steps == 0):
                fit.save(state_path)
            if stop:
                raise KeyboardInterrupt
    model = model.half().float().eval().cpu()
    return model, accuracy(model, *held_out)


@torch.no_grad()
def accuracy(model: SmallClassifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Fraction of uint8 images (N, C, H, W) that are classified as their labels (N,), in [0, 1]."""
    right = [model(to_unit(batch)).argmax(1) for batch in images.split(batch_size)]
    return (torch.cat(right) == labels).double().mean().item()


def augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift images (N, C, H, W) by up to ``shift`` pixels along each axis, with mirrored borders, and flip half."""
    n, _, height, width = images.shape
    padded = F.pad(images, [shift] * 4, mode="reflect")
    down, right = torch.randint(2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns.flip(1), columns)
    moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return rearrange(moved, "n h w c -> n c h w")


def _sha256(images: Tensor, labels: Tensor) -> str:
    """Hash of images (N, C, H, W) and labels (N,), by which a resumed fit recognises them."""
    return tensors_sha256({"images": images, "labels": labels})[:16]


def _gather(data: ImageSource, split: str) -> tuple[Tensor, Tensor]:
    """All images (N, C, H, W) uint8 and labels (N,) of a split."""
    batches = [(images, labels) for _, images, labels in data.batches(split, batch_size=500)]
    images, labels = [images for images, _ in batches], [labels for _, labels in batches if labels is not None]
    if len(labels) < len(images) or images[0].dtype != torch.uint8:
        raise UsageError(
            f"the {split} split has no labelled uint8 images: fit extractors to a source of images with labels"
        )
    return torch.cat(images), torch.cat(labels)
