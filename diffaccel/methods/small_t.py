"""Small-time diffusion: a short diffusion and a density that bridges the rest (Franzese et al., 2023, 2206.05173)."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.collective import failing_together
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
    """A diffusion up to the prior's level alone, whose start is a density fitted to the noisy data there.

    Score and density have objectives and weights of their own, so they are fitted in any order; densities in closed
    form, and those fitted by EM, are fitted before the first step. A frozen denoiser of the full range may be reused:
    that costs no training, and is at worst as good as one trained on [epsilon, T].

    Args:
        frozen: Whether the denoiser keeps its weights and only the density is fitted.
        weighting: Of the score's loss at t: ``sigma``, |sigma_t s + z|^2, or ``likelihood``, g^2 |s + z / sigma_t|^2
            over twice the levels' density, whose mean is the bound's term I for any levels.
        stratified: Whether a step's times are one of each of as many equal shares of the levels.
        density_lr: The density's learning rate over the run's.
        parts: Those of :class:`Diffusion`; the prior is a :class:`~diffaccel.prior.DensityPrior` to be fitted, any
            other only samples. A denoiser that is trained is trained up to the prior's level. Levels ``uniform`` in
            time are the paper's, ``log_uniform`` the importance sampling that goes with ``likelihood``.

    References:
        How Much Is Enough? A Study on Diffusion Times in Score-Based Generative Models (Franzese et al., 2023),
        https://arxiv.org/abs/2206.05173
    """

    starts_from = DensityPrior

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
                f"method 'small_t': mirrored pairs of levels share out an even batch, training.batch_size is "
                f"{self.training_plan.batch_size}: make it even, or set training.antithetic=false"
            )
        prior = self.prior
        if isinstance(prior, DensityPrior):
            low, high = self.denoiser.ratio_range
            if not low < prior.ratio_star <= high * 1.001:
                raise UsageError(
                    f"method 'small_t': the start's ratio {prior.ratio_star:.4g} is none that the denoiser knows, "
                    f"[{low:.4g}, {high:.4g}]: change prior.T, or denoiser.ratio_max"
                )
            if not frozen:
                self.truncate_denoiser(prior.ratio_star)
        if frozen:
            self.freeze_denoiser()

    @property
    def density(self) -> Density:
        """What is fitted.

        Raises:
            UsageError: The experiment has another prior.
        """
        if not isinstance(self.prior, DensityPrior):
            raise UsageError("method 'small_t' fits a density prior: set prior=density")
        return self.prior.density

    def phases(self) -> list[Phase]:
        """The denoiser's, unless it is frozen, and the density's, if it is trained by steps."""
        found = [] if self.frozen else super().phases()
        if parameters := list(self.density.parameters()):
            found.append(Phase("density", parameters, self.density_loss, lr=self.density_lr))
        return found

    @property
    def trained_classes(self) -> int:
        """The denoiser's; a density sees no labels."""
        return 0 if self.frozen else self.classes

    @override
    def trained_networks(self) -> dict[str, nn.Module]:
        return super().trained_networks() | ({"density": self.density} if list(self.density.parameters()) else {})

    def exports(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        """The denoiser's, and ``density``, averaged, in float32: rounding would move its moments."""
        found = super().exports()
        found.pop("density_raw", None)
        state, _ = found.get("density", (self.density.state_dict(), {}))
        level = {"ratio_star": self.density.ratio, "any_level": not self.density.bound}
        said = {
            "kind": "density",
            "dtype": "float32",
            "density": type(self.density).__name__,
            **level,
            "shape": list(self.shape),
        }
        return {**found, "density": (state, said)}

    def describe_fit(self, data: DataModule) -> list[str]:
        """Say what the density knows of held-out noisy images."""
        if not self.density.normalised:
            return []
        with self.averaged_weights():
            density = self.density.cpu().eval()
            found = judge(density, (to_float(images) for _, images, _ in data.batches("test", 250)), self.seed)
        verdict = (
            "" if found.plausible else "; BELOW THE NOISE'S OWN ENTROPY: it has learned noise, or isn't normalised"
        )
        return [
            f"density: {found.bits:.4f} bits/dim on held-out noisy images, {found.gain:.4f} ± {found.se:.4f} below "
            f"N(0, I) (the noise alone has {found.floor:.4f}); largest |x_T| of as many draws "
            f"{found.largest:.3g}{verdict}"
        ]

    # Fitting

    def on_fit_start(self) -> None:
        """Fit what needs no steps, unless the checkpoint brought it."""
        super().on_fit_start()
        if self.density.fitted:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]

        def read(rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
            for index, images, _ in data.batches("train", 250, rank, world):
                yield index, to_float(images).to(self.device)

        flip = self.training_plan.flip
        with failing_together():
            self.density.fit(TrainingImages(read, self.global_rank, self.trainer.world_size, flip, self.seed))
        self.density.broadcast()

    def on_train_start(self) -> None:
        """Where there is nothing to step, the run is done: it has seen every image once."""
        if not self._phases:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.images_seen = self.training_plan.images = data.size("train")
        super().on_train_start()

    def density_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """The density's loss on the batch with fresh noise, (B,)."""
        y = batch.image + self.density.ratio * noise.normal(batch.image)
        with full_precision(y):
            return self.density.loss(y)

    def level_quantiles(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """One of each of as many equal shares as the global batch has images, by the position in the stream."""
        if not self.stratified:
            return super().level_quantiles(batch, noise)
        size, index = self.training_plan.batch_size, batch.index.cpu()
        if not self.training_plan.antithetic:
            return ((index % size) + noise.uniform()) / size
        u = NoiseStreams(self.seed, index // 2, "pairs of levels").uniform()
        lower = ((index // 2) % (size // 2) + u) / size  # pairs share out the lower half, mirrors the upper one
        return torch.where(index % 2 == 1, 1 - lower, lower)

    @torch.enable_grad()
    def times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Training times and the weights of |sigma_t s + z|^2 there, (B,) each, float64.

        One over the density of t = levels(u) is dt / du, so that g^2 / (2 sigma^2) dt / du is the likelihood's weight
        for any levels: with ``log_uniform`` a constant.
        """
        if self.weighting == "sigma":
            return super().times(u)
        t = self.levels(self.denoiser, u.requires_grad_())
        (derivative,) = torch.autograd.grad(t.sum(), u)
        t, process = t.detach(), self.denoiser.process
        return t, 0.5 * (process.diffusion(t) / process.sigma(t)).square() * derivative

    def level_loss(
        self, x_0: Tensor, t: Tensor, noise: NoiseStreams, condition: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """Squared error of the predicted noise, whatever the network predicts, mean over C, H, W: (B,)."""
        eps = noise.normal(x_0)
        labels = () if augment is None else (augment,)  # an exact denoiser takes none
        found = self.denoiser(self.denoiser.process.marginal(x_0, t, eps), t, condition, *labels).eps
        return (found - eps).square().flatten(1).mean(1)


class Fit(NamedTuple):
    """How well a density knows held-out noisy images.

    Attributes:
        bits: -log nu(y) in bits per dimension of VP's x = y / sqrt(1 + ratio^2).
        bits_se: Its standard error.
        gain: Bits per dimension below N(0, I).
        se: Standard error of the gain.
        floor: What no density can have less of: the entropy of the noise.
        largest: Largest |x| of as many draws.
    """

    bits: float
    bits_se: float
    gain: float
    se: float
    floor: float
    largest: float

    @property
    def plausible(self) -> bool:
        """Whether it keeps to the floor; below it noise was learned by heart, or the density isn't normalised."""
        return self.bits >= self.floor - 3 * self.bits_se


@torch.no_grad()
def judge(density: Density, batches: Iterable[Tensor], seed: int = 0) -> Fit:
    """Test a density on clean images in [-1, 1], (B, C, H, W) each, with noise from streams of their own."""
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
