"""Normal numbers on a CPU, as fast as PyTorch's own generator draws them.

NumPy's integer operations, and its logarithm, sine and cosine in float32, are two to three times as fast as PyTorch's.
A batch is computed in place, in pieces that fit into the cache. The words that vary with the index of the stream, and
those that vary with the block, meet in the third round, so that the rounds before it are computed on vectors.
"""

import threading
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffaccel.noise.philox import ANGLE, LOW, MULTIPLIERS, ROUNDS, round_keys

Words = NDArray[np.uint64]
Floats = NDArray[np.float32]
PIECE = 49_152
"""Number of blocks per piece, as many as 64 images of 3 x 32 x 32 have; 4 MB of buffers."""
_KEPT = threading.local()
_32, _LOW = np.uint64(32), np.uint64(LOW)
_MULTIPLIERS = np.array(MULTIPLIERS, np.uint64)[:, None, None]


class _Third(NamedTuple):
    """What round 3 makes of the counters: words of the streams, (B, 1), and of the blocks, (1, blocks).

    Words 0 and 2 are the exclusive or of two such words; words 1 and 3 contain the key of round 4.
    """

    word_0: tuple[Words, Words]
    word_1: Words
    word_2: tuple[Words, Words]
    word_3: Words


def normal(index: Tensor, key: int, draw: int, size: int) -> Tensor:
    """Draw normal numbers, those of :func:`~diffaccel.noise.philox.normals`, up to rounding.

    Args:
        index: Indices of the streams, (B,) int64 on the CPU.
        key: Key of the streams.
        draw: Number of the draw.
        size: Number of numbers per stream.

    Returns:
        Normal numbers, (B, size) float32.
    """
    blocks, found = -(-size // 4), index.numpy().view(np.uint64)
    highest = found >> _32
    if not len(found) or not size:
        return torch.empty(len(found), size)
    if (highest != highest[0]).any():  # on both sides of a multiple of 2^32
        low = torch.from_numpy(highest == highest[0])
        made = torch.empty(len(found), size)
        made[low], made[~low] = normal(index[low], key, draw, size), normal(index[~low], key, draw, size)
        return made
    keys = np.array(round_keys(key), np.uint64)[:, :, None, None]
    third = _third_round(found, highest[:1], np.arange(blocks, dtype=np.uint64), draw, keys.reshape(-1, 2))
    numbers = np.empty((len(found), 4, blocks), np.float32)
    rows = min(len(found), max(1, PIECE // blocks))
    words, floats = _buffers(rows * blocks)
    words, floats = words.reshape(3, 2, rows, blocks), floats.reshape(3, 2, rows, blocks)
    for first in range(0, len(found), rows):
        piece = slice(first, first + rows)
        count = len(numbers[piece])
        x, y = _rounds(third, piece, keys, words[:, :, :count])
        _box_muller(x, y, floats[:, :, :count], numbers[piece])
    return torch.from_numpy(numbers.reshape(len(found), -1)[:, :size])


def _buffers(size: int) -> tuple[Words, Floats]:
    """Buffers of a piece, (3, 2, size) each, which a thread keeps: new memory costs more than the numbers."""
    kept: tuple[Words, Floats] | None = getattr(_KEPT, "buffers", None)
    if kept is None or kept[0].shape[2] < size:
        shape = 3, 2, max(size, PIECE)
        kept = _KEPT.buffers = np.empty(shape, np.uint64), np.empty(shape, np.float32)
    return kept[0][..., :size], kept[1][..., :size]


def _multiplied(word: Words, which: int) -> tuple[Words, Words]:
    """High and low half of a word times a multiplier."""
    product = word * _MULTIPLIERS[which, 0, 0]
    return product >> _32, product & _LOW


def _third_round(index: Words, highest: Words, block: Words, draw: int, keys: Words) -> _Third:
    """Compute the first three rounds of streams whose indices have the same high word."""
    high_0, low_0 = _multiplied(highest, 0)
    high_1, low_1 = _multiplied(np.array([draw], np.uint64), 1)
    of_block, of_stream = high_1 ^ block ^ keys[0, 0], (high_0 ^ (index & _LOW) ^ keys[0, 1])[:, None]
    (high_0, block_low), (high_1, stream_low) = _multiplied(of_block, 0), _multiplied(of_stream, 1)
    of_stream, of_block = high_1 ^ low_1 ^ keys[1, 0], high_0 ^ low_0 ^ keys[1, 1]
    (high_0, word_3), (high_1, word_1) = _multiplied(of_stream, 0), _multiplied(of_block, 1)
    return _Third(
        (stream_low, high_1 ^ keys[2, 0]), word_1 ^ keys[3, 0], (high_0, block_low ^ keys[2, 1]), word_3 ^ keys[3, 1]
    )


def _rounds(third: _Third, piece: slice, keys: Words, buffers: Words) -> tuple[Words, Words]:
    """Compute rounds 4 to 10 of some streams.

    The words that a round multiplies are stacked, as are the other two; a round exchanges the two of a stack.

    Returns:
        Words (2, 0) and words (3, 1), whose bits above the 32nd are arbitrary.
    """
    x, y, spare = buffers
    np.bitwise_xor(third.word_0[0][piece], third.word_0[1], out=x[0])
    np.bitwise_xor(third.word_2[0][piece], third.word_2[1], out=x[1])
    np.multiply(x, _MULTIPLIERS, out=y)
    np.right_shift(y, _32, out=x)
    x[0] ^= third.word_3[piece]
    x[1] ^= third.word_1
    for number in range(4, ROUNDS):
        in_order = number % 2  # whether the words are (0, 2) before the round, and (2, 0) after it
        np.multiply(x, _MULTIPLIERS if in_order else _MULTIPLIERS[::-1], out=spare)
        np.right_shift(spare, _32, out=x)
        x ^= y[::-1]
        x ^= keys[number, ::-1] if in_order else keys[number]
        if number < ROUNDS - 1:
            x &= _LOW
        y, spare = spare, y
    return x, y


def _box_muller(x: Words, y: Words, buffers: Floats, made: Floats) -> None:
    """Convert words (2, 0) and (3, 1) to normal numbers, (rows, 4, blocks)."""
    r, a, sine = buffers
    r[...], a[...] = (words.view(np.uint32)[..., ::2] for words in (x, y))  # the low halves, on little-endian machines
    r *= np.float32(2.0**-32)
    r += np.float32(2.0**-33)
    np.log(r, out=r)
    r *= np.float32(-2)
    np.sqrt(r, out=r)
    a *= np.float32(ANGLE)
    np.sin(a, out=sine)
    np.cos(a, out=a)
    for pair in (0, 1):
        np.multiply(r[1 - pair], a[1 - pair], out=made[:, 2 * pair])
        np.multiply(r[1 - pair], sine[1 - pair], out=made[:, 2 * pair + 1])
