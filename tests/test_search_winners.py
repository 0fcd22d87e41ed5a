"""The experiment that a search writes: it means the winners, with the weights and settings of the command line."""

from pathlib import Path
from typing import Any

import pytest
from test_search import TOY
from test_search_choice import scripted, winner

from diffaccel.__main__ import main
from diffaccel.config import EXPERIMENTS, find, load, to_yaml
from diffaccel.errors import UsageError
from diffaccel.evaluation.winners import Winners
from diffaccel.experiment import build_frozen
from diffaccel.experiment.identity import searched_with
from diffaccel.solver import SOLVERS

GAUSSIAN = {"name": "gaussian"}
BASE = """\
base: EXPERIMENTS/toy/edm.yaml
prior: {name: gaussian, ratio_star: 20}
solver:
  {name: dpmpp2m, denoise: false, analytic_first: 0.5, grid: {name: listed, ratio_cap: 20, fractions: [0.0, 0.5, 1.0]}}
"""
NAMELESS = "base: EXPERIMENTS/toy/edm.yaml\nsolver: {grid: {rho: 3}}\n"
BY_NFE = """\
base: EXPERIMENTS/toy/edm.yaml
by_nfe:
  5: {solver: {analytic_first: 0.5, grid: {rho: 4}}}
  8: {prior: {ratio_star: 20}, solver: {name: heun, grid: {name: time, ratio_min: 0.1}}}
"""


def written(path: Path, content: str) -> Path:
    path.write_text(content.replace("EXPERIMENTS", str(EXPERIMENTS)))
    return path


@pytest.mark.parametrize(
    ("content", "words", "solver"),
    [(BASE, ["solver=ddim"], {"name": "dpmpp2m"}),
     (BASE, [], {"name": "dpmpp2m", "grid": {"name": "listed", "fractions": [0.0, 0.3, 1.0]}}),
     (BASE, [], {"name": "dpmpp2m", "grid": {"rho": 5}}),
     (BASE, ["solver.denoise=true"], {"name": "heun"}),
     (NAMELESS, [], {"name": "dpmpp2m", "grid": {"name": "log_snr"}}),
     (BY_NFE, ["solver.grid.ratio_cap=30"], {"name": "dpmpp2m", "grid": {"name": "time"}}),
     (BY_NFE, ["by_nfe={}"], {"name": "dpmpp2m"})],
)  # fmt: skip
def test_the_file_means_the_winner(tmp_path: Path, content: str, words: list[str], solver: dict[str, Any]):
    """Whatever keys the experiment sets besides, which by_nfe is merged into."""
    base = written(tmp_path / "base.yaml", content)
    searched = load(str(base), words)
    path, settings = tmp_path / "out" / "best.yaml", {"prior": GAUSSIAN, "solver": solver}
    Winners(path, base, lambda budget: own(searched, budget), searched_with(searched), "abc").write(
        5, settings, ["a=1"]
    )
    found = load(str(path))
    assert SOLVERS.build(found.at(5)["solver"]) == SOLVERS.build(solver)
    assert found.at(5)["prior"].get("ratio_star") is None
    assert SOLVERS.build(found.at(8)["solver"]) == SOLVERS.build(
        searched.at(8)["solver"] if 8 in found.by_nfe else solver
    )
    assert found.tuned_for == ["a=1"] and found.searched and found.search.identity == "abc"


def own(config: Any, budget: float) -> dict[str, Any]:
    return config.at(budget) if budget < 1e9 else {"prior": config.prior, "solver": config.solver}


def test_the_file_keeps_the_settings_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """So that a bench measures what was searched; a search with other ones does not add to it."""
    calls = scripted(monkeypatch, lambda plan, n, seed: {"fd_identity": float(plan.steps)})
    words = ["search", "toy/edm", TOY, "n=20", "search.trials=3", "search.images=[20]", f"out={tmp_path}", "nfe=5"]
    assert main([*words, "tweedie_ratio=0.5", "seed=3"]) == 0
    found = load(str(tmp_path / "best.yaml"))
    assert found.tweedie_ratio == 0.5 and found.seed == 0 and found.nfe != [5]
    capsys.readouterr()
    content = (tmp_path / "best.yaml").read_text()
    for other in (
        [],
        ["tweedie_ratio=0.5", f"reference={EXPERIMENTS / 'toy' / 'weights' / 'floor.npz'}", "floor=null"],
    ):
        assert main([*words, *other, "seed=3"]) == 2
        assert "measured with other parts, weights or statistics" in capsys.readouterr().err.replace("\n", " ")
    assert (tmp_path / "best.yaml").read_text() == content
    before = len(calls)
    assert main([*words, "tweedie_ratio=0.5", "seed=3"]) == 0
    assert len(calls) == before


def test_trials_are_those_of_the_same_settings_weights_and_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Anything that determines a distance is in the key of a trial; again=true measures all of them again."""
    calls = scripted(monkeypatch, lambda plan, n, seed: {"fd_identity": float(plan.steps)})
    words = ["search", "toy/edm", TOY, "nfe=5", "n=20", "search.trials=2", "search.images=[20]", f"out={tmp_path}",
             "search.confirm.best=1"]  # fmt: skip
    statistics = [f"reference={EXPERIMENTS / 'toy' / 'weights' / 'floor.npz'}", "floor=null"]
    for number, (other, new) in enumerate(
        (([], 2), (["n=30"], 0), (["tweedie_ratio=0.5"], 2), (statistics, 2), (["again=true"], 2))
    ):
        before = len(calls)
        assert main([*words, *other]) == 0, number
        assert len(calls) - before == new, number
        (tmp_path / "best.yaml").unlink()  # as after an interrupt


def test_a_listed_grid_is_searched_again_for_another_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Because its number of steps is that of the plan for these images."""
    calls = scripted(monkeypatch, lambda plan, n, seed: {"fd_identity": float(plan.steps)})
    words = ["search", "toy/edm", "search.space={solver.grid.name: [listed]}", "nfe=5", "search.trials=2",
             "search.images=[20]", "search.confirm.best=1", f"out={tmp_path}"]  # fmt: skip
    assert main([*words, "n=20"]) == main([*words, "n=30"]) == 0
    assert len(calls) == 2 + 1


GENERATOR = "{name: implicit, ratio_star: 1.0, network: {name: mlp}, checkpoint: weights/generator.safetensors}"


@pytest.mark.parametrize("where", ["candidates", "by_nfe"])
def test_a_winner_with_weights_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    """Its file is found from any folder, and the settings are for these weights too."""
    scripted(monkeypatch, lambda plan, n, seed: {"fd_identity": 0.0 if plan.prior.networks() else 1.0})
    (tmp_path / "mine" / "weights").mkdir(parents=True)
    weights = tmp_path / "mine" / "weights" / "generator.safetensors"
    weights.write_bytes((EXPERIMENTS / "toy" / "weights" / "tdpm_generator.safetensors").read_bytes())
    entry = f"[{{prior: {GENERATOR}}}]" if where == "candidates" else f"{{5: {{prior: {GENERATOR}}}}}"
    key = "search: {candidates: ENTRY}" if where == "candidates" else "by_nfe: ENTRY"
    written(tmp_path / "mine" / "edm.yaml", f"base: EXPERIMENTS/toy/edm.yaml\n{key.replace('ENTRY', entry)}\n")
    monkeypatch.chdir(tmp_path)
    words = ["search.space={solver.name: [heun]}", "search.trials=3", "search.images=[20]", "nfe=5", "n=20"]
    assert main(["search", "mine/edm.yaml", *words, "out=runs/found"]) == 0
    monkeypatch.chdir(tmp_path / "mine")
    found = load("../runs/found/best.yaml")
    assert Path(found.at(5)["prior"]["checkpoint"]).samefile(weights)
    assert {one.partition("=")[0] for one in found.tuned_for} == {"denoiser", "generator"}
    assert build_frozen(found).tuned


def test_a_winner_needs_its_own_weights(tmp_path: Path, capsys: Any):
    """Settings that were searched for another generator are ignored, also if only a budget has it."""
    weights = EXPERIMENTS / "toy" / "weights" / "tdpm_generator.safetensors"
    prior = GENERATOR.replace("weights/generator.safetensors", str(weights))
    content = f"base: EXPERIMENTS/toy/edm.yaml\ntuned_for: TUNED\nby_nfe: {{5: {{prior: {prior}}}}}\n"
    hashes = build_frozen(load(str(written(tmp_path / "plain.yaml", content.replace("TUNED", "[]"))))).weights_sha256()
    assert [one.partition("=")[0] for one in hashes] == ["denoiser", "generator"]
    for number, tuned_for in enumerate((hashes, [hashes[0], "generator=0123456789abcdef"])):
        file = written(tmp_path / "best.yaml", content.replace("TUNED", str(tuned_for)))
        sampler = build_frozen(load(str(file)))
        assert sampler.tuned == bool(sampler.by_nfe) == (not number)
    assert "searched for another generator" in capsys.readouterr().err


# What counts as searched


SEARCHED = """\
base: EXPERIMENTS/toy/edm.yaml
tuned_for: [denoiser=0123456789abcdef]
by_nfe:
  5: {prior: {name: gaussian, ratio_star: 20}, solver: {name: ddim}}
  8: {solver: {name: heun}}
"""


@pytest.mark.parametrize(
    ("words", "searched"),
    [([], True), (["nfe=5", "tweedie_ratio=0.1"], True), (["solver=heun"], False), (["solver.grid.rho=3"], False),
     (["prior.ratio_star=10"], False), (["by_nfe.5.solver=heun"], False), (["prior=gaussian"], True)],
)  # fmt: skip
def test_settings_are_searched_unless_something_is_laid_over_them(tmp_path: Path, words: list[str], searched: bool):
    """As the run's configuration also says, which is read in place of the file."""
    config = load(str(written(tmp_path / "best.yaml", SEARCHED)), words)
    assert config.searched is searched
    (tmp_path / "config.yaml").write_text(to_yaml(config, tmp_path))
    again = load(str(tmp_path / "config.yaml"))
    assert again.searched is searched and bool(again.tuned_for) is searched and again.by_nfe == config.by_nfe


@pytest.mark.parametrize(
    ("own", "at_five", "searched"),
    [("solver: {name: heun}\nprior: {ratio_star: 10}", ("heun", 10), False), ("n: 20", ("ddim", 20), True),
     ("by_nfe: {5: {solver: {name: dpm2}}}", ("dpm2", 20), False),
     ("solver: heun\nby_nfe: {5: {solver: {name: dpm2}}}", ("dpm2", 20), False),
     ("by_nfe: null\nsolver: heun", ("heun", None), False)],
)  # fmt: skip
def test_a_file_s_own_solver_applies_to_the_budgets_of_its_base(
    tmp_path: Path, own: str, at_five: tuple[str, int | None], searched: bool
):
    """As the command line's does; settings of a budget in the same file are over them."""
    written(tmp_path / "best.yaml", SEARCHED)
    config = load(str(written(tmp_path / "own.yaml", f"base: best.yaml\n{own}\n")))
    settings = config.at(5)
    assert (settings["solver"]["name"], settings["prior"].get("ratio_star")) == at_five
    assert config.searched is searched


def test_a_chain_may_be_a_candidate_of_another_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A candidate may need the posterior that the experiment's own prior does without."""
    scripted(monkeypatch, lambda plan, n, seed: {"fd_identity": float(plan.chain_steps == 0)})
    chain = "[{prior: {name: chain, images_per_chain: 10, eta: 0.5}}]"
    words = ["search.space={solver.name: [heun]}", "search.trials=3", "search.images=[100]", "nfe=20", "n=100"]
    file = written(tmp_path / "edm.yaml", "base: EXPERIMENTS/toy/dlg.yaml\nmethod: diffusion\nprior: gaussian\n")
    assert main(["search", str(file), f"search.candidates={chain}", *words, f"out={tmp_path}"]) == 0
    assert winner(tmp_path, 20)["prior"]["name"] == "chain"


def test_a_file_of_another_search_is_refused(tmp_path: Path):
    """By its base, or as it is no experiment."""
    for content in ("base: other.yaml\nby_nfe: {}\n", "[1, 2", "- 1\n"):
        path = tmp_path / "best.yaml"
        path.write_text(content)
        with pytest.raises(UsageError, match="is not from a search of"):
            Winners(path, find("toy/edm"), lambda budget: {}, {}, "abc")
