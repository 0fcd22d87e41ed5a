"""Training of an auto-encoder: absolute error, divergence of the posterior, LPIPS, and a critic of patches."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.collective import World, all_reduce
from diffaccel.data import Batch, DataModule, to_float
from diffaccel.features.independence import feature_networks
from diffaccel.features.perceptual import build_lpips
from diffaccel.latents import AutoEncoder, Moments
from diffaccel.nn.patch_critic import PatchCritic, hinge
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import Counts, at_least, positive
from diffaccel.training.module import Phase, TrainedModule
from diffaccel.training.plan import Training

SCALED_ON = 10_000
"""Maximum number of training images, evenly spaced, that determine mean and standard deviation of the latents."""
JUDGED_ON = 1000
"""Maximum number of images whose reconstructions are measured at the end."""
BALANCE = 1e4
"""Maximum of the factor that balances the critic's gradient with that of the reconstruction."""


class AutoEncoderTraining(TrainedModule):
    """Training of an auto-encoder on images.

        L = (|x - y| + perceptual_weight LPIPS(x, y) + kl_weight KL) + lambda critic_weight (-D(y))

    y is the decoded draw from the posterior of x. The first two terms are means over the image, and KL is the sum over
    the latents divided by the number of values of the image, so that the ratio of the terms is that of latent
    diffusion. lambda is the ratio of the norms of the gradients of reconstruction and critic at the decoder's last
    layer. The critic D is trained with the hinge loss.

    At the end, mean and standard deviation of the latents of training images are stored with the weights.

    Args:
        network: Auto-encoder.
        training: Settings of the training.
        seed: Seed of the run.
        kl_weight: Weight of the Kullback-Leibler divergence of the posterior from N(0, I).
        perceptual_weight: Weight of LPIPS, which requires images with three channels; 0 for no LPIPS.
        critic_weight: Weight of the critic; 0 for no critic.
        critic_since: Number of images seen from which on the critic is trained and used.
        critic_lr: Learning rate of the critic, as a factor on the run's.
        critic_widths: Number of channels of the critic's layers.

    Raises:
        UsageError: A value is out of range, LPIPS is required for images without three channels, or images are too
            small for the critic.

    References:
        High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022),
        https://arxiv.org/abs/2112.10752, appendix G
        Taming Transformers for High-Resolution Image Synthesis (Esser et al., 2021),
        https://arxiv.org/abs/2012.09841, Eqs. 6 and 7
    """

    def __init__(
        self,
        network: AutoEncoder,
        training: Training,
        seed: int = 0,
        kl_weight: float = 1e-6,
        perceptual_weight: float = 0.0,
        critic_weight: float = 0.5,
        critic_since: int = 0,
        critic_lr: float = 1.0,
        critic_widths: Counts = [64, 128, 256, 512],  # noqa: B006 (read only; a list, for YAML)
    ) -> None:
        super().__init__(training, seed)
        where = "method 'autoencoder'"
        weights = {"kl_weight": kl_weight, "perceptual_weight": perceptual_weight, "critic_weight": critic_weight}
        at_least(0, where, **weights, critic_since=critic_since)
        positive(where, critic_lr=critic_lr)
        self.network = network
        self.kl_weight, self.perceptual_weight, self.critic_weight = kl_weight, perceptual_weight, critic_weight
        self.critic_since, self.critic_lr = critic_since, critic_lr
        self.critic = PatchCritic(network.image_shape, critic_widths) if critic_weight else None
        # In lists: neither a frozen network nor a batch is part of a training state.
        self._lpips = [build_lpips()] if perceptual_weight else list[nn.Module]()
        self._made: list[Tensor] = []
        self.reconstruction: dict[str, Any] = {}

    @override
    def phases(self) -> list[Phase]:
        found = [Phase("autoencoder", self.network.parameters(), self.autoencoder_loss)]
        if self.critic is not None:
            phase = Phase(
                "critic", self.critic.parameters(), self.critic_loss, since=self.critic_since, lr=self.critic_lr
            )
            found.append(phase)
        return found

    @override
    def averaged(self) -> nn.Module:
        return nn.ModuleDict({"autoencoder": self.network})

    @override
    def feature_networks(self) -> list[str]:
        return sorted({*super().feature_networks(), *feature_networks(self._lpips)})

    @override
    def exports(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        averaged = self.ema is not None
        average = {} if self.ema is None else self.ema.state_dict()
        own = {name.removeprefix("autoencoder."): tensor for name, tensor in average.items()}
        said = {"kind": "autoencoder", "dtype": "float32", "averaged": averaged, **self.reconstruction}
        if self.ema is not None:
            said["ema_half_life"] = self.ema.half_life
        return {"autoencoder": ({**self.network.state_dict(), **own}, said)}

    # Losses

    def autoencoder_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Compute the auto-encoder's loss, (B,)."""
        x = batch.image
        posterior = self.network.encode(x)
        y = self.network.decode(posterior.draw(noise.normal(posterior.mean)))
        reconstruction = (y - x).abs().flatten(1).mean(1)
        if self._lpips:
            perceived = self._lpips[0].to(x.device)(y, x).reshape(len(x))
            reconstruction = reconstruction + self.perceptual_weight * perceived
        divergence = divergence_from_normal(posterior)
        loss = reconstruction + self.kl_weight * divergence / x[0].numel()
        if self.logs_now:
            self.note({"psnr": psnr(y.detach(), x).mean(), "kl": divergence.mean()})
        if self.critic is None or self.images_seen < self.critic_since:
            return loss
        self._made = [y.detach()]
        self.critic.requires_grad_(False)
        judged = -self.critic(y).flatten(1).mean(1)
        self.critic.requires_grad_(True)
        balance = self.balance(reconstruction, judged)
        if self.logs_now:
            self.note({"critic_balance": balance, "critic_made": -judged.mean()})
        return loss + self.critic_weight * balance * judged

    def balance(self, reconstruction: Tensor, judged: Tensor) -> Tensor:
        """Compute lambda from the losses (B,) of all ranks, 0-dimensional; Eq. 7 of Esser et al."""
        norms = []
        for loss in (reconstruction, judged):
            (gradient,) = torch.autograd.grad(loss.mean(), self.network.last_layer, retain_graph=True)
            norms.append(all_reduce(gradient.float()).norm())
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=BALANCE).detach()

    def critic_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Compute the critic's hinge loss on the images and their reconstructions of this step, (B,)."""
        assert self.critic is not None
        (made,) = self._made
        self._made = []
        return hinge(self.critic(batch.image), self.critic(made))

    # The end of a fit

    @torch.no_grad()
    def finish(self, data: DataModule, world: World) -> None:
        """Compute mean and standard deviation of the latents, and the errors of reconstructions; collective.

        Args:
            data: Data set.
            world: Rank and number of ranks.
        """
        network = self.network
        with self.averaged_weights(), torch.autocast(self.device.type, enabled=False):
            network.eval()
            mean, std = self._statistics(data, world)
            network.latent_mean.copy_(mean)
            network.latent_std.copy_(std)
            self.reconstruction = self._judged(data, world)
            network.train()

    def _statistics(self, data: DataModule, world: World) -> tuple[Tensor, Tensor]:
        """Mean of each channel, and standard deviation over all, of draws from the posteriors of training images."""
        channels, count = self.network.channels, 0
        sums = torch.zeros(2, channels, dtype=torch.float64, device=self.device)
        for index, images in self._shares(data, "train", SCALED_ON, world):
            posterior = self.network.encode(images)
            draws = posterior.draw(NoiseStreams(self.seed, index, "latents").normal(posterior.mean)).double()
            sums += torch.stack([draws.sum((0, 2, 3)), draws.square().sum((0, 2, 3))])
            count += draws[:, 0].numel()
        total = all_reduce(torch.tensor([count], dtype=torch.float64, device=self.device))
        first, second = all_reduce(sums) / total
        return first.float(), (second - first.square()).mean().clamp_min(1e-24).sqrt().float()

    def _judged(self, data: DataModule, world: World) -> dict[str, Any]:
        """Header entries on the reconstruction of held-out images, or of training images if there are none."""
        split = "test" if data.has_split("test") else "train"
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for _, images in self._shares(data, split, JUDGED_ON, world):
            values = psnr(self.network.decode(self.network.encode(images).mean), images)
            sums += torch.tensor([values.double().sum().item(), len(images)], dtype=torch.float64, device=self.device)
        total, n = all_reduce(sums).tolist()
        return {"psnr": round(total / n, 4), "psnr_on": f"{n:.0f} images of the split {split}"}

    def _shares(self, data: DataModule, split: str, most: int, world: World) -> Any:
        """Yield the indices and images of this rank, evenly spaced over a split, in batches of the fit."""
        found = data.images(split)
        chosen = torch.linspace(0, len(found) - 1, min(most, len(found))).round().long().unique()
        batches = chosen.split(max(1, data.batch_size // world.size))
        for batch in world.share(batches):
            yield batch, to_float(found.read(batch)).to(self.device)

    @override
    def describe_fit(self, data: DataModule) -> list[str]:
        mean = ", ".join(f"{value:.3g}" for value in self.network.latent_mean.tolist())
        return [
            f"auto-encoder: reconstructions of {self.reconstruction.get('psnr_on')} at a PSNR of "
            f"{self.reconstruction.get('psnr')} dB; latents {self.network.shape} with means {mean} and standard "
            f"deviation {self.network.latent_std.item():.4g}"
        ]


def divergence_from_normal(posterior: Moments) -> Tensor:
    """Kullback-Leibler divergence of a posterior from N(0, I), summed over the latents, in nats: (B,)."""
    mean, std = posterior
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1)


def psnr(made: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [-1, 1], (B, C, H, W) each, after clamping, in dB: (B,)."""
    error = (made.clamp(-1, 1) - images).float().square().flatten(1).mean(1)
    return 10 * (4 / error.clamp_min(1e-10)).log10()
