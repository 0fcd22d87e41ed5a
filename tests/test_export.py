"""Settings for other tools: levels on other ranges, and the images of diffusers and k-diffusion with our lists."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_diffusers import UNet2D, save_scheduler
from torch import Tensor

import diffaccel as da
from diffaccel import UsageError
from diffaccel.__main__ import main
from diffaccel.denoiser import DENOISERS, GaussianDenoiser
from diffaccel.nn import NETWORKS
from diffaccel.noise import NoiseStreams
from diffaccel.prior.base import GaussianPrior
from diffaccel.process import DiscreteVariancePreserving, EDMVarianceExploding, VariancePreserving
from diffaccel.sampling import Sampler
from diffaccel.sampling.schedule import Ends, levels
from diffaccel.solver import SOLVERS
from diffaccel.verbs.tools import TOOLS, Setting, as_comfyui

SHAPE = (1, 8, 8)
B = 4


def setting_of(sampler: Sampler, nfe: int, ends: Ends | None = None) -> Setting:
    plan = sampler.plan(nfe, B)
    evaluations = plan.solver.evaluations(plan.steps)
    return Setting(plan.solver, plan.steps, levels(sampler, plan, ends), sampler.denoiser, evaluations, False)


def ours(sampler: Sampler, nfe: int) -> tuple[Tensor, Tensor]:
    """The sampler's images before rounding, and the unit noise that they start from."""
    plan, noise = sampler.plan(nfe, B), NoiseStreams(0, range(B))
    (images,) = [made for _, made in sampler.draw(plan, 0, [range(B)])]
    return images, noise.normal(torch.empty(B, *SHAPE))


def scheduled(found: dict[str, Any]) -> Any:
    """The scheduler of diffusers that an export names, with its lists set by the export's own lines."""
    schedulers = pytest.importorskip("diffusers.schedulers", reason="diffusers is not installed (extra dev)")
    scheduler = getattr(schedulers, found["scheduler"])(**found["config"])
    exec(found["use"], {**found, "scheduler": scheduler, "torch": torch})
    return scheduler


def theirs(scheduler: Any, network: Any, x: Tensor) -> tuple[Tensor, int]:
    """The loop of a pipeline of diffusers, and the number of evaluations."""
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.to(x.dtype).expand(len(x)), None)
        x = scheduler.step(output, t, x).prev_sample
    return x, len(scheduler.timesteps)


# diffusers, on the same weights and noise


@pytest.mark.parametrize("nfe", [5, 12])
@pytest.mark.parametrize("grid", [{"name": "karras", "rho": 5.0}, {"name": "listed", "fractions": [0.0, 0.4, 1.0]}])
@pytest.mark.parametrize(
    ("scheduler", "solver"),
    [
        ("EDMDPMSolverMultistepScheduler", {"name": "dpmpp2m", "lower_order_final": False}),
        ("EDMDPMSolverMultistepScheduler", {"name": "dpmpp2m", "lower_order_final": False, "denoise": False}),
        ("EDMDPMSolverMultistepScheduler", {"name": "dpmpp2m", "lower_order_final": True, "denoise": False}),
        ("EDMEulerScheduler", {"name": "euler"}),
        ("EDMEulerScheduler", {"name": "ddim"}),
        ("EDMEulerScheduler", {"name": "euler", "denoise": False}),
    ],
)
@torch.no_grad()
def test_edm_schedulers_make_our_images(scheduler: str, solver: dict[str, Any], grid: dict[str, Any], nfe: int):
    """digits/edm's own weights, on EDM's process: the images agree to the rounding of float32."""
    model = da.load("digits/edm")
    sampler = da.Sampler(model, prior={"name": "gaussian", "ratio_star": 40}, solver={**solver, "grid": grid})
    images, noise = ours(sampler, nfe)
    found, _ = TOOLS["diffusers"](setting_of(sampler, nfe))
    assert found["scheduler"] == scheduler and found["noise"] == pytest.approx(40)
    x, evaluations = theirs(scheduled(found), model.denoiser.network, found["noise"] * noise)
    assert evaluations == sampler.plan(nfe, B).solver.evaluations(sampler.plan(nfe, B).steps) == nfe
    torch.testing.assert_close(x, images, atol=2e-5, rtol=0)
    assert torch.equal(sampler.kind(x), sampler.kind(images)), "the same bytes"


@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.parametrize(
    ("scheduler", "solver"),
    [
        ("DPMSolverMultistepScheduler", {"name": "dpmpp2m", "lower_order_final": False}),
        ("DPMSolverMultistepScheduler", {"name": "dpmpp2m", "lower_order_final": False, "denoise": False}),
        ("EulerDiscreteScheduler", {"name": "euler"}),
    ],
)
@torch.no_grad()
def test_discrete_schedulers_make_our_images(scheduler: str, solver: dict[str, Any], target: str):
    """A network on DDPM's indices, in double precision but for diffusers' own tables in float32."""
    torch.manual_seed(0)
    network = NETWORKS.build({"name": "unet", "widths": [8], "attention": [], "embedding": 16}, shape=SHAPE)
    denoiser = DENOISERS.build(
        {"name": target, "time_scale": 1.0}, process=DiscreteVariancePreserving(), network=network
    )
    sampler = Sampler(denoiser.eval(), "gaussian", {**solver, "grid": "index"}, SHAPE)
    images, noise = ours(sampler, 6)
    found, notes = TOOLS["diffusers"](setting_of(sampler, 6))
    assert (
        found["scheduler"] == scheduler and found["timesteps"][0] == 999 and not any("rounded" in one for one in notes)
    )
    x, evaluations = theirs(scheduled(found), network, found["noise"] * noise)
    assert evaluations == 6
    torch.testing.assert_close(x, images, atol=2e-3, rtol=2e-4)
    assert images.std() > 0.01


# k-diffusion's samplers, as its code has them (sampling.py), on the exact denoiser of a Gaussian


def k_diffusion(name: str, denoise: Any, x: Tensor, sigmas: list[float]) -> Tensor:
    """sample_euler, sample_heun, sample_dpm_2 and sample_dpmpp_2m without noise."""
    old = None
    for i, (now, then) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        denoised = denoise(x, now)
        d, dt = (x - denoised) / now, then - now
        if name == "sample_euler" or (then == 0 and name != "sample_dpmpp_2m"):
            x = x + d * dt
        elif name == "sample_heun":
            x_2 = x + d * dt
            x = x + (d + (x_2 - denoise(x_2, then)) / then) / 2 * dt
        elif name == "sample_dpm_2":
            middle = math.exp((math.log(now) + math.log(then)) / 2)
            x_2 = x + d * (middle - now)
            x = x + (x_2 - denoise(x_2, middle)) / middle * dt
        else:
            t, s = -math.log(now), math.inf if then == 0 else -math.log(then)
            if old is None or then == 0:
                x = then / now * x - math.expm1(-(s - t)) * denoised
            else:
                r = (t + math.log(sigmas[i - 1])) / (s - t)
                x = then / now * x - math.expm1(-(s - t)) * ((1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old)
            old = denoised
    return x


@pytest.mark.parametrize("process", [EDMVarianceExploding(), VariancePreserving()], ids=["edm", "vp"])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpm2", "dpmpp2m"])
@pytest.mark.parametrize("denoise", [True, False])
@torch.no_grad()
def test_k_diffusions_samplers_make_our_images(solver: str, denoise: bool, process: Any):
    """With the list of the export, in the coordinates x / alpha of k-diffusion."""
    node = {"name": solver, "denoise": denoise} | ({"lower_order_final": False} if solver == "dpmpp2m" else {})
    sampler = Sampler(
        GaussianDenoiser(torch.full(SHAPE, 0.2), 0.3, process), GaussianPrior(), SOLVERS.build(node), SHAPE
    )
    found, _ = TOOLS["k-diffusion"](setting_of(sampler, 7))
    assert (found["sigmas"][-1] == 0) == denoise
    images, noise = ours(sampler, 7)

    def denoised(y: Tensor, sigma: float) -> Tensor:
        t = process.time(torch.full((B,), sigma, dtype=torch.float64))
        return sampler.denoiser(y * process.alpha(t)[:, None, None, None], t).x_0

    x = k_diffusion(found["sampler"], denoised, noise.double() * found["sigmas"][0], found["sigmas"])
    end = process.alpha(process.time(torch.tensor(found["sigmas"][-1], dtype=torch.float64)))
    torch.testing.assert_close(x * end, images.double(), atol=1e-5, rtol=1e-4)


# Ranges


def sampler_with(grid: dict[str, Any] | str, process: Any = None, **solver: Any) -> Sampler:
    denoiser = GaussianDenoiser(torch.zeros(SHAPE), 0.3, process or EDMVarianceExploding())
    return Sampler(denoiser, GaussianPrior(), SOLVERS.build({"name": "euler", "grid": grid, **solver}), SHAPE)


def karras(low: float, high: float, steps: int, rho: float = 7) -> list[float]:
    ramp = [i / (steps - 1) for i in range(steps)]
    return [(high ** (1 / rho) + at * (low ** (1 / rho) - high ** (1 / rho))) ** rho for at in ramp]


def test_a_list_is_that_of_the_papers_equation():
    own = setting_of(sampler_with({"name": "karras"}), 5).sigmas
    assert own == pytest.approx([*karras(0.002, 80, 5), 0])


@pytest.mark.parametrize("process", [EDMVarianceExploding(), VariancePreserving()], ids=["edm", "vp"])
def test_a_grid_is_mapped_to_another_range_in_its_own_coordinate(process: Any):
    ends = Ends(0.0292, 14.6146)
    start = sampler_with("karras", process)
    mapped = setting_of(sampler_with({"name": "karras", "ratio_cap": 1000.0}, process), 5, ends).sigmas
    assert mapped == pytest.approx([*karras(0.0292, 14.6146, 5), 0])
    fractions = [0.0, 0.2, 0.5, 0.9, 1.0]
    listed = setting_of(sampler_with({"name": "listed", "fractions": fractions, "ratio_cap": 1000.0}, process), 5, ends)
    logs = [math.log(14.6146) + at * math.log(0.0292 / 14.6146) for at in fractions]
    assert listed.sigmas == pytest.approx([*map(math.exp, logs), 0])
    assert setting_of(start, 5, Ends(high=14.6146)).sigmas[-2] == pytest.approx(0.002), "the other end is kept"


def test_the_time_of_a_process_is_a_coordinate():
    process = VariancePreserving()
    own, mapped = (setting_of(sampler_with("time", process), 5, ends).sigmas for ends in (None, Ends(0.05, 20.0)))
    times = [process.time(torch.tensor(found[:-1], dtype=torch.float64)) for found in (own, mapped)]
    shapes = [(t - t[0]) / (t[-1] - t[0]) for t in times]
    torch.testing.assert_close(*shapes)
    assert mapped[0] == pytest.approx(20) and mapped[-2] == pytest.approx(0.05) and mapped[-1] == 0


def test_a_cap_stays_as_far_below_the_start():
    """Levels of VP, whose start is above the cap of 80: the first one is as far below it, in ln(ratio)."""
    process = VariancePreserving()
    high = process.ratio(torch.tensor(1.0, dtype=torch.float64)).item()
    assert high > 80
    own, mapped = (
        setting_of(sampler_with("log_snr", process), 6, ends).sigmas for ends in (None, Ends(0.002, high / 3))
    )
    capped = high / 3 * 80 / high
    assert mapped[1:-1] == pytest.approx([capped * (0.002 / capped) ** (i / 5) for i in range(1, 6)])
    assert own[1:-1] == pytest.approx([80 * (0.002 / 80) ** (i / 5) for i in range(1, 6)])


@pytest.mark.parametrize(
    ("sampler", "ends", "said"),
    [
        (lambda: sampler_with("index", DiscreteVariancePreserving()), Ends(0.03, 14.6), "Indices has no levels"),
        (lambda: sampler_with("karras"), Ends(10.0, 14.6), "Karras has no levels"),
        (lambda: sampler_with("karras"), Ends(14.6, 0.03), "set 0 < sigma_min < sigma_max"),
        (lambda: sampler_with("karras"), Ends(high=0.001), "set 0 < sigma_min < sigma_max"),
    ],
)
def test_a_range_that_a_grid_cannot_have_is_refused(sampler: Any, ends: Ends, said: str):
    with pytest.raises(UsageError, match=said):
        setting_of(sampler(), 5, ends)


def test_the_range_and_the_parametrisation_of_another_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A checkpoint of diffusers on DDPM's indices: its range, its scheduler, and the indices nearest to the levels."""
    folder = UNet2D().save(tmp_path / "unet")
    save_scheduler(tmp_path)
    words = ["nfe=5", "format=diffusers", f"checkpoint={tmp_path}", "solver.grid.ratio_cap=1000"]
    assert folder.is_dir() and main(["export", "digits/edm", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    process = DiscreteVariancePreserving()
    ends = process.ratio(torch.tensor([999.0, 0.0], dtype=torch.float64)).tolist()
    assert found["sigmas"] == pytest.approx([*karras(ends[1], ends[0], 5), 0], rel=1e-5)
    assert found["scheduler"] == "DPMSolverMultistepScheduler" and found["config"]["num_train_timesteps"] == 1000
    nearest = process.time(torch.tensor(found["sigmas"][:-1], dtype=torch.float64)).round().tolist()
    assert found["timesteps"] == nearest and nearest[0] == 999 and nearest[-1] == 0
    assert any("rounded" in note for note in found["notes"])
    scheduler = scheduled(found)
    assert scheduler.timesteps.tolist() == nearest and len(scheduler.sigmas) == 6
    own = da.export("digits/edm", nfe=5, checkpoint=tmp_path, sigma_max=14.6146)
    assert own["sigmas"][0] == pytest.approx(14.6146) and own["timesteps"][-1] == -1


# What can't be expressed


def test_what_a_list_does_not_express_is_said(capsys: pytest.CaptureFixture[str]):
    words = ["export", "digits/edm", "nfe=5", "format=comfyui", "solver=dpmpp2m", "solver.analytic_first=1"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and "6 evaluations in place of 5" in printed.err
    assert len(printed.out.split(", ")) == 7
    assert main(["export", "digits/edm", "nfe=5", "format=k-diffusion", "solver=unipc2", "solver.denoise=false"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)[-1] == pytest.approx(0.002)
    assert "UniPC2 has no equal there" in printed.err and "without a step to 0" in printed.err
    notes = da.export("digits/edm", nfe=5, format="diffusers", solver={"name": "dpmpp2m", "lower_order_final": True})
    assert any("of first order here" in note for note in notes["notes"])
    notes = da.export("digits/edm", nfe=5, format="k-diffusion", solver={"name": "ddim", "eta": 0.5})["notes"]
    assert any("adds noise in each step" in note for note in notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digits/dlg", "nfe=5"], "prior=chain does not start from pure noise"),
        (["digits/small_t", "nfe=5"], "prior=density does not start from pure noise"),
        (["digits/tdpm", "nfe=5"], "prior=implicit does not start from pure noise"),
        (["digits/ddm", "nfe=5"], "the decoupled process (DDM) has no equal"),
        (["digits/edm", "nfe=null", "solver=rk45"], "chooses its levels while sampling"),
        (["digits/edm", "nfe=5", "sigma_min=0"], "sigma_min=0: give a positive number"),
        (["digits/edm", "nfe=5", "sigma_max=large"], "sigma_max='large': give a positive number"),
        (["digits/edm", "nfe=5", "checkpoint=nowhere.safetensors"], "nowhere.safetensors"),
        (["digits/edm", "nfe=5", "dry_run=true"], "export has no dry run, curve, bench, fit,"),
        (["digits/edm", "nfe=5", "format=comfy"], "no format 'comfy'; did you mean 'comfyui'?"),
    ],
)
def test_what_cannot_be_expressed_is_an_error(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    form = [] if any(word.startswith("format") for word in words) else ["format=comfyui"]
    assert main(["export", *words, *form]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_json_describes_a_chain_too():
    found = da.export("digits/dlg", nfe=5)
    assert found["sigmas"] is None and found["prior"]["name"] == "chain" and found["chain_steps"] > 0
    assert "prior=chain" in found["notes"][0]


def test_a_searched_setting_by_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    low, high = da.export("cifar10_small/edm_best", nfe=[5, 10])
    assert low["tuned"] and low["solver"]["name"] == "unipc2" and high["solver"]["name"] == "unipc3"
    assert low["solver"]["grid"]["name"] == "listed" and low["sigmas"][0] == pytest.approx(80)
    assert low["nfe"] == 5 and len(low["sigmas"]) == low["steps"] + 1
    out = tmp_path / "settings.json"
    assert main(["export", "cifar10_small/edm_best", "nfe=5,10", f"out={out}"]) == 0
    assert json.loads(out.read_text()) == [low, high] and capsys.readouterr().out == ""


def test_comfyuis_numbers_have_no_exponents():
    setting = setting_of(sampler_with({"name": "log_snr", "ratio_min": 2e-5}), 5)
    text = as_comfyui(setting)[0]["sigmas"]
    assert "e" not in text and [float(one) for one in text.split(", ")] == pytest.approx(setting.sigmas, rel=1e-3)


def test_an_unknown_name_is_reported_without_importing_pytorch():
    code = "import sys; from diffaccel.__main__ import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for words in (["digits/emd"], ["digits/edm", "fromat=json"], ["digits/edm", "format=jsn"]):
        done = subprocess.run([sys.executable, "-c", code, "export", *words], capture_output=True, text=True)
        assert done.returncode == 0 and "did you mean" in done.stderr
