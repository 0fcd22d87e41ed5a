"""Benchmarks are run by hand, so that nothing else notices that one no longer imports or runs."""

import dataclasses
import importlib
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
