"""Fits and benches in latents: what points hold, what files of weights say, and what is refused before work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from coders import KL, write_autoencoder

from diffaccel.api import bench, fit
from diffaccel.api import load as load_model
from diffaccel.config import load
from diffaccel.errors import UsageError
from diffaccel.experiment import build_latents, build_method
from diffaccel.nfe import EvaluationCounter
from diffaccel.sampling import Sampler
from diffaccel.weights import open_weights

FAST: dict[str, Any] = {"logger": "none", "threads": 1, "network.widths": [8, 8], "precision": "32-true"}
pytestmark = pytest.mark.usefixtures("undrawn")


def latent(autoencoder: Path, **keys: Any) -> dict[str, Any]:
    own = {**KL, "checkpoint": autoencoder, "cache": autoencoder.parent / "cache"}
    return {**FAST, "network.unshuffle": 1, **{f"latents.{key}": value for key, value in own.items()}, **keys}


def fitted(out: Path, name: str, keys: dict[str, Any]) -> Path:
    short = {"training.images": 64, "training.batch_size": 32, "training.warmup": 1}
    return fit(name, **{"reference": "", "floor": "", **keys, **short}, out=out)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "autoencoder.safetensors")


@pytest.fixture(scope="module")
def weights(autoencoder: Path) -> Path:
    return fitted(autoencoder.parent / "edm", "digits/edm", latent(autoencoder)) / "ema.safetensors"


def test_a_point_counts_decoding_apart(weights: Path, autoencoder: Path, tmp_path: Path, capsys: Any):
    keys = latent(autoencoder, checkpoint=weights, n=24, out=tmp_path, nfe=5)
    (point,) = bench("digits/edm", **keys)
    assert point["nfe"] == 5 and point["evaluations"] == {"denoiser": 5 * 24}
    latents = build_latents(load("digits/edm", [*words_of(autoencoder)]))
    assert latents is not None
    with EvaluationCounter({"decoder": latents}) as counter, torch.no_grad():
        latents(torch.zeros(2, *latents.shape))
    assert point["gflops_decoding"] == counter.flops["decoder"] / 1e9 and point["seconds_decoding"] > 0
    assert point["gflops_per_image"] == pytest.approx(point["nfe_equivalent"] / 5 * point["gflops_per_image"])
    assert "decoding the latents takes" in capsys.readouterr().out
    assert point["metrics"]["fd_digits"] > 0
    again = bench("digits/edm", **keys)[0]
    assert again["key"] == point["key"] and again["seconds_decoding"] == point["seconds_decoding"], "measured anew"


def words_of(autoencoder: Path) -> list[str]:
    own = {**KL, "checkpoint": autoencoder}
    return [f"latents.{key}={value}".replace(" ", "") for key, value in own.items()]


def test_weights_say_their_latents(weights: Path, autoencoder: Path, tmp_path: Path):
    header = open_weights(weights).header
    latents = build_latents(load("digits/edm", words_of(autoencoder)))
    assert latents is not None
    assert header["latents"] == {"sha256": latents.sha256, "std": 1.0} and header["shape"] == [3, 4, 4]
    other = write_autoencoder(tmp_path / "other.safetensors", seed=1)
    for keys, words in (
        (latent(other), "latents of another auto-encoder .*: set latents.checkpoint= to the auto-encoder of its fit"),
        (latent(autoencoder, **{"latents.std": 0.5}), "standard deviation 1.0, the experiment has 0.5"),
        (FAST, "was trained on latents, but the experiment samples pixels"),
    ):
        with pytest.raises(UsageError, match=words):
            bench("digits/edm", **{**keys, "checkpoint": weights, "n": 4, "out": tmp_path / "bench"})
    plain = fitted(tmp_path / "plain", "digits/edm", FAST) / "ema.safetensors"
    with pytest.raises(UsageError, match="was trained on pixels, but the experiment samples latents"):
        bench("digits/edm", **latent(autoencoder, checkpoint=plain, n=4, out=tmp_path / "bench"))
    assert not (tmp_path / "bench").exists()
    with pytest.raises(UsageError, match="samples latents, which are not images: load its experiment"):
        Sampler(load_model(weights))


def test_a_loaded_model_decodes(weights: Path, autoencoder: Path):
    images = Sampler(load_model("digits/edm", **latent(autoencoder, checkpoint=weights)))(3, nfe=5)
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.uint8


@pytest.mark.parametrize(("keys", "words"), [
    ({"latents.checkpoint": None}, "has no auto-encoder: set latents.checkpoint=FILE, the output of .*/autoencoder`"),
    ({"latents.checkpoint": "none.safetensors"}, "the auto-encoder latents.checkpoint=none.safetensors does not exist"),
    ({"latents.channels": 4}, "autoencoder.channels is 3 in the file and 4 in the experiment"),
    ({"latents.widths": [8, 16, 16, 16, 16]}, "images of 8x8 can't be divided by the auto-encoder's factor 16"),
    ({"latents.std": 0.0}, "std"),
    ({"latents.sample": "maybe"}, "latents.sample"),
    ({"latents.width": 8}, "width"),
    ({"network.unshuffle": 8}, "unshuffle"),
    ({"condition": "{name: super_resolution, factor: 2}", "network.image": 1}, "acts on pixels"),
    ({"condition": "{name: inpainting}", "network.image": 1, "network.mask": True}, "acts on pixels"),
    ({"training.augment": 0.1, "network.augment": 9}, "training.augment moves pixels"),
    ({"likelihood": True}, "no likelihood of images"),
    ({"solver": "{name: ancestral, clip: true}"}, r"solver.clip=true restricts samples to \[-1, 1\]"),
    ({"data.resident": True}, "latents are read from files"),
])  # fmt: skip
def test_what_does_not_fit_is_one_error_before_work(
    keys: dict[str, Any], words: str, autoencoder: Path, tmp_path: Path
):
    with pytest.raises(UsageError, match=words):
        fitted(tmp_path / "out", "digits/edm", {**latent(autoencoder), **keys})
    assert not list(tmp_path.rglob("*.ckpt"))


def test_weights_of_another_kind_are_no_auto_encoder(weights: Path, autoencoder: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="holds a denoiser, and an auto-encoder is needed"):
        bench("digits/edm", **latent(weights, checkpoint=weights, n=4, out=tmp_path))
    with pytest.raises(UsageError, match="holds an auto-encoder, and a denoiser is needed"):
        bench("digits/edm", **latent(autoencoder, checkpoint=autoencoder, n=4, out=tmp_path))


def test_an_auto_encoder_is_not_sampled(tmp_path: Path):
    with pytest.raises(UsageError, match="method 'autoencoder' makes no images"):
        bench("celebahq256/autoencoder", n=4, out=tmp_path, dry_run=True)


def test_lpips_compares_no_latents(autoencoder: Path):
    method = "method={name: ddm, weighting: later, reconstruction: later, perceptual_weight: 1.0}"
    with pytest.raises(UsageError, match="LPIPS compares images, not latents"):
        build_method(
            load("digits/ddm", [*words_of(autoencoder), "network.unshuffle=1", "solver.clamp=false", method]),
            load=False,
        )


@pytest.mark.parametrize("method", ["ddm", "tdpm", "small_t", "dlg"])
def test_every_method_runs_in_latents(method: str, weights: Path, autoencoder: Path, tmp_path: Path):
    """Fit and bench, with the priors and solvers of pixels."""
    keys = latent(autoencoder)
    own: dict[str, dict[str, Any]] = {
        "ddm": {"solver.clamp": False},
        "tdpm": {"method.critic": "{name: mlp, width: 8}"},
        "small_t": {"checkpoint": weights, "training.flip": True},
        "dlg": {"checkpoint": weights, "posterior.count": 20, "prior.images_per_chain": 4},
    }  # fmt: skip
    keys |= {**own[method], "by_nfe": "{}"}
    out = fitted(tmp_path / "fit", f"digits/{method}", keys)
    made = {
        "ddm": {"checkpoint": out / "ema.safetensors"},
        "tdpm": {"checkpoint": out / "ema.safetensors"},
        "small_t": {"prior.checkpoint": out / "density.safetensors"},
        "dlg": {"posterior.checkpoint": out / "classifier.safetensors"},
    }[method]
    (point,) = bench(f"digits/{method}", **{**keys, **made}, n=12, nfe=20, out=tmp_path / "bench")
    assert 0 < point["nfe"] <= 20 and point["gflops_decoding"] > 0
    for file in made.values():
        assert open_weights(file).header["latents"]["sha256"] == open_weights(weights).header["latents"]["sha256"]
