"""What a point records of the program and the files that made it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
import torch

from diffaccel.config import EXPERIMENTS, load
from diffaccel.denoiser import GaussianDenoiser
from diffaccel.evaluation.provenance import git_commit
from diffaccel.experiment.identity import settings_of
from diffaccel.experiment.loading import describe_checkpoint
from diffaccel.report import read_points
from diffaccel.report.commands import command_of
from diffaccel.report.points import normalised


def test_the_commit_is_that_of_the_package_and_of_no_other_repository(tmp_path: Path):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "own.py").write_text("")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    git("add", ".")
    git("commit", "-qm", "another project")
    installed = tmp_path / ".venv" / "diffaccel" / "provenance.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    assert git_commit(installed) is None, "a wheel in that project's environment"
    assert git_commit(tmp_path / "own.py") == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "own.py").write_text("# changed")
    assert str(git_commit(tmp_path / "own.py")).endswith("+")


def test_shipped_files_are_recorded_without_the_place_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that points of a machine can be published, wherever the working directory was."""
    (tmp_path / "own.safetensors").touch()
    recorded = []
    for folder in (tmp_path, EXPERIMENTS.parent):
        monkeypatch.chdir(folder)
        config = load("digits/small_t")
        checkpoint = describe_checkpoint(config, GaussianDenoiser(torch.zeros(1, 8, 8), 1.0))
        assert checkpoint is not None
        recorded.append((checkpoint["path"], settings_of(config, 5)["prior"]["checkpoint"]))
    weights = "experiments/digits/weights"
    assert recorded == [(f"{weights}/edm.safetensors", f"{weights}/gaussian.safetensors")] * 2
    own = load("digits/small_t", [f"prior.checkpoint={tmp_path / 'own.safetensors'}"])
    assert settings_of(own, 5)["prior"]["checkpoint"] == str(tmp_path / "own.safetensors")
    assert own.prior["checkpoint"] == str(tmp_path / "own.safetensors")
    # The command that repeats such a point names the file where it is.
    point = {"experiment": "digits/small_t", "nfe": 5, "settings": settings_of(load("digits/small_t"), 5)}
    assert f"prior.checkpoint={weights}/gaussian.safetensors" in str(command_of(normalised(point)))
    monkeypatch.chdir(tmp_path)
    assert f"prior.checkpoint={EXPERIMENTS}/digits/weights/gaussian.safetensors" in str(command_of(normalised(point)))


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from texts(one)


def test_shipped_points_name_no_file_outside_the_repository():
    files = sorted(EXPERIMENTS.glob("*/results/**/points.jsonl"))
    named = [text for file in files for point in read_points(file) for text in texts(point)]
    outside = {
        text
        for text in named
        if text.startswith("~")
        or ".." in PurePosixPath(text).parts
        or PurePosixPath(text).is_absolute()
        or PureWindowsPath(text).is_absolute()
    }
    assert outside == set()
