"""Implicit priors: a generator makes the state at the start level in one evaluation (TDPM, arXiv 2202.09671)."""

from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.denoiser import Denoiser, NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.nn import NETWORKS
from diffaccel.noise import NoiseStreams
from diffaccel.prior.base import PRIORS, Plan, Prior
from diffaccel.process import DiscreteVariancePreserving, Process
from diffaccel.solver import Indices, Solver

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
        ratio_star: Noise-to-data ratio of the states, 1 if neither it nor ``K`` is given. At 0 the generator makes the
            images: a GAN, whose one evaluation is all that is spent.
        generator: See above.
        ratio_init: Level of the generator's input in units of the data, for ``separate`` and ``diffuse``.
        token: The network's noise conditioning for ``shared``; that of index ``K`` if it is given.
        K: Instead of ``ratio_star``, on a discrete process: the number of denoising evaluations at full length, which
            go from index K - 1 to 0. K = 0 is a GAN.
        prior_level_offset: The generator's states are those of index K - 1 + offset. With 1, as in TDPM's reference
            code, the first denoising step takes them for less noisy than they are.
        level_scale: Factor on the noise level of the states that is reported to the solver. A generator's states lack
            detail; with a factor slightly below 1, the denoiser removes less of the detail that they have. This matters
            more the fewer evaluations remain.
        network: A network to be the generator for ``separate`` and ``diffuse`` instead of the denoiser's copy, so that
            the denoiser may be exact: a name and keys. Its output is the state in units of variance preserving
            processes, or the image.
        shape: Image shape (C, H, W), for such a network.

    Raises:
        UsageError: The denoiser is exact and there is no ``network``; a value out of range; no ``token``; K on a
            process without indices, or with ``level_scale``.

    References:
        Truncated Diffusion Probabilistic Models (Zheng et al., 2023), https://arxiv.org/abs/2202.09671
    """

    evaluations = 1
    weight_keys = ("generator", "ratio_star", "ratio_init", "token", "K", "prior_level_offset", "network")

    def __init__(
        self,
        denoiser: Denoiser,
        ratio_star: float | None = None,
        generator: Kind = "separate",
        ratio_init: float = 20.0,
        token: float | None = None,
        K: int | None = None,
        prior_level_offset: int = 0,
        level_scale: float = 1.0,
        network: Annotated[dict[str, Any], NETWORKS] = {},  # noqa: B006 (read only; a mapping, for YAML)
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        if generator not in get_args(Kind):
            raise UsageError(f"prior 'implicit': generator is {generator!r}: take {', '.join(get_args(Kind))}")
        if not network and not isinstance(denoiser, NetworkDenoiser):
            raise UsageError(
                "prior 'implicit' is made of the denoiser's network, and this denoiser is exact: set prior.network"
            )
        self.kind, self.ratio_init, self.K = generator, ratio_init, K
        self.ratio_star, self.ratio_made = _levels(denoiser.process, ratio_star, K, prior_level_offset)
        if not level_scale > 0 or (level_scale != 1 and K is not None):
            raise UsageError(
                f"prior 'implicit': level_scale is {level_scale:g}, it must be positive, and 1 if K is set: set "
                "prior_level_offset instead to shift the level by whole indices"
            )
        self.ratio_star *= level_scale
        # With an offset the reference hands the state over as it is in units of variance preserving processes.
        self.handed = ((1 + self.ratio_star**2) / (1 + self.ratio_made**2)) ** 0.5 if prior_level_offset else 1.0
        copies = generator != "shared" and not network
        if self.ratio_star < 0 or (copies and not self.ratio_made < ratio_init):
            raise UsageError(
                f"prior 'implicit': ratio_star is {self.ratio_star} and ratio_init {ratio_init}: neither may be "
                "negative, and ratio_init the larger"
            )
        if generator == "shared" and network:
            raise UsageError("prior 'implicit': a shared generator is the denoiser's network: remove prior.network")
        self.token = self._token(denoiser, token)
        self.uses_denoiser_weights = generator == "shared"
        self.own: Denoiser | None = None
        self.made: nn.Module | None = None
        if network:
            self.made = NETWORKS.build(network, shape=shape)
        elif copies:
            assert isinstance(denoiser, NetworkDenoiser)  # or it was refused above
            self.own = denoiser.copy()

    def _token(self, denoiser: Denoiser, token: float | None) -> float:
        if self.kind == "shared" and token is None and self.K is not None and isinstance(denoiser, NetworkDenoiser):
            index = torch.tensor([self.K], dtype=torch.float64, device="cpu")
            return denoiser.noise_conditioning(index).item()
        if (self.kind == "shared") != (token is not None):
            raise UsageError("prior 'implicit': a shared generator needs its token, the others have none: set token")
        return token or 0.0

    @property
    def generator(self) -> nn.Module | None:
        """The network of its own; None if it is the denoiser's."""
        return self.made if self.own is None else self.own.network

    def classes(self, denoiser: Denoiser) -> int:
        """The generator's, which is the denoiser's network unless it has one of its own."""
        return getattr(self.generator or denoiser.network, "classes", 0)

    @override
    def networks(self) -> dict[str, nn.Module]:
        return {} if self.generator is None else {"generator": self.generator}

    @override
    def highest_ratio(self, denoiser: Denoiser) -> float:
        return self.ratio_star

    def share_weights(self, other: Prior) -> None:
        """See :class:`Prior`.

        Raises:
            UsageError: The other one's generator makes states at another level.
        """
        assert isinstance(other, ImplicitPrior)
        if self.ratio_made != other.ratio_made:
            raise UsageError(
                f"by_nfe: the generator makes states at ratio_star {other.ratio_made:.6g}, and a budget starts at "
                f"{self.ratio_made:.6g}: change prior.level_scale there, not prior.ratio_star"
            )
        self.own, self.made = other.own, other.made

    def plan(self, solver: Solver, budget: float, n: int, extra: int = 0) -> Plan:
        """One evaluation for the generator, the rest for the solver; no solver at ratio 0, K steps at most on indices.

        Raises:
            UsageError: The budget is below the minimum.
        """
        if self.ratio_star == 0:
            if budget < self.evaluations + extra:
                raise UsageError(f"nfe={budget:g} is below the minimum of {self.evaluations + extra}: raise nfe")
            return Plan(self, solver, 0)
        plan = super().plan(solver, budget, n, extra)
        return Plan(self, solver, min(plan.steps, self.K)) if self.K and isinstance(solver.grid, Indices) else plan

    @override
    def forward(
        self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...], chain_steps: int = 0, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = self.handed * self.generate(denoiser, noise, shape)
        ratio = torch.full((len(y),), self.ratio_star, dtype=torch.float64, device=y.device)
        return denoiser.process.from_ratio(y, ratio)

    def latent(self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...]) -> Tensor:
        """Draw what a generator starts from, standard normal of the images' shape, (B, C, H, W)."""
        return noise.normal(torch.empty(len(noise), *shape, device=denoiser.device))

    def generate(
        self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...], z: Tensor | None = None
    ) -> Tensor:
        """Make states x / alpha at ``ratio_made``, (B, C, H, W), with gradients; from a ``latent`` z if it is given."""
        z = self.latent(denoiser, noise, shape) if z is None else z
        if self.own is not None:
            init = torch.full((len(z),), self.ratio_init, dtype=torch.float64, device=z.device)
            x_0, eps = self.own(*denoiser.process.from_ratio(self.ratio_init * z, init), denoiser.condition)
            return x_0 + self.ratio_made * (noise.normal(z) if self.kind == "diffuse" else eps)
        network = denoiser.network if self.made is None else self.made
        output = network(z, torch.full((len(z),), self.token, device=z.device), denoiser.condition).to(z)
        if self.kind == "diffuse":
            return output + self.ratio_made * noise.normal(z)
        return (1 + self.ratio_made**2) ** 0.5 * output


def _levels(process: Process, ratio_star: float | None, K: int | None, offset: int) -> tuple[float, float]:
    """Ratio that sampling starts at, and ratio of the states that the generator is to make.

    Raises:
        UsageError: Both ``ratio_star`` and ``K``; a K or an offset that the process has no index for.
    """
    if K is None:
        if offset:
            raise UsageError("prior 'implicit': prior_level_offset counts indices: set K too, or remove it")
        return (1.0, 1.0) if ratio_star is None else (ratio_star, ratio_star)
    if ratio_star is not None or not isinstance(process, DiscreteVariancePreserving):
        raise UsageError("prior 'implicit': K is for process=vp_discrete, ratio_star for any: set one of them")
    if not (0 <= K <= process.steps and 0 <= offset <= process.steps - K):
        raise UsageError(
            f"prior 'implicit': K={K} and prior_level_offset={offset}: the process has the indices 0 to "
            f"{process.steps - 1}, K goes from 0 to their number, and K - 1 + offset must be an index"
        )
    index = torch.tensor([K - 1, K - 1 + offset], dtype=torch.float64, device="cpu")
    start, made = process.ratio(index).tolist()
    return start, made
