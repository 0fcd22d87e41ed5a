"""What an installation brings: everything that is imported, from versions that continuous integration tries."""

import ast
import re
import runpy
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
LOWEST = runpy.run_path(str(ROOT / ".ci" / "lowest.py"))["lowest"](PYPROJECT)


def imported() -> set[str]:
    """Packages that the code imports, anywhere in a file."""
    found = set()
    for file in (ROOT / "diffaccel").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"diffaccel"}


def test_what_is_imported_is_installed():
    providers = packages_distributions()
    for package in imported():
        names = {name.lower().replace("_", "-") for name in providers[package]}
        assert names & LOWEST.keys(), f"{package} is of none of the dependencies"


def test_every_dependency_has_a_lowest_version_that_is_tried():
    block = PYPROJECT.split("dependencies = [\n")[1].split("]")[0]
    assert len(LOWEST) == len(block.split(",\n")) - 1, "a dependency without a lower bound"
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["lowest"]["steps"]
    commands = [step.get("run", "") for step in steps]
    assert any(".ci/lowest.py > lowest.txt" in command for command in commands)
    assert {"PIP_CONSTRAINT": "lowest.txt"} in [step.get("env") for step in steps]
    assert any("pytest" in command for command in commands)


def test_every_python_that_is_named_is_tried():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    tried = jobs["test"]["strategy"]["matrix"]["python"]
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT) == tried
    assert f'requires-python = ">={tried[0]}"' in PYPROJECT
    assert jobs["lowest"]["steps"][1]["with"]["python-version"] == tried[0]
