"""LPIPS as a part of a loss: torchmetrics' network on VGG-16 features, frozen."""

from urllib.error import URLError

from torch import nn

from diffaccel.errors import UsageError
from diffaccel.parts.optional import extra


def build_lpips() -> nn.Module:
    """Build the distance of images in [-1, 1], (B, 3, H, W) each -> (B, 1, 1, 1), with gradients to its inputs only.

    It stays in evaluation mode whatever ``train()`` says: there is dropout in it.

    Raises:
        UsageError: VGG's weights are neither in torchvision's cache nor to be had, or torchvision is not installed.

    References:
        The Unreasonable Effectiveness of Deep Features (Zhang et al., 2018), https://arxiv.org/abs/1801.03924
    """
    with extra("vision", needed_by="method.perceptual_weight"):
        import torchvision  # noqa: F401 (torchmetrics imports it)
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg", reduction="none")
    except (URLError, OSError) as error:
        raise UsageError(
            f"method.perceptual_weight needs torchvision's VGG-16 weights, which can't be fetched ({error}): put them "
            "into torch.hub's folder of checkpoints, or set method.perceptual_weight=0"
        ) from None
    return metric.net.requires_grad_(False)
