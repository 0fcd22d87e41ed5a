"""Fits, benches and samples with captions: what points hold, what files of weights say, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coders import KL, write_autoencoder
from PIL import Image
from safetensors import safe_open

import diffaccel as da
from diffaccel.__main__ import main
from diffaccel.api import bench, fit, load, sample
from diffaccel.captions.encoders import Words
from diffaccel.condition import Condition, Kinds
from diffaccel.config import EXPERIMENTS
from diffaccel.config import load as load_config
from diffaccel.data.conditions import ToGive
from diffaccel.data.module import DataModule
from diffaccel.errors import UsageError
from diffaccel.experiment import build_method
from diffaccel.noise import NoiseStreams

FAST: dict[str, Any] = {"logger": "none", "threads": 1, "network.widths": [8, 8], "network.text_layers": 1}
SHIPPED = EXPERIMENTS / "digits_text" / "weights" / "edm.safetensors"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = {**FAST, "training.images": 64, "training.batch_size": 32, "training.warmup": 1}
    out = tmp_path_factory.mktemp("text")
    return fit("digits_text/edm", **keys, out=out, reference="", floor="", init="") / "ema.safetensors"


def test_weights_say_their_encoder(weights: Path, tmp_path: Path):
    with safe_open(weights, framework="pt") as file:
        header = json.loads(file.metadata()["diffaccel"])
    assert header["condition"]["encoder"] == {"name": "words", "dim": 32, "length": 16}
    assert header["condition_sha256"] == Words(32, 16).sha256 and header["condition_drop"] == 0.1
    for keys, words in (
        ({"condition.encoder.length": 8}, r'condition.encoder is .*"length": 16.* in the file and .*"length": 8'),
        ({"network.text_layers": 2}, "network.text_layers is 1 in the file and 2 in"),
        ({"network.tokens": 16}, "network.tokens is 32 in the file and 16 in the experiment"),
    ):
        with pytest.raises(UsageError, match=words):
            bench("digits_text/edm", **{**FAST, **keys}, checkpoint=weights, n=4, out=tmp_path)
    others = {"condition.templates": "['draw {label}']", "condition.names": "[0,1,2,3,4,5,6,7,8,9]"}
    assert load("digits_text/edm", **FAST, **others, checkpoint=weights), "weights are valid for any captions"


def test_a_bench_measures_the_accuracy(weights: Path, tmp_path: Path):
    """Against the classes of the captions; points are known by captions and encoder, and no pixels are compared."""
    keys = {**FAST, "checkpoint": weights, "n": 24, "nfe": 3, "out": tmp_path}
    (point,) = bench("digits_text/edm", **keys)
    metrics = point["metrics"]
    assert 0 <= metrics["accuracy"] <= 1 and metrics["accuracy_floor"] > 0.95 and "psnr" not in metrics
    (again,) = bench("digits_text/edm", **keys)
    assert again["seconds_per_image"] == point["seconds_per_image"], "not measured anew"
    (other,) = bench("digits_text/edm", **keys, **{"condition.templates": "['{label} {label}']"})
    assert other["key"] != point["key"]
    (guided,) = bench("digits_text/edm", **{**keys, "nfe": 6}, guidance=1)
    assert guided["evaluations"] == {"denoiser": 2 * point["evaluations"]["denoiser"], "text_encoder": 24}
    with pytest.raises(UsageError, match="'accuracy' requires samples of known classes, but those of digits_text/edm"):
        bench("digits_text/edm", **keys, caption="a seven")
    metrics = "[frechet,accuracy]"
    with pytest.raises(UsageError, match="'accuracy' requires samples of known classes, but those of digits/edm"):
        bench("digits/edm", n=4, nfe=2, metrics=metrics, out=tmp_path, logger="none")


def test_images_of_a_caption(weights: Path, tmp_path: Path):
    """The same by the command line and in Python, and by captions or their tokens."""
    (folder,) = sample("digits_text/edm", **FAST, checkpoint=weights, n=3, nfe=2, out=tmp_path, caption="a 7, please",
                       format="npz")  # fmt: skip
    said = json.loads((folder / "sample.json").read_text())
    assert said["configuration"]["condition"]["caption"] == "a 7, please"
    images = torch.from_numpy(np.load(folder / "images.npz")["images"]).reshape(3, 1, 8, 8)
    keys = {key: value for key, value in FAST.items() if key != "logger"}
    sampler = da.Sampler(load("digits_text/edm", **keys, checkpoint=weights))
    assert sampler.takes == Kinds(tokens=32)
    assert torch.equal(sampler(3, nfe=2, condition="a 7, please"), images)
    assert torch.equal(sampler(3, nfe=2, condition=["a 7, please"] * 3), images)
    tokens = next(Words(32, 16).encode(["a 7, please"])).float()
    assert torch.equal(sampler(3, nfe=2, condition=Condition(tokens=tokens.expand(3, -1, -1))), images)
    sampler(1000, nfe=1, condition="more than there are test images")
    alone = da.Sampler(load(weights))
    assert alone(3, nfe=2, condition="a 7, please").shape == images.shape
    alone.inputs = ToGive(alone.inputs.conditioner, "another encoder's")
    with pytest.raises(UsageError, match="the text encoder has other weights than that of the training"):
        alone(3, nfe=2, condition="a 7, please")
    for condition, words in (
        (["a", "b"], "2 captions for 3 images: give one caption, or one for each image"),
        (["a", "b", 3], "list is not a Condition: give da.Condition.image=...., or captions"),
        ("", "caption='': give a text"),
        (Condition(tokens=torch.zeros(3, 2, 5)), r"tokens have shape \(3, 2, 5\), it must be \(3, L, 32\)"),
    ):
        with pytest.raises(UsageError, match=words):
            sampler(3, nfe=2, condition=condition)
    with pytest.raises(UsageError, match="the network takes no condition: leave it out"):
        da.Sampler(load("digits/edm"))(2, nfe=2, condition="a seven")
    with pytest.raises(UsageError, match="the model has no text encoder"):
        da.Sampler(load(weights).denoiser, shape=(1, 8, 8))(2, nfe=2, condition="a seven")


@pytest.mark.parametrize("method", ["edm", "ddm", "tdpm"])
def test_every_method_trains_with_captions(method: str):
    """The loss of each phase depends on the caption."""
    config = load_config(f"digits_text/{method}", ["network.widths=8,8", *(
        ["method.critic={name: stylegan2, channel_base: 64}"] if method == "tdpm" else [])])  # fmt: skip
    built = build_method(config, load=False)
    module = DataModule({"name": "digits"}, batch_size=16, conditioner=built.sampler.inputs.conditioner)
    batch = next(iter(module.train_dataloader()))
    tokens = batch.condition.tokens
    other = batch._replace(condition=batch.condition._replace(tokens=-tokens))
    for name, parameter in built.named_parameters():
        if parameter.ndim > 1 and not name.startswith("critic"):
            torch.nn.init.normal_(parameter, std=0.1)
    found = 0
    for phase in built.phases():
        losses = [phase.loss(one, NoiseStreams(0, one.index)) for one in (batch, other)]
        assert not torch.allclose(*losses, rtol=1e-5), phase.name
        found += 1
    assert found == (3 if method == "tdpm" else 1)


def test_a_fit_may_begin_with_an_unconditional_network(tmp_path: Path):
    keys = {"logger": "none", "threads": 1, "reference": "", "floor": "", "training.images": 32,
            "training.batch_size": 32, "training.warmup": 1, "training.lr": 1e-9}  # fmt: skip
    init = EXPERIMENTS / "digits" / "weights" / "edm.safetensors"
    out = fit("digits_text/edm", **keys, init=init, out=tmp_path)
    images = da.Sampler(load("digits_text/edm", checkpoint=out / "ema.safetensors"))(16, nfe=5, condition="a seven")
    plain = da.Sampler(load("digits/edm"))(16, nfe=5)
    assert (images.int() - plain.int()).abs().float().mean() < 1, "up to rounding of the weights"


def test_missing_captions_are_an_error_before_training(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("L", (8, 8), ord(name)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "a.txt").write_text("one")
    keys = {**FAST, "data": "folder", "data.path": tmp_path / "images", "condition.templates": "[]",
            "condition.names": "[]", "reference": "", "floor": "", "out": tmp_path / "out"}  # fmt: skip
    with pytest.raises(UsageError, match=r"1 of 2 images have no caption \(b.png\): add them"):
        fit("digits_text/edm", **keys)
    with pytest.raises(UsageError, match="encoder 'clip': there is no folder .*nowhere|requires transformers"):
        clip = "{name: clip, path: %s, dim: 32}" % (tmp_path / "nowhere")  # noqa: UP031 (braces)
        fit("digits_text/edm", **keys, **{"condition.encoder": clip})
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("name", ["cub64/tdpm", "coco64/tdpm"])
def test_text_to_image_experiments_have_their_sizes(name: str):
    config = load_config(name, ["condition.encoder.path=/nowhere"])
    with torch.device("meta"):
        method = build_method(config, load=False)
        tokens = torch.empty(2, 77, 768)
        output = method.denoiser.network(torch.empty(2, 3, 64, 64), torch.empty(2), Condition(tokens=tokens))
    assert output.shape == (2, 3, 64, 64) and method.critic.takes == Kinds(tokens=768)
    parameters = sum(parameter.numel() for parameter in method.denoiser.network.parameters())
    assert 40e6 < parameters < 80e6
    assert [phase.name for phase in method.phases()] == ["denoiser", "generator", "critic"]


@pytest.mark.parametrize("name", ["cub256/tdpm_latent", "coco256/tdpm_latent"])
def test_text_to_image_in_latents_has_its_sizes(name: str, capsys: pytest.CaptureFixture[str]):
    """A dry run without data, weights and text encoder; narrow networks, because a CPU takes minutes otherwise."""
    with torch.device("meta"):
        method = build_method(load_config(name), load=False)
    parameters = sum(parameter.numel() for parameter in method.denoiser.network.parameters())
    assert 150e6 < parameters < 220e6
    assert method.critic.takes == Kinds(tokens=768) and method.shape == (4, 32, 32)
    narrow = ["network.widths=[8,8,8,8]", "network.embedding=16", "latents.widths=[8,8,8,8]", "latents.groups=4"]
    assert main(["bench", name, "dry_run=true", "n=4", "threads=1", "logger=none", *narrow]) == 0
    printed = capsys.readouterr().out
    assert "a bench would end: no folder" in printed
    assert "images (3, 256, 256), latents (4, 32, 32)" in printed and "decoding takes" in printed


def test_tdpm_trains_and_samples_with_captions_in_latents(tmp_path: Path):
    """All parts together: text encoder, cross-attention, shared generator, critic, auto-encoder, guidance."""
    latents = {**KL, "checkpoint": write_autoencoder(tmp_path / "autoencoder.safetensors"), "cache": tmp_path}
    keys = {"logger": "none", "threads": 1, "network.widths": [8, 8], "metrics": "[frechet]",
            "network.unshuffle": 1, "method.critic": "{name: mlp, width: 8}", "precision": "32-true",
            "training.images": 64, "training.batch_size": 32, "training.warmup": 1,
            **{f"latents.{key}": value for key, value in latents.items()}}  # fmt: skip
    out = fit("digits_text/tdpm", **{**keys, "reference": "", "floor": ""}, out=tmp_path / "fit")
    keys |= {"checkpoint": out / "ema.safetensors"}
    (point,) = bench("digits_text/tdpm", **keys, n=12, nfe=9, guidance=1, out=tmp_path / "bench")
    assert point["evaluations"] == {"denoiser": 12 * 9, "text_encoder": 12}
    assert point["gflops_decoding"] > 0


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_a_captioned_sample_is_recognised_as_its_captions_class(guidance: float):
    """By the digits' classifier, which did not train the network; chance is a tenth."""
    solver = {"name": "dpmpp2m", "guidance": guidance}
    sampler = da.Sampler(load("digits_text/edm", threads=1), solver=solver)
    captions = [f"a {name}" for name in DIGITS for _ in range(10)]
    images = sampler(100, nfe=10 * (1 + bool(guidance)), condition=captions)
    assert sampler.spent.nfe == 10 * (1 + bool(guidance))
    from diffaccel.features.extractors import load_classifier, to_unit

    classifier, _ = load_classifier(EXPERIMENTS / "digits" / "weights" / "extractor.safetensors")
    with torch.no_grad():
        found = classifier(to_unit(images)).argmax(1)
    assert (found == torch.arange(100) // 10).float().mean() > 0.8


def test_the_shipped_weights_are_small():
    assert SHIPPED.stat().st_size < 12_000_000
