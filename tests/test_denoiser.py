"""Denoisers: parametrisations against an oracle network, exact ones against autograd and naive sums."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from diffaccel.denoiser import (
    DENOISERS,
    ConditionedDenoiser,
    Denoiser,
    EpsDenoiser,
    FiniteSetDenoiser,
    GaussianDenoiser,
    KarrasDenoiser,
    MixtureDenoiser,
    NetworkDenoiser,
    VelocityDenoiser,
)
from diffaccel.errors import UsageError
from diffaccel.process import (
    Decoupled,
    EDMVarianceExploding,
    Prediction,
    Process,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    expand,
)

PROCESSES = [VariancePreserving(), SubVariancePreserving(), VarianceExploding(), EDMVarianceExploding(), Decoupled()]
SHAPE = (3, 2, 2)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Stub(nn.Module):
    """Returns ``answer`` whatever it is asked, and remembers what that was."""

    answer: Tensor

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        self.asked = x, noise, condition
        return self.answer


def build(name: str, process: Process, **context: object) -> tuple[NetworkDenoiser, Stub]:
    stub = Stub()
    return DENOISERS.build({"name": name, "ratio_max": 80.0}, network=stub, process=process, **context), stub


def draws(*ratios: float, process: Process) -> tuple[Tensor, Tensor, Tensor]:
    t = process.time(f64(*ratios))
    x_0, eps = torch.randn(2, len(ratios), *SHAPE).double()
    return x_0, eps, t


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("name", ["eps", "x0", "v", "karras"])
class TestParametrisation:
    def test_oracle_has_no_loss_and_predicts_exactly(self, name: str, process: Process) -> None:
        denoiser, stub = build(name, process)
        x_0, eps, t = draws(0.01, 0.5, 2.0, 60.0, process=process)
        stub.answer = denoiser.target(x_0, eps, t)
        assert denoiser.loss(x_0, t, eps).tolist() == [0, 0, 0, 0]
        prediction = denoiser(process.marginal(x_0, t, eps), t)
        torch.testing.assert_close(prediction, Prediction(x_0, eps), rtol=1e-9, atol=1e-9)

    def test_any_output_is_consistent_with_the_state(self, name: str, process: Process) -> None:
        denoiser, stub = build(name, process)
        x_t, stub.answer, t = draws(0.01, 0.5, 2.0, 60.0, process=process)
        x_0, eps = denoiser(x_t, t)
        torch.testing.assert_close(process.marginal(x_0, t, eps), x_t, rtol=1e-9, atol=1e-9)

    def test_loss_is_one_mean_per_sample(self, name: str, process: Process) -> None:
        denoiser, stub = build(name, process)
        x_0, eps, t = draws(0.01, 0.5, 2.0, process=process)
        stub.answer = torch.randn_like(x_0)
        together = denoiser.loss(x_0, t, eps)
        error = stub.answer - denoiser.target(x_0, eps, t)
        torch.testing.assert_close(together, (error**2).sum((1, 2, 3)) / error[0].numel())
        answer = stub.answer
        for i in range(3):
            stub.answer = answer[i : i + 1]
            alone = denoiser.loss(x_0[i : i + 1], t[i : i + 1], eps[i : i + 1])
            torch.testing.assert_close(alone, together[i : i + 1])

    def test_dtype_follows_the_state(self, name: str, process: Process) -> None:
        """Float64 times don't promote, and a network that answers in bfloat16 doesn't demote."""
        denoiser, stub = build(name, process)
        x_t, t = torch.randn(2, *SHAPE), process.time(f64(0.5, 1.0))
        stub.answer = torch.randn(2, *SHAPE).bfloat16()
        prediction = denoiser(x_t, t)
        assert prediction.x_0.dtype == prediction.eps.dtype == torch.float32
        assert stub.asked[0].dtype == stub.asked[1].dtype == torch.float32

    def test_condition_reaches_the_network(self, name: str, process: Process) -> None:
        denoiser, stub = build(name, process)
        x_t, stub.answer, t = draws(0.5, 1.0, process=process)
        labels = torch.tensor([4, 7])
        denoiser.given(labels)(x_t, t)
        assert stub.asked[2].labels is labels
        denoiser(x_t, t, labels)
        assert stub.asked[2].labels is labels
        denoiser(x_t, t)
        assert stub.asked[2] is None


@pytest.mark.parametrize("name", ["x0", "v"])
def test_infinite_ratio(name: str) -> None:
    """At t = 1 of the decoupled process alpha is 0; the state is the noise, and nothing is divided by alpha."""
    denoiser, stub = build(name, Decoupled())
    x_0, eps, t = draws(math.inf, math.inf, process=Decoupled())
    stub.answer = denoiser.target(x_0, eps, t)
    torch.testing.assert_close(denoiser(eps, t), Prediction(x_0, eps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("ratio", [0.002, 0.1, 0.5, 2.0, 80.0])
def test_karras_sees_and_aims_at_unit_variance(process: Process, ratio: float) -> None:
    """For data of standard deviation sigma_data, by the coefficients of x_0 and eps."""
    denoiser = KarrasDenoiser(Stub(), process, sigma_data=0.7)
    t = process.time(f64(ratio))
    one, zero = torch.ones(1, *SHAPE).double(), torch.zeros(1, *SHAPE).double()
    from_data, from_noise = denoiser.target(one, zero, t), denoiser.target(zero, one, t)
    torch.testing.assert_close(0.49 * from_data**2 + from_noise**2, one, rtol=1e-12, atol=0)
    scaled = denoiser.scale_input(0.7 * process.marginal(one, t, zero), t) ** 2
    scaled += denoiser.scale_input(process.marginal(zero, t, one), t) ** 2
    torch.testing.assert_close(scaled, one, rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_karras_is_edm(process: Process) -> None:
    """D(y; sigma) = c_skip y + c_out F(c_in y; c_noise) with the coefficients of EDM's Table 1, y = x_t / alpha_t."""
    denoiser, stub = build("karras", process)
    sigma, data = f64(0.003, 0.2, 1.0, 70.0), 0.5
    y, stub.answer = torch.randn(2, 4, *SHAPE).double()
    x_t, t = process.from_ratio(y, sigma)
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
    c_in, c_noise = 1 / (sigma**2 + data**2).sqrt(), sigma.log() / 4
    expected = expand(c_skip, y) * y + expand(c_out, y) * stub.answer
    torch.testing.assert_close(denoiser(x_t, t).x_0, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(stub.asked[0], expand(c_in, y) * y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(stub.asked[1], c_noise, rtol=1e-11, atol=1e-11)


def test_karras_noise_does_not_cancel() -> None:
    """In float32 at ratio 0.002, eps is as exact as at any level; (y - D) / rho would lose three digits."""
    process = EDMVarianceExploding()
    denoiser, stub = build("karras", process)
    x_0, eps, t = draws(0.002, process=process)
    stub.answer = denoiser.target(x_0, eps, t).float()
    error = denoiser(process.marginal(x_0, t, eps).float(), t).eps - eps
    assert error.abs().max() < 1e-6


def test_velocity_on_vp() -> None:
    process = VariancePreserving()
    x_0, eps, t = draws(0.5, process=process)
    expected = expand(process.alpha(t), eps) * eps - expand(process.sigma(t), x_0) * x_0
    torch.testing.assert_close(VelocityDenoiser(Stub(), process).target(x_0, eps, t), expected)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_range_ends_with_the_process(process: Process) -> None:
    low, high = VelocityDenoiser(Stub(), process).ratio_range
    assert low == 0.002
    assert high == process.ratio(f64(process.t_max)).item()
    assert VelocityDenoiser(Stub(), process, ratio_max=3.0).ratio_range[1] == 3.0


def test_noise_says_nothing_of_data_at_infinite_ratio() -> None:
    with pytest.raises(UsageError, match="ratio_max"):
        EpsDenoiser(Stub(), Decoupled())
    assert EpsDenoiser(Stub(), Decoupled(), ratio_max=80.0).ratio_range[1] == 80.0


def test_range_is_checked() -> None:
    denoiser = EpsDenoiser(Stub(), VariancePreserving(), ratio_min=0.01, ratio_max=2.0)
    denoiser.check_range(f64(0.01 * 0.9995, 2.0 * 1.0005))
    denoiser.check_range(f64())
    for ratio in (f64(0.5, 2.1), f64(0.5, 0.009), f64(math.nan), f64(math.inf)):
        with pytest.raises(UsageError, match=r"trained on \[0.01, 2\]"):
            denoiser.check_range(ratio)
    GaussianDenoiser(torch.zeros(SHAPE), 1.0).check_range(f64(0.0, math.inf))


def test_selection_narrows_the_condition() -> None:
    denoiser, stub = build("v", VariancePreserving())
    bound = denoiser.given(torch.tensor([4, 7, 9]))
    index = torch.tensor([2, 0])
    x_t, stub.answer, t = draws(0.5, 1.0, process=denoiser.process)
    bound.select(index)(x_t, t)
    assert stub.asked[2].labels.tolist() == [9, 4]
    assert denoiser.select(index) is denoiser
    assert isinstance(bound, ConditionedDenoiser)
    assert bound.network is stub
    assert bound.ratio_range == denoiser.ratio_range
    assert denoiser.given(None) is denoiser


MEANS = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
WEIGHTS = f64(0.1, 0.3, 0.2, 0.15, 0.25)


def mixture_law(var: float) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(WEIGHTS), Independent(Normal(MEANS, math.sqrt(var)), 3))


@pytest.mark.parametrize("ratio", [0.05, 0.6, 5.0])
def test_mixture_density(ratio: float) -> None:
    denoiser = MixtureDenoiser(MEANS, 0.09, WEIGHTS)
    y = torch.randn(7, *SHAPE).double()
    expected = mixture_law(0.09 + ratio**2).log_prob(y)
    actual = denoiser.log_prob(y, f64(ratio, 2 * ratio))
    assert actual.shape == (7, 2)
    torch.testing.assert_close(actual[:, 0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_mixture_prediction_is_the_score(process: Process) -> None:
    """By Tweedie's formula: eps = -rho score and x_0 = y + rho^2 score at y = x_t / alpha_t."""
    denoiser = MixtureDenoiser(MEANS, 0.09, WEIGHTS, process)
    ratio = f64(0.05, 0.6, 5.0, 70.0)
    y = torch.randn(4, *SHAPE).double().requires_grad_()
    log_prob = denoiser.log_prob(y, ratio).diagonal().sum()
    (score,) = torch.autograd.grad(log_prob, y)
    y, rho = y.detach(), expand(ratio, score)
    torch.testing.assert_close(
        denoiser(*process.from_ratio(y, ratio)),
        Prediction(y + rho**2 * score, -rho * score),
        rtol=1e-9,
        atol=1e-9,
    )


def test_mixture_at_the_ends() -> None:
    """Pure noise says nothing of the data; clean data are known."""
    denoiser = MixtureDenoiser(MEANS, 0.09, WEIGHTS, Decoupled())
    x = torch.randn(2, *SHAPE).double()
    x_0, eps = denoiser(x, f64(1.0, 1.0))
    torch.testing.assert_close(x_0[0], (WEIGHTS[:, None, None, None] * MEANS).sum(0))
    torch.testing.assert_close(eps, x)
    torch.testing.assert_close(denoiser(x, f64(0.0, 0.0)).x_0, x)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_gaussian_is_linear_regression(process: Process) -> None:
    denoiser = GaussianDenoiser(MEANS[0], 0.3, process)
    t, x = process.time(f64(0.4)), torch.randn(1, *SHAPE).double()
    alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
    gain = 0.3 * alpha / (0.3 * alpha**2 + sigma**2)
    x_0, eps = denoiser(x, t)
    torch.testing.assert_close(x_0, MEANS[:1] + gain * (x - alpha * MEANS[:1]))
    torch.testing.assert_close(alpha * x_0 + sigma * eps, x)


def test_finite_set_is_a_softmax_average() -> None:
    images = torch.rand(6, *SHAPE).double() * 2 - 1
    denoiser = FiniteSetDenoiser(images)
    sigma = f64(0.2, 0.5, 5.0)
    x = images[:3] + expand(sigma, images) * torch.randn(3, *SHAPE).double()
    for i in range(3):
        weights = torch.stack([(-((x[i] - image) ** 2).sum() / (2 * sigma[i] ** 2)).exp() for image in images])
        expected = sum(weight * image for weight, image in zip(weights / weights.sum(), images, strict=True))
        torch.testing.assert_close(denoiser(x, sigma).x_0[i], expected, rtol=1e-9, atol=1e-9)


def test_single_data_point_is_returned() -> None:
    point = torch.rand(1, *SHAPE).double()
    for process in PROCESSES:
        denoiser: Denoiser = FiniteSetDenoiser(point, process)
        eps, t = torch.randn(2, *SHAPE).double(), process.time(f64(0.3, 4.0))
        x_t = process.marginal(point.expand(2, -1, -1, -1), t, eps)
        torch.testing.assert_close(denoiser(x_t, t), Prediction(point.expand(2, -1, -1, -1), eps))


def test_what_the_network_is_told_of_the_time() -> None:
    """A share of the process's time, or as often as time_scale says; with EDM's preconditioning ln(rho) / 4."""
    x = torch.zeros(1, *SHAPE).double()
    for process, options, t, told in (
        (EDMVarianceExploding(80.0), {}, 20.0, 0.25),
        (VariancePreserving(), {}, 0.3, 0.3),
        (VariancePreserving(), {"time_scale": 999.0}, 0.3, 299.7),
    ):
        denoiser, stub = build("eps", process, **options)
        stub.answer = x
        denoiser(x, f64(t))
        assert stub.asked[1].item() == pytest.approx(told, rel=1e-12)
    denoiser, stub = build("karras", EDMVarianceExploding())
    stub.answer = x
    denoiser(x, f64(20.0))
    assert stub.asked[1].item() == pytest.approx(math.log(20) / 4, rel=1e-12)


def test_weights_of_a_mixture_need_not_sum_to_one() -> None:
    means = torch.tensor([-1.0, 2.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    denoiser = MixtureDenoiser(means, 0.09, f64(3.0, 1.0))
    y = torch.linspace(-6, 7, 2001, dtype=torch.float64)
    density = denoiser.log_prob(y[:, None, None, None], f64(0.4))[:, 0].exp()
    assert torch.trapezoid(density, y).item() == pytest.approx(1, abs=1e-6)
    assert torch.trapezoid(y * density, y).item() == pytest.approx(0.75 * -1 + 0.25 * 2, abs=1e-6)
