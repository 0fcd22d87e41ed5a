"""The sampler: makes images from a denoiser, a prior and a solver within a budget of network evaluations.

The sampler does not require a trainer. All commands, evaluation during training and notebooks use it.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.budget import nearest
from diffaccel.condition import Condition, Kinds
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.latents import Latents
from diffaccel.nfe import total_flops
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import real_number, whole_number
from diffaccel.prior import Group, Plan, Prior
from diffaccel.sampling import conditions
from diffaccel.sampling.arguments import build_prior, check_part, check_settings, checked_shape, derived
from diffaccel.sampling.batches import counted_batches
from diffaccel.sampling.conditions import Inputs, Observed
from diffaccel.sampling.cost import Sampled, Spent
from diffaccel.sampling.images import ImageKind
from diffaccel.sampling.model import Model, Part
from diffaccel.sampling.precision import arithmetic, check_precision, convert
from diffaccel.sampling.settings import Setting, Tweedie, check_levels, check_steps
from diffaccel.sampling.warm_up import needs_warm_up, warm_up
from diffaccel.solver import DEFAULT, SOLVERS, Solver
from diffaccel.weights import networks_sha256


class Sampler:
    """Sampler of images from a denoiser, a prior and a solver.

    Args:
        model: Denoiser, or :class:`Model`, whose experiment has the defaults of the other arguments.
        prior: Distribution of the states that sampling starts from: a :class:`~diffaccel.prior.Prior`, a name, or a
            name and keys; by default N(0, sigma^2 I) at the denoiser's highest noise level.
        solver: Reverse integrator, in the same forms; by default DPM-Solver++(2M), of order 2 in the last step too.
        shape: Image shape (C, H, W); a :class:`Model` has its own.
        by_nfe: Budget -> prior and solver in effect from that budget on, in place of the arguments ``prior`` and
            ``solver``; the lowest also below it. Empty for the same prior and solver at all budgets. A prior or solver
            given with a :class:`Model` replaces those of its budgets.
        tweedie: Last denoising step; None for no such step, or for the model's.
        kind: Conversion of the output to images; by default rounding to uint8.
        precision: Precision of the networks, see :func:`~diffaccel.sampling.precision.arithmetic`; by default
            ``32-true``. ``64-true`` converts the weights, which all samplers of a model share; the next call of a
            sampler of another precision converts them back. Samplers of different precisions can't run in parallel.
        batch_size: Number of images per batch, by default 100; images do not depend on it beyond rounding.
        inputs: Conditions of the images by index, for networks that take others than labels; None if they are given in
            each call.
        latents: Latents that are sampled, with their decoder, whose cost is measured apart; None for pixels.

    Raises:
        UsageError: A name or key is unknown, a part is of another type, a value is out of range, ``by_nfe`` is given
            beside a prior or solver, or ``shape`` is missing for a denoiser or differs from the model's.

    Attributes:
        tuned: Whether ``by_nfe`` was searched for the weights of the sampler.
        spent: Cost of the latest call; None before the first call.
        shape: Shape of the samples (C, H, W): images, or latents, which are decoded to images of ``image_shape``.
    """

    denoiser: Denoiser
    shape: tuple[int, int, int]
    prior: Prior
    solver: Solver
    by_nfe: dict[int, Setting]
    tweedie: Tweedie | None
    kind: ImageKind
    precision: str
    batch_size: int
    inputs: Inputs | None
    latents: Latents | None
    tuned: bool
    spent: Spent | None
    _warm: dict[tuple[int, float], tuple[int, dict[str, float]]]

    def __init__(
        self,
        model: Denoiser | Model,
        prior: Prior | Part = None,
        solver: Solver | Part = None,
        shape: tuple[int, int, int] | None = None,
        by_nfe: Mapping[int, Setting] | None = None,
        tweedie: Tweedie | None = None,
        kind: ImageKind | None = None,
        precision: str | None = None,
        batch_size: int | None = None,
        inputs: Inputs | None = None,
        latents: Latents | None = None,
    ) -> None:
        check_part("prior", prior, Prior)
        check_part("solver", solver, Solver)
        check_settings(by_nfe, tweedie, kind, prior=prior, solver=solver)
        if isinstance(model, Model):
            vars(self).update(vars(derived(model, prior, solver)))
            if shape is not None and checked_shape(shape) != self.shape:
                raise UsageError(f"Sampler: shape={shape}, but {model.name} makes images of {self.shape}: leave it out")
        else:
            self._assemble(model, prior, solver, shape)
        self.inputs = self.inputs if inputs is None else inputs
        self.latents = self.latents if latents is None else latents
        self.by_nfe, self.tuned = (self.by_nfe, self.tuned) if by_nfe is None else (dict(by_nfe), False)
        self.tweedie, self.kind = tweedie or self.tweedie, kind or self.kind
        self.precision = self.precision if precision is None else check_precision(precision)
        if batch_size is not None:
            self.batch_size = whole_number("batch_size", batch_size)

    def _assemble(
        self, model: Denoiser, prior: Prior | Part, solver: Solver | Part, shape: tuple[int, int, int] | None
    ) -> None:
        """Set the parts, with default settings.

        Raises:
            UsageError: See the class.
        """
        if not isinstance(model, Denoiser):
            raise UsageError(f"Sampler: {model!r} is neither a model nor a denoiser: da.load({model!r}) loads a model")
        if shape is None:
            raise UsageError("Sampler: a denoiser does not define the shape of the images: give shape=(C, H, W)")
        self.denoiser, self.shape = model, checked_shape(shape)
        self.prior = prior if isinstance(prior, Prior) else build_prior(prior, model, self.shape)
        self.solver = solver if isinstance(solver, Solver) else SOLVERS.build(solver or DEFAULT)
        self.by_nfe, self.tuned, self.spent, self._warm, self.inputs, self.latents = {}, False, None, {}, None, None
        self.tweedie, self.kind, self.precision, self.batch_size = None, ImageKind(), "32-true", 100

    def __call__(
        self,
        n: int,
        nfe: float = 10,
        seed: int = 0,
        labels: Sequence[int] | None = None,
        batch_size: int | None = None,
        condition: Condition | str | Sequence[str] | None = None,
    ) -> Tensor:
        """Make images.

        Args:
            n: Number of images.
            nfe: Maximum number of network evaluations per image, including burn-in; ``math.inf`` for an adaptive
                solver.
            seed: Seed; image i has the noise stream (seed, i), chain c (seed, c).
            labels: Class of each image, n integers; by default those of the sampler's inputs, or all classes in turn.
            batch_size: Number of images per batch; by default that of the sampler.
            condition: Condition of the n images, or, for an experiment with captions, a caption of all images or one of
                each; by default the sampler's inputs. Kinds that it leaves out are null.

        Returns:
            Images (n, C, H, W) on the CPU: uint8, or float32 for toy points. Their cost is in ``spent``.

        Raises:
            UsageError: A number is out of range, the budget is below the minimum, labels or condition are missing or
                invalid, or a value is NaN.
        """
        n, seed, nfe = whole_number("n", n), whole_number("seed", seed), real_number("nfe", nfe, infinite=True)
        batch_size = self.batch_size if batch_size is None else whole_number("batch_size", batch_size)
        self._convert()
        plan = self.plan(nfe, n, given=labels is not None or condition is not None)
        given = conditions.given_condition(
            self.takes, plan.prior, n, self.shape, self.denoiser, labels, condition, self.inputs
        )
        if given is None and self.inputs is None:
            conditions.require_inputs(self.takes)
        images = torch.zeros(n, *self.image_shape, dtype=self.kind.dtype)
        evaluations, burn_in = Counter[str](), Counter[str]()
        flops: dict[str, float] = {}
        seconds, decoding, decoding_flops = 0.0, 0.0, 0.0
        for group in plan.prior.schedule(n, batch_size):
            for made in self.batches(plan, group, seed, given=given):
                images[made.indices] = made.images.cpu()
                seconds, decoding = seconds + made.settle(), decoding + made.seconds_decoding
                decoding_flops = made.decoding_flops
                evaluations.update(made.evaluations)
                burn_in.update(made.burn_in)
                flops |= made.flops
        total, burned = self.evaluations_per_image(plan, nfe, evaluations, burn_in, n)
        gflops = total_flops(evaluations, flops) / n / 1e9
        apart = decoding_flops / 1e9, decoding / n
        self.spent = Spent(n, total, burned, dict(evaluations), gflops, seconds / n, *apart)
        return images

    # Settings and networks

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return self.denoiser.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the images (C, H, W), which differs from ``shape`` if latents are sampled."""
        return self.shape if self.latents is None else self.latents.image_shape

    def _modules(self) -> tuple[nn.Module, ...]:
        decoder = () if self.latents is None else (self.latents,)
        return (self.denoiser, self.prior, *(setting.prior for setting in self.by_nfe.values()), *decoder)

    def to(self, device: torch.device | str) -> "Sampler":
        """Move the networks, and convert their weights to the sampler's precision."""
        for module in self._modules():
            module.to(device)
        self._convert()
        return self

    def _convert(self) -> None:
        for module in self._modules():
            convert(module, self.precision)

    def eval(self) -> "Sampler":
        """Set the networks to evaluation mode."""
        for module in self._modules():
            module.eval()
        return self

    def using(
        self, prior: Prior, solver: Solver | None = None, by_nfe: Mapping[int, Setting] | None = None
    ) -> "Sampler":
        """Return a sampler with the same denoiser, and another prior, solver and settings by budget."""
        made = Sampler(
            self.denoiser, prior.to(self.device), solver or self.solver, self.shape, None, self.tweedie, self.kind,
            self.precision, self.batch_size, self.inputs, self.latents,
        )  # fmt: skip
        made.by_nfe = dict(by_nfe or {})
        return made

    def setting(self, nfe: float) -> Setting:
        """Return the prior and the solver of a budget."""
        return self.by_nfe[nearest(self.by_nfe, nfe)] if self.by_nfe else Setting(self.prior, self.solver)

    @property
    def takes(self) -> Kinds:
        """Kinds of conditions of the images."""
        return self.prior.takes(self.denoiser)

    @property
    def classes(self) -> int:
        """Number of classes of the images; 0 if no label is used."""
        return self.takes.classes

    @property
    def extra_evaluations(self) -> int:
        """Evaluations per image after the solver."""
        return int(self.tweedie is not None and self.tweedie.counted)

    def evaluated_networks(self, prior: Prior | None = None) -> dict[str, nn.Module]:
        """Return the networks whose forward passes count as evaluations, by name."""
        return {"denoiser": self.denoiser.network, **(prior or self.prior).networks()}

    def auxiliary_networks(self, prior: Prior | None = None) -> dict[str, nn.Module]:
        """Return the networks that count towards FLOPs but not towards evaluations, by name."""
        return (prior or self.prior).auxiliary_networks()

    def counted_networks(self, prior: Prior | None = None) -> dict[str, nn.Module]:
        """Return all networks whose FLOPs count, by name: also encoders of conditions, which run once per image."""
        encoders = self.denoiser.condition_encoders
        return {**self.evaluated_networks(prior), **self.auxiliary_networks(prior), **encoders}

    def weights_sha256(self) -> list[str]:
        """Return ``NETWORK=HASH`` of the networks of all budgets, which identify the weights of searched settings."""
        priors = (self.prior, *(setting.prior for setting in self.by_nfe.values()))
        return networks_sha256({**self.evaluated_networks(one), **self.auxiliary_networks(one)} for one in priors)

    def arithmetic(self) -> AbstractContextManager[None]:
        """Return the context of the networks' precision."""
        return arithmetic(self.precision, self.device)

    # Budgets

    def plan(self, nfe: float, n: int, given: bool = False) -> Plan:
        """Plan at most ``nfe`` evaluations per image for n images, including burn-in, with the settings of the budget.

        Args:
            nfe: Budget.
            n: Number of images.
            given: Whether the user gives labels or condition, so that not all is by index.

        Raises:
            UsageError: The budget is below the minimum, prior, solver, process and network are incompatible, or the
                grid or the solver does not support the steps.
        """
        prior, solver = self.setting(nfe)
        conditions.check_parts(self.takes, prior, solver, self.denoiser)
        if self.inputs is not None and not given:
            conditions.check_inputs(self.takes, self.inputs, n, self.denoiser.network)
        if self.latents is not None:
            self.latents.to(self.device)
        if solver.counts_by_level(self.denoiser.process):
            solver = solver.counting(self.denoiser.process, prior.highest_ratio(self.denoiser))
        plan = prior.to(self.device).plan(solver, nfe, n, self.extra_evaluations)
        own = {f"prior.{key}": one for key, one in prior.solvers().items()}
        check_levels(self.denoiser, {"solver": solver, **own}, self.tweedie)
        check_steps(self.denoiser, plan)
        return plan

    def planned_nfe(self, plan: Plan, n: int) -> float:
        """Return the planned number of evaluations per image; NaN for an adaptive solver."""
        if plan.solver.adaptive:
            return math.nan
        solver = plan.solver.evaluations(plan.steps) if plan.steps else 0
        marginal = plan.chain_steps + solver + self.extra_evaluations + plan.prior.evaluations
        return marginal + plan.prior.burn_in_evaluations(n) / n

    def evaluations_per_image(
        self, plan: Plan, budget: float, evaluations: Mapping[str, int], burn_in: Mapping[str, int], n: int
    ) -> tuple[float, float]:
        """Return the counted evaluations per image of n images, in total and of the burn-in.

        Raises:
            UsageError: The budget was exceeded.
        """
        evaluated = self.evaluated_networks(plan.prior)
        nfe, burned = (sum(counts.get(name, 0) for name in evaluated) / n for counts in (evaluations, burn_in))
        bounded = nfe if plan.prior.burn_in_counted else nfe - burned
        if bounded > budget * (1 + 1e-9):
            raise UsageError(f"nfe={budget:g} was exceeded: {bounded:.6g} evaluations per image were counted")
        return nfe, burned

    # Drawing

    def open(self, plan: Plan, seed: int, group: Group) -> Any:
        """Create the state shared by a group's batches (a chain's, after burn-in); None for independent images."""
        return plan.prior.open(self.denoiser, seed, group, self.shape)

    def restore(self, plan: Plan, seed: int, group: Group, saved: Any) -> Any:
        """Recreate the shared state from its ``state_dict`` after some of the group's batches."""
        return plan.prior.restore(self.denoiser, seed, group, self.shape, saved)

    @torch.no_grad()
    def draw(
        self, plan: Plan, seed: int, group: Group, state: Any = None, given: Condition | None = None
    ) -> Iterator[tuple[range, Tensor]]:
        """Draw a group's images, batch by batch.

        Args:
            plan: Plan of the budget.
            seed: Seed; image i has the noise stream (seed, i), chain c (seed, c).
            group: Image indices, one range per batch.
            state: State of the group returned by :meth:`open`.
            given: Condition of all n images; by default that of :meth:`condition`.

        Yields:
            Indices of a batch and its samples, (B, C, H, W): images in [-1, 1] (not clamped), or latents.
        """
        for indices in group:
            noise = NoiseStreams(seed, indices, device=self.device)
            condition = (
                self.condition(plan, indices) if given is None else given.select(slice(indices.start, indices.stop))
            )
            observed = Observed.of(self.inputs, condition)
            denoiser = self.denoiser.given(condition, observed.observation if observed else None)
            x_t, t = plan.prior(denoiser, noise, self.shape, plan.chain_steps, state)
            x_t = observed.start(denoiser, x_t, t, noise) if observed else x_t
            x_0 = plan.solver(denoiser, x_t, t, noise, plan.steps) if plan.steps else x_t
            x_0 = x_0 if self.tweedie is None else self.tweedie(denoiser, x_0)
            yield indices, observed.end(x_0) if observed else x_0

    def batches(
        self,
        plan: Plan,
        group: Group,
        seed: int,
        done: int = 0,
        saved: dict[str, Any] | None = None,
        given: Condition | None = None,
    ) -> Iterator[Sampled]:
        """Yield the unfinished batches of a group, with counted evaluations.

        Args:
            plan: Plan of the budget.
            group: Image indices, one range per batch.
            seed: Seed; image i has the noise stream (seed, i).
            done: Number of leading batches that are finished.
            saved: State of the chains after the finished batches.
            given: See :meth:`draw`.
        """
        return counted_batches(self, plan, group, seed, done, saved, given)

    def warmed_up(self, plan: Plan, count: int, given: Condition | None) -> tuple[float, dict[str, float]]:
        """Warm up once for each prior, and for larger batches: the time, 0 for later calls, and FLOPs by network."""
        if not needs_warm_up(self, plan):
            return 0.0, {}
        key = (id(plan.prior), plan.solver.guidance)
        known, flops = self._warm.get(key, (0, {}))
        if count <= known:
            return 0.0, flops
        seconds, flops = warm_up(self, plan, count, given)
        self._warm[key] = count, flops
        return seconds, flops

    def labels(self, plan: Plan, indices: range) -> Tensor | None:
        """Return the class labels of images by their index, see :mod:`diffaccel.sampling.conditions`."""
        return conditions.labels_by_index(self.takes, plan.prior, self.inputs, indices, self.device)

    def classes_of(self, plan: Plan, n: int) -> Tensor | None:
        """Return the classes that n images are made for, see :mod:`diffaccel.sampling.conditions`."""
        return conditions.classes_of(self.labels(plan, range(n)), self.inputs, n)

    def condition(self, plan: Plan, indices: range) -> Condition | None:
        """Return the condition of images by their index, see :mod:`diffaccel.sampling.conditions`."""
        return conditions.condition_by_index(self.takes, plan.prior, self.inputs, indices, self.device)
