"""One stream of noise per image, per chain, per training sample.

Image i draws from stream (seed, i) whatever batch or process it is made in, so batch size, world size and resuming
change no image, and two methods under one seed share their noise (common random numbers).
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def stream_seed(seed: int, purpose: str) -> int:
    """Hash (seed, purpose) to the 32-bit number that stream 0 is seeded with.

    PyTorch's CPU generator uses the low 32 bits of its seed only, so streams are *consecutive* numbers from one hash:
    within a purpose no two of the first 2^32 collide, as independent hashes would.
    """
    return int.from_bytes(hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=4).digest(), "little")


class NoiseStreams:
    """B independent streams, drawn from in lockstep.

    Draws happen on the CPU in float32 and are then moved: the streams of other devices differ between models of
    hardware.

    Args:
        seed: The run's seed.
        index: Global index of each stream, length B.
        purpose: What the streams are for; ``image`` and ``chain`` streams of equal index are independent.
    """

    def __init__(self, seed: int, index: Sequence[int] | Tensor, purpose: str = "image") -> None:
        first = stream_seed(seed, purpose)
        self._generators = [torch.Generator().manual_seed((first + int(i)) % 2**32) for i in index]

    def __len__(self) -> int:
        return len(self._generators)

    def first(self, count: int) -> "NoiseStreams":
        """Return the first ``count`` of these streams, shared and not copied."""
        streams = NoiseStreams(0, ())
        streams._generators = self._generators[:count]
        return streams

    def normal(self, like: Tensor) -> Tensor:
        """Draw standard normal noise of the shape, dtype and device of ``like`` (B, ...)."""
        noise = torch.empty(like.shape, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(like)

    def uniform(self) -> Tensor:
        """Draw one number in [0, 1) from each stream: (B,), float64, on the CPU."""
        return torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self._generators])

    def state_dict(self) -> Tensor:
        """Return the streams' states, (B, bytes)."""
        return torch.stack([generator.get_state() for generator in self._generators])

    def load_state_dict(self, states: Tensor) -> None:
        """Continue from :meth:`state_dict`."""
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state.to("cpu", copy=True))  # PyTorch crashes on a view of a larger tensor
