"""Statistics of an experiment's data, written to OUT: both files, or none, and never over others unasked."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from diffaccel import experiment
from diffaccel.config import Config
from diffaccel.data import DataModule, MissingSplit
from diffaccel.errors import UsageError
from diffaccel.features.extractors import Extractor
from diffaccel.metrics.reference import Reference, compute_reference, save_references
from diffaccel.run import launch
from diffaccel.run.targets import check_new
from diffaccel.text.terminal import PlainConsole

KEYS = {"train": "reference", "test": "floor"}
"""Split -> the key that names its file."""


class Statistics(L.LightningModule):
    """Takes the statistics of some splits, shared among the trainer's processes.

    Args:
        data: The data module.
        extractor: Gives the features, in float32 whatever the precision of a run.
        splits: Which ones.

    Attributes:
        found: Reference by split.
    """

    def __init__(self, data: DataModule, extractor: Extractor, splits: list[str]) -> None:
        super().__init__()
        self.source, self.extractor, self.splits = data, extractor, splits
        self.found: dict[str, Reference] = {}

    def on_test_start(self) -> None:
        """Go through every split."""
        self.found = {split: compute_reference(self.source, split, self.extractor) for split in self.splits}

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: all is done at the start."""


def write_statistics(config: Config) -> str | None:
    """Write the statistics of the training split and, if there is one, of the test split.

    Args:
        config: The run's. An empty ``reference`` or ``floor`` is a file of that name in OUT; null leaves it out.

    Returns:
        The words that make a bench use them; None in all processes but the first.

    Raises:
        UsageError: A file is there already, can't be written, or has no data.
    """
    console = PlainConsole(stderr=True, soft_wrap=True)
    paths = _paths(config)
    if not paths:
        raise UsageError("nothing to write: set reference=FILE or floor=FILE, or neither for files in OUT")
    if launch.is_first(config):
        check_new(paths.values(), config.again)
    data, extractor = experiment.build_data(config), experiment.build_extractor(config)
    if "test" in paths and (missing := _missing(data)):
        if config.floor or len(paths) == 1:  # it was asked for
            raise missing
        console.print(f"no floor: {missing}")
        del paths["test"]
    module = Statistics(data, extractor, list(paths))
    trainer = launch.build_trainer(dataclasses.replace(config, logger="none", precision="32-true"), [])
    trainer.test(module, DataLoader([0]), verbose=False)  # type: ignore[arg-type]
    if not trainer.is_global_zero:
        return None
    save_references({path: module.found[split] for split, path in paths.items()})
    for split, path in paths.items():
        found = module.found[split]
        console.print(f"{path}: {found.moments.n} {split} images, sha256 {found.sha256[:12]}")
    words = [f"{KEYS[split]}={path}" for split, path in paths.items()]
    if "test" not in paths:
        words.append("floor=null")  # the experiment's own is of other data, or other features
    return shlex.join(words)


def _paths(config: Config) -> dict[str, Path]:
    """File by split."""
    named = {split: getattr(config, key) for split, key in KEYS.items()}
    return {
        split: Path(path or config.folder / f"{KEYS[split]}.npz") for split, path in named.items() if path is not None
    }


def _missing(data: DataModule) -> MissingSplit | None:
    """Open the test split; return the error if there is none."""
    try:
        data.images("test")
    except MissingSplit as error:
        return error
    return None
