"""Streams of random numbers, one per image, per chain and per training sample.

Image i draws from stream (seed, i) in any batch and on any rank. So images don't depend on batch size, world size or
resuming, and two methods with the same seed share their noise (common random numbers).
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def stream_seed(seed: int, purpose: str) -> int:
    """Hash (seed, purpose) to the 32-bit seed of stream 0.

    The seeds of streams are *consecutive* numbers from this hash, so that the first 2^32 streams of a purpose have
    distinct seeds. Independent hashes would collide, because PyTorch's CPU generator uses the low 32 bits only.
    """
    return int.from_bytes(hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=4).digest(), "little")


class NoiseStreams:
    """A batch of B independent streams of random numbers.

    Numbers are drawn on the CPU in float32 and then moved, because the generators of other devices depend on the
    hardware.

    Args:
        seed: Seed of the run.
        index: Global index of each stream, length B.
        purpose: Purpose of the streams, such as ``image`` or ``chain``; different purposes give independent streams.
    """

    def __init__(self, seed: int, index: Sequence[int] | Tensor, purpose: str = "image") -> None:
        first = stream_seed(seed, purpose)
        self._generators = [torch.Generator().manual_seed((first + int(i)) % 2**32) for i in index]

    def __len__(self) -> int:
        return len(self._generators)

    def first(self, count: int) -> "NoiseStreams":
        """Return the first ``count`` streams, which share their state with these."""
        streams = NoiseStreams(0, ())
        streams._generators = self._generators[:count]
        return streams

    def normal(self, like: Tensor) -> Tensor:
        """Draw standard normal noise with the shape, dtype and device of ``like`` (B, ...)."""
        noise = torch.empty(like.shape, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(like)

    def uniform(self) -> Tensor:
        """Draw one number in [0, 1) from each stream, (B,) float64 on the CPU."""
        return torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self._generators])

    def state_dict(self) -> Tensor:
        """Return the states of the streams, (B, number of bytes) uint8."""
        return torch.stack([generator.get_state() for generator in self._generators])

    def load_state_dict(self, states: Tensor) -> None:
        """Restore the states returned by :meth:`state_dict`."""
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state.to("cpu", copy=True))  # PyTorch crashes on a view of a larger tensor
