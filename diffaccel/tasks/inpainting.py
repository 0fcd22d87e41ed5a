"""Inpainting: images with holes of random shapes."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.condition import Condition, Kinds, KnownPixels
from diffaccel.data.conditions import CONDITIONERS, Degradation
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import Count


@CONDITIONERS.register("inpainting")
class Inpainting(Degradation):
    """Image with free-form holes, 0 in the holes, and the mask of its known pixels.

    A hole is a union of brush strokes: polygonal lines with round ends, which start anywhere and turn by random angles.
    Strokes are drawn from the noise stream of the image, so that its mask depends only on the seed and its index.

    Known pixels are kept in both senses: every prediction of the denoiser has them in its x_0, which is the exact
    conditional expectation there, and they are copied into the finished image, in which they are equal to the bit.

    Args:
        shape: Image shape (C, H, W).
        strokes: Number of strokes.
        segments: Number of segments of a stroke.
        length: Largest length of a segment, as a fraction of the image's shorter side; the smallest is a quarter of it.
        width: Largest width of a stroke, in the same units; the smallest is half of it.

    Raises:
        UsageError: ``length`` or ``width`` is not positive.

    References:
        Free-Form Image Inpainting with Gated Convolution (Yu et al., 2019), https://arxiv.org/abs/1806.03589
    """

    weight_keys = ()  # known pixels mean the same, whatever the holes
    observation = KnownPixels()

    def __init__(
        self,
        shape: tuple[int, int, int],
        strokes: Count = 3,
        segments: Count = 4,
        length: float = 0.4,
        width: float = 0.2,
    ) -> None:
        if not (length > 0 and width > 0):
            raise UsageError(f"condition 'inpainting': length={length} and width={width} must be positive")
        self.kinds = Kinds(image=shape[0], mask=True)
        self.strokes, self.segments, self.length, self.width = strokes, segments, length, width

    def mask(self, noise: NoiseStreams, height: int, width: int, device: torch.device) -> Tensor:
        """Draw the masks of known pixels, (B, 1, H, W) float: 1 known, 0 in a hole."""
        side = min(height, width)
        rows = torch.arange(height, dtype=torch.float64, device=device)[None, :, None] + 0.5
        columns = torch.arange(width, dtype=torch.float64, device=device)[None, None, :] + 0.5
        hole = torch.zeros(len(noise), height, width, dtype=torch.bool, device=device)

        def draw() -> Tensor:
            return noise.uniform().to(device)[:, None, None]

        for _ in range(self.strokes):
            y, x, angle = height * draw(), width * draw(), 2 * math.pi * draw()
            radius = 0.5 * side * self.width * (0.5 + 0.5 * draw())
            for _ in range(self.segments):
                angle = angle + math.pi * (draw() - 0.5)
                reach = side * self.length * (0.25 + 0.75 * draw())
                step_y, step_x = reach * angle.sin(), reach * angle.cos()
                # Distance of each pixel's centre to the segment from (y, x) to (y, x) + step.
                along = (((rows - y) * step_y + (columns - x) * step_x) / reach.square()).clamp(0, 1)
                distance = (rows - y - along * step_y).square() + (columns - x - along * step_x).square()
                hole |= distance <= radius.square()
                y, x = (y + step_y).clamp(0, height), (x + step_x).clamp(0, width)
        return (~hole)[:, None].float()

    @override
    def degrade(self, images: Tensor, noise: NoiseStreams) -> Condition:
        mask = self.mask(noise, images.shape[2], images.shape[3], images.device)
        return Condition(image=images * mask.to(images), mask=mask)

    @override
    def baseline(self, condition: Condition) -> Tensor | None:
        """Return the image with the mean of its known pixels in the holes."""
        assert condition.image is not None
        assert condition.mask is not None
        known = condition.mask.sum((2, 3), keepdim=True).clamp_min(1)
        mean = condition.image.sum((2, 3), keepdim=True) / known
        return torch.where(condition.mask > 0, condition.image, mean)
