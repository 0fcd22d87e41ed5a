"""CMMD against its definition, and where it is left out."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.metrics import FrechetDistance, Moments
from diffaccel.metrics.base import METRICS, Made, Real
from diffaccel.metrics.cmmd import cmmd
from diffaccel.metrics.reference import Reference


def embeddings(n: int, seed: int, shift: float = 0.0) -> Tensor:
    return F.normalize(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)) + shift)


def naive(x: Tensor, y: Tensor) -> float:
    """The definition, pair by pair."""

    def mean(a: Tensor, b: Tensor) -> float:
        return sum(torch.exp(-(p - q).square().sum() / 200).item() for p in a for q in b) / (len(a) * len(b))

    x, y = x.double(), y.double()
    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_cmmd_is_its_definition_in_any_tiles():
    x, y = embeddings(7, 0), embeddings(11, 1, shift=0.5)
    for rows in (3, 1024):
        assert cmmd(x, y, rows).item() == pytest.approx(naive(x, y), rel=1e-9)
    assert cmmd(x, x).item() == pytest.approx(0, abs=1e-10)
    one, other = torch.eye(2)  # 1 + 1 - 2 exp(-2 / 200), of two points
    assert cmmd(one[None], other[None]).item() == pytest.approx(2000 * (1 - torch.exp(torch.tensor(-0.01)).item()))


def values(made: Tensor, real: Tensor, held_out: Tensor | None = None) -> dict[str, float]:
    def reference(features: Tensor) -> Reference:
        return Reference(Moments.from_features(features), features.half(), {})

    sums = FrechetDistance(made.shape[1], Moments.from_features(real))
    floor = None if held_out is None else reference(held_out)
    return dict(METRICS.build("cmmd")(Made(len(made), made, sums, "fd_clip"), Real(reference(real), floor)))


def test_the_metric_has_a_floor_and_is_left_out_for_other_features():
    made, real, held_out = embeddings(40, 0, shift=1.0), embeddings(60, 1), embeddings(50, 2)
    found = values(made, real, held_out)
    assert found.keys() == {"cmmd", "cmmd_floor"} and found["cmmd"] > 3 * found["cmmd_floor"] > 0
    assert found["cmmd"] == pytest.approx(cmmd(made, real).item(), rel=0.01), "the reference is in float16"
    assert values(made, real).keys() == {"cmmd"}
    assert values(2 * made, real) == values(made, 2 * real) == {}
