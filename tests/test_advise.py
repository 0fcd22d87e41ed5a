"""Advice from points: the best within a budget, its error, ties, other judges, and what is not compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffaccel as da
from diffaccel import UsageError
from diffaccel.__main__ import main
from diffaccel.config import FLAGS, KEYS, load
from diffaccel.evaluation.scores import blocks_of
from diffaccel.metrics import paired_difference
from diffaccel.metrics.reference import read_reference
from diffaccel.parts.overrides import one_experiment
from diffaccel.report import append_point, read_points
from diffaccel.report.commands import command_of
from diffaccel.verbs.advise import advise

N = 300
pytestmark = pytest.mark.usefixtures("undrawn")
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "cifar10_small" / "results"


def point(method: str, nfe: float, fd: float, se: float = 0.1, **changes: Any) -> dict[str, Any]:
    """A point of an independent judge."""
    return {
        "method": method, "experiment": f"toy/{method}", "data": "toy", "prior": "gaussian", "solver": "heun",
        "settings": {"prior": {"name": "gaussian"}, "solver": {"name": "heun"}}, "nfe_budget": nfe, "nfe": nfe,
        "seconds_per_image": nfe / 100, "gflops_per_image": nfe / 10, "n": N, "seed": 0, "noise": "philox4x32-10",
        "device": "cpu", "metrics": {"fid": fd, "fid_se": se}, "key": f"{method}{nfe:g}", "words": [],
        "extractor": {"name": "inception", "sha256": "aa"}, "reference": {"name": "toy", "sha256": "bb"}, **changes,
    }  # fmt: skip


def method(candidate: Any) -> str:
    return str(candidate.point["method"])


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write points into a folder; returns the folder."""

    def run(*points: dict[str, Any], name: str = "run") -> str:
        for one in points:
            append_point(tmp_path / name / "points.jsonl", one)
        return str(tmp_path / name)

    return run


def judged(name: str, fd: float, se: float = 0.1) -> dict[str, Any]:
    key = "fid" if name == "inception" else f"fd_{name}"
    return {
        "metrics": {key: fd, f"{key}_se": se},
        "extractor": {"name": name, "sha256": name}, "reference": {"name": "toy", "sha256": f"r{name}"},
    }  # fmt: skip


def by(*judges: dict[str, Any]) -> dict[str, Any]:
    """Keys of a point of several judges, the first of which is at the top."""
    return {**judges[0], "judges": {one["extractor"]["name"]: one for one in judges}}


# The best, and how sure


def test_the_best_within_each_kind_of_budget(write: Write):
    folder = write(
        point("edm", 5, 9.0), point("edm", 10, 4.0), point("edm", 20, 2.0),
        point("dlg", 5, 7.0), point("dlg", 10, 5.0), point("dlg", 20, 3.0),
    )  # fmt: skip
    for budget in ({"nfe": 12}, {"seconds": 0.12}, {"gflops": 1.0}):
        found = advise([folder], **budget)
        assert (method(found.best), found.best.fd) == ("edm", 4.0) and not found.ties
        (other,) = found.others
        assert method(other.other) == "dlg" and other.fd == 1.0 and not other.paired
        assert other.se == pytest.approx(0.1 * 2**0.5) and other.z == pytest.approx(1 / (0.1 * 2**0.5))
        assert found.more is not None and method(found.more.other) == "edm" and found.more.fd == -2.0
        assert found.more.other.point["nfe"] == 20
    assert method(advise([folder], nfe=5).best) == "dlg"
    assert advise([folder], nfe=100).more is None


def test_a_cheaper_setting_of_a_strategy_counts_if_it_is_better(write: Write):
    found = advise([write(point("tdpm", 3, 2.0), point("tdpm", 10, 4.0), point("edm", 10, 3.0))], nfe=10)
    assert (found.best.point["nfe"], found.others[0].fd) == (3, 1.0)


def test_a_difference_below_two_errors_is_a_tie(write: Write):
    found = advise([write(point("edm", 10, 4.0), point("dlg", 10, 4.2), point("ddm", 10, 6.0))], nfe=10)
    assert [method(one.other) for one in found.ties] == ["dlg"]
    lines = "\n".join(found.lines())
    assert (
        "tie: dlg" in lines
        and "z = 1.4, independent errors" in lines
        and "better than ddm (heun, gaussian) by 2 ± 0.14" in lines
    )


def test_more_is_the_next_budget_that_is_clearly_better(write: Write):
    folder = write(point("edm", 10, 4.0), point("edm", 20, 3.9), point("dlg", 20, 3.95), point("dlg", 50, 2.0))
    found = advise([folder], nfe=10)
    assert found.more is not None and (method(found.more.other), found.more.other.point["nfe"]) == ("dlg", 50)
    assert "for more: dlg" in "\n".join(found.lines()) and "lower by 2 ±" in "\n".join(found.lines())


def test_more_by_another_cost_is_not_the_next_budget_in_evaluations(write: Write):
    """A setting with many cheap evaluations may cost less than one with few."""
    few = point("tdpm", 20, 3.0, seconds_per_image=0.5, gflops_per_image=50)
    folder = write(point("edm", 10, 4.0), few, point("dlg", 50, 2.0, seconds_per_image=0.2, gflops_per_image=5))
    for budget, expected in (({"seconds": 0.12}, "dlg"), ({"gflops": 2}, "dlg"), ({"nfe": 10}, "tdpm")):
        found = advise([folder], **budget)
        assert found.more is not None and method(found.more.other) == expected


def test_seeds_are_averaged(write: Write):
    folder = write(
        point("edm", 10, 4.0), point("edm", 10, 6.0, seed=1), point("dlg", 10, 4.5), point("dlg", 10, 4.7, seed=1)
    )
    found = advise([folder], nfe=10)
    assert (method(found.best), found.best.fd) == ("dlg", pytest.approx(4.6)) and len(found.best.rows) == 2
    assert found.best.se == pytest.approx(0.1 / 2**0.5)
    assert "mean of 2 seeds" in next(found.lines())


def test_common_noise_gives_the_paired_error(tmp_path: Path):
    """The error of metrics.paired_difference, from the features that the benches left."""
    statistics = [f"reference={tmp_path / 'reference.npz'}", f"floor={tmp_path / 'floor.npz'}"]
    assert main(["reference", "toy/edm", "data.n=400", *statistics]) == 0
    folders = []
    for solver in ("heun", "dpmpp2m"):
        folders.append(tmp_path / solver)
        words = [f"solver={solver}", "nfe=15", f"n={N}", "logger=none", *statistics, f"out={folders[-1]}"]
        assert main(["bench", "toy/edm", *words]) == 0
    found = da.advise(folders, nfe=20)
    (other,) = found.others
    points = {folder: read_points(folder / "points.jsonl")[0] for folder in folders}
    best, worse = sorted(folders, key=lambda folder: points[folder]["metrics"]["fd_identity"])
    x, y = (torch.from_numpy(np.load(one / "features" / f"{points[one]['key']}.npy")) for one in (worse, best))
    expected = paired_difference(
        x, y, blocks_of(torch.arange(N), None), read_reference(tmp_path / "reference.npz").moments
    )
    assert other.paired and other.fd == pytest.approx(expected.fd.item(), rel=1e-6)
    assert other.se == pytest.approx(expected.se.item(), rel=1e-6)
    independent = np.hypot(*(points[one]["metrics"]["fd_identity_se"] for one in folders))
    assert other.se < independent, "the common noise cancels"
    assert "paired by common noise" in "\n".join(found.lines())
    config = load(*one_experiment((found.command or "").split()[2:], KEYS, FLAGS))
    assert config.solver["name"] == found.best.point["solver"] and config.nfe == [15.0] and config.n == N


# What is not compared


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": 50}, "n 50, not 300"),
        ({"noise": "mt19937"}, "noise mt19937, not philox"),
    ],
)
def test_incomparable_points_are_left_out(write: Write, changes: dict[str, Any], said: str):
    folder = write(point("edm", 10, 4.0), point("dlg", 10, 5.0), point("ddm", 10, 1.0, **changes))
    notes: list[str] = []
    found = advise([folder], nfe=10, note=notes.append)
    assert method(found.best) == "edm" and [method(one.other) for one in found.others] == ["dlg"]
    assert any(said in note for note in notes), notes


def test_the_number_of_images_can_be_chosen(write: Write):
    folder = write(point("edm", 10, 4.0), point("dlg", 10, 5.0), point("ddm", 10, 9.0, n=50))
    assert method(advise([folder], nfe=10, n=50).best) == "ddm"
    with pytest.raises(UsageError, match=r"n=500 images; did you mean '50'\?"):
        advise([folder], nfe=10, n=500)


def test_seconds_of_another_device_are_not_compared(write: Write):
    folder = write(point("edm", 10, 4.0), point("dlg", 10, 5.0), point("ddm", 10, 1.0, device="gpu"))
    assert method(advise([folder], seconds=1).best) == "edm"
    assert method(advise([folder], nfe=10).best) == "ddm", "evaluations are"


def test_other_data_or_judges_are_never_mixed(write: Write):
    other, said = point("dlg", 10, 3.0, reference={"name": "other", "sha256": "cc"}), []
    advice = advise([write(other, point("edm", 10, 4.0))], nfe=10, note=said.append)
    assert method(advice.best) == "edm" and advice.others == []
    assert "1 of 2 points were not scored by" in said[0]
    jpeg = point("dlg", 10, 0, metrics={"fid_jpeg75": 1.0, "fid_jpeg75_inf": 1.0})
    with pytest.raises(UsageError, match="fid_jpeg75"):
        advise([write(point("edm", 10, 4.0), jpeg, name="jpeg")], nfe=10)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "advise requires one budget: nfe=10"),
        (["nfe=10", "seconds=1"], "advise requires one budget"),
        (["nfe=many"], "nfe='many': give a positive number"),
        (["nfe=3"], "no measured point costs at most nfe=3 per image: the lowest cost is 5 (edm (heun"),
        (["nfe=10", "judge=kid"], "judge=kid"),
        (["nfe=10", "jugde=inception"], "advise has no key 'jugde'; did you mean 'judge'?"),
    ],
)
def test_bad_words_are_one_line(write: Write, words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["advise", write(point("edm", 5, 4.0)), *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""


# Warnings


def test_judges_that_disagree_are_named(write: Write):
    folder = write(
        point("edm", 10, 0, **by(judged("inception", 4.0), judged("mobilenetv2", 9.0), judged("mine", 5.0))),
        point("dlg", 10, 0, **by(judged("inception", 5.0), judged("mobilenetv2", 7.0), judged("mine", 4.9))),
    )
    (first, second) = advise([folder], nfe=10).warnings
    assert first == "mobilenetv2 prefers dlg (heun, gaussian): lower by 2 ± 0.14 (independent errors)"
    assert second == "mine ranks first dlg (heun, gaussian): lower by 0.1 ± 0.14 (independent errors, a tie)"
    found = advise([folder], nfe=10, judge="mobilenetv2")
    assert method(found.best) == "dlg" and found.best.fd == 7.0
    assert found.warnings == ["inception prefers edm (heun, gaussian): lower by 1 ± 0.14 (independent errors)"]


def test_judges_of_ones_own_alone_are_said(write: Write):
    own = by(judged("mine", 4.0), judged("mine_check", 9.0))
    (warning,) = advise([write(point("edm", 10, 0, **own))], nfe=10).warnings
    assert warning.startswith("only judges that were trained here scored these points (mine, mine_check)")
    assert advise([write(point("edm", 10, 4.0), name="published")], nfe=10).warnings == []


def test_few_modes_and_repeats_are_said(write: Write):
    chain = {
        "fid": 4.0, "fid_se": 0.1, "recall": 0.4, "coverage": 0.79, "effective_n": 60.0,
        "near_repeats": 0.04, "near_repeats_real": 0.01,
    }  # fmt: skip
    other = {"fid": 5.0, "fid_se": 0.1, "recall": 0.6, "coverage": 0.8}
    folder = write(point("dlg", 10, 0, metrics=chain, chains=30, nfe_burn_in=3.0), point("edm", 10, 0, metrics=other))
    assert advise([folder], nfe=10).warnings == [
        "recall of dlg (heun, gaussian) is 0.4, of other strategies up to 0.6",
        "the images of dlg (heun, gaussian) depend on each other: 300 are worth 60 independent ones",
        "4.0% of the images of dlg (heun, gaussian) nearly repeat another one, of held-out images 1.0%",
        "dlg (heun, gaussian): 3 of 10 evaluations are burn-in of 30 chains, shared by 300 images: fewer images cost "
        "more each",
    ]


# Commands


def test_the_command_repeats_the_point():
    from diffaccel.report.points import normalised

    solver = {"name": "dpmpp2m", "lower_order_final": False, "grid": {"name": "karras", "rho": 5.0}}
    settings = {"prior": {"name": "gaussian", "ratio_star": None}, "solver": solver}
    command = command_of(normalised(point("edm", 10, 4.0, settings=settings, solver="dpmpp2m", precision="32-true")))
    assert command == (
        "diffaccel bench toy/edm nfe=10 n=300 seed=0 precision=32-true solver=dpmpp2m "
        "solver.lower_order_final=false solver.grid=karras solver.grid.rho=5.0 prior=gaussian prior.ratio_star=null"
    )
    config = load(*one_experiment(command.split()[2:], KEYS, FLAGS))
    assert config.solver == {**solver, "grid": {**solver["grid"]}} and config.prior["ratio_star"] is None
    assert command_of(normalised(point("edm", 10, 4.0, source="images"))) is None


def test_present_noise_and_published_judges_come_before_many_points(write: Write):
    """Of version 0.1 by a classifier of the images there may be more, which is what the shipped folders have."""
    former = [point("ddm", nfe, 0.1, noise="mt19937", **judged("mine", 0.1)) for nfe in (2, 5, 10, 20)]
    own = [point("dlg", nfe, 0, **judged("mine", 1.0)) for nfe in (5, 10, 20)]
    both = point("edm", 10, 0, **by(judged("mine", 3.0), judged("mobilenetv2_bilinear64", 2.0)))
    found = advise([write(*former, *own, both)], nfe=10)
    assert (method(found.best), found.best.key) == ("edm", "fd_mobilenetv2_bilinear64")
    assert not any("trained here" in warning for warning in found.warnings)
    assert method(advise([write(*former, *own, both, name="again")], nfe=10, judge="mine").best) == "dlg"
    former = [point("ddm", nfe, 1.0, noise="mt19937") for nfe in (2, 5, 10, 20)]
    notes: list[str] = []
    assert method(advise([write(*former, point("edm", 10, 4.0), name="one")], nfe=10, note=notes.append).best) == "edm"
    assert notes == ["4 points are not comparable and left out (noise mt19937, not philox4x32-10)"]


def test_a_command_that_gives_other_images_says_so(write: Write):
    found = advise([write(point("edm", 10, 4.0, noise="mt19937"))], nfe=10)
    assert found.warnings[-1].startswith("the command does not repeat edm (heun, gaussian) exactly: measured by")


def test_shipped_points(capsys: pytest.CaptureFixture[str]):
    folders = [str(RESULTS / name) for name in ("edm_best", "dlg", "ddm_best")]
    assert main(["advise", *folders, "nfe=5"]) == 0
    printed = capsys.readouterr()
    start = "best within 5 evaluations per image by efficientnet_lite0 (fd_efficientnet_lite0) (n=5000"
    assert printed.out.startswith(start)
    assert "repeat: diffaccel bench cifar10_small/" in printed.out and "for more: " in printed.out
    assert "warning: only judges that were trained here" not in printed.out
