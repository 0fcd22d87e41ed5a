"""Encoder of a frozen denoiser, as a feature extractor of noisy states."""

import torch
from torch import Tensor

from diffaccel.condition import Condition
from diffaccel.denoiser import Denoiser, NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.nn import UNet


class Encoder:
    """Last features at each resolution of a denoiser's U-Net, at a fixed noise level.

    The class is not a module, so that the weights are not trained. Extractors that score images are not used in
    training.

    Args:
        denoiser: Trained denoiser with the network ``unet``.
        ratio: Noise-to-data ratio of the states.
        asked_by: Subject of error messages: the part that requires the encoder.
        instead: Remedy in error messages.

    Raises:
        UsageError: The denoiser is exact, has another network, or was not trained at ``ratio``.
    """

    def __init__(self, denoiser: Denoiser, ratio: float, asked_by: str, instead: str) -> None:
        network = denoiser.network
        if not isinstance(denoiser, NetworkDenoiser) or not isinstance(network, UNet):
            raise UsageError(f"{asked_by} requires a denoiser with the network 'unet': {instead}")
        low, high = denoiser.ratio_range
        if not low <= ratio <= high:
            raise UsageError(
                f"{asked_by}: the denoiser was not trained at ratio {ratio:g}: choose one in [{low:g}, {high:g}]"
            )
        self.denoiser, self.network, self.ratio = denoiser, network, ratio

    def __call__(self, x: Tensor, condition: Condition | Tensor | None = None) -> list[Tensor]:
        """Compute feature maps, finest first, of states (B, C, H, W) in units of variance preserving processes."""
        denoiser = self.denoiser
        ratio = torch.full((len(x),), self.ratio, dtype=torch.float64, device=x.device)
        x_t, t = denoiser.process.from_ratio((1 + self.ratio**2) ** 0.5 * x, ratio)
        noise = denoiser.noise_conditioning(t).to(x_t)
        bottleneck, skips, _ = self.network.encode(denoiser.scale_input(x_t, t), noise, condition)
        return list({one.shape[2:]: one for one in (*skips, bottleneck)}.values())

    @torch.no_grad()
    def sizes(self, shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        """Return the shapes (C, H, W) of the feature maps of states with shape (C, H, W)."""
        maps = self(torch.zeros(1, *shape, device=self.denoiser.device))
        return [(one.shape[1], one.shape[2], one.shape[3]) for one in maps]
