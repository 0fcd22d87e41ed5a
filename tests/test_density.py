"""Densities: normalised, sampling what they say, right at their level, at first no worse than the Gaussian."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from oracles import three_modes

from diffaccel.data.source import random_order
from diffaccel.density import DENSITIES, GaussianDensity, MixtureDensity, NormalDensity, TrainingImages
from diffaccel.density.basis import CosineBasis, PrincipalBasis
from diffaccel.errors import UsageError
from diffaccel.methods.small_t import judge
from diffaccel.weights import load_weights, save_weights

PLANE, SHAPE, RATIO = (2, 1, 1), (3, 8, 4), 0.7
KINDS = {
    "normal": {},
    "gaussian": {},
    "cosines": {"name": "gaussian", "basis": "dct"},
    "mixture": {"components": 3, "rounds": 4},
    "dirichlet": {"name": "mixture", "components": 6, "dirichlet": True, "rounds": 4},
    "leading": {"name": "mixture", "components": 3, "rank": 1, "rounds": 4},
    "flow": {"transforms": 2, "width": 16},
    "maf": {"name": "flow", "kind": "maf", "passes": None, "width": 16},
}
IMAGES = {**KINDS, "glow": {"scales": 2, "steps": 2, "width": 8}}


def source(images: torch.Tensor, flip: bool = False, **where) -> TrainingImages:
    """Images in batches of 100, which processes share."""

    def read(rank, world):
        batches = list(enumerate(images.split(100)))
        return iter(batches[rank::world])

    return TrainingImages(read, flip=flip, **where)


def images(n: int = 600) -> torch.Tensor:
    """Smooth coloured noise with a mean, (n, 3, 8, 4)."""
    walk = torch.randn(n, *SHAPE).cumsum(2).cumsum(3)
    return 0.1 * (walk + walk.mean(1, keepdim=True)) + torch.linspace(0, 1, 8)[:, None]


def build(kind: str, shape=PLANE, data=None, stir: float = 0.3, ratio: float = RATIO):
    """A fitted density; flows are moved off their start, which would hide half of their arithmetic."""
    node = {"name": kind, **IMAGES[kind]}
    density = DENSITIES.build(node, shape=shape, ratio=ratio)
    density.fit(source(three_modes().sample(600).float() if data is None else data))
    for parameter in density.parameters():
        torch.nn.init.normal_(parameter, std=stir / max(1, parameter[0].numel() if parameter.ndim > 1 else 1) ** 0.5)
    for name, parameter in density.named_parameters():
        if name.endswith("mix"):
            parameter.data += torch.eye(len(parameter))
    return density.eval()


def draws(density, n: int) -> torch.Tensor:
    with torch.no_grad():
        return density(torch.randn(n, density.noise_size), torch.rand(n, dtype=torch.float64))


# The contract


@pytest.mark.parametrize("kind", KINDS)
def test_it_integrates_to_one(kind):
    density, side = build(kind), torch.linspace(-9, 9, 250, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)[:, :, None, None].float()
    with torch.no_grad():
        total = density.log_prob(points).exp().sum().item() * (18 / 249) ** 2
    assert total == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_it_samples_what_it_says(kind):
    """Draws and density agree on the first two moments and on the entropy, by quadrature."""
    density, side = build(kind), torch.linspace(-9, 9, 250, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    with torch.no_grad():
        log_prob = density.log_prob(points[:, :, None, None].float())
        weight = log_prob.exp() * (18 / 249) ** 2
        drawn = draws(density, 40_000)
        own = density.log_prob(drawn)
    drawn = drawn.flatten(1).double()
    se = drawn.std(0) / 200
    assert ((drawn.mean(0) - weight @ points).abs() < 4 * se).all()
    square = drawn.square().mean(0)
    assert ((square - weight @ points.square()).abs() < 4 * drawn.square().std(0) / 200).all()
    assert abs(own.mean() - weight @ log_prob) < 4 * own.std() / 200


@pytest.mark.parametrize("kind", ["normal", "gaussian", "cosines", "flow", "maf", "glow"])
def test_the_density_of_a_draw_is_the_noises_over_the_jacobian(kind):
    shape = (1, 4, 4) if kind == "glow" else PLANE
    data = images()[:, :1, :4].contiguous() if kind == "glow" else None
    density = build(kind, shape, data).double()
    z, u = torch.randn(1, density.size, dtype=torch.float64), torch.rand(1, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: density(z, u).flatten(), z)[:, 0]
    expected = -0.5 * z.square().sum() - 0.5 * density.size * math.log(2 * math.pi) - torch.linalg.slogdet(jacobian)[1]
    assert density.log_prob(density(z, u)).item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("kind", [*IMAGES, "vae"])
def test_a_file_brings_back_the_same_bits(kind, tmp_path: Path):
    options = {"vae": {"latent": 4, "width": 4}}.get(kind, IMAGES.get(kind))
    make = lambda: DENSITIES.build({"name": kind, **options}, shape=SHAPE, ratio=RATIO)  # noqa: E731
    density, other = make(), make()
    density.fit(source(images()))
    save_weights(tmp_path / "density.safetensors", density.state_dict(), {}, torch.float32)
    load_weights(tmp_path / "density.safetensors", other)
    z, u = torch.randn(5, density.noise_size), torch.rand(5, dtype=torch.float64)
    assert other.fitted and torch.equal(density(z, u), other(z, u))
    if density.normalised:
        y = images(5)
        assert torch.equal(density.log_prob(y), other.log_prob(y))


def test_a_draw_does_not_depend_on_its_batch():
    density = build("mixture", SHAPE, images())
    z, u = torch.randn(8, density.noise_size), torch.rand(8, dtype=torch.float64)
    assert torch.allclose(density(z, u)[2:4], density(z[2:4], u[2:4]), atol=1e-5)


# Gaussians


def test_one_decomposition_serves_every_level():
    data = images().double()
    density = GaussianDensity(SHAPE, RATIO).double()
    density.fit(source(data))
    y = images(7).double()
    for ratio in (0.05, RATIO, 6.0):
        covariance = torch.cov(data.flatten(1).T) + ratio**2 * torch.eye(density.size)
        law = torch.distributions.MultivariateNormal(data.mean(0).flatten(), covariance)
        assert torch.allclose(density.at(ratio).log_prob(y), law.log_prob(y.flatten(1)), rtol=1e-5)
    assert density.ratio == RATIO


def test_cosines_are_scipys():
    basis, x = CosineBasis(SHAPE).double(), images(4).double()
    expected = scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")
    assert np.allclose(basis.rotate(x.flatten(1)).reshape(x.shape), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [PrincipalBasis, CosineBasis])
def test_a_basis_is_orthogonal_and_ordered(kind):
    basis, data = kind(SHAPE), images()
    basis.fit(source(data))
    eye = torch.eye(basis.size)
    assert torch.allclose(basis.rotate(eye) @ basis.rotate(eye).T, eye, atol=1e-4)
    assert torch.allclose(basis.images(basis.coordinates(data)), data, atol=1e-4)
    c = basis.coordinates(data)
    assert torch.allclose(c.mean(0), torch.zeros(basis.size), atol=1e-4)
    assert torch.allclose(c.var(0), basis.variances, rtol=1e-3, atol=1e-5)
    assert (basis.variances.diff() <= 0).all()


def test_colours_are_decorrelated():
    """On images whose channels are mixtures of independent ones, the cosines' variances are the eigenvalues."""
    mixing = torch.tensor([[1.0, 0.8, 0.2], [0.5, -1.0, 0.4], [0.3, 0.2, -0.7]])
    mixing = torch.linalg.qr(mixing)[0] * torch.tensor([3.0, 1.0, 0.2])
    data = torch.einsum("kc,bchw->bkhw", mixing, torch.randn(4000, *SHAPE))
    basis = CosineBasis(SHAPE)
    basis.fit(source(data))
    expected = torch.tensor([9.0, 1.0, 0.04]).repeat_interleave(32)
    assert torch.allclose(basis.variances, expected, rtol=0.15)


@pytest.mark.parametrize("kind", [PrincipalBasis, CosineBasis])
def test_flips_are_data_too(kind):
    once, twice, data = kind(SHAPE), kind(SHAPE), images()
    once.fit(source(data, flip=True))
    twice.fit(source(torch.cat([data, data.flip(-1)])))
    assert torch.allclose(once.mean, twice.mean, atol=1e-6)
    assert torch.allclose(once.variances, twice.variances, rtol=1e-4, atol=1e-6)


def test_one_image_has_no_covariance():
    for kind in ("pca", "dct"):
        with pytest.raises(UsageError, match="at least 2"):
            GaussianDensity(SHAPE, 1.0, kind).fit(source(images(1)))


# Mixtures


def test_a_dirichlet_mixture_is_an_ordinary_one():
    """Scikit-learn's own score of a Bayesian mixture integrates to less than one; ours must not."""
    from scipy.stats import multivariate_normal

    density = build("dirichlet")
    y = torch.randn(20, *PLANE)
    c = density.basis.coordinates(y).double().numpy()
    expected = sum(
        weight * multivariate_normal(mean, (vectors * values) @ vectors.T).pdf(c)
        for weight, mean, values, vectors in zip(
            *(tensor.double().numpy() for tensor in (density.weights, density.means, density.values, density.vectors)),
            strict=True,
        )
    )
    assert np.allclose(density.log_prob(y).exp(), expected, rtol=1e-4)
    assert 2.5 < density.effective_components < 6


def test_no_component_is_narrower_than_the_noise():
    """Forty components on 200 points would learn the noise: the floor is met with, and kept."""
    density = MixtureDensity(SHAPE, 2.0, rank=8, components=40, rounds=1)
    density.fit(source(images(200)))
    assert (density.values >= 4.0 * (1 - 1e-6)).all() and (density.values < 4.0001).any()


def test_a_mixture_of_the_truth_is_found():
    """Of three modes, EM finds weights, means and variances of the noisy law: within sampling error of it."""
    data, truth = three_modes().sample(4000).float(), three_modes().exact_prior(0.2)
    density = MixtureDensity(PLANE, truth.ratio_star, components=3, rounds=10)
    density.fit(source(data))
    y = three_modes().sample(4000).float() + truth.ratio_star * torch.randn(4000, *PLANE)
    gap = truth.density.log_prob(y.double()) - density.log_prob(y)
    assert gap.mean().item() == pytest.approx(0, abs=0.006)
    assert sorted(density.weights.tolist()) == pytest.approx([0.2, 0.3, 0.5], abs=0.03)


def test_the_loss_is_in_bits_a_dimension():
    """Of N(0, s^2): log2(2 pi s^2) / 2 + mean y^2 / (2 s^2 ln 2)."""
    density, y = NormalDensity(SHAPE, 0.5, std=1.2), torch.randn(4, *SHAPE)
    variance = 1.2**2 + 0.5**2
    square = y.square().flatten(1).mean(1).double()
    expected = 0.5 * math.log2(2 * math.pi * variance) + square / (2 * variance * math.log(2))
    torch.testing.assert_close(density.loss(y), expected, rtol=1e-6, atol=0)


def test_components_see_the_noise_of_as_many_draws_as_there_are_rounds(monkeypatch):
    from sklearn.mixture import GaussianMixture

    seen, fit = [], GaussianMixture.fit
    monkeypatch.setattr(GaussianMixture, "fit", lambda self, x, y=None: seen.append(x) or fit(self, x))
    density = MixtureDensity(PLANE, 0.3, rank=2, components=1, rounds=3)
    density.fit(source(torch.ones(400, *PLANE)))
    assert len(seen) == 3 and all(x.std() == pytest.approx(0.3, rel=0.1) for x in seen)
    assert abs(np.corrcoef([x.ravel() for x in seen]) - np.eye(3)).max() < 0.15


def test_random_images_make_the_components():
    """Of one component the moments are known: the images' own, and the noise's variance. Others are far away."""
    data, chosen = 5 + torch.randn(600, *PLANE), random_order(600)[:350]
    data[chosen] = 0.5 + 0.2 * torch.randn(350, *PLANE)
    density = MixtureDensity(PLANE, 0.3, rank=2, components=1, limit=350)
    density.fit(source(data))
    mean = density.basis.coordinates(data[chosen].mean(0, keepdim=True))
    torch.testing.assert_close(density.means, mean, rtol=0, atol=0.06)
    covariance = (density.vectors * density.values[:, None]) @ density.vectors.mT
    torch.testing.assert_close(covariance[0], (0.2**2 + 0.3**2) * torch.eye(2), rtol=0, atol=0.025)


def test_too_few_images_for_the_components():
    with pytest.raises(UsageError, match="too few for 20 components"):
        MixtureDensity(SHAPE, 1.0).fit(source(images(15)))


# Flows


@pytest.mark.parametrize("kind", ["flow", "maf", "glow"])
def test_a_flow_starts_at_the_gaussian(kind):
    data = images()
    flow = DENSITIES.build({"name": kind, **IMAGES[kind]} | {"basis": "dct"}, shape=SHAPE, ratio=RATIO)
    gaussian = GaussianDensity(SHAPE, RATIO, "dct")
    flow.fit(source(data))
    gaussian.fit(source(data))
    y = data + RATIO * torch.randn_like(data)
    with torch.no_grad():
        assert torch.allclose(flow.log_prob(y), gaussian.log_prob(y), atol=2e-3)


def test_a_flow_learns_what_the_gaussian_can_not():
    flow, data = build("flow", stir=0.0), three_modes().sample(20_000).float()
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    losses = []
    for _ in range(100):
        chosen = data[torch.randint(len(data), (256,))]
        loss = flow.loss(chosen + RATIO * torch.randn_like(chosen)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < np.mean(losses[:5]) - 0.1


def test_images_that_can_not_be_halved():
    for name in ("glow", "vae"):
        with pytest.raises(UsageError, match="can't be halved"):
            DENSITIES.build({"name": name}, shape=(1, 6, 6), ratio=1.0)
    with pytest.raises(UsageError, match="nsf"):
        DENSITIES.build({"name": "flow", "kind": "nice"}, shape=SHAPE, ratio=1.0)


def test_a_vae_bounds_and_samples():
    vae = DENSITIES.build({"name": "vae", "latent": 4, "width": 4}, shape=SHAPE, ratio=RATIO)
    assert draws(vae, 6).shape == (6, *SHAPE)
    assert vae.variance >= RATIO**2
    y = images(64) + RATIO * torch.randn(64, *SHAPE)
    vae.loss(y).mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vae.encoder.parameters())
    floor = 0.5 * math.log2(2 * math.pi * math.e * RATIO**2)
    assert vae.loss(y).mean() > floor
    with pytest.raises(UsageError, match="no log-density"):
        vae.log_prob(y)


def test_the_bound_of_a_vae_is_its_closed_form():
    """An encoder and a decoder that say the same of all: -log N(y; c, s^2) and KL[N(m, v) || N(0, 1)] a latent."""
    vae = DENSITIES.build({"name": "vae", "latent": 2, "width": 4}, shape=SHAPE, ratio=RATIO)
    mean, log_std, centre = torch.tensor([0.5, -1.0]), torch.tensor([0.3, -0.7]), torch.tensor([0.1, 0.2, 0.3])
    for layer, bias in ((vae.encoder[-1], torch.cat([mean, log_std])), (vae.decoder[-1], centre)):
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data.copy_(bias)
    vae.raw_excess.data.fill_(-0.4)
    variance = RATIO**2 + math.log(1 + math.exp(-0.4))
    y, size = torch.randn(5, *SHAPE), math.prod(SHAPE)
    law = torch.distributions.Normal(centre[:, None, None], variance**0.5)
    latent = torch.distributions.Normal(mean, log_std.exp())
    divergence = torch.distributions.kl_divergence(latent, torch.distributions.Normal(0.0, 1.0)).sum()
    expected = (divergence - law.log_prob(y).flatten(1).sum(1)) / (size * math.log(2))
    torch.testing.assert_close(vae.loss(y).float(), expected)
    drawn = draws(vae, 4000) - centre[:, None, None]
    assert drawn.var().item() == pytest.approx(variance, rel=0.02)


# Levels


def test_another_level_is_refused(tmp_path: Path):
    density = build("mixture")
    save_weights(tmp_path / "density.safetensors", density.state_dict(), {}, torch.float32)
    other = DENSITIES.build({"name": "mixture", **KINDS["mixture"]}, shape=PLANE, ratio=0.8)
    with pytest.raises(UsageError, match=r"are for ratio_star 0.7, but the experiment's prior starts at 0.8"):
        load_weights(tmp_path / "density.safetensors", other)
    with pytest.raises(UsageError, match="fitted at ratio_star 0.7, not at 0.8"):
        density.at(0.8)


# Judging


def test_the_gain_over_white_noise_is_known_in_closed_form():
    """1/2 (tr C - D - ln det C + |m|^2) of the law of x, for the Gaussian of its moments and any law."""
    truth, T = three_modes(), 0.4
    prior, mean = truth.matched_prior(T), truth.moments[0]
    alpha, sigma = (f(torch.tensor(T, dtype=torch.float64)) for f in (truth.process.alpha, truth.process.sigma))
    covariance = alpha**2 * truth.moments[1] + sigma**2 * torch.eye(2)
    nats = 0.5 * (covariance.trace() - 2 - covariance.logdet() + (alpha * mean).square().sum())
    found = judge(prior.density.float(), truth.sample(8000).float().split(1000))
    assert abs(found.gain - nats.item() / (2 * math.log(2))) < 4 * found.se < 0.02
    assert found.plausible and 2 < found.largest < 6
    floor = 0.5 * math.log2(2 * math.pi * math.e * sigma.item() ** 2)
    assert found.floor == pytest.approx(floor)


def test_noise_learned_by_heart_is_seen():
    """Data without any spread leave the noise alone; a density that claims more than that can't be normalised."""
    density, data = NormalDensity(PLANE, RATIO, std=0.0), [torch.zeros(2000, *PLANE)]
    assert judge(density, data).plausible
    log_prob = density.log_prob
    density.log_prob = lambda y: log_prob(y) + 0.3
    assert not judge(density, data).plausible


def test_a_few_draws_of_noise_are_not_called_learned():
    """Where all is noise N(0, I) is right, and its bits of a few draws lie below their mean in half of the cases."""
    density, data = NormalDensity(PLANE, 1000.0), [torch.zeros(50, *PLANE)]
    found = [judge(density, data, seed) for seed in range(8)]
    assert min(one.bits for one in found) < found[0].floor and all(one.plausible for one in found)
