"""The command line as a person meets it: every verb, and every mistake as one line that says what to do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel import __version__, experiment
from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.weights import save_weights

TINY = ["network.widths=[8]", "network.attention=[]", "network.embedding=16"]
QUICK = ["n=40", "logger=none"]

pytestmark = pytest.mark.usefixtures("undrawn")
Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of a tiny denoiser of digits."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    network = experiment.build_method(load("digits/edm", TINY), load=False).denoiser.network
    save_weights(path, network.state_dict(), {"images_seen": 0})
    return path


@pytest.fixture
def refused(capsys: Printed):  # noqa: ANN201
    """Run words that must fail: status 2, one line on stderr, nothing else."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("diffaccel: ") and printed.err.count("\n") == 1, printed.err
        assert "Traceback" not in printed.err and printed.out == ""
        return printed.err

    return run


# What works


def test_help_and_version(capsys: Printed):
    for words in ([], ["help"], ["-h"], ["--help"], ["help", "bench"], ["bench", "--help"], ["bench", "toy/edm", "-h"]):
        assert main(words) == 0
        printed = capsys.readouterr()
        assert "diffaccel bench EXPERIMENT" in printed.out and printed.err == ""
    for word in ("version", "--version"):
        assert main([word]) == 0
        assert capsys.readouterr().out == f"diffaccel {__version__}\n"


def test_bench_prints_the_point_and_where_it_is(tmp_path: Path, capsys: Printed):
    assert main(["bench", "method=edm", "data=toy", "nfe=[4,8]", f"out={tmp_path}", *QUICK]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1].endswith(str(tmp_path))
    rows = [line.split()[:2] for line in lines if line.split()[:1] in (["4"], ["8"])]
    assert rows == [["4", "4"], ["8", "8"]], "one row a budget: the budget and what was spent"
    assert any(line.startswith("floor:") for line in lines)
    assert load(str(tmp_path / "config.yaml")).nfe == [4.0, 8.0]


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(tmp_path: Path, capsys: Printed):
    out = tmp_path / "out"
    words = ["nfe=[20,40]", "n=2000", "dry_run=true", f"out={out}", "batch_size=4"]
    assert main(["bench", "digits/dlg", *words, *TINY, "checkpoint=missing.safetensors"]) == 0
    assert not out.exists()
    printed = capsys.readouterr().out
    method = experiment.build_method(load("digits/dlg", TINY), load=False)
    for budget in (20, 40):
        plan = method.sampler.plan(budget, 2000)
        (row,) = [line.split() for line in printed.splitlines() if line.split()[:1] == [str(budget)]]
        assert row[1:3] == [str(plan.chain_steps), str(plan.steps)]
        assert float(row[4]) == pytest.approx(method.sampler.planned_nfe(plan, 2000), rel=1e-3)
    assert f"{sum(p.numel() for p in method.parameters()):,} parameters" in printed


def test_sample_writes_png_or_npz(tmp_path: Path, weights: Path, capsys: Printed):
    words = [*TINY, f"checkpoint={weights}", "nfe=2", "n=7", "batch_size=3", f"out={tmp_path}"]
    assert main(["sample", "digits/edm", *words]) == 0
    folder = Path(capsys.readouterr().out.strip())
    pictures = [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]
    assert len(pictures) == 7
    assert main(["sample", "digits/edm", *words, "format=npz", "again=true"]) == 0
    images = np.load(folder / "images.npz")["images"]
    assert images.shape == (7, 8, 8, 1) and images.dtype == np.uint8
    for picture, image in zip(pictures, images, strict=True):
        np.testing.assert_array_equal(picture[..., None], image)  # grey stays grey


def test_reference_writes_what_bench_compares_with(tmp_path: Path, capsys: Printed):
    files = [f"reference={tmp_path / 'r.npz'}", f"floor={tmp_path / 'f.npz'}"]
    assert main(["reference", "toy/edm", "data.n=500", *files]) == 0
    assert "500 train images" in capsys.readouterr().err
    assert main(["bench", "toy/edm", *files, *QUICK, f"out={tmp_path}"]) == 0
    assert "40 held-out real images" in capsys.readouterr().out


# Mistakes


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["bnech", "toy/edm"], ["'bnech'", "did you mean 'bench'"]),
        (["bench", "toy/emd"], ["'toy/emd'", "did you mean 'toy/edm'"]),
        (["bench"], ["method=NAME data=NAME"]),
        (["bench", "toy/edm", "toy/dlg"], ["'toy/dlg'", "key=value"]),
        (["bench", "toy/edm", "slover=heun"], ["'slover'", "did you mean 'solver'"]),
        (["bench", "toy/edm", "solver=huen"], ["'huen'", "did you mean 'heun'"]),
        (["bench", "toy/edm", "solver.ordre=3"], ["dpmpp2m", "'ordre'"]),
        (["bench", "toy/edm", "solver={name: ddim, eta: 7}"], ["eta", "[0, 1]"]),
        (["bench", "toy/edm", "solver.grid=karas"], ["'karas'", "did you mean 'karras'"]),
        (["bench", "toy/edm", "prior=chain"], ["'chain'", "posterior"]),
        (["bench", "toy/edm", "data.m=3"], ["'toy'", "'m'"]),
        (["bench", "toy/edm", "n=lots"], ["'n'", "lots"]),
        (["bench", "toy/edm", "nfe=0.5"], ["nfe=0.5", "minimum of 1"]),
        (["bench", "toy/dlg", "nfe=10", "chains=10", "n=60"], ["nfe=10", "minimum of 12", "chains"]),
        (["bench", "toy/edm", "reference="], ["diffaccel reference"]),
        (["bench", "toy/edm", "reference=nowhere.npz"], ["nowhere.npz", "diffaccel reference"]),
        (["bench", "toy/edm", "extractor.dim=3"], ["dim 2", "dim 3"]),
        (["bench", "toy/edm", "out=/proc/nowhere"], ["out=/proc/nowhere", "another out="]),
        (["bench", "digits/edm", "checkpoint=nowhere.safetensors"], ["nowhere.safetensors", "checkpoint=FILE"]),
        (["bench", "digits/edm", "checkpoint=nowhere.ckpt"], ["nowhere.ckpt", "checkpoint=FILE"]),
        (["fit", "toy/edm"], ["exact", "nothing to train"]),
        (["fit", "toy/dlg"], ["no noise classifier"]),
        (["fit", "digits/edm", "data={name: npz, path: nowhere.npz}"], ["nowhere.npz"]),
        (["reference", "toy/edm", "reference=", "floor="], ["reference=FILE"]),
        (["sample", "toy/edm", "nfe=0.5"], ["nfe=0.5", "minimum of 1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0] in ("bench", "fit") else None,
)
def test_a_mistake_is_one_line(words: list[str], named: list[str], refused, tmp_path: Path):
    line = refused(*words, *([] if len(words) < 2 or "out=" in words[-1] else [f"out={tmp_path}", "logger=none"]))
    for what in named:
        assert what in line


def test_no_gpu_and_no_key_for_wandb(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "accelerator=cpu" in refused("bench", "toy/edm", *QUICK, "accelerator=gpu", f"out={tmp_path}")
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    line = refused("bench", "toy/edm", "n=40", "wandb_mode=online", f"out={tmp_path}")
    assert "wandb_mode=offline" in line


def test_broken_weights(refused, weights: Path, tmp_path: Path):
    bench = ["bench", "digits/edm", *QUICK, f"out={tmp_path}"]
    half = tmp_path / "half.safetensors"
    half.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    line = refused(*bench, *TINY, f"checkpoint={half}")
    assert str(half) in line and "truncated" in line
    line = refused(*bench, *TINY[1:], "network.widths=[16]", f"checkpoint={weights}")
    assert "network" in line and str(weights) in line, "weights of another network"
    nothing = tmp_path / "nothing.safetensors"
    nothing.write_bytes(b"")
    assert str(nothing) in refused(*bench, *TINY, f"checkpoint={nothing}")
    network = experiment.build_method(load("digits/edm", TINY), load=False).denoiser.network
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    next(iter(state.values())).view(-1)[0] = torch.nan
    save_weights(tmp_path / "nan.safetensors", state, {})
    line = refused(*bench, *TINY, f"checkpoint={tmp_path / 'nan.safetensors'}")
    assert "NaN" in line


def test_images_of_another_size(refused, weights: Path, tmp_path: Path):
    out = [f"out={tmp_path}", *QUICK]
    line = refused("fit", "digits/edm", "shape=[1,16,16]", *TINY, *out)
    assert "(1, 8, 8)" in line and "(1, 16, 16)" in line and "shape=" in line
    line = refused("bench", "digits/edm", "shape=[3,8,8]", *TINY, f"checkpoint={weights}", *out)
    assert str(weights) in line, "the weights are of grey images"
    line = refused("bench", "digits/edm", "shape=[1,9,9]", "network.widths=[8,8]", *out)
    assert "9x9" in line
    line = refused("bench", "digits/dlg", "shape=[1,8,16]", "checkpoint=null", *out)
    assert "square" in line


def test_a_start_out_of_the_trained_range(refused, weights: Path, tmp_path: Path):
    words = [*TINY, f"checkpoint={weights}", *QUICK, f"out={tmp_path}"]
    line = refused("bench", "digits/edm", *words, "prior.ratio_star=500")
    assert "500" in line and "80" in line and "ratio_star" in line


def test_a_reference_of_another_extractor(refused, weights: Path, tmp_path: Path):
    words = [*TINY, f"checkpoint={weights}", *QUICK, f"out={tmp_path}"]
    line = refused("bench", "digits/edm", *words, "extractor={name: identity, dim: 64}")
    assert "reference.npz" in line and "identity" in line and "diffaccel reference" in line


def test_where_a_fit_goes_on(refused, tmp_path: Path):
    fit = ["fit", "digits/edm", *TINY, "logger=none", f"out={tmp_path}"]
    line = refused(*fit, "resume=nowhere.ckpt")
    assert "nowhere.ckpt" in line and "resume=auto" in line
    (tmp_path / "last.ckpt").write_bytes(b"anything")
    line = refused(*fit)
    assert "last.ckpt" in line and "resume=auto" in line and "out=" in line


@pytest.mark.parametrize("left", ["ema.safetensors", "raw.safetensors", "best.ckpt"])
def test_a_fit_replaces_no_weights_of_another(refused, tmp_path: Path, left: str):
    """Also when the state that it would go on from was removed, or is given from elsewhere."""
    fit = ["fit", "digits/edm", *TINY, "logger=none", f"out={tmp_path}"]
    (tmp_path / left).write_bytes(b"hours of work")
    for resume in ([], ["resume=auto"], ["resume=elsewhere/last.ckpt"]):
        line = refused(*fit, *resume)
        assert left in line and "another out=" in line
    assert [path.name for path in tmp_path.iterdir()] == [left]
    assert (tmp_path / left).read_bytes() == b"hours of work"


def test_an_extractor_is_not_replaced(refused, tmp_path: Path):
    (tmp_path / "extractor.safetensors").write_bytes(b"a judge")
    line = refused("fit", "digits/extractor", f"out={tmp_path}")
    assert "extractor.safetensors" in line and "another out=" in line


def test_a_comparison_replaces_no_curve_of_a_run(refused, tmp_path: Path):
    (tmp_path / "curve.png").write_bytes(b"a bench's")
    line = refused("compare", tmp_path, f"out={tmp_path}")
    assert "curve.png" in line and "another out=" in line


def test_convert_replaces_nothing_unasked(refused, tmp_path: Path, weights: Path):
    source, target = weights, tmp_path / "mine.safetensors"
    target.write_bytes(b"hours of work")
    line = refused("convert", source, target)
    assert f"{target} exists" in line and "again=true" in line
    assert "exists" in refused("convert", source, source)
    assert "exists" not in refused("convert", source, target, "again=true"), "but this file doesn't say what it is"
    assert target.read_bytes() == b"hours of work"


def test_a_folder_that_cannot_be_made(refused, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    assert "another out=" in refused("bench", "toy/edm", *QUICK, f"out={tmp_path / 'file' / 'runs'}")
