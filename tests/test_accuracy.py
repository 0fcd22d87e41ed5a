"""Accuracy of conditional samples: the classifier in closed form, what it is fitted to, and what is left out."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffaccel.config import EXPERIMENTS, load
from diffaccel.errors import UsageError
from diffaccel.evaluation.judges import Judge
from diffaccel.evaluation.provenance import identity_hash
from diffaccel.experiment.evaluation import check_classes
from diffaccel.experiment.identity import identify
from diffaccel.metrics import FrechetDistance, Moments
from diffaccel.metrics.accuracy import Accuracy, Discriminant, standard_error
from diffaccel.metrics.base import Made, Real
from diffaccel.metrics.reference import Reference, read_reference


def gaussians(n: int, distance: float, dim: int = 3) -> tuple[Tensor, Tensor]:
    """Two classes N(+-distance / 2 e_1, A A^T), whose optimal accuracy is Phi(delta / 2)."""
    labels = torch.arange(n) % 2
    x = torch.randn(n, dim)
    x[:, 0] += distance * (labels - 0.5)
    mixing = torch.eye(dim) + 0.5 * torch.ones(dim, dim).triu(1)
    return x @ mixing, labels


def reference(features: Tensor, labels: Tensor | None) -> Reference:
    provenance = {"extractor": {"name": "identity", "sha256": "0", "dim": features.shape[1]}, "label": "x"}
    return Reference(Moments.from_features(features), features.half(), provenance, labels)


def made(features: Tensor, labels: Tensor | None) -> Made:
    return Made(len(features), features, FrechetDistance(features.shape[1], Moments.from_features(features)), "fd_x",
                labels=labels)  # fmt: skip


@pytest.mark.parametrize("distance", [1.0, 2.0, 4.0])
def test_two_gaussians_are_told_apart_as_well_as_possible(distance: float):
    """The optimum is Phi(delta / 2), delta the Mahalanobis distance, which no linear map of the features changes."""
    (features, labels), (others, own) = gaussians(4000, distance), gaussians(20_000, distance)
    found = Accuracy()(made(others, own), Real(reference(features, labels), reference(others, own)))
    optimum = 0.5 * (1 + math.erf(distance / 2 / math.sqrt(2)))
    assert found["accuracy"] == pytest.approx(optimum, abs=0.01) and found["accuracy_floor"] == found["accuracy"]
    assert found["accuracy_se"] == pytest.approx(
        (found["accuracy"] * (1 - found["accuracy"]) / 20_000) ** 0.5, rel=1e-3
    )


def test_it_is_scikit_learns_discriminant():
    """With the same shrinkage of the covariance within the classes, and equal frequencies."""
    lda = pytest.importorskip("sklearn.discriminant_analysis")
    torch.manual_seed(1)
    labels = torch.arange(600) % 3
    centres = torch.randn(3, 8) * 0.8
    features = centres[labels] + torch.randn(600, 8) @ torch.randn(8, 8)
    theirs = lda.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.01, priors=[1 / 3] * 3)
    theirs.fit(features.numpy(), labels.numpy())
    others = centres[labels] + torch.randn(600, 8) * 2
    found = Discriminant(features, labels)(others).numpy()
    assert (found == theirs.predict(others.numpy())).mean() > 0.995  # the covariances differ by n / (n - 3)


def test_classes_need_not_be_all_there():
    features, labels = gaussians(200, 8.0)
    assert set(Discriminant(features, labels * 5 + 2)(features).tolist()) == {2, 7}


def test_samples_of_no_class_are_left_out():
    (features, labels), real = gaussians(400, 8.0), None
    real = Real(reference(features, labels), None)
    wrong = torch.where(torch.arange(400) < 100, -1, torch.where(torch.arange(400) < 200, 1 - labels, labels))
    found = Accuracy()(made(features, wrong), real)
    assert found["accuracy"] == pytest.approx(2 / 3, abs=0.01) and "accuracy_floor" not in found
    assert found["accuracy_se"] == pytest.approx((found["accuracy"] * (1 - found["accuracy"]) / 300) ** 0.5, rel=1e-2)
    for one, other in ((None, labels), (labels, None), (torch.full((400,), -1), labels)):
        assert not Accuracy()(made(features, one), Real(reference(features, other), None))


def test_samples_that_are_right_together_count_once():
    """Six copies of each sample have the error of the samples alone, and single blocks that of a binomial share."""
    right = (torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.7).double()
    blocks = torch.arange(50)
    one = standard_error(right.numpy(), blocks.numpy())
    copies = standard_error(right.repeat_interleave(6).numpy(), blocks.repeat_interleave(6).numpy())
    share = right.mean().item()
    assert one == pytest.approx(copies) == pytest.approx((share * (1 - share) / 49) ** 0.5)
    assert math.isnan(standard_error(right.numpy(), torch.zeros(50).numpy()))


def test_labels_are_in_the_file_and_not_in_its_hash(tmp_path: Path):
    features, labels = gaussians(50, 1.0)
    provenance = {"extractor": {"name": "identity", "sha256": "0", "dim": 3}, "label": "x"}
    with_labels = Reference(Moments.from_features(features), features.half(), provenance, labels)
    without = Reference(with_labels.moments, with_labels.features, provenance)
    assert with_labels.sha256 == without.sha256
    with_labels.save(tmp_path / "a.npz")
    found = read_reference(tmp_path / "a.npz")
    assert torch.equal(found.labels, labels) and found.sha256 == without.sha256
    without.save(tmp_path / "b.npz")
    assert read_reference(tmp_path / "b.npz").labels is None
    arrays = dict(np.load(tmp_path / "a.npz"))
    np.savez(tmp_path / "c.npz", **{**arrays, "labels": arrays["labels"][:-1]})
    with pytest.raises(UsageError, match="labels are not one class number of each feature"):
        read_reference(tmp_path / "c.npz")


def test_labels_are_part_of_a_points_key_where_a_metric_uses_them():
    """A point of wrong labels is measured again once they are mended; other points stay as they are."""
    features, labels = gaussians(200, 2.0)

    def key(labels: Tensor | None, floor: Tensor | None, *words: str) -> str:
        judge = Judge(SimpleNamespace(sha256="0"), Real(reference(features, labels), reference(features, floor)))
        return identity_hash(identify(load("digits_text/edm", ["n=4", *words]), [judge])(5).scores)

    assert len({key(labels, labels), key(1 - labels, labels), key(labels, 1 - labels), key(labels, None)}) == 4
    assert key(labels, labels, "metrics=[frechet]") == key(None, 1 - labels, "metrics=[frechet]")


def test_one_judge_with_labels_is_enough():
    """The others leave the metric out, and without any it is an error before work."""
    features, labels = gaussians(200, 2.0)
    known, unknown = (
        SimpleNamespace(name=name, real=Real(reference(features, own), None))
        for name, own in (("a", labels), ("b", None))
    )
    config, sampler = SimpleNamespace(experiment="x/y"), SimpleNamespace(inputs=None, classes=2)
    check_classes(config, sampler, [unknown, known], [Accuracy()])
    assert Accuracy()(made(features, labels), unknown.real) == {}
    with pytest.raises(UsageError, match="the reference of 'b' has none: compute it again"):
        check_classes(config, sampler, [unknown], [Accuracy()])


def test_the_shipped_reference_of_cifar10_has_labels():
    file = EXPERIMENTS / "cifar10_small" / "weights" / "reference.npz"
    found = read_reference(file)
    assert found.labels is not None and torch.bincount(found.labels).min() > 900
