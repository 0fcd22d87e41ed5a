"""The method that most rows of the table are: a denoiser, a prior, a solver, and how the denoiser is trained."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.data import Batch, DataModule
from diffaccel.data.augment import LABELS, augment
from diffaccel.denoiser import Denoiser, NetworkDenoiser
from diffaccel.denoiser.levels import Levels
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.parts.registry import Registry
from diffaccel.prior import ChainPrior, Group, Plan, Prior
from diffaccel.solver import Solver
from diffaccel.training.ema import of_network
from diffaccel.training.module import Phase, TrainedModule, Training
from diffaccel.weights import tensors_sha256

METHODS: Registry["Diffusion"] = Registry(
    "method",
    builtins=["diffaccel.methods"],
    context=["denoiser", "prior", "solver", "levels", "training", "shape", "seed"],
)


def nearest(budgets: Collection[int], nfe: float) -> int:
    """Return the highest of the budgets that is not above ``nfe``, or the lowest."""
    return max((budget for budget in budgets if budget <= nfe), default=min(budgets))


@METHODS.base
@METHODS.register("edm")
@METHODS.register("edm_best")
@METHODS.register("ddpm")
class Diffusion(TrainedModule):
    """Baselines: whatever process, denoiser, prior and solver the experiment names.

    Attributes:
        tuned: Whether the settings by budget were searched for the very weights that it has.
        by_nfe: Budget -> prior and solver that take over from that budget on; the lowest also below it. Empty if one
            setting serves all.

    Args:
        denoiser: E[x_0 | x_t] and E[eps | x_t] on a process.
        prior: Law of the starting states.
        solver: Reverse integrator.
        levels: Noise levels to train at.
        training: How to train.
        shape: Image shape (C, H, W).
        seed: The run's seed.
    """

    starts_from: type = Prior
    """Kind of prior without which a sample is none of the method's."""

    def __init__(
        self,
        denoiser: Denoiser,
        prior: Prior,
        solver: Solver,
        levels: Levels,
        training: Training,
        shape: tuple[int, int, int],
        seed: int = 0,
    ) -> None:
        super().__init__(training, seed)
        self.denoiser, self.prior, self.solver, self.levels = denoiser, prior, solver, levels
        self.by_nfe: dict[int, tuple[Prior, Solver]] = {}
        self.tuned = self.truncated = False
        self.shape = shape
        self.frozen = False
        self.classes: int = getattr(denoiser.network, "classes", 0)

    @classmethod
    def keeps_denoiser(cls, node: Mapping[str, Any]) -> bool:
        """Whether a fit of the method as ``node`` describes it leaves the denoiser's weights as they are."""
        return bool(node.get("frozen", False))

    def truncate_denoiser(self, ratio_star: float) -> None:
        """Train the denoiser up to a noise-to-data ratio and no further."""
        self.denoiser.ratio_range = self.denoiser.ratio_range[0], ratio_star
        self.truncated = True

    # A frozen denoiser

    def freeze_denoiser(self) -> None:
        """Keep the denoiser's weights; a checkpoint refers to them by their hash instead of copying them."""
        self.denoiser.requires_grad_(False).eval()
        self.strict_loading = False  # a checkpoint leaves the denoiser out
        self.frozen = True

    def train(self, mode: bool = True) -> "Diffusion":
        """Leave a frozen denoiser without dropout."""
        super().train(mode)
        if self.frozen:
            self.denoiser.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # torch overloads it
        """Leave a frozen denoiser out."""
        state = super().state_dict(*args, **kwargs)
        left_out = "denoiser." if self.frozen else ()
        return {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the denoiser was trained on, or a frozen one's hash."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["diffaccel"] |= self.trained_ratios()
        if self.frozen:
            checkpoint["diffaccel"]["denoiser_sha256"] = tensors_sha256(self.denoiser.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on over another denoiser than the one that was frozen.

        Raises:
            UsageError: The checkpoint was made over other weights.
        """
        super().on_load_checkpoint(checkpoint)
        known = checkpoint["diffaccel"].get("denoiser_sha256")
        if self.frozen and known != tensors_sha256(self.denoiser.state_dict()):
            raise UsageError("resume: the checkpoint belongs to another denoiser: set checkpoint= to the one it had")

    # Training

    def phases(self) -> list[Phase]:  # noqa: D102
        if not isinstance(self.denoiser, NetworkDenoiser):
            raise UsageError("this experiment's denoiser is exact: there is nothing to train")
        if self.training_plan.augment and not getattr(self.denoiser.network, "takes_augment", False):
            raise UsageError(f"training.augment: the network is told of augmentations: set network.augment={LABELS}")
        return [Phase("denoiser", self.denoiser.network.parameters(), self.denoiser_loss)]

    @property
    def trained_classes(self) -> int:
        """Number of classes of what is trained, which labels have to fit; 0 if no label is used."""
        return self.classes if self.trained_networks() else 0

    def trained_networks(self) -> dict[str, nn.Module]:
        """Networks that sample and are trained by steps, by name: they are averaged, and left when training is done."""
        trained = isinstance(self.denoiser, NetworkDenoiser) and not self.frozen
        return {"denoiser": self.denoiser.network} if trained else {}

    def averaged(self) -> nn.Module | None:  # noqa: D102
        networks = self.trained_networks()
        return nn.ModuleDict(networks) if networks else None

    def exports(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        """Return what training leaves: file name -> weights, and the header that describes them.

        The denoiser's are ``raw`` and, averaged, ``ema``; another network's go by its name.
        """
        average = self.ema.state_dict() if self.ema is not None else {}
        found = {}
        for name, network in self.trained_networks().items():
            own = of_network(average, name)
            raw, ema = ("raw", "ema") if name == "denoiser" else (f"{name}_raw", name)
            said = {"kind": name, **(self.trained_ratios() if name == "denoiser" else {})}
            found[raw] = (network.state_dict(), {**said, "averaged": False})
            found[ema] = ({**network.state_dict(), **own}, {**said, "averaged": bool(own)})
        return found

    def trained_ratios(self) -> dict[str, Any]:
        """Noise-to-data ratios that the denoiser is trained on, for its header; none if its levels have no bounds."""
        bounded = self.truncated or getattr(self.levels, "bounded", True)
        return {"trained_ratios": list(self.denoiser.ratio_range)} if bounded else {}

    def describe_fit(self, data: DataModule) -> list[str]:
        """Say how good what was fitted is on held-out images, a line each; nothing that the curve doesn't say."""
        return []

    def denoiser_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Squared error of the network's output at one level a sample, (B,)."""
        u = self.level_quantiles(batch, noise)
        x_0, labels = self.augmented(batch)
        t, weight = self.times(u.to(self.device))
        loss = self.level_loss(x_0, t, noise, self.drop_labels(batch.condition, noise), labels)
        loss = weight.to(loss) * loss
        if self.training_plan.pixel_sum:
            loss = loss * x_0[0].numel()
        if self.logs_now:  # by quarters of the levels' law, from the least noise up
            quarters = [loss[(4 * u).long().clamp_max(3) == quarter] for quarter in range(4)]
            self.note({f"denoiser_loss_quarter_{i}": part.mean() for i, part in enumerate(quarters, 1) if len(part)})
        return loss

    def level_loss(
        self, x_0: Tensor, t: Tensor, noise: NoiseStreams, condition: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """Error at times t, (B,), on images with their class and augmentation labels."""
        assert isinstance(self.denoiser, NetworkDenoiser)
        return self.denoiser.loss(x_0, t, noise.normal(x_0), condition, augment)

    def level_quantiles(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Where each sample's level lies in their law, (B,) in [0, 1]."""
        if not self.training_plan.antithetic:
            return noise.uniform()
        # Neighbours in the stream share a number, in whatever batches and processes they are.
        u = NoiseStreams(self.seed, batch.index // 2, "pairs of levels").uniform()
        return torch.where(batch.index.cpu() % 2 == 1, 1 - u, u)

    def times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Training times at quantiles of the levels, and the weight of the loss there: (B,) -> (B,) each, float64."""
        t = self.levels(self.denoiser, u)
        return t, torch.ones_like(t)

    def drop_labels(self, condition: Tensor | None, noise: NoiseStreams) -> Tensor | None:
        """Replace some labels by the null class."""
        if condition is None or not self.classes:
            return None
        dropped = noise.uniform().to(condition.device) < self.training_plan.label_drop
        return condition.masked_fill(dropped, self.classes)

    def augmented(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Images to train on and their augmentation labels, (B, 9); None if images are left as they are."""
        if not self.training_plan.augment:
            return batch.image, None
        return augment(batch.image, self.training_plan.augment, NoiseStreams(self.seed, batch.index, "augmentation"))

    # Sampling

    extra_evaluations = 0
    """Evaluations per image after the solver."""

    def evaluated_networks(self) -> dict[str, nn.Module]:
        """Networks whose forwards are evaluations, by name."""
        return {"denoiser": self.denoiser.network, **self.prior.networks()}

    def auxiliary_networks(self) -> dict[str, nn.Module]:
        """Networks whose FLOPs count and whose forwards don't."""
        return {}

    def weights_sha256(self) -> list[str]:
        """``NETWORK=HASH`` of the weights of each network that samples: searched settings belong to these weights."""
        networks = {**self.evaluated_networks(), **self.auxiliary_networks()}
        return [f"{name}={tensors_sha256(network.state_dict())[:16]}" for name, network in networks.items()]

    def plan(self, nfe: float, n: int) -> Plan:
        """Spend at most ``nfe`` evaluations per image on n images, burn-in included, by the settings of that budget.

        Raises:
            UsageError: The budget is below the method's minimum.
        """
        self.tune(nfe)
        if isinstance(self.prior, ChainPrior):
            self._require_null_class()
        return self.prior.plan(self.solver, nfe, n, self.extra_evaluations)

    def tune(self, nfe: float) -> None:
        """Take the prior and the solver that ``by_nfe`` has for a budget; they stay until the next call."""
        if self.by_nfe:
            prior, self.solver = self.by_nfe[nearest(self.by_nfe, nfe)]
            self.prior = prior.to(self.device)

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """Give back the experiment's own prior and solver, which training takes, after a ``with`` block that tunes."""
        own = self.prior, self.solver
        try:
            yield
        finally:
            self.prior, self.solver = own

    def planned_nfe(self, plan: Plan, n: int) -> float:
        """Evaluations per image that a plan takes, NaN if the solver is adaptive; the counter says what was spent."""
        if self.solver.adaptive:
            return math.nan
        solver = self.solver.evaluations(plan.steps) if plan.steps else 0
        marginal = plan.skips + solver + self.extra_evaluations + self.prior.evaluations
        return marginal + self.prior.burn_in_evaluations(n) / n

    def open(self, seed: int, group: Group) -> Any:
        """Make what a group's batches share (a chain's state, after burn-in)."""
        return self.prior.open(self.denoiser, seed, group, self.shape)

    def restore(self, seed: int, group: Group, saved: Any) -> Any:
        """Make it anew from what its ``state_dict`` gave after some of the group's batches."""
        return self.prior.restore(self.denoiser, seed, group, self.shape, saved)

    @torch.no_grad()
    def sample(self, seed: int, group: Group, plan: Plan, state: Any = None) -> Iterator[tuple[range, Tensor]]:
        """Make a group's images, batch by batch.

        Args:
            seed: Image i draws from stream (seed, i), chain c from (seed, c).
            group: Image indices, one range a batch.
            plan: How the budget is spent.
            state: What :meth:`open` returned for the group.

        Yields:
            The indices of a batch and its images, (B, C, H, W) in [-1, 1] (not clamped).
        """
        for indices in group:
            noise = NoiseStreams(seed, indices)
            denoiser = self.denoiser.given(self.labels(indices))
            x_t, t = self.prior(denoiser, noise, self.shape, plan, state)
            yield indices, self.finish(self.solver(denoiser, x_t, t, noise, plan.steps) if plan.steps else x_t)

    def labels(self, indices: range) -> Tensor | None:
        """Class labels of images, index mod classes, (B,): balanced, and the same in any batch.

        None, which a network takes for its null class, if it has no classes, and for chains, which change them.
        """
        if not self.classes or isinstance(self.prior, ChainPrior):
            return None
        return torch.tensor(indices, device=self.device) % self.classes

    def _require_null_class(self) -> None:
        """Refuse chains, which change classes, on a network that was never trained without labels."""
        if self.classes and not getattr(self.denoiser.network, "null_class", True):
            raise UsageError(
                "a chain samples without labels, and this conditional network was never trained without: take another "
                "prior, or a network fitted with training.label_drop"
            )

    def finish(self, x_0: Tensor) -> Tensor:
        """What the method does after the solver."""
        return x_0

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: all of a bench is the evaluator's."""
