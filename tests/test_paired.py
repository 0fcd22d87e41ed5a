"""The difference of two methods that share their noise, against its closed form and its spread over repetitions."""

import pytest
import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.metrics import FrechetDistance, Moments, paired_difference

DIM, N, BLOCKS = 8, 400, 10
REFERENCE = Moments(10**6, torch.zeros(DIM), torch.eye(DIM))
BLOCK = torch.arange(N) % BLOCKS


def methods(seed: int, shared: bool = True) -> tuple[Tensor, Tensor]:
    """Two Gaussians of standard deviations 1.2 and 1.15, a tenth of whose noise is their own, or all of it."""
    z, z_a, z_b = torch.randn(3, N, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if not shared:
        return 1.2 * z_a, 1.15 * z_b
    return 1.2 * (0.99**0.5 * z + 0.1 * z_a), 1.15 * (0.99**0.5 * z + 0.1 * z_b)


TRUE = DIM * (0.2**2 - 0.15**2)


def alone(features: Tensor) -> FrechetDistance:
    metric = FrechetDistance(DIM, REFERENCE, blocks=BLOCKS)
    for k in range(BLOCKS):
        metric.update(features[k == BLOCK], k)
    return metric


def test_the_difference_is_that_of_the_scores():
    a, b = methods(seed=0)
    difference, of_a, of_b = paired_difference(a, b, BLOCK, REFERENCE), alone(a).compute(), alone(b).compute()
    torch.testing.assert_close(difference.fd, of_a.fd - of_b.fd, rtol=1e-12, atol=0)
    torch.testing.assert_close(difference.fd_inf, of_a.fd_inf - of_b.fd_inf, rtol=1e-10, atol=0)


def test_its_error_is_the_spread_over_repetitions():
    fd, fd_inf, se = torch.tensor([paired_difference(*methods(seed), BLOCK, REFERENCE) for seed in range(200)]).T
    assert abs(fd_inf.mean() - TRUE) < 3 * fd_inf.std() / 200**0.5
    root_mean_square = se.square().mean().sqrt()
    assert root_mean_square == pytest.approx(fd_inf.std().item(), rel=0.25)
    assert root_mean_square == pytest.approx(fd.std().item(), rel=0.25)
    outside = (abs(fd_inf - TRUE) > 3 * se).sum()
    assert outside <= 8, "three errors with nine degrees of freedom leave out 1.5 %"


def test_common_noise_makes_the_error_several_times_smaller():
    pairs = [methods(seed) for seed in range(20)]
    paired = torch.stack([paired_difference(a, b, BLOCK, REFERENCE).se for a, b in pairs]).mean()
    unpaired = torch.stack([alone(a).compute().se.hypot(alone(b).compute().se) for a, b in pairs]).mean()
    assert paired < unpaired / 3.5


def test_without_common_noise_it_is_the_unpaired_error():
    pairs = [methods(seed, shared=False) for seed in range(40)]
    paired = torch.stack([paired_difference(a, b, BLOCK, REFERENCE).se.square() for a, b in pairs]).mean()
    variances = [alone(a).compute().se.square() + alone(b).compute().se.square() for a, b in pairs]
    assert paired.item() == pytest.approx(torch.stack(variances).mean().item(), rel=0.25)


def test_a_method_does_not_differ_from_itself():
    a, _ = methods(seed=1)
    assert [value.item() for value in paired_difference(a, a, BLOCK, REFERENCE)] == [0, 0, 0]


def test_the_other_way_round_it_has_the_other_sign():
    a, b = methods(seed=2)
    there, back = paired_difference(a, b, BLOCK, REFERENCE), paired_difference(b, a, BLOCK, REFERENCE)
    torch.testing.assert_close(torch.stack(there), torch.stack(back) * torch.tensor([-1, -1, 1]))


def test_labels_of_blocks_and_their_sizes_are_free():
    a, b = methods(seed=3)
    there = paired_difference(a, b, BLOCK, REFERENCE)
    torch.testing.assert_close(paired_difference(a, b, 100 - 7 * BLOCK, REFERENCE), there)
    unequal = paired_difference(a, b, torch.arange(N).pow(2) % 23, REFERENCE)
    torch.testing.assert_close(unequal.fd, there.fd)
    assert abs(unequal.fd_inf - TRUE) < 4 * unequal.se


@pytest.mark.parametrize("n", [DIM, 60], ids=["n <= dim", "one block"])
def test_no_error_where_it_means_nothing(n):
    a, b = (x[:n] for x in methods(seed=4))
    result = paired_difference(a, b, torch.zeros(n, dtype=torch.int64) if n > DIM else BLOCK[:n], REFERENCE)
    assert result.fd.isfinite() and result.fd_inf.isnan() and result.se.isnan()


def test_what_does_not_fit_is_refused():
    a, b = methods(seed=5)
    with pytest.raises(UsageError, match=r"do not form pairs .\(400, 8\) and \(399, 8\)"):
        paired_difference(a, b[:-1], BLOCK, REFERENCE)
    with pytest.raises(UsageError, match=r"blocks of \(399,\)"):
        paired_difference(a, b, BLOCK[:-1], REFERENCE)
    with pytest.raises(UsageError, match="the reference has 8 features"):
        paired_difference(a[:, :5], b[:, :5], BLOCK, REFERENCE)
    with pytest.raises(UsageError, match="NaN"):
        paired_difference(a, b.log(), BLOCK, REFERENCE)
