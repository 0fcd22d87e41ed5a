"""Accuracy of conditional samples: how often a classifier that did not train them finds the class that they are of.

The classifier is linear discriminant analysis on the features of a judge, fitted to the features of training images in
the reference, which have labels. It needs no weights of its own, and nothing of the sampled network.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.metrics.base import METRICS, Made, Metric, Real

SHRINKAGE = 1e-2
"""Weight of the identity, in units of the mean variance of the features, in the covariance within classes."""


@METRICS.register("accuracy")
class Accuracy(Metric):
    """Share of the first 10,000 images that a classifier assigns to the class that they were made for.

    The classifier is linear discriminant analysis on the judge's features of training images. Keys of the point:
    ``accuracy``, its binomial standard error ``accuracy_se``, and ``accuracy_floor``, the accuracy for held-out images.

    References:
        Regularized Discriminant Analysis (Friedman, 1989), https://doi.org/10.1080/01621459.1989.10478752
    """

    in_training = needs_labels = True

    @override
    def __call__(self, made: Made, real: Real) -> Mapping[str, float]:
        labels, trained = made.labels, real.reference.labels
        if labels is None or trained is None or not (known := labels >= 0).any():
            return {}
        classifier = Discriminant(real.features, trained)
        share = accuracy(classifier(made.features[known]), labels[known])
        found = {"accuracy": share, "accuracy_se": (share * (1 - share) / int(known.sum())) ** 0.5}
        if real.floor is not None and real.floor.labels is not None:
            found["accuracy_floor"] = accuracy(classifier(real.held_out), real.floor.labels)
        return found


def accuracy(found: Tensor, labels: Tensor) -> float:
    """Return the share of classes (m,) that equal the labels (m,)."""
    return (found == labels).double().mean().item()


class Discriminant:
    """Linear discriminant analysis with equally frequent classes.

        argmax_k <S^-1 m_k, x> - <S^-1 m_k, m_k> / 2,    S: covariance within the classes, shrunk towards the identity

    Args:
        features: Features of training images, (m, d).
        labels: Their classes, (m,) int64; classes without images are never found.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        x = features.double()
        self.classes, index = labels.unique(return_inverse=True)
        counts = torch.bincount(index).double()
        means = torch.zeros(len(counts), x.shape[1], dtype=torch.float64).index_add_(0, index, x) / counts[:, None]
        centred = x - means[index]
        within = centred.T @ centred / max(1, len(x) - len(counts))
        scale = within.diagonal().mean().clamp_min(1e-12)
        shrunk = within + SHRINKAGE * scale * torch.eye(len(within), dtype=torch.float64)
        self.weight = torch.linalg.solve(shrunk, means.T)
        self.bias = -(means * self.weight.T).sum(1) / 2

    def __call__(self, features: Tensor) -> Tensor:
        """Find the classes of features (m, d), (m,) int64."""
        return self.classes[(features.double() @ self.weight + self.bias).argmax(1)]
