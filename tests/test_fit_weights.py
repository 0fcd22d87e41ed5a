"""Weights that a fit starts from, keeps, and names in its points."""

from pathlib import Path

import pytest

from diffaccel.__main__ import main
from diffaccel.config import find, load
from diffaccel.features.extractors import EXTRACTORS
from diffaccel.report import read_points
from diffaccel.weights import read_weights, save_weights

pytestmark = pytest.mark.usefixtures("undrawn")

WEIGHTS = Path(find("digits/edm")).parent / "weights"
TINY = ["images=64", "training.batch_size=32", "training.warmup=32", "n=20", "nfe=6", "batch_size=20", "threads=1"]
SMALL = ["network.widths=[8]", "network.attention=[]", "network.embedding=16"]
Printed = pytest.CaptureFixture[str]


def fit(out: Path, *words: str) -> int:
    return main(["fit", *words, *TINY, "logger=none", f"out={out}"])


def test_points_of_weights_in_training_name_no_file(tmp_path: Path):
    """The experiment names weights that exist, of an earlier fit."""
    assert fit(tmp_path, "digits/edm", *SMALL) == 0
    (point,) = read_points(tmp_path / "points.jsonl")
    assert point["checkpoint"] is None and point["configuration"]["checkpoint"] is None


def test_a_checkpoint_that_a_fit_would_not_use_is_refused(tmp_path: Path, capsys: Printed):
    assert fit(tmp_path, "digits/edm", f"checkpoint={WEIGHTS / 'edm.safetensors'}") == 2
    assert "checkpoint: this fit trains the denoiser from new weights" in capsys.readouterr().err
    assert not tmp_path.exists() or not [*tmp_path.iterdir()]


def test_weights_that_a_fit_replaces_do_not_exclude_a_judge(tmp_path: Path):
    """The header of the file that it names says that the judge trained it."""
    tensors, said = read_weights(WEIGHTS / "edm.safetensors")
    judge = EXTRACTORS.build(load("digits/edm").extractor)
    save_weights(tmp_path / "edm.safetensors", tensors, {**said, "feature_networks": [judge.sha256]})
    file = tmp_path / "own.yaml"
    file.write_text(f"base: {find('digits/edm').resolve()}\ncheckpoint: edm.safetensors\n")
    assert main(["bench", str(file), "n=20", "nfe=6", "logger=none", "threads=1", f"out={tmp_path / 'bench'}"]) == 2
    assert fit(tmp_path / "fit", str(file), *SMALL) == 0


def test_what_a_fit_does_not_train_is_read(tmp_path: Path, capsys: Printed):
    """A chain's classifier, in the fit of a denoiser: measured with its weights, and not with random ones."""
    words = ["digits/dlg", "method.name=diffusion", "method.label=mine", *SMALL]
    assert fit(tmp_path / "own", *words) == 0
    (point,) = read_points(tmp_path / "own" / "points.jsonl")
    (shipped,) = bench(tmp_path / "shipped", "digits/dlg")
    assert point["weights"] == shipped["weights"] and list(point["weights"]) == ["classifier"]
    assert fit(tmp_path / "none", *words, "posterior.checkpoint=null") == 2
    assert "digits/dlg: set posterior.checkpoint=FILE" in capsys.readouterr().err
    assert fit(tmp_path / "density", "digits/small_t", "method={name: diffusion}", "prior.checkpoint=null") == 2
    assert "digits/small_t: set prior.checkpoint=FILE" in capsys.readouterr().err


def bench(out: Path, name: str) -> list[dict]:
    words = ["n=20", "nfe=6", "logger=none", "threads=1", "batch_size=20"]
    assert main(["bench", name, *words, f"out={out}"]) == 0
    return read_points(out / "points.jsonl")
