"""Small T from the command line: fits with and without steps, in two processes; bits/dim; the trade-off."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.evaluation import BitsPerDim, Evaluator
from diffaccel.evaluation.tradeoff import TradeoffCurve
from diffaccel.experiment import build_method
from diffaccel.report import read_points
from diffaccel.weights import read_description, read_weights

pytestmark = pytest.mark.usefixtures("undrawn")

QUICK = ["logger=none", "threads=1", "reference=", "data.n=2000"]
TOY = (0.2, 0.3, 0.5)
ENTROPY = -sum(w * math.log(w) for w in TOY) + math.log(2 * math.pi * math.e * 0.3**2)
"""Of the toy mixture, whose modes don't overlap, in nats."""
TO_NORMAL = 0.1647
"""KL[p_T || N(0, I)] at T = 0.4 in nats, the mean over a million draws of x_T, ± 0.0006."""


def fit(out: Path, *words: str) -> Path:
    """Fit on toy points; returns the density's file."""
    assert main(["fit", "toy/small_t", *QUICK, *words, f"out={out}"]) == 0
    return out / "density.safetensors"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    return fit(tmp_path_factory.mktemp("mixture"))


def test_a_fit_without_steps_sees_each_point_once_and_says_its_level(mixture: Path, capsys):
    story = read_description(mixture)
    assert story["images_seen"] == 2000 and story["density"] == "MixtureDensity" and not story["any_level"]
    assert story["ratio_star"] == pytest.approx(2.0283, abs=1e-4)
    assert sorted(read_weights(mixture)[0]["weights"].tolist()) == pytest.approx(sorted(TOY), abs=0.2)
    assert main(["sample", "toy/small_t", "prior.T=0.3", f"prior.checkpoint={mixture}", "n=4"]) == 2
    assert "are for ratio_star 2.02832, but the experiment's prior starts at 1.23415" in capsys.readouterr().err


def test_a_fit_goes_on_from_where_it_was_stopped(tmp_path: Path, capsys):
    """A flow's steps, stopped half-way and resumed, end where an unbroken run does."""
    flow = ["prior.density.name=flow", "prior.density.transforms=1", "prior.density.width=8", "training.batch_size=50"]
    whole = read_weights(fit(tmp_path / "whole", *flow, "images=1000", "training.decay=0", "training.warmup=0"))[0]
    fit(tmp_path / "parts", *flow, "images=500", "training.decay=0", "training.warmup=0")
    words = [*flow, "images=1000", "training.decay=0", "training.warmup=0", "resume=auto"]
    resumed = read_weights(fit(tmp_path / "parts", *words))[0]
    assert "below N(0, I)" in capsys.readouterr().err
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_fit_is_measured_at_the_times_of_its_budgets(tmp_path: Path):
    """A Gaussian holds at every T: what is fitted at one is what a budget starts from at another."""
    words = ["digits/small_t", "logger=none", "threads=1", "by_nfe={3: {prior: {T: 0.6}}}", "nfe=3", "n=20"]
    assert main(["fit", *words, f"out={tmp_path / 'fit'}"]) == 0
    weights = f"prior.checkpoint={tmp_path / 'fit' / 'density.safetensors'}"
    for at in ("by_nfe={3: {prior: {T: 0.6}}}", "by_nfe={}"):
        assert main(["bench", *words, weights, at, f"out={tmp_path / 'bench'}"]) == 0
    fitted, benched, own = (
        point for name in ("fit", "bench") for point in read_points(tmp_path / name / "points.jsonl")
    )
    assert fitted["settings"]["prior"]["T"] == benched["settings"]["prior"]["T"] == 0.6
    assert fitted["images_sha256"] == benched["images_sha256"] != own["images_sha256"]


def test_two_processes_fit_what_one_fits(mixture: Path, tmp_path: Path):
    command = [sys.executable, "-m", "diffaccel", "fit", "toy/small_t", *QUICK, "devices=2", "accelerator=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"out={tmp_path}"], env=environment, timeout=300, check=True)
    one, two = read_weights(mixture)[0], read_weights(tmp_path / "density.safetensors")[0]
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_bits_per_dimension_are_the_data_s_entropy(mixture: Path, tmp_path: Path):
    words = ["bench", "toy/small_t", "logger=none", "nfe=5", "n=100", f"prior.checkpoint={mixture}", f"out={tmp_path}"]
    assert main([*words, "likelihood=true", "likelihood_n=150"]) == 0
    (point,) = read_points(tmp_path / "points.jsonl")
    found = point["metrics"]
    assert found["bits_per_dim_n"] == 150 and found["bits_per_dim_nfe"] > 20
    assert abs(found["bits_per_dim"] - ENTROPY / (2 * math.log(2))) < 4 * found["bits_per_dim_se"] < 0.5
    assert point["evaluations"] == {"denoiser": 400, "density": 100}, "likelihoods are not sampling"
    assert main(words) == 0
    assert len(read_points(tmp_path / "points.jsonl")) == 2, "with and without are two points"


def test_likelihoods_go_on_from_the_last_batch(mixture: Path, tmp_path: Path, monkeypatch):
    words = ["bench", "toy/small_t", "logger=none", "nfe=5", "n=100", "batch_size=50", f"prior.checkpoint={mixture}"]
    words += ["likelihood=true", "likelihood_n=120"]
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    measure, firsts, broken = BitsPerDim._batch, [], [True]

    def interrupted(self, method, starts, images, first):
        if first == 50 and broken:
            broken.pop()
            raise KeyboardInterrupt
        firsts.append(first)
        return measure(self, method, starts, images, first)

    monkeypatch.setattr(BitsPerDim, "_batch", interrupted)
    parts = tmp_path / "parts"
    assert main([*words, f"out={parts}"]) == 130
    monkeypatch.setattr(BitsPerDim, "clear", lambda self: None)
    assert main([*words, "seed=1", f"out={parts}"]) == 0
    assert firsts == [0, 0, 50, 100], "another seed's batches are not taken"
    monkeypatch.undo()
    monkeypatch.setattr(BitsPerDim, "_batch", interrupted)
    assert main([*words, f"out={parts}"]) == 0
    assert firsts == [0, 0, 50, 100, 50, 100] and not (parts / "partial").exists()
    (whole,), (_, resumed) = (read_points(tmp_path / name / "points.jsonl") for name in ("whole", "parts"))
    for key in ("bits_per_dim", "bits_per_dim_se", "bits_per_dim_nfe"):
        assert resumed["metrics"][key] == whole["metrics"][key]


def test_starts_of_two_budgets_have_likelihoods_of_their_own(tmp_path: Path):
    """Densities without weights differ in their settings alone."""
    normal = ["bench", "toy/small_t", "logger=none", "n=20", "prior.checkpoint=null", "prior.density.name=normal"]
    normal += ["likelihood=true", "likelihood_n=20"]
    budgets = "by_nfe={3: {prior: {density: {std: 1.0}}}, 6: {prior: {density: {std: 0.3}}}}"
    assert main([*normal, budgets, "nfe=3,6", f"out={tmp_path / 'both'}"]) == 0
    assert main([*normal, "prior.density.std=0.3", "nfe=6", f"out={tmp_path / 'one'}"]) == 0
    both, (one,) = (read_points(tmp_path / name / "points.jsonl") for name in ("both", "one"))
    wide, narrow = (point["metrics"]["bits_per_dim"] for point in both)
    assert wide != pytest.approx(narrow, abs=0.01) and narrow == one["metrics"]["bits_per_dim"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toy/dlg"], "excludes a likelihood"),
        (["toy/ddm"], "starts at an infinite noise-to-data ratio"),
        (["digits/edm", "by_nfe={6: {prior: {name: implicit, checkpoint: null}}}", "nfe=3,6"], "excludes a likelihood"),
        (["toy/edm", "likelihood_n=1"], "likelihood_n=1: a standard error requires at least 2"),
        (["digits/edm", "prior={name: warm, ratio_star: 1}"], "which WarmPrior lacks"),
    ],
    ids=str,
)
def test_a_likelihood_without_density_is_refused_before_sampling(words, message, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(Evaluator, "measure", lambda *_, **__: pytest.fail("a measurement"))
    assert main(["bench", *words, "n=4", "logger=none", "likelihood=true", f"out={tmp_path}"]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_density_that_only_samples_has_no_likelihood(tmp_path: Path, monkeypatch, capsys):
    vae = ["prior.density={name: vae, latent: 2, width: 2}", "training.images=128", "training.batch_size=64"]
    vae += ["reference=", "logger=none", "threads=1", "network.widths=[8]", "network.attention=[]"]
    assert main(["fit", "digits/small_t", *vae, "checkpoint=", f"out={tmp_path}"]) == 0
    monkeypatch.setattr(Evaluator, "measure", lambda *_, **__: pytest.fail("a measurement"))
    words = ["likelihood=true", "nfe=3", "n=4", f"prior.checkpoint={tmp_path / 'density.safetensors'}"]
    assert main(["bench", "digits/small_t", vae[0], *words, "logger=none", f"out={tmp_path / 'bench'}"]) == 2
    assert "a log-density of the starting states, which VAEDensity lacks" in capsys.readouterr().err.replace("\n", " ")


def test_the_trade_off_is_written_and_drawn(mixture: Path, tmp_path: Path, capsys):
    words = ["nfe=4", "n=100", f"prior.checkpoint={mixture}", "tradeoff.T=[0.2,0.9]", "tradeoff.images=100"]
    words += ["likelihood=true", "likelihood_n=500"]
    assert main(["tradeoff", "toy/small_t", *words, f"out={tmp_path}", "logger=none"]) == 0
    with (tmp_path / "tradeoff.csv").open() as file:
        rows = {(row["density"], round(float(row["T"]), 3)): row for row in csv.DictReader(file)}
    free = {(name, T) for name in ("N(0, I)", "Gaussian") for T in (0.2, 0.4, 0.9)}
    assert set(rows) == free | {("mixture", 0.4)}
    bits = {key: float(row["bits_per_dim_bound"]) for key, row in rows.items()}
    assert bits["N(0, I)", 0.2] > bits["N(0, I)", 0.4] + 0.5 > bits["N(0, I)", 0.9]
    assert bits["mixture", 0.4] < bits["Gaussian", 0.4] < bits["N(0, I)", 0.4]
    assert bits["Gaussian", 0.9] == pytest.approx(ENTROPY / (2 * math.log(2)), abs=0.6)
    flow = {key: (float(row["bits_per_dim"]), float(row["bits_per_dim_se"])) for key, row in rows.items()}
    assert abs(flow["mixture", 0.4][0] - ENTROPY / (2 * math.log(2))) < 4 * flow["mixture", 0.4][1]
    gain, se = (float(rows["mixture", 0.4][f"bits_per_dim_gain{end}"]) for end in ("", "_se"))
    assert gain == pytest.approx(flow["N(0, I)", 0.4][0] - flow["mixture", 0.4][0], abs=1e-9)
    assert abs(gain - TO_NORMAL / (2 * math.log(2))) < 3 * se < 0.1, "KL[p_T || N(0, I)], which the mixture closes"
    assert float(rows["N(0, I)", 0.4]["bits_per_dim_gain"]) == 0
    assert rows["Gaussian", 0.4]["bits_per_dim_nfe"] == rows["mixture", 0.4]["bits_per_dim_nfe"], "one level, one stop"
    nfe = [float(rows["Gaussian", T]["bits_per_dim_nfe"]) for T in (0.2, 0.4, 0.9)]
    assert 10 < nfe[0] < nfe[1] < nfe[2]
    assert all(float(row["fd_identity_nfe4"]) > 0 for row in rows.values())
    assert (tmp_path / "tradeoff.png").stat().st_size > 10_000
    assert "lowest bound: N(0, I) at T = 0.9" in capsys.readouterr().out


def test_one_flow_serves_fits_at_several_times(mixture: Path, tmp_path: Path, capsys):
    """Each fit's figures are those that it has as the experiment's own."""
    late = fit(tmp_path / "late", "prior.T=0.6")
    quick = ["tradeoff.T=[0.6]", "tradeoff.fd=false", "tradeoff.images=50", "likelihood=true", "likelihood_n=50"]
    quick += ["logger=none"]

    def figures(out: Path, *words: str) -> dict[tuple[str, float], dict[str, float]]:
        assert main(["tradeoff", "toy/small_t", *quick, *words, f"out={out}"]) == 0
        with (out / "tradeoff.csv").open() as file:
            rows = list(csv.DictReader(file))
        keys = ("bits_per_dim_bound", "bits_per_dim", "bits_per_dim_gain")
        return {(row["density"], round(float(row["T"]), 3)): {key: float(row[key]) for key in keys} for row in rows}

    own = f"prior.checkpoint={mixture}"
    both = figures(tmp_path / "both", own, f"tradeoff.densities={{0.6: {late}}}")
    alone = figures(tmp_path / "alone", f"prior.checkpoint={late}", "prior.T=0.6")
    assert set(both) == {(name, T) for name in ("N(0, I)", "Gaussian", "mixture") for T in (0.4, 0.6)}
    for name in ("N(0, I)", "mixture"):  # the Gaussian's moments are those of either fit's draws
        assert both[name, 0.6] == pytest.approx(alone[name, 0.6], abs=2e-3)
    assert both["mixture", 0.6] != pytest.approx(both["mixture", 0.4], abs=1e-3)
    capsys.readouterr()
    for words, message in (
        ([own, f"tradeoff.densities={{0.7: {late}}}"], "set prior.T or prior.ratio_star to that of the weights"),
        ([own, "tradeoff.densities={0.6: none.safetensors}"], "none.safetensors"),
    ):
        assert main(["tradeoff", "toy/small_t", *quick, *words, f"out={tmp_path / 'bad'}"]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    everywhere = load("digits/small_t").prior["checkpoint"]
    assert main(["tradeoff", "digits/small_t", *quick, f"tradeoff.densities={{0.6: {everywhere}}}"]) == 2
    assert (
        "is defined at every level, without further fits: remove tradeoff.densities"
        in capsys.readouterr().err.replace("\n", " ")
    )


def test_the_experiment_s_own_white_noise_is_compared(tmp_path: Path, capsys):
    words = ["prior.checkpoint=null", "prior.density.name=normal", "tradeoff.T=[0.2]", "tradeoff.images=50"]
    words += ["tradeoff.fd=false", "logger=none"]
    for std, names in ((0.5, ["N(0, I)", "normal"]), (1.0, ["N(0, I)"])):
        out = tmp_path / str(std)
        assert main(["tradeoff", "toy/small_t", *words, f"prior.density.std={std}", f"out={out}"]) == 0
        with (out / "tradeoff.csv").open() as file:
            rows = {row["density"]: float(row["bits_per_dim_bound"]) for row in csv.DictReader(file)}
        assert list(rows) == names and len(set(rows.values())) == len(names)
    assert main(["tradeoff", "toy/small_t", *words, "tradeoff.images=1", f"out={tmp_path / 'one'}"]) == 2
    assert "tradeoff.images=1: a standard error requires at least 2" in capsys.readouterr().err.replace("\n", " ")


def test_an_interrupted_trade_off_keeps_what_it_has(mixture: Path, tmp_path: Path, monkeypatch):
    measure, calls = Evaluator.measure, []

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*given, **named)

    monkeypatch.setattr(Evaluator, "measure", interrupted)
    words = ["nfe=4", "n=100", f"prior.checkpoint={mixture}", "tradeoff.T=[0.2]", "tradeoff.images=20"]
    assert main(["tradeoff", "toy/small_t", *words, f"out={tmp_path}", "logger=none"]) == 130
    with (tmp_path / "tradeoff.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["fd_identity_nfe4"]) for row in rows] == [True, True, False, False, False]
    assert all(float(row["bits_per_dim_bound"]) for row in rows) and (tmp_path / "tradeoff.png").is_file()


def test_a_trade_off_plans_its_budgets_first(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(TradeoffCurve, "bounds", lambda *_: pytest.fail("a measurement"))
    assert main(["tradeoff", "digits/small_t", "nfe=[4,1]", "n=20", f"out={tmp_path}", "logger=none"]) == 2
    assert "nfe=1 is below the minimum" in capsys.readouterr().err
    assert not (tmp_path / "tradeoff.csv").exists()


def test_a_trade_off_is_not_replaced_unasked(mixture: Path, tmp_path: Path, capsys):
    words = [
        f"prior.checkpoint={mixture}",
        "tradeoff.T=[0.2]",
        "tradeoff.images=20",
        "tradeoff.fd=false",
        f"out={tmp_path}",
    ]
    assert main(["tradeoff", "toy/small_t", *words, "logger=none"]) == 0
    before = (tmp_path / "tradeoff.csv").read_text()
    assert main(["tradeoff", "toy/small_t", *words, "seed=1"]) == 2
    assert "tradeoff.csv exists: set again=true" in capsys.readouterr().err
    assert (tmp_path / "tradeoff.csv").read_text() == before
    assert main(["tradeoff", "toy/small_t", *words, "seed=1", "again=true"]) == 0
    assert (tmp_path / "tradeoff.csv").read_text() != before


def test_the_trade_off_wants_a_density_that_is_known(tmp_path: Path, capsys):
    words = ["prior.checkpoint=", f"out={tmp_path}", "logger=none"]
    assert main(["tradeoff", "toy/small_t", *words]) == 2
    assert "set prior.checkpoint=FILE" in capsys.readouterr().err.replace("\n", " ")
    assert main(["tradeoff", "toy/edm", *words[1:]]) == 2
    assert "small_t" in capsys.readouterr().err


def test_the_digits_variant_is_trained_up_to_its_T():
    method = build_method(load("digits/small_t_trained", ["prior.T=0.2"]), load=False)
    assert method.denoiser.ratio_range == pytest.approx((0.01, 0.7204), abs=1e-4)
    assert [phase.name for phase in method.phases()] == ["denoiser"]
    assert json.dumps(method.exports()["density"][1])
