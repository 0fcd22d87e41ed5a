"""Benchmarks are run by hand, so that nothing else notices that one no longer imports."""

import importlib
from pathlib import Path

import pytest

import benchmarks

MODULES = sorted(file.stem for file in Path(benchmarks.__path__[0]).glob("*.py") if file.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_imports_and_says_how_it_is_run(name: str):
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__ and (f"python -m benchmarks.{name}" in module.__doc__ or not hasattr(module, "main"))
