"""LightningModules: one file per published method."""

from diffaccel.methods import extractor
from diffaccel.methods.base import METHODS, Diffusion
from diffaccel.methods.ddm import DecoupledDiffusion
from diffaccel.methods.dlg import DenoisingLangevinGibbs
from diffaccel.methods.small_t import SmallTimeDiffusion
from diffaccel.methods.tdpm import TruncatedDiffusion
from diffaccel.training.module import Phase, TrainedModule
from diffaccel.training.plan import Training

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
    "extractor",
]
