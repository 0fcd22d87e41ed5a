"""Embeddings of large vision transformers: DINOv2 for ``fd_dinov2``, and CLIP for ``cmmd``.

Weights come from a local file or folder, or from the address where their authors publish them. The hash of the file is
part of every point, because names do not determine the weights. Files of torch.save are read without running code.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from diffaccel.errors import UsageError
from diffaccel.features.extractors import EXTRACTORS, Extractor, in_colour
from diffaccel.nn.vit import CLIP, DINOV2, Variant, VisionTransformer, resample_positions
from diffaccel.weights import check_finite, file_sha256, read_weights
from diffaccel.weights.torchfile import Stored, read_torch

Names = Mapping[str, str]
"""Pattern of a tensor's name in a file -> its name in :class:`VisionTransformer`."""

WEIGHTS = r"\.(weight|bias)"
DINOV2_HUB: Names = {
    "cls_token": "cls",
    "pos_embed": "positions",
    rf"patch_embed\.proj{WEIGHTS}": r"patches.\1",
    rf"blocks\.(\d+)\.norm([12]){WEIGHTS}": r"layers.\1.norm_\2.\3",
    rf"blocks\.(\d+)\.attn\.qkv{WEIGHTS}": r"layers.\1.qkv.\2",
    rf"blocks\.(\d+)\.attn\.proj{WEIGHTS}": r"layers.\1.out.\2",
    rf"blocks\.(\d+)\.mlp\.fc1{WEIGHTS}": r"layers.\1.into.\2",
    rf"blocks\.(\d+)\.mlp\.fc2{WEIGHTS}": r"layers.\1.back.\2",
    r"blocks\.(\d+)\.ls([12])\.gamma": r"layers.\1.scale_\2",
    rf"norm{WEIGHTS}": r"norm.\1",
}
DINOV2_TRANSFORMERS: Names = {
    r"embeddings\.cls_token": "cls",
    r"embeddings\.position_embeddings": "positions",
    rf"embeddings\.patch_embeddings\.projection{WEIGHTS}": r"patches.\1",
    rf"encoder\.layer\.(\d+)\.norm([12]){WEIGHTS}": r"layers.\1.norm_\2.\3",
    rf"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value){WEIGHTS}": r"layers.\1.\2.\3",
    rf"encoder\.layer\.(\d+)\.attention\.output\.dense{WEIGHTS}": r"layers.\1.out.\2",
    rf"encoder\.layer\.(\d+)\.mlp\.fc1{WEIGHTS}": r"layers.\1.into.\2",
    rf"encoder\.layer\.(\d+)\.mlp\.fc2{WEIGHTS}": r"layers.\1.back.\2",
    r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1": r"layers.\1.scale_\2",
    rf"layernorm{WEIGHTS}": r"norm.\1",
}
CLIP_TRANSFORMERS: Names = {
    r"vision_model\.embeddings\.class_embedding": "cls",
    r"vision_model\.embeddings\.position_embedding\.weight": "positions",
    r"vision_model\.embeddings\.patch_embedding\.weight": "patches.weight",
    rf"vision_model\.pre_layrnorm{WEIGHTS}": r"before.\1",  # spelled so in the published files
    rf"vision_model\.encoder\.layers\.(\d+)\.layer_norm([12]){WEIGHTS}": r"layers.\1.norm_\2.\3",
    rf"vision_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj{WEIGHTS}": r"layers.\1.query.\2",
    rf"vision_model\.encoder\.layers\.(\d+)\.self_attn\.k_proj{WEIGHTS}": r"layers.\1.key.\2",
    rf"vision_model\.encoder\.layers\.(\d+)\.self_attn\.v_proj{WEIGHTS}": r"layers.\1.value.\2",
    rf"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj{WEIGHTS}": r"layers.\1.out.\2",
    rf"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc1{WEIGHTS}": r"layers.\1.into.\2",
    rf"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc2{WEIGHTS}": r"layers.\1.back.\2",
    rf"vision_model\.post_layernorm{WEIGHTS}": r"norm.\1",
    r"visual_projection\.weight": "project.weight",
}


class Embedding(Extractor):
    """Class token of a vision transformer, of images resized as PIL resizes them.

    Args:
        path: Weights file, or folder of the library transformers that contains one; by default the file in torch.hub's
            cache, which is downloaded if it is missing.

    Raises:
        UsageError: The file is missing and can't be downloaded, is damaged, contains code, or is of another network.
    """

    kind: ClassVar[str]
    variant: ClassVar[Variant]
    known_names: ClassVar[tuple[Names, ...]]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]

    def __init__(self, path: Path | None, url: str, file: str) -> None:
        super().__init__()
        found = weights_file(Path(path)) if path else downloaded(self.kind, url, file)
        self.network = self.build(found)
        self.name, self.dim, self.sha256 = self.named(self.network), self.network.dim, file_sha256(found)
        for name, values in (("shift", self.mean), ("scale", self.std)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None], persistent=False)

    def build(self, path: Path) -> VisionTransformer:
        """Build the network of a weights file, whose tensors determine its size.

        Raises:
            UsageError: The file contains another network.
        """
        try:
            tensors = merged(self.read(path))
            patch, layers = tensors["patches.weight"].shape[-1], 1 + max(_layer(name) for name in tensors)
            if (side := self.side(tensors["positions"], patch)) ** 2 + 1 != len(tensors["positions"]):
                tensors["positions"] = resample_positions(tensors["positions"], side)
            dim = len(tensors["project.weight"]) if "project.weight" in tensors else None
            with torch.device("meta"):
                network = VisionTransformer(self.variant, len(tensors["cls"]), layers, patch, side, dim)
            network.load_state_dict(tensors, assign=True)
        except UsageError:  # a ValueError, too
            raise
        except (LookupError, TypeError, ArithmeticError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"extractor {self.kind!r}: {path} holds no such network ({reason:.150}): set extractor.path= to the "
                "published weights"
            ) from None
        return network.requires_grad_(False).eval()

    def read(self, path: Path) -> dict[str, Tensor]:
        """Read the tensors that the network consists of, float32, under its names.

        Raises:
            UsageError: The file is damaged or contains code, or a value is not finite.
        """
        stored: Mapping[str, Tensor | Stored]
        stored = read_weights(path)[0] if path.suffix == ".safetensors" else read_torch(path)
        if not isinstance(stored, Mapping):
            raise ValueError("its content is not a mapping of names to tensors")
        for names in self.known_names:
            renamed = {_renamed(str(name), names): tensor for name, tensor in stored.items()}
            renamed.pop("", None)
            if "cls" in renamed:
                tensors = {name: t.load() if isinstance(t, Stored) else t for name, t in renamed.items()}
                check_finite(tensors, f"weights {path}", "get the file anew")
                tensors = {name: tensor.float() for name, tensor in tensors.items()}
                return tensors | {name: tensors[name].reshape(-1, tensors[name].shape[-1]) for name in ("positions",)}
        raise ValueError("it has no class token")

    @abstractmethod
    def side(self, positions: Tensor, patch: int) -> int:
        """Return the number of patches along each side of a resized image."""

    @abstractmethod
    def named(self, network: VisionTransformer) -> str:
        """Return the name of the extractor; only the network of the published metric has the name of that metric."""

    def prepared(self, images: Tensor) -> Tensor:
        """Resize and normalise images, (N, 1 or 3, H, W) uint8 -> (N, 3, h, w) float32."""
        size = self.network.side * self.network.patch
        return (resized(in_colour(images, self.name), size) - self.shift) / self.scale

    @override
    def features(self, images: Tensor) -> Tensor:
        """Extract the class token, (N, C, H, W) -> (N, dim)."""
        return self.network(self.prepared(images))

    shift: Tensor
    scale: Tensor


@EXTRACTORS.register("dinov2")
class DINOv2(Embedding):
    """Class token of DINOv2 at 224 pixels; with ViT-L/14, whose key is ``fd_dinov2``, (N, 1024).

    Images are resized to 224 x 224 by PIL's bicubic interpolation and normalised by the moments of ImageNet, as in
    dgm-eval, which EDM2 follows. Files of the authors and of the library transformers are read.

    Args:
        size: Network to download without ``path``: ViT-S/14, ViT-B/14 or ViT-L/14.

    References:
        Exposing flaws of generative model evaluation metrics (Stein et al., 2023), https://arxiv.org/abs/2306.04675,
        https://github.com/layer6ai-labs/dgm-eval
        Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2024),
        https://arxiv.org/abs/2312.02696, https://github.com/NVlabs/edm2
    """

    kind, variant, known_names = "dinov2", DINOV2, (DINOV2_HUB, DINOV2_TRANSFORMERS)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, path: Path | None = None, size: Literal["small", "base", "large"] = "large") -> None:
        model = f"dinov2_vit{size[0]}14"
        url = f"https://dl.fbaipublicfiles.com/dinov2/{model}/{model}_pretrain.pth"
        super().__init__(path, url, f"{model}_pretrain.pth")

    @override
    def side(self, positions: Tensor, patch: int) -> int:
        return 224 // patch

    @override
    def named(self, network: VisionTransformer) -> str:
        return self.kind if network.dim == 1024 else f"{self.kind}_{network.dim}"


@EXTRACTORS.register("clip")
class CLIPImages(Embedding):
    """Unit-norm image embedding of CLIP; with ViT-L/14 at 336 pixels, (N, 768), the one of the metric ``cmmd``.

    Images are cropped to squares, resized by PIL's bicubic interpolation to the resolution of the network, and
    normalised as for CLIP. Files of the library transformers are read.

    References:
        Rethinking FID: Towards a Better Evaluation Metric for Image Generation (Jayasumana et al., 2024),
        https://arxiv.org/abs/2401.09603, https://github.com/google-research/google-research/tree/master/cmmd
    """

    kind, variant, known_names = "clip", CLIP, (CLIP_TRANSFORMERS,)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, path: Path | None = None) -> None:
        repository = "openai/clip-vit-large-patch14-336"
        url = f"https://huggingface.co/{repository}/resolve/main/pytorch_model.bin"
        super().__init__(path, url, f"{repository.partition('/')[2]}.bin")

    @override
    def side(self, positions: Tensor, patch: int) -> int:
        return round((len(positions) - 1) ** 0.5)

    @override
    def named(self, network: VisionTransformer) -> str:
        own = (network.dim, network.patch, network.side * network.patch)
        return self.kind if own == (768, 14, 336) else f"{self.kind}_{own[0]}_{own[1]}_{own[2]}"

    @override
    def features(self, images: Tensor) -> Tensor:
        """Extract embeddings, (N, C, H, W) -> (N, dim)."""
        height, width = images.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return F.normalize(super().features(images[..., top : top + side, left : left + side]))


def _renamed(name: str, names: Names) -> str:
    """Name of a tensor in the network; empty if the network has no such tensor."""
    for pattern, replacement in names.items():
        if found := re.fullmatch(pattern, name):
            return found.expand(replacement)
    return ""


def _layer(name: str) -> int:
    """Index of the layer of a tensor; -1 for other tensors."""
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate queries, keys and values, which some files hold apart, and flatten the class token."""
    found = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.(query|key|value)\.", name)}
    for name in tensors:
        if ".query." in name:
            apart = [tensors[name.replace(".query.", f".{one}.")] for one in ("query", "key", "value")]
            found[name.replace(".query.", ".qkv.")] = torch.cat(apart)
    return {**found, "cls": found["cls"].flatten()}


def resized(images: Tensor, size: int) -> Tensor:
    """Resize images by PIL's bicubic interpolation, up to its rounding, (N, C, H, W) uint8 -> (N, C, size, size).

    The result is float32 of whole numbers from 0 to 255, as in an image file.
    """
    found = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return found.round().clamp(0, 255)


def weights_file(path: Path) -> Path:
    """Return a weights file, or the one in a folder of the library transformers.

    Raises:
        UsageError: There is no such file.
    """
    files = [path / name for name in ("model.safetensors", "pytorch_model.bin")] if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            return file
    raise UsageError(
        f"there are no weights at {' or '.join(map(str, files))}: set extractor.path= to a file, or leave it out"
    )


def downloaded(name: str, url: str, file: str) -> Path:
    """Return a file in torch.hub's cache, downloaded if it is missing.

    Args:
        name: Name of the extractor, for the message.
        url: Address.
        file: Name of the file in the cache.

    Raises:
        UsageError: The file is missing and can't be downloaded.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except (OSError, RuntimeError) as error:  # no network or no room
        raise UsageError(
            f"extractor {name!r}: there are no weights at {path}, and downloading them failed ({error}): put {url} "
            "there, or set extractor.path= to the file"
        ) from None
    return path
