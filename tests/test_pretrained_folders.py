"""Folders that diffusers' training script and tutorials leave: what is found in them, and that it predicts alike."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_diffusers import SCHEDULER, UNet2D, save_scheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffaccel.__main__ import main
from diffaccel.errors import UsageError
from diffaccel.pretrained import convert, files_sha256, read
from diffaccel.process import expand

PUBLISHED = {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False}
PUBLISHED |= {"freq_shift": 1, "norm_eps": 1e-6}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "published": PUBLISHED,
    "attention first": {
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    },
    "attention down": {"up_block_types": ["UpBlock2D", "UpBlock2D"]},
    "attention up": {"down_block_types": ["DownBlock2D", "DownBlock2D"], "layers_per_block": 2},
    "no attention": {
        "add_attention": False,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    },
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift, normed": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "fractions": {
        "block_out_channels": [8, 12, 16],
        "attention_head_dim": 4,
        "norm_eps": 1e-3,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_networks_agree_with_their_layout_evaluated_independently(tmp_path: Path, name: str) -> None:
    theirs = UNet2D(seed=3, **VARIANTS[name])
    theirs.save(tmp_path / "unet")
    save_scheduler(tmp_path)
    x, k = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 17.5, 999.0])
    convert(tmp_path, tmp_path / "a.safetensors")
    for path in (tmp_path, tmp_path / "a.safetensors"):
        torch.testing.assert_close(read(path).build().network(x, k), theirs(x, k), rtol=1e-4, atol=1e-4)


def cosine(steps: int) -> Tensor:
    """1 - beta_k = abar((k + 1) / T) / abar(k / T), beta at most 0.999."""
    share = [math.cos((k / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(steps + 1)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in zip(share, share[1:], strict=False)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        ("linear", torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)),
        ("scaled_linear", torch.linspace(1e-2, 0.02**0.5, 100, dtype=torch.float64) ** 2),
        ("sigmoid", 1e-4 + 0.0199 / (1 + (-torch.linspace(-6, 6, 100, dtype=torch.float64)).exp())),
        ("squaredcos_cap_v2", cosine(100)),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_schedulers(tmp_path: Path, schedule: str, betas: Tensor, prediction: str) -> None:
    """At a level of the table the network sees its index and x_k, and its output means what the scheduler says."""
    theirs = UNet2D(seed=4)
    theirs.save(tmp_path / "unet")
    save_scheduler(tmp_path, beta_schedule=schedule, num_train_timesteps=100, prediction_type=prediction)
    denoiser = read(tmp_path).build()
    kept, k = (1 - betas).cumprod(0), torch.tensor([1, 40, 98])
    a, s = kept[k].sqrt(), (1 - kept[k]).sqrt()
    x_k = torch.randn(3, 3, 8, 8)
    output = theirs(x_k, k.float())
    expected = {
        "epsilon": (x_k - expand(s, x_k) * output) / expand(a, x_k),
        "v_prediction": expand(a, x_k) * x_k - expand(s, x_k) * output,
        "sample": output,
    }[prediction]
    x_t, t = denoiser.process.from_ratio(x_k / expand(a, x_k), s / a)
    torch.testing.assert_close(denoiser.noise_conditioning(t), k.double(), rtol=0, atol=1e-3)
    found = denoiser(x_t, t)
    torch.testing.assert_close(found.x_0.double(), expected.double(), rtol=2e-3, atol=2e-3)
    rebuilt = expand(a, x_k) * found.x_0 + expand(s, x_k) * found.eps
    torch.testing.assert_close(rebuilt.double(), x_k.double(), rtol=1e-3, atol=2e-3)


# What is found where


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What the training script leaves with ``--use_ema``."""
    folder = tmp_path / "out"
    UNet2D(seed=1).save(folder / "unet")
    UNet2D(seed=2).save(folder / "checkpoint-500" / "unet")
    average = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 500, "power": 0.75}
    average |= {"update_after_step": 0, "use_ema_warmup": True}
    UNet2D(seed=3).save(folder / "checkpoint-500" / "unet_ema", **average)
    (folder / "checkpoint-500" / "scheduler.bin").write_bytes(b"the learning rate's, which is not read")
    save_scheduler(folder)
    return folder


def seed_of(path: Path, **options: Any) -> tuple[int, str]:
    """Which of the networks was read, and what its weights are said to be."""
    found = read(path, **options)
    stem = found.tensors["stem.weight"]
    seeds = [seed for seed in (1, 2, 3) if torch.equal(stem, UNet2D(seed=seed).tensors["conv_in.weight"])]
    return seeds[0], found.source["weights"]


def test_folders_of_training(trained: Path) -> None:
    within = trained / "checkpoint-500"
    assert seed_of(trained) == seed_of(trained / "unet") == (1, "file's")
    assert seed_of(within) == seed_of(within, weights="ema") == (3, "ema")
    assert seed_of(within, weights="raw") == (2, "raw")
    assert seed_of(within / "unet")[0] == 2 and seed_of(within / "unet_ema")[0] == 3
    assert read(within / "unet_ema").source["weights"] == "ema"
    hashes = [read(within, weights=weights).source["sha256"] for weights in ("ema", "raw")]
    assert hashes == [files_sha256(within / "unet_ema"), files_sha256(within / "unet")]
    with pytest.raises(UsageError, match=f"give the folder, {within / 'unet'}"):
        read(within / "unet" / "diffusion_pytorch_model.safetensors")
    assert files_sha256(within) == files_sha256(within / "unet_ema") != files_sha256(within / "unet")
    for path in (trained, within / "unet"):
        with pytest.raises(UsageError, match="one set of weights"):
            read(path, weights="ema")
    (trained / "unet" / "config.json").unlink()
    with pytest.raises(UsageError, match="give one of checkpoint-500 in it"):
        read(trained)


def test_the_scheduler_is_two_folders_above_at_most(trained: Path) -> None:
    (trained / "scheduler").rename(trained.parent / "scheduler")
    assert seed_of(trained)[0] == 1
    with pytest.raises(UsageError, match="no scheduler_config.json"):
        read(trained / "checkpoint-500")


def test_weights_of_another_name(tmp_path: Path) -> None:
    """Variants, shards and indices as diffusers writes them; safetensors before .bin, the main before a variant."""
    folder, main_file = UNet2D(seed=1).save(tmp_path / "unet"), "diffusion_pytorch_model"
    save_scheduler(tmp_path)
    (folder / f"{main_file}.safetensors").unlink()

    def write(seed: int, name: str, shards: int = 0) -> None:
        tensors, suffix = UNet2D(seed=seed).tensors, name.rpartition(".")[2]
        save = torch.save if suffix == "bin" else save_file
        stem, variant = name.removesuffix(f".{suffix}"), name.split(".")[1] if name.count(".") == 2 else ""
        if not shards:
            save(tensors, folder / name)
            return
        files = [f"{stem}-{index + 1:05}-of-{shards:05}.{suffix}" for index in range(shards)]
        weight_map = {tensor: files[index % shards] for index, tensor in enumerate(tensors)}
        for file in files:
            save({tensor: tensors[tensor] for tensor in weight_map if weight_map[tensor] == file}, folder / file)
        index = f"{main_file}.{suffix}.index{'.' + variant if variant else ''}.json"
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))

    write(1, f"{main_file}.fp16.bin", shards=2)
    assert seed_of(tmp_path) == (1, "file's")
    write(2, f"{main_file}.fp16.safetensors")
    assert seed_of(tmp_path) == (2, "file's")
    write(3, f"{main_file}.non_ema.safetensors")
    with pytest.raises(UsageError, match="the variants fp16, non_ema"):
        read(tmp_path)
    write(1, f"{main_file}.bin")
    assert seed_of(tmp_path) == (1, "ema") and seed_of(tmp_path, weights="raw") == (3, "raw")
    write(2, f"{main_file}.safetensors", shards=3)
    assert seed_of(tmp_path)[0] == 2
    (folder / f"{main_file}-00002-of-00003.safetensors").unlink()
    with pytest.raises(UsageError, match="00002-of-00003.safetensors does not exist"):
        read(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(tmp_path: Path, prefix: str) -> None:
    folder = UNet2D(seed=1).save(tmp_path / "unet")
    save_scheduler(tmp_path)
    (weights,) = folder.glob("*.safetensors")
    named = {f"{prefix}{name}": value for name, value in load_file(weights).items()}
    save_file(named, weights)
    assert seed_of(tmp_path)[0] == 1
    weights.unlink()
    # Any order of strides: convolutions as channels_last leaves them, matrices transposed.
    turned = {
        name: value.to(memory_format=torch.channels_last)
        if value.ndim == 4
        else value.mT.contiguous().mT
        if value.ndim == 2
        else value
        for name, value in named.items()
    }
    torch.save(turned, weights.with_suffix(".bin"))
    assert seed_of(tmp_path)[0] == 1
    named["conv_in.bias"] = named[f"{prefix}conv_in.bias"]
    torch.save(named, weights.with_suffix(".bin"))
    with pytest.raises(UsageError, match="refused"):
        read(tmp_path)


def test_ours_may_have_prefixes_too(tmp_path: Path) -> None:
    UNet2D(seed=1).save(tmp_path / "unet")
    save_scheduler(tmp_path)
    convert(tmp_path, tmp_path / "a.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        said = file.metadata()
    tensors = load_file(tmp_path / "a.safetensors")
    save_file({f"_orig_mod.{name}": value for name, value in tensors.items()}, tmp_path / "b.safetensors", said)
    assert seed_of(tmp_path / "b.safetensors")[0] == 1


@pytest.mark.parametrize(
    ("config", "scheduler", "match"),
    [
        ({"num_class_embeds": 10}, {}, "num_class_embeds is 10"),
        ({"mid_block_type": None}, {}, "mid_block_type"),
        ({"downsample_type": "resnet"}, {}, "downsample_type is 'resnet'"),
        ({"down_block_types": ["DownBlock2D", "ResnetDownsampleBlock2D"]}, {}, "down_block_types are not 2 of"),
        ({"down_block_types": ["DownBlock2D"]}, {}, "down_block_types are not 2 of"),
        ({"attention_head_dim": 5}, {}, "can't be divided into 5 channels per head"),
        ({"norm_num_groups": "4"}, {}, "norm_num_groups is '4'"),
        ({"norm_eps": float("nan")}, {}, "norm_eps is nan"),
        ({"dropout": "0"}, {}, "dropout is '0'"),
        ({"freq_shift": True}, {}, "freq_shift is True"),
        ({"block_out_channels": [8, "16"]}, {}, "block_out_channels is '16'"),
        ({"sample_size": None}, {}, "give size="),
        ({}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({}, {"_class_name": "ScoreSdeVpScheduler"}, "ScoreSdeVpScheduler"),
        ({}, {"beta_schedule": "laplace"}, "'laplace'"),
        ({}, {"prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ({}, {"trained_betas": [0.1, 0.2]}, "betas of its own"),
        ({}, {"variance_type": "learned_range"}, "learned variance"),
    ],
)
def test_what_is_not_built_is_named(tmp_path: Path, config: dict, scheduler: dict, match: str) -> None:
    UNet2D(seed=1).save(tmp_path / "unet", **config)
    save_scheduler(tmp_path, **scheduler)
    with pytest.raises(UsageError, match=match):
        read(tmp_path)


def test_sizes_that_the_file_has_or_is_given(tmp_path: Path) -> None:
    UNet2D(seed=1).save(tmp_path / "unet", sample_size=None)
    save_scheduler(tmp_path)
    assert read(tmp_path, size=16).shape == (3, 16, 16)
    with pytest.raises(UsageError, match="sigma_max=50 has no use"):
        read(tmp_path, size=16, sigma_max=50)
    UNet2D(seed=1).save(tmp_path / "unet", sample_size=[16, 8])
    found = read(tmp_path)
    assert found.shape == (3, 16, 8) and found.network["attention"] == [8]


def test_the_command_reads_them(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--inspect", str(trained / "checkpoint-500")]) == 0
    said = capsys.readouterr().out
    assert "weights ema" in said and "ddpm" in said and str(SCHEDULER["num_train_timesteps"]) in said
    assert main(["convert", "--inspect", str(trained / "checkpoint-500"), "weights=raw"]) == 0
    assert "weights raw" in capsys.readouterr().out
