"""What training leaves behind: its state at intervals, and weights at its end."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from diffaccel import __version__
from diffaccel.evaluator.logs import log_weights
from diffaccel.methods import Diffusion
from diffaccel.weights import save_weights


class Checkpointer(L.Callback):
    """Saves ``last.ckpt`` every few minutes, when training is interrupted, and at its end; then the weights.

    A checkpoint replaces the last one only when it is written whole.

    Args:
        out: Folder to write to.
        minutes: Minutes between checkpoints.
        description: What the weights' header says besides counters.
    """

    def __init__(self, out: Path, minutes: float, description: dict[str, Any]) -> None:
        self.out, self.minutes, self.description = out, minutes, description
        self._saved = self._started = time.monotonic()
        self._before = 0.0  # seconds trained in the runs that this one goes on from

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self._before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        self._saved = self._started = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:  # noqa: D102
        assert isinstance(pl_module, Diffusion)
        if pl_module.steps % 10:
            return
        # Rank 0's clock decides for all: saving is collective.
        if trainer.strategy.broadcast(time.monotonic() - self._saved > 60 * self.minutes):
            self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save where a person interrupted; after an error, or within a step, the last good checkpoint stays."""
        assert isinstance(pl_module, Diffusion)
        whole = trainer.world_size == 1 and trainer.training and not pl_module.mid_step
        if isinstance(exception, KeyboardInterrupt) and whole:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the state and, if the budget of images is used up, the weights in bf16, unless they say."""
        assert isinstance(pl_module, Diffusion)
        self.save(trainer)
        if trainer.is_global_zero and pl_module.images_seen >= pl_module.training_plan.images:
            self._export(trainer, pl_module)

    def save(self, trainer: L.Trainer) -> None:
        """Write ``last.ckpt``; every process calls this."""
        partial = self.out / "last.ckpt.partial"
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            partial.replace(self.out / "last.ckpt")
        self._saved = time.monotonic()

    def _export(self, trainer: L.Trainer, method: Diffusion) -> None:
        description = {
            **self.description,
            "module": type(method).__name__,
            "images_seen": method.images_seen,
            "hours": round(self._seconds() / 3600, 3),
            "version": __version__,
        }
        for name, (state, said) in method.exports().items():
            path = self.out / f"{name}.safetensors"
            save_weights(path, state, {**description, **said}, getattr(torch, said.get("dtype", "bfloat16")))
            for logger in trainer.loggers:
                log_weights(logger, path, f"{description['experiment']}-{name}", {**description, **said})
