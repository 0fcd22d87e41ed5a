"""What every solver keeps to: its grid, its budget, its samples' independence, its errors."""

import math

import pytest
import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser, GaussianDenoiser, MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.process import (
    Decoupled,
    EDMVarianceExploding,
    Prediction,
    Process,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    expand,
)
from diffaccel.solver import GRIDS, SOLVERS, Karras, Listed, LogSNR, Solver, TimeToZero, Trajectory, UniformTime

ADAPTIVE = {"rk45"}
FIXED = sorted(set(SOLVERS) - ADAPTIVE)
PROCESSES = [
    VariancePreserving(),
    SubVariancePreserving(),
    VarianceExploding(sigma_min=0.004),
    EDMVarianceExploding(),
    Decoupled(),
    Decoupled(clock="t^2"),
]
MEANS = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(1)).double()


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def solver(name: str, **keys: object) -> Solver:
    if name == "rk45":
        keys = {"tol": 0.01, **keys}  # these tests want its path, not its accuracy
    if name == "bridge":
        keys = {"eta": 0.0, **keys}  # as for ddim: the joint law that eta = 1 draws from is the process's own
    return SOLVERS.build({"name": name, **keys})


def start(process: Process, *ratios: float) -> tuple[Tensor, Tensor]:
    """Diffused data at each ratio, pure noise at infinity."""
    t = process.time(f64(*ratios))
    index = torch.arange(len(ratios)) % len(MEANS)
    eps = torch.randn(len(ratios), 2, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    return process.marginal(MEANS[index], t, eps), t


class Counting(Denoiser):
    """Counts evaluations of each sample of a batch."""

    def __init__(self, denoiser: Denoiser, counts: Tensor, index: Tensor | None = None) -> None:
        super().__init__()
        self.process, self.ratio_range = denoiser.process, denoiser.ratio_range
        self.denoiser, self.counts = denoiser, counts
        self.index = torch.arange(len(counts)) if index is None else index

    def select(self, index: Tensor) -> Denoiser:
        return Counting(self.denoiser.select(index), self.counts, self.index[index])

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
        assert len(x_t) == len(t) == len(self.index)
        self.counts[self.index] += 1
        return self.denoiser(x_t, t)


class Broken(Denoiser):
    """A network that overflowed."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process, self.ratio_range = process, (0.0, math.inf)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
        return Prediction(torch.full_like(x_t, math.nan), torch.full_like(x_t, math.nan))


# Grids


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("name", sorted(set(GRIDS) - {"index"}))
@pytest.mark.parametrize("denoise", [True, False])
def test_grid_falls_from_each_start(name: str, process: Process, denoise: bool) -> None:
    t = process.time(f64(0.7, 5.0, 40.0))
    grid = GRIDS.build({"name": name, "ratio_min": 0.05 if name != "ddm" else 0.005})
    for steps in (1, 2, 7):
        times = grid(process, t.float(), steps, denoise)
        assert times.shape == (steps + 1, 3) and times.dtype == torch.float64
        ratio = process.ratio(times)
        assert torch.equal(times[0], t.float().double())
        assert (ratio[1:] < ratio[:-1]).all()
        if denoise:
            assert (ratio[-1] == 0).all()
        if not (denoise and steps == 1):
            least = torch.full_like(ratio[0], grid.ratio_min)
            torch.testing.assert_close(ratio[-2 if denoise else -1], least, rtol=1e-9, atol=0)


def test_karras_grid_is_edms() -> None:
    """EDM's Eq. 5: n levels from sigma_max to sigma_min, then 0."""
    times = Karras(ratio_min=0.002)(EDMVarianceExploding(), f64(80.0, 3.0), 18)
    for column, top in ((times[:, 0], 80.0), (times[:, 1], 3.0)):
        a, b = top ** (1 / 7), 0.002 ** (1 / 7)
        expected = [(a + i / 17 * (b - a)) ** 7 for i in range(18)] + [0.0]
        torch.testing.assert_close(column, f64(*expected), rtol=1e-11, atol=0)


def test_log_snr_grid_is_geometric() -> None:
    ratio = VariancePreserving().ratio(LogSNR(ratio_min=0.02)(VariancePreserving(), f64(0.8, 0.3), 9))
    step = ratio[1:-1] / ratio[:-2]
    torch.testing.assert_close(step, step[:1].expand_as(step), rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", [VariancePreserving(), Decoupled()], ids=repr)
def test_uniform_time_has_no_cap(process: Process) -> None:
    """At the top too, where the ratio is above ``ratio_cap``, steps in time are equal."""
    times = UniformTime(ratio_min=0.01)(process, f64(1.0, 0.4), 10, denoise=False)
    torch.testing.assert_close(times.diff(dim=0), (times[1:2] - times[:1]).expand(10, 2), rtol=1e-9, atol=1e-12)


def test_ddm_grid() -> None:
    times = TimeToZero()(Decoupled(), f64(1.0), 6)
    torch.testing.assert_close(times[:, 0], f64(1.0, 0.8, 0.6, 0.4, 0.2, 1e-4, 0.0), rtol=1e-12, atol=1e-15)
    assert TimeToZero()(Decoupled(), f64(1.0), 2)[:, 0].tolist() == pytest.approx([1.0, 1e-4, 0.0])
    with pytest.raises(UsageError, match="use fewer steps"):
        TimeToZero()(Decoupled(), f64(1.0), 10_002)
    ve = VarianceExploding(sigma_min=0.02)
    with pytest.raises(UsageError, match="grid 'ddm': the last level, ratio 0.005, is at a negative time"):
        TimeToZero(ratio_min=0.005)(ve, f64(1.0), 4, denoise=False)


def test_starts_above_the_cap_are_spaced_from_it() -> None:
    for grid in (Karras(ratio_cap=50.0), LogSNR(ratio_cap=50.0)):
        capped = grid(EDMVarianceExploding(), f64(80.0, 50.0), 6)
        assert capped[0].tolist() == [80, 50]
        torch.testing.assert_close(capped[1:, 0], capped[1:, 1])
        infinite = Decoupled().ratio(grid(Decoupled(), f64(1.0), 6))[:, 0]
        assert infinite[0] == math.inf
        torch.testing.assert_close(infinite[1:], capped[1:, 1], rtol=1e-9, atol=0)


def test_the_adaptive_solver_begins_at_the_cap() -> None:
    """From infinite ratio; a start below it is left where it is."""
    process, seen = Decoupled(), []
    denoiser = GaussianDenoiser(MEANS[0], 0.1, process)
    denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(process.ratio(inputs[1])))
    for first, begins in ((math.inf, 50.0), (20.0, 20.0)):
        seen.clear()
        x, t = start(process, first)
        solver("rk45", grid={"name": "log_snr", "ratio_cap": 50.0})(denoiser, x, t, NoiseStreams(0, range(1)), 0)
        ratios = torch.cat(seen)
        assert ratios[ratios.isfinite()].max().item() == pytest.approx(begins, rel=1e-9)
        assert ratios.isinf().sum() == math.isinf(first)


def test_listed_grid_is_relative_to_its_ends() -> None:
    """A list found from 80 down to 0.1 keeps its place between any start and the least level."""
    grid = Listed(ratio_min=0.1, fractions=[0.0, 0.2, 0.7, 1.0])
    times = grid(EDMVarianceExploding(), f64(80.0, 2.0), 4)
    for column, top in ((times[:, 0], 80.0), (times[:, 1], 2.0)):
        expected = [top * (0.1 / top) ** f for f in (0.0, 0.2, 0.7, 1.0)] + [0.0]
        torch.testing.assert_close(column, f64(*expected), rtol=1e-12, atol=0)


def test_listed_grid_joins_its_levels_by_straight_lines() -> None:
    """At twice the steps, every second level is a listed one and the others lie half-way in ln(ratio)."""
    fractions = [0.0, 0.2, 0.7, 1.0]
    ratio = Listed(ratio_min=0.1, fractions=fractions)(EDMVarianceExploding(), f64(50.0), 6, denoise=False)[:, 0]
    way = (50.0 / ratio).log() / math.log(500.0)
    torch.testing.assert_close(way, f64(0.0, 0.1, 0.2, 0.45, 0.7, 0.85, 1.0), rtol=1e-12, atol=1e-12)
    assert torch.equal(Listed()(EDMVarianceExploding(), f64(50.0), 6), LogSNR()(EDMVarianceExploding(), f64(50.0), 6))


@pytest.mark.parametrize("fractions", [[0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.6, 0.6, 1.0], [0.0, 0.7, 0.6, 1.0]])
def test_listed_grid_must_rise(fractions: list[float]) -> None:
    with pytest.raises(UsageError, match="must increase from 0 to 1"):
        GRIDS.build({"name": "listed", "fractions": fractions})


def test_low_starts_keep_a_step() -> None:
    """A start below ``ratio_min`` still has levels below it."""
    times = Karras(ratio_min=0.1)(EDMVarianceExploding(), f64(0.04), 3)
    assert times[0] == 0.04 and times[2].item() == pytest.approx(0.02) and times[3] == 0


# Budgets


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("denoise", [True, False])
def test_evaluations_are_what_is_spent(name: str, denoise: bool) -> None:
    process = EDMVarianceExploding()
    x, t = start(process, 0.7, 5.0, 40.0)
    part = solver(name, denoise=denoise)
    for steps in (1, 2, 5):
        counts = torch.zeros(3)
        part(Counting(MixtureDenoiser(MEANS, 0.1), counts), x, t, NoiseStreams(0, range(3)), steps)
        assert counts.tolist() == [part.evaluations(steps)] * 3


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("denoise", [True, False])
def test_steps_within_is_the_most_that_fits(name: str, denoise: bool) -> None:
    part = solver(name, denoise=denoise)
    for evaluations in range(part.evaluations(1), 40):
        steps = part.steps_within(evaluations)
        assert part.evaluations(steps) <= evaluations < part.evaluations(steps + 1)
    with pytest.raises(UsageError, match="raise nfe"):
        part.steps_within(part.evaluations(1) - 1)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("process", [VariancePreserving(), EDMVarianceExploding(), Decoupled()], ids=repr)
def test_an_analytic_first_step_is_exact_on_gaussian_data(name: str, process: Process) -> None:
    """Data N(0, s^2 I): the prediction it takes is the network's own, one evaluation cheaper."""
    x, t = start(process, 7.0, 40.0)
    counts = torch.zeros(2)
    exact = GaussianDenoiser(torch.zeros(2, 2, 2), 0.3**2, process)
    plain, analytic = solver(name), solver(name, analytic_first=0.3)
    expected = plain(exact, x, t, NoiseStreams(0, range(2)), 4)
    found = analytic(Counting(exact, counts), x, t, NoiseStreams(0, range(2)), 4)
    torch.testing.assert_close(found, expected)
    assert counts.tolist() == [analytic.evaluations(4)] * 2 == [plain.evaluations(4) - 1] * 2


@pytest.mark.parametrize("name", FIXED)
def test_an_analytic_first_step_is_never_the_only_one(name: str) -> None:
    part = solver(name, analytic_first=0.5)
    assert part.least_evaluations >= 1
    assert part.evaluations(part.steps_within(part.least_evaluations)) == part.least_evaluations
    with pytest.raises(UsageError, match="raise nfe"):
        part.steps_within(part.least_evaluations - 1)


def test_heun_counts_odd() -> None:
    heun = solver("heun")
    assert [heun.evaluations(n) for n in (1, 2, 18)] == [1, 3, 35]
    assert [heun.steps_within(n) for n in (1, 2, 3, 10, 35)] == [1, 1, 2, 5, 18]
    with pytest.raises(UsageError, match="needs 2 evaluation"):
        solver("heun", denoise=False).steps_within(1)


@pytest.mark.parametrize("name", sorted(ADAPTIVE))
def test_adaptive_solvers_refuse_a_budget(name: str) -> None:
    for call in (solver(name).evaluations, solver(name).steps_within):
        with pytest.raises(UsageError, match="set solver.tol, and nfe=null"):
            call(10)


# Independence of the batch and of the process


@pytest.mark.parametrize("process", [VariancePreserving(), EDMVarianceExploding(), Decoupled()], ids=repr)
@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_a_sample_does_not_depend_on_its_batch(name: str, process: Process) -> None:
    """Mixed start levels together equal each alone on the same noise."""
    ratios = (0.7, 2.0, math.inf if isinstance(process, Decoupled) else 30.0, 8.0)
    denoiser, part = MixtureDenoiser(MEANS, 0.1, process=process), solver(name)
    x, t = start(process, *ratios)
    together = part(denoiser, x, t, NoiseStreams(5, range(4)), 6)
    assert together.isfinite().all()
    for i in range(4):
        alone = part(denoiser, x[i : i + 1], t[i : i + 1], NoiseStreams(5, [i]), 6)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [SubVariancePreserving(), VarianceExploding(), Decoupled()], ids=repr)
@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_all_processes_give_one_result(name: str, process: Process) -> None:
    """On a grid in rho and the same noise, y = x / alpha doesn't know which process it is on."""
    grid: dict[str, object] = {"name": "karras", "ratio_min": 0.02}
    y, ratio = start(EDMVarianceExploding(), 0.7, 2.0, 8.0, 30.0)
    vp = VariancePreserving()
    results = [
        solver(name, grid=grid)(
            MixtureDenoiser(MEANS, 0.1, process=p), *p.from_ratio(y, ratio), NoiseStreams(5, range(4)), 6
        )
        for p in (vp, process)
    ]
    if not solver(name).denoise:  # the state at the least level, not the data
        alpha_vp, alpha = (p.alpha(p.time(f64(0.02))) for p in (vp, process))
        results = [results[0] / alpha_vp, results[1] / alpha]
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("clock", ["t", "t^2"])
def test_a_step_from_infinite_ratio_is_ddims(name: str, clock: str) -> None:
    """Alone and beside a sample at a finite level, which takes its own step."""
    process = Decoupled(clock=clock)  # type: ignore[arg-type]
    denoiser = MixtureDenoiser(MEANS, 0.1, process=process)
    x, t = start(process, math.inf, 4.0)
    s = process.time(f64(3.0, 2.0))
    step = solver(name).step(denoiser, x, t, s, Trajectory(NoiseStreams(0, range(2)), steps=5))
    expected, _ = process.transition(denoiser(x, t), t, s)
    torch.testing.assert_close(step[0], expected[0], rtol=1e-12, atol=1e-12)
    own = solver(name).step(denoiser, x[1:], t[1:], s[1:], Trajectory(NoiseStreams(0, [1]), steps=5))
    torch.testing.assert_close(step[1:], own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_decoupled_from_pure_noise(name: str, steps: int) -> None:
    """No NaN at t = 1, and a single step is the posterior mean."""
    denoiser = MixtureDenoiser(MEANS, 0.1, process=Decoupled())
    x = torch.randn(3, 2, 2, 2).double()
    result = solver(name, denoise=True)(denoiser, x, f64(1, 1, 1), NoiseStreams(0, range(3)), steps)
    assert result.isfinite().all()
    if steps == 1 and name not in ADAPTIVE:
        torch.testing.assert_close(result, MEANS.mean(0).expand(3, -1, -1, -1))


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("process", [VariancePreserving(), Decoupled()], ids=repr)
def test_one_step_is_the_denoiser(name: str, process: Process) -> None:
    """From a finite ratio too, but for the solver that leaves half of the noise."""
    denoiser = MixtureDenoiser(MEANS, 0.1, process=process)
    x, t = start(process, 0.7, 3.0)
    result = solver(name)(denoiser, x, t, NoiseStreams(0, range(2)), 1)
    prediction = denoiser(x, t)
    half = expand(0.5 * process.ratio(t), x) * prediction.eps if name == "probability_flow" else 0
    if name not in ("edm_stochastic", "pc"):  # which denoise from a raised or corrected state
        torch.testing.assert_close(result, prediction.x_0 + half)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_float32_stays_float32(name: str) -> None:
    process = VariancePreserving()
    x, t = start(process, 0.7, 30.0)
    part = solver(name)
    result = part(MixtureDenoiser(MEANS, 0.1, process=process), x.float(), t, NoiseStreams(0, range(2)), 8)
    exact = part(MixtureDenoiser(MEANS, 0.1, process=process), x, t, NoiseStreams(0, range(2)), 8)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_the_condition_is_that_of_each_sample(name: str) -> None:
    """Labels bound by ``given`` follow their samples, also where a solver evaluates only some of them."""

    class Labelled(Denoiser):
        """Data of class k are exactly k."""

        process, ratio_range = Decoupled(), (0.0, math.inf)

        def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
            assert condition is not None
            x_0 = expand(condition.labels, x_t).expand_as(x_t)
            alpha, sigma = expand(self.process.alpha(t), x_t), expand(self.process.sigma(t), x_t)
            return Prediction(x_0, (x_t - alpha * x_0) / sigma)

    labels = torch.tensor([3, 1, 2])
    x, t = torch.randn(3, 2, 2, 2).double(), Decoupled().time(f64(math.inf, 0.3, 20.0))
    result = solver(name, denoise=True)(Labelled().given(labels), x, t, NoiseStreams(0, range(3)), 40)
    assert (result.mean((1, 2, 3)) - labels).abs().max() < 0.05


# Errors


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_nan_from_the_network(name: str) -> None:
    for process in (EDMVarianceExploding(), Decoupled()):
        x, t = start(process, 0.7, 5.0)
        with pytest.raises(UsageError, match="NaN or infinity while sampling"):
            solver(name)(Broken(process), x, t, NoiseStreams(0, range(2)), 4)


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("ratio", [0.001, 3.0, 200.0])
def test_start_out_of_the_trained_range(name: str, ratio: float) -> None:
    denoiser = GaussianDenoiser(MEANS[0], 0.1)
    denoiser.ratio_range = (0.01, 2.0)
    x, t = start(EDMVarianceExploding(), 1.0, ratio)
    with pytest.raises(UsageError, match=r"trained on \[0.01, 2\]"):
        solver(name)(denoiser, x, t, NoiseStreams(0, range(2)), 4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "ddim", "eta": 1.1}, "eta is 1.1"),
        ({"name": "ipndm", "max_order": 5}, "1, 2, 3 or 4"),
        ({"name": "rk45", "tol": 0.0}, "must be positive"),
        ({"name": "rk45", "analytic_first": 0.5}, "doesn't support analytic_first"),
        ({"name": "ipndm", "analytic_first": 0.0}, "it must be positive or null"),
        ({"name": "ddim", "denoise": False, "grid": {"name": "ddm", "final_evaluation": False}}, "set denoise=true or"),
        ({"name": "heunn"}, "did you mean 'heun'"),
        ({"name": "heun", "grid": {"name": "karass"}}, "did you mean 'karras'"),
        ({"name": "heun", "grid": {"name": "karras", "rhoo": 3}}, "did you mean 'rho'"),
    ],
)
def test_bad_settings(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SOLVERS.build(keys)
