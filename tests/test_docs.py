"""The documentation: links lead somewhere, tables are those of the points, and every name of the API has its entry."""

import dataclasses
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from pages import DOCS, PAGES, ROOT, SHELL, anchors, fences, links, named_files, unfenced

import diffaccel
from diffaccel.config import experiment_names

sys.path.insert(0, str(DOCS))  # as Sphinx does, for the directives

import tables  # noqa: E402

READMES = sorted(ROOT.glob("experiments/*/README.md"))
ALL = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DIRECTIVES = {"points", "curve", "strip", "page", "parts", "offered", "toctree", "figure", "eval-rst"}
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if "://" in target:
            parts = urlsplit(target)
            assert parts.scheme == "https" and "." in parts.netloc and " " not in target, target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", [*ALL, *READMES], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_in_backquotes_exist(page: Path) -> None:
    assert [name for name in named_files(page) if not (ROOT / name).exists() and "results" not in name] == []


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.parent.name)
def test_hashes_of_weights_are_in_no_text(page: Path) -> None:
    """They change with the header of a file; `diffaccel list weights` prints them."""
    assert re.findall(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b", page.read_text()) == []


def test_the_layout_has_every_folder_and_imports_go_up() -> None:
    rows = table(DOCS / "idea.md", "Layout of the code")
    lines = [re.findall(r"`(\w+)`", names) for names, _ in rows]
    level = {name: number for number, names in enumerate(lines) for name in names}
    folders = {path.parent.name for path in (ROOT / "diffaccel").glob("*/__init__.py")}
    assert level.keys() == folders
    for name in folders:
        for file in (ROOT / "diffaccel" / name).rglob("*.py"):
            used = re.findall(r"^\s*(?:from|import) diffaccel\.(\w+)", file.read_text(), re.M)
            assert [other for other in used if level.get(other, 0) > level[name]] == [], file


def test_the_quickstart_has_every_extra_and_every_data_set() -> None:
    extras = [re.findall(r"`(\w+)`", name) for name, *_ in table(DOCS / "quickstart.md", "Install")]
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert sorted(name for (name,) in extras) == sorted(re.findall(r"^(\w+) = \[", project, re.M))
    shipped = table(DOCS / "quickstart.md", "Shipped experiments")
    names = [name for names, *_ in shipped for name in re.findall(r"`(\w+)`", names)]
    assert sorted(names) == sorted({name.partition("/")[0] for name in experiment_names()})


def table(page: Path, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head."""
    (section,) = re.findall(rf"^## {heading}$(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S)
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@named
def test_blocks_have_a_language_and_exempt_ones_a_reason(page: Path) -> None:
    found = fences(page)
    for block in found:
        language = block.language
        assert language.strip("{}") in DIRECTIVES or language in (*SHELL, "python", "toml", "yaml", "html", "text"), (
            language
        )
    exempt = [block for block in found if block.reason is not None]
    assert unfenced(page).count("<!-- not-run") == len(exempt), "a mark without a block"
    assert all(block.language in (*SHELL, "python") and len(block.reason or "") > 3 for block in exempt)


def test_every_page_is_in_the_toctree() -> None:
    index = (DOCS / "index.md").read_text()
    entries = [line for tree in re.findall(r"```\{toctree\}\n(.*?)```", index, re.S) for line in tree.splitlines()]
    wanted = {
        str(page.relative_to(DOCS).with_suffix("")) for page in PAGES if page.name not in ("index.md", "README.md")
    }
    assert wanted - set(entries) == set()
    assert wanted.isdisjoint({"search", "genindex"}), "Sphinx writes pages of these names itself"


# Tables


@pytest.mark.parametrize("name", tables.tables())
def test_every_table_has_points(name: str) -> None:
    table = tables.named(name)
    text = tables.markdown(table)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(table.found) and len({row.count("|") for row in rows[1:]}) == 1
    assert f"{table.setting('n'):,} images" in text and "± one standard error" in text


def test_a_cell_is_the_newest_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two points of a bench, that with today's noise is shown; older noise has a dagger, other settings no cell."""
    import json

    def point(budget: float, value: float, **keys: object) -> str:
        metrics = {"fd_x": value, "fd_x_inf": value, "fd_x_se": 0.02, "fd_x_floor": 0.1, "kid": 0.002, "kid_se": 0.0001}
        metrics["kid_floor"] = 0.001
        base = {"method": "edm", "solver": "heun", "nfe_budget": budget, "nfe": budget, "n": 10, "seed": 1}
        settings = {"solver": {"name": "heun"}, "prior": {"name": "gaussian"}}
        return json.dumps(
            {**base, "settings": settings, "metrics": metrics, "extractor": {"name": "x", "sha256": "0"}, **keys}
        )

    new = {"noise": "philox4x32-10", "versions": {"diffaccel": "0.2.0"}, "experiment": "toy/edm", "floor": {"n": 3000}}
    stochastic = {"solver": {"name": "heun", "S_churn": 5.0}, "prior": {"name": "gaussian"}}
    lines = [point(5, 1.25, **new), point(5, 9.0), point(10, 3.0, nfe=9), point(20, 4.0, seed=2)]
    lines += [point(5, 8.0, **new, settings=stochastic), point(20, 7.0, **new, settings=stochastic)]
    for file in (tmp_path / "toy" / "edm.yaml", tmp_path / "toy" / "results" / "edm" / "points.jsonl"):
        file.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "toy" / "edm.yaml").write_text("{method: edm, data: digits, shape: [1, 8, 8]}\n")
    file.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(tables, "EXPERIMENTS", tmp_path)
    tables.points_of.cache_clear()
    try:
        row = tables.Row("edm solver=heun", ("edm",))
        table = tables.Table("t", "toy", "x", ("method",), (5, 10, 20), (row,), common="n=10 seed=1")
        assert "| edm | 1.25 ± 0.02 | 3.00 ± 0.02 [9]† |  |" in tables.markdown(table)
        assert "floor (3,000 held-out images): 0.1" in tables.note(table) and "bf16" not in tables.note(table)
        kernel = dataclasses.replace(table, metric="kid")
        assert "floor (held-out images): 1;" in tables.note(kernel), "of those whose features are kept, fewer"
        assert tables.commands(table).splitlines() == [
            "COMMON=(nfe=5,10,20 n=10 seed=1)",
            'diffaccel bench toy/edm solver=heun "${COMMON[@]}"',
        ]
        other = tables.Table(
            "t", "toy", "x", ("m",), (5,), (tables.Row("edm solver=ddim", ("edm",)),), common="n=10 seed=1"
        )
        with pytest.raises(tables.UsageError, match="no point of toy by x matches"):
            tables.markdown(other)
    finally:
        tables.points_of.cache_clear()


def test_a_row_has_the_settings_of_its_command() -> None:
    """Points of a former default are in a row that states it, and no point of densities is missing."""
    check = {row.bench: cells for row, cells in tables.named("cifar10_small_check").found}
    former = "edm solver=dpmpp3m solver.D2=parabola solver.lower_order_final=false"
    assert "edm solver=dpmpp3m" not in check and check[former].keys() == {5, 10, 20, 50}
    starts = tables.named("cifar10_small_small_t")
    assert len(starts.found) == 13 and all(cells.keys() == {5, 10, 20, 50} for _, cells in starts.found)
    assert "Not measured" not in tables.note(starts)


def test_what_is_not_measured_is_named_by_its_solver() -> None:
    """Rows of `edm` are measured, so that its name alone says nothing."""
    note = tables.note(tables.named("cifar10_small_efficientnet"))
    assert "; `ddpm`;" in note and "; `edm` `deis`, `rhoab`, order 3." in note and "`edm`;" not in note


def test_tables_between_marks_are_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- points: cifar10_small_chain -->\nold\n<!-- end -->\nb\n")
    assert tables.main(["--check", str(page)]) == 1
    assert tables.main(["--write", str(page)]) == 0
    assert "| Gaussian | `heun` |" in page.read_text() and "old" not in page.read_text()
    assert tables.main(["--check", str(page)]) == 0
    page.write_text("<!-- points: none -->\n<!-- end -->\n")
    assert tables.main(["--write", str(page)]) == 2


# API and continuous integration


def test_the_api_page_has_exactly_what_is_offered() -> None:
    from directives import offered

    kinds = offered()
    assert sorted(name for names in kinds.values() for name in names) == sorted(
        set(diffaccel.__all__) - {"__version__"}
    )
    page = (DOCS / "api.md").read_text()
    assert set(re.findall(r"```\{offered\} (\w+)", page)) == {kind for kind, names in kinds.items() if names}


def test_continuous_integration_builds_the_documentation() -> None:
    assert "make docs" in (ROOT / ".ci" / "run").read_text()
    recipe = (ROOT / "Makefile").read_text().partition("\ndocs:")[2].partition("\n\n")[0]
    assert "-W" in recipe and "-n" in recipe.split()
    workflows = [yaml.safe_load(file.read_text()) for file in (ROOT / ".github" / "workflows").glob("*.yml")]
    steps = [step for flow in workflows for job in flow["jobs"].values() for step in job.get("steps", [])]
    assert any("make docs" in step.get("run", "") for step in steps)
