"""Normal numbers on a CPU, nearly as fast as PyTorch's own generator draws them.

NumPy's integer operations, and its logarithm, sine and cosine in float32, are two to three times as fast as PyTorch's.
A batch is computed in place, in pieces that fit into the cache. The words that vary with the index of the stream, and
those that vary with the block, meet in the third round, so that the rounds before it are computed on vectors.
"""

import threading
from typing import Any, NamedTuple

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
_MULTIPLIERS = [np.uint64(multiplier) for multiplier in MULTIPLIERS]


class _Third(NamedTuple):
    """What round 3 makes of the counters: words of the streams, (B, 1), and of the blocks, (blocks,).

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
    keys = np.array(round_keys(key), np.uint64)
    third = _third_round(found, highest[:1], np.arange(blocks, dtype=np.uint64), draw, keys)
    numbers = np.empty((len(found), 4, blocks), np.float32)
    rows = min(len(found), max(1, PIECE // blocks))
    for first in range(0, len(found), rows):
        piece = slice(first, first + rows)
        ours = numbers[piece]
        words, floats = _buffers(len(ours) * blocks)
        _rounds(third, piece, keys, words)
        for pair in (0, 1):
            _box_muller(words[2 * pair], words[2 * pair + 1], floats, ours[:, 2 * pair : 2 * pair + 2])
    return torch.from_numpy(numbers.reshape(len(found), -1)[:, :size])


def _buffers(size: int) -> tuple[list[Words], list[Floats]]:
    """Buffers of a piece, six and three of (size,), which a thread keeps: new memory costs more than the numbers."""
    kept: tuple[list[Words], list[Floats]] | None = getattr(_KEPT, "buffers", None)
    if kept is None or len(kept[0][0]) < size:
        longest = max(size, PIECE)
        kept = _aligned(6, longest, np.uint64), _aligned(3, longest, np.float32)
        _KEPT.buffers = kept
    return [one[:size] for one in kept[0]], [one[:size] for one in kept[1]]


def _aligned(count: int, size: int, dtype: type[Any]) -> list[NDArray[Any]]:
    """Arrays (size,) that begin with a cache line, at distances of no whole pages: both make operations slower."""
    apart = -(-size // 16) * 16 + 80
    whole = np.empty(count * apart + 16, dtype)
    first = -whole.ctypes.data % 64 // whole.itemsize
    return [whole[first + i * apart :][:size] for i in range(count)]


def _multiplied(word: Words, which: int) -> tuple[Words, Words]:
    """High and low half of a word times a multiplier."""
    product = word * _MULTIPLIERS[which]
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


def _rounds(third: _Third, piece: slice, keys: Words, words: list[Words]) -> None:
    """Compute rounds 4 to 10 of some streams.

    Args:
        third: Result of round 3.
        piece: Streams.
        keys: Keys of all rounds, (10, 2).
        words: Six buffers. The first four are set to the words of the blocks, whose bits above the 32nd are arbitrary.
    """
    w_0, p_1, w_2, p_0, next_0, next_1 = words  # p_1 and p_0 are products, whose low halves are the words 1 and 3
    shape = -1, len(third.word_1)
    np.bitwise_xor(third.word_0[0][piece], third.word_0[1], w_0.reshape(shape))
    np.bitwise_xor(third.word_2[0][piece], third.word_2[1], w_2.reshape(shape))
    m_0, m_1 = _MULTIPLIERS
    np.multiply(w_0, m_0, p_0)
    np.multiply(w_2, m_1, p_1)
    np.right_shift(p_1, _32, w_0)
    np.right_shift(p_0, _32, w_2)
    w_0.reshape(shape)[...] ^= third.word_1
    w_2.reshape(shape)[...] ^= third.word_3[piece]
    for number, (key_0, key_1) in enumerate(keys[4:], start=5):
        np.multiply(w_0, m_0, next_0)
        np.multiply(w_2, m_1, next_1)
        np.right_shift(next_1, _32, w_0)
        np.bitwise_xor(w_0, p_1, w_0)
        np.bitwise_xor(w_0, key_0, w_0)
        np.right_shift(next_0, _32, w_2)
        np.bitwise_xor(w_2, p_0, w_2)
        np.bitwise_xor(w_2, key_1, w_2)
        if number < ROUNDS:
            np.bitwise_and(w_0, _LOW, w_0)
            np.bitwise_and(w_2, _LOW, w_2)
        p_0, p_1, next_0, next_1 = next_0, next_1, p_0, p_1
    words[1], words[3] = p_1, p_0


def _box_muller(radius: Words, angle: Words, buffers: list[Floats], made: Floats) -> None:
    """Convert two words of the blocks, (rows * blocks,), to two normal numbers, (rows, 2, blocks)."""
    r, a, sine = buffers
    # the low halves, on little-endian machines
    r[...], a[...] = radius.view(np.uint32)[::2], angle.view(np.uint32)[::2]
    np.multiply(r, np.float32(2.0**-32), r)
    np.add(r, np.float32(2.0**-33), r)
    np.log(r, r)
    np.multiply(r, np.float32(-2), r)
    np.sqrt(r, r)
    np.multiply(a, np.float32(ANGLE), a)
    np.sin(a, sine)
    np.cos(a, a)
    shape = made[:, 0].shape
    np.multiply(r.reshape(shape), a.reshape(shape), made[:, 0])
    np.multiply(r.reshape(shape), sine.reshape(shape), made[:, 1])
