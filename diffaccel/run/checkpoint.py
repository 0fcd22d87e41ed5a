"""Checkpoints: the training state at intervals, and weights at the end of training."""

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from diffaccel.denoiser import NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.evaluation.provenance import device_name
from diffaccel.experiment.headers import FREE
from diffaccel.methods import Diffusion
from diffaccel.report.logs import log_weights
from diffaccel.storage import check_room, check_target, write_whole
from diffaccel.text.terminal import side_output
from diffaccel.training.module import TrainedModule
from diffaccel.version import __version__
from diffaccel.weights import save_weights, tensors_sha256

IDENTITY = (
    *("method", "training_images", "seed", "shape", "latents", "autoencoder", "network", "denoiser", "process"),
    *("levels", "prior", "posterior", "condition", "init_sha256", "condition_sha256", "label_drop", "condition_drop"),
)
"""Keys of the description that must be equal in a resumed run."""
LATER = ("training_images", "levels", "posterior", "condition", "label_drop", "condition_drop")
"""Keys that training states of earlier versions may lack."""


class WholeFiles(TorchCheckpointIO):
    """Atomic writing of Lightning's checkpoints."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            UsageError: The file can't be written.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)  # a full disk would raise an error without the cause
        write_whole(path, buffer.getbuffer())


class Checkpointer(L.Callback):
    """Callback that saves ``last.ckpt`` at intervals, on interrupts and at the end, and the weights at the end.

    Args:
        out: Folder to write to.
        minutes: Minutes between checkpoints.
        description: Header of the weights without counters, which a resumed run must share.
        recipe: Settings of the loss by dotted keys, which a resumed run must share; not part of the header.
    """

    def __init__(
        self, out: Path, minutes: float, description: dict[str, Any], recipe: Mapping[str, Any] | None = None
    ) -> None:
        self.out, self.minutes, self.description, self.recipe = out, minutes, description, dict(recipe or {})
        self._saved = self._started = time.monotonic()
        self._before = 0.0  # seconds of training before resuming
        self._resumed: Mapping[str, Any] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds()}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the description of the weights, and the settings of the loss, to the checkpoint."""
        assert isinstance(pl_module, TrainedModule)
        own = {"description": self._described(pl_module), "recipe": self.recipe}
        checkpoint.setdefault("diffaccel", {}).update(own)

    def _described(self, method: TrainedModule) -> dict[str, Any]:
        """Header of the weights without counters: of the run that trained them, if this one has only resumed it."""
        before = self._resumed.get("description", {}) if self._trained_nothing(method) else {}
        own = {**self.description, "device": device_name(method.device), "version": __version__}
        return {**own, **before, **self._trained_with(method)}

    def _trained_nothing(self, method: TrainedModule) -> bool:
        """Whether the method is still in the state that the run was resumed from."""
        counters = (self._resumed.get("images_seen"), self._resumed.get("steps"))
        return counters == (method.images_seen, method.steps)

    def _trained_with(self, method: TrainedModule) -> dict[str, Any]:
        """Header entries with the hashes of the frozen networks of the fit, and of the fits that it continues."""
        used = sorted({*self.description.get("feature_networks", ()), *method.feature_networks()})
        return {**stands_on(method), **({"feature_networks": used} if used else {})}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def check_outputs(self, method: TrainedModule) -> None:
        """Check before training that all files can be written.

        Raises:
            UsageError: A file's name is that of a folder, or there is no space for two training states, old and new.
        """
        last = self.out / "last.ckpt"
        for path in (last, *(self.out / f"{name}.safetensors" for name in method.exports())):
            check_target(path)
        trained = sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)
        state = (3 + len(method.training_plan.ema_half_life)) * trained  # with two moments and the averages
        check_room(self.out, state * (1 if last.is_file() else 2), state, "checkpoints")

    def check_same_run(self, path: Path, content: Mapping[str, Any]) -> None:
        """Check that a checkpoint has the settings of this run, which describe the weights.

        Raises:
            UsageError: The settings differ; the message contains one difference.
        """
        own = content["diffaccel"]
        self._resumed = {key: own.get(key, {}) for key in ("description", "images_seen", "steps")}  # without averages
        before = own.get("description", self.description)
        recipe = own.get("recipe", {})
        compared = [(key, before, self.description) for key in IDENTITY if key in before or key not in LATER]
        compared += [(key, recipe, self.recipe) for key in self.recipe if key in recipe]  # of this version's method
        for key, *both in compared:
            there, here = (_fixed(key, said.get(key)) for said in both)
            if there != here:
                raise UsageError(
                    f"resume: {path} is of a run with {key}={there}, but this run has {here}: resume with the "
                    "settings of that run, or choose another out= (init=FILE starts with its weights)"
                )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, before a method fits what is not trained step by step."""
        self._saved = self._started = time.monotonic()

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """End the fit after an interrupt in the step before, whose callbacks have run."""
        assert isinstance(pl_module, TrainedModule)
        if pl_module.interrupted:
            raise KeyboardInterrupt

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, TrainedModule)
        if pl_module.steps % 10:
            return
        # All ranks follow the clock of rank 0, because saving is collective.
        if trainer.strategy.broadcast(time.monotonic() - self._saved > 60 * self.minutes):
            self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save after an interrupt between steps; after an error or within a step, keep the last checkpoint."""
        assert isinstance(pl_module, TrainedModule)
        whole = trainer.world_size == 1 and trainer.training and pl_module.whole
        if isinstance(exception, KeyboardInterrupt) and whole:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the training state and, if the run is complete, the weights, by default in bf16."""
        assert isinstance(pl_module, TrainedModule)
        if self._trained_nothing(pl_module):
            self._started = time.monotonic()  # the hours of a fit do not include those of commands after its end
        self.save(trainer)
        if trainer.is_global_zero and pl_module.images_seen >= pl_module.training_plan.images:
            self._export(trainer, pl_module)

    def save(self, trainer: L.Trainer) -> None:
        """Write ``last.ckpt``; collective."""
        trainer.save_checkpoint(self.out / "last.ckpt")
        self._saved = time.monotonic()

    def _export(self, trainer: L.Trainer, method: TrainedModule) -> None:
        description = {
            **self._described(method),
            "module": type(method).__name__,
            "images_seen": method.images_seen,
            "steps": method.steps,
            "hours": round(self._seconds() / 3600, 3),
        }
        written = []
        for name, (state, said) in method.exports().items():
            path = self.out / f"{name}.safetensors"
            # Densities and noise-level classifiers do not use labels.
            classes = method.classes if said.get("kind") in ("denoiser", "generator") else 0
            header = {**description, "classes": classes, **said}
            save_weights(path, state, header, getattr(torch, said.get("dtype", "bfloat16")))
            written.append((path, header))
        for logger in trainer.loggers:
            for path, said in written:
                with side_output(f"{type(logger).__name__}, of {path.name},"):
                    log_weights(logger, path, f"{description['experiment']}-{path.stem}", said)


def _fixed(part: str, value: Any) -> Any:
    """Part without the keys that a resumed run may change, and with the names of files without their folders."""
    if isinstance(value, Mapping):
        free = FREE[part] if part in ("network", "condition") else ()
        return {key: _fixed("", item) for key, item in value.items() if key not in free}
    if isinstance(value, list | tuple):
        return [_fixed("", item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def stands_on(method: TrainedModule) -> dict[str, str]:
    """Return the header entry with the hash of a frozen denoiser's network; empty for no frozen denoiser."""
    if not isinstance(method, Diffusion) or not method.frozen or not isinstance(method.denoiser, NetworkDenoiser):
        return {}
    return {"stands_on": tensors_sha256(method.denoiser.network.state_dict())}
