"""Frechet distance of a generator's states to noisy training images of the same level.

    python -m benchmarks.priors cifar10_small/tdpm prior.checkpoint=FILE data.path=TRAIN.npz data.test_path=TEST.npz

The experiment's extractor is applied to states x / sqrt(1 + ratio^2), clamped to [-1, 1] like images. The reference is
the states of the training images. The rows are states of the generator, of a Gaussian with the mean and covariance of
the training states, of a standard normal distribution, and of held-out images. The last one is the floor.
"""

import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.distances import score, standard
from diffaccel.config import Config, load
from diffaccel.data import DataModule, to_float
from diffaccel.errors import UsageError
from diffaccel.experiment import build_data, build_extractor, build_method
from diffaccel.methods import TruncatedDiffusion
from diffaccel.metrics import Frechet
from diffaccel.noise import NoiseStreams
from diffaccel.run.machine import settle
from diffaccel.sampling import to_uint8


def matched_gaussian(states: Tensor, n: int, seed: int = 0) -> Tensor:
    """Draw (n, C, H, W) from the Gaussian with the mean and covariance of states (N, C, H, W)."""
    flat = states.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    z = torch.randn(n, len(values), generator=torch.Generator().manual_seed(seed)).double()
    drawn = flat.mean(0) + (z * values.clamp_min(0).sqrt()) @ vectors.T
    return drawn.to(states).reshape(n, *states.shape[1:])


def real_states(data: DataModule, split: str, ratio: float, n: int) -> Tensor:
    """States of the first n images of a split at a ratio, x / sqrt(1 + ratio^2), (n, C, H, W)."""
    images = data.images(split)
    x_0 = to_float(images.read(torch.arange(min(n, len(images)))))
    noise = NoiseStreams(0, range(len(x_0)), f"states of {split}")
    return (x_0 + ratio * noise.normal(x_0)) / (1 + ratio**2) ** 0.5


@torch.no_grad()
def made_states(method: TruncatedDiffusion, seed: int, n: int, batch_size: int) -> Tensor:
    """States of the generator, x / sqrt(1 + ratio^2), (n, C, H, W)."""
    method.eval()
    parts = []
    for (indices,) in method.prior.schedule(n, batch_size):
        denoiser = method.denoiser.given(torch.tensor(indices) % method.classes if method.classes else None)
        parts.append(method.implicit.generate(denoiser, NoiseStreams(seed, indices), method.shape))
    return torch.cat(parts) / (1 + method.implicit.ratio_made**2) ** 0.5


def measure(config: Config) -> dict[str, Frechet]:
    """Distance of each kind of states to those of the training images.

    Raises:
        UsageError: The experiment has no generator.
    """
    method, data, extractor = build_method(config), build_data(config), build_extractor(config)
    if not isinstance(method, TruncatedDiffusion):
        raise UsageError(f"{config.experiment}: the method has no generator: use a tdpm experiment")
    ratio = method.implicit.ratio_made
    real = real_states(data, "train", ratio, data.size("train"))
    reference = standard(to_uint8(real), extractor)
    rows = {
        "generator": made_states(method, config.seed, config.n, config.batch_size),
        "matched Gaussian": matched_gaussian(real, config.n),
        "standard normal": torch.randn(config.n, *method.shape, generator=torch.Generator().manual_seed(0)),
        "held-out images": real_states(data, "test", ratio, config.n),
    }
    return {name: score(to_uint8(states), extractor, reference).frechet for name, states in rows.items()}


def main(arguments: Sequence[str]) -> int:
    """Measure and print; return 0, or 2 for invalid input."""
    try:
        if not arguments:
            raise UsageError("no experiment: run python -m benchmarks.priors EXPERIMENT key=value ...")
        config = load(arguments[0], arguments[1:])
        settle(config)
        rows = measure(config)
    except UsageError as error:
        Console(stderr=True, soft_wrap=True).print(f"priors: {error}", style="red", markup=False)
        return 2
    table = Table(box=None, header_style="bold")
    for column in ("states", "distance", "se"):
        table.add_column(column, justify="left" if column == "states" else "right")
    for name, found in rows.items():
        table.add_row(name, f"{found.fd:.4g}", f"{found.se:.2g}")
    print(f"Frechet distance of {config.n} states, {config.experiment}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
