"""Truncated diffusion as it is trained: exact resume, two processes, precision, logs, and what a fit leaves."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_collective import run
from torch import nn

from diffaccel.__main__ import main
from diffaccel.config import find, load
from diffaccel.data import to_float
from diffaccel.experiment import build_data, build_method
from diffaccel.methods import TruncatedDiffusion
from diffaccel.metrics.states import compare_states, radial_power
from diffaccel.noise import NoiseStreams
from diffaccel.report import read_points
from diffaccel.weights import file_sha256, read_weights, save_weights

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = ["network.widths=[8]", "network.attention=[]", "network.embedding=16", "training.batch_size=32", "threads=1"]
TINY += ["training.warmup=64", "logger=none", "n=20", "nfe=3", "checkpoint="]
PRODUCT = ["method.frozen=true", "prior.generator=separate", "method.r1_every=3"]
FEATURES = "method.critic={name: features, width: 8}"
OBJECTIVES = "method.objectives=[{name: ode_pair, steps: 2, pairs: 48, until: 64}, {name: moments, since: 32}, "
OBJECTIVES += "{name: distribution_matching, since: 96}, {name: moments, ratio: 0.5, steps: 2, rows: 2, filters: 3}]"
"""A separate generator on a frozen denoiser, whose weights are random here."""


def critic(words: Sequence[str]) -> list[str]:
    """The smallest of its kind."""
    return [] if FEATURES in words else ["method.critic.channel_base=64"]


def fit(out: Path, *words: str, images: int = 256, experiment: str = "digits/tdpm") -> int:
    return main(["fit", experiment, *TINY, *critic(words), f"images={images}", "reference=", *words, f"out={out}"])


def state(out: Path) -> dict[str, Any]:
    return torch.load(out / "last.ckpt", weights_only=True)


# Resume


@pytest.mark.parametrize(
    ("words", "optimizers"),
    [(["network.dropout=0.1"], 3), ([*PRODUCT, FEATURES, OBJECTIVES], 7)],
    ids=["shared", "objectives"],
)
def test_resuming_is_exact(words: list[str], optimizers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All of the optimisers, the critic, the average and the counters, from the middle of a run."""
    assert fit(tmp_path / "whole", *words) == 0
    loss, calls = TruncatedDiffusion.critic_loss, [0]

    def interrupted(self: TruncatedDiffusion, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    from diffaccel.run.checkpoint import Checkpointer

    monkeypatch.setattr(TruncatedDiffusion, "critic_loss", interrupted)
    monkeypatch.setattr(  # every 3 steps and not every 10
        Checkpointer, "on_train_batch_end", lambda self, trainer, method, *_: method.steps % 3 or self.save(trainer)
    )
    assert fit(tmp_path / "halves", *words) == 130
    assert state(tmp_path / "halves")["diffaccel"]["steps"] == 3, "the last whole state, before the interrupted step"
    assert fit(tmp_path / "halves", *words, "resume=auto") == 0
    one, other = state(tmp_path / "whole"), state(tmp_path / "halves")
    assert one["diffaccel"]["steps"] == 8
    for key in ("description", "recipe"):
        assert one["diffaccel"].pop(key) == other["diffaccel"].pop(key)
    assert one["diffaccel"].pop("denoiser_sha256", 0) == other["diffaccel"].pop("denoiser_sha256", 0)
    for key in ("state_dict", "diffaccel", "optimizer_states"):
        torch.testing.assert_close(other[key], one[key], rtol=0, atol=0)
    assert len(one["optimizer_states"]) == optimizers


BY_BUDGET = """
prior: {generator: separate, K: null, ratio_star: 2}
by_nfe:
  2: {prior: {level_scale: 0.8}}
  3: {prior: {level_scale: 0.9}, solver: {eta: 0.5}}
  4: {prior: {name: gaussian}}
"""


def test_settings_by_budget_leave_the_training_alone(tmp_path: Path):
    """What samples at some budget, planned at the start and measured between steps, is not what is trained."""
    file = tmp_path / "own.yaml"
    file.write_text(f"base: {find('digits/tdpm').resolve()}{BY_BUDGET}")
    random = build_method(load("digits/tdpm", TINY), load=False).denoiser.network.state_dict()
    save_weights(tmp_path / "denoiser.safetensors", random, {})  # a fit that is measured needs weights
    words = [word for word in PRODUCT if not word.startswith("prior.")]
    words.append(f"checkpoint={tmp_path / 'denoiser.safetensors'}")
    measured = [f"reference={load('digits/tdpm').reference}", "training.evaluate_every=64", "training.evaluate_n=20"]
    assert fit(tmp_path / "plain", *words, "by_nfe={}", images=128, experiment=str(file)) == 0
    assert fit(tmp_path / "tuned", *words, *measured, "nfe=[2,3,4]", images=128, experiment=str(file)) == 0
    plain, tuned = state(tmp_path / "plain"), state(tmp_path / "tuned")
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(tuned[key], plain[key], rtol=0, atol=0)
    points = read_points(tmp_path / "tuned" / "points.jsonl")
    assert [point["settings"]["prior"].get("level_scale") for point in points] == [0.8, 0.9, None]
    assert [point["evaluations"].get("generator") for point in points] == [20, 20, None]

    method = build_method(load(str(file), [*TINY, *words]), load=False)
    assert method.sampler.by_nfe[2][0].generator is method.sampler.by_nfe[3][0].generator is method.implicit.generator


def test_a_fit_begins_anew_whatever_weights_its_experiment_names(tmp_path: Path):
    """Settings by budget share the generator that is trained."""
    file = tmp_path / "own.yaml"
    file.write_text(f"base: {find('digits/tdpm').resolve()}\nby_nfe: {{3: {{solver: {{eta: 0.5}}}}}}\n")
    assert fit(tmp_path / "a", *PRODUCT, images=64, experiment=str(file)) == 0
    given = f"prior.checkpoint={tmp_path / 'a' / 'generator.safetensors'}"
    assert fit(tmp_path / "b", *PRODUCT, given, images=64, experiment=str(file)) == 0
    one, other = state(tmp_path / "a"), state(tmp_path / "b")
    torch.testing.assert_close(other["state_dict"], one["state_dict"], rtol=0, atol=0)


def test_a_fit_goes_on_from_first_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As after a warm-up: what no phase trains is left as it was given."""
    assert fit(tmp_path / "warm", *PRODUCT, images=64) == 0
    given = tmp_path / "warm" / "generator_raw.safetensors"
    for frozen in ("true", "false"):
        words, out = [*PRODUCT, f"method.frozen={frozen}", "method.generator_since=1000"], tmp_path / frozen
        assert fit(out, *words, f"prior.init={given}", images=64) == 0
        found, first = (read_weights(file) for file in (out / given.name, given))
        torch.testing.assert_close(found[0], first[0], rtol=0, atol=0)
        assert found[1]["prior"]["init_sha256"] == file_sha256(given) and str(tmp_path) not in str(found[1])
    assert fit(tmp_path / "no", *PRODUCT, f"prior.init={tmp_path / 'none.safetensors'}", images=64) == 2
    assert "none.safetensors" in capsys.readouterr().err
    assert fit(tmp_path / "no", f"prior.init={given}", images=64) == 2
    assert "remove prior.init" in capsys.readouterr().err


# Two processes


@pytest.mark.parametrize(
    "words",
    [[], pytest.param([*PRODUCT, FEATURES, OBJECTIVES], marks=pytest.mark.slow)],
    ids=["shared", "objectives"],
)
def test_two_processes_train_as_one_with_their_batch(words: list[str], tmp_path: Path):
    """Each phase's gradient is averaged, whatever part of the parameters it touches; deviations are of neighbours."""
    words = [*words, "precision=64-true", "accelerator=cpu", "images=160", "training.log_every=1", "reference="]
    assert fit(tmp_path / "one", *words) == 0
    done = run(
        tmp_path, "", "fit", "digits/tdpm", *TINY, *critic(words), *words, "devices=2", f"out={tmp_path / 'two'}"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-7, atol=1e-9, msg=name)
    for name, value in one["diffaccel"]["ema"].items():
        torch.testing.assert_close(two["diffaccel"]["ema"][name], value, rtol=1e-7, atol=1e-9, msg=name)


# Precision


def test_the_critic_learns_in_float32_under_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its gradient, R1's among it, is that of precision=32-true at the same states.

    Under autocast a linear layer's backward pass would round to three digits.
    """
    loss, step = TruncatedDiffusion.critic_loss, torch.optim.AdamW.step
    states = torch.randn(32, 1, 8, 8)
    critic: list[nn.Parameter] = []
    found: dict[str, list[torch.Tensor]] = {}

    def on_given_states(self: TruncatedDiffusion, *arguments: Any) -> torch.Tensor:
        critic[:] = self.critic.parameters()
        monkeypatch.setattr(self.implicit, "generate", lambda *_: states)
        return loss(self, *arguments)

    monkeypatch.setattr(TruncatedDiffusion, "critic_loss", on_given_states)
    for precision in ("32-true", "bf16-mixed"):

        def stepping(self: Any, *arguments: Any, precision: str = precision, **words: Any) -> Any:
            if critic and self.param_groups[0]["params"][0] is critic[0]:
                found[precision] = [parameter.grad.clone() for parameter in critic]
            return step(self, *arguments, **words)

        monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
        assert fit(tmp_path / precision, f"precision={precision}", "method.gamma=10", images=32) == 0
    assert len(found["32-true"]) == len(found["bf16-mixed"]) > 10
    for gradient, rounded in zip(found["32-true"], found["bf16-mixed"], strict=True):
        torch.testing.assert_close(rounded, gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


# Logs


def test_what_is_logged(tmp_path: Path):
    assert fit(tmp_path, "logger=csv", "training.log_every=2", images=128) == 0
    (file,) = tmp_path.glob("csv/version_*/metrics.csv")
    with file.open() as stream:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]
    names = {key for row in rows for key in row if key.startswith("train/")}
    expected = {f"train/denoiser_loss_quarter_{k}" for k in (1, 2, 3, 4)}
    expected |= {"train/critic_real", "train/critic_made", "train/critic_penalty", "train/critic_loss"}
    expected |= {"train/generator_mean_0", "train/generator_std_0", *(f"train/generator_power_{k}" for k in range(4))}
    assert expected <= names
    assert sum("train/critic_real" in row for row in rows) == 2, "on every second step of four"


def test_objectives_of_one_kind_log_apart():
    phases = build_method(load("digits/tdpm", [*TINY, *PRODUCT, OBJECTIVES])).phases()
    names = ["ode_pair", "moments", "fake_denoiser", "matching", "moments_2", "generator", "critic"]
    assert [phase.name for phase in phases] == names


def test_states_of_one_law_compare_as_equal():
    found = compare_states(torch.randn(4000, 3, 8, 8), torch.randn(4000, 3, 8, 8))
    assert set(found) == {f"{name}_{c}" for name in ("mean", "std") for c in range(3)} | {
        f"power_{k}" for k in range(4)
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(float(not name.startswith("mean")), abs=0.03), name


def test_states_that_differ_show_where():
    real = torch.randn(4000, 1, 8, 8)
    found = compare_states(nn.functional.avg_pool2d(real, 3, 1, 1, count_include_pad=False) + 0.5, real + 0.3)
    assert found["mean_0"].item() == pytest.approx(0.2, abs=0.02) and found["std_0"] < 0.5
    assert found["power_1"] > found["power_2"] > found["power_3"]


def test_power_of_a_wave():
    rows = torch.arange(16)[:, None] / 16
    wave = torch.cos(2 * torch.pi * 6 * rows).expand(2, 1, 16, 16)
    power = radial_power(wave)
    assert power.argmax() == 3 and power[:3].max() < 1e-9, "6 of 16 is in the band from 3/8 of a cycle a pixel on"
    assert radial_power(torch.randn(2000, 1, 8, 8)).sub(1).abs().max() < 0.05


# Digits


def test_one_generator_serves_all_budgets(tmp_path: Path):
    """Weights that a fit leaves are those that a bench reads, at the ends of both ways to train."""
    shared = f"checkpoint={tmp_path / 'shared' / 'ema.safetensors'}"  # a network of the same size
    for name, words, left in (
        ("shared", [], {"ema", "raw"}),
        ("product", [*PRODUCT, shared.replace("ema.", "whole.")], {"generator", "generator_raw"}),
    ):
        out = tmp_path / name
        assert fit(out, *words, images=64) == 0
        assert {file.stem for file in out.glob("*.safetensors")} == left
        weights = shared
        if name == "shared":  # as if it had been trained at all levels
            tensors, said = read_weights(out / "ema.safetensors")
            del said["trained_ratios"]
            save_weights(out / "whole.safetensors", tensors, said)
        if name == "product":
            assert "denoiser_sha256" in state(out)["diffaccel"]
            weights = f"prior.checkpoint={out / 'generator.safetensors'}"
        assert main(["bench", "digits/tdpm", *TINY, *critic(words), *words, weights, f"out={out}", "nfe=[2,4]"]) == 0
        assert [point["nfe"] for point in read_points(out / "points.jsonl")] == [2, 4]


@pytest.mark.slow
def test_digits_from_scratch(tmp_path: Path):
    """After 300 steps the generator's pixels spread as the states do, within 20 %."""
    words = [
        "training.batch_size=64",
        "prior.K=4",
        "denoiser.time_scale=0.25",
        "logger=none",
        "n=20",
        "nfe=3",
        "checkpoint=",
    ]
    assert main(["fit", "digits/tdpm", *words, "images=19200", f"out={tmp_path}"]) == 0
    config = load("digits/tdpm", [*words, f"checkpoint={tmp_path / 'ema.safetensors'}"])
    method = build_method(config)
    assert isinstance(method, TruncatedDiffusion)
    with torch.no_grad():
        made = method.implicit.generate(method.denoiser, NoiseStreams(0, range(500)), (1, 8, 8))
    images = to_float(build_data(config).images("train").read(torch.arange(1000)))
    expected = (images.var() + method.implicit.ratio_made**2).sqrt()
    assert made.std().item() == pytest.approx(expected.item(), rel=0.2)
    assert all(tensor.isfinite().all() for tensor in read_weights(tmp_path / "ema.safetensors")[0].values())
