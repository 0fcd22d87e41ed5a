"""The critics: the reference's sizes, every layer against its formula, R1 against closed forms and differences."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.errors import UsageError
from diffaccel.nn.critic import (
    CRITICS,
    Blur,
    Critic,
    CriticBlock,
    CriticHead,
    EqualisedConv2d,
    EqualisedLinear,
    MLPCritic,
    StyleGAN2Critic,
    minibatch_deviation,
    r1_penalty,
)

FIR = torch.tensor([[1.0, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]]) / 64


def small(size: int = 8, classes: int = 0) -> StyleGAN2Critic:
    return StyleGAN2Critic((1, size, size), channel_base=8 * size, channel_max=12, classes=classes)


BOTH = [
    pytest.param(small, (1, 8, 8), id="stylegan2"),
    pytest.param(partial(MLPCritic, (2, 1, 1)), (2, 1, 1), id="mlp"),
]


@pytest.mark.parametrize(
    ("size", "channel_base", "count"), [(32, 16384, 21_507_073), (64, 32768, 26_488_833), (256, 32768, 28_864_129)]
)
def test_parameters_of_the_reference(size, channel_base, count):
    with torch.device("meta"):
        critic = StyleGAN2Critic((3, size, size), channel_base)
    assert sum(parameter.numel() for parameter in critic.parameters()) == count
    assert critic.state_dict().keys() == dict(critic.named_parameters()).keys()


@pytest.mark.parametrize(
    ("shape", "keys", "count"),
    [
        # 1x1: 2 x 64. Block: 64 x 577 + 128 x 577 + 64 x 128. Then 128 x (129 x 9 + 1), 128 x 2049 and 129.
        ((1, 8, 8), {"name": "stylegan2", "channel_base": 512}, 128 + 118_976 + 148_736 + 262_272 + 129),
        ((1, 4, 4), {"name": "stylegan2", "channel_base": 64, "channel_max": 8}, 16 + 8 * 82 + 8 * 129 + 9),
        ((2, 1, 1), {"name": "mlp", "width": 16, "depth": 2}, 3 * 16 + 17 * 16 + 17),
        # A layer of 16 to 16 instead of the logit, 5 embeddings, 8 layers of the mapping.
        ((2, 1, 1), {"name": "mlp", "width": 16, "depth": 2, "classes": 5}, 3 * 16 + 17 * 16 * (1 + 1 + 8) + 5 * 16),
    ],
)
def test_a_file_names_small_ones(shape, keys, count):
    critic = CRITICS.build(keys, shape=shape)
    assert sum(parameter.numel() for parameter in critic.parameters()) == count
    assert critic(torch.randn(3, *shape), torch.tensor([0, 4, 2])).shape == (3,)


def test_keys_are_the_constructors():
    own = {"channel_base", "channel_max"}
    assert CRITICS.keys_of("stylegan2") == {"shape", "classes", "image", "mask", "tokens", *own}
    with pytest.raises(UsageError, match="critic 'mlp' has no key 'widht'; did you mean 'width'"):
        CRITICS.build({"name": "mlp", "widht": 3}, shape=(2, 1, 1))


# --- layers


@pytest.mark.parametrize("rate", [1.0, 0.01])
def test_linear_layer_keeps_the_variance_at_any_width_and_rate(rate):
    for width_in in (16, 400):
        layer = EqualisedLinear(width_in, 300, rate)
        assert layer.weight.std().item() * rate == pytest.approx(1, rel=0.05)
        assert (layer.bias == 0).all()
        assert layer.gain == pytest.approx(rate / math.sqrt(width_in))
        assert layer(torch.randn(2000, width_in)).var().item() == pytest.approx(1, rel=0.1)


def test_linear_layer_steps_in_proportion_to_its_rate():
    """Adam moves any parameter by lr, hence the output by rate lr / sqrt(fan_in) a weight and by rate lr the bias."""
    layer, x = EqualisedLinear(25, 1, rate=0.01), torch.ones(1, 25)
    layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, torch.full((1, 25), 0.01 / 5))
    assert torch.allclose(layer.bias.grad, torch.tensor([0.01]))


@pytest.mark.parametrize(("width_in", "size"), [(3, 1), (24, 3)])
def test_convolution_keeps_the_variance(width_in, size):
    layer = EqualisedConv2d(width_in, 64, size)
    assert layer.gain == pytest.approx(1 / math.sqrt(width_in * size**2))
    assert layer.weight.std().item() == pytest.approx(1, rel=0.15)
    assert layer(torch.randn(100, width_in, 8, 8)).var().item() == pytest.approx(1, rel=0.15)


def test_second_moment_is_104_percent_a_layer():
    """(1 + 0.2^2) / 2 for the leaky ReLU of a symmetric input, times the gain's square, 2."""
    for depth in (1, 6):
        features = MLPCritic((100, 1, 1), width=800, depth=depth).features(torch.randn(200, 100, 1, 1))
        assert features.square().mean().item() == pytest.approx(1.04**depth, rel=0.15)


@pytest.mark.parametrize(("padding", "stride"), [(2, 1), (1, 2)])
def test_blur_of_an_impulse_is_its_kernel(padding, stride):
    x = torch.zeros(1, 2, 8, 8)
    x[0, 1, 4, 3] = 1
    blurred = Blur(padding, stride)(x)
    whole = torch.zeros(8 + 2 * padding - 3, 8 + 2 * padding - 3)
    whole[padding + 1 : padding + 5, padding : padding + 4] = FIR  # the first window to hold (4, 3) starts 3 before
    assert torch.equal(blurred[0, 0], torch.zeros_like(blurred[0, 0]))
    assert torch.allclose(blurred[0, 1], whole[::stride, ::stride])
    assert Blur(padding, stride).kernel.sum().item() == 1


def test_both_branches_of_a_block_downsample_about_the_same_points():
    """A ramp is kept, read off between the pixels of each pair; with a delta for 3x3 weights the branches are one."""
    block = CriticBlock(1, 1)
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    assert torch.allclose(block.downsample(ramp)[0, 0, 3, 1:-1], 2 * torch.arange(1.0, 7.0) + 0.5)
    with torch.no_grad():
        block.conv_2.weight.zero_()
        block.conv_2.weight[0, 0, 1, 1] = 1 / block.conv_2.gain
    x = torch.randn(2, 1, 16, 16)
    assert torch.allclose(block.conv_2(block.blur(x)), block.downsample(x), atol=1e-6)


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (7, 1), (8, 4), (10, 2)])
def test_minibatch_deviation_is_a_loop_over_groups(batch, size):
    """The largest divisor up to 4; members are neighbours."""
    x = torch.randn(batch, 3, 2, 5)
    deviation = minibatch_deviation(x)
    assert deviation.shape == (batch, 1, 2, 5)
    for sample in range(batch):
        members = [x[sample // size * size + step].flatten().tolist() for step in range(size)]
        columns = [[value - sum(column) / size for value in column] for column in zip(*members, strict=True)]
        roots = [math.sqrt(sum(value**2 for value in column) / size + 1e-8) for column in columns]
        assert torch.allclose(deviation[sample], torch.tensor(sum(roots) / len(roots)), atol=1e-6)


def test_minibatch_deviation_differentiates_twice_even_at_equal_samples():
    x = torch.randn(8, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(minibatch_deviation, x)
    assert torch.autograd.gradgradcheck(minibatch_deviation, x)
    for equal in (torch.ones(4, 1, 2, 2, requires_grad=True), torch.randn(1, 1, 2, 2, requires_grad=True)):
        (gradient,) = torch.autograd.grad(minibatch_deviation(equal).sum(), equal, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), equal)
        assert (gradient == 0).all()
        assert (second == 0).all()


# --- whole critics


def reference(critic: StyleGAN2Critic, x: Tensor) -> Tensor:
    """Logits by the formulas of the two papers, from the raw weights."""

    def weights(layer):
        return layer.weight / layer.weight[0].numel() ** 0.5

    def activate(y, gain=2**0.5):
        return gain * torch.where(y > 0, y, 0.2 * y)

    def filtered(y, padding):
        fir = torch.zeros(y.shape[1], y.shape[1], 4, 4)
        for channel in range(y.shape[1]):
            fir[channel, channel] = FIR
        return F.conv2d(F.pad(y, [padding] * 4), fir)

    y = activate(F.conv2d(x, weights(critic.from_image), critic.from_image.bias))
    for block in critic.blocks:
        skip = F.conv2d(filtered(y, 1)[:, :, ::2, ::2], weights(block.skip) * 0.5**0.5)
        y = activate(F.conv2d(y, weights(block.conv_1), block.conv_1.bias, padding=1))
        strided = F.conv2d(filtered(y, 2), weights(block.conv_2), block.conv_2.bias)[:, :, ::2, ::2]
        y = skip + activate(strided, gain=1.0)
    deviation = torch.empty(6, 1, 4, 4)
    for first in (0, 3):  # a batch of 6 makes two groups of 3
        members = y[first : first + 3]
        deviation[first : first + 3] = (members.std(0, correction=0).square() + 1e-8).sqrt().mean()
    y = activate(F.conv2d(torch.cat([y, deviation], 1), weights(critic.conv), critic.conv.bias, padding=1))
    y = activate(y.flatten(1) @ weights(critic.linear).T + critic.linear.bias)
    return (y @ weights(critic.head.out).T + critic.head.out.bias)[:, 0]


@pytest.mark.parametrize("size", [4, 8, 16])
def test_logits_follow_the_formulas(size):
    critic = small(size)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # biases off zero
    x = 2 * torch.randn(6, 1, size, size)
    torch.testing.assert_close(critic(x), reference(critic, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("build", "shape"), BOTH)
def test_every_parameter_learns(build, shape):
    critic: Critic = build(classes=3)
    critic(torch.randn(6, *shape), torch.tensor([0, 1, 2, 0, 1, 2])).square().sum().backward()
    for name, parameter in critic.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_points_do_not_see_one_another():
    critic, x = MLPCritic((2, 1, 1)), torch.randn(5, 2, 1, 1)
    torch.testing.assert_close(critic(x), torch.cat([critic(point[None]) for point in x]))


def test_head_projects_on_the_mapped_label():
    head, features, label = CriticHead(6, classes=4), torch.randn(3, 6), torch.tensor([2, 0, 2])
    mapped = F.normalize(head.embed_class.weight, dim=1) * math.sqrt(6)
    for layer in head.mapping:  # starts at N(0, 100^2): a hundredth of that is used
        mapped = math.sqrt(2) * F.leaky_relu(mapped @ (layer.weight / 100 / math.sqrt(6)).T, 0.2)
    out = features @ (head.out.weight / math.sqrt(6)).T
    expected = torch.stack([out[b] @ mapped[label[b]] / math.sqrt(6) for b in range(3)])
    torch.testing.assert_close(head(features, label), expected, rtol=1e-4, atol=1e-5)
    assert len(head.mapping) == 8


def test_logits_tend_to_the_log_ratio_of_densities():
    """N(m, I) against N(-m, I): log q - log p = 2 m x, at TDPM's learning rate."""
    critic, m = MLPCritic((2, 1, 1), width=64), torch.tensor([0.5, -0.25])[:, None, None]
    optimizer = torch.optim.Adam(critic.parameters(), 2.5e-3, betas=(0.0, 0.99))
    for step in range(400):
        if step == 300:
            optimizer.param_groups[0]["lr"] /= 20  # what is left is the noise of the last steps
        real, fake = torch.randn(256, 2, 1, 1) + m, torch.randn(256, 2, 1, 1) - m
        optimizer.zero_grad()
        (F.softplus(-critic(real)) + F.softplus(critic(fake))).mean().backward()
        optimizer.step()
    x = torch.randn(2000, 2, 1, 1)
    exact = 2 * (m * x).sum((1, 2, 3))
    error = (critic(x) - exact).square().mean().sqrt().item()
    assert error < 0.1 * exact.std().item()


def test_sees_a_generator_that_repeats_itself():
    """One image sixteen times, drawn from the data's own law: no critic of single images can beat 2 log 2 = 1.39."""
    critic = StyleGAN2Critic((1, 4, 4), channel_base=64)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2, betas=(0.0, 0.99))
    for _ in range(150):
        real, fake = torch.randn(16, 1, 4, 4), torch.randn(1, 1, 4, 4).expand(16, -1, -1, -1)
        optimizer.zero_grad()
        loss = (F.softplus(-critic(real)) + F.softplus(critic(fake))).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


# --- precision


@pytest.mark.parametrize(("build", "shape"), BOTH)
def test_autocast_changes_nothing(build, shape):
    critic, x = build(), torch.randn(4, *shape)
    logit, penalty = critic(x), r1_penalty(critic, x, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_penalty = critic(x), r1_penalty(critic, x, 2.0)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(cast, logit)
    assert torch.equal(cast_penalty, penalty)
    assert cast.dtype == cast_penalty.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("build", "shape"), BOTH)
def test_samples_come_in_any_precision(build, shape, dtype):
    critic, x = build(), torch.randn(4, *shape).to(dtype)
    assert torch.equal(critic(x), critic(x.float()))
    assert r1_penalty(critic, x, 1.0).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert critic.double()(x).dtype == torch.float64


# --- R1


def test_r1_of_linear_and_quadratic_critics():
    x, w = torch.randn(5, 3, 2, 2), torch.randn(3, 2, 2, requires_grad=True)
    linear = r1_penalty(lambda x: (x * w).sum((1, 2, 3)) + 7, x, gamma=0.3)
    assert torch.allclose(linear, (0.15 * w.square().sum()).expand(5))
    (gradient,) = torch.autograd.grad(linear.mean(), w)
    assert torch.allclose(gradient, 0.3 * w)
    quadratic = r1_penalty(lambda x: (w * x.square()).sum((1, 2, 3)) / 2, x, gamma=0.3)
    assert torch.allclose(quadratic, 0.15 * (w * x).square().sum((1, 2, 3)))


@pytest.mark.parametrize("classes", [0, 3])
def test_r1_is_the_squared_slope_in_finite_differences(classes):
    """Across the batch: the minibatch deviation couples the samples."""
    label = torch.tensor([0, 1, 2, 0])
    network, x = small(8, classes).double(), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    critic = partial(network, condition=label)
    penalty = r1_penalty(critic, x, gamma=3.0)
    slopes = torch.empty_like(x)
    with torch.no_grad():
        for index in range(x.numel()):
            step = torch.zeros(x.numel(), dtype=x.dtype)
            step[index] = 1e-6
            step = step.view_as(x)
            slopes.view(-1)[index] = (critic(x + step).sum() - critic(x - step).sum()) / 2e-6
    assert torch.allclose(penalty, 1.5 * slopes.square().sum((1, 2, 3)), rtol=1e-6)
    alone = r1_penalty(partial(network, condition=label[:1]), x[:1], gamma=3.0)
    assert not torch.allclose(penalty[0], alone, rtol=1e-3)
    assert not x.requires_grad


@pytest.mark.parametrize(("build", "shape"), BOTH)
def test_r1_differentiates_by_the_parameters(build, shape):
    critic, x = build().double(), torch.randn(4, *shape, dtype=torch.float64)
    parameters = [parameter for parameter in critic.parameters() if parameter.ndim > 1]
    direction = [torch.randn_like(parameter) for parameter in parameters]
    gradients = torch.autograd.grad(r1_penalty(critic, x, 1.0).mean(), parameters)
    slope = sum((gradient * along).sum() for gradient, along in zip(gradients, direction, strict=True)).item()

    def moved(step: float) -> float:
        state = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.add_(step * along)
        value = r1_penalty(critic, x, 1.0).mean().item()
        with torch.no_grad():
            for parameter, before in zip(parameters, state, strict=True):
                parameter.copy_(before)
        return value

    assert slope == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-5)


# --- refusals


@pytest.mark.parametrize("shape", [(3, 28, 28), (2, 1, 1), (1, 2, 2), (3, 48, 48), (3, 32, 16)])
def test_images_that_cannot_be_halved_to_4x4(shape):
    message = rf"critic 'stylegan2': images of {shape[1]}x{shape[2]} .* power of two from 4 up, or the critic 'mlp'"
    with pytest.raises(UsageError, match=message):
        StyleGAN2Critic(shape)


def test_widths_under_1():
    with pytest.raises(UsageError, match="channel_base=16 .* at 32x32: use a channel_base of 32"):
        StyleGAN2Critic((3, 32, 32), channel_base=16)
    with pytest.raises(UsageError, match="channel_max of 1"):
        StyleGAN2Critic((3, 32, 32), channel_max=0)
    with pytest.raises(UsageError, match="critic 'mlp': width=16 and depth=0: use 1 or more"):
        MLPCritic((2, 1, 1), width=16, depth=0)


@pytest.mark.parametrize(("build", "shape"), BOTH)
def test_wrong_calls(build, shape):
    with pytest.raises(UsageError, match=r"built for samples of shape .* got \(1, 2, 2\)"):
        build()(torch.randn(4, 1, 2, 2))
    with pytest.raises(UsageError, match="called without labels: pass the labels"):
        build(classes=3)(torch.randn(4, *shape))
