"""``method: autoencoder``, which trains the auto-encoder of latents; it is not a sampling method."""

from diffaccel.methods.registry import METHODS
from diffaccel.training.autoencoder import AutoEncoderTraining

METHODS.register("autoencoder")(AutoEncoderTraining)
