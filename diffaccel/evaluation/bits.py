"""Bits per dimension of test images under the probability flow, independent of budget and solver."""

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffaccel.collective import World, all_gather
from diffaccel.denoiser import Denoiser
from diffaccel.evaluation.likelihood import bits_per_dim, dequantised, probability_flow, rademacher
from diffaccel.evaluation.partial import read_whole, write_whole
from diffaccel.nfe import EvaluationCounter
from diffaccel.noise import NoiseStreams
from diffaccel.prior import Prior
from diffaccel.sampling import Sampler
from diffaccel.text.terminal import track
from diffaccel.weights import tensors_sha256

if TYPE_CHECKING:
    from diffaccel.data import DataModule

EXACT = 16
"""Maximum number of dimensions with an exact divergence; above, one random probe per image estimates the divergence."""
LEAST = 1e-3
"""Lowest noise-to-data ratio for an exact denoiser: sigma at t = 1e-5 on the variance preserving process."""


def least_ratio(denoiser: Denoiser) -> float:
    """Return the noise-to-data ratio at which likelihoods start: the lowest one that the denoiser is trained on."""
    return max(denoiser.ratio_range[0], LEAST)


class BitsPerDim:
    """Bits per dimension of ``n`` test images in random order, distributed over all ranks and computed once per prior.

    Args:
        data: Data module of the test images; images are dequantised, toy points are used as they are.
        n: Number of images.
        seed: Seed of the dequantisation and of the probes of each image.
        batch_size: Number of images per batch; values do not depend on it.
        out: Folder whose ``partial/`` keeps finished batches until :meth:`clear`; None keeps nothing.
        identity: Everything that determines the values, except for the starts; batches of another identity are ignored.
    """

    def __init__(
        self, data: "DataModule", n: int, seed: int, batch_size: int, out: Path | None = None, identity: object = None
    ) -> None:
        self.data, self.n, self.seed, self.batch_size = data, n, seed, batch_size
        self.folder = out and out / "partial"
        self.identity = json.dumps(identity, sort_keys=True, default=str)
        self._known: dict[int, dict[str, float]] = {}

    def __call__(self, sampler: Sampler, prior: Prior, world: World = World()) -> dict[str, float]:  # noqa: B008 (frozen)
        """Compute mean, standard error, number of images, and evaluations of the denoiser per image for a prior."""
        key = id(prior)
        if key not in self._known:
            bits, nfe = self.each(sampler, [prior], world)
            self._known[key] = {
                "bits_per_dim": bits.mean().item(),
                "bits_per_dim_se": standard_error(bits[0]),
                "bits_per_dim_n": bits.shape[1],
                "bits_per_dim_nfe": nfe[0].item(),
            }
        return self._known[key]

    def each(
        self,
        sampler: Sampler,
        starts: Sequence[Prior],
        world: World = World(),  # noqa: B008 (frozen)
    ) -> tuple[Tensor, Tensor]:
        """Compute bits per dimension of each image for several starts, with one flow through all of their levels.

        Returns:
            Bits per dimension, (S, n) float64, and evaluations of the denoiser per image up to each start, (S,).
        """
        found, calls = [torch.zeros(len(starts), 0, dtype=torch.float64)], [torch.zeros(len(starts))]
        # Outside Lightning's inference mode, which excludes gradients, and in full precision.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(sampler.device.type, enabled=False):
            batches = self.data.batches("test", self.batch_size, world.rank, world.size, self.n)
            own, key = math.ceil(self.n / self.batch_size / world.size), self._key(sampler.denoiser, starts)
            for index, images, _ in track(batches, "bits/dim", own, shown=world.first):
                first = index * self.batch_size
                path = self.folder and self.folder / f"bits_{key}_{first:08d}_{len(images)}.pt"
                done = read_whole(path)
                if done is None:
                    done = self._batch(sampler.denoiser, starts, images, first)
                    write_whole(path, done)
                found.append(done[0])
                calls.append(done[1])
        shares = all_gather((torch.cat(found, 1), torch.stack(calls).sum(0)))
        bits = torch.cat([share for share, _ in shares], 1)
        return bits, torch.stack([count for _, count in shares]).sum(0) / bits.shape[1]

    def clear(self) -> None:
        """Remove the kept batches, once the result has been written."""
        if self.folder is None:
            return
        for path in self.folder.glob("bits_*"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # the folder may contain batches of a point
            self.folder.rmdir()

    def _key(self, denoiser: Denoiser, starts: Sequence[Prior]) -> str:
        """Cache key of everything that determines the values of a batch."""
        described = [(type(start).__name__, start.start_ratio(denoiser), _digest(start)) for start in starts]
        return hashlib.sha256(json.dumps([self.identity, described], sort_keys=True).encode()).hexdigest()[:16]

    def _batch(self, denoiser: Denoiser, starts: Sequence[Prior], images: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Bits per dimension of a batch, (S, B), and total number of evaluations up to each start, (S,)."""
        noise = NoiseStreams(self.seed, range(first, first + len(images)), "likelihood")
        width, size = cell_range(images), images[0].numel()
        x = (images if width is None else dequantised(images, noise)).to(denoiser.device)
        ratios = [start.start_ratio(denoiser) for start in starts]
        levels = sorted(set(ratios))
        flow = probability_flow(
            denoiser, x, least_ratio(denoiser), levels, rademacher(noise, x) if size > EXACT else None
        )
        bits, calls = torch.zeros(len(starts), len(x), dtype=torch.float64), torch.zeros(len(starts))
        with EvaluationCounter({"denoiser": denoiser.network}, {"denoiser": 0.0}) as counter:
            for level, (x_star, volume) in zip(levels, flow, strict=True):
                for i, start in enumerate(starts):
                    if ratios[i] == level:
                        bits[i] = bits_per_dim(start.log_prob(denoiser, x_star) + volume, size, width).cpu()
                        calls[i] = counter.evaluations["denoiser"]
        return bits, calls


def _digest(prior: Prior) -> list[Any]:
    """Types, settings and weights of a prior; settings such as the ``std`` of a density are not among the weights."""
    modules = [(type(module).__name__, _settings(module)) for module in prior.modules()]
    return [*modules, tensors_sha256(prior.state_dict())]


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers and words among the attributes of a module."""
    return {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}


def cell_range(images: Tensor) -> float | None:
    """Return the width of the range of 256 cells, for :func:`bits_per_dim`; None for data that are not quantised."""
    return 2.0 if images.dtype == torch.uint8 else None


def standard_error(values: Tensor) -> float:
    """Compute the standard error of the mean of values (n,)."""
    return values.std().item() / math.sqrt(len(values))
