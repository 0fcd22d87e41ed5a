"""Repetition: how many independent images a set of dependent images is worth, and how many images repeat another.

A Frechet distance compares mean and covariance, and hardly reacts if a few hundred images are repeated with variations.
"""

from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.metrics.moments import check_features
from diffaccel.metrics.neighbours import Neighbours

QUANTILE = 0.01
"""Fraction of the real images that counts as close to another real image."""


def effective_number(features: Tensor, chains: int | None, n: int | None = None) -> float:
    """Compute the number of independent images whose mean features have the same variance as those of n images.

        n_eff = n / tau,    tau = 1 + 2 sum_k (1 - k / R) rho_k,    rho_k = tr Cov(f_r, f_{r+k}) / tr Cov(f)

    where f_r are the features of the r-th image of a chain, and R = n / C is the number of images of each of the C
    chains, which are independent of one another. tr Cov(mean of all n) = tau tr Cov(f) / n is an identity. Covariances
    are about the mean of all chains, so that chains that stay apart count as correlated. The sum ends before the first
    pair rho_2j + rho_2j+1 that is not positive (initial positive sequence of Geyer); those of a reversible chain are
    positive. Negative correlation is not credited: n_eff is at most n.

    If only the first m < n images are given and the sum does not end within them, later correlations are assumed to
    equal the last known one (1 without any), so that the result is a lower bound.

    Args:
        features: Features of the first images in order, (m, d); image i is of chain i mod C.
        chains: Number of chains C; None for independent images.
        n: Number of images; by default m.

    Raises:
        UsageError: There are no images, or a value is NaN or infinite.

    References:
        Survey Sampling (Kish, 1965), section 8.2: design effect of clusters
        Practical Markov Chain Monte Carlo (Geyer, 1992), section 3.3, https://doi.org/10.1214/ss/1177011137
        Bayesian Data Analysis (Gelman et al., 2013), section 11.5: several chains
    """
    check_features(features, features.shape[-1], "the features")
    if not (m := len(features)):
        raise UsageError("there are no features: give at least 1")
    n = m if n is None else n
    if chains is None or chains >= n:
        return float(n)
    x = features.double() - features.double().mean(0)
    variance = x.square().sum() / m
    if not variance > 0:
        return 1.0
    rounds, known = -(-n // chains), -(-m // chains) - 1
    last = 1.0 if known < 1 else max(0.0, _correlation(x, known * chains, variance))

    def weighted(k: int) -> float:
        """Correlation at lag k, with the fraction of the images that have a successor at this lag."""
        if k >= rounds:
            return 0.0
        rho = _correlation(x, k * chains, variance) if k <= known else last
        return rho * (n - k * chains) / n

    time = -1.0
    for k in range(0, rounds, 2):
        pair = weighted(k) + weighted(k + 1)
        if pair <= 0:
            break
        time += 2 * pair
    return max(1.0, n / max(1.0, time))


def _correlation(x: Tensor, lag: int, variance: Tensor) -> float:
    """Correlation of centred rows that are ``lag`` rows apart, with the total variance of all dimensions."""
    count = len(x) - lag
    return float((x[:count] * x[lag:]).sum() / count / variance)


def spacing(real: Neighbours, quantile: float = QUANTILE) -> Tensor | None:
    """Compute the distance within which few real images have another one, () float64; None for too few images.

    It is the j-th smallest distance of the m real images to their nearest neighbours, j = floor(quantile (m + 1)).
    """
    distance = real.radii(1)
    j = int(quantile * (len(distance) + 1))
    return distance.kthvalue(j).values if j else None


def near_repeats(generated: Neighbours, threshold: Tensor) -> float:
    """Compute the fraction of generated images whose nearest other generated image is within ``threshold``.

    As many new real images have a fraction of about ``quantile`` of :func:`spacing`; exact repeats count always. The
    numbers of generated and real images must be equal, because distances between neighbours decrease with the number.
    Images that lack detail are close to one another too, so that the fraction should be compared with that of
    independent images of the same network and budget.
    """
    return (generated.radii(1) <= threshold).double().mean().item()
