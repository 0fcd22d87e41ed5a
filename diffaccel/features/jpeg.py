"""JPEG compression of images, and extractors that compress images first."""

import hashlib
import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from typing_extensions import override

from diffaccel.errors import UsageError
from diffaccel.features.extractors import Extractor


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Compress and decompress images as JPEG files, with chroma subsampling by 2.

    Args:
        images: Images, (N, C, H, W) uint8, C = 1 or 3.
        quality: Quality of JPEG, 1 to 100.

    Returns:
        Images, (N, C, H, W) uint8.
    """

    def through(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    arrays = images.permute(0, 2, 3, 1).squeeze(-1).cpu().numpy()  # PIL reads grey images as (H, W)
    found = torch.from_numpy(np.stack([through(image) for image in arrays])).reshape(images.permute(0, 2, 3, 1).shape)
    return found.permute(0, 3, 1, 2).contiguous().to(images.device)


class AsJPEG(Extractor):
    """Extractor of features of JPEG-compressed images, to reproduce distances that were computed from JPEG files.

    The names of its metrics contain the quality (``fd_inception_jpeg75``), to distinguish them from distances of the
    uncompressed images. The reference statistics are those of ``extractor``, without compression.

    Args:
        extractor: Extractor to apply to the compressed images.
        quality: Quality of JPEG, 1 to 100; PIL's default is 75.

    Raises:
        UsageError: The quality is out of range, or the extractor is not of images.
    """

    def __init__(self, extractor: Extractor, quality: int) -> None:
        super().__init__()
        if not 1 <= quality <= 100 or not extractor.of_images:
            raise UsageError(
                f"jpeg={quality} with the extractor {extractor.name!r}: set jpeg to 1 to 100 and use an extractor of "
                "images, or set jpeg=null"
            )
        self.extractor, self.quality = extractor, quality
        self.name, self.dim = f"{extractor.name}_jpeg{quality}", extractor.dim
        self.sha256 = hashlib.sha256(f"{extractor.sha256} jpeg {quality}".encode()).hexdigest()

    @property
    @override
    def weights_sha256(self) -> str:
        return self.extractor.weights_sha256

    @override
    def features(self, images: Tensor) -> Tensor:
        """Extract features of the compressed images, (N, C, H, W) uint8 -> (N, dim)."""
        return self.extractor.features(jpeg(images, self.quality))
