"""Functions for notebooks: loading of models, and the commands."""

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from diffaccel.errors import UsageError
from diffaccel.sampling import Model

if TYPE_CHECKING:
    from diffaccel.verbs.advise import Advice


def load(source: str | Path, **settings: Any) -> Model:
    """Load a trained model.

    Args:
        source: Experiment by name (``digits/edm``) or file; or checkpoint: a file of ``fit`` or ``convert``, a
            score_sde ``.pth``, an EDM ``.pkl``, or a folder in diffusers format.
        settings: Keys of the experiment, as on the command line: ``checkpoint="mine.safetensors"``; dotted keys in a
            mapping, ``**{"denoiser.ratio_max": 50}``.

    Raises:
        UsageError: The experiment or file does not exist, a file is damaged or contains code, or a setting is invalid.
    """
    from diffaccel.config import load as load_config
    from diffaccel.experiment.models import build_checkpoint, build_model
    from diffaccel.run.machine import settle

    if not isinstance(source, str | Path):
        raise UsageError(f"load: {source!r:.80} is neither a name nor a path: give digits/edm, say, or a file")
    path = Path(source).expanduser()
    if left := next((name for name in ("ema.safetensors", "last.ckpt") if (path / name).is_file()), None):
        raise UsageError(f"{source} is the folder of a fit: load one of its files, {path / left} for example")
    if path.exists() and path.suffix not in (".yaml", ".yml"):
        if settings:
            raise UsageError(f"{source} is a checkpoint, which has no settings: give an experiment and checkpoint=")
        return build_checkpoint(path)

    def again(given: Mapping[str, Any]) -> Any:
        config = load_config(str(source), words({**settings, **given}), trains=False)
        settle(config)
        return config

    return build_model(again({}), again)


def words(settings: Mapping[str, Any]) -> list[str]:
    """Convert settings to words of a command line, where the budget of an adaptive solver is null."""
    if settings.get("nfe") == math.inf:
        settings = {**settings, "nfe": None}
    return [f"{key}={_text(value)}" for key, value in settings.items()]


def _text(value: Any) -> str:
    """Write a value as a command line has it: a text bare, anything else as YAML in one line."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Mapping | list | tuple):
        # JSON has no keys but texts, and no infinity.
        return yaml.safe_dump(_plain(value), default_flow_style=True, width=math.inf).strip()
    return ".inf" if value == math.inf else json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    """Bring paths, tuples, and numbers of other libraries to what YAML has, at any depth."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, str | Path):
        return str(value)
    raise UsageError(f"{value!r:.80} is no setting: give a number, a text, a list, or a mapping as a YAML file has it")


def _run(verb: str, experiment: str | Path, settings: Mapping[str, Any]) -> Any:
    from diffaccel.verbs.run import run

    return run(verb, str(experiment), words(settings))


def bench(experiment: str | Path, **settings: Any) -> list[dict[str, Any]]:
    """Measure points of the quality-versus-NFE curve; see ``diffaccel bench``.

    Example:
        >>> points = bench("digits/dlg", nfe=[5, 10])  # doctest: +SKIP
    """
    return _run("bench", experiment, settings)


def fit(experiment: str | Path, **settings: Any) -> Path:
    """Train a method and return the folder of the weights; see ``diffaccel fit``."""
    return _run("fit", experiment, settings)


def search(experiment: str | Path, **settings: Any) -> dict[int, dict[str, dict[str, Any]]]:
    """Find the best prior and solver for each budget; see ``diffaccel search``."""
    return _run("search", experiment, settings)


def tradeoff(experiment: str | Path, **settings: Any) -> list[dict[str, Any]]:
    """Measure likelihood bound and distance of small T for each start time; see ``diffaccel tradeoff``."""
    return _run("tradeoff", experiment, settings)


def sample(experiment: str | Path, **settings: Any) -> list[Path]:
    """Write the images that a bench measures, and return their folders; see ``diffaccel sample``."""
    return _run("sample", experiment, settings)


def reference(experiment: str | Path, **settings: Any) -> dict[str, Path]:
    """Write statistics of the data, and return the file of each split; see ``diffaccel reference``."""
    return _run("reference", experiment, settings)


def score(source: str | Path, experiment: str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Score images of any origin as a bench does, and return the point; see ``diffaccel score``.

    Args:
        source: Folder or zip archive of images, npz file, or statistics (``mu``, ``sigma``).
        experiment: Experiment (``digits/edm``) or data set (``digits``) whose extractor and statistics are used; None
            if ``reference`` is given.
        settings: ``name`` and ``nfe`` of the method, ``n``, ``seed``, ``image_size``, and keys of an experiment
            (``reference``, ``floor``, ``extractor``, ``out`` ...).

    Example:
        >>> point = score("made/images", "digits", name="mine", nfe=4)  # doctest: +SKIP
    """
    from diffaccel.verbs.score import Asked
    from diffaccel.verbs.score import score as run

    path = str(Path(source).expanduser())
    return run(Asked.of(path, None if experiment is None else str(experiment), words(settings)))


def new(folder: str | Path, images: str | Path, **settings: Any) -> Path:
    """Write the experiments of all methods for your images, and return their folder; see ``diffaccel new``.

    Args:
        folder: New folder.
        images: Folder or zip archive of images, or npz file.
        settings: ``checkpoint`` of a denoiser, ``size`` to resize the images to, ``test_share`` or ``test`` images,
            ``judges``, ``labels``, ``label``, ``again``, ``threads``, ``accelerator``.

    Raises:
        UsageError: The images can't be used, the checkpoint does not fit them, or the folder has other content.

    Example:
        >>> folder = new("mine", images="photos", size=32)  # doctest: +SKIP
    """
    from diffaccel.verbs.new import Asked
    from diffaccel.verbs.new import new as run
    from diffaccel.verbs.run import quiet

    quiet()
    return run(Asked.of([str(folder), *words({"images": images, **settings})]))


def _names(given: str | Sequence[str]) -> list[str]:
    """Return names as a list; a text is one name, and not a sequence of letters."""
    return [given] if isinstance(given, str) else list(given)


def curve(folder: str | Path, methods: str | Sequence[str] | None = None, **settings: Any) -> list[dict[str, Any]]:
    """Fit and measure methods of a folder of experiments, compare them, and return the points; see ``diffaccel curve``.

    Args:
        folder: Folder that :func:`new` wrote, or name of a data set (``digits``).
        methods: Names of experiments; by default edm, dlg and small_t.
        settings: Keys of every fit and measurement (``nfe=[5, 10]``, ``n``, ``images``), ``out`` and ``judge``.

    Example:
        >>> points = curve("mine", methods=["edm", "dlg"], nfe=[5, 10])  # doctest: +SKIP
    """
    from diffaccel.verbs.curve import Asked
    from diffaccel.verbs.curve import curve as run

    chosen = {} if methods is None else {"methods": ",".join(_names(methods))}
    return run(Asked.of([str(folder), *words({**chosen, **settings})]))


def sweep(
    file: str | Path, processes: int = 1, count: int | None = None, out: str | Path | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Measure the points of a sweep file that are not in ``out`` yet; see ``diffaccel sweep``.

    Args:
        file: Sweep file of W&B, or name of one under experiments/sweeps.
        processes: Number of simultaneous runs.
        count: Maximum number of runs; by default the file's ``run_cap``.
        out: Folder for the folders of the curves; runs/sweeps/NAME by default.
        settings: Keys for every run, in place of the sweep's parameters.

    Returns:
        Points of all runs, in their order.
    """
    from diffaccel.verbs.run import quiet
    from diffaccel.verbs.sweep import sweep

    quiet()
    return [dict(one) for one in sweep(file, words(settings), processes, count, None if out is None else str(out))]


def train(
    folder: str | Path,
    methods: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    place: bool = False,
    **settings: Any,
) -> list[Path]:
    """Run the fits of a folder of experiments that are missing, in order; see ``diffaccel train``.

    Args:
        folder: Name of a folder under experiments/, or path.
        methods: Experiments to train, with those that they need; None for all.
        out: Folder of the output folders of the fits; runs/<folder> by default.
        place: Whether to copy weights to the files that the experiments name.
        settings: Keys for every fit.

    Returns:
        Output folders of all fits, in order.
    """
    from diffaccel.verbs.run import quiet
    from diffaccel.verbs.train import train

    quiet()
    names = None if methods is None else _names(methods)
    fits = train(str(folder), words(settings), names, None if out is None else str(out), place)
    return [fit.folder for fit in fits]


def compare(
    folders: str | Path | Sequence[str | Path],
    out: str | Path = "runs/compare",
    reference: str | Path | None = None,
    judge: str | None = None,
    labels: str | Sequence[str] = (),
    x: str = "nfe",
) -> Path:
    """Compare points of several runs, and return the page; see ``diffaccel compare``.

    Args:
        folders: Folders of runs, or their points.jsonl; the points of the others are paired with those of the first.
            Folders below are included.
        out: Folder of the page.
        reference: File of the reference statistics, if the folders' config.yaml does not lead to it.
        judge: Name of the judge whose metrics are shown; by default a published one before others, then that of most
            points.
        labels: Name of each folder in labels, in order; empty strings, or no names, for names from the settings.
        x: Cost on the horizontal axis: ``nfe``, ``seconds``, ``gflops`` or ``nfe_equivalent``, the FLOPs in evaluations
            of each point's own denoiser; for denoisers of different sizes, use ``gflops``.

    Raises:
        UsageError: There are no points, ``judge`` scored none of them, there are not as many labels as folders, or the
            folder can't be written to.
    """
    from diffaccel.storage import check_target
    from diffaccel.text.terminal import PlainConsole
    from diffaccel.verbs import compare as comparison

    sources = [str(Path(one).expanduser()) for one in ([folders] if isinstance(folders, str | Path) else folders)]
    page = Path(out).expanduser()
    comparison.check_out(page)
    check_target(page / "index.html")
    note = PlainConsole(stderr=True, soft_wrap=True).print
    named = None if reference is None else str(reference)
    found = comparison.compare_all(sources, named, note, judge, _names(labels), x)
    comparison.write(found.rows, page, *found[1:])
    return page / "index.html"


def advise(
    folders: str | Path | Sequence[str | Path],
    nfe: float | None = None,
    seconds: float | None = None,
    gflops: float | None = None,
    judge: str | None = None,
    n: int | None = None,
    reference: str | Path | None = None,
) -> "Advice":
    """Find the best measured setting within a budget; see ``diffaccel advise``.

    Args:
        folders: Folders of runs, or their points.jsonl.
        nfe: Budget in evaluations per image; exactly one budget is given.
        seconds: Budget in seconds per image.
        gflops: Budget in GFLOPs per image.
        judge: Judge whose distance is minimised; by default a published one before others, then that of most points.
        n: Number of images of the points; by default that of most settings.
        reference: File of the reference statistics, if the folders' config.yaml does not lead to it.

    Returns:
        Advice: the best setting, differences to the others, and warnings; ``lines()`` describes it.
    """
    from diffaccel.text.terminal import say
    from diffaccel.verbs.advise import advise as run

    sources = [folders] if isinstance(folders, str | Path) else folders
    paths = [str(Path(one).expanduser()) for one in sources]
    return run(paths, nfe, seconds, gflops, judge, n, None if reference is None else str(reference), say)


def export(
    experiment: str | Path,
    format: str = "json",  # noqa: A002 (the name of the key)
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    checkpoint: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Describe a sampling setting for other tools; see ``diffaccel export``.

    Args:
        experiment: Experiment by name (``digits/edm``) or file.
        format: ``json`` for all of the setting; ``diffusers``, ``k-diffusion`` or ``comfyui`` for the list of noise
            levels that the tool takes.
        sigma_min: Last positive level of another model, to whose range the spacing of the levels is mapped.
        sigma_max: First level of another model.
        checkpoint: Checkpoint of another model, for its range and parametrisation.
        settings: Keys of the experiment, ``nfe`` among them.

    Returns:
        Setting; for several budgets, a list of settings. ``notes`` lists what a list of levels does not express.

    Example:
        >>> export("digits/edm", nfe=3, format="k-diffusion", solver="euler")["sigmas"]
        [80.0, 2.515219183535214, 0.002, 0.0]
    """
    from diffaccel.verbs.export import export as run

    other = None if checkpoint is None else str(checkpoint)
    found = run(str(experiment), words(settings), format, sigma_min, sigma_max, other)
    return found[0] if len(found) == 1 else found


def convert(source: str | Path, target: str | Path, again: bool = False, **options: Any) -> Path:
    """Convert a checkpoint of another codebase to safetensors, and return the file; see ``diffaccel convert``.

    Args:
        source: A file, or a folder of diffusers.
        target: The new file, whose name ends in ``.safetensors``.
        again: Whether to replace a file that is there.
        options: What the file doesn't say: ``weights`` (``ema`` or ``raw``), ``size``, ``sigma_max``.

    Raises:
        UsageError: The source is refused, or the target exists or can't be written.
    """
    from diffaccel import pretrained
    from diffaccel.run.targets import check_new

    file = Path(target).expanduser()
    check_new([file], again)
    pretrained.convert(Path(source).expanduser(), file, **options)
    return file
