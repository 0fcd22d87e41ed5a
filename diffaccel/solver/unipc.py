"""UniPC: a multistep predictor-corrector, whose evaluation at a predicted state also corrects that state."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.process import Prediction, Process
from diffaccel.solver.base import SOLVERS, Past, Trajectory
from diffaccel.solver.exponential import add_weighted, data_moments, data_weights
from diffaccel.solver.multistep import Multistep


def _add(x: Tensor, weights: Tensor, past: list[Past]) -> Tensor:
    return add_weighted(x, weights, [earlier.prediction.x_0 for earlier in past])


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC of order p with data prediction: one evaluation per step.

    A step from t to s evaluates the denoiser at x_t, which the previous step predicted from p predictions. With the new
    prediction, p + 1 in total, the step corrects x_t, and then predicts x_s. The evaluation is not repeated at the
    corrected x_t: x_0 is kept, and eps is adapted to the corrected state. The last state is not corrected, because that
    would require another evaluation.

    B(h) is a factor of the weights of a single difference: of the predictor for p = 2, and of the corrector for p = 1.
    It cancels in all others, which are exact for polynomials. So ``bh1`` and ``bh2`` of p = 3 differ in the start-up
    and in the last steps only.

    The method is of order p + 1 given exact starting values. The start-up increases p step by step, which gives order
    3. ``lower_order_final`` gives order 2, because the last step is DDIM's, but smaller errors in few steps.

    Attributes:
        lower_order_final: Whether p is at most S + 1 - k in predictor and corrector of step k of S, the default of the
            authors' code (uni_pc.py, ``sample``).
        variant: B(h): ``bh1`` for h, the default of the authors' code, or ``bh2`` for 1 - exp(-h).

    References:
        UniPC (Zhao et al., 2023), https://arxiv.org/abs/2302.04867, Algorithms 1 and 2
    """

    order: ClassVar[int]

    lower_order_final: bool = True
    variant: Literal["bh1", "bh2"] = "bh1"

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process = denoiser.process
        prediction = self._corrected(process, denoiser(x_t, t), t, trajectory.past[: self.order])
        x_s, _ = process.transition(prediction, t, s)
        past = self.combined(trajectory, Past(prediction, t), self.order)
        if trajectory.final:
            return x_s
        return _add(x_s, data_weights(process, t, s, past, self._moments), past)

    def _corrected(self, process: Process, prediction: Prediction, t: Tensor, past: list[Past]) -> Prediction:
        """Correct the state at t: repeat the step from ``past`` to t with the prediction at t as an additional node."""
        if not past:
            return prediction
        u, nodes = past[0].t, [past[0], Past(prediction, t), *past[1:]]
        change = data_weights(process, u, t, nodes, self._moments)
        change[[0, *range(2, len(nodes))]] -= data_weights(process, u, t, past, self._moments)
        # x_t = alpha_t x_0 + sigma_t eps
        return Prediction(prediction.x_0, _add(prediction.eps, change / process.sigma(t), nodes))

    def _moments(self, h: Tensor, count: int) -> Tensor:
        moments = data_moments(h, count)
        if count == 2 and self.variant == "bh1":
            moments[1] = h * h / 2
        return moments


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
