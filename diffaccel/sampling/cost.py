"""Cost of generated images."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffaccel.deferred import Checks, Stopwatch


@dataclass
class Sampled:
    """Batch of generated images with its cost.

    The device may still be working on it: :meth:`settle` waits.

    Attributes:
        indices: Indices of the images, (b,) int64.
        images: Images as scored, (b, C, H, W): uint8, or float32 for toy points.
        evaluations: Number of evaluations by network, including burn-in.
        burn_in: Number of burn-in evaluations by network.
        flops: FLOPs per sample by network.
        trace: Records of a chain in this round.
        state: State of the chains after the batch; None for independent images.
        stopwatch: Stopwatch of prior and solver.
        decoding: Stopwatch of the decoder of latents; None without latents.
        decoding_flops: FLOPs per image of this decoder.
        checks: Checks of the values that were computed.
        seconds_warm_up: Time for compilation and other work that the first batch alone requires, in seconds.
    """

    indices: Tensor
    images: Tensor
    evaluations: dict[str, int]
    burn_in: dict[str, int]
    flops: dict[str, float]
    trace: list[dict[str, Any]]
    state: dict[str, Any] | None
    stopwatch: Stopwatch
    checks: Checks
    seconds_warm_up: float = 0.0
    decoding: Stopwatch | None = None
    decoding_flops: float = 0.0

    @property
    def seconds_decoding(self) -> float:
        """Time for decoding latents, in seconds; waits for the device."""
        return 0.0 if self.decoding is None else self.decoding.seconds

    def settle(self) -> float:
        """Wait for the device, and return the time for sampling, in seconds.

        Raises:
            UsageError: A value is NaN or infinite, or a level out of range.
        """
        seconds = self.stopwatch.seconds
        self.checks.settle()
        return seconds


@dataclass(frozen=True)
class Spent:
    """Cost of the images of one call.

    Attributes:
        n: Number of images.
        nfe: Network evaluations per image, including burn-in.
        nfe_burn_in: Burn-in evaluations per image.
        evaluations: Total number of evaluations by network.
        gflops_per_image: FLOPs of all networks, including auxiliary ones, in 10^9.
        seconds_per_image: Wall-clock time of prior and solver.
        gflops_decoding: FLOPs per image of the decoder of latents, in 10^9, in addition; 0 without latents.
        seconds_decoding: Wall-clock time per image of this decoder, in addition.
    """

    n: int
    nfe: float
    nfe_burn_in: float
    evaluations: dict[str, int]
    gflops_per_image: float
    seconds_per_image: float
    gflops_decoding: float = 0.0
    seconds_decoding: float = 0.0
