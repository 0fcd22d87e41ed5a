"""Points of several runs side by side: what stands in a row, what makes a pair, what is written, what is refused."""

import csv
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.__main__ import main
from diffaccel.evaluation import BLOCKS, comparable
from diffaccel.metrics import Frechet, paired_difference
from diffaccel.metrics.reference import read_reference
from diffaccel.report import append_point, plot_curve, read_points, sample_grid, title_of, write_curve_csv
from diffaccel.report.page import Shown, data_of
from diffaccel.report.tables import notes as notes_of
from diffaccel.verbs.compare import Row, compare, compare_all, markdown, table

N = 300
RUNS = {
    "first": ["toy/edm", "solver=heun", "nfe=[15,31]"],
    "second": ["toy/edm", "solver=dpmpp2m", "nfe=[31,15]"],
    "a chain": ["toy/dlg", "chains=15", "nfe=15"],
}

pytestmark = pytest.mark.usefixtures("undrawn")
Printed = pytest.CaptureFixture[str]
Bench = Callable[..., Path]


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that name real points, few ones: KID would take longer than the runs."""
    folder = tmp_path_factory.mktemp("statistics")
    words = [f"reference={folder / 'reference.npz'}", f"floor={folder / 'floor.npz'}"]
    assert main(["reference", "toy/edm", "data.n=400", *words]) == 0
    return words


@pytest.fixture(scope="module")
def bench(statistics: list[str]) -> Bench:
    """Measure an experiment into a folder; returns the folder."""

    def run(out: Path, name: str, *words: str) -> Path:
        assert main(["bench", name, f"n={N}", "logger=none", *statistics, *words, f"out={out}"]) == 0
        return out

    return run


@pytest.fixture(scope="module")
def runs(bench: Bench, undrawn: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two solvers that share their noise, and a chain."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: bench(folder / name, *words) for name, words in RUNS.items()}


@pytest.fixture
def refused(capsys: Printed) -> Callable[..., str]:
    """Run words that must fail: status 2, one line on stderr, nothing else."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main(["compare", *(str(word) for word in words)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("diffaccel: ") and printed.err.count("\n") == 1, printed.err
        assert "Traceback" not in printed.err and printed.out == ""
        return printed.err

    return run


def points_of(folder: Path) -> dict[float, dict[str, Any]]:
    """By budget."""
    return {point["nfe_budget"]: point for point in read_points(folder / "points.jsonl")}


def features_of(folder: Path, point: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / "features" / f"{point['key']}.npy"))


def edited(folder: Path, out: Path, **changes: Any) -> Path:
    """The points of a folder, changed, in another one."""
    for point in read_points(folder / "points.jsonl"):
        append_point(out / "points.jsonl", {**point, **changes})
    return out


def without_blocks(folder: Path, out: Path | None = None) -> Path:
    """A run, or a copy of it, whose points lack the distances of blocks, as those of older versions."""
    points = read_points(folder / "points.jsonl")
    if out is not None:
        folder = Path(shutil.copytree(folder, out))
    (folder / "points.jsonl").unlink()
    for point in points:
        append_point(folder / "points.jsonl", {key: value for key, value in point.items() if key != "jackknife"})
    return folder


def numbers(difference: Frechet) -> torch.Tensor:
    return torch.tensor([float(value) for value in difference], dtype=torch.float64)


def only(rows: list[Row], folder: Path) -> Row:
    (row,) = (row for row in rows if row.folder == folder)
    return row


# Rows


def test_rows_go_by_source_and_budget(runs: dict[str, Path]):
    for order in (["first", "second", "a chain"], ["second", "first"], ["first", "a chain", "second"]):
        rows = compare([str(runs[name]) for name in order])
        budgets = {"first": [15, 31], "second": [15, 31], "a chain": [15]}
        expected = [(runs[name], budget) for name in order for budget in budgets[name]]
        assert [(row.folder, row.point["nfe_budget"]) for row in rows] == expected
    assert compare([str(runs["first"] / "points.jsonl")]) == compare([str(runs["first"])]), "a file is a source too"
    assert compare([str(runs["first"]), f"{runs['first']}/"]) == compare([str(runs["first"])]), "the same one twice"


def test_the_table_is_printed_and_says_what_a_difference_is(runs: dict[str, Path], tmp_path: Path, capsys: Printed):
    sources = [str(runs["first"]), str(runs["second"])]
    capsys.readouterr()
    assert main(["compare", *sources, f"out={tmp_path}"]) == 0
    printed = capsys.readouterr()
    heads, lines = table(compare(sources))
    shown = [line.split() for line in printed.out.splitlines() if line.strip().startswith("edm (")]
    assert len(shown) == len(lines) == 4
    for words, line in zip(shown, lines, strict=True):
        cells = dict(zip(heads, line, strict=True))
        assert words[-2:] == [cells["difference"], cells["its se"]]
        assert words[2:4] == [cells["budget"], cells["nfe"]]
    assert f"minus that of the first row of {runs['first']}" in printed.out and "floor: 300 held-out" in printed.out
    assert printed.err == "" and printed.out.rstrip().endswith(str(tmp_path))


def test_recall_of_other_numbers_of_images_is_pointed_out(runs: dict[str, Path], tmp_path: Path, capsys: Printed):
    """It depends on the number, also where both points have the same n: features of the floor may be fewer."""
    few = edited(runs["second"], tmp_path / "few", neighbourhoods=20)
    for other, said in ((runs["second"], False), (few, True)):
        assert main(["compare", str(runs["first"]), str(other), f"out={tmp_path / 'out'}"]) == 0
        assert ("recall, density and coverage are of 20 or" in capsys.readouterr().out.replace("\n", " ")) == said


def test_a_point_measured_again_shows_once_the_last(bench: Bench, tmp_path: Path):
    for words in ([], ["again=true"]):
        bench(tmp_path, "toy/edm", "nfe=[4,6]", *words)
    points = read_points(tmp_path / "points.jsonl")
    assert len(points) == 4
    rows = compare([str(tmp_path)])
    assert [row.point for row in rows] == points[2:]
    assert rows[0].point["seconds_per_image"] != points[0]["seconds_per_image"]


# Pairs


@pytest.mark.parametrize("stored", [True, False], ids=["blocks", "features"])
def test_the_difference_is_that_of_the_kept_features(
    stored: bool, runs: dict[str, Path], statistics: list[str], tmp_path: Path
):
    """Second less first, with an error that the common noise has made smaller; from points alone to rounding."""
    reference = read_reference(statistics[0].removeprefix("reference=")).moments
    first, second = points_of(runs["first"]), points_of(runs["second"])
    folders = [runs[name] if stored else without_blocks(runs[name], tmp_path / name) for name in ("first", "second")]
    rows = compare([str(folder) for folder in folders])
    assert [row.difference for row in rows[:2]] == [None, None]
    for row, budget in zip(rows[2:], (15, 31), strict=True):
        features = features_of(runs["second"], second[budget]), features_of(runs["first"], first[budget])
        expected = numbers(paired_difference(*features, torch.arange(N) % BLOCKS, reference))
        rounding = {"rtol": 1e-9, "atol": 1e-11} if stored else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(numbers(row.difference), expected, **rounding)
        metrics = [point[budget]["metrics"] for point in (second, first)]
        for value, name in zip(row.difference, ("fd_identity", "fd_identity_inf"), strict=False):
            assert value.item() == pytest.approx(metrics[0][name] - metrics[1][name], rel=1e-6, abs=1e-9)
        assert row.difference.se < np.hypot(*(each["fd_identity_se"] for each in metrics)) / 2


def test_points_alone_give_the_differences(runs: dict[str, Path], tmp_path: Path):
    """What is shipped of a run is points.jsonl: no features, no configuration, no reference."""
    shipped = [edited(runs[name], tmp_path / name) for name in ("first", "second")]
    assert all([file.name for file in folder.iterdir()] == ["points.jsonl"] for folder in shipped)
    whole, alone = (compare([str(one) for one in each]) for each in ([runs["first"], runs["second"]], shipped))
    for row, other in zip(whole, alone, strict=True):
        assert row.difference == other.difference
    assert sum(row.difference is not None for row in alone) == 2


def test_the_other_way_round_it_has_the_other_sign(runs: dict[str, Path]):
    there = compare([str(runs["first"]), str(runs["second"])])[2:]
    back = compare([str(runs["second"]), str(runs["first"])])[2:]
    for row, other in zip(there, back, strict=True):
        assert row.point["nfe_budget"] == other.point["nfe_budget"]
        assert row.difference.fd == -other.difference.fd != 0
        assert row.difference.se == pytest.approx(other.difference.se.item(), rel=1e-9)


@pytest.mark.parametrize("other", ["nfe=17", "n=301", "seed=1"])
def test_pairs_have_equal_budget_number_and_seed(other: str, runs: dict[str, Path], bench: Bench, tmp_path: Path):
    words = ["toy/edm", "solver=dpmpp2m", "nfe=15"]
    assert only(compare([str(runs["first"]), str(bench(tmp_path / "same", *words))]), tmp_path / "same").difference
    rows = compare([str(runs["first"]), str(bench(tmp_path / "other", *words, other))])
    assert only(rows, tmp_path / "other").difference is None
    heads, lines = table(rows)
    assert lines[-1][heads.index("difference")] == lines[-1][heads.index("its se")] == "-"


def test_the_pair_is_the_first_measured(bench: Bench, runs: dict[str, Path], tmp_path: Path):
    """Runs of one experiment share a folder unless told otherwise."""
    for solver in ("heun", "ddim", "dpm2"):
        bench(tmp_path, "toy/edm", "nfe=15", f"solver={solver}")
    rows = compare([str(tmp_path), str(runs["second"])])
    assert [row.point["solver"] for row in rows[:3]] == ["heun", "ddim", "dpm2"]
    pairs = [row for row in rows if row.point["nfe_budget"] == 15]
    assert len(pairs) == 4 and pairs[0].difference is None
    fds = [row.point["metrics"]["fd_identity"] for row in pairs]
    for row, fd in zip(pairs[1:], fds[1:], strict=True):
        assert row.difference is not None
        assert row.difference.fd.item() == pytest.approx(fd - fds[0], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("without", ["first", "second"])
def test_neither_blocks_nor_features_no_difference(without: str, runs: dict[str, Path], tmp_path: Path):
    folder = without_blocks(runs[without], tmp_path / "run")
    shutil.rmtree(folder / "features")
    sources = {**runs, without: folder}
    words = [str(sources[name]) for name in ("first", "second")]
    assert main(["compare", *words, f"out={tmp_path / 'out'}"]) == 0
    notes: list[str] = []
    heads, lines = table(compare(words, note=notes.append))
    assert {line[heads.index(head)] for line in lines for head in ("difference", "its se")} == {"-"}
    assert len(notes) == 1 and notes[0].startswith("2 differences are not shown"), notes


def test_chains_of_other_blocks_without_features_say_why(bench: Bench, runs: dict[str, Path], tmp_path: Path):
    chain = bench(tmp_path / "chain", "toy/dlg", "chains=15", "nfe=15", "keep_features=false")
    notes: list[str] = []
    sources = [str(runs["first"]), str(chain)]
    assert only(compare(sources, note=notes.append), chain).difference is None
    (said,) = notes
    assert "1 difference is not shown" in said and "multiples of ten" in said and "keep_features=true" in said
    notes.clear()
    assert only(compare([str(runs["first"]), str(runs["a chain"])], note=notes.append), runs["a chain"]).difference
    assert notes == []


@pytest.mark.parametrize("change", ["noise", "samples"])
def test_the_page_pairs_what_the_table_pairs(change: str, runs: dict[str, Path], tmp_path: Path):
    """Neither images of unknown noise nor those with other numbers of samples of a condition are pairs."""
    changes = {"noise": {"noise": "unknown"}, "samples": {"configuration": {"condition": {"samples": 4}}}}[change]
    folders = [edited(runs["first"], tmp_path / "first"), edited(runs["second"], tmp_path / "second")]
    page = data_of("", [Shown("identity", compare([str(folder) for folder in folders]))])
    pairs = [point["pair"] for point in page["views"][0]["points"]]
    assert pairs[:2] == pairs[2:] and None not in pairs
    changed = [edited(folder, tmp_path / f"changed {folder.name}", **changes) for folder in folders]
    rows = compare([str(changed[0] if change == "noise" else folders[0]), str(changed[1])])
    pairs = [point["pair"] for point in data_of("", [Shown("identity", rows)])["views"][0]["points"]]
    assert [row.difference for row in rows] == [None] * 4 and not {*pairs[:2]} & {*pairs[2:]} - {None}


def test_damaged_blocks_are_no_blocks(runs: dict[str, Path], tmp_path: Path):
    good = read_points(runs["first"] / "points.jsonl")[0]["jackknife"]
    damaged: list[Any] = [3, {}, {**good, "kept": good["kept"][:3]}, {**good, "sizes": [0] * 10}, {"kept": ["x"] * 10}]
    damaged += [{**good, "kept": [[1.0]] * 10}, {**good, "kept": [1e999] * 10}, {**good, "halves": [1.0]}]
    for number, record in enumerate(damaged):
        folder = edited(runs["first"], tmp_path / f"{number}", jackknife=record)
        rows = compare([str(runs["second"]), str(folder)])
        assert [row.difference for row in rows] == [None] * 4, record


@pytest.mark.parametrize(
    ("chains", "blocks"),
    [((None, 15), 10), ((15, None), 10), ((20, 30), 10), ((15, 20), 5), ((12, 12), 10)],
    ids=str,
)
def test_a_block_holds_whole_chains_of_both(
    chains: tuple[int | None, int | None], blocks: int, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[torch.Tensor] = []

    def spy(a: torch.Tensor, b: torch.Tensor, block: torch.Tensor, *rest: Any) -> Frechet:
        seen.append(block)
        return paired_difference(a, b, block, *rest)

    monkeypatch.setattr("diffaccel.metrics.paired_difference", spy)
    folders = []
    for count, solver in zip(chains, ("dpmpp2m", "heun"), strict=True):
        words = ["toy/dlg", f"chains={count}"] if count else ["toy/edm"]
        folders.append(bench(tmp_path / solver, *words, f"solver={solver}", "nfe=30", "n=120"))
    from_points = compare([str(folder) for folder in folders])[-1]
    alike = chains in ((20, 30), (12, 12))  # the blocks of both points are the same
    assert len(seen) == (0 if alike else 1)
    seen.clear()
    row = compare([str(without_blocks(folder, tmp_path / f"{folder.name}_old")) for folder in folders])[-1]
    (block,) = seen
    assert block.shape == (120,) and len(block.unique()) == blocks
    for count in filter(None, chains):
        whole = [set(block[chain::count].tolist()) for chain in range(count)]
        assert all(len(found) == 1 for found in whole), f"a chain of {count} lies in several blocks"
    assert row.difference.se > 0
    torch.testing.assert_close(numbers(from_points.difference), numbers(row.difference), rtol=1e-8, atol=1e-11)


def test_chains_with_nothing_in_common_have_a_difference_without_an_error(bench: Bench, tmp_path: Path):
    """Of 7 and 8 chains all images are linked with one another."""
    folders = [str(bench(tmp_path / f"{count}", "toy/dlg", f"chains={count}", "nfe=15")) for count in (7, 8)]
    rows = compare(folders)
    heads, lines = table(rows)
    assert rows[1].difference.fd.isfinite()
    assert lines[1][heads.index("difference")] != "-" and lines[1][heads.index("its se")] == "-"


# Files


class Page(HTMLParser):
    """The contents of a page, its tags, and whatever it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.policy = ""
        self.data: dict[str, Any] = {}
        self._in_data = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]
        self._in_data = tag == "script" and ("id", "data") in attrs
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = str(dict(attrs)["content"])

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data, self._in_data = json.loads(data), False

    @property
    def view(self) -> dict[str, Any]:
        """What the first judge sees."""
        return self.data["views"][0]

    @property
    def labels(self) -> list[str]:
        """Label of each point."""
        return [self.view["curves"][point["curve"]]["label"] for point in self.view["points"]]

    @property
    def cells(self) -> list[tuple[str, float]]:
        """Labels and budgets of the strip."""
        return [(label, budget) for label, budget, _ in self.view["strip"]["cells"]]


def draw(path: Path, n: int = N) -> None:
    """A sample grid as a bench leaves it beside a point."""
    sample_grid(torch.randint(256, (min(n, 64), 1, 8, 8), dtype=torch.uint8), path)


def test_the_files_hold_the_table(runs: dict[str, Path], tmp_path: Path):
    sources = [str(folder) for folder in runs.values()]
    assert main(["compare", *sources, f"out={tmp_path / 'a' / 'new folder'}"]) == 0
    (out,) = (tmp_path / "a").iterdir()
    assert {file.name for file in out.iterdir()} == {
        *("compare.csv", "table.md", "curve.png", "curve_dark.png", "index.html")
    }
    heads, lines = table(rows := compare(sources))
    with (out / "compare.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [heads, *(["" if cell == "-" else cell for cell in line] for line in lines)]
    with Image.open(out / "curve.png") as light, Image.open(out / "curve_dark.png") as dark:
        assert min(light.size) > 100 and light.getpixel((0, 0))[:3] == (255, 255, 255)
        assert max(dark.getpixel((0, 0))[:3]) < 30
    page = Page(out / "index.html")
    assert page.labels == [row.label for row in rows]
    for point, row in zip(page.view["points"], rows, strict=True):
        assert point["metrics"] == row.point["metrics"] and point["nfe"] == row.point["nfe"]
        assert point["difference"] == (row.difference and [float(row.difference.fd), float(row.difference.se)])
    first, *_, floor = (out / "table.md").read_text().splitlines()[2:]
    points = {budget: point["metrics"] for budget, point in points_of(runs["first"]).items()}
    said = [f"{points[budget]['fd_identity']:.4g} ± {points[budget]['fd_identity_se']:.2g}" for budget in (15, 31)]
    assert first.split(" | ")[1:] == [said[0], f"{said[1]} |"] and first.startswith("| edm (heun, gaussian)")
    assert (
        floor.startswith("| 300 held-out real images | ") and floor.count(f"{points[15]['fd_identity_floor']:.2g}") == 2
    )


def test_the_page_needs_no_other_file(runs: dict[str, Path], tmp_path: Path):
    pictures = [runs["first"] / "samples_nfe15.png", runs["a chain"] / "samples_nfe15.png"]
    for picture in pictures:
        draw(picture)
    try:
        assert main(["compare", *(str(folder) for folder in runs.values()), f"out={tmp_path}"]) == 0
    finally:
        for picture in pictures:
            picture.unlink()
    page = Page(tmp_path / "index.html")
    assert page.fetched == ["data:,"], "an icon, which browsers would otherwise ask for"
    assert "default-src 'none'" in page.policy and "'unsafe-eval'" not in page.policy
    assert page.policy.count("sha256-") == 2 and "script-src 'unsafe-inline'" not in page.policy
    assert len(page.data["pictures"]) == 2
    assert all(address.startswith("data:image/webp;base64,") for address in page.data["pictures"])
    assert page.tags.count("script") == 3 and not set(page.tags) & {"iframe", "object", "base", "img"}
    assert page.cells == [("edm (heun, gaussian)", 15), ("dlg (dpmpp2m, chain)", 15)]
    assert page.view["strip"]["title"] == "samples 0 to 3 of seed 0: the same noise in all cells"
    assert (tmp_path / "strip.png").is_file() and (tmp_path / "strip_dark.png").is_file()


def test_a_grid_stands_beside_the_point_that_drew_it(bench: Bench, tmp_path: Path):
    """Two solvers at one budget in one folder: the second has overwritten the first one's grid."""
    for solver in ("ddim", "heun"):
        bench(tmp_path, "toy/edm", "nfe=7", f"solver={solver}")
    draw(tmp_path / "samples_nfe7.png")
    assert main(["compare", str(tmp_path), f"out={tmp_path / 'out'}"]) == 0
    assert Page(tmp_path / "out" / "index.html").cells == [("edm (heun)", 7)]


def test_the_page_escapes_what_it_is_given(runs: dict[str, Path], tmp_path: Path):
    label = "</script><script>alert('&')</script><i>"
    folder = edited(runs["first"], tmp_path / "run", solver=label, data='"<i>')
    draw(folder / "samples_nfe15.png")
    assert main(["compare", str(folder), f"out={tmp_path / 'out'}"]) == 0
    page = Page(tmp_path / "out" / "index.html")
    assert page.tags.count("script") == 3 and "i" not in page.tags
    (shown,) = set(page.labels)
    assert shown.startswith("edm (</script><script>")
    assert page.data["title"] == '"<i>: ' + read_points(folder / "points.jsonl")[0]["reference"]["name"]
    assert page.cells == [(shown, 15)]


# Curves, and lines that lack something


def test_settings_are_curves_of_their_own_and_seeds_are_not(bench: Bench, tmp_path: Path):
    """One folder and several, the same settings with two seeds, and one in a folder of its own."""
    for eta in (0, 1):
        bench(tmp_path / "run", "toy/edm", "solver=ddim", f"solver.eta={eta}", "nfe=[4,6]", "keep_features=false")
    bench(tmp_path / "seed", "toy/edm", "solver=ddim", "solver.eta=1", "nfe=4", "seed=1")
    rows = compare([str(tmp_path / "run"), str(tmp_path / "seed")])
    assert [row.label for row in rows] == ["edm (eta=0)"] * 2 + ["edm (eta=1)"] * 3
    lines = markdown(rows).splitlines()
    assert len(lines) == 5
    first, second = (row.point["metrics"] for row in rows if row.label == "edm (eta=1)" and row.point["nfe"] == 4)
    mean = (first["fd_identity"] + second["fd_identity"]) / 2
    between = abs(first["fd_identity"] - second["fd_identity"]) / 2
    within = np.hypot(first["fd_identity_se"], second["fd_identity_se"]) / 2
    assert lines[3].split(" | ")[1] == f"{mean:.4g} ± {between:.2g} (2 seeds, within ± {within:.2g})"


def test_settings_of_the_process_are_told_apart(bench: Bench, tmp_path: Path):
    for sigma in (80, 40):
        bench(
            tmp_path / "run",
            "toy/edm",
            "nfe=5",
            f"process.sigma_max={sigma}",
            "keep_features=false",
        )
    assert len({row.label for row in compare([str(tmp_path / "run")])}) == 2


def broken(folder: Path, out: Path) -> Path:
    """A file as an older version or an editor leaves it: only the first line is whole."""
    whole, *_ = read_points(folder / "points.jsonl")
    lines: list[dict[str, Any]] = [
        whole,
        {key: value for key, value in whole.items() if key not in ("settings", "configuration", "seed", "prior")},
        {**whole, "metrics": None},
        {**whole, "metrics": {"fd_identity": "2.5"}, "key": "1"},
        {**whole, "nfe": "15", "seed": 3, "images_sha256": None},
        {"method": "old", "metrics": {"fd_identity": 3.0}, "nfe": 9, "extractor": {"name": "identity"}},
        {},
        {**whole, "settings": [[[]]], "extractor": 3, "reference": None, "floor": "x", "n": [], "chains": {}},
        {**whole, "metrics": {"fd_identity": [[{}]], "kid": True}, "seed": -1e308, "nfe_budget": "many"},
    ]
    for line in lines:
        append_point(out / "points.jsonl", line)
    return out


def test_lines_that_lack_something_are_shown_as_far_as_they_go(runs: dict[str, Path], tmp_path: Path, capsys: Printed):
    folder = broken(runs["first"], tmp_path / "old")
    capsys.readouterr()
    assert main(["compare", str(runs["second"]), str(folder), f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr()
    assert "of 11 points lack fd_identity or nfe: not drawn" in printed.err
    assert "shown without them" in printed.err and "old" in printed.out
    page = Page(tmp_path / "out" / "index.html")
    drawn = zip(page.labels, page.view["points"], strict=True)
    assert any(label.startswith("old") and point["metrics"] == {"fd_identity": 3.0} for label, point in drawn)


def test_a_bench_appends_to_lines_that_lack_something(
    runs: dict[str, Path], statistics: list[str], tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
):
    folder = broken(runs["first"], tmp_path / "old")
    capsys.readouterr()
    assert (
        main(["bench", "toy/edm", f"n={N}", "logger=none", *statistics, "solver=heun", "nfe=[15,20]", f"out={folder}"])
        == 0
    )
    printed = capsys.readouterr()
    assert "points lack fd_identity or nfe: not drawn" in printed.err
    points = read_points(folder / "points.jsonl")
    assert len(points) == 10, "the whole line is not measured again"
    chosen = comparable(points, points[-1])  # as the bench's own drawing, which these tests leave out
    write_curve_csv(chosen, tmp_path / "curve.csv")
    plot_curve(chosen, tmp_path / "curve.png", title_of(chosen))
    assert len(chosen) >= 5


def test_text_of_files_stays_text(runs: dict[str, Path], tmp_path: Path, capsys: Printed):
    """Names that a terminal, a spreadsheet, Markdown, rich or matplotlib would take for their own."""
    names = [
        "=2+3|x",
        "[red]a[/red]",
        "$x_{$",
        "\x1b[31mred\x07",
        "\u202eright",
        "_hidden",
        "a`b*c",
        "\ud800",
        ":smile:",
    ]
    for number, name in enumerate(names):
        edited(runs["first"], tmp_path / "run", method=name, data="$[bold]^{", key=f"{number}", images_sha256=None)
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "run"), f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert not set(printed) & set("\x1b\x07\u202e\ud800") and "\\x1b[31mred\\x07" in printed
    assert all(name in printed for name in ("[red]a[/red]", "$x_{$", "_hidden", ":smile:"))
    with (tmp_path / "out" / "compare.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert all(cell[:1] not in ("=", "+", "-", "@") or float(cell) is not None for cell in cells)
    assert any(cell.startswith("'=2+3|x") for cell in cells)
    lines = (tmp_path / "out" / "table.md").read_text(encoding="utf-8").splitlines()
    assert all(line.replace("\\|", "").count("|") == lines[0].count("|") for line in lines)


# Mistakes


@pytest.mark.parametrize("kind", ["extractor", "reference"])
def test_points_that_were_scored_otherwise_are_left_out_and_named(
    kind: str, runs: dict[str, Path], tmp_path: Path, capsys: Printed
):
    """They are not mixed; the page shows them as another judge's."""
    (first, *_) = read_points(runs["first"] / "points.jsonl")
    change = {"extractor": {"name": "inception", "sha256": "1" * 64}, "reference": {"sha256": "2" * 64}}[kind]
    folder = edited(runs["first"], tmp_path / "other", **{kind: {**first[kind], **change}})
    sources = [str(runs["first"]), str(folder), str(runs["second"])]
    capsys.readouterr()
    assert main(["compare", *sources, f"out={tmp_path / 'out'}"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 6 points were not scored by identity" in said and str(folder) in said
    assert [row.folder for row in compare(sources)] == [runs["first"]] * 2 + [runs["second"]] * 2
    names = [view["judge"] for view in Page(tmp_path / "out" / "index.html").data["views"]]
    hashes = first["reference"]["sha256"][:8], "2" * 8
    assert names == {"extractor": ["identity", "inception"], "reference": [f"identity {one}" for one in hashes]}[kind]
    assert [row.folder for row in compare(sources, judge=names[1])] == [folder] * 2


def test_the_last_reference_in_a_folder_is_shown(runs: dict[str, Path], tmp_path: Path):
    """Points that were measured before the statistics were computed again are not the present ones."""
    points = read_points(runs["first"] / "points.jsonl")
    stale = [{**one, "key": "0" * 16, "reference": {**one["reference"], "sha256": "2" * 64}} for one in points]
    (tmp_path / "both").mkdir()
    lines = "".join(json.dumps(one) + "\n" for one in [*stale, *points])
    (tmp_path / "both" / "points.jsonl").write_text(lines)
    assert [row.point["key"] for row in compare([str(tmp_path / "both")])] == [one["key"] for one in points]
    other = edited(runs["first"], tmp_path / "other", reference={**points[0]["reference"], "sha256": "3" * 64})
    assert {row.folder for row in compare([str(runs["first"]), str(other)])} == {runs["first"]}, "the baseline"


def test_folders_below_a_source_are_read_too(runs: dict[str, Path], tmp_path: Path):
    deep = [
        edited(runs[name], tmp_path / where) for name, where in (("first", "b/c"), ("second", "a"), ("a chain", "b"))
    ]
    edited(runs["first"], tmp_path / "features" / "run")  # a run's own folders are not searched
    expected = [deep[1]] * 2 + [deep[2]] + [deep[0]] * 2
    assert [row.folder for row in compare([str(tmp_path)])] == expected
    assert [row.folder for row in compare([str(tmp_path / "b"), str(tmp_path)])] == [*expected[2:], *expected[:2]]


def test_names_of_sources_replace_methods_in_labels(
    runs: dict[str, Path], bench: Bench, tmp_path: Path, refused: Callable[..., str]
):
    both = bench(tmp_path / "both", "toy/edm", "solver=ddim", "nfe=[4,15]")
    bench(both, "toy/edm", "solver=dpm2", "nfe=15")
    sources = [str(runs["first"]), str(both), str(runs["second"])]
    labels = [row.label for row in compare(sources, names=["mine, new", "", "theirs"])]
    assert labels == ["mine, new"] * 2 + ["edm (ddim)"] * 2 + ["edm (dpm2)"] + ["theirs"] * 2
    labels = [row.label for row in compare(sources, names=["one", "one", "one"])]
    assert labels == ["one (heun)"] * 2 + ["one (ddim)"] * 2 + ["one (dpm2)"] + ["one (dpmpp2m)"] * 2
    assert main(["compare", *sources, "label=first,,last one", f"out={tmp_path / 'out'}"]) == 0
    assert {"first", "edm (ddim)", "last one"} < set(Page(tmp_path / "out" / "index.html").labels)
    assert "2 names for 3 folders" in refused(*sources, "label=a,b", f"out={tmp_path / 'out'}")


def test_the_cost_of_the_picture_is_chosen(runs: dict[str, Path], tmp_path: Path, refused: Callable[..., str]):
    for cost in ("seconds", "gflops", "nfe_equivalent"):
        assert main(["compare", str(runs["first"]), f"x={cost}", f"out={tmp_path / cost}"]) == 0
        assert Page(tmp_path / cost / "index.html").data["x"] == cost
    pictures = [(tmp_path / cost / "curve.png").read_bytes() for cost in ("seconds", "gflops", "nfe_equivalent")]
    assert len(set(pictures)) == 3
    assert "did you mean 'seconds'" in refused(runs["first"], "x=second", f"out={tmp_path / 'out'}")


def test_denoisers_of_other_sizes_are_noted(runs: dict[str, Path], tmp_path: Path):
    points = read_points(runs["second"] / "points.jsonl")
    other = edited(runs["second"], tmp_path / "other", nfe_equivalent=points[0]["nfe_equivalent"] / 2)
    for source, expected in ((runs["second"], 0), (other, 1)):
        notes: list[str] = []
        found = compare_all([str(runs["first"]), str(source)], note=notes.append, x="nfe_equivalent")
        assert len([said for said in notes if "x=gflops" in said]) == expected
        view = data_of("", [Shown("identity", found.rows)])["views"][0]
        assert len([said for said in view["notes"] if "x=gflops" in said]) == expected
        compare_all([str(runs["first"]), str(source)], note=notes.append, x="gflops")
        assert len([said for said in notes if "x=gflops" in said]) == expected, "only where it is the cost"


def test_the_floor_is_one_everywhere_or_nowhere(runs: dict[str, Path], tmp_path: Path):
    """The distance of real images depends on their number: figures of several numbers have none in common."""
    rows = compare([str(runs["first"]), str(runs["second"])])
    label, value = "300 held-out real images", rows[0].point["metrics"]["fd_identity_floor"]
    assert data_of("", [Shown("identity", rows)])["views"][0]["floor"] == {"label": label, "value": value}
    (line,) = (said for said in notes_of(rows) if said.startswith("floor"))
    before, _, after = line.partition("; other metrics of held-out images: ")
    assert before == f"floor: {label} are at fd_identity {value:.4g}" and "recall" in after and "300" not in after
    other = edited(runs["second"], tmp_path / "other", n=100, floor={"n": 100, "sha256": "a"})
    rows = compare([str(runs["first"]), str(other)])
    assert data_of("", [Shown("identity", rows)])["views"][0]["floor"] is None
    assert "real images" not in markdown(rows) + "".join(notes_of(rows))


def test_shipped_results_are_compared_in_one_command(tmp_path: Path, capsys: Printed):
    """Folders within folders, several judges, and points of two versions, whose noise differs."""
    results = Path(__file__).parents[1] / "experiments" / "cifar10_small" / "results"
    sources = [str(folder) for folder in sorted(results.iterdir())]
    assert main(["compare", *sources, f"out={tmp_path}"]) == 0
    files = list(results.glob("**/points.jsonl"))
    page = Page(tmp_path / "index.html")
    found = [line for file in files for line in read_points(file)]
    shown = {point["card"] for view in page.data["views"] for point in view["points"]}
    repeated = len(found) - len({point["images_sha256"] + json.dumps(point["extractor"]) for point in found})
    assert (
        len(page.data["views"]) > 1 and sum(len(view["points"]) for view in page.data["views"]) >= len(found) - repeated
    )
    assert shown == set(page.data["cards"])
    assert (tmp_path / "index.html").stat().st_size < 5_000_000
    for view in page.data["views"]:
        labels = [curve["label"] for curve in view["curves"]]
        assert len(set(labels)) == len(labels)
        settings: dict[Any, set[str]] = {}
        for point in view["points"]:
            card = page.data["cards"][point["card"]]
            sampling = dict(dict(card["sections"])["sampling"])
            if "settings" not in sampling:  # not tuned: one setting a curve
                own = json.dumps([sampling.get(key) for key in ("method", "solver", "prior", "noise", "images")])
                settings.setdefault(point["curve"], set()).add(own)
        assert all(len(found) == 1 for found in settings.values())
        assert all(("tuned" in curve["label"]) == curve["tuned"] for curve in view["curves"])


@pytest.mark.parametrize("change", ["changed", "missing", "damaged"])
def test_without_the_reference_all_but_the_differences_is_shown(
    change: str, tmp_path: Path, bench: Bench, capsys: Printed
):
    file = tmp_path / "reference.npz"
    assert main(["reference", "toy/edm", "data.n=100", f"reference={file}", "floor="]) == 0
    words = ["toy/edm", f"reference={file}", "floor=", "nfe=8"]
    folders = [without_blocks(bench(tmp_path / solver, *words, f"solver={solver}")) for solver in ("ddim", "dpmpp2m")]
    (tmp_path / "kept.npz").write_bytes(file.read_bytes())
    with_differences = compare([str(folder) for folder in folders])
    if change == "changed":
        assert main(["reference", "toy/edm", "data.n=101", f"reference={file}", "floor=", "again=true"]) == 0
    elif change == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:200])
    capsys.readouterr()
    assert main(["compare", *map(str, folders), f"out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file) in said and "reference=" in said, said
    assert len(Page(tmp_path / "out" / "index.html").view["points"]) == 2
    again = compare([str(folder) for folder in folders], reference=str(tmp_path / "kept.npz"))
    assert [row.label for row in again] == ["edm (ddim)", "edm (dpmpp2m)"]
    assert again[1].difference.fd == with_differences[1].difference.fd


def test_a_moved_run_shows_its_points_and_differences(
    bench: Bench, runs: dict[str, Path], tmp_path: Path, capsys: Printed
):
    """Its configuration's paths lead nowhere; that of the run beside it leads to the same reference."""
    without_blocks(bench(tmp_path / "before", *RUNS["second"]))
    Image.new("L", (4, 4)).save(tmp_path / "before" / "samples_nfe15.png")
    moved = (tmp_path / "before").rename(tmp_path / "somewhere else")
    config = moved / "config.yaml"
    lines = [
        "reference: gone.npz" if line.startswith("reference:") else line for line in config.read_text().splitlines()
    ]
    config.write_text("\n".join(lines))
    rows = compare([str(runs["first"]), str(moved)])
    assert [row.difference is not None for row in rows] == [False, False, True, True] and rows[2].grid is not None
    (tmp_path / "too").mkdir()
    config.rename(tmp_path / "config.yaml")
    without_blocks(bench(tmp_path / "too", "toy/edm", "solver=ddim", "nfe=15"))
    (tmp_path / "too" / "config.yaml").unlink()
    capsys.readouterr()
    assert main(["compare", str(moved), str(tmp_path / "too"), f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr()
    assert f"{moved / 'config.yaml'} does not exist" in printed.err or "config.yaml does not exist" in printed.err
    assert printed.err.count("\n") == 1 and "edm (ddim)" in printed.out and (tmp_path / "out" / "curve.png").is_file()


def test_a_reference_of_other_points_is_refused(runs: dict[str, Path], tmp_path: Path, refused: Callable[..., str]):
    other = tmp_path / "other.npz"
    assert main(["reference", "toy/edm", "data.n=90", f"reference={other}", "floor="]) == 0
    assert str(other) in refused(runs["first"], runs["second"], f"reference={other}", f"out={tmp_path / 'out'}")


def test_damaged_features_are_named(bench: Bench, runs: dict[str, Path], tmp_path: Path, capsys: Printed):
    without_blocks(bench(tmp_path, *RUNS["second"]))
    file = tmp_path / "features" / f"{points_of(tmp_path)[15]['key']}.npy"
    file.write_bytes(file.read_bytes()[:100])
    capsys.readouterr()
    assert main(["compare", str(runs["first"]), str(tmp_path), f"out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file) in said
    rows = compare([str(runs["first"]), str(tmp_path)])
    assert [row.difference is not None for row in rows] == [False, False, False, True]


def test_mistakes_are_one_line(runs: dict[str, Path], tmp_path: Path, refused: Callable[..., str]):
    assert "requires folders of runs" in refused()
    assert "requires folders of runs" in refused(f"out={tmp_path}")
    assert str(tmp_path / "nowhere") in refused(runs["first"], tmp_path / "nowhere")
    error = refused(runs["first"], "otu=here")
    assert "'otu'" in error and "did you mean 'out'" in error
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "points.jsonl").touch()
    assert str(tmp_path / "empty") in refused(tmp_path / "empty", f"out={tmp_path / 'out'}")
    (tmp_path / "file").touch()
    assert "can't be written" in refused(runs["first"], f"out={tmp_path / 'file' / 'out'}")
