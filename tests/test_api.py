"""The library from a notebook: what ``import diffaccel`` offers, and that it is what the command line measures."""

import doctest
import hashlib
import math
import os
import subprocess
import sys
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import VE, random_network, score_sde_content
from test_guidance import CLASSES, SHAPE, network
from test_nfe import in_threads
from torch import Tensor

import diffaccel as da
from diffaccel.api import words
from diffaccel.config import load
from diffaccel.denoiser import KarrasDenoiser
from diffaccel.evaluation.scores import digests
from diffaccel.nfe import EvaluationCounter
from diffaccel.prior import ExactPosterior, GaussianPrior, LangevinGibbsPrior, geometric_levels
from diffaccel.process import EDMVarianceExploding
from diffaccel.report import read_points
from diffaccel.sampling import Setting, Tweedie
from diffaccel.solver import SOLVERS
from diffaccel.text.terminal import say_once

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "experiments" / "digits" / "weights"

pytestmark = pytest.mark.usefixtures("undrawn")


def sha256(images: Tensor) -> str:
    """Hash as ``images_sha256`` of a point."""
    return hashlib.sha256(digests(images).numpy().tobytes()).hexdigest()


def fresh(code: str) -> str:
    """Run code in an interpreter of its own and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The package


def test_the_example_of_the_package_runs():
    found = doctest.testmod(da)
    assert found.attempted > 4 and not found.failed


def test_all_names_are_there_and_a_usage_error_is_a_value_error():
    assert set(da.__all__) <= set(dir(da)) and all(hasattr(da, name) for name in da.__all__)
    assert issubclass(da.UsageError, ValueError)
    with pytest.raises(AttributeError, match="bensh"):
        da.bensh  # noqa: B018
    assert (Path(da.__file__).parent / "py.typed").is_file()


def test_the_import_is_light():
    heavy = "torch", "lightning", "omegaconf", "torchmetrics", "wandb", "matplotlib", "numpy", "rich"
    assert fresh(f"import sys, diffaccel; print([name for name in {heavy} if name in sys.modules])") == "[]"


SAMPLING = """\
import sys
import diffaccel as da
for name in ("digits/edm", "digits/dlg", "digits/tdpm", "digits/small_t", "digits/ddm", "toy/edm"):
    images = da.Sampler(da.load(name))(100, nfe=20)
    assert len(images) == 100 and images.float().std() > 0, name
print([name for name in ("lightning", "torchmetrics", "wandb", "matplotlib") if name in sys.modules])
"""


def test_sampling_loads_no_trainer_and_no_plots():
    assert fresh(SAMPLING) == "[]"


PLANNING = """\
import sys
from diffaccel.config import load
from diffaccel.verbs.bench import planned
for name in ("digits/edm", "digits/dlg", "digits/ddm"):
    assert planned(load(name, ["nfe=20"])) is not None
print([name for name in {heavy} if name in sys.modules])
"""
BENCH = """\
import sys
from diffaccel.__main__ import main
assert main(["bench", "digits/edm", "nfe=3", "n=20", "logger={logger}", "threads=1", "out={out}"]) == 0
print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
sys.exit(any(name in sys.modules for name in {heavy}))
"""
TRAINER = "lightning", "torchmetrics", "torchvision", "torch._dynamo", "scipy", "sklearn"


def test_planning_a_bench_loads_no_trainer_no_logger_and_no_plots():
    assert fresh(PLANNING.format(heavy=(*TRAINER, "wandb", "matplotlib"))) == "[]"


@pytest.mark.parametrize(("logger", "unused"), [("none", ("wandb",)), ("wandb", ())])
def test_a_bench_loads_no_trainer(logger: str, unused: tuple[str, ...], tmp_path: Path):
    fresh(BENCH.format(logger=logger, out=tmp_path, heavy=(*TRAINER, *unused)))
    assert (tmp_path / "curve.png").is_file() and (tmp_path / "wandb").is_dir() == (logger == "wandb")


COLLECTED = """\
import gc, sys
from diffaccel.__main__ import main
words = ["bench", "toy/edm", "nfe=3", "n=20", "dry_run=true"]
assert main(words) == 0 and gc.get_freeze_count() == 0, "a caller's objects are collected"
sys.argv[1:] = words
assert main() == 0 and gc.isenabled() and gc.get_freeze_count() > 10_000
"""


def test_a_command_leaves_its_modules_out_of_garbage_collection():
    fresh(COLLECTED)


def test_types_are_checked(tmp_path: Path):
    """A user's type checker sees the package's annotations through its lazy names."""
    user = tmp_path / "user.py"
    user.write_text(
        'import diffaccel as da\nsampler = da.Sampler(da.load("digits/edm"), solver=3)\nsampler("ten").sum()\n'
    )
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--follow-imports=silent", str(user)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    errors = [line for line in done.stdout.splitlines() if "error" in line]
    assert len(errors) == 2, done.stdout + done.stderr
    assert "user.py:2" in errors[0] and '"solver"' in errors[0] and "user.py:3" in errors[1] and "int" in errors[1]


# The sampler makes what bench measures

DLG: dict[str, Any] = {"nfe": 20, "n": 200, "seed": 4, "precision": "32-true", "logger": "none"}


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A bench's point of each experiment."""
    folder = tmp_path_factory.mktemp("points")
    return {name: da.bench(name, **DLG, out=folder / name)[0] for name in ("digits/dlg", "digits/edm")}


@pytest.mark.parametrize("name", ["digits/dlg", "digits/edm"])
def test_images_and_scores_are_those_of_the_bench(name: str, points: dict[str, dict[str, Any]]):
    point = points[name]
    sampler = da.Sampler(da.load(name, precision="32-true"))
    images = sampler(DLG["n"], nfe=DLG["nfe"], seed=DLG["seed"])
    assert images.dtype == torch.uint8 and sha256(images) == point["images_sha256"]
    measured = da.measure(images, reference="digits", batch_size=point["chains"] or 100)
    assert measured == {**point["metrics"], "effective_n": DLG["n"]}, "as of independent images"
    spent = sampler.spent
    assert spent is not None and spent.n == DLG["n"]
    assert (spent.nfe, spent.nfe_burn_in, spent.evaluations) == tuple(
        point[key] for key in ("nfe", "nfe_burn_in", "evaluations")
    )
    assert spent.gflops_per_image == point["gflops_per_image"]


def test_parts_by_name_are_the_keys_of_an_experiment(tmp_path: Path):
    (point,) = da.bench(
        "digits/edm", solver="ddim", **{"prior.ratio_star": 20}, n=60, nfe=6, out=tmp_path, logger="none"
    )
    model = da.load("digits/edm", solver="heun")
    keyed = da.Sampler(model, prior={"name": "gaussian", "ratio_star": 20}, solver="ddim")
    built = da.Sampler(model, prior=GaussianPrior(20.0), solver=SOLVERS.build("ddim"))
    for sampler in (keyed, built):
        assert sha256(sampler(60, nfe=6)) == point["images_sha256"]
    assert sha256(da.Sampler(model)(60, nfe=6)) != point["images_sha256"]


@pytest.mark.parametrize("name", ["digits/edm", "digits/dlg"])
def test_spent_is_what_the_networks_evaluated(name: str):
    sampler = da.Sampler(da.load(name))
    with EvaluationCounter(sampler.evaluated_networks()) as counter:
        sampler(150, nfe=17)
    assert sampler.spent is not None
    assert sampler.spent.evaluations["denoiser"] == counter.evaluations["denoiser"]
    assert sampler.spent.nfe == counter.evaluations["denoiser"] / 150 <= 17
    assert sampler.spent.nfe_burn_in == counter.burn_in["denoiser"] / 150


BY_NFE = {3: {"solver": {"name": "ddim"}, "prior": {"ratio_star": 20}}, 8: {"solver": {"name": "heun"}}}


@pytest.mark.parametrize(
    ("name", "settings", "budgets"),
    [("digits/edm", {"by_nfe": BY_NFE}, (2, 5, 9)), ("toy/tdpm", {}, (2, 3, 6)), ("digits/dlg", {}, (20, 30))],
)
def test_a_budget_is_an_argument(name: str, settings: dict[str, Any], budgets: tuple[int, ...]):
    model, n = da.load(name, **settings), 100
    alone = {nfe: da.Sampler(model)(n, nfe=nfe, seed=1) for nfe in budgets}
    assert len({sha256(images) for images in alone.values()}) == len(budgets)
    for order in permutations(budgets):
        sampler = da.Sampler(model)
        for nfe in order:
            assert torch.equal(sampler(n, nfe=nfe, seed=1), alone[nfe])


def test_settings_by_budget_give_way_to_the_parts_that_are_given():
    model = da.load("digits/edm", by_nfe=BY_NFE)
    prior, solver = GaussianPrior(10.0), SOLVERS.build("euler")
    named = da.Sampler(model, solver="euler")
    for sampler in (named, da.Sampler(model, solver=solver)):
        assert {budget: type(setting.solver) for budget, setting in sampler.by_nfe.items()} == {
            3: type(solver),
            8: type(solver),
        }
        assert sampler.setting(3).prior.ratio_star == 20 and sampler.setting(8).prior.ratio_star is None  # type: ignore[union-attr]
    assert torch.equal(named(20, nfe=4), da.Sampler(model, solver=solver)(20, nfe=4))
    given = da.Sampler(model, prior=prior)
    assert all(setting.prior is prior for setting in given.by_nfe.values())
    assert type(given.setting(3).solver) is not type(given.setting(8).solver)


def test_a_models_own_settings_may_be_replaced():
    model = da.load("digits/edm")
    plain = da.Sampler(model)(20, nfe=4)
    sampler = da.Sampler(model, batch_size=7, precision="bf16-mixed")
    assert (sampler.batch_size, sampler.precision) == (7, "bf16-mixed")
    assert not torch.equal(sampler(20, nfe=4), plain)
    assert da.Sampler(model, shape=(1, 8, 8)).shape == (1, 8, 8)
    with pytest.raises(da.UsageError, match=r"shape=\(3, 8, 8\).* \(1, 8, 8\)"):
        da.Sampler(model, shape=(3, 8, 8))


def test_double_precision_needs_no_further_call():
    double = da.Sampler(da.load("digits/edm", precision="64-true"))(20, nfe=4)
    single = da.Sampler(da.load("digits/edm"))(20, nfe=4)
    assert (double.int() - single.int()).abs().max() <= 1


def test_a_sampler_in_double_precision_leaves_those_in_single_precision_as_they_were():
    """They share the weights; levels and the like are float64 in any precision."""
    model = da.load("digits/dlg")
    single, double = da.Sampler(model), da.Sampler(model, precision="64-true")
    types = {name: tensor.dtype for name, tensor in [*model.denoiser.state_dict().items(), *buffers(single)]}
    assert set(types.values()) >= {torch.float32, torch.float64}
    before, in_double = single(20, nfe=30), double(20, nfe=30)
    assert torch.equal(single(20, nfe=30), before)
    assert {name: tensor.dtype for name, tensor in [*model.denoiser.state_dict().items(), *buffers(single)]} == types
    assert torch.equal(double(20, nfe=30), in_double)
    assert torch.equal(single.to("cpu")(20, nfe=30), before)


def buffers(sampler: da.Sampler) -> list[tuple[str, torch.Tensor]]:
    return list(sampler.prior.named_buffers())


def test_samplers_of_a_model_may_run_in_threads():
    model = da.load("digits/edm")
    samplers = [da.Sampler(model, solver="ddim"), da.Sampler(model, solver="heun")]
    calls = [partial(samplers[0], 100, nfe=20), partial(samplers[1], 150, nfe=8)]
    alone = [(call(), sampler.spent) for call, sampler in zip(calls, samplers, strict=True)]
    for images, (expected, _) in zip(in_threads(*calls), alone, strict=True):
        assert torch.equal(images, expected)
    for sampler, (_, spent) in zip(samplers, alone, strict=True):
        assert sampler.spent is not None and spent is not None
        assert (sampler.spent.nfe, sampler.spent.evaluations) == (spent.nfe, spent.evaluations)
        assert sampler.spent.gflops_per_image == spent.gflops_per_image


def test_a_name_is_not_a_list_of_letters(tmp_path: Path):
    for verb in (da.curve, da.train):
        with pytest.raises(da.UsageError, match="no experiment .*'?edn'?; did you mean 'edm'"):
            verb("digits", methods="edn")
    da.bench("toy/edm", nfe=4, n=40, out=tmp_path / "points", logger="none")
    folders = [tmp_path / "points"]
    assert "my label" in da.compare(folders, out=tmp_path / "page", labels="my label").read_text()
    with pytest.raises(da.UsageError, match="label= has 1 names for 2 folders"):
        da.compare(2 * folders, out=tmp_path / "page", labels="ab")


# Levels outside the training


def test_levels_below_the_training_are_reported_once(capsys: pytest.CaptureFixture[str]):
    """Of any solver, by budget or searched; a checkpoint's default stays within, and some grids have fixed ends."""
    say_once.cache_clear()
    model = da.load(WEIGHTS / "ddpm.safetensors")
    prior, within = GaussianPrior(), SOLVERS.build({"name": "heun", "grid": {"ratio_min": 0.01}})
    da.Sampler(model).plan(5, 2)
    da.Sampler(da.load("digits/tdpm")).plan(5, 2)
    da.Sampler(model, solver=within, tweedie=Tweedie(0.01)).plan(5, 2)
    assert "noise-to-data ratio" not in capsys.readouterr().err
    below = da.Sampler(model, by_nfe={4: Setting(prior, within), 8: Setting(prior, SOLVERS.build("heun"))})
    below.plan(4, 2)
    assert capsys.readouterr().err == ""
    for made in (below, below, da.Sampler(model, solver={"name": "ddim", "grid": {"ratio_min": 0.005}})):
        made.plan(8, 2)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("solver.grid.ratio_min is below 0.01, the lowest noise-to-data ratio") == 1
    assert said.endswith("solver.grid.ratio_min=0.01 stays within")
    da.Sampler(model, tweedie=Tweedie(0.002)).plan(5, 2)
    assert "tweedie_ratio is below 0.01" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(da.UsageError, match="would start at a noise-to-data ratio in"):
        da.Sampler(model, prior={"name": "restart", "ratio_star": 0.005}, solver=within).plan(30, 200)
    assert "prior.solver.grid.ratio_min is below 0.01" in " ".join(capsys.readouterr().err.split())


def test_a_last_step_at_no_level_of_the_training_is_refused():
    with pytest.raises(da.UsageError, match="Tweedie: ratio is 0, it must be positive"):
        Tweedie(0)
    with pytest.raises(da.UsageError, match=r"tweedie_ratio=5000 is above .*, the highest noise-to-data ratio"):
        da.Sampler(da.load(WEIGHTS / "edm.safetensors"), tweedie=Tweedie(5000)).plan(5, 2)


# Labels


def by_class(classes: int = CLASSES) -> da.Sampler:
    return da.Sampler(KarrasDenoiser(network(classes), EDMVarianceExploding()), "gaussian", "ddim", SHAPE)


def test_labels_are_the_images_classes():
    sampler = by_class()
    balanced = sampler(6, nfe=4)
    assert torch.equal(sampler(6, nfe=4, labels=[0, 1, 2, 1, 2, 0]), balanced)
    assert torch.equal(sampler(6, nfe=4, labels=torch.tensor([0, 1, 2, 1, 2, 0])), balanced)  # type: ignore[arg-type]
    assert torch.equal(
        sampler(6, nfe=4, labels=np.array([0, 1, 2, 1, 2, 0]), batch_size=4), sampler(6, nfe=4, batch_size=4)
    )  # type: ignore[arg-type]
    ones = sampler(6, nfe=4, labels=[1] * 6)
    assert torch.equal(ones[1], balanced[1]) and not torch.equal(ones[0], balanced[0])


@pytest.mark.parametrize(
    "labels",
    [[0, 1], [0, 1, 3], [0, -1, 2], [0.0, 1.0, 2.0], ["cat", "dog", "cat"], 1, [[0, 1, 2]], [True, False, True]],
    ids=str,
)
def test_wrong_labels_are_refused(labels: Any):
    with pytest.raises(da.UsageError, match="labels: give 3 whole numbers from 0 to 2, one for each image"):
        by_class()(3, nfe=4, labels=labels)


def test_labels_of_a_network_without_classes_or_of_a_chain_are_refused():
    with pytest.raises(da.UsageError, match="labels: the network has no classes"):
        by_class(0)(3, nfe=4, labels=[0, 0, 0])
    posterior = ExactPosterior(None, geometric_levels(50))  # type: ignore[arg-type]
    chained = da.Sampler(by_class().denoiser, LangevinGibbsPrior(posterior, chains=4), "ddim", SHAPE)
    with pytest.raises(da.UsageError, match="labels: a chain samples without labels"):
        chained(400, nfe=60, labels=[0] * 400)


# Models from anywhere


def test_a_file_of_weights_describes_itself():
    images = da.Sampler(da.load(WEIGHTS / "edm.safetensors"))(20, nfe=6)
    assert torch.equal(images, da.Sampler(da.load("digits/edm"))(20, nfe=6))
    with pytest.raises(da.UsageError, match="which has no settings"):
        da.load(WEIGHTS / "edm.safetensors", precision="32-true")
    with pytest.raises(da.UsageError, match="digits/edm"):
        da.load("digits/edn")
    with pytest.raises(da.UsageError, match="feature|extractor"):
        da.load(WEIGHTS / "extractor.safetensors")


TINY = {"network.widths": [8], "network.attention": [], "network.embedding": 16}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny fit."""
    out = tmp_path_factory.mktemp("fit")
    keys = {"images": 128, "training.batch_size": 64, "training.warmup": 0, "n": 20, "nfe": 4, "reference": None}
    assert da.fit("digits/edm", **TINY, **keys, logger="none", out=out) == out
    return out


def test_what_a_fit_leaves_is_a_model(fitted: Path):
    state, weights = (da.load(fitted / name) for name in ("last.ckpt", "ema.safetensors"))
    rounded, exported = state.denoiser.state_dict(), weights.denoiser.state_dict()
    assert rounded.keys() == exported.keys()
    assert all(torch.equal(rounded[key].bfloat16().float(), exported[key]) for key in exported), "weights are in bf16"
    assert da.Sampler(state)(20, nfe=4).shape == (20, 1, 8, 8)
    images = da.Sampler(weights)(20, nfe=4)
    named = da.load("digits/edm", **TINY, checkpoint=fitted / "ema.safetensors")
    assert torch.equal(images, da.Sampler(named)(20, nfe=4))


def test_converted_checkpoints_are_models(tmp_path: Path):
    source, target = tmp_path / "score_sde.pth", tmp_path / "ours.safetensors"
    torch.save(score_sde_content(random_network(1, **VE), random_network(2, **VE)), source)
    assert da.convert(source, target, sigma_max=50.0) == target and target.is_file()
    images = [da.Sampler(da.load(path))(4, nfe=3) for path in (source, target)]
    assert torch.equal(*images) and images[0].shape == (4, 3, 32, 32)
    with pytest.raises(da.UsageError, match="exists: set again=true"):
        da.convert(source, target)
    assert da.convert(source, target, again=True) == target
    with pytest.raises(da.UsageError, match="safetensors"):
        da.convert(source, tmp_path / "ours.pt")


# Commands return what they make


def test_bench_returns_the_points_of_the_file(tmp_path: Path):
    found = da.bench("toy/edm", nfe=[4, 8], n=60, out=tmp_path, logger="none")
    assert [point["nfe_budget"] for point in found] == [4, 8]
    assert found == read_points(tmp_path / "points.jsonl")
    assert da.bench("toy/edm", nfe=[4, 8], n=60, out=tmp_path, logger="none") == found, "measured before"
    assert da.bench("toy/edm", nfe=[4, 8], n=60, out=tmp_path, logger="none", dry_run=True) == []


def test_an_infinite_budget_is_that_of_an_adaptive_solver(tmp_path: Path):
    (point,) = da.bench("toy/edm", solver="rk45", nfe=math.inf, n=20, out=tmp_path, logger="none")
    sampler = da.Sampler(da.load("toy/edm"), solver="rk45")
    images = sampler(20, nfe=math.inf)
    assert point["nfe_budget"] is None and sha256(images) == point["images_sha256"]
    assert sampler.spent is not None and sampler.spent.nfe == point["nfe"] > 10
    with pytest.raises(da.UsageError, match="nfe is not set"):
        da.Sampler(da.load("toy/edm"))(20, nfe=math.inf)


def test_commands_return_the_paths_they_write(tmp_path: Path):
    keys: dict[str, Any] = {"n": 40, "logger": "none"}
    (folder,) = da.sample("digits/edm", nfe=4, out=tmp_path / "sample", format="npz", **keys)
    images = np.load(folder / "images.npz")["images"]
    assert torch.equal(torch.from_numpy(images).permute(0, 3, 1, 2), da.Sampler(da.load("digits/edm"))(40, nfe=4))
    files = da.reference("digits/edm", out=tmp_path / "reference", limit=100)
    assert files.keys() == {"train", "test"} and all(path.is_file() for path in files.values())
    points = [
        da.bench("digits/edm", nfe=4, solver=solver, out=tmp_path / solver, **keys) for solver in ("ddim", "dpmpp2m")
    ]
    assert all(points)
    page = da.compare([tmp_path / "ddim", str(tmp_path / "dpmpp2m")], out=tmp_path / "page")
    assert page == tmp_path / "page" / "index.html" and page.is_file()
    assert len((page.parent / "compare.csv").read_text().splitlines()) == 3
    assert da.compare(tmp_path / "ddim", out=tmp_path / "one").is_file(), "a folder alone"
    made, extractor = (
        torch.from_numpy(images).permute(0, 3, 1, 2),
        {"name": "small", "path": WEIGHTS / "extractor.safetensors"},
    )
    assert da.measure(made, files["train"], files["test"], extractor).keys() >= {"fd_digits", "fd_digits_floor", "kid"}
    with pytest.raises(da.UsageError, match="was made with the extractor 'digits': give it with its keys"):
        da.measure(made, files["train"])


def test_settings_are_what_a_command_line_sets():
    """Values of any kind, by whatever type a notebook has them."""
    given = {"nfe": np.int64(4), "checkpoint": WEIGHTS / "edm.safetensors", "limit": None, "tweedie_counted": False}
    nested = {"prior": {"name": "gaussian", "ratio_star": np.float32(0.5)}, "by_nfe": {3: {"solver": {"name": "ddim"}}}}
    numbers = {"solver.grid.ratio_min": 1e-5, "denoiser.ratio_max": math.inf, "network.widths": (32, 48)}
    config = load("digits/edm", words({**given, **nested, **numbers}))
    assert config.nfe == [4] and config.checkpoint == str(WEIGHTS / "edm.safetensors") and config.limit is None
    assert config.tweedie_counted is False and config.prior["ratio_star"] == 0.5
    assert config.by_nfe[3]["solver"]["name"] == "ddim"
    assert config.by_nfe[3]["solver"]["grid"]["ratio_min"] == 1e-5 and config.denoiser["ratio_max"] == math.inf
    assert config.network["widths"] == [32, 48]


def test_toy_points_are_measured_as_the_bench_does(tmp_path: Path):
    (point,) = da.bench("toy/edm", nfe=6, n=150, out=tmp_path, logger="none")
    sampler = da.Sampler(da.load("toy/edm"))
    points = sampler(150, nfe=6)
    assert points.dtype == torch.float32 and sha256(points) == point["images_sha256"]
    assert da.measure(points, "toy", batch_size=sampler.batch_size) == point["metrics"]


def test_a_model_s_own_sampler_keeps_that_its_settings_are_tuned():
    model = da.load("cifar10_small/edm_best", precision="32-true")
    own, other = da.Sampler(model), da.Sampler(model, solver="dpmpp2m")
    assert own.tuned and own.by_nfe and own.spent is None
    assert not other.tuned and not da.Sampler(model, prior={"ratio_star": 30}).tuned
    assert not da.Sampler(model, by_nfe=dict(list(own.by_nfe.items())[:1])).tuned
    assert own is not da.Sampler(model) and other.by_nfe[5].solver != own.by_nfe[5].solver
