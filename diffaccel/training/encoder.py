"""A frozen denoiser's encoder: what it makes of the states that it was trained on."""

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser, NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.nn import UNet


class Encoder:
    """The last features at each resolution of a denoiser's U-Net, told one level. No module: its weights stay.

    Args:
        denoiser: A trained one, on the network ``unet``. No extractor that scores takes part in training.
        ratio: Level of the states.
        asked_by: Who asks, for messages,
        instead: and what to do where there is none.

    Raises:
        UsageError: The denoiser is exact, has another network, or was not trained at that level.
    """

    def __init__(self, denoiser: Denoiser, ratio: float, asked_by: str, instead: str) -> None:
        network = denoiser.network
        if not isinstance(denoiser, NetworkDenoiser) or not isinstance(network, UNet):
            raise UsageError(f"{asked_by} takes the encoder of the network 'unet': {instead}")
        low, high = denoiser.ratio_range
        if not low <= ratio <= high:
            raise UsageError(f"{asked_by}: the denoiser was not trained at ratio {ratio:g}: take [{low:g}, {high:g}]")
        self.denoiser, self.network, self.ratio = denoiser, network, ratio

    def __call__(self, x: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        """States in units of variance preserving processes (B, C, H, W), labels (B,) -> maps, finest first."""
        denoiser = self.denoiser
        ratio = torch.full((len(x),), self.ratio, dtype=torch.float64, device=x.device)
        x_t, t = denoiser.process.from_ratio((1 + self.ratio**2) ** 0.5 * x, ratio)
        noise = denoiser.noise_conditioning(t).to(x_t)
        bottleneck, skips, _ = self.network.encode(denoiser.scale_input(x_t, t), noise, condition)
        return list({one.shape[2:]: one for one in (*skips, bottleneck)}.values())

    @torch.no_grad()
    def sizes(self, shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        """Shapes (C, H, W) of the maps of states (C, H, W)."""
        maps = self(torch.zeros(1, *shape, device=self.denoiser.device))
        return [(one.shape[1], one.shape[2], one.shape[3]) for one in maps]
