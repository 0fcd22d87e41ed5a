"""Random numbers on CUDA, one kernel per draw. This module requires Triton, which PyTorch installs with CUDA."""

from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.noise.philox import ANGLE

BLOCKS = 256
"""Number of Philox blocks per program."""
_ANGLE, _PER_WORD, _HALF_WORD = tl.constexpr(ANGLE), tl.constexpr(2.0**-32), tl.constexpr(2.0**-33)
_HIGH, _PER_BIT = tl.constexpr(2.0**26), tl.constexpr(2.0**-53)


class Number(IntEnum):
    """What is drawn."""

    WORD = 0
    """Words of the blocks in their order, four per block, int64."""
    NORMAL = 1
    """Normal numbers, :func:`~diffaccel.noise.philox.normals`, float32."""
    UNIFORM = 2
    """The uniform number of the first block, :func:`~diffaccel.noise.philox.uniforms`, float64."""


DTYPES = {Number.WORD: torch.int64, Number.NORMAL: torch.float32, Number.UNIFORM: torch.float64}


def draw_numbers(index: Tensor, key: int, draw: int, size: int, number: Number) -> Tensor:
    """Draw ``size`` numbers from each stream, (B, size).

    Args:
        index: Indices of the streams, (B,) int64 on a CUDA device.
        key: Key of the streams.
        draw: Number of the draw.
        size: Number of numbers per stream.
        number: What to draw.
    """
    made = torch.empty(len(index), size, dtype=DTYPES[number], device=index.device)
    blocks = -(-size // 4)
    if made.numel():
        with torch.cuda.device_of(index):  # a kernel starts on the current device
            _draw[len(index), -(-blocks // BLOCKS)](
                index, made, _signed(key & 0xFFFFFFFF), _signed(key >> 32), draw, size, blocks, int(number), BLOCKS
            )
    return made


def _signed(word: int) -> int:
    """The word as an int32: Triton compiles a kernel for each integer type that it is given."""
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def _store_pair(start, place, radius, angle, blocks, end):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Box-Muller: store r cos a at ``place``, and r sin a ``blocks`` numbers later."""
    r = tl.sqrt_rn(-2 * tl.log(radius.to(tl.float32) * _PER_WORD + _HALF_WORD))
    a = angle.to(tl.float32) * _ANGLE
    tl.store(start + place, r * tl.cos(a), mask=place < end)
    tl.store(start + place + blocks, r * tl.sin(a), mask=place + blocks < end)


# Unspecialised, because Triton compiles a kernel again for an integer that is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["key_low", "key_high", "draw", "size", "blocks"])
def _draw(index, made, key_low, key_high, draw, size, blocks, number: tl.constexpr, span: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Draw the numbers of ``span`` blocks of a stream."""
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * span + tl.arange(0, span)
    stream, start, block = tl.load(index + row), made + row * size, place.to(tl.uint32)
    zero = block * 0
    w_0, w_1, w_2, w_3 = tl.philox_impl(
        zero + (stream >> 32).to(tl.uint32), block, zero + draw.to(tl.uint32), zero + stream.to(tl.uint32),
        zero + key_low.to(tl.uint32), zero + key_high.to(tl.uint32),
    )  # fmt: skip
    if number == 0:
        tl.store(start + 4 * place, w_0.to(tl.int64), mask=4 * place < size)
        tl.store(start + 4 * place + 1, w_1.to(tl.int64), mask=4 * place + 1 < size)
        tl.store(start + 4 * place + 2, w_2.to(tl.int64), mask=4 * place + 2 < size)
        tl.store(start + 4 * place + 3, w_3.to(tl.int64), mask=4 * place + 3 < size)
    elif number == 1:
        inside = place < blocks  # a program may reach past the stream's last block
        _store_pair(start, place, w_0, w_1, blocks, tl.where(inside, size, 0))
        _store_pair(start, place + 2 * blocks, w_2, w_3, blocks, tl.where(inside, size, 0))
    else:
        bits = (w_0 >> 5).to(tl.float64) * _HIGH + (w_1 >> 6).to(tl.float64)
        tl.store(start + place, bits * _PER_BIT, mask=place < size)
