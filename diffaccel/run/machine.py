"""What the machine offers a run: device, precision, threads, launcher, compiler. Settled before anything is built."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig

import torch
from joblib import cpu_count

from diffaccel.config import Config
from diffaccel.errors import UsageError
from diffaccel.run.environment import check_launcher
from diffaccel.text.terminal import say

ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA under which oneDNN emulates bfloat16, several times slower than float32."""


def settle(config: Config) -> None:
    """Replace ``precision: auto`` by the device's own, set the number of threads, and refuse what can't run here.

    Raises:
        UsageError: The devices aren't there, other processes were launched than the configuration has, the device
            can't compute in this precision, or there is no compiler for ``compile``.
    """
    check_launcher(config)
    device = device_type(config)
    if device == "cuda" and config.devices > torch.cuda.device_count():
        raise UsageError(f"devices={config.devices}, but the number of visible GPUs is {torch.cuda.device_count()}")
    chosen = config.precision == "auto"
    if chosen:
        config.precision = "bf16-mixed" if has_bf16_units(config) else "32-true"
    if config.precision == "16-mixed" and device == "cpu":
        raise UsageError("precision=16-mixed needs a GPU: on a CPU set precision=auto, bf16-mixed or 32-true")
    if config.compile:
        check_compiler(device)
    set_threads(config)
    if chosen or (config.precision == "bf16-mixed" and not has_bf16_units(config)):
        config.notes.append(describe(config))


def device_type(config: Config) -> str:
    """``cuda`` or ``cpu``, which a run computes on.

    Raises:
        UsageError: A GPU was asked for and there is none.
    """
    visible = torch.cuda.is_available()
    if config.accelerator == "gpu" and not visible:
        raise UsageError("accelerator=gpu, but no GPU is visible: take accelerator=cpu or auto")
    return "cuda" if visible and config.accelerator != "cpu" else "cpu"


def has_bf16_units(config: Config) -> bool:
    """Whether all devices of this process's node multiply bfloat16 in hardware; emulation is slower than float32."""
    if device_type(config) == "cuda":
        capable = all(torch.cuda.get_device_capability(i) >= (8, 0) for i in range(config.devices))
        return capable and torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # On x86 that function is true of emulation too. AMX implies AVX512_BF16 for oneDNN.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL"))
    return torch.cpu._is_avx512_bf16_supported() and limit.upper() not in ISAS_WITHOUT_BF16


def set_threads(config: Config) -> None:
    """Set the CPU threads of this process: ``threads``, else OMP_NUM_THREADS, else its share of the usable cores.

    PyTorch's own default ignores a container's quota, and Lightning sets another one when it starts processes.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    threads = config.threads or (int(given) if given.isdigit() and int(given) else _share_of_cores(config))
    torch.set_num_threads(threads)
    if config.devices > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _share_of_cores(config: Config) -> int:
    if per_task := os.environ.get("SLURM_CPUS_PER_TASK"):
        return int(per_task)
    return max(1, cpu_count() // config.devices)  # affinity and a container's quota included


def check_compiler(device: str) -> None:
    """Try the compiler that ``torch.compile`` would call: C++ for the CPU, C for the GPU's launchers.

    Raises:
        UsageError: There is none, or it doesn't find Python's headers.
    """
    if device == "cuda":
        language, compiler = "c", os.environ.get("CC") or shutil.which("gcc") or "clang"
    else:
        language, compiler = "c++", os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    command = [compiler, "-x", language, "-fsyntax-only", "-I", sysconfig.get_path("include"), "-"]
    try:
        subprocess.run(command, input="#include <Python.h>\n", text=True, check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        reason = f"{compiler} fails: {(error.stderr.strip() or 'no message').splitlines()[0]}"
    except OSError as error:
        reason = f"{compiler}: {error.strerror}"
    else:
        return
    variable = "CC" if device == "cuda" else "CXX"
    raise UsageError(
        f"compile=true needs a working compiler and Python's headers ({reason}): install them (Debian: g++ and "
        f"python3-dev), set {variable}, or set compile=false"
    )


def describe(config: Config) -> str:
    """What a run computes on, in a line."""
    device = device_type(config)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    processes = config.devices * config.num_nodes
    parts = [name, f"precision={config.precision}", f"threads={torch.get_num_threads()}"]
    if processes > 1:
        parts.insert(0, f"{processes} processes")
    if not has_bf16_units(config):
        slow = "emulated and slower than 32-true, as " if config.precision == "bf16-mixed" else ""
        parts[-2] += f" ({slow}the device has no bf16 units)"
    return "computing on " + ", ".join(parts)


def announce(config: Config) -> None:
    """Say what was chosen for this machine, or is slow on it."""
    for note in config.notes:
        say(note)
