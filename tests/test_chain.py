"""The Langevin-Gibbs chain against exact conditionals, its closed-form drift and hand-made sequences of levels."""

import pytest
import torch

from diffaccel.denoiser import Denoiser, FiniteSetDenoiser, MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.prior import (
    PRIORS,
    ChainState,
    ExactPosterior,
    LangevinGibbsPrior,
    LevelPosterior,
    geometric_levels,
    keep_lower,
    langevin_step,
)
from diffaccel.process import EDMVarianceExploding, Prediction

WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
MEANS = torch.tensor([[-2.0, -2.0], [2.0, -2.0], [0.0, 2.5]], dtype=torch.float64)
TOY = MixtureDenoiser(MEANS[:, :, None, None], 0.09, WEIGHTS)
TOY_LEVELS = torch.logspace(torch.tensor(8.0).log10(), -1, 16, dtype=torch.float64)


class BatchedNoise:
    """NoiseStreams from one generator, for thousands of chains whose draws need not be told apart."""

    def __init__(self, count: int, seed: int = 0):
        self.count, self.generator = count, torch.Generator().manual_seed(seed)

    def __len__(self):
        return self.count

    def normal(self, like):
        return torch.randn(like.shape, dtype=like.dtype, generator=self.generator)

    def uniform(self):
        return torch.rand(self.count, dtype=torch.float64, generator=self.generator)


class Scripted(LevelPosterior):
    """Levels from a table (T, B), and the states that they were given to."""

    def __init__(self, table):
        super().__init__(torch.ones(1))
        self.table, self.seen = iter(table), []

    def logits(self, y):
        raise NotImplementedError

    def forward(self, y, update, noise):
        self.seen.append(y)
        return next(self.table).double(), torch.zeros(len(y), dtype=torch.bool)


def toy_state(chains: int, seed: int) -> ChainState:
    """Exact draws from the joint law of state and level."""
    noise = BatchedNoise(chains, seed)
    component = torch.multinomial(WEIGHTS, chains, replacement=True, generator=noise.generator)
    ratio = TOY_LEVELS[(noise.uniform() * len(TOY_LEVELS)).long()]
    y = MEANS[component][:, :, None, None]
    return ChainState(y + (0.09 + ratio**2).sqrt()[:, None, None, None] * noise.normal(y), ratio, noise)


def metropolis_step(prior: LangevinGibbsPrior, state: ChainState, eta: torch.Tensor) -> None:
    """A Gibbs sweep whose Langevin step is only a proposal: exact for any step size."""
    variance = 0.09 + state.ratio**2

    def density_and_mean(y):
        """Log-density of y at its level, and the mean of the proposal from it, (B, 2)."""
        square = (y.flatten(1)[:, None] - MEANS).square().sum(2)
        density = (WEIGHTS.log() - square / (2 * variance[:, None])).logsumexp(1) - variance.log()
        mean = langevin_step(y, TOY(y, state.ratio).eps, state.ratio, eta, torch.zeros_like(y))
        return density, mean

    def log_ratio(density, mean, to):
        return density - (to - mean).square().flatten(1).sum(1) / (2 * eta)

    density, mean = density_and_mean(state.y)
    proposed = mean + eta.sqrt()[:, None, None, None] * state.noise.normal(mean)
    proposed_density, back = density_and_mean(proposed)
    gain = log_ratio(proposed_density, back, state.y) - log_ratio(density, mean, proposed)
    accepted = state.noise.uniform().log() < gain
    state.y = torch.where(accepted[:, None, None, None], proposed, state.y)
    state.ratio, _ = prior.posterior(state.y, prior.update, state.noise)


def unadjusted_step(prior: LangevinGibbsPrior, state: ChainState, eta: torch.Tensor) -> None:
    prior.advance(TOY, state, eta)


def run_toy(step, eta, update: str = "sample", chains: int = 1024, steps: int = 200, discard: int = 50):
    """States and level indices of every step after the first few: (T, B, 2), (T, B)."""
    prior = LangevinGibbsPrior(ExactPosterior(TOY, TOY_LEVELS), update=update)
    state = toy_state(chains, seed=0)
    states, indices = [], []
    for k in range(steps):
        step(prior, state, eta(state.ratio))
        if k >= discard:
            states.append(state.y.flatten(1))
            indices.append((TOY_LEVELS[None] - state.ratio[:, None]).abs().argmin(1))
    return torch.stack(states), torch.stack(indices)


def occupancy(indices: torch.Tensor) -> torch.Tensor:
    """Share of each level, (K,)."""
    return torch.bincount(indices.flatten(), minlength=len(TOY_LEVELS)).double() / indices.numel()


def total_variation(share: torch.Tensor) -> float:
    """Distance from the uniform law that the levels should have."""
    return 0.5 * (share - 1 / len(share)).abs().sum().item()


def variance_times(c: float):
    return lambda ratio: c * (0.09 + ratio**2)


def test_metropolis_adjusted_chain_samples_the_joint_law():
    states, indices = run_toy(metropolis_step, variance_times(1.0), steps=600, discard=150)
    share = occupancy(indices)
    assert total_variation(share) < 0.015
    assert (len(share) * share - 1).abs().max() < 0.06
    second_moment = (WEIGHTS * MEANS.square().sum(1)).sum()
    for k, ratio in enumerate(TOY_LEVELS):
        exact = second_moment + 2 * (0.09 + ratio**2)
        assert states[indices == k].square().sum(1).mean() == pytest.approx(exact.item(), rel=0.06)
    lowest = states[indices == len(TOY_LEVELS) - 1]
    mode = (lowest[:, None] - MEANS).square().sum(2).argmin(1)
    assert torch.bincount(mode) / len(mode) == pytest.approx(WEIGHTS.numpy(), abs=0.03)


def test_unadjusted_steps_bias_the_levels_by_their_size():
    distances = [total_variation(occupancy(run_toy(unadjusted_step, variance_times(c))[1])) for c in (0.1, 0.5, 1.0)]
    assert distances[0] < 0.03
    assert distances == sorted(distances)
    assert distances[2] > 0.1
    # The reference's eta does not scale with the level.
    assert total_variation(occupancy(run_toy(unadjusted_step, lambda ratio: torch.tensor(0.5))[1])) > 0.2


def test_argmax_is_no_gibbs_update_in_low_dimension():
    _, indices = run_toy(metropolis_step, variance_times(1.0), update="argmax")
    assert total_variation(occupancy(indices)) > 0.3


def drift_setting():
    """Section "step-size laws" of the paper's setting in units of [0, 1]: (denoiser, posterior)."""
    means = torch.rand(20, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoiser = MixtureDenoiser(means, 0.15**2)
    return denoiser, ExactPosterior(denoiser, geometric_levels(1000, 0.01, 50.0))


def drift_run(corrected: bool, start: float, steps: int):
    """Levels of 8 chains after each step, (steps, 8)."""
    denoiser, posterior = drift_setting()
    prior = LangevinGibbsPrior(posterior, eta=0.5, corrected=corrected)
    noise = BatchedNoise(8)
    clean = denoiser.means[:8] + 0.15 * noise.normal(denoiser.means[:8])
    state = ChainState(clean + start * noise.normal(clean), torch.full((8,), start, dtype=torch.float64), noise)
    levels = []
    for _ in range(steps):
        prior.advance(denoiser, state, prior.eta)
        levels.append(state.ratio)
    return torch.stack(levels)


def test_levels_drift_up_by_the_law():
    """One step maps sigma^2 to sigma^2 + eta^2 / (4 sigma^2): sigma_n^4 grows by about eta^2 / 2 a step."""
    levels, square, law = drift_run(corrected=False, start=0.5, steps=100), 0.25, []
    for _ in range(100):
        square += 0.25 / (4 * square)
        law.append(square**0.5)
    for step, measured in ((1, 0.70), (10, 1.09), (100, 1.9)):
        assert levels[step - 1].mean().item() == pytest.approx(law[step - 1], rel=0.05)
        assert levels[step - 1].mean().item() == pytest.approx(measured, rel=0.05)
    assert levels.min() >= 0.9 * 0.5**0.5


def test_corrected_steps_do_not_drift():
    levels = drift_run(corrected=True, start=0.8, steps=250)
    assert (levels[-50:].mean() < 0.8) and (levels[-50:].mean() > 0.4)
    assert (0.8**4 + 0.125 * 250) ** 0.25 > 2.3  # where the law puts the uncorrected chain


def test_langevin_step_is_the_equation():
    y, eps, z = torch.randn(3, 2, 1, 4, 4).double()
    ratio, eta = torch.tensor([0.5, 2.0]), torch.tensor([0.3, 4.0])
    for b in range(2):
        score = -eps[b] / ratio[b]
        plain = y[b] + eta[b] / 2 * score + eta[b].sqrt() * z[b]
        assert torch.allclose(langevin_step(y, eps, ratio, eta, z)[b], plain)
        less = (eta[b] - eta[b] ** 2 / (4 * ratio[b] ** 2)).clamp_min(0).sqrt()
        assert torch.allclose(
            langevin_step(y, eps, ratio, eta, z, corrected=True)[b], y[b] + eta[b] / 2 * score + less * z[b]
        )
    # All of the noise may go: eta = 4 ratio^2 and above.
    everything = langevin_step(y, eps, ratio, 5 * ratio**2, z, corrected=True)
    assert torch.allclose(everything, langevin_step(y, eps, ratio, 5 * ratio**2, torch.zeros_like(z)))


DATA = FiniteSetDenoiser(0.5 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def fresh_state(chains: int, ratio: float = 1.0) -> ChainState:
    noise = NoiseStreams(0, range(chains), "chain")
    y = noise.normal(torch.empty(chains, 3, 8, 8))
    return ChainState(y, torch.full((chains,), ratio, dtype=torch.float64), noise)


def test_keep_lower_is_strict_and_by_chain():
    y = torch.arange(3.0)[:, None, None, None]
    best = (y, torch.tensor([1.0, 1.0, 1.0]))
    new = torch.full_like(y, float("nan"))
    new[0] = 10.0
    (kept, ratio), lower = keep_lower(best, new, torch.tensor([0.5, 1.0, 2.0]))
    assert lower.tolist() == [True, False, False]
    assert kept.flatten().tolist() == [10.0, 1.0, 2.0]  # a tie keeps the earlier; a NaN not taken does not spread
    assert ratio.tolist() == [0.5, 1.0, 1.0]


TABLE = torch.tensor(
    [  # chains in columns: the least is first, last, tied with a later one, tied with the carried 1.0, above it
        [0.5, 0.9, 0.7, 1.0, 1.5],
        [0.6, 0.8, 0.6, 1.2, 1.4],
        [0.7, 0.7, 0.6, 1.0, 1.3],
    ]
)


@pytest.mark.parametrize(
    ("carry", "chosen"),
    [(True, [0, 2, 1, None, None]), (False, [0, 2, 1, 0, 2])],
)
def test_selects_the_least_noisy_state(carry, chosen):
    posterior = Scripted(TABLE)
    prior = LangevinGibbsPrior(posterior, chains=5, eta=0.1, carry=carry)
    state = fresh_state(5)
    carried = state.y
    y, t = prior(DATA, NoiseStreams(0, range(5)), (3, 8, 8), 3, state)
    for c, step in enumerate(chosen):
        assert torch.equal(y[c], carried[c] if step is None else posterior.seen[step][c])
        assert t[c] == (1.0 if step is None else TABLE[step, c].double())
    # The chain goes on from its last state, not from the chosen one.
    assert torch.equal(state.y, posterior.seen[2])
    assert torch.equal(state.ratio, TABLE[2].double())
    assert state.trace[0]["carried"] == (0.4 if carry else 0.0)


def test_select_last_takes_the_last_state():
    posterior = Scripted(TABLE)
    prior = LangevinGibbsPrior(posterior, chains=5, eta=0.1, select="last")
    state = fresh_state(5)
    y, t = prior(DATA, NoiseStreams(0, range(5)), (3, 8, 8), 3, state)
    assert torch.equal(y, posterior.seen[2])
    assert torch.equal(t, TABLE[2].double())
    assert state.trace[0]["start_ratio"] == t.tolist()


class AtEnds(Scripted):
    """The first state of five, and all in the last of three steps, lie at an end of the table."""

    def forward(self, y, update, noise):
        ratio, _ = super().forward(y, update, noise)
        return ratio, (torch.arange(5) == 0) | (len(self.seen) == 3)


@pytest.mark.parametrize(("select", "carried"), [("minimum", 0.4), ("last", 0.0)])
def test_what_a_round_records(select, carried):
    """Shares of starts that were carried over, and of (1 + 1 + 5) of 15 levels at the ends."""
    prior, state = LangevinGibbsPrior(AtEnds(TABLE), chains=5, eta=0.1, select=select), fresh_state(5)
    y, t = prior(DATA, NoiseStreams(0, range(5)), (3, 8, 8), 3, state)
    (record,) = state.trace
    assert (record["rounds_since_start"], record["carried"]) == (1, carried)
    assert record["at_end_levels"] == pytest.approx(7 / 15)
    assert record["mean"] == pytest.approx(y.flatten(1).mean(1).tolist()) and record["start_ratio"] == t.tolist()


ONE = FiniteSetDenoiser(torch.full((1, 3, 8, 8), 0.25))


def opened(prior, denoiser=ONE):
    return prior.open(denoiser, 0, [range(3)], (3, 8, 8))


def test_a_chain_draws_from_a_stream_of_its_own(monkeypatch):
    """By its number among all chains, and apart from the images of equal index."""
    monkeypatch.setattr(LangevinGibbsPrior, "start", lambda self, denoiser, state: None)
    drawn = LangevinGibbsPrior(Scripted([])).open(ONE, 5, [range(4, 7)], (3, 8, 8)).noise.normal(torch.empty(3, 2))
    assert torch.equal(drawn, NoiseStreams(5, range(7), "chain").normal(torch.empty(7, 2))[4:])
    images = NoiseStreams(5, range(7)).normal(torch.empty(7, 2))
    assert not torch.isclose(drawn[:, None], images).any()


def test_first_states_are_samples_and_noise_that_is_added_back():
    """Of one image all samples are that image: what is left is the noise of ``renoise``."""
    options = {"posterior": Scripted(torch.ones(3, 3)), "warmup": []}
    states = [opened(LangevinGibbsPrior(**options, renoise=renoise)) for renoise in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(states[0].y, ONE.means.expand(3, -1, -1, -1), rtol=0, atol=1e-4)
    noise = states[2].y - states[0].y
    torch.testing.assert_close(states[1].y - states[0].y, 0.5 * noise)
    assert noise.std().item() == pytest.approx(1, abs=0.1)


def test_first_states_are_integrated_as_in_the_reference(monkeypatch):
    """19 steps of EDM's stochastic solver down to 0.02, which raises levels in [0.1, 2] alone, by sqrt(2)."""
    seen, forward = [], ONE.forward
    monkeypatch.setattr(ONE, "forward", lambda x, t, condition=None: seen.append(t[0].item()) or forward(x, t))
    prior = LangevinGibbsPrior(Scripted(torch.ones(1, 3)), warmup=[])
    monkeypatch.setattr(ONE, "ratio_range", (0.002, 80.0))
    opened(prior)
    low, high = 0.02 ** (1 / 7), 80 ** (1 / 7)
    levels = [(high + k / 18 * (low - high)) ** 7 for k in range(19)]
    raised = [level * 2**0.5 if 0.1 <= level <= 2 else level for level in levels]
    assert seen[::2] == pytest.approx(raised, rel=1e-6) and seen[1::2] == pytest.approx(levels[1:], rel=1e-6)


def test_warm_up_has_step_sizes_of_its_own(monkeypatch):
    etas, advance = [], LangevinGibbsPrior.advance
    monkeypatch.setattr(LangevinGibbsPrior, "advance", lambda *words: etas.append(words[3]) or advance(*words))
    opened(LangevinGibbsPrior(Scripted(torch.ones(6, 3)), eta=0.3, warmup=[[2, 0.7], [3, None]]))
    assert etas == [0.7, 0.7, 0.3, 0.3, 0.3]


class Broken(Denoiser):
    """Returns NaN where asked to."""

    process, ratio_range = EDMVarianceExploding(), (0.0, float("inf"))

    def forward(self, x_t, t, condition=None):
        return Prediction(x_t, torch.where(torch.arange(len(x_t)) == 1, float("nan"), 0.0)[:, None, None, None] * x_t)


def test_nan_in_a_chain_is_an_error():
    prior = LangevinGibbsPrior(Scripted(torch.ones(3, 4)), chains=4)
    with pytest.raises(UsageError, match=r"state is NaN or infinite: .*prior\.eta"):
        prior(Broken(), NoiseStreams(0, range(4)), (3, 8, 8), 3, fresh_state(4))


def test_chain_outside_the_trained_range_is_an_error():
    denoiser = FiniteSetDenoiser(torch.zeros(1, 3, 8, 8))
    denoiser.ratio_range = (0.002, 80.0)
    prior = LangevinGibbsPrior(Scripted(torch.full((3, 4), 90.0)), chains=4)
    with pytest.raises(UsageError, match="noise-to-data ratio"):
        prior(denoiser, NoiseStreams(0, range(4)), (3, 8, 8), 3, fresh_state(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": 0}, "chains is 0"),
        ({"eta": 0.0}, "eta is 0.0"),
        ({"eta": -1.0}, "eta is -1.0"),
        ({"update": "mode"}, "update is 'mode'"),
        ({"select": "first"}, "select is 'first'"),
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 1.0}, "share is 1.0"),
        ({"chain_steps": 0}, "chain_steps is 0"),
        ({"restart_every": 0}, "restart_every is 0"),
        ({"init_steps": 0}, "init_steps is 0"),
        ({"renoise": -0.5}, "renoise is -0.5"),
        ({"warmup": [[10]]}, "warmup"),
        ({"warmup": [10, 2.0]}, "warmup"),
        ({"warmup": [[-1, 2.0]]}, "warmup"),
        ({"warmup": [[10, -2.0]]}, "warmup"),
        ({"warmup": [["ten", 2.0]]}, "warmup"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        LangevinGibbsPrior(Scripted([]), **options)


def test_is_built_from_plain_values():
    node = {"name": "chain", "chains": 8, "update": "sample", "warmup": [[50, 6.4], [20, None]], "eta": 3.2}
    prior = PRIORS.build(
        {**node, "init_solver": {"name": "heun", "grid": {"name": "karras", "ratio_min": 0.02}}},
        posterior=Scripted([]),
    )
    assert isinstance(prior, LangevinGibbsPrior)
    assert prior.warmup == [(50, 6.4), (20, 3.2)]
    assert prior.burn_in_per_chain == 37 + 70
