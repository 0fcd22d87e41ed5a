"""The restart chain on Gaussian data, where its law and its mixing have closed forms; and what it spends."""

import pytest
import torch
from oracles import split

from diffaccel.denoiser import GaussianDenoiser
from diffaccel.errors import UsageError
from diffaccel.nfe import EvaluationCounter
from diffaccel.noise import NoiseStreams
from diffaccel.parts.history import explicit
from diffaccel.prior import PRIORS, RestartPrior
from diffaccel.process import EDMVarianceExploding, Process, VariancePreserving
from diffaccel.solver import SOLVERS

VAR = 0.25
SHAPE = (1, 16, 16)
CHAINS = 40
FINE = {"name": "dpmpp2m", "grid": {"name": "log_snr"}}


def rounds(prior: RestartPrior, count: int, chain_steps: int, process: Process | None = None) -> torch.Tensor:
    """States x / alpha of so many rounds, (rounds, CHAINS, 1, 16, 16)."""
    denoiser = GaussianDenoiser(torch.zeros(SHAPE), VAR, process)
    group = [range(first, first + CHAINS) for first in range(0, count * CHAINS, CHAINS)]
    state, found = prior.open(denoiser, 0, group, SHAPE), []
    for indices in group:
        x_t, t = prior(denoiser, NoiseStreams(0, indices), SHAPE, chain_steps, state)
        assert torch.allclose(denoiser.process.ratio(t), torch.tensor(prior.ratio_star, dtype=torch.float64), rtol=1e-6)
        found.append(x_t / denoiser.process.alpha(t)[:, None, None, None])
    return torch.stack(found)


@pytest.mark.parametrize("process", [EDMVarianceExploding(), VariancePreserving()])
def test_the_law_at_its_level_stays_and_mixes_as_the_way_up_says(process):
    """Noise and the exact way down scale by c = sqrt((v + star^2) / (v + up^2)), so that rounds correlate by c."""
    prior = RestartPrior(ratio_star=0.8, ratio_up=3.0, solver=FINE, chains=CHAINS, init_steps=60)
    states = rounds(prior, 12, 40, process)
    level = VAR + 0.8**2
    # 10,240 coordinates a round: a standard error of 1.4 % in the variance, about 0.5 % over all rounds.
    assert states.square().mean((1, 2, 3, 4)).sub(level).abs().max() < 0.06 * level
    assert states.square().mean().item() == pytest.approx(level, rel=0.02)
    correlation = (states[1:] * states[:-1]).mean() / states.square().mean()
    assert correlation.item() == pytest.approx((level / (VAR + 9.0)) ** 0.5, abs=0.02)


def test_a_chain_costs_its_way_from_noise_once_and_its_rounds():
    denoiser = GaussianDenoiser(torch.zeros(SHAPE), VAR)
    prior = RestartPrior(chains=5, init_steps=7, chain_steps=4, solver={"name": "heun"})
    n = 15
    plan = prior.plan(SOLVERS.build({"name": "ddim"}), 20, n)
    assert prior.burn_in_per_chain == 14 and split(plan) == (20 - 5 - 4, 4)
    with EvaluationCounter({"denoiser": denoiser.network}) as counter:
        for group in prior.schedule(n, 2):
            state = prior.open(denoiser, 0, group, SHAPE)
            for indices in group:
                prior(denoiser, NoiseStreams(0, indices), SHAPE, plan.chain_steps, state)
    assert counter.burn_in["denoiser"] == 5 * 14
    assert counter.evaluations["denoiser"] == 5 * 14 + n * 4


@pytest.mark.parametrize(("chain_steps", "spent"), [(2, 2), (3, 2), (5, 4), (None, 6)])
def test_a_round_is_planned_as_what_its_solver_can_spend(chain_steps, spent):
    prior = RestartPrior(chains=5, init_steps=7, chain_steps=chain_steps, share=0.45, solver={"name": "heun"})
    plan = prior.plan(SOLVERS.build({"name": "ddim"}), 20, 15)
    assert plan.chain_steps == spent and plan.steps == (20 - 5 - spent if chain_steps else 20 - 5 - 7)
    least = spent if chain_steps else 2
    with pytest.raises(UsageError, match=rf"the minimum of {5 - 1 / 3 + least + 1:.3g}\d* \({least} chain step"):
        prior.plan(SOLVERS.build({"name": "ddim"}), 5 + least, 15)


def test_another_solver_has_its_own_defaults():
    """The chain's default solver has a key that differs from the solver's own default."""
    made = {node: PRIORS.build({"name": "restart", "solver": node}).init_solver for node in ("heun", "dpmpp3m")}
    assert type(made["heun"]) is SOLVERS["heun"]
    assert made["dpmpp3m"].lower_order_final is True
    for node in ({"grid": {"rho": 3.0}}, {"name": "dpmpp2m", "grid": {"rho": 3.0}}):
        kept = PRIORS.build({"name": "restart", "solver": node}).init_solver
        assert (kept.lower_order_final, kept.grid.rho) == (False, 3.0)
        recorded = explicit({"prior": {"name": "restart", "solver": node}})["prior"]["solver"]
        assert PRIORS.build({"name": "restart", "solver": recorded}).init_solver == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_star": 0.0}, "ratio_star is 0.0"),
        ({"ratio_star": 2.0, "ratio_up": 3.0}, "ratio_up is 3.0, it must be at least twice"),
        ({"chains": 0}, "chains is 0"),
        ({"images_per_chain": 0}, "images_per_chain is 0"),
        ({"solver": {"name": "hein"}}, "heun"),
        ({"solver": "rk45"}, "RK45, which is adaptive"),
        ({"solver": "heun", "chain_steps": 1}, "chain_steps is 1, but Heun takes at least 2"),
        ({"solver": {"grid": {"name": "ddm", "final_evaluation": False}}}, "grid .* ignores ratio_min"),
        ({"solver": {"grid": "index"}}, "grid .* ignores ratio_min"),
        ({"solver": {"analytic_first": 1.0}}, "remove prior.solver.analytic_first"),
        ({"solver": {"guidance": 1.0}}, "remove prior.solver.guidance"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        PRIORS.build({"name": "restart", **options})
