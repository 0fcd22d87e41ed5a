"""Noise streams: one per image, whatever the batch, the device, the dtype or the interruption."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffaccel.noise import NoiseStreams, host, philox, stream_key
from diffaccel.noise.philox import counters, normals, uniforms

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DRAWS = (
    ([7, 9], 3, 123 + (456 << 32), 20),
    ([2**32 - 2, 2**32 - 1, 2**32, 2**40 + 9], 1, 5, 13),
    ([2**62], 2**31 - 1, 2**64 - 7, 3072),
    (range(40), 0, 1, 7),
    ([3], 1, 5, 1),
)
"""Indices, number of the draw, key, number of numbers."""


def words(index: Tensor, key: int, draw: int, size: int) -> tuple[Tensor, ...]:
    blocks = -(-size // 4)
    return tuple(word.expand(len(index), blocks) for word in philox(counters(index, draw, blocks), key))


# Salmon et al.'s Random123, examples/kat_vectors: philox4x32 10, counter, key, result
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    found = philox(tuple(torch.tensor(word) for word in counter), key[0] | key[1] << 32)
    assert tuple(word.item() for word in found) == expected


@pytest.mark.parametrize(("index", "draw", "key", "size"), DRAWS)
def test_a_cpu_draws_what_is_defined(index: list[int], draw: int, key: int, size: int) -> None:
    index = torch.tensor(list(index))
    expected = normals(words(index, key, draw, size), size)
    torch.testing.assert_close(host.normal(index, key, draw, size), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("index", "draw", "key", "size"), [*DRAWS, ([], 0, 1, 8), ([5], 0, 1, 0), (range(0, 140, 2), 2, 9, 3072)]
)
def test_the_compiled_loop_changes_no_bit(
    index: list[int], draw: int, key: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host.compiled_loop() is None:
        pytest.skip("the package was built without a compiler")
    index = torch.tensor(list(index), dtype=torch.int64)
    compiled = host.normal(index, key, draw, size)
    monkeypatch.setattr(host, "compiled_loop", lambda: None)
    assert torch.equal(compiled, host.normal(index, key, draw, size))


def test_the_compiled_loop_reads_any_memory() -> None:
    """Indices that are every second of an array, and pieces of a batch."""
    if host.compiled_loop() is None:
        pytest.skip("the package was built without a compiler")
    index = torch.arange(64 * 5)
    one = host.normal(index, 3, 1, 3072)
    assert torch.equal(host.normal(index[::2], 3, 1, 3072), one[::2])


def test_box_muller() -> None:
    w = torch.tensor([0, 0, 2**31, 2**32 - 1]).split(1)
    expected = [math.sqrt(66 * math.log(2)), 0.0, math.sqrt(2 * math.log(2)), 0.0]
    assert normals(tuple(word[None] for word in w), 4)[0].tolist() == pytest.approx(expected, abs=1e-6)


KERNEL = """
import contextlib, sys, torch
sys.path.insert(0, "tests")
from test_noise import DRAWS, words
from diffaccel.noise.kernel import Number, draw_numbers
from diffaccel.noise.philox import normals, uniforms
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
for index, draw, key, size in DRAWS:
    index = torch.tensor(list(index))
    w = words(index, key, draw, size)
    assert torch.equal(draw_numbers(index, key, draw, size, Number.WORD), torch.stack(w, 2).flatten(1)[:, :size])
    assert torch.equal(draw_numbers(index, key, draw, 1, Number.UNIFORM), uniforms(w)[:, :1])
    found = draw_numbers(index, key, draw, size, Number.NORMAL)
    torch.testing.assert_close(found, normals(w, size), rtol=0, atol=1e-6)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_draws_what_is_defined() -> None:
    """Triton's interpreter runs the kernel without a GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@CUDA
@pytest.mark.parametrize(("index", "draw", "key", "size"), DRAWS)
def test_a_gpu_draws_what_is_defined(index: list[int], draw: int, key: int, size: int) -> None:
    from diffaccel.noise.kernel import Number, draw_numbers

    index = torch.tensor(list(index))
    w, there = words(index, key, draw, size), index.cuda()
    found = {number: draw_numbers(there, key, draw, size, number).cpu() for number in (Number.WORD, Number.NORMAL)}
    assert torch.equal(found[Number.WORD], torch.stack(w, 2).flatten(1)[:, :size])
    torch.testing.assert_close(found[Number.NORMAL], normals(w, size), rtol=0, atol=1e-6)
    assert torch.equal(draw_numbers(there, key, draw, 1, Number.UNIFORM).cpu(), uniforms(w)[:, :1])


@CUDA
def test_a_draw_on_a_gpu_does_not_wait() -> None:
    streams, like = NoiseStreams(0, range(8), device="cuda"), torch.empty(8, 3, 4, 4, device="cuda")
    streams.normal(like), streams.uniform()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        NoiseStreams(0, range(8), device="cuda").normal(like), streams.uniform()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (3, 32, 32)])
def test_a_stream_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    together = NoiseStreams(3, range(10, 80))
    alone = NoiseStreams(3, [14])
    mixed = NoiseStreams(3, torch.tensor([2**32 + 1, 14, 2]))
    for _ in range(3):
        row = together.normal(torch.empty(70, *shape))[4]
        assert torch.equal(alone.normal(torch.empty(1, *shape))[0], row)
        assert torch.equal(mixed.normal(torch.empty(3, *shape))[1], row)
        assert torch.equal(together.uniform()[4], alone.uniform()[0])
        mixed.uniform()
    assert len(together) == 70


def test_the_number_of_draws_is_the_state() -> None:
    streams, like = NoiseStreams(0, range(4), "chain"), torch.empty(4, 3, 4, 5)
    streams.normal(like), streams.uniform()
    resumed = NoiseStreams(0, range(4), "chain")
    resumed.draws = streams.draws
    assert streams.draws == 2
    assert torch.equal(streams.normal(like), resumed.normal(like))
    assert torch.equal(streams.uniform(), resumed.uniform())


def test_the_first_streams_are_copies() -> None:
    streams, like = NoiseStreams(0, range(4)), torch.empty(4, 16)
    streams.normal(like)
    first = streams.first(2)
    assert torch.equal(first.normal(like[:2]), streams.normal(like)[:2])


def test_noise_is_for_as_many_images_as_there_are_streams() -> None:
    with pytest.raises(ValueError, match="4 streams .* a batch of 3"):
        NoiseStreams(0, range(4)).normal(torch.empty(3, 16))
    assert NoiseStreams(0, []).normal(torch.empty(0, 3)).shape == (0, 3)
    assert NoiseStreams(0, []).uniform().shape == (0,)


def test_draws_are_float32_in_any_dtype() -> None:
    like = torch.empty(2, 3, 4, 4)
    single = NoiseStreams(0, [0, 1]).normal(like)
    double = NoiseStreams(0, [0, 1]).normal(like.double())
    half = NoiseStreams(0, [0, 1]).normal(like.bfloat16())
    assert (single.dtype, double.dtype, half.dtype) == (torch.float32, torch.float64, torch.bfloat16)
    assert torch.equal(single.double(), double)
    assert torch.equal(single.bfloat16(), half)


# Statistics


def test_normal_numbers_are_normal() -> None:
    z = NoiseStreams(0, range(1000)).normal(torch.empty(1000, 4096)).double().flatten()
    n = len(z)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert z.pow(power).mean().item() == pytest.approx(moment, abs=4 * math.sqrt(variance / n))
    assert stats.kstest(z.numpy(), "norm").pvalue > 0.001
    for bound in (3.0, 4.0, 4.5):
        expected = n * 2 * stats.norm.sf(bound)
        assert (z.abs() > bound).sum().item() == pytest.approx(expected, abs=4 * math.sqrt(expected))
    assert 4.9 < z.abs().max() < 6.8  # the largest of 4 million is near 5.2, that of 32 bits is 6.76


def test_squares_and_products_within_a_block_are_independent() -> None:
    """Both numbers of a pair share a radius, and the four of a block a counter."""
    z = NoiseStreams(1, range(200_000)).normal(torch.empty(200_000, 4)).double()
    for values in (z, z.square(), z.abs()):
        off_diagonal = torch.corrcoef(values.T) - torch.eye(4)
        assert off_diagonal.abs().max() < 5 / math.sqrt(len(z))


def test_neighbours_draws_seeds_and_purposes_are_independent() -> None:
    n = 20_000
    like, later = torch.empty(1, n), NoiseStreams(0, [0], "image")
    rows = [
        later.normal(like),
        later.normal(like),
        later.normal(like),
        NoiseStreams(0, [1], "image").normal(like),
        NoiseStreams(0, [2**32], "image").normal(like),
        NoiseStreams(1, [0], "image").normal(like),
        NoiseStreams(0, [0], "chain").normal(like),
        NoiseStreams(0, [0], "training").normal(like),
        NoiseStreams(2**40, [0], "image").normal(like),
    ]
    found = torch.cat(rows).double()
    for values in (found, found.square()):
        off_diagonal = torch.corrcoef(values) - torch.eye(len(rows))
        assert off_diagonal.abs().max() < 5 / math.sqrt(n)
    for lag in (1, 2, 4, n // 4):
        assert torch.corrcoef(torch.stack([found[0, :-lag], found[0, lag:]]))[0, 1].abs() < 5 / math.sqrt(n - lag)


def test_the_first_numbers_of_consecutive_streams_are_independent() -> None:
    first = NoiseStreams(0, range(100_000)).normal(torch.empty(100_000, 1))[:, 0].double()
    assert stats.kstest(first.numpy(), "norm").pvalue > 0.001
    for lag in (1, 2, 64, 1000):
        assert torch.corrcoef(torch.stack([first[:-lag], first[lag:]]))[0, 1].abs() < 0.013


def test_uniform_numbers_are_uniform() -> None:
    streams = NoiseStreams(0, range(100_000))
    u, later = streams.uniform(), streams.uniform()
    assert u.dtype == torch.float64
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.001
    assert torch.corrcoef(torch.stack([u, later]))[0, 1].abs() < 0.013
    bits = (u * 2**53).long()
    assert torch.equal(bits.double() / 2**53, u)
    for place in range(53):  # each of the 53 bits is a fair coin
        assert (bits >> place & 1).double().mean().item() == pytest.approx(0.5, abs=0.008)


def test_the_numbers_are_part_of_the_contract() -> None:
    """Published images depend on these numbers: a change must be a decision."""
    assert [stream_key(0, "image"), stream_key(0, "chain"), stream_key(1, "image")] == [
        7965256173609398105,
        4257322149494663620,
        12611032546903634731,
    ]
    streams = NoiseStreams(0, [0])
    assert streams.normal(torch.empty(1, 4))[0].tolist() == pytest.approx(
        [-0.2014081, 0.2422604, 1.8561023, -0.0766149], abs=1e-6
    )
    assert streams.uniform().item() == 0.06133487398251536
    assert all(0 <= stream_key(seed, "image") < 2**64 for seed in (0, 1, 2**31, 2**63, -1))
