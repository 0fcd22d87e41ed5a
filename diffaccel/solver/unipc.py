"""UniPC: a multistep predictor-corrector, whose evaluation at a predicted state also corrects that state."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.process import Prediction, Process
from diffaccel.solver.base import SOLVERS, Past, Solver, Trajectory
from diffaccel.solver.exponential import add_weighted, data_weights


def _add(x: Tensor, weights: Tensor, past: list[Past]) -> Tensor:
    return add_weighted(x, weights, [earlier.prediction.x_0 for earlier in past])


class UniPC(Solver):
    """UniPC of order p with data prediction and B_2(h): one evaluation per step.

    A step from t to s evaluates the denoiser at x_t, which the previous step predicted from p predictions. With the new
    prediction, p + 1 in total, the step corrects x_t, and then predicts x_s. The evaluation is not repeated at the
    corrected x_t: x_0 is kept, and eps is adapted to the corrected state. The last state is not corrected, because that
    would require another evaluation.

    The method is of order p + 1 given exact starting values. The start-up increases p step by step, which gives order
    3. The last steps keep the full order, except for the step to ratio 0, which is DDIM's.

    References:
        UniPC (Zhao et al., 2023), https://arxiv.org/abs/2302.04867, Algorithms 1 and 2
    """

    order: ClassVar[int]

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process = denoiser.process
        prediction = self._corrected(process, denoiser(x_t, t), t, trajectory.past[: self.order])
        x_s, _ = process.transition(prediction, t, s)
        trajectory.past = past = [Past(prediction, t), *trajectory.past][: self.order]
        if trajectory.final:
            return x_s
        return _add(x_s, data_weights(process, t, s, past), past)

    def _corrected(self, process: Process, prediction: Prediction, t: Tensor, past: list[Past]) -> Prediction:
        """Correct the state at t: repeat the step from ``past`` to t with the prediction at t as an additional node."""
        if not past:
            return prediction
        u, nodes = past[0].t, [past[0], Past(prediction, t), *past[1:]]
        change = data_weights(process, u, t, nodes)
        change[[0, *range(2, len(nodes))]] -= data_weights(process, u, t, past)
        # x_t = alpha_t x_0 + sigma_t eps
        return Prediction(prediction.x_0, _add(prediction.eps, change / process.sigma(t), nodes))


@SOLVERS.register("unipc2")
@dataclass(frozen=True)
class UniPC2(UniPC):
    """:class:`UniPC` with p = 2."""

    order = 2


@SOLVERS.register("unipc3")
@dataclass(frozen=True)
class UniPC3(UniPC):
    """:class:`UniPC` with p = 3."""

    order = 3
