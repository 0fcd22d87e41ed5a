"""Images in files: those of the bench, whole, of one run alone, and what is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel import experiment
from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.denoiser import MixtureDenoiser
from diffaccel.evaluation import Partial
from diffaccel.prior import Plan
from diffaccel.report import image_files, read_points
from diffaccel.sampling import Sampler
from diffaccel.solver import Solver
from diffaccel.weights import save_weights

pytestmark = pytest.mark.usefixtures("undrawn")
Printed = pytest.CaptureFixture[str]
TINY = ["network.widths=[8]", "network.attention=[]", "network.embedding=16"]


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of a tiny class-conditional denoiser of colour images."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    words = [*TINY, "network.classes=3", "shape=[3,8,8]"]
    network = experiment.build_method(load("digits/edm", words), load=False).denoiser.network
    save_weights(path, network.state_dict(), {"images_seen": 0})
    return path


def sample(out: Path, name: str, *words: str) -> None:
    assert main(["sample", name, *words, f"out={out}"]) == 0


def arrays(folder: Path) -> list[np.ndarray[Any, Any]]:
    """A folder's images as they lie in memory for a bench, (C, H, W), in order."""
    if (folder / "images.npz").exists():
        return list(np.load(folder / "images.npz")["images"].transpose(0, 3, 1, 2))
    found = [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]
    return [image[None] if image.ndim == 2 else image.transpose(2, 0, 1) for image in found]


def sha256(folder: Path) -> str:
    each = [hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in arrays(folder)]
    return hashlib.sha256(b"".join(each)).hexdigest()


def described(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "sample.json").read_text()))


# The bench's own images


@pytest.mark.parametrize(
    "words",
    [
        ["digits/edm", "nfe=[2,5]", "n=30", "batch_size=7", "seed=3"],
        ["digits/edm", "nfe=3", "n=30", "batch_size=30", "truncate=true", "precision=bf16-mixed", "format=npz"],
        ["digits/dlg", "nfe=12", "n=45", "chains=10", "batch_size=4"],
        ["digits/tdpm", "nfe=2", "n=30"],
        ["toy/dlg", "nfe=22", "n=64", "chains=10", "batch_size=4"],
        ["toy/edm", "nfe=null", "solver=rk45", "n=20"],
        ["toy/edm", "nfe=4", "n=20", "precision=64-true", "accelerator=cpu"],
    ],
    ids=" ".join,
)
def test_the_files_hold_what_a_bench_measures(tmp_path: Path, words: list[str], capsys: Printed):
    sample(tmp_path / "sample", *words)
    folders = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert main(["bench", *[word for word in words if "format" not in word], "logger=none", f"out={tmp_path}"]) == 0
    points = read_points(tmp_path / "points.jsonl")
    assert len(folders) == len(points)
    for folder, point in zip(folders, points, strict=True):
        name = f"images_nfe{point['nfe_budget']:g}" if point["nfe_budget"] else "images_adaptive"
        assert folder == tmp_path / "sample" / name
        assert sha256(folder) == point["images_sha256"]
        said = described(folder)
        same = ["n", "seed", "nfe", "nfe_burn_in", "nfe_budget", "evaluations", "precision", "settings", "checkpoint"]
        same.append("images_sha256")
        assert {key: said[key] for key in same} == {key: point[key] for key in same}
    assert sorted(path.name for path in (tmp_path / "sample").iterdir()) == sorted(f.name for f in folders)


def test_two_processes_write_the_images_of_one(tmp_path: Path):
    words = ["digits/dlg", "nfe=12", "n=45", "chains=10", "batch_size=4", "accelerator=cpu"]
    sample(tmp_path / "one", *words)
    command = [sys.executable, "-m", "diffaccel", "sample", *words, "devices=2", f"out={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "two" / "images_nfe12"
    assert done.stdout.strip() == str(folder)
    assert sha256(folder) == sha256(tmp_path / "one" / "images_nfe12")
    one, two = described(tmp_path / "one" / "images_nfe12"), described(folder)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert two["evaluations"] == one["evaluations"] and two["key"] == one["key"]


def test_more_than_the_budget_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed):
    monkeypatch.setattr(
        Sampler, "plan", lambda self, nfe, n, given=False: Plan(self.prior, self.solver, steps=int(nfe) + 1)
    )
    assert main(["sample", "toy/edm", "nfe=4", "n=20", f"out={tmp_path}"]) == 2
    assert "nfe=4 was exceeded: 5 evaluations" in capsys.readouterr().err
    assert not (tmp_path / "images_nfe4").exists()


def test_nan_is_no_dark_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed):
    monkeypatch.setattr(Solver, "__call__", lambda self, denoiser, x_t, *_: x_t * torch.nan)
    for verb in ("sample", "bench"):
        assert main([verb, "digits/edm", "nfe=2", "n=20", "logger=none", f"out={tmp_path}"]) == 2
        assert "NaN" in capsys.readouterr().err


# Files


def test_colour_classes_and_both_names(tmp_path: Path, weights: Path):
    words = ["digits/edm", *TINY, "network.classes=3", "shape=[3,8,8]", f"checkpoint={weights}", "nfe=2", "n=7"]
    sample(tmp_path / "png", *words, "batch_size=3")
    sample(tmp_path / "npz", *words, "batch_size=3", "format=npz")
    file = np.load(tmp_path / "npz" / "images_nfe2" / "images.npz")
    assert file["images"].shape == (7, 8, 8, 3) and file["images"].dtype == np.uint8
    np.testing.assert_array_equal(file["images"], file["arr_0"])
    assert file["labels"].tolist() == [0, 1, 2, 1, 2, 0, 2]
    names = sorted(path.name for path in (tmp_path / "png" / "images_nfe2").iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(7)), "sample.json"]
    np.testing.assert_array_equal(
        np.stack(arrays(tmp_path / "png" / "images_nfe2")), file["images"].transpose(0, 3, 1, 2)
    )


def test_points_are_written_as_they_are(tmp_path: Path, capsys: Printed):
    sample(tmp_path, "toy/edm", "nfe=8", "n=500")
    assert "npz" in capsys.readouterr().err, "no PNG, as is said"
    points = np.load(tmp_path / "images_nfe8" / "images.npz")["images"]
    assert points.shape == (500, 1, 1, 2) and points.dtype == np.float32
    assert np.abs(points).max() > 1.5, "not cut to [-1, 1]"
    assert described(tmp_path / "images_nfe8")["format"] == "npz"


def test_two_channels_are_no_picture(tmp_path: Path, capsys: Printed):
    words = [*TINY, "shape=[2,8,8]", "nfe=2", "n=4", f"out={tmp_path}"]
    network = experiment.build_method(load("digits/edm", words), load=False).denoiser.network
    save_weights(tmp_path / "two.safetensors", network.state_dict(), {})
    words.append(f"checkpoint={tmp_path / 'two.safetensors'}")
    assert main(["sample", "digits/edm", *words]) == 2
    assert "format=npz" in capsys.readouterr().err
    assert main(["sample", "digits/edm", *words, "format=npz"]) == 0


def test_names_sort_as_the_images_do(tmp_path: Path):
    image_files.write_png(tmp_path, [torch.zeros(2, 1, 2, 2, dtype=torch.uint8)], n=2_000_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000000.png", "0000001.png"]


def test_one_image_is_enough_but_not_for_a_distance(tmp_path: Path, capsys: Printed):
    sample(tmp_path, "digits/edm", "nfe=2", "n=1")
    assert len(arrays(tmp_path / "images_nfe2")) == 1
    assert main(["bench", "digits/edm", "nfe=2", "n=1", f"out={tmp_path}", "logger=none"]) == 2
    assert "n=1" in (said := capsys.readouterr().err) and "2 images" in said


# What a folder holds


def test_no_folder_holds_images_of_two_runs(tmp_path: Path, capsys: Printed):
    words = ["digits/edm", "nfe=2", "batch_size=5"]
    sample(tmp_path, *words, "n=20")
    folder, before = tmp_path / "images_nfe2", sha256(tmp_path / "images_nfe2")
    for changed in (["n=10"], ["n=20", "seed=1"], ["n=20", "solver=heun"], ["n=20", "truncate=true"], ["format=npz"]):
        capsys.readouterr()
        assert main(["sample", *words, *changed, f"out={tmp_path}"]) == 2
        assert str(folder) in (said := capsys.readouterr().err) and "again=true" in said and "20 images" in said
    assert sha256(folder) == before and not (tmp_path / "partial").exists()
    sample(tmp_path, *words, "n=10", "again=true")
    assert len(arrays(folder)) == 10 and described(folder)["n"] == 10
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_folder_of_something_else_stays(tmp_path: Path, capsys: Printed):
    folder = tmp_path / "images_nfe2"
    folder.mkdir()
    (folder / "holiday.png").write_bytes(b"mine")
    for again in ("false", "true"):
        assert main(["sample", "digits/edm", "nfe=[5,2]", "n=10", f"again={again}", f"out={tmp_path}"]) == 2
        assert "sample.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["images_nfe2", "holiday.png"]


def test_the_same_images_are_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed):
    sample(tmp_path, "digits/edm", "nfe=2", "n=10")
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "batches", None)
        sample(tmp_path, "digits/edm", "nfe=2", "n=10")
    assert "made before" in (printed := capsys.readouterr()).err
    assert printed.out.splitlines() == [str(tmp_path / "images_nfe2")] * 2
    (tmp_path / "images_nfe2" / "000003.png").unlink()
    assert main(["sample", "digits/edm", "nfe=2", "n=10", f"out={tmp_path}"]) == 2
    assert "lacks 1 of its images" in capsys.readouterr().err
    sample(tmp_path, "digits/edm", "nfe=2", "n=10", "again=true")
    assert len(arrays(tmp_path / "images_nfe2")) == 10


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: Printed):
    out = tmp_path / "out"
    assert main(["sample", "digits/edm", "nfe=[2,5]", "n=10", "dry_run=true", f"out={out}"]) == 0
    assert "n=10" in capsys.readouterr().out and not out.exists()


# What breaks off


@pytest.mark.parametrize(
    "words", [["toy/edm", "nfe=4", "n=60"], ["toy/dlg", "nfe=22", "n=64", "chains=10"]], ids=" ".join
)
def test_killed_while_sampling_it_goes_on(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch):
    words = [*words, "batch_size=10"]
    sample(tmp_path / "whole", *words)
    forward, spent = MixtureDenoiser.forward, [0, 0]

    def killing(self: MixtureDenoiser, x_t: torch.Tensor, *rest: Any) -> Any:
        spent[0] += 1
        spent[1] += len(x_t)
        if spent[0] == limit:
            raise Killed
        return forward(self, x_t, *rest)

    monkeypatch.setattr(MixtureDenoiser, "forward", killing)
    limit = 19 if words[0] == "toy/edm" else 130
    with pytest.raises(Killed):
        sample(tmp_path / "parts", *words)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["partial"]
    sample(tmp_path / "parts", *words)
    (one,), (two,) = ((tmp_path / name).glob("images_*") for name in ("whole", "parts"))
    assert sha256(two) == sha256(one)
    assert described(two)["evaluations"] == described(one)["evaluations"]
    lost = spent[1] - described(one)["evaluations"]["denoiser"]
    assert 0 <= lost <= 10 * 30, "all was made again"
    assert list((tmp_path / "parts").iterdir()) == [two], "nothing else is left"


@pytest.mark.parametrize("at", [0, 3, 9])
def test_killed_while_writing_the_old_folder_stays(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch):
    words = ["digits/edm", "nfe=2", "batch_size=5"]
    sample(tmp_path, *words, "n=12")
    before = sha256(tmp_path / "images_nfe2")
    with monkeypatch.context() as patch:
        save, calls = Image.Image.save, [0]

        def killing(self: Image.Image, *rest: Any) -> None:
            calls[0] += 1
            if calls[0] > at:
                raise Killed
            save(self, *rest)

        patch.setattr(Image.Image, "save", killing)
        with pytest.raises(Killed):
            sample(tmp_path, *words, "n=10", "again=true")
    assert sha256(tmp_path / "images_nfe2") == before == described(tmp_path / "images_nfe2")["images_sha256"]
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draw", None)  # every batch was kept
        sample(tmp_path, *words, "n=10", "again=true")
    assert len(arrays(tmp_path / "images_nfe2")) == 10


def test_a_full_disk_is_one_line_and_loses_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert main(["sample", "digits/edm", "nfe=2", "n=10", f"out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "No space left" in said and "images_nfe2" in said and said.count("\n") == 1
    monkeypatch.setattr(Sampler, "draw", None)
    sample(tmp_path, "digits/edm", "nfe=2", "n=10")


def test_batches_that_another_machine_has_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed):
    monkeypatch.setattr(Partial, "save", lambda *_: None)
    assert main(["sample", "digits/edm", "nfe=2", "n=10", f"out={tmp_path}"]) == 2
    assert "all processes share" in capsys.readouterr().err
