"""Several processes: they train as one, and fail as one."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from diffaccel.__main__ import main
from diffaccel.collective import failing_together
from diffaccel.errors import SharedError, UsageError

TINY = ["network.widths=[8]", "network.attention=[]", "network.embedding=16", "training.batch_size=32"]
FIT = ["digits/edm", *TINY, "images=256", "training.warmup=64", "precision=64-true", "accelerator=cpu", "threads=1"]
FIT += ["logger=none", "nfe=2", "n=20"]
PREAMBLE = """\
import os, sys
from diffaccel.__main__ import main
from diffaccel.denoiser import MixtureDenoiser
from diffaccel.evaluation import Evaluator

Evaluator._draw = Evaluator._draw_curve = lambda self: None
"""


def run(tmp_path: Path, script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a script of its own: Lightning starts the other processes by running it again."""
    file = tmp_path / "run.py"
    file.write_text(f"{PREAMBLE}{script}\nsys.exit(main(sys.argv[1:]))\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(file), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_two_processes_train_as_one_with_their_batch(tmp_path: Path, undrawn: None):
    """Batches, noise and times follow from the position in the stream, and gradients are averaged."""
    assert main(["fit", *FIT, f"out={tmp_path / 'one'}"]) == 0
    done = run(tmp_path, "", "fit", *FIT, "devices=2", f"out={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("one", "two"))
    assert one["diffaccel"]["images_seen"] == two["diffaccel"]["images_seen"] == 256
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-7, atol=1e-9, msg=name)
    for name, value in one["diffaccel"]["ema"].items():
        torch.testing.assert_close(two["diffaccel"]["ema"][name], value, rtol=1e-7, atol=1e-9, msg=name)


FAILING = """
forward, calls = MixtureDenoiser.forward, 0

def evaluate(self, *arguments):
    global calls
    calls += 1
    prediction = forward(self, *arguments)
    broken = os.environ.get("LOCAL_RANK", "0") == "{rank}" and calls > 8
    return prediction._replace(x_0=prediction.x_0 * float("nan")) if broken else prediction

MixtureDenoiser.forward = evaluate
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_fails_ends_all_with_its_message(tmp_path: Path, rank: int):
    words = ["toy/edm", "n=400", "batch_size=20", "nfe=6", "devices=2", "accelerator=cpu", "threads=1", "logger=none"]
    done = run(tmp_path, FAILING.format(rank=rank), "bench", *words, f"out={tmp_path}")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "diffaccel:" in line]
    assert len(said) == 1 and f"process {rank} failed: the network returned NaN" in said[0]
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "partial").glob("*/images_*.pt")), "what was made is kept"


def test_a_schedulers_sigterm_is_a_ctrl_c(tmp_path: Path):
    """Lightning notes it and goes on."""
    command = [sys.executable, "-m", "diffaccel", "bench", "toy/edm", "n=400000", "nfe=9", "batch_size=20"]
    process = subprocess.Popen([*command, "logger=none", f"out={tmp_path}"], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "partial").is_dir() and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert not (tmp_path / "points.jsonl").exists()


def test_alone_an_error_is_itself():
    with pytest.raises(UsageError, match="^too few$") as raised, failing_together():
        raise UsageError("too few")
    assert not isinstance(raised.value, SharedError)
    with failing_together():
        pass


# A process that is gone

FIT_FOREVER = ["fit", *FIT, "images=100000000", "reference=", "devices=2"]


def start(tmp_path: Path, script: str, *words: str, **environment: str) -> "subprocess.Popen[str]":
    """As :func:`run`, without waiting, in a session of its own."""
    file = tmp_path / "run.py"
    file.write_text(f"{PREAMBLE}{script}\nsys.exit(main(sys.argv[1:]))\n")
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(file), *words, f"out={tmp_path / 'out'}"]
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True)


def assert_ended(process: "subprocess.Popen[str]", status: int, seconds: float) -> str:
    """Wait for the end of all of a session; returns what it has printed."""
    try:
        _, said = process.communicate(timeout=seconds)  # ends when no process has the pipe any more
        assert process.returncode == status, said
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return said


def test_a_port_that_is_taken_is_named(tmp_path: Path):
    """The other process would wait for half an hour."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = assert_ended(start(tmp_path, "", *FIT_FOREVER, MASTER_PORT=port), 2, 120)
    assert f"MASTER_PORT={port} is in use" in said
    assert said.count("diffaccel: ") == 1 and "Traceback" not in said


def test_one_that_dies_at_its_start_ends_all(tmp_path: Path):
    said = assert_ended(start(tmp_path, 'os.environ.get("LOCAL_RANK") == "1" and os._exit(3)', *FIT_FOREVER), 2, 120)
    assert "process 1 ended with status 3" in said and said.count("diffaccel: ") == 1 and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_all(tmp_path: Path, rank: int):
    script = f"""
from diffaccel.methods import Diffusion
training_step = Diffusion.training_step
def step(self, *arguments):
    if self.steps == 20 and self.global_rank == {rank}:
        os.kill(os.getpid(), 9)
    return training_step(self, *arguments)
Diffusion.training_step = step
"""
    said = assert_ended(start(tmp_path, script, *FIT_FOREVER), [-9, 2][rank], 120)
    assert "Traceback" not in said
    assert rank == 0 or ("process 1 was ended by SIGKILL" in said and said.count("diffaccel: ") == 1)
