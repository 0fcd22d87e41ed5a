"""Training loop: phases with separate optimisers, counters in images, exact resuming.

A step on a GPU is only queued: nothing in it reads a value from the device, except in every ``log_every``-th step. Such
a read would wait until the device has finished all work before it, and the device would then wait for the next work.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from diffaccel.data import Batch, DataModule
from diffaccel.features.independence import feature_networks
from diffaccel.interrupts import interrupts_held
from diffaccel.noise import NoiseStreams, stream_key
from diffaccel.text.terminal import say
from diffaccel.training.ema import EMA
from diffaccel.training.finite import FiniteCheck
from diffaccel.training.plan import Training
from diffaccel.training.speed import Speed


@dataclass
class Phase:
    """Part of a training step with its own optimiser.

    Attributes:
        name: Prefix of the logged loss.
        parameters: Parameters to optimise.
        loss: Function (batch, noise streams of the batch) -> scalar, or one value per sample (B,).
        every: Number of steps between two runs of the phase.
        since: Number of images seen from which on the phase is active.
        until: Number of images seen from which on the phase is no longer active.
        lr: Learning rate, as a factor on the run's.
        betas: Coefficients of Adam; None for the run's.
        clip: Whether the run's gradient clipping applies.
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
    """Training loop over the phases of a method.

    Noise and training times come from streams (seed, position in the training stream), so that neither resuming nor the
    number of ranks changes a run. The global generator, for dropout, is seeded with step and rank, so that a run with
    dropout depends on the number of ranks, but not on resuming.

    Args:
        training: Settings of the training.
        seed: Seed of the run.

    Attributes:
        ema: Average that evaluations use, and that is exported as the fit's weights; None without averaging.
        further_emas: Averages with other half-lives.
        chosen_by: Header entry that describes how ``ema`` was chosen among several averages; empty if it was not.
        speed: Images per second, and the remaining time.
        defer_check: Whether losses are checked for NaN in logged steps and before they have any effect on a file or an
            evaluation, and not in each step; None for a deferred check on GPUs only.
    """

    def __init__(self, training: Training, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.training_plan, self.seed = training, seed
        self.images_seen, self.steps = 0, 0
        self.mid_step = self.logs_now = self.interrupted = False
        self.ema: EMA | None = None
        self.further_emas: list[EMA] = []
        self.chosen_by: dict[str, Any] = {}
        self.speed = Speed()
        self.defer_check: bool | None = None
        self._check = FiniteCheck(torch.device("cpu"), deferred=False)
        self._phases: list[Phase] = []
        self._noted: dict[str, Tensor] = {}

    frozen = False
    """Whether a denoiser that the fit uses is frozen."""
    classes = 0
    """Number of classes of the trained networks."""

    def phases(self) -> list[Phase]:
        """Return the phases; empty for a method without training."""
        return []

    def exports(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        """Return the trained weights with their headers by file name."""
        return {}

    def describe_fit(self, data: DataModule) -> list[str]:
        """Return lines that describe the quality of the fit on held-out images."""
        return []

    def averaged(self) -> nn.Module | None:
        """Return the module whose weights are averaged; None for no average."""
        return None

    def feature_networks(self) -> list[str]:
        """Return the hashes of the frozen feature networks that losses and critics use, once there are phases.

        An extractor with such weights does not score the trained model. A part that keeps its network out of the
        submodules, for example in a list, overrides this.
        """
        return feature_networks(self.modules())

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Use the averaged weights, if there are any, within a ``with`` block.

        Raises:
            UsageError: A loss or gradient was NaN or infinite.
        """
        self._check.read()
        with nullcontext() if self.ema is None else self.ema.swapped():
            yield

    @property
    def whole(self) -> bool:
        """Whether weights, averages and counters belong to the same step, and no average is in place of the weights."""
        return not self.mid_step and not any(ema.in_use for ema in self.emas)

    @property
    def emas(self) -> list[EMA]:
        """All averages, the one in use first."""
        return [] if self.ema is None else [self.ema, *self.further_emas]

    def use_average(self, half_life: float) -> None:
        """Use the average with a half-life, given in images, in evaluations and as the fit's weights."""
        emas = self.emas
        (self.ema,) = (one for one in emas if one.half_life == half_life)
        self.further_emas = [one for one in emas if one.half_life != half_life]

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Log values of a phase, 0-dimensional tensors, under ``train/`` at the end of the step, if it is logged."""
        if self.logs_now:
            self._noted |= {name: value.detach() for name, value in values.items()}

    def _log_noted(self) -> None:
        """Log the values of the step, read at once, and the number of images.

        On the CPU, because Lightning reads the values of the progress bar again in each of the following steps.
        """
        noted, self._noted = self._noted, {}
        losses = {f"{phase.name}_loss" for phase in self._phases}
        values = torch.stack([value.double() for value in noted.values()]).cpu() if noted else ()
        for name, value in zip(noted, values, strict=True):
            self.log(f"train/{name}", value, prog_bar=name in losses)
        self._log_number("train/images", self.images_seen)
        self.speed.mark(self.images_seen)  # the values above have been read, so that the device is not behind
        if self.speed.images_per_second is not None:
            self._log_number("train/images_per_second", self.speed.images_per_second)
            self._log_number("train/seconds_left", self.speed.seconds_left(self.training_plan.images), shown=False)

    def _log_number(self, name: str, number: float, shown: bool = True) -> None:
        self.log(name, torch.tensor(number, dtype=torch.float64, device="cpu"), prog_bar=shown)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing; a callback runs the evaluator."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Create an AdamW optimiser for each phase; without weight decay it is Adam."""
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
        """Continue the data at the position of the checkpoint, and start the average unless it was restored."""
        self._check = FiniteCheck(self.device, self._defers_check())
        self._place_data()  # not in on_train_start, before which Lightning has drawn the first batch
        network = self.averaged()
        if self.ema is None and network is not None:
            self.ema, *self.further_emas = (EMA(network, one) for one in self.training_plan.ema_half_life)
        for ema in self.emas:
            ema.to(self.device)
            ema.failed = self._check.failed

    def on_train_epoch_start(self) -> None:
        """Continue the data in a new epoch, which begins within a run that is resumed with another batch size."""
        self._place_data()

    def _place_data(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        data.start = self.images_seen

    def _defers_check(self) -> bool:
        """Whether the check for NaN is deferred: by default where reading a number from the device takes time."""
        if self.defer_check is not None:
            return self.defer_check
        # In 16-mixed, a gradient scaler sets the optimiser's flag itself.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        return self.device.type != "cpu" and not scaled

    def on_train_start(self) -> None:
        """Stop if the checkpoint is of a finished run."""
        self.speed = Speed()
        if self.images_seen >= self.training_plan.images:
            self.trainer.should_stop = True

    def learning_rate(self) -> float:
        """Return the current learning rate: linear warm-up, constant, decay to the floor."""
        plan, seen = self.training_plan, self.images_seen
        rise = min(1.0, (seen + 1) / max(1, plan.warmup))
        fall = min(1.0, max(0.0, (plan.images - seen) / max(1.0, plan.decay * plan.images)))
        return plan.lr * rise * max(fall**plan.decay_power, plan.floor)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run the active phases and count the images of the global batch; an interrupt waits for the end of the step.

        Raises:
            UsageError: A loss or gradient is NaN or infinite, or was, if the check is deferred.
        """
        # Not with several processes, which would stop in different steps.
        if self.trainer.world_size > 1:
            return self._step(batch)
        with interrupts_held(self._say_interrupted) as interrupts:
            self._step(batch)
        self.interrupted = bool(interrupts)

    def _say_interrupted(self) -> None:
        say("interrupted: the fit ends after this step (a second interrupt ends it at once, without this step)")

    def _step(self, batch: Batch) -> None:
        self.mid_step = True  # an interrupt before the end leaves weights and counters inconsistent
        self.logs_now = self.steps % self.training_plan.log_every == 0
        torch.manual_seed(stream_key(self.seed, f"step {self.steps} rank {self.global_rank}"))
        noise = NoiseStreams(self.seed, batch.index, "training")
        optimizers = self.optimizers(use_pl_optimizer=True)
        for phase, optimizer in zip(
            self._phases, optimizers if isinstance(optimizers, list) else [optimizers], strict=True
        ):
            if self.steps % phase.every or not phase.since <= self.images_seen < phase.until:
                continue
            with self._check.collected():
                loss = phase.loss(batch, noise).mean()
            self._optimise(phase, optimizer, loss)
        self.steps += 1
        images = len(batch.index) * self.trainer.world_size
        self.images_seen += images
        for ema in self.emas:
            ema.update(images, self.images_seen)
        ends = self.images_seen >= self.training_plan.images
        if self.logs_now or ends:
            self._check.read()
        if self.logs_now:
            self._log_noted()
        self.mid_step = self.logs_now = False
        if ends:
            self.trainer.should_stop = True

    def _optimise(self, phase: Phase, optimizer: Any, loss: Tensor) -> None:
        """Take an optimiser step, unless the loss or the gradient of this or an earlier step is not finite."""
        optimizer.zero_grad()
        with torch.autocast(self.device.type, enabled=False):  # to keep float32 products in full precision
            self.manual_backward(loss)
        norm = self._clip(phase, optimizer)
        self._check.add(phase.name, self.images_seen, loss, norm)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate() * phase.lr
        if self._check.failed is not None:
            optimizer.optimizer.found_inf = self._check.failed  # a fused optimiser takes no step where this is 1
        optimizer.step()
        self.note({f"{phase.name}_loss": loss})

    def _clip(self, phase: Phase, optimizer: Any) -> Tensor:
        """Clip the gradient of a phase, and return its norm before."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if phase.clip and self.training_plan.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.training_plan.clip, norm)
        return norm

    def on_train_end(self) -> None:
        """Check the losses of the last steps, also if the training was stopped.

        Raises:
            UsageError: A loss or gradient was NaN or infinite.
        """
        self._check.read()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters and the averages.

        Raises:
            UsageError: A loss or gradient was NaN or infinite, so that the state must not be kept.
        """
        self._check.read()
        checkpoint.setdefault("diffaccel", {}).update(images_seen=self.images_seen, steps=self.steps)
        if self.ema is not None:
            others = {f"{ema.half_life:.0f}": ema.state_dict() for ema in self.further_emas}
            averages = {"ema": self.ema.state_dict(), "ema_half_life": self.ema.half_life, "ema_others": others}
            checkpoint["diffaccel"].update({**averages, **self.chosen_by})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters and the averages; a finished run keeps the average that was chosen."""
        state, plan = checkpoint["diffaccel"], self.training_plan
        self.images_seen, self.steps = state["images_seen"], state["steps"]
        finished = self.images_seen >= plan.images
        network = self.averaged()
        if "ema" not in state or network is None:
            return
        averages = {state["ema_half_life"]: state["ema"]}
        averages |= {int(half_life): average for half_life, average in state.get("ema_others", {}).items()}
        if len(averages) == 1 and not finished:  # a single average may go on with another half-life
            averages = {plan.ema_half_life[0]: state["ema"]}
        found = {half_life: EMA(network, half_life) for half_life in averages}
        for half_life, ema in found.items():
            ema.load_state_dict(averages[half_life])
        self.ema, *self.further_emas = (found[one] for one in (plan.ema_half_life if len(found) > 1 else found))
        if finished and "chosen_by" in state:
            self.use_average(state["ema_half_life"])
            self.chosen_by = {"chosen_by": state["chosen_by"]}
