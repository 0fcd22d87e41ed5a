"""The search: its draws, its grids, what it finds, and that nothing is measured twice."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.denoiser import FiniteSetDenoiser, GaussianDenoiser, MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.evaluation import Evaluator
from diffaccel.evaluation.space import check_space, draw
from diffaccel.experiment import build_frozen, build_searcher
from diffaccel.noise import NoiseStreams
from diffaccel.process import Decoupled, EDMVarianceExploding, Process, VariancePreserving
from diffaccel.report import read_points
from diffaccel.solver import SOLVERS, Listed, LogSNR
from diffaccel.solver.searched import FineTrajectory

OWN = {"prior": {"name": "gaussian"}, "solver": {"name": "heun", "grid": {"name": "karras", "rho": 5.0}}}
SPACE = {
    "prior.ratio_star": [20, 40],
    "solver.name": ["heun", "ipndm"],
    "solver.max_order": [2, 3],
    "solver.grid.name": ["karras", "log_snr", "listed"],
    "solver.grid.rho": {"low": 3, "high": 15},
    "solver.grid.ratio_min": {"low": 0.01, "high": 0.1, "log": True},
    "gamma": [1.0, 1.2],
}
TOY = (
    "search.space={prior.ratio_star: [80, 40, 20], solver.name: [heun, dpmpp2m, ddim], solver.grid: [karras, log_snr]}"
)
QUICK = ["nfe=[5,8]", "n=400", "seed=7", "search.trials=6", "search.images=[50,100]", "search.keep=0.34",
         "search.confirm.best=1"]  # fmt: skip


# Draws


def test_draws_are_seeded_and_have_only_keys_of_their_parts():
    first, again = ([draw(SPACE, OWN, rng) for _ in range(60)] for rng in map(np.random.default_rng, (3, 3)))
    assert first == again
    kinds = set()
    for drawn in first:
        solver, grid = drawn["solver"], drawn["solver"]["grid"]
        assert ("max_order" in solver) == (solver["name"] == "ipndm")
        assert set(grid) == {"karras": {"name", "rho", "ratio_min"}, "log_snr": {"name", "ratio_min"},
                             "listed": {"name", "gamma"}}[grid["name"]]  # fmt: skip
        assert drawn["prior"]["ratio_star"] in (20, 40)
        assert 3 <= grid.get("rho", 5) <= 15 and 0.01 <= grid.get("ratio_min", 0.05) <= 0.1
        kinds.add((solver["name"], grid["name"]))
    assert len(kinds) == 6
    assert OWN["solver"] == {"name": "heun", "grid": {"name": "karras", "rho": 5.0}}  # nobody wrote into it


def test_draws_fill_their_ranges_evenly():
    """On a logarithmic scale in ratios, both ends of integers among them."""
    space = {"solver.grid.ratio_min": {"low": 0.01, "high": 0.1, "log": True}, "prior.ratio_star": [1, 2],
             "solver.grid.rho": {"low": 3, "high": 5, "integer": True}}  # fmt: skip
    rng = np.random.default_rng(1)
    drawn = [draw(space, OWN, rng) for _ in range(600)]
    low, rho = (np.array([one["solver"]["grid"][key] for one in drawn]) for key in ("ratio_min", "rho"))
    assert np.quantile(low, [0.25, 0.5, 0.75]) == pytest.approx(10.0 ** np.array([-1.75, -1.5, -1.25]), rel=0.15)
    assert np.bincount(rho.astype(int)).tolist()[:3] == [0, 0, 0]
    assert np.bincount(rho.astype(int))[3:] == pytest.approx([200] * 3, abs=45)


@pytest.mark.parametrize(
    ("space", "named"),
    [({"nfe": [5]}, "'nfe' is neither"), ({"solver.grid.rho": 7}, "rho=7"), ({"solver.grid.rho": []}, "rho="),
     ({"solver.grid.rho": {"low": 1}}, "rho="), ({"solver.nam": ["heun"]}, "did you mean 'name'"),
     ({"solver.name": ["heunn"]}, "did you mean 'heun'"), ({"solver.grid.name": ["karass"]}, "'karras'"),
     ({"prior.chains": [3]}, "replace it by prior.images_per_chain"), ({"prior.chain": [3]}, "did you mean 'chains'"),
     ({"prior.told": [0.9]}, "now called 'level_scale'"), ({}, "no search.space")],
)  # fmt: skip
def test_a_mistake_in_the_space(space: dict[str, object], named: str):
    with pytest.raises(UsageError, match=named):
        check_space(space)
    check_space(SPACE)


# Grids


def mixture(process: Process) -> MixtureDenoiser:
    means = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    return MixtureDenoiser(means, 0.01, process=process)


def starts(process: Process, ratio: float, n: int = 32) -> tuple[Tensor, Tensor]:
    t = process.time(torch.full((n,), ratio, dtype=torch.float64))
    z = torch.randn(n, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return process.sigma(t)[:, None, None, None] * z, t


@pytest.mark.parametrize("gamma", [1.0, 1.2])
@pytest.mark.parametrize("denoise", [True, False])
def test_dynamic_programming_finds_the_best_of_all_paths(gamma: float, denoise: bool):
    process = EDMVarianceExploding()
    fine = FineTrajectory(mixture(process), *starts(process, 40.0), levels=10)
    last = 10 if denoise else 9
    for steps in (1, 2, 3, 5):
        paths = [(0, *middle, last) for middle in itertools.combinations(range(1, last), steps - 1)]
        costs = [
            sum(gamma**k * fine.cost[i, j].item() for k, (i, j) in enumerate(itertools.pairwise(path)))
            for path in paths
        ]
        assert tuple(fine.path(steps, gamma, denoise)) == paths[int(np.argmin(costs))]
    with pytest.raises(UsageError, match="use more levels"):
        fine.path(last + 1, gamma, denoise)


def test_one_data_point_has_straight_trajectories():
    """y is linear in rho there, so that no Euler step costs anything."""
    process = VariancePreserving()
    denoiser = FiniteSetDenoiser(torch.ones(1, 2, 2, 2, dtype=torch.float64), process)
    fine = FineTrajectory(denoiser, *starts(process, 40.0), levels=12)
    assert fine.cost[fine.cost.isfinite()].max() < 1e-12
    assert fine.cost.isfinite().sum() == 12 * 13 / 2


@pytest.mark.parametrize("process", [EDMVarianceExploding(), VariancePreserving()], ids=repr)
def test_a_searched_grid_beats_the_usual_ones(process: Process):
    """Euler's error against a fine solution, on starts that the search has not seen."""
    denoiser = mixture(process)
    (seen, x), (seen_t, t) = (tensor.chunk(2) for tensor in starts(process, 40.0, 256))
    grid = FineTrajectory(denoiser, seen, seen_t, spacing=LogSNR(ratio_min=0.01)).grid(8, gamma=1.0)
    assert isinstance(grid, Listed) and len(grid.fractions) == 8 and grid.ratio_min >= 0.01
    noise = NoiseStreams(0, range(len(x)))
    fine = SOLVERS.build({"name": "heun", "grid": {"name": "log_snr", "ratio_min": 0.001}})
    exact = fine(denoiser, x, t, noise, 400)

    def error(**keys: object) -> float:
        found = SOLVERS.build({"name": "euler", **keys})(denoiser, x, t, noise, 8)
        return (found - exact).square().mean().sqrt().item()

    searched = error(grid={"name": "listed", "ratio_min": grid.ratio_min, "fractions": grid.fractions})
    usual = [error(grid={"name": name, "ratio_min": low}) for name in ("karras", "log_snr") for low in (0.002, 0.05)]
    assert searched < 0.8 * min(usual)


def test_an_euler_step_of_a_gaussian_costs_its_closed_form():
    """y ~ sqrt(v + rho^2), and a step from rho_0 falls on the tangent there; the fine levels are of second order."""
    v, process = 0.25, EDMVarianceExploding()
    x, t = starts(process, 5.0)
    fine = FineTrajectory(GaussianDenoiser(torch.zeros(2, 2, 2).double(), v, process), x, t, 40, LogSNR(ratio_min=0.1))
    rho = fine.ratio[:, 0]
    scale = (v + rho.square()).sqrt() / (v + rho[0] ** 2) ** 0.5
    tangent = 1 + rho[0] / (v + rho[0] ** 2) * (rho - rho[0])
    size = x.square().flatten(1).mean(1).sqrt().mean()
    torch.testing.assert_close(fine.cost[0, 15:-1], ((tangent - scale).abs() * size)[15:-1], rtol=0.02, atol=0)


@pytest.mark.parametrize("ratio", [40.0, 150.0])
@pytest.mark.parametrize("denoise", [True, False])
def test_a_grid_is_its_path(denoise: bool, ratio: float):
    """Its steps lie at the levels that were found, down to ratio 0 or to the least positive one, from any start."""
    process = VariancePreserving()
    x, t = starts(process, ratio)
    fine = FineTrajectory(mixture(process), x, t, levels=12)
    path = fine.path(5, 1.2, denoise)
    times = fine.grid(5, 1.2, denoise)(process, t, 5, denoise)
    torch.testing.assert_close(process.ratio(times), fine.ratio[path], rtol=2e-3, atol=0)
    assert fine.grid(1, denoise=True) == Listed()


def test_a_grid_ends_in_the_trained_range():
    process = EDMVarianceExploding()
    denoiser = mixture(process)
    for low, end in ((0.01, 0.01), (0.0, 0.002)):
        denoiser.ratio_range = (low, 80.0)
        fine = FineTrajectory(denoiser, *starts(process, 40.0), levels=10)
        torch.testing.assert_close(fine.ratio[-2], torch.full((32,), end, dtype=torch.float64))


def test_no_grid_from_infinite_ratio():
    t = torch.ones(2, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"set prior.ratio_star"):
        FineTrajectory(mixture(Decoupled()), torch.zeros(2, 2, 2, 2, dtype=torch.float64), t)


# The search


@pytest.fixture(autouse=True)
def plain(undrawn: None, monkeypatch: pytest.MonkeyPatch):
    """No kernel distance, which costs more than the points of tests."""
    monkeypatch.setattr("diffaccel.metrics.KernelDistance.compute", lambda self: torch.tensor(0.0))


def trials(out: Path) -> list[dict]:
    return read_points(out / "trials.jsonl")


def test_the_winner_is_the_best_of_the_last_round_and_an_experiment(tmp_path: Path):
    assert main(["search", "toy/edm", TOY, *QUICK, f"out={tmp_path}"]) == 0
    found = trials(tmp_path)
    config = load(str(tmp_path / "best.yaml"))
    for budget in (5, 8):
        rounds = [[trial for trial in found if (trial["nfe_budget"], trial["n"]) == (budget, n)] for n in (50, 100)]
        assert [len(trials) for trials in rounds] == [6, 3]
        assert len({json.dumps(trial["drawn"]) for trial in rounds[0]}) == 6
        scores = sorted((trial["metrics"]["fd_identity"], json.dumps(trial["drawn"])) for trial in rounds[0])
        assert {drawn for _, drawn in scores[:3]} == {json.dumps(trial["drawn"]) for trial in rounds[1]}
        best = min(rounds[1], key=lambda trial: trial["metrics"]["fd_identity"])
        assert config.at(budget)["solver"] | best["settings"]["solver"] == config.at(budget)["solver"]
        assert all(trial["nfe"] <= budget for trial in [*rounds[0], *rounds[1]])
    assert main(["bench", str(tmp_path / "best.yaml"), "nfe=[5,8]", "n=40", "logger=none", f"out={tmp_path}"]) == 0
    points = read_points(tmp_path / "points.jsonl")
    assert [point["settings"]["solver"] for point in points] == [config.at(budget)["solver"] for budget in (5, 8)]
    assert all(point["tuned"] for point in points)


def test_a_fitted_prior_keeps_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As it is drawn at other levels, and in the winner, from whatever folder that is read."""
    words = ["search.space={prior.T: [0.3, 0.5, 0.6]}", "search.trials=3", "search.images=[16]"]
    assert main(["search", "digits/small_t", *words, "nfe=[5]", "n=16", "seed=7", f"out={tmp_path}"]) == 0
    own = Path(load("digits/small_t").prior["checkpoint"]).resolve()
    assert all(Path(trial["drawn"]["prior"]["checkpoint"]).samefile(own) for trial in trials(tmp_path))
    assert all(np.isfinite(trial["metrics"]["fd_digits"]) for trial in trials(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = load(str(tmp_path / "best.yaml")).at(5)["prior"]
    assert Path(found["checkpoint"]).samefile(own)


def test_nothing_is_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A search that is interrupted goes on, and ends as one that is not."""
    words = ["search", "toy/edm", TOY, *QUICK, "search.confirm.best=2"]
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    measure, calls = Evaluator.measure, itertools.count()

    def interrupted(self, *args, **keys):
        if next(calls) == 10:
            raise KeyboardInterrupt
        return measure(self, *args, **keys)

    monkeypatch.setattr(Evaluator, "measure", interrupted)
    assert main([*words, f"out={tmp_path / 'parts'}"]) == 130
    assert len(trials(tmp_path / "parts")) == 10
    assert main([*words, f"out={tmp_path / 'parts'}"]) == 0
    assert next(calls) - 1 == len(trials(tmp_path / "parts")) == 2 * (6 + 3 + 2)

    def essence(out: Path) -> list:
        return [(trial["drawn"], trial["n"], trial["seed"], trial["metrics"]) for trial in trials(out)]

    assert essence(tmp_path / "parts") == essence(tmp_path / "whole")
    assert load(str(tmp_path / "parts" / "best.yaml")).by_nfe == load(str(tmp_path / "whole" / "best.yaml")).by_nfe


def test_winners_of_other_budgets_stay(tmp_path: Path, capsys):
    words = [TOY, "search.trials=2", "search.images=[20]", "n=20", f"out={tmp_path}"]
    assert main(["search", "toy/edm", *words, "nfe=[5]"]) == 0
    first = load(str(tmp_path / "best.yaml")).by_nfe
    assert main(["search", "toy/edm", *words, "nfe=[8]"]) == 0
    assert set(load(str(tmp_path / "best.yaml")).by_nfe) == {5, 8}
    assert load(str(tmp_path / "best.yaml")).by_nfe[5] == first[5]
    assert "another winner" not in capsys.readouterr().err
    content = (tmp_path / "best.yaml").read_text()
    assert main(["search", "toy/ddpm", *words, "nfe=[5]"]) == 2
    assert "best.yaml is not from a search of" in capsys.readouterr().err.replace("\n", " ")
    assert (tmp_path / "best.yaml").read_text() == content
    before, entries = content.split("by_nfe:")
    other = before + "by_nfe:" + entries.replace("name: ", "name: no_", 1)  # as after another search
    (tmp_path / "best.yaml").write_text(other)
    assert main(["search", "toy/edm", *words, "nfe=[5]"]) == 0
    assert "nfe 5: best.yaml had another winner" in capsys.readouterr().err
    assert (tmp_path / "best.yaml").read_text() == content


def test_chains_are_as_many_per_image_as_in_the_end(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """So that burn-in takes the share of the budget that it will take, and chains are as long; a number is refused."""
    monkeypatch.setattr("diffaccel.evaluation.search.exclusion", lambda trial, recall: "")
    space = "search.space={prior.eta: [0.5, 1.0], prior.images_per_chain: [10, 20]}"
    words = ["nfe=[40]", "n=400", "search.trials=4", "search.images=[40, 100]", "search.confirm.n=200",
             "prior.images_per_chain=10"]  # fmt: skip
    assert main(["search", "toy/dlg", space, *words, f"out={tmp_path}"]) == 0
    found = [trial for trial in trials(tmp_path) if trial["chains"]]
    assert {trial["n"] for trial in found} == {40, 100, 200}
    for trial in found:
        assert 38 < trial["nfe"] <= 40
        assert trial["n"] / trial["chains"] == trial["drawn"]["prior"]["images_per_chain"]
        assert trial["neighbourhoods"] == trial["n"]
    capsys.readouterr()
    assert main(["search", "toy/dlg", space, *words, "chains=40", f"out={tmp_path}"]) == 2
    assert "set prior.images_per_chain=10 and prior.chains=null" in capsys.readouterr().err


def test_settings_are_planned_with_exact_counts():
    """Guidance in an interval doubles the evaluations there only, so that more steps fit the budget."""
    words = ["network.classes=10", "checkpoint=null", "search.space={gamma: [1.0]}", "search.images=[20]", "n=20"]
    config = load("digits/edm", words)
    sampler = build_frozen(config, load=False)
    searcher = build_searcher(config, sampler)
    guided = {
        "name": "ddim",
        "guidance": 1.0,
        "guidance_interval": [0.5, 1.0],
        "grid": {"name": "listed", "gamma": 1.0},
    }
    settings = {"prior": {"name": "gaussian"}, "solver": guided}
    with torch.inference_mode():
        assert searcher._problem(sampler, 2, settings) == ""
        found = searcher._filled(sampler, 6, settings)["solver"]
    with_log_snr = SOLVERS.build({**guided, "grid": "listed"})  # a listed grid without levels of its own
    planned = sampler.using(sampler.prior, with_log_snr).plan(6, 20).steps
    assert len(found["grid"]["fractions"]) == planned > 3 == sampler.prior.plan(with_log_snr, 6, 20).steps
    assert "below the minimum" in searcher._problem(sampler, 0, settings)


def test_a_setting_that_fails_is_noted_and_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measure = Evaluator.measure

    def failing(self, sampler, budget, plan, **keys):
        if type(plan.solver).__name__ == "DDIM":
            raise UsageError("the chain turned to NaN")
        return measure(self, sampler, budget, plan, **keys)

    monkeypatch.setattr(Evaluator, "measure", failing)
    assert main(["search", "toy/edm", TOY, *QUICK, "search.trials=9", f"out={tmp_path}"]) == 0
    failed = [trial for trial in trials(tmp_path) if trial["drawn"]["solver"]["name"] == "ddim"]
    assert failed and all(trial["error"] == "the chain turned to NaN" for trial in failed)
    assert all(entry["solver"]["name"] != "ddim" for entry in load(str(tmp_path / "best.yaml")).by_nfe.values())


@pytest.mark.parametrize(
    ("words", "named"),
    [(["search.trials=0"], "search.trials=0"), (["search.keep=1.5"], "search.keep=1.5"), (["nfe=5.5"], "whole budgets"),
     (["search.space={solver.nam: [heun]}"], "nam"), (["search.space={}"], "no search.space")],
)  # fmt: skip
def test_a_mistake_is_named_before_anything_is_measured(tmp_path: Path, words: list[str], named: str, capsys):
    space = [] if any("space" in word for word in words) else [TOY]
    assert main(["search", "toy/edm", *space, *words, f"out={tmp_path}"]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "trials.jsonl").exists()


def test_a_searched_grid_is_written_out(tmp_path: Path):
    space = "search.space={solver.grid.name: [listed], gamma: [0.3, 1.0, 3.0]}"
    words = [*QUICK, "search.trials=4", "search.keep=0.7"]
    assert main(["search", "toy/edm", space, *words, f"out={tmp_path}"]) == 0
    assert [sum(trial["n"] == n for trial in trials(tmp_path)) for n in (50, 100)] == [2 * 4, 2 * 3]
    listed = [trial for trial in trials(tmp_path) if trial["drawn"]["solver"].get("grid")]
    for budget in (5, 8):  # the more late errors weigh, the lower it goes before the last step
        low = {trial["drawn"]["solver"]["grid"]["gamma"]: trial["settings"]["solver"]["grid"]["ratio_min"]
               for trial in listed if trial["nfe_budget"] == budget}  # fmt: skip
        assert low[0.3] > 10 * low[1.0] > 100 * low[3.0]
    for trial in listed:
        grid = trial["settings"]["solver"]["grid"]
        assert set(grid) == {"name", "ratio_min", "ratio_cap", "fractions"} and math.isfinite(
            trial["metrics"]["fd_identity"]
        )
        assert isinstance(SOLVERS.build(trial["settings"]["solver"]).grid, Listed)
