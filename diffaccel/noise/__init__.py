"""Random numbers of images, chains and training samples, which are the same on every device."""

from diffaccel.noise.philox import GENERATOR, philox, stream_key
from diffaccel.noise.streams import NoiseStreams

__all__ = ["GENERATOR", "NoiseStreams", "philox", "stream_key"]
