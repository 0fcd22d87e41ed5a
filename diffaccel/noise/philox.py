"""Philox4x32-10, a counter-based random number generator, and the numbers that diffaccel makes of its words.

A counter-based generator is a function of a key and a counter, without a state: any number can be computed alone, in
any order and on any device. Here

    key = hash of (purpose, seed),    counter = (high word of index, block, draw, low word of index),

where ``index`` is that of an image, a chain or a training position, ``draw`` is the number of the draw from this
stream, and the blocks are those of one draw. The four 32-bit words w of a block give four normal numbers by the
Box-Muller method,

    u = (w_0 + 1/2) / 2^32,  a = 2 pi w_1 / 2^32,    z = sqrt(-2 ln u) (cos a, sin a),    and likewise (w_2, w_3),

or one uniform number of 53 bits. The words are the same everywhere, and the normal numbers are equal up to rounding.

References:
    Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011), https://doi.org/10.1145/2063384.2063405
"""

import hashlib
import math

import torch
from torch import Tensor

GENERATOR = "philox4x32-10"
"""Name of the definition, which points record: images of another one have other noise for the same seed."""
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
"""Multipliers of the words 0 and 2 of the counter."""
WEYL = 0x9E3779B9, 0xBB67AE85
"""Increments of the key from round to round."""
ROUNDS = 10
LOW = 0xFFFFFFFF
"""Mask of the low 32 bits."""
ANGLE = 2 * math.pi / 2**32
"""Angle per unit of a word."""

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def stream_key(seed: int, purpose: str) -> int:
    """Hash (seed, purpose) to a key of 64 bits."""
    return int.from_bytes(hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=8).digest(), "little")


def round_keys(key: int) -> list[tuple[int, int]]:
    """Return both 32-bit words of the key for each round."""
    low, high = key & LOW, key >> 32
    return [((low + r * WEYL[0]) & LOW, (high + r * WEYL[1]) & LOW) for r in range(ROUNDS)]


def philox(counter: Words, key: int) -> Words:
    """Compute the four words of each block.

    This is the definition, in tensor operations that exist on every device. Two faster forms of it are tested against
    it: :mod:`~diffaccel.noise.host` for CPUs and :mod:`~diffaccel.noise.kernel` for CUDA.

    Args:
        counter: Four words, int64 tensors with values in [0, 2^32), broadcastable against each other.
        key: Key of 64 bits.

    Returns:
        Four words, int64 tensors with values in [0, 2^32).
    """
    c_0, c_1, c_2, c_3 = counter
    for k_0, k_1 in round_keys(key):
        p_0, p_1 = c_0 * MULTIPLIERS[0], c_2 * MULTIPLIERS[1]  # modulo 2^64, as int64 wraps around
        c_0, c_1, c_2, c_3 = (p_1 >> 32 & LOW) ^ c_1 ^ k_0, p_1 & LOW, (p_0 >> 32 & LOW) ^ c_3 ^ k_1, p_0 & LOW
    return c_0, c_1, c_2, c_3


def counters(index: Tensor, draw: int, blocks: int) -> Words:
    """Return the counters of a draw, which broadcast to (B, blocks), for stream indices (B,)."""
    block = torch.arange(blocks, device=index.device)
    return (index >> 32 & LOW)[:, None], block, torch.full_like(block, draw), (index & LOW)[:, None]


def normals(words: Words, size: int) -> Tensor:
    """Convert words, four of (B, blocks), to ``size`` <= 4 * blocks normal numbers per stream, (B, size) float32.

    The numbers of a block are apart by the number of blocks, so that each of the four is written in one piece.
    """
    radius, angle = radii_and_angles(words)
    r = radius.log().mul(-2).sqrt()
    made = [r[0] * angle[0].cos(), r[0] * angle[0].sin(), r[1] * angle[1].cos(), r[1] * angle[1].sin()]
    return torch.cat(made, 1)[:, :size]


def radii_and_angles(words: Words) -> tuple[Tensor, Tensor]:
    """Return the numbers u and a of the Box-Muller method, each (2, B, blocks) float32, of words (B, blocks)."""
    radius, angle = torch.stack(words[::2]), torch.stack(words[1::2])
    return radius.float() * 2.0**-32 + 2.0**-33, angle.float() * ANGLE


def uniforms(words: Words) -> Tensor:
    """Convert the first two words of a block to a number in [0, 1) of 53 bits, float64."""
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)).double() * 2.0**-53
