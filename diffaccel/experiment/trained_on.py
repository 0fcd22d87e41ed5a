"""Comparison of the training images of weights with those that an experiment has now."""

from pathlib import Path
from typing import Any

from diffaccel.config import Config
from diffaccel.errors import UsageError
from diffaccel.experiment.evaluation import build_data
from diffaccel.weights import open_weights


class PresentImages:
    """Training images of experiments, which are read once for each data set."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, dict[str, Any]]] = {}

    def check(self, path: Path, config: Config) -> None:
        """Check that the weights of a fit are of the images that the experiment has now.

        Weights of earlier versions, which do not record their images, are not compared.

        Args:
            path: File of the weights.
            config: Configuration of the experiment.

        Raises:
            UsageError: They are of other images, or the images can't be read.
        """
        header = open_weights(path).header
        if (trained := header.get("training_images")) is None:
            return
        if (key := repr((config.data, config.limit))) not in self._known:
            data = build_data(config)
            self._known[key] = data.label, data.identify()
        label, present = self._known[key]
        if trained != present:
            raise UsageError(
                f"{path} was trained on {trained['n']:,} images of {header['data']!r}, which are not the "
                f"{present['n']:,} of {label!r} that the experiment has now: remove {path.parent}, or choose another "
                "folder"
            )
