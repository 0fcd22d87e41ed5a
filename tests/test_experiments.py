"""The shipped experiments: every file loads, every small one builds, every large one has the size it claims."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from diffaccel import experiment
from diffaccel.__main__ import main
from diffaccel.config import EXPERIMENTS, load
from diffaccel.data import Batch
from diffaccel.density import TrainingImages
from diffaccel.errors import UsageError
from diffaccel.experiment.latents import node_of
from diffaccel.latents import AUTOENCODERS
from diffaccel.methods import METHODS, Diffusion, TruncatedDiffusion
from diffaccel.nfe import EvaluationCounter
from diffaccel.noise import NoiseStreams

FILES = sorted(path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for path in EXPERIMENTS.glob("*/*.yaml"))
FILES = [name for name in FILES if not name.startswith("sweeps/")]  # see test_sweep.py
APART = ("/base", "/extractor", "/autoencoder")
"""Files that are no experiments, or whose method is not sampled."""
NAMES = [name for name in FILES if not any(part in name for part in APART)]
SMALL = [name for name in NAMES if name.startswith(("toy/", "digits/", "digits_text/", "cifar10_small/"))]
MID = [name for name in NAMES if name.startswith("cifar10_mid/")]
OTHERS = ("/tdpm", "/ddm")
"""Of the papers' size too, but each its own."""
PAPER = [name for name in NAMES if name.startswith("cifar10/") and not name.endswith(OTHERS)]
LARGER = [name for name in NAMES if name.startswith("celebahq256/") and not name.endswith((*OTHERS, "_latent"))]
OF_TEXT = ("coco256/tdpm_latent", "cub256/tdpm_latent")  # see test_caption_runs.py
LATENT = [n for n in NAMES if (n.endswith("_latent") or n == "celebahq256/ddm") and n not in OF_TEXT]


def weights_of(name: str) -> list[Path]:
    """Files of weights and statistics that an experiment names."""
    config = load(name)
    parts = (config.posterior, config.prior)
    paths = [config.checkpoint, *(part.get("checkpoint") for part in parts), config.extractor.get("path")]
    for files in (config.reference, config.floor):
        paths += files.values() if isinstance(files, dict) else [files]
    return [Path(path) for path in paths if path]


def test_there_are_experiments():
    assert {"toy/edm", "toy/ddpm", "toy/dlg", "digits/edm", "digits/ddpm", "digits/dlg"} <= set(SMALL)
    assert {f"{data}/ddm" for data in ("toy", "digits", "cifar10_small")} <= set(SMALL)
    assert {f"digits_text/{method}" for method in ("edm", "ddm", "tdpm")} <= set(SMALL)
    assert {"cub64/tdpm", "coco64/tdpm"} <= set(NAMES)
    assert {"cifar10/edm", "cifar10/dlg", "cifar10/dlg_kar2", "cifar10/small_t"} <= set(PAPER)
    assert {f"{data}/tdpm" for data in ("toy", "digits", "cifar10_small", "cifar10", "lsun256")} <= set(NAMES)
    assert {"celebahq256/dlg", "celebahq256/dlg_ours"} <= set(LARGER)
    methods = ("edm", "tdpm", "small_t", "dlg")
    assert {f"{data}/{name}_latent" for data in ("celebahq256", "lsun256") for name in methods} <= set(LATENT)
    assert {"celebahq256/ddm", "lsun256/ddm_latent"} <= set(LATENT)


@pytest.mark.parametrize("name", [name for name in FILES if "/base" not in name])
def test_it_loads(name: str):
    config = load(name)
    assert config.experiment == name
    assert config.data["name"] and config.shape and config.nfe


@pytest.mark.parametrize("name", SMALL)
def test_a_small_one_builds_and_can_spend_its_budget(name: str):
    config = load(name)
    method = experiment.build_method(config, load=False)
    assert isinstance(method, Diffusion)
    for budget in (*config.nfe, 10.0):
        if budget < 20 and name == "toy/dlg":
            continue  # its chains take 60 evaluations each to burn in
        plan = method.sampler.plan(budget, config.n)
        assert budget - 1 < method.sampler.planned_nfe(plan, config.n) <= budget


@pytest.mark.parametrize("name", SMALL)
def test_what_a_small_one_needs_is_shipped(name: str):
    missing = [path for path in weights_of(name) if not path.is_file()]
    if missing:
        pytest.fail(f"{name} names {[str(path) for path in missing]}, which do not exist")
    method = experiment.build_method(load(name))
    experiment.build_evaluator(load(name), method.sampler)  # extractor and references fit each other


@pytest.mark.parametrize(
    ("name", "word"), [("digits/edm", "checkpoint=null"), ("cifar10_small/tdpm", "prior.checkpoint=null")]
)
def test_nothing_is_sampled_from_untrained_networks(name: str, word: str):
    with pytest.raises(UsageError, match=f"set {word.split('=')[0]}=FILE"):
        experiment.build_method(load(name, [word]), frozen=True)


def test_digits_ship_in_four_megabytes_with_their_story():
    files = list((EXPERIMENTS / "digits" / "weights").iterdir())
    assert sum(file.stat().st_size for file in files) < 4_000_000
    for name in ("edm", "ddpm", "ddm", "tdpm", "classifier"):
        with safe_open(EXPERIMENTS / "digits" / "weights" / f"{name}.safetensors", framework="pt") as file:
            story = json.loads(file.metadata()["diffaccel"])
        assert {"method", "experiment", "data", "seed", "module", "images_seen", "hours", "version"} <= story.keys()
        assert story["images_seen"] > 0


def build_on_meta(name: str, words: Sequence[str] = ()) -> tuple[Diffusion, float]:
    """Build without memory or weights; returns the method and the FLOPs of one image through its network."""
    config = load(name, words)
    with torch.device("meta"):
        method = experiment.build_method(config, load=False)
        x = torch.empty(2, *method.shape)
        with FlopCounterMode(display=False) as counter:
            output = method.denoiser.network(x, torch.empty(2))
    heads = sum(config.network.get("heads", [1]))
    assert output.shape == (2, heads * x.shape[1], *x.shape[2:]) and output.is_meta
    assert all(parameter.is_meta for parameter in method.parameters())
    return method, counter.get_total_flops() / len(x)


@pytest.mark.parametrize("name", MID)
def test_a_mid_one_builds_and_can_spend_its_budget(name: str):
    """Its weights come from `make train`; all else that it names ships with cifar10_small."""
    config = load(name)
    assert config.compile and config.channels_last and not config.by_nfe and not config.tuned_for
    own = EXPERIMENTS / "cifar10_mid"
    named = [path for path in weights_of(name) if not path.resolve().is_relative_to(own.resolve())]
    judges = [Path(judge["path"]) for judge in config.judges if "path" in judge]
    assert len(named) >= 6 and all(path.is_file() for path in [*named, *judges])
    method = experiment.build_method(load(name, ["compile=false"]), load=False)
    for budget in (*config.nfe, *config.validation.nfe):
        plan = method.sampler.plan(budget, config.n)
        assert budget - 1 < method.sampler.planned_nfe(plan, config.n) <= budget


@pytest.mark.parametrize("name", ["edm", "ddm", "tdpm_shared"])
def test_the_mid_recipe_is_one_for_all(name: str):
    """A network of 5.4 to 5.8 M parameters and 0.50 GFLOPs, 16 M images, and weights below 12 MB in bf16."""
    config = load(f"cifar10_mid/{name}", ["compile=false"])
    method = experiment.build_method(config, load=False)
    parameters = sum(parameter.numel() for parameter in method.denoiser.network.parameters())
    assert parameters == 5_559_340
    assert 2 * parameters < 12_000_000
    with EvaluationCounter({"denoiser": method.denoiser.network}) as counter, torch.no_grad():
        method.denoiser.network(torch.zeros(1, 3, 32, 32), torch.zeros(1))
    assert counter.flops["denoiser"] == pytest.approx(0.50e9, rel=0.01)
    training = config.training
    assert (training.images, training.batch_size, training.decay) == (16_000_000, 1024, 0.4)
    assert len(training.ema_half_life) == 3 and max(training.ema_half_life) <= 0.05 * training.images
    whole = training.lr
    for seen, rate in ((9_600_000, whole), (12_800_000, whole / 2), (14_400_000, whole / 4), (16_000_000, 0.0)):
        method.images_seen = seen
        assert method.learning_rate() == pytest.approx(rate)


def test_the_mid_validation_judge_is_no_judge():
    config = load("cifar10_mid/edm")
    method = experiment.build_method(load("cifar10_mid/edm", ["compile=false"]), load=False)
    validator = experiment.build_validator(config, method.sampler)
    assert validator is not None and validator.extractor.name == "cifar10_check"
    assert "cifar10_check" not in [judge.name for judge in experiment.build_judges(config, "CIFAR-10")]
    with pytest.raises(UsageError, match="is also a judge"):
        experiment.build_validator(config, method.sampler, validator.judges)
    with pytest.raises(UsageError, match="is also the seed of the run"):
        experiment.build_validator(load("cifar10_mid/edm", ["seed=7"]), method.sampler)
    with pytest.raises(UsageError, match=r"validation\.judge is not"):
        experiment.build_validator(load("digits/edm", ["validation.reference=x.npz"]), method.sampler)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*SMALL, *MID)])
def test_a_large_one_builds_and_plans_its_budgets(name: str, tmp_path: Path):
    config = load(name)
    words = []
    if config.condition:  # made from test images, which do not ship
        images = np.zeros((config.n, *config.shape[1:], config.shape[0]), np.uint8)
        np.savez(tmp_path / "images.npz", images=images, captions=np.full(config.n, "a bird"))
        words = [f"data.path={tmp_path / 'images.npz'}", f"data.test_path={tmp_path / 'images.npz'}"]
    if config.condition.get("name") == "captions":  # by an encoder that needs no weights
        words = [f"data={{name: npz, path: {tmp_path / 'images.npz'}, test_path: {tmp_path / 'images.npz'}}}"]
        words += ["condition.path=", "condition.encoder={name: words, dim: 768}"]
    method, _ = build_on_meta(name, words)
    for budget in config.nfe:
        plan = method.sampler.plan(budget, config.n)
        apart = 0 if method.prior.burn_in_counted else method.prior.burn_in_evaluations(config.n) / config.n
        assert not method.sampler.planned_nfe(plan, config.n) - apart > budget  # an adaptive solver's is not known


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_size_one_has_the_papers_size(name: str):
    method, flops = build_on_meta(name)
    parameters = sum(parameter.numel() for parameter in method.denoiser.network.parameters())
    assert 50e6 < parameters < 63e6, "EDM's DDPM++ has 55.7 M, NCSN++ 62.8 M"
    assert 20e9 < flops < 60e9, "EDM's DDPM++ takes about 21 G multiply-adds, two FLOPs each"


@pytest.mark.parametrize(
    ("name", "denoiser", "critic", "rates"),
    [
        ("cifar10/tdpm", 35_746_307, 21_507_073, [2e-4, 2e-5, 2.5e-3]),
        ("lsun256/tdpm", 113_673_219, 28_864_129, [2e-5, 1e-5, 2e-3]),
    ],
)
def test_tdpm_has_the_papers_sizes_and_rates(name: str, denoiser: int, critic: int, rates: list[float]):
    method, _ = build_on_meta(name)
    assert isinstance(method, TruncatedDiffusion)
    assert sum(parameter.numel() for parameter in method.denoiser.network.parameters()) == denoiser
    assert method.critic and sum(parameter.numel() for parameter in method.critic.parameters()) == critic
    assert [phase.lr * method.training_plan.lr for phase in method.phases()] == pytest.approx(rates)
    assert method.implicit.token == 99 and method.sampler.plan(100, 10).steps == 99


def test_the_small_critic_costs_no_more_than_the_network():
    """Forwards a step, a backward being two: of the critic 8, of the network 4."""
    method, flops = build_on_meta("cifar10_small/tdpm_shared")
    assert isinstance(method, TruncatedDiffusion) and method.critic
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        method.critic.head(method.critic.features(torch.empty(2, 3, 32, 32)), None)
    assert 8 * counter.get_total_flops() / 2 < 4 * flops


@pytest.mark.parametrize(("name", "millions"), [("cifar10/ddm", 216.1), ("celebahq256/ddm", 121.1)])
def test_ddm_has_the_sizes_of_its_reference(name: str, millions: float):
    method, _ = build_on_meta(name)
    parameters = sum(parameter.numel() for parameter in method.denoiser.network.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", LATENT)
def test_latents_are_those_of_latent_diffusion(name: str):
    """An auto-encoder of 55.3 M parameters with a factor of 4, and latents of 3x64x64."""
    method, flops = build_on_meta(name)
    latents = method.sampler.latents
    assert latents is not None and latents.shape == (3, 64, 64) == method.shape
    assert sum(parameter.numel() for parameter in latents.parameters()) == 55_312_063
    assert 50e9 < flops < 100e9, "a sixth of the network of pixels, or less"
    header = load(name).latents
    assert header["checkpoint"].endswith("weights/autoencoder.safetensors")


@pytest.mark.parametrize("data", ["celebahq256", "lsun256"])
def test_the_auto_encoder_of_the_papers_size_can_be_trained(data: str):
    config = load(f"{data}/autoencoder")
    with torch.device("meta"):
        network = AUTOENCODERS.build(node_of(config), shape=(3, 256, 256))
        recipe = {**config.method, "perceptual_weight": 0.0}  # LPIPS reads weights that do not ship
        method = METHODS.build(recipe, network=network, training=config.training)
    assert [phase.name for phase in method.phases()] == ["autoencoder", "critic"]
    assert sum(parameter.numel() for parameter in method.critic.parameters()) / 1e6 == pytest.approx(2.76, abs=0.01)


SMALLER = ["latents.widths=[8,8,8]", "latents.groups=4", "threads=1", "logger=none", "n=4", "precision=32-true"]
NARROW = {
    "adm": ["network.width=16", "network.multipliers=[1,1,1,1]", "network.blocks=1"],
    "unet": ["network.widths=[8,8,8,8]", "network.blocks=1", "network.embedding=16", "network.attention=[3]"],
    "ddpm": ["network.width=32", "network.multipliers=[1,1,1]", "network.blocks=1"],
}


@pytest.mark.parametrize("name", LATENT)
def test_a_dry_run_in_latents(name: str, capsys: pytest.CaptureFixture[str]):
    """Without data and weights; with narrow networks, because a CPU takes minutes for those of the papers' size."""
    narrow = NARROW[load(name).network["name"]]
    assert main(["bench", name, "dry_run=true", "nfe=50", *SMALLER, *narrow]) == 0
    printed = capsys.readouterr().out
    assert "images (3, 256, 256), latents (3, 64, 64)" in printed and "decoding takes" in printed


@pytest.mark.parametrize(
    ("data", "words"),
    [("digits", []), ("cifar10_small", []), ("cifar10_small", ["network.heads=[1,1]", "network.widths=[48,72,104]"])],
)
def test_ddm_is_as_large_as_edm(data: str, words: list[str]):
    (edm, edm_flops), (ddm, ddm_flops) = build_on_meta(f"{data}/edm"), build_on_meta(f"{data}/ddm", words)
    sizes = [sum(p.numel() for p in method.denoiser.network.parameters()) for method in (edm, ddm)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert ddm_flops == pytest.approx(edm_flops, rel=0.04)


def test_the_papers_glow_is_trained_from_the_gaussian_on():
    """Of 22 M parameters; a step on a few images, at a fraction of the width, comes off the Gaussian."""
    method, _ = build_on_meta("cifar10/small_t")
    density = method.sampler.evaluated_networks()["density"]
    assert 10e6 < sum(parameter.numel() for parameter in density.parameters()) < 40e6
    method = experiment.build_method(load("cifar10/small_t", ["prior.density.width=16", "network.widths=[16,16,16]"]))
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    method.density.fit(TrainingImages(lambda rank, world: iter([(0, images)])))
    before = method.density.log_prob(images)
    *_, phase = method.phases()
    optimizer = torch.optim.Adam(phase.parameters, 1e-3)
    phase.loss(Batch(images, None, torch.arange(8)), NoiseStreams(0, range(8))).mean().backward()
    optimizer.step()
    assert phase.name == "density" and not torch.equal(method.density.log_prob(images), before)


@pytest.mark.parametrize("name", LARGER)
def test_celebahq_is_the_published_network(name: str):
    method, flops = build_on_meta(name)
    assert sum(parameter.numel() for parameter in method.denoiser.network.parameters()) == 65_574_421
    assert 500e9 < flops < 600e9


def test_the_papers_noise_classifier():
    """1000 levels on 32x32 images: 389 k parameters in the convolutions, 1025 k in the linear layer."""
    with torch.device("meta"):
        method = experiment.build_method(load("cifar10/dlg"), load=False)
    (classifier,) = method.sampler.auxiliary_networks().values()
    sizes = [3, 32, 64, 128, 256]
    convolutions = sum(9 * a * b + b for a, b in zip(sizes, sizes[1:], strict=False))
    assert sum(parameter.numel() for parameter in classifier.parameters()) == convolutions + 1024 * 1000 + 1000
