"""Loading of configurations, merged from schema, base file, experiment file and command line, in this order.

A file contains only differences to its ``base``. A part (solver, prior ...) is a mapping with a ``name``; its other
keys are parameters of the constructor registered under that name. If a part gets another name, the old part's keys are
dropped. Prior and solver of a file also apply to the settings by budget (``by_nfe``) of its base, those of the command
line to all of them. Paths in a file are relative to the file, paths on the command line to the working directory.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # OmegaConf's parser

from diffaccel.config.keys import check_parts, holds_path, holds_text, map_paths, name_parts
from diffaccel.config.schema import PRECISIONS, TUNABLE, Config
from diffaccel.errors import UsageError, suggest
from diffaccel.methods.registry import FORMER
from diffaccel.parts import overrides
from diffaccel.parts.catalogue import registry_of
from diffaccel.parts.checks import check, check_finite, conform
from diffaccel.parts.overrides import FromEnvironment, as_given, as_plain, keep_references, refuse_references
from diffaccel.parts.trees import STATISTICS, merge

_INSTALLED = Path(__file__).parents[1] / "experiments"  # only in a wheel; in a clone they are at the top level
EXPERIMENTS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "experiments"


SWEEPS = "sweeps"
"""Folder of the sweeps under experiments/."""


def load(
    experiment: str | None,
    settings: Iterable[str] = (),
    instead: Mapping[str, Any] | None = None,
    trains: bool = True,
) -> Config:
    """Read an experiment and apply overrides.

    Args:
        experiment: Path, or ``<data>/<method>`` under experiments/; None for ``method=`` and ``data=`` in the
            overrides.
        settings: ``key=value`` words, see :mod:`diffaccel.parts.overrides`; keys may be dotted.
        instead: Values that replace those of the experiment before the overrides are applied.
        trains: Whether to keep the keys of the method. Sampling does not use them, and checking them requires
            Lightning, which takes seconds to import.

    Returns:
        Typed configuration.

    Raises:
        UsageError: A file is missing or unreadable, a key is unknown, or a value has the wrong type or is out of range.
    """
    settings = list(settings)
    given = parse_overrides(settings, trains)
    if experiment is None:
        experiment = _chosen(given)
        data, _, method = experiment.rpartition("/")
        names = {f"data={data}", f"data.name={data}", f"method={method}", f"method.name={method}"}
        settings = [word for word in settings if word not in names]  # the words of a run follow its experiment
    file = find(experiment)
    tree = _layered(merge(read(file, given=given, trains=trains), instead or {}), given, "the command line")
    tree["experiment"] = experiment if not Path(experiment).is_file() else str(file)
    config = _complete(tree, given, experiment)
    config.searched = _is_searched(config, file, given)
    config.words = settings
    return config


def load_tree(tree: Mapping[str, Any], settings: Iterable[str], where: str) -> Config:
    """Apply overrides to keys that are not from an experiment's file; nothing is trained.

    Args:
        tree: Keys, ``shape``, ``method`` and ``data`` among them.
        settings: See :func:`load`.
        where: Name of the keys in messages.

    Raises:
        UsageError: See :func:`load`.
    """
    given = parse_overrides(settings, trains=False)
    return _complete(_layered(dict(tree), given, "the command line"), given, where)


def _complete(tree: dict[str, Any], given: Mapping[str, Any], experiment: str) -> Config:
    """Check a merged tree, and convert it to a configuration."""
    check_finite(tree, experiment)
    _check_keys(tree)
    _tune(tree, given)
    check_parts(tree)
    if "shape" not in tree:
        raise UsageError(f"{experiment}: the key 'shape' is missing: give [channels, height, width]")
    config = _typed(tree, experiment)
    _check(config)
    return config


def _check_keys(tree: dict[str, Any]) -> None:
    known = {item.name for item in dataclasses.fields(Config)}
    for key in tree:
        if key not in known:
            raise UsageError(f"no key is called {key!r}{suggest(str(key), known)}")


def _typed(tree: dict[str, Any], experiment: str) -> Config:
    """Convert a tree to the schema's types.

    Raises:
        UsageError: A value can't be converted.
    """
    if "nfe" in tree and tree["nfe"] in (None, "none", "None"):
        tree["nfe"] = [math.inf]
    if isinstance(tree.get("nfe"), int | float):
        tree["nfe"] = [tree["nfe"]]
    training = tree.get("training")
    if isinstance(training, dict) and type(training.get("ema_half_life")) in (int, float):
        training["ema_half_life"] = [training["ema_half_life"]]
    if "precision" in tree:
        tree["precision"] = PRECISIONS.get(str(tree["precision"]), tree["precision"])
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), as_plain(conform("", tree, Config))))
    except OmegaConfBaseException as error:
        where = f"{experiment}: the key {error.full_key!r}" if error.full_key else experiment
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    keep_references(config, tree)
    return config


def _chosen(given: dict[str, Any]) -> str:
    """Remove the names ``data`` and ``method`` from the overrides, and return the experiment that they specify."""
    parts = [given[key] for key in ("data", "method") if isinstance(given.get(key), dict)]
    names = [part.pop("name", None) for part in parts]
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise UsageError("no experiment is given: give its name (digits/dlg) or path, or method=NAME data=NAME")
    return "/".join(names)


def find(experiment: str) -> Path:
    """Locate the file of an experiment: a file, with or without ``.yaml``, or one under experiments/.

    Raises:
        UsageError: The experiment is neither a file nor a name under experiments/.
    """
    own = os.path.expanduser(experiment)
    for path in (Path(own), Path(f"{own}.yaml"), EXPERIMENTS / f"{experiment}.yaml"):
        if path.is_file():
            return _nearby(path)
    known = suggest(experiment, experiment_names())
    raise UsageError(f"experiment {experiment!r} is neither a file nor under {EXPERIMENTS}{known}")


def experiment_names() -> list[str]:
    """Return the names of the shipped experiments: files under experiments/ except for bases and sweeps."""
    files = [file.relative_to(EXPERIMENTS).with_suffix("") for file in EXPERIMENTS.glob("*/*.yaml")]
    return sorted(file.as_posix() for file in files if not is_base(file) and file.parent.name != SWEEPS)


def is_base(file: Path) -> bool:
    """Whether a file is a base of experiments, by its name: ``base`` or ``base_...``."""
    return file.stem == "base" or file.stem.startswith("base_")


def base_of(file: Path) -> Path | None:
    """Return the file that an experiment's file is based on, which may not exist; None if it has no base."""
    base = _tree(file).get("base")
    return None if base is None else file.parent / str(base)


def files_of(file: Path) -> Iterator[tuple[Path, dict[Any, Any]]]:
    """Yield an experiment's file and then its bases, each with its keys as they are written; imports no parts.

    Raises:
        UsageError: A file is not YAML, or is not a mapping.
    """
    above: set[Path] = set()
    base: Path | None = file
    while base is not None and base.is_file() and base.resolve() not in above:
        above.add(base.resolve())
        tree = _tree(base)
        yield base, tree
        base = None if tree.get("base") is None else base.parent / str(tree["base"])


def portable(path: str) -> str:
    """Return a path as points record it: that of a shipped file is ``experiments/...``, wherever the package is."""
    absolute = Path(os.path.abspath(path))
    if isinstance(path, FromEnvironment) or not absolute.is_relative_to(EXPERIMENTS):
        return path
    return Path("experiments", absolute.relative_to(EXPERIMENTS)).as_posix()


def located(path: str) -> str:
    """Return where a file is whose path is :func:`portable`; any other path as it is."""
    first, *below = Path(path).parts or ("",)
    shipped = EXPERIMENTS.joinpath(*below)
    return str(_nearby(shipped)) if first == "experiments" and not Path(path).exists() and shipped.exists() else path


def _nearby(path: Path) -> Path:
    """Make a path in the working directory relative, for shorter messages and points."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read(
    file: Path, above: tuple[Path, ...] = (), given: Mapping[str, Any] | None = None, trains: bool = True
) -> dict[str, Any]:
    """Read a YAML file, merged into its ``base``, with paths resolved.

    Args:
        file: File.
        above: Files that have this file as their base.
        given: Overrides of the command line.
        trains: See :func:`load`.

    Raises:
        UsageError: The file is not YAML, is not a mapping, or contains a reference; or its base does not exist or is
            based on this file.
    """
    tree = _tree(file)
    if "parameters" in tree and "command" in tree:
        raise UsageError(f"{file} is a sweep, not an experiment: run it with `diffaccel sweep {file}`")
    own = merge({}, {str(key): value for key, value in tree.items()})
    _drop_training(own, trains)
    name_parts(own)
    _rename_method(own)
    refuse_references(own, file, given)
    base = own.pop("base", None)

    def resolve(path: str) -> str:
        return os.path.normpath(file.parent / Path(path).expanduser())

    if base is None:
        map_paths(own, resolve)
        return _layered({}, own, file)
    parent = file.parent / str(base)
    if not parent.is_file():
        raise UsageError(f"{file}: its base {parent} does not exist")
    if parent.resolve() in above or parent.samefile(file):
        raise UsageError(f"{file}: its base {parent} is in turn based on it: remove one of the two")
    below = read(parent, (*above, file.resolve()), given, trains)
    map_paths(own, resolve, below)
    if isinstance(below.get("by_nfe"), dict):
        below["by_nfe"] = _laid_over(below["by_nfe"], own)
    return _layered(below, own, file)


def _tree(file: Path) -> dict[Any, Any]:
    """Read a YAML file as it is."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{file} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{file} does not contain a mapping of keys to values")
    return tree


def _layered(below: dict[str, Any], own: dict[str, Any], where: object) -> dict[str, Any]:
    """Merge settings; the last to set ``extractor`` or ``judges`` decides what scores images.

    Raises:
        UsageError: ``own`` sets both.
    """
    if "extractor" in own and own.get("judges"):
        raise UsageError(f"{where}: both extractor and judges are set: list all extractors in judges")
    if "extractor" in own:
        below = {key: value for key, value in below.items() if key != "judges"}
    return merge(below, own)


def _rename_method(own: dict[str, Any]) -> None:
    """Replace, in place, what a file of version 0.1 calls a method and is an experiment."""
    method = own.get("method")
    if isinstance(method, dict) and method.get("name") in FORMER:
        own["method"] = {"label": method["name"], **method, "name": "diffusion"}


def _drop_training(tree: dict[str, Any], trains: bool) -> None:
    """Remove all keys of the method except for name and label, in place, if nothing is trained."""
    if not trains and isinstance(method := tree.get("method"), Mapping):
        tree["method"] = {key: value for key, value in method.items() if key in ("name", "label")}


def parse_overrides(words: Iterable[str], trains: bool = True) -> dict[str, Any]:
    """Convert ``key=value`` words to a tree.

    Raises:
        UsageError: A word is not a setting, or its value can't be read.
    """
    tree = overrides.parse(list(words), holds_path, holds_text)
    _drop_training(tree, trains)
    name_parts(tree)
    map_paths(tree, lambda path: path if isinstance(path, FromEnvironment) else os.path.expanduser(path))
    return tree


def _tune(tree: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Check ``by_nfe``, and apply the overrides of the command line to each of its entries, in place.

    Raises:
        UsageError: A budget is not a positive integer, or an entry has keys other than prior and solver.
    """
    entries = tree.get("by_nfe") or {}
    if not isinstance(entries, dict):
        raise UsageError(f"by_nfe={entries!r}: give budgets, each with a prior and a solver")
    tree["by_nfe"] = entries
    if "by_nfe" in given and "tuned_for" not in given:
        tree["tuned_for"] = []  # the user's own settings, for any weights
    for budget, entry in entries.items():
        if not isinstance(budget, int) or budget < 1:
            raise UsageError(f"by_nfe: {budget!r} is not a budget: give a positive whole number")
        if not isinstance(entry, dict) or not entry.keys() <= set(TUNABLE):
            raise UsageError(f"by_nfe.{budget}={entry!r}: give a mapping with the keys {' and '.join(TUNABLE)}")
    tree["by_nfe"] = _laid_over(entries, given)


def _laid_over(entries: Mapping[Any, Any], own: Mapping[str, Any]) -> dict[Any, Any]:
    """Merge the prior and solver of ``own`` into each entry of ``by_nfe``; entries that are no mappings are left."""
    parts = {part: own[part] for part in TUNABLE if part in own}
    return {key: merge(entry, parts) if isinstance(entry, Mapping) else entry for key, entry in entries.items()}


def _is_searched(config: Config, file: Path, given: Mapping[str, Any]) -> bool:
    """Whether the settings by budget are those of the file that sets ``tuned_for``, and nothing was laid over them.

    Weights are left out, because ``tuned_for`` identifies them.
    """
    searched = next((path for path, keys in files_of(file) if keys.get("tuned_for")), None)
    if searched is None or not config.tuned_for:
        return False
    tree = read(searched, given=given, trains=False)
    return _by_budget(tree) == _by_budget({part: getattr(config, part) for part in (*TUNABLE, "by_nfe")})


def _by_budget(tree: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """Prior and solver of each entry of ``by_nfe``, without weights."""
    own, found = {part: tree.get(part, getattr(Config(), part)) for part in TUNABLE}, {}
    for budget, entry in (tree.get("by_nfe") or {}).items():
        found[budget] = {
            part: {key: value for key, value in (node or {}).items() if key not in registry_of(part).extra}
            for part, node in merge(own, entry or {}).items()
        }
    return found


def _check(config: Config) -> None:
    """Check names and values that no run can have."""
    for key, part in (("method", config.method), ("data", config.data)):
        if "name" not in part:
            raise UsageError(f"{config.experiment}: the key '{key}' is missing: give its name")
    for key in STATISTICS:
        value = getattr(config, key)
        files = list(value.values()) if isinstance(value, dict) else [value]
        if not all(file is None or isinstance(file, str) for file in files):
            raise UsageError(f"{key}={value!r}: give a file, or a mapping of judges to files")
    check(config)


def as_written(config: Config) -> dict[str, Any]:
    """Return the configuration as a tree for writing, with references to the environment unresolved."""
    tree = cast(dict[str, Any], as_given(dataclasses.asdict(config)))
    if not config.searched:
        tree["tuned_for"] = []  # the settings were changed since
    tree.pop("extractor" if config.judges else "judges")  # a file sets one of them
    return tree


def to_yaml(config: Config, folder: Path = Path()) -> str:
    """Convert the resolved configuration to YAML that ``load`` can read from a file in ``folder``."""
    tree = as_written(config)
    if tree["nfe"] == [math.inf]:
        tree["nfe"] = None
    map_paths(tree, lambda path: path if os.path.isabs(path) or "${" in path else os.path.relpath(path, folder))
    return OmegaConf.to_yaml(OmegaConf.create(tree))
