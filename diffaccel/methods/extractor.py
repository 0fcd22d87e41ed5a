"""``method: extractor``: no sampling method, but the training of a feature network that scores."""

from diffaccel.features.fitting import fit_extractor
from diffaccel.methods.registry import METHODS

METHODS.register("extractor")(fit_extractor)
