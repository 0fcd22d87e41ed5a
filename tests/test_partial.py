"""What a bench that was killed leaves, and that the next one goes on from it as if nothing had happened."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffaccel.__main__ import main
from diffaccel.denoiser import MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.evaluation import Chunk, Partial
from diffaccel.features.extractors import SmallClassifier, save_classifier
from diffaccel.nn.unet import UNet
from diffaccel.report import read_points

RUNS = {
    "chains": ["toy/dlg", "chains=20", "nfe=24", "n=130", "batch_size=8"],  # groups of 8, 8, 4; the last round has 10
    "restarts": ["toy/dlg", "chains=20", "nfe=30", "n=130", "batch_size=8", "prior.restart_every=3"],
    "stochastic": ["toy/edm", "solver=edm_stochastic", "nfe=9", "n=130", "batch_size=20"],
}
SAME = ("key", "nfe", "nfe_burn_in", "evaluations", "images_sha256", "metrics", "chain", "plan", "images_by_rank")


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


@pytest.fixture(autouse=True)
def plain(undrawn: None) -> None:
    """No pictures."""


def bench(out: Path, run: str, *words: str) -> int:
    name, *own = RUNS[run]
    return main(["bench", name, *own, *words, "logger=none", f"out={out}"])


def essence(out: Path) -> list[dict[str, Any]]:
    points = read_points(out / "points.jsonl")
    return [json.loads(json.dumps({key: point[key] for key in SAME})) for point in points]


def killing(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Kill the run in the middle of the ``at``-th call of the network; returns the samples evaluated until then."""
    forward, spent, calls = MixtureDenoiser.forward, [0], [0]

    def evaluate(self: MixtureDenoiser, x_t: torch.Tensor, *rest: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise Killed
        spent[0] += len(x_t)
        return forward(self, x_t, *rest)

    monkeypatch.setattr(MixtureDenoiser, "forward", evaluate)
    return spent


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("share", [0.02, 0.37, 0.71, 0.98])
def test_a_killed_bench_goes_on(tmp_path: Path, run: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        whole = killing(patch, at=-1)
        calls = 0
        forward = MixtureDenoiser.forward

        def counted(self: MixtureDenoiser, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return forward(self, *arguments)

        patch.setattr(MixtureDenoiser, "forward", counted)
        assert bench(tmp_path / "whole", run) == 0
    with monkeypatch.context() as patch:
        before = killing(patch, at=int(share * calls))
        with pytest.raises(Killed):
            bench(tmp_path / "parts", run)
        assert not (tmp_path / "parts" / "points.jsonl").exists()
    with monkeypatch.context() as patch:
        after = killing(patch, at=-1)
        assert bench(tmp_path / "parts", run) == 0
    assert essence(tmp_path / "parts") == essence(tmp_path / "whole")
    lost = before[0] + after[0] - whole[0]
    batch = 20 * 9 if run == "stochastic" else 8 * (60 + 30)  # one batch; a group's burn-in with it
    assert 0 <= lost <= batch, "more than what the batch that was killed had spent was spent again"
    assert not list((tmp_path / "parts").glob("partial/*")), "nothing is left of a finished point"


def test_measured_points_are_skipped_and_changed_settings_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert bench(tmp_path, "stochastic") == 0
    with monkeypatch.context() as patch:
        spent = killing(patch, at=-1)
        assert bench(tmp_path, "stochastic") == 0
        assert spent[0] == 0 and len(essence(tmp_path)) == 1
    for changed in ("seed=1", "n=131", "solver.S_churn=3", "nfe=11", "prior.ratio_star=20", "again=true"):
        count = len(essence(tmp_path))
        assert bench(tmp_path, "stochastic", changed) == 0
        assert len(essence(tmp_path)) == count + 1, changed
    keys = [point["key"] for point in essence(tmp_path)]
    assert len(set(keys)) == len(keys) - 1, "again=true measures the same point"


def test_a_run_that_goes_on_reports_the_points_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench(tmp_path, "stochastic", "nfe=7") == 0
    assert bench(tmp_path, "stochastic", "nfe=[7,9]") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()[:1] in "79"][-2:] == [
        "7",
        "9",
    ]


def test_another_extractor_scores_the_images_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = ["digits/dlg", "nfe=12", "n=120", "chains=40", "batch_size=16", "logger=none"]
    save_classifier(SmallClassifier(1, 10, 8, (4,)), tmp_path / "other.safetensors", "other", "digits", 0.1, 0)
    other = [f"extractor.path={tmp_path / 'other.safetensors'}", f"reference={tmp_path / 'other.npz'}", "floor=null"]
    assert main(["reference", "digits/dlg", *other]) == 0
    assert main(["bench", *own, "keep_images=true", f"out={tmp_path / 'kept'}"]) == 0
    assert main(["bench", *own, *other, f"out={tmp_path / 'anew'}"]) == 0
    calls = []
    with monkeypatch.context() as patch:
        forward = UNet.forward
        patch.setattr(UNet, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
        assert main(["bench", *own, *other, f"out={tmp_path / 'kept'}"]) == 0
        assert not calls, "the images were made anew"
        assert main(["bench", *own, *other, f"out={tmp_path / 'kept'}", "again=true"]) == 0
        assert calls, "again=true takes kept images for new ones"
    (first, scored, again), (anew,) = essence(tmp_path / "kept"), essence(tmp_path / "anew")
    assert scored == anew == again
    assert "fd_digits" in first["metrics"] and "fd_other" in scored["metrics"]
    assert first["images_sha256"] == scored["images_sha256"] and first["key"] != scored["key"]


# The files


def chunk(first: int, count: int = 2) -> Chunk:
    return Chunk(
        torch.arange(first, first + count), torch.randn(count, 3), torch.zeros(count, 32, dtype=torch.uint8),
        torch.zeros(0, 1, 2, 2), None, "0123", 0, {"denoiser": 4}, {"denoiser": 1}, {"denoiser": 2.5}, 0.1, 0.2,
        [{"mean": [0.5]}],
    )  # fmt: skip


GROUP = [range(0, 2), range(2, 4), range(4, 6)]


def test_chunks_come_back_as_they_were(tmp_path: Path):
    partial = Partial(tmp_path)
    kept = [chunk(0), chunk(2)]
    for number, one in enumerate(kept):
        partial.save(GROUP, number, one, None)
    assert partial.done(GROUP, chained=False) == (2, None)
    for one, other in zip(kept, map(partial.read, GROUP[:2]), strict=True):
        assert torch.equal(one.features, other.features) and torch.equal(one.indices, other.indices)
        assert (one.evaluations, one.flops, one.trace) == (other.evaluations, other.flops, other.trace)
    partial.clear()
    assert partial.done(GROUP, chained=False) == (0, None) and not tmp_path.exists()


def test_rounds_without_the_state_after_them_do_not_count(tmp_path: Path):
    """Killed between a round's two files: the chain is where it was before that round."""
    partial = Partial(tmp_path)
    for number in range(2):
        partial.save(GROUP, number, chunk(2 * number), {"y": torch.ones(2) * number})
    partial.save(GROUP, 2, chunk(4), None)
    found, state = partial.done(GROUP, chained=True)
    assert found == 2 and torch.equal(state["y"], torch.ones(2))
    (tmp_path / "images_00000000.pt").unlink()
    assert partial.done(GROUP, chained=True) == (0, None)


def test_a_damaged_file_is_named(tmp_path: Path):
    partial = Partial(tmp_path)
    partial.save(GROUP, 0, chunk(0), None)
    file = next(tmp_path.glob("images_*.pt"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"images_00000000.pt is damaged .* remove its folder"):
        partial.read(GROUP[0])


def test_nothing_is_kept_without_a_folder():
    partial = Partial(None)
    partial.save(GROUP, 0, chunk(0), None)
    assert partial.done(GROUP, chained=False) == (0, None)
    partial.clear()
