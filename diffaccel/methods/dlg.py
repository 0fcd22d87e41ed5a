"""Denoising Langevin Gibbs (Kim and Ye, 2022), arXiv 2209.14593: a chain on pretrained scores."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.data import Batch, DataModule, to_float
from diffaccel.errors import UsageError
from diffaccel.methods.base import Diffusion
from diffaccel.methods.registry import METHODS
from diffaccel.noise import NoiseStreams
from diffaccel.prior import ChainPrior, ClassifierPosterior, LangevinGibbsPrior
from diffaccel.training.module import Phase


@METHODS.register("dlg")
class DenoisingLangevinGibbs(Diffusion):
    """Training of the noise-level classifier of a chain prior; the pretrained denoiser is frozen.

    Args:
        parts: Arguments of :class:`Diffusion`; the prior is a :class:`~diffaccel.prior.LangevinGibbsPrior`, and the
            levels are ignored.
    """

    starts_from = ChainPrior
    fits_posterior = True

    @classmethod
    def keeps_denoiser(cls, node: Mapping[str, Any]) -> bool:
        """Return True."""
        return True

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.freeze_denoiser()

    @property
    def classifier(self) -> ClassifierPosterior:
        """Classifier that is trained.

        Raises:
            UsageError: The prior is not a Langevin-Gibbs chain, or its posterior is exact.
        """
        posterior = self.prior.posterior if isinstance(self.prior, LangevinGibbsPrior) else None
        if not isinstance(posterior, ClassifierPosterior):
            raise UsageError("this experiment has no noise classifier, so that there is nothing to train")
        return posterior

    @override
    def phases(self) -> list[Phase]:
        return [Phase("classifier", self.classifier.network.parameters(), self.classifier_loss)]

    @override
    def exports(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        return {"classifier": (self.classifier.network.state_dict(), {"kind": "classifier"})}

    def describe_fit(self, data: DataModule) -> list[str]:
        """Describe the accuracy of the noise-level classifier on held-out images, if there are any."""
        if not data.has_split("test"):
            return [f"noise classifier: not tested, because {data.label} has no held-out images (data.test_share=)"]
        images = (to_float(images) for _, images, _ in data.batches("test", 250))
        found = accept(self.classifier, images, self.seed)
        worst = max(found.error.values())
        verdict = "accepted" if found.accepted else "NOT accepted, the chain would drift: train longer (images=)"
        decades = ", ".join(f"{decade}: {error:.4f}" for decade, error in found.error.items())
        return [
            f"noise classifier: mean |ln sigma error| by decade {decades} (worst {worst:.4f}, limit {found.limit:.4f})"
            f", top-1 {found.top_1:.1%}: {verdict}"
        ]

    def classifier_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Compute the cross-entropy at one level per sample, uniform over the levels, (B,) in nats."""
        index = (noise.uniform().to(self.device) * len(self.classifier.levels)).long()
        return self.classifier.loss(batch.image, index, noise.normal(batch.image))


class Acceptance(NamedTuple):
    """Accuracy of a noise-level classifier.

    Attributes:
        error: Mean of abs(ln sigma_hat - ln sigma) in each decade of sigma, keyed by the decade's lower end.
        limit: Maximum accepted error: 3 / sqrt(2 d), or the spacing of two levels if that is larger.
        top_1: Fraction of levels classified exactly.
        cross_entropy: Mean cross-entropy over levels and images, in nats.
    """

    error: dict[str, float]
    limit: float
    top_1: float
    cross_entropy: float

    @property
    def accepted(self) -> bool:
        """Whether every decade is within the limit."""
        return all(error <= self.limit for error in self.error.values())


@torch.no_grad()
def accept(posterior: ClassifierPosterior, batches: Iterable[Tensor], seed: int = 0) -> Acceptance:
    """Test a noise-level classifier on held-out images.

    A state in d dimensions determines its level to a relative accuracy of about 1 / sqrt(2 d). The limit of the error
    therefore follows from d, and not from the fraction of exact hits.

    Args:
        posterior: Classifier with its levels.
        batches: Batches of clean images in [-1, 1], (B, C, H, W) each.
        seed: Seed of levels and noise.
    """
    errors, sigmas, hits, entropies, first = [], [], [], [], 0
    dimension = 1
    for x_0 in batches:
        noise = NoiseStreams(seed, range(first, first + len(x_0)), "acceptance")
        first, dimension = first + len(x_0), x_0[0].numel()
        index = (noise.uniform() * len(posterior.levels)).long().to(x_0.device)
        sigma = posterior.levels[index]
        logits = posterior.logits(x_0 + sigma.to(x_0)[:, None, None, None] * noise.normal(x_0)).double()
        best = logits.argmax(1)
        errors.append((posterior.levels[best].log() - sigma.log()).abs())
        sigmas.append(sigma)
        hits.append(best == index)
        entropies.append(nn.functional.cross_entropy(logits, index, reduction="none"))
    error, decade = (
        torch.cat(errors),
        (torch.cat(sigmas).log10() - 1e-9).floor().long(),
    )  # the highest level belongs to the decade below
    spacing = (posterior.levels[0] / posterior.levels[-1]).log().item() / (len(posterior.levels) - 1)
    return Acceptance(
        {f"{10.0**k:g}": error[decade == k].mean().item() for k in decade.unique().tolist()},
        max(3 / math.sqrt(2 * dimension), 2 * spacing),
        torch.cat(hits).double().mean().item(),
        torch.cat(entropies).mean().item(),
    )
