"""Likelihoods of exact models: the flow's, the bound's, and what the two say of a start at small T."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from oracles import BatchedNoise, one_gaussian, three_modes

from diffaccel.denoiser.levels import LogUniform, Uniform
from diffaccel.evaluation.likelihood import (
    bits_per_dim,
    bound,
    decoding,
    dequantised,
    flow_log_prob,
    probability_flow,
    rademacher,
    score_matching,
)
from diffaccel.noise import NoiseStreams
from diffaccel.process import SubVariancePreserving, VarianceExploding, VariancePreserving


def time(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def ratio(T: float, process=None) -> float:
    return (process or VariancePreserving()).ratio(time(T)).item()


def laws(truth, make, times):
    """The log-density of a start at each of several times."""
    return [partial(make(T).log_prob, truth) for T in times]


def plane(side: int = 200, reach: float = 7.0) -> tuple[torch.Tensor, float]:
    """Points (n, 2, 1, 1) and the area of each."""
    axis = torch.linspace(-reach, reach, side, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)[:, :, None, None], (2 * reach / (side - 1)) ** 2


@torch.no_grad()
def divergence_of_starts(truth, T: float, start) -> float:
    """KL[p_T || start] by quadrature in the network's coordinates."""
    x, area = plane()
    log_p = truth.exact_prior(T).log_prob(truth, x)
    return (log_p.exp() * (log_p - start.log_prob(truth, x))).sum().item() * area


# The start's mismatch, on three modes (closed forms and quadrature)


@pytest.mark.parametrize(
    ("T", "to_normal", "to_matched", "information"),
    [
        (0.1, 1.54615, 1.16636, 1.71256),
        (0.2, 0.64213, 0.39865, 1.16101),
        (0.3, 0.19436, 0.07751, 0.74931),
        (0.4, 0.05214, 0.00899, 0.38200),
        (0.6, 0.00371, 0.00002, 0.05186),
        (1.0, 0.000005, 0.0, 0.00009),
    ],
)
def test_the_mismatch_of_starts(T, to_normal, to_matched, information):
    truth = three_modes()
    assert divergence_of_starts(truth, T, truth.normal_prior(T)) == pytest.approx(to_normal, abs=2e-5)
    assert divergence_of_starts(truth, T, truth.matched_prior(T)) == pytest.approx(to_matched, abs=2e-5)
    x, area = plane()
    log_p, sigma = truth.exact_prior(T).log_prob(truth, x), truth.process.sigma(time(T)).item()
    entropy = -(log_p.exp() * log_p).sum().item() * area
    assert entropy - math.log(2 * math.pi * math.e * sigma**2) == pytest.approx(information, abs=2e-5)


@pytest.mark.parametrize("T", [0.2, 0.4, 1.0])
def test_what_a_matched_gaussian_gains_has_a_closed_form(T):
    truth, mean = three_modes(), three_modes().moments[0]
    alpha, sigma = truth.process.alpha(time(T)), truth.process.sigma(time(T))
    covariance = alpha**2 * truth.moments[1] + sigma**2 * torch.eye(2)
    gain = 0.5 * (covariance.trace() - 2 - covariance.logdet() + (alpha * mean).square().sum()).item()
    found = [divergence_of_starts(truth, T, start) for start in (truth.normal_prior(T), truth.matched_prior(T))]
    assert found[0] - found[1] == pytest.approx(gain, abs=1e-5)


# The probability flow


@pytest.mark.parametrize("process", [VariancePreserving(), SubVariancePreserving(), VarianceExploding(0.01, 50.0)])
@pytest.mark.parametrize("T", [0.2, 0.6, 1.0])
def test_from_the_true_law_the_flow_gives_the_data_s_density(process, T):
    truth = three_modes(process)
    low = ratio(1e-5, process)
    x = truth.sample(20) * process.alpha(time(1e-5)) + process.sigma(time(1e-5)) * torch.randn(20, 2, 1, 1).double()
    prior = truth.exact_prior(T)
    found = flow_log_prob(truth, lambda x: prior.log_prob(truth, x), x, low, prior.ratio_star, tol=1e-6)
    alpha = process.alpha(time(1e-5))
    expected = truth.log_prob(x / alpha, torch.full((20,), low).double()) - 2 * alpha.log()
    assert (found - expected).abs().max() < 2e-5
    if isinstance(process, VariancePreserving) and T == 0.2:
        assert (found - truth.log_prob(x, torch.zeros(20).double())).abs().max() < 1.2e-4, "sigma is 0.001 there"


def test_from_another_law_it_differs_by_the_start_alone():
    truth, T, n = three_modes(), 0.2, 300
    normal, exact = truth.normal_prior(T), truth.exact_prior(T)
    x, low = truth.sample(n), ratio(1e-3)
    ends = []

    def record(x_star):
        ends.append(x_star)
        return normal.log_prob(truth, x_star)

    found = flow_log_prob(truth, record, x, low, normal.ratio_star)
    right = flow_log_prob(truth, lambda x: exact.log_prob(truth, x), x, low, normal.ratio_star)
    gap = normal.log_prob(truth, ends[0]) - exact.log_prob(truth, ends[0])
    assert torch.allclose(found - right, gap, atol=1e-9)
    assert abs(gap.mean() + 0.64213) < 4 * gap.std() / n**0.5


def test_one_flow_goes_through_several_levels():
    truth, levels = three_modes(), [ratio(T) for T in (0.1, 0.4, 1.0)]
    x = truth.sample(10)
    together = list(probability_flow(truth, x, ratio(1e-3), levels, tol=1e-7))
    for level, (x_star, volume) in zip(levels, together, strict=True):
        ((end, change),) = probability_flow(truth, x, ratio(1e-3), [level], tol=1e-7)
        assert torch.allclose(x_star, end, atol=1e-5) and torch.allclose(volume, change, atol=1e-5)


def test_the_tolerance_of_the_reference():
    """At 1e-5 single errors stay below 0.028 nats and the mean below 2e-4, as was measured for T = 1."""
    truth = three_modes()
    prior, x = truth.exact_prior(1.0), truth.sample(30)
    tight, loose = (
        flow_log_prob(truth, lambda x: prior.log_prob(truth, x), x, ratio(1e-5), prior.ratio_star, tol=tol)
        for tol in (1e-7, 1e-5)
    )
    assert (loose - tight).abs().max() < 0.028 and (loose - tight).mean().abs() < 1e-3


def test_a_random_probe_is_unbiased():
    truth, prior = three_modes(), three_modes().exact_prior(0.4)
    x = truth.sample(1).expand(500, 2, 1, 1)
    law = lambda x: prior.log_prob(truth, x)  # noqa: E731
    exact = flow_log_prob(truth, law, x[:1], ratio(1e-5), prior.ratio_star)
    probe = rademacher(BatchedNoise(500), x)
    assert probe.abs().eq(1).all() and probe.mean().abs() < 0.15
    found = flow_log_prob(truth, law, x, ratio(1e-5), prior.ratio_star, probe=probe)
    assert found.std() > 0 and abs(found.mean() - exact) < 4 * found.std() / 500**0.5


def test_a_value_does_not_depend_on_its_batch_and_single_precision_costs_little():
    truth, prior = three_modes(), three_modes().exact_prior(0.4)
    law, x = (lambda x: prior.log_prob(truth, x.double())), truth.sample(6)
    one = flow_log_prob(truth, law, x[2:3], ratio(1e-5), prior.ratio_star)
    assert torch.allclose(flow_log_prob(truth, law, x, ratio(1e-5), prior.ratio_star)[2], one, atol=1e-12)
    single = flow_log_prob(truth, law, x[2:3].float(), ratio(1e-5), prior.ratio_star)
    assert torch.allclose(single, one, atol=5e-3)


# Images


@pytest.mark.parametrize(("width", "log_density"), [(2.0, -math.log(2)), (1.0, 0.0)])
def test_a_uniform_density_is_eight_bits(width, log_density):
    assert bits_per_dim(torch.tensor([48 * log_density]), 48, width).item() == pytest.approx(8, abs=1e-6)


def test_dequantised_values_fill_their_cells():
    images = torch.arange(256, dtype=torch.uint8).repeat(40)[None, None, None].repeat(2, 1, 1, 1)
    x = dequantised(images, NoiseStreams(0, range(2)))
    assert x.min() >= -1 and x.max() <= 1
    cell = 128 * (x.double() + 1)
    assert (cell >= images - 1e-3).all() and (cell <= images + 1.001).all()
    assert (cell - images).mean().item() == pytest.approx(0.5, abs=0.01)
    assert (cell - images).var().item() == pytest.approx(1 / 12, abs=0.002)


# The bound


def test_the_terms_of_a_gaussian():
    """Closed forms at epsilon = 1e-5 for a score that is wrong by a tenth (design table): I, R, ln nu and their sum."""
    truth, n, T = one_gaussian(factor=1.1), 6000, (0.2, 0.6, 1.0)
    x_0 = truth.sample(n)
    starts = {"normal": laws(truth, truth.normal_prior, T), "exact": laws(truth, truth.exact_prior, T)}
    found = bound(truth, starts, x_0, ratio(1e-5), [ratio(t) for t in T], BatchedNoise(n), draws=24)
    se = found.score_matching.std(0) / n**0.5
    assert torch.allclose(found.entropy, torch.tensor([25.4810, 27.5759, 27.6289]).double(), atol=1e-4)
    assert ((found.score_matching.mean(0) - torch.tensor([24.39022, 26.30436, 26.49560])).abs() < 4 * se).all()
    for name, expected in (("normal", (-5.358521, -4.434969, -4.542461)), ("exact", (-4.347413, -4.414371, -4.542429))):
        total = found.total(name)
        assert ((total.mean(0) - torch.tensor(expected)).abs() < 4 * total.std(0) / n**0.5).all(), name
    gap = found.start["exact"] - found.start["normal"]
    assert ((gap.mean(0) - torch.tensor([1.011108, 0.020598, 0.000032])).abs() < 4 * gap.std(0) / n**0.5 + 1e-5).all()


def test_with_true_score_and_start_the_bound_is_the_entropy_at_every_T():
    truth, n, T = three_modes(), 20_000, (0.2, 0.4, 1.0)
    starts = {"exact": laws(truth, truth.exact_prior, T)}
    for epsilon, entropy in ((1e-5, 1.63426), (1e-3, 1.63529)):
        found = bound(truth, starts, truth.sample(n), ratio(epsilon), [ratio(t) for t in T], BatchedNoise(n))
        total = found.total("exact")
        assert ((total.mean(0) + entropy).abs() < 3.5 * total.std(0) / n**0.5).all()


def test_the_decoder_brings_the_bound_to_the_data():
    """Check of section 9.6: L + Delta = -4.3279415 at epsilon = 1e-3, just under -H(p_0) = -4.3279403."""
    truth, n, T = one_gaussian(), 20_000, 0.6
    x_0, prior = truth.sample(n), truth.exact_prior(T)
    starts = {"exact": laws(truth, truth.exact_prior, [T])}
    found = bound(truth, starts, x_0, ratio(1e-3), [prior.ratio_star], BatchedNoise(n)).total("exact")[:, 0]
    delta = decoding(truth, x_0, ratio(1e-3), BatchedNoise(n))
    total = found + delta
    assert delta.mean().abs() > 5e-5
    assert abs(total.mean() + 4.3279415) < 4 * total.std() / n**0.5


def test_importance_sampling_agrees_with_uniform_times_and_is_steadier():
    truth, n, T, epsilon = three_modes(), 20_000, 0.6, 1e-2
    truth.ratio_range = (ratio(epsilon), ratio(T))
    x_0, process = truth.sample(n), truth.process
    ours = score_matching(truth, x_0, ratio(epsilon), torch.tensor([ratio(T)]), BatchedNoise(n), 1)[:, 0]
    t = Uniform()(truth, torch.rand(n).double())
    z = torch.randn_like(x_0)
    error = (truth(process.marginal(x_0, t, z), t).eps - z).flatten(1).square().sum(1)
    plain = 0.5 * (T - epsilon) * (process.diffusion(t) / process.sigma(t)).square() * error
    assert abs(ours.mean() - plain.mean()) < 4 * (ours.var() / n + plain.var() / n).sqrt()
    assert ours.std() < 0.5 * plain.std()


def test_the_draws_of_levels_are_one_of_each_share():
    """Of as many equal shares of ln(ratio) as there are draws, for every image."""
    truth, low, high, seen = three_modes(), 0.05, 2.0, []
    truth.register_forward_pre_hook(lambda _, inputs: seen.append(truth.process.ratio(inputs[1])))
    score_matching(truth, truth.sample(50), low, torch.tensor([high]), BatchedNoise(50), 8)
    share = (torch.stack(seen) / low).log() / math.log(high / low) * 8
    assert share.floor().sort(0).values.eq(torch.arange(8)[:, None]).all()
    assert share.frac().mean().item() == pytest.approx(0.5, abs=0.06) and share.frac().std() > 0.25


@pytest.mark.parametrize(
    ("process", "z"),
    [
        (VariancePreserving(), 9.8316),
        (SubVariancePreserving(), 16.0231),
        (VarianceExploding(0.01, 50.0), 2 * 0.59 * math.log(5000)),
    ],
)
def test_the_constants_of_importance_sampling_and_of_R(process, z):
    """Z = int g^2 / sigma^2 dt, and R / D = 1/2 int (g^2 / sigma^2 + 2 f) dt = ln(sigma_T / sigma), on [0.01, 0.6]."""
    low, high = ratio(0.01, process), ratio(0.6, process)
    assert 2 * math.log(high / low) == pytest.approx(z, abs=1e-4)
    t = torch.linspace(0.01, 0.6, 200_001, dtype=torch.float64)
    rate, drift = (process.diffusion(t) / process.sigma(t)).square(), process.drift(t)
    assert torch.trapezoid(rate, t).item() == pytest.approx(z, abs=1e-4)
    entropy = (process.sigma(time(0.6)) / process.sigma(time(0.01))).log().item()
    assert torch.trapezoid(0.5 * rate + drift, t).item() == pytest.approx(entropy, rel=1e-6)
    truth = three_modes(process)
    truth.ratio_range = (low, high)
    levels = process.ratio(LogUniform()(truth, torch.tensor([0.0, 0.5, 1.0]).double())).log()
    assert torch.allclose(levels, torch.tensor([low, (low * high) ** 0.5, high]).double().log())


# Where to stop


def score_gaps(truth, times: list[float], steps: int = 60) -> list[float]:
    """int E |grad log p|^2 rho d rho from epsilon = 1e-5: G(T) / delta^2 for a score that is wrong by 1 + delta."""
    levels = torch.linspace(math.log(ratio(1e-5)), math.log(ratio(1.0)), steps, dtype=torch.float64)
    values = []
    for level in levels:
        y, area = plane(160, 4.5)
        width = max(1.0, 7 / 4.5 * (1 + level.exp().item() ** 2) ** 0.5) if level > -1 else 1.0
        y, rho = y * width, torch.full((len(y),), level.exp().item(), dtype=torch.float64)
        t = truth.process.time(rho)
        eps = truth(y * truth.process.alpha(t)[:, None, None, None], t).eps
        values.append((truth.log_prob(y, rho).exp() * eps.flatten(1).square().sum(1)).sum() * area * width**2)
    found = torch.cumulative_trapezoid(torch.stack(values), levels)
    return np.interp([math.log(ratio(T)) for T in times], levels[1:], found).tolist()


def test_the_score_of_one_gaussian_has_the_gap_of_its_closed_form():
    truth, delta = one_gaussian(), 0.1
    for T, expected in ((0.2, 0.01946), (0.6, 0.08642), (1.0, 0.21448)):
        v = lambda t: 1 + truth.process.alpha(t).square() * (truth.variances[0] - 1)  # noqa: E731
        alpha, alpha_min = truth.process.alpha(time(T)), truth.process.alpha(time(1e-5))
        closed = 0.5 * delta**2 * (alpha_min**2 * v(time(T)) / (alpha**2 * v(time(1e-5)))).log().sum()
        assert closed.item() == pytest.approx(expected, abs=1e-5)
        x_0, n = truth.sample(4000), 4000
        torch.manual_seed(1)
        wrong = score_matching(one_gaussian(1.1), x_0, ratio(1e-5), torch.tensor([ratio(T)]), BatchedNoise(n), 16)
        torch.manual_seed(1)
        right = score_matching(truth, x_0, ratio(1e-5), torch.tensor([ratio(T)]), BatchedNoise(n), 16)
        gap = (wrong - right)[:, 0]
        assert abs(gap.mean() - expected) < 4 * gap.std() / n**0.5


@pytest.mark.slow
def test_an_auxiliary_model_lowers_the_best_T_and_raises_the_bound():
    """Check of section 9.7, by quadrature: T* and G + KL there, for N(0, I) and for the matched Gaussian."""
    truth, times = three_modes(), [0.01 * k for k in range(33, 76)]
    gaps = score_gaps(truth, times)
    for make, rows in (
        (truth.normal_prior, ((0.03, 0.70, 0.0065), (0.1, 0.54, 0.0503), (0.3, 0.41, 0.322))),
        (truth.matched_prior, ((0.03, 0.53, 0.0039), (0.1, 0.44, 0.0363), (0.3, 0.36, 0.269))),
    ):
        mismatch = [divergence_of_starts(truth, T, make(T)) for T in times]
        for delta, best, loss in rows:
            total = [delta**2 * gap + kl for gap, kl in zip(gaps, mismatch, strict=True)]
            assert times[total.index(min(total))] == pytest.approx(best, abs=0.011)
            assert min(total) == pytest.approx(loss, rel=0.02)
    (whole,) = score_gaps(truth, [1.0])
    assert [delta**2 * whole for delta in (0.03, 0.1, 0.3)] == pytest.approx([0.0101, 0.113, 1.01], rel=0.02)
