"""Evaluation during and after training."""

import lightning as L

from diffaccel.collective import World
from diffaccel.evaluation.evaluator import Evaluator
from diffaccel.methods import Diffusion
from diffaccel.report.logs import distances, keep_best


class EvaluationCallback(L.Callback):
    """Lightning callback that runs an evaluator with a method's averaged weights.

    Args:
        evaluator: Evaluator of the points.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure every budget once training is complete."""
        assert isinstance(pl_module, Diffusion)
        if pl_module.images_seen < pl_module.training_plan.images:
            return  # interrupted: the run will be resumed
        pl_module.eval()
        with pl_module.averaged_weights():
            self.evaluator.run(pl_module.sampler, _world(trainer), trainer.loggers)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure every budget with fewer images during training, and log the metrics.

        The names of the metrics of all judges but the first contain the judge: ``eval/nfe_010/mobilenetv2/kid``.
        Every rank logs the same values, so that a ``ModelCheckpoint`` can monitor them.
        """
        assert isinstance(pl_module, Diffusion)
        n, sampler = pl_module.training_plan.evaluate_n, pl_module.sampler
        self.evaluator.to(pl_module.device)
        with pl_module.averaged_weights():
            for budget in self.evaluator.budgets:
                point = self.evaluator.measure(sampler, budget, sampler.plan(budget, n), n, world=_world(trainer))
                if trainer.is_global_zero:
                    keep_best(trainer.loggers, [f"eval/nfe_{budget:03g}/{name}" for name in distances(point)])
                values = {**point["metrics"], "nfe": point["nfe"]}
                for judge in self.evaluator.judges[1:]:
                    own = point["judges"][judge.name]["metrics"]
                    values |= {f"{judge.name}/{name}": value for name, value in own.items()}
                for name, value in values.items():
                    if value == value:  # the extrapolation of few images is NaN
                        pl_module.log(f"eval/nfe_{budget:03g}/{name}", value)


def _world(trainer: L.Trainer) -> World:
    return World(trainer.global_rank, trainer.world_size)
