"""Choice of the winner of a search: eligibility, confirmation, candidates and judge, on scripted measurements."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_search import TOY, trials

from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.errors import UsageError
from diffaccel.evaluation import Evaluator
from diffaccel.evaluation.eligible import exclusion
from diffaccel.experiment import build_extractors
from diffaccel.experiment.evaluation import search_judge
from diffaccel.prior import ChainPrior, GaussianPrior, Plan
from diffaccel.sampling import Sampler


def scripted(monkeypatch: pytest.MonkeyPatch, metrics: Callable[[Plan, int, int], dict[str, float]]) -> list[Any]:
    """Replace measurements by metrics of plan, number of images and seed; returns the (plan, n, seed) so far."""
    calls = []

    def measure(self: Evaluator, sampler: Sampler, budget: float, plan: Plan, **keys: Any) -> dict[str, Any]:
        calls.append((plan, self.n, self.seed))
        chains = plan.prior.chains_for(self.n) if isinstance(plan.prior, ChainPrior) else None
        found = {"nfe": budget, "chains": chains, "neighbourhoods": self.n}
        return {**found, "metrics": metrics(plan, self.n, self.seed)}

    monkeypatch.setattr(Evaluator, "measure", measure)
    return calls


CHAINS = "search.space={prior.eta: [0.1], prior.images_per_chain: [2, 5, 10, 25, 50]}"
CHAIN_WORDS = ["nfe=[40]", "n=400", "search.trials=6", "search.images=[100]", "search.keep=1", "seed=3"]


def winner(out: Path, budget: int = 40) -> dict[str, Any]:
    return load(str(out / "best.yaml")).at(budget)


@pytest.mark.parametrize(
    ("kind", "best"),
    [({"recall": 0.05}, 25), ({"effective_n": 3.0}, 25), ({}, 50), ({"near_repeats": 0.5}, 25)],
    ids=["recall", "effective_n", "honest", "near_repeats"],
)  # fmt: skip
def test_repetition_does_not_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, float], best: int):
    """The longer the chains, the lower the distance here; the longest ones repeat themselves."""
    good = {"recall": 0.5, "effective_n": 90.0, "near_repeats": 0.0}

    def metrics(plan: Plan, n: int, seed: int) -> dict[str, float]:
        if not isinstance(plan.prior, ChainPrior):
            return {"fd_identity": 9.0, **good, "effective_n": n}
        length = plan.prior.images_per_chain
        return {"fd_identity": 1 / length, **good, **(kind if length == 50 else {})}

    calls = scripted(monkeypatch, metrics)
    words = ["search", "toy/dlg", CHAINS, *CHAIN_WORDS, "prior.images_per_chain=2", f"out={tmp_path}"]
    assert main(words) == 0
    assert winner(tmp_path)["prior"]["images_per_chain"] == best
    independent = [plan for plan, _, _ in calls if isinstance(plan.prior, GaussianPrior)]
    assert len(independent) == 2, "once for each seed, for comparison only"


def test_a_space_of_repetition_has_no_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Nor is one a setting that failed, which has no reason to be excluded."""

    def metrics(plan: Plan, n: int, seed: int) -> dict[str, float]:
        if isinstance(plan.prior, ChainPrior) and plan.prior.images_per_chain == 25:
            raise UsageError("the chain turned to NaN")
        return {"fd_identity": 1.0, "recall": 0.5, "effective_n": 5.0}

    scripted(monkeypatch, metrics)
    assert main(["search", "toy/dlg", CHAINS, *CHAIN_WORDS, f"out={tmp_path}"]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "no setting is eligible" in said and "worth 5 independent ones" in said
    assert "this inf (failed: the chain turned to NaN)" in said
    assert not (tmp_path / "best.yaml").exists()


@pytest.mark.parametrize(
    ("changed", "independent", "said"),
    [({}, {}, ""), ({"recall": 0.4}, {}, "recall of 0.400"), ({"recall": 0.44}, {}, ""),
     ({"near_repeats": 0.15}, {}, ""), ({"near_repeats": 0.17}, {}, "near repeats of 0.17"),
     ({"effective_n": 199}, {}, "2000 images that are worth 199"), ({"effective_n": 201}, {}, ""),
     ({"recall": 0.4, "neighbourhoods": 360}, {}, ""), ({"recall": 0.39, "neighbourhoods": 360}, {}, "recall of 0.390"),
     ({"recall": 0.0}, {"recall": None}, ""), ({"recall": None, "near_repeats": None}, {}, ""),
     ({"recall": 0.4, "chains": None, "effective_n": 1}, {}, "")],
)  # fmt: skip
def test_what_is_eligible(changed: dict[str, Any], independent: dict[str, float], said: str):
    """0.9 of the recall of independent images less two standard errors, here 0.022; 0.1 more near repeats; a tenth.

    The standard error is that of the images that recall is computed of: 0.026 for 360 held-out ones.
    """
    trial = {"n": 2000, "chains": changed.pop("chains", 40), "neighbourhoods": changed.pop("neighbourhoods", 2000)}
    metrics = {"recall": 0.5, "effective_n": 2000, "near_repeats": 0.0, **changed}
    found = exclusion({**trial, "metrics": metrics}, {"recall": 0.5, "near_repeats": 0.06, **independent})
    assert found == "" if said == "" else said in found
    assert exclusion({**trial, "metrics": {"recall": 0.0, "effective_n": 2000}}, {}) == ""


@pytest.mark.parametrize(
    ("words", "named"),
    [(["nfe=1"], "no setting of the space is possible; with the experiment's own settings: nfe=1 is below the minimum"),
     (["by_nfe={40: {prior: {chains: 4}}}"], "set prior.images_per_chain=100 and prior.chains=null")],
)  # fmt: skip
def test_a_budget_without_settings_is_named(tmp_path: Path, words: list[str], named: str, capsys):
    """And so is a number of chains that only a budget has."""
    assert main(["search", "toy/dlg", CHAINS, *CHAIN_WORDS, *words, f"out={tmp_path}"]) == 2
    assert named in capsys.readouterr().err.replace("\n", " ")


def test_the_best_of_many_is_confirmed_on_another_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The luckiest on the first seed is not the winner, and neither is one that was not among the best."""
    true = {"heun": 3.0, "dpmpp2m": 1.0, "ddim": 2.0}
    lucky = {"heun": 0.5, "dpmpp2m": 1.0, "ddim": 2.0}

    def metrics(plan: Plan, n: int, seed: int) -> dict[str, float]:
        name = {"Heun": "heun", "DPMSolverPP2M": "dpmpp2m"}.get(type(plan.solver).__name__, "ddim")
        return {"fd_identity": (lucky if seed == 7 else true)[name]}

    calls = scripted(monkeypatch, metrics)
    space = "search.space={solver.name: [heun, dpmpp2m, ddim]}"
    words = ["search", "toy/edm", space, "nfe=[8]", "n=400", "seed=7", "search.trials=3", "search.images=[50]",
             "search.keep=1", "search.confirm={best: 2, n: 80}", "solver=ddim"]  # fmt: skip
    assert main([*words, f"out={tmp_path / 'two'}"]) == 0
    assert winner(tmp_path / "two", 8)["solver"]["name"] == "dpmpp2m"
    assert [(n, seed) for _, n, seed in calls] == [(50, 7)] * 3 + [(80, 8)] * 2
    assert main([*words, "search.confirm.best=1", f"out={tmp_path / 'one'}"]) == 0
    assert winner(tmp_path / "one", 8)["solver"]["name"] == "heun"
    assert main([*words, "search.confirm.seed=7", f"out={tmp_path / 'same'}"]) == 2


def test_candidates_come_first_and_count_as_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After the experiment's own settings, and those of by_nfe; one that doesn't fit the budget is left out."""
    calls = scripted(monkeypatch, lambda plan, n, seed: {"fd_identity": float(plan.steps)})
    given = ("search.candidates=[{solver: {name: unipc2, variant: bh1, grid: {name: listed, gamma: 1.1}}}, "
             "{solver: heun}, {solver: {name: rk45}}, {prior: {name: gaussian, ratio_star: 20}}]")  # fmt: skip
    words = ["nfe=[6]", "n=400", "search.trials=7", "search.images=[50]", "search.confirm.best=1",
             "by_nfe={5: {solver: {name: ipndm}}}"]  # fmt: skip
    assert main(["search", "toy/edm", TOY, given, *words, f"out={tmp_path}"]) == 0
    drawn = [trial["drawn"] for trial in trials(tmp_path)]
    assert len(drawn) == len(calls) == 7
    assert [one["solver"]["name"] for one in drawn[:4]] == ["dpmpp2m", "ipndm", "unipc2", "heun"]
    assert drawn[2]["solver"]["variant"] == "bh1" and drawn[2]["solver"]["grid"] == {"name": "listed", "gamma": 1.1}
    assert drawn[4]["prior"]["ratio_star"] == 20 and drawn[4]["solver"]["name"] == "dpmpp2m"
    assert "fractions" in trials(tmp_path)[2]["settings"]["solver"]["grid"]


def test_a_candidate_s_grid_may_be_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Null as in a bench, and in the space too; gamma is in place of the levels of the experiment's own listed grid."""
    scripted(monkeypatch, lambda plan, n, seed: {"fd_identity": float(plan.steps)})
    given = ("search.candidates=[{solver: {name: heun, grid: null}}, {solver: {grid: {gamma: 1.1}}}]",
             "search.space={solver.grid: [null]}", "solver.grid={name: listed, ratio_cap: 20}")  # fmt: skip
    words = ["nfe=[6]", "n=400", "search.trials=4", "search.images=[50]", "search.confirm.best=1", f"out={tmp_path}"]
    assert main(["search", "toy/edm", *given, *words]) == 0
    grids = [trial["drawn"]["solver"].get("grid") for trial in trials(tmp_path)]
    assert grids == [{"name": "listed", "ratio_cap": 20}, None, {"name": "listed", "gamma": 1.1}, None]


@pytest.mark.parametrize(
    ("given", "named"),
    [("[{solvr: heun}]", "candidates.0"), ("[heun]", "candidates.0"), ("[{}]", "candidates.0"),
     ("[{solver: heunn}]", "did you mean 'heun'"), ("[{solver: {name: heun, rho: 3}}]", "'rho'"),
     ("[{prior: {ratio_stra: 3}}]", "'ratio_stra'"), ("[{solver: null}]", "candidates.0.solver=None"),
     ("[{solver: {grid: {name: karras, gamma: 1.1}}}]", "searched: give {name: listed, gamma: 1.1}, or remove gamma"),
     ("[{solver: {grid: {name: listed, gamma: 1.1, ratio_min: 0.1}}}]", "or remove gamma"),
     ("[{solver: {grid: {name: listed, gamma: no}}}]", "gamma, a positive number"),
     ("[{solver: {grid: {name: listed, gamma: null}}}]", "'gamma'")],
)  # fmt: skip
def test_a_mistake_in_a_candidate(tmp_path: Path, given: str, named: str, capsys):
    assert main(["search", "toy/edm", TOY, f"search.candidates={given}", f"out={tmp_path}"]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "trials.jsonl").exists()


def test_the_judge_of_a_search_is_not_one_of_the_table():
    """The extractor that was held back for cifar10_small; a judge that is reported is warned of, by its features."""
    config, name, note = search_judge(load("cifar10_small/edm_best"))
    assert (name, note) == ("cifar10_check", "") and config.extractors[0]["path"].endswith(
        "extractor_check.safetensors"
    )
    assert "cifar10_check" not in [one.name for one in build_extractors(load("cifar10_small/edm_best"))]
    for words, expected in (([], "digits"), (["search.judge=digits"], "digits")):
        _, name, note = search_judge(load("digits/edm", words))
        assert name == expected and "the winners' distance by digits is too low" in note
    same = load("digits/edm").extractor["path"]
    _, name, note = search_judge(load("digits/edm", [f"search.judge={{name: small, path: {same}}}"]))
    assert name == "digits" and note, "the same network by its file"
    _, name, note = search_judge(load("cifar10_small/edm_best", ["search.judge=mobilenetv2"]))
    assert name == "mobilenetv2" and note
    with pytest.raises(UsageError, match="search.judge='nobody': neither a judge .digits. nor an extractor"):
        search_judge(load("digits/edm", ["search.judge=nobody"]))


def test_all_searches_of_cifar10_small_have_equal_numbers():
    """Of trials, images and seeds: a method does not win by more trials."""
    searches = [load(f"cifar10_small/{name}", trains=False).search for name in ("edm_best", "dlg", "small_t_best")]
    assert all(search.space for search in searches)
    assert (
        len({(one.trials, *one.images, one.keep, *vars(one.confirm).values(), str(one.judge)) for one in searches}) == 1
    )
