"""The shipped experiments: every file loads, every small one builds, every large one has the size it claims."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from diffaccel import experiment
from diffaccel.config import EXPERIMENTS, load
from diffaccel.methods import Diffusion

FILES = sorted(path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for path in EXPERIMENTS.glob("*/*.yaml"))
NAMES = [name for name in FILES if "/base" not in name and "/extractor" not in name]
SMALL = [name for name in NAMES if name.startswith(("toy/", "digits/", "cifar10_small/"))]
PAPER = [name for name in NAMES if name.startswith("cifar10/") and not name.endswith("/ddm")]


def weights_of(name: str) -> list[Path]:
    """Files of weights and statistics that an experiment names."""
    config = load(name)
    paths = [config.checkpoint, config.posterior.get("checkpoint"), config.extractor.get("path")]
    return [Path(path) for path in [*paths, config.reference, config.floor] if path]


def test_there_are_experiments():
    assert {"toy/edm", "toy/ddpm", "toy/dlg", "digits/edm", "digits/ddpm", "digits/dlg"} <= set(SMALL)
    assert {"toy/ddm", "digits/ddm", "cifar10_small/ddm"} <= set(SMALL)
    assert {"cifar10/edm", "cifar10/dlg"} <= set(PAPER)


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("/base")])
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
        plan = method.plan(budget, config.n)
        assert budget - 1 < method.planned_nfe(plan, config.n) <= budget


@pytest.mark.parametrize("name", SMALL)
def test_what_a_small_one_needs_is_shipped(name: str):
    missing = [path for path in weights_of(name) if not path.is_file()]
    if missing:
        pytest.fail(f"{name} names {[str(path) for path in missing]}, which do not exist")
    method = experiment.build_method(load(name))
    experiment.build_evaluator(load(name), method)  # extractor and references fit each other


def test_digits_ship_in_four_megabytes_with_their_story():
    files = list((EXPERIMENTS / "digits" / "weights").iterdir())
    assert sum(file.stat().st_size for file in files) < 4_000_000
    for name in ("edm", "ddpm", "ddm", "classifier"):
        with safe_open(EXPERIMENTS / "digits" / "weights" / f"{name}.safetensors", framework="pt") as file:
            story = json.loads(file.metadata()["diffaccel"])
        assert {"method", "experiment", "data", "seed", "module", "images_seen", "hours", "version"} <= story.keys()
        assert story["images_seen"] > 0


def build_on_meta(name: str, words: Sequence[str] = ()) -> tuple[Diffusion, float]:
    """Build without memory or weights; returns the method and the FLOPs of one image through its network."""
    config = load(name, words)
    with torch.device("meta"):
        method = experiment.build_method(config, load=False)
        x = torch.empty(2, *config.shape)
        with FlopCounterMode(display=False) as counter:
            output = method.denoiser.network(x, torch.empty(2))
    heads = sum(config.network.get("heads", [1]))
    assert output.shape == (2, heads * x.shape[1], *x.shape[2:]) and output.is_meta
    assert all(parameter.is_meta for parameter in method.parameters())
    return method, counter.get_total_flops() / len(x)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SMALL])
def test_a_large_one_builds_and_plans_its_budgets(name: str):
    method, _ = build_on_meta(name)
    config = load(name)
    for budget in config.nfe:
        assert method.planned_nfe(method.plan(budget, config.n), config.n) <= budget


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_size_one_has_the_papers_size(name: str):
    method, flops = build_on_meta(name)
    parameters = sum(parameter.numel() for parameter in method.denoiser.network.parameters())
    assert 50e6 < parameters < 62e6, "EDM's DDPM++ has 55.7 M"
    assert 20e9 < flops < 60e9, "EDM's DDPM++ takes about 21 G multiply-adds, two FLOPs each"


@pytest.mark.parametrize(("name", "millions"), [("cifar10/ddm", 216.1), ("celebahq256/ddm", 121.1)])
def test_ddm_has_the_sizes_of_its_reference(name: str, millions: float):
    method, _ = build_on_meta(name)
    parameters = sum(parameter.numel() for parameter in method.denoiser.network.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("data", "words"),
    [("digits", []), ("cifar10_small", []), ("cifar10_small", ["network.heads=[1,1]", "network.widths=[48,72,104]"])],
)
def test_ddm_is_as_large_as_edm(data: str, words: list[str]):
    (edm, edm_flops), (ddm, ddm_flops) = build_on_meta(f"{data}/edm"), build_on_meta(f"{data}/ddm", words)
    sizes = [sum(p.numel() for p in method.denoiser.network.parameters()) for method in (edm, ddm)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert ddm_flops == pytest.approx(edm_flops, rel=0.04)


def test_the_papers_noise_classifier():
    """1000 levels on 32x32 images: 389 k parameters in the convolutions, 1025 k in the linear layer."""
    with torch.device("meta"):
        method = experiment.build_method(load("cifar10/dlg"), load=False)
    (classifier,) = method.auxiliary_networks().values()
    sizes = [3, 32, 64, 128, 256]
    convolutions = sum(9 * a * b + b for a, b in zip(sizes, sizes[1:], strict=False))
    assert sum(parameter.numel() for parameter in classifier.parameters()) == convolutions + 1024 * 1000 + 1000
