"""Every block of the documentation runs, in a fresh folder and in order, but for those that a mark exempts.

The commands of exempt blocks, and those that measure the tables, are loaded and built by test_advice.py, in zsh too.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from forked import CLIENT
from pages import DOCS, PAGES, ROOT, SHELL, Block, blocks

from diffaccel.parts.catalogue import CATALOGUE, registry_of

HIDDEN = {"runs", "samples", "build", "dist"}
"""Entries of the clone that commands write or that are not tracked."""

FOLLOWED = {"tutorial.md": "test_tutorial.py"}
"""Pages with a test of their own, which sets their variables."""

pages = [page for page in PAGES if page.name not in FOLLOWED]
shell = [page for page in pages if any(block.reason is None for block in blocks(page, *SHELL))]
python = [page for page in pages if any(block.reason is None for block in blocks(page, "python"))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the command ``diffaccel``, which a server carries out."""
    folder = tmp_path_factory.mktemp("bin")
    command = [sys.executable, str(ROOT / "tests" / "forked.py"), str(folder / "socket")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)
    try:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        client = folder / "diffaccel"
        client.write_text(CLIENT.format(python=sys.executable, path=str(folder / "socket")))
        client.chmod(0o755)
        (folder / "python").symlink_to(sys.executable)
        yield folder
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the entries of the repository, in which commands may write."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in HIDDEN:
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.mark.parametrize("page", shell, ids=name)
def test_commands_of_a_page_run(page: Path, programs: Path, clone: Path) -> None:
    script = "".join(f"echo '{page.name}, line {block.line}' >&2\n{shortened(block.code)}" for block in runnable(page))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "DIFFACCEL"))}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    environment |= {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-euc", script], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page, *SHELL) if block.reason is None]


def shortened(code: str) -> str:
    """Commands with 100 images in place of 500, but for chains, whose images share a burn-in."""
    return "".join(line if "/dlg" in line else line.replace(" n=500", " n=100") for line in code.splitlines(True))


@pytest.fixture
def registries() -> Iterator[None]:
    """Parts that a page registers are forgotten afterwards."""
    assert all(list(registry_of(group)) for group in CATALOGUE)  # built-in parts are registered when one is looked up
    kept = {group: dict(registry_of(group)._factories) for group in CATALOGUE}
    yield
    for group, factories in kept.items():
        registry_of(group)._factories.clear()
        registry_of(group)._factories.update(factories)


@pytest.mark.parametrize("page", python, ids=name)
def test_python_of_a_page_runs(
    page: Path, clone: Path, registries: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of a page share a namespace, and their tests are called."""
    monkeypatch.chdir(clone)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # dataclasses look their module up
    for block in blocks(page, "python"):
        if block.reason is None:
            exec(compile("\n" * block.line + block.code, str(page), "exec"), vars(module))
    for test in [value for key, value in vars(module).items() if key.startswith("test_")]:
        test()


def test_the_solver_of_the_documentation_has_its_test() -> None:
    solver, test, *_ = blocks(DOCS / "extending.md", "python")
    assert "def test_" in test.code and "MySolver(" in test.code
    lines = re.sub(r'""".*?"""', "", solver.code.partition("@SOLVERS")[2], flags=re.S).splitlines()
    assert 5 < len([line for line in lines if line.strip()]) <= 10


def test_pages_with_a_test_of_their_own_are_followed_there() -> None:
    for page, test in FOLLOWED.items():
        assert page in (ROOT / "tests" / test).read_text()
