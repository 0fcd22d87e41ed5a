"""Truncated diffusion with an adversarial prior (Zheng et al., 2023), arXiv 2202.09671."""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from diffaccel.data import Batch
from diffaccel.denoiser import Denoiser, NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.methods.base import Diffusion
from diffaccel.methods.registry import METHODS
from diffaccel.metrics.states import compare_states
from diffaccel.nn.critic import CRITICS, Critic, r1_penalty
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import at_least, positive
from diffaccel.prior import GaussianPrior, ImplicitPrior, Prior
from diffaccel.training.feature_critic import FeatureCritic  # noqa: F401 (registers it)
from diffaccel.training.module import Phase
from diffaccel.training.moment_matching import MomentMatching  # noqa: F401 (registers it)
from diffaccel.training.objectives import OBJECTIVES, in_units


@METHODS.register("tdpm")
class TruncatedDiffusion(Diffusion):
    """Training of a diffusion truncated at ``ratio_star``, and of an implicit prior with a critic.

    A training step has up to three phases, in the reference's order: the denoiser (unless it is frozen or exact), the
    generator, and the critic. The denoiser is trained up to ``ratio_star``. The critic's inputs are states in units of
    variance preserving processes, x / sqrt(1 + ratio^2), which do not depend on the process, and labels if the network
    has classes. With ``ratio_star`` 0 only generator and critic are trained, as a GAN; with a Gaussian prior only the
    denoiser is trained, as in plain diffusion.

    Args:
        critic: Critic by name and keys.
        frozen: Whether to freeze the denoiser and train only generator and critic.
        generator_lr: Learning rate of the generator, as a factor on the run's.
        critic_lr: Learning rate of the critic, as a factor on the run's.
        generator_since: Number of images seen from which on the generator is trained against the critic, for example
            after a warm-up by ``objectives``.
        critic_since: Number of images seen from which on the critic is trained.
        gamma: Weight of the R1 gradient penalty on real states.
        r1_every: Number of the critic's steps between penalties, which, as in the reference, are not scaled by this
            number.
        game_every: Number of steps between two steps of generator and critic against each other.
        objectives: Further objectives that train the generator with the frozen denoiser, each with its own optimiser:
            names (``ode_pair``, ``distribution_matching``, ``moments``) and keys.
        parts: Arguments of :class:`Diffusion`; the prior is an :class:`~diffaccel.prior.ImplicitPrior`, or one that
            requires no training.
    """

    starts_from = fitted_prior = ImplicitPrior

    def __init__(
        self,
        critic: Annotated[dict[str, Any], CRITICS] = {"name": "stylegan2"},  # noqa: B006 (read only; a mapping, for YAML)
        frozen: bool = False,
        generator_lr: float = 0.1,
        critic_lr: float = 12.5,
        generator_since: int = 0,
        critic_since: int = 0,
        gamma: float = 0.01,
        r1_every: int = 16,
        game_every: int = 1,
        objectives: Annotated[list[dict[str, Any]], OBJECTIVES] = [],  # noqa: B006 (read only; a list, for YAML)
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        positive("method 'tdpm'", generator_lr=generator_lr, critic_lr=critic_lr)
        at_least(0, "method 'tdpm'", generator_since=generator_since, critic_since=critic_since, gamma=gamma)
        at_least(1, "method 'tdpm'", r1_every=r1_every, game_every=game_every)
        self.generator_lr, self.critic_lr, self.gamma, self.r1_every = generator_lr, critic_lr, gamma, r1_every
        self.generator_since, self.critic_since, self.game_every = generator_since, critic_since, game_every
        self.penalty: Tensor | None = None  # the latest one, because not every logged step computes it
        self.critic: Critic | None = None
        denoiser, prior = self.denoiser, self.prior
        if isinstance(prior, ImplicitPrior):
            context = {
                "denoiser": denoiser,
                "ratio": prior.ratio_made,
                "image": self.takes.image,
                "mask": self.takes.mask,
                "tokens": self.takes.tokens,
            }
            self.critic = CRITICS.build(critic, shape=self.shape, classes=self.classes, **context)
        if self.critic is not None and self.critic.needs_trained_denoiser and not frozen:
            raise UsageError(
                f"method 'tdpm': critic {critic['name']!r} requires a trained, frozen denoiser: set method.frozen=true"
            )
        if frozen:
            if isinstance(prior, ImplicitPrior) and prior.generator is None:
                raise UsageError(
                    "method 'tdpm': a shared generator trains the denoiser's weights: set method.frozen=false"
                )
            self.freeze_denoiser()
        self._truncate(denoiser, prior)
        self._objectives = [OBJECTIVES.build(node) for node in objectives]
        if objectives and isinstance(denoiser, NetworkDenoiser) and not frozen:
            raise UsageError("method 'tdpm': objectives require a trained, frozen denoiser: set method.frozen=true")
        for objective in self._objectives:
            objective.attach(denoiser, self.implicit, self.shape)
        self.learning = nn.ModuleList(self._objectives)  # registers the parameters of the objectives

    def _truncate(self, denoiser: Denoiser, prior: Prior) -> None:
        """Restrict a denoiser's training to levels up to the start level.

        Raises:
            UsageError: The start level is outside the denoiser's range.
        """
        star = prior.ratio_star if isinstance(prior, ImplicitPrior | GaussianPrior) else None
        low, high = denoiser.ratio_range
        if star is None or star == 0:
            return
        if not low < star <= high * 1.001:
            raise UsageError(
                f"method 'tdpm': ratio_star {star:.4g} is outside the denoiser's range [{low:.4g}, {high:.4g}]: set "
                "denoiser.ratio_max"
            )
        if isinstance(denoiser, NetworkDenoiser) and not self.frozen:
            self.truncate_denoiser(star)

    @property
    def implicit(self) -> ImplicitPrior:
        """Prior that is trained.

        Raises:
            UsageError: The prior is not implicit.
        """
        if not isinstance(self.prior, ImplicitPrior):
            raise UsageError("method 'tdpm' requires an implicit prior to train: set prior=implicit")
        return self.prior

    @property
    def trains_denoiser(self) -> bool:
        """Whether the denoiser is trained."""
        image_level = isinstance(self.prior, ImplicitPrior) and self.prior.ratio_star == 0
        return isinstance(self.denoiser, NetworkDenoiser) and not self.frozen and not image_level

    @override
    def phases(self) -> list[Phase]:
        found = super().phases() if self.trains_denoiser else []
        if not isinstance(self.prior, ImplicitPrior):
            if not found:
                raise UsageError(
                    "method 'tdpm': with a frozen denoiser and no implicit prior there is nothing to train: set "
                    "method.frozen=false or prior=implicit"
                )
            return found
        names: Counter[str] = Counter()
        for objective in self._objectives:
            for phase in objective.phases(self.prior, self.given, self.shape):
                names[phase.name] += 1  # an objective may be used twice, with other keys, and logs both losses
                again = f"_{names[phase.name]}" if names[phase.name] > 1 else ""
                found.append(replace(phase, name=phase.name + again))
        assert self.critic is not None
        generator = self.prior.generator or self.denoiser.network
        for name, network, loss, lr, since in (
            ("generator", generator, self.generator_loss, self.generator_lr, self.generator_since),
            ("critic", self.critic, self.critic_loss, self.critic_lr, self.critic_since),
        ):
            betas, every = (0.0, 0.99), self.game_every
            game = Phase(name, network.parameters(), loss, every, since=since, lr=lr, betas=betas, clip=False)
            found.append(game)
        return found

    @override
    def trained_networks(self) -> dict[str, nn.Module]:
        shared = isinstance(self.prior, ImplicitPrior) and self.prior.kind == "shared"
        own = {"denoiser": self.denoiser.network} if self.trains_denoiser or shared else {}
        return {**own, **self.prior.networks()}

    # Generator and critic

    def given(self, batch: Batch) -> Denoiser:
        """Return the denoiser with the part of a batch's condition bound that the generator takes."""
        return self.denoiser.given(self.condition(batch))

    def generator_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Compute the non-saturating logistic loss, softplus(-D(G(z))), (B,)."""
        assert self.critic is not None
        self.critic.requires_grad_(False)
        loss = F.softplus(-self.judge(self.implicit.generate(self.given(batch), noise, self.shape), batch))
        self.critic.requires_grad_(True)
        return loss

    def critic_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Compute softplus(D(G(z))) + softplus(-D(y)), plus R1 on real states in every ``r1_every``-th step, (B,)."""
        assert self.critic is not None
        with torch.no_grad():
            made = self.implicit.generate(self.given(batch), noise, self.shape)
        real = self.diffused(batch.image, noise)
        d_made, d_real = self.judge(made, batch), self.judge(real, batch)
        loss = F.softplus(d_made) + F.softplus(-d_real)
        if self.steps // self.game_every % self.r1_every == 0:
            condition = self.condition(batch)
            seen = self.critic.seen(in_units(self.implicit, real), condition)
            penalty = r1_penalty(partial(self.critic.logits, condition=condition), seen, self.gamma)
            self.penalty = penalty.mean().detach()
            loss = loss + penalty
        if self.logs_now:
            if self.penalty is not None:
                self.note({"critic_penalty": self.penalty})
            self.note({"critic_real": d_real.mean(), "critic_made": d_made.mean()})
            self.note({f"generator_{name}": value for name, value in compare_states(made, real).items()})
        return loss

    def diffused(self, x_0: Tensor, noise: NoiseStreams) -> Tensor:
        """Add noise to images: real states x / alpha at the generator's level, (B, C, H, W)."""
        return x_0 + self.implicit.ratio_made * noise.normal(x_0)

    def judge(self, y: Tensor, batch: Batch) -> Tensor:
        """Compute the critic's logits of states x / alpha, (B, C, H, W) -> (B,)."""
        assert self.critic is not None
        return self.critic(in_units(self.implicit, y), self.condition(batch))
