"""Methods as LightningModules: one module per published method."""

from typing import TYPE_CHECKING

from diffaccel.methods.registry import METHODS
from diffaccel.parts.lazy import lazy
from diffaccel.training.plan import Training

if TYPE_CHECKING:
    from diffaccel.methods.base import Diffusion
    from diffaccel.methods.ddm import DecoupledDiffusion
    from diffaccel.methods.dlg import DenoisingLangevinGibbs
    from diffaccel.methods.small_t import SmallTimeDiffusion
    from diffaccel.methods.tdpm import TruncatedDiffusion
    from diffaccel.training.module import Phase, TrainedModule

__all__ = [
    "METHODS",
    "DecoupledDiffusion",
    "DenoisingLangevinGibbs",
    "Diffusion",
    "Phase",
    "SmallTimeDiffusion",
    "TrainedModule",
    "Training",
    "TruncatedDiffusion",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "DecoupledDiffusion": "diffaccel.methods.ddm",
        "DenoisingLangevinGibbs": "diffaccel.methods.dlg",
        "Diffusion": "diffaccel.methods.base",
        "Phase": "diffaccel.training.module",
        "SmallTimeDiffusion": "diffaccel.methods.small_t",
        "TrainedModule": "diffaccel.training.module",
        "TruncatedDiffusion": "diffaccel.methods.tdpm",
    },
)
