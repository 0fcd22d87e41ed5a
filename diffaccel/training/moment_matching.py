"""Matching of the moments of a frozen encoder's features: a Frechet distance as training loss of a generator."""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.collective import all_reduce
from diffaccel.condition import Condition
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
"""Constant added to the variances of the features, in units of the real variances, against singular directions."""

BEGIN = 4
"""Minimum number of generated and real states per feature from which on the loss is used."""


@OBJECTIVES.register("moments")
class MomentMatching(Objective):
    """Move the generator's states along the optimal transport map between Gaussians of generated and real features.

        L = mean |f - T(f)|^2,    T(f) = mu_r + A (f - mu),    A = C_r^1/2 (C_r^1/2 C C_r^1/2)^-1/2 C_r^1/2,

    with T held fixed. Averaged over all states, L is the Frechet distance of the two Gaussians, and has its gradient.
    The features f are spatial means and standard deviations of the feature maps of the frozen denoiser's encoder, in
    units of the standard deviations of real features; extractors that score images are not used. Means over several
    ``rows`` capture vertical position, and means of random ``filters`` (a dilated convolution of normalised channels,
    and ReLU) capture dependence between channels (Saxe et al., 2011). The moments are taken over the latest ``memory``
    generated states and the first ``real_states`` real states, which are many more than a batch. The loss is zero until
    there are four times as many states as features.

    Args:
        memory: Half-life of the moments of generated states, in states.
        ratio: Noise-to-data ratio at which features of images are compared: of real images, and of images that
            ``solver`` makes from the states, so that the generator learns to compensate for the solver's error. Null
            compares features of the states.
        solver: Solver that makes images from states; gradients pass through all of its steps.
        steps: Number of solver steps.
        rows: Number of horizontal bands of each feature map over which means are taken.
        filters: Number of random filters per feature map, equal in every run.
        real_states: Number of real states after which their moments are fixed, to save evaluations.
        lr: See :class:`Objective`.
        since: See :class:`Objective`.
        until: See :class:`Objective`.

    Raises:
        UsageError: ``ratio`` is not positive; ``steps`` is less than 1, or more than 1 without ``ratio``; the solver is
            adaptive; ``rows`` or ``filters`` is out of range; or ``memory`` or ``real_states`` is too small for the
            number of features.

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
            raise UsageError(f"objective 'moments': ratio is {ratio:g}, it must be positive or null")
        if steps < 1 or (steps > 1 and ratio is None):
            raise UsageError(
                f"objective 'moments': steps is {steps}, it must be 1 or more, and 1 without a ratio: set ratio to "
                "compare images"
            )
        self.solver: Solver = SOLVERS.build(solver)
        if self.solver.adaptive:
            raise UsageError(f"objective 'moments': solver {solver.get('name')!r} is adaptive: choose another one")
        if rows < 1 or filters < 0:
            raise UsageError(
                f"objective 'moments': rows is {rows} and filters is {filters}: at least 1 and 0 are required"
            )
        self.memory, self.ratio, self.real_states, self.steps = memory, ratio, real_states, steps
        self.rows, self.filters = rows, filters

    @override
    def attach(self, denoiser: Denoiser, prior: ImplicitPrior, shape: tuple[int, int, int]) -> None:
        self.encoder = Encoder(denoiser, self.ratio or prior.ratio_made, "objective 'moments'", "remove it")
        sizes = self.encoder.sizes(shape)
        if self.rows > (smallest := min(height for _, height, _ in sizes)):
            raise UsageError(
                f"objective 'moments': rows is {self.rows}, it must be at most {smallest}, the height of the smallest "
                "map"
            )
        self.dim = sum((self.rows + 1) * channels + self.filters for channels, _, _ in sizes)
        for name, least in (("memory", BEGIN * self.dim * math.log(2)), ("real_states", BEGIN * self.dim)):
            if (given := getattr(self, name)) < least:
                raise UsageError(
                    f"objective 'moments': {name} is {given}, too few states for the moments of {self.dim} features: "
                    f"at least {math.ceil(least)} are required"
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
        """Compute the encoder's input for states x / alpha (B, C, H, W), in units of variance preserving processes."""
        if self.ratio is None:
            return in_units(prior, y)
        start = torch.full((len(y),), prior.ratio_star, dtype=torch.float64, device=y.device)
        x_t, t = denoiser.process.from_ratio(y, start)
        return self.diffused(self.solver.integrate(denoiser, x_t, t, noise, self.steps), prior, noise)

    def diffused(self, x_0: Tensor, prior: ImplicitPrior, noise: NoiseStreams) -> Tensor:
        """Add noise at the level of the features to images (B, C, H, W), in units of variance preserving processes."""
        ratio = self.ratio or prior.ratio_made
        return (x_0 + ratio * noise.normal(x_0)) / (1 + ratio**2) ** 0.5

    def summary(self, x: Tensor, condition: Condition | None) -> Tensor:
        """Compute the features of states (B, C, H, W) in units of variance preserving processes, (B, dim)."""
        features = []
        for one, filters in zip(self.encoder(x, condition), self.bank, strict=True):
            m = one.to(x)
            features += [F.adaptive_avg_pool2d(m, (self.rows, 1)).flatten(1), (m.var((2, 3)) + 1e-6).sqrt()]
            features += [filters(m)] if self.filters else []
        return torch.cat(features, dim=1)

    def distance(self, made: Tensor, real: Tensor | None) -> Tensor:
        """Update the moments with features, (B, dim), and compute |f - T(f)|^2, (B,); 0 with too few states so far."""
        self._add(made.detach(), real)
        if min(self.made[0, 0], self.real[0, 0]) < BEGIN * self.dim:
            return 0 * made.sum(1)
        theirs, scale = known = self.known or self.reference()
        if real is None:  # cached, because no more will be added and the square root is expensive
            self.known = known
        ours = standardised(moments(self.made), scale)
        f = made / scale.to(made)
        with torch.no_grad():
            transport = transport_between(ours, theirs).to(made)
            target = theirs.mean.to(made) + (f - ours.mean.to(made)) @ transport
        return (f - target).square().sum(1)

    def reference(self) -> tuple[Moments, Tensor]:
        """Return the moments of the standardised real features, and their standard deviations (dim,)."""
        real = moments(self.real)
        scale = real.covariance.diagonal().clamp_min(1e-12).sqrt()
        return standardised(real, scale), scale

    @torch.no_grad()
    def _add(self, made: Tensor, real: Tensor | None) -> None:
        """Add a step's features, of all ranks, to the sums."""
        latest = products(made)
        self.made.mul_(0.5 ** (latest[0, 0].item() / self.memory)).add_(latest)
        if real is not None:
            self.real.add_(products(real))


class RandomFilters(nn.Module):
    """Spatial means of random dilated 3 x 3 filters with bias and ReLU, (B, C, H, W) -> (B, count)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int, count: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = torch.randn(count, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        self.register_buffer("weight", weight, persistent=False)  # not saved, because the seed is fixed
        self.register_buffer("bias", torch.randn(count, generator=generator) / 2, persistent=False)

    @override
    def forward(self, m: Tensor) -> Tensor:
        unit = F.layer_norm(m.movedim(1, -1), (m.shape[1],)).movedim(-1, 1)  # channels differ in scale
        return F.relu(F.conv2d(unit, self.weight, self.bias, padding=2, dilation=2)).to(m).mean((2, 3))


def products(features: Tensor) -> Tensor:
    """Sum (1, f) (1, f)^T of features (B, d) over the batches of all ranks, (d + 1, d + 1) float64."""
    rows = torch.cat([torch.ones_like(features[:, :1]), features], dim=1).double()
    return all_reduce(rows.T @ rows)


def moments(sums: Tensor) -> Moments:
    """Compute moments of features from the sums of (1, f) (1, f)^T, (d + 1, d + 1)."""
    number = sums[0, 0]
    mean = sums[0, 1:] / number
    return Moments(math.floor(number.item()), mean, sums[1:, 1:] / number - torch.outer(mean, mean))


def standardised(given: Moments, scale: Tensor) -> Moments:
    """Divide moments of features by their scale (d,), and add the ridge."""
    ridge = RIDGE * torch.eye(given.dim, dtype=scale.dtype)
    return Moments(given.n, given.mean / scale, given.covariance / torch.outer(scale, scale) + ridge)


def transport_between(ours: Moments, theirs: Moments) -> Tensor:
    """Return the symmetric A (d, d) with A C A = C_r, the optimal transport map between centred Gaussians."""
    values, vectors = torch.linalg.eigh(theirs.root @ ours.covariance @ theirs.root)
    return theirs.root @ (vectors / values.sqrt()) @ vectors.T @ theirs.root
