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

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # OmegaConf's parser

from diffaccel.errors import UsageError, suggest
from diffaccel.methods.base import nearest
from diffaccel.methods.small_t import Tradeoff
from diffaccel.methods.training import Training

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

PARTS = (
    *("method", "data", "process", "network", "denoiser", "levels", "posterior", "prior", "solver", "extractor"),
    *("grid", "init_solver", "attenuation", "density"),  # parts of parts
)
"""Keys that hold a part; a bare string there is its name."""

PATHS = (
    "checkpoint",
    "init",
    "posterior.checkpoint",
    "prior.checkpoint",
    "prior.init",
    "reference",
    "floor",
    "extractor.path",
    "data.path",
    "data.test_path",
    "data.root",
)
"""Keys that hold a path, resolved against the file that sets them."""

TUNABLE = ("prior", "solver")
"""Parts that ``by_nfe`` may set."""

ALIASES = {"chains": "prior.chains", "images": "training.images"}
"""Short keys of the command line."""


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
    """Lightning's precision: 32-true, bf16-mixed, 16-mixed, 64-true."""
    compile: bool = False
    """Compile the networks with torch.compile: some seconds at first, then faster; results change by rounding."""
    channels_last: bool = False
    """Keep activations in channels-last order: faster convolutions on some devices, slower GroupNorm on CPUs."""
    threads: int | None = None
    """CPU threads per process."""
    accelerator: str = "auto"
    """Lightning's accelerator: auto, cpu, gpu."""
    devices: int = 1
    """Devices (processes) per node."""
    num_nodes: int = 1
    """Nodes."""
    logger: str = "wandb"
    """``wandb``, ``csv``, ``tensorboard`` or ``none``."""
    wandb_mode: str = "offline"
    """``offline`` needs no account; ``online`` uploads."""
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


def load(experiment: str | None, overrides: Iterable[str] = (), instead: Mapping[str, Any] | None = None) -> Config:
    """Read an experiment and apply overrides.

    Args:
        experiment: A path, or ``<data>/<method>`` under experiments/; None takes ``method=`` and ``data=`` from the
            overrides.
        overrides: ``key=value`` words; a leading ``--`` is ignored, keys may be dotted, values are YAML.
        instead: Keys of a command that does without the experiment's own values; the overrides are laid over them.

    Returns:
        The typed configuration.

    Raises:
        UsageError: A missing or unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    given = parse_overrides(overrides)
    if experiment is None:
        experiment = _chosen(given)
    file = find(experiment)
    tree = merge(merge(read(file), instead or {}), given)
    known = {item.name for item in dataclasses.fields(Config)}
    for key in tree:
        if key not in known:
            raise UsageError(f"no key is called {key!r}{suggest(str(key), known)}")
    if "nfe" in tree and not isinstance(tree["nfe"], list):
        tree["nfe"] = [math.inf if tree["nfe"] is None else tree["nfe"]]
    tree["experiment"] = experiment if not Path(experiment).is_file() else str(file)
    _tune(tree, given)
    _check_parts(tree)
    if "shape" not in tree:
        raise UsageError(f"{experiment}: the key 'shape' is missing: give [channels, height, width]")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree))
    except OmegaConfBaseException as error:
        where = f"{experiment}: the key {error.full_key!r}" if error.full_key else experiment
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    _check(config)
    return config


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
    for path in (Path(experiment), EXPERIMENTS / f"{experiment}.yaml"):
        if path.is_file():
            return _nearby(path)
    names = sorted(p.relative_to(EXPERIMENTS).with_suffix("").as_posix() for p in EXPERIMENTS.glob("*/*.yaml"))
    names = [name for name in names if not name.endswith("/base")]
    raise UsageError(f"experiment {experiment!r} is neither a file nor under {EXPERIMENTS}{suggest(experiment, names)}")


def _nearby(path: Path) -> Path:
    """The path from the working directory if it lies below, else as it is: short in messages and in points."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file over its ``base``, with paths resolved.

    Args:
        file: The file.
        above: The files that it is a base of.

    Raises:
        UsageError: Not YAML, not a mapping, or a base that doesn't exist or is based on this file.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is no valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{file} holds no mapping of keys to values")
    own = merge({}, {str(key): value for key, value in tree.items()})
    base = own.pop("base", None)
    _map_paths(own, lambda path: os.path.normpath(file.parent / Path(path).expanduser()))
    if base is None:
        return own
    parent = file.parent / str(base)
    if not parent.is_file():
        raise UsageError(f"{file}: its base {parent} does not exist")
    if parent.resolve() in above or parent.samefile(file):
        raise UsageError(f"{file}: its base {parent} is in turn based on it: remove one of the two")
    return merge(read(parent, (*above, file.resolve())), own)


def _map_paths(tree: dict[str, Any], change: Callable[[str], str]) -> None:
    """Replace each path of a tree, in place."""
    for name in PATHS:
        *parents, last = name.split(".")
        branch: Any = tree
        for key in parents:
            branch = branch.get(key) if isinstance(branch, dict) else None
        if isinstance(branch, dict) and isinstance(branch.get(last), str):
            branch[last] = change(branch[last])


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """Turn ``key=value`` words into a tree.

    Raises:
        UsageError: A word without ``=``, or a value that is no YAML.
    """
    tree: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.lstrip("-").partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is no key=value")
        try:
            parsed = OmegaConf.create(f"value: {value}") if value else OmegaConf.create({"value": None})
        except (YAMLError, OmegaConfBaseException) as error:
            raise UsageError(f"{word!r}: {str(error).splitlines()[0]}") from None
        assert isinstance(parsed, DictConfig)
        plain = OmegaConf.to_container(parsed)
        assert isinstance(plain, dict)
        branch: Any = plain["value"]
        for name in reversed(ALIASES.get(key, key).split(".")):
            branch = {name: branch}
        tree = merge(tree, cast(dict[str, Any], branch))
    return tree


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``new`` over ``old``: mappings key by key, except that a part of another name replaces the old one whole."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if key == "by_nfe" and not value:  # drops them, as null does; laid key by key it would say nothing
            before = None
        if key in PARTS and isinstance(value, str):
            value = {"name": value}
        if key in PARTS and isinstance(before, str):
            before = {"name": before}
        renamed = isinstance(value, Mapping) and isinstance(before, Mapping) and _renames(before, value)
        nests = isinstance(value, Mapping) and isinstance(before, Mapping) and not renamed
        if isinstance(value, Mapping):
            value = merge(cast(Mapping[str, Any], before) if nests else {}, value)
        merged[key] = value
    return merged


def _renames(before: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return "name" in value and "name" in before and value["name"] != before["name"]


def _tune(tree: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Check ``by_nfe`` and lay what the command line says over each of its entries, in place.

    Raises:
        UsageError: A budget that is no positive whole number, or an entry with other keys than prior and solver.
    """
    entries = tree.get("by_nfe") or {}
    if not isinstance(entries, dict):
        raise UsageError(f"by_nfe={entries!r}: give budgets, each with a prior and a solver")
    tree["by_nfe"] = entries
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


def _check(config: Config) -> None:
    """Refuse numbers that no run can mean."""
    for key, part in (("method", config.method), ("data", config.data)):
        if "name" not in part:
            raise UsageError(f"{config.experiment}: the key '{key}' is missing: give its name")
    positive = {"n": config.n, "batch_size": config.batch_size, "devices": config.devices, "threads": config.threads}
    for key, value in {**positive, "num_nodes": config.num_nodes}.items():
        if value is not None and value < 1:
            raise UsageError(f"{key}={value}: it must be 1 or more")
    if not config.nfe or min(config.nfe) <= 0:
        raise UsageError(f"nfe={config.nfe}: give one or more positive budgets")
    if len(config.shape) != 3 or min(config.shape) < 1:
        raise UsageError(f"shape={config.shape}: give [channels, height, width]")
    choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("logger", config.logger, ("wandb", "csv", "tensorboard", "none")),
        ("wandb_mode", config.wandb_mode, ("offline", "online", "disabled")),
        ("format", config.format, ("png", "npz")),
        ("precision", config.precision, ("32-true", "bf16-mixed", "16-mixed", "64-true")),
        ("accelerator", config.accelerator, ("auto", "cpu", "gpu")),
    )
    for name, choice, allowed in choices:
        if choice not in allowed:
            raise UsageError(f"{name}={choice!r} is none of {', '.join(allowed)}")


def to_yaml(config: Config, folder: Path = Path()) -> str:
    """Write the resolved configuration as YAML, which ``load`` reads back to the same from a file in ``folder``."""
    tree = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))
    _map_paths(tree, lambda path: path if os.path.isabs(path) else os.path.relpath(path, folder))
    return OmegaConf.to_yaml(tree)
