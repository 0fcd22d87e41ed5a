"""Mobile convolutional networks: MobileNetV2 and EfficientNet-Lite0, up to their pooled features.

Both are stacks of inverted residuals: a 1x1 convolution expands the channels, a depthwise convolution acts on each of
them, a 1x1 convolution projects them, and the input is added where the shapes agree. The networks differ in the table
of stages, in the padding of strided convolutions and in the constant of the batch norm.

References:
    MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al., 2018), https://arxiv.org/abs/1801.04381
    EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (Tan and Le, 2019),
        https://arxiv.org/abs/1905.11946; the variant Lite, without squeeze-and-excitation and with ReLU6:
        https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Stage(NamedTuple):
    """Row of a table of stages: ``repeats`` inverted residuals, of which the first has the stride."""

    expand: int
    channels: int
    repeats: int
    stride: int
    kernel: int = 3


MOBILENET_V2 = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)
EFFICIENTNET_LITE0 = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 40, 2, 2, kernel=5),
    Stage(6, 80, 3, 2),
    Stage(6, 112, 3, 1, kernel=5),
    Stage(6, 192, 4, 2, kernel=5),
    Stage(6, 320, 1, 1),
)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's padding ``SAME``: the output has ceil(size / stride) rows and columns.

    The padding depends on the size of the input, and an odd one has its larger half below and to the right.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride))."""
        padding: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


class Mobile(nn.Module):
    """Stack of inverted residuals between a strided 3x3 convolution and a 1x1 convolution, with mean pooling.

    Args:
        stages: Table of stages.
        width: Number of channels of the first convolution.
        dim: Number of features.
        same: Whether strided convolutions are padded as in TensorFlow, and not by half of the kernel on each side.
        eps: Constant of the batch norm.
    """

    def __init__(
        self, stages: Sequence[Stage], width: int = 32, dim: int = 1280, same: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.dim, self.same, self.eps = dim, same, eps
        self.stem = self._conv(3, width, 3, stride=2)
        blocks: list[nn.Module] = []
        for stage in stages:
            for repeat in range(stage.repeats):
                blocks.append(self._block(stage, width, stage.stride if repeat == 0 else 1))
                width = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.last = self._conv(width, dim, 1)

    def _conv(
        self, width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> nn.Sequential:
        """Convolution, batch norm and, with ``relu``, ReLU6."""
        kind, padding = (SameConv2d, 0) if self.same and stride > 1 else (nn.Conv2d, kernel // 2)
        conv = kind(width_in, width, kernel, stride, padding, groups=groups, bias=False)
        parts: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", nn.BatchNorm2d(width, self.eps))]
        return nn.Sequential(OrderedDict([*parts, ("relu", nn.ReLU6(inplace=True))] if relu else parts))

    def _block(self, stage: Stage, width_in: int, stride: int) -> nn.Module:
        """Inverted residual; without an expansion, the first convolution is left out."""
        hidden = stage.expand * width_in
        layers = [self._conv(width_in, hidden, 1)] if stage.expand > 1 else []
        layers.append(self._conv(hidden, hidden, stage.kernel, stride, groups=hidden))
        layers.append(self._conv(hidden, stage.channels, 1, relu=False))
        return (Residual if stride == 1 and width_in == stage.channels else nn.Sequential)(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Extract features of normalised images, (N, 3, H, W) -> (N, dim)."""
        return self.last(self.blocks(self.stem(x))).mean((2, 3))

    def fused(self) -> "Mobile":
        """Merge each batch norm into the convolution before it, in place, for inference."""
        for module in list(self.modules()):
            conv, norm = getattr(module, "conv", None), getattr(module, "norm", None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module.conv, module.norm = fuse_conv_bn_eval(conv.eval(), norm.eval()), nn.Identity()
        return self


class Residual(nn.Sequential):
    """Sequence of layers whose output is added to the input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return x + super().forward(x)


def assign_in_order(network: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Copy tensors to a network whose state has the same shapes in the same order, under any names.

    Raises:
        ValueError: The number of tensors or a shape differs.
    """
    state = network.state_dict()
    if [tensor.shape for tensor in tensors] != [own.shape for own in state.values()]:
        raise ValueError("the tensors have other shapes than those of the network")
    network.load_state_dict(dict(zip(state, tensors, strict=True)))
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError("a tensor contains NaN or infinity")
