"""``fit`` of the auto-encoder of latents."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from diffaccel import experiment
from diffaccel.collective import World
from diffaccel.config import Config
from diffaccel.errors import UsageError
from diffaccel.experiment import loading
from diffaccel.experiment.latents import image_shape_of, node_of
from diffaccel.latents import AUTOENCODERS
from diffaccel.methods import METHODS
from diffaccel.run import launch, loggers, trainer
from diffaccel.run.lines import SpeedLines
from diffaccel.run.targets import resume_from
from diffaccel.text.terminal import PlainConsole
from diffaccel.training.autoencoder import AutoEncoderTraining
from diffaccel.training.plan import Training
from diffaccel.verbs.fit_cost import print_fit


class Finish(L.Callback):
    """Callback that measures latents and reconstructions at the end of a fit, before its weights are written."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure them, unless the fit was stopped before its end."""
        assert isinstance(pl_module, AutoEncoderTraining)
        if pl_module.images_seen >= pl_module.training_plan.images:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            pl_module.finish(data, World(trainer.global_rank, trainer.world_size))


def _check_training(training: Training) -> None:
    """Check that the settings are those of the fit of an auto-encoder.

    Raises:
        UsageError: There are several averages, or evaluations during the training.
    """
    for key, value in {"evaluate_every": training.evaluate_every, "keep_best": training.keep_best}.items():
        if value is not None:
            raise UsageError(f"training.{key}={value:g}: the fit of an auto-encoder has no evaluations: set it to null")
    if len(training.ema_half_life) > 1:
        known = ",".join(map(str, training.ema_half_life))
        raise UsageError(
            f"training.ema_half_life={known}: the fit of an auto-encoder writes one average: set one half-life"
        )


def fit_autoencoder(config: Config) -> Path:
    """Train the auto-encoder of an experiment's latents.

    Returns:
        Folder of autoencoder.safetensors and the training state.

    Raises:
        UsageError: The input is invalid, or a loss is NaN or infinite.
    """
    console = PlainConsole(stderr=True, soft_wrap=True)
    if not config.latents:
        raise UsageError(f"{config.experiment} has no auto-encoder: set latents=kl")
    if config.condition or config.training.augment:
        raise UsageError("method 'autoencoder' uses neither condition nor training.augment: leave them out")
    _check_training(config.training)
    torch.manual_seed(config.seed)
    network = AUTOENCODERS.build(node_of(config), shape=image_shape_of(config))
    recipe = {key: value for key, value in config.method.items() if key not in METHODS.extra}
    notes = []
    if config.dry_run and recipe.get("perceptual_weight"):
        recipe["perceptual_weight"], notes = 0.0, ["LPIPS, whose weights a dry run does not read, is not included"]
    method: Any = METHODS.build(recipe, network=network, training=config.training, seed=config.seed)
    if config.dry_run:
        print_fit(method, network.image_shape, config, notes)
        return config.folder
    data = experiment.build_data(config)
    if not data.source.has_images():
        raise UsageError(f"data={config.data['name']} has points instead of images: choose other data")
    resume = resume_from(config, [*method.exports()], console)
    checkpointer = trainer.build_autoencoder_checkpointer(config, data)
    if launch.is_first(config):
        checkpointer.check_outputs(method)
    if resume is not None:
        checkpointer.check_same_run(resume, loading.check_resumable(resume, method))
    launch.write_config(config)
    fitting = trainer.build_trainer(config, [SpeedLines(), Finish(), checkpointer], phases=len(method.phases()))
    try:
        fitting.fit(method, data, ckpt_path=resume, weights_only=True)
    finally:
        loggers.close_wandb(config)
    if fitting.is_global_zero:
        for line in method.describe_fit(data):
            console.print(line)
        console.print(f"{method.images_seen} images seen; weights and training state are in {config.folder}")
    return config.folder
