"""Latents of images of 64x64, overfitted from end to end in minutes: auto-encoder, DDM in its latents, decoding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffaccel.api import bench, fit, sample
from diffaccel.report import read_points
from diffaccel.weights import open_weights, save_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

COUNT = 6
"""Number of training images."""
EXPERIMENT = """
data: {name: npz, path: train.npz, label: photographs}
shape: [3, 64, 64]
latents: {name: kl, widths: [8, 16, 32], blocks: 1, channels: 4, groups: 4, attention: false}
network: {name: unet, widths: [32, 64], blocks: 1, attention: [1], embedding: 64}
extractor: {name: identity, dim: 12288}
threads: 1
logger: none
"""
AUTOENCODER = """
base: base.yaml
method: {name: autoencoder, critic_weight: 0.05, critic_since: 2500, critic_widths: [16, 32]}
training: {images: 3000, batch_size: 6, lr: 0.004, warmup: 150, decay: 0.5, ema_half_life: 300}
"""
DDM = """
base: base.yaml
latents: {checkpoint: autoencoder/autoencoder.safetensors, cache: cache}
method: ddm
process: {name: decoupled, clock: t^2}
denoiser: {name: decoupled, sigma_data: 1.0}
levels: {name: uniform}
prior: {name: gaussian}
solver: {name: bridge, eta: 0.0}
training: {images: 12000, batch_size: 24, lr: 0.002, warmup: 1000, decay: 0.5, ema_half_life: 1000}
"""


def photographs() -> np.ndarray[Any, Any]:
    """Squares of scikit-learn's two photographs, (COUNT, 64, 64, 3) uint8."""
    from sklearn.datasets import load_sample_image

    found = []
    for name in ("china.jpg", "flower.jpg"):
        image = Image.fromarray(load_sample_image(name))
        found += [image.crop((x, 0, x + 427, 427)).resize((64, 64), Image.Resampling.LANCZOS) for x in (0, 100, 200)]
    return np.stack([np.asarray(image) for image in found])


def to_nearest(images: Tensor, real: Tensor) -> float:
    """Mean distance of images to their nearest training images: root of the mean squared error, of 255."""
    return torch.cdist(images.flatten(1).double(), real.flatten(1).double()).min(1).values.mean().item() / 12288**0.5


def test_a_pipeline_in_latents_reproduces_its_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    np.savez("train.npz", images=photographs())
    for name, text in (("base", EXPERIMENT), ("autoencoder", AUTOENCODER), ("ddm", DDM)):
        Path(f"{name}.yaml").write_text(text)
    fit("autoencoder.yaml", out="autoencoder")
    header = open_weights("autoencoder/autoencoder.safetensors").header
    assert header["psnr"] > 22, "27.0 was measured; a grey image is at 11 dB"

    fit("ddm.yaml", out="ddm")
    weights = Path("ddm/ema.safetensors")
    keys: dict[str, Any] = {"n": 32, "nfe": 20, "checkpoint": weights}
    (folder,) = sample("ddm.yaml", **keys, out="samples", format="npz")
    real = torch.from_numpy(photographs())
    images = torch.from_numpy(np.load(folder / "images.npz")["images"])
    reached = to_nearest(images, real)

    opened = open_weights(weights)
    network = {name: 0.1 * torch.randn_like(tensor) for name, tensor in opened.read().items()}
    save_weights(Path("untrained.safetensors"), network, opened.header)
    (folder,) = sample("ddm.yaml", **{**keys, "checkpoint": "untrained.safetensors"}, out="untrained", format="npz")
    untrained = to_nearest(torch.from_numpy(np.load(folder / "images.npz")["images"]), real)
    assert reached < 0.4 * untrained and reached < 30, "23 was measured, 84 with random weights"
    nearest = torch.cdist(images.flatten(1).double(), real.flatten(1).double()).argmin(1)
    assert len(nearest.unique()) >= 4, "samples are of several training images"

    bench("ddm.yaml", **keys, out="bench", reference=reference())
    point = read_points(Path("bench/points.jsonl"))[-1]
    assert point["nfe"] <= 20 and point["gflops_decoding"] > 0 and point["seconds_decoding"] > 0


def reference() -> str:
    from diffaccel.api import reference as compute

    compute("ddm.yaml", out="reference")
    return "reference/reference.npz"
