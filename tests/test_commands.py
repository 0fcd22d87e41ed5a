"""The command on a point's card: it measures the same point."""

import shlex
from pathlib import Path

import pytest

from diffaccel.__main__ import main
from diffaccel.report import normalised, read_points
from diffaccel.report.commands import command_of, differs

pytestmark = pytest.mark.usefixtures("undrawn")

RUNS = (
    ["toy/edm", "solver=ddim", "solver.eta=0.5", "solver.grid=karras", "solver.grid.rho=3", "nfe=6", "seed=4"],
    ["toy/dlg", "chains=20", "solver=dpmpp2m", "prior.warmup=[[5,null]]", "nfe=20.5"],
    ["toy/edm", "solver=rk45", "nfe=null"],
)


@pytest.mark.parametrize("words", RUNS, ids=lambda words: " ".join(words[:2]))
def test_the_command_repeats_the_point(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It has the same key, so that the bench finds it measured before."""
    common = ["n=40", "logger=none", "metrics=[frechet]", f"out={tmp_path}"]
    assert main(["bench", *words, *common]) == 0
    (point,) = read_points(tmp_path / "points.jsonl")
    command = command_of(normalised(point))
    assert command is not None and differs(normalised(point)) is None
    program, *again = shlex.split(command)
    capsys.readouterr()
    assert program == "diffaccel" and main([*again, *common[1:]]) == 0
    assert "measured before" in capsys.readouterr().err
    assert len(read_points(tmp_path / "points.jsonl")) == 1


def test_what_a_bench_did_not_make_has_no_command():
    assert command_of(normalised({"experiment": "digits/edm", "source": "images.npz"})) is None
    assert command_of(normalised({"method": "edm"})) is None


def test_text_of_points_is_one_word_of_the_shell():
    """A command is pasted: nothing in a point may end it and begin another."""
    point = normalised(
        {"experiment": "a; rm -rf ~", "solver": "$(reboot)", "nfe": 5, "settings": {"prior": {"`x`": "|y"}}}
    )
    words = shlex.split(str(command_of(point)))
    assert words[2] == "a; rm -rf ~" and "solver=$(reboot)" in words and "prior.`x`=|y" in words
    assert "'a; rm -rf ~'" in str(command_of(point))


def test_points_of_another_noise_say_so():
    assert "other images" in str(differs(normalised({"method": "edm"})))
