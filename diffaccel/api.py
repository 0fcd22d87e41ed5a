"""What a notebook calls: models, scores, and the commands as functions."""

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
        source: An experiment by name (``digits/edm``) or file; or a checkpoint: a file of ``fit`` or ``convert``, a
            score_sde ``.pth``, an EDM ``.pkl``, or a folder of diffusers.
        settings: Keys of the experiment, as the command line sets them: ``checkpoint="mine.safetensors"``; dotted ones
            in a mapping, ``**{"denoiser.ratio_max": 50}``.

    Raises:
        UsageError: No such experiment or file, a file that is damaged or hostile, or a bad setting.
    """
    from diffaccel.config import load as load_config
    from diffaccel.experiment.build import build_checkpoint, build_model
    from diffaccel.run.machine import settle

    path = Path(source).expanduser()
    if path.exists() and path.suffix not in (".yaml", ".yml"):
        if settings:
            raise UsageError(f"{source} is a checkpoint, which has no settings: name an experiment, and checkpoint=")
        return build_checkpoint(path)

    def again(given: Mapping[str, Any]) -> Any:
        config = load_config(str(source), words({**settings, **given}), trains=False)
        settle(config)
        return config

    return build_model(again({}), again)


def words(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as the words of a command line."""
    return [f"{key}={_text(value)}" for key, value in settings.items()]


def _text(value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)
    return json.dumps(value, default=str)  # which is YAML, too


def measure(
    images: Tensor,
    reference: str | Path,
    floor: str | Path | None = None,
    extractor: str | Mapping[str, Any] | None = None,
    batch_size: int = 100,
) -> dict[str, float]:
    """Score images as a bench does.

    Args:
        images: (n, C, H, W), uint8; toy points are float32.
        reference: Statistics of the data: a data set's name under experiments/ (``digits``), whose extractor and floor
            are then the defaults; or a file of ``diffaccel reference``.
        floor: Statistics of held-out images; none for a file, unless given.
        extractor: Feature network, by name and keys; for a file of statistics the one that made them.
        batch_size: Images a batch of the extractor.

    Returns:
        Metric -> value, by the keys of a point's ``metrics``.

    Raises:
        UsageError: An unknown data set, statistics of another extractor, or images of another shape or type.
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
    """Train; returns the folder of the weights. See ``diffaccel fit``."""
    return _run("fit", experiment, settings)


def search(experiment: str | Path, **settings: Any) -> dict[int, dict[str, dict[str, Any]]]:
    """Find the best prior and solver for each budget; see ``diffaccel search``."""
    return _run("search", experiment, settings)


def tradeoff(experiment: str | Path, **settings: Any) -> list[dict[str, Any]]:
    """Measure small T's bound and distance for each start time; see ``diffaccel tradeoff``."""
    return _run("tradeoff", experiment, settings)


def sample(experiment: str | Path, **settings: Any) -> list[Path]:
    """Write the images that a bench measures; returns their folders. See ``diffaccel sample``."""
    return _run("sample", experiment, settings)


def reference(experiment: str | Path, **settings: Any) -> dict[str, Path]:
    """Write statistics of the data; returns the file of each split. See ``diffaccel reference``."""
    return _run("reference", experiment, settings)


def compare(folders: Sequence[str | Path], out: str | Path = "runs/compare", reference: str | None = None) -> Path:
    """Put points of several runs side by side; returns the page. See ``diffaccel compare``."""
    from diffaccel.verbs import compare as comparison

    page = Path(out)
    comparison.check_out(page)
    comparison.write(comparison.compare([str(folder) for folder in folders], reference), page)
    return page / "index.html"


def convert(source: str | Path, target: str | Path, **options: Any) -> Path:
    """Write another program's checkpoint as safetensors; returns the file. See ``diffaccel convert``."""
    from diffaccel import pretrained

    pretrained.convert(Path(source), Path(target), **options)
    return Path(target)
