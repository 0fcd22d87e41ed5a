"""Functions for notebooks: loading of models, metrics of images, and the commands."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.sampling import Model


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
    from diffaccel.experiment.build import build_checkpoint, build_model
    from diffaccel.run.machine import settle

    path = Path(source).expanduser()
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
    """Convert settings to words of a command line."""
    return [f"{key}={_text(value)}" for key, value in settings.items()]


def _text(value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)
    return json.dumps(value, default=str)  # JSON is also YAML


def measure(
    images: Tensor,
    reference: str | Path,
    floor: str | Path | None = None,
    extractor: str | Mapping[str, Any] | None = None,
    batch_size: int = 100,
) -> dict[str, float]:
    """Compute the standard metrics of images, as in a bench.

    Args:
        images: Images (n, C, H, W), uint8, or float32 for toy points.
        reference: Statistics of the data: name of a data set under experiments/ (``digits``), whose extractor and floor
            are the defaults; or a file of ``diffaccel reference``.
        floor: Statistics of held-out images; by default none for a file.
        extractor: Feature network, by name and keys; for a file, the one that the statistics were computed with.
        batch_size: Number of images per batch of the extractor.

    Returns:
        Metrics, with the keys of a point's ``metrics``.

    Raises:
        UsageError: The data set is unknown, the statistics are of another extractor, or the images have another shape
            or type.
    """
    from diffaccel.evaluation.measure import measure as score

    return score(images, reference, floor, extractor, batch_size)


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


def compare(folders: Sequence[str | Path], out: str | Path = "runs/compare", reference: str | None = None) -> Path:
    """Compare points of several runs, and return the page; see ``diffaccel compare``."""
    from diffaccel.verbs import compare as comparison

    page = Path(out)
    comparison.check_out(page)
    comparison.write(comparison.compare([str(folder) for folder in folders], reference), page)
    return page / "index.html"


def convert(source: str | Path, target: str | Path, **options: Any) -> Path:
    """Convert a checkpoint of another codebase to safetensors, and return the file; see ``diffaccel convert``."""
    from diffaccel import pretrained

    pretrained.convert(Path(source), Path(target), **options)
    return Path(target)
