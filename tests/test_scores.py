"""What a point's images add up to: rounding, blocks, the floor at as many images, and held-out ones beside them."""

import math

import pytest
import torch
from torch import Tensor

from diffaccel.config import STANDARD
from diffaccel.errors import UsageError
from diffaccel.evaluation.partial import Chunk
from diffaccel.evaluation.scores import BLOCKS, Scores, blocks_of
from diffaccel.metrics import Moments, kernel_distance, memorisation
from diffaccel.metrics.base import METRICS, Made, Measured, Metric, Real, build_metrics, measure, spread
from diffaccel.metrics.reference import Reference
from diffaccel.sampling import to_uint8

CPU = torch.device("cpu")


def reference(mean: float, std: float, features: Tensor) -> Reference:
    """Statistics of 1000 images with one feature, of which ``features`` (m, 1) are kept."""
    return Reference(Moments(1000, torch.tensor([mean]), torch.tensor([[std**2]])), features.half(), {})


def chunk(features: Tensor, first: int = 0) -> Chunk:
    """A batch of the images from ``first`` on, with these features (b, 1)."""
    count = len(features)
    indices, shown = torch.arange(first, first + count), torch.zeros(len(range(first, min(4, first + count))), 1, 1, 1)
    return Chunk(
        indices, features, torch.zeros(count, 32, dtype=torch.uint8), shown, None, "", 0,
        {"denoiser": 5 * count}, {}, {"denoiser": 100.0}, 0.5, 0.25, warm_up=3.0,
        decoding=0.125, decoding_flops=7.0,
    )  # fmt: skip


def scores(features: Tensor, real: Real, chains: int | None = None) -> Scores:
    """The scores of one batch."""
    found = Scores(len(features), 1, (1, 1, 1), 4, torch.float32, real, chains, CPU)
    found.add(chunk(features))
    return found


def measured(found: Scores, *names: str) -> Measured:
    """The values of metrics by name."""
    return measure(build_metrics(["frechet", *names]), found.made("fd"), found.real)


def test_the_floor_is_that_of_as_many_images():
    """(mean - 0)^2 + (std - 1)^2, of rows 0, 4 and 8 of the nine that are kept: mean 4, variance 32 / 2."""
    floor = reference(3.0, 1.0, torch.arange(9.0)[:, None])
    real = Real(reference(0.0, 1.0, torch.randn(20, 1)), floor)
    few, many = (measured(scores(torch.randn(n, 1), real)).values["fd_floor"] for n in (3, 12))
    assert few == pytest.approx(4**2 + (4 - 1) ** 2)
    assert many == pytest.approx(3**2 + 0**2), "more than are kept: all of the split"
    assert "fd_floor" not in measured(scores(torch.randn(3, 1), Real(real.reference, None))).values


def test_the_distance_is_the_closed_form_of_one_feature():
    real = Real(reference(2.0, 3.0, torch.randn(20, 1)), None)
    found = measured(scores(torch.tensor([[-1.0], [0.0], [1.0]]), real)).values
    assert found["fd"] == pytest.approx(2**2 + (3 - 1) ** 2)


def test_neighbourhoods_of_held_out_images_stand_beside():
    """Copies of real images lie among them, held-out ones from elsewhere do not."""
    rows = torch.arange(20.0)[:, None]
    real = Real(reference(0.0, 1.0, rows), reference(0.0, 1.0, rows + 500))
    found = measured(scores(rows, real), "manifold").values
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert (found["precision_real"], found["recall_real"], found["coverage_real"]) == (0, 0, 0)


def test_samples_of_a_condition_are_in_one_block():
    block = blocks_of(torch.arange(90), None, samples=3)
    assert torch.equal(block.view(30, 3), (torch.arange(30) % BLOCKS)[:, None].expand(30, 3))
    rows, real = torch.randn(90, 1).cumsum(0), Real(reference(0.0, 1.0, torch.randn(20, 1)), None)
    found = Scores(90, 1, (1, 1, 1), 4, torch.float32, real, None, CPU, samples=3)
    found.add(chunk(rows))
    whole, alone = (one.first.frechet.moments(0).mean for one in (found, scores(rows, real)))
    assert whole.item() == pytest.approx(rows[block != 0].double().mean().item())
    assert whole.item() != pytest.approx(alone.item())


def test_copies_are_those_of_training_images():
    """Held-out images are 5 off, so that half of what is generated here is close, and the other half is not."""
    training, held_out = 10 * torch.arange(200.0)[:, None], 10 * torch.arange(200.0)[:, None] + 5
    real = Real(reference(0.0, 1.0, training), reference(0.0, 1.0, held_out))
    found = measured(scores(torch.cat([training + 4, training + 3000]), real), "memorisation").details["memorisation"]
    assert (found["share"], found["threshold"]) == (0.5, 5)
    assert len(found["closest"]) == 8 and all(a == b and d == 4 for a, b, d in found["closest"])
    few = Real(real.reference, reference(0.0, 1.0, held_out[:99]))
    details = measured(scores(training, few), "memorisation").details
    assert details.keys() == {"jackknife", "memorisation"} and details["memorisation"] is None


def test_the_kernel_distance_has_an_error_and_a_floor():
    """The floor is that of as many held-out images, and is computed once for all points."""
    rows = torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    real = Real(reference(0.0, 1.0, rows[:200]), reference(0.0, 1.0, rows[200:]))
    found = scores(rows[:80] + 1, real, chains=20)
    values, details = measured(found, "kid").values, found.made("fd")
    assert details.block is not None and torch.equal(details.block, blocks_of(torch.arange(80), 20))
    expected = kernel_distance(rows[:80] + 1, real.kernel, block=blocks_of(torch.arange(80), 20))
    assert (values["kid"], values["kid_se"]) == (expected.kid.item(), expected.se.item())
    assert values["kid_se"] > 0
    assert values["kid_floor"] == kernel_distance(spread(real.held_out, 80), real.kernel).kid.item()
    assert real.kernel_floor(80) is real.kernel_floor(80)
    assert "kid_floor" not in measured(scores(rows[:80], Real(real.reference, None)), "kid").values
    assert measured(scores(rows[:3], real), "kid").values.keys() & {"kid", "kid_se"} == {"kid"}


def test_the_threshold_of_copies_is_of_all_classes(monkeypatch: pytest.MonkeyPatch):
    """Held-out images are sorted by class; those of the first class are 1 off, the others equal training images."""
    monkeypatch.setattr("diffaccel.metrics.base.COMPARED", 200)
    training = 4 * torch.arange(400.0)[:, None]
    held_out = training + (torch.arange(400) < 200)[:, None]
    real = Real(reference(0.0, 1.0, training), reference(0.0, 1.0, held_out))
    assert real.copy_threshold.item() == 0


def test_the_threshold_of_copies_is_computed_once_for_all_points(monkeypatch: pytest.MonkeyPatch):
    """And is that of :func:`memorised` alone."""
    rows, held_out = 10 * torch.arange(200.0)[:, None], 10 * torch.arange(200.0)[:, None] + 5
    real, searched = Real(reference(0.0, 1.0, rows), reference(0.0, 1.0, held_out)), []
    nearest = memorisation.nearest
    monkeypatch.setattr(memorisation, "nearest", lambda x, *rest: (searched.append(len(x)), nearest(x, *rest))[1])
    found = [measured(scores(rows[:150] + i, real), "memorisation").details["memorisation"] for i in (4, 6)]
    assert searched == [200, 150, 150]
    alone = [memorisation.memorised(rows[:150] + i, rows, held_out) for i in (4, 6)]
    assert [(one["share"], one["threshold"]) for one in found] == [(one.share, one.threshold) for one in alone]


def test_rounding_and_truncation():
    """Values halfway between two levels, in units of [-1, 1]; what lies outside is brought in."""
    level = torch.tensor([-3.0, 0.0, 0.4, 0.6, 200.9, 254.6, 300.0])
    assert to_uint8(level / 127.5 - 1).tolist() == [0, 0, 0, 1, 201, 255, 255]
    assert to_uint8(level / 127.5 - 1, truncate=True).tolist() == [0, 0, 0, 0, 200, 254, 255]


def test_blocks_are_of_images_or_of_whole_chains():
    indices = torch.arange(60)
    assert blocks_of(indices, None).tolist() == [i % BLOCKS for i in range(60)]
    blocks = blocks_of(indices, 15)
    assert all(blocks[i] == blocks[i % 15] == (i % 15) % BLOCKS for i in range(60))


def test_what_is_spread_takes_both_ends():
    assert spread(torch.arange(9), 3).tolist() == [0, 4, 8]
    assert spread(torch.arange(5), 5).tolist() == [0, 1, 2, 3, 4]


def test_what_batches_took_adds_up():
    real = Real(reference(0.0, 1.0, torch.randn(20, 1)), None)
    found = Scores(5, 1, (1, 1, 1), 4, torch.float32, real, None, CPU)
    for first, count in ((0, 3), (3, 2)):
        found.add(chunk(torch.full((count, 1), float(first)), first))
    assert found.evaluations == {"denoiser": 25} and found.flops == {"denoiser": 100.0}
    assert found.seconds.tolist() == [1.0, 0.5, 6.0, 0.25] and found.images_by_rank == {0: 5}
    assert found.decoding_flops == 7.0
    assert found.features[0].flatten().tolist() == [0, 0, 0, 3, 3]
    assert math.isnan(measured(found).values["fd_inf"]) is False


class Spread(Metric):
    """Standard deviation of all images' features, and whether there are many.

    Args:
        scale: Factor on it.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, made: Made, real: Real) -> dict[str, float]:
        return {"spread": self.scale * float(made.moments().covariance.sqrt())}

    def details(self, made: Made, real: Real) -> dict[str, object]:
        return {"many": made.n > 2}


def test_a_metric_under_a_name_of_its_own_is_computed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METRICS._factories, "spread", Spread)
    found = scores(torch.tensor([[-1.0], [0.0], [1.0]]), Real(reference(0.0, 1.0, torch.randn(20, 1)), None))
    metrics = build_metrics(["frechet", {"name": "spread", "scale": 3}])
    both = measure(metrics, found.made("fd"), found.real)
    assert both.values.keys() == {"fd", "fd_inf", "fd_se", "spread"}
    assert both.details.keys() == {"jackknife", "many"} and both.details["many"] is True
    assert both.values["spread"] == pytest.approx(3.0)
    quick = measure(metrics, found.made("fd"), found.real, in_training=True)
    assert quick.values.keys() == {"fd", "fd_inf", "fd_se"}, "it is not marked for evaluations in training"
    with pytest.raises(UsageError, match="Spread and another metric both return 'spread'"):
        measure([*metrics, Spread()], found.made("fd"), found.real)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["kid"], "'frechet' is missing, .*add it"),
        (["frechet", "kld"], "no metric is called 'kld'; did you mean 'kid'"),
        (["frechet", {"name": "kid", "rows": 3}], "metric 'kid' has no key 'rows'"),
        ([3], "give a name"),
    ],
)
def test_metrics_that_can_not_be_built(names: list[object], message: str):
    with pytest.raises(UsageError, match=message):
        build_metrics(names)  # type: ignore[arg-type]
    assert len(build_metrics(STANDARD)) == 5
