"""Validation of a fit: looks at its distances, and the average that it chooses."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from diffaccel.__main__ import main
from diffaccel.evaluation.validation import ValidationCallback
from diffaccel.training.ema import EMA
from diffaccel.weights import read_weights

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = ["network.widths=[8,16]", "network.embedding=16", "training.batch_size=16", "images=640", "training.warmup=16"]
TINY += ["reference=", "training.log_every=10", "n=20", "training.ema_half_life=16,64,160"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a validation by pixels."""
    out = tmp_path_factory.mktemp("reference")
    assert main(["reference", "digits/edm", "extractor=identity", "extractor.dim=64", f"out={out}"]) == 0
    return [
        "validation.judge.name=identity",
        "validation.judge.dim=64",
        f"validation.reference={out / 'reference.npz'}",
        "validation.nfe=2,4",
    ]


def rows(out: Path) -> list[dict[str, str]]:
    """Logged looks."""
    found: list[dict[str, str]] = []
    for file in sorted(out.glob("csv/*/metrics.csv")):
        with file.open() as lines:
            found += [row for row in csv.DictReader(lines) if row.get("validation/images")]
    return found


def test_a_fit_is_looked_at_and_one_average_is_chosen(judged: list[str], tmp_path: Path, capsys):
    words = [*TINY, *judged, "logger=csv", "validation.looks=[0.25,0.5]", f"out={tmp_path}"]
    assert main(["fit", "digits/edm", *words]) == 0
    looks = rows(tmp_path)
    assert [float(row["validation/images"]) for row in looks] == [160, 320]
    assert all(float(row[f"validation/nfe_00{nfe}/fd_identity"]) > 0 for row in looks for nfe in (2, 4))
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("after 160 of 640 images: fd_identity") == 1 and said.count("average with a half-life of") == 4
    tensors, header = read_weights(tmp_path / "ema.safetensors")
    chosen = header["chosen_by"]
    assert (chosen["metric"], chosen["seed"], chosen["n"]) == ("fd_identity", 7, 20)
    assert [*chosen["distances"]] == ["16", "64", "160"]
    best = min(chosen["distances"], key=lambda one: chosen["distances"][one]["4"])
    assert str(header["ema_half_life"]) == best
    same, other = read_weights(tmp_path / f"ema_{best}.safetensors")
    assert all(torch.equal(tensors[name], same[name]) for name in tensors) and "chosen_by" not in other
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["diffaccel"]
    assert str(state["ema_half_life"]) == best and len(state["ema_others"]) == 2
    assert (
        main(
            ["bench", "digits/edm", *TINY[:2], f"checkpoint={tmp_path / 'last.ckpt'}", "nfe=2", "n=10", "dry_run=true"]
        )
        == 0
    )


def test_the_smallest_distance_at_the_largest_budget_decides(judged: list[str], tmp_path: Path, monkeypatch):
    """Not that at the smaller one; looks don't change what is trained."""
    distances = {
        16: {2.0: (1.0, 0.1), 4.0: (3.0, 0.1)},
        64: {2.0: (3.0, 0.1), 4.0: (1.0, 0.1)},
        160: {2.0: (2.0, 0.1), 4.0: (2.0, 0.1)},
    }
    fit = [
        "fit",
        "digits/edm",
        *TINY,
        "logger=none",
        "training.decay=0",
    ]  # at a rate that does not depend on the length
    assert main([*fit, f"out={tmp_path / 'plain'}"]) == 0
    assert main([*fit, *judged, "validation.looks=[0.3]", "images=320", f"out={tmp_path / 'looks'}"]) == 0
    monkeypatch.setattr(
        ValidationCallback, "_measure", lambda self, trainer, method, n: distances[method.ema.half_life]
    )
    assert main([*fit, *judged, "resume=auto", f"out={tmp_path / 'looks'}"]) == 0
    tensors, header = read_weights(tmp_path / "looks" / "ema.safetensors")
    assert header["ema_half_life"] == 64 and header["chosen_by"]["distances"]["16"] == {"2": 1.0, "4": 3.0}
    assert read_weights(tmp_path / "plain" / "ema.safetensors")[1]["ema_half_life"] == 16, "the first one"
    for name in ("raw", "ema_16", "ema_64", "ema_160"):
        one, two = (read_weights(tmp_path / run / f"{name}.safetensors")[0] for run in ("plain", "looks"))
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_other_half_lives_are_not_resumed(tmp_path: Path, capsys):
    fit = ["fit", "digits/edm", *TINY, "logger=none", f"out={tmp_path}", "images=32"]
    assert main(fit) == 0
    for lives in ("16,64", "16", "16,64,200"):
        assert main([*fit, "images=64", "resume=auto", f"training.ema_half_life={lives}"]) == 2
        assert "averages with half-lives [16, 64, 160], but this run has" in " ".join(capsys.readouterr().err.split())
    assert main([*fit, "images=64", "resume=auto", "training.ema_half_life=160,16,64"]) == 0


def test_the_first_half_life_of_the_resumed_run_is_used(judged: list[str], tmp_path: Path):
    """Without validation; an average that was chosen stays with its reason until the fit is trained further."""
    fit = ["fit", "digits/edm", *TINY, "logger=none", "resume=auto", f"out={tmp_path}"]

    def header(*words: str) -> tuple[float, bool]:
        assert main([*fit, *words]) == 0
        tensors, found = read_weights(tmp_path / "ema.safetensors")
        same = read_weights(tmp_path / f"ema_{found['ema_half_life']}.safetensors")[0]
        assert all(torch.equal(tensors[name], same[name]) for name in tensors)
        return found["ema_half_life"], "chosen_by" in found

    assert header("images=32") == (16, False)
    assert header("images=32", "training.ema_half_life=160,16,64") == (160, False)
    assert header("images=64", "training.ema_half_life=64,160,16") == (64, False)
    chosen, reason = header("images=96", *judged)
    assert reason and header("images=96") == (chosen, True)
    other = "64,160,16" if chosen == 16 else "16,64,160"
    assert header("images=128", f"training.ema_half_life={other}") == (int(other.split(",")[0]), False)


def looks_of(said: str) -> list[str]:
    return [look.partition("(")[0] for look in " ".join(said.split()).split("after 320 of ")[1:]]


def interrupted_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Interrupt the first call of a method in its middle, for averages; or at its start."""
    function = getattr(owner, name)

    def interrupt(self: Any, *arguments: Any) -> None:
        monkeypatch.setattr(owner, name, function)
        if isinstance(self, EMA):
            parameters = list(self.module.parameters())
            torch._foreach_copy_([p.data for p in parameters[:3]], [*self.average.values()][:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupt)


@pytest.mark.parametrize(("owner", "name"), [(EMA, "_swap"), (ValidationCallback, "_measure")])
def test_a_look_that_was_interrupted_is_made_again(
    owner: type, name: str, judged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """An interrupt between weights and averages saves no state; any other keeps what was trained before the look."""
    words = ["fit", "digits/edm", *TINY, *judged, "logger=none", "validation.looks=[0.5]", "resume=auto"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*words, f"out={whole}"]) == 0
    look = looks_of(capsys.readouterr().err)
    interrupted_once(monkeypatch, owner, name)
    assert main([*words, f"out={out}"]) == 130
    assert (out / "last.ckpt").exists() == (owner is not EMA)
    capsys.readouterr()
    assert main([*words, f"out={out}"]) == 0
    assert looks_of(capsys.readouterr().err) == look and len(look) == 1
    for file in ("raw", "ema_16", "ema_64", "ema_160"):
        one, two = (read_weights(folder / f"{file}.safetensors")[0] for folder in (whole, out))
        assert all(torch.equal(one[key], two[key]) for key in one), file


def test_a_budget_that_can_not_be_spent_ends_the_fit_before_it_begins(judged: list[str], tmp_path: Path, capsys):
    words = [*TINY, *judged, "logger=none", "validation.nfe=0.5", f"out={tmp_path}"]
    assert main(["fit", "digits/edm", *words]) == 2
    assert not list(tmp_path.glob("*.ckpt")) and capsys.readouterr().err.count("diffaccel: ") == 1
