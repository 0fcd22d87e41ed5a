"""The documentation: links lead somewhere, tables are those of the points, and every name of the API has its entry."""

import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from pages import DOCS, PAGES, ROOT, SHELL, anchors, fences, links, named_files, unfenced

import diffaccel

sys.path.insert(0, str(DOCS))  # as Sphinx does, for the directives

import tables  # noqa: E402

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


@named
def test_files_in_backquotes_exist(page: Path) -> None:
    assert [name for name in named_files(page) if not (ROOT / name).exists() and "results" not in name] == []


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
    """Of two points of a bench, the one with today's noise is shown; older noise has a dagger."""
    import json

    def point(budget: float, value: float, **keys: object) -> str:
        metrics = {"fd_x": value, "fd_x_inf": value, "fd_x_se": 0.02, "fd_x_floor": 0.1, "kid": 0.002, "kid_se": 0.0001}
        base = {"method": "edm", "solver": "heun", "nfe_budget": budget, "nfe": budget, "n": 10, "seed": 1}
        settings = {"solver": {"name": "heun"}, "prior": {"name": "gaussian"}}
        return json.dumps(
            {**base, "settings": settings, "metrics": metrics, "extractor": {"name": "x", "sha256": "0"}, **keys}
        )

    new = {"noise": "philox4x32-10", "versions": {"diffaccel": "0.2.0"}, "experiment": "toy/edm"}
    lines = [point(5, 1.25, **new), point(5, 9.0), point(10, 3.0, nfe=9), point(20, 4.0, seed=2)]
    for file in (tmp_path / "toy" / "edm.yaml", tmp_path / "toy" / "results" / "edm" / "points.jsonl"):
        file.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "toy" / "edm.yaml").touch()
    file.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(tables, "EXPERIMENTS", tmp_path)
    tables.points_of.cache_clear()
    try:
        row = tables.Row("edm solver=heun", ("edm",))
        table = tables.Table("t", "toy", "x", ("method",), (5, 10, 20), (row,), common="n=10 seed=1")
        assert "| edm | 1.25 ± 0.02 | 3.00 ± 0.02 [9]† |  |" in tables.markdown(table)
        assert "floor (held-out images): 0.1" in tables.note(table) and "bf16" not in tables.note(table)
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
