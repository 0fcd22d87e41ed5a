"""Comparison of the processes started by a launcher with the configuration.

Lightning uses the processes of torchrun or SLURM, or starts the processes of the node itself. If their number differs
from the configuration, Lightning runs without some ranks, runs every process separately into the same folder, or
deadlocks.
"""

import os

import torch.distributed as dist

from diffaccel.config import Config
from diffaccel.errors import SharedError, UsageError
from diffaccel.text.terminal import say

INTERACTIVE = ("bash", "interactive")
"""Names of SLURM jobs for which Lightning starts the processes itself."""


def check_launcher(config: Config) -> None:
    """Check that there are ``devices`` processes on each of ``num_nodes`` nodes.

    Raises:
        UsageError: A launcher started other processes, or nothing starts the processes of other nodes.
    """
    if dist.is_available() and dist.is_torchelastic_launched():
        _check_torchrun(config)
    elif "SLURM_NTASKS" in os.environ:
        _check_slurm(config)
    elif config.num_nodes > 1 and not {"MASTER_ADDR", "NODE_RANK"} <= os.environ.keys():
        raise UsageError(
            f"num_nodes={config.num_nodes}, but nothing starts the processes of the other nodes: start with srun or "
            "torchrun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each node"
        )


def _check_torchrun(config: Config) -> None:
    started, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if (started, here) != (config.devices * config.num_nodes, config.devices):
        raise SharedError(
            f"torchrun has started {started} processes, {here} on this node, but {_asked(config)}: set devices={here} "
            f"num_nodes={max(1, started // here)}"
        )


def _check_slurm(config: Config) -> None:
    tasks, nodes = _number("SLURM_NTASKS", 1), _number("SLURM_NNODES", 1)
    per_node = _number("SLURM_NTASKS_PER_NODE", max(1, tasks // nodes))
    if os.environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        _check_interactive(config, tasks)
    elif (tasks, per_node, nodes) != (config.devices * config.num_nodes, config.devices, config.num_nodes):
        raise SharedError(
            f"the SLURM job has {tasks} tasks, {per_node} on each of {nodes} nodes, but {_asked(config)}: set "
            f"devices={per_node} num_nodes={nodes}, or start srun with --nodes={config.num_nodes} "
            f"--ntasks-per-node={config.devices}"
        )
    elif tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise SharedError(f"SLURM: start srun with --ntasks-per-node={config.devices} in place of --ntasks={tasks}")
    elif tasks > 1 and "SLURM_STEP_ID" not in os.environ and "SLURM_STEPID" not in os.environ:
        say(f"waiting for the {tasks} tasks of the SLURM job: if you did not start this command with srun, do so")


def _check_interactive(config: Config, tasks: int) -> None:
    name = os.environ["SLURM_JOB_NAME"]
    if _number("SLURM_STEP_NUM_TASKS", 1) > 1:
        raise SharedError(
            f"srun has started several processes in a SLURM job called {name!r}, where each would start its own "
            "devices: set SLURM_JOB_NAME=diffaccel before srun, or start without srun"
        )
    if config.num_nodes > 1:
        raise UsageError(
            f"num_nodes={config.num_nodes}, but a SLURM job called {name!r} starts processes on this node only: set "
            "SLURM_JOB_NAME=diffaccel and start with srun"
        )
    if tasks != config.devices:
        say(
            f"interactive SLURM job: devices={config.devices} processes are started, independent of the {tasks} tasks "
            "of the allocation"
        )


def _asked(config: Config) -> str:
    return f"the configuration has devices={config.devices} num_nodes={config.num_nodes}"


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else default
