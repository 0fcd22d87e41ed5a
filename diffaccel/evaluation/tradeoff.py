"""Trade-off of the start time T: likelihood bound and Frechet distance against T, for each density, from one network.

A small T reduces the score's part of the bound and increases the mismatch of the start. The bound is insensitive to
mismatches that ruin images, so that T should not be chosen without the distance of samples.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from diffaccel.collective import World
from diffaccel.config import Tradeoff
from diffaccel.data import DataModule
from diffaccel.denoiser import Denoiser
from diffaccel.density import Density, GaussianDensity, NormalDensity
from diffaccel.errors import UsageError
from diffaccel.evaluation import BitsPerDim, Evaluator, least_ratio
from diffaccel.evaluation.bits import cell_range, standard_error
from diffaccel.evaluation.likelihood import Bound, LogDensity, bits_per_dim, bound, decoding, dequantised
from diffaccel.noise import NoiseStreams
from diffaccel.prior import DensityPrior
from diffaccel.report import write_csv
from diffaccel.sampling import Sampler
from diffaccel.storage import whole
from diffaccel.text.terminal import side_output

matplotlib.use("Agg")

NORMAL = "N(0, I)"
"""Name of the baseline start."""

Row = dict[str, Any]


class TradeoffCurve:
    """Measurement of L(T) and of sample quality for N(0, I), the Gaussian of the data's moments, and the density.

    Args:
        settings: Number of images and of draws.
        starts: Name of the density -> prior at each time, see :func:`starts_of`.
        data: Data module of the test images.
        evaluator: Evaluator of samples; None for no distances.
        likelihood: Measurement of bits per dimension by the probability flow; None for no such measurement.
        seed: Seed of the noise, which all times and densities share.
        batch_size: Number of images per batch.
        out: Folder of ``tradeoff.csv`` and ``tradeoff.png``.
    """

    def __init__(
        self,
        settings: Tradeoff,
        starts: dict[str, dict[float, DensityPrior]],
        data: DataModule,
        evaluator: Evaluator | None,
        likelihood: BitsPerDim | None,
        seed: int,
        batch_size: int,
        out: Path,
    ) -> None:
        self.settings, self.starts, self.data = settings, starts, data
        self.evaluator, self.likelihood = evaluator, likelihood
        self.seed, self.batch_size, self.out = seed, batch_size, out
        self.rows: list[Row] = []

    def run(self, sampler: Sampler, world: World = World()) -> list[Row]:  # noqa: B008 (frozen)
        """Measure and write everything, and return a row per density and time.

        Raises:
            UsageError: A budget is below the minimum; raised before anything is measured.
        """
        if self.evaluator is not None:
            for prior in (prior for priors in self.starts.values() for prior in priors.values()):
                for budget in self.evaluator.budgets:
                    sampler.using(prior).plan(budget, self.evaluator.n)
        self.rows = self.bounds(sampler.denoiser, self.starts)
        try:
            if self.likelihood is not None:
                self.likelihoods(sampler, world, [self.starts[row["density"]][row["T"]] for row in self.rows])
            if self.evaluator is not None:
                self.evaluator.to(sampler.device)
                for row in self.rows:
                    row |= self.distances(sampler, world, self.starts[row["density"]][row["T"]])
        finally:  # an interrupt loses no row
            if world.first:
                write(self.rows, self.out)
        if self.likelihood is not None and world.first:
            self.likelihood.clear()
        return self.rows

    @torch.no_grad()
    def bounds(self, denoiser: Denoiser, starts: dict[str, dict[float, DensityPrior]]) -> list[Row]:
        """Compute the bound in bits per dimension with its standard error; one row per density and time."""
        times = sorted({T for priors in starts.values() for T in priors})
        process = denoiser.process
        ratios = process.ratio(torch.tensor(times, dtype=torch.float64)).tolist()
        denoiser.check_range(torch.tensor(ratios))
        densities = {
            name: [_log_density(denoiser, priors[T]) if T in priors else _nowhere for T in times]
            for name, priors in starts.items()
        }
        parts: list[tuple[Bound, Tensor]] = []
        for index, images, _ in self.data.batches("test", self.batch_size, n=self.settings.images):
            first = index * self.batch_size
            noise = NoiseStreams(self.seed, range(first, first + len(images)), "likelihood")
            width = cell_range(images)
            x_0 = (images if width is None else dequantised(images, noise)).to(denoiser.device)
            low = least_ratio(denoiser)
            terms = bound(denoiser, densities, x_0, low, ratios, noise, self.settings.draws)
            parts.append((terms, decoding(denoiser, x_0, low, noise)))
        bounds, deltas = [terms for terms, _ in parts], torch.cat([delta for _, delta in parts])
        return [
            {"density": name, "T": T, "ratio": ratios[i], **self._terms(name, i, bounds, deltas, width)}
            for name, priors in starts.items()
            for i, T in enumerate(times)
            if T in priors
        ]

    def _terms(self, name: str, i: int, bounds: list[Bound], deltas: Tensor, width: float | None) -> Row:
        """Means over the images of the bound and its terms at the i-th time."""
        size = math.prod(self.data.shape)
        total = torch.cat([terms.total(name)[:, i] for terms in bounds])
        bits, unit = bits_per_dim(total, size, width), size * math.log(2)
        return {
            "bits_per_dim_bound": bits.mean().item(),
            "bits_per_dim_bound_se": bits.std().item() / math.sqrt(len(bits)),
            "bits_per_dim_bound_of_x_0": bits_per_dim(total + deltas, size, width).mean().item(),
            "log_nu": torch.cat([terms.start[name][:, i] for terms in bounds]).mean().item() / unit,
            "I": torch.cat([terms.score_matching[:, i] for terms in bounds]).mean().item() / unit,
            "R": bounds[0].entropy[i].item() / unit,
            "n": len(bits),
        }

    def likelihoods(self, sampler: Sampler, world: World, starts: list[DensityPrior]) -> None:
        """Add bits per dimension by the probability flow to each row, and their gain over N(0, I) at the same T."""
        assert self.likelihood is not None
        bits, nfe = self.likelihood.each(sampler, starts, world)
        normal = {row["T"]: own for row, own in zip(self.rows, bits, strict=True) if row["density"] == NORMAL}
        for row, own, calls in zip(self.rows, bits, nfe.tolist(), strict=True):
            gain = normal[row["T"]] - own
            row |= {"bits_per_dim": own.mean().item(), "bits_per_dim_se": standard_error(own)}
            row |= {"bits_per_dim_gain": gain.mean().item(), "bits_per_dim_gain_se": standard_error(gain)}
            row |= {"bits_per_dim_nfe": calls, "bits_per_dim_n": len(own)}

    def distances(self, sampler: Sampler, world: World, prior: DensityPrior) -> Row:
        """Measure the distances of samples from one start at each budget."""
        assert self.evaluator is not None
        own, found = sampler.using(prior), Row()
        for budget in self.evaluator.budgets:
            plan = own.plan(budget, self.evaluator.n)
            metrics = self.evaluator.measure(own, budget, plan, world=world)["metrics"]
            name = self.evaluator.extractor.metric_name
            found |= {f"{name}_nfe{budget:g}": metrics[name], f"{name}_nfe{budget:g}_se": metrics[f"{name}_se"]}
        return found


def starts_of(
    sampler: Sampler, times: Sequence[float], fitted: Sequence[DensityPrior] = ()
) -> dict[str, dict[float, DensityPrior]]:
    """Return the starts to compare: name of the density -> prior at each time.

    Args:
        sampler: Sampler whose prior is a :class:`DensityPrior`; its density is one of the starts.
        times: Times of the densities that are defined at every level.
        fitted: The experiment's density fitted at further times.

    Raises:
        UsageError: The experiment's density has no log-density, or is defined at every level and ``fitted`` is given.
    """
    assert isinstance(sampler.prior, DensityPrior)
    own, denoiser = sampler.prior.density, sampler.denoiser
    if not own.normalised:
        raise UsageError("the trade-off requires a log-density, which a vae lacks: set prior.density.name=gaussian")
    known: dict[str, Density] = {NORMAL: NormalDensity(own.shape, own.ratio)}
    if isinstance(own, GaussianDensity):  # or one with the same moments
        known["Gaussian"] = GaussianDensity(own.shape, own.ratio)
        known["Gaussian"].basis = own.basis
        known["Gaussian"].fitted.fill_(True)
    name = type(own).__name__.removesuffix("Density").lower()
    shown = isinstance(own, GaussianDensity) or (isinstance(own, NormalDensity) and own.std == 1)
    if not own.bound and not shown:
        known[name] = own
    if fitted and not own.bound:
        raise UsageError("this density is defined at every level, without further fits: remove tradeoff.densities")
    process, fits = denoiser.process, {}
    if own.bound:
        for density in (own, *(prior.density for prior in fitted)):
            T = process.time(torch.tensor(density.ratio, dtype=torch.float64)).item()
            fits[float(f"{T:.9g}")] = prior_at(denoiser, density, density.ratio)  # without the rounding error of T
    # At the time of a fit, all starts have exactly its level, so that the flow stops there once.
    ratios = dict(zip(times, process.ratio(torch.tensor(times, dtype=torch.float64)).tolist(), strict=True))
    ratios |= {T: prior.ratio_star for T, prior in fits.items()}
    found = {
        start: {T: prior_at(denoiser, density, ratio) for T, ratio in ratios.items()}
        for start, density in known.items()
    }
    return found | ({name: fits} if fits else {})


def prior_at(denoiser: Denoiser, density: Density, ratio: float) -> DensityPrior:
    """Build a prior from a density at a noise-to-data ratio."""
    prior = DensityPrior(denoiser, density.shape, {"name": "normal"}, ratio)
    prior.density = density.at(ratio)
    prior.evaluations = density.evaluations
    return prior


def _log_density(denoiser: Denoiser, prior: DensityPrior) -> LogDensity:
    return partial(prior.to(denoiser.device).log_prob, denoiser)


def _nowhere(x: Tensor) -> Tensor:
    return torch.full((len(x),), math.nan, dtype=torch.float64, device=x.device)


def best(rows: Sequence[Row]) -> dict[str, float]:
    """Return the time of the lowest bound for each density."""
    names = dict.fromkeys(row["density"] for row in rows)
    return {
        name: min((row for row in rows if row["density"] == name), key=lambda row: row["bits_per_dim_bound"])["T"]
        for name in names
    }


def write(rows: Sequence[Row], out: Path) -> None:
    """Write ``tradeoff.csv`` and ``tradeoff.png``."""
    heads, picture = list(rows[0]), out / "tradeoff.png"  # the first row is the first to be complete
    with whole(out / "tradeoff.csv") as part:
        write_csv([heads, *([row.get(head) for head in heads] for row in rows)], part)
    with side_output(str(picture)), whole(picture) as part:
        plot(rows, part)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the bound, and the distances if there are any, against T."""
    from matplotlib import pyplot as plt

    shown = [key for key in rows[0] if f"{key}_se" in rows[0] and not key.endswith("_gain")]
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], shown, strict=True):
        for name in dict.fromkeys(row["density"] for row in rows):
            own = sorted((row for row in rows if row["density"] == name and key in row), key=lambda row: row["T"])
            # All rows of a bound share their images, whose spread is not the error of their differences.
            errors = None if key.startswith("bits") else [row[f"{key}_se"] for row in own]
            axis.errorbar([row["T"] for row in own], [row[key] for row in own], errors, marker="o", ms=4, label=name)
        axis.set_ylabel(key, parse_math=False)
        axis.set(xlabel="T", yscale="linear" if key.startswith("bits") else "log")
        axis.grid(alpha=0.3)
    axes[0][0].legend(title="start")
    figure.savefig(path, dpi=120)
    plt.close(figure)
