"""A judge's weights train nothing that it scores: what losses used is recorded, inherited and refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from diffaccel.__main__ import main
from diffaccel.errors import UsageError
from diffaccel.features.extractors import EXTRACTORS, Identity, Small, SmallClassifier, save_classifier
from diffaccel.features.independence import check_independent, feature_networks
from diffaccel.features.jpeg import AsJPEG
from diffaccel.methods.base import Diffusion
from diffaccel.weights import open_weights, save_weights

DIGITS = Path(__file__).parents[1] / "experiments" / "digits" / "weights"
FIT = ("training.images=64", "training.batch_size=32", "logger=none", "n=20", "nfe=5", "precision=32-true")


@pytest.fixture
def judge(tmp_path: Path) -> Small:
    torch.manual_seed(0)
    save_classifier(SmallClassifier(3, 10, dim=4, widths=(4,)), tmp_path / "judge.safetensors", "judge", "none", 0.1, 0)
    return Small(tmp_path / "judge.safetensors")


def test_feature_networks_are_found_among_submodules(judge: Small):
    loss = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(2, 2), judge)})
    assert feature_networks(loss.modules()) == [judge.sha256]
    assert feature_networks(nn.Linear(2, 2).modules()) == []


def test_a_judge_is_refused_by_its_weights_whatever_is_done_to_the_images(judge: Small):
    used = feature_networks([judge])
    for one in (judge, AsJPEG(judge, 75)):
        with pytest.raises(UsageError, match=f"{one.name}' can't score cifar10/tdpm, which was trained with its w"):
            check_independent([Identity(2), one], used, "cifar10/tdpm")
    check_independent([Identity(2), judge], ["0" * 64], "cifar10/tdpm")


def fit(tmp_path: Path, name: str, *words: str) -> int:
    return main(["fit", "digits/edm", *FIT, f"out={tmp_path / name}", *words])


def test_a_fit_records_what_its_losses_used_and_its_judge_is_refused(tmp_path, monkeypatch, capsys):
    own = EXTRACTORS.build({"name": "small", "path": str(DIGITS / "extractor.safetensors")}).sha256
    monkeypatch.setattr(Diffusion, "feature_networks", lambda self: ["f" * 64])
    assert fit(tmp_path, "first") == 0
    monkeypatch.undo()
    assert fit(tmp_path, "second", f"init={tmp_path / 'first' / 'ema.safetensors'}") == 0
    for run in ("first", "second"):  # the second one used nothing itself
        for file in ("ema.safetensors", "raw.safetensors", "last.ckpt"):
            assert open_weights(tmp_path / run / file).header["feature_networks"] == ["f" * 64], (run, file)
    assert fit(tmp_path, "third") == 0
    assert "feature_networks" not in open_weights(tmp_path / "third" / "ema.safetensors").header
    capsys.readouterr()
    monkeypatch.setattr(Diffusion, "feature_networks", lambda self: [own])
    assert fit(tmp_path, "fourth") == 2
    assert "extractor 'digits' can't score this run, which was trained with its weights" in capsys.readouterr().err
    assert not (tmp_path / "fourth" / "config.yaml").exists()


def test_a_bench_refuses_a_judge_that_trained_the_weights(tmp_path, capsys):
    own = EXTRACTORS.build({"name": "small", "path": str(DIGITS / "extractor.safetensors")}).sha256
    weights = open_weights(DIGITS / "edm.safetensors")
    save_weights(tmp_path / "edm.safetensors", weights.read(), {**weights.header, "feature_networks": [own]})
    words = ["bench", "digits/edm", "nfe=5", "n=20", "logger=none", f"out={tmp_path / 'runs'}"]
    assert main([*words, f"checkpoint={tmp_path / 'edm.safetensors'}"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("diffaccel: extractor 'digits' can't score digits/edm, which was trained with its weights")
    assert said.endswith("score with another extractor")
    save_weights(tmp_path / "edm.safetensors", weights.read(), {**weights.header, "feature_networks": "f"})
    assert main([*words, f"checkpoint={tmp_path / 'edm.safetensors'}"]) == 2
    assert "feature_networks is not a list of hashes" in capsys.readouterr().err
