"""Numbers that no run can mean are one error before work."""

import copy
import dataclasses
import functools
import math
from typing import Any

import pytest

from diffaccel import experiment
from diffaccel.config import Config, load
from diffaccel.errors import UsageError
from diffaccel.evaluation.space import check_space
from diffaccel.parts.checks import RANGES, Range, check, conform
from diffaccel.parts.overrides import scalar

# Loaded: what a value is not

LOADED = """
nfe=.nan nfe=.inf nfe=nan nfe=[5,.nan] nfe=true n=10^14 n=true n=1000.5 n=1e400 n=1:30 seed=2**70 seed=0.5 images=none
devices=true training.lr=.nan training.lr=.inf training.betas=0.9 keep_images=2 compile=perhaps solver.eta=.nan
data.n=.nan prior.ratio_star=.inf nfe={a:1} nfe=[[5]] training.betas={a:1} n=[5] n.x=3 n=0 nfe=5,5 shape=2,1
"""


@pytest.mark.parametrize("word", LOADED.split())
def test_a_value_that_is_no_number_of_its_key_is_one_error(word: str):
    with pytest.raises(UsageError) as error:
        load("toy/edm", [word])
    assert "\n" not in str(error.value)
    assert word.partition("=")[0].split(".")[-1] in str(error.value)


# Checked: what a number is not

RANGED = """
nfe=5,5.0 nfe=-5, nfe=0, nfe=, nfe=1e12, n=100000000000000 n=-3 n=0 seed=1180591620717411303424 seed=-1 batch_size=0
batch_size=1000000000 limit=0 limit=-1 likelihood_n=0 jpeg=0 jpeg=101 devices=0 num_nodes=0 threads=0 threads=1000000
training.images=0 training.images=-5 training.lr=-1 training.lr=0 training.lr=nan training.warmup=-5
training.betas=1.5,0 training.betas=0.9,1 training.betas=, training.betas=0.9,0.9,0.9 training.decay=2
training.decay=-0.1 training.clip=0 training.clip=-1 training.ema_half_life=0 training.label_drop=1.5
training.augment=1.1 training.evaluate_n=1 training.evaluate_every=0 training.checkpoint_minutes=0
training.log_every=0 training.batch_size=0 training.workers=-1 training.keep_best=-3 training.weight_decay=-1
training.floor=2 training.decay_power=-1 search.trials=0 search.images=, search.images=1, search.images=500,500
search.keep=0 search.keep=2 search.confirm.best=0 search.confirm.n=1 search.confirm.seed=-1
tradeoff.T=, tradeoff.T=0, tradeoff.T=0.1,0.1 tradeoff.images=0 tradeoff.draws=0
shape=3,100000,100000 shape=3,0,3 shape=3,-8,8 shape=2,1 shape=,
"""


@pytest.fixture(scope="module")
def config() -> Config:
    return load("toy/edm")


@pytest.mark.parametrize("word", RANGED.split())
def test_a_number_out_of_range_is_one_error_that_names_it(config: Config, word: str):
    config = copy.deepcopy(config)
    key, _, text = word.partition("=")
    *above, last = key.split(".")
    place = functools.reduce(getattr, above, config)
    setattr(place, last, [scalar(item) for item in text.split(",") if item] if "," in text else scalar(text))
    with pytest.raises(UsageError, match=f"^{key}="):
        check(config)


def test_times_of_densities_are_positive(config: Config):
    config = copy.deepcopy(config)
    config.tradeoff.densities = {-1.0: "a"}
    with pytest.raises(UsageError, match="tradeoff.densities"):
        check(config)


def test_every_number_of_the_schema_has_a_range():
    """A new number can't be forgotten."""

    def numbers(schema: Any, prefix: str = "") -> list[str]:
        found = []
        for item in dataclasses.fields(schema):
            if dataclasses.is_dataclass(item.type):
                found += numbers(item.type, f"{prefix}{item.name}.")
            elif item.type is not bool and any(kind in str(item.type) for kind in ("int", "float")):
                found.append(prefix + item.name)
        return found

    assert set(numbers(Config)) - {"by_nfe"} == RANGES.keys()


def test_the_ends_of_a_range():
    assert 0 in Range(0, 1) and 1 in Range(0, 1)
    assert 0 not in Range(0, 1, "(]") and 1 not in Range(0, 1, "[)")
    assert math.nan not in Range(0, 1)


PARTS = """
toy/edm solver.grid.ratio_min=0
toy/edm solver.grid.ratio_min=-1
toy/edm solver.grid.ratio_cap=0.001
toy/edm solver.grid.rho=0
toy/edm solver.grid.rho=-7
toy/edm solver.grid.rho=1e-9
toy/edm solver=ipndm solver.max_order=0
toy/edm solver=deis solver.max_order=5
toy/edm solver=ddim solver.eta=-1
toy/edm solver=edm_stochastic solver.S_churn=-3
toy/edm solver=edm_stochastic solver.S_noise=-1
toy/edm solver=edm_stochastic solver.S_max=0.01
toy/edm solver=pc solver.snr=0
toy/edm nfe=null solver=rk45 solver.tol=0
toy/edm nfe=null solver=rk45 solver.max_steps=0
toy/edm solver.analytic_first=0
toy/edm solver.name.x=1
toy/edm solver.max_order=3
toy/dlg chains=0
toy/dlg prior.images_per_chain=0.5
toy/dlg prior.share=0
toy/dlg prior.share=1
toy/dlg prior.chain_steps=0
toy/dlg prior.chain_steps=1e9
toy/dlg prior.init_steps=0
toy/dlg prior.init_steps=1e12
toy/dlg prior.restart_every=0
toy/dlg prior.eta=-1
toy/dlg prior.renoise=-1
toy/dlg prior.chains=true
toy/dlg posterior.count=1
toy/dlg posterior.ratio_min=0
toy/dlg posterior.ratio_max=0.01
toy/dlg tweedie_ratio=0
toy/edm prior=restart prior.ratio_star=-1
toy/edm prior.ratio_star=0
toy/tdpm method.critic_lr=0
toy/tdpm method.generator_lr=-1
toy/tdpm method.r1_every=0
toy/tdpm method.gamma=-1
toy/tdpm method.generator_since=-1
toy/small_t method.density_lr=0
digits/edm levels.std=0
digits/edm network.widths=[]
digits/edm network.widths=[-1]
digits/edm network.heads=[]
digits/edm network.embedding=0
digits/edm network.unshuffle=0
digits/edm network.classes=-3
digits/edm network.dropout=1.5
digits/dlg posterior.count=-3
digits/dlg posterior.width=0
cifar10/tdpm network.groups=0
cifar10/tdpm network.multipliers=[]
toy/edm denoiser.means=[]
toy/edm denoiser.weights=[1,-1]
""".strip().splitlines()


@pytest.mark.parametrize("line", PARTS)
def test_parts_refuse_what_they_cannot_mean(line: str):
    name, *words = line.split()
    with pytest.raises(UsageError) as error:
        experiment.build_method(load(name, words), load=False)
    key = words[-1].partition("=")[0].split(".")[-1]
    assert "\n" not in str(error.value)
    assert ("name" if key == "x" else key) in str(error.value)


@pytest.mark.parametrize(("word", "key"), [("prior.told=0.9", "level_scale"), ("prior.skips=4", "chain_steps")])
def test_a_renamed_key_is_refused_with_its_present_name(word: str, key: str):
    name = "toy/tdpm" if key == "level_scale" else "toy/dlg"
    old = word.partition("=")[0].partition(".")[2]
    with pytest.raises(UsageError, match=f"has no key '{old}'; '{old}' is now called '{key}'$"):
        experiment.build_method(load(name, [word]), load=False)


def test_a_denoiser_without_the_network_that_it_needs():
    with pytest.raises(UsageError, match="'karras' requires a network"):
        experiment.build_method(load("toy/edm", ["denoiser=karras"]), load=False)


@pytest.mark.parametrize(
    "values",
    [
        [], {"low": 3, "high": 1}, {"low": 0, "high": 1, "log": True}, {"low": -1, "high": 1, "log": True},
        {"low": 1.5, "high": 3, "integer": True}, {"low": 1, "high": 3, "integer": True, "log": True},
        {"low": True, "high": 3}, {"low": "a", "high": 3}, {"low": 1}, 3,
    ],
)  # fmt: skip
def test_ranges_of_a_search(values: object):
    with pytest.raises(UsageError, match=r"search\.space\.solver\.eta"):
        check_space({"solver.eta": values})


def test_values_become_those_of_a_type():
    assert conform("k", 2e6, int) == 2_000_000 and type(conform("k", 2e6, int)) is int
    assert conform("k", 2.5, int) == 2.5, "left for the schema to refuse"
    assert conform("k", "5, 10", list[float]) == [5, 10] and conform("k", [1e3], list[int]) == [1000]
    assert conform("k", "None", int | None) is None and conform("k", "none", str | None) == "none"
    assert conform("k", 1, bool) == 1
    for value, kind in ((2, bool), (5, list[int])):
        with pytest.raises(UsageError, match="^k="):
            conform("k", value, kind)
