"""Copies, fresh draws and strangers: how close generated images come to training images."""

import pytest
import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.metrics import memorised

DIM = 6


def gaussian(n: int, seed: int, mean: float = 0.0) -> Tensor:
    return mean + torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


def test_copies_are_all_found():
    training, held_out = gaussian(500, seed=1), gaussian(300, seed=2)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:200]
    result = memorised(training[order], training, held_out)
    assert result.share == 1
    assert result.distance.tolist() == [0] * 8
    assert torch.equal(result.training, order[result.generated])


def test_fresh_draws_are_as_close_as_the_quantile_says():
    """Given the training images, distances are independent and alike: P(fresh <= j-th of h) = j / (h + 1), exactly."""
    training, n, h, seeds = gaussian(1000, seed=3), 999, 999, range(30)
    shares = torch.tensor(
        [memorised(gaussian(n, 10 + seed), training, gaussian(h, 100 + seed)).share for seed in seeds]
    )
    error = (0.01 * 0.99 * (1 / n + 1 / h) / len(seeds)) ** 0.5  # of the count, and of the threshold
    assert abs(shares.mean() - 0.01) < 3 * error
    assert shares.std() == pytest.approx(error * len(seeds) ** 0.5, rel=0.5)


def test_some_copies_among_fresh_draws_are_counted():
    training, held_out = gaussian(1000, seed=4), gaussian(999, seed=5)
    nudged = training[:300] + 1e-3 * gaussian(300, seed=6)
    share = memorised(torch.cat([nudged, gaussian(700, seed=7)]), training, held_out).share
    assert share == pytest.approx(0.3 + 0.7 * 0.01, abs=0.01)


def test_strangers_are_close_to_nothing():
    assert memorised(gaussian(100, seed=8, mean=30), gaussian(200, seed=9), gaussian(200, seed=10)).share == 0


def test_the_closest_pairs_are_those_of_the_whole_matrix():
    generated, training, held_out = gaussian(120, seed=11), gaussian(90, seed=12), gaussian(150, seed=13)
    result = memorised(generated, training, held_out, closest=5, rows=17)
    distance, index = torch.cdist(generated.double(), training.double()).min(dim=1)
    expected = distance.sort()
    assert torch.equal(result.generated, expected.indices[:5])
    assert torch.equal(result.training, index[expected.indices[:5]])
    torch.testing.assert_close(result.distance, expected.values[:5])
    real = torch.cdist(held_out.double(), training.double()).min(dim=1).values
    assert result.threshold == pytest.approx(real.sort().values[0].item())  # of 150, 1 % is the first
    assert len(memorised(generated[:3], training, held_out).distance) == 3, "no more than there are"


def test_what_does_not_fit_is_refused():
    some = gaussian(200, seed=14)
    with pytest.raises(UsageError, match="98 held-out images are too few for the quantile 0.01"):
        memorised(some, some, some[:98])
    with pytest.raises(UsageError, match="no training features"):
        memorised(some, some[:0], some)
    with pytest.raises(UsageError, match=r"held-out features have shape \(200, 5\), not \(n, 6\)"):
        memorised(some, some, some[:, :5])
    with pytest.raises(UsageError, match="generated features contain 200 values that are NaN"):
        memorised(some.clone().index_fill_(1, torch.tensor(2), torch.nan), some, some)
