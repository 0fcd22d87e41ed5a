"""``reference``: statistics of an experiment's data. All files are written or none, and existing files are kept."""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch

from diffaccel import experiment
from diffaccel.collective import World
from diffaccel.config import Config
from diffaccel.data import DataModule, MissingSplit
from diffaccel.errors import UsageError
from diffaccel.experiment.judges import check_files
from diffaccel.metrics.reference import Reference, compute_references, file_of, save_references
from diffaccel.run import launch
from diffaccel.run.targets import check_new
from diffaccel.text.terminal import PlainConsole, print_lines

HELP = """\
reference EXPERIMENT
write statistics of the data for bench

Keys:
  reference=FILE floor=FILE  files for the training and the test split; OUT/reference.npz and OUT/floor.npz by default
  judges=inception,mobilenetv2  extractors whose features are used, in one pass
  keep_rows=10000          images whose features are kept, for KID, precision and recall
"""
KEYS = {"train": "reference", "test": "floor"}
"""Split -> key of its file."""

Paths = dict[str, dict[str, Path]]
"""Split -> judge -> file."""


def reference(config: Config, advises: bool = True) -> dict[str, Path]:
    """Write the statistics of the training split and, if there is one, of the test split, for all judges in one pass.

    Args:
        config: Configuration of the run. An empty ``reference`` or ``floor`` is a file of that name in OUT, or for
            several judges one file each, ``reference_<judge>.npz``; null omits the files.
        advises: Whether to print the settings with which a bench uses the files.

    Returns:
        File of each split, ``train`` and ``test``; for several judges, also of each split and judge,
        ``train.mobilenetv2``, where ``train`` is the file of the first judge.

    Raises:
        UsageError: A file exists already or can't be written, or a split has no data.
    """
    console = PlainConsole(stderr=True, soft_wrap=True)
    extractors = experiment.build_extractors(config)
    names = [extractor.name for extractor in extractors]
    paths = _paths(config, names)
    if not paths:
        raise UsageError("there is nothing to write: set reference=FILE or floor=FILE, or neither for files in OUT")
    if launch.is_first(config):
        check_new([path for files in paths.values() for path in files.values()], config.again)
    data = experiment.build_data(config)
    if "test" in paths and (missing := _missing(data)):
        if config.floor or len(paths) == 1:  # requested explicitly
            raise missing
        console.print(f"no floor: {missing}")
        del paths["test"]
    found: dict[str, list[Reference]] = {}

    def run(_: World, device: torch.device) -> None:
        for split, files in paths.items():
            own = [extractor.to(device) for extractor in extractors if extractor.name in files]
            found[split] = compute_references(data, split, own, keep=config.keep_rows)

    # Features are computed in float32 for any precision of a run.
    if launch.everywhere(dataclasses.replace(config, precision="32-true"), run):
        written = {split: zip(files.values(), found[split], strict=True) for split, files in paths.items()}
        save_references({path: one for pairs in written.values() for path, one in pairs})
        for split, files in paths.items():
            for path, one in zip(files.values(), found[split], strict=True):
                console.print(f"{path}: {one.moments.n} {split} images, sha256 {one.sha256[:12]}")
        if advises:
            print_lines(f"to use these files, add to bench: {shlex.join(_words(config, paths, len(names) > 1))}")
    return _flat(paths, len(names) > 1)


def _words(config: Config, paths: Paths, several: bool) -> list[str]:
    """Settings of a bench that uses the files."""
    words = [f"judges={','.join(str(node['name']) for node in config.judges)}"] if _by_name(config, several) else []
    for split, files in paths.items():
        words += [
            f"{KEYS[split]}.{name}={path}" if several else f"{KEYS[split]}={path}" for name, path in files.items()
        ]
    if "test" not in paths:
        words.append("floor=null")  # the experiment's own floor is of other data or features
    return words


def _by_name(config: Config, several: bool) -> bool:
    """Whether there are several judges, which their names alone determine."""
    return several and all(list(node) == ["name"] for node in config.judges)


def _flat(paths: Paths, several: bool) -> dict[str, Path]:
    found = {split: next(iter(files.values())) for split, files in paths.items()}
    if several:
        found |= {f"{split}.{name}": path for split, files in paths.items() for name, path in files.items()}
    return found


def _paths(config: Config, names: list[str]) -> Paths:
    """File of each split and judge.

    Raises:
        UsageError: There is one file for several judges.
    """
    check_files({"reference": config.reference, "floor": config.floor}, names)
    found: Paths = {}
    for split, key in KEYS.items():
        files = getattr(config, key)
        if files is None:
            continue
        own = {name: file_of(files, name) for name in names}
        ends = {name: f"_{name}" if len(names) > 1 else "" for name in names}
        if not isinstance(files, Mapping):
            own = {name: file or str(config.folder / f"{key}{ends[name]}.npz") for name, file in own.items()}
        if chosen := {name: Path(file) for name, file in own.items() if file}:
            found[split] = chosen
    return found


def _missing(data: DataModule) -> MissingSplit | None:
    """Open the test split, and return the error if there is none."""
    try:
        data.images("test")
    except MissingSplit as error:
        return error
    return None
