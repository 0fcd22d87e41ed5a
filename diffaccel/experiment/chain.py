"""Fits that several experiments require before they can be measured, in the order of their dependencies.

An experiment names the weights of its denoiser, of its prior and of the noise classifier of a chain. A fit makes
weights that do not exist: the fit of the experiment itself, or of the experiment that it inherits the path from. The
classifier of ``dlg`` and the density of ``small_t``, for example, are fitted after the denoiser of ``edm``.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffaccel import experiment
from diffaccel.config import Config, base_of, files_of, find, load, read
from diffaccel.errors import UsageError
from diffaccel.experiment.build import is_subclass
from diffaccel.experiment.order import value_at
from diffaccel.methods import METHODS, Diffusion
from diffaccel.sampling import Sampler


@dataclass
class Step:
    """Fit or measurement of an experiment.

    Attributes:
        verb: ``fit`` or ``bench``.
        name: Name of the experiment in its folder.
        experiment: Name or path of the experiment, as for the commands.
        words: ``key=value`` words.
        config: Configuration.
        sampler: Sampler of a measurement, without weights if fits make some of them.
        waits: Whether fits make some of the weights.
        method: Method of a fit, without the weights that other fits make.
    """

    verb: str
    name: str
    experiment: str
    words: list[str]
    config: Config
    sampler: Sampler | None = None
    waits: bool = False
    method: Diffusion | None = None


@dataclass
class Chain:
    """Planner of the steps.

    Args:
        files: Experiments of the folder by name, as for the commands.
        words: Settings of all steps.
        root: Folder of measurements, and of fits whose weights have no place of their own.
        settle: Function that adapts a configuration to the machine.

    Attributes:
        steps: Steps in the order of their dependencies.
    """

    files: Mapping[str, str]
    words: Sequence[str]
    root: Path
    settle: Callable[[Config], None] = lambda config: None
    steps: list[Step] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def bench(self, name: str) -> None:
        """Add the measurement of an experiment, after the fits that it requires.

        Raises:
            UsageError: The experiment is invalid, or no fit makes its weights.
        """
        config = self._config(name)
        own = self._weights(name, config, experiment.build_frozen(config, load=False))
        words = [*self.words, *own.words, f"out={self.root / name}"]
        config = self._config(name, words)
        # Built again, because the words may set a checkpoint with a network of its own.
        sampler = experiment.build_frozen(config, load=not own.waits)
        self.steps.append(Step("bench", name, self.files[name], words, config, sampler, own.waits))

    def fit(self, name: str, kind: str) -> Path:
        """Add the fit of an experiment, unless it is complete, and return the file of the weights of a kind.

        Raises:
            UsageError: The fit does not make weights of this kind, or depends on itself.
        """
        if name in self._open:
            raise UsageError(f"the fits of {', '.join(self._open)} depend on each other: set checkpoint= for one")
        config = _fitted(self._config(name))
        method: Any = METHODS[config.method["name"]]
        if not is_subclass(method, Diffusion):
            raise UsageError(f"{config.experiment} is not the experiment of a method: leave out {name}")
        built = experiment.build_method(config, load=False)
        # Of a network's weights, the averaged ones come last.
        names = {said["kind"]: f"{stem}.safetensors" for stem, (_, said) in built.exports().items()}
        if kind not in names:
            raise UsageError(
                f"{config.experiment} has no weights for its {kind}, which its fit does not train: set "
                f"{KEYS.get(kind, 'prior.checkpoint')}=FILE"
            )
        places = self._places(name, names)
        for out in places:
            if all((out / file).is_file() for file in names.values()):
                return out / names[kind]
        planned = next((step for step in self.steps if step.verb == "fit" and step.name == name), None)
        if planned is None:
            self._open.append(name)
            given = self._weights(name, config, built.sampler, without=names)
            self._open.remove(name)
            out = next((place for place in places if not self._is_taken(place, name)), places[-1])
            words = [*self.words, *given.words, f"out={out}"]
            words += ["resume=auto"] if (out / "last.ckpt").is_file() else []
            config = _fitted(self._config(name, words))
            load_frozen = built.frozen and not given.waits
            method = experiment.build_method(config, load=load_frozen)
            planned = Step("fit", name, self.files[name], words, config, waits=given.waits, method=method)
            self.steps.append(planned)
        return planned.config.folder / names[kind]

    def _config(self, name: str, words: Sequence[str] | None = None) -> Config:
        config = load(self.files[name], self.words if words is None else words)
        self.settle(config)
        return config

    def _places(self, name: str, names: Mapping[str, str]) -> list[Path]:
        """Folders for a fit: that of the experiment's weights, if these are named as a fit's output, and its own."""
        files = configured(self._config(name))
        paths = ((files.get(KEYS.get(kind, "prior.checkpoint")), file) for kind, file in names.items())
        found = [path.parent for path, file in paths if path is not None and path.name == file]
        return [*found[:1], self.root / "fits" / name]

    def _is_taken(self, folder: Path, name: str) -> bool:
        """Whether a folder has, or will have, the training state of another experiment's fit."""
        if any(step.verb == "fit" and step.config.folder.resolve() == folder.resolve() for step in self.steps):
            return True
        if not (folder / "last.ckpt").is_file() or not (folder / "config.yaml").is_file():
            return False
        _, tree = next(files_of(folder / "config.yaml"))
        # By the last part of the name, because the folder may have been given by another path.
        return Path(str(tree.get("experiment", name))).stem != Path(self.files[name]).stem

    def _weights(self, name: str, config: Config, sampler: Sampler, without: Mapping[str, str] = {}) -> "_Words":  # noqa: B006
        """Return the words that set the weights of an experiment, after planning the fits that make missing ones.

        Args:
            name: Name of the experiment.
            config: Its configuration.
            sampler: Its sampler, for the kinds of weights that it requires.
            without: Kinds that are made by the step itself.
        """
        found, files = _Words([]), configured(config)
        for key, kind in _required(config, sampler).items():
            path = files.get(key)
            if kind in without or (path is not None and path.exists()):
                continue
            maker = self._maker(name, key, path)
            made = self.fit(maker, kind)
            found.waits = found.waits or not made.is_file()
            if path is None or os.path.abspath(path) != os.path.abspath(made):
                found.words.append(f"{key}={made}")
        return found

    def _maker(self, name: str, key: str, path: Path | None) -> str:
        """Name of the experiment whose fit makes a file: of an experiment and its bases, the last with this path."""
        if path is None:
            return name
        known = {os.path.realpath(find(file)): other for other, file in self.files.items()}
        maker = name
        for file in _lineage(find(self.files[name])):
            named = value_at(read(file), key)
            if named is None or os.path.abspath(named) != os.path.abspath(path):
                break
            maker = known.get(os.path.realpath(file), maker)
        return maker


@dataclass
class _Words:
    """Words that set weights, and whether some of the files do not exist yet."""

    words: list[str]
    waits: bool = False


KEYS = {"denoiser": "checkpoint", "classifier": "posterior.checkpoint"}
"""Key of the weights of a kind; that of other kinds is ``prior.checkpoint``."""


def _required(config: Config, sampler: Sampler) -> dict[str, str]:
    """Return the kind of the weights that each key of an experiment has to set."""
    found = {"checkpoint": "denoiser"} if config.network else {}
    for kind in sampler.prior.networks():
        found["prior.checkpoint"] = kind
    return found | ({"posterior.checkpoint": "classifier"} if sampler.auxiliary_networks() else {})


def configured(config: Config) -> dict[str, Path]:
    """Return the file of each key of weights that is set."""
    found = {
        "checkpoint": config.checkpoint,
        "prior.checkpoint": config.prior.get("checkpoint"),
        "posterior.checkpoint": config.posterior.get("checkpoint"),
    }
    return {key: Path(path) for key, path in found.items() if path}


def _fitted(config: Config) -> Config:
    """Remove, as a fit does, the weights that are trained; see :func:`diffaccel.verbs.fit.fit`."""
    for part in (config.posterior, config.prior, *(entry.get("prior", {}) for entry in config.by_nfe.values())):
        part.pop("checkpoint", None)
    return config


def _lineage(file: Path) -> list[Path]:
    """Return a file and its bases, in this order."""
    found = [file]
    while (base := base_of(found[-1])) is not None:
        found.append(base)
    return found
