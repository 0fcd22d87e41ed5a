"""Accuracy of conditional samples: how often a classifier that did not train them finds the class that they are of.

The classifier is linear discriminant analysis on the features of a judge, fitted to the features of training images in
the reference, which have labels. It needs no weights of its own, and nothing of the sampled network.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.jackknife import jackknife
from diffaccel.metrics.base import METRICS, Made, Metric, Real

SHRINKAGE = 1e-2
"""Weight of the identity, in units of the mean variance of the features, in the covariance within classes."""


@METRICS.register("accuracy")
class Accuracy(Metric):
    """Share of the first 10,000 images that a classifier assigns to the class that they were made for.

    The classifier is linear discriminant analysis on the judge's features of training images. Keys of the point:
    ``accuracy``, its standard error ``accuracy_se``, and ``accuracy_floor``, the accuracy for held-out images. The
    standard error is that of the jackknife over blocks of images, because samples of one condition are often right or
    wrong together.

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
        right = classifier(made.features[known]) == labels[known]
        share = right.double().mean().item()
        blocks = torch.arange(len(labels)) if made.block is None else made.block
        found = {"accuracy": share, "accuracy_se": standard_error(right.double().numpy(), blocks[known].numpy())}
        if real.floor is not None and real.floor.labels is not None:
            found["accuracy_floor"] = accuracy(classifier(real.held_out), real.floor.labels)
        return found


def standard_error(values: np.ndarray, blocks: np.ndarray) -> float:
    """Compute the jackknife standard error of a mean, whose blocks are independent; NaN for a single block.

    Args:
        values: Values, (m,) float64.
        blocks: Block of each value, (m,) integers.
    """
    _, index, sizes = np.unique(blocks, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return math.nan
    kept = (values.sum() - np.bincount(index, values)) / (len(values) - sizes)
    return float(jackknife(values.mean(), kept, sizes)[1])


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
