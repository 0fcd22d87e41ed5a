"""Latents: the codes of an auto-encoder, in which a diffusion runs in place of pixels.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022),
    https://arxiv.org/abs/2112.10752
"""

from diffaccel.latents.base import AUTOENCODERS, AutoEncoder, Latents, Moments

__all__ = ["AUTOENCODERS", "AutoEncoder", "Latents", "Moments"]
