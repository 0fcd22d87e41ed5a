"""Precision, recall, density and coverage against torch-fidelity, a direct implementation and closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch_fidelity.metric_prc import prc_features_to_metric

from diffaccel.errors import UsageError
from diffaccel.metrics import Neighbours, distances, manifold_scores, nearest
from diffaccel.metrics.neighbours import smallest


def gaussian(n: int, dim: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(n, dim, dtype=torch.float64, generator=generator)


def direct(generated: Tensor, reference: Tensor, k: int) -> dict[str, float]:
    """All four scores from whole matrices of differences, as the papers define them."""
    x, y = generated.double().numpy(), reference.double().numpy()

    def between(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    radius_x, radius_y = (np.sort(between(s, s), axis=1)[:, k] for s in (x, y))
    cross = between(x, y)
    return {
        "precision": (cross <= radius_y).any(axis=1).mean(),
        "recall": (cross <= radius_x[:, None]).any(axis=0).mean(),
        "density": (cross <= radius_y).sum(axis=1).mean() / k,
        "coverage": (cross.min(axis=0) <= radius_y).mean(),
    }


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.1])
@pytest.mark.parametrize(("dim", "n", "m"), [(8, 700, 700), (64, 700, 700), (64, 700, 500)])
def test_precision_and_recall_are_torch_fidelitys(dim, n, m, scale):
    generated, reference = gaussian(n, dim, seed=1, mean=0.1, scale=scale), gaussian(m, dim, seed=2)
    ours = manifold_scores(generated, reference)
    settings = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
    theirs = prc_features_to_metric(generated, reference, **settings)
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)  # float32
    assert 0 < ours.recall < 1, "a case that shows something"


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m"), [(300, 300), (200, 350)])
def test_all_four_are_the_direct_ones(n, m, k):
    generated, reference = gaussian(n, 6, seed=3, scale=1.2).float(), gaussian(m, 6, seed=4).half()
    ours = manifold_scores(generated, reference, k_precision=k, k_density=k)
    assert ours._asdict() == pytest.approx(direct(generated, reference, k), rel=1e-12)


def test_each_k_belongs_to_its_scores():
    generated, reference = gaussian(200, 6, seed=3), gaussian(200, 6, seed=4)
    expected = {**direct(generated, reference, 2)} | {
        key: value for key, value in direct(generated, reference, 7).items() if key in ("density", "coverage")
    }
    assert manifold_scores(generated, reference, 2, 7)._asdict() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 100, 5000])
def test_tiles_and_known_neighbours_change_nothing(rows):
    generated, reference = gaussian(230, 16, seed=5, scale=1.1), gaussian(210, 16, seed=6)
    known = Neighbours(reference, k=8, rows=rows)
    expected = manifold_scores(generated, reference)
    assert manifold_scores(generated, reference, rows=rows) == expected
    assert manifold_scores(generated, known, rows=rows) == expected


def test_copies_are_all_inside():
    """Each ball holds its centre and k neighbours, the last of which lies on its very edge: density is (k + 1) / k."""
    features = gaussian(400, 8, seed=7)
    shuffled = features[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert manifold_scores(shuffled, features, rows=33) == (1, 1, 6 / 5, 1)


def test_sets_far_apart_share_nothing():
    assert manifold_scores(gaussian(100, 8, seed=8, mean=50), gaussian(100, 8, seed=9)) == (0, 0, 0, 0)


def test_half_of_the_modes_is_half_of_the_coverage():
    """Twenty modes, of which the generator knows ten: all it makes is right, and half of the data is missed."""
    modes = 100.0 * torch.eye(20, dtype=torch.float64)
    real, made = gaussian(2000, 20, seed=10).view(20, 100, 20), gaussian(2000, 20, seed=11).view(10, 200, 20)
    real, made = real + modes[:, None], made + modes[:10, None]
    whole = manifold_scores(made.flatten(0, 1), real.flatten(0, 1))
    known = manifold_scores(made.flatten(0, 1), real[:10].flatten(0, 1))
    assert (whole.precision, whole.density) == (known.precision, pytest.approx(known.density, rel=1e-12))
    assert (whole.recall, whole.coverage) == pytest.approx((known.recall / 2, known.coverage / 2), rel=1e-12)
    assert known.coverage > 0.98


def expected_coverage(n: int, m: int, k: int) -> float:
    """Of one distribution: one less the chance that the k nearest of a real image, among all, are real (exact)."""
    return 1 - math.prod((m - i) / (n + m - i) for i in range(1, k + 1))


@pytest.mark.parametrize(("n", "m"), [(400, 400), (800, 400), (200, 400)])
def test_of_one_distribution_density_is_1_and_coverage_its_closed_form(n, m):
    scores = torch.tensor([manifold_scores(gaussian(n, 5, seed), gaussian(m, 5, 100 + seed)) for seed in range(20)])
    _, _, density, coverage = scores.double().unbind(1)
    assert abs(density.mean() - 1) < 3 * density.std() / 20**0.5
    assert abs(coverage.mean() - expected_coverage(n, m, 5)) < 3 * coverage.std() / 20**0.5


def test_real_against_real_is_far_from_1():
    """The value to print beside: at d = 64, n = 2000 precision and recall of one distribution with itself are 0.6."""
    pairs = [(gaussian(2000, 64, seed), gaussian(2000, 64, 100 + seed)) for seed in range(4)]
    precision, recall, density, coverage = torch.tensor([manifold_scores(*pair) for pair in pairs]).mean(0).tolist()
    assert (precision, recall) == pytest.approx((0.60, 0.60), abs=0.03)  # the spread of one pair is 0.017
    assert coverage == pytest.approx(expected_coverage(2000, 2000, 5), abs=0.01)  # 0.007
    assert density == pytest.approx(1, abs=0.11)  # 0.07


def test_precision_and_recall_change_places_with_the_sets():
    x, y = gaussian(300, 8, seed=12, scale=0.7), gaussian(250, 8, seed=13)
    there, back = manifold_scores(x, y), manifold_scores(y, x)
    assert (there.precision, there.recall) == (back.recall, back.precision)
    assert there.precision > 0.9 > there.recall


# Distances


def test_near_duplicates_far_from_the_origin_keep_their_distance():
    x = 1e4 + gaussian(50, 64, seed=14)
    step = 1e-6 * gaussian(50, 64, seed=15)
    (found,) = distances(x + step, x)
    torch.testing.assert_close(found.diagonal(), ((x + step) - x).norm(dim=1), rtol=1e-12, atol=0)


def test_a_distance_is_the_same_in_any_tile_and_order():
    x, y = gaussian(90, 37, seed=16), gaussian(70, 37, seed=17)
    whole = torch.cat(list(distances(x, y)))
    assert torch.equal(whole, torch.cat(list(distances(x, y, rows=7))))
    assert torch.equal(whole, torch.cat(list(distances(y, x, rows=11))).T)


def test_radii_leave_the_feature_itself_out_and_count_its_copies():
    line = torch.tensor([[0.0], [1.0], [3.0], [3.0], [7.0]])
    neighbours = Neighbours(line, k=3)
    assert neighbours.radii(1).tolist() == [1, 1, 0, 0, 4]
    assert neighbours.radii(2).tolist() == [3, 2, 2, 2, 4]
    assert neighbours.radii(3).tolist() == [3, 2, 3, 3, 6]


def test_nearest_is_the_smallest_of_the_row():
    x, y = gaussian(40, 5, seed=18), gaussian(60, 5, seed=19)
    distance, index = nearest(x, y, rows=9)
    expected = torch.cdist(x, y).min(dim=1)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(distance, expected.values)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_tile():
    generated, reference, rows = gaussian(700, 4, seed=20), gaussian(900, 4, seed=21), 16
    with Largest() as largest:
        manifold_scores(generated, reference, rows=rows)
        nearest(generated, reference, rows)
    assert largest.numel == rows * 900


# What is refused


def test_what_does_not_fit_is_refused():
    features = gaussian(10, 3, seed=22)
    with pytest.raises(UsageError, match="5 features are too few for k=5 neighbours"):
        manifold_scores(features, features[:5])
    with pytest.raises(UsageError, match="3 features are too few for k=3 neighbours"):
        manifold_scores(features[:3], features)
    with pytest.raises(UsageError, match="too few for k=0 neighbours"):
        Neighbours(features, k=0)
    with pytest.raises(UsageError, match="only 4 neighbours are available, not 5"):
        manifold_scores(features, Neighbours(features, k=4))
    with pytest.raises(UsageError, match=r"generated features have shape \(10, 2\), not \(n, 3\)"):
        manifold_scores(features[:, :2], features)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad):
    good, spoilt = gaussian(10, 3, seed=23), gaussian(10, 3, seed=24)
    spoilt[4, 1] = bad
    for pair in ((good, spoilt), (spoilt, good)):
        with pytest.raises(UsageError, match="contain 1 values that are NaN or infinite"):
            manifold_scores(*pair)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_smallest_are_those_of_all_distances_to_the_last_bit(scale):
    """Also among copies, near duplicates and points far from the origin, where a matrix product rounds them away."""
    x = scale + torch.randn(150, 6)
    x[40:60] = x[39]  # more copies than there are spare candidates
    x[60:90] = x[90:120] + 1e-6 * torch.randn(30, 6)
    (whole,) = distances(x, x, rows=150)
    expected = whole.sort(dim=1, stable=True)
    for rows in (150, 32):
        distance, index = smallest(x, x, 4, rows)
        assert torch.equal(distance, expected.values[:, :4]) and torch.equal(index, expected.indices[:, :4])
