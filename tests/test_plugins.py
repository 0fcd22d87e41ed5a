"""Parts of another package, under names of their own: found, fitted, resumed, benched and compared like ours."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.errors import UsageError
from diffaccel.experiment.identity import identify_images
from diffaccel.features.extractors import Identity
from diffaccel.features.jpeg import AsJPEG
from diffaccel.metrics.base import METRICS, build_metrics
from diffaccel.metrics.standard import FrechetMetric
from diffaccel.report import read_points
from diffaccel.solver import SOLVERS, Solver
from diffaccel.weights import open_weights

ROOT = Path(__file__).parents[1]
PACKAGE = "extra-parts"
MODULE = '''\
"""Parts that are not diffaccel's."""

from dataclasses import dataclass

from diffaccel.methods import DenoisingLangevinGibbs
from diffaccel.metrics.base import Metric
from diffaccel.prior import LangevinGibbsPrior
from diffaccel.solver import Solver
from diffaccel.solver.base import ddim_step


@dataclass(frozen=True)
class Repeated(Solver):
    """DDIM whose every prediction is made ``times`` times over.

    Attributes:
        times: Predictions of a step.

    References:
        None, of course
    """

    times: int = 2

    def predictions(self, steps):
        return self.times * steps

    def step(self, denoiser, x_t, t, s, trajectory):
        for _ in range(self.times):
            x_s = ddim_step(denoiser, x_t, t, s)[1]
        return x_s


class Walk(LangevinGibbsPrior):
    """A chain of its own."""


class FeatureNorm(Metric):
    """Mean norm of the features, to a power."""

    in_training = True

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def __call__(self, made, real):
        return {"feature_norm": float(made.features.norm(dim=1).mean()) ** self.power}

    def details(self, made, real):
        return {"feature_dim": made.features.shape[1]}


class Wandering(DenoisingLangevinGibbs):
    """A method of its own."""

    def __init__(self, remark: str = "", **parts) -> None:
        super().__init__(**parts)
        self.remark = remark

    def describe_fit(self, data):
        return [f"remark: {self.remark}", *super().describe_fit(data)]
'''
ENTRY_POINTS = {"solvers": "repeated", "priors": "walk", "metrics": "feature_norm", "methods": "wandering"}
CLASSES = {"repeated": "Repeated", "walk": "Walk", "feature_norm": "FeatureNorm", "wandering": "Wandering"}

CHAIN = {"chains": 10, "carry": False, "eta": 1.0, "share": 0.3, "init_steps": 4, "warmup": [[2, None]]}
TRAINING = {"lr": 0.002, "batch_size": 64, "decay": 0.0}  # a rate that doesn't depend on where the fit ends
COMMON: dict[str, Any] = {"n": 200, "nfe": [9], "seed": 3, "training": TRAINING}
FIRST, SECOND = 256, 512
"""Images of the fit that is cut short, and of the whole one."""
QUICK = ["logger=none", "threads=1"]

pytestmark = pytest.mark.usefixtures("undrawn")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package, the experiments and the runs are."""
    folder = tmp_path_factory.mktemp("plugins")
    site = folder / "site"
    info = site / f"{PACKAGE.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "extra_parts.py").write_text(MODULE)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
    groups = (f"[diffaccel.{group}]\n{name} = extra_parts:{CLASSES[name]}\n" for group, name in ENTRY_POINTS.items())
    (info / "entry_points.txt").write_text("\n".join(groups))
    for name, parts in EXPERIMENTS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"base": str(BASES / "dlg.yaml"), **COMMON, **parts}))
    return folder


BASES = ROOT / "experiments" / "digits"
FRECHET = ("fd_digits_inf", "fd_digits_se", "fd_digits_floor")
KID = ("kid", "kid_se", "kid_floor")
COMPUTED = ["frechet", "kid", {"name": "feature_norm", "power": 2.0}]
OWN = {
    "method": {"name": "wandering", "remark": "by another package"},
    "prior": {"name": "walk", **CHAIN, "init_solver": {"name": "repeated", "times": 1}},
    "metrics": COMPUTED,
}
OURS = {"prior": {"name": "chain", **CHAIN, "init_solver": {"name": "ddim"}}}
EXPERIMENTS: dict[str, dict[str, Any]] = {"own": OWN, "ours": OURS}


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Run the command line in an interpreter that has the package; it must succeed."""

    def run(*words: object) -> "subprocess.CompletedProcess[str]":
        path = os.pathsep.join([str(ROOT), str(folder / "site")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "diffaccel", *map(str, words)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def fitted(folder: Path, run: Run) -> Path:
    """The folder of a fit that was cut short and resumed."""
    out = folder / "fit"
    first = run("fit", "own.yaml", f"out={out}", f"images={FIRST}", *QUICK)
    assert f"{FIRST} images seen" in first.stderr
    second = run("fit", "own.yaml", f"out={out}", f"images={SECOND}", "resume=auto", *QUICK)
    assert "resuming from" in second.stderr and f"{SECOND} images seen" in second.stderr
    assert "remark: by another package" in second.stderr and "noise classifier: mean" in second.stderr
    return out


def only(folder: Path) -> dict[str, Any]:
    (point,) = read_points(folder / "points.jsonl")
    return point


def test_a_plugins_parts_are_listed_and_explained(run: Run):
    for group, name in (("metric", "feature_norm"), ("method", "wandering")):
        printed = " ".join(run("list", group).stdout.split())
        assert f"plugin '{name}' (extra_parts:{CLASSES[name]}) of package '{PACKAGE}'" in printed
    solver = run("explain", "solver", "repeated").stdout
    assert PACKAGE in solver and "extra_parts.Repeated" in solver
    assert "Predictions of a step" in solver and "None, of course" in solver
    prior = run("explain", "prior", "walk").stdout
    assert PACKAGE in prior and "burn_in_counted" in prior and "checkpoint" in prior


def test_a_plugins_method_and_prior_fit_and_resume_as_dlg_does(folder: Path, fitted: Path):
    """The classifier of a fit in two halves under other names is, to the bit, that of DLG's fit in one go."""
    assert main(["fit", str(folder / "ours.yaml"), f"out={folder / 'ours_fit'}", f"images={SECOND}", *QUICK]) == 0
    ours, own = (open_weights(out / "classifier.safetensors") for out in (folder / "ours_fit", fitted))
    assert ours.kind == own.kind == "classifier"
    theirs, tensors = ours.read(), own.read()
    assert theirs.keys() == tensors.keys() and all((theirs[key] == tensors[key]).all() for key in theirs)
    at_the_end, expected = read_points(fitted / "points.jsonl")[-1], only(folder / "ours_fit")
    assert at_the_end["method"] == "wandering" and at_the_end["prior"] == "walk"
    assert at_the_end["images_sha256"] == expected["images_sha256"]


@pytest.fixture(scope="module")
def benched(folder: Path, run: Run) -> dict[str, Path]:
    """The folder of each experiment's bench."""
    for name in EXPERIMENTS:
        run("bench", f"{name}.yaml", f"out={folder / name}", "logger=csv", "threads=1")
    return {name: folder / name for name in EXPERIMENTS}


def test_a_plugins_prior_and_method_give_dlgs_point(benched: dict[str, Path]):
    own, ours = only(benched["own"]), only(benched["ours"])
    assert (own["method"], own["prior"]) == ("wandering", "walk") and (ours["method"], ours["prior"]) == (
        "dlg",
        "chain",
    )
    for key in ("images_sha256", "nfe", "nfe_burn_in", "nfe_sequential", "evaluations", "chains", "chain", "plan"):
        assert own[key] == ours[key], key
    assert "fd_digits" in ours["metrics"] and own["metrics"].keys() == {"fd_digits", *FRECHET, *KID, "feature_norm"}
    shared = own["metrics"].keys() & ours["metrics"].keys()
    assert {key: own["metrics"][key] for key in shared} == {key: ours["metrics"][key] for key in shared}
    assert own["metrics"]["feature_norm"] > 0 and own["feature_dim"] == own["extractor"]["dim"]
    header, values = (benched["own"] / "curve.csv").read_text().splitlines()
    assert "feature_norm" in header and "wandering" in values


def test_the_fitted_weights_are_benched(folder: Path, fitted: Path, run: Run):
    out = folder / "benched"
    words = [f"posterior.checkpoint={fitted / 'classifier.safetensors'}", "solver=repeated", "solver.times=3"]
    printed = run("bench", "own.yaml", f"out={out}", *words, *QUICK).stdout
    point = only(out)
    assert "feature_norm" in point["metrics"] and "feature_norm" in printed
    assert point["solver"] == "repeated" and point["settings"]["solver"]["times"] == 3
    again = run("bench", "own.yaml", f"out={out}", *words, *QUICK)
    assert "measured before" in again.stderr and only(out) == point


def test_a_plugins_solver_is_counted_as_it_counts(folder: Path, run: Run):
    """Every prediction made twice: the images of half the budget, and twice the evaluations."""
    for name, words in {"twice": ["solver=repeated", "nfe=8"], "once": ["solver=ddim", "nfe=4"]}.items():
        run("bench", "digits/edm", "n=20", f"out={folder / name}", *words, *QUICK)
    twice, once = only(folder / "twice"), only(folder / "once")
    assert twice["images_sha256"] == once["images_sha256"] and twice["nfe"] == 8 == 2 * once["nfe"]
    assert "feature_norm" not in twice["metrics"]


def test_a_plugins_points_are_compared(folder: Path, benched: dict[str, Path], run: Run):
    """Both in the table, and paired: images of the same noise that are equal differ by nothing."""
    page = folder / "page"
    said = run("compare", benched["ours"], benched["own"], f"out={page}")
    assert "dlg" in said.stdout and "wandering" in said.stdout and not said.stderr.strip()
    with (page / "compare.csv").open() as file:
        ours, own = csv.DictReader(file)
    assert "dlg" in ours["run"] and "wandering" in own["run"]
    assert float(own["difference"]) == 0.0
    assert float(own["feature_norm"]) > 0 and ours["feature_norm"] == ""


# What counts is what a part is, not its name


class Tabled(Solver):
    """Reads a file."""

    def __init__(self, table: Path | None = None) -> None: ...

    def step(self, denoiser: Any, x_t: Any, t: Any, s: Any, trajectory: Any) -> Any:
        return x_t


def test_a_file_that_a_plugins_part_reads_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A point is measured anew once the file is another, and is the same where the same file lies elsewhere."""
    monkeypatch.setitem(SOLVERS._factories, "tabled", Tabled)

    def identity(file: Path, content: str) -> dict[str, Any]:
        file.write_text(content)
        return identify_images(load("digits/edm", ["solver=tabled", f"solver.table={file}"]))(5)

    first = identity(tmp_path / "a", "1")
    assert first == identity(tmp_path / "b", "1") != identity(tmp_path / "a", "2")
    (tmp_path / "folder").mkdir()
    named = identify_images(load("digits/edm", ["solver=tabled", f"solver.table={tmp_path / 'folder'}"]))(5)
    assert named["settings"]["solver"]["table"] == str(tmp_path / "folder")


def test_a_distance_under_another_name_is_one_that_tables_show(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METRICS._factories, "my_frechet", type("MyFrechet", (FrechetMetric,), {}))
    assert [type(metric).__name__ for metric in build_metrics(["my_frechet", "kid"])] == ["MyFrechet", "KernelMetric"]
    with pytest.raises(UsageError, match="'frechet' is missing"):
        build_metrics(["kid"])


def test_points_by_another_name_are_not_compressed():
    points = type("Points", (Identity,), {})(2)
    points.name = "points"
    with pytest.raises(UsageError, match="an extractor of images"):
        AsJPEG(points, 75)
