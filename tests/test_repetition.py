"""Repetition: effective numbers of chains in closed form, planted repeats, and what tables say of them."""

import math

import pytest
import torch
from test_curves import point
from torch import Tensor

from diffaccel.__main__ import main
from diffaccel.errors import UsageError
from diffaccel.evaluation.scores import FeatureSums
from diffaccel.metrics import Moments
from diffaccel.metrics.base import Real, build_metrics, measure
from diffaccel.metrics.neighbours import Neighbours
from diffaccel.metrics.reference import Reference
from diffaccel.metrics.repetition import effective_number, near_repeats, spacing
from diffaccel.report import read_points
from diffaccel.report.points import normalised
from diffaccel.report.repetition import columns, in_words, warnings_of


def chains(a: float, count: int, rounds: int, dim: int = 8, stuck: float = 0.0) -> Tensor:
    """Features of stationary x_k = a x_{k-1} + sqrt(1 - a^2) z, in the order of images; ``stuck`` stays in a chain."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rounds, count, dim, generator=generator, dtype=torch.float64)
    x = z.clone()
    for k in range(1, rounds):
        x[k] = a * x[k - 1] + math.sqrt(1 - a * a) * z[k]
    x = x + stuck * torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return x.reshape(rounds * count, dim)


def time_of(a: float, rounds: int) -> float:
    """n Var(mean) / Var(x) of an autoregression: the definition, summed exactly."""
    return 1 + 2 * sum((1 - lag / rounds) * a**lag for lag in range(1, rounds))


@pytest.mark.parametrize("a", [0.3, 0.8, 0.95])
@pytest.mark.parametrize(("count", "rounds"), [(1000, 5), (100, 50), (10, 500), (1, 5000)])
def test_effective_number_of_an_autoregression(a: float, count: int, rounds: int):
    """Also where chains are too short for their correlation to end, and for one chain."""
    found = effective_number(chains(a, count, rounds), count)
    assert found == pytest.approx(count * rounds / time_of(a, rounds), rel=0.15 if count < 100 else 0.05)


def test_independent_images_count_as_many():
    x = chains(0.0, 100, 50)
    assert effective_number(x, None) == effective_number(x, 5000) == effective_number(x, 10_000) == 5000
    assert effective_number(x, 100) == pytest.approx(5000, rel=0.06)
    assert effective_number(chains(-0.5, 100, 50), 100) == 5000, "negative correlation is not credited"


def test_repeated_images_count_once():
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).repeat(50, 1)
    assert effective_number(x, 100) == pytest.approx(100)
    assert effective_number(torch.ones(20, 3), 5) == 1
    apart = chains(0.0, 100, 50, stuck=2.0)  # each chain mixes about a place of its own: tau = 1 + 49 * 4 / 5
    assert effective_number(apart, 100) == pytest.approx(5000 / (1 + 49 * 0.8), rel=0.1)


def test_restarts_and_a_last_round_that_is_not_whole():
    """50 rounds that start anew every 10 are 500 chains of 10; the last round may have fewer images."""
    x = chains(0.9, 500, 10).reshape(10, 5, 100, 8).transpose(0, 1).reshape(5000, 8)
    assert effective_number(x, 100) == pytest.approx(5000 / time_of(0.9, 10), rel=0.1)
    whole = effective_number(chains(0.8, 100, 50), 100)
    assert effective_number(chains(0.8, 100, 50)[:-30], 100) == pytest.approx(whole, rel=0.02)


def test_the_first_images_bound_the_number_of_all():
    """Where the correlation ends within them, they tell it; else it is assumed to stay."""
    x = chains(0.5, 100, 50)
    assert effective_number(x, 100, 20_000) == pytest.approx(20_000 / 3, rel=0.05)
    assert effective_number(x[:100], 100, 5000) == pytest.approx(100), "one round: nothing is known"
    assert effective_number(chains(0.95, 100, 50)[:200], 100, 5000) <= 5000 / time_of(0.95, 50)


def test_features_that_have_no_effective_number():
    with pytest.raises(UsageError, match="give at least 1"):
        effective_number(torch.zeros(0, 3), 2)
    with pytest.raises(UsageError, match="NaN"):
        effective_number(torch.full((4, 3), math.nan), 2)


# Near repeats


def gaussian(n: int, seed: int) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def test_planted_repeats_are_found():
    """As many new images have the share of the quantile; 30 % exact or close copies have it besides."""
    threshold = spacing(Neighbours(gaussian(1000, 0)))
    assert threshold is not None
    assert (Neighbours(gaussian(1000, 0)).radii(1) <= threshold).sum() == 10, "the quantile of 1 %"
    assert near_repeats(Neighbours(gaussian(1000, 1)), threshold) == pytest.approx(0.01, abs=0.01)
    for noise in (0.0, 1e-3):
        made = gaussian(1000, 1)
        made[850:] = made[:150] + noise * gaussian(150, 2)
        assert near_repeats(Neighbours(made), threshold) == pytest.approx(0.3, abs=0.01)
    assert spacing(Neighbours(gaussian(98, 0))) is None, "fewer than 99 images have no 1 %"


def test_the_metric_of_a_point():
    """By chain, with the share of held-out images; none without images, and no share for few."""
    rows = gaussian(2000, 0)
    kept = [Reference(Moments(1000, half.mean(0), half.T.cov()), half.half(), {}) for half in rows.chunk(2)]
    real = Real(kept[0], kept[1])

    def values(features: Tensor, chains: int | None, real: Real = real) -> dict[str, float]:
        sums = FeatureSums(len(features), 6, real, chains, torch.device("cpu"))
        sums.add(torch.arange(len(features)), features)
        sums.reduce()
        return measure(build_metrics(["frechet", "repetition"]), sums.made("fd"), real).values

    made = gaussian(100, 3).repeat(10, 1)
    chained, alone = values(made, 100), values(made, None)
    assert chained["effective_n"] == pytest.approx(100) and alone["effective_n"] == 1000
    assert chained["near_repeats"] == alone["near_repeats"] == 1
    assert 0 < chained["near_repeats_real"] < 0.03
    assert "near_repeats_real" not in values(made, None, Real(kept[0], None))
    assert values(made[:50], 5).keys() & {"effective_n", "near_repeats"} == {"effective_n"}


# Tables


def test_a_row_of_chains_that_repeat_themselves_is_warned_of():
    good = {"fd_small": 1.0, "recall": 0.5, "effective_n": 2000.0, "near_repeats": 0.05}
    points = [
        normalised(point(chains=100, n=5000, nfe_budget=5, metrics={**good, **changed}))
        for changed in (
            {},
            {"effective_n": 600.0},
            {"near_repeats": 0.74},
            {"effective_n": 600, "near_repeats": 0.74},
        )
    ]
    lines = warnings_of(points)
    assert len(lines) == 3 and all("budget 5, 100 chains" in line and "images_per_chain" in line for line in lines)
    assert "5000 images are worth 600 independent ones" in lines[0] and "74 %" in lines[1]
    assert "600" in lines[2] and "74 %" in lines[2]
    assert warnings_of(points[1:2], ["dlg"])[0].startswith("warning: dlg at budget 5")
    independent = normalised(point(chains=None, n=5000, metrics={**good, "near_repeats": 0.74}))
    assert warnings_of([independent]) == [], "images of few evaluations lack detail"
    assert columns(points) == ["effective_n", "near_repeats"] and columns([independent]) == []
    assert in_words(points[:2]) == "recall 0.5, effective_n 1.3e+03, near_repeats 0.05"
    assert in_words([independent]) == in_words([]) == ""


def test_a_chain_is_shown_with_its_repetition(tmp_path, capsys, undrawn):
    """In a bench, a comparison and its table; a chain of very short steps is warned of."""
    words = ["toy/dlg", "prior.eta=0.001", "chains=10", "nfe=20", "n=200", "logger=none", f"out={tmp_path}"]
    assert main(["bench", *words]) == 0
    (found,) = read_points(tmp_path / "points.jsonl")
    assert found["metrics"]["effective_n"] < 50 and 0 <= found["metrics"]["near_repeats"] <= 1
    printed = capsys.readouterr().out
    assert "effective_n" in printed and "near_repeats" in printed and "10 chains: its 200 images are worth" in printed
    assert main(["compare", str(tmp_path), f"out={tmp_path / 'compared'}"]) == 0
    printed = capsys.readouterr().out
    assert (
        "effective_n" in printed
        and "near_repeats" in printed
        and "warning: dlg (dpmpp2m, chain) at budget 20" in printed
    )
    assert "effective_n" in (tmp_path / "compared" / "table.md").read_text()
