"""``curve``: fits and measures several methods of a folder of experiments, and compares them on a page."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel import experiment
from diffaccel.config import EXPERIMENTS, FLAGS, KEYS, Config, find
from diffaccel.data.module import check_labels
from diffaccel.errors import SharedError, UsageError, suggest
from diffaccel.experiment.chain import Chain, Step, configured
from diffaccel.experiment.order import experiments_of
from diffaccel.experiment.trained_on import PresentImages
from diffaccel.metrics.reference import file_of, read_reference
from diffaccel.parts.overrides import sort_words, split_names
from diffaccel.pretrained import open_weights
from diffaccel.report.judges import judges_of
from diffaccel.run import launch
from diffaccel.run.machine import settle
from diffaccel.run.parent import end_with_parent
from diffaccel.storage import check_target
from diffaccel.text.terminal import print_lines, say
from diffaccel.verbs import compare as comparison
from diffaccel.verbs.bench import bench
from diffaccel.verbs.curve_cost import print_costs
from diffaccel.verbs.fit import fit
from diffaccel.verbs.run import quiet

HELP = """\
curve DIR methods=edm,dlg nfe=5,10,20
fit what is missing, measure all methods and compare them

DIR is a folder that `diffaccel new` wrote, or a data set under experiments/. Fits are carried out in the order of their
dependencies, complete fits and measured points are kept, and the same command continues after an interrupt. Further
keys are settings of every fit and measurement.

Keys:
  methods=edm,dlg,small_t  experiments of the folder to measure; names or files
  nfe=5,10,20              maximum network evaluations per image
  n=5000 seed=0            images per point, and seed of their noise
  images=1000000           training images of each fit
  judge=NAME               judge whose metrics the comparison shows
  out=DIR                  folder of the results; DIR/runs, or runs/<data> for shipped experiments
  dry_run=true             print the steps with their estimated time
"""
METHODS = ("edm", "dlg", "small_t")
"""Experiments that are measured by default, as far as the folder has them."""
NFE = "nfe=5,10,20"
"""Budgets by default."""
OWN = ("methods", "out", "judge")
"""Keys of the command itself; other keys are settings of every fit and measurement."""
REFUSED = ("resume", "again", "method", "data")
"""Keys of single runs."""


@dataclass(frozen=True)
class Asked:
    """Arguments of the command.

    Attributes:
        folder: Folder of experiments, or name of one under experiments/.
        methods: Names of experiments in the folder, or experiment files; None for those of ``METHODS``.
        out: Folder of the results; ``runs`` in the folder of ``diffaccel new``, else ``runs/<data>``.
        judge: Name of the judge that the comparison shows; None for the first.
        words: ``key=value`` words for every fit and measurement.
    """

    folder: str
    methods: tuple[str, ...] | None = None
    out: str | None = None
    judge: str | None = None
    words: tuple[str, ...] = (NFE,)

    @classmethod
    def of(cls, words: Sequence[str]) -> "Asked":
        """Read the words of a command line.

        Raises:
            UsageError: The folder is missing, or a key is unknown or not one of this command.
        """
        others, settings = sort_words(words, FLAGS, lambda word: Path(word).is_dir())
        if len(others) != 1:
            raise UsageError("curve requires a folder of experiments: diffaccel curve DIR methods=edm,dlg nfe=5,10,20")
        keys = [word.partition("=")[0].split(".")[0] for word in settings]
        if unknown := [key for key in keys if key not in {*KEYS, *OWN}]:
            raise UsageError(f"curve has no key {unknown[0]!r}{suggest(unknown[0], {*KEYS, *OWN})}")
        if refused := [key for word in settings if (key := word.partition("=")[0]) in REFUSED]:
            raise UsageError(
                f"curve has no key {refused[0]!r}, which is one of single runs: use fit and bench, or another out="
            )
        own = dict(word.split("=", 1) for word in settings if word.partition("=")[0] in OWN)
        methods = split_names(own.get("methods", ""))
        rest = [word for word in settings if word.partition("=")[0] not in OWN]
        if "nfe" not in keys:
            rest.append(NFE)
        return cls(others[0], tuple(methods) or None, own.get("out") or None, own.get("judge") or None, tuple(rest))


def curve_command(words: list[str]) -> list[dict[str, Any]]:
    """Fit, measure and compare what the words of a command line ask for.

    Raises:
        UsageError: See :meth:`Asked.of` and :func:`curve`.
    """
    return curve(Asked.of(words))


def curve(asked: Asked) -> list[dict[str, Any]]:
    """Fit what is missing, measure each method at each budget, and compare the methods.

    Fits are carried out in the order of their dependencies. All fits and measurements are planned and checked before
    the first one starts. The same call goes on after an interrupt: complete fits and measured points are kept.

    Returns:
        Points of all methods; empty for a dry run, which prints the steps and their estimated time.

    Raises:
        UsageError: An experiment, a key, the images or the statistics are invalid, a budget is below the minimum of a
            method, or some weights can't be made.
    """
    quiet()
    end_with_parent()
    files, methods = _chosen(asked)
    root = _root(asked)
    chain = Chain(files, list(asked.words), root, settle)
    for name in methods:
        chain.bench(name)
    _check(chain, asked.judge)
    _check_images(chain.steps, [root, Path(asked.folder)])
    _say_shorter(chain.steps, chain.words)
    if any(step.config.dry_run for step in chain.steps):
        print_costs(chain.steps)
        return []
    page = root / "curve"
    comparison.check_out(page)
    check_target(page / "index.html")
    measured = _carry_out(chain.steps)
    command = shlex.join(["diffaccel", "compare", *(str(root / name) for name in methods)])
    keys = {point["key"] for points in measured.values() for point in points}  # the folders may have others, too
    folders = [str(root / name) for name in methods]
    found = comparison.compare_all(folders, None, say, asked.judge, command=command, keys=keys)
    written = comparison.write(found.rows, page, *found[1:])
    comparison.show(found.rows)
    print_lines(f"the page is {page / 'index.html'}; {', '.join(written[:-1])} are beside it")
    return [point for points in measured.values() for point in points]


def _chosen(asked: Asked) -> tuple[dict[str, str], list[str]]:
    """Return the experiments by name, those that are given by their files included, and the names to measure."""
    files = experiments_of(asked.folder)
    if asked.methods is None:
        found = [name for name in METHODS if name in files]
        if not found:
            raise UsageError(f"{asked.folder} has no experiment {' or '.join(METHODS)}: set methods={','.join(files)}")
        return files, found
    names = []
    for method in asked.methods:
        if method in files:
            names.append(method)
            continue
        if not method.endswith((".yaml", ".yml")):
            raise UsageError(f"{asked.folder} has no experiment {method!r}{suggest(method, files)}")
        path = find(method)
        names.append(f"{path.absolute().parent.name}_{path.stem}")  # searches/edm/best.yaml -> edm_best
        files[names[-1]] = str(path)
    return files, list(dict.fromkeys(names))


def _root(asked: Asked) -> Path:
    if asked.out:
        return Path(asked.out).expanduser()
    folder = Path(asked.folder)
    shipped = not folder.is_dir() or folder.resolve().is_relative_to(EXPERIMENTS.resolve())
    return Path("runs", folder.name) if shipped else folder / "runs"


# Checks


def _check(chain: Chain, judge: str | None) -> None:
    """Check everything that could end the chain after its first fit.

    Raises:
        UsageError: See :func:`curve`.
    """
    checked: set[str] = set()
    judges: list[str] = []
    for step in chain.steps:
        config = step.config
        if config.devices * config.num_nodes > 1:
            raise UsageError("curve runs on one device: use fit and bench with devices=")
        try:
            check_target(config.folder / "config.yaml")
            if step.method is not None:
                _check_data(step, config, checked)
            elif step.sampler is not None:
                for budget in config.nfe:
                    step.sampler.plan(budget, config.n)
                evaluator = experiment.build_evaluator(config, step.sampler)
                judges += [one.name for one in evaluator.judges]
                judges += [name for point in evaluator.known() for name in judges_of(point)]  # `score` may add judges
        except SharedError:
            raise
        except UsageError as error:
            raise UsageError(f"{step.name}: {error}") from None
    if judge is not None and judge.split(" ")[0] not in judges:  # a name may be followed by a hash
        known = list(dict.fromkeys(judges))
        raise UsageError(f"judge={judge} scores none of the points{suggest(judge, known)}")


def _check_data(step: Step, config: Config, checked: set[str]) -> None:
    """Check the images of a fit, and that the statistics are of these images."""
    assert step.method is not None
    step.method.phases()
    experiment.build_latents(config)
    data = experiment.build_data(config)
    check_labels(data, step.method.trained_classes)
    if (key := repr((config.data, config.limit))) in checked or config.limit is not None:
        return
    checked.add(key)
    files = config.reference if isinstance(config.reference, Mapping) else {"": config.reference}
    for path in filter(None, (file_of(config.reference, name) for name in files)):
        if Path(path).is_file() and (n := read_reference(path).moments.n) != data.size("train"):
            raise UsageError(
                f"{path} has the statistics of {n} images, but there are {data.size('train')} training images now: "
                "compute new statistics with `diffaccel new` and again=true, or `diffaccel reference`"
            )


def _check_images(steps: Sequence[Step], folders: Sequence[Path]) -> None:
    """Check that the weights of fits in some folders are of the present images, which `new` may have changed.

    Raises:
        UsageError: They are of other images.
    """
    present, places = PresentImages(), [folder.resolve() for folder in folders]
    for step in steps:
        for file in configured(step.config).values() if step.verb == "bench" else ():
            if file.is_file() and any(file.resolve().is_relative_to(place) for place in places):
                present.check(file, step.config)


def _say_shorter(steps: Sequence[Step], words: Sequence[str]) -> None:
    """Say which weights of earlier fits, which are kept, were fitted on fewer images than are asked for."""
    asked = [word for word in words if word.startswith(("images=", "training.images="))]
    files = {
        file: step.config for step in steps for key, file in configured(step.config).items() if _in_steps(step, key)
    }
    for file, config in files.items() if asked else ():
        if not file.is_file() or not (file.parent / "last.ckpt").is_file():
            continue
        header, wanted = open_weights(file).header, config.training.images
        if 0 < (seen := header.get("images_seen") or 0) < wanted:
            fit = f"diffaccel fit {shlex.quote(str(header['experiment']))} out={shlex.quote(str(file.parent))}"
            say(
                f"{file}: fitted on {seen:,} images, fewer than {asked[-1]}, and kept (`{fit} {asked[-1]} resume=auto` "
                "goes on)"
            )


def _in_steps(step: Step, key: str) -> bool:
    """Whether weights are trained in steps, and not, like a density in closed form, in one pass over the images."""
    if step.sampler is None or key != "prior.checkpoint":
        return step.sampler is not None
    return any(list(network.parameters()) for network in step.sampler.prior.networks().values())


# Fits and measurements


def _carry_out(steps: Sequence[Step]) -> dict[str, list[dict[str, Any]]]:
    """Carry out the steps, and return the points of each measured experiment."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for number, step in enumerate(steps, start=1):
        config = step.config
        step.method = step.sampler = None  # built again by the step, with its weights
        what = f"{config.training.images:,} images" if step.verb == "fit" else f"n={config.n}, {_budgets(config)}"
        say(f"[{number}/{len(steps)}] {step.verb} {step.name}: {what} -> {config.folder}")
        started = time.monotonic()
        # The configuration is loaded again, because networks of checkpoints were written into that of the check.
        config = again(step)
        try:
            with launch.folder_of(config):
                settle(config)
                if step.verb == "fit":
                    fit(config, evaluates=False)
                else:
                    measured[step.name] = bench(config)
        except UsageError as error:
            raise type(error)(f"{step.verb} {step.name}: {error}") from None
        say(f"[{number}/{len(steps)}] {step.verb} {step.name}: {_duration(time.monotonic() - started)}")
    return measured


def again(step: Step) -> Config:
    """Load the configuration of a step."""
    from diffaccel.config import load

    return load(step.experiment, step.words)


def _budgets(config: Config) -> str:
    return "nfe=" + ",".join(f"{budget:g}" for budget in config.nfe)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
