"""Points: what they hold, what they must not depend on, and what is left when a run breaks off."""

import csv
import dataclasses
import json
import os
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch_fidelity.metric_fid import fid_statistics_to_metric
from wandb.proto import wandb_internal_pb2

from diffaccel import experiment
from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.denoiser import MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.evaluation import Evaluator, Real
from diffaccel.evaluation.callback import EvaluationCallback
from diffaccel.evaluation.judges import Judge
from diffaccel.features.extractors import Identity, Inception
from diffaccel.metrics.base import METRICS
from diffaccel.metrics.reference import load_reference
from diffaccel.parts.registry import Registry
from diffaccel.prior import ExactPosterior, LangevinGibbsPrior, Plan
from diffaccel.report import read_points
from diffaccel.run import launch, loggers, trainer
from diffaccel.sampling import Sampler

CHAINS = ["chains=10", "nfe=20"]
QUICK = ["n=60", "logger=none"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads of a process wait for each other where two processes share two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measure(out: Path, name: str, *words: str, steps: int | None = None, whole: bool = False) -> Evaluator:
    """Bench an experiment as the command line does; unless ``whole``, draw nothing and take KID to few real points."""
    config = load(name, [*QUICK, f"out={out}", "again=true", *words])
    sampler = experiment.build_method(config).eval().sampler
    evaluator = experiment.build_evaluator(config, sampler)
    if steps is not None:
        sampler.plan = lambda nfe, n: Plan(sampler.prior, sampler.solver, steps)  # type: ignore[method-assign]
    if not whole:
        evaluator._draw = evaluator._draw_curve = lambda *_: None  # type: ignore[method-assign]
        (judge,) = evaluator.judges
        few = dataclasses.replace(judge.real.reference, features=judge.real.reference.features[:50])
        evaluator.judges = [Judge(judge.extractor, Real(few, judge.real.floor))]
    with loggers.logging(config) as logs:
        launch.everywhere(config, lambda world, device: evaluator.run(sampler.to(device), world, logs))
    return evaluator


# What a point holds


def test_a_point_has_every_key(tmp_path: Path):
    (point,) = measure(tmp_path, "toy/dlg", *CHAINS, whole=True).points
    assert json.loads((tmp_path / "points.jsonl").read_text()) == json.loads(json.dumps(point))
    keys = """method experiment process prior solver nfe_budget nfe nfe_marginal nfe_burn_in nfe_sequential
        nfe_equivalent evaluations chains gflops_per_image seconds_per_image seconds_scoring n seed images_sha256
        metrics extractor reference checkpoint data world_size images_by_rank device precision versions git"""
    assert set(keys.split()) <= point.keys()
    assert set(point["extractor"]) == {"name", "sha256", "dim"}
    assert set(point["reference"]) == {"name", "split", "n", "sha256"}
    neighbourhoods = {
        f"{name}{end}" for name in ("precision", "recall", "density", "coverage") for end in ("", "_real")
    }
    distances = {f"fd_identity{end}" for end in ("", "_inf", "_se", "_floor")} | {"kid", "kid_se", "kid_floor"}
    assert set(point["metrics"]) == distances | neighbourhoods | {"effective_n"}  # too few images for near repeats
    assert set(point["memorisation"]) == {"share", "threshold", "closest"}
    expected = {"method": "dlg", "experiment": "toy/dlg", "prior": "chain", "chains": 10, "n": 60, "world_size": 1}
    assert {key: point[key] for key in expected} == expected
    for file in ("curve.csv", "curve.png", "samples_nfe20.png"):
        assert (tmp_path / file).stat().st_size > 0


def test_only_inception_gives_fid(tmp_path: Path):
    assert Inception.metric_name.fget(None) == "fid"  # type: ignore[attr-defined]
    assert Identity(2).metric_name == "fd_identity"
    (point,) = measure(tmp_path, "toy/edm").points
    assert not any(key.startswith("fid") for key in point["metrics"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("toy/edm", ["nfe=[1,7]"]),
        ("toy/edm", ["nfe=[1,8]", "solver=heun"]),
        ("toy/ddpm", ["nfe=[6]", "n=61", "batch_size=7"]),
        ("toy/dlg", [*CHAINS, "n=63", "batch_size=4"]),
        ("toy/dlg", [*CHAINS, "n=63", "nfe=45", "prior.restart_every=3", "solver=heun", "tweedie_ratio=0.05"]),
    ],
)
def test_what_was_spent_is_what_was_planned(tmp_path: Path, name: str, words: list[str]):
    evaluator = measure(tmp_path, name, *words)
    config = load(name, [*QUICK, *words])
    method = experiment.build_method(config)
    for point in evaluator.points:
        plan = method.sampler.plan(point["nfe_budget"], config.n)
        assert point["nfe"] == pytest.approx(method.sampler.planned_nfe(plan, config.n), rel=1e-12)
        assert point["nfe"] <= point["nfe_budget"]
        burn_in = method.prior.burn_in_evaluations(config.n) / config.n
        assert point["nfe_burn_in"] == pytest.approx(burn_in, rel=1e-12)
        assert point["nfe_marginal"] + point["nfe_burn_in"] == pytest.approx(point["nfe"], rel=1e-12)
        assert point["evaluations"]["denoiser"] == round(point["nfe"] * config.n)
        assert point["nfe_equivalent"] == pytest.approx(point["nfe"], rel=1e-12), "no other network here"


def test_other_networks_count_by_their_flops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """60 images of 10 chains, 6 rounds: what a classifier of 256 FLOPs adds, and what one image waits for."""
    classifier, logits = nn.Linear(2, 64), ExactPosterior.logits

    def asked(self: ExactPosterior, y: torch.Tensor) -> torch.Tensor:
        classifier(y.flatten(1))
        return logits(self, y)

    monkeypatch.setattr(ExactPosterior, "logits", asked)
    monkeypatch.setattr(LangevinGibbsPrior, "auxiliary_networks", lambda self: {"classifier": classifier})
    burn_in = ["prior.init_steps=10", "prior.warmup=[[50,null]]", "prior.chain_steps=4", "solver=dpmpp2m"]
    started = time.perf_counter()
    (point,) = measure(tmp_path, "toy/dlg", *CHAINS, *burn_in).points
    assert 0 < 60 * (point["seconds_per_image"] + point["seconds_scoring"]) < time.perf_counter() - started
    assert point["plan"] == {"chain_steps": 4, "steps": 6}
    assert (point["nfe_marginal"], point["nfe_burn_in"], point["nfe"]) == (4 + 6, 10, 20)
    assert point["nfe_sequential"] == 10 + 50 + 6 * 4 + 6, "the first start, all rounds, and the last image's solver"
    levels = (10 * (1 + 50) + 60 * 4) / 60  # each new state's: of ten first ones, in warm-up, in rounds
    denoiser = 2 * 2 * 3 + 2 * 3 * 2  # FLOPs: distances from three means in the plane, and their weighted mean
    assert point["nfe_equivalent"] == pytest.approx(20 + levels * 256 / denoiser)
    assert point["gflops_per_image"] == pytest.approx((20 * denoiser + levels * 256) / 1e9)
    assert point["evaluations"] == {"denoiser": 1200, "classifier": 60 * levels}


def test_a_restart_waits_for_no_earlier_round(tmp_path: Path):
    words = ["prior.chains=10", "n=60", "nfe=40", "solver=dpmpp2m", "prior.chain_steps=4", "prior.restart_every=2"]
    (point,) = measure(tmp_path, "toy/dlg", *words, "prior.init_steps=10", "prior.warmup=[]").points
    assert (point["nfe_burn_in"], point["plan"]) == (5, {"chain_steps": 4, "steps": 31})
    assert point["nfe_sequential"] == 10 + 2 * 4 + 31


def test_a_point_of_an_adaptive_burn_in(tmp_path: Path):
    """Its evaluations are counted; what would follow from a plan is not known."""
    words = ["prior.chains=10", "n=60", "prior.init_solver.name=rk45", "prior.warmup=[]", "prior.chain_steps=2"]
    (adaptive,) = measure(tmp_path, "toy/dlg", *words, "nfe=null", "solver=rk45").points
    apart = ["prior.burn_in_counted=false", "nfe=10", "solver=dpmpp2m"]
    (bounded,) = measure(tmp_path, "toy/dlg", *words, *apart).points
    for point in (adaptive, bounded):
        assert point["nfe_sequential"] is None and point["nfe_burn_in"] > 1
    assert bounded["nfe_marginal"] == 10
    with pytest.raises(UsageError, match=r"burn-in by RK45, which is adaptive: set prior\.burn_in_counted=false"):
        measure(tmp_path, "toy/dlg", *words, "nfe=10")


def test_overspending_is_an_error(tmp_path: Path):
    with pytest.raises(UsageError, match=r"nfe=10 was exceeded: 11 evaluations"):
        measure(tmp_path, "toy/edm", steps=11)
    assert not (tmp_path / "points.jsonl").exists()


MINE = """\
from diffaccel.metrics.base import Metric

class Mine(Metric):
    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, made, real):
        return {"mine": self.scale * made.n}
"""


def test_a_metric_of_a_plugin_package_is_computed_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine-1.0.dist-info").mkdir()
    (tmp_path / "mine-1.0.dist-info" / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
    (tmp_path / "mine-1.0.dist-info" / "entry_points.txt").write_text("[diffaccel.metrics]\nmine = mine:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in Registry("metric", builtins=["diffaccel.metrics.standard"]).__dict__.items():
        monkeypatch.setattr(METRICS, name, {**METRICS._factories} if name == "_factories" else value)

    def bench(*words: str) -> list[dict[str, Any]]:
        assert main(["bench", "toy/edm", "nfe=4", *QUICK, f"out={tmp_path / 'out'}", *words]) == 0
        return read_points(tmp_path / "out" / "points.jsonl")

    standard = bench()[0]
    assert "mine" not in standard["metrics"]
    for _ in range(2):  # the second finds the first's
        points = bench("metrics=[frechet, {name: mine, scale: 2}]")
        assert len(points) == 2
    assert points[1]["metrics"] == {
        **{key: value for key, value in standard["metrics"].items() if key.startswith("fd_")}, "mine": 120,
    }  # fmt: skip
    assert points[1]["key"] != standard["key"] and points[1]["images_sha256"] == standard["images_sha256"]
    assert "memorisation" in standard and "memorisation" not in points[1]


# What a point's images depend on


def test_the_hash_follows_the_seed_and_nothing_else(tmp_path: Path):
    def digest(*words: str) -> str:
        return str(measure(tmp_path, "toy/ddpm", *words).points[0]["images_sha256"])

    first = digest()
    assert digest() == first, "a second run"
    assert digest("batch_size=60") == digest("batch_size=99999") == first, "the same batches"
    assert digest("seed=1") != first


@pytest.mark.parametrize(
    ("name", "words"),
    [("toy/ddpm", []), ("toy/edm", ["solver=edm_stochastic", "nfe=9"]), ("toy/dlg", ["chains=30", "nfe=40"])],
)
def test_the_batch_size_changes_images_by_rounding_only(tmp_path: Path, name: str, words: list[str]):
    images = [measure(tmp_path, name, *words, f"batch_size={size}").shown for size in (1, 7, 64)]
    assert images[0].std() > 0.5
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], rtol=1e-3, atol=1e-4)


def test_budgets_share_their_noise(tmp_path: Path):
    """From one starting noise two step counts of an ODE solver end close to each other; other noise doesn't."""
    evaluator = measure(tmp_path, "toy/edm", "nfe=[30,40]", "solver=heun")
    shown = evaluator.shown
    other = measure(tmp_path, "toy/edm", "nfe=30", "solver=heun").shown
    assert (shown - other).abs().mean() < 0.05
    assert (shown - other.roll(1, 0)).abs().mean() > 1


# Scores


def test_the_distance_is_torch_fidelitys(tmp_path: Path):
    evaluator = measure(tmp_path, "toy/edm", "n=500", "batch_size=100")
    features = evaluator.shown.flatten(1).double()
    assert len(features) == 500
    reference = load_reference("experiments/toy/weights/reference.npz", Identity(2)).moments
    ours = {"mu": features.mean(0).numpy(), "sigma": torch.cov(features.T).numpy()}
    theirs = {"mu": reference.mean.numpy(), "sigma": reference.covariance.numpy()}
    expected = fid_statistics_to_metric(ours, theirs, verbose=False)["frechet_inception_distance"]
    assert evaluator.points[0]["metrics"]["fd_identity"] == pytest.approx(expected, rel=1e-9)


def test_a_block_of_the_jackknife_holds_whole_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffaccel.metrics import FrechetDistance

    seen: list[tuple[torch.Tensor, int]] = []
    update = FrechetDistance.update

    def spy(self: FrechetDistance, features: torch.Tensor, block: int) -> None:
        seen.append((features, block))
        update(self, features, block)

    monkeypatch.setattr(FrechetDistance, "update", spy)
    evaluator = measure(tmp_path, "toy/dlg", "chains=15", "n=75", "nfe=25", "batch_size=4")
    images = evaluator.shown.flatten(1).double()
    blocks_of_chain = defaultdict(set)
    for features, block in seen:
        for row in features:
            (image,) = (images == row).all(1).nonzero().flatten().tolist()
            blocks_of_chain[image % 15].add(block)
    assert len(blocks_of_chain) == 15
    assert all(len(blocks) == 1 for blocks in blocks_of_chain.values())
    assert len(set.union(*blocks_of_chain.values())) == 10, "every block has some"


# What breaks off


def failing_at(call: int, failure: Callable[[Any], Any]) -> Callable[..., Any]:
    """Let the exact denoiser fail from its ``call``-th evaluation on."""
    forward, calls = MixtureDenoiser.forward, 0

    def broken(self: MixtureDenoiser, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        prediction = forward(self, *arguments)
        return failure(prediction) if calls >= call else prediction

    return broken


def test_nan_is_one_error_and_earlier_points_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def to_nan(prediction: Any) -> Any:
        return prediction._replace(x_0=prediction.x_0 * torch.nan)

    monkeypatch.setattr(MixtureDenoiser, "forward", failing_at(6, to_nan))
    assert main(["bench", "toy/edm", *QUICK, "nfe=[5,10]", f"out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "NaN" in error and "weights" in error and "Traceback" not in error
    assert [point["nfe_budget"] for point in read_points(tmp_path / "points.jsonl")] == [5]


def test_an_interrupt_keeps_the_points_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(MixtureDenoiser, "forward", failing_at(6, interrupt))
    assert main(["bench", "toy/edm", *QUICK, "nfe=[5,10]", f"out={tmp_path}", "logger=csv"]) == 130
    assert "interrupted" in capsys.readouterr().err
    (point,) = read_points(tmp_path / "points.jsonl")
    assert point["nfe"] == 5 and point["n"] == 60
    with next(tmp_path.glob("csv/version_0/metrics.csv")).open() as stream:
        (row,) = csv.DictReader(stream)
    assert float(row["curve/nfe"]) == 5, "the logger has it too"


# Loggers


def wandb_records(path: Path, seconds: float = 30.0) -> list[Any]:
    """Read an offline run's file once W&B's process has written the last record, which may be after the run's end."""
    last = time.monotonic() + seconds
    while not (records := list(framed_records(path))) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < last, f"{path} has no end"
        time.sleep(0.1)
    return records


def framed_records(path: Path, block: int = 32768) -> Iterator[Any]:
    """Read what is there of the file: a 7-byte header, LevelDB's log framing, one protobuf a record."""
    content, position, payload = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        part = content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in (1, 2, 3, 4) or len(part) < length:
            return  # zero padding, or a torn write
        payload = part if kind in (1, 2) else payload + part  # whole or first; middle or last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            yield record


def curve_rows(records: list[Any]) -> list[dict[str, float]]:
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    return [row for row in rows if "curve/nfe" in row]


def test_wandb_and_csv_hold_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for logger in ("wandb", "csv"):
        if logger == "csv":
            for name in ("_draw", "_draw_curve"):
                monkeypatch.setattr(Evaluator, name, lambda self: None)
        words = [*QUICK, "nfe=[5,10]", f"out={tmp_path / logger}", f"logger={logger}"]
        assert main(["bench", "toy/edm", *words]) == 0
    points = read_points(tmp_path / "wandb" / "points.jsonl")
    (file,) = (tmp_path / "wandb").glob("wandb/offline-run-*/run-*.wandb")
    records = wandb_records(file)
    with next((tmp_path / "csv").glob("csv/version_0/metrics.csv")).open() as stream:
        table = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]
    rows = curve_rows(records)
    assert len(rows) == len(table) == len(points) == 2
    for row, line, point in zip(rows, table, points, strict=True):
        assert row["curve/nfe"] == line["curve/nfe"] == point["nfe"]
        for key, value in point["metrics"].items():
            assert row[f"curve/{key}"] == pytest.approx(value, rel=1e-6)
            assert line[f"curve/{key}"] == pytest.approx(value, rel=1e-6)
    axes = {
        record.metric.name or record.metric.glob_name: record.metric for record in records if record.HasField("metric")
    }
    assert axes.keys() == {key for row in rows for key in row if key.startswith("curve/")}, "by name, not by a pattern"
    assert all(metric.step_metric == "curve/nfe" for name, metric in axes.items() if name != "curve/nfe")
    assert any(record.WhichOneof("record_type") == "exit" for record in records), "the run was closed"
    images = list(file.parent.glob("files/media/images/*.png"))
    assert len(images) == 3, "two sample grids and the curve"


# At the end of a fit

TINY = ["network.widths=[8]", "network.attention=[]", "network.embedding=16", "training.batch_size=32", "n=60"]


def test_after_a_fit_the_averaged_weights_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured: list[dict[str, torch.Tensor]] = []

    def record(self: Evaluator, sampler: Sampler, *_: object) -> None:
        measured.append({name: value.clone() for name, value in sampler.denoiser.network.state_dict().items()})

    monkeypatch.setattr(Evaluator, "run", record)
    config = load("digits/edm", [*TINY, "training.images=320", "training.warmup=1", f"out={tmp_path}", "logger=none"])
    method = experiment.build_method(config, load=False)
    evaluation = EvaluationCallback(experiment.build_evaluator(config, method.sampler))
    method.images_seen = 319
    evaluation.on_train_end(None, method)  # type: ignore[arg-type]
    assert not measured, "a run that broke off is not measured"
    method.images_seen = 0
    fitting = trainer.build_trainer(config, [evaluation])
    fitting.fit(method, experiment.build_data(config))
    (weights,) = measured
    raw = method.denoiser.network.state_dict()
    assert method.ema is not None and method.images_seen == 320
    assert all(
        torch.equal(weights[name.removeprefix("denoiser.")], value) for name, value in method.ema.average.items()
    )
    assert any(not torch.equal(weights[name], raw[name]) for name in raw), "the raw weights are back afterwards"


# Several processes

SCRIPT = """\
import sys
from diffaccel.__main__ import main
from diffaccel.evaluation import Evaluator
from diffaccel.evaluation.callback import EvaluationCallback

Evaluator._draw = Evaluator._draw_curve = lambda self: None
for name, words in {runs!r}:
    status = main(["bench", name, *words, "devices={devices}", "threads=1", f"out={out}/{{name}}"])
    if status:
        sys.exit(status)
"""
SPREAD = {
    "toy/dlg": ["n=64", "chains=10", "batch_size=2"],  # five groups; the last round is not whole
    "toy/edm": ["n=90", "solver=edm_stochastic", "batch_size=20"],
    "toy/ddpm": ["n=30", "batch_size=40"],  # one batch: the second process has nothing to do
}


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Words by experiment, with few real points: every process would take seconds for the KID of all."""
    folder = tmp_path_factory.mktemp("statistics")
    files = [f"reference={folder / 'reference.npz'}", f"floor={folder / 'floor.npz'}"]
    assert main(["reference", "toy/edm", "data.n=400", *files]) == 0
    common = ["accelerator=cpu", "logger=none", "nfe=22", *files]
    return {name: [*common, *words] for name, words in SPREAD.items()}


@pytest.fixture(scope="module")
def alone(spread: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The points that one process makes."""
    out = tmp_path_factory.mktemp("alone")
    return {name: measure(out, name, *words, whole=True).points[0] for name, words in spread.items()}


@pytest.mark.parametrize(
    "shares",
    [
        {"toy/dlg": [38, 26], "toy/edm": [50, 40], "toy/ddpm": [30, 0]},
        {"toy/dlg": [26, 26, 12], "toy/edm": [40, 30, 20]},
    ],
    ids=["two", "three"],
)
def test_several_processes_make_the_same_points(
    shares: dict[str, list[int]], spread: dict[str, list[str]], alone: dict[str, dict[str, Any]], tmp_path: Path
):
    devices = len(shares["toy/dlg"])
    runs = [(name, spread[name]) for name in shares]
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(runs=runs, devices=devices, out=tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, share in shares.items():
        one, (several,) = alone[name], read_points(tmp_path / name / "points.jsonl")
        assert (one["world_size"], several["world_size"]) == (1, devices)
        assert several["images_by_rank"] == share
        assert several["images_sha256"] == one["images_sha256"]
        assert several["metrics"] == pytest.approx(one["metrics"], rel=1e-9, nan_ok=True)
        assert several["evaluations"] == one["evaluations"]
        same = ("nfe", "nfe_burn_in", "nfe_sequential", "gflops_per_image")
        assert {key: several[key] for key in same} == pytest.approx({key: one[key] for key in same})
        assert several["chain"] == pytest.approx(one["chain"], nan_ok=True)
