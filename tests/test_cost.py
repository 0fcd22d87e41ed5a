"""What a dry run predicts: bytes that are alive together, counted by hand, on real and on meta tensors."""

import pytest
import torch

from diffaccel.__main__ import main
from diffaccel.cost import LiveBytes


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
        line = next(line for line in printed.splitlines() if line.startswith("memory of a process"))
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
