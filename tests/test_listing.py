"""Lists and explanations of parts: every part says what it is and what its keys do."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffaccel.__main__ import main
from diffaccel.config import KEYS, experiment_names
from diffaccel.errors import UsageError
from diffaccel.metrics import Moments
from diffaccel.metrics.base import METRICS, Made, Real, build_metrics
from diffaccel.metrics.reference import Reference
from diffaccel.parts.catalogue import CATALOGUE, DESCRIPTIONS, registry_of
from diffaccel.parts.docstrings import documented_keys, entries, first_line, first_paragraph, references
from diffaccel.solver import SOLVERS, Grid, Solver
from diffaccel.verbs.listed import Key, list_experiments, list_keys
from diffaccel.verbs.listing import explain, list_parts

PARTS = [(group, name) for group in CATALOGUE for name in registry_of(group)]


@pytest.mark.parametrize(("group", "name"), PARTS)
def test_every_part_documents_its_keys_and_no_others(group: str, name: str):
    registry = registry_of(group)
    factory: Any = registry[name]
    assert first_line(factory).strip(), "no docstring"
    keys = set(registry.annotations(name)) - set(registry.extra)
    assert keys <= documented_keys(factory).keys(), "a key without a word on it"
    arguments = entries(factory, "Args", *(["Attributes"] if dataclasses.is_dataclass(factory) else []))
    assert arguments.keys() <= set(inspect.signature(factory).parameters) | registry.context


@pytest.mark.parametrize(("group", "name"), PARTS)
def test_every_part_is_explained(group: str, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffaccel.verbs.listing._experiments", lambda group, name: [])
    found = explain(group, name)
    assert found.what and found.source.startswith("diffaccel.") and found.plugin is None
    for key in found.keys:
        assert key.what and key.type and "<" not in f"{key.type}{key.default}", key
    assert {key.name for key in found.keys} == set(registry_of(group).annotations(name))


def test_groups_and_parts_are_listed():
    assert [one.name for one in list_parts()] == list(CATALOGUE) == list(DESCRIPTIONS)
    solvers = {one.name: one for one in list_parts("solver")}
    assert solvers.keys() == set(SOLVERS)
    assert solvers["heun"].what.startswith("Heun's method") and solvers["heun"].plugin is None
    assert solvers["unipc2"].what == "`UniPC` with p = 2.", "no roles of reStructuredText"


def test_heun_is_explained():
    found = explain("solver", "heun")
    assert found.source == "diffaccel.solver.onestep.Heun"
    keys = {key.name: key for key in found.keys}
    assert list(keys) == ["grid", "denoise", "analytic_first", "guidance", "guidance_interval"]
    assert keys["grid"].type == "grid"
    assert keys["grid"].default == "{name: karras, ratio_min: 0.002, ratio_cap: 80, rho: 7}"
    assert keys["denoise"][1:3] == ("true or false", "true") and keys["analytic_first"][1:3] == (
        "float or null",
        "null",
    )
    assert found.references == [
        "Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Algorithm 1"
    ]
    assert "cifar10/edm" in found.experiments and "digits/ddpm" not in found.experiments


def test_keys_of_a_part_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["list", "solver", "heun"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1].strip()]
    assert rows == ["key", *(key.name for key in explain("solver", "heun").keys)]


def test_experiments_and_sweeps_are_listed(capsys: pytest.CaptureFixture[str]):
    assert {one.name for one in list_experiments()} == set(experiment_names())
    digits = {one.name: one.what for one in list_experiments("digits")}
    assert digits["digits/ddpm"] == "Noise prediction on a variance preserving process, ancestral sampling"
    assert {name.partition("/")[0] for name in digits} == {"digits"}
    assert "0 .. K - 1" in digits["digits/tdpm"], "dots are not the end of a sentence"
    assert {one.name: one.what for one in list_experiments("toy")}["toy/edm"] == "method diffusion"
    assert main(["list", "sweeps"]) == 0
    assert "methods  Every method at every budget" in capsys.readouterr().out


def test_keys_of_an_experiment_are_listed():
    keys = {key.name: key for key in list_keys()}
    assert keys.keys() == KEYS - {"experiment"}
    assert all(key.what for key in keys.values())
    assert keys["n"][1:] == ("int", "5000", "Images per point.") and keys["shape"].default is None
    assert keys["checkpoint"].type == "path" and keys["chains"].what == "short for prior.chains"
    training = {key.name: key for key in list_keys("training")}
    assert training["training.lr"][1:3] == ("float", "0.001") and all(key.what for key in training.values())


def test_sections_of_sections_are_listed_by_the_names_that_are_printed():
    listed, unseen = set(), [None]
    while unseen:
        for key in list_keys(unseen.pop()):
            if key.type == "section":
                assert f"`diffaccel list keys {key.name}` lists its keys." in key.what
                unseen.append(key.name)
            listed.add(key.name)
    assert {"search.confirm", "search.confirm.best", "training.lr"} <= listed


def test_types_in_words():
    def of(group: str, name: str, key: str) -> Key:
        return next(one for one in explain(group, name).keys if one.name == key)

    assert of("data", "npz", "path")[1:3] == ("path", None), "a key without a default must be set"
    assert of("data", "npz", "test_path")[1:3] == ("path or null", "null")
    assert of("process", "decoupled", "clock")[1:3] == ("t or t^2", "t")
    assert of("method", "tdpm", "objectives")[1:3] == ("list of objectives", "[]")
    assert of("prior", "density", "density")[1:3] == ("density", "{name: gaussian}")
    assert of("prior", "density", "init").type == "path or null", "a key that is no parameter"
    assert of("network", "unet", "widths").type == "list of int, from 1 to 1,000,000, one or more"
    assert of("grid", "listed", "fractions").default == "[0, 1]"


class Leap:
    """Leap ahead.

    It goes far,
    and fast.

    Args:
        grid: Where it lands: see
            :class:`~diffaccel.solver.Grid`, or ``none``.
        rate (float): How fast.

    References:
        A paper (2020)
            https://example.org
    """

    def __init__(self, rate: float, grid: Grid = Solver.grid) -> None:
        self.rate, self.grid = rate, grid


def test_docstrings_are_read():
    assert first_line(Leap) == first_paragraph(Leap) == "Leap ahead."
    assert entries(Leap, "Args") == {"grid": "Where it lands: see `Grid`, or `none`.", "rate": "How fast."}
    assert references(Leap) == ["A paper (2020)", "    https://example.org"]
    assert entries(Leap, "Attributes") == {}

    class Undocumented:
        pass

    assert first_line(Undocumented) == "" and documented_keys(Undocumented) == {}


def test_a_plugins_part_is_shown_with_its_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(SOLVERS._factories, "leap", Leap)
    monkeypatch.setitem(SOLVERS._origins, "leap", "plugin 'leap' (pack:Leap) of package 'pack'")
    assert main(["list", "solver"]) == main(["explain", "solver", "leap"]) == 0
    listed, explained = capsys.readouterr().out.split("solver leap ")
    (line,) = (line for line in listed.splitlines() if line.startswith("leap "))
    assert "Leap ahead." in line and "package 'pack'" in line
    assert "package 'pack'" in explained and "(required)" in explained and "A paper (2020)" in explained


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "solvers"], "no group of parts is called 'solvers'; did you mean 'solver'?"),
        (["list", "solver", "heun", "grid"], "list accepts at most a group of parts and the name of a part"),
        (["list", "solver", "huen"], "no solver is called 'huen'; did you mean 'heun'?"),
        (["list", "experiments", "digts"], "there are no experiments of 'digts'; did you mean 'digits'?"),
        (["list", "keys", "trainig"], "no section of keys is called 'trainig'; did you mean 'training'?"),
        (["explain", "solver", "huen"], "no solver is called 'huen'; did you mean 'heun'?"),
        (["explain", "grids", "karras"], "no group of parts is called 'grids'; did you mean 'grid'?"),
        (["explain", "heun"], "explain requires a group and a name"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    assert said in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_groups_are_listed_without_torch():
    code = "import sys; from diffaccel.verbs.listing import list_parts; list_parts(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
    with pytest.raises(UsageError):
        list_parts("none")


def test_the_documentation_names_the_entry_points_of_every_group():
    page = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    assert {group for group in CATALOGUE if registry_of(group).group not in page} == set()


def test_the_metric_of_the_documentation_is_one():
    page = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    (code,) = re.findall(r"^```python\n(from diffaccel.metrics.*?)^```", page, re.M | re.S)
    try:
        exec(code, {"__name__": "readme"})
        (metric,) = build_metrics(["frechet", "my_metric"])[1:]
        made = Made(2, torch.tensor([[1.0], [3.0]]), None, "fd")  # type: ignore[arg-type]
        real = Real(Reference(Moments(2, torch.zeros(1), torch.eye(1)), torch.ones(3, 1).half(), {}), None)
        assert metric(made, real) == {"my_metric": 1.0}
    finally:
        METRICS._factories.pop("my_metric", None)
