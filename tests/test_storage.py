"""Two runs in one folder, disks that are full, names that can't be written: nothing is lost, and one line says why."""

import errno
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffaccel import storage
from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.errors import UsageError
from diffaccel.evaluation import Evaluator
from diffaccel.evaluation.partial import write_whole
from diffaccel.report import append_point, read_points
from diffaccel.run.launch import is_first
from diffaccel.storage import LOCK, check_room, check_target, occupied, whole
from diffaccel.text.terminal import side_output
from diffaccel.weights import save_weights

Printed = pytest.CaptureFixture[str]
fork = multiprocessing.get_context("fork")
TINY = ["network.widths=[8]", "network.attention=[]", "network.embedding=16", "training.batch_size=32"]
BENCH = ["bench", "toy/edm", "n=40", "nfe=3", "logger=none"]


@pytest.fixture
def unpictured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``undrawn``, for one test."""
    monkeypatch.setattr(Evaluator, "_draw", lambda self: None)
    monkeypatch.setattr(Evaluator, "_draw_curve", lambda self: None)


# Appends


def append(path: Path, name: str, number: int) -> None:
    for i in range(number):
        append_point(path, {"by": name, "i": i, "filling": "x" * 3000})


def test_two_processes_append_without_loss(tmp_path: Path):
    path = tmp_path / "points.jsonl"
    writers = [fork.Process(target=append, args=(path, name, 100)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    points = read_points(path)
    assert sorted((point["by"], point["i"]) for point in points) == [(name, i) for name in "ab" for i in range(100)]


def test_an_append_that_breaks_off_leaves_the_points_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "points.jsonl"
    append(path, "a", 2)
    before = path.read_bytes()

    def full(file: Any, content: bytes) -> None:
        file.write(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("diffaccel.report.files.write_all", full)
    with pytest.raises(UsageError, match=r"points.jsonl can't be written \(No space left on device\): make room"):
        append(path, "a", 1)
    assert path.read_bytes() == before


# One run at a time


def hold(folder: Path, ready: Any) -> None:
    with occupied(folder):
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """A folder that another process holds, and that process."""
    ready = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / "out", ready))
    process.start()
    assert ready.wait(30)
    yield tmp_path / "out", process
    process.kill()
    process.join()


@pytest.mark.parametrize("words", [BENCH, ["fit", "digits/edm", "logger=none"], ["search", "digits/edm"]], ids=str)
def test_a_folder_in_use_names_its_holder(words: list[str], holder: tuple[Path, Any], capsys: Printed):
    folder, process = holder
    assert main([*words, f"out={folder}"]) == 2
    said = capsys.readouterr().err
    assert f"out={folder} is in use by" in said and f"process {process.pid} on {os.uname().nodename}" in said
    assert Path(sys.argv[0]).name in said and said.count("\n") == 1
    assert os.listdir(folder) == [LOCK], "nothing of the holder's was touched"


def test_a_run_that_was_killed_can_be_resumed_at_once(holder: tuple[Path, Any]):
    folder, process = holder
    torn = folder / f".1-a{storage.PART}.png"
    torn.write_bytes(b"half")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (folder / LOCK).exists()
    assert main([*BENCH, f"out={folder}"]) == 0
    assert not (folder / LOCK).exists() and not torn.exists()


def test_a_child_that_outlives_its_parent_does_not_hold_the_folder(tmp_path: Path):
    """A worker that reads data, say."""
    with occupied(tmp_path):
        child = fork.Process(target=time.sleep, args=(60,))
        child.start()
        with pytest.raises(UsageError, match="in use"), occupied(tmp_path):
            pass
    with occupied(tmp_path):
        assert child.is_alive()
    child.kill()
    child.join()


def test_the_first_process_holds_the_folder_for_all(monkeypatch: pytest.MonkeyPatch):
    from lightning.pytorch.utilities import rank_zero_only

    alone, two = load("toy/edm", []), load("toy/edm", ["devices=2"])
    assert is_first(alone) and is_first(two)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert is_first(alone) and not is_first(two)
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    monkeypatch.setenv("NODE_RANK", "1")
    assert not is_first(load("toy/edm", ["num_nodes=2"]))


class _Reached(Exception):
    pass


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "toy/edm", "reference={files}/reference.npz", "floor={files}/floor.npz"],
        ["fit", "digits/edm", "reference=null"],
        ["tradeoff", "toy/small_t", "tradeoff.fd=false"],
        ["reference", "toy/edm"],
    ],
    ids=lambda words: words[0],
)
def test_a_later_process_leaves_the_folder_to_the_first(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ahead of the first, or on a disk of its own, it finds no folder, makes none, and goes on."""
    from lightning.pytorch.utilities import rank_zero_only

    def reached(*_: object, **__: object) -> None:
        raise _Reached

    def mkdir(path: Path, *_: object, **__: object) -> None:
        pytest.fail(f"{path} is made")

    if words[0] == "bench":
        files = [f"{key}={tmp_path / key}.npz" for key in ("reference", "floor")]
        assert main(["reference", "toy/edm", "data.n=50", "accelerator=cpu", *files]) == 0
    for name in ("trainer.build_trainer", "launch.everywhere"):
        monkeypatch.setattr(f"diffaccel.run.{name}", reached)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    out = tmp_path / "out"
    with pytest.raises(_Reached):
        main([*(word.format(files=tmp_path) for word in words), "devices=2", "accelerator=cpu", f"out={out}"])
    assert not out.exists()


def test_a_mistake_leaves_no_folder(tmp_path: Path):
    out = tmp_path / "deep" / "er"
    assert main([*BENCH, "solver=huen", f"out={out}"]) == 2
    assert not out.parent.exists()


def test_without_locks_a_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed):
    monkeypatch.setattr(storage, "fcntl", None)
    with occupied(tmp_path), occupied(tmp_path):
        assert "no locks" in capsys.readouterr().err
    append(tmp_path / "points.jsonl", "a", 2)
    assert len(read_points(tmp_path / "points.jsonl")) == 2


@pytest.mark.usefixtures("unpictured")
def test_an_earlier_configuration_is_kept(tmp_path: Path):
    for words in (["nfe=3"], ["nfe=3", "again=true"], ["nfe=4", "seed=1"], ["nfe=3"], ["nfe=4", "seed=1"]):
        assert main([*BENCH, *words, f"out={tmp_path}"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == ["config.1.yaml", "config.2.yaml", "config.yaml"]
    kept = [load(str(tmp_path / f"config.{number}.yaml")) for number in (1, 2)]
    assert [(config.nfe, config.seed) for config in kept] == [([3.0], 0), ([4.0], 1)]


# Whole files


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "new" / "file.png"
    with whole(path) as part:
        assert part.suffix == ".png" and part.parent == path.parent
        part.write_text("first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), whole(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "first" and os.listdir(path.parent) == ["file.png"]


WRITERS = {
    "weights": lambda path: save_weights(path, {"w": torch.ones(100_000)}, {}),
    "batch": lambda path: write_whole(path, {"x": torch.ones(100_000)}),
    "points": lambda path: append_point(path, {"x": "1" * 200_000}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_limit_on_files_is_one_line(write: Any, tmp_path: Path):
    """EFBIG, and with that the path of a write that stops in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UsageError, match=r"out can.t be written \(File too large\): make room"):
            write(tmp_path / "out")
        with pytest.raises(UsageError, match=r"limited to 0.05 MB here \(ulimit -f\)"):
            check_room(tmp_path, 1, 60_000, "checkpoints")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path for path in tmp_path.iterdir() if path.stat().st_size] == []
    with pytest.raises(UsageError, match="MB free, and the checkpoints take 1e"):
        check_room(tmp_path, 10**18, 1, "checkpoints")


def test_targets_are_tried_and_left_as_they_were(tmp_path: Path):
    (tmp_path / "file").write_text("content")
    check_target(tmp_path / "file")
    check_target(tmp_path / "new" / "file")
    assert (tmp_path / "file").read_text() == "content" and not (tmp_path / "new").exists()
    for path, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "below", "Not a directory|File exists"),
        (Path("/proc/nowhere/file"), "No such file"),
        (Path("/dev/full"), "is a device"),
        (tmp_path / ("x" * 300), "name too long"),
    ):
        with pytest.raises(UsageError, match=reason):
            check_target(path)


# The command line


@pytest.fixture
def awkward(tmp_path: Path) -> dict[str, Path]:
    """Paths that nothing can be read from."""
    end = ".safetensors"
    (tmp_path / f"loop{end}").symlink_to(tmp_path / f"loop{end}")
    (tmp_path / f"folder{end}").mkdir()
    (tmp_path / "file").write_text("x")
    return {
        "loop": tmp_path / f"loop{end}",
        "folder": tmp_path / f"folder{end}",
        "below": tmp_path / "file" / f"below{end}",
        "long": tmp_path / ("x" * 300 + end),
        "root": Path(f"/proc/nowhere{end}"),
    }


@pytest.mark.parametrize("kind", ["loop", "folder", "below", "long", "root"])
@pytest.mark.parametrize(
    "words",
    [
        ["bench", "toy/edm", "n=40", "reference=PATH"],
        ["bench", "toy/edm", "n=40", "floor=PATH"],
        ["bench", "digits/edm", "n=40", "checkpoint=PATH"],
        ["bench", "toy/edm", "n=40", "out=PATH"],
        ["fit", "digits/edm", "resume=PATH"],
        ["fit", "digits/edm", "init=PATH"],
        ["fit", "digits/edm", "data={name: npz, path: PATH}"],
        ["bench", "PATH", "n=40"],
        ["reference", "toy/edm", "data.n=50", "reference=PATH", "floor="],
        ["compare", "PATH", "out=runs/never"],
        ["convert", "PATH", "new.safetensors"],
        ["convert", "new.pkl", "PATH"],
    ],
    ids=lambda words: " ".join(words[::2]),
)
def test_awkward_paths_are_one_line(
    kind: str, words: list[str], awkward: dict[str, Path], tmp_path: Path, capsys: Printed, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    if kind == "folder" and "out=PATH" in words:
        pytest.skip("a folder is what is wanted")
    path = str(awkward[kind])
    quiet = ["logger=none"] if words[0] in ("bench", "fit") else []
    assert main([*(word.replace("PATH", path) for word in words), *quiet]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said and Path(path).name[:20] in said


# Results first


def broken(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied", "/home/nobody/.cache")


def test_what_a_run_can_do_without_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed):
    for name in ("sample_grid", "write_curve_csv", "plot_curve"):
        monkeypatch.setattr(f"diffaccel.evaluation.pictures.{name}", broken)
    monkeypatch.setattr("numpy.save", broken)
    monkeypatch.setattr("diffaccel.evaluation.evaluator.log_curve", broken)
    assert main(["bench", "digits/edm", "n=40", "nfe=3", "logger=csv", f"out={tmp_path}"]) == 0
    assert len(read_points(tmp_path / "points.jsonl")) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert len(lines) == 5 and all("Permission denied" in line for line in lines)
    for what in (".npy", "samples_nfe3.png", "curve.csv", "curve.png", "CSVLogger"):
        assert any(what in line for line in lines), what
    monkeypatch.undo()
    assert main(["bench", "digits/edm", "n=40", "nfe=3", "logger=none", f"out={tmp_path}"]) == 0
    assert list(tmp_path.glob("features/*.npy")) and (tmp_path / "samples_nfe3.png").is_file()
    assert len(read_points(tmp_path / "points.jsonl")) == 1 and not list(tmp_path.glob("partial/*"))


def test_features_and_pictures_that_a_kill_prevented_take_no_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unpictured: None
):
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Evaluator, "_leave", kill)
        main([*BENCH, f"out={tmp_path}"])
    assert len(read_points(tmp_path / "points.jsonl")) == 1, "the point comes first"
    monkeypatch.setattr("diffaccel.sampling.Sampler.draw", lambda *_: pytest.fail("it sampled"))
    assert main([*BENCH, f"out={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("features/*.npy"))) == len(read_points(tmp_path / "points.jsonl")) == 1


def test_interrupts_are_none_of_a_side_outputs_business(capsys: Printed):
    with pytest.raises(KeyboardInterrupt), side_output("it"):
        raise KeyboardInterrupt
    with side_output("the log"):
        raise ValueError("first\nsecond")
    assert capsys.readouterr().err == "diffaccel: the log failed (first); the results are not affected\n"


@pytest.mark.parametrize("logger", ["csv", "tensorboard", "wandb"])
def test_a_fit_without_its_logger_leaves_its_weights(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed, unpictured: None
):
    fit = ["fit", "digits/edm", *TINY, "images=64", "training.log_every=1", "reference=", f"logger={logger}"]
    (tmp_path / logger).write_text("in the way")  # of the logger's folder
    monkeypatch.setattr("diffaccel.run.checkpoint.log_weights", broken)
    assert main([*fit, f"out={tmp_path}"]) == 0
    assert (tmp_path / "ema.safetensors").is_file() and (tmp_path / "raw.safetensors").is_file()
    said = capsys.readouterr().err
    assert "failed" in said and "Traceback" not in said


def test_a_logger_that_fails_on_the_way_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed, unpictured: None
):
    monkeypatch.setattr("lightning.pytorch.loggers.CSVLogger.log_metrics", broken)
    fit = ["fit", "digits/edm", *TINY, "images=320", "training.log_every=1", "reference=", "logger=csv"]
    assert main([*fit, f"out={tmp_path}"]) == 0
    assert (tmp_path / "ema.safetensors").is_file()
    assert capsys.readouterr().err.count("CSVLogger failed (") == 1


def test_a_home_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed, unpictured: None
):
    """W&B stages artifacts there."""
    monkeypatch.setenv("HOME", "/dev/null")
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    words = ["fit", "digits/edm", *TINY, "images=64", "n=40", "nfe=2", f"out={tmp_path}"]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "WandbLogger, of ema.safetensors, failed" in said and "Traceback" not in said
    assert {"ema.safetensors", "raw.safetensors", "last.ckpt", "points.jsonl"} <= set(os.listdir(tmp_path))
