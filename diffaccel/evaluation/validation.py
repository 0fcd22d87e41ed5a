"""Validation of a fit: early looks at the distances, and the choice of one of several averages.

Both use a seed and an extractor that no point uses, so that nothing is chosen by the images or features that are
reported.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L

from diffaccel.collective import World
from diffaccel.evaluation.evaluator import Evaluator
from diffaccel.methods import Diffusion
from diffaccel.nn.compiling import uncompiled
from diffaccel.report.logs import keep_best
from diffaccel.text.terminal import number, say


class ValidationCallback(L.Callback):
    """Lightning callback that measures a method in training, and chooses its average at the end.

    It precedes the callbacks that write weights and measure points.

    Args:
        validator: Evaluator of the validation's budgets, seed and extractor.
        looks: Fractions of the training after which the distances are measured.
        look_n: Number of images of these measurements.
    """

    def __init__(self, validator: Evaluator, looks: Sequence[float], look_n: int) -> None:
        self.validator, self.looks, self.look_n = validator, sorted(looks), look_n
        self.metric = validator.extractor.metric_name
        self._looked: int | None = None  # images seen up to which all looks are made

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the number of images up to which all looks are made: less than those seen, if one was interrupted."""
        checkpoint.setdefault("diffaccel", {})["looked"] = self._looked

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the number of images up to which all looks are made."""
        self._looked = checkpoint["diffaccel"].get("looked")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Skip the looks that a resumed run has behind it, but make one that was interrupted."""
        assert isinstance(pl_module, Diffusion)
        if self._looked is None:
            self._looked = pl_module.images_seen
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure and log the distances if the step has passed one of the fractions."""
        assert isinstance(pl_module, Diffusion)
        self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, method: Diffusion) -> None:
        total, seen = method.training_plan.images, method.images_seen
        assert self._looked is not None
        if any(self._looked < look * total <= seen for look in self.looks):
            with method.speed.paused():
                method.eval()
                found = self._measure(trainer, method, self.look_n)
                method.train()
            say(f"after {seen:,} of {total:,} images: {self.describe(found, self.look_n)}")
            names = {self._name(budget): value for budget, (value, _) in found.items()}
            if trainer.is_global_zero:
                keep_best(trainer.loggers, [*names])
            for logger in trainer.loggers:
                logger.log_metrics({**names, "validation/images": float(seen)}, step=method.steps)
        self._looked = seen

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Use the average with the smallest distance at the largest budget, if the run is complete."""
        assert isinstance(pl_module, Diffusion)
        if pl_module.images_seen < pl_module.training_plan.images or len(pl_module.emas) < 2:
            return
        pl_module.eval()
        measured: dict[float, dict[float, tuple[float, float]]] = {}
        for half_life in sorted(ema.half_life for ema in pl_module.emas):
            pl_module.use_average(half_life)
            measured[half_life] = self._measure(trainer, pl_module, self.validator.n)
            say(f"average with a half-life of {half_life:,} images: {self.describe(measured[half_life])}")
        largest = max(self.validator.budgets)
        best = min(measured, key=lambda half_life: measured[half_life][largest][0])
        pl_module.use_average(best)
        pl_module.chosen_by = {"chosen_by": self._described(measured)}
        say(f"the average with a half-life of {best:,} images is used: it has the smallest distance at NFE {largest:g}")

    def _measure(self, trainer: L.Trainer, method: Diffusion, n: int) -> dict[float, tuple[float, float]]:
        """Distance of the averaged weights and its standard error, by budget; collective."""
        self.validator.to(method.device)
        world, found = World(trainer.global_rank, trainer.world_size), {}
        # Graphs of the sampling batch take longer to compile than these few images to sample.
        with method.averaged_weights(), uncompiled():
            for budget in self.validator.budgets:
                plan = method.sampler.plan(budget, n)
                metrics = self.validator.measure(method.sampler, budget, plan, n, world=world)["metrics"]
                found[budget] = metrics[self.metric], metrics.get(f"{self.metric}_se", float("nan"))
        return found

    def describe(self, found: Mapping[float, tuple[float, float]], n: int | None = None) -> str:
        """Return measured distances as text."""
        parts = []
        for budget, (value, error) in found.items():
            spread = f" ± {number(error, 2)}" if error == error else ""  # NaN for few images
            parts.append(f"{number(value)}{spread} at NFE {budget:g}")
        return f"{self.metric} {', '.join(parts)} ({n or self.validator.n:,} images)"

    def _described(self, measured: Mapping[float, Mapping[float, tuple[float, float]]]) -> dict[str, Any]:
        """Header entry of the chosen weights."""
        distances = {
            f"{half_life:.0f}": {f"{budget:g}": round(value, 6) for budget, (value, _) in found.items()}
            for half_life, found in measured.items()
        }
        return {
            "metric": self.metric,
            "extractor": self.validator.extractor.sha256,
            "seed": self.validator.seed,
            "n": self.validator.n,
            "distances": distances,
        }

    def _name(self, budget: float) -> str:
        return f"validation/nfe_{budget:03g}/{self.metric}"
