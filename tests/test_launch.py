"""Loggers: what a user of W&B sets in the environment holds, unless the configuration says otherwise, which is said."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch.loggers.wandb
import pytest
import wandb

from diffaccel.config import load
from diffaccel.errors import UsageError
from diffaccel.run import loggers


@pytest.fixture
def initial(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What wandb.init would be called with, for a run with some words; the run that is started is ended."""

    def of(out: Path, *words: str) -> dict[str, Any]:
        (logger,) = loggers.build_loggers(load("toy/edm", [f"out={out}", *words]))
        assert isinstance(logger, lightning.pytorch.loggers.wandb.WandbLogger)
        return logger._wandb_init

    yield of
    wandb.finish()


def test_a_bench_starts_the_run_that_a_fit_starts(initial: Any, tmp_path: Path):
    """Without Lightning, whose import takes seconds."""
    config = load("toy/edm", [f"out={tmp_path}"])
    (logger,) = loggers.build_loggers(config, training=False)
    loggers.close_wandb(config)
    assert isinstance(logger, loggers.WandbRun)
    of_a_fit = {key: value for key, value in initial(tmp_path).items() if key != "anonymous"}
    assert logger.settings == {**of_a_fit, "id": logger.settings["id"]} and logger.settings["id"] != of_a_fit["id"]


def test_the_environment_s_words_hold(initial: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    found = initial(tmp_path)
    assert (found["project"], found["name"], found["mode"], found["dir"]) == (
        *("diffaccel", "toy/edm gaussian dpmpp2m NFE 10 seed 0", "offline", str(tmp_path)),
    )
    own = {
        "PROJECT": "p",
        "NAME": "mine",
        "MODE": "disabled",
        "DIR": str(tmp_path / "w"),
        "RUN_ID": "r",
        "RESUME": "must",
    }
    for name, value in own.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    found = initial(tmp_path)
    assert [found[key] for key in ("project", "name", "mode", "dir", "id", "resume")] == list(own.values())
    assert "entity" not in found and "group" not in found, "wandb reads those itself"


@pytest.mark.parametrize(("variable", "mode"), [("dryrun", "offline"), ("disabled", "disabled"), (None, "offline")])
def test_the_mode_is_the_environment_s(variable: str | None, mode: str, monkeypatch: pytest.MonkeyPatch):
    if variable is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert loggers.wandb_mode(load("toy/edm")) == mode


def test_a_run_of_a_sweep_is_online_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert loggers.wandb_mode(load("toy/edm")) == "offline", "as the environment of the tests says"
    assert loggers.wandb_mode(load("toy/edm", ["wandb_mode=disabled"])) == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    assert loggers.wandb_mode(load("toy/edm")) == "online"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["toy/edm", "nfe=5,10", "seed=3"], "toy/edm gaussian dpmpp2m NFE 5,10 seed 3"),
        (["toy/edm", "nfe=null", "solver=rk45"], "toy/edm gaussian rk45 NFE adaptive seed 0"),
        (["cifar10_small/dlg", "nfe=10"], "cifar10_small/dlg chain unipc2 NFE 10 seed 0"),
        (["cifar10_small/dlg", "nfe=10,20"], "cifar10_small/dlg chain unipc2 NFE 10,20 seed 0"),
    ],
)
def test_a_run_is_named_by_prior_solver_and_budget(words: list[str], name: str):
    assert loggers.run_name(load(*words[:1], words[1:])) == name


def test_only_the_first_of_several_processes_starts_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[Any] = []
    monkeypatch.setattr(wandb, "init", lambda **settings: started.append(settings))
    for first in (False, True):
        monkeypatch.setattr(loggers, "is_first", lambda config, first=first: first)
        for mode in ("online", "offline"):
            config = load("toy/edm", [f"out={tmp_path}", f"wandb_mode={mode}"])
            loggers.build_loggers(config, training=False)
        assert len(started) == 2 * first


def test_a_conflict_of_modes_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WANDB_MODE", "online")
    assert loggers.wandb_mode(load("toy/edm", ["wandb_mode=offline"])) == "offline"
    assert capsys.readouterr().err == "wandb_mode=offline overrides WANDB_MODE=online of the environment\n"
    assert loggers.wandb_mode(load("toy/edm", ["wandb_mode=online"])) == "online"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UsageError, match="WANDB_MODE=ofline"):
        loggers.wandb_mode(load("toy/edm"))
