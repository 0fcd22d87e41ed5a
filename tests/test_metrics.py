import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.kid import poly_mmd

from diffaccel.errors import UsageError
from diffaccel.metrics import (
    FrechetDistance,
    KernelDistance,
    KernelReference,
    Moments,
    MomentSums,
    frechet,
    frechet_distance,
    jackknife,
    kernel,
    kernel_distance,
)
from diffaccel.metrics.frechet import Resampled, frechet_of_few


def gaussian(n: int, dim: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    """Correlated Gaussian features, far from the origin as pooled activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(99)) / dim**0.5
    return scale * torch.randn(n, dim, dtype=torch.float64, generator=generator) @ mixing + 3 + mean


def scored(features: Tensor, reference: Moments, batch: int = 50, blocks: int = 10) -> FrechetDistance:
    metric = FrechetDistance(features.shape[1], reference, blocks=blocks)
    for index, part in enumerate(features.split(batch)):
        metric.update(part, index)
    return metric


def fidelity(features: Tensor, reference: Tensor) -> float:
    statistics = fid_features_to_statistics(features), fid_features_to_statistics(reference)
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def test_moments_are_numpys():
    features = gaussian(300, 8, seed=0)
    moments = Moments.from_features(features)
    assert moments.n == 300
    np.testing.assert_allclose(moments.mean, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-12)
    torch.testing.assert_close(moments.root @ moments.root, moments.covariance, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dim", "n"), [(1, 40), (2, 40), (64, 700)])
def test_block_sums_have_the_moments_of_all_features(dim, n):
    features = 1e4 + gaussian(n, dim, seed=1)  # a mean that would cost eight digits of the covariance about zero
    sums = MomentSums(dim, blocks=3, origin=features[0])
    for index, part in enumerate(features.split(17)):
        sums.update(part, index)
    moments, expected = sums.compute(), Moments.from_features(features)
    assert moments.n == n
    torch.testing.assert_close(moments.mean, expected.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.covariance, expected.covariance, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dim", "mean"), [(2, 0.0), (64, 0.0), (64, 0.5)])
def test_frechet_distance_is_torch_fidelitys(dim, mean):
    generated, reference = gaussian(1003, dim, seed=1, mean=mean, scale=1.1), gaussian(900, dim, seed=2)
    ours = scored(generated, Moments.from_features(reference)).compute().fd
    assert ours.item() == pytest.approx(fidelity(generated, reference), rel=1e-9)


def test_distance_between_diagonal_gaussians_is_its_closed_form():
    generator = torch.Generator().manual_seed(3)
    mean, std, mean_r, std_r = torch.rand(4, 7, dtype=torch.float64, generator=generator)
    ours = frechet_distance(Moments(9, mean, std.square().diag()), Moments(9, mean_r, std_r.square().diag()))
    torch.testing.assert_close(ours, (mean - mean_r).square().sum() + (std - std_r).square().sum())


def test_distance_of_a_set_with_itself_is_zero():
    features = gaussian(400, 16, seed=4)
    assert abs(scored(features, Moments.from_features(features)).compute().fd.item()) < 1e-10


def test_jackknife_removes_the_bias_and_knows_its_error():
    """Against the exact reference the true FD is d (scale - 1)^2; the plain one is biased by more than its noise."""
    dim, scale, true = 32, 1.15, 32 * 0.15**2
    reference = Moments(10**6, torch.zeros(dim), torch.eye(dim))
    results = []
    for seed in range(24):
        features = scale * torch.randn(400, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        results.append(torch.stack(scored(features, reference, batch=20).compute()))
    fd, fd_inf, se = torch.stack(results).unbind(1)
    assert fd.mean() - true > 10 * fd.std() / 24**0.5
    assert (fd_inf.mean() - true).abs() < 3 * fd_inf.std() / 24**0.5
    assert 0.6 < se.mean() / fd_inf.std() < 1.6


@pytest.mark.parametrize(("dim", "n", "true", "repeats"), [(64, 500, 0.771, 60), (256, 2500, 9.95, 20)])
def test_bias_limit_and_error_at_the_sizes_of_use(dim, n, true, repeats):
    """Correlations of two decades, an exact reference, standard deviations 1.2 times its own, and a shift of the mean.

    By second-order perturbation of the root the plain distance is biased by

        (tr C + 1/2 sum_ij (1 + [i = j]) mu_i mu_j / (mu_i + mu_j)) / n,    mu^2 = eigenvalues of C C_r
    """
    variance = torch.logspace(0, -2, dim, dtype=torch.float64)
    shift = ((true - 0.2**2 * variance.sum()) / dim).sqrt()
    mu = 1.2 * variance
    harmonic = torch.outer(mu, mu) / (mu[:, None] + mu)
    bias = (1.2**2 * variance.sum() + (harmonic.sum() + harmonic.trace()) / 2) / n
    reference = Moments(10**9, torch.zeros(dim), variance.diag())
    results = []
    for seed in range(repeats):
        noise = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        features = shift + 1.2 * variance.sqrt() * noise
        results.append(torch.stack(scored(features, reference, batch=n // 20).compute()))
    fd, fd_inf, se = torch.stack(results).unbind(1)
    by_chance = 3 * fd.std() / repeats**0.5
    assert abs(fd.mean() - true - bias) < by_chance + 0.05 * bias
    assert abs(fd_inf.mean() - true) < by_chance + 0.03 * bias
    assert bias > 5 * fd.std()
    assert fd_inf.std() < 1.2 * fd.std(), "taking the bias away costs next to no variance"
    chance = 3 * (1 / (2 * (repeats - 1)) + 1 / (18 * repeats)) ** 0.5
    assert se.square().mean().sqrt() == pytest.approx(fd_inf.std().item(), rel=chance)


def test_jackknife_of_equal_blocks_is_the_textbook_one():
    full, kept = torch.tensor(2.0), torch.tensor([1.0, 2.5, 4.0])
    estimate, error = jackknife(full, kept, torch.tensor([5.0, 5.0, 5.0]))
    torch.testing.assert_close(estimate, 3 * full - 2 * kept.mean())
    torch.testing.assert_close(error, (2 / 3 * (kept - kept.mean()).square().sum()).sqrt())


def test_jackknife_cancels_a_bias_of_1_over_n_for_unequal_blocks():
    sizes = torch.tensor([300.0, 300.0, 70.0], dtype=torch.float64)
    n = sizes.sum()
    estimate, error = jackknife(0.7 + 11 / n, 0.7 + 11 / (n - sizes), sizes)
    torch.testing.assert_close(estimate, torch.tensor(0.7, dtype=torch.float64), rtol=1e-12, atol=0)
    assert error < 1e-12


@pytest.mark.parametrize(("n", "batch"), [(60, 60), (8, 2)], ids=["one block", "n <= dim"])
def test_no_extrapolation_where_it_means_nothing(n, batch):
    result = scored(gaussian(n, 8, seed=1), Moments.from_features(gaussian(60, 8, seed=2)), batch).compute()
    assert result.fd.isfinite() and result.fd_inf.isnan() and result.se.isnan()


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
def test_two_halves_merged_are_one(kind):
    features, reference = gaussian(230, 8, seed=1, mean=0.3), gaussian(200, 8, seed=2)

    def metric():
        if kind == "kernel":
            return KernelDistance(8, reference)
        return FrechetDistance(8, Moments.from_features(reference))

    one, even, odd = metric(), metric(), metric()
    for index, part in enumerate(features.split(20)):
        one.update(part, index)
        (odd if index % 2 else even).update(part, index)
    even.merge_state(odd)
    torch.testing.assert_close(even.compute(), one.compute(), rtol=0, atol=0)  # ten blocks: to the last bit


WORKER = """
import sys, torch, torch.distributed as dist
from diffaccel.metrics import FrechetDistance, KernelDistance, Moments
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
reference = torch.randn(90, 4, generator=torch.Generator().manual_seed(2))
for batches in (1, 5):
    features = torch.randn(20 * batches, 4, generator=torch.Generator().manual_seed(1))
    frechet, kernel = FrechetDistance(4, Moments.from_features(reference)), KernelDistance(4, reference)
    for index, part in enumerate(features.split(20)):
        if index % 2 == rank:
            frechet.update(part, index), kernel.update(part, index)
    print(*(value.item() for value in (*frechet.compute(), kernel.compute())))
dist.destroy_process_group()
"""


def test_two_processes_are_one(tmp_path: Path):
    """Also when one of them gets no batch, or fewer batches than the other."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = ([float(value) for value in p.communicate(timeout=120)[0].split()] for p in processes)
    reference, expected = torch.randn(90, 4, generator=torch.Generator().manual_seed(2)), []
    for batches in (1, 5):
        features = torch.randn(20 * batches, 4, generator=torch.Generator().manual_seed(1))
        kernel = KernelDistance(4, reference)
        kernel.update(features, 0)
        alone = scored(features, Moments.from_features(reference), batch=20).compute()
        expected += [value.item() for value in (*alone, kernel.compute())]
    assert first == pytest.approx(second, rel=0, abs=0, nan_ok=True)
    assert first == pytest.approx(expected, rel=1e-12, nan_ok=True)


# The extrapolation to the second order


def test_the_second_order_cancels_both_terms_for_any_sizes():
    """Unequal blocks, and halves that are not of half the images."""
    sizes = torch.tensor([3.0, 5.0, 8.0, 4.0, 7.0], dtype=torch.float64)
    halves = torch.stack([sizes[::2].sum(), sizes[1::2].sum(), sizes[:2].sum(), sizes[2:].sum()])

    def law(n: Tensor) -> Tensor:
        return 0.7 + 11 / n + 130 / n**2

    parts = Resampled(law(sizes.sum()), law(sizes.sum() - sizes), sizes, law(halves), halves)
    assert parts.extrapolated().fd_inf == pytest.approx(0.7, rel=1e-10)
    first = parts._replace(halves=sizes[:0], half_sizes=sizes[:0]).extrapolated()
    assert first.fd_inf == jackknife(parts.full, parts.kept, sizes)[0] != pytest.approx(0.7, rel=0.05)
    assert first.se == parts.extrapolated().se


def drawn(variance: Tensor, n: int, seeds: range, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Errors of fd_inf and their standard errors, of n images that differ from the reference by a shift of the mean."""
    dim = len(variance)
    reference, found = Moments(10**9, torch.zeros(dim), variance.diag()), []
    offset = shift * variance.sqrt()
    for seed in seeds:
        noise = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        one = scored(noise * variance.sqrt() + offset, reference, batch=n // 20).compute()
        found.append(torch.stack([one.fd_inf - offset.square().sum(), one.se]))
    errors, ses = torch.stack(found).unbind(1)
    return errors, ses


@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_few_images_per_feature_are_extrapolated_to_the_second_order(shift: float, monkeypatch: pytest.MonkeyPatch):
    """As many as 5,000 in 1,280 features: the first order is off by more than its error, the second is not."""
    variance = torch.logspace(0, -1, 160, dtype=torch.float64)
    errors, ses = drawn(variance, 620, range(30), shift)
    assert errors.mean().abs() < 0.8 * ses.mean()
    assert (errors.abs() < 2 * ses).double().mean() >= 0.85
    monkeypatch.setattr(frechet, "SECOND_ORDER", (3, 3))
    first, ses = drawn(variance, 620, range(30), shift)
    assert first.mean() < -1.4 * ses.mean() and errors.std() < 1.3 * first.std()
    assert (first.abs() < 2 * ses).double().mean() < 0.7


@pytest.mark.slow
def test_the_distance_of_5000_images_in_1280_features():
    """A spectrum as of EfficientNet-Lite0's features."""
    index = torch.arange(1280, dtype=torch.float64)
    errors, ses = drawn(30 / (1 + index / 4) * (-index / 800).exp(), 5000, range(4))
    assert errors.mean().abs() < 1.5 * ses.mean() and (errors.abs() < 3 * ses).all()


def test_many_images_per_feature_keep_the_first_order():
    """And very few, whose halves would have singular covariances."""
    reference = Moments(10**9, torch.zeros(20), torch.eye(20))
    for n, second in ((40, False), (60, True), (159, True), (160, False)):
        features = torch.randn(n, 20, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        assert (len(scored(features, reference, batch=1).resampled().halves) > 0) == second, n


def naive_kernel_distance(x: Tensor, y: Tensor) -> float:
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    within = [sum(k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) for s in (x, y)]
    cross = sum(k(a, b) for a in x for b in y)
    n, m = len(x), len(y)
    return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * cross / (n * m)


@pytest.mark.parametrize("rows", [7, 1024])
def test_kernel_distance_is_the_double_loop(rows):
    x, y = gaussian(30, 5, seed=1, mean=0.2).float(), gaussian(25, 5, seed=2).float()
    metric = KernelDistance(5, y, rows=rows)
    for index, part in enumerate(x.split(8)):
        metric.update(part, index)
    assert metric.compute().item() == pytest.approx(naive_kernel_distance(x.double(), y.double()), rel=1e-11)


def test_kernel_distance_is_torchmetrics_on_one_subset_of_all():
    x, y = gaussian(100, 6, seed=1, mean=0.2).float(), gaussian(100, 6, seed=2).float()
    metric = KernelDistance(6, y)
    metric.update(x, 0)
    assert metric.compute().item() == pytest.approx(poly_mmd(x.double(), y.double()).item(), rel=1e-11)


def test_the_references_own_term_is_taken_once(monkeypatch: pytest.MonkeyPatch):
    """And with it a distance is what it is with the features alone."""
    y, of_itself = gaussian(90, 6, seed=2).float(), []
    mean_off_diagonal = kernel.mean_off_diagonal
    monkeypatch.setattr(
        kernel, "mean_off_diagonal", lambda x, rows: (of_itself.append(len(x)), mean_off_diagonal(x, rows))[1]
    )
    shared = KernelReference(y)
    for seed in (3, 4):
        x, values = gaussian(80, 6, seed).float(), []
        for reference in (shared, y):
            metric = KernelDistance(6, reference)
            metric.update(x, 0)
            values.append(metric.compute())
        assert values[0] == values[1]
    assert of_itself.count(90) == 3, "one for what is shared, two without"


def test_kernel_distance_is_unbiased_and_not_clamped():
    values = []
    for seed in range(20):
        metric = KernelDistance(4, gaussian(60, 4, seed=100 + seed))
        metric.update(gaussian(60, 4, seed=seed), 0)
        values.append(metric.compute())
    values = torch.stack(values)
    assert values.min() < 0 < values.max()
    assert values.mean().abs() < 3 * values.std() / 20**0.5


def test_the_error_of_the_kernel_distance_is_the_spread_of_repeated_draws():
    """And the distance is that of the metric, for blocks of unequal size too."""
    reference = KernelReference(gaussian(200, 4, seed=1))
    found = [kernel_distance(gaussian(123, 4, seed=100 + seed, mean=0.2), reference) for seed in range(200)]
    distances, errors = (torch.stack(values) for values in zip(*found, strict=True))
    assert errors.square().mean().sqrt() == pytest.approx(distances.std().item(), rel=0.15)
    metric = KernelDistance(4, reference)
    metric.update(gaussian(123, 4, seed=100, mean=0.2), 0)
    torch.testing.assert_close(distances[0], metric.compute(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rows", [7, 50, 1024])
def test_the_kernel_distance_with_its_error_is_the_metrics_to_the_bit(rows):
    reference = KernelReference(gaussian(90, 6, seed=2).float(), rows)
    x = gaussian(123, 6, seed=3, mean=0.2).float()
    metric = KernelDistance(6, reference, rows)
    metric.update(x, 0)
    assert kernel_distance(x, reference).kid == metric.compute()


def test_the_jackknife_of_the_kernel_distance_leaves_out_whole_blocks():
    """Against distances of the images that are left, for unequal blocks in any order."""
    reference = KernelReference(gaussian(60, 5, seed=2).float(), rows=16)
    x, block = (
        gaussian(70, 5, seed=3, mean=0.2).float(),
        torch.randint(4, (70,), generator=torch.Generator().manual_seed(5)),
    )

    def alone(features: Tensor) -> Tensor:
        metric = KernelDistance(5, reference)
        metric.update(features, 0)
        return metric.compute()

    kept = torch.stack([alone(x[block != k]) for k in range(4)])
    expected = jackknife(alone(x), kept, block.bincount().double())[1]
    assert kernel_distance(x, reference, block=block).se == pytest.approx(expected.item(), rel=1e-9)


def test_the_error_of_correlated_images_needs_their_blocks():
    """Ten draws of each of 40 features: as if there were 40 images."""
    reference, errors = KernelReference(gaussian(300, 4, seed=1).float()), []
    draws = [gaussian(40, 4, seed=100 + seed, mean=0.3).float().repeat(10, 1) for seed in range(60)]
    chains = torch.arange(400) % 40 % 10
    found = [kernel_distance(x, reference, block=chains) for x in draws]
    errors = [kernel_distance(x, reference, block=torch.arange(400) // 40) for x in draws]
    spread = torch.stack([one.kid for one in found]).std().item()
    rms, wrong = (float(torch.stack([one.se for one in some]).square().mean().sqrt()) for some in (found, errors))
    assert rms == pytest.approx(spread, rel=0.25) and wrong < spread / 3


def test_the_kernel_distance_of_many_images_takes_its_tiles_once(monkeypatch: pytest.MonkeyPatch):
    reference, tiles, tile = KernelReference(gaussian(40, 3, seed=1).float(), rows=20), [], kernel._tile
    assert reference.within.isfinite()
    monkeypatch.setattr(kernel, "_tile", lambda x, y: (tiles.append(len(x)), tile(x, y))[1])
    kernel_distance(gaussian(60, 3, seed=2).float(), reference)
    assert len(tiles) == 3 * 3 + 3 * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
def test_features_that_are_not_finite_are_refused(kind, bad):
    reference = gaussian(50, 3, seed=1)
    metric = kind(3, Moments.from_features(reference) if kind is FrechetDistance else reference)
    features = gaussian(10, 3, seed=2)
    features[4, 1] = bad
    with pytest.raises(UsageError, match="batch 7 contain 1 values that are NaN or infinite"):
        metric.update(features, 7)


def test_what_does_not_fit_is_refused():
    reference = gaussian(50, 3, seed=1)
    with pytest.raises(UsageError, match="the reference has 3 features, but the extractor has 4"):
        FrechetDistance(4, Moments.from_features(reference))
    with pytest.raises(UsageError, match=r"shape \(5, 4\), not \(n, 3\)"):
        FrechetDistance(3, Moments.from_features(reference)).update(torch.zeros(5, 4), 0)
    with pytest.raises(UsageError, match="at least 2 images, not 1: score more"):
        scored(reference[:1], Moments.from_features(reference)).compute()
    with pytest.raises(UsageError, match="at least 2"):
        Moments.from_features(reference[:1])
    with pytest.raises(UsageError, match="at least 2"):
        KernelDistance(3, reference[:1])
    with pytest.raises(UsageError, match=r"shape \(50, 3\), not \(n, 4\)"):
        KernelDistance(4, KernelReference(reference))


def test_reset_starts_anew():
    features, reference = gaussian(200, 4, seed=1), gaussian(200, 4, seed=2)
    metric = scored(features + 5, Moments.from_features(reference))
    metric.reset()
    for index, part in enumerate(features.split(50)):
        metric.update(part, index)
    torch.testing.assert_close(metric.compute(), scored(features, Moments.from_features(reference)).compute())


def test_few_images_have_the_distance_of_their_moments():
    """Fewer images than features: the eigenvalues of a matrix of their number are those of their covariance."""
    generator = torch.Generator().manual_seed(0)
    reference = Moments.from_features(torch.randn(500, 40, generator=generator))
    for n in (2, 7, 40):
        features = 1.5 * torch.randn(n, 40, generator=generator) + 0.3
        expected = frechet_distance(Moments.from_features(features), reference)
        # the covariance has eigenvalues that are 0 up to rounding, whose roots add up to 1e-6
        torch.testing.assert_close(frechet_of_few(features, reference), expected, rtol=1e-7, atol=0)
