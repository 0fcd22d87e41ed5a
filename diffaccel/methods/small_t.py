"""Small-time diffusion (Franzese et al., 2023), arXiv 2206.05173: a short diffusion that starts from a density."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.collective import failing_together
from diffaccel.condition import Condition
from diffaccel.data import Batch, DataModule, to_float
from diffaccel.density import Density, NormalDensity, TrainingImages
from diffaccel.errors import UsageError
from diffaccel.methods.base import Diffusion
from diffaccel.methods.registry import METHODS
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import positive
from diffaccel.prior import DensityPrior
from diffaccel.prior.density import full_precision
from diffaccel.training.module import Phase

Weighting = Literal["sigma", "likelihood"]


@METHODS.register("small_t")
class SmallTimeDiffusion(Diffusion):
    """Training of a diffusion up to the prior's noise level, and of a density of the noisy data at that level.

    Score and density have separate objectives and weights, and can be fitted in any order. Densities that have a closed
    form or are fitted by EM are fitted before the first step. A frozen denoiser trained on the full range can be reused
    without training.

    Args:
        frozen: Whether to freeze the denoiser and fit only the density.
        weighting: Weighting of the score's loss at t: ``sigma``, |sigma_t s + z|^2, or ``likelihood``,
            g^2 |s + z / sigma_t|^2 divided by twice the density of the levels, whose mean is term I of the bound for
            any distribution of levels.
        stratified: Whether to stratify the times of a step, with one image per stratum of the levels.
        density_lr: Learning rate of the density, as a factor on the run's.
        parts: Arguments of :class:`Diffusion`; a :class:`~diffaccel.prior.DensityPrior` is fitted, other priors can
            only sample. A denoiser is trained up to the prior's level. The paper's levels are ``uniform`` in time;
            ``log_uniform`` is importance sampling for ``likelihood``.

    References:
        How Much Is Enough? A Study on Diffusion Times in Score-Based Generative Models (Franzese et al., 2023),
        https://arxiv.org/abs/2206.05173
    """

    starts_from = fitted_prior = DensityPrior

    def __init__(
        self,
        frozen: bool = False,
        weighting: Weighting = "sigma",
        stratified: bool = True,
        density_lr: float = 1.0,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        positive("method 'small_t'", density_lr=density_lr)
        self.weighting, self.stratified, self.density_lr = weighting, stratified, density_lr
        if stratified and self.training_plan.antithetic and self.training_plan.batch_size % 2:
            raise UsageError(
                f"method 'small_t': training.batch_size is {self.training_plan.batch_size}, but antithetic pairs of "
                "stratified levels require an even number: make it even, or set training.antithetic=false"
            )
        prior = self.prior
        if isinstance(prior, DensityPrior):
            low, high = self.denoiser.ratio_range
            if not low < prior.ratio_star <= high * 1.001:
                raise UsageError(
                    f"method 'small_t': the prior's noise-to-data ratio {prior.ratio_star:.4g} is outside the "
                    f"denoiser's range [{low:.4g}, {high:.4g}]: change prior.T, or denoiser.ratio_max"
                )
            if not frozen:
                self.truncate_denoiser(prior.ratio_star)
        if frozen:
            self.freeze_denoiser()

    @property
    def density(self) -> Density:
        """Density that is fitted.

        Raises:
            UsageError: The prior is not a density prior.
        """
        if not isinstance(self.prior, DensityPrior):
            raise UsageError("method 'small_t' requires a density prior: set prior=density")
        return self.prior.density

    def phases(self) -> list[Phase]:
        """Return the phases of a denoiser that is not frozen, and of a density that is trained step by step."""
        found = [] if self.frozen else super().phases()
        if parameters := list(self.density.parameters()):
            found.append(Phase("density", parameters, self.density_loss, lr=self.density_lr))
        return found

    @property
    def trained_classes(self) -> int:
        """Number of classes of the denoiser, if it is trained; a density does not use labels."""
        return 0 if self.frozen else self.classes

    @override
    def trained_networks(self) -> dict[str, nn.Module]:
        return super().trained_networks() | ({"density": self.density} if list(self.density.parameters()) else {})

    def exports(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        """Return the denoiser's weights and those of ``density``, averaged, in float32 to keep its moments exact."""
        found = super().exports()
        found.pop("density_raw", None)
        level = {"ratio_star": self.density.ratio, "any_level": not self.density.bound}
        said = {
            "kind": "density",
            "dtype": "float32",
            "density": type(self.density).__name__,
            **level,
            "shape": list(self.shape),
        }
        averages = {name: one for name, one in found.items() if one[1]["kind"] == "density"}
        averages = averages or {"density": (self.density.state_dict(), {})}
        return {**found, **{name: (state, {**about, **said}) for name, (state, about) in averages.items()}}

    def describe_fit(self, data: DataModule) -> list[str]:
        """Describe the likelihood of held-out noisy images, if there are at least two, as its error requires."""
        if not self.density.normalised:
            return []
        held_out = data.size("test") if data.has_split("test") else 0
        if held_out < 2:
            return [f"density: not tested, because {data.label} has {held_out} held-out images (data.test_share=)"]
        with self.averaged_weights():
            density = self.density.cpu().eval()
            found = judge(density, (to_float(images) for _, images, _ in data.batches("test", 250)), self.seed)
        verdict = (
            "" if found.plausible else "; BELOW THE ENTROPY OF THE NOISE: the density is overfitted or not normalised"
        )
        return [
            f"density: {found.bits:.4f} bits/dim on held-out noisy images, {found.gain:.4f} ± {found.se:.4f} below "
            f"N(0, I) (entropy of the noise: {found.floor:.4f}); largest |x_T| of as many draws "
            f"{found.largest:.3g}{verdict}"
        ]

    # Fitting

    def on_fit_start(self) -> None:
        """Fit a density that is not trained step by step, unless the checkpoint contains it."""
        super().on_fit_start()
        if self.density.fitted:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]

        def read(rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
            for index, images, _ in data.batches("train", 250, rank, world):
                yield index, to_float(images).to(self.device)

        flip = self.training_plan.flip and data.mirrors  # otherwise the data are mirrored already
        with failing_together():
            self.density.fit(TrainingImages(read, self.global_rank, self.trainer.world_size, flip, self.seed))
        self.density.broadcast()

    def on_train_start(self) -> None:
        """End the run if nothing is trained step by step; every image has been seen once."""
        if not self._phases:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.images_seen = self.training_plan.images = data.size("train")
        super().on_train_start()

    def density_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Compute the density's loss on the batch with fresh noise, (B,)."""
        y = batch.image + self.density.ratio * noise.normal(batch.image)
        with full_precision(y):
            return self.density.loss(y)

    def level_quantiles(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Draw stratified quantiles, with one stratum per image of the global batch by its position in the stream."""
        if not self.stratified:
            return super().level_quantiles(batch, noise)
        size, index = self.training_plan.batch_size, batch.index
        if not self.training_plan.antithetic:
            return ((index % size) + noise.uniform().to(index.device)) / size
        u = NoiseStreams(self.seed, index // 2, "pairs of levels").uniform().to(index.device)
        lower = (
            (index // 2) % (size // 2) + u
        ) / size  # the first of a pair is in the lower half, its mirror image in the upper half
        return torch.where(index % 2 == 1, 1 - lower, lower)

    @torch.enable_grad()
    def times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the training times and the weights of |sigma_t s + z|^2, (B,) each, float64.

        The density of t = levels(u) is 1 / (dt / du), so that the likelihood's weight is g^2 / (2 sigma^2) dt / du for
        any distribution of levels; with ``log_uniform`` it is constant.
        """
        if self.weighting == "sigma":
            return super().times(u)
        t = self.levels(self.denoiser, u.requires_grad_())
        (derivative,) = torch.autograd.grad(t.sum(), u)
        t, process = t.detach(), self.denoiser.process
        return t, 0.5 * (process.diffusion(t) / process.sigma(t)).square() * derivative

    def level_loss(
        self, x_0: Tensor, t: Tensor, noise: NoiseStreams, condition: Condition | None, augment: Tensor | None
    ) -> Tensor:
        """Compute the squared error of the predicted noise for any prediction target, averaged over C, H, W: (B,)."""
        eps = noise.normal(x_0)
        labels = () if augment is None else (augment,)  # an exact denoiser has no such argument
        found = self.denoiser(self.denoiser.process.marginal(x_0, t, eps), t, condition, *labels).eps
        return (found - eps).square().flatten(1).mean(1)


class Fit(NamedTuple):
    """Likelihood of held-out noisy images under a density.

    Attributes:
        bits: -log nu(y) in bits per dimension of x = y / sqrt(1 + ratio^2), as on variance preserving processes.
        bits_se: Standard error of ``bits``.
        gain: Difference to N(0, I) in bits per dimension, positive if the density is better.
        se: Standard error of ``gain``.
        floor: Lower bound of ``bits``: the entropy of the noise.
        largest: Largest |x| among as many draws as there are images.
    """

    bits: float
    bits_se: float
    gain: float
    se: float
    floor: float
    largest: float

    @property
    def plausible(self) -> bool:
        """Whether ``bits`` is not below the floor; otherwise the density is overfitted or not normalised."""
        return self.bits >= self.floor - 3 * self.bits_se


@torch.no_grad()
def judge(density: Density, batches: Iterable[Tensor], seed: int = 0) -> Fit:
    """Test a density on held-out images.

    Args:
        density: Fitted density.
        batches: Batches of clean images in [-1, 1], (B, C, H, W) each.
        seed: Seed of the noise.
    """
    normal = NormalDensity(density.shape, density.ratio)
    scale, own, control, largest, first = math.sqrt(1 + density.ratio**2), [], [], 0.0, 0
    for x_0 in batches:
        noise = NoiseStreams(seed, range(first, first + len(x_0)), "density")
        first += len(x_0)
        y = x_0 + density.ratio * noise.normal(x_0)
        own.append(density.log_prob(y))
        control.append(normal.log_prob(y))
        z = noise.normal(torch.empty(len(x_0), density.noise_size, device=x_0.device))
        largest = max(largest, density(z, noise.uniform().to(z.device)).abs().max().item() / scale)
    unit = density.size * math.log(2)
    gain, bits = (torch.cat(own) - torch.cat(control)) / unit, -torch.cat(own) / unit - math.log2(scale)
    return Fit(
        bits.mean().item(),
        bits.std().item() / math.sqrt(len(bits)),
        gain.mean().item(),
        gain.std().item() / math.sqrt(len(gain)),
        0.5 * math.log2(2 * math.pi * math.e) + math.log2(density.ratio / scale),
        largest,
    )
