"""``method: extractor``, which trains the feature network that scores images; it is not a sampling method."""

from diffaccel.features.fitting import fit_extractor
from diffaccel.methods.registry import METHODS

METHODS.register("extractor")(fit_extractor)
