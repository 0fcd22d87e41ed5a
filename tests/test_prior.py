"""Starting states, level tables and posteriors, and how a budget is spent."""

import re

import pytest
import torch
from oracles import split

from diffaccel.denoiser import FiniteSetDenoiser, GaussianDenoiser, KarrasDenoiser, MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.nn.unet import UNet
from diffaccel.noise import NoiseStreams
from diffaccel.prior import (
    PRIORS,
    ExactPosterior,
    GaussianPrior,
    LangevinGibbsPrior,
    LevelPosterior,
    geometric_levels,
)
from diffaccel.process import Decoupled, EDMVarianceExploding, VarianceExploding, VariancePreserving
from diffaccel.solver import SOLVERS

ZERO = torch.zeros(1, 2, 2)
SOLVER_NAMES = ["ddim", "heun", "edm_stochastic", "dpmpp2m", "reverse_diffusion"]


@pytest.mark.parametrize(
    ("process", "ratio", "variance"),
    [
        (VariancePreserving(), 152.2, 1.0),
        (EDMVarianceExploding(), 80.0, 6400.0),
        (VarianceExploding(sigma_max=50.0), 50.0, 2500.0),
        (Decoupled(), float("inf"), 1.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gaussian_starts_at_the_top(process, ratio, variance):
    x_t, t = GaussianPrior()(GaussianDenoiser(ZERO, 0.25, process), NoiseStreams(0, range(4000)), (1, 2, 2))
    assert torch.equal(t, torch.full((4000,), process.t_max, dtype=torch.float64))
    assert process.ratio(t)[0].item() == pytest.approx(ratio, rel=1e-3)
    assert x_t.var().item() == pytest.approx(variance, rel=0.05)
    assert x_t.mean().abs() < 0.05 * variance**0.5
    assert x_t.dtype == torch.float32


def test_gaussian_start_is_capped_at_the_trained_range():
    """EDM's preconditioning trained to ratio 80 on VP, whose top is 152."""
    process = VariancePreserving()
    denoiser = KarrasDenoiser(UNet((1, 8, 8), [8], blocks=1, embedding=8), process)
    _, t = GaussianPrior()(denoiser, NoiseStreams(0, range(3)), (1, 8, 8))
    assert torch.allclose(process.ratio(t), torch.tensor(80.0).double())
    denoiser.check_range(process.ratio(t))
    decoupled = KarrasDenoiser(UNet((1, 8, 8), [8], blocks=1, embedding=8), Decoupled())
    _, t = GaussianPrior()(decoupled, NoiseStreams(0, range(3)), (1, 8, 8))
    assert torch.allclose(Decoupled().ratio(t), torch.tensor(80.0).double())


@pytest.mark.parametrize("process", [VariancePreserving(), EDMVarianceExploding(), Decoupled()])
def test_ratio_star_sets_the_start(process):
    prior = PRIORS.build({"name": "gaussian", "ratio_star": 3.0})
    x_t, t = prior(GaussianDenoiser(ZERO, 0.25, process), NoiseStreams(0, range(4000)), (1, 2, 2))
    assert torch.allclose(process.ratio(t), torch.tensor(3.0).double())
    assert x_t.std().item() == pytest.approx(process.sigma(t[0]).item(), rel=0.03)


def test_ratio_star_must_be_positive():
    with pytest.raises(UsageError, match="ratio_star"):
        GaussianPrior(ratio_star=0.0)


def test_images_start_from_streams_of_their_own():
    denoiser = GaussianDenoiser(ZERO, 0.25)
    whole, _ = GaussianPrior()(denoiser, NoiseStreams(7, range(10)), (1, 2, 2))
    part, _ = GaussianPrior()(denoiser, NoiseStreams(7, range(4, 6)), (1, 2, 2))
    assert torch.equal(whole[4:6], part)


# Levels


def test_level_table_of_the_reference():
    levels = geometric_levels(1000, 0.01, 50.0)
    assert levels.shape == (1000,)
    assert levels[0].item() == pytest.approx(50.0)
    assert levels[-1].item() == pytest.approx(0.01 * 5000**0.001)
    assert levels[-1].item() == pytest.approx(0.010086, abs=1e-6)
    assert levels[:-1] / levels[1:] == pytest.approx(1.00855, abs=1e-5)
    assert geometric_levels(1000, 0.01, 348.0)[-1].item() == pytest.approx(0.010105, abs=1e-6)
    assert torch.allclose(geometric_levels(), 2 * levels)  # the default, in units of [-1, 1]


class Fixed(LevelPosterior):
    """The same logits for every state."""

    def __init__(self, levels, logits):
        super().__init__(levels)
        self._logits = logits

    def logits(self, y):
        return self._logits.expand(len(y), -1) if self._logits.ndim == 1 else self._logits


def test_class_index_and_level_round_trip():
    levels = geometric_levels()
    posterior = Fixed(levels, torch.eye(1000))
    ratio, at_end = posterior(torch.zeros(1000, 1, 1, 1), "argmax", NoiseStreams(0, range(1000)))
    assert torch.equal(ratio, levels)
    assert at_end.nonzero().flatten().tolist() == [0, 999]
    index = torch.log(levels / levels[0]) / torch.log(levels[-1] / levels[0]) * 999
    assert torch.equal(index.round().long(), torch.arange(1000))


def test_updates_follow_the_posterior():
    levels, probability = torch.tensor([8.0, 4.0, 2.0, 1.0]), torch.tensor([0.1, 0.2, 0.6, 0.1])
    posterior, y = Fixed(levels, probability.log() + 3.0), torch.zeros(20_000, 1, 1, 1)
    noise = NoiseStreams(0, range(20_000))
    assert (posterior(y, "argmax", noise)[0] == 2.0).all()
    mean = (probability.double() @ levels.double().log()).exp()
    assert torch.allclose(posterior(y, "mean", noise)[0], mean)
    drawn, at_end = posterior(y, "sample", noise)
    share = (drawn[:, None] == levels).double().mean(0)
    assert share == pytest.approx(probability.numpy(), abs=0.015)  # 4 standard deviations
    assert not at_end.any()  # says where the most probable level is, whatever was drawn


def test_sampling_never_leaves_the_table():
    """Cumulated probabilities may end below 1, and impossible levels must not be drawn."""
    posterior = Fixed(torch.tensor([4.0, 2.0, 1.0]), torch.tensor([-float("inf"), 0.0, -float("inf")]))
    drawn, _ = posterior(torch.zeros(5000, 1, 1, 1), "sample", NoiseStreams(0, range(5000)))
    assert (drawn == 2.0).all()


def test_exact_posterior_is_bayes():
    """For one Gaussian p(k | y) is a softmax of log N(y; m, a^2 + sigma_k^2)."""
    levels = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    mean, y = torch.full((1, 2, 2), 0.3), torch.randn(5, 1, 2, 2)
    exact = torch.stack(
        [
            torch.distributions.Normal(0.3, (0.25 + level**2).sqrt()).log_prob(y.double()).sum((1, 2, 3))
            for level in levels
        ],
        dim=1,
    )
    logits = ExactPosterior(GaussianDenoiser(mean, 0.25), levels).logits(y)
    assert torch.allclose(logits.softmax(1), exact.softmax(1), atol=1e-7)


def test_level_is_known_to_one_over_root_2d():
    """The sharpness that the classifier's acceptance is built on."""
    denoiser, levels = FiniteSetDenoiser(torch.zeros(1, 3, 32, 32)), geometric_levels()
    y = 0.7 * torch.randn(200, 3, 32, 32)
    ratio, _ = ExactPosterior(denoiser, levels)(y, "mean", NoiseStreams(0, range(200)))
    assert (ratio / 0.7).log().std().item() == pytest.approx(1 / (2 * 3072) ** 0.5, rel=0.2)


# Budgets


def chain(**options):
    denoiser = MixtureDenoiser(torch.zeros(2, 1, 1, 1), 1.0)
    return LangevinGibbsPrior(ExactPosterior(denoiser, geometric_levels()), **options)


@pytest.mark.parametrize(
    ("solver", "budget", "extra", "steps"),
    [
        ("ddim", 10, 0, 10),
        ("ddim", 10.9, 1, 9),
        ("heun", 10, 0, 5),
        ("heun", 9, 0, 5),
        ("heun", 11, 2, 5),
        ("heun", 1, 0, 1),
    ],
)
def test_gaussian_plan(solver, budget, extra, steps):
    assert split(GaussianPrior().plan(SOLVERS.build({"name": solver}), budget, 100, extra)) == (steps, 0)


def test_gaussian_minimum():
    with pytest.raises(UsageError, match="minimum of 2 "):
        GaussianPrior().plan(SOLVERS.build({"name": "heun"}), 1.5, 100, extra=1)


@pytest.mark.parametrize(
    ("warmup", "total"), [([[10, 2.0], [10, None]], 57), ([[50, 6.4], [20, None]], 107)], ids=["CIFAR-10", "CelebA-HQ"]
)
def test_published_burn_in(warmup, total):
    assert chain(warmup=warmup).burn_in_per_chain == total
    assert chain(warmup=warmup, chains=200).burn_in_evaluations(50_000) == total * 200


def test_chain_plan_by_hand():
    heun = SOLVERS.build({"name": "heun"})
    prior = chain(chains=100)  # burn-in 57 evaluations a chain
    assert split(prior.plan(heun, 12.0, 5700)) == (3, 6)  # 1 of burn-in, 11 left: 5 for Heun
    assert split(prior.plan(heun, 11.0, 5700)) == (3, 5)
    assert split(prior.plan(heun, 11.99, 5700)) == (3, 5)
    assert split(prior.plan(heun, 11.0, 5700, extra=1)) == (3, 4)
    assert split(chain(chains=100, chain_steps=3).plan(heun, 11.0, 5700)) == (4, 3)
    # What Heun can't use, an even number, goes to the chain.
    assert split(chain(chains=100, share=0.4).plan(heun, 11.0, 5700)) == (3, 5)
    assert split(chain(chains=100, share=0.9).plan(heun, 11.0, 5700)) == (1, 9)
    assert split(prior.plan(heun, 58.0 + 1, 50)) == (1, 1)  # fewer images than chains


def test_burn_in_that_no_budget_bounds_leaves_the_whole_to_the_image():
    heun = SOLVERS.build({"name": "heun"})
    for n in (1, 50, 5700):
        assert split(chain(burn_in_counted=False).plan(heun, 11.0, n)) == (3, 6)
    with pytest.raises(UsageError, match=r"minimum of 3 .* 0 of burn-in"):
        chain(burn_in_counted=False).plan(heun, 2.0, 50, extra=1)


@pytest.mark.parametrize("n", [50, 640, 700, 5000])
@pytest.mark.parametrize("chain_steps", [None, 4])
@pytest.mark.parametrize("extra", [0, 1])
def test_minimum_in_the_message_is_enough(n, chain_steps, extra):
    prior, heun = chain(chains=100, chain_steps=chain_steps), SOLVERS.build({"name": "heun"})
    with pytest.raises(UsageError, match="below the minimum") as error:
        prior.plan(heun, 1.0, n, extra)
    least = float(re.search(r"minimum of ([\d.]+) ", str(error.value)).group(1))
    assert split(prior.plan(heun, least, n, extra)) == (1, chain_steps or 1)
    with pytest.raises(UsageError):
        prior.plan(heun, least - 0.02, n, extra)


@pytest.mark.parametrize("name", SOLVER_NAMES)
def test_plans_keep_to_their_budget(name):
    solver = SOLVERS.build({"name": name})
    for budget in (3, 5, 7.5, 10, 20, 50):
        for n in (1000, 1001, 5003):
            for chains in (1, 10, 64):
                for restart_every in (None, 3, 50):
                    prior = chain(chains=chains, restart_every=restart_every)
                    overhead = prior.burn_in_evaluations(n) / n
                    try:
                        plan = prior.plan(solver, budget, n)
                    except UsageError:
                        assert budget < overhead + 1 + solver.evaluations(1) + 1e-9
                        continue
                    spent = overhead + plan.chain_steps + solver.evaluations(plan.steps)
                    assert budget - 1 < spent <= budget + 1e-9  # and no evaluation is left lying about
                    assert plan.chain_steps >= 1 and plan.steps >= 1


@pytest.mark.parametrize("per_chain", [5, 10, 12.5, 50])
def test_the_plan_does_not_depend_on_the_number_of_images(per_chain):
    """Images per chain are given, so that burn-in per image and the split are equal for multiples, and no n is refused
    that has as many images as a chain; between multiples there is at most one image more per chain and round.
    """
    prior, heun = chain(images_per_chain=per_chain), SOLVERS.build({"name": "heun"})
    assert prior.chains_for(5000) == 5000 / per_chain and prior.burn_in_evaluations(5000) / 5000 == 57 / per_chain
    whole = split(prior.plan(heun, 20.0, 5000))
    for n in (50, 100, 2000, 50_000):
        assert prior.burn_in_evaluations(n) / n == 57 / per_chain and split(prior.plan(heun, 20.0, n)) == whole
    for n in (512, 777, 2001, 4999):
        assert 57 / per_chain * (1 - per_chain / n) < prior.burn_in_evaluations(n) / n <= 57 / per_chain
        assert split(prior.plan(heun, 20.0, n)) == whole
        assert sorted(i for group in prior.schedule(n, 8) for batch in group for i in batch) == list(range(n))
    assert prior.chains_for(int(per_chain) - 1) == 1, "fewer images than a chain has"


def test_images_per_chain_are_rounded_down_exactly():
    """Quotients that are whole but for rounding are whole."""
    assert [chain(images_per_chain=per_chain).chains_for(n) for n, per_chain in ((99, 1.1), (4410, 4.41), (7, 1))] == [
        90,
        1000,
        7,
    ]
    for per_chain in (0.5, 0, -1, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="images_per_chain is"):
            chain(images_per_chain=per_chain)


def test_restarts_are_of_a_number_of_chains():
    """Chains of some images end without them, so that no burn-in is for the rest of a last round."""
    with pytest.raises(UsageError, match="set prior.images_per_chain=10 and prior.restart_every=null, or prior.chains"):
        chain(images_per_chain=50, restart_every=10)
    restarted, short = chain(chains=100, restart_every=10), chain(images_per_chain=10)
    assert restarted.burn_in_evaluations(5000) == short.burn_in_evaluations(5000)


def test_a_number_of_chains_overrides_images_per_chain():
    assert [chain(images_per_chain=10, chains=7).chains_for(n) for n in (5, 70, 5000)] == [7, 7, 7]
    assert chain().chains_for(5000) == 100, "the default up to version 0.1, at the default n"


def test_burn_in_with_restarts():
    # 14 images of 4 chains: rounds of 4, 4, 4, 2. A start before rounds 0 and 2, or before each.
    assert chain(chains=4).burn_in_evaluations(14) == 57 * 4
    assert chain(chains=4, restart_every=2).burn_in_evaluations(14) == 57 * 8
    assert chain(chains=4, restart_every=3).burn_in_evaluations(14) == 57 * (4 + 2)
    assert chain(chains=4, restart_every=1).burn_in_evaluations(14) == 57 * 14
    assert chain(chains=4, restart_every=4).burn_in_evaluations(14) == 57 * 4
    assert chain(chains=4).burn_in_evaluations(3) == 57 * 3
    assert GaussianPrior().burn_in_evaluations(14) == 0


# Schedules


@pytest.mark.parametrize("n", [1, 5, 64, 100, 130])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("prior", [GaussianPrior(), chain(chains=64), chain(chains=9)], ids=["gaussian", "64", "9"])
def test_schedule_covers_every_image_once(prior, n, batch_size):
    groups = prior.schedule(n, batch_size)
    indices = [i for group in groups for batch in group for i in batch]
    assert sorted(indices) == list(range(n))
    assert all(0 < len(batch) <= batch_size for group in groups for batch in group)


def test_chain_makes_every_c_th_image():
    prior = chain(chains=10)
    for group in prior.schedule(34, 4):
        first = group[0]
        for round_, batch in enumerate(group):
            assert [i // 10 for i in batch] == [round_] * len(batch)
            assert [i % 10 for i in batch] == [i % 10 for i in first][: len(batch)]
    assert [len(group) for group in prior.schedule(34, 4)] == [4, 3, 3]  # chains 4 to 9 make no image of round 3
