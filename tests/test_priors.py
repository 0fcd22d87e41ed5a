"""The benchmark of the prior alone."""

import pytest
import torch

from benchmarks.priors import main, matched_gaussian
from diffaccel.config import EXPERIMENTS


def test_a_matched_gaussian_has_the_states_moments():
    states = torch.randn(3000, 2, 1, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.3]]) + 0.5
    drawn = matched_gaussian(states, 20_000)
    assert drawn.shape == (20_000, 2, 1, 2)
    torch.testing.assert_close(drawn.mean(0), states.mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.flatten(1).T.cov(), states.flatten(1).T.cov(), rtol=0, atol=0.04)


def test_held_out_states_are_the_nearest(capsys: pytest.CaptureFixture[str]):
    words = ["n=300", "limit=600", "method.frozen=true", "prior.generator=separate", "prior.K=50", "checkpoint="]
    assert main(["digits/tdpm", *words]) == 0
    rows = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[-4:]]
    distance = {name.strip(): float(value) for name, value, _ in rows}
    assert list(distance) == ["generator", "matched Gaussian", "standard normal", "held-out images"]
    assert distance["held-out images"] < distance["matched Gaussian"] < distance["standard normal"]


def test_what_has_no_generator(capsys: pytest.CaptureFixture[str]):
    assert main([str(EXPERIMENTS / "digits" / "edm.yaml")]) == 2
    assert "use a tdpm experiment" in capsys.readouterr().err
    assert main([]) == 2
