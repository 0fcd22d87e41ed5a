"""Feature extractors for Frechet and kernel distances.

Extractors map images (N, C, H, W) uint8 to features (N, dim) float64. In float32, rounding of the mean alone would
change the fifth digit of a small FD. An extractor is identified by the hash of its weights, on which scores depend. It
must not be part of a generator's training: a loss on its features would bias the score.
"""

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from diffaccel.errors import UsageError
from diffaccel.features.names import distance_key
from diffaccel.parts.registry import Registry
from diffaccel.parts.schema import is_path
from diffaccel.weights import file_sha256, open_weights, save_weights

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Extractor(nn.Module, ABC):
    """Frozen map from images to features, always in eval mode, without gradients and without autocast.

    Attributes:
        name: Name in tables and metric keys.
        sha256: Hash of all that determines the features: of the weights file, if nothing else does, and of no bytes for
            an extractor without weights. ``EXTRACTORS.build`` adds the options of extractors of other packages.
        dim: Number of features.
        of_images: Whether it reads uint8 images only, which JPEG can compress.
    """

    name: str
    sha256: str
    dim: int
    of_images: ClassVar[bool] = True
    _weights_sha256: str | None = None

    @property
    def metric_name(self) -> str:
        """Key of the Frechet distance in these features."""
        return distance_key(self.name)

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights alone, equal for all extractors on them; a loss that uses them is recorded by it."""
        return self._weights_sha256 or self.sha256

    @property
    def device(self) -> torch.device:
        """Device of the weights; the CPU for an extractor without weights."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def train(self, mode: bool = True) -> "Extractor":
        """Stay in eval mode, so that a parent module's ``train`` has no effect."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Extract features, (N, C, H, W) uint8 -> (N, dim) float64.

        Raises:
            UsageError: The images have another dtype or shape than the extractor supports.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self.features(images).double()

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Extract features, (N, C, H, W) uint8 -> (N, dim) in the precision of the weights."""


class Extractors(Registry[Extractor]):
    """Extractors by name, of which those of other packages are identified by their options too."""

    @override
    def build(self, node: Mapping[str, Any] | str, **context: Any) -> Extractor:
        """Build an extractor; see :meth:`Registry.build`.

        The hash of an extractor of another package may be that of its weights alone, and scores with other options
        would be taken for its own. Options that differ from their defaults are therefore part of the hash, except for
        paths: the hash of the extractor covers the content of files.
        """
        extractor, whole = super().build(node, **context), self.normal(node)
        if not self[whole["name"]].__module__.startswith("diffaccel.") and (options := self._options(whole)):
            extractor._weights_sha256 = extractor.weights_sha256
            described = f"{extractor.sha256} {json.dumps(options, sort_keys=True, default=str)}"
            extractor.sha256 = hashlib.sha256(described.encode()).hexdigest()
        return extractor

    def _options(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of a node that differ from their defaults, without paths; numbers as floats, as 2 may be 2.0."""
        name, defaults = node["name"], self._parameters(node["name"])
        return {
            key: float(value) if isinstance(value, int) else value
            for key, value in node.items()
            if key != "name" and value != defaults[key].default and not is_path(self.annotation(key, name))
        }


EXTRACTORS: Registry[Extractor] = Extractors(
    "extractor",
    builtins=["diffaccel.features.extractors", "diffaccel.features.packaged", "diffaccel.features.embeddings"],
)
EXTRACTORS.base(Extractor)


@EXTRACTORS.register("identity")
class Identity(Extractor):
    """Extractor without weights whose features are the flattened values, for toy points (float) and tiny images.

    Args:
        dim: Number of values per image, C H W.
    """

    of_images = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.name, self.dim, self.sha256 = "identity", dim, hashlib.sha256().hexdigest()

    @override
    def features(self, images: Tensor) -> Tensor:
        """Flatten (N, C, H, W) or (N, dim), uint8 or float."""
        flat = images.flatten(1)
        if flat.shape[1] != self.dim:
            raise UsageError(f"extractor 'identity' has dim={self.dim}, an image has {flat.shape[1]} values: set dim")
        return flat


@EXTRACTORS.register("inception")
class Inception(Extractor):
    """Inception-v3 pool3 features, as computed by torch-fidelity with TensorFlow's resize; the distance is ``fid``.

    Args:
        path: Weights file; by default the one in torch-fidelity's cache, which is downloaded if it is missing.

    Raises:
        UsageError: The file is missing and can't be downloaded, or its SHA-256 is not that of the published weights.

    References:
        High-fidelity performance metrics for generative models in PyTorch (Obukhov et al., 2020),
        https://github.com/toshas/torch-fidelity
    """

    dim = 2048

    def __init__(self, path: Path | None = None) -> None:
        # imported here, because it takes seconds
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        self.name, self.sha256 = "inception", INCEPTION_SHA256
        # torch-fidelity unpickles its input, so it must be the same bytes whose hash has been checked.
        weights = io.BytesIO(_inception_weights(path))
        self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights)

    @property
    @override
    def metric_name(self) -> str:
        """``fid``."""
        return distance_key("inception")

    @override
    def features(self, images: Tensor) -> Tensor:
        """Extract pool3 features; grey images are repeated to three channels."""
        return self.network(in_colour(images, self.name))[0]


def _inception_weights(path: Path | None) -> bytes:
    """Read the weights file and check its SHA-256."""
    file = Path(path) if path else Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    if path is None and not file.is_file():
        _download_inception(file)
    if not file.is_file():
        raise UsageError(f"no Inception weights at {file}: put {INCEPTION_URL} there")
    content = file.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != INCEPTION_SHA256:
        raise UsageError(
            f"{file} has SHA-256 {digest[:12]}..., not {INCEPTION_SHA256[:12]}...: put {INCEPTION_URL} there"
        )
    return content


def _download_inception(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(file), hash_prefix=INCEPTION_SHA256, progress=False)
    except (OSError, RuntimeError) as error:  # no network or no room; a wrong hash
        raise UsageError(
            f"no Inception weights at {file}, and downloading them failed ({error}): put {INCEPTION_URL} there, "
            f"or score with another extractor"
        ) from None


def in_colour(images: Tensor, name: str) -> Tensor:
    """Repeat grey uint8 images to three channels, (N, 1 or 3, H, W) -> (N, 3, H, W).

    Args:
        images: Images.
        name: Name of the extractor, for the message.

    Raises:
        UsageError: The images have another dtype or shape.
    """
    check_images(images, name, channels=(1, 3))
    return repeat(images, "n 1 h w -> n three h w", three=3) if images.shape[1] == 1 else images


def check_images(images: Tensor, name: str, channels: Sequence[int]) -> None:
    """Check that images are uint8, (N, C, H, W), with a supported number of channels.

    Raises:
        UsageError: They are not.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in channels:
        raise UsageError(
            f"extractor {name!r} reads uint8 images (N, C, H, W) with C in {tuple(channels)}, not {images.dtype} "
            f"{tuple(images.shape)}: choose another extractor"
        )


class Block(nn.Module):
    """Residual block of two 3x3 convolutions with batch norm, optionally after average pooling that halves H and W."""

    def __init__(self, width_in: int, width: int, halve: bool) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()
        self.conv_1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(width_in, width, 1, bias=False) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, width_in, H, W) -> (N, width, H, W) or (N, width, H / 2, W / 2)."""
        x = self.pool(x)
        hidden = F.silu(self.norm_1(self.conv_1(x)))
        return F.silu(self.skip(x) + self.norm_2(self.conv_2(hidden)))


class SmallClassifier(nn.Module):
    """Residual classifier, with its spatially pooled last activations as features.

    The last activations are pooled before the linear head, as in Inception's pool3, so that features retain properties
    that are irrelevant for the classes but relevant for the quality of images.

    Args:
        channels: Image channels, 1 or 3.
        classes: Number of classes.
        dim: Number of features.
        widths: Channels of each stage. H and W are halved between stages, and must be at least 2^(stages - 1).
        blocks: Residual blocks per stage.
    """

    def __init__(
        self, channels: int, classes: int, dim: int = 64, widths: tuple[int, ...] = (32, 64), blocks: int = 1
    ) -> None:
        super().__init__()
        config = {"channels": channels, "classes": classes, "dim": dim, "widths": list(widths), "blocks": blocks}
        self.config: dict[str, Any] = config
        self.stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]))
        inputs = [widths[0], *widths[:-1]]
        self.stages = nn.Sequential(
            *(
                Block(width_in if block == 0 else width, width, halve=stage > 0 and block == 0)
                for stage, (width_in, width) in enumerate(zip(inputs, widths, strict=True))
                for block in range(blocks)
            )
        )
        self.last = nn.Sequential(nn.Conv2d(widths[-1], dim, 1, bias=False), nn.BatchNorm2d(dim))
        self.head = nn.Linear(dim, classes)

    def features(self, images: Tensor) -> Tensor:
        """Extract features of images in [-1, 1], (N, C, H, W) -> (N, dim)."""
        hidden = F.silu(self.last(self.stages(F.silu(self.stem(images)))))
        return reduce(hidden, "n dim h w -> n dim", "mean")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes for images in [-1, 1], (N, C, H, W) -> (N, classes)."""
        return self.head(self.features(images))


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


@EXTRACTORS.register("small")
class Small(Extractor):
    """Features of a small classifier.

    Args:
        path: Safetensors file of the classifier, written by :func:`save_classifier`; it contains the extractor's name.

    Raises:
        UsageError: The file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.network, self.metadata = load_classifier(path)
        self.network.requires_grad_(False).to(memory_format=torch.channels_last)  # faster convolutions
        self.name, self.dim = str(self.metadata["name"]), self.network.config["dim"]
        self.sha256 = file_sha256(Path(path))

    @override
    def features(self, images: Tensor) -> Tensor:
        """Extract the features of the penultimate layer."""
        check_images(images, self.name, channels=(self.network.config["channels"],))
        return self.network.features(to_unit(images))


def save_classifier(model: SmallClassifier, path: str | Path, name: str, data: str, accuracy: float, seed: int) -> None:
    """Write the weights of a classifier as float16, with JSON metadata.

    Args:
        model: Classifier.
        path: File to write; missing folders are created.
        name: Name in metric keys, ``fd_<name>``.
        data: Description of the training data.
        accuracy: Accuracy on the test split, in [0, 1].
        seed: Seed of the training.
    """
    description = {"kind": "extractor", **model.config, "name": name, "data": data, "accuracy": accuracy, "seed": seed}
    save_weights(Path(path), model.state_dict(), description, dtype=torch.float16)


def load_classifier(path: str | Path) -> tuple[SmallClassifier, dict[str, Any]]:
    """Read a file written by :func:`save_classifier`.

    Returns:
        The classifier, float32 and in eval mode, and the metadata.

    Raises:
        UsageError: The file is missing, truncated, of another kind, or contains values that are not finite.
    """
    weights = open_weights(path, "extractor.path").of("extractor")
    tensors, description = weights.read(), dict(weights.header)
    try:
        with torch.device("meta"):  # shapes first: a broken file must not make us allocate what it claims
            model = SmallClassifier(
                **{key: description[key] for key in ("channels", "classes", "dim", "widths", "blocks")}
            )
        model.load_state_dict(tensors, assign=True)
        description = {**description, "name": str(description["name"])}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} holds no extractor ({error!r:.100}): get it again, or fit it anew") from None
    return model.eval(), description
