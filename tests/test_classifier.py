"""The noise-level classifier: the reference's geometry, and learning as far as the exact posterior allows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffaccel.denoiser import MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.nn.classifier import NoiseLevelClassifier
from diffaccel.prior import ClassifierPosterior, ExactPosterior, geometric_levels


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("size", [2, 8, 16, 32, 64, 256])
def test_every_size_ends_at_1024_features(size, normalise):
    network = NoiseLevelClassifier((3, size, size), 1000, normalise=normalise)
    y = torch.randn(2, 3, size, size)
    assert network.features(y).shape == (2, 1024)
    assert network(y).shape == (2, 1000)


def reference_32(network: NoiseLevelClassifier, y: torch.Tensor) -> torch.Tensor:
    for conv in network.convolutions:
        y = F.avg_pool2d(F.relu(conv(y)), 2)
    return network.linear(y.flatten(1))


def reference_256(network: NoiseLevelClassifier, y: torch.Tensor) -> torch.Tensor:
    for conv in network.convolutions[:3]:
        y = F.avg_pool2d(F.relu(conv(y)), kernel_size=2, stride=4)
    return network.linear(F.avg_pool2d(F.relu(network.convolutions[3](y)), 2, 2).flatten(1))


@pytest.mark.parametrize(("size", "reference"), [(32, reference_32), (256, reference_256)])
def test_is_the_reference_network_without_normalisation(size, reference):
    network, y = NoiseLevelClassifier((3, size, size), 1000, normalise=False), torch.randn(2, 3, size, size)
    assert torch.equal(network(y), reference(network, y))
    sizes = [tuple(conv.weight.shape) for conv in network.convolutions]
    assert sizes == [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3)]
    # Convolutions 896 + 18496 + 73856 + 295168 with biases, and the linear layer's 1025 x 1000.
    assert sum(p.numel() for p in network.parameters()) == 388_416 + 1_025_000


def test_normalised_input_carries_the_level_in_one_channel():
    """Scaling a state changes nothing but the channel that holds the logarithm of its scale."""
    network = NoiseLevelClassifier((1, 8, 8), 10, width=4)
    seen = []
    network.convolutions[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    y = torch.randn(3, 1, 8, 8)
    network(y)
    network(1000 * y)
    assert torch.allclose(seen[0][:, 0], seen[1][:, 0], rtol=1e-5)
    assert torch.allclose(seen[1][:, 1] - seen[0][:, 1], torch.tensor(1000.0).log())
    assert network(torch.zeros(1, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 28, 28), (3, 1, 1), (3, 1024, 1024), (3, 48, 48), (3, 32, 16)])
def test_sizes_that_do_not_end_at_2x2(shape):
    with pytest.raises(UsageError, match="classifier: images of"):
        NoiseLevelClassifier(shape, 10)


@pytest.mark.parametrize("normalise", [False, True])
def test_one_step_lowers_the_loss(normalise):
    levels = geometric_levels(100)
    posterior = ClassifierPosterior(NoiseLevelClassifier((1, 8, 8), 100, width=8, normalise=normalise), levels)
    x_0, index, eps = torch.rand(64, 1, 8, 8) * 2 - 1, torch.randint(100, (64,)), torch.randn(64, 1, 8, 8)
    optimizer = torch.optim.Adam(posterior.parameters(), 1e-3)
    before = posterior.loss(x_0, index, eps)
    before.mean().backward()
    optimizer.step()
    after = posterior.loss(x_0, index, eps)
    assert before.shape == (64,)
    assert after.mean() < before.mean()


def test_loss_is_the_negative_log_posterior_of_the_noisy_state():
    levels = torch.tensor([2.0, 1.0, 0.5])
    posterior = ClassifierPosterior(NoiseLevelClassifier((1, 8, 8), 3, width=4), levels)
    x_0, eps, index = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([2, 0, 1])
    y = x_0 + torch.tensor([0.5, 2.0, 1.0])[:, None, None, None] * eps
    expected = -posterior.logits(y).log_softmax(1)[torch.arange(3), index]
    assert torch.allclose(posterior.loss(x_0, index, eps), expected, atol=1e-6)


def test_learns_the_exact_posterior_of_the_toy_target_from_above():
    """Cross-entropy is the conditional entropy of the level given the state plus a divergence that shrinks."""
    means = torch.tensor([[-2.0, -2.0], [2.0, -2.0], [0.0, 2.5]])[:, :, None, None]
    weights = torch.tensor([0.2, 0.3, 0.5])
    levels = torch.logspace(torch.tensor(8.0).log10().item(), -1, 16)
    exact = ExactPosterior(MixtureDenoiser(means, 0.09, weights), levels)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16))
    learned = ClassifierPosterior(network, levels)

    def draw(count):
        component = torch.multinomial(weights, count, replacement=True)
        x_0 = means[component] + 0.3 * torch.randn(count, 2, 1, 1)
        return x_0, torch.randint(16, (count,)), torch.randn(count, 2, 1, 1)

    x_0, index, eps = draw(20_000)
    y = x_0 + levels[index][:, None, None, None] * eps
    entropy = F.cross_entropy(exact.logits(y), index).item()

    @torch.no_grad()
    def excess():
        return learned.loss(x_0, index, eps).mean().item() - entropy

    gaps = [excess()]
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for steps in (100, 500):
        for _ in range(steps):
            optimizer.zero_grad()
            learned.loss(*draw(512)).mean().backward()
            optimizer.step()
        gaps.append(excess())
    assert gaps == sorted(gaps, reverse=True)
    assert 0 < gaps[-1] < 0.05
