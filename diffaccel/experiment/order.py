"""Fits of a folder of experiments: which are needed, in which order, and which are done.

Experiments name files of weights under the keys :data:`KEYS`, and several may name the same file, for example that of a
denoiser that they share. The experiment whose own file sets the key, and does not inherit it from its ``base``, makes
these weights, unless its method freezes the part. An extractor's weights are made by the experiment of the method
``extractor`` that has the name of the file, and an auto-encoder's by that of the method ``autoencoder``. A fit needs
the weights that its experiment names and does not make.

Weights are read from the file that the experiments name, if it exists, as for shipped weights, and otherwise from the
output folder of the fit, ``ROOT/<name>``.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffaccel.config import EXPERIMENTS, Config, base_of, load, read
from diffaccel.config.loader import SWEEPS, is_base
from diffaccel.errors import UsageError, suggest
from diffaccel.experiment.trained_on import PresentImages
from diffaccel.weights import open_weights

AUTOENCODER = "latents.checkpoint"
"""Key of the file of an auto-encoder, which the experiment of the method ``autoencoder`` makes."""
KEYS = ("checkpoint", "prior.checkpoint", "posterior.checkpoint", AUTOENCODER)
"""Keys of files of trained weights."""
EXTRACTOR = "extractor"
"""Key that stands for the files of all extractors of an experiment."""


class Made(NamedTuple):
    """Weights that a fit makes.

    Attributes:
        key: Key under which experiments name the file, one of :data:`KEYS` or :data:`EXTRACTOR`.
        named: File that the experiments name.
        left: File in the output folder of the fit.
    """

    key: str
    named: Path
    left: Path

    @property
    def elsewhere(self) -> bool:
        """Whether the weights are not in the file that the experiments name."""
        return not self.named.exists() and _real(self.named) != _real(self.left)


class Fit(NamedTuple):
    """Fit of an experiment.

    Attributes:
        name: Name of the experiment in its folder.
        experiment: Experiment, as for ``diffaccel fit``.
        folder: Output folder.
        makes: Weights that it makes.
        needs: Weights of other fits that it reads.
        done: Whether all weights exist, from as many images as the fit has.
        begun: Whether there is a training state, from which the fit resumes.
        fewer: Files that the experiments name, which are kept, with the number of images that they were fitted on, if
            this is less than the fit has.
    """

    name: str
    experiment: str
    folder: Path
    makes: tuple[Made, ...]
    needs: tuple[Made, ...]
    done: bool
    begun: bool
    fewer: tuple[tuple[Path, int], ...] = ()

    def words(self) -> list[str]:
        """Return the settings of ``diffaccel fit``: output folder, resuming, and the weights of other fits."""
        return [f"out={self.folder}", "resume=auto", *settings_of(self.needs)]


def of_steps(word: str) -> bool:
    """Whether a ``key=value`` word is a setting of training in steps, as opposed to an extractor's epochs."""
    key = word.partition("=")[0]
    return key == "images" or key.partition(".")[0] == "training"


def settings_of(weights: Iterable[Made]) -> list[str]:
    """Return the settings, for a fit or a bench, that name the weights that are only in the folders of their fits."""
    return [f"{one.key}={one.left}" for one in weights if one.key in KEYS and one.elsewhere]


def folder_of(data: str) -> Path:
    """Locate a folder of experiments.

    Args:
        data: Name under experiments/, or path.

    Raises:
        UsageError: There is no such folder with experiments.
    """
    for folder in (Path(data).expanduser(), EXPERIMENTS / data):
        if folder.is_dir() and names_in(folder):
            return folder
    known = sorted(
        path.name for path in EXPERIMENTS.iterdir() if path.is_dir() and path.name != SWEEPS and names_in(path)
    )
    raise UsageError(f"{data!r} is no folder of experiments, nor one under {EXPERIMENTS}{suggest(data, known)}")


def names_in(folder: Path) -> list[str]:
    """Return the names of the experiments of a folder, without bases."""
    return sorted(file.stem for file in folder.glob("*.yaml") if not is_base(file))


def experiments_of(data: str) -> dict[str, str]:
    """Return the experiments of a folder by name, as for the commands.

    Args:
        data: Name under experiments/, or path.

    Raises:
        UsageError: See :func:`folder_of`.
    """
    folder = folder_of(data)
    inside = folder.resolve().parent == EXPERIMENTS.resolve()
    return {
        name: f"{folder.resolve().name}/{name}" if inside else str(folder / f"{name}.yaml") for name in names_in(folder)
    }


def plan(
    data: str, root: Path | None = None, names: Sequence[str] | None = None, settings: Sequence[str] = ()
) -> list[Fit]:
    """List the fits that experiments require, each after those that it needs.

    Args:
        data: Folder of experiments: name under experiments/, or path.
        root: Folder of the output folders of the fits; runs/<data> by default.
        names: Names of the required experiments; None for all of the folder.
        settings: Settings of every fit.

    Returns:
        Fits, done and missing ones.

    Raises:
        UsageError: There is no such folder or experiment, an experiment is invalid, fits need each other, weights don't
            exist and no experiment of the folder makes them, or weights of a fit are of other images.
    """
    folder, known = folder_of(data), experiments_of(data)
    root = Path("runs", folder.absolute().name) if root is None else root
    if unknown := [name for name in names or () if name not in known]:
        raise UsageError(f"{folder} has no experiment {unknown[0]!r}{suggest(unknown[0], known)}")
    experiments = {name: _Experiment(folder, name, given, settings) for name, given in known.items()}
    present = PresentImages()
    extractors = {path for one in experiments.values() for key, path in one.named if key == EXTRACTOR}
    makers: dict[tuple[str, Path], tuple[str, Made]] = {}
    for name, one in experiments.items():
        for key, named in one.made(extractors):
            made = Made(key, named, root / name / one.output(key))
            # Of two experiments that set the same file, the one with its name makes it.
            if (key, _real(named)) not in makers or named.stem == name:
                makers[key, _real(named)] = name, made
    return _sorted(experiments, makers, names or list(known), root, present)


def _sorted(
    experiments: Mapping[str, "_Experiment"],
    makers: Mapping[tuple[str, Path], tuple[str, Made]],
    names: Sequence[str],
    root: Path,
    present: PresentImages,
) -> list[Fit]:
    """Fits that experiments require, depth first."""
    found: dict[str, Fit | None] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            chain = " -> ".join((*above[above.index(name) :], name))
            raise UsageError(f"{experiments[name].folder}: the fits need each other's weights ({chain})")
        if name in found:
            return
        one, needs = experiments[name], []
        for key, path in one.named:
            maker, made = makers.get((key, _real(path)), (None, None))
            if maker is None or made is None:
                one.check_exists(key, path)
            elif maker != name:
                visit(maker, (*above, name))
                needs.append(made)
        own = tuple(made for maker, made in makers.values() if maker == name)
        done = all(one.is_done(made, present) for made in own)
        begun = (root / name / "last.ckpt").is_file()
        fewer = tuple((made.named, seen) for made in own if (seen := one.fewer(made)))
        fit = Fit(name, one.experiment, root / name, own, tuple(needs), done, begun, fewer)
        found[name] = fit if own else None

    for name in names:
        visit(name, ())
    return [fit for fit in found.values() if fit is not None]


class _Experiment:
    """Experiment of a folder, with the files of weights that it names.

    Args:
        folder: Folder.
        name: Name of the experiment.
        experiment: Experiment, as for the commands.
        settings: Settings of its fit, which may name weights that are then not fitted.

    Attributes:
        named: Keys and files.
    """

    def __init__(self, folder: Path, name: str, experiment: str, settings: Sequence[str]) -> None:
        self.folder, self.name, self.experiment = folder, name, experiment
        file = folder / f"{name}.yaml"
        self.config: Config = load(self.experiment, settings)
        tree, base = read(file), base_of(file)
        below = read(base) if base is not None else {}
        own = vars(self.config)
        scores = [] if self._is_extractor else [*self.config.extractors, self.config.validation.judge]
        files = [node.get("path") for node in scores if isinstance(node, Mapping)]
        named = [(key, Path(path)) for key in KEYS if not self._is_extractor and (path := value_at(own, key))]
        if self._is_autoencoder:
            self.named, self._own = [], [(key, path) for key, path in named if key == AUTOENCODER]
            return
        given = [(key, value_at(tree, key), path) for key, path in named if value_at(tree, key) != value_at(below, key)]
        changed = [(key, path) for key, said, path in given if said and _real(Path(said)) == _real(path)]
        self.named, self._own = named, [(key, path) for key, path in changed if key != AUTOENCODER]
        self.named += [(EXTRACTOR, Path(path)) for path in files if path]

    @property
    def _is_extractor(self) -> bool:
        return bool(self.config.method["name"] == "extractor")

    @property
    def _is_autoencoder(self) -> bool:
        return bool(self.config.method["name"] == "autoencoder")

    def made(self, extractors: Iterable[Path]) -> list[tuple[str, Path]]:
        """Return keys and files of the weights that a fit of the experiment makes."""
        if self._is_extractor:
            return [(EXTRACTOR, path) for path in sorted(extractors) if path.stem == self.name]
        if self._is_autoencoder:
            return self._own
        from diffaccel.methods import METHODS  # imported here, because it requires Lightning, which takes seconds

        kind: Any = METHODS[self.config.method["name"]]
        frozen = kind.keeps_denoiser(self.config.method)
        return [(key, path) for key, path in self._own if not (frozen and key == "checkpoint")]

    def output(self, key: str) -> str:
        """Return the name of the file that a fit writes."""
        from diffaccel.prior import PRIORS

        prior: Any = PRIORS[self.config.prior["name"]]
        names = {
            "checkpoint": "ema",
            "prior.checkpoint": prior.fitted_name,
            "posterior.checkpoint": "classifier",
            EXTRACTOR: "extractor",
            AUTOENCODER: "autoencoder",
        }
        return f"{names[key]}.safetensors"

    def check_exists(self, key: str, path: Path) -> None:
        """Check that weights exist that no experiment of the folder makes; a fit may do without an extractor.

        Raises:
            UsageError: They don't exist.
        """
        if key in KEYS and not path.exists():
            raise UsageError(
                f"{self.experiment}: {key}={path} does not exist, and no fit of {self.folder} makes it: give the file"
            )

    def is_done(self, made: Made, present: PresentImages) -> bool:
        """Whether weights exist; those in the folder of a fit must be from as many images as the fit has.

        Raises:
            UsageError: The weights in the folder of the fit are of other images than ``present``.
        """
        if made.named.exists() and _real(made.named) != _real(made.left):
            return True
        if not made.left.is_file():
            return False
        present.check(made.left, self.config)
        return self._seen_fewer(made.key, made.left) is None

    def fewer(self, made: Made) -> int | None:
        """Return the number of images of weights that are kept where experiments name them, if the fit has more."""
        kept = made.named.is_file() and _real(made.named) != _real(made.left)
        return self._seen_fewer(made.key, made.named) if kept else None

    def _seen_fewer(self, key: str, file: Path) -> int | None:
        if key not in KEYS:
            return None  # extractors are trained by epochs
        header = open_weights(file).header
        seen = header.get("images_seen") or 0
        stepwise = header.get("steps") != 0  # densities in closed form are fitted in no step
        return int(seen) if stepwise and seen < self.config.training.images else None


def _real(path: Path) -> Path:
    return path.expanduser().resolve()


def value_at(tree: Mapping[str, Any], key: str) -> str | None:
    """Return the text under a dotted key of a tree; None if there is none."""
    found: Any = tree
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, str) else None
