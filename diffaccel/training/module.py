"""Training loop: phases with separate optimisers, counters in images, exact resuming."""

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
from diffaccel.features.independence import feature_networks
from diffaccel.noise import NoiseStreams, stream_seed
from diffaccel.training.ema import EMA
from diffaccel.training.plan import Training


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

    Noise and training times come from streams (seed, position in the training stream), and the global generator, for
    dropout, is seeded in each step, so that neither resuming nor the number of ranks changes a run.

    Args:
        training: Settings of the training.
        seed: Seed of the run.
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
        """Return the phases; empty for a method without training."""
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
        """Use the averaged weights, if there are any, within a ``with`` block."""
        with nullcontext() if self.ema is None else self.ema.swapped():
            yield

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Log values of a phase under ``train/``, if the step is logged."""
        if self.logs_now:
            self.log_dict({f"train/{name}": value.detach() for name, value in values.items()})

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
        # Not in on_train_start, before which Lightning has drawn the first batch.
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        data.start_step = self.images_seen // data.batch_size
        network = self.averaged()
        if self.ema is None and network is not None:
            self.ema = EMA(network, self.training_plan.ema_half_life)
        if self.ema is not None:
            self.ema.to(self.device)

    def on_train_start(self) -> None:
        """Stop if the checkpoint is of a finished run."""
        if self.images_seen >= self.training_plan.images:
            self.trainer.should_stop = True

    def learning_rate(self) -> float:
        """Return the current learning rate: linear warm-up, constant, decay to the floor."""
        plan, seen = self.training_plan, self.images_seen
        rise = min(1.0, (seen + 1) / max(1, plan.warmup))
        fall = min(1.0, max(0.0, (plan.images - seen) / max(1.0, plan.decay * plan.images)))
        return plan.lr * rise * max(fall**plan.decay_power, plan.floor)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run the active phases and count the images of the global batch.

        Raises:
            UsageError: A loss or gradient is NaN or infinite.
        """
        self.mid_step = True  # an interrupt before the end leaves weights and counters inconsistent
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
            with torch.autocast(self.device.type, enabled=False):  # to keep float32 products in full precision
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
        if not norm.isfinite():  # also if the loss is not finite, because its gradient is NaN
            raise UsageError(
                f"{phase.name}: the loss is {loss.item():.4g} and its gradient {norm.item():.4g} after "
                f"{self.images_seen} images: lower training.lr, or resume from an older checkpoint with resume=FILE"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters and the average."""
        checkpoint.setdefault("diffaccel", {}).update(images_seen=self.images_seen, steps=self.steps)
        if self.ema is not None:
            checkpoint["diffaccel"]["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters and the average."""
        state = checkpoint["diffaccel"]
        self.images_seen, self.steps = state["images_seen"], state["steps"]
        network = self.averaged()
        if "ema" in state and network is not None:
            self.ema = EMA(network, self.training_plan.ema_half_life)
            self.ema.load_state_dict(state["ema"])
