"""Runs that SIGKILL ends, again and again, end where an undisturbed one does (`make test-slow`).

Runs are forks of this process, which spare them the seconds that imports take.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffaccel.__main__ import main
from diffaccel.evaluation import Evaluator, Partial, evaluator, pictures
from diffaccel.report import read_points
from diffaccel.run import checkpoint
from diffaccel.weights import read_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks of a process with a tensor library are safe on Linux"),
]

KILLS = 10
DRAWING = {name: getattr(Evaluator, name) for name in ("_draw", "_draw_curve")}  # before a fixture turns them off


class Run:
    """A call of main in a process of its own, which can be killed.

    Args:
        words: Of the command line.
        prepare: What the process does before, to itself.
    """

    def __init__(self, words: list[str], prepare: Callable[[], None] = lambda: None) -> None:
        def call() -> None:
            prepare()
            sys.exit(main(words))

        self.process = multiprocessing.get_context("fork").Process(target=call, daemon=True)
        self.process.start()

    def kill_when(self, reached: Callable[[], bool], delay: float = 0.0) -> None:
        """Kill it some seconds after a condition holds; it must not have ended by then."""
        while not reached():
            assert self.process.is_alive(), "it ended before it could be killed"
            time.sleep(0.002)
        time.sleep(delay)
        self.process.kill()
        assert self.end() == -signal.SIGKILL

    def end(self) -> int:
        """Exit status, or less the signal's number."""
        self.process.join(timeout=300)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode


# Bench: each run takes some five seconds

BENCHES = {
    "chains": ["toy/dlg", "chains=60", "nfe=60", "n=1500", "batch_size=10"],
    "restarts": ["toy/dlg", "chains=60", "nfe=60", "n=1500", "batch_size=10", "prior.restart_every=7"],
    "stochastic": ["toy/edm", "solver=edm_stochastic", "nfe=41", "n=5000", "batch_size=20"],
}
SECONDS = ("seconds_per_image", "seconds_scoring", "seconds_warm_up")
"""What differs between two equal runs."""


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that name real points, few ones: their KID would take longer than the runs."""
    folder = tmp_path_factory.mktemp("statistics")
    words = [f"reference={folder / 'reference.npz'}", f"floor={folder / 'floor.npz'}"]
    assert Run(["reference", "toy/edm", "data.n=500", *words]).end() == 0
    return words


class Bench:
    """One of ``BENCHES``, the folder of a run of it that nothing disturbed, and one for runs that something does."""

    def __init__(self, name: str, statistics: list[str], folder: Path) -> None:
        self.words = [*BENCHES[name], "logger=none", *statistics]
        self.whole, self.out = folder / name, folder / f"{name}-killed"
        assert self.run(self.whole).end() == 0
        (self.point,) = read_points(self.whole / "points.jsonl")
        n, size = (self.point["n"], int(self.words[4].partition("=")[2]))
        self.batches = n // size

    def run(self, out: Path, prepare: Callable[[], None] = lambda: None) -> Run:
        return Run(["bench", *self.words, f"out={out}"], prepare)

    def done(self, batches: int, out: Path) -> Callable[[], bool]:
        """Whether so many batches lie on the disk; for 0, whether there is a run at all."""
        if batches == 0:
            return (out / "config.yaml").is_file
        return lambda: len(list(out.glob("partial/*/images_*.pt"))) >= batches

    def check(self, out: Path, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """The point is the undisturbed one but for some keys, and nothing else is left."""
        content = (out / "points.jsonl").read_bytes()
        assert content.count(b"\n") == 1 and content.endswith(b"\n")
        point = json.loads(content)
        left_out = {*SECONDS, *without}
        assert {key: point[key] for key in point.keys() - left_out} == {
            key: self.point[key] for key in self.point.keys() - left_out
        }
        assert not list(out.glob("partial/*")), "nothing is left of a finished point"
        files = [folder / "features" / f"{point['key']}.npy" for folder in (out, self.whole)]
        np.testing.assert_array_equal(*map(np.load, files))
        assert not list(out.rglob("*.part"))
        return point


@pytest.fixture(scope="module", params=BENCHES)
def bench(request: pytest.FixtureRequest, statistics: list[str], undrawn: None, tmp_path_factory: Any) -> Bench:
    return Bench(request.param, statistics, tmp_path_factory.mktemp("bench"))


def test_a_bench_that_is_killed_ten_times_measures_the_same(bench: Bench, tmp_path: Path):
    rng = random.Random(0)
    moments = [0, *sorted(rng.randrange(bench.batches - 5) for _ in range(KILLS - 1))]
    done: dict[Path, int] = {}
    for moment in moments:
        bench.run(tmp_path).kill_when(bench.done(moment, tmp_path), delay=rng.uniform(0, 0.1))
        assert not (tmp_path / "points.jsonl").exists()
        before, done = done, {file: file.stat().st_mtime_ns for file in tmp_path.glob("partial/*/images_*.pt")}
        made_again = [file.name for file in before if done.get(file) != before[file]]
        assert len(made_again) <= 1, "more than the batch that the chain's state did not know of"
    assert len(done) > bench.batches / 2
    assert bench.run(tmp_path).end() == 0
    bench.check(tmp_path)


def broken_at(module: Any, name: str, after: bool) -> Callable[[], None]:
    """Kill the process that has called this before, or after, a function of some object does its work."""

    def prepare() -> None:
        function = getattr(module, name)

        def killing(*arguments: Any, **words: Any) -> None:
            if after:
                function(*arguments, **words)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, killing)

    return prepare


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("module", "name"),
    [(np, "save"), (evaluator, "append_point"), (Partial, "clear"), (Evaluator, "_draw")],
    ids=["features", "point", "clear", "draw"],
)
def test_a_bench_that_is_killed_as_it_finishes(
    module: Any, name: str, after: bool, statistics: list[str], tmp_path: Path
):
    """Whether the point was written or not, it is there once in the end."""
    words = ["bench", "toy/dlg", "chains=6", "nfe=[30,40]", "n=60", "logger=none", *statistics]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert Run([*words, f"out={whole}"]).end() == 0
    for _ in range(2):  # at the first budget, and at the second
        assert Run([*words, f"out={out}"], broken_at(module, name, after)).end() == -signal.SIGKILL
    assert Run([*words, f"out={out}"]).end() == 0
    points, expected = (read_points(folder / "points.jsonl") for folder in (out, whole))
    for point in (*points, *expected):
        for key in SECONDS:
            del point[key]
    assert points == expected
    assert not list(out.glob("partial/*"))
    features = [sorted(file.name for file in folder.glob("features/*")) for folder in (out, whole)]
    assert features[0] == features[1] and len(features[0]) == 2


@pytest.mark.parametrize("name", ["scatter", "write_curve_csv", "plot_curve"])
def test_pictures_that_a_kill_has_prevented_are_drawn(name: str, statistics: list[str], tmp_path: Path):
    def drawing() -> None:
        for method, function in DRAWING.items():
            setattr(Evaluator, method, function)

    def killed() -> None:
        drawing()
        broken_at(pictures, name, after=False)()

    words = ["bench", "toy/edm", "nfe=5", "n=60", "logger=none", *statistics, f"out={tmp_path}"]
    assert Run(words, killed).end() == -signal.SIGKILL
    assert Run(words, drawing).end() == 0
    assert len(read_points(tmp_path / "points.jsonl")) == 1
    assert all((tmp_path / file).is_file() for file in ("samples_nfe5.png", "curve.csv", "curve.png"))


# Another number of processes

SCRIPT = """\
import sys
from diffaccel.__main__ import main
from diffaccel.evaluation import Evaluator

Evaluator._draw = Evaluator._draw_curve = lambda self: None
sys.exit(main({words!r}))
"""


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start words in two processes, as a group of their own, which is gone at the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        script = tmp_path / "run.py"
        script.write_text(SCRIPT.format(words=[*words, "devices=2", "accelerator=cpu", "threads=1"]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen([sys.executable, script], env=environment, start_new_session=True, **silent))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("bench", ["chains", "stochastic"], indirect=True)
def test_another_number_of_processes_goes_on(bench: Bench, two: Callable[..., subprocess.Popen[bytes]], tmp_path: Path):
    """One process begins, two go on, one again; then two finish."""
    out, words = tmp_path / "out", ["bench", *bench.words, f"out={tmp_path / 'out'}"]
    bench.run(out).kill_when(bench.done(bench.batches // 4, out))
    before = len(list(out.glob("partial/*/images_*.pt")))
    group = two(*words)
    reached, deadline = bench.done(bench.batches // 2, out), time.monotonic() + 120
    while not reached():
        assert group.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(group.pid, signal.SIGKILL)
    group.wait()
    ranks = [torch.load(file, weights_only=True)["rank"] for file in out.glob("partial/*/images_*.pt")]
    assert len(ranks) > before and set(ranks) == {0, 1}, "both had a part"
    bench.run(out).kill_when(bench.done(3 * bench.batches // 4, out))
    assert two(*words).wait(timeout=300) == 0
    point = bench.check(out, without=("metrics", "jackknife", "memorisation", "images_by_rank", "world_size"))
    assert point["metrics"] == pytest.approx(bench.point["metrics"], rel=1e-9, nan_ok=True)
    for name, values in bench.point["jackknife"].items():
        assert point["jackknife"][name] == pytest.approx(values, rel=1e-9)
    assert point["memorisation"]["share"] == bench.point["memorisation"]["share"]
    assert point["world_size"] == 2 and sum(point["images_by_rank"]) == point["n"] and all(point["images_by_rank"])


# Fit: 600 steps of 20 ms, a checkpoint every 10

FIT = [
    *("fit", "digits/edm", "network.widths=[8]", "network.attention=[]", "network.embedding=16", "threads=1"),
    *("network.dropout=0.1", "images=19200", "training.batch_size=32", "training.warmup=300", "training.flip=true"),
    *("training.checkpoint_minutes=0.001", "logger=none", "reference="),
]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fit that ran through."""
    out = tmp_path_factory.mktemp("fit")
    assert Run([*FIT, f"out={out}"]).end() == 0
    return out


def assert_same_fit(out: Path, whole: Path) -> None:
    """Weights and all of the state, bit for bit."""
    for name in ("raw", "ema"):
        weights, expected = (read_weights(folder / f"{name}.safetensors")[0] for folder in (out, whole))
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    states = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (out, whole)]
    for key in ("description", "recipe"):
        assert states[0]["diffaccel"].pop(key) == states[1]["diffaccel"].pop(key)
    for key in ("state_dict", "diffaccel", "optimizer_states"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)


def test_a_fit_that_is_killed_ten_times_ends_at_the_same_weights(fitted: Path, tmp_path: Path):
    rng, last, killed_at = random.Random(1), tmp_path / "last.ckpt", []

    def written() -> int:
        return last.stat().st_mtime_ns if last.is_file() else 0

    for _ in range(KILLS):
        run = Run([*FIT, f"out={tmp_path}", "resume=auto"])
        for _ in range(rng.randint(1, 4)):
            before, deadline = written(), time.monotonic() + 60
            while written() == before:
                assert run.process.is_alive() and time.monotonic() < deadline
                time.sleep(0.002)
        run.kill_when(lambda: True, delay=rng.uniform(0, 0.3))
        killed_at.append(torch.load(last, weights_only=True)["diffaccel"]["images_seen"])
    assert killed_at == sorted(set(killed_at)) and killed_at[-1] < 19200, "every run came further"
    assert not list(tmp_path.glob("*.safetensors")), "an unfinished run leaves no weights"
    assert Run([*FIT, f"out={tmp_path}", "resume=auto"]).end() == 0
    assert_same_fit(tmp_path, fitted)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_fit_that_is_killed_as_it_exports_does_so_again(fitted: Path, after: bool, tmp_path: Path):
    """Between the raw and the averaged weights, or before either."""
    (tmp_path / "last.ckpt").write_bytes((fitted / "last.ckpt").read_bytes())
    words = [*FIT, f"out={tmp_path}", "resume=auto"]
    assert Run(words, broken_at(checkpoint, "save_weights", after)).end() == -signal.SIGKILL
    assert [file.name for file in tmp_path.glob("*.safetensors")] == (["raw.safetensors"] if after else [])
    assert Run(words).end() == 0
    assert_same_fit(tmp_path, fitted)
