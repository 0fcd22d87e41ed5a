"""Bits per dimension of test images under a method's probability flow, which no budget or solver moves."""

import math
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from diffaccel.collective import all_gather
from diffaccel.data import DataModule
from diffaccel.likelihood import bits_per_dim, dequantised, probability_flow, rademacher
from diffaccel.methods import Diffusion
from diffaccel.nfe import EvaluationCounter
from diffaccel.noise import NoiseStreams
from diffaccel.prior import Prior

EXACT = 16
"""Up to so many dimensions the divergence is exact; above, one random probe an image estimates it."""
LEAST = 1e-3
"""Least ratio of a denoiser that knows all: sigma at 1e-5 on the variance preserving process."""


def least_ratio(method: Diffusion) -> float:
    """Where likelihoods begin: the least level that the denoiser is trained on."""
    return max(method.denoiser.ratio_range[0], LEAST)


class BitsPerDim:
    """Measures the first ``n`` test images, shared among the processes; once for each prior.

    Args:
        data: Where they come from; images are dequantised, other points taken as they are.
        n: Number of images.
        seed: Of the dequantisation and the probes, which belong to the image.
        batch_size: Images a batch; no value depends on it.
    """

    def __init__(self, data: DataModule, n: int, seed: int, batch_size: int) -> None:
        self.data, self.n, self.seed, self.batch_size = data, n, seed, batch_size
        self._known: dict[int, dict[str, float]] = {}

    def __call__(self, method: Diffusion, rank: int = 0, world: int = 1) -> dict[str, float]:
        """Measure a method: the mean, its standard error, the number of images, and the denoiser's evaluations each."""
        key = id(method.prior)
        if key not in self._known:
            bits, nfe = self.each(method, [method.prior], rank, world)
            self._known[key] = {
                "bits_per_dim": bits.mean().item(),
                "bits_per_dim_se": standard_error(bits[0]),
                "bits_per_dim_n": bits.shape[1],
                "bits_per_dim_nfe": nfe[0].item(),
            }
        return self._known[key]

    def each(self, method: Diffusion, starts: Sequence[Prior], rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Bits per dimension of each image for several starts, whose levels one flow goes through.

        Returns:
            ``(bits, nfe)``: (S, n) float64, and the denoiser's evaluations an image up to each start, (S,).
        """
        found, calls = [torch.zeros(len(starts), 0, dtype=torch.float64)], [torch.zeros(len(starts))]
        # Out of Lightning's inference mode, whose tensors know no gradients; in full precision.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(method.device.type, enabled=False):
            batches = self.data.batches("test", self.batch_size, rank, world)
            console, own = Console(stderr=True), math.ceil(self.n / self.batch_size / world)
            shown = console.is_terminal and rank == 0
            for index, images, _ in track(batches, "bits/dim", own, console=console, transient=True, disable=not shown):
                first = index * self.batch_size
                if first >= self.n:
                    break
                bits, count = self._batch(method, starts, images[: self.n - first], first)
                found.append(bits)
                calls.append(count)
        shares = all_gather((torch.cat(found, 1), torch.stack(calls).sum(0)))
        bits = torch.cat([share for share, _ in shares], 1)
        return bits, torch.stack([count for _, count in shares]).sum(0) / bits.shape[1]

    def _batch(self, method: Diffusion, starts: Sequence[Prior], images: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Of some images, and how many evaluations all of them took up to each start."""
        noise = NoiseStreams(self.seed, range(first, first + len(images)), "likelihood")
        width, size = cell_range(images), images[0].numel()
        x = (images if width is None else dequantised(images, noise)).to(method.device)
        ratios = [start.start_ratio(method.denoiser) for start in starts]
        levels = sorted(set(ratios))
        flow = probability_flow(
            method.denoiser, x, least_ratio(method), levels, rademacher(noise, x) if size > EXACT else None
        )
        bits, calls = torch.zeros(len(starts), len(x), dtype=torch.float64), torch.zeros(len(starts))
        with EvaluationCounter({"denoiser": method.denoiser.network}, {"denoiser": 0.0}) as counter:
            for level, (x_star, volume) in zip(levels, flow, strict=True):
                for i, start in enumerate(starts):
                    if ratios[i] == level:
                        bits[i] = bits_per_dim(start.log_prob(method.denoiser, x_star) + volume, size, width).cpu()
                        calls[i] = counter.evaluations["denoiser"]
        return bits, calls


def cell_range(images: Tensor) -> float | None:
    """Width of the scaled range that 256 cells share, as :func:`bits_per_dim` takes it; None for other points."""
    return 2.0 if images.dtype == torch.uint8 else None


def standard_error(values: Tensor) -> float:
    """Of the mean of values (n,)."""
    return values.std().item() / math.sqrt(len(values))
