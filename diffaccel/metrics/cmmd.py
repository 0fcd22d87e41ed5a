"""Maximum mean discrepancy of CLIP's embeddings (CMMD).

    CMMD = 1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10

As in the authors' code, the means are over all pairs, those of an embedding with itself included.

References:
    Rethinking FID: Towards a Better Evaluation Metric for Image Generation (Jayasumana et al., 2024),
    https://arxiv.org/abs/2401.09603, https://github.com/google-research/google-research/tree/master/cmmd
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.metrics.base import METRICS, Made, Metric, Real, spread

SIGMA, SCALE = 10.0, 1000.0
ROUNDING = 2e-3
"""Largest deviation of a norm from 1, that of features stored in float16."""


@METRICS.register("cmmd")
class CMMDMetric(Metric):
    """Distance of CLIP's embeddings under a Gaussian kernel, of the first 10,000 images and of held-out images.

    Keys of the point: ``cmmd`` and ``cmmd_floor``. They are omitted for features whose norm is not 1, because the
    kernel's width is that for normalised embeddings: use ``extractor=clip``.

    References:
        Rethinking FID: Towards a Better Evaluation Metric for Image Generation (Jayasumana et al., 2024),
        https://arxiv.org/abs/2401.09603
    """

    @override
    def __call__(self, made: Made, real: Real) -> Mapping[str, float]:
        if not (has_unit_norm(made.features) and has_unit_norm(real.features)):
            return {}
        n = len(made.features)
        found = {"cmmd": made.features, "cmmd_floor": spread(real.held_out, min(n, len(real.held_out)))}
        return {key: float(cmmd(x, real.features)) for key, x in found.items() if len(x)}


def has_unit_norm(features: Tensor) -> bool:
    """Whether there are features, (n, d), and all of them have the norm 1 up to rounding."""
    return len(features) > 0 and bool((features.float().norm(dim=1) - 1).abs().max() < ROUNDING)


def cmmd(x: Tensor, y: Tensor, rows: int = 1024) -> Tensor:
    """Compute the distance between embeddings x (n, d) and y (m, d), () float64; ``rows`` bounds the memory."""
    return SCALE * (mean_kernel(x, x, rows) + mean_kernel(y, y, rows) - 2 * mean_kernel(x, y, rows))


def mean_kernel(x: Tensor, y: Tensor, rows: int) -> Tensor:
    """Average exp(-|x_i - y_j|^2 / (2 sigma^2)) over all pairs of x (n, d) and y (m, d), () float64."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for some_x in x.double().split(rows):
        for some_y in y.double().split(rows):
            squares = some_x.square().sum(1)[:, None] + some_y.square().sum(1) - 2 * some_x @ some_y.T
            total += (-squares / (2 * SIGMA**2)).exp().sum()
    return total / (len(x) * len(y))
