"""Checkpoints of other programs against their networks, evaluated independently, and against golden files.

Golden files (``score_sde_tiny_*``, ``edm_tiny_*``, with what the reference implementations made of them) are looked for
in the folder that DIFFACCEL_GOLDEN names.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import (
    LAYOUTS,
    VE,
    VP,
    Dhariwal,
    ScoreSDE,
    as_filed,
    edm_content,
    edm_modules,
    random_network,
    score_sde_content,
    write_pickle,
)
from torch import Tensor

from diffaccel.config import load
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.experiment.build import build_frozen
from diffaccel.pretrained import convert, describe, read
from diffaccel.pretrained.score_sde import listing
from diffaccel.process import Prediction, expand

__all__ = ["edm_modules"]  # a fixture


def off(found: Tensor, expected: Tensor) -> float:
    """Largest error of each level, relative to the largest value there; the worst of the levels."""
    error, size = ((a.double().abs().flatten(1).amax(1)) for a in (found - expected, expected))
    return (error / size).max().item()


def at_sigma(denoiser: Denoiser, y: Tensor, sigma: Tensor) -> Prediction:
    """Predict for y = x_0 + sigma n, in units of [-1, 1]."""
    x_t, t = denoiser.process.from_ratio(y, sigma.double())
    return denoiser(x_t, t)


# score_sde_pytorch

SIGMAS = torch.tensor([0.02, 0.6, 30.0])  # of data in [0, 1]


def states(sigma: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(len(sigma), 3, 32, 32, generator=generator) + sigma[:, None, None, None] * torch.randn(
        len(sigma), 3, 32, 32, generator=generator
    )


@pytest.mark.parametrize(("name", "older"), [("ve", False), ("pyramid", True), ("deep", False)])
def test_ve_checkpoints_score_as_their_own_network_does(tmp_path: Path, name: str, older: bool) -> None:
    """Averaged weights, in their names, on data in [0, 1]: score doubles, sigma halves, D(2 x - 1) = 2 D(x) - 1."""
    layout = LAYOUTS[name]
    averaged, raw = random_network(1, **layout), random_network(2, **layout)
    content = score_sde_content(averaged, raw)
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not older)
    found = read(tmp_path / "a.pth")
    denoiser = found.build()
    x = states(SIGMAS)
    for weights, network in (("ema", averaged), ("raw", raw)):
        tensors = as_filed(listing(network), network)
        if weights == "raw":
            tensors["all_modules.0.W"] = content["model"]["module.all_modules.0.W"]
        score = ScoreSDE(tensors, layout)(x, SIGMAS)
        prediction = at_sigma(read(tmp_path / "a.pth", weights=weights).build(), 2 * x - 1, 2 * SIGMAS)
        assert off(-prediction.eps / expand(2 * SIGMAS, x), score / 2) < 1e-4
        assert off((prediction.x_0 + 1) / 2, x + expand(SIGMAS, x).square() * score) < 1e-4
    assert denoiser.ratio_range == pytest.approx((0.02, 100.0))
    assert found.source["weights"] == "ema" and "doubled" in found.source["units"]


def test_vp_checkpoints_predict_as_their_own_network_does(tmp_path: Path) -> None:
    averaged, raw = random_network(1, **VP), random_network(2, **VP)
    torch.save(score_sde_content(averaged, raw), tmp_path / "a.pth")
    denoiser, t = read(tmp_path / "a.pth").build(), torch.tensor([1e-3, 0.5, 0.9], dtype=torch.float64)
    alpha, sigma = denoiser.process.alpha(t), denoiser.process.sigma(t)
    x_t = torch.randn(3, 3, 32, 32)
    x_t = expand(alpha, x_t) * 0.3 + expand(sigma, x_t) * x_t
    eps = ScoreSDE(as_filed(listing(averaged), averaged), VP)(x_t, 999 * t.float())
    prediction = denoiser(x_t, t)
    assert off(prediction.eps, eps) < 1e-4
    assert off(prediction.x_0, (x_t - expand(sigma, x_t) * eps) / expand(alpha, x_t)) < 1e-4
    assert denoiser.ratio_range == pytest.approx((0.0010005, 152.17), rel=1e-4)


def test_without_a_prefix_or_with_many_sigmas_it_is_the_same_checkpoint(tmp_path: Path) -> None:
    networks = random_network(1, **VE), random_network(2, **VE)
    prefixed = {"a": {}, "b": {"prefix": "", "levels": 1000}, "c": {"prefix": "_orig_mod.module."}}
    for name, keys in prefixed.items():
        torch.save(score_sde_content(*networks, **keys), tmp_path / f"{name}.pth")
    a, *others = (read(tmp_path / f"{name}.pth") for name in prefixed)
    for b in others:
        assert a.denoiser == b.denoiser and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_the_largest_level_is_the_file_s_or_asked_for(tmp_path: Path) -> None:
    content = score_sde_content(random_network(1, **VE), random_network(2, **VE), sigma_max=348.0)
    torch.save(content, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth").denoiser["ratio_max"] == 696.0
    del content["model"]["module.sigmas"]
    torch.save(content, tmp_path / "b.pth")
    with pytest.raises(UsageError, match="sigma_max="):
        read(tmp_path / "b.pth")
    assert read(tmp_path / "b.pth", sigma_max=378.0).denoiser["ratio_max"] == 756.0
    other = read(tmp_path / "a.pth", sigma_max=50.0, size=64)
    assert other.denoiser["ratio_max"] == 100.0 and "replaced size=32 and sigma_max=348.0 of the file" in describe(
        other
    )
    assert "replaced" not in describe(read(tmp_path / "a.pth", sigma_max=348.0, size=32))


def test_options_that_a_file_has_no_use_for_are_refused(tmp_path: Path, edm_modules: None) -> None:
    network = random_network(1, **VE)
    write_pickle(tmp_path / "edm.pkl", edm_content(network, VE))
    torch.save(score_sde_content(random_network(1, **VP), random_network(2, **VP)), tmp_path / "vp.pth")
    for file, key in (("edm.pkl", "size"), ("edm.pkl", "sigma_max"), ("vp.pth", "sigma_max")):
        with pytest.raises(UsageError, match=f"{key}=64 has no use .*: leave it out"):
            read(tmp_path / file, **{key: 64})


def test_attention_tells_the_size_of_the_images(tmp_path: Path) -> None:
    torch.save(score_sde_content(random_network(1, **VE), random_network(2, **VE)), tmp_path / "a.pth")
    assert read(tmp_path / "a.pth").shape == (3, 32, 32)
    larger = read(tmp_path / "a.pth", size=64)
    assert larger.shape == (3, 64, 64) and larger.network["attention"] == [32]


# EDM


@pytest.mark.parametrize("name", ["ve", "vp", "pyramid"])
def test_edm_pickles_hold_what_was_written(tmp_path: Path, edm_modules: None, name: str) -> None:
    layout = {**LAYOUTS[name], "augment": 9, "classes": 10 if name == "vp" else 0}
    network = random_network(4, **layout)
    write_pickle(tmp_path / "a.pkl", edm_content(network, layout))
    found = read(tmp_path / "a.pkl")
    assert list(found.tensors) == list(network.state_dict())
    assert all(torch.equal(found.tensors[name], value) for name, value in network.state_dict().items())
    sigma = torch.tensor([0.02, 0.8, 30.0])
    y = states(sigma)
    c_in, c_out = 1 / (sigma**2 + 0.25).sqrt(), 0.5 * sigma / (sigma**2 + 0.25).sqrt()
    output = network(expand(c_in, y) * y, sigma.log() / 4)
    expected = expand(0.25 / (sigma**2 + 0.25), y) * y + expand(c_out, y) * output
    assert off(at_sigma(found.build(), y, sigma).x_0, expected) < 1e-4


def test_edm_s_two_other_preconditionings(tmp_path: Path, edm_modules: None) -> None:
    """VEPrecond and VPPrecond as published; the former on the weights of a VE file agrees with the [0, 1] file."""
    network, sigma = random_network(1, **VE), torch.tensor([0.04, 1.2, 60.0])
    y = states(sigma)
    write_pickle(tmp_path / "ve.pkl", edm_content(network, VE, "VEPrecond", sigma_min=0.02, sigma_max=100))
    torch.save(score_sde_content(network, random_network(2, **VE)), tmp_path / "ve.pth")
    found = at_sigma(read(tmp_path / "ve.pkl").build(), y, sigma).x_0
    assert off(found, y + expand(sigma, y) * network(y, (sigma / 2).log())) < 1e-4
    assert off(found, at_sigma(read(tmp_path / "ve.pth").build(), y, sigma).x_0) < 1e-4
    network = random_network(1, **VP)
    write_pickle(tmp_path / "vp.pkl", edm_content(network, VP, "VPPrecond", beta_d=19.9, beta_min=0.1, M=1000))
    t = ((0.01 + 2 * 19.9 * (1 + sigma.double() ** 2).log()).sqrt() - 0.1) / 19.9
    output = network(y / expand((1 + sigma**2).sqrt(), y), (999 * t).float())
    assert off(at_sigma(read(tmp_path / "vp.pkl").build(), y, sigma).x_0, y - expand(sigma, y) * output) < 1e-4


@pytest.mark.parametrize("classes", [0, 5])
def test_dhariwal_s_network_in_edm_s_preconditioning(tmp_path: Path, edm_modules: None, classes: int) -> None:
    """Two heads of 64 channels at the coarsest level; labels as one-hot vectors there, as a table here."""
    theirs = Dhariwal([1, 2], blocks=1, attention=[16, 8], width=64, classes=classes)
    theirs.made(3, torch.Generator().manual_seed(4))
    write_pickle(tmp_path / "a.pkl", theirs.content("EDMPrecond"))
    denoiser, sigma = read(tmp_path / "a.pkl").build(), torch.tensor([0.02, 0.8, 30.0])
    y, labels = states(sigma), torch.tensor([4, 0, 2]) if classes else None
    onehot = None if labels is None else torch.eye(5)[labels]
    scaled = y / expand((sigma**2 + 0.25).sqrt(), y)
    expected = theirs(scaled, sigma.log() / 4, onehot)
    assert off(denoiser.network(scaled, sigma.log() / 4, labels), expected) < 1e-4
    x_t, t = denoiser.process.from_ratio(y, sigma.double())
    expected = expand(0.25 / (sigma**2 + 0.25), y) * y + expand(0.5 * sigma / (sigma**2 + 0.25).sqrt(), y) * expected
    assert off(denoiser(x_t, t, labels).x_0, expected) < 1e-4


def test_a_dry_run_refuses_guidance_without_a_null_class(tmp_path: Path, edm_modules: None) -> None:
    theirs = Dhariwal([1], blocks=1, attention=[], width=64, classes=10)
    theirs.arguments["label_dropout"] = 0
    theirs.made(3, torch.Generator().manual_seed(0))
    write_pickle(tmp_path / "a.pkl", theirs.content("EDMPrecond"))
    config = load("cifar10_small/edm", [f"checkpoint={tmp_path / 'a.pkl'}", "guidance=1"])
    sampler = build_frozen(config, load=False)
    with pytest.raises(UsageError, match="trained without condition, which this network was not"):
        sampler.plan(9, 20)


def test_iddpm_reads_the_nearest_level_and_leaves_the_variances(tmp_path: Path, edm_modules: None) -> None:
    theirs = Dhariwal([1], blocks=1, attention=[], width=64)
    theirs.made(6, torch.Generator().manual_seed(4))
    write_pickle(tmp_path / "a.pkl", theirs.content("iDDPMPrecond", M=1000, C_1=0.001, C_2=0.008))
    u = [0.0]  # u_M .. u_0, by the paper's recursion

    def kept(j: int) -> float:
        return math.sin(math.pi / 2 * j / 1000 / 1.008) ** 2

    for j in range(1000, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(kept(j - 1) / kept(j), 0.001) - 1))
    index = torch.tensor([0, 300, 820])
    sigma = torch.tensor([u[i + 1] for i in index]) * torch.tensor([1.05, 1.0001, 0.9999])
    y = states(sigma)
    output = theirs(y / expand((1 + sigma**2).sqrt(), y), index.float())[:, :3]
    denoiser = read(tmp_path / "a.pkl").build()
    assert off(at_sigma(denoiser, y, sigma).x_0, y - expand(sigma, y) * output) < 1e-4
    assert denoiser.ratio_range == pytest.approx((u[1], 80.0))
    write_pickle(tmp_path / "c.pkl", theirs.content("iDDPMPrecond", M=math.nan))
    with pytest.raises(UsageError, match="M = nan"):
        read(tmp_path / "c.pkl")
    write_pickle(tmp_path / "b.pkl", theirs.content("EDMPrecond"))
    with pytest.raises(UsageError, match="not as many outputs as EDMPrecond reads"):
        read(tmp_path / "b.pkl")


def test_q_k_and_v_take_turns_channel_by_channel() -> None:
    """As EDM reads them: reshape to (B heads, C / heads, 3, H W)."""
    network = random_network(5, **VE)
    block: Any = network.enc["16x16_block0"]
    x = torch.randn(2, 16, 16, 16)
    q, k, v = block.qkv(block.norm2(x)).reshape(2, 16, 3, 256).unbind(2)
    weights = torch.einsum("bcq,bck->bqk", q, k / 4).softmax(2)
    h = block.proj(torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape))
    torch.testing.assert_close(block._attend(x), (x + h) / 2**0.5, rtol=1e-5, atol=1e-5)


# Ours


def test_a_converted_file_is_the_same_denoiser(tmp_path: Path) -> None:
    torch.save(score_sde_content(random_network(1, **VE), random_network(2, **VE)), tmp_path / "a.pth")
    found = convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    again = read(tmp_path / "b.safetensors")
    assert (again.network, again.denoiser, again.process) == (found.network, found.denoiser, found.process)
    assert again.source == found.source and len(found.source["sha256"]) == 64
    y, sigma = states(SIGMAS), 2 * SIGMAS
    assert torch.equal(at_sigma(again.build(), y, sigma).x_0, at_sigma(found.build(), y, sigma).x_0)
    assert "score_sde_pytorch" in describe(again) and "ncsnpp" in describe(again)


# Golden files

needs_golden = pytest.mark.skipif(
    not Path(os.environ.get("DIFFACCEL_GOLDEN", "absent")).is_dir(),
    reason="DIFFACCEL_GOLDEN names no folder of golden files",
)


def golden(name: str) -> tuple[Path, dict[str, Tensor]]:
    folder = Path(os.environ["DIFFACCEL_GOLDEN"]).resolve()
    stored = np.load(folder / f"{name}.npz")
    path = next(folder / f"{name}{end}" for end in (".pth", ".pkl") if (folder / f"{name}{end}").is_file())
    return path, {key: torch.from_numpy(stored[key]) for key in stored.files}


@needs_golden
@pytest.mark.parametrize("converted", [False, True])
def test_golden_ve(tmp_path: Path, converted: bool) -> None:
    path, stored = golden("score_sde_tiny_ve")
    if converted:
        convert(path, tmp_path / "a.safetensors")
        path = tmp_path / "a.safetensors"
    x, sigma = stored["x"], stored["cond"]
    prediction = at_sigma(read(path).build(), 2 * x - 1, 2 * sigma)
    score = -2 * prediction.eps / expand(2 * sigma, x)
    assert off(score, stored["score"]) < 1e-4 and off(score, stored["net_out"]) < 1e-4
    assert off((prediction.x_0 + 1) / 2, stored["denoised"]) < 1e-4
    assert off(score, stored["raw_out"]) > 1e-2
    if not converted:
        raw = at_sigma(read(path, weights="raw").build(), 2 * x - 1, 2 * sigma)
        assert off(-2 * raw.eps / expand(2 * sigma, x), stored["raw_out"]) < 1e-4


@needs_golden
def test_golden_vp() -> None:
    path, stored = golden("score_sde_tiny_vp")
    denoiser, x, t = read(path).build(), stored["x"], stored["t"].double()
    prediction = denoiser(x, t)
    assert off(prediction.eps, stored["net_out"]) < 1e-4
    assert off(-prediction.eps / expand(stored["std"], x), stored["score"]) < 1e-4
    assert off(prediction.x_0, stored["denoised"]) < 1e-4
    assert off(prediction.eps, stored["raw_out"]) > 1e-2
    assert off(read(path, weights="raw").build()(x, t).eps, stored["raw_out"]) < 1e-4


@needs_golden
@pytest.mark.parametrize("name", ["edm_tiny_edm_vp", "edm_tiny_edm_ve"])
def test_golden_edm(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDM_CANARY", str(tmp_path / "canary"))
    path, stored = golden(name)
    monkeypatch.chdir(tmp_path)
    denoiser, x, sigma = read(path).build(), stored["x"], stored["sigma"]
    prediction = at_sigma(denoiser, x, sigma)
    assert off(prediction.x_0, stored["denoised"]) < 1e-4
    assert off(-prediction.eps / expand(sigma, x), stored["score"]) < 1e-4
    scaled = x / expand((sigma**2 + 0.25).sqrt(), x)
    assert off(denoiser.network(scaled, stored["c_noise"]), stored["raw"]) < 1e-4
    assert not list(tmp_path.iterdir()), "the file's own source was executed"


@needs_golden
def test_golden_forbidden_global() -> None:
    with pytest.raises(UsageError, match=r"names \w+\.getcwd"):
        read(Path(os.environ["DIFFACCEL_GOLDEN"], "forbidden_global.pkl"))
