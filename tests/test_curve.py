"""``diffaccel curve``: what is missing is fitted in order, what is there is kept, and the page compares the methods."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from own_images import make, save_images
from PIL import Image

import diffaccel as da
from diffaccel import experiment
from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.errors import UsageError
from diffaccel.experiment.chain import Chain
from diffaccel.experiment.order import experiments_of
from diffaccel.report import read_points
from diffaccel.verbs import curve as verb
from diffaccel.verbs import curve_cost, fit_cost
from diffaccel.weights import open_weights

pytestmark = pytest.mark.usefixtures("undrawn")
Printed = pytest.CaptureFixture[str]
WORDS = ["images=256", "training.batch_size=64", "n=60", "logger=none", "threads=1"]
NFE = "nfe=8,12"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("own") / "discs")


def fresh(folder: Path, images: Path) -> Path:
    """The folder of `new`, with a chain that suits a few images."""
    assert make(folder, images) == 0
    dlg = (folder / "dlg.yaml").read_text()
    for old, new in (("images_per_chain: 20", "chains: 4"), ("count: 600", "count: 20\n  width: 4")):
        assert old in dlg
        dlg = dlg.replace(old, new)
    (folder / "dlg.yaml").write_text(dlg)
    return folder


@pytest.fixture(scope="module")
def template(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh(tmp_path_factory.mktemp("template") / "mine", images)


@pytest.fixture(scope="module")
def done(template: Path, tmp_path_factory: pytest.TempPathFactory, undrawn: None) -> Path:
    """A folder after a first curve."""
    folder = Path(shutil.copytree(template, tmp_path_factory.mktemp("done") / "mine"))
    assert main(["curve", str(folder), "methods=dlg,edm,small_t", NFE, *WORDS]) == 0
    return folder


def steps(folder: str | Path, *methods: str, words: list[str] | None = None) -> list[tuple[str, str]]:
    files = experiments_of(str(folder))
    chain = Chain(files, words or ["n=2000"], verb._root(verb.Asked(str(folder))))
    for method in methods:
        chain.bench(method)
    return [(step.verb, step.name) for step in chain.steps]


# The order


def test_fits_come_before_what_stands_on_them_and_once(template: Path):
    assert steps(template, "small_t", "dlg", "edm", "ddpm", "ddm", words=["n=60"]) == [
        ("fit", "edm"), ("fit", "small_t"), ("bench", "small_t"), ("fit", "dlg"), ("bench", "dlg"), ("bench", "edm"),
        ("bench", "ddpm"), ("fit", "ddm"), ("bench", "ddm"),
    ]  # fmt: skip
    assert steps(template, "tdpm") == [("fit", "edm"), ("fit", "tdpm"), ("bench", "tdpm")]


def test_shipped_weights_are_not_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = ("edm", "dlg", "small_t", "ddpm", "tdpm", "ddm")
    assert steps("digits", *names) == [("bench", name) for name in names]
    assert steps("digits", "small_t_trained") == [("fit", "small_t_trained"), ("bench", "small_t_trained")]


def test_weights_without_a_place_go_below_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    chain = Chain(experiments_of("digits"), [], Path("runs/digits"))
    chain.bench("small_t_trained")
    fitted, measured = (step.config for step in chain.steps)
    assert fitted.folder == Path("runs/digits/fits/small_t_trained")
    assert measured.checkpoint == "runs/digits/fits/small_t_trained/ema.safetensors"
    assert measured.prior["checkpoint"] == "runs/digits/fits/small_t_trained/density.safetensors"
    assert measured.folder == Path("runs/digits/small_t_trained")


def test_two_fits_have_two_folders(done: Path, tmp_path: Path):
    """Also if the weights are to lie in one folder, which has the training state of the fit that is first."""
    folder = Path(shutil.copytree(done, tmp_path / "mine"))
    weights = folder / "one_folder"
    for name, key, file in (("dlg", "posterior", "classifier"), ("small_t", "prior", "density"), ("edm", "", "ema")):
        tree = yaml.safe_load((folder / f"{name}.yaml").read_text())
        (tree[key] if key else tree)["checkpoint"] = f"one_folder/{file}.safetensors"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))

    def fits(*methods: str) -> dict[str, Path]:
        chain = Chain(experiments_of(str(folder)), ["n=60"], tmp_path / "runs")
        for method in methods:
            chain.bench(method)
        return {step.name: step.config.folder for step in chain.steps if step.verb == "fit"}

    own = {name: tmp_path / "runs" / "fits" / name for name in ("dlg", "small_t")}
    assert fits("small_t", "dlg") == {"edm": weights, **own}
    shutil.copytree(done / "fits" / "edm", weights)
    assert fits("dlg", "small_t") == own, "with the first fit complete"
    shutil.copytree(done / "fits" / "dlg", own["dlg"])
    assert fits("dlg", "small_t") == {"small_t": own["small_t"]}


def test_weights_that_no_fit_makes_are_named(template: Path, tmp_path: Path):
    folder = Path(shutil.copytree(template, tmp_path / "mine"))
    for base, message in (
        ("edm.yaml", None),
        ("base.yaml", "no weights for its denoiser, which its fit does not train"),
    ):
        tree = yaml.safe_load((folder / "dlg.yaml").read_text()) | {"base": base}
        (folder / "dlg.yaml").write_text(yaml.safe_dump(tree))
        if message is None:
            assert steps(folder, "dlg", words=["n=60"])[0] == ("fit", "edm")
            continue
        with pytest.raises(UsageError, match=message):
            steps(folder, "dlg", words=["n=60"])


# Errors before the first fit


def refused(capsys: Printed, *words: str) -> str:
    assert main(["curve", *words]) == 2
    said = capsys.readouterr().err
    assert "[1/" not in said and "Traceback" not in said
    return " ".join(said.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods=edm,dgl"], "no experiment 'dgl'; did you mean 'dlg'?"),
        (["sover=ipndm"], "no key 'sover'; did you mean 'solver'?"),
        (["nfe=2", "n=60"], "dlg: nfe=2 is below the minimum"),
        (["n=1"], "a distance requires at least 2 images"),
        (["methods=edm", "solver=heunn"], "did you mean 'heun'"),
        (["again=true"], "no key 'again'"),
        (["devices=2"], "one device"),
        (["methods=edm", "data.path=/nowhere"], "/nowhere"),
        (["methods=edm", "reference=/nowhere.npz"], "/nowhere.npz"),
        (["methods=edm", "shape=[1,8,8]"], "edm: "),
        (["methods=edm", "judge=identty"], "judge=identty scores none of the points; did you mean 'identity'"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_fit(
    template: Path, tmp_path: Path, capsys: Printed, words: list[str], message: str
):
    folder = Path(shutil.copytree(template, tmp_path / "mine"))
    assert message in refused(capsys, str(folder), "logger=none", *words)
    assert not (folder / "runs").exists() and not (folder / "fits").exists()


def test_images_that_changed_since_new(template: Path, tmp_path: Path, images: Path, capsys: Printed):
    folder, more = Path(shutil.copytree(template, tmp_path / "mine")), Path(shutil.copytree(images, tmp_path / "discs"))
    save_images(more / "more", n=40, seed=5)
    words = ["methods=edm", f"data.path={more}", "data.label=discs", "data.labels=false", *WORDS]
    assert "training images now" in refused(capsys, str(folder), *words)


def test_a_folder_without_experiments(tmp_path: Path, capsys: Printed):
    said = refused(capsys, str(tmp_path))
    assert "no folder of experiments" in said and "digits" in said
    assert "requires a folder" in refused(capsys, "methods=edm")


# The curve


def test_a_curve_leaves_weights_points_and_the_page(done: Path):
    for name, file in (("edm", "ema"), ("dlg", "classifier"), ("small_t", "density")):
        assert (done / "fits" / name / f"{file}.safetensors").is_file()
        points = read_points(done / "runs" / name / "points.jsonl")
        assert [point["nfe_budget"] for point in points] == [8, 12] and all(point["n"] == 60 for point in points)
        assert all(point["method"] == name and not point["tuned"] for point in points)
    assert open_weights(done / "fits" / "edm" / "ema.safetensors").header["images_seen"] == 256
    assert not (done / "fits" / "edm" / "points.jsonl").exists(), "a fit of the chain is not measured twice"
    edm = read_points(done / "runs" / "edm" / "points.jsonl")[0]["checkpoint"]["sha256"]
    assert edm == open_weights(done / "fits" / "edm" / "ema.safetensors").sha256
    page = (done / "runs" / "curve" / "index.html").read_text()
    assert all(name in page for name in ("edm", "dlg", "small_t"))
    assert (done / "runs" / "curve" / "table.md").read_text().count("\n") >= 5


def test_again_nothing_is_fitted_or_measured(done: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verb, "fit", lambda *_, **__: pytest.fail("a fit"))  # the density has seen 132 images, not 256
    monkeypatch.setattr("diffaccel.evaluation.Evaluator.measure", lambda *_, **__: pytest.fail("a measurement"))
    before = (done / "runs" / "dlg" / "points.jsonl").read_text()
    assert main(["curve", str(done), "methods=edm,dlg,small_t", NFE, *WORDS]) == 0
    said = capsys.readouterr()
    assert "fewer than" not in said.err
    assert said.err.count("measured before") == 6 and "[3/3] bench small_t" in said.err
    assert (done / "runs" / "dlg" / "points.jsonl").read_text() == before
    assert str(done / "runs" / "curve" / "index.html") in said.out.replace("\n", "")


def test_more_budgets_measure_the_rest_and_the_page_has_what_was_asked(done: Path, tmp_path: Path, capsys: Printed):
    folder = Path(shutil.copytree(done, tmp_path / "mine"))
    points = da.curve(folder, methods=["edm"], nfe=[8, 6], images=2000, n=60, threads=1, logger="none",
                      **{"training.batch_size": 64})  # fmt: skip
    assert [point["nfe_budget"] for point in points] == [8, 6]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("measured before") == 1
    assert said.count("fitted on 256 images, fewer than images=2000, and kept (`diffaccel fit ") == 1
    table = (folder / "runs" / "curve" / "table.md").read_text()
    assert "12" not in table.splitlines()[0] and "dlg" not in table


def test_longer_weights_are_new_points(done: Path, tmp_path: Path):
    """The command that is advised goes on with the fit; the points of the shorter one are not on the page."""
    folder = Path(shutil.copytree(done, tmp_path / "mine"))
    words = ["images=384", *WORDS[1:]]
    assert (
        main(["fit", str(folder / "edm"), f"out={folder / 'fits' / 'edm'}", "resume=auto", "reference=", *words]) == 0
    )
    points = da.curve(folder, methods=["edm"], nfe=[8], images=384, n=60, threads=1, logger="none",
                      **{"training.batch_size": 64})  # fmt: skip
    assert len(read_points(folder / "runs" / "edm" / "points.jsonl")) == 3 and len(points) == 1
    assert len((folder / "runs" / "curve" / "compare.csv").read_text().splitlines()) == 2


def test_fits_of_other_images_are_not_measured(done: Path, images: Path, tmp_path: Path, capsys: Printed):
    """As many images, of the same name, in the folder that `new` replaced."""
    folder = Path(shutil.copytree(done, tmp_path / "mine"))
    changed = Path(shutil.copytree(images, tmp_path / images.name))
    for path in sorted(changed.rglob("*.png"))[::2]:
        Image.open(path).rotate(180).save(path)
    assert make(folder, changed, "again=true") == 0
    capsys.readouterr()
    assert main(["curve", str(folder), "methods=edm", NFE, *WORDS]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "ema.safetensors was trained on" in said and f"remove {folder / 'fits' / 'edm'}" in said


def test_points_of_an_older_reference_are_not_on_the_page(done: Path, tmp_path: Path):
    """As many as the present ones, so that the judge's view of them comes first."""
    folder = Path(shutil.copytree(done, tmp_path / "mine"))
    file = folder / "runs" / "edm" / "points.jsonl"
    points = read_points(file)
    for point in (stale := json.loads(json.dumps(points))):
        point["key"], point["reference"]["sha256"] = "0" * 16, "2" * 64
        for judge in point.get("judges", {}).values():
            judge["reference"]["sha256"] = "2" * 64
    file.write_text("".join(json.dumps(one) + "\n" for one in [*stale, *points]))
    assert main(["curve", str(folder), "methods=edm", NFE, *WORDS]) == 0
    assert len((folder / "runs" / "curve" / "compare.csv").read_text().splitlines()) == 3


def test_killed_in_a_fit_it_goes_on(template: Path, done: Path, tmp_path: Path):
    """Killed in the second fit, after a checkpoint of it; then the same weights as if it had never been killed."""
    folder = Path(shutil.copytree(template, tmp_path / "mine"))
    command = ["curve", str(folder), "methods=edm,dlg", NFE, *WORDS, "training.checkpoint_minutes=1e-4"]
    code = f"import sys; from diffaccel.__main__ import main; sys.exit(main({command!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "fit dlg" not in (line := process.stderr.readline()):
        assert line, "it ended"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (folder / "fits" / "dlg" / "classifier.safetensors").exists()
    before = os.stat(folder / "fits" / "edm" / "ema.safetensors").st_mtime_ns
    time.sleep(0.01)
    assert main(command) == 0
    assert os.stat(folder / "fits" / "edm" / "ema.safetensors").st_mtime_ns == before
    for file in ("edm/ema.safetensors", "dlg/classifier.safetensors"):
        ours, theirs = open_weights(folder / "fits" / file).read(), open_weights(done / "fits" / file).read()
        assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_given_weights_are_not_retrained(done: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`new checkpoint=` on the weights of another folder: the same images come out, and no fit of edm."""
    weights = done / "fits" / "edm" / "ema.safetensors"
    assert make(tmp_path / "mine", images, f"checkpoint={weights}") == 0
    monkeypatch.setattr(verb, "fit", lambda *_, **__: pytest.fail("a fit"))
    (point,) = da.curve(tmp_path / "mine", methods=["edm"], nfe=[8], n=60, threads=1, logger="none")
    before = read_points(done / "runs" / "edm" / "points.jsonl")[0]
    assert point["images_sha256"] == before["images_sha256"] and all(
        point["metrics"][key] == before["metrics"][key] for key in ("fd_identity", "kid", "recall")
    )


def test_a_searched_file_is_a_method(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Path(shutil.copytree(done, tmp_path / "mine"))
    best = tmp_path / "searches" / "edm" / "best.yaml"
    best.parent.mkdir(parents=True)
    hashes = experiment.build_frozen(load(str(folder / "edm"))).weights_sha256()
    tree = {"base": str(folder / "edm.yaml"), "method": {"name": "diffusion", "label": "edm_best"},
            "tuned_for": hashes, "by_nfe": {8: {"solver": {"name": "ipndm"}}}}  # fmt: skip
    best.write_text(yaml.safe_dump(tree))
    points = da.curve(folder, methods=["edm", str(best)], nfe=[8], n=60, threads=1, logger="none")
    assert [(point["method"], point["tuned"], point["solver"]) for point in points] == [
        ("edm", False, "dpmpp2m"), ("edm_best", True, "ipndm")]  # fmt: skip
    assert (folder / "runs" / "edm_best" / "points.jsonl").is_file()


# A dry run


def test_a_dry_run_says_what_would_run_and_writes_nothing(template: Path, tmp_path: Path, capsys: Printed):
    folder = Path(shutil.copytree(template, tmp_path / "mine"))
    before = sorted(folder.rglob("*"))
    assert da.curve(folder, methods=["edm", "dlg"], nfe=[8], n=60, images=640, threads=1, dry_run=True) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines[1:5]] == [
        ["fit", "edm"], ["bench", "edm"], ["fit", "dlg"], ["bench", "dlg"]]  # fmt: skip
    assert "640 images" in lines[1] and "n=60, nfe=8" in lines[2] and "in all on this machine" in lines[5]
    assert sorted(folder.rglob("*")) == before


def test_times_are_products_of_measured_ones(template: Path, monkeypatch: pytest.MonkeyPatch):
    """With a clock that advances by one second per reading, a step of 32 images takes 1/32 s per image and phase."""
    ticks = iter(range(10_000))
    for module in (fit_cost, curve_cost):
        monkeypatch.setattr(module, "clock", lambda device: float(next(ticks)))
    config = load(str(template / "tdpm"), ["images=1000", "method.objectives=[]", "method.critic_since=500",
                                           "method.generator_since=750"])  # fmt: skip
    method = experiment.build_method(config, load=False)
    assert curve_cost.seconds_per_image(method, config) == pytest.approx((0.5 + 0.25) / 32)
    edm = load(str(template / "edm"), ["n=60", NFE])
    sampler = experiment.build_frozen(edm, load=False)
    monkeypatch.setattr(curve_cost, "forward_cost", lambda *_: type("Cost", (), {"seconds": 0.5}))
    assert curve_cost.seconds_of_samples(sampler, edm) == pytest.approx((8 + 12) * 60 * 0.5)
    assert curve_cost.seconds_of_features(edm) == pytest.approx(1 / 32)
    assert [curve_cost.minutes(s) for s in (5, 300, 7200)] == ["5 s", "5 min", "2.0 h"]
