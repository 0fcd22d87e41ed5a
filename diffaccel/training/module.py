"""The one training loop: phases with their own optimisers, counters in images, exact resume."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from diffaccel.data import Batch
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams, stream_seed
from diffaccel.training.ema import EMA
from diffaccel.training.plan import Training


@dataclass
class Phase:
    """One optimiser's part of a training step.

    Attributes:
        name: Prefix of what it logs.
        parameters: What it optimises.
        loss: (batch, noise streams of the batch) -> scalar, or one value per sample (B,).
        every: The phase runs on every ``every``-th step,
        since: from so many images seen on,
        until: and before so many.
        lr: Learning rate over the run's own.
        betas: Adam's; None takes the run's.
        clip: Whether the run's clipping applies.
    """

    name: str
    parameters: Iterable[nn.Parameter]
    loss: Callable[[Batch, NoiseStreams], Tensor]
    every: int = 1
    since: int = 0
    until: float = math.inf
    lr: float = 1.0
    betas: tuple[float, float] | None = None
    clip: bool = True


class TrainedModule(L.LightningModule):
    """Runs a method's phases; the method says which.

    Noise and training times come from streams (seed, position in the training stream), and the global generator
    (dropout) is seeded anew each step, so neither resuming nor the number of processes changes a run.

    Args:
        training: Lengths, rates, clipping.
        seed: The run's seed.
    """

    def __init__(self, training: Training, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.training_plan, self.seed = training, seed
        self.images_seen, self.steps = 0, 0
        self.mid_step = self.logs_now = False
        self.ema: EMA | None = None
        self._phases: list[Phase] = []

    def phases(self) -> list[Phase]:
        """What is trained; empty for a method that needs no training."""
        return []

    def averaged(self) -> nn.Module | None:
        """The network whose weights are averaged: the one that samples."""
        return None

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Sample with the averaged weights, if there are any, for the length of a ``with`` block."""
        with nullcontext() if self.ema is None else self.ema.swapped():
            yield

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Log what a phase saw under ``train/``, on a step that is logged."""
        if self.logs_now:
            self.log_dict({f"train/{name}": value.detach() for name, value in values.items()})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: evaluating is the evaluator's."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for each phase, which is Adam without weight decay."""
        self._phases = self.phases()
        plan, (beta_1, beta_2) = self.training_plan, self.training_plan.betas
        return [
            torch.optim.AdamW(
                phase.parameters,
                plan.lr * phase.lr,
                betas=phase.betas or (beta_1, beta_2),
                weight_decay=plan.weight_decay,
                fused=True,
            )
            for phase in self._phases
        ]

    def on_fit_start(self) -> None:
        """Let the loader go on where the checkpoint stopped; start the average, unless the checkpoint brought one."""
        # Here and not in on_train_start: Lightning has drawn the first batch by then.
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        data.start_step = self.images_seen // data.batch_size
        network = self.averaged()
        if self.ema is None and network is not None:
            self.ema = EMA(network, self.training_plan.ema_half_life)
        if self.ema is not None:
            self.ema.to(self.device)

    def on_train_start(self) -> None:
        """Take no step more if the checkpoint is of a finished run."""
        if self.images_seen >= self.training_plan.images:
            self.trainer.should_stop = True

    def learning_rate(self) -> float:
        """Rate at the images seen so far: linear warm-up, constant, decay to the floor."""
        plan, seen = self.training_plan, self.images_seen
        rise = min(1.0, (seen + 1) / max(1, plan.warmup))
        fall = min(1.0, max(0.0, (plan.images - seen) / max(1.0, plan.decay * plan.images)))
        return plan.lr * rise * max(fall**plan.decay_power, plan.floor)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run the phases that are due and count the global batch's images.

        Raises:
            UsageError: A loss or gradient is NaN or infinite.
        """
        self.mid_step = True  # an interrupt before the end leaves weights and counters apart
        self.logs_now = self.steps % self.training_plan.log_every == 0
        torch.manual_seed(stream_seed(self.seed, f"step {self.steps} rank {self.global_rank}"))
        noise = NoiseStreams(self.seed, batch.index, "training")
        optimizers = self.optimizers(use_pl_optimizer=True)
        for phase, optimizer in zip(
            self._phases, optimizers if isinstance(optimizers, list) else [optimizers], strict=True
        ):
            if self.steps % phase.every or not phase.since <= self.images_seen < phase.until:
                continue
            loss = phase.loss(batch, noise).mean()
            optimizer.zero_grad()
            with torch.autocast(self.device.type, enabled=False):  # or products of a float32 part would be rounded
                self.manual_backward(loss)
            self._check_finite(phase, loss, optimizer)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate() * phase.lr
            optimizer.step()
            if self.logs_now:
                self.log(f"train/{phase.name}_loss", loss.detach(), prog_bar=True)
        self.steps += 1
        images = len(batch.index) * self.trainer.world_size
        self.images_seen += images
        if self.ema is not None:
            self.ema.update(images, self.images_seen)
        self.mid_step = self.logs_now = False
        if self.steps % self.training_plan.log_every == 1:
            self.log("train/images", float(self.images_seen), prog_bar=True)
        if self.images_seen >= self.training_plan.images:
            self.trainer.should_stop = True

    def _check_finite(self, phase: Phase, loss: Tensor, optimizer: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, (phase.clip and self.training_plan.clip) or float("inf"))
        if not norm.isfinite():  # also when the loss isn't: its gradient carries the NaN
            raise UsageError(
                f"{phase.name}: the loss is {loss.item():.4g} and its gradient {norm.item():.4g} after "
                f"{self.images_seen} images: lower training.lr, or go on from an older checkpoint with resume=FILE"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters and the average, under their own key."""
        checkpoint.setdefault("diffaccel", {}).update(images_seen=self.images_seen, steps=self.steps)
        if self.ema is not None:
            checkpoint["diffaccel"]["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        state = checkpoint["diffaccel"]
        self.images_seen, self.steps = state["images_seen"], state["steps"]
        network = self.averaged()
        if "ema" in state and network is not None:
            self.ema = EMA(network, self.training_plan.ema_half_life)
            self.ema.load_state_dict(state["ema"])
