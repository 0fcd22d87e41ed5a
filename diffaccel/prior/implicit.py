"""Implicit priors: a generator makes the starting state in one evaluation (TDPM, arXiv 2202.09671)."""

from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.condition import Kinds
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
    """Distribution of the states that a generator makes from noise at ``ratio_star``, in one evaluation per image.

    - ``separate``: a separate network with the denoiser's architecture, preconditioning and initial weights. Before
      training, its output is the denoiser's DDIM step from pure noise at ``ratio_init`` to ``ratio_star``.
    - ``diffuse``: x_0 predicted by such a network, plus fresh noise. The noise is exact, so that the generator only has
      to make the image. This differs from TDPM and is close to Diffusion-GAN (arXiv 2206.02262).
    - ``shared``: the denoiser's network, as in TDPM, at the noise conditioning ``token``, which denoising does not use.
      Its output is the state in units of variance preserving processes.

    Args:
        denoiser: Denoiser that the generator is copied from, or shares its network with.
        ratio_star: Noise-to-data ratio of the states, 1 if neither ``ratio_star`` nor ``K`` is given. At 0 the
            generator makes the images in a single evaluation: a GAN.
        generator: Type of the generator, see above.
        ratio_init: Standard deviation of the generator's input in units of the data, for ``separate`` and ``diffuse``.
        token: Noise conditioning of the network for ``shared``; by default that of index ``K``.
        K: Number of denoising evaluations of the full chain, from index K - 1 to 0, on a discrete process; replaces
            ``ratio_star``. K = 0 is a GAN.
        prior_level_offset: Offset of the index of the generator's states, K - 1 + offset. With 1, as in TDPM's
            reference code, the first denoising step assumes less noise than the states have.
        level_scale: Factor on the noise level of the states that is reported to the solver. A generator's states lack
            detail; with a factor slightly below 1, the denoiser removes less of the detail that they have. This matters
            more the fewer evaluations remain.
        network: Network of the generator by name and keys, for ``separate`` and ``diffuse``, instead of a copy of the
            denoiser's, which an exact denoiser does not have. Its output is the state in units of variance preserving
            processes, or the image.
        shape: Image shape (C, H, W), required by ``network``.

    Raises:
        UsageError: The denoiser is exact and ``network`` is not given, a value is out of range, ``token`` is missing,
            or ``K`` is used on a process without indices or with ``level_scale``.

    References:
        Truncated Diffusion Probabilistic Models (Zheng et al., 2023), https://arxiv.org/abs/2202.09671
    """

    evaluations = 1
    fitted_name = "generator"
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
            raise UsageError(
                f"prior 'implicit': generator is {generator!r}, it must be one of {', '.join(get_args(Kind))}"
            )
        if not network and not isinstance(denoiser, NetworkDenoiser):
            raise UsageError(
                "prior 'implicit' copies the denoiser's network, but this denoiser is exact: set prior.network"
            )
        self.kind, self.ratio_init, self.K = generator, ratio_init, K
        self.ratio_star, self.ratio_made = _levels(denoiser.process, ratio_star, K, prior_level_offset)
        if not level_scale > 0 or (level_scale != 1 and K is not None):
            raise UsageError(
                f"prior 'implicit': level_scale is {level_scale:g}, it must be positive, and 1 if K is set: set "
                "prior_level_offset instead to shift the level by whole indices"
            )
        self.ratio_star *= level_scale
        # With an offset, the reference passes the state on unscaled in units of variance preserving processes.
        self.handed = ((1 + self.ratio_star**2) / (1 + self.ratio_made**2)) ** 0.5 if prior_level_offset else 1.0
        copies = generator != "shared" and not network
        if self.ratio_star < 0 or (copies and not self.ratio_made < ratio_init):
            raise UsageError(
                f"prior 'implicit': ratio_star is {self.ratio_star} and ratio_init is {ratio_init}: ratio_star must "
                "not be negative, and ratio_init must be larger"
            )
        if generator == "shared" and network:
            raise UsageError("prior 'implicit': a shared generator uses the denoiser's network: remove prior.network")
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
            raise UsageError(
                "prior 'implicit': prior.generator=shared requires a token, others have none: set or remove it"
            )
        return token or 0.0

    @property
    def generator(self) -> nn.Module | None:
        """Network of the generator; None if the generator is the denoiser's network."""
        return self.made if self.own is None else self.own.network

    @override
    def takes(self, denoiser: Denoiser) -> Kinds:
        return Kinds.taken_by(self.generator or denoiser.network)

    @override
    def networks(self) -> dict[str, nn.Module]:
        return {} if self.generator is None else {"generator": self.generator}

    @override
    def highest_ratio(self, denoiser: Denoiser) -> float:
        return self.ratio_star

    @override
    def known_start(self, denoiser: Denoiser) -> float:
        return self.ratio_star

    def share_weights(self, other: Prior) -> None:
        """See :class:`Prior`.

        Raises:
            UsageError: The other prior's generator makes states at another level.
        """
        assert isinstance(other, ImplicitPrior)
        if self.ratio_made != other.ratio_made:
            raise UsageError(
                f"by_nfe: a budget has ratio_star {self.ratio_made:.6g}, but the generator makes states at "
                f"{other.ratio_made:.6g}: change prior.level_scale there instead of prior.ratio_star"
            )
        self.own, self.made = other.own, other.made

    def plan(self, solver: Solver, budget: float, n: int, extra: int = 0) -> Plan:
        """Give one evaluation to the generator and the rest to the solver.

        There is no solver step at ratio 0, and there are at most K steps on a grid of indices.

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

    @override
    def warm_up(self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...]) -> None:
        self.generate(denoiser, noise, shape)

    def latent(self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...]) -> Tensor:
        """Draw the generator's input, standard normal noise, (B, C, H, W)."""
        return noise.normal(torch.empty(len(noise), *shape, device=denoiser.device))

    def generate(
        self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...], z: Tensor | None = None
    ) -> Tensor:
        """Generate states, with gradients.

        Args:
            denoiser: Denoiser with its condition bound.
            noise: Noise streams of the B images.
            shape: Shape of an image, (C, H, W).
            z: Input of the generator, (B, C, H, W); by default drawn by :meth:`latent`.

        Returns:
            States x / alpha at ``ratio_made``, (B, C, H, W).
        """
        z = self.latent(denoiser, noise, shape) if z is None else z
        if self.own is not None:
            init = torch.full((len(z),), self.ratio_init, dtype=torch.float64, device=z.device)
            x_0, eps = self.own(*denoiser.process.from_ratio(self.ratio_init * z, init), denoiser.condition)
            return x_0 + self.ratio_made * (noise.normal(z) if self.kind == "diffuse" else eps)
        network = denoiser.network if self.made is None else self.made
        output = network(z, torch.full((len(z),), self.token, device=z.device), denoiser.condition_for(network)).to(z)
        if self.kind == "diffuse":
            return output + self.ratio_made * noise.normal(z)
        return (1 + self.ratio_made**2) ** 0.5 * output


def _levels(process: Process, ratio_star: float | None, K: int | None, offset: int) -> tuple[float, float]:
    """Noise-to-data ratio at which sampling starts, and ratio of the states that the generator makes.

    Raises:
        UsageError: Both ``ratio_star`` and ``K`` are given, or the process has no index for ``K`` or the offset.
    """
    if K is None:
        if offset:
            raise UsageError("prior 'implicit': prior_level_offset requires K: set K, or remove prior_level_offset")
        return (1.0, 1.0) if ratio_star is None else (ratio_star, ratio_star)
    if ratio_star is not None or not isinstance(process, DiscreteVariancePreserving):
        raise UsageError("prior 'implicit': K requires process=vp_discrete and excludes ratio_star: set one of them")
    if not (0 <= K <= process.steps and 0 <= offset <= process.steps - K):
        raise UsageError(
            f"prior 'implicit': K={K} and prior_level_offset={offset} are out of range: the indices of the "
            f"process are 0 to {process.steps - 1}, K must be from 0 to {process.steps}, and K - 1 + "
            "prior_level_offset must be an index"
        )
    index = torch.tensor([K - 1, K - 1 + offset], dtype=torch.float64, device="cpu")
    start, made = process.ratio(index).tolist()
    return start, made
