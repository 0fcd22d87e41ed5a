"""Multi-scale normalising flow of images, initialised as a rotation, which preserves white noise.

References:
    Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma and Dhariwal, 2018), https://arxiv.org/abs/1807.03039
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.errors import UsageError


class Convolutions(nn.Sequential):
    """3x3, 1x1, 3x3 with ReLU; the last convolution is initialised with zeros."""

    def __init__(self, width_in: int, width: int, width_out: int) -> None:
        last = nn.Conv2d(width, width_out, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]  # there is one
        first = nn.Conv2d(width_in, width, 3, padding=1)
        super().__init__(first, nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), last)


class Affine(nn.Module):
    """x_b -> (x_b - shift(x_a)) / scale(x_a), with ln(scale) in (-2, 2): Glow's coupling, and its learned split.

    Args:
        width_in: Channels of x_a.
        width: Hidden channels.
        width_out: Channels of x_b.
    """

    def __init__(self, width_in: int, width: int, width_out: int) -> None:
        super().__init__()
        self.network = Convolutions(width_in, width, 2 * width_out)

    def _parameters_of(self, a: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.network(a).chunk(2, dim=1)
        return shift, 2 * torch.tanh(0.5 * raw)

    def encode(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised x_b and the log-determinant (B,)."""
        shift, log_scale = self._parameters_of(a)
        return (b - shift) * (-log_scale).exp(), -log_scale.flatten(1).double().sum(1)

    def decode(self, a: Tensor, b: Tensor) -> Tensor:
        """Invert :meth:`encode`."""
        shift, log_scale = self._parameters_of(a)
        return b * log_scale.exp() + shift


class FlowStep(nn.Module):
    """Scale and shift of each channel, 1x1 convolution, affine coupling.

    Args:
        channels: Channels of the input, an even number.
        width: Hidden channels of the coupling.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.coupling = Affine(channels // 2, width, channels - channels // 2)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, C, H, W) and the log-determinant (B,)."""
        pixels = x.shape[2] * x.shape[3]
        x = F.conv2d(x * self.log_scale.exp() + self.shift, self.mix[:, :, None, None])
        own = pixels * (self.log_scale.double().sum() + torch.linalg.slogdet(self.mix.double())[1])
        a, b = x.tensor_split([x.shape[1] // 2], dim=1)
        b, log_det = self.coupling.encode(a, b)
        return torch.cat([a, b], dim=1), log_det + own

    def decode(self, x: Tensor) -> Tensor:
        """Invert :meth:`encode`."""
        a, b = x.tensor_split([x.shape[1] // 2], dim=1)
        x = torch.cat([a, self.coupling.decode(a, b)], dim=1)
        x = F.conv2d(x, torch.linalg.inv(self.mix.double()).to(x)[:, :, None, None])
        return (x - self.shift) * (-self.log_scale).exp()


class Glow(nn.Module):
    """Glow: at each scale a squeeze, steps, and a split, after which half of the channels are not transformed further.

    Args:
        shape: Image shape (C, H, W).
        scales: Number of scales; each scale halves height and width.
        steps: Number of steps per scale.
        width: Hidden channels of the couplings.

    Raises:
        UsageError: Height or width can't be halved once per scale.
    """

    def __init__(self, shape: tuple[int, int, int], scales: int = 3, steps: int = 16, width: int = 512) -> None:
        super().__init__()
        channels, height, side = shape
        if height % 2**scales or side % 2**scales:
            raise UsageError(f"images of {height}x{side} can't be halved {scales} times: lower density.scales")
        self.shape, self.channels = shape, [channels * 2 ** (scale + 2) for scale in range(scales)]
        self.steps = nn.ModuleList(nn.ModuleList(FlowStep(c, width) for _ in range(steps)) for c in self.channels)
        self.splits = nn.ModuleList(Affine(c // 2, width // 8, c // 2) for c in self.channels[:-1])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Transform images to latent vectors and the log-determinant: (B, C, H, W) -> (B, C H W), (B,)."""
        latents, log_det = [], torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for scale, steps in enumerate(self.steps):
            x = rearrange(x, "b c (h i) (w j) -> b (c i j) h w", i=2, j=2)
            for step in steps:  # type: ignore[attr-defined]  # a ModuleList of ModuleLists
                x, more = step.encode(x)
                log_det = log_det + more
            if scale < len(self.splits):
                x, latent = x.chunk(2, dim=1)
                latent, more = self.splits[scale].encode(x, latent)  # type: ignore[operator]
                latents.append(latent.flatten(1))
                log_det = log_det + more
        return torch.cat([*latents, x.flatten(1)], dim=1), log_det

    def decode(self, z: Tensor) -> Tensor:
        """Invert :meth:`encode`."""
        _, height, side = self.shape
        shapes = [(c, height // 2 ** (scale + 1), side // 2 ** (scale + 1)) for scale, c in enumerate(self.channels)]
        kept = [(c // 2, h, w) for c, h, w in shapes[:-1]] + [shapes[-1]]
        parts = [
            part.reshape(-1, *shape) for part, shape in zip(z.split([*map(math.prod, kept)], 1), kept, strict=True)
        ]
        x = parts[-1]
        for scale in reversed(range(len(shapes))):
            if scale < len(self.splits):
                x = torch.cat([x, self.splits[scale].decode(x, parts[scale])], dim=1)  # type: ignore[operator]
            for step in reversed(self.steps[scale]):  # type: ignore[call-overload]
                x = step.decode(x)
            x = rearrange(x, "b (c i j) h w -> b c (h i) (w j)", i=2, j=2)
        return x
