"""Implicit priors: a generator makes the state at the start level in one evaluation (TDPM, arXiv 2202.09671)."""

import copy
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from diffaccel.denoiser import Denoiser, NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.prior.base import PRIORS, Plan, Prior

Kind = Literal["separate", "diffuse", "shared"]


@PRIORS.register("implicit")
class ImplicitPrior(Prior):
    """Start from what a generator makes of noise, one evaluation an image, at the level ``ratio_star``.

    - ``separate``: a network of its own, shaped and preconditioned as the denoiser's and beginning with its weights:
      the DDIM step of that copy from pure noise at ``ratio_init`` to ``ratio_star``, until training has changed it.
    - ``diffuse``: the same copy's x_0, to which fresh noise is added: its noise is exact, so the generator has only the
      image to make. Not TDPM's own recipe (close to Diffusion-GAN, arXiv 2206.02262).
    - ``shared``: TDPM's own: the denoiser's network at a noise conditioning that no denoising uses, ``token``. Its
      output is the state itself in units of variance preserving processes.

    Args:
        denoiser: What the generator is made of.
        ratio_star: Noise-to-data ratio of the states.
        generator: See above.
        ratio_init: Level of the generator's input in units of the data, for ``separate`` and ``diffuse``.
        token: The network's noise conditioning for ``shared``.

    Raises:
        UsageError: The denoiser is exact, so that there is no network; a value out of range; no ``token``.

    References:
        Truncated Diffusion Probabilistic Models (Zheng et al., 2023), https://arxiv.org/abs/2202.09671
    """

    evaluations = 1

    def __init__(
        self,
        denoiser: Denoiser,
        ratio_star: float = 1.0,
        generator: Kind = "separate",
        ratio_init: float = 20.0,
        token: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(denoiser, NetworkDenoiser):
            raise UsageError("prior 'implicit' is made of the denoiser's network, and this denoiser is exact")
        if generator not in get_args(Kind):
            raise UsageError(f"prior 'implicit': generator is {generator!r}: take {', '.join(get_args(Kind))}")
        if not 0 < ratio_star < ratio_init:
            raise UsageError(
                f"prior 'implicit': ratio_star is {ratio_star} and ratio_init {ratio_init}: both must be positive, "
                "and ratio_init the larger"
            )
        if (generator == "shared") != (token is not None):
            raise UsageError("prior 'implicit': a shared generator needs its token, the others have none: set token")
        self.ratio_star, self.ratio_init, self.kind, self.token = ratio_star, ratio_init, generator, token
        self.own = None if generator == "shared" else copy.deepcopy(denoiser)

    def networks(self) -> dict[str, nn.Module]:  # noqa: D102
        return {} if self.own is None else {"generator": self.own.network}

    def forward(  # noqa: D102
        self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...], plan: Plan, state: object = None
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = self.generate(denoiser, noise, shape)
        ratio = torch.full((len(y),), self.ratio_star, dtype=torch.float64, device=y.device)
        return denoiser.process.from_ratio(y, ratio)

    def generate(self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...]) -> Tensor:
        """Make states x / alpha at ``ratio_star``, (B, C, H, W), with gradients."""
        z = noise.normal(torch.empty(len(noise), *shape, device=denoiser.device))
        if self.own is None:
            assert self.token is not None
            output = denoiser.network(z, torch.full((len(z),), self.token, device=z.device), None).to(z)
            return (1 + self.ratio_star**2) ** 0.5 * output
        init = torch.full((len(z),), self.ratio_init, dtype=torch.float64, device=z.device)
        made = self.own(*denoiser.process.from_ratio(self.ratio_init * z, init))
        eps = noise.normal(z) if self.kind == "diffuse" else made.eps
        return made.x_0 + self.ratio_star * eps
