"""The page of a comparison in Chromium: what it shows, sorts and hides, and that nothing leaves it."""

import csv
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, chromium

from diffaccel.__main__ import main
from diffaccel.jackknife import Resampled
from diffaccel.report import append_point, sample_grid
from diffaccel.text.terminal import number
from diffaccel.verbs.compare import compare

HOSTILE = "<img src=x onerror=hacked=1><b>"
"""Not longer than a label shows of a name."""
METHODS = ("edm", "tdpm", HOSTILE, "dlg")
SOLVERS = ("heun", "ddim", "ipndm", "unipc2", "dpmpp2m")
BUDGETS = (2, 4, 5, 8, 10, 15, 20, 30, 50)
BLOCK = 500
COLUMN = BUDGETS.index(10) + 1
"""Column of budget 10 in the table."""


def made(method: str, solver: str, nfe: int, seed: int = 0, offset: float = 0.0) -> dict[str, Any]:
    """A point under common noise: blocks of every method share their fluctuation, up to a smaller one of their own."""
    common = np.random.default_rng(nfe)
    own = np.random.default_rng([nfe, seed, METHODS.index(method), SOLVERS.index(solver)])
    full = 1 + 8 / nfe + 0.3 * METHODS.index(method) + 0.01 * SOLVERS.index(solver) + offset
    kept = full + 0.01 * common.standard_normal(10) + 0.002 * own.standard_normal(10)
    parts = Resampled(np.float64(full), kept, np.full(10, float(BLOCK)), kept[:0], kept[:0])
    metrics = {"fd_a": full, "fd_a_inf": full - 0.01, "fd_a_se": float(parts.extrapolated().se), "recall": 0.5}
    metrics["fd_a_floor"] = 0.25
    chain = {"chains": 100, "metrics": {**metrics, "coverage": 0.4, "effective_n": 812.0, "near_repeats": 0.031}}
    point = {
        **{"method": method, "solver": solver, "prior": "gaussian", "experiment": "digits/edm", "data": "digits"},
        **{"settings": {"prior": {"name": "gaussian"}, "solver": {"name": solver}}, "tuned": False, "chains": None},
        **{"nfe_budget": float(nfe), "nfe": float(nfe), "nfe_equivalent": float(nfe), "noise": "philox4x32-10"},
        **{"n": 10 * BLOCK, "seed": seed, "seconds_per_image": 0.002 * nfe, "gflops_per_image": 0.3 * nfe},
        **{
            "configuration": {"process": {"name": "edm"}},
            "checkpoint": {"path": "edm.safetensors", "sha256": "a" * 64},
        },
        **{"extractor": {"name": "a", "sha256": "b" * 64, "dim": 64}, "metrics": metrics, "jackknife": parts.record()},
        **{"reference": {"name": "digits", "sha256": "c" * 64, "n": 1000}, "precision": "32-true"},
        **{"floor": {"n": 360, "sha256": "e" * 64}, "words": ["judges=a,b"]},
        **{"key": f"{own.integers(2**60):016x}", "images_sha256": f"{own.integers(2**60):x}"},
        **(chain if method == "dlg" else {}),
    }
    view = {key: point[key] for key in ("metrics", "extractor", "reference", "jackknife")}
    other = {**view, "metrics": {"fd_b": 10 * full, "fd_b_inf": full}, "extractor": {"name": "b", "sha256": "d" * 64}}
    return {**point, "judges": {"a": view, "b": other}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """200 points with a sample grid each, in a folder for each method and solver."""
    root = tmp_path_factory.mktemp("runs")
    coarse = torch.randint(256, (64, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    images = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 255).byte()
    found = []
    for method in METHODS:
        for solver in SOLVERS:
            folder = root / f"{METHODS.index(method)}_{solver}"
            for nfe in BUDGETS:
                append_point(folder / "points.jsonl", made(method, solver, nfe))
                images = images.roll(1, dims=0).flip(3)
                sample_grid(images, folder / f"samples_nfe{nfe}.png")
            append_point(folder / "points.jsonl", made(method, solver, 10, seed=1, offset=0.003))
            found.append(folder)
    return found


@pytest.fixture(scope="module")
def page(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page")
    assert main(["compare", *map(str, folders), f"out={out}"]) == 0
    return out / "index.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(tab: Browser, page: Path) -> Iterator[Browser]:
    """The page, which must have logged and requested nothing when the test is over."""
    tab.errors(), tab.requested()
    tab.open(page)
    yield tab
    assert tab.errors() == []
    assert [url for url in tab.requested() if not url.startswith(("data:", "blob:", page.as_uri()))] == []
    assert tab.js("return window.hacked") is None


def rows(tab: Browser) -> list[str]:
    """Labels of the rows of curves."""
    return [text.removesuffix("reference") for text in tab.texts("#grid tbody tr:not(.floor) th")]


def column(tab: Browser, number: int) -> list[float]:
    return [
        float(text.split(" ")[0]) for text in tab.texts(f"#grid tbody tr:not(.floor) td:nth-child({number + 1}) .cell")
    ]


def test_two_hundred_points_are_below_five_megabytes(page: Path):
    assert 1_500_000 < page.stat().st_size < 5_000_000


def test_it_opens_without_an_error_or_a_request(opened: Browser):
    assert len(opened.texts("#points tbody tr")) == 200
    assert len(rows(opened)) == len(set(rows(opened))) == 20
    assert any(HOSTILE in label for label in rows(opened)), "text is shown as it is"
    # 20 curves at 9 budgets; at one, the grid is that of the second seed, whose noise is not that of the others.
    assert opened.js("return document.querySelectorAll('#strip img').length") == 160
    assert opened.js("return [...document.images].every(one => one.complete && one.naturalWidth > 0)")
    assert opened.js("return document.getElementById('chart').data.length") == 21, "the curves and the front"


def test_the_floor_states_its_number_of_images(opened: Browser):
    assert opened.texts("#grid tbody tr.floor th") == ["360 held-out real images"]
    assert set(opened.texts("#grid tbody tr.floor td")) == {"0.25"}


def test_columns_are_sorted_in_both_directions(opened: Browser):
    before = rows(opened)
    opened.click("#grid thead th", COLUMN)
    assert column(opened, COLUMN) == sorted(column(opened, COLUMN)) and rows(opened) != before[::-1]
    assert opened.js("return document.querySelectorAll('#grid thead th')[arguments[0]].ariaSort", COLUMN) == "ascending"
    opened.click("#grid thead th", COLUMN)
    assert column(opened, COLUMN) == sorted(column(opened, COLUMN), reverse=True)
    opened.click("#grid thead th", COLUMN)
    assert rows(opened) == before
    opened.click("#points thead th", 2)
    spent = [float(text) for text in opened.texts("#points tbody td:nth-child(3)")]
    assert spent == sorted(spent) and len(set(spent)) == len(BUDGETS)


def test_a_filter_and_chips_hide_curves(opened: Browser):
    opened.choose("#filter", "tdpm hEUN")
    assert rows(opened) == [label for label in rows(opened) if "tdpm" in label and "heun" in label] != []
    assert opened.js("return document.getElementById('chart').data.length") == 1
    opened.choose("#filter", "")
    hidden = opened.texts(".chip")[3]
    opened.click(".chip", 3)
    assert len(rows(opened)) == 19 and rows(opened)[3] not in hidden
    assert opened.js("return document.getElementById('chart').data.length") == 20
    assert opened.js("return document.querySelectorAll('.chip')[3].ariaPressed") == "false"
    opened.click("#none")
    assert rows(opened) == []
    opened.click("#all")
    assert len(rows(opened)) == 20


def test_judge_and_cost_are_switched(opened: Browser):
    assert opened.texts("#grid thead th")[0] == "fd_a"
    first = column(opened, 1)
    opened.choose("#judge", "1")
    assert opened.texts("#grid thead th")[0] == "fd_b"
    assert column(opened, 1) == pytest.approx([10 * value for value in first], rel=2e-3)
    opened.choose("#cost", "seconds")
    assert opened.js("return document.getElementById('chart').layout.xaxis.title.text") == "seconds per image"
    spent = opened.js("return document.getElementById('chart').data.at(-1).x")
    assert spent == pytest.approx([0.002 * nfe for nfe in BUDGETS])


def test_a_card_opens_from_the_table_and_the_chart(opened: Browser):
    opened.click("#grid tbody tr .cell", 0)
    assert opened.js("return document.getElementById('card').open")
    assert opened.texts("#card .command code") == [
        "diffaccel bench digits/edm nfe=2 n=5000 seed=0 precision=32-true checkpoint=edm.safetensors solver=heun "
        "prior=gaussian judges=a,b"
    ]
    card = dict(zip(opened.texts("#card dt"), opened.texts("#card dd"), strict=True))
    assert card["images"] and card["SHA-256"] and card["reference"] == "digits" and card["seed"] == "0"
    opened.click("#card .close")
    assert not opened.js("return document.getElementById('card').open")
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    opened.choose("#filter", "dlg heun")
    marks = opened.driver.find_elements(By.CSS_SELECTOR, "#chart .points path")
    ActionChains(opened.driver).move_to_element(marks[0]).perform()
    hover = " ".join(opened.texts("#chart .hovertext tspan"))
    assert "near_repeats 0.031" in hover and "diffaccel bench digits/edm nfe=2" in hover
    ActionChains(opened.driver).click(marks[0]).perform()
    assert opened.js("return document.getElementById('card').open")
    assert "dlg" in opened.texts("#card h3")[0]


def test_differences_are_those_of_the_command(opened: Browser, folders: list[Path]):
    """z-scores against a chosen row, and ties, from the distances of blocks."""
    reference, other = folders[1], folders[7]
    found = compare([str(reference), str(other)])
    names = rows(opened)
    opened.choose("#against", names[1])
    expected = {}
    for row in found:
        if row.folder == other:
            expected.setdefault(row.point["nfe_budget"], []).append(row.difference)
    for place, budget in enumerate(BUDGETS, start=2):
        (text,) = opened.texts(f"#grid tbody tr:nth-child(8) td:nth-child({place})")
        own = expected[budget]
        z = np.mean([each.fd for each in own]) / (math.hypot(*(each.se for each in own)) / len(own))
        said = re.search(r"z ([+−])([\d.e+]+)", text)
        assert said is not None and text.count("*") == 0
        assert float(said[2]) * (1 if said[1] == "+" else -1) == pytest.approx(z, rel=0.06)
    assert opened.texts("#grid tbody tr.reference th")[0].startswith(names[1])


def test_the_best_and_its_ties_are_marked(opened: Browser, folders: list[Path]):
    values = column(opened, COLUMN)
    kinds = opened.js(
        "return [...document.querySelectorAll(`#grid tbody tr:not(.floor) td:nth-child(${arguments[0] + 1})`)]"
        ".map(one => one.className)", COLUMN,
    )  # fmt: skip
    assert kinds.count("best") == 1 and kinds[values.index(min(values))] == "best"
    for place, folder in enumerate(folders[:5]):
        if kinds[place] == "best":
            continue
        row = [row for row in compare([str(folders[kinds.index("best")]), str(folder)]) if row.folder == folder]
        own = [one.difference for one in row if one.point["nfe_budget"] == 10]
        tied = np.mean([one.fd for one in own]) < 2 * math.hypot(*(one.se for one in own)) / len(own)
        assert (kinds[place] == "tie") == tied, folder
    bold = opened.js("return getComputedStyle(document.querySelector('td.best button')).fontWeight")
    assert int(bold) >= 600


def test_chains_show_their_diversity(opened: Browser):
    texts = opened.texts("#grid tbody tr:nth-child(16) td:nth-child(2) small")
    assert texts[0].startswith("z +")
    assert texts[1:] == ["recall 0.5 · coverage 0.4", "effective n 812 · near repeats 0.031"]
    assert "recall" not in " ".join(opened.texts("#grid tbody tr:nth-child(2) small"))
    opened.choose("#also", "recall")
    assert "recall 0.5" in opened.texts("#grid tbody tr:nth-child(2) td:nth-child(2) small")


def test_seeds_are_averaged_and_counted(opened: Browser, folders: list[Path]):
    (cell,) = opened.texts(f"#grid tbody tr:first-child td:nth-child({COLUMN + 1})")
    values = [row.point["metrics"]["fd_a"] for row in compare([str(folders[0])]) if row.point["nfe"] == 10]
    assert len(values) == 2
    assert cell.startswith(f"{number(float(np.mean(values)))} ± {number(abs(values[0] - values[1]) / 2, 2)}2 seeds")
    assert "2 seeds" in opened.texts(".chip")[0]


def test_csv_and_markdown_are_saved(opened: Browser):
    opened.js("window.saved = []; URL.createObjectURL = blob => { saved.push(blob.text()); return 'data:,'; }")
    opened.click("#csv")
    opened.click("#markdown")
    table, text = opened.js("return Promise.all(saved)")
    lines = list(csv.DictReader(io.StringIO(table)))
    assert len(lines) == 200 and {line["judge"] for line in lines} == {"a"}
    assert float(lines[0]["fd_a"]) == made("edm", "heun", 2)["metrics"]["fd_a"]
    assert text.count("\n") == 22 and text.count("**") == 2 * len(BUDGETS) and "<img" not in text


@pytest.mark.parametrize("width", [1440, 390])
def test_it_fits_the_window(width: int, tab: Browser, page: Path):
    tab.open(page, width)
    assert tab.js("return document.documentElement.scrollWidth") <= width
    assert tab.js("return document.querySelector('#chart .main-svg').getBoundingClientRect().width") <= width
    tab.click("#grid tbody tr .cell", 0)
    box = tab.js("const box = document.getElementById('card').getBoundingClientRect(); return [box.left, box.right]")
    assert 0 <= box[0] < box[1] <= width


def test_it_is_dark_where_the_reader_prefers_it(tab: Browser, page: Path):
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        tab.open(page)
        ground, ink = tab.js("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
        dark, light = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink))
        assert dark < 100 < 600 < light
        assert tab.js("return document.getElementById('chart').data[1].line.color") == "#4FB3F6"
    finally:
        tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_it_prints_on_a4(tab: Browser, page: Path):
    tab.open(page)
    printed = tab.printed()
    sizes = {
        tuple(round(float(side)) for side in found)
        for found in re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", printed)
    }
    assert sizes == {(595, 842)}
    assert 2 <= printed.count(b"/Type /Page\n") <= 14
