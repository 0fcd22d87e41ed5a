"""The moving average against its closed forms."""

import pytest
import torch
from torch import nn

from diffaccel.training.ema import EMA


@pytest.fixture
def network() -> nn.Linear:
    return nn.Linear(3, 2)


def set_all(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def average(ema: EMA) -> float:
    """The one number that all averaged weights have."""
    (value,) = {value for tensor in ema.average.values() for value in tensor.flatten().tolist()}
    return value


def test_is_a_geometric_average(network):
    """average_n = sum_k w_k keep^(n - k) (1 - keep) + w_0 keep^n, keep = 2^(-images / half_life)."""
    set_all(network, 0.0)
    ema, keep = EMA(network, half_life=100, rampup=1e9), 0.5 ** (32 / 100)
    for k in range(1, 21):
        set_all(network, float(k))
        ema.update(32, 32 * k)
    exact = sum(k * keep ** (20 - k) * (1 - keep) for k in range(1, 21))
    assert average(ema) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("batch", [25, 50, 100])
def test_half_life_is_in_images(network, batch):
    """A value that is no longer seen keeps half of its weight after a half-life, whatever the batch."""
    set_all(network, 1.0)
    ema = EMA(network, half_life=100, rampup=1e9)
    set_all(network, 0.0)
    for step in range(100 // batch):
        ema.update(batch, batch * (step + 1))
    assert average(ema) == pytest.approx(0.5)


def test_warms_up(network):
    """Early on the half-life is rampup times the images seen: the random start is forgotten at once."""
    set_all(network, 1.0)
    ema = EMA(network, half_life=10_000, rampup=0.5)
    set_all(network, 0.0)
    expected = 1.0
    for step in range(1, 11):
        ema.update(100, 100 * step)
        expected *= 0.5 ** (100 / (0.5 * 100 * step))
    assert average(ema) == pytest.approx(expected, rel=1e-4)
    assert expected < 0.02
    set_all(network, 1.0)
    ema.update(100, 10_000_000)  # beyond the ramp
    assert average(ema) == pytest.approx(expected + (1 - expected) * (1 - 0.5**0.01), rel=1e-4)


def test_swapped_gives_and_takes_back(network):
    set_all(network, 1.0)
    ema = EMA(network, half_life=100)
    set_all(network, 2.0)
    parameters = list(network.parameters())
    with ema.swapped():
        assert all((p == 1).all() for p in network.parameters())
        assert average(ema) == 2.0
    assert all((p == 2).all() for p in network.parameters())
    assert average(ema) == 1.0
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))  # optimisers keep their hold
    ema.update(100, 10_000)
    assert average(ema) == 1.5


def test_swapped_takes_back_after_an_error(network):
    set_all(network, 1.0)
    ema = EMA(network, half_life=100)
    set_all(network, 2.0)
    with pytest.raises(ValueError, match="inside"), ema.swapped():
        raise ValueError("inside")
    assert all((p == 2).all() for p in network.parameters())
    assert average(ema) == 1.0


def test_an_interrupt_within_a_swap_leaves_the_average_in_use(network, monkeypatch):
    ema = EMA(network, half_life=500)
    with pytest.raises(ValueError), ema.swapped():
        assert ema.in_use
        raise ValueError
    assert not ema.in_use

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(EMA, "_swap", interrupt)
    with pytest.raises(KeyboardInterrupt), ema.swapped():
        pass
    assert ema.in_use


def test_state_round_trip(network):
    ema = EMA(network, half_life=100)
    set_all(network, 2.0)
    ema.update(10, 1000)
    other = EMA(network, half_life=100)
    other.load_state_dict(ema.state_dict())
    for step in range(2, 5):
        for each in (ema, other):
            each.update(10, 1000 * step)
    assert all(torch.equal(ema.average[name], other.average[name]) for name in ema.average)


def test_loaded_state_is_a_copy(network):
    ema, state = EMA(network, half_life=100), {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    ema.load_state_dict(state)
    ema.update(100, 10_000)
    assert all((tensor == 0).all() for tensor in state.values())


def test_average_is_not_in_the_graph(network):
    ema = EMA(network, half_life=100)
    ema.update(10, 1000)
    assert not any(tensor.requires_grad for tensor in ema.average.values())
    with ema.swapped():
        pass
    assert not any(tensor.requires_grad for tensor in ema.average.values())
    assert all(p.requires_grad for p in network.parameters())
