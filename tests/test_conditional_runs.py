"""Fits and benches with conditions: what points hold, what files of weights say, and what is refused before work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffaccel import Sampler
from diffaccel.api import bench, fit, load
from diffaccel.condition import Condition, Kinds
from diffaccel.config import EXPERIMENTS
from diffaccel.config import load as load_config
from diffaccel.data.module import DataModule
from diffaccel.denoiser import GaussianDenoiser
from diffaccel.errors import UsageError
from diffaccel.experiment import build_method
from diffaccel.experiment.build import build_inputs
from diffaccel.noise import NoiseStreams
from diffaccel.prior.warm import WarmPrior
from diffaccel.process import Decoupled, VariancePreserving
from diffaccel.solver import SOLVERS

SR = {"condition": "{name: super_resolution, factor: 2}", "network.image": 1}
HOLES = {"condition": "{name: inpainting}", "network.image": 1, "network.mask": True}
FAST: dict[str, Any] = {"logger": "none", "threads": 1, "network.widths": [8, 8], "precision": "32-true"}


def dotted(*parts: dict[str, Any], **keys: Any) -> dict[str, Any]:
    merged: dict[str, Any] = dict(FAST)
    for part in parts:
        merged |= part
    return merged | keys


def fitted(out: Path, name: str, *parts: dict[str, Any]) -> Path:
    keys = dotted(*parts, out=out, reference="", floor="")
    return fit(name, **keys, **{"training.images": 64, "training.batch_size": 32, "training.warmup": 1})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tmp_path_factory.mktemp("sr"), "digits/ddm", SR) / "ema.safetensors"


def test_a_bench_measures_the_restoration(weights: Path, tmp_path: Path):
    """Samples are consistent even with a network that has learned nothing; points are cached."""
    keys = dotted(SR, checkpoint=weights, n=24, out=tmp_path, nfe=3)
    (point,) = bench("digits/ddm", **keys)
    metrics = point["metrics"]
    assert metrics["consistency"] > 35
    assert 10 < metrics["psnr"] < 20 and 0 < metrics["ssim"] < 1 and 10 < metrics["psnr_baseline"] < 20
    assert point["evaluations"] == {"denoiser": 3 * 24} and point["metrics"]["fd_digits"] > 0
    assert "psnr_mean" not in metrics
    again = bench("digits/ddm", **keys)[0]
    assert again["key"] == point["key"] and again["seconds_per_image"] == point["seconds_per_image"], (
        "not measured anew"
    )
    more = bench("digits/ddm", **{**keys, "condition": "{name: super_resolution, factor: 2, samples: 4}"})[0]
    assert more["key"] != point["key"] and more["images_sha256"] != point["images_sha256"]
    assert more["metrics"]["psnr_mean"] > more["metrics"]["psnr"]


def test_holes_are_filled_and_known_pixels_stay(tmp_path: Path):
    trained = fitted(tmp_path / "fit", "digits/edm", HOLES) / "ema.safetensors"
    for solver in ("dpmpp2m", "euler_maruyama"):
        keys = dotted(HOLES, checkpoint=trained, n=12, out=tmp_path / solver, nfe=4, solver=solver)
        (point,) = bench("digits/edm", **keys)
        assert point["metrics"]["known_error"] == 0


def test_a_fit_begins_with_the_network_without_condition(tmp_path: Path):
    """At a rate next to 0 the weights stay those of the file, with zeros for the image; other networks are refused."""
    plain = fitted(tmp_path / "plain", "digits/edm") / "ema.safetensors"
    still = {"training.lr": 1e-30, "init": plain}
    begun = load_file(fitted(tmp_path / "begun", "digits/edm", SR, still) / "raw.safetensors")
    start = load_file(plain)
    added = begun["stem.weight"].shape[1] - start["stem.weight"].shape[1]
    assert added > 0 and begun["stem.weight"][:, -added:].abs().max() < 1e-20
    begun["stem.weight"] = begun["stem.weight"][:, :-added]
    torch.testing.assert_close(begun, dict(start), rtol=0, atol=1e-20)
    with pytest.raises(UsageError, match="network.widths is"):
        fitted(tmp_path / "no", "digits/edm", SR, {**still, "network.widths": [16, 16]})
    with pytest.raises(UsageError, match="network.image is 1 in the file"):
        fitted(tmp_path / "no", "digits/edm", {"init": tmp_path / "begun" / "ema.safetensors"})


def test_weights_say_their_condition(weights: Path, tmp_path: Path):
    for other, words in (
        (
            {**SR, "condition": "{name: super_resolution, factor: 4}"},
            "condition.factor is 2 in the file and 4 in",
        ),
        (
            {**SR, "condition": "{name: super_resolution, factor: 2, kernel: area}"},
            "condition.kernel is .bicubic. in",
        ),
        (HOLES, "network.mask is false in the file and true"),
    ):
        with pytest.raises(UsageError, match=words):
            bench("digits/ddm", **dotted(other, checkpoint=weights, n=4, out=tmp_path))
    with pytest.raises(UsageError, match="likelihood=true is unconditional, but the network takes an image"):
        bench("digits/ddm", **dotted(SR, checkpoint=weights, n=4, out=tmp_path, likelihood=True))
    plain = fitted(tmp_path / "plain", "digits/ddm") / "ema.safetensors"
    with pytest.raises(UsageError, match="network.image is 0 in the file and 1 in the experiment"):
        bench("digits/ddm", **dotted(SR, checkpoint=plain, n=4, out=tmp_path))


@pytest.mark.parametrize(("keys", "words"), [
    ({"network.image": 1}, "takes an image of 1 channel, but the experiment gives no condition: set condition="),
    ({"caption": "a seven"}, "condition.caption is set, but the experiment has no condition: remove it, set"),
    ({"condition": "{name: inpainting}"}, "takes no condition, but condition=inpainting gives an image of 1 ch"),
    ({**SR, "n": 361}, "n=361 with 1 sample.s. per image requires 361 test images .* has 360: set n=360 or less"),
    ({**SR, "prior": "{name: warm, ratio_star: -1}"}, "ratio_star is -1.*it must be 0 or more"),
    ({**SR, "condition": "{name: super_resolution, factor: 5}"}, "factor=5 must be 2 or more and divide images of 8x8"),
])  # fmt: skip
def test_what_does_not_fit_is_an_error_before_work(keys: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(UsageError, match=words):
        bench("digits/ddm", **{**dotted(keys), "out": tmp_path, "dry_run": True, "checkpoint": None})


@pytest.mark.parametrize(("word", "words"), [
    ("samples=1.5", "condition.samples=1.5: give a whole number"), ("samples=abc", "=abc: give a whole number"),
    ("samples=true", "samples=True: give a whole"), ("seed=1.5", "condition.seed=1.5: give a whole number"),
    ("seed=[1]", r"condition.seed=\[1\]: give a number"), ("lpips=maybe", "lpips=maybe: give true or false"),
    ("samples=0", "samples=0 and seed=0: set 1 or more"),
])  # fmt: skip
def test_keys_of_the_samples_of_conditions_have_their_types(word: str, words: str):
    with pytest.raises(UsageError, match=words):
        build_inputs(load_config("digits/edm", ["condition=inpainting", f"condition.{word}"]))


def test_null_is_the_default_of_the_samples_of_conditions():
    words = ["condition.samples=2.0", "condition.seed=null", "condition.lpips=none"]
    inputs = build_inputs(load_config("digits/edm", ["condition=inpainting", *words]))
    assert (inputs.samples, inputs.seed, inputs.lpips) == (2, 0, False) and inputs.condition(range(3)).size == 3


def test_augmentation_would_tear_image_and_condition_apart(tmp_path: Path):
    with pytest.raises(UsageError, match="training.augment.* condition"):
        fitted(tmp_path, "digits/edm", SR, {"network.augment": 9, "training.augment": 0.2})


@pytest.mark.parametrize("method", ["edm", "ddm", "tdpm", "small_t"])
def test_every_method_trains_with_a_condition(method: str):
    """The loss of each phase depends on the condition's image."""
    config = load_config(f"digits/{method}", [
        "condition={name: super_resolution, factor: 2}", "network.image=1", "network.widths=8,8", "checkpoint=",
        *(["method.frozen=false", "method.objectives=[]", "method.critic={name: stylegan2, channel_base: 64}"]
          if method == "tdpm" else []),
        *(["method.frozen=false"] if method == "small_t" else []),
    ])  # fmt: skip
    built = build_method(config, load=False)
    conditioner = built.sampler.inputs.conditioner
    module = DataModule({"name": "digits"}, batch_size=16, conditioner=conditioner)
    batch = next(iter(module.train_dataloader()))
    other = batch._replace(condition=batch.condition._replace(image=-batch.condition.image))
    for name, parameter in built.named_parameters():
        if parameter.ndim > 1 and not name.startswith("critic"):
            torch.nn.init.normal_(parameter, std=0.1)
    found = 0
    for phase in built.phases():
        if phase.name == "density":
            continue
        losses = [phase.loss(one, NoiseStreams(0, one.index)) for one in (batch, other)]
        assert not torch.allclose(*losses, rtol=1e-5), phase.name
        found += 1
    assert found >= (3 if method == "tdpm" else 1)


def test_a_checkpoint_takes_the_users_condition(weights: Path):
    """A file alone determines the network; the condition is given to the sampler."""
    keys = {key: value for key, value in FAST.items() if key != "logger"}
    model = load("digits/ddm", **keys, **SR, checkpoint=weights)
    sampler = Sampler(model)
    assert sampler.takes == Kinds(image=1)
    image = sampler.inputs.condition(range(3)).image
    again = sampler(3, nfe=2, condition=Condition(image=image))
    assert torch.equal(again, sampler(3, nfe=2))
    assert "stem.weight" in load_file(weights) and load_file(weights)["stem.weight"].shape[1] == 2


def test_a_file_alone_imposes_what_its_condition_determines(weights: Path):
    """Its header names the conditioner, by which samples are consistent with the condition even without training."""
    keys = {key: value for key, value in FAST.items() if key != "logger"}
    named, alone = Sampler(load("digits/ddm", **keys, **SR, checkpoint=weights)), Sampler(load(weights))
    condition, shrink = named.inputs.condition(range(3)), alone.inputs.conditioner.observe
    small = (shrink(condition.image) + 1) * 127.5
    for sampler in (named, alone):
        assert (shrink(sampler(3, nfe=3, condition=condition).float()) - small).abs().max() < 12
    with pytest.raises(UsageError, match="its file has no images: give condition=... to the sampler, or load an exp"):
        alone(3, nfe=3)


# --- The warm start


class Restorer(GaussianDenoiser):
    takes = Kinds(image=1)


@pytest.mark.parametrize("process", [VariancePreserving(), Decoupled()], ids=repr)
def test_a_warm_start_has_the_law_of_the_diffused_image(process: Any):
    n, image = 3000, 0.6
    denoiser = Restorer(torch.zeros(1, 2, 2), 1.0, process).given(Condition(image=torch.full((n, 1, 2, 2), image)))
    x_t, t = WarmPrior(0.5)(denoiser, NoiseStreams(0, range(n)), (1, 2, 2))
    alpha, sigma = process.alpha(t)[0].item(), process.sigma(t)[0].item()
    assert sigma / alpha == pytest.approx(0.5)
    assert x_t.mean().item() == pytest.approx(alpha * image, abs=4 * sigma / (4 * n) ** 0.5)
    assert x_t.std().item() == pytest.approx(sigma, rel=0.03)


def test_a_warm_start_at_ratio_0_is_the_degraded_image_in_no_evaluation():
    values = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    denoiser = Restorer(torch.zeros(1, 8, 8), 1.0)
    sampler = Sampler(denoiser, WarmPrior(0.0), SOLVERS.build("ddim"), (1, 8, 8))
    assert torch.equal(sampler(4, nfe=1, condition=Condition(image=values.float() / 127.5 - 1)), values)
    assert sampler.spent.nfe == 0
    with pytest.raises(UsageError, match="starts from a condition's image of shape"):
        Sampler(GaussianDenoiser(torch.zeros(1, 8, 8), 1.0), WarmPrior(1.0), SOLVERS.build("ddim"), (1, 8, 8))(2, nfe=2)


@pytest.mark.parametrize(("name", "nfe"), [("edm", 10), ("tdpm", 2)])
def test_shipped_samples_of_a_class_are_recognised(name: str, nfe: int, tmp_path: Path):
    """Without guidance, by a classifier that did not train them: in the long run 0.3 and 0.4, and 0.1 by chance."""
    judge = [{"name": "small", "path": EXPERIMENTS / "cifar10_small" / "weights" / "extractor.safetensors"}]
    keys = {
        "judges": judge,
        "metrics": "[frechet,accuracy]",
        "logger": "none",
        "threads": 1,
        "seed": 5,
        "out": tmp_path,
    }
    (point,) = bench(f"cifar10_class/{name}", n=300, nfe=nfe, **keys)
    assert point["metrics"]["accuracy"] > 0.2
    assert point["metrics"]["accuracy_floor"] == pytest.approx(0.892, abs=0.001)
