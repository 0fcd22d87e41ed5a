"""Folders of diffusers: the two layouts, their names, their schedulers, and what is refused; and units, row by row."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import as_filed, random_network, score_sde_content
from safetensors.torch import save_file
from torch import Tensor, nn

from diffaccel.denoiser import DENOISERS
from diffaccel.errors import UsageError
from diffaccel.nn.ddpm import DDPMUNet
from diffaccel.nn.ncsnpp import NCSNpp
from diffaccel.pretrained import files_sha256, read
from diffaccel.pretrained.diffusers_names import names_of_ddpm, names_of_ncsnpp
from diffaccel.process import EDMVarianceExploding, VariancePreserving, expand

WIDE = {"width": 128, "multipliers": [1, 1], "blocks": 1, "encoder": "skip", "decoder": "skip", "dropout": 0.0}
FOURIER: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.1.0",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 128],
    "center_input_sample": True,
    "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1.41421356237,
    "norm_eps": 1e-06,
    "norm_num_groups": None,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "fourier",
    "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
}
VE_SCHEDULER = {"_class_name": "ScoreSdeVeScheduler", "sigma_max": 348, "sigma_min": 0.01, "snr": 0.075}
POSITIONAL: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "attention_head_dim": None,
    "block_out_channels": [8, 16],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
DDPM_SCHEDULER = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}


def small_ddpm() -> DDPMUNet:
    return DDPMUNet((3, 8, 8), 8, [1, 2], 2, [4], 0.0, 4).eval()


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], scheduler: dict[str, Any] | None = None
) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def test_ncsnpp_is_the_same_in_both_formats(tmp_path: Path) -> None:
    """As score_sde_pytorch has it, whose reader is tested against an evaluation of its own."""
    network = random_network(1, **WIDE)
    torch.save(score_sde_content(network, network, sigma_max=348.0), tmp_path / "a.pth")
    write_folder(tmp_path / "a", FOURIER, as_filed(names_of_ncsnpp(network), network), VE_SCHEDULER)
    ours, theirs = read(tmp_path / "a.pth"), read(tmp_path / "a")
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(value, theirs.tensors[name]) for name, value in ours.tensors.items())
    assert theirs.denoiser == ours.denoiser and theirs.process == ours.process and theirs.shape == ours.shape
    assert theirs.network.items() >= {key: ours.network[key] for key in ("width", "multipliers", "encoder")}.items()


def test_older_names_and_shapes_of_attention(tmp_path: Path) -> None:
    """query, key, value, proj_attn as 1x1 convolutions, and the frequencies twice; .bin is read like .safetensors."""
    network = random_network(1, **WIDE)
    tensors = as_filed(names_of_ncsnpp(network), network)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in tensors.items():
        found = next((new for new in older if f".{new}." in name), None)
        convolved = value[:, :, None, None] if found and value.ndim == 2 else value
        renamed[name.replace(found, older[found]) if found else name] = convolved
    renamed["time_proj.W"] = renamed["time_proj.weight"].clone()
    folder = write_folder(tmp_path / "a", {**FOURIER, "center_input_sample": False}, tensors, VE_SCHEDULER)
    expected = read(folder)
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.unlink()
    torch.save(renamed, weights.with_suffix(".bin"))
    found = read(folder)
    assert all(torch.equal(value, found.tensors[name]) for name, value in expected.tensors.items())
    # Uncentred inputs are those of data in [-1, 1]: no level is doubled.
    assert found.denoiser == {"name": "ve", "unit": 1.0, "ratio_min": 0.01, "ratio_max": 348.0}


def test_shards_and_bare_folders(tmp_path: Path) -> None:
    network = small_ddpm()
    tensors = as_filed(names_of_ddpm(network), network)
    folder = write_folder(tmp_path / "a", POSITIONAL, tensors, DDPM_SCHEDULER)
    whole, (weights,) = read(folder), (folder / "unet").glob("*.safetensors")
    weights.unlink()
    halves = {"one.safetensors": list(tensors)[::2], "two.safetensors": list(tensors)[1::2]}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, folder / "unet" / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "unet" / "scheduler_config.json").write_text(json.dumps(DDPM_SCHEDULER))
    for path in (folder, folder / "unet"):
        assert all(torch.equal(value, whole.tensors[name]) for name, value in read(path).tensors.items())
    before = files_sha256(folder)
    (folder / "unet" / "config.json").write_text(json.dumps({**POSITIONAL, "dropout": 0.1}))
    assert files_sha256(folder) != before
    index["weight_map"]["conv_in.bias"] = "../one.safetensors"
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="of its own folder"):
        read(folder)


def test_published_names() -> None:
    """Spelt out, of google/ddpm-cifar10-32 and google/ncsnpp-celebahq-256."""
    with torch.device("meta"):
        ddpm = DDPMUNet((3, 32, 32))
        celeba = NCSNpp((3, 256, 256), 128, [1, 1, 2, 2, 2, 2, 2], 2, encoder="skip", decoder="skip")
    shapes = {entry.name: entry.shape for entry in names_of_ddpm(ddpm)}
    assert sum(math.prod(shape) for shape in shapes.values()) == 35_746_307
    assert shapes["down_blocks.1.attentions.1.to_q.weight"] == (256, 256)
    assert shapes["down_blocks.0.downsamplers.0.conv.weight"] == (128, 128, 3, 3)
    assert shapes["down_blocks.1.resnets.0.conv_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["up_blocks.2.attentions.2.to_out.0.bias"] == (256,)
    assert shapes["up_blocks.3.resnets.2.conv_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["up_blocks.0.upsamplers.0.conv.bias"] == (256,)
    assert shapes["mid_block.resnets.1.time_emb_proj.weight"] == (256, 512)
    assert "up_blocks.3.upsamplers.0.conv.bias" not in shapes and "down_blocks.3.downsamplers.0.conv.bias" not in shapes
    shapes = {entry.name: entry.shape for entry in names_of_ncsnpp(celeba)}
    assert sum(math.prod(shape) for shape in shapes.values()) == 65_574_421 + 128
    assert shapes["down_blocks.4.attentions.1.to_v.weight"] == (256, 256)
    assert shapes["up_blocks.2.attentions.0.group_norm.weight"] == (256,)
    assert shapes["down_blocks.0.skip_conv.weight"] == (128, 3, 1, 1)
    assert shapes["down_blocks.5.resnet_down.conv_shortcut.weight"] == (256, 256, 1, 1)
    assert shapes["up_blocks.0.skip_conv.weight"] == (3, 256, 3, 3) and shapes["conv_out.weight"] == (3, 128, 3, 3)
    assert shapes["up_blocks.5.skip_norm.weight"] == (128,) and "up_blocks.6.skip_norm.weight" not in shapes


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddpm_predicts_as_its_network_does(tmp_path: Path, prediction: str) -> None:
    """At a level of the table the network sees its index and x_k; between two, an index between."""
    network = small_ddpm()
    scheduler = {**DDPM_SCHEDULER, "prediction_type": prediction}
    write_folder(tmp_path / "a", POSITIONAL, as_filed(names_of_ddpm(network), network), scheduler)
    denoiser = read(tmp_path / "a").build()
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    k = torch.tensor([0, 400, 999])
    a, s = kept[k].sqrt(), (1 - kept[k]).sqrt()
    x_k = torch.randn(3, 3, 8, 8)
    output = network(x_k, k.float())
    expected = (
        (x_k - expand(s, x_k) * output) / expand(a, x_k)
        if prediction == "epsilon"
        else expand(a, x_k) * x_k - expand(s, x_k) * output
    )
    x_t, t = denoiser.process.from_ratio(x_k / expand(a, x_k), s / a)
    found = denoiser(x_t, t)
    torch.testing.assert_close(found.x_0, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(expand(a, x_k) * found.x_0 + expand(s, x_k) * found.eps, x_k, rtol=1e-3, atol=2e-3)
    between = (s / a)[1:2] * math.exp(1e-4)
    assert 400 < denoiser.noise_conditioning(denoiser.process.time(between)).item() < 401
    assert denoiser.ratio_range == pytest.approx((0.0100, 157.4), rel=1e-3)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"_class_name": "UNetUnconditionalModel"}, "UNetUnconditionalModel"),
        ({"block_channels": [8]}, "key 'block_channels'"),
        ({"flip_sin_to_cos": 1}, "flip_sin_to_cos is 1"),
        ({"freq_shift": 2}, "freq_shift is 2"),
        ({"downsample_padding": 2}, "downsample_padding is 2"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0"),
        ({"norm_eps": -1e-5}, "norm_eps is -1e-05"),
        ({"num_class_embeds": 10}, "num_class_embeds is 10"),
        ({"out_channels": 6}, "learned variance"),
        ({"up_block_types": ["UpBlock2D", "SkipUpBlock2D"]}, "up_block_types are not 2 of UpBlock2D and AttnUpBlock2D"),
        ({"time_embedding_type": "fourier"}, "for fourier embedding"),
        ({"sample_size": None}, "sample_size"),
        ({"layers_per_block": 10**6}, "layers_per_block"),
    ],
)
def test_configurations_that_are_not_built(tmp_path: Path, edit: dict[str, Any], match: str) -> None:
    write_folder(tmp_path / "a", {**POSITIONAL, **edit}, {"a": torch.zeros(1)}, DDPM_SCHEDULER)
    with pytest.raises(UsageError, match=match):
        read(tmp_path / "a")


def test_a_missing_key_has_the_default_of_diffusers(tmp_path: Path) -> None:
    network = small_ddpm()
    config = {key: value for key, value in POSITIONAL.items() if key != "attention_head_dim"}
    write_folder(tmp_path / "a", config, as_filed(names_of_ddpm(network), network), DDPM_SCHEDULER)
    assert read(tmp_path / "a").network["head_width"] == 8


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        (None, "no scheduler_config.json"),
        ({**DDPM_SCHEDULER, "prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ({**DDPM_SCHEDULER, "beta_schedule": "laplace"}, "laplace"),
        ({**DDPM_SCHEDULER, "variance_type": "learned_range"}, "learned variance"),
        ({**DDPM_SCHEDULER, "beta_end": "high"}, "no numbers"),
    ],
)
def test_schedulers_that_are_not_built(tmp_path: Path, scheduler: dict[str, Any] | None, match: str) -> None:
    network = small_ddpm()
    write_folder(tmp_path / "a", POSITIONAL, as_filed(names_of_ddpm(network), network), scheduler)
    with pytest.raises(UsageError, match=match):
        read(tmp_path / "a")


@pytest.mark.parametrize("scheduler", [None, {}, {"sigma_max": 1348.0}])
def test_the_scheduler_s_default_is_not_trusted(tmp_path: Path, scheduler: dict[str, Any] | None) -> None:
    network = random_network(1, **WIDE)
    write_folder(tmp_path / "a", FOURIER, as_filed(names_of_ncsnpp(network), network), scheduler)
    with pytest.raises(UsageError, match="sigma_max="):
        read(tmp_path / "a")
    assert read(tmp_path / "a", sigma_max=348.0).denoiser["ratio_max"] == 696.0
    assert "replaced" not in read(tmp_path / "a", sigma_max=348.0).source


def test_folders_that_lack_something(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="holds no config.json"):
        read(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="no JSON"):
        read(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(POSITIONAL))
    with pytest.raises(UsageError, match="holds no diffusion_pytorch_model"):
        read(tmp_path / "a")
    (tmp_path / "a" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(UsageError, match="truncated"):
        read(tmp_path / "a")


# Units


class Recorder(nn.Module):
    """Returns the same whatever it sees, and remembers that."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        self.seen = x, noise
        return self.output


@pytest.mark.parametrize("process", [EDMVarianceExploding(200.0), VariancePreserving()], ids=["ve", "vp"])
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_what_networks_see_and_mean(name: str, process: Any) -> None:
    """The table of published conventions, for any output F, on a process of their own and on another."""
    output, y = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.05, 2.0, 90.0], dtype=torch.float64)
    network = Recorder(output)
    denoiser = DENOISERS.build({"name": name}, network=network, process=process)
    x_t, t = process.from_ratio(y, sigma)
    found = denoiser(x_t, t)
    seen, noise = network.seen
    if name == "ve":
        expected, told, d = y, (sigma / 2).log(), y + expand(sigma, y) * output
    else:
        trained = VariancePreserving()
        expected, told = y / expand((1 + sigma**2).sqrt(), y), 999 * trained.time(sigma)
        d = y - expand(sigma, y) * output
    torch.testing.assert_close(seen, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(noise, told, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.x_0, d, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.eps, (y - d) / expand(sigma, y), rtol=1e-8, atol=1e-8)
    target = denoiser.target(*torch.randn(2, 3, 3, 4, 4, dtype=torch.float64), t)
    assert target.shape == y.shape


@pytest.mark.parametrize("node", [{"name": "ve"}, {"name": "vp"}, {"name": "discrete_vp", "predicts": "v"}])
def test_a_network_that_hits_its_target_denoises_exactly(node: dict[str, Any]) -> None:
    x_0, eps = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64)
    process = EDMVarianceExploding()
    network = Recorder(x_0)
    denoiser: Any = DENOISERS.build(node, network=network, process=process)
    t = torch.tensor([0.05, 1.0, 50.0], dtype=torch.float64)
    network.output = denoiser.target(x_0, eps, t)
    found = denoiser(process.marginal(x_0, t, eps), t)
    torch.testing.assert_close(found.x_0, x_0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.eps, eps, rtol=1e-8, atol=1e-8)
