"""The critic on a frozen denoiser's features: what it sees, whom it teaches, and that it tells laws apart."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.denoiser import Denoiser, GaussianDenoiser, KarrasDenoiser
from diffaccel.errors import UsageError
from diffaccel.nn import MLP, UNet
from diffaccel.nn.critic import CRITICS, r1_penalty
from diffaccel.process import EDMVarianceExploding, VariancePreserving
from diffaccel.training.feature_critic import FeatureCritic

SHAPE, RATIO = (1, 8, 8), 0.7


def denoiser(process: object = None, classes: int = 0) -> Denoiser:
    torch.manual_seed(0)
    network = UNet(SHAPE, widths=[8, 12], blocks=2, unshuffle=1, embedding=16, classes=classes)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return KarrasDenoiser(network, process or EDMVarianceExploding(), sigma_data=0.5).requires_grad_(False).eval()


@pytest.mark.parametrize("process", [EDMVarianceExploding(), VariancePreserving()], ids=["ve", "vp"])
def test_sees_the_last_features_at_each_resolution(process: object) -> None:
    """Those that the network itself makes of the state, of a process of any units."""
    teacher = denoiser(process)
    critic, x = FeatureCritic(SHAPE, teacher, RATIO, width=6), torch.randn(3, *SHAPE)
    network, caught = teacher.network, {}
    for name, module in (("fine", network.down[1]), ("coarse", network.middle[1])):
        module.register_forward_hook(lambda _module, _inputs, output, name=name: caught.update({name: output}))
    y = (1 + RATIO**2) ** 0.5 * x
    teacher(*teacher.process.from_ratio(y, torch.full((3,), RATIO, dtype=torch.float64)))
    expected = torch.cat([caught["fine"].flatten(1), caught["coarse"].flatten(1)], dim=1)
    torch.testing.assert_close(critic.seen(x), expected, rtol=1e-5, atol=1e-5)
    assert critic.seen(x).shape == (3, 8 * 64 + 12 * 16)
    torch.testing.assert_close(critic(x), critic.logits(expected), rtol=1e-4, atol=1e-5)


def test_labels_reach_encoder_and_head() -> None:
    critic, x = FeatureCritic(SHAPE, denoiser(classes=3), RATIO, width=6, classes=3), torch.randn(4, *SHAPE)
    one, other = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 2, 0])
    assert not torch.equal(critic.seen(x, one)[0], critic.seen(x, other)[0])
    assert torch.equal(critic.seen(x, one)[1:], critic.seen(x, other)[1:])
    seen = critic.seen(x, one)
    assert not torch.equal(critic.logits(seen, one)[0], critic.logits(seen, other)[0])


def test_the_encoder_is_none_of_its_own() -> None:
    """It gets no gradient and is in no checkpoint twice; the states do get one, through it."""
    teacher = denoiser()
    critic, x = FeatureCritic(SHAPE, teacher, RATIO, width=6), torch.randn(4, *SHAPE, requires_grad=True)
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in teacher.parameters()}
    critic(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in critic.parameters())
    assert all(p.grad is None for p in teacher.parameters()) and x.grad.abs().max() > 0


def test_r1_is_taken_by_the_features() -> None:
    """It sums to the slope of the logits' sum along their gradient by the features, in finite differences."""
    critic = FeatureCritic(SHAPE, denoiser(), RATIO, width=6).double()
    seen = critic.seen(torch.randn(4, *SHAPE)).double().requires_grad_()
    penalty = r1_penalty(partial(critic.logits, condition=None), seen, gamma=2.0)
    (along,) = torch.autograd.grad(critic.logits(seen).sum(), seen)
    with torch.no_grad():
        ahead, behind = (critic.logits(seen + step * along).sum() for step in (1e-6, -1e-6))
    assert penalty.sum().item() == pytest.approx((ahead - behind).item() / 2e-6, rel=1e-5)


def test_tells_a_generators_law_from_the_data_s() -> None:
    """States of the right variance at each pixel and none of the covariance between them."""
    critic = FeatureCritic(SHAPE, denoiser(), RATIO, width=8)
    optimizer = torch.optim.Adam(critic.parameters(), 5e-3, betas=(0.0, 0.99))

    def real(n: int) -> Tensor:
        return torch.randn(n, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)

    for _ in range(120):
        optimizer.zero_grad()
        (F.softplus(-critic(real(64))) + F.softplus(critic(torch.randn(64, *SHAPE)))).mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert (critic(real(500)) > 0).float().mean() > 0.9 and (
            critic(torch.randn(500, *SHAPE)) < 0
        ).float().mean() > 0.9


def test_what_it_cannot_be_built_on() -> None:
    def build(teacher: Denoiser, ratio: float = RATIO, **keys: int) -> None:
        CRITICS.build({"name": "features", **keys}, shape=SHAPE, classes=0, denoiser=teacher, ratio=ratio)

    process = EDMVarianceExploding()
    with pytest.raises(UsageError, match="requires a denoiser with the network 'unet': use critic 'stylegan2'"):
        build(GaussianDenoiser(torch.zeros(SHAPE), 1.0, process))
    with pytest.raises(UsageError, match="requires a denoiser with the network 'unet'"):
        build(KarrasDenoiser(MLP(SHAPE), process, sigma_data=0.5))
    with pytest.raises(UsageError, match="not trained at ratio 0: choose one in"):
        build(denoiser(), ratio=0.0)
    with pytest.raises(UsageError, match="width=0: use 1 or more"):
        build(denoiser(), width=0)
