"""Sweep files: what they stand for, and their runs on this machine, which kills do not lose."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_evaluator import framed_records
from test_wandb import wandb_files

import diffaccel as da
from diffaccel import experiment
from diffaccel.__main__ import main
from diffaccel.config import EXPERIMENTS, load
from diffaccel.config.sweep import CONTINUOUS, FORMS, read_sweep, sweep_names
from diffaccel.errors import UsageError
from diffaccel.report import read_points
from diffaccel.verbs import sweep as verb

ROOT = Path(__file__).parent.parent
COMMAND = ["diffaccel", "bench", "${args_no_hyphens}"]


def written(folder: Path, parameters: dict[str, Any], **keys: Any) -> Path:
    file = folder / "own.yaml"
    file.write_text(
        yaml.safe_dump({"method": "grid", "command": COMMAND, "parameters": parameters, **keys}, sort_keys=False)
    )
    return file


# The shipped sweeps


def test_there_are_sweeps():
    assert set(sweep_names()) == {"methods", "solvers", "dlg", "tdpm"}


@pytest.mark.parametrize("name", sweep_names())
def test_a_shipped_sweep_expands_and_every_curve_can_spend_its_budgets(name: str, tmp_path: Path):
    runs = verb.plan(read_sweep(name), [], tmp_path)
    assert len({tuple(run.words) for run in runs}) == len(runs) > 40
    curves: dict[Path, verb.Run] = {}
    for run in runs:
        curves.setdefault(run.config.folder, run)
    for run in runs[:: len(runs) // 5]:
        assert load(None, run.words[1:]) == run.config, "the command is the configuration"
    for run in list(curves.values())[:15]:
        sampler = experiment.build_frozen(run.config, load=False)
        for budget in {run.config.nfe[0] for run in runs}:
            assert sampler.plan(budget, run.config.n).steps >= 0


@pytest.mark.parametrize("name", sweep_names())
def test_a_shipped_sweep_is_one_for_the_agent_of_wandb(name: str):
    """Which takes the program from the file, and optimises a value that a run logs under this name."""
    tree = yaml.safe_load((EXPERIMENTS / "sweeps" / f"{name}.yaml").read_text())
    assert tree["program"] == "diffaccel" and tree["command"] == COMMAND
    assert tree["metric"] == {"name": "fd_cifar10", "goal": "minimize"}


def test_a_sweep_is_no_experiment(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "sweeps/solvers"]) == 2
    assert "run it with `diffaccel sweep" in capsys.readouterr().err


# What a file stands for


def test_a_grid_has_all_combinations(tmp_path: Path):
    parameters = {
        "method": {"value": "edm"},
        "solver": {"parameters": {"name": {"values": ["heun", "ddim"]}, "denoise": {"value": True}}},
        "nfe": {"values": [5, 10]},
        "seed": {"min": 1, "max": 3},
    }
    runs = read_sweep(written(tmp_path, parameters)).runs()
    assert len(runs) == 12 and len({json.dumps(run) for run in runs}) == 12
    assert runs[0] == {"method": "edm", "solver": {"name": "heun", "denoise": True}, "nfe": 5, "seed": 1}
    assert [run["seed"] for run in runs[:4]] == [1, 2, 3, 1]
    assert read_sweep(written(tmp_path, parameters, run_cap=5)).runs() == runs[:5]
    assert read_sweep(written(tmp_path, parameters)).runs(2) == runs[:2]


@pytest.mark.parametrize("form", FORMS)
def test_words_are_those_of_wandb(form: str, tmp_path: Path):
    agent = pytest.importorskip("wandb.sdk.launch.sweeps.utils").create_sweep_command_args
    values = {
        "solver": {"name": "heun", "denoise": True},
        "carry": True,
        "again": False,
        "limit": None,
        "nfe": [5, 1e-05],
    }
    sweep = read_sweep(written(tmp_path, {"seed": {"value": 1}}, command=["env", "diffaccel", "bench", "n=3", form]))
    expected = agent({"args": {key: {"value": value} for key, value in values.items()}})[form[2:-1]]
    assert sweep.words(values) == ["bench", "n=3", *expected]


def test_draws_are_the_same_again_and_a_longer_sweep_begins_with_a_shorter_one(tmp_path: Path):
    parameters = {"a": {"min": 0.0, "max": 1.0}, "b": {"values": ["x", "y"], "probabilities": [0.9, 0.1]}}
    sweep = read_sweep(written(tmp_path, parameters, method="random", run_cap=400))
    runs = sweep.runs()
    assert len(runs) == 400 and sweep.runs(10) == runs[:10] and sweep.runs(500)[:400] == runs
    assert 330 < Counter(run["b"] for run in runs)["x"] < 390
    other = read_sweep(written(tmp_path, {**parameters, "c": {"value": 1}}, method="random", run_cap=3))
    assert other.runs()[0]["a"] != runs[0]["a"]
    assert len({run["a"] for run in runs}) == 400


MEDIANS = {
    "uniform": ({"min": 2, "max": 6}, 4.0),
    "log_uniform": ({"min": 0, "max": 2}, np.e),
    "log_uniform_values": ({"min": 0.01, "max": 100}, 1.0),
    "inv_log_uniform": ({"min": 0, "max": 2}, 1 / np.e),
    "inv_log_uniform_values": ({"min": 0.01, "max": 100}, 1.0),
    "normal": ({"mu": 3, "sigma": 0.5}, 3.0),
    "log_normal": ({"mu": 1, "sigma": 0.5}, np.e),
    "beta": ({"a": 2, "b": 2}, 0.5),
}
"""Distribution -> its parameters, and its median in closed form."""


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_distribution_has_its_median_and_its_range(name: str, tmp_path: Path):
    spec, median = MEDIANS[name]
    sweep = read_sweep(written(tmp_path, {"x": {"distribution": name, **spec}}, method="random"))
    drawn = np.array([run["x"] for run in sweep.runs(1500)])
    below = (drawn < median).mean()
    assert abs(below - 0.5) < 4 * np.sqrt(0.25 / 1500), below
    if "values" in name or name == "uniform":
        assert drawn.min() >= spec["min"] and drawn.max() <= spec["max"]
    quantised = read_sweep(written(tmp_path, {"x": {"distribution": f"q_{name}", **spec, "q": 0.25}}, method="random"))
    drawn = np.array([run["x"] for run in quantised.runs(50)])
    np.testing.assert_allclose(drawn / 0.25, (drawn / 0.25).round(), atol=1e-9)


@pytest.mark.parametrize(
    ("parameters", "keys", "named"),
    [
        ({"n": 3}, {}, "give a mapping, {value: 3}"),
        ({"n": {"values": 3}}, {}, "give a list"),
        ({"n": {"values": []}}, {}, "give a list"),
        ({"n": {"min": 0.1, "max": 1.0}}, {}, "a grid requires a list of values, not the distribution uniform"),
        ({"n": {"min": 1}}, {"method": "random"}, "the distribution uniform requires max"),
        ({"n": {"min": "1e-3", "max": 1}}, {"method": "random"}, "'1e-3' is not a number (YAML requires 1.0e-3"),
        ({"n": {"min": 3, "max": 1}}, {"method": "random"}, "min=3 is above max=1"),
        ({"n": {"min": 0, "max": 1, "distribution": "log_uniform_values"}}, {"method": "random"}, "has no logarithm"),
        ({"n": {"min": 0, "max": 1, "distribution": "log_unifrom"}}, {"method": "random"}, "did you mean 'log_uniform"),
        ({"n": {"values": [1, 2], "probabilities": [1.0]}}, {"method": "random"}, "one for each value"),
        ({"n": {"value": 1}}, {"method": "random"}, "requires a number of runs: set count=, or run_cap"),
        ({"n": {"value": 1}}, {"method": "gird"}, "did you mean 'grid'"),
        ({"n": {"value": 1}}, {"run_cap": 0}, "run_cap=0"),
        ({"n": {"value": 1}}, {"comand": []}, "did you mean 'command'"),
        ({"n": {"value": 1}}, {"command": ["python", "train.py", "${args}"]}, "no command of diffaccel"),
        ({"n": {"value": 1}}, {"command": ["diffaccel", "bench"]}, "no command of diffaccel"),
        ({"n": {"value": 1}}, {"command": ["diffaccel", "bench", "${arg}"]}, "did you mean '${args}'"),
        ({"n": {"value": 1}}, {"command": ["diffaccel", "fit", "${args}"]}, "only sweeps of bench run here"),
        ({"method": {"value": "edm"}, "data": {"values": ["toy", "tpy"]}}, {}, "(data=tpy): experiment 'tpy/edm'"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_line(
    parameters: dict[str, Any], keys: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["sweep", str(written(tmp_path, parameters, **keys)), f"out={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr()
    assert named in printed.err and printed.err.count("\n") == 1, printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "sweep requires a file"),
        (["solvers", "methods"], "sweep requires a file"),
        (["solver"], "did you mean 'solvers'"),
        (["solvers", "processes=two"], "processes=two"),
        (["solvers", "processes=0"], "positive"),
        (["solvers", "slover=heun"], "did you mean 'solver'"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["sweep", *words, f"out={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr().err
    assert named in printed and printed.count("\n") == 1


def test_a_setting_replaces_a_parameter_and_a_dry_run_prints_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["sweeps/methods", "--method=edm", "seed=1", "--nfe", "5,10", "--dry-run", f"--out={tmp_path}"]
    assert main(["sweep", *words]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("diffaccel bench data=cifar10_small method=edm seed=1 nfe=5,10 dry_run=true out=")


SOLVERS = {"data": {"value": "digits"}, "method": {"value": "edm"}, "solver": {"values": ["ddim", "heun"]}}
CHAINS = {"data": {"value": "digits"}, "method": {"value": "dlg"}, "prior.chains": {"values": [3, 6]}}


@pytest.mark.parametrize(
    ("parameters", "word", "runs"),
    [
        (SOLVERS, "solver.name=dpmpp2m", None),
        ({**SOLVERS, "solver.name": {"value": "dpmpp2m"}}, "nfe=5", None),
        ({**SOLVERS, "solver": {"values": [{"name": "ddim", "eta": 0.5}, {"name": "heun"}]}}, "solver.eta=1", None),
        (SOLVERS, "solver.grid.rho=3", 2),
        (SOLVERS, "solver=heun", 1),
        (CHAINS, "chains=20", 1),
        ({**CHAINS, "chains": {"values": [4, 5]}, "prior.chains": {"value": 3}}, "prior.chains=20", 1),
    ],
)
def test_a_run_is_shown_under_values_that_have_an_effect(
    parameters: dict[str, Any], word: str, runs: int | None, tmp_path: Path
):
    sweep = read_sweep(written(tmp_path, parameters))
    if runs is not None:
        planned = verb.plan(sweep, [word], tmp_path)
        assert len(planned) == runs and all(bool(run.values) is (runs > 1) for run in planned)
        return
    with pytest.raises(UsageError, match=r"run 1 .*another setting of the run replaces solver=.*: set solver="):
        verb.plan(sweep, [word], tmp_path)


def test_runs_that_differ_in_budget_and_seed_share_a_folder(tmp_path: Path):
    parameters = {"data": {"value": "toy"}, "method": {"values": ["edm", "ddpm"]}, "seed": {"values": [1, 2]}}
    sweep = read_sweep(written(tmp_path, {**parameters, "nfe": {"values": [5, 10]}}))
    folders = [run.config.folder for run in verb.plan(sweep, [], tmp_path)]
    assert sorted(Counter(folders).values()) == [4, 4]
    other = [run.config.folder for run in verb.plan(sweep, ["logger=none", "threads=1", "nfe=3"], tmp_path)]
    assert set(other) == set(folders), "what does not change a point is not in the name"
    assert not {run.config.folder for run in verb.plan(sweep, ["n=100"], tmp_path)} & set(folders)


# Runs

PARAMETERS = {
    "data": {"value": "digits"},
    "method": {"values": ["edm", "ddpm"]},
    "nfe": {"values": [3, 4]},
    "n": {"value": 60},
}


def points_in(out: Path) -> list[tuple[str, float]]:
    found = [point for file in out.glob("*/points.jsonl") for point in read_points(file)]
    return sorted((point["method"], point["nfe_budget"]) for point in found)


def test_a_sweep_that_is_interrupted_and_killed_runs_the_rest_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out, file = tmp_path / "out", written(tmp_path, PARAMETERS, name="mine")
    command = [sys.executable, "-m", "diffaccel", "sweep", str(file), f"out={out}"]

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for number, sent in ((1, signal.SIGINT), (2, signal.SIGKILL)):
        process, deadline = start(), time.monotonic() + 200
        while len(points_in(out)) < number:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(sent)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL), said
        last = time.monotonic() + 10
        while busy(out):
            assert time.monotonic() < last, "a run outlives its sweep"
            time.sleep(0.05)
    before = len(points_in(out))
    assert 2 <= before < 4
    process = start()
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert f"mine: 4 runs, of which {before} were measured before" in said
    expected = [(method, nfe) for method in ("ddpm", "edm") for nfe in (3, 4)]
    assert points_in(out) == expected, "each once"
    assert len([line for line in printed.splitlines() if line.split()[:1] in (["1"], ["2"], ["3"], ["4"])]) == 4
    assert "lowest fd_digits" in printed
    files = out.glob("*/wandb/offline-run-*/run-*.wandb")
    records = [record for file in files for record in framed_records(file)]  # of killed runs too, which have no end
    groups = {record.run.run_group for record in records if record.WhichOneof("record_type") == "run"}
    assert groups == {"sweep mine"}
    monkeypatch.setattr(verb._Runner, "_one_by_one", None)
    points = da.sweep(file, out=out)
    assert [(point["method"], point["nfe"]) for point in points] == [("edm", 3), ("edm", 4), ("ddpm", 3), ("ddpm", 4)]
    assert (
        main(["compare", *(str(folder) for folder in out.iterdir() if folder.is_dir()), f"out={tmp_path / 'c'}"]) == 0
    )
    assert capsys.readouterr().out.count("fd_digits") > 0


def busy(out: Path) -> bool:
    """Whether a process holds the lock of a folder."""
    import fcntl

    for lock in out.glob("*/.lock"):
        with lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def test_a_run_that_fails_is_named_and_the_others_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parameters = {**PARAMETERS, "method": {"values": ["dlg", "edm"]}, "nfe": {"value": 2}}
    file, out = written(tmp_path, parameters), tmp_path / "out"
    assert main(["sweep", str(file), "processes=2", "logger=none", f"out={out}"]) == 2
    printed = capsys.readouterr()
    assert "nfe=2 is below the minimum" in printed.err and "1 of 2 runs failed (runs 1)" in printed.err
    assert points_in(out) == [("edm", 2)]
    with pytest.raises(UsageError, match="1 of 2 runs failed"):
        da.sweep(file, out=out, logger="none")


def test_a_run_on_two_devices_is_one_run(tmp_path: Path):
    parameters = {**PARAMETERS, "method": {"value": "edm"}, "nfe": {"value": 4}, "batch_size": {"value": 10}}
    settings = {"devices": 2, "accelerator": "cpu", "threads": 1}
    (point,) = da.sweep(written(tmp_path, parameters), out=tmp_path / "out", **settings)
    assert point["world_size"] == 2
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    (file,) = wandb_files(folder)
    assert [row["curve/nfe"] for row in file.curve] == [4]


def test_a_bayesian_sweep_is_drawn_here_which_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert da.sweep("dlg", count=3, out=tmp_path, dry_run=True) == []
    printed = capsys.readouterr()
    assert "drawn at random" in printed.err and "wandb agent" in printed.err and len(printed.out.splitlines()) == 3


STARTS_ANOTHER = """
import os, subprocess, sys, time
code = "import os, time; from diffaccel.run.parent import end_with_parent; end_with_parent();"
code += "print(os.getpid(), 'DIFFACCEL_PARENT' in os.environ, flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "DIFFACCEL_PARENT": str(os.getpid())})
time.sleep(60)
"""


def test_a_run_ends_with_the_process_that_started_it():
    parent = subprocess.Popen([sys.executable, "-c", STARTS_ANOTHER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    _, passed_on = parent.stdout.readline().split()
    assert passed_on == "False", "or the processes that it starts would end at once"
    parent.kill()
    started = time.monotonic()
    assert parent.stdout.read() == "", "the pipe is closed by the end of the run, which also holds it"
    assert time.monotonic() - started < 20
    parent.wait()
