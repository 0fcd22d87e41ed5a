"""What sampling needs of the methods, without Lightning, which the methods require and whose import takes seconds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffaccel.prior import ChainPrior, Prior
from diffaccel.process import Decoupled, Process


class Sampled(NamedTuple):
    """What a method without keys requires of an experiment that is sampled.

    Attributes:
        starts_from: Type of prior that samples of the method start from.
        process: Type of the process.
        fits_denoiser: Whether a fit of the method trains the denoiser.
    """

    starts_from: type = Prior
    process: type = Process
    fits_denoiser: bool = True


SAMPLED = {
    "diffusion": Sampled(),
    "ddm": Sampled(process=Decoupled),
    "dlg": Sampled(starts_from=ChainPrior, fits_denoiser=False),
}
"""Requirements of the built-in methods whose constructors require nothing else if no key is set."""


def sampled(node: Mapping[str, Any]) -> Sampled | None:
    """Return the requirements of a method, by name and keys; None if its class has to check them."""
    return None if node.keys() - {"name", "label"} else SAMPLED.get(node["name"])
