"""DINOv2 and CLIP on small networks, against the code of DINOv2's authors and the library transformers.

The golden values are means over eight groups of features. They were computed by those two codebases on the state
dictionaries of transformers_weights.py and on the resized images of the extractors, which PIL's are compared with here.
"""

import hashlib
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from judged import golden_images
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers_weights import clip_transformers, dinov2_hub, dinov2_transformers

from diffaccel.errors import UsageError
from diffaccel.features import embeddings
from diffaccel.features.embeddings import CLIPImages, DINOv2, resized
from diffaccel.features.extractors import EXTRACTORS
from diffaccel.nn.vit import resample_positions

GOLDEN = {
    "hub": [
        [0.0011, 0.2337, 0.1618, 0.5407, 0.0172, -0.4293, -0.621, 0.2221],
        [-0.1497, -0.0174, -0.0562, 0.1059, 0.3473, -0.2293, -0.0533, 0.0488],
        [0.4513, 0.3061, 0.6225, -0.1096, -0.2298, -0.4755, 0.0642, -0.6345],
    ],
    "transformers": [
        [-0.2924, -0.0933, 0.3569, -0.1735, 0.2667, 0.335, -0.475, -0.0691],
        [0.2058, -0.3979, 0.2104, -0.2287, 0.2626, 0.1023, 0.092, -0.3334],
        [0.0014, -0.1663, 0.1897, -0.2431, 0.2641, 0.0919, -0.0492, -0.224],
    ],
    "clip": [
        [0.0702, -0.0305, 0.0429, -0.1032, 0.0514, -0.0014, 0.0184, -0.0707],
        [0.0368, -0.0508, 0.0131, -0.0792, 0.0635, -0.042, 0.0029, -0.0718],
        [0.0344, -0.0433, 0.0419, -0.0721, 0.0491, -0.0151, -0.0365, -0.0802],
    ],
}


def save(state: dict[str, Tensor], path: Path) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("golden", "kind", "state", "file"),
    [
        ("hub", "dinov2", dinov2_hub, "hub.pth"),
        ("transformers", "dinov2", dinov2_transformers, "model.safetensors"),
        ("transformers", "dinov2", dinov2_transformers, "pytorch_model.bin"),
        ("clip", "clip", clip_transformers, "model.safetensors"),
        ("clip", "clip", clip_transformers, "pytorch_model.bin"),
    ],
)
def test_features_are_those_of_the_published_code(golden, kind, state, file, tmp_path):
    path = save(state(), tmp_path / file)
    extractor = EXTRACTORS.build({"name": kind, "path": str(path)})
    found = extractor(golden_images())
    expected = torch.tensor(GOLDEN[golden]).double()
    torch.testing.assert_close(found.reshape(3, 8, -1).mean(2), expected, rtol=0, atol=2e-4)
    assert extractor.sha256 == extractor.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    if file != "hub.pth":
        assert torch.equal(EXTRACTORS.build({"name": kind, "path": str(tmp_path)})(golden_images()), found), "a folder"


@pytest.mark.parametrize("size", [32, 224, 20])
def test_images_are_resized_as_by_pil(size):
    arrays = golden_images().permute(0, 2, 3, 1).numpy()
    pil = [np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC)) for array in arrays]
    found = resized(golden_images(), size)
    assert (found - torch.from_numpy(np.stack(pil)).permute(0, 3, 1, 2)).abs().max() <= 1
    assert torch.equal(found, found.round()) and found.min() >= 0 and found.max() <= 255


def test_normalisation_is_that_of_each_network(tmp_path):
    """Black and white images, whose normalised values are known."""
    black_white = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    dinov2, clip = DINOv2(save(dinov2_hub(), tmp_path / "d.pth")), CLIPImages(save(clip_transformers(), tmp_path / "c"))
    for extractor, side, mean, std in (
        (dinov2, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        (clip, 32, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    ):
        made = extractor.prepared(black_white)
        assert made.shape == (2, 3, side, side)
        expected = (torch.tensor([[0.0], [1.0]]) - torch.tensor(mean)) / torch.tensor(std)
        torch.testing.assert_close(made.mean((2, 3)), expected, rtol=1e-5, atol=1e-6)


def test_clips_embeddings_have_unit_norm_and_are_of_the_central_square(tmp_path):
    extractor = CLIPImages(save(clip_transformers(), tmp_path / "clip.bin"))
    images = golden_images()
    found = extractor(images)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3).double(), rtol=0, atol=1e-6)
    wide = torch.cat([255 * torch.ones(3, 3, 32, 6, dtype=torch.uint8), images, images[..., :6]], dim=3)
    assert torch.equal(extractor(wide), found) and torch.equal(extractor(wide.mT), extractor(images.mT))


def test_names_of_metrics_are_those_of_the_published_networks(tmp_path):
    small = DINOv2(save(dinov2_hub(), tmp_path / "d.pth")), CLIPImages(save(clip_transformers(), tmp_path / "c.bin"))
    assert [one.metric_name for one in small] == ["fd_dinov2_64", "fd_clip_48_8_32"]
    large, network = small[0], small[0].network
    network.dim = 1024
    assert large.named(network) == "dinov2"
    network.dim, network.patch, network.side = 768, 14, 24
    assert small[1].named(network) == "clip" and large.named(network) == "dinov2_768"


def test_positions_of_the_trained_resolution_are_left_alone():
    positions = torch.randn(1 + 16**2, 8)
    assert resample_positions(positions, 16) is positions
    constant = resample_positions(torch.ones(1 + 9, 8), 16)
    torch.testing.assert_close(constant, torch.ones(1 + 16**2, 8))


def spoiled(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    norm = next(name for name in state if name.endswith("norm1.weight") or name.endswith("layer_norm1.weight"))
    changed = {
        "missing": {name: tensor for name, tensor in state.items() if name != norm},
        "shape": {**state, norm: torch.zeros(3)},
        "nan": {**state, norm: torch.full_like(state[norm], torch.nan)},
        "another": {"weight": torch.zeros(3)},
    }
    return changed[how]


@pytest.mark.parametrize("how", ["missing", "shape", "nan", "another"])
@pytest.mark.parametrize(("kind", "state"), [("dinov2", dinov2_hub), ("clip", clip_transformers)])
def test_files_of_other_networks_are_one_line(kind, state, how, tmp_path):
    path = save(spoiled(state(), how), tmp_path / "weights.pth")
    with pytest.raises(UsageError, match="weights.pth") as caught:
        EXTRACTORS.build({"name": kind, "path": str(path)})
    assert "\n" not in str(caught.value) and ("path=" in str(caught.value) or how == "nan")


def test_missing_and_damaged_files(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UsageError, match="there are no weights at"):
            DINOv2(path)
    (tmp_path / "half.pth").write_bytes(save(dinov2_hub(), tmp_path / "whole.pth").read_bytes()[:5000])
    torch.save({"cls_token": print}, tmp_path / "code.pth")
    for file in ("half.pth", "code.pth"):
        with pytest.raises(UsageError, match=file):
            DINOv2(tmp_path / file)


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_without_a_file_the_published_one_is_downloaded_once(kind, tmp_path, monkeypatch):
    asked = []

    def download(url: str, file: str, progress: bool) -> None:
        asked.append(url)
        save(dinov2_hub() if kind == "dinov2" else clip_transformers(), Path(file))

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        EXTRACTORS.build(kind)
    assert len(asked) == 1 and ("vitl14" in asked[0] or "clip-vit-large-patch14-336" in asked[0])


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_without_network_the_message_says_where_the_file_goes(kind, tmp_path, monkeypatch):
    def offline(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(embeddings.torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UsageError, match=f"no weights at {tmp_path}/checkpoints/.*no network.*put https://.* there"):
        EXTRACTORS.build(kind)
