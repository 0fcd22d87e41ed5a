"""Settings of the machine, made before anything is built: device, precision, threads, launcher, compiler."""

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
    """Resolve ``precision: auto``, choose batch size and threads, and check that the machine can run the rest.

    Raises:
        UsageError: Devices are missing, the launched processes differ from the configuration, the device does not
            support the precision, or there is no compiler for ``compile``.
    """
    check_launcher(config)
    device = device_type(config)
    if device == "cuda" and config.devices > torch.cuda.device_count():
        raise UsageError(f"devices={config.devices}, but the number of visible GPUs is {torch.cuda.device_count()}")
    chosen = config.precision == "auto"
    if chosen:
        config.precision = "bf16-mixed" if has_bf16_units(config) else "32-true"
    config.batch_size = config.batch_size or default_batch_size(config.shape, device)
    if config.precision == "16-mixed" and device == "cpu":
        raise UsageError("precision=16-mixed requires a GPU: on a CPU set precision=auto, bf16-mixed or 32-true")
    if config.compile:
        check_compiler(device)
    set_threads(config)
    if chosen or (config.precision == "bf16-mixed" and not has_bf16_units(config)):
        config.notes.append(describe(config))


def device_type(config: Config) -> str:
    """Return the type of the run's devices, ``cuda`` or ``cpu``.

    Raises:
        UsageError: A GPU is required by the configuration and not visible.
    """
    visible = torch.cuda.is_available()
    if config.accelerator == "gpu" and not visible:
        raise UsageError("accelerator=gpu, but no GPU is visible: set accelerator=cpu or auto")
    return "cuda" if visible and config.accelerator != "cpu" else "cpu"


def default_batch_size(shape: list[int], device: str) -> int:
    """Return the number of images per sampling batch that keeps a device busy: by their pixels, and a GPU's memory."""
    pixels = shape[1] * shape[2]
    if device == "cpu":
        return max(1, min(100, 20 * 256**2 // pixels))
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, int(2500 * min(1.0, memory / 40e9) * min(1.0, 32**2 / pixels)))


def has_bf16_units(config: Config) -> bool:
    """Whether all devices of the node have bfloat16 hardware; emulation is slower than float32."""
    if device_type(config) == "cuda":
        capable = all(torch.cuda.get_device_capability(i) >= (8, 0) for i in range(config.devices))
        return capable and torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # On x86 that function also returns true for emulation. AMX implies AVX512_BF16 for oneDNN.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL"))
    return torch.cpu._is_avx512_bf16_supported() and limit.upper() not in ISAS_WITHOUT_BF16


def set_threads(config: Config) -> None:
    """Set the CPU threads of this process: ``threads``, else OMP_NUM_THREADS, else its share of the usable cores.

    PyTorch's default ignores the quota of a container, and Lightning sets another number when it starts processes.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    threads = config.threads or (int(given) if given.isdigit() and int(given) else _share_of_cores(config))
    torch.set_num_threads(threads)
    if config.devices > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _share_of_cores(config: Config) -> int:
    if per_task := os.environ.get("SLURM_CPUS_PER_TASK"):
        return int(per_task)
    return max(1, cpu_count() // config.devices)  # includes affinity and the quota of a container


def check_compiler(device: str) -> None:
    """Check the compiler of ``torch.compile``: C++ for the CPU, C for the launchers of GPU kernels.

    Raises:
        UsageError: There is no compiler, or it does not find Python's headers.
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
        f"compile=true requires a working compiler and Python's headers ({reason}): install them (Debian: g++ and "
        f"python3-dev), set {variable}, or set compile=false"
    )


def describe(config: Config) -> str:
    """Describe device, precision and threads of a run in one line."""
    device = device_type(config)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    world = config.devices * config.num_nodes
    parts = [name, f"precision={config.precision}", f"threads={torch.get_num_threads()}"]
    if world > 1:
        parts.insert(0, f"{world} processes")
    if not has_bf16_units(config):
        slow = "emulated and slower than 32-true, as " if config.precision == "bf16-mixed" else ""
        parts[-2] += f" ({slow}the device has no bf16 units)"
    return "computing on " + ", ".join(parts)


def announce(config: Config) -> None:
    """Print the settings chosen for this machine, and warnings about slow ones."""
    for note in config.notes:
        say(note)
