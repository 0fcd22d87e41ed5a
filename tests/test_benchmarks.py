"""Benchmarks are run by hand, so that nothing else notices that one no longer imports or runs."""

import dataclasses
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import training
from benchmarks.sampling import SHAPE
from benchmarks.training import Case
from diffaccel.nn import UNet
from diffaccel.training.ema import EMA

MODULES = sorted(file.stem for file in Path(benchmarks.__path__[0]).glob("*.py") if file.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_imports_and_says_how_it_is_run(name: str):
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__ and (f"python -m benchmarks.{name}" in module.__doc__ or not hasattr(module, "main"))


@pytest.mark.parametrize("case", [Case(), Case(device="cpu", precision="bf16-mixed", wall=True)], ids=["cpu", "gpu"])
def test_training_is_measured(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a few small batches; a GPU differs by its device."""
    monkeypatch.setattr(training, "build_network", lambda: UNet(SHAPE, [8], blocks=1, unshuffle=4, embedding=8))
    text = training.EXPERIMENT.replace("widths: [64, 96, 128], blocks: 2, attention: [2], unshuffle: 2", "widths: [8]")
    monkeypatch.setattr(training, "EXPERIMENT", text)
    monkeypatch.setattr(torch.optim.Adam, "step", torch.optim.Adam.step)  # which the benchmark wraps
    monkeypatch.setattr(EMA, "update", EMA.update)
    images = torch.randint(256, (16, *SHAPE), dtype=torch.uint8)
    case = dataclasses.replace(case, batch=4, steps=3, warmup=2)
    found, limit, within = training.measure(case, images, str(tmp_path), repeats=2)
    assert found.ours > 0 and found.bare > 0 and limit == 1.05
    assert (within is None) == case.wall


def test_the_parts_of_a_short_bench_are_found(tmp_path: Path):
    """The functions that benchmarks.startup times are where it looks for them, and are called."""
    words = ["bench", "digits/edm", "nfe=3", "n=20", "logger=csv", f"out={tmp_path / 'out'}"]
    file = tmp_path / "parts.json"
    command = [sys.executable, "-m", "benchmarks.startup", "measure", str(time.time()), str(file), *words]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    parts = json.loads(file.read_text())
    assert {"building", "sampling", "scoring", "metrics", "drawing", "logging", "rest"} <= parts.keys()
