"""Networks. They are independent of the diffusion process: denoisers compute their conditioning and inputs."""

from diffaccel.nn.adm import ADMUNet
from diffaccel.nn.ddpm import DDPMUNet
from diffaccel.nn.mlp import MLP
from diffaccel.nn.ncsnpp import NCSNpp
from diffaccel.nn.unet import NETWORKS, UNet

__all__ = ["MLP", "NETWORKS", "ADMUNet", "DDPMUNet", "NCSNpp", "UNet"]
