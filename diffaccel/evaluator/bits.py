"""Bits per dimension of test images under a method's probability flow, which no budget or solver moves."""

import math
from functools import partial

import torch
from torch import Tensor

from diffaccel.collective import all_gather
from diffaccel.data import DataModule
from diffaccel.likelihood import bits_per_dim, dequantised, flow_log_prob, rademacher
from diffaccel.methods import Diffusion
from diffaccel.nfe import EvaluationCounter
from diffaccel.noise import NoiseStreams

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
        """Measure: the mean, its standard error, the number of images, and the denoiser's evaluations an image."""
        key = id(method.prior)
        if key not in self._known:
            # Out of Lightning's inference mode, whose tensors know no gradients; in full precision.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(method.device.type, enabled=False):
                self._known[key] = self._measure(method, rank, world)
        return self._known[key]

    def _measure(self, method: Diffusion, rank: int, world: int) -> dict[str, float]:
        found: list[Tensor] = [torch.zeros(0, dtype=torch.float64)]
        with EvaluationCounter({"denoiser": method.denoiser.network}, {"denoiser": 0.0}) as counter:
            for index, images, _ in self.data.batches("test", self.batch_size, rank, world):
                first = index * self.batch_size
                if first >= self.n:
                    break
                found.append(self._bits(method, images[: self.n - first], first).cpu())
        shares = all_gather((torch.cat(found), counter.evaluations["denoiser"]))
        bits, calls = torch.cat([share for share, _ in shares]), sum(count for _, count in shares)
        se = bits.std().item() / math.sqrt(len(bits))
        mean, nfe = bits.mean().item(), calls / len(bits)
        return {"bits_per_dim": mean, "bits_per_dim_se": se, "bits_per_dim_n": len(bits), "bits_per_dim_nfe": nfe}

    def _bits(self, method: Diffusion, images: Tensor, first: int) -> Tensor:
        noise = NoiseStreams(self.seed, range(first, first + len(images)), "likelihood")
        quantised, size = images.dtype == torch.uint8, images[0].numel()
        x = (dequantised(images, noise) if quantised else images).to(method.device)
        log_q = flow_log_prob(
            method.denoiser,
            partial(method.prior.log_prob, method.denoiser),
            x,
            least_ratio(method),
            method.prior.start_ratio(method.denoiser),
            probe=rademacher(noise, x) if size > EXACT else None,
        )
        return bits_per_dim(log_q, size, 2.0 if quantised else None)
