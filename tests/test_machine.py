"""What a run computes on: precision, threads, device and compiler, chosen or refused before anything is built."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffaccel import experiment
from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.errors import SharedError, UsageError
from diffaccel.run import machine, processes
from diffaccel.run.environment import check_launcher

QUICK = ["n=40", "nfe=3", "logger=none"]

pytestmark = pytest.mark.usefixtures("undrawn", "alone")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPU and scheduler."""
    for variable in list(os.environ):
        if variable.startswith(("SLURM_", "ONEDNN_", "DNNL_")) or variable == "OMP_NUM_THREADS":
            monkeypatch.delenv(variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def units(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there)


# Precision


@pytest.mark.parametrize(("there", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_is_what_the_cpu_has_units_for(there: bool, precision: str, monkeypatch: pytest.MonkeyPatch):
    units(monkeypatch, there)
    config = load("digits/edm", ["precision=auto"])
    machine.settle(config)
    assert config.precision == precision
    assert f"precision={precision}" in machine.describe(config)
    assert ("no bf16 units" in machine.describe(config)) == (not there)


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_units_that_onednn_may_not_use_do_not_count(variable: str, monkeypatch: pytest.MonkeyPatch):
    units(monkeypatch, True)
    for limit, there in (("AVX2", False), ("avx512_core", False), ("AVX512_CORE_BF16", True), ("ALL", True)):
        monkeypatch.setenv(variable, limit)
        assert machine.has_bf16_units(load("toy/edm")) == there, limit


@pytest.mark.parametrize(("capability", "precision"), [((7, 0), "32-true"), ((9, 0), "bf16-mixed")])
def test_auto_on_gpus_is_what_the_oldest_has_units_for(capability: Any, precision: str, monkeypatch: Any):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0) if i == 0 else capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=80e9))
    config = load("digits/edm", ["precision=auto", "devices=2"])
    machine.settle(config)
    assert (config.precision, config.batch_size) == (precision, 2500)


def test_the_batch_size_is_that_of_the_device(monkeypatch: Any):
    """By pixels and, on a GPU, memory; a size that is set stays."""
    memory = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: memory)
    shapes = [1, 8, 8], [3, 32, 32], [3, 64, 64], [3, 256, 256]
    assert [machine.default_batch_size(shape, "cpu") for shape in shapes] == [100, 100, 100, 20]
    assert [machine.default_batch_size(shape, "cuda") for shape in shapes] == [2500, 2500, 625, 39]
    memory.total_memory = 8e9
    assert [machine.default_batch_size(shape, "cuda") for shape in shapes] == [500, 500, 125, 7]
    for words, size in (([], 100), (["batch_size=7"], 7)):
        config = load("digits/edm", words)
        machine.settle(config)
        assert config.batch_size == config.images_per_batch == size


def test_an_experiment_without_the_key_computes_alike_everywhere(tmp_path: Path):
    """In float32; so do the data sets whose images tests compare to the bit."""
    (tmp_path / "own.yaml").write_text("method: diffusion\ndata: toy\nshape: [2, 1, 1]\n")
    for name in (str(tmp_path / "own.yaml"), "digits/edm", "toy/edm", "cifar10/dlg"):
        assert load(name).precision == "32-true", name


def test_a_point_of_auto_is_that_of_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["bench", "digits/edm", *QUICK]
    chosen = "bf16-mixed" if machine.has_bf16_units(load("digits/edm")) else "32-true"
    assert main([*words, "precision=auto", f"out={tmp_path / 'auto'}"]) == 0
    assert f"precision={chosen}" in capsys.readouterr().err
    written = load(str(tmp_path / "auto" / "config.yaml"))
    assert written.precision == chosen
    assert main([*words, f"precision={chosen}", f"out={tmp_path / 'auto'}"]) == 0
    assert "measured before" in capsys.readouterr().err
    (point,) = map(json.loads, (tmp_path / "auto" / "points.jsonl").read_text().splitlines())
    assert point["precision"] == chosen and point["threads"] == torch.get_num_threads()


def test_shipped_results_keep_their_keys():
    """Those of cifar10_small were measured in bf16-mixed."""
    config = load("cifar10_small/edm", ["precision=bf16-mixed"])
    machine.settle(config)
    assert experiment.identify_images(config)(10)["precision"] == "bf16-mixed"


def test_fp16_needs_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Lightning would compute in bf16 instead."""
    for verb in ("bench", "sample", "fit", "search"):
        assert main([verb, "digits/edm", *QUICK, "precision=16-mixed", f"out={tmp_path / 'out'}"]) == 2
        error = capsys.readouterr().err
        assert "precision=16-mixed" in error and "precision=auto" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_processes_that_chose_differently_stop(monkeypatch: pytest.MonkeyPatch):
    strategy = processes.Processes()
    monkeypatch.setattr(processes.DDPStrategy, "setup_environment", lambda self: None)
    monkeypatch.setattr(processes, "all_gather", lambda thing: ["32-true", "bf16-mixed"])
    with pytest.raises(SharedError, match="32-true and in bf16-mixed"):
        strategy.setup_environment()


# Threads and devices


def test_threads_are_the_process_s_share_of_the_usable_cores(monkeypatch: pytest.MonkeyPatch):
    found = {}
    monkeypatch.setattr(torch, "set_num_threads", lambda count: found.update(threads=count))
    monkeypatch.setattr(machine, "cpu_count", lambda: 8)
    for words, variables, threads in (
        ([], {}, 8),
        (["devices=3"], {}, 2),
        (["devices=9"], {}, 1),
        (["threads=5", "devices=3"], {}, 5),
        ([], {"OMP_NUM_THREADS": "3,1"}, 3),
        (["threads=5"], {"OMP_NUM_THREADS": "3"}, 5),
        (["devices=2"], {"SLURM_CPUS_PER_TASK": "6"}, 6),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "")
            for name, value in variables.items():
                patch.setenv(name, value)
            machine.set_threads(load("cifar10_small/edm", words))
            assert found["threads"] == threads, words
            if "devices=3" in words:  # what Lightning would otherwise set in the first process
                assert os.environ["OMP_NUM_THREADS"] == str(threads)


def test_threads_wait_passively():
    """Those that spin slow each other down tenfold where something else takes a core."""
    script = (
        "import os, sys; from diffaccel.__main__ import main; main(['version']); print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for given in (None, "ACTIVE"):
        own = environment | ({} if given is None else {"OMP_WAIT_POLICY": given})
        found = subprocess.run([sys.executable, "-c", script], env=own, capture_output=True, text=True, check=True)
        assert found.stdout.split()[-1] == (given or "PASSIVE")


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="accelerator=cpu"):
        machine.settle(load("toy/edm", ["accelerator=gpu"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="devices=4, but the number of visible GPUs is 1"):
        machine.settle(load("toy/edm", ["devices=4"]))


# The compiler


def test_compile_without_a_working_compiler(monkeypatch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'Python.h: No such file or directory' >&2\nexit 1\n")
    broken.chmod(0o755)
    for compiler, reason in ((tmp_path / "none", "No such file"), (broken, "Python.h")):
        monkeypatch.setenv("CXX", str(compiler))
        assert main(["bench", "digits/edm", *QUICK, "compile=true", f"out={tmp_path / 'out'}"]) == 2
        error = capsys.readouterr().err
        assert str(compiler) in error and reason in error and "compile=false" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Launchers

SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("variables", "words", "named"),
    [
        ({"NTASKS": "2", "NTASKS_PER_NODE": "2"}, [], ["2 tasks", "devices=2 num_nodes=1"]),
        ({"NTASKS": "1"}, ["devices=2"], ["1 tasks", "--ntasks-per-node=2"]),
        ({"NTASKS": "4", "NTASKS_PER_NODE": "2", "NNODES": "2"}, ["devices=4"], ["devices=2 num_nodes=2"]),
        (
            {"NTASKS": "8", "NTASKS_PER_NODE": "4", "NNODES": "2"},
            ["devices=2", "num_nodes=4"],
            ["devices=4 num_nodes=2"],
        ),
        ({"NTASKS": "2"}, ["devices=2"], ["--ntasks-per-node=2 in place of --ntasks=2"]),
        ({"NTASKS": "2", "JOB_NAME": "bash", "STEP_NUM_TASKS": "2"}, ["devices=2"], ["'bash'", "SLURM_JOB_NAME="]),
        ({"NTASKS": "2", "JOB_NAME": "interactive"}, ["num_nodes=2"], ["'interactive'", "srun"]),
    ],
)
def test_other_slurm_tasks_than_processes(
    variables: dict[str, str], words: list[str], named: list[str], monkeypatch: Any
):
    for name, value in {**SLURM, **{f"SLURM_{name}": value for name, value in variables.items()}}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as error:
        machine.settle(load("toy/edm", words))
    for what in named:
        assert what in str(error.value)


def test_slurm_tasks_that_are_the_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name, value in {**SLURM, "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    check_launcher(load("toy/edm", ["devices=4", "num_nodes=2"]))
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("SLURM_STEP_ID")  # the batch script itself
    check_launcher(load("toy/edm", ["devices=4", "num_nodes=2"]))
    assert "start this command with srun" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    check_launcher(load("toy/edm"))
    assert "devices=1 processes are started" in capsys.readouterr().err


def test_nodes_that_nothing_starts(monkeypatch: pytest.MonkeyPatch):
    config = load("toy/edm", ["num_nodes=2"])
    for variable in ("MASTER_ADDR", "NODE_RANK"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UsageError, match="num_nodes=2, but nothing starts"):
        check_launcher(config)
    for variable, value in (("MASTER_ADDR", "host"), ("NODE_RANK", "1")):
        monkeypatch.setenv(variable, value)
    check_launcher(config)


def test_other_processes_than_torchrun_s(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    check_launcher(load("toy/edm", ["devices=4", "num_nodes=2"]))
    with pytest.raises(SharedError, match="set devices=4 num_nodes=2"):
        check_launcher(load("toy/edm", ["devices=8"]))


def test_only_a_choice_is_said_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    """Also before a slow precision; and after all that may be refused."""
    units(monkeypatch, False)
    words = ["sample", "digits/edm", "n=2", "nfe=1", "solver=ddim"]
    for precision, said in (("auto", "precision=32-true"), ("bf16-mixed", "emulated"), ("32-true", "")):
        assert main([*words, f"precision={precision}", f"out={tmp_path / precision}"]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "computing on" in line]
        assert len(lines) == bool(said) and said in "".join(lines)
    assert main([*words, "precision=auto", "solver=unknown"]) == 2
    assert "computing on" not in capsys.readouterr().err
