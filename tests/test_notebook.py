"""The notebook of the documentation runs on the shipped weights and shows what it announces."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    """The notebook with its outputs, executed in an empty folder."""
    patch = pytest.MonkeyPatch()
    root = str(NOTEBOOK.parent.parent)
    patch.setenv("PYTHONPATH", os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]))
    patch.delenv("MPLBACKEND")  # the kernel's own
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    try:
        return NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": tmp_path_factory.mktemp("nb")}}
        ).execute()
    finally:
        patch.undo()


def outputs(notebook: nbformat.NotebookNode, cell: str) -> list[nbformat.NotebookNode]:
    return next(one.outputs for one in notebook.cells if one.id == cell)


def test_the_repository_has_it_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 4 and all(not cell.outputs and cell.execution_count is None for cell in code)


def test_it_counts_what_it_spends(run: nbformat.NotebookNode) -> None:
    (shown,) = outputs(run, "sample")
    assert shown.data["text/plain"] == "(torch.Size([8, 1, 8, 8]), torch.uint8, 10.0)"


def test_the_measured_distances_fall_with_the_budget(run: nbformat.NotebookNode) -> None:
    (shown,) = outputs(run, "measure")
    lines = dict(line.split(" ", 1) for line in shown.text.splitlines())
    values = {name: [float(one.split()[2]) for one in line.split(", ")] for name, line in lines.items()}
    assert set(values) == {"heun", "dpmpp2m"}
    assert all(line == sorted(line, reverse=True) and line[-1] < 1 for line in values.values())
    assert values["dpmpp2m"][0] < values["heun"][0]


def test_the_figures_are_drawn(run: nbformat.NotebookNode) -> None:
    for cell in ("strip", "curve"):
        assert any("image/png" in one.get("data", {}) for one in outputs(run, cell))
