"""Truncated diffusion with an adversarial prior (Zheng et al., 2023), arXiv 2202.09671."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.data import Batch
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.levels import Levels
from diffaccel.methods.base import METHODS, Diffusion
from diffaccel.methods.training import Phase, Training
from diffaccel.nn.critic import CRITICS, r1_penalty
from diffaccel.noise import NoiseStreams
from diffaccel.prior import ImplicitPrior, Prior
from diffaccel.solver import Solver


@METHODS.register("tdpm")
class TruncatedDiffusion(Diffusion):
    """A diffusion cut off at ``ratio_star``, whose prior is a generator trained against a critic.

    A training step is up to three phases, in the reference's order: the denoiser (unless it is frozen), the generator,
    the critic. The critic sees states in units of variance preserving processes, x / sqrt(1 + ratio_star^2), so that
    its inputs do not depend on the process.

    Args:
        denoiser: See :class:`Diffusion`.
        prior: An :class:`~diffaccel.prior.ImplicitPrior`.
        solver: See :class:`Diffusion`.
        levels: See :class:`Diffusion`.
        training: See :class:`Diffusion`.
        shape: See :class:`Diffusion`.
        seed: See :class:`Diffusion`.
        critic: The discriminator, by name and keys.
        frozen: Whether the denoiser keeps its weights and only generator and critic are trained.
        generator_lr: The generator's rate over the run's.
        critic_lr: The critic's rate over the run's.
        gamma: Weight of the gradient penalty R1 on real states.
        r1_every: Steps between penalties; the reference does not scale them up for that.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        prior: Prior,
        solver: Solver,
        levels: Levels,
        training: Training,
        shape: tuple[int, int, int],
        seed: int = 0,
        critic: dict[str, Any] = {"name": "stylegan2"},  # noqa: B006 (read only; a mapping, for YAML)
        frozen: bool = False,
        generator_lr: float = 0.1,
        critic_lr: float = 12.5,
        gamma: float = 0.01,
        r1_every: int = 16,
    ) -> None:
        super().__init__(denoiser, prior, solver, levels, training, shape, seed)
        self.critic: nn.Module = CRITICS.build(critic, shape=shape)
        self.generator_lr, self.critic_lr, self.gamma, self.r1_every = generator_lr, critic_lr, gamma, r1_every
        low, high = denoiser.ratio_range
        if not low < self.implicit.ratio_star <= high:
            raise UsageError(
                f"method 'tdpm': ratio_star {self.implicit.ratio_star} is none that the denoiser is trained on, "
                f"[{low:.4g}, {high:.4g}]: set denoiser.ratio_max"
            )
        if frozen and self.implicit.own is None:
            raise UsageError("method 'tdpm': a shared generator trains the denoiser's weights: set method.frozen=false")
        if frozen:
            self.freeze_denoiser()

    @property
    def implicit(self) -> ImplicitPrior:
        """The prior that is trained.

        Raises:
            UsageError: The experiment has another one.
        """
        if not isinstance(self.prior, ImplicitPrior):
            raise UsageError("method 'tdpm' trains an implicit prior: set prior=implicit")
        return self.prior

    def phases(self) -> list[Phase]:  # noqa: D102
        generator = self.denoiser if self.implicit.own is None else self.implicit.own
        found = [] if self.frozen else super().phases()
        for name, parameters, loss, lr in (
            ("generator", generator.network.parameters(), self.generator_loss, self.generator_lr),
            ("critic", self.critic.parameters(), self.critic_loss, self.critic_lr),
        ):
            found.append(Phase(name, parameters, loss, lr=lr, betas=(0.0, 0.99), clip=False))
        return found

    def averaged(self) -> nn.Module | None:
        """Denoiser and generator, whichever is trained."""
        networks = self.evaluated_networks()
        return nn.ModuleDict({name: networks[name] for name in networks if name != "denoiser" or not self.frozen})

    def exports(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        """Denoiser (``ema``, ``raw``) and generator, averaged and not."""
        found: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        average = self.ema.state_dict() if self.ema is not None else {}
        for name, network in self.evaluated_networks().items():
            if name == "denoiser" and self.frozen:
                continue
            own = {key.removeprefix(f"{name}."): one for key, one in average.items() if key.startswith(f"{name}.")}
            ema, raw = ("ema", "raw") if name == "denoiser" else (name, f"{name}_raw")
            found[raw] = (network.state_dict(), {"averaged": False})
            found[ema] = ({**network.state_dict(), **own}, {"averaged": bool(own)})
        return found

    def generator_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Non-saturating logistic loss, softplus(-D(G(z))), (B,)."""
        self.critic.requires_grad_(False)
        loss = F.softplus(-self.judge(self.implicit.generate(self.denoiser, noise, self.shape)))
        self.critic.requires_grad_(True)
        return loss

    def critic_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """softplus(D(G(z))) + softplus(-D(y)) with fresh noise, and R1 on real states when due, (B,)."""
        with torch.no_grad():
            fake = self.implicit.generate(self.denoiser, noise, self.shape)
        real = self.diffused(batch.image, noise)
        loss = F.softplus(self.judge(fake)) + F.softplus(-self.judge(real))
        if self.steps % self.r1_every == 0:
            loss = loss + r1_penalty(self.critic, self.scaled(real), self.gamma)
        return loss

    def diffused(self, x_0: Tensor, noise: NoiseStreams) -> Tensor:
        """Real states x / alpha at the start level, (B, C, H, W)."""
        return x_0 + self.implicit.ratio_star * noise.normal(x_0)

    def scaled(self, y: Tensor) -> Tensor:
        """Bring states x / alpha (B, C, H, W) to variance preserving units."""
        return y / (1 + self.implicit.ratio_star**2) ** 0.5

    def judge(self, y: Tensor) -> Tensor:
        """The critic's logits of states x / alpha: (B, C, H, W) -> (B,)."""
        return self.critic(self.scaled(y))
