"""Standard metrics, which every bench computes by default."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override

from diffaccel.metrics.base import COMPARED, METRICS, Made, Metric, Real
from diffaccel.metrics.frechet import Frechet, frechet_distance, frechet_of_few
from diffaccel.metrics.kernel import KernelDistance, kernel_distance
from diffaccel.metrics.manifold import manifold_scores
from diffaccel.metrics.memorisation import memorised
from diffaccel.metrics.repetition import effective_number, near_repeats


@METRICS.register("frechet")
class FrechetMetric(Metric):
    """Frechet distance, its limit for n to infinity, its standard error, and the distance of held-out images.

    Keys of the point: ``fd_<extractor>`` (``fid`` for Inception features), and the same with ``_inf``, ``_se`` and
    ``_floor``. The key ``jackknife`` of the point contains the distances without each block of images, from which
    ``compare`` computes the standard errors of differences under common noise.

    References:
        GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), https://arxiv.org/abs/1706.08500
        Effectively Unbiased FID and Inception Score (Chong & Forsyth, 2020), https://arxiv.org/abs/1911.07023
    """

    in_training = gives_distance = True

    @override
    def __call__(self, made: Made, real: Real) -> Mapping[str, float]:
        name, reference = made.distance, real.reference.moments
        few, nan = _few(made, real), torch.tensor(math.nan)
        found = Frechet(frechet_of_few(made.features, reference), nan, nan) if few else made.resampled.extrapolated()
        values = {name: float(found.fd), f"{name}_inf": float(found.fd_inf), f"{name}_se": float(found.se)}
        if real.floor is not None:
            held_out = real.floor.features_of(made.n) if few else None
            if held_out is not None:
                values[f"{name}_floor"] = float(frechet_of_few(held_out, reference))
            else:
                values[f"{name}_floor"] = float(frechet_distance(real.floor.moments_of(made.n), reference))
        return values

    @override
    def details(self, made: Made, real: Real) -> Mapping[str, Any]:
        record = None if _few(made, real) else made.resampled.record()
        return {} if record is None else {"jackknife": record}


def _few(made: Made, real: Real) -> bool:
    """Whether there are no more images than features, where no standard error is defined."""
    return 2 <= made.n <= min(real.reference.moments.dim, len(made.features))


@METRICS.register("kid")
class KernelMetric(Metric):
    """Kernel distance (KID) of the first 10,000 images, its standard error, and the distance of held-out images.

    Keys of the point: ``kid``, ``kid_se`` and ``kid_floor``. The standard error is the jackknife's over blocks of
    images, in which chains are whole, for the fixed training images of the reference. ``kid`` is unbiased at any number
    of images, so that there is nothing to extrapolate.

    References:
        Demystifying MMD GANs (Binkowski et al., 2018), https://arxiv.org/abs/1801.01401
    """

    in_training = True

    @override
    def __call__(self, made: Made, real: Real) -> Mapping[str, float]:
        if real.kernel is None:
            return {}
        if len(made.features) < 4:  # too few for blocks
            alone = KernelDistance(made.features.shape[1], real.kernel, sync_on_compute=False)
            alone.update(made.features, 0)
            return {"kid": float(alone.compute())}
        found, floor = kernel_distance(made.features, real.kernel, block=made.block), real.kernel_floor(made.n)
        values = {"kid": float(found.kid), "kid_se": float(found.se)}
        return values if floor is None else {**values, "kid_floor": float(floor.kid)}


@METRICS.register("manifold")
class ManifoldMetric(Metric):
    """Precision, recall, density and coverage of the first images and, with ``_real``, of held-out images.

    They are of at most 5,000 images each, and of no more than the reference and the floor keep features of, because
    they depend on the number. The key ``neighbourhoods`` of the point contains it.

    References:
        Improved Precision and Recall Metric for Assessing Generative Models (Kynkaanniemi et al., 2019),
            https://arxiv.org/abs/1904.06991
        Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020),
            https://arxiv.org/abs/2002.09797
    """

    @override
    def __call__(self, made: Made, real: Real) -> Mapping[str, float]:
        if (m := real.compared(made)) < 10:
            return {}
        neighbours, held_out = real.manifold(m)
        found = manifold_scores(made.neighbours(m), neighbours)._asdict()
        return found | ({f"{key}_real": value for key, value in held_out._asdict().items()} if held_out else {})

    @override
    def details(self, made: Made, real: Real) -> Mapping[str, Any]:
        return {"neighbourhoods": m} if (m := real.compared(made)) >= 10 else {}


@METRICS.register("repetition")
class RepetitionMetric(Metric):
    """Effective number of independent images, and fraction of images that repeat another one closely.

    Keys of the point: ``effective_n`` of all n images, from the first 10,000, which is n for independent images; and
    ``near_repeats`` of the first 5,000 images with, under ``near_repeats_real``, that of held-out images: the fraction
    whose nearest other image is as close as for 1 % of as many training images.

    References:
        See :func:`~diffaccel.metrics.repetition.effective_number`.
    """

    @override
    def __call__(self, made: Made, real: Real) -> Mapping[str, float]:
        if not len(made.features):  # only moments are known
            return {}
        values = {"effective_n": effective_number(made.features, made.chains, made.n)}
        if (m := real.compared(made)) < 10:
            return values
        threshold, held_out = real.spacing(m)
        if threshold is not None:
            values["near_repeats"] = near_repeats(made.neighbours(m), threshold)
        return values if held_out is None else {**values, "near_repeats_real": held_out}


@METRICS.register("memorisation")
class MemorisationMetric(Metric):
    """Fraction of generated images that are copies of training images, and the closest pairs.

    Key of the point: ``memorisation``; null with fewer than 100 held-out images, which define the threshold.

    References:
        A Non-Parametric Test to Detect Data-Copying in Generative Models (Meehan et al., 2020),
            https://arxiv.org/abs/2004.05675
    """

    @override
    def __call__(self, made: Made, real: Real) -> Mapping[str, float]:
        return {}

    @override
    def details(self, made: Made, real: Real) -> Mapping[str, Any]:
        if len(real.held_out) < 100:
            return {"memorisation": None}
        found = memorised(made.features[:COMPARED], real.features, real.held_out, threshold=real.copy_threshold)
        pairs = zip(found.generated.tolist(), found.training.tolist(), found.distance.tolist(), strict=True)
        closest = [list(pair) for pair in pairs]
        return {"memorisation": {"share": found.share, "threshold": found.threshold, "closest": closest}}
