"""Scores of images of any origin: those of a bench for the same images; statistics of other programs; mistakes."""

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.metric_fid import fid_statistics_to_metric

import diffaccel as da
from diffaccel.__main__ import main
from diffaccel.data import DataModule
from diffaccel.data.source import random_order
from diffaccel.evaluation import pictures as pictures_of_points
from diffaccel.evaluation import scoring
from diffaccel.metrics.reference import read_reference
from diffaccel.metrics.statistics import read_statistics
from diffaccel.report import read_points
from diffaccel.verbs.compare import compare, markdown
from diffaccel.verbs.help import overview

N, NFE = 200, 4
WEIGHTS = Path(__file__).parents[1] / "experiments" / "digits" / "weights"
DIGITS = [f"extractor={{name: small, path: {WEIGHTS / 'extractor.safetensors'}}}"]
RUN = [f"nfe={NFE}", f"n={N}", "seed=3"]
FRECHET = {"fd_digits", "fd_digits_inf", "fd_digits_se", "fd_digits_floor"}

pytestmark = pytest.mark.usefixtures("undrawn")
Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffaccel.verbs.score.draw_curve", lambda *_: None)
        patch.setattr("diffaccel.verbs.score.draw_samples", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def made(undrawn: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench, and its images as PNG, as npz, as a zip, and without a description."""
    out = tmp_path_factory.mktemp("made")
    assert main(["bench", "digits/edm", *RUN, "logger=none", f"out={out / 'bench'}"]) == 0
    assert main(["sample", "digits/edm", *RUN, f"out={out}"]) == 0
    (out / f"images_nfe{NFE}").rename(out / "png")
    assert main(["sample", "digits/edm", *RUN, "format=npz", f"out={out}"]) == 0
    (out / f"images_nfe{NFE}").rename(out / "npz")
    shutil.copytree(out / "png", out / "alien", ignore=shutil.ignore_patterns("sample.json"))
    shutil.copy(out / "npz" / "images.npz", out / "alien.npz")
    with zipfile.ZipFile(out / "alien.zip", "w") as archive:
        for file in (out / "alien").iterdir():
            archive.write(file, file.name)
    return out


@pytest.fixture
def refused(tmp_path: Path, capsys: Printed) -> Callable[..., str]:
    """Run words that must fail: status 2, one line on stderr apart from notes on the images, nothing written."""

    def run(*words: object) -> str:
        capsys.readouterr()
        out = tmp_path / "refused"
        assert main(["score", *map(str, words), f"out={out}"]) == 2
        printed = capsys.readouterr()
        *_, said = printed.err.splitlines()
        assert said.startswith("diffaccel: ") and printed.err.count("diffaccel: ") == 1, printed.err
        assert "Traceback" not in printed.err and printed.out == "" and not (out / "points.jsonl").exists()
        return said

    return run


def score(out: Path, *words: object) -> dict[str, Any]:
    assert main(["score", *map(str, words), f"out={out}"]) == 0
    return dict(read_points(out / "points.jsonl")[-1])


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def gaussian(seed: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(3 * d, d)) * (1 + 0.1 * seed)
    return x.mean(0), np.cov(x.T)


# The metrics of a bench


@pytest.mark.parametrize("name", ["png", "npz", "npz/images.npz", "alien", "alien.npz", "alien.zip"])
@pytest.mark.parametrize("experiment", ["digits/edm", "digits"])
def test_the_same_images_have_the_metrics_of_the_bench(made: Path, tmp_path: Path, name: str, experiment: str):
    (bench,) = read_points(made / "bench" / "points.jsonl")
    point = score(tmp_path, made / name, experiment)
    assert len(bench["metrics"]) > 10 and bench["memorisation"]["closest"]
    known = not name.startswith("alien")
    by_order = ("fd_digits_inf", "kid_se", "fd_digits_se")  # by blocks of images, whose order is another one
    assert point["metrics"].keys() == bench["metrics"].keys()
    for key, value in bench["metrics"].items():
        if known or key not in by_order:
            assert point["metrics"][key] == (value if known else pytest.approx(value, rel=1e-6)), key
    for mine, theirs in zip(point["memorisation"]["closest"], bench["memorisation"]["closest"], strict=True):
        assert mine == pytest.approx(theirs)
    for key in ("images_sha256", "n", "extractor", "reference", "floor", "data", "neighbourhoods"):
        assert point[key] == bench[key], key
    same = ["method", "nfe", "nfe_budget", "nfe_burn_in", "seed", "noise", "chains", "settings", "prior", "solver"]
    same += ["experiment", "process", "checkpoint", "configuration", "evaluations", "precision", "tuned", "by_budget"]
    if known:
        assert [key for key in same if point[key] != bench[key]] == []
    else:
        assert point["method"] == "alien" and point["nfe"] is None and point["seed"] is None
        kind = {"": "folder", ".zip": "zip", ".npz": "npz"}[Path(name).suffix]
        assert point["source"] == {"path": str(made / name), "kind": kind, "files": N}


def test_images_of_a_chain_keep_its_blocks(tmp_path: Path):
    words = ["digits/dlg", "nfe=12", "n=90", "chains=15", "logger=none"]
    assert main(["bench", *words, f"out={tmp_path / 'bench'}"]) == 0
    assert main(["sample", *words, f"out={tmp_path}"]) == 0
    (bench,) = read_points(tmp_path / "bench" / "points.jsonl")
    point = score(tmp_path / "scored", tmp_path / "images_nfe12", "digits", "metrics=frechet")
    assert point["chains"] == bench["chains"] == 15 and point["nfe_burn_in"] == bench["nfe_burn_in"] > 0
    for key in ("fd_digits", "fd_digits_inf", "fd_digits_se"):
        assert point["metrics"][key] == pytest.approx(bench["metrics"][key], rel=1e-5)
    (tmp_path / "images_nfe12" / "sample.json").unlink()
    other = score(tmp_path / "independent", tmp_path / "images_nfe12", "digits", "metrics=frechet")
    assert other["metrics"]["fd_digits_se"] != pytest.approx(bench["metrics"]["fd_digits_se"], rel=1e-2)


def test_the_python_function_returns_the_point(made: Path, tmp_path: Path):
    point = da.score(made / "alien", "digits", name="mine", nfe=4, n=100, out=tmp_path)
    (written,) = read_points(tmp_path / "points.jsonl")
    assert json.loads(json.dumps(point)) == written and (point["method"], point["nfe"], point["n"]) == ("mine", 4, 100)
    files = sorted((made / "alien").iterdir())
    images = np.stack([np.asarray(Image.open(files[index])) for index in random_order(N)[:100].tolist()])
    assert da.measure(torch.from_numpy(images)[:, None], "digits") == point["metrics"]


def test_images_sorted_by_class_are_not_scored_by_the_first_classes(tmp_path: Path):
    """Real digits, sorted: recall, coverage and ``n=`` of the first images alone would be those of three classes."""
    images = DataModule({"name": "digits"}).images("train")
    order = images.labels.argsort(stable=True)
    path = save(tmp_path / "sorted.npz", images=images.read(order)[:, 0].numpy())
    point = score(tmp_path / "all", path, "digits", "metrics=[frechet,manifold,kid]")["metrics"]
    assert point["recall"] > 0.75 and point["coverage"] > 0.9
    part = score(tmp_path / "part", path, "digits", "n=400", "metrics=frechet")["metrics"]
    assert part["fd_digits"] < 1.0  # 12.8 for the first 400


def test_samples_of_a_condition_stay_together(tmp_path: Path):
    """As in a bench: blocks of whole conditions, and the classes that the images were made for."""
    words = ["digits_text/edm", "nfe=5", "n=60", "condition.samples=3", "metrics=[frechet,kid,accuracy]"]
    assert main(["bench", *words, "logger=none", f"out={tmp_path / 'bench'}"]) == 0
    assert main(["sample", *words[:-1], "format=npz", f"out={tmp_path}"]) == 0
    (bench,) = read_points(tmp_path / "bench" / "points.jsonl")
    point = score(tmp_path / "scored", tmp_path / "images_nfe5", "digits_text", words[-1])
    assert point["metrics"] == bench["metrics"] and "accuracy_se" in point["metrics"]


def test_images_with_mended_labels_are_scored_again(tmp_path: Path):
    images = DataModule({"name": "digits"}).images("test")
    arrays = {"images": images.images[:50].permute(0, 2, 3, 1).numpy(), "labels": images.labels[:50].numpy()}
    words = ["digits_text", "metrics=[frechet,accuracy]"]
    wrong = save(tmp_path / "own.npz", **{**arrays, "labels": 9 - arrays["labels"]})
    assert score(tmp_path / "scored", wrong, *words)["metrics"]["accuracy"] < 0.2
    right = save(tmp_path / "own.npz", **arrays)
    assert score(tmp_path / "scored", right, *words)["metrics"]["accuracy"] > 0.9


def test_the_accuracy_of_unknown_classes_is_refused(made: Path, refused: Callable[..., str]):
    said = refused(made / "png", "digits", "metrics=[frechet,accuracy]")
    assert "the classes of the images are unknown" in said and "sample them with format=npz" in said


def test_a_folder_of_several_budgets_is_not_one_set(made: Path, refused: Callable[..., str]):
    said = refused(made, "digits")
    assert "images of `diffaccel sample` in folders of their own (npz, png)" in said


def test_a_part_of_the_images_of_chains_is_refused(tmp_path: Path, refused: Callable[..., str]):
    """The burn-in of their NFE is shared by all of them."""
    assert main(["sample", "digits/dlg", "nfe=12", "n=60", "chains=15", f"out={tmp_path}"]) == 0
    assert "60 images of 15 chains, whose burn-in is shared" in refused(tmp_path / "images_nfe12", "digits", "n=30")


def test_the_statistics_of_training_images_are_no_floor(made: Path, refused: Callable[..., str], tmp_path: Path):
    for floor in ("reference.npz", "floor.npz"):
        words = [f"reference={WEIGHTS / 'floor.npz'}"] if floor == "floor.npz" else []
        said = refused(made / "png", "digits", *DIGITS, *words, f"floor={WEIGHTS / floor}")
        assert "contains statistics of training images, and a floor those of held-out images" in said
    words = ["digits/edm", "nfe=4", "n=20", "logger=none", f"out={tmp_path}"]
    assert main(["bench", *words, f"floor={WEIGHTS / 'reference.npz'}"]) == 2
    with pytest.raises(da.UsageError, match="statistics of training images"):
        da.measure(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), "digits", floor=WEIGHTS / "reference.npz")


def test_a_floor_has_the_shape_of_the_images(made: Path, tmp_path: Path, refused: Callable[..., str]):
    larger = tmp_path / "larger"
    larger.mkdir()
    for index in range(8):
        Image.fromarray(np.full((16, 16), index, np.uint8)).save(larger / f"{index}.png")
    said = refused(made / "png", "digits", *DIGITS, f"floor={larger}")
    assert "the images are 8x8 grey, those of the floor 'larger' 16x16 grey" in said


def test_two_judges_are_two(made: Path, refused: Callable[..., str], tmp_path: Path):
    mu, sigma = gaussian(0, 64)
    node = DIGITS[0].partition("=")[2]
    assert "two of them are called 'digits'" in refused(made / "png", "digits", f"judges=[{node},{node}]")
    one = save(tmp_path / "one.npz", mu=mu, sigma=sigma)
    said = refused(made / "png", "digits", f"judges=[{node},{{name: identity, dim: 64}}]", f"reference={one}")
    assert "is one file, but there are 2 judges" in said


def test_the_reference_may_be_images(made: Path, tmp_path: Path):
    assert main(["reference", "digits/edm", "data=npz", f"data.path={made / 'alien.npz'}", "data.label=digits 8x8",
                 "floor=null", f"reference={tmp_path / 'r.npz'}"]) == 0  # fmt: skip
    by_file = score(tmp_path / "a", made / "png", "digits", f"reference={tmp_path / 'r.npz'}", "n=100")
    by_images = score(tmp_path / "b", made / "png", f"reference={made / 'alien'}", *DIGITS, "n=100")
    assert by_images["metrics"] == by_file["metrics"] and "kid" in by_file["metrics"]
    assert "fd_digits_floor" not in by_file["metrics"], "the experiment's floor is of other data"


def test_points_with_a_budget_are_drawn(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("draw_curve", "draw_samples"):
        monkeypatch.setattr(f"diffaccel.verbs.score.{name}", getattr(pictures_of_points, name))
    score(tmp_path, made / "alien", "digits", "nfe=4", "metrics=frechet")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"points.jsonl", "config.yaml", "curve.png", "curve.csv", "samples_nfe4.png"}
    (row,) = compare([str(tmp_path)])
    assert row.grid == tmp_path / "samples_nfe4.png"


# Again


def test_a_point_is_not_scored_twice(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed):
    first = score(tmp_path, made / "alien", "digits", "nfe=4")
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_chunk", None)
        assert score(tmp_path, made / "alien.npz", "digits", "nfe=4") == first, "the same images by content"
        assert "scored before" in capsys.readouterr().err
    assert score(tmp_path, made / "alien", "digits", "nfe=5")["key"] != first["key"]
    assert score(tmp_path, made / "alien", "digits", "nfe=4", "name=b")["key"] != first["key"]
    score(tmp_path, made / "alien", "digits", "nfe=4", "again=true")
    assert len(read_points(tmp_path / "points.jsonl")) == 4


def test_killed_it_goes_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Killed(BaseException):
        pass

    chunk, calls = scoring._chunk, [0]

    def killing(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        return chunk(*arguments)

    monkeypatch.setattr(scoring, "_chunk", killing)
    words = [made / "alien", "digits", "batch_size=25"]
    with pytest.raises(Killed):
        score(tmp_path / "parts", *words)
    assert score(tmp_path / "parts", *words)["metrics"] == score(tmp_path / "whole", *words)["metrics"]
    assert calls[0] == 4 + 5 + 8, "three batches were kept"
    assert not (tmp_path / "parts" / "partial").exists()


# Beside other points


def test_given_images_are_never_paired_with_a_bench(made: Path, tmp_path: Path):
    score(tmp_path / "alien", made / "alien", "digits", f"nfe={NFE}", "seed=3", "name=theirs")
    score(tmp_path / "mine", made / "png", "digits", "name=mine")
    rows = compare([str(made / "bench"), str(tmp_path / "alien"), str(tmp_path / "mine")])
    by_name = {row.point["method"]: row for row in rows}
    assert by_name["theirs"].difference is None and by_name["theirs"].label == "theirs"
    assert by_name["theirs"].point["metrics"]["fd_digits_se"] > 0
    assert not (tmp_path / "alien" / "features").exists()
    difference = by_name["mine"].difference
    assert difference is not None and float(difference.fd) == 0, "of the same noise, and the same images"


def test_two_given_sets_are_no_pair(made: Path, tmp_path: Path):
    for name in ("a", "b"):
        score(tmp_path / name, made / "alien", "digits", f"nfe={NFE}", "seed=3", f"name={name}")
    assert [row.difference for row in compare([str(tmp_path / "a"), str(tmp_path / "b")])] == [None, None]


def test_a_described_folder_is_the_bench_itself(made: Path, tmp_path: Path):
    score(tmp_path, made / "png", "digits")
    notes: list[str] = []
    rows = compare([str(made / "bench"), str(tmp_path)], note=notes.append)
    assert [row.folder for row in rows] == [made / "bench"] and "same points" in notes[0]


def test_without_a_budget_it_is_in_the_table_only(made: Path, tmp_path: Path):
    score(tmp_path, made / "alien", "digits")
    notes: list[str] = []
    rows = compare([str(made / "bench"), str(tmp_path)], note=notes.append)
    assert notes == ["1 of 2 points lacks nfe: not drawn"]
    head, _, *lines = markdown(rows).splitlines()
    assert head == f"| fd_digits | NFE {NFE} | no NFE |" and any(line.startswith("| alien |") for line in lines)


# Descriptions


def test_a_description_of_other_images_is_refused(made: Path, tmp_path: Path, refused: Callable[..., str]):
    shutil.copytree(made / "png", tmp_path / "png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "png" / "000007.png")
    assert "describes other images: remove it" in refused(tmp_path / "png", "digits")
    (tmp_path / "png" / "sample.json").unlink()
    assert score(tmp_path / "out", tmp_path / "png", "digits")["method"] == "png"


@pytest.mark.parametrize("word", ["nfe=6", "seed=4"])
def test_a_description_is_not_contradicted(made: Path, refused: Callable[..., str], word: str):
    assert f"omit {word.partition('=')[0]}=" in refused(made / "png", "digits", word)


def test_a_judge_that_trained_the_model_does_not_score_its_images(
    made: Path, tmp_path: Path, refused: Callable[..., str]
):
    shutil.copytree(made / "png", tmp_path / "png")
    said = json.loads((tmp_path / "png" / "sample.json").read_text())
    assert said["feature_networks"] == []
    used = read_reference(WEIGHTS / "reference.npz").provenance["extractor"]["sha256"]
    (tmp_path / "png" / "sample.json").write_text(json.dumps({**said, "feature_networks": [used]}))
    assert "can't score" in refused(tmp_path / "png", "digits")


# Statistics of other programs


def test_statistics_give_the_distance_of_torch_fidelity(tmp_path: Path):
    one, other = gaussian(0, 48), gaussian(3, 48)
    files = [save(tmp_path / f"{k}.npz", mu=mu, sigma=sigma) for k, (mu, sigma) in enumerate((one, other))]
    point = score(tmp_path / "out", files[0], f"reference={files[1]}", "extractor=identity", "name=adm", "nfe=250")
    statistics = ({"mu": mu, "sigma": sigma} for mu, sigma in (one, other))
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert point["metrics"]["fd_identity"] == pytest.approx(expected, rel=1e-9)
    assert point["metrics"]["fd_identity_se"] is None and point["n"] is None and "kid" not in point["metrics"]
    assert (point["method"], point["nfe"], point["source"]["kind"]) == ("adm", 250, "statistics")
    assert point["extractor"] == {"name": "identity", "sha256": None, "dim": 48}


def test_the_name_fid_is_that_of_inception(tmp_path: Path, refused: Callable[..., str]):
    mean, covariance = np.zeros(2048), np.eye(2048)
    a = save(tmp_path / "a.npz", mu=mean, sigma=covariance, mu_s=mean[:7], sigma_s=covariance[:7, :7])
    b = save(tmp_path / "b.npz", mu=mean + 0.5, sigma=4 * covariance)
    point = score(tmp_path / "out", a, f"reference={b}", "extractor=inception")
    assert point["metrics"]["fid"] == pytest.approx(2048 * (0.25 + 1))
    assert "states the extractor" in (said := refused(a, f"reference={b}")) and "inception" in said
    small = save(tmp_path / "small.npz", mu=mean[:64], sigma=covariance[:64, :64])
    said = refused(small, f"reference={small}", "extractor=inception")
    assert "64 features" in said and "2048" in said
    assert "2048 features" in (said := refused(a, "digits")) and "64" in said


def test_statistics_as_reference_allow_the_distance_alone(made: Path, tmp_path: Path, capsys: Printed):
    own = read_reference(WEIGHTS / "reference.npz").moments
    arrays = {"mu": own.mean.numpy(), "sigma": own.covariance.numpy()}
    file = save(tmp_path / "adm.npz", arr_0=np.zeros((5, 8, 8, 1), np.uint8), **arrays)
    (bench,) = read_points(made / "bench" / "points.jsonl")
    floor = f"floor={WEIGHTS / 'floor.npz'}"
    point = score(tmp_path / "out", made / "alien", f"reference={file}", *DIGITS, floor)
    assert "only the Frechet distance" in capsys.readouterr().err
    assert point["metrics"].keys() == FRECHET
    for key in FRECHET - {"fd_digits_inf", "fd_digits_se"}:  # by blocks of images, whose order is another one
        assert point["metrics"][key] == pytest.approx(bench["metrics"][key], rel=1e-9)
    assert point["reference"]["n"] is None and point["reference"]["name"] == "adm.npz"
    given = score(tmp_path / "given", save(tmp_path / "s.npz", **arrays), "digits")
    assert given["metrics"]["fd_digits"] == pytest.approx(0, abs=1e-9)
    assert given["extractor"] == bench["extractor"], "that of the reference"


def test_the_project_s_own_statistics_are_a_source(tmp_path: Path):
    point = score(tmp_path, WEIGHTS / "floor.npz", "digits")
    assert point["metrics"]["fd_digits"] == point["metrics"]["fd_digits_floor"] and point["n"] == 360


def test_equal_content_is_the_same_reference(tmp_path: Path):
    mu, sigma = gaussian(1, 5)
    files = [save(tmp_path / name, mu=mu, sigma=sigma) for name in ("a.npz", "b.npz")]
    other = save(tmp_path / "c.npz", mu=mu + 1, sigma=sigma)
    found = [read_statistics(str(file)).sha256 for file in (*files, other)]
    assert found[0] == found[1] != found[2]


# What ADM's evaluator reads


def test_sampled_npz_is_what_adm_s_evaluator_reads(made: Path):
    """Its reader wants the member arr_0.npy in C order, and streams it: uint8 (N, H, W, C)."""
    with zipfile.ZipFile(made / "npz" / "images.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, fortran, dtype) == ((N, 8, 8, 1), False, np.uint8)
        streamed = np.frombuffer(file.read(), np.uint8).reshape(shape)
    pictures = [np.asarray(Image.open(path)) for path in sorted((made / "png").glob("*.png"))]
    np.testing.assert_array_equal(streamed[..., 0], np.stack(pictures))
    with np.load(made / "npz" / "images.npz") as arrays:
        assert not {"mu", "sigma"} & set(arrays), "with which the evaluator would not compute statistics of arr_0"


# Inputs that people have


def pictures(folder: Path, images: list[Image.Image], suffix: str = "png", **options: Any) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        image.save(folder / f"{i:02d}.{suffix}", **options)
    return folder


def noise(i: int, channels: int = 3, size: tuple[int, int] = (8, 8)) -> Image.Image:
    array = np.random.default_rng(i).integers(256, size=(*size, channels), dtype=np.uint8)
    return Image.fromarray(array[..., 0] if channels == 1 else array)


def test_images_are_read_as_the_data_module_reads_them(tmp_path: Path):
    """Palette, alpha, CMYK and grey among colours: the point is that of the array the module makes of them."""
    kinds: list[Callable[[Image.Image], Image.Image]] = [
        lambda image: image, lambda image: image.convert("P"), lambda image: image.convert("L"),
        lambda image: Image.merge("RGBA", (*image.split(), noise(9, 1))),
    ]  # fmt: skip
    folder = pictures(tmp_path / "kinds", [kinds[i % 4](noise(i)) for i in range(12)])
    module = DataModule({"name": "folder", "path": str(folder)})
    ((_, images, _),) = module.batches("train", 12)
    array = save(tmp_path / "kinds.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    words = [f"reference={folder}", "extractor=identity", "extractor.dim=192", "metrics=frechet"]
    points = [score(tmp_path / f"out{source.suffix}", source, *words) for source in (folder, array)]
    assert points[0]["images_sha256"] == points[1]["images_sha256"] and points[0]["n"] == 12


def sixteen(i: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), 300 * i, np.uint16))


@pytest.mark.parametrize(
    ("images", "words", "named"),
    [
        ([noise(i) for i in range(4)], [], "RGB, those of the reference 'digits 8x8' 8x8 grey: convert them to grey"),
        ([noise(i, 1, (9, 7)) for i in range(4)], [], "7x9 grey, .* 8x8 grey: resize them to 8x8, or set image_size=8"),
        ([noise(0, 1), noise(1, 1, (9, 9))], [], "1 of 2 images can't be used: .*9x9, most are 8x8"),
        ([sixteen(i) for i in range(4)], [], "convert to 8 bits"),
        ([noise(0, 1)], [], "has 1 images: a distance requires at least 2"),
        ([noise(i, 1) for i in range(4)], ["n=5"], "has 4 images, n=5"),
        ([noise(i, 1) for i in range(4)], ["n=1.5"], "n=1.5: give a whole number"),
        ([noise(i, 1) for i in range(4)], ["nfe=0"], "nfe=0: it must be positive"),
        ([noise(i, 1) for i in range(4)], ["nfe=[5,10]"], "give a number"),
        ([noise(i, 1) for i in range(4)], ["image_size=0"], "image_size=0: set 1 to"),
        ([noise(i, 1) for i in range(4)], ["solver=heun"], "score has no key 'solver'"),
        ([noise(i, 1) for i in range(4)], ["nmae=x"], "did you mean 'name'"),
    ],
)  # fmt: skip
def test_images_that_do_not_fit(
    tmp_path: Path, refused: Callable[..., str], images: list[Image.Image], words: list[str], named: str
):
    said = refused(pictures(tmp_path / "images", images), "digits", *words)
    assert re.search(named, said), said


def test_no_image_is_resized_unless_it_is_said(tmp_path: Path):
    folder = pictures(tmp_path / "large", [noise(i, 1, (16, 16)) for i in range(12)])
    point = score(tmp_path / "out", folder, "digits", "image_size=8", "metrics=frechet")
    assert point["source"]["image_size"] == 8 and point["n"] == 12


def files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that can't be scored, with what is said of them."""
    (folder / "page.npz").write_text("<html>not found</html>")
    (folder / "torn.zip").write_bytes(b"PK\x03\x04torn")
    (folder / "edm.pkl").write_bytes(pickle.dumps({"mu": [0.0], "sigma": [[1.0]]}))
    (folder / "empty").mkdir()
    np.save(folder / "array.npy", np.zeros(3))
    torch.save({"mu": torch.zeros(2), "sigma": torch.eye(2)}, folder / "edm.pt")
    zeros = np.zeros
    arrays = {
        "channels first": ({"arr_0": zeros((4, 3, 8, 8), np.uint8)}, "with channels last, (N, H, W, C)"),
        "float": ({"arr_0": zeros((4, 8, 8, 3), np.float32)}, "save uint8"),
        "no images": ({"x": zeros(3)}, "no array 'images' or 'arr_0', only x"),
        "code": ({"mu": np.array([{}, 1], dtype=object), "sigma": np.eye(2)}, "contains Python objects"),
        "shapes": ({"mu": zeros(3), "sigma": np.eye(4)}, "has shape (3,) and 'sigma' (4, 4)"),
        "nan": ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        "negative": ({"mu": zeros(2), "sigma": -np.eye(2)}, "has negative variances"),
        "asymmetric": ({"mu": zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "is not symmetric"),
    }
    found = {name: (save(folder / f"{name}.npz", **each), said) for name, (each, said) in arrays.items()}
    return found | {
        "page": (folder / "page.npz", "a web page"),
        "torn": (folder / "torn.zip", "truncated or not zip"),
        "pickle": (folder / "edm.pkl", "is a pickle, which may contain code and is not opened"),
        "torch": (folder / "edm.pt", "is a file of torch.save, which may contain code and is not opened"),
        "empty": (folder / "empty", "contains no images"),
        "bare": (folder / "array.npy", "is a single array"),
        "missing": (folder / "missing", "does not exist: give a folder or a zip archive of images, or an npz file"),
    }


@pytest.mark.parametrize("role", ["source", "reference"])
def test_files_that_are_no_images(made: Path, tmp_path: Path, refused: Callable[..., str], role: str):
    for name, (path, named) in files(tmp_path).items():
        words = [path, "digits"] if role == "source" else [made / "alien", "digits", f"reference={path}"]
        assert named in (said := refused(*words)), (name, said)


def test_what_is_missing_is_said(made: Path, refused: Callable[..., str]):
    assert "requires a source" in refused()
    assert "nothing to compare" in refused(made / "alien")
    assert "did you mean 'digits/edm'" in refused(made / "alien", "digits/emd")
    assert "requires a source" in refused(made / "alien", "digits", "toy")
    assert "set extractor=" in refused(made / "alien", f"reference={made / 'png'}")
    assert "give it with its keys" in refused(made / "alien", f"reference={WEIGHTS / 'reference.npz'}")


def test_the_help_lists_it(capsys: Printed):
    assert "  diffaccel score SOURCE EXPERIMENT" in overview()
    for words in (["score", "--help"], ["score", "help"], []):
        assert main(words) == 0 and "diffaccel score" in capsys.readouterr().out
