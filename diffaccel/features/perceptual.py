"""LPIPS as a loss: torchmetrics' frozen network on VGG-16 features."""

from urllib.error import URLError

from torch import nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from diffaccel.errors import UsageError


def build_lpips() -> nn.Module:
    """Build the LPIPS distance of two batches of images in [-1, 1], (B, 3, H, W) each -> (B, 1, 1, 1).

    The module has gradients with respect to its inputs only. It remains in evaluation mode after ``train()``, because
    it contains dropout.

    Raises:
        UsageError: VGG's weights are not in torchvision's cache and can't be downloaded.

    References:
        The Unreasonable Effectiveness of Deep Features (Zhang et al., 2018), https://arxiv.org/abs/1801.03924
    """
    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg", reduction="none")
    except (URLError, OSError) as error:
        raise UsageError(
            f"method.perceptual_weight needs torchvision's VGG-16 weights, which can't be downloaded ({error}): put "
            "them into torch.hub's folder of checkpoints, or set method.perceptual_weight=0"
        ) from None
    return metric.net.requires_grad_(False)
