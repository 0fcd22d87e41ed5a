"""Streams of random numbers, one per image, per chain and per training sample.

Image i draws from stream (seed, i) in any batch, on any rank and device. So images depend on batch size, world size,
resuming and device only by rounding, and two methods with the same seed share their noise (common random numbers).
"""

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from diffaccel.noise import host
from diffaccel.noise.philox import counters, normals, philox, stream_key, uniforms


class NoiseStreams:
    """A batch of B independent streams of random numbers.

    Numbers are drawn on the device where they are used, without waiting for it.

    Args:
        seed: Seed of the run.
        index: Global index of each stream, length B.
        purpose: Purpose of the streams, such as ``image`` or ``chain``; different purposes give independent streams.
        device: Device of :meth:`uniform`; by default that of ``index``.

    Attributes:
        draws: Number of draws so far, which is all of the streams' state.
    """

    def __init__(
        self,
        seed: int,
        index: Sequence[int] | Tensor,
        purpose: str = "image",
        device: torch.device | str | None = None,
    ) -> None:
        self._key, self.draws = stream_key(seed, purpose), 0
        if isinstance(index, range):
            self._index = torch.arange(index.start, index.stop, index.step, device=device or "cpu")
        elif isinstance(index, Tensor):
            self._index = index.to(device or index.device, torch.int64)
        else:
            self._index = torch.tensor(index, dtype=torch.int64, device=device or "cpu")

    def __len__(self) -> int:
        return len(self._index)

    def first(self, count: int) -> "NoiseStreams":
        """Return copies of the first ``count`` streams."""
        streams = NoiseStreams(0, self._index[:count])
        streams._key, streams.draws = self._key, self.draws
        return streams

    def normal(self, like: Tensor) -> Tensor:
        """Draw standard normal noise with the shape, dtype and device of ``like`` (B, ...), in float32."""
        if len(like) != len(self):
            raise ValueError(f"{len(self)} streams can't draw noise for a batch of {len(like)}")
        if like.device != self._index.device:
            self._index = self._index.to(like.device)
        self.draws += 1
        index, draw, size = self._index, self.draws - 1, like[0].numel() if len(like) else 0
        if _has_kernel(index.device):
            from diffaccel.noise.kernel import Number, draw_numbers

            noise = draw_numbers(index, self._key, draw, size, Number.NORMAL)
        elif index.device.type == "cpu":
            noise = host.normal(index, self._key, draw, size)
        else:
            noise = normals(philox(counters(index, draw, -(-size // 4)), self._key), size)
        return noise.reshape(like.shape).to(like.dtype)

    def uniform(self) -> Tensor:
        """Draw one number in [0, 1) of 53 bits from each stream, (B,) float64 on the device of the streams."""
        self.draws += 1
        index, draw = self._index, self.draws - 1
        if _has_kernel(index.device):
            from diffaccel.noise.kernel import Number, draw_numbers

            return draw_numbers(index, self._key, draw, 1, Number.UNIFORM)[:, 0]
        return uniforms(philox(counters(index, draw, 1), self._key))[:, 0]


@cache
def _has_kernel(device: torch.device) -> bool:
    """Whether there is a kernel for a device; if not, tensor operations draw the same numbers."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
