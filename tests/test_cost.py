"""What a dry run predicts: bytes that are alive together, counted by hand, on real and on meta tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.experiment import build_method
from diffaccel.verbs import cost
from diffaccel.verbs.cost import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_of_a_short_program(device: str):
    x = torch.ones(1000, device=device)  # from before: not counted
    with LiveBytes() as memory:
        a = x * 2  # 4000
        b = a.double()  # + 8000
        assert memory.live == 12_000
        a.mul_(3)  # in place: nothing new
        b[:500].view(5, 100)  # a view: nothing new
        assert (memory.live, memory.peak) == (12_000, 12_000)
        del a
        assert memory.live == 8_000
        c = torch.cat([x, x])  # + 8000
        assert (memory.live, memory.peak) == (16_000, 16_000)
        del b, c
    assert memory.live == 0


def test_a_dry_run_says_what_a_bench_takes(capsys: pytest.CaptureFixture[str]):
    memory = {}
    for batch_size in (10, 20):
        assert main(["bench", "digits/edm", "nfe=[5,10]", "dry_run=true", f"batch_size={batch_size}"]) == 0
        printed = capsys.readouterr().out
        line = next(line for line in printed.splitlines() if line.startswith("memory per process"))
        value, unit = line.split(" of weights, ")[1].split()[:2]
        memory[batch_size] = float(value) * {"kB": 1e3, "MB": 1e6}[unit]
    assert memory[20] == pytest.approx(2 * memory[10], rel=0.1)


def test_each_budget_is_planned_with_its_own_settings(capsys: pytest.CaptureFixture[str]):
    words = [
        "nfe=[7,20]",
        "n=1000",
        "dry_run=true",
        "by_nfe={7: {solver: {name: heun}}, 20: {solver: {name: dpmpp2m}}}",
    ]
    assert main(["bench", "digits/edm", *words]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()[:2] in ("7 ", "20")]
    assert [row[2] for row in rows] == ["4", "20"], "solver steps: two evaluations each but the last, and one each"
    assert [row[4] for row in rows] == ["7", "20"]


def test_the_forward_that_is_timed_is_a_warm_one_of_a_whole_batch(monkeypatch: pytest.MonkeyPatch):
    """A clock that adds 3 s to the first forward of a size, 1 ms an image after that: only the latter is predicted."""
    calls: list[int] = []

    def forward(method: Any, images: int) -> float:
        calls.append(images)
        return images * 1e-3 + (3.0 if calls.count(images) == 1 else 0.0)

    monkeypatch.setattr(cost, "_forward", forward)
    monkeypatch.setattr(cost, "AFFORDABLE", 7.0)
    sampler = build_method(load("toy/edm")).sampler
    found = cost.forward_cost(sampler, 300)
    assert (found.timed, found.seconds) == (300, pytest.approx(1e-3))
    assert (found.compiling, calls) == (0.0, [300, 300, 300, 300, 300])
    calls.clear()
    sampler.shape = (3, 64, 64)
    found = cost.forward_cost(sampler, 100)  # 4 were watched, at 0.751 s each the first time
    assert found.timed == 100, "start-up does not decide what is affordable"
    assert found.seconds == pytest.approx(1e-3) and found.counting == found.compiling == pytest.approx(3.0)
    calls.clear()
    monkeypatch.setattr(cost, "AFFORDABLE", 0.05)
    found = cost.forward_cost(sampler, 100)
    assert found.timed == 4 and found.seconds == pytest.approx(1e-3) and found.counting == pytest.approx(3.0)


def test_sampling_is_timed_with_all_that_it_does(monkeypatch: pytest.MonkeyPatch):
    """A chain's first batch, burn-in and all: a minute over the evaluations that were counted."""
    config = load("toy/dlg", ["n=100", "chains=50", "batch_size=25", "nfe=40"])
    sampler = build_method(config, frozen=True).eval().sampler
    plan = sampler.plan(40, 100)
    ticks = iter([0.0, 90.0, 100.0, 160.0])
    monkeypatch.setattr(cost, "clock", lambda device: next(ticks))
    opened, drawn = sampler.open, sampler.draw
    made: list[int] = []
    monkeypatch.setattr(sampler, "open", lambda *given: made.append(-1) or opened(*given))

    def draw(*arguments: Any) -> Any:
        for indices, images in drawn(*arguments):
            made.append(len(indices))
            yield indices, images

    monkeypatch.setattr(sampler, "draw", draw)
    rate = cost.seconds_per_evaluation(config, sampler, plan, forward=1e-9)
    assert made == [-1, 25, -1, 25], "the burn-in and one batch, and again, because the first time includes start-up"
    evaluations = 25 * (sampler.prior.burn_in_per_chain + plan.chain_steps + sampler.solver.evaluations(plan.steps))
    assert rate == pytest.approx(60.0 / evaluations, rel=1e-9)
    assert cost.seconds_per_evaluation(config, sampler, plan, forward=1.0) == 1.0, "what takes too long isn't run"


def test_a_dry_run_has_the_threads_of_the_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    forward = cost._forward

    def watch(sampler: Any, images: int) -> float:
        seen.append(torch.get_num_threads())
        return forward(sampler, images)

    monkeypatch.setattr(cost, "_forward", watch)
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            seen.clear()
            assert main(["bench", "toy/edm", "n=20", "dry_run=true", f"threads={threads}"]) == 0
            assert set(seen) == {threads} and f"threads={threads}" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


def test_a_dry_run_computes_as_the_bench_would(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    seen = []
    forward = cost._forward

    def watch(sampler: Any, images: int) -> float:
        parameter = next(sampler.denoiser.parameters())
        seen.append((torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"), parameter.dtype))
        return forward(sampler, images)

    monkeypatch.setattr(cost, "_forward", watch)
    for precision, autocast, dtype in (
        ("32-true", False, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("64-true", False, torch.float64),
    ):
        seen.clear()
        words = ["n=20", "batch_size=10", "nfe=3", "dry_run=true", "threads=1", f"precision={precision}"]
        assert main(["bench", "digits/edm", *words]) == 0
        assert set(seen) == {(autocast, dtype)}
        assert f"precision={precision}" in capsys.readouterr().out


def test_a_dry_run_of_a_fit_has_its_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Each with the images that it sees; nothing is trained, read or written."""
    words = ["fit", "digits/tdpm", "dry_run=true", "images=1000", "method.critic_since=500",
             "method.generator_since=750", "network.widths=8,8", "threads=1", "logger=none", f"out={tmp_path / 'out'}",
             "data=npz", "data.path=nowhere.npz"]  # fmt: skip
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits/tdpm: tdpm, 1,000 images of (1, 8, 8), 64 a step, seed=0"
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:6]}
    assert {name: row[1] for name, row in rows.items()} == {"denoiser": "1,000", "generator": "250", "critic": "500"}
    assert rows["denoiser"][0] == rows["generator"][0], "one network"
    assert lines[6].startswith("about ") and not (tmp_path / "out").exists()


def test_a_dry_run_of_a_fit_plans_its_evaluations(capsys: pytest.CaptureFixture[str]):
    """What the fit itself would refuse after its start."""
    for word in ("nfe=0.5", "guidance=1"):
        assert main(["fit", "digits/dlg", "dry_run=true", word, "threads=1", "logger=none"]) == 2
        assert word.partition("=")[0] in capsys.readouterr().err


def test_a_dry_run_of_an_auto_encoder_reads_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With the critic, which needs what the auto-encoder's own step made, and without LPIPS."""
    small = ["latents.widths=[8,8,8]", "latents.groups=4", "method.critic_widths=[8,8]", "threads=1", "logger=none"]
    assert main(["fit", "celebahq256/autoencoder", "dry_run=true", *small, f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "\n autoencoder " in printed and "\n critic " in printed and "4,000,000 images of (3, 256, 256)" in printed
    assert "LPIPS, whose weights a dry run does not read, is not included" in printed
    assert not (tmp_path / "out").exists()


def test_phases_of_a_fit_with_captions_are_timed(capsys: pytest.CaptureFixture[str]):
    """Networks and critic receive a condition of the kinds that they take."""
    assert main(["fit", "digits_text/tdpm", "dry_run=true", "network.widths=8,8", "threads=1", "logger=none"]) == 0
    assert "\n critic " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["search", "digits/edm"], ["reference", "digits/edm"], ["fit", "digits/extractor"]])
def test_what_has_no_dry_run_says_so(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It used to do the work."""
    assert main([*words, "dry_run=true", "logger=none", f"out={tmp_path / 'out'}"]) == 2
    assert "has no dry run" in capsys.readouterr().err and not (tmp_path / "out").exists()
