"""Workflows: what they name exists, and a tag publishes the version that was tried elsewhere."""

import hashlib
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import diffaccel

ROOT = Path(__file__).parent.parent
WORKFLOWS = {file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / ".github" / "workflows").glob("*.yml")}
VERSION = runpy.run_path(str(ROOT / ".ci" / "version.py"))
JOBS: dict[str, Any] = WORKFLOWS["release"]["jobs"]


def ancestors(job: str) -> set[str]:
    needed = JOBS[job].get("needs", [])
    direct = {needed} if isinstance(needed, str) else set(needed)
    return direct.union(*(ancestors(one) for one in direct))


def steps(job: str) -> str:
    return yaml.safe_dump(JOBS[job]["steps"])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_name_jobs_files_and_targets_that_exist(name: str) -> None:
    jobs = WORKFLOWS[name]["jobs"]
    makefile = (ROOT / "Makefile").read_text()
    for job in jobs.values():
        needed = job.get("needs", [])
        assert {needed} <= jobs.keys() if isinstance(needed, str) else set(needed) <= jobs.keys()
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            command = step.get("run", "")
            for target in re.findall(r"\bmake (\w[\w-]*)", command):
                assert re.search(rf"^{target}:", makefile, re.M), target
            for script in re.findall(r"(?:bash|python) (\.ci/[\w.]+)", command):
                assert (ROOT / script).is_file(), script
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v1)", step["uses"]), step["uses"]


def test_a_tag_publishes_what_was_tried() -> None:
    """All that is published comes after the tests, and after the wheel has benched on every Python that is named."""
    assert WORKFLOWS["release"][True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    publishers = [job for job, node in JOBS.items() if "permissions" in node]
    assert set(publishers) == {"pypi", "pages", "github"}
    assert all(ancestors(job) == {"build", "elsewhere"} for job in publishers)
    assert WORKFLOWS["release"]["permissions"] == {"contents": "read"}
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert JOBS["elsewhere"]["strategy"]["matrix"]["python"] == named
    for command in ("bash .ci/package dist", "make test", "make docs", "bash .ci/weights weights", ".ci/version.py"):
        assert command in steps("build")
    assert "diffaccel bench digits/dlg" in steps("elsewhere") and "actions/checkout" not in steps("elsewhere")
    assert JOBS["pypi"]["permissions"] == {"id-token": "write"} and "password" not in steps("pypi")
    assert "sha256sum" in steps("github") and "gh release create" in steps("github")


def test_the_tag_must_be_the_version_with_a_section_of_the_changelog() -> None:
    changelog = "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-01-01\n\n- One.\n\n## [1.1.0]\n\n- Two.\n"
    assert VERSION["notes"](changelog, "1.2.0") == "- One.\n"
    for missing in ("1.3.0", "Unreleased"):
        with pytest.raises(SystemExit, match="has no section"):
            VERSION["notes"](changelog, missing)
    assert VERSION["version"]((ROOT / "diffaccel" / "version.py").read_text()) == diffaccel.__version__
    with pytest.raises(SystemExit, match=f"the tag is v0.0.1, but diffaccel/version.py states {diffaccel.__version__}"):
        VERSION["main"]("v0.0.1")


def test_release_files_are_all_weights_with_their_hashes(tmp_path: Path) -> None:
    subprocess.run(["bash", str(ROOT / ".ci" / "weights"), str(tmp_path)], check=True)
    lines = [line.split() for line in (tmp_path / "SHA256SUMS").read_text().splitlines()]
    shipped = {f"{file.parts[-3]}-{file.name}": file for file in ROOT.glob("experiments/*/weights/*")}
    assert {name for _, name in lines} == set(shipped)
    assert {path.name for path in tmp_path.iterdir()} == {*shipped, "SHA256SUMS"}
    for digest, name in lines:
        assert hashlib.sha256(shipped[name].read_bytes()).hexdigest() == digest


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == diffaccel.__version__
    assert citation["license"] == "MIT" and citation["message"] and citation["title"].startswith("diffaccel")
    assert all({"type", "title", "authors"} <= one.keys() for one in citation["references"])
