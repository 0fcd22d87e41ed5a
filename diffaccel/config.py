"""Configuration: schema, base file, experiment file, command line, in this order; the last word wins.

A file is a short difference over its ``base``. A part (solver, prior ...) is a mapping with a ``name``; the rest of its
keys are the parameters of the constructor registered under that name. A part given by a new name drops the old part's
keys. Paths in a file are relative to that file, paths on the command line to the working directory.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # OmegaConf's parser

from diffaccel import overrides
from diffaccel.checks import check, check_finite, conform
from diffaccel.errors import UsageError, suggest
from diffaccel.methods.base import METHODS, nearest
from diffaccel.methods.small_t import Tradeoff
from diffaccel.methods.training import Training
from diffaccel.overrides import FromEnvironment, as_given, as_plain, keep_references, refuse_references
from diffaccel.trees import PARTS, merge

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

PATHS = ("checkpoint", "init", "reference", "floor", "path", "test_path", "root")
"""Keys that hold a path wherever they stand, resolved against the file that sets them."""

TUNABLE = ("prior", "solver")
"""Parts that ``by_nfe`` may set."""

PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
"""Lightning's short names."""


@dataclass
class Search:
    """A seeded random search for the best prior and solver at each budget, by successive halving."""

    trials: int = 32
    """Settings drawn per budget, the experiment's own among them."""
    images: list[int] = field(default_factory=lambda: [500, 2000])
    """Images per setting, round by round."""
    keep: float = 0.25
    """Share of the settings that goes on to the next round."""
    space: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> its values: a list, or {low, high} with log: true or integer: true. Keys that a drawn part does
    not have are left out."""


@dataclass
class Config:
    """Everything a run may set. Parts are checked when they are built, the rest here."""

    method: dict[str, Any] = field(default_factory=dict)
    """``edm``, ``edm_best``, ``ddpm`` and the four methods, or ``extractor`` for the feature network that scores."""
    data: dict[str, Any] = field(default_factory=dict)
    """Source of images."""
    shape: list[int] = MISSING
    """Image shape [C, H, W]."""
    process: dict[str, Any] = field(default_factory=lambda: {"name": "edm"})
    """Forward process."""
    network: dict[str, Any] = field(default_factory=dict)
    """Backbone of the denoiser; none for an exact one."""
    denoiser: dict[str, Any] = field(default_factory=lambda: {"name": "karras"})
    """Preconditioning."""
    levels: dict[str, Any] = field(default_factory=lambda: {"name": "lognormal"})
    """Noise levels to train at."""
    posterior: dict[str, Any] = field(default_factory=dict)
    """What a chain asks for its noise level."""
    prior: dict[str, Any] = field(default_factory=lambda: {"name": "gaussian"})
    """Law of the starting states."""
    solver: dict[str, Any] = field(default_factory=lambda: {"name": "heun"})
    """Reverse integrator."""
    by_nfe: dict[int, Any] = field(default_factory=dict)
    """Budget -> ``{prior: ..., solver: ...}`` laid over the above from that budget on; the lowest also below it."""
    tuned_for: list[str] = field(default_factory=list)
    """``NETWORK=HASH`` of each of the weights that ``by_nfe`` was searched for, as `diffaccel search` writes it. With
    other weights ``by_nfe`` is left out. Empty if it holds for any."""
    search: Search = field(default_factory=Search)
    """What `diffaccel search` tries."""
    training: Training = field(default_factory=Training)
    """How to train."""
    checkpoint: str | None = None
    """Weights of the denoiser: safetensors, or a checkpoint of ``fit``."""
    init: str | None = None
    """Weights that a fit begins the denoiser with, in place of random ones; of the same kinds of files."""
    extractor: dict[str, Any] = field(default_factory=lambda: {"name": "inception"})
    """Feature network that scores."""
    reference: str | None = None
    """Statistics that images are compared with (npz, from ``diffaccel reference``)."""
    floor: str | None = None
    """Statistics of held-out real images, for the floor."""
    nfe: list[float] = field(default_factory=lambda: [10.0])
    """Budgets: most evaluations per image, one point each; null for an adaptive solver, which keeps to none."""
    n: int = 5000
    """Images per point."""
    seed: int = 0
    """Seed of sampling and of training."""
    batch_size: int = 100
    """Images per sampling batch; training has its own."""
    limit: int | None = None
    """Use only the first images of each split."""
    precision: str = "32-true"
    """Lightning's precision (32-true, bf16-mixed, 16-mixed, 64-true), or ``auto``: bf16-mixed where the device has bf16
    units, 32-true elsewhere. The default gives the same results on every machine, up to rounding."""
    compile: bool = False
    """Compile the networks with torch.compile: some seconds at first, then faster; results change by rounding."""
    channels_last: bool = False
    """Keep activations in channels-last order: faster convolutions on some devices, slower GroupNorm on CPUs."""
    threads: int | None = None
    """CPU threads per process; by default OMP_NUM_THREADS, or the process's share of the usable cores."""
    accelerator: str = "auto"
    """gpu, cpu, or ``auto``: CUDA GPUs if one is visible, else the CPU."""
    devices: int = 1
    """Devices (processes) per node."""
    num_nodes: int = 1
    """Nodes."""
    logger: str = "wandb"
    """``wandb``, ``csv``, ``tensorboard`` or ``none``."""
    wandb_mode: str | None = None
    """``offline`` needs no account; ``online`` uploads; ``disabled``. By default WANDB_MODE, or offline."""
    out: str | None = None
    """Folder to write to; runs/<data>/<method> by default."""
    resume: str | None = None
    """``auto`` goes on from OUT/last.ckpt if there is one; or a checkpoint's path."""
    truncate: bool = False
    """Truncate images to uint8 as the DLG reference does, instead of rounding them."""
    jpeg: int | None = None
    """Score JPEGs of this quality, as the DLG reference did (75); the metrics are then named so, `fd_..._jpeg75`."""
    keep_features: bool = True
    """Keep the features of each point's first 10,000 images, which `diffaccel compare` pairs."""
    keep_images: bool = False
    """Keep each point's images in OUT/images: benched again with another extractor, they are scored, not made anew."""
    likelihood: bool = False
    """Measure bits per dimension of test images beside each point, by the probability flow."""
    likelihood_n: int = 512
    """How many test images."""
    tradeoff: Tradeoff = field(default_factory=Tradeoff)
    """What `diffaccel tradeoff` tries."""
    again: bool = False
    """Make what OUT has already once more: images and statistics replace the old ones, points are added."""
    dry_run: bool = False
    """Print the plan, its cost and memory; measure nothing."""
    format: str = "png"
    """Of ``diffaccel sample``: png, or npz with the arrays ``images`` and, the same, ``arr_0``."""
    experiment: str = ""
    """Where the configuration came from; set by the loader."""

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        """What was chosen for this machine, to be said when work starts; no key."""

    @property
    def method_name(self) -> str:
        """The method's name."""
        return str(self.method["name"])

    @property
    def data_name(self) -> str:
        """The data set's name: the experiment's folder."""
        return Path(self.experiment).absolute().parent.name

    @property
    def folder(self) -> Path:
        """Where a run writes."""
        return Path(self.out or Path("runs", self.data_name, Path(self.experiment).stem))

    def at(self, nfe: float) -> dict[str, dict[str, Any]]:
        """Prior and solver at a budget."""
        own = {"prior": self.prior, "solver": self.solver}
        if not self.by_nfe:
            return own
        return merge(own, self.by_nfe[nearest(self.by_nfe, nfe)])


TEXTS = ("precision", "accelerator", "logger", "wandb_mode", "format", "data.label", "method.metric")
"""Keys whose value on the command line is text, whatever it looks like."""

KEYS = frozenset(item.name for item in dataclasses.fields(Config)) | overrides.ALIASES.keys()
"""Keys that need no part's name before them."""

FLAGS = frozenset(item.name for item in dataclasses.fields(Config) if item.type is bool)
"""Keys that ``--key`` alone sets to true."""


def holds_path(key: str) -> bool:
    """Whether the value of a dotted key is a path."""
    return key.rpartition(".")[2] in (*PATHS, "out", "resume") or key.startswith("tradeoff.densities.")


def load(experiment: str | None, settings: Iterable[str] = (), instead: Mapping[str, Any] | None = None) -> Config:
    """Read an experiment and apply overrides.

    Args:
        experiment: A path, or ``<data>/<method>`` under experiments/; None takes ``method=`` and ``data=`` from the
            overrides.
        settings: ``key=value`` words, see :mod:`diffaccel.overrides`; keys may be dotted.
        instead: Keys of a command that does without the experiment's own values; the settings are laid over them.

    Returns:
        The typed configuration.

    Raises:
        UsageError: A missing or unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    given = parse_overrides(settings)
    if experiment is None:
        experiment = _chosen(given)
    file = find(experiment)
    own = read(file, given=given)
    tree = merge(merge(own, instead or {}), given)
    check_finite(tree, experiment)
    _check_keys(tree)
    tree["experiment"] = experiment if not Path(experiment).is_file() else str(file)
    _tune(tree, given)
    _check_parts(tree)
    _check_method(experiment, file, own, tree)
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
    """Bring a tree to the schema's types.

    Raises:
        UsageError: A value can't be.
    """
    if "nfe" in tree and tree["nfe"] in (None, "none", "None"):
        tree["nfe"] = [math.inf]
    if isinstance(tree.get("nfe"), int | float):
        tree["nfe"] = [tree["nfe"]]
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


def _check_method(experiment: str, file: Path, own: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
    """Refuse to give an experiment the name of another one: its parts stay, so that its points would be mislabelled.

    Raises:
        UsageError: ``method=`` names another one for the same class.
    """
    before, wanted = ((part.get("method") or {}).get("name") for part in (own, tree))
    if wanted and isinstance(before, str) and wanted != before and METHODS[before] is METHODS[wanted]:
        raise UsageError(
            f"method={wanted} would call {experiment} so and change nothing else: name the experiment of that method, "
            f"{file.parent.name}/{wanted}, say"
        )


def _chosen(given: dict[str, Any]) -> str:
    """Take the names ``data`` and ``method``, which are an experiment's here, out of the overrides."""
    parts = [given[key] for key in ("data", "method") if isinstance(given.get(key), dict)]
    names = [part.pop("name", None) for part in parts]
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise UsageError("which experiment? Name one (digits/dlg, or a path), or give method=NAME data=NAME")
    return "/".join(names)


def find(experiment: str) -> Path:
    """Locate an experiment's file.

    Raises:
        UsageError: Neither a file nor a name under experiments/.
    """
    for path in (Path(os.path.expanduser(experiment)), EXPERIMENTS / f"{experiment}.yaml"):
        if path.is_file():
            return _nearby(path)
    names = sorted(p.relative_to(EXPERIMENTS).with_suffix("").as_posix() for p in EXPERIMENTS.glob("*/*.yaml"))
    names = [name for name in names if not name.endswith("/base")]
    raise UsageError(f"experiment {experiment!r} is neither a file nor under {EXPERIMENTS}{suggest(experiment, names)}")


def _nearby(path: Path) -> Path:
    """The path from the working directory if it lies below, else as it is: short in messages and in points."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read(file: Path, above: tuple[Path, ...] = (), given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a YAML file over its ``base``, with paths resolved.

    Args:
        file: The file.
        above: The files that it is a base of.
        given: What the command line sets.

    Raises:
        UsageError: Not YAML, not a mapping, a reference, or a base that doesn't exist or is based on this file.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{file} is no valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{file} holds no mapping of keys to values")
    own = merge({}, {str(key): value for key, value in tree.items()})
    refuse_references(own, file, given)
    base = own.pop("base", None)
    _map_paths(own, lambda path: os.path.normpath(file.parent / Path(path).expanduser()))
    if base is None:
        return own
    parent = file.parent / str(base)
    if not parent.is_file():
        raise UsageError(f"{file}: its base {parent} does not exist")
    if parent.resolve() in above or parent.samefile(file):
        raise UsageError(f"{file}: its base {parent} is in turn based on it: remove one of the two")
    return merge(read(parent, (*above, file.resolve()), given), own)


def _map_paths(tree: dict[str, Any], change: Callable[[str], str]) -> None:
    """Replace each path of a tree, in place, those of budgets and of parts' parts among them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _map_paths(value, change)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    _map_paths(item, change)
        elif key in PATHS and isinstance(value, str):
            tree[key] = change(value)
    densities = tree.get("densities")  # of tradeoff: time -> file
    if isinstance(densities, dict):
        densities.update({T: change(path) for T, path in densities.items() if isinstance(path, str)})


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """Turn ``key=value`` words into a tree.

    Raises:
        UsageError: A word that is no setting, or whose value can't be read.
    """
    tree = overrides.parse(list(words), holds_path, TEXTS)
    _map_paths(tree, lambda path: path if isinstance(path, FromEnvironment) else os.path.expanduser(path))
    return tree


def _tune(tree: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Check ``by_nfe`` and lay what the command line says over each of its entries, in place.

    Raises:
        UsageError: A budget that is no positive whole number, or an entry with other keys than prior and solver.
    """
    entries = tree.get("by_nfe") or {}
    if not isinstance(entries, dict):
        raise UsageError(f"by_nfe={entries!r}: give budgets, each with a prior and a solver")
    tree["by_nfe"] = entries
    if "by_nfe" in given and "tuned_for" not in given:
        tree["tuned_for"] = []  # the user's own settings, for whatever weights
    own = {part: given[part] for part in TUNABLE if part in given}
    for budget, entry in entries.items():
        if not isinstance(budget, int) or budget < 1:
            raise UsageError(f"by_nfe: {budget!r} is no budget: give a positive whole number")
        if not isinstance(entry, dict) or not entry.keys() <= set(TUNABLE):
            raise UsageError(f"by_nfe.{budget}={entry!r}: give a mapping with the keys {' and '.join(TUNABLE)}")
        entries[budget] = merge(entry, own)


def _check_parts(tree: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse parts that are neither a name nor a mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            _check_parts(value, f"{prefix}{key}.")
        elif key == "training" or (key in PARTS and (value is not None or not prefix)):
            raise UsageError(f"{prefix}{key}={value!r}: give a name, or a mapping of keys to values")
        if key in PARTS and isinstance(value, Mapping) and not isinstance(value.get("name", ""), str):
            raise UsageError(f"{prefix}{key}.name={value['name']!r} is no name")


def _check(config: Config) -> None:
    """Refuse what no run can mean."""
    for key, part in (("method", config.method), ("data", config.data)):
        if "name" not in part:
            raise UsageError(f"{config.experiment}: the key '{key}' is missing: give its name")
    check(config)


def as_written(config: Config) -> dict[str, Any]:
    """Return the configuration as a tree to write: references to the environment stay references."""
    return cast(dict[str, Any], as_given(dataclasses.asdict(config)))


def to_yaml(config: Config, folder: Path = Path()) -> str:
    """Write the resolved configuration as YAML, which ``load`` reads back to the same from a file in ``folder``."""
    tree = as_written(config)
    if tree["nfe"] == [math.inf]:
        tree["nfe"] = None
    _map_paths(tree, lambda path: path if os.path.isabs(path) or "${" in path else os.path.relpath(path, folder))
    return OmegaConf.to_yaml(OmegaConf.create(tree))
