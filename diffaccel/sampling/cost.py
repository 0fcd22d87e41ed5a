"""Cost of generated images."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Sampled:
    """Batch of generated images with its cost.

    Attributes:
        indices: Indices of the images, (b,) int64.
        images: Images as scored, (b, C, H, W): uint8, or float32 for toy points.
        evaluations: Number of evaluations by network, including burn-in.
        burn_in: Number of burn-in evaluations by network.
        flops: FLOPs per sample by network.
        seconds: Time for sampling, in seconds.
        trace: Records of a chain in this round.
        state: State of the chains after the batch; None for independent images.
    """

    indices: Tensor
    images: Tensor
    evaluations: dict[str, int]
    burn_in: dict[str, int]
    flops: dict[str, float]
    seconds: float
    trace: list[dict[str, Any]]
    state: dict[str, Any] | None


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
    """

    n: int
    nfe: float
    nfe_burn_in: float
    evaluations: dict[str, int]
    gflops_per_image: float
    seconds_per_image: float
