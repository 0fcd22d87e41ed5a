"""Images as JPEG would keep them, and scores of such images, under their own name."""

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
    """Write and read images (N, C, H, W) uint8, C = 1 or 3, as JPEG of a quality of 1 to 100, colours at half size."""

    def through(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    arrays = images.permute(0, 2, 3, 1).squeeze(-1).cpu().numpy()  # grey ones are (H, W) to PIL
    found = torch.from_numpy(np.stack([through(image) for image in arrays])).reshape(images.permute(0, 2, 3, 1).shape)
    return found.permute(0, 3, 1, 2).contiguous().to(images.device)


class AsJPEG(Extractor):
    """An extractor that sees JPEGs of the images, to reproduce distances that were computed from such files.

    Its metrics bear the quality in their names (``fd_inception_jpeg75``), so that none is taken for a distance of the
    images themselves. The statistics that it is compared with stay those of ``extractor``.

    Args:
        extractor: Sees the files.
        quality: Of JPEG, 1 to 100; PIL's own is 75.

    Raises:
        UsageError: No such quality, or an extractor of points.
    """

    def __init__(self, extractor: Extractor, quality: int) -> None:
        super().__init__()
        if not 1 <= quality <= 100 or extractor.name == "identity":
            raise UsageError(
                f"jpeg={quality}: the quality of JPEG is 1 to 100, and extractor 'identity' reads no files: set "
                "jpeg=null"
            )
        self.extractor, self.quality = extractor, quality
        self.name, self.dim = f"{extractor.name}_jpeg{quality}", extractor.dim
        self.sha256 = hashlib.sha256(f"{extractor.sha256} jpeg {quality}".encode()).hexdigest()

    @override
    def features(self, images: Tensor) -> Tensor:
        """Extract features of the files, (N, C, H, W) uint8 -> (N, dim)."""
        return self.extractor.features(jpeg(images, self.quality))
