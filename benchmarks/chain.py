"""Deviation of a chain's states from real images at the same noise levels, round by round.

python -m benchmarks.chain EXPERIMENT key=value ...     (chains=: number of chains, prior.chain_steps=: steps per round)

The states of a perfect chain are distributed as real images with noise of the states' levels, in every round. The
deviation is measured by the drift of the levels, by the ratio of power to that of real images in bands of spatial
frequency, and by the Frechet distance of one-step denoised states to one-step denoised real images at the same levels.
The floor is the distance of other real images, at the same n.
"""

import sys

import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffaccel.config import load
from diffaccel.data import to_float
from diffaccel.experiment import build_data, build_extractor, build_method
from diffaccel.features.extractors import Extractor
from diffaccel.methods import Diffusion
from diffaccel.metrics import Moments, frechet_distance
from diffaccel.noise import NoiseStreams
from diffaccel.process import expand
from diffaccel.run.machine import settle
from diffaccel.sampling import to_uint8

ROUNDS = (1, 2, 5, 10, 20, 50)
BANDS = 4


def power(images: Tensor) -> Tensor:
    """Mean power of images in bands of spatial frequency, lowest first: (B, C, H, W) -> (BANDS,)."""
    spectrum = torch.fft.fft2(images.double(), norm="ortho").abs().square().mean((0, 1))
    rows, columns = (torch.fft.fftfreq(size, dtype=torch.float64) for size in images.shape[-2:])
    radius = (rearrange(rows, "h -> h 1").square() + columns.square()).sqrt()
    band = (radius / 0.5 * BANDS).long().clamp_max(BANDS - 1)
    return torch.stack([spectrum[band == k].mean() for k in range(BANDS)])


@torch.no_grad()
def denoised(method: Diffusion, extractor: Extractor, y: Tensor, ratio: Tensor, batch_size: int = 250) -> Moments:
    """Moments of the features of one-step denoised states y = x / alpha (B, C, H, W) at ratios (B,)."""
    features = []
    for y_b, ratio_b in zip(y.split(batch_size), ratio.split(batch_size), strict=True):
        features.append(extractor(to_uint8(method.denoiser(*method.denoiser.process.from_ratio(y_b, ratio_b)).x_0)))
    return Moments.from_features(torch.cat(features))


@torch.no_grad()
def main(experiment: str, *words: str) -> None:
    """Run the chains, and print a row per round of ``ROUNDS``."""
    config = load(experiment, words)
    settle(config)
    method, extractor, data = build_method(config).eval(), build_extractor(config), build_data(config)
    chains, chain_steps = int(config.prior["chains"]), int(config.prior.get("chain_steps") or 3)
    real = torch.cat([to_float(images) for _, images, _ in data.batches("test", 500)])
    if len(real) < 2 * chains:
        sys.exit(f"{len(real)} held-out images are too few for {chains} chains and a floor: use fewer chains")
    real, other = (real[start : 2 * chains : 2] for start in (0, 1))
    table = Table("round", "level", *(f"power {k}" for k in range(BANDS)), "fd", "floor", box=None, header_style="bold")
    group = [range(chains)] * max(ROUNDS)
    state = method.prior.open(method.denoiser, config.seed, group, method.shape)
    for number in range(1, max(ROUNDS) + 1):
        noise = NoiseStreams(config.seed, range(chains), f"round {number}")
        x_t, t = method.prior(method.denoiser, noise, method.shape, chain_steps, state)
        if number not in ROUNDS:
            continue
        ratio = method.denoiser.process.ratio(t)
        y = x_t / expand(method.denoiser.process.alpha(t), x_t)
        noisy, others = (x + expand(ratio, x) * noise.normal(x) for x in (real, other))
        reference = denoised(method, extractor, noisy, ratio)
        distances = (frechet_distance(denoised(method, extractor, x, ratio), reference) for x in (y, others))
        spread = f"{ratio.min():.2f} .. {ratio.mean():.2f} .. {ratio.max():.2f}"
        table.add_row(
            str(number), spread, *(f"{r:.3f}" for r in power(y) / power(noisy)), *(f"{d:.3f}" for d in distances)
        )
    print(f"{experiment}, {chains} chains, {chain_steps} steps a round, eta {config.prior.get('eta')}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
