"""Matching the moments of a frozen encoder's features: a Frechet distance that a generator is trained by."""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.collective import all_reduce
from diffaccel.data import Batch
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.metrics import Moments
from diffaccel.noise import NoiseStreams
from diffaccel.prior import ImplicitPrior
from diffaccel.solver import SOLVERS, Solver
from diffaccel.training.encoder import Encoder
from diffaccel.training.module import Phase
from diffaccel.training.objectives import OBJECTIVES, Given, Objective, in_units

RIDGE = 1e-4
"""Added to the features' variances, in units of the real ones', for directions in which nothing varies."""

BEGIN = 4
"""States to a feature, made and real, from which their moments are trusted."""


@OBJECTIVES.register("moments")
class MomentMatching(Objective):
    """Move the generator's states along the optimal transport of their features' Gaussian to the real states'.

        L = mean |f - T(f)|^2,    T(f) = mu_r + A (f - mu),    A = C_r^1/2 (C_r^1/2 C C_r^1/2)^-1/2 C_r^1/2,

    T held fixed: over all states this is the Frechet distance of the two Gaussians, and its gradient is the distance's.
    f are means and deviations over space of the frozen denoiser's encoder's maps, in units of the real ones' deviation;
    no extractor that scores takes part. Means over several ``rows`` tell above from below, and those of random
    ``filters`` (a dilated convolution over normalised channels, and ReLU) tell which channels go together (Saxe et al.,
    2011). The moments are of the latest ``memory`` states made, and of the first ``real_states`` real ones, so that
    they are of many more than a batch has; the loss begins when there are four times as many as features.

    Args:
        memory: States after which one counts half in the moments of those made.
        ratio: Noise-to-data ratio at which features are of images: real ones, and what ``solver`` makes of the states,
            so that a generator learns to make up for what that loses. Null: they are of the states.
        solver: Makes images of states; the gradient goes through all of its steps,
        steps: of which it takes so many. One is one evaluation.
        rows: Bands, one above the other, that each map has means of.
        filters: Random filters on each map. They are the same in every run.
        real_states: Real states after which their moments are taken as known, and evaluations of more are saved.
        lr: See :class:`Objective`.
        since: See :class:`Objective`.
        until: See :class:`Objective`.

    Raises:
        UsageError: A ratio that is not positive, no steps, or steps of a solver that can't keep to a number of them or
            without a ratio; no rows, or more than a map has; fewer filters than none; a memory or a number of real
            states too small for the features.

    References:
        On random weights and unsupervised feature learning (Saxe et al., 2011), ICML;
        Backpropagating through Frechet Inception Distance (Mathiasen and Hvilshoj, 2020),
        https://arxiv.org/abs/2009.14075
    """

    made: Tensor
    real: Tensor

    def __init__(
        self,
        memory: int = 10_000,
        ratio: float | None = None,
        real_states: int = 100_000,
        solver: Annotated[dict[str, Any], SOLVERS] = {"name": "ddim"},  # noqa: B006 (read only; a mapping, for YAML)
        steps: int = 1,
        rows: int = 1,
        filters: int = 0,
        lr: float = 1.0,
        since: int = 0,
        until: int | None = None,
    ) -> None:
        super().__init__(lr, since, until)
        if ratio is not None and ratio <= 0:
            raise UsageError(f"objective 'moments': ratio is {ratio:g}, it must be positive, or null for the states'")
        if steps < 1 or (steps > 1 and ratio is None):
            raise UsageError(
                f"objective 'moments': steps is {steps}: take 1 or more, and more than 1 with a ratio alone, as only "
                "images are made in steps"
            )
        self.solver: Solver = SOLVERS.build(solver)
        if self.solver.adaptive:
            raise UsageError(f"objective 'moments': solver {solver.get('name')!r} chooses its own steps: take another")
        if rows < 1 or filters < 0:
            raise UsageError(
                f"objective 'moments': rows is {rows} and filters {filters}: take 1 or more rows, 0 or more filters"
            )
        self.memory, self.ratio, self.real_states, self.steps = memory, ratio, real_states, steps
        self.rows, self.filters = rows, filters

    @override
    def attach(self, denoiser: Denoiser, prior: ImplicitPrior, shape: tuple[int, int, int]) -> None:
        self.encoder = Encoder(denoiser, self.ratio or prior.ratio_made, "objective 'moments'", "remove it")
        sizes = self.encoder.sizes(shape)
        if self.rows > (smallest := min(height for _, height, _ in sizes)):
            raise UsageError(f"objective 'moments': rows is {self.rows}, the smallest map has {smallest}: take no more")
        self.dim = sum((self.rows + 1) * channels + self.filters for channels, _, _ in sizes)
        for name, least in (("memory", BEGIN * self.dim * math.log(2)), ("real_states", BEGIN * self.dim)):
            if (given := getattr(self, name)) < least:
                raise UsageError(
                    f"objective 'moments': {name} is {given}, too few states for the moments of {self.dim} features: "
                    f"take {math.ceil(least)} or more"
                )
        for name in ("made", "real"):  # sums of (1, f) (1, f)^T: number, total and products in one
            self.register_buffer(name, torch.zeros(self.dim + 1, self.dim + 1, dtype=torch.float64))
        self.known: tuple[Moments, Tensor] | None = None
        generator = torch.Generator().manual_seed(0)
        self.bank = nn.ModuleList(RandomFilters(channels, self.filters, generator) for channels, _, _ in sizes)

    @override
    def phases(self, prior: ImplicitPrior, given: Given, shape: tuple[int, ...]) -> list[Phase]:
        generator = prior.generator
        assert generator is not None

        def loss(batch: Batch, noise: NoiseStreams) -> Tensor:
            denoiser = given(batch)
            y = prior.generate(denoiser, noise, shape)
            made = self.summary(self.seen(y, prior, denoiser, noise), denoiser.condition)
            if self.real[0, 0] >= self.real_states:
                return self.distance(made, None)
            with torch.no_grad():
                real = self.summary(self.diffused(batch.image, prior, noise), denoiser.condition)
            return self.distance(made, real)

        return [self.phase("moments", generator.parameters(), loss, lr=self.lr)]

    def seen(self, y: Tensor, prior: ImplicitPrior, denoiser: Denoiser, noise: NoiseStreams) -> Tensor:
        """What the encoder takes of states x / alpha (B, C, H, W), in units of variance preserving processes."""
        if self.ratio is None:
            return in_units(prior, y)
        start = torch.full((len(y),), prior.ratio_star, dtype=torch.float64, device=y.device)
        x_t, t = denoiser.process.from_ratio(y, start)
        return self.diffused(self.solver.integrate(denoiser, x_t, t, noise, self.steps), prior, noise)

    def diffused(self, x_0: Tensor, prior: ImplicitPrior, noise: NoiseStreams) -> Tensor:
        """Images (B, C, H, W) at the level that features are taken at, in units of variance preserving processes."""
        ratio = self.ratio or prior.ratio_made
        return (x_0 + ratio * noise.normal(x_0)) / (1 + ratio**2) ** 0.5

    def summary(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Features of states (B, C, H, W) in units of variance preserving processes, (B, dim)."""
        features = []
        for one, filters in zip(self.encoder(x, condition), self.bank, strict=True):
            m = one.to(x)
            features += [F.adaptive_avg_pool2d(m, (self.rows, 1)).flatten(1), (m.var((2, 3)) + 1e-6).sqrt()]
            features += [filters(m)] if self.filters else []
        return torch.cat(features, dim=1)

    def distance(self, made: Tensor, real: Tensor | None) -> Tensor:
        """|f - T(f)|^2 of features made (B, dim), (B,), given more real ones or none; 0 while too few tell T."""
        self._add(made.detach(), real)
        if min(self.made[0, 0], self.real[0, 0]) < BEGIN * self.dim:
            return 0 * made.sum(1)
        theirs, scale = known = self.known or self.reference()
        if real is None:  # no more will be added, and the square root is what takes time
            self.known = known
        ours = standardised(moments(self.made), scale)
        f = made / scale.to(made)
        with torch.no_grad():
            transport = transport_between(ours, theirs).to(made)
            target = theirs.mean.to(made) + (f - ours.mean.to(made)) @ transport
        return (f - target).square().sum(1)

    def reference(self) -> tuple[Moments, Tensor]:
        """Moments of the real features in units of their deviation, and that deviation (dim,)."""
        real = moments(self.real)
        scale = real.covariance.diagonal().clamp_min(1e-12).sqrt()
        return standardised(real, scale), scale

    @torch.no_grad()
    def _add(self, made: Tensor, real: Tensor | None) -> None:
        """Add a step's features, of all processes, to the sums."""
        latest = products(made)
        self.made.mul_(0.5 ** (latest[0, 0].item() / self.memory)).add_(latest)
        if real is not None:
            self.real.add_(products(real))


class RandomFilters(nn.Module):
    """Means over space of maps' random filters, (B, C, H, W) -> (B, count): 3 x 3 with holes of one, bias, ReLU."""

    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int, count: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = torch.randn(count, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        self.register_buffer("weight", weight, persistent=False)  # drawn anew with the same seed
        self.register_buffer("bias", torch.randn(count, generator=generator) / 2, persistent=False)

    @override
    def forward(self, m: Tensor) -> Tensor:
        unit = F.layer_norm(m.movedim(1, -1), (m.shape[1],)).movedim(-1, 1)  # channels differ in scale by orders
        return F.relu(F.conv2d(unit, self.weight, self.bias, padding=2, dilation=2)).to(m).mean((2, 3))


def products(features: Tensor) -> Tensor:
    """Sums of the (1, f) (1, f)^T of features (B, d) over the batches of all processes, (d + 1, d + 1) in float64."""
    rows = torch.cat([torch.ones_like(features[:, :1]), features], dim=1).double()
    return all_reduce(rows.T @ rows)


def moments(sums: Tensor) -> Moments:
    """Take moments of features from the sums of (1, f) (1, f)^T, (d + 1, d + 1)."""
    number = sums[0, 0]
    mean = sums[0, 1:] / number
    return Moments(math.floor(number.item()), mean, sums[1:, 1:] / number - torch.outer(mean, mean))


def standardised(given: Moments, scale: Tensor) -> Moments:
    """Take moments of features over their scale (d,), with the ridge."""
    ridge = RIDGE * torch.eye(given.dim, dtype=scale.dtype)
    return Moments(given.n, given.mean / scale, given.covariance / torch.outer(scale, scale) + ridge)


def transport_between(ours: Moments, theirs: Moments) -> Tensor:
    """Return the symmetric A (d, d) with A C A = C_r, the optimal map between Gaussians about their means."""
    values, vectors = torch.linalg.eigh(theirs.root @ ours.covariance @ theirs.root)
    return theirs.root @ (vectors / values.sqrt()) @ vectors.T @ theirs.root
