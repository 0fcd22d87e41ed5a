"""Construction of the extractors and statistics that score images."""

from collections.abc import Mapping
from typing import Any

from diffaccel.config import Config
from diffaccel.errors import UsageError
from diffaccel.evaluation.judges import Judge
from diffaccel.experiment.latents import image_shape_of
from diffaccel.features.extractors import EXTRACTORS, Extractor
from diffaccel.features.jpeg import AsJPEG
from diffaccel.metrics.base import Real
from diffaccel.metrics.reference import Reference, check_held_out, check_same_data, file_of, load_reference


def build_extractors(config: Config) -> list[Extractor]:
    """Build the feature extractors of all judges.

    Raises:
        UsageError: Weights are missing or damaged, or two extractors have the same name.
    """
    found = [EXTRACTORS.build(node) for node in config.extractors]
    check_names([extractor.name for extractor in found])
    return found


def check_names(names: list[str]) -> None:
    """Check that all extractors have names of their own.

    Raises:
        UsageError: Two have the same name.
    """
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"judges: two of them are called {twice[0]!r}: list each extractor once")


def build_extractor(config: Config) -> Extractor:
    """Build the feature extractor of the first judge."""
    return EXTRACTORS.build(config.extractors[0])


def build_judges(config: Config, label: str, only: str | None = None) -> list[Judge]:
    """Build the judges, and check that their statistics are of the experiment's data.

    Args:
        config: Configuration of the run.
        label: Label of the data.
        only: Name of the only judge to build; None for all.

    Raises:
        UsageError: No judge has the name ``only``; a judge has no reference; or the weights or statistics are missing,
            damaged, or don't match.
    """
    extractors = build_extractors(config)
    names = [extractor.name for extractor in extractors]
    check_files({"reference": config.reference, "floor": config.floor}, names)
    if only is not None and only not in names:
        raise UsageError(
            f"no judge is called {only!r} among {', '.join(names)}: choose one of these, or add it to judges"
        )
    chosen = [extractor for extractor in extractors if only in (None, extractor.name)]
    missing = [one.name for one in chosen if not file_of(config.reference, one.name)]
    if missing and len(names) == 1:
        raise UsageError(
            f"{config.experiment} has no reference: compute one with `diffaccel reference EXPERIMENT`, and set "
            "reference="
        )
    if missing:
        words = " ".join(f"reference.{name}=FILE" for name in missing)
        raise UsageError(
            f"{config.experiment} has no reference for the judges {', '.join(missing)}: compute the statistics of all "
            f"judges with `diffaccel reference EXPERIMENT judges=...`, and set {words}"
        )
    return [_build(config, extractor, label) for extractor in chosen]


def _build(config: Config, extractor: Extractor, label: str) -> Judge:
    def load(files: Any) -> Reference | None:
        path = file_of(files, extractor.name)
        if not path:
            return None
        found = load_reference(path, extractor)
        check_same_data(path, found, label, image_shape_of(config))
        return found

    reference, floor = load(config.reference), load(config.floor)
    assert reference is not None
    check_held_out(str(file_of(config.floor, extractor.name)), floor, reference)
    return Judge(extractor if config.jpeg is None else AsJPEG(extractor, config.jpeg), Real(reference, floor))


def check_files(files: Mapping[str, Any], names: list[str]) -> None:
    """Check that several judges have a file of statistics each.

    Args:
        files: Files of statistics by key: a file, or a mapping of names of judges to files.
        names: Names of the judges.

    Raises:
        UsageError: There is one file for several judges.
    """
    for key, file in files.items():
        if isinstance(file, str) and file and len(names) > 1:
            words = " ".join(f"{key}.{name}=FILE" for name in names)
            raise UsageError(f"{key}={file} is one file, but there are {len(names)} judges: set {words}")
