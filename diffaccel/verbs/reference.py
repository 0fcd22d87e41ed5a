"""``reference``: statistics of an experiment's data. Both files are written or none, and existing files are kept."""

import dataclasses
import shlex
from pathlib import Path

import torch

from diffaccel import experiment
from diffaccel.collective import World
from diffaccel.config import Config
from diffaccel.data import DataModule, MissingSplit
from diffaccel.errors import UsageError
from diffaccel.metrics.reference import Reference, compute_reference, save_references
from diffaccel.run import launch
from diffaccel.run.targets import check_new
from diffaccel.text.terminal import PlainConsole, print_lines

KEYS = {"train": "reference", "test": "floor"}
"""Split -> key of its file."""


def reference(config: Config) -> dict[str, Path]:
    """Write the statistics of the training split and, if there is one, of the test split.

    Args:
        config: Configuration of the run. An empty ``reference`` or ``floor`` is a file of that name in OUT; null omits
            the file.

    Returns:
        File of each split.

    Raises:
        UsageError: A file exists already or can't be written, or a split has no data.
    """
    console = PlainConsole(stderr=True, soft_wrap=True)
    paths = _paths(config)
    if not paths:
        raise UsageError("there is nothing to write: set reference=FILE or floor=FILE, or neither for files in OUT")
    if launch.is_first(config):
        check_new(paths.values(), config.again)
    data, extractor = experiment.build_data(config), experiment.build_extractor(config)
    if "test" in paths and (missing := _missing(data)):
        if config.floor or len(paths) == 1:  # requested explicitly
            raise missing
        console.print(f"no floor: {missing}")
        del paths["test"]
    found: dict[str, Reference] = {}

    def run(_: World, device: torch.device) -> None:
        extractor.to(device)
        found.update({split: compute_reference(data, split, extractor) for split in paths})

    # Features are computed in float32 for any precision of a run.
    if not launch.everywhere(dataclasses.replace(config, precision="32-true"), run):
        return paths
    save_references({path: found[split] for split, path in paths.items()})
    for split, path in paths.items():
        console.print(f"{path}: {found[split].moments.n} {split} images, sha256 {found[split].sha256[:12]}")
    words = [f"{KEYS[split]}={path}" for split, path in paths.items()]
    if "test" not in paths:
        words.append("floor=null")  # the experiment's own floor is of other data or features
    print_lines(f"to use these files, add to bench: {shlex.join(words)}")
    return paths


def _paths(config: Config) -> dict[str, Path]:
    """File of each split."""
    named = {split: getattr(config, key) for split, key in KEYS.items()}
    return {
        split: Path(path or config.folder / f"{KEYS[split]}.npz") for split, path in named.items() if path is not None
    }


def _missing(data: DataModule) -> MissingSplit | None:
    """Open the test split, and return the error if there is none."""
    try:
        data.images("test")
    except MissingSplit as error:
        return error
    return None
