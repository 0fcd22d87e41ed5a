"""Noise streams: one per image, whatever the batch, the dtype or the interruption."""

import math

import pytest
import torch

from diffaccel.noise import NoiseStreams, stream_seed


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5)])  # below and above 16 numbers PyTorch fills in different ways
def test_a_stream_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    together = NoiseStreams(3, range(10, 20))
    alone = NoiseStreams(3, [14])
    mixed = NoiseStreams(3, torch.tensor([99, 14, 2]))
    for _ in range(3):
        row = together.normal(torch.empty(10, *shape))[4]
        assert torch.equal(alone.normal(torch.empty(1, *shape))[0], row)
        assert torch.equal(mixed.normal(torch.empty(3, *shape))[1], row)
        assert torch.equal(together.uniform()[4], alone.uniform()[0])
        mixed.uniform()
    assert len(together) == 10


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 4, 5)])
def test_state_round_trip(shape: tuple[int, ...]) -> None:
    streams = NoiseStreams(0, range(4), "chain")
    like = torch.empty(4, *shape)
    streams.normal(like), streams.uniform()
    state = streams.state_dict()
    expected = streams.normal(like), streams.uniform(), streams.normal(like)
    resumed = NoiseStreams(7, range(4), "image")
    resumed.load_state_dict(state)
    actual = resumed.normal(like), resumed.uniform(), resumed.normal(like)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_draws_are_float32_in_any_dtype() -> None:
    like = torch.empty(2, 3, 4, 4)
    single = NoiseStreams(0, [0, 1]).normal(like)
    double = NoiseStreams(0, [0, 1]).normal(like.double())
    half = NoiseStreams(0, [0, 1]).normal(like.bfloat16())
    assert (single.dtype, double.dtype, half.dtype) == (torch.float32, torch.float64, torch.bfloat16)
    assert torch.equal(single.double(), double)
    assert torch.equal(single.bfloat16(), half)


def test_neighbours_seeds_and_purposes_are_independent() -> None:
    n = 20_000
    like = torch.empty(1, n)
    rows = torch.cat(
        [
            NoiseStreams(0, [0], "image").normal(like),
            NoiseStreams(0, [1], "image").normal(like),
            NoiseStreams(1, [0], "image").normal(like),
            NoiseStreams(0, [0], "chain").normal(like),
            NoiseStreams(0, [0], "training").normal(like),
            NoiseStreams(2**40, [0], "image").normal(like),
        ]
    )
    off_diagonal = torch.corrcoef(rows) - torch.eye(len(rows))
    assert off_diagonal.abs().max() < 5 / math.sqrt(n)
    assert rows.mean(1).abs().max() < 5 / math.sqrt(n)
    assert (rows.var(1) - 1).abs().max() < 5 * math.sqrt(2 / n)


def test_the_moments_across_streams() -> None:
    """The first number of 20 000 consecutive streams is standard normal: consecutive seeds leave no pattern."""
    first = NoiseStreams(0, range(20_000)).normal(torch.empty(20_000, 16))
    assert first[:, 0].mean().item() == pytest.approx(0, abs=0.03)
    assert first[:, 0].var().item() == pytest.approx(1, abs=0.05)
    assert torch.corrcoef(torch.stack([first[:-1, 0], first[1:, 0]]))[0, 1].abs() < 0.03


def test_streams_wrap_at_32_bits() -> None:
    seed = next(s for s in range(1000) if stream_seed(s, "image") > 2**31)
    last = 2**32 - stream_seed(seed, "image")  # the index whose stream wraps to seed 0
    like = torch.empty(1, 16)
    wrapped = NoiseStreams(seed, [last]).normal(like)
    assert torch.equal(wrapped[0], torch.empty(16).normal_(generator=torch.Generator().manual_seed(0)))
    assert torch.equal(NoiseStreams(seed, [last + 2**32]).normal(like), wrapped)
    assert all(0 <= stream_seed(s, "image") < 2**32 for s in (0, 1, 2**31, 2**63, -1))


def test_the_seed_is_part_of_the_contract() -> None:
    """Published images depend on these numbers: a change of the hash must be a decision."""
    assert [stream_seed(0, "image"), stream_seed(0, "chain"), stream_seed(1, "image")] == [
        294070228,
        3876198440,
        3266785514,
    ]


def test_the_first_streams_are_shared() -> None:
    streams, like = NoiseStreams(0, range(4)), torch.empty(4, 16)
    expected = NoiseStreams(0, range(4))
    first = streams.first(2)
    assert torch.equal(first.normal(like[:2]), expected.normal(like)[:2])
    again = expected.normal(like)
    assert torch.equal(streams.normal(like)[:2], again[:2])


def test_uniform_is_float64_in_the_unit_interval() -> None:
    u = NoiseStreams(0, range(2000)).uniform()
    assert u.dtype == torch.float64
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.03)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.005)
