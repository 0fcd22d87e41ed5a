"""Few-step sampling of diffusion models under one protocol."""

__version__ = "0.1.0"
