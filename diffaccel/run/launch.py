"""Devices, processes and output folder of a run."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import count

import torch

from diffaccel.collective import World
from diffaccel.config import Config, to_yaml
from diffaccel.run.machine import announce, device_type
from diffaccel.storage import check_target, occupied, write_whole


def everywhere(config: Config, work: Callable[[World, torch.device], object]) -> bool:
    """Call a function on every rank of a run without training, on the rank's device.

    Args:
        config: Configuration of the run.
        work: Function of the world and the device.

    Returns:
        Whether this is the first rank, which prints the results.

    Raises:
        UsageError: A GPU is required by the configuration and not visible, or the port is in use.
        SharedError: Another process has ended.
    """
    if config.devices * config.num_nodes > 1:
        return _on_ranks(config, work)
    kind = device_type(config)
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    announce(config)  # after everything that may raise an error
    with torch.inference_mode():
        work(World(), device)
    return True


def _on_ranks(config: Config, work: Callable[[World, torch.device], object]) -> bool:
    """Call a function on every rank of a run with several processes."""
    from lightning.fabric import Fabric  # imported here, because it takes seconds, and a single process does without

    from diffaccel.run.processes import Workers, check_agreed

    fabric = Fabric(
        accelerator=device_type(config),  # Lightning's own auto includes devices without float64
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=Workers(),
    )
    announce(config)  # after everything that may raise an error

    def run(fabric: Fabric) -> bool:
        check_agreed(config.precision)
        world = World(fabric.global_rank, fabric.world_size)
        with torch.inference_mode():
            work(world, fabric.device)
        return world.first

    return bool(fabric.launch(run))


def folder_of(config: Config) -> AbstractContextManager[None]:
    """Lock the output folder of a run against other runs, on the first rank.

    Raises:
        UsageError: The folder can't be written to, or is in use.
    """
    return occupied(config.folder) if is_first(config) else nullcontext()


def is_first(config: Config) -> bool:
    """Whether this process has rank zero, also before there is a trainer.

    Rank zero creates and checks the output folder for all ranks, which may be ahead of it or on other disks.
    """
    if config.devices * config.num_nodes == 1:
        return True
    from lightning.pytorch.utilities import rank_zero_only  # imported here, because it takes seconds

    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0)))
    return rank_zero_only.rank == 0 and node == 0  # type: ignore[attr-defined]


def write_config(config: Config, *results: str) -> None:
    """Write the resolved configuration to config.yaml in OUT; earlier ones are renamed to config.1.yaml and so on.

    Several configurations may share a folder, because points contain their own settings.

    Args:
        config: Configuration of the run.
        results: Files in OUT that the run will write.

    Raises:
        UsageError: A file can't be written.
    """
    if not is_first(config):
        return
    for name in results:
        check_target(config.folder / name)
    path, text = config.folder / "config.yaml", to_yaml(config, config.folder)
    if path.is_file() and (settings := _settings(path.read_text(errors="replace"))) != _settings(text):
        earlier = config.folder.glob("config.*.yaml")
        if all(_settings(file.read_text(errors="replace")) != settings for file in earlier):
            numbered = (config.folder / f"config.{number}.yaml" for number in count(1))
            path.replace(next(file for file in numbered if not file.exists()))
    write_whole(path, text)


def _settings(text: str) -> list[str]:
    """Lines of a configuration, except for keys that only affect the start of a run."""
    return [line for line in text.splitlines() if not line.startswith(("resume:", "again:"))]
