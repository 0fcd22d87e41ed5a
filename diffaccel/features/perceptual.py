"""LPIPS as a loss: torchmetrics' frozen network on VGG-16 features."""

from urllib.error import URLError

from torch import nn

from diffaccel.errors import UsageError
from diffaccel.parts.optional import extra

VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
"""Hash of torchvision's weights file, vgg16-397923af.pth."""


def build_lpips(key: str = "method.perceptual_weight", off: str = "0") -> nn.Module:
    """Build the LPIPS distance of two batches of images in [-1, 1], (B, 3, H, W) each -> (B, 1, 1, 1).

    The module has gradients with respect to its inputs only. It remains in evaluation mode after ``train()``, because
    it contains dropout. Its attribute ``weights_sha256`` is recorded with the trained weights, see
    :mod:`~diffaccel.features.independence`.

    Args:
        key: Key of the experiment that requires it, for messages.
        off: Value of the key without LPIPS.

    Raises:
        UsageError: VGG's weights are not in torchvision's cache and can't be downloaded, or torchvision is missing.

    References:
        The Unreasonable Effectiveness of Deep Features (Zhang et al., 2018), https://arxiv.org/abs/1801.03924
    """
    with extra("vision", needed_by=key):
        import torchvision  # noqa: F401 (torchmetrics imports it)
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg", reduction="none")
    except (URLError, OSError) as error:
        raise UsageError(
            f"{key} needs torchvision's VGG-16 weights, which can't be downloaded ({error}): put "
            f"them into torch.hub's folder of checkpoints, or set {key}={off}"
        ) from None
    network = metric.net.requires_grad_(False)
    network.weights_sha256 = VGG16_SHA256  # type: ignore[assignment]  # no tensor, but an attribute
    return network
