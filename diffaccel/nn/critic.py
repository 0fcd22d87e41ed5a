"""Critics D(x), with one logit per sample, for the adversarial training of implicit priors.

All layers have an equalised learning rate: weights are initialised from N(0, 1) and multiplied by 1 / sqrt(fan_in) in
the forward pass, so that Adam changes every layer by the same fraction of its scale. The learning rates of TDPM's
recipe, about 2e-3, are too high without.

References:
    Analyzing and Improving the Image Quality of StyleGAN (Karras et al., 2020), https://arxiv.org/abs/1912.04958
    Training Generative Adversarial Networks with Limited Data (Karras et al., 2020), https://arxiv.org/abs/2006.06676
    Truncated Diffusion Probabilistic Models (Zheng et al., 2023), https://arxiv.org/abs/2202.09671
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from diffaccel.condition import Condition, Kinds, pixels_of
from diffaccel.errors import UsageError
from diffaccel.nn.text import pooled
from diffaccel.parts.registry import Registry

CRITICS: Registry["Critic"] = Registry(
    "critic",
    builtins=["diffaccel.nn.critic", "diffaccel.training.feature_critic"],
    context=["shape", "classes", "image", "mask", "tokens", "denoiser", "ratio"],
)

GROUP = 4  # maximum number of samples in a group of the minibatch standard deviation
MAPPING_LAYERS, MAPPING_RATE = 8, 0.01


class EqualisedLinear(nn.Linear):
    """Linear layer with an equalised learning rate: y = (rate / sqrt(fan_in)) W x + rate * bias.

    Args:
        width_in: Input features.
        width: Output features.
        rate: Learning rate relative to other layers. W is initialised from N(0, 1 / rate^2), so that the initial y
            doesn't depend on the rate.
    """

    def __init__(self, width_in: int, width: int, rate: float = 1.0) -> None:
        super().__init__(width_in, width)
        self.rate = rate
        self.gain = rate * _equalise(self, rate)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(..., width_in) -> (..., width)."""
        return F.linear(x, self.gain * self.weight, self.rate * self.bias)


class EqualisedConv2d(nn.Conv2d):
    """Convolution with an equalised learning rate: y = (W * x) / sqrt(fan_in) + bias, W ~ N(0, 1), bias = 0."""

    def __init__(
        self, width_in: int, width: int, size: int, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__(width_in, width, size, stride, padding, bias=bias)
        self.gain = _equalise(self)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H', W')."""
        return F.conv2d(x, self.gain * self.weight, self.bias, self.stride, self.padding)


def _equalise(layer: nn.Linear | nn.Conv2d, rate: float = 1.0) -> float:
    """Initialise a layer's weights from N(0, 1 / rate^2) and its bias with zeros, and return 1 / sqrt(fan_in)."""
    nn.init.normal_(layer.weight, std=1 / rate)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return 1 / math.sqrt(layer.weight[0].numel())


class Blur(nn.Module):
    """Low-pass filter [1, 3, 3, 1] along each axis, normalised to sum 1, applied channel by channel.

    Args:
        padding: Number of zeros on each side: 2 before an unpadded 3x3 convolution with stride 2, 1 for a filter with
            stride 2. In both cases output pixel i is centred between input pixels 2i and 2i + 1.
        stride: Stride of the filter.
    """

    kernel: Tensor

    def __init__(self, padding: int, stride: int = 1) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)
        self.padding, self.stride = padding, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, (H + 2 padding - 4) // stride + 1, ...)."""
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.expand(channels, -1, -1, -1), None, self.stride, self.padding, groups=channels)


class CriticBlock(nn.Module):
    """Residual block that halves the resolution: (conv, blur, strided conv) plus (blur, 1x1), divided by sqrt(2).

    Args:
        width_in: Input channels.
        width: Output channels.
    """

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv_1 = EqualisedConv2d(width_in, width_in, 3, padding=1)
        self.conv_2 = EqualisedConv2d(width_in, width, 3, stride=2)
        self.skip = EqualisedConv2d(width_in, width, 1, bias=False)
        self.blur, self.downsample = Blur(padding=2), Blur(padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / 2, W / 2)."""
        hidden = leaky(self.conv_2(self.blur(leaky(self.conv_1(x)))))
        # On smooth images both branches initially preserve the second moment, and so does their sum over sqrt(2).
        return (self.skip(self.downsample(x)) + hidden) / math.sqrt(2)


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.2, scaled to preserve the second moment within 4 %."""
    return math.sqrt(2) * F.leaky_relu(x, 0.2)


def minibatch_deviation(x: Tensor) -> Tensor:
    """Standard deviation over a group of samples, averaged to one number: (B, C, H, W) -> (B, 1, H, W).

    This statistic reveals a generator that repeats the same image. A group is G consecutive samples, so that groups are
    the same on any number of ranks if G divides the batch of each. G is the largest divisor of B up to 4. If G is 1, as
    for a prime B above 3, the channel is constant. ``x`` is the batch of this rank, either all real or all generated.
    """
    size = next(size for size in range(GROUP, 0, -1) if len(x) % size == 0)
    members = rearrange(x, "(group member) c h w -> member group c h w", member=size)
    # The offset is inside the root, whose derivative at 0 (equal samples) is infinite; R1 differentiates it twice.
    deviation = (members.var(0, correction=0) + 1e-8).sqrt()
    average = reduce(deviation, "group c h w -> group", "mean")
    return repeat(average, "group -> (group member) 1 h w", member=size, h=x.shape[2], w=x.shape[3])


class CriticHead(nn.Module):
    """Map features to a logit, with labels and texts by a projection on their embedding.

        logit = <out(features), m(c)> / sqrt(width),    m: normalised embedding, 8 layers at 1/100 of the learning rate

    The embedding of a text is a linear map of the mean of its valid tokens.

    Args:
        width: Number of features.
        classes: Number of class labels; 0 for none.
        tokens: Width of the tokens of a text; 0 for none. Without classes and tokens there is a linear layer instead of
            the projection.
    """

    def __init__(self, width: int, classes: int, tokens: int = 0) -> None:
        super().__init__()
        projects = bool(classes or tokens)
        self.out = EqualisedLinear(width, width if projects else 1)
        self.embed_class = nn.Embedding(classes, width) if classes else None
        self.embed_text = EqualisedLinear(tokens, width) if tokens else None
        self.mapping = nn.ModuleList(
            EqualisedLinear(width, width, MAPPING_RATE) for _ in range(MAPPING_LAYERS if projects else 0)
        )

    def forward(self, features: Tensor, condition: Condition | Tensor | None) -> Tensor:
        """Features (B, width), condition with labels (B,) or None -> logits (B,).

        Raises:
            UsageError: ``condition`` has no labels in a critic with classes, or no tokens in a critic with tokens.
        """
        out = self.out(features)
        if not len(self.mapping):
            return rearrange(out, "b 1 -> b")
        condition, parts = Condition.of(condition), []
        if self.embed_class is not None:
            if condition is None or condition.labels is None:
                raise UsageError(
                    "a critic with classes was called without labels: pass the labels, or build it with classes=0"
                )
            parts.append(self.embed_class(condition.labels))
        if self.embed_text is not None:
            if condition is None or condition.tokens is None:
                raise UsageError("a critic with tokens was called without them: pass them, or build it without")
            parts.append(self.embed_text(pooled(condition).to(out.dtype)))
        mapped = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        mapped = mapped * (mapped.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.mapping:
            mapped = leaky(layer(mapped))
        return einsum(out, mapped, "b width, b width -> b") / math.sqrt(mapped.shape[1])


@CRITICS.base
class Critic(nn.Module, ABC):
    """Map from samples to logits of being real, in the precision of the weights, without autocast.

    The optimum is log q(x) - log p(x), the log-ratio of real to generated densities. Its small differences matter, and
    R1 differentiates it twice, so the three digits of bfloat16 are not enough. The caller's autocast still affects the
    backward pass: call it outside of autocast.

    Args:
        shape: Sample shape (C, H, W).
        width: Number of features.
        classes: Number of class labels; 0 for an unconditional critic, which ignores labels.
        image: Number of channels of the condition's image, which the trained layers receive after the sample's.
        mask: Whether they receive the condition's mask too.
        tokens: Width of the tokens of the condition's text.
    """

    needs_trained_denoiser = False
    """Whether its features are a denoiser's, which has to be trained already."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: int,
        classes: int,
        image: int = 0,
        mask: bool = False,
        tokens: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.takes = tuple(shape), Kinds(classes, tokens, image, mask)
        self.head = CriticHead(width, classes, tokens)

    @abstractmethod
    def features(self, seen: Tensor) -> Tensor:
        """Features (B, width) of the output of :meth:`seen`."""

    def seen(self, x: Tensor, condition: Condition | Tensor | None = None) -> Tensor:
        """Input of the trained layers, with respect to which R1 differentiates: the samples (B, C, H, W) by default."""
        return x

    def forward(self, x: Tensor, condition: Condition | Tensor | None = None) -> Tensor:
        """Logits of samples, (B,).

        Args:
            x: Samples, (B, C, H, W), not restricted to [-1, 1]; either all real or all generated.
            condition: Condition, or class labels (B,) int64, or None.

        Raises:
            UsageError: The samples don't have the critic's shape, or labels are missing.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise UsageError(
                f"the critic was built for samples of shape {self.shape}, got {tuple(x.shape[1:])}: build one for these"
            )
        return self.logits(self.seen(x, condition), condition)

    def logits(self, seen: Tensor, condition: Condition | Tensor | None = None) -> Tensor:
        """Logits (B,) of the output of :meth:`seen`."""
        if self.takes.pixels:  # here, so that R1 differentiates with respect to the sample alone
            seen = torch.cat([seen, pixels_of(condition, self.takes, seen)], dim=1)
        with torch.autocast(seen.device.type, enabled=False):
            return self.head(self.features(seen.to(self.head.out.weight.dtype)), condition)


@CRITICS.register("stylegan2")
class StyleGAN2Critic(Critic):
    """Residual discriminator of StyleGAN2, with C(r) = min(channel_base // r, channel_max) channels at r x r pixels.

    The layers are a 1x1 convolution to C(H) channels, blocks from H x H down to 4 x 4, the minibatch standard deviation
    as an additional channel, a 3x3 convolution, a linear layer with C(4) features, and the logit.

    Args:
        shape: Image shape (C, H, W), H = W a power of two, 4 or more.
        channel_base: Number of channels times resolution. TDPM has 16384 for 32 x 32, and 32768 for 64 x 64 and above;
            512 suits digits of 8 x 8 pixels, with 64 and 128 channels.
        channel_max: Maximum number of channels.
        classes: Number of class labels; 0 for an unconditional critic.
        image: See :class:`Critic`.
        mask: See :class:`Critic`.
        tokens: See :class:`Critic`.

    Raises:
        UsageError: Images that can't be halved down to 4 x 4, or widths under 1.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        channel_base: int = 16384,
        channel_max: int = 512,
        classes: int = 0,
        image: int = 0,
        mask: bool = False,
        tokens: int = 0,
    ) -> None:
        channels, size, width = shape
        if size != width or size < 4 or size & (size - 1):
            raise UsageError(
                f"critic 'stylegan2': images of {size}x{width} can't be halved down to 4x4: use squares of a power of "
                "two from 4 up, or the critic 'mlp'"
            )
        if min(channel_base // size, channel_max) < 1:
            raise UsageError(
                f"critic 'stylegan2': channel_base={channel_base} and channel_max={channel_max} leave no channels at "
                f"{size}x{size}: use a channel_base of {size} or more, and a channel_max of 1 or more"
            )
        resolutions = [2**power for power in range(int(math.log2(size)), 1, -1)]
        widths = [min(channel_base // resolution, channel_max) for resolution in resolutions]
        super().__init__(shape, widths[-1], classes, image, mask, tokens)
        self.from_image = EqualisedConv2d(channels + self.takes.pixels, widths[0], 1)
        self.blocks = nn.Sequential(
            *(CriticBlock(before, after) for before, after in zip(widths, widths[1:], strict=False))
        )
        self.conv = EqualisedConv2d(widths[-1] + 1, widths[-1], 3, padding=1)
        self.linear = EqualisedLinear(widths[-1] * 4 * 4, widths[-1])

    @override
    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C(4))."""
        hidden = self.blocks(leaky(self.from_image(x)))
        hidden = leaky(self.conv(torch.cat([hidden, minibatch_deviation(hidden)], dim=1)))
        return leaky(self.linear(rearrange(hidden, "b c h w -> b (c h w)")))


@CRITICS.register("mlp")
class MLPCritic(Critic):
    """Perceptron on the flattened sample, for toy points and images under 4 pixels, without minibatch statistics.

    Args:
        shape: Sample shape (C, H, W), any.
        width: Features of each hidden layer.
        depth: Number of hidden layers.
        classes: Number of class labels; 0 for an unconditional critic.
        image: See :class:`Critic`.
        mask: See :class:`Critic`.
        tokens: See :class:`Critic`.

    Raises:
        UsageError: A width or a depth under 1.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: int = 128,
        depth: int = 3,
        classes: int = 0,
        image: int = 0,
        mask: bool = False,
        tokens: int = 0,
    ) -> None:
        if min(width, depth) < 1:
            raise UsageError(f"critic 'mlp': width={width} and depth={depth}: use 1 or more for each")
        super().__init__(shape, width, classes, image, mask, tokens)
        widths = [math.prod((shape[0] + self.takes.pixels, *shape[1:]))] + [width] * depth
        self.layers = nn.ModuleList(
            EqualisedLinear(before, after) for before, after in zip(widths, widths[1:], strict=False)
        )

    @override
    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width)."""
        hidden = rearrange(x, "b c h w -> b (c h w)")
        for layer in self.layers:
            hidden = leaky(layer(hidden))
        return hidden


def r1_penalty(critic: Callable[[Tensor], Tensor], x: Tensor, gamma: float) -> Tensor:
    """R1 penalty at each sample, differentiable with respect to the critic's parameters.

        gamma / 2 ||d/dx_b sum_b' D(x_b')||^2

    The sum is over the batch, because each logit depends on other samples through the minibatch standard deviation.

    Args:
        critic: Function from samples (B, C, H, W) to logits (B,), such as ``partial(critic, condition=labels)``.
        x: Real samples, with the noise of the distribution that the generator learns, or :meth:`Critic.seen` of them,
            (B, ...).
        gamma: Weight. TDPM applies the penalty every 16th step, without StyleGAN2's factor of 16.

    Returns:
        Penalties, (B,), float64 if ``x`` is float64, otherwise float32. The penalty of a batch is their mean.

    References:
        Which Training Methods for GANs do actually Converge? (Mescheder et al., 2018),
        https://arxiv.org/abs/1801.04406, Eq. 9
    """
    # The critic disables autocast in its forward pass, but its backward pass runs under the caller's autocast.
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return gamma / 2 * gradient.square().flatten(1).sum(1)
