"""``fit`` of the feature network that scores images."""

import time
from pathlib import Path
from typing import Any

from diffaccel import experiment
from diffaccel.config import Config
from diffaccel.errors import UsageError
from diffaccel.experiment.order import of_steps
from diffaccel.features.extractors import save_classifier
from diffaccel.methods import METHODS
from diffaccel.run import launch
from diffaccel.run.machine import announce, device_type
from diffaccel.run.targets import resume_from
from diffaccel.text.terminal import PlainConsole


def fit_features(config: Config) -> Path:
    """Train a classifier whose features score images.

    Returns:
        Folder of extractor.safetensors and the training state.

    Raises:
        UsageError: The input is invalid.
    """
    console = PlainConsole(stderr=True, soft_wrap=True)
    data = experiment.build_data(config)
    if config.dry_run:
        raise UsageError("dry_run: the fit of an extractor has no dry run: leave it out")
    if unused := next(filter(of_steps, config.words), None):
        raise UsageError(
            f"{unused}: an extractor is trained in epochs: set method.epochs, method.batch_size, method.lr"
        )
    if config.devices * config.num_nodes > 1:
        raise UsageError("devices: an extractor is trained on one device: leave out devices= and num_nodes=")
    resume = resume_from(config, ["extractor"], console)
    launch.write_config(config, "last.ckpt", "extractor.safetensors")
    if config.precision not in ("32-true", "bf16-mixed"):
        raise UsageError(f"precision={config.precision}: an extractor requires precision=32-true or bf16-mixed")
    announce(config)
    started = time.monotonic()
    recipe = dict(config.method)
    metric = recipe.pop("metric", config.data["name"])
    context: dict[str, Any] = {"state_path": config.folder / "last.ckpt", "resume": resume, "console": console}
    context |= {"device": device_type(config), "bf16": config.precision == "bf16-mixed"}
    trained: Any = METHODS.build(recipe, data=data, seed=config.seed, **context)
    model, accuracy = trained
    path = config.folder / "extractor.safetensors"
    save_classifier(model, path, metric, data.label, accuracy, config.seed)
    minutes = (time.monotonic() - started) / 60
    console.print(f"{path}: test accuracy {accuracy:.2%}, {minutes:.1f} minutes")
    return config.folder
