"""What a plan refuses before anything is sampled: steps that have no levels, and generators without a condition."""

import math

import pytest
import torch

from diffaccel.__main__ import main
from diffaccel.denoiser import Denoiser, GaussianDenoiser, KarrasDenoiser
from diffaccel.errors import UsageError
from diffaccel.nn import UNet
from diffaccel.prior import GaussianPrior, ImplicitPrior, LangevinGibbsPrior, Prior, RestartPrior
from diffaccel.prior.posterior import ExactPosterior, geometric_levels
from diffaccel.process import Decoupled, EDMVarianceExploding, Process, VarianceExploding, VariancePreserving
from diffaccel.process.attenuation import Linear
from diffaccel.sampling import Sampler, Tweedie
from diffaccel.solver import SOLVERS

SHAPE = (1, 8, 8)
MEAN = torch.zeros(SHAPE)
SCORE_SDE = {"name": "reverse_diffusion", "discretisation": "score_sde", "grid": "time"}


class Unevaluated(GaussianDenoiser):
    """Denoiser that planning must not evaluate."""

    def forward(self, *_: object) -> None:
        pytest.fail("an evaluation")


def sampler(process: Process, solver: object, prior: Prior | None = None, **options: object) -> Sampler:
    return Sampler(Unevaluated(MEAN, 0.25, process), prior or GaussianPrior(), SOLVERS.build(solver), SHAPE, **options)


# Steps


@pytest.mark.parametrize(
    ("process", "solver", "prior", "nfe", "message"),
    [
        (Decoupled(), "bridge", None, 10_002, "grid 'ddm': 10001 equal steps in time pass ratio_min"),
        (VarianceExploding(), {"name": "heun", "grid": "quadratic"}, None, 5, "grid 'quadratic': the last level"),
        (VarianceExploding(), {"name": "rk45", "grid": "quadratic"}, None, math.inf, "grid 'quadratic': the last"),
        (VariancePreserving(), SCORE_SDE, None, 15, "15 steps are too few for solver.discretisation=score_sde"),
        (VariancePreserving(), {**SCORE_SDE, "name": "pc"}, None, 20, "10 steps are too few"),
        (EDMVarianceExploding(), {"name": "ddim", "grid": "index"}, None, 5, "grid 'index' needs process=vp_discrete"),
        (
            VarianceExploding(),
            "ddim",
            RestartPrior(solver={"name": "ddim", "grid": {"name": "ddm"}}, ratio_star=0.01, chains=1),
            60,
            "grid 'ddm': the last level, ratio 0.01, is at a negative time",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_steps_without_levels_are_refused(
    process: Process, solver: object, prior: Prior | None, nfe: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sampler(process, solver, prior).plan(nfe, 20)


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("process", [VariancePreserving(), Decoupled(), EDMVarianceExploding()], ids=repr)
def test_a_plan_draws_and_evaluates_nothing(name: str, process: Process) -> None:
    """Also from infinite ratio, and with chains, whose starts have levels of their own."""
    state, adaptive = torch.get_rng_state(), SOLVERS[name].adaptive
    one, nfe = sampler(process, {"name": name, "grid": "log_snr"}), math.inf if adaptive else 30
    assert one.plan(nfe, 20).steps > 0
    posterior = ExactPosterior(one.denoiser, geometric_levels(10, 0.1, 20))
    chain = LangevinGibbsPrior(posterior, chains=1, chain_steps=2, init_solver={"name": name}, burn_in_counted=False)
    assert one.using(chain).plan(nfe, 20).steps > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_within_the_levels_are_planned() -> None:
    assert sampler(VariancePreserving(), SCORE_SDE).plan(50, 20).steps == 50
    assert sampler(VariancePreserving(), SCORE_SDE, GaussianPrior(ratio_star=1.0)).plan(15, 20).steps == 15
    with pytest.raises(UsageError, match=r"trained on \[0.002, 80\]"):
        Sampler(KarrasDenoiser(network(), EDMVarianceExploding()), GaussianPrior(90.0), "ddim", SHAPE).plan(5, 20)


def test_all_budgets_are_planned_before_the_first_is_measured(tmp_path, capsys) -> None:
    words = ["bench", "digits/ddm", "nfe=5,150", "n=20", "logger=none", f"out={tmp_path}"]
    for dry in ("false", "true"):
        assert main([*words, f"dry_run={dry}"]) == 2
        assert "149 equal steps in time pass ratio_min" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "points.jsonl").exists()


def test_a_last_denoising_step_requires_data_that_are_scaled() -> None:
    with pytest.raises(UsageError, match="tweedie_ratio=0.02 takes the mean of x_t to be alpha x_0"):
        sampler(Decoupled(attenuation=Linear()), "bridge", tweedie=Tweedie(0.02)).plan(5, 20)


# Generators


def network(**options: object) -> UNet:
    torch.manual_seed(0)
    return UNet(SHAPE, widths=[8], blocks=1, attention=[], embedding=8, **options)


def generated(denoiser: Denoiser, ratio_star: float = 1.0, **options: object) -> Sampler:
    node = {"name": "unet", "widths": [8], "blocks": 1, "attention": [], "embedding": 8, **options}
    prior = ImplicitPrior(denoiser, ratio_star, network=node, shape=SHAPE)
    return Sampler(denoiser, prior, "ddim", SHAPE)


def test_a_generator_without_labels_is_refused_for_a_network_trained_with_them_only() -> None:
    denoiser = KarrasDenoiser(network(classes=10), EDMVarianceExploding())
    assert generated(denoiser)(2, 3).shape == (2, *SHAPE), "trained without labels too"
    denoiser.network.null_class = False
    with pytest.raises(UsageError, match=r"trained with labels only: use a generator with prior.network.classes=10"):
        generated(denoiser)(2, 3)
    assert generated(denoiser, classes=10)(2, 3).shape == (2, *SHAPE)
    assert generated(denoiser, ratio_star=0.0)(2, 1).shape == (2, *SHAPE), "a GAN, without the denoiser"


@pytest.mark.parametrize("kinds", [{"image": 1}, {"mask": True}, {"image": 1, "mask": True}], ids=str)
def test_a_generator_without_the_denoisers_condition_is_refused(kinds: dict[str, object]) -> None:
    denoiser = KarrasDenoiser(network(**kinds), EDMVarianceExploding())
    with pytest.raises(UsageError, match="takes no condition, but the denoiser's network takes .*(image|mask)"):
        generated(denoiser)(2, 3)
