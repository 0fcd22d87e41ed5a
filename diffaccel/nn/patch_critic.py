"""Critic of image patches, for the adversarial loss of an auto-encoder."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.errors import UsageError

SIZE, SLOPE = 4, 0.2
"""Size of the convolutions, and slope of the leaky ReLU below 0."""


class PatchCritic(nn.Module):
    """Convolutional critic with a logit for each patch of an image.

    Layers are 4x4 convolutions, of which all but the last two halve the resolution. pix2pix normalises over the batch;
    here a group is all channels of one image, so that logits depend neither on the batch nor on the number of ranks.

    Args:
        shape: Image shape (C, H, W).
        widths: Number of channels of each layer but the last.

    Raises:
        UsageError: The images are too small for the number of layers.

    References:
        Image-to-Image Translation with Conditional Adversarial Networks (Isola et al., 2017),
        https://arxiv.org/abs/1611.07004
    """

    def __init__(self, shape: tuple[int, int, int], widths: list[int]) -> None:
        super().__init__()
        depth, height, width = shape
        smallest = 2 ** (len(widths) - 1) * 3  # the last two layers shorten each side by one
        if min(height, width) < smallest:
            raise UsageError(
                f"method 'autoencoder': the critic's {len(widths)} layers require images of {smallest} pixels, not "
                f"{height}x{width}: set fewer method.critic_widths"
            )
        strides = [2] * (len(widths) - 1) + [1]
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise([depth, *widths])):
            layers.append(nn.Conv2d(before, after, SIZE, strides[number], padding=1))
            if number:
                layers.append(nn.GroupNorm(1, after))
            layers.append(nn.LeakyReLU(SLOPE))
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, SIZE, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, 1, h, w)."""
        return self.layers(images)


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """Hinge loss of a critic from its logits of real and made images, (B, ...) each -> (B,)."""
    return 0.5 * (F.relu(1 - real) + F.relu(1 + made)).flatten(1).mean(1)
