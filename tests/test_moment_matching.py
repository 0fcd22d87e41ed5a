"""The Frechet distance that a generator is trained by, against its closed form."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffaccel.data import Batch
from diffaccel.denoiser import GaussianDenoiser, KarrasDenoiser
from diffaccel.errors import UsageError
from diffaccel.metrics import Moments
from diffaccel.metrics.frechet import frechet_distance
from diffaccel.nn import UNet
from diffaccel.noise import NoiseStreams
from diffaccel.prior import ImplicitPrior
from diffaccel.process import EDMVarianceExploding
from diffaccel.training.moment_matching import MomentMatching, RandomFilters, moments, transport_between

D = 6


def objective(memory: int = 10**9) -> MomentMatching:
    model = KarrasDenoiser(UNet((1, 8, 8), [D // 2], blocks=1, embedding=8), EDMVarianceExploding())
    matching = MomentMatching(memory)
    matching.attach(model, ImplicitPrior(model, 1.0), (1, 8, 8))
    assert matching.dim == D
    return matching


def samples(count: int, seed: int) -> Tensor:
    """Correlated, of several scales, off centre."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return torch.randn(count, D, generator=generator, dtype=torch.float64) @ mixing + torch.arange(D) * seed / 3


def in_reals_units(features: Tensor, real: Tensor) -> Moments:
    return Moments.from_features(features / real.std(0, correction=0))


def test_the_map_brings_one_covariance_to_the_other():
    ours, theirs = (Moments.from_features(samples(50, seed)) for seed in (1, 2))
    found = transport_between(ours, theirs)
    torch.testing.assert_close(found @ ours.covariance @ found, theirs.covariance)
    torch.testing.assert_close(found, found.T)  # symmetric and positive: the optimal one (Brenier)
    assert torch.linalg.eigvalsh(found).min() > 0
    diagonal = transport_between(
        *(Moments(0, torch.zeros(2), torch.tensor(v).diag()) for v in ([4.0, 9.0], [1.0, 36.0]))
    )
    torch.testing.assert_close(diagonal, torch.tensor([0.5, 2.0], dtype=torch.float64).diag())


def test_loss_and_gradient_are_the_frechet_distances():
    matching, made, real = objective(), samples(4000, 1).requires_grad_(True), samples(4000, 2)
    loss = matching.distance(made, real).mean()
    (gradient,) = torch.autograd.grad(loss, made)
    direction, step = torch.randn(made.shape, dtype=torch.float64), 1e-3
    reference = in_reals_units(real, real)
    there, here, back = (
        frechet_distance(in_reals_units(made.detach() + move * direction, real), reference).item()
        for move in (step, 0, -step)
    )
    assert loss.item() == pytest.approx(here, rel=2e-3)
    assert (gradient * direction).sum().item() == pytest.approx((there - back) / (2 * step), rel=2e-2)


def test_equal_moments_leave_nothing_to_do():
    matching, real = objective(), samples(4000, 3)
    made = real.flip(0).clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(matching.distance(made, real).sum(), made)
    assert gradient.abs().max() < 1e-9


def test_batches_make_one_moment_and_old_ones_fade():
    made, real = samples(96, 1), samples(96, 2)
    whole, parts, fading = objective(), objective(), objective(memory=32)
    whole.distance(made, real)
    steps = list(zip(made.split(16), real.split(16), strict=True))
    early = [matching.distance(*step) for matching in (parts, fading) for step in steps]
    assert early[0].abs().max() == 0, "16 images tell nothing of 6 features' covariance"
    assert early[1].abs().max() > 0
    torch.testing.assert_close(parts.made, whole.made)
    torch.testing.assert_close(parts.real, whole.real)
    assert moments(whole.real).mean.tolist() == pytest.approx(real.mean(0).tolist())
    weights = 0.5 ** (torch.arange(5, -1, -1, dtype=torch.float64).repeat_interleave(16) / 2)
    torch.testing.assert_close(moments(fading.made).mean, (weights @ made) / weights.sum())
    assert set(whole.state_dict()) == {"made", "real"}, "for an exact resume"


def test_features_may_be_of_images():
    """States of Gaussian data, denoised and noised, and real images noised: variances and slope are known."""
    model, variance, ratio = objective(), 0.25, 0.1
    prior = ImplicitPrior(model.encoder.denoiser, 1.0)
    denoiser = GaussianDenoiser(torch.zeros(1, 8, 8), variance)
    y = torch.randn(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * (1 + variance) ** 0.5
    y.requires_grad_()
    noise = NoiseStreams(0, range(2000))
    torch.testing.assert_close(model.seen(y, prior, denoiser, noise), y / 2**0.5)
    x = MomentMatching(ratio=ratio).seen(y, prior, denoiser, noise)
    assert x.var().item() == pytest.approx((variance**2 / (1 + variance) + ratio**2) / (1 + ratio**2), rel=0.02)
    images = variance**0.5 * torch.randn(2000, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    diffused = MomentMatching(ratio=ratio).diffused(images, prior, noise)
    assert diffused.var().item() == pytest.approx((variance + ratio**2) / (1 + ratio**2), rel=0.02)
    assert model.diffused(images, prior, noise).var().item() == pytest.approx((variance + 1) / 2, rel=0.02)
    (slope,) = torch.autograd.grad(x.sum(), y)
    torch.testing.assert_close(slope, torch.full_like(y, variance / (1 + variance) / (1 + ratio**2) ** 0.5))
    with pytest.raises(UsageError, match="not trained at ratio 500: choose one in"):
        MomentMatching(ratio=500.0).attach(model.encoder.denoiser, prior, (1, 8, 8))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_images_may_take_steps_and_their_gradient_goes_through_all(steps: int):
    """The flow of Gaussian data is linear: DDIM multiplies x / alpha by one known factor a step."""
    model, variance, ratio = objective(), 0.25, 0.1
    prior = ImplicitPrior(model.encoder.denoiser, 1.0)
    denoiser = GaussianDenoiser(torch.zeros(1, 8, 8), variance)
    solver = {"name": "ddim", "grid": {"name": "karras", "rho": 1, "ratio_min": 0.2}}
    y = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    noise = NoiseStreams(0, range(8))
    x = MomentMatching(ratio=ratio, solver=solver, steps=steps).seen(y, prior, denoiser, noise)
    levels = [*torch.linspace(1, 0.2, steps, dtype=torch.float64).tolist(), 0.0]
    factor = 1.0
    for now, then in pairwise(levels):
        factor *= (variance + then * now) / (variance + now**2)
    images = torch.autograd.grad(x.sum(), y)[0] * (1 + ratio**2) ** 0.5
    torch.testing.assert_close(images, torch.full_like(y, factor))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"steps": 0, "ratio": 0.1}, "steps is 0, it must be 1 or more"),
        ({"steps": 2}, "steps is 2, .* 1 without a ratio: set ratio"),
        ({"rows": 0}, "rows is 0 and filters is 0: at least 1"),
        ({"filters": -1}, "rows is 1 and filters is -1: at least 1 and 0 are required"),
        ({"ratio": 0.1, "solver": {"name": "rk45"}}, "solver 'rk45' is adaptive: choose another one"),
    ],
)
def test_keys_that_make_no_features_are_refused(keys: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        MomentMatching(**keys)


def test_features_are_means_and_deviations_over_space():
    matching, maps = objective(), 5 * torch.randn(4, D // 2, 8, 8, generator=torch.Generator().manual_seed(0)) - 2
    matching.encoder = lambda x, condition: [maps]
    expected = torch.cat([maps.mean((2, 3)), maps.std((2, 3))], dim=1)
    torch.testing.assert_close(matching.summary(torch.zeros(4, 1, 8, 8), None), expected, rtol=1e-5, atol=1e-5)


def test_rows_tell_above_from_below():
    model = objective()
    prior = ImplicitPrior(model.encoder.denoiser, 1.0)
    one, two = MomentMatching(), MomentMatching(rows=2)
    for matching in (one, two):
        matching.attach(model.encoder.denoiser, prior, (1, 8, 8))
    assert two.dim == 3 * D // 2
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, banded = one.summary(x, None), two.summary(x, None)
    (maps,) = model.encoder(x)
    above, below = maps[:, :, :4].mean((2, 3)), maps[:, :, 4:].mean((2, 3))
    torch.testing.assert_close(banded[:, :D].unflatten(1, (-1, 2)), torch.stack([above, below], dim=2))
    torch.testing.assert_close((above + below) / 2, plain[:, : D // 2])
    torch.testing.assert_close(banded[:, D:], plain[:, D // 2 :])
    with pytest.raises(UsageError, match="rows is 9, it must be at most 8, the height of the smallest map"):
        MomentMatching(rows=9).attach(model.encoder.denoiser, prior, (1, 8, 8))


def test_filters_see_channels_together_and_are_the_same_in_every_run():
    """On maps of one pixel only the middle of a filter sees anything; on periodic ones all nine, two pixels apart."""
    first, again = (RandomFilters(D, 5, torch.Generator().manual_seed(0)) for _ in range(2))
    m = samples(7, 1).float()[:, :, None, None]
    unit = (m - m.mean(1, keepdim=True)) / m.std(1, keepdim=True, correction=0)
    middle = first.weight[:, :, 1, 1] @ unit[:, :, 0, 0].T
    torch.testing.assert_close(first(m), (middle.T + first.bias).relu(), rtol=1e-3, atol=1e-3)
    assert torch.equal(first(m), again(m))
    assert not first.state_dict(), "drawn anew"
    wide = m.expand(-1, -1, 200, 200)
    whole = torch.einsum("ochw,bc->bo", first.weight, unit[:, :, 0, 0])
    torch.testing.assert_close(first(wide), (whole + first.bias).relu(), rtol=0.03, atol=0.03)
    torch.testing.assert_close(first(10 * m + 3), first(m), rtol=1e-3, atol=1e-3)


def test_filters_are_features_like_others():
    model = objective()
    matching = MomentMatching(filters=5)
    matching.attach(model.encoder.denoiser, ImplicitPrior(model.encoder.denoiser, 1.0), (1, 8, 8))
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = matching.summary(x, None)
    assert matching.dim == found.shape[1] == D + 5
    torch.testing.assert_close(found[:, :D], model.summary(x, None))
    torch.testing.assert_close(found[:, D:], matching.bank[0](*model.encoder(x)))
    assert set(matching.state_dict()) == {"made", "real"}


def test_known_moments_cost_no_more_evaluations():
    matching, generator = objective(), torch.Generator().manual_seed(0)
    matching.real_states = 64
    denoiser = matching.encoder.denoiser
    (phase,) = matching.phases(ImplicitPrior(denoiser, 1.0), lambda _: denoiser, (1, 8, 8))
    counts, sums = [], []
    for step in range(4):
        batch = Batch(index=range(32), image=torch.randn(32, 1, 8, 8, generator=generator), condition=None)
        assert (phase.loss(batch, NoiseStreams(step, range(32))) > 0).all()
        counts.append((matching.real[0, 0].item(), matching.made[0, 0].item()))
        sums.append(matching.real.clone())
    assert [real for real, _ in counts] == [32, 64, 64, 64]
    assert [made for _, made in counts] == pytest.approx([32, 64, 96, 128])
    assert torch.equal(sums[1], sums[3])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"memory": 16}, "memory is 16, too few states for the moments of 6 features: at least 17 are required"),
        ({"memory": 0}, "memory is 0, "),
        (
            {"real_states": 23},
            "real_states is 23, too few states for the moments of 6 features: at least 24 are required",
        ),
    ],
)
def test_too_few_states_for_the_moments_are_refused(keys: dict[str, int], message: str):
    model = objective().encoder.denoiser
    with pytest.raises(UsageError, match=message):
        MomentMatching(**keys).attach(model, ImplicitPrior(model, 1.0), (1, 8, 8))


def test_a_teacher_without_an_encoder_is_refused():
    denoiser = GaussianDenoiser(torch.zeros(1, 8, 8), 0.25)
    prior = ImplicitPrior(denoiser, 1.0, network={"name": "mlp"}, shape=(1, 8, 8))
    with pytest.raises(UsageError, match=r"objective 'moments' requires a denoiser with the network 'unet'.*remove it"):
        MomentMatching().attach(denoiser, prior, (1, 8, 8))
    with pytest.raises(UsageError, match="ratio is -1, it must be positive"):
        MomentMatching(ratio=-1.0)
