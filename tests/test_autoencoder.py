"""Training of an auto-encoder: its losses, the scale of its latents, resuming; and diffusers' auto-encoders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coders import KL, kl
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffaccel.api import fit
from diffaccel.collective import World
from diffaccel.config import load
from diffaccel.data import Batch, to_float
from diffaccel.data.module import DataModule
from diffaccel.errors import UsageError
from diffaccel.experiment.latents import build_latents
from diffaccel.latents import AUTOENCODERS, Latents, Moments
from diffaccel.nn.patch_critic import PatchCritic, hinge
from diffaccel.noise import NoiseStreams
from diffaccel.training.autoencoder import AutoEncoderTraining, divergence_from_normal, psnr
from diffaccel.training.plan import Training
from diffaccel.weights import assign_weights, open_weights

IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
BATCH = Batch(IMAGES, None, torch.arange(6))


def training(**keys: Any) -> AutoEncoderTraining:
    own: dict[str, Any] = {"critic_widths": [4, 8], **keys}
    return AutoEncoderTraining(kl().train(), Training(), seed=3, **own)


# Losses


def test_divergence_is_that_of_torch():
    mean, std = torch.randn(4, 3, 2, 2), torch.rand(4, 3, 2, 2) + 0.1
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), normal)
    torch.testing.assert_close(divergence_from_normal(Moments(mean, std)), expected.flatten(1).sum(1))


def test_psnr_of_a_known_error():
    """An error of 0.2 of a range of 2 is 20 dB; values out of range are clamped first."""
    images = torch.zeros(2, 1, 4, 4)
    torch.testing.assert_close(psnr(images + 0.2, images), torch.full((2,), 20.0))
    torch.testing.assert_close(psnr(images + 9.0, torch.full_like(images, 0.8)), torch.full((2,), 20.0))


def test_hinge_by_hand():
    real, made = torch.tensor([[0.5, 2.0], [-1.0, 1.0]]), torch.tensor([[-2.0, 0.0], [-0.5, 1.0]])
    torch.testing.assert_close(hinge(real, made), torch.tensor([0.5 * (0.25 + 0.5), 0.5 * (1.0 + 1.25)]))


def test_loss_without_critic_is_error_and_divergence():
    """With weights as in latent diffusion, whose sums are over the image."""
    module = training(critic_weight=0.0, kl_weight=0.01)
    loss = module.autoencoder_loss(BATCH, NoiseStreams(0, range(6)))
    posterior = module.network.encode(IMAGES)
    made = module.network.decode(posterior.draw(NoiseStreams(0, range(6)).normal(posterior.mean)))
    error = (made - IMAGES).abs().flatten(1).mean(1)
    torch.testing.assert_close(loss, error + 0.01 * divergence_from_normal(posterior) / 64)
    assert [phase.name for phase in module.phases()] == ["autoencoder"]


def test_the_critic_is_balanced_at_the_last_layer():
    """The gradients of reconstruction and critic have equal norms there, times the weight of the critic."""
    module = training(critic_weight=0.5, kl_weight=0.0)
    last = module.network.last_layer
    (whole,) = torch.autograd.grad(module.autoencoder_loss(BATCH, NoiseStreams(0, range(6))).mean(), last)
    module.images_seen = -1  # before the critic
    (own,) = torch.autograd.grad(module.autoencoder_loss(BATCH, NoiseStreams(0, range(6))).mean(), last)
    assert (whole - own).norm().item() == pytest.approx(0.5 * own.norm().item(), rel=0.02)
    assert all(parameter.requires_grad for parameter in module.critic.parameters())


def test_a_logit_is_that_of_a_patch():
    """No logit depends on other images, nor on pixels far from its patch."""
    critic = PatchCritic((1, 64, 64), [8])
    images = torch.randn(3, 1, 64, 64)
    changed = images.clone()
    changed[0, :, :8] += 1
    difference = (critic(images) - critic(changed)).abs()
    assert difference[0, 0, :8].max() > 0 and difference[0, 0, 12:].max() == 0 and difference[1:].max() < 1e-6
    with pytest.raises(UsageError, match="require images of 24 pixels, not 8x8: set fewer method.critic_widths"):
        training(critic_widths=[4, 4, 4, 4])


def test_the_critic_learns_from_the_images_of_the_step():
    module = training(critic_since=10)
    _, phase = module.phases()
    assert phase.since == 10
    module.images_seen = 10
    module.autoencoder_loss(BATCH, NoiseStreams(0, range(6)))
    made = module._made[0]
    loss = module.critic_loss(BATCH, NoiseStreams(0, range(6)))
    torch.testing.assert_close(loss, hinge(module.critic(IMAGES), module.critic(made)))
    assert not module._made and not made.requires_grad


# The scale of the latents


def test_standardised_latents_of_the_training_images_have_unit_variance():
    data = DataModule({"name": "digits"}, batch_size=100)
    module = training()
    module.finish(data, World())
    latents = Latents(module.network, std=0.5)
    images = to_float(data.images("train").read(torch.arange(data.size("train"))))
    posterior = latents.encode(images)
    draws = posterior.draw(torch.randn_like(posterior.mean)).double()
    assert draws.mean((0, 2, 3)).abs().max() < 0.01
    assert draws.var((0, 2, 3)).mean().sqrt().item() == pytest.approx(0.5, rel=0.01)
    assert module.reconstruction["psnr_on"] == "360 images of the split test"


# Fits

DIGITS: dict[str, Any] = {
    **{f"latents.{key}": value for key, value in KL.items()},
    **{"method": "{name: autoencoder, critic_widths: [8, 16], critic_since: 64}", "logger": "none", "threads": 1},
    **{
        "training.images": 256,
        "training.batch_size": 32,
        "training.warmup": 1,
        "training.decay": 0.0,
        "precision": "32-true",
    },
}


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path):
    whole = fit("digits/edm", **DIGITS, out=tmp_path / "a")
    half = fit("digits/edm", **{**DIGITS, "training.images": 128}, out=tmp_path / "b")
    resumed = fit("digits/edm", **DIGITS, out=tmp_path / "b", resume="auto")
    one, other = (load_file(folder / "autoencoder.safetensors") for folder in (whole, resumed))
    assert half == resumed and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    header = open_weights(whole / "autoencoder.safetensors").header
    assert header["kind"] == "autoencoder" and header["autoencoder"]["widths"] == [8, 16]
    assert header["images_seen"] == 256 and header["psnr"] > 0 and header["shape"] == [1, 8, 8]
    with pytest.raises(UsageError, match="does the experiment's network match the file"):
        fit("digits/edm", **{**DIGITS, "latents.channels": 2}, out=tmp_path / "b", resume="auto")
    with pytest.raises(UsageError, match=r"is a training state: finish the fit, and give its autoencoder\.safetensors"):
        build_latents(load("digits/edm", [*words_of(KL), f"latents.checkpoint={tmp_path / 'b' / 'last.ckpt'}"]))


def words_of(node: dict[str, Any]) -> list[str]:
    return [f"latents.{key}={value}".replace(" ", "") for key, value in node.items()]


@pytest.mark.parametrize(("keys", "words"), [
    ({"method": "{name: autoencoder, kl_weight: -1}"}, "kl_weight is -1.*it must be 0 or more"),
    ({"method": "{name: autoencoder, perceptual: 1}"}, "has no key 'perceptual'"),
    ({"training.ema_half_life": [100, 300]}, "ema_half_life=100,300: .* writes one average: set one half-life"),
    ({"training.evaluate_every": 64}, "evaluate_every=64: .* has no evaluations: set it to null"),
    ({"training.keep_best": 5}, "keep_best=5: .* has no evaluations: set it to null"),
    ({"training.augment": 0.1}, "uses neither condition nor training.augment"),
    ({"latents.groups": 3}, "width 8 is not a multiple of groups=3"),
    ({"data": "{name: toy}", "shape": [2, 1, 1]}, "images of 1x1 can't be divided"),
])  # fmt: skip
def test_what_a_fit_refuses_before_work(keys: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(UsageError, match=words):
        fit("digits/edm", **{**DIGITS, **keys}, out=tmp_path / "out")


# Folders of diffusers

LAYOUT: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "latent_channels": 3,
}


@pytest.mark.parametrize("keys", [
    {},
    {"scaling_factor": 0.36, "shift_factor": 0.1, "latent_channels": 8, "use_quant_conv": False,
     "use_post_quant_conv": False, "mid_block_add_attention": False},
])  # fmt: skip
def test_diffusers_auto_encoder_is_the_same(keys: dict[str, Any], tmp_path: Path):
    """Posterior, decoded images and scaled latents, in float64."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra dev)")
    theirs = diffusers.AutoencoderKL(**{**LAYOUT, **keys}).eval()
    theirs.save_pretrained(tmp_path / "vae")
    config = load("digits/edm", ["shape=[3,16,16]", f"latents={{name: kl, checkpoint: {tmp_path}}}"])
    latents = build_latents(config)  # of a pipeline's folder
    assert latents is not None and config.latents["widths"] == [8, 16] and config.latents["blocks"] == 2
    ours, theirs = latents.double(), theirs.double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        found, raw = latents.encode(images), ours.autoencoder.encode(images)
        torch.testing.assert_close(raw.mean, posterior.mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(raw.std, posterior.std, rtol=1e-10, atol=1e-10)
        scaled = (posterior.mean - (theirs.config.shift_factor or 0.0)) * theirs.config.scaling_factor
        torch.testing.assert_close(found.mean, scaled, rtol=1e-6, atol=1e-6)  # the factors are kept in float32
        decoded = theirs.decode(posterior.mean).sample
        torch.testing.assert_close(ours.autoencoder.decode(raw.mean), decoded, rtol=1e-8, atol=1e-8)


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "diffusion_pytorch_model.safetensors"
    )
    return folder


CONFIG = {"_class_name": "AutoencoderKL", **LAYOUT}


def own_tensors() -> dict[str, Tensor]:
    network = AUTOENCODERS.build({**KL, "blocks": 2}, shape=(3, 16, 16))
    return {name: tensor for name, tensor in network.state_dict().items() if "latent_" not in name}


def test_a_folder_is_read_without_diffusers(tmp_path: Path):
    """By the names of our own network, with older names of the attention."""
    tensors = own_tensors()
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    weights = open_weights(write_folder(tmp_path / "a", CONFIG, renamed))
    assert weights.kind == "autoencoder"
    network = AUTOENCODERS.build(weights.header["autoencoder"], shape=(3, 16, 16))
    assign_weights(weights.read(), network, "the test's weights")
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert network.latent_std.item() == pytest.approx(1 / 0.18215)


@pytest.mark.parametrize(("change", "words"), [
    ({"latents_mean": [0.0, 0.0, 0.0]}, "latents_mean is a list, built here is None"),
    ({"act_fn": "relu"}, "act_fn is 'relu'"),
    ({"scaling_factor": -1}, "scaling_factor or shift_factor is no number"),
    ({"block_out_channels": [8, "x"]}, "no list of one to eight numbers"),
    ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "are not 2 of DownEncoderBlock2D"),
    ({"use_quant_conv": False}, "use_quant_conv is False, but use_post_quant_conv is True"),
    ({"surprise": 1}, "a key 'surprise' that is not known here"),
    ({"layers_per_block": 3}, "missing are .*surplus"),
    ({"norm_num_groups": 5}, "not a multiple of groups=5"),
])  # fmt: skip
def test_other_auto_encoders_of_diffusers_are_refused(change: dict[str, Any], words: str, tmp_path: Path):
    folder = write_folder(tmp_path / "a", {**CONFIG, **change}, own_tensors())
    with pytest.raises(UsageError, match=words):
        open_weights(folder)
