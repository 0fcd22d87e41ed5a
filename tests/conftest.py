"""What every test starts from: a fixed seed, float32, one thread, and no tool that asks or reports."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before any import of wandb or matplotlib reads them.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # what runs without threads= take

import pytest
import torch

# Rounding depends on the number of threads; and two threads on tiny tensors wait for each other on a busy machine.
torch.set_num_threads(1)

# A background job of a script is started with interrupts ignored, and the tests that send one would wait for nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Same draws in any order of tests, and float32 again after a test that asked for float64."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator of the test's own, for draws that must not move with other draws."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """No pictures, which cost more than the points of tests: test_evaluator.py draws them."""
    from diffaccel.evaluation import Evaluator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "_draw", lambda self: None)
        patch.setattr(Evaluator, "_draw_curve", lambda self: None)
        yield


@pytest.fixture
def npz(tmp_path: Path) -> str:
    """The images of stored.py as npz."""
    from stored import LABELS, RGB, save_npz

    return save_npz(tmp_path / "rgb.npz", images=RGB, labels=LABELS)
