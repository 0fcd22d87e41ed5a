"""The command on a point's card: it measures the same point."""

import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from diffaccel.__main__ import main
from diffaccel.config import EXPERIMENTS, FLAGS, KEYS, load
from diffaccel.parts.overrides import one_experiment
from diffaccel.report import normalised, read_points
from diffaccel.report.commands import command_of, differs
from diffaccel.report.measured import same_settings
from diffaccel.weights import file_sha256

pytestmark = pytest.mark.usefixtures("undrawn")

RUNS = (
    ["toy/edm", "solver=ddim", "solver.eta=0.5", "solver.grid=karras", "solver.grid.rho=3", "nfe=6", "seed=4"],
    ["toy/dlg", "chains=20", "solver=dpmpp2m", "prior.warmup=[[5,null]]", "nfe=20.5"],
    ["toy/edm", "solver=rk45", "nfe=null"],
    ["data=toy", "method=edm", "nfe=3"],
    ["digits/edm", "truncate=true", "tweedie_ratio=0.1", "nfe=3"],
    ["digits/edm", "jpeg=50", "floor=", "nfe=2"],
    ["digits_text/edm", "condition.samples=2", 'condition.templates=["a {label}"]', "nfe=2"],
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


# Points of earlier versions, which lack the words of their command


def former(judges: str, experiment: str = "cifar10_small/edm", **configuration: Any) -> dict[str, Any]:
    names = judges.split(",")
    several = {"judges": {name: {"extractor": {"name": name}} for name in names}} if len(names) > 1 else {}
    return normalised(
        {
            **{"experiment": experiment, "nfe": 5, "noise": "philox4x32-10", "solver": "heun", "prior": "gaussian"},
            **{"extractor": {"name": names[0]}, "configuration": configuration, **several},
        }
    )


COMMAND = "diffaccel bench cifar10_small/edm nfe=5 solver=heun prior=gaussian"


@pytest.mark.parametrize(
    ("judges", "words", "said"),
    [
        ("efficientnet_lite0,mobilenetv2,cifar10", "", None),
        ("cifar10", "", None),
        ("inception", " judges=inception", None),
        ("inception,mobilenetv2", " judges=inception,mobilenetv2", None),
        ("cifar10_check", "", "scored by cifar10_check in place of the experiment's judges"),
        ("inception,cifar10", "", "scored by inception in place of the experiment's judges"),
        ("mobilenetv2_jpeg75", "", "scored by mobilenetv2_jpeg75 in place of the experiment's judges"),
    ],
)
def test_judges_are_named_where_they_are_others_and_have_names(judges: str, words: str, said: str | None):
    """The name of a classifier is in the header of its weights, and no name of an extractor."""
    point = former(judges)
    assert command_of(point) == COMMAND + words
    assert said is None if (found := differs(point)) is None else said is not None and said in found


def test_keys_of_judges_extend_their_names(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("judges: [{name: mobilenetv2, resolution: 64}]\nbase: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extractor: inception\n")
    assert differs(former("mobilenetv2_bicubic64", str(file))) is None
    assert "in place of" in str(differs(former("efficientnet_lite0_bicubic64", str(file))))
    assert str(command_of(former("inception", str(file)))).endswith("judges=inception"), "the base is overruled"
    assert differs(former("inception", str(tmp_path / "b"))) is None
    (tmp_path / "c.yaml").write_text("base: c.yaml\n")
    assert "in place of" in str(differs(former("mine", str(tmp_path / "c")))), "it is its own base"


def test_truncation_and_tweedie_steps_are_in_the_command():
    found = command_of(former("cifar10", truncate=True, tweedie=[0.02, False]))
    assert found == f"{COMMAND} truncate=true tweedie_ratio=0.02 tweedie_counted=false"


def test_a_condition_is_in_the_command_where_the_experiment_has_another():
    own = {"name": "super_resolution", "factor": 4}
    restored, text = ("cifar10", "cifar10_sr4/ddm"), ("digits", "digits_text/edm")
    assert "condition" not in str(command_of(former(*restored, condition=own)))
    other = former(*restored, condition={**own, "impose": False})
    assert "condition=super_resolution condition.factor=4 condition.impose=false" in str(command_of(other))
    assert differs(other) is None
    paired = former(*restored, condition={"name": "paired", "path": "a" * 64, "samples": 2})
    assert str(command_of(paired)).endswith("condition=paired condition.samples=2"), "a hash is no file"
    assert "set its files" in str(differs(paired))
    words = {"name": "captions", "encoder": {"name": "words", "dim": 32, "length": 16}, "samples": 6}
    assert "condition" not in str(command_of(former(*text, condition=words)))


def test_the_weights_of_the_experiment_are_not_sought_on_another_machine():
    sha256 = file_sha256(EXPERIMENTS / "digits" / "weights" / "edm.safetensors")
    for path, known, word in (
        ("gone.pt", sha256, ""),
        ("gone.pt", "0" * 64, " checkpoint=gone.pt"),
        ("/", sha256, " checkpoint=/"),
    ):
        point = {**former("digits", "digits/edm"), "checkpoint": {"path": path, "sha256": known}}
        assert command_of(point) == f"diffaccel bench digits/edm nfe=5{word} solver=heun prior=gaussian"


def test_points_of_a_fit_say_that_their_weights_are_others():
    assert "set checkpoint=" in str(differs(former("cifar10", training={"images": 10})))


SHIPPED = {
    (file.parts[0], "check" in file.parts): EXPERIMENTS / file
    for file in sorted(file.relative_to(EXPERIMENTS) for file in EXPERIMENTS.glob("*/results/**/points.jsonl"))
}
"""A file for each data set, and for a judge that is not of its experiment."""


@pytest.mark.parametrize("data, check", SHIPPED)
def test_commands_of_shipped_points_are_read_and_have_their_settings(data: str, check: bool):
    file = SHIPPED[data, check]
    point = normalised(read_points(file)[-1])
    words = shlex.split(str(command_of(point)))[2:]
    config = load(*one_experiment(words, KEYS, FLAGS))
    assert same_settings(point, config.at(point["nfe_budget"] or math.inf))
    named = [word for word in words if word.startswith("judges=")]
    assert not named and ("in place of" in str(differs(point))) == check
