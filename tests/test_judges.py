"""Several judges in one pass: what each of them says is what it says alone, however the images come about."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.kid import poly_mmd

from diffaccel.__main__ import main
from diffaccel.config import STANDARD, load, to_yaml
from diffaccel.errors import UsageError
from diffaccel.evaluation import Partial, comparable
from diffaccel.evaluation.measure import judge_images
from diffaccel.evaluation.production import produce
from diffaccel.experiment import build_evaluator, build_frozen, build_judges, build_searcher
from diffaccel.features.extractors import Small, SmallClassifier, save_classifier
from diffaccel.metrics import Frechet
from diffaccel.metrics.base import build_metrics
from diffaccel.metrics.reference import read_reference
from diffaccel.nn.unet import UNet
from diffaccel.report import read_points
from diffaccel.report.judges import common_judges, features_name, judges_of, seen_by
from diffaccel.report.logs import log_curve
from diffaccel.report.table import print_points
from diffaccel.text.terminal import number
from diffaccel.verbs.compare import compare, show, table, write
from diffaccel.weights import open_weights, save_weights

DIGITS = Path(__file__).parents[1] / "experiments" / "digits" / "weights"
BENCH = ["digits/dlg", "nfe=12", "n=130", "chains=20", "batch_size=8", "logger=none"]
VIEW = ("metrics", "jackknife", "neighbourhoods", "memorisation", "extractor", "reference", "floor")
PRC = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
SAME = ("nfe", "evaluations", "images_sha256", "metrics", "judges", "chain", "images_by_rank", "key")

pytestmark = pytest.mark.usefixtures("undrawn")
Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Words that name each judge alone, and both, with few real images: KID would take longer than the runs.

    There are as many as generated ones, because other programs' KID compares equal numbers.
    """
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    save_classifier(SmallClassifier(1, 10, 8, (4,)), folder / "other.safetensors", "other", "digits", 0.1, 0)
    paths = {"digits": DIGITS / "extractor.safetensors", "other": folder / "other.safetensors"}
    both = ", ".join(f"{{name: small, path: {path}}}" for path in paths.values())
    common = [f"judges=[{both}]", *(f"{key}.{name}={folder}/{key}_{name}.npz" for key, name in FILES)]
    assert main(["reference", "digits/dlg", "keep_rows=130", *common]) == 0
    words = {
        name: [f"extractor.path={path}", f"reference={folder}/reference_{name}.npz", f"floor={folder}/floor_{name}.npz"]
        for name, path in paths.items()
    }
    return {**words, "both": common}


FILES = [(key, name) for key in ("reference", "floor") for name in ("digits", "other")]


def bench(out: Path, *words: str) -> dict[str, Any]:
    assert main(["bench", *BENCH, *words, f"out={out}"]) == 0
    return read_points(out / "points.jsonl")[-1]


@pytest.fixture(scope="module")
def points(
    judges: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory, undrawn: None
) -> dict[str, dict[str, Any]]:
    """The points of each judge alone, and of both."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: {**bench(folder / name, *words), "folder": folder / name} for name, words in judges.items()}


# The point


def test_two_judges_in_one_pass_say_what_each_says_alone(points: dict[str, dict[str, Any]]):
    """To the bit, and with its own references and floors."""
    both = points["both"]
    assert judges_of(both) == list(both["judges"]) == ["digits", "other"]
    for name in both["judges"]:
        alone = points[name]
        assert "judges" not in alone and judges_of(alone) == [name]
        assert both["judges"][name] == {key: alone[key] for key in VIEW}
        assert {"kid", "kid_se", "kid_floor", f"fd_{name}_floor"} <= both["judges"][name]["metrics"].keys()
    assert {key: both[key] for key in VIEW} == both["judges"]["digits"], "the first is where one alone is"
    assert both["images_sha256"] == points["digits"]["images_sha256"]
    assert len({point["key"] for point in points.values()}) == 3


def test_the_features_of_each_judge_are_kept(points: dict[str, dict[str, Any]]):
    for place, name in enumerate(("digits", "other")):
        alone, both = points[name], points["both"]
        (file,) = (alone["folder"] / "features").iterdir()
        own = features_name(both["key"], alone["extractor"]["sha256"], not place)
        assert np.array_equal(np.load(file), np.load(both["folder"] / "features" / own))


def test_a_point_through_the_eyes_of_a_judge(points: dict[str, dict[str, Any]]):
    both = points["both"]
    for name in ("digits", "other"):
        seen = seen_by(both, name)
        assert {key: seen[key] for key in VIEW} == {key: points[name][key] for key in VIEW}
        assert seen_by(seen, "digits") == both, "a view can be looked at through others"
        assert seen_by(points[name], name) == points[name]
    assert seen_by(both, "nobody") == both
    assert common_judges([both, points["other"]]) == ["other"] and common_judges([]) == []
    for judges in (None, 3, [], {}, {"other": 3}):  # a damaged file
        broken = {**points["digits"], "judges": judges}
        assert judges_of(broken) == (["other"] if judges == {"other": 3} else ["digits"])
        assert seen_by(broken, "other") == broken


def test_each_judge_agrees_with_other_programs_on_its_features(
    judges: dict[str, list[str]], points: dict[str, dict[str, Any]]
):
    """torch-fidelity and torchmetrics, on the features that the bench has kept and those of the reference."""
    both = points["both"]
    for place, name in enumerate(("digits", "other")):
        file = features_name(both["key"], both["judges"][name]["extractor"]["sha256"], not place)
        made = torch.from_numpy(np.load(both["folder"] / "features" / file))
        reference, metrics = read_reference(judges[name][1].partition("=")[2]), both["judges"][name]["metrics"]
        moments = {"mu": reference.moments.mean.numpy(), "sigma": reference.moments.covariance.numpy()}
        fid = fid_statistics_to_metric(fid_features_to_statistics(made.double()), moments, verbose=False)
        assert metrics[f"fd_{name}"] == pytest.approx(fid["frechet_inception_distance"], rel=1e-6)
        kid = poly_mmd(made.double(), reference.features.double())
        assert metrics["kid"] == pytest.approx(kid.item(), rel=1e-8)
        parts = prc_features_to_metric(made, reference.features.float(), **PRC)
        assert (metrics["precision"], metrics["recall"]) == pytest.approx(
            (parts["precision"], parts["recall"]), rel=1e-6
        )


def test_given_images_are_scored_as_those_of_a_bench(judges: dict[str, list[str]], points: dict[str, dict[str, Any]]):
    """Up to rounding, for the images of a bench and its chains in other batches."""
    config = load("digits/dlg", [*BENCH[1:], *judges["both"]])
    sampler = build_frozen(config)
    built, plan = build_judges(config, "digits 8x8"), sampler.plan(12, 130)
    groups = plan.prior.schedule(130, 8)
    chunks = list(produce(sampler, plan, groups, 0, Partial(None)))
    images = torch.cat([chunk.images for chunk in sorted(chunks, key=lambda chunk: int(chunk.indices[0]))])
    found = judge_images(images, built, build_metrics(STANDARD), batch_size=8, chains=20)
    for name, own in points["both"]["judges"].items():
        assert found["judges"][name]["metrics"] == pytest.approx(own["metrics"], rel=1e-6, abs=1e-9)
        assert found["judges"][name]["reference"] == own["reference"]


# How images come about


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_a_killed_bench_of_two_judges_goes_on(
    judges: dict[str, list[str]],
    points: dict[str, dict[str, Any]],
    share: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    class Killed(BaseException):
        pass

    forward, calls = UNet.forward, [0]

    def evaluate(self: UNet, *arguments: Any, **words: Any) -> Any:
        calls[0] += 1
        if calls[0] == stop:
            raise Killed
        return forward(self, *arguments, **words)

    monkeypatch.setattr(UNet, "forward", evaluate)
    stop = -1
    bench(tmp_path / "whole", *judges["both"])
    total, calls[0] = calls[0], 0
    stop = int(share * total)
    with pytest.raises(Killed):
        bench(tmp_path / "parts", *judges["both"])
    assert not (tmp_path / "parts" / "points.jsonl").exists()
    calls[0], stop = 0, -1
    again = bench(tmp_path / "parts", *judges["both"])
    for key in SAME:
        assert again[key] == points["both"][key], key
    assert calls[0] < total - share * total / 2 or share < 0.5, "what was finished was made again"
    assert len(list((tmp_path / "parts" / "features").iterdir())) == 2


def test_kept_images_are_scored_by_a_judge_that_joins(
    judges: dict[str, list[str]],
    points: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Images are made once, and features once a judge."""
    bench(tmp_path, *judges["digits"], "keep_images=true")
    seen: list[str] = []
    features = Small.features
    monkeypatch.setattr(UNet, "forward", lambda *_: pytest.fail("the images were sampled again"))
    monkeypatch.setattr(Small, "features", lambda self, x: (seen.append(self.name), features(self, x))[1])
    both = bench(tmp_path, *judges["both"])
    assert set(seen) == {"other"}, "the features of the first were on disk"
    assert {key: both[key] for key in SAME} == {key: points["both"][key] for key in SAME}
    assert bench(tmp_path, *judges["both"])["key"] == both["key"]
    assert len(read_points(tmp_path / "points.jsonl")) == 2, "measured before"


SCRIPT = """\
import sys
from diffaccel.__main__ import main
from diffaccel.evaluation import Evaluator

Evaluator._draw = Evaluator._draw_curve = lambda self: None
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("devices", [2, 3])
def test_several_processes_agree(
    devices: int, judges: dict[str, list[str]], points: dict[str, dict[str, Any]], tmp_path: Path
):
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["bench", *BENCH, *judges["both"], f"devices={devices}", "accelerator=cpu", "threads=1"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), *words, f"out={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (point,) = read_points(tmp_path / "out" / "points.jsonl")
    one = points["both"]
    assert point["world_size"] == devices and point["images_sha256"] == one["images_sha256"]
    assert point["key"] == one["key"] and list(point["judges"]) == list(one["judges"])
    for name, own in one["judges"].items():
        theirs = point["judges"][name]
        assert theirs["metrics"] == pytest.approx(own["metrics"], rel=1e-9, abs=1e-12)
        assert {key: theirs[key] for key in VIEW[4:]} == {key: own[key] for key in VIEW[4:]}


# References


def test_the_statistics_of_all_judges_are_those_of_each(judges: dict[str, list[str]], tmp_path: Path, capsys: Printed):
    for name in ("digits", "other"):
        own, reference, _ = judges[name]
        assert main(["reference", "digits/dlg", "keep_rows=130", own, f"out={tmp_path / name}"]) == 0
        alone = read_reference(tmp_path / name / "reference.npz")
        assert alone.sha256 == read_reference(reference.partition("=")[2]).sha256
        assert alone.provenance["extractor"]["name"] == name


def test_the_files_of_several_judges_are_named_by_them(judges: dict[str, list[str]], tmp_path: Path, capsys: Printed):
    assert main(["reference", "digits/dlg", judges["both"][0], "limit=50", f"out={tmp_path}"]) == 0
    files = {f"{key}_{name}.npz" for key, name in FILES}
    assert {file.name for file in tmp_path.glob("*.npz")} == files
    said = capsys.readouterr().out
    assert all(f"{key}.{name}={tmp_path / f'{key}_{name}.npz'}" in said for key, name in FILES)
    assert main(["reference", "digits/dlg", judges["both"][0], f"reference={tmp_path / 'one.npz'}"]) == 2
    assert "is one file, but there are 2 judges: set reference.digits=FILE ref" in capsys.readouterr().err
    assert not (tmp_path / "one.npz").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda words: [words[0]],
            r"reference=.*reference.npz is one file, but there are 2 judges: set reference.digi",
        ),
        (lambda words: words[:2] + words[3:], "has no reference for the judges other: compute the statistics of all j"),
        (lambda words: [*words, "reference.other=nowhere.npz"], "no reference statistics at nowhere.npz: compute it"),
        (
            lambda words: [*words, words[1].replace("reference.digits", "reference.other")],
            r"was computed with the extractor digits .*but the run uses other",
        ),
    ],
)
def test_a_judge_without_its_statistics_is_refused(
    change: Any, message: str, judges: dict[str, list[str]], tmp_path: Path
):
    config = load("digits/dlg", [*BENCH[1:], *change(judges["both"]), f"out={tmp_path}"])
    sampler = build_frozen(config)
    with pytest.raises(UsageError, match=message):
        build_evaluator(config, sampler)


def test_a_judge_without_a_floor_has_none(judges: dict[str, list[str]], tmp_path: Path):
    point = bench(tmp_path, *judges["both"][:4])
    assert point["floor"] is not None and point["judges"]["other"]["floor"] is None
    assert "kid_floor" not in point["judges"]["other"]["metrics"]


def test_a_judge_that_trained_the_model_is_refused(judges: dict[str, list[str]], tmp_path: Path, capsys: Printed):
    """Wherever it is in the list."""
    used = Small(Path(judges["other"][0].partition("=")[2])).weights_sha256
    weights = open_weights(DIGITS / "edm.safetensors")
    save_weights(tmp_path / "edm.safetensors", weights.read(), {**weights.header, "feature_networks": [used]})
    words = ["bench", *BENCH, *judges["both"], f"checkpoint={tmp_path / 'edm.safetensors'}", f"out={tmp_path / 'out'}"]
    assert main(words) == 2
    assert "extractor 'other' can't score digits/dlg, which was trained with its weights" in capsys.readouterr().err


# The configuration


def test_the_last_to_name_a_judge_decides(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(
        "method: diffusion\nshape: [3, 32, 32]\ndata: {name: cifar10}\n"
        "extractor: {name: small, path: w/a.safetensors}\nreference: {a: w/a.npz}\n"
    )
    (tmp_path / "child.yaml").write_text("base: base.yaml\njudges: [mobilenetv2, {name: small, path: b.safetensors}]\n")
    child = str(tmp_path / "child.yaml")
    base = [{"name": "small", "path": str(tmp_path / "w/a.safetensors")}]
    listed = [{"name": "mobilenetv2"}, {"name": "small", "path": str(tmp_path / "b.safetensors")}]
    assert load(str(tmp_path / "base.yaml")).extractors == base
    assert load(child).extractors == listed
    assert load(child, ["extractor=inception"]).extractors == [{"name": "inception"}]
    assert load(child, ["judges=efficientnet_lite0,mobilenetv2"]).extractors == [
        {"name": "efficientnet_lite0"},
        {"name": "mobilenetv2"},
    ]
    assert load(child, ["judges=mobilenetv2"]).extractors == [{"name": "mobilenetv2"}]
    assert load(child, ["reference.mobilenetv2=m.npz"]).reference == {
        "a": str(tmp_path / "w/a.npz"),
        "mobilenetv2": "m.npz",
    }
    assert load(child, ["reference=one.npz"]).reference == "one.npz"
    config = load(child)
    (tmp_path / "written.yaml").write_text(to_yaml(config, tmp_path))
    assert load(str(tmp_path / "written.yaml")).extractors == listed, "a written configuration reads back"
    with pytest.raises(UsageError, match="both extractor and judges are set: list all extractors in judges"):
        load(child, ["extractor=inception", "judges=mobilenetv2"])
    with pytest.raises(UsageError, match="judges.0=3: give a name"):
        load(child, ["judges=[3]"])
    with pytest.raises(UsageError, match="reference=.*: give a file, or a mapping of judges to files"):
        load(child, ["reference.a.b=1"])


def test_a_judge_is_listed_once(judges: dict[str, list[str]], tmp_path: Path, capsys: Printed):
    path = judges["other"][0].partition("=")[2]
    twice = f"judges=[{{name: small, path: {path}}}, {{name: small, path: {path}}}]"
    assert main(["bench", *BENCH, twice, f"out={tmp_path}"]) == 2
    assert "judges: two of them are called 'other': list each extractor once" in capsys.readouterr().err


def test_a_search_takes_the_first_judge_or_the_one_it_names(judges: dict[str, list[str]], tmp_path: Path):
    words = [*BENCH[1:], *judges["both"], "search.images=[20]", "search.space.prior.eta=[1.0,2.0]", f"out={tmp_path}"]
    words.append("chains=null")  # which a search refuses
    for own, metric in (([], "fd_digits"), (["search.judge=other"], "fd_other")):
        config = load("digits/dlg", [*words, *own])
        searcher = build_searcher(config, build_frozen(config))
        assert searcher.metric == metric
        assert [judge.name for judge in searcher.evaluators[20, config.seed].judges] == [metric.removeprefix("fd_")]
    config = load("digits/dlg", [*words, "search.judge=nobody"])
    with pytest.raises(UsageError, match="judge.*'nobody'.*digits, other"):
        build_searcher(config, build_frozen(config))


# Tables, comparisons and logs


def test_a_bench_prints_a_table_for_each_judge(points: dict[str, dict[str, Any]], capsys: Printed):
    print_points([points["both"]], "fd_digits", Path("there"))
    printed = capsys.readouterr().out
    first, second = printed.split("judge other:")
    assert "fd_digits@130" in first and "fd_other" not in first and "fd_other@130" in second
    kid = points["both"]["judges"]["other"]["metrics"]["kid"]
    assert number(kid) in second and printed.count("points.jsonl") == 1


def test_the_curve_of_a_log_has_every_judge(points: dict[str, dict[str, Any]], tmp_path: Path):
    logged: list[dict[str, float]] = []

    class Logger:
        def log_metrics(self, row: dict[str, float], step: int) -> None:
            logged.append(row)

    log_curve(Logger(), [points["both"]], tmp_path, {})
    own = points["both"]["judges"]
    assert logged[0]["curve/kid"] == own["digits"]["metrics"]["kid"]
    assert logged[0]["curve/other/kid"] == own["other"]["metrics"]["kid"]
    assert not any(key.startswith("curve/digits/") for key in logged[0])


@pytest.fixture(scope="module")
def folders(
    judges: dict[str, list[str]], points: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Two runs with common noise that both judges scored."""
    other = tmp_path_factory.mktemp("edm")
    assert main(["bench", "digits/edm", *BENCH[1:3], "logger=none", *judges["both"], f"out={other}"]) == 0
    return [str(points["both"]["folder"]), str(other)]


def test_a_comparison_shows_one_judge(folders: list[str], judges: dict[str, list[str]], tmp_path: Path):
    """With the differences of its own features, whether the judge was alone or not."""
    for name in ("digits", "other"):
        rows = compare(folders, judge=name)
        assert [row.point["extractor"]["name"] for row in rows] == [name, name]
        heads, lines = table(rows)
        assert f"fd_{name}" in heads and lines[0][heads.index(f"fd_{name}")] == number(
            read_points(Path(folders[0]) / "points.jsonl")[0]["judges"][name]["metrics"][f"fd_{name}"]
        )
        difference = rows[1].difference
        assert difference is not None and list(rows[1].others) == [{"digits": "other", "other": "digits"}[name]]
        metrics = [row.point["metrics"][f"fd_{name}"] for row in rows]
        assert difference.fd == pytest.approx(metrics[1] - metrics[0], rel=1e-5)
    assert compare(folders)[0].point == compare(folders, judge="digits")[0].point, "the first by default"
    through = compare(folders, judge="other")[1]
    assert through.difference == compare(folders)[1].others["other"]
    bench(tmp_path, *judges["other"], "seed=0")
    rows = compare([str(tmp_path), folders[1]])
    assert [row.point["extractor"]["name"] for row in rows] == ["other", "other"]
    assert rows[1].difference is not None and rows[1].difference.fd == through.difference.fd


def test_points_that_a_judge_did_not_score_are_left_out_and_named(
    folders: list[str], points: dict[str, dict[str, Any]]
):
    alone, said = str(points["digits"]["folder"]), []
    rows = compare([*folders, alone], note=said.append, judge="other")
    assert [row.point["extractor"]["name"] for row in rows] == ["other"] * 2
    assert said == [
        f"1 of 3 points were not scored by other with the same reference and are left out: {alone}",
        "judge='digits' shows 3; index.html shows all judges",
    ]
    with pytest.raises(UsageError, match="judge=nobody scored none of the points: choose one of digits, other$"):
        compare([*folders, alone], judge="nobody")
    assert [row.point["extractor"]["name"] for row in compare([*folders, alone])] == ["digits"] * 2, "the same images"
    said.clear()
    (row,) = compare([alone, str(points["other"]["folder"])], note=said.append)
    assert row.point["extractor"]["name"] == "digits" and "1 of 2 points were not scored by digits" in said[0]


def test_pairs_that_judges_order_differently_are_listed(folders: list[str], tmp_path: Path, capsys: Printed):
    """Only where both differ from zero by two standard errors."""

    def difference(fd: float, se: float) -> Frechet:
        return Frechet(*(torch.tensor(value, dtype=torch.float64) for value in (fd, fd, se)))

    first, row = compare(folders)
    for own, other, opposed in (
        (difference(1, 0.1), difference(-2, 0.3), ["other"]),
        (difference(1, 0.1), difference(2, 0.3), []),
        (difference(1, 0.6), difference(-2, 0.3), []),
        (difference(1, 0.1), difference(-2, 1.1), []),
        (difference(1, float("nan")), difference(-2, 0.3), []),
    ):
        changed = replace(row, difference=own, others={"other": other})
        assert changed.opposed == opposed
        write([first, changed], tmp_path)
        said = "+1 ± 0.1 by digits, -2 ± 0.3 by other" in (tmp_path / "index.html").read_text()
        show([first, changed])
        printed = capsys.readouterr().out
        assert said == bool(opposed) == ("judges disagree on" in printed.replace("\n", " "))
        assert "judge: digits; also scored by other (judge=NAME)" in printed


def test_the_command_takes_a_judge(folders: list[str], tmp_path: Path, capsys: Printed):
    assert main(["compare", *folders, "judge=other", f"out={tmp_path}"]) == 0
    assert "fd_other" in capsys.readouterr().out and "fd_other" in (tmp_path / "table.md").read_text()
    assert main(["compare", *folders, "judge=nobody", f"out={tmp_path}"]) == 2
    assert "judge=nobody" in capsys.readouterr().err


def test_old_points_and_new_ones_make_one_curve(judges: dict[str, list[str]], tmp_path: Path):
    """A folder of one judge goes on with two: what both have is drawn."""
    bench(tmp_path, *judges["other"], "seed=3")
    bench(tmp_path, *judges["both"], "seed=4")
    old, new = read_points(tmp_path / "points.jsonl")
    assert [one["extractor"]["name"] for one in comparable([old, new], old)] == ["other", "other"]
    assert [one["extractor"]["name"] for one in comparable([old, new], new)] == ["digits"]


def test_images_of_any_origin_are_scored_by_all_judges(
    judges: dict[str, list[str]], points: dict[str, dict[str, Any]], tmp_path: Path
):
    assert main(["sample", *BENCH, f"out={tmp_path}"]) == 0
    point = points["both"]
    assert main(["score", str(tmp_path / "images_nfe12"), "digits/dlg", *judges["both"], f"out={tmp_path / 's'}"]) == 0
    (scored,) = read_points(tmp_path / "s" / "points.jsonl")
    assert judges_of(scored) == judges_of(point) == ["digits", "other"]
    for name in judges_of(point):
        own, other = seen_by(scored, name), seen_by(point, name)
        assert own["extractor"] == other["extractor"] and own["reference"] == other["reference"]
        assert own["metrics"] == pytest.approx(other["metrics"], rel=1e-5, abs=1e-9)
        file = features_name(scored["key"], own["extractor"]["sha256"], name == "digits")
        assert np.load(tmp_path / "s" / "features" / file).shape == (130, own["extractor"]["dim"])
    assert main(["score", str(tmp_path / "images_nfe12"), "digits/dlg", *judges["both"], f"out={tmp_path / 's'}"]) == 0
    assert len(read_points(tmp_path / "s" / "points.jsonl")) == 1


def test_a_fit_logs_every_judge_and_keeps_the_best_of_the_first(judges: dict[str, list[str]], tmp_path: Path):
    words = ["training.images=64", "training.batch_size=32", "training.evaluate_every=32", "training.evaluate_n=20"]
    words += ["training.keep_best=5", "n=20", "nfe=5", "precision=32-true", "logger=csv", f"out={tmp_path}"]
    assert main(["fit", "digits/edm", *words, *judges["both"]]) == 0
    (log,) = tmp_path.rglob("metrics.csv")
    heads = log.read_text().splitlines()[0].split(",")
    assert {"eval/nfe_005/fd_digits", "eval/nfe_005/other/fd_other", "eval/nfe_005/other/kid"} <= set(heads)
    assert not any(head.startswith("eval/nfe_005/digits/") for head in heads)
    assert (tmp_path / "best.ckpt").is_file()
    (point,) = read_points(tmp_path / "points.jsonl")
    assert list(point["judges"]) == ["digits", "other"]
