"""Registries: constructors are schemas, mistakes get one sentence, plugins come by entry point."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from diffaccel import registry as module
from diffaccel.errors import UsageError, suggest
from diffaccel.registry import Registry


@dataclass(frozen=True)
class Grid:
    ratio_min: float = 0.002
    rho: float = 7.0


@dataclass(frozen=True)
class Heun:
    grid: Grid = Grid()
    denoise: bool = True


@dataclass(frozen=True)
class Churned(Heun):
    churn: float = 80.0
    levels: list[int] = field(default_factory=lambda: [1, 2])
    clip: float | None = None
    clock: Literal["t", "t^2"] = "t"


def network(shape: tuple[int, int, int], widths: list[int] = [8, 16], depth: int = 2) -> tuple[object, ...]:  # noqa: B006
    return shape, widths, depth


def needy(path: str, count: int, quiet: bool = False) -> tuple[str, int, bool]:
    return path, count, quiet


def open_ended(rate: float = 0.1, **rest: Any) -> tuple[float, dict[str, Any]]:
    return rate, rest


@pytest.fixture
def solvers() -> Registry[Any]:
    grids: Registry[Any] = Registry("grid")
    grids.register("karras")(Grid)
    solvers: Registry[Any] = Registry("solver", nested={"grid": grids})
    solvers.register("heun")(Heun)
    solvers.register("churned")(Churned)
    solvers.register("network")(network)
    solvers.register("needy")(needy)
    solvers.register("open_ended")(open_ended)
    return solvers


def test_defaults_and_values(solvers: Registry[Any]) -> None:
    assert solvers.build({"name": "heun"}) == Heun()
    built = solvers.build({"name": "churned", "churn": 3, "levels": [5], "clip": 1, "clock": "t^2", "denoise": False})
    assert built == Churned(churn=3.0, levels=[5], clip=1.0, clock="t^2", denoise=False)
    assert isinstance(built.churn, float) and type(built.levels) is list
    assert solvers.build({"name": "churned", "clip": None}).clip is None


def test_strings_from_a_command_line_convert(solvers: Registry[Any]) -> None:
    assert solvers.build({"name": "churned", "churn": "1e-3", "denoise": "false"}) == Churned(churn=1e-3, denoise=False)


def test_nested_parts(solvers: Registry[Any]) -> None:
    assert solvers.build({"name": "heun", "grid": {"name": "karras", "rho": 3}}) == Heun(Grid(rho=3.0))
    with pytest.raises(UsageError, match="grid 'karras' has no key 'rhoo'; did you mean 'rho'"):
        solvers.build({"name": "heun", "grid": {"name": "karras", "rhoo": 3}})
    with pytest.raises(UsageError, match="no grid is called 'karas'; did you mean 'karras'"):
        solvers.build({"name": "heun", "grid": {"name": "karas"}})
    assert solvers.build({"name": "heun", "grid": {"rho": 3}}) == Heun(Grid(rho=3.0)), "the default's name"
    assert solvers.build({"name": "heun", "grid": "karras"}) == Heun(Grid()), "a name alone"


def test_context_is_given_and_hidden(solvers: Registry[Any]) -> None:
    """What only the program knows reaches the factories that ask for it, and no file can set it."""
    assert solvers.build({"name": "network", "depth": 3}, shape=(3, 8, 8), seed=1) == ((3, 8, 8), [8, 16], 3)
    assert solvers.build({"name": "heun"}, shape=(3, 8, 8)) == Heun()
    with pytest.raises(UsageError, match="solver 'network' has no key 'shape'"):
        solvers.build({"name": "network", "shape": [1, 2, 3]}, shape=(3, 8, 8))


def test_mutable_defaults_are_not_shared(solvers: Registry[Any]) -> None:
    first = solvers.build({"name": "network"}, shape=(3, 8, 8))[1]
    first.append(99)
    assert solvers.build({"name": "network"}, shape=(3, 8, 8))[1] == [8, 16]


def test_the_node_is_not_changed(solvers: Registry[Any]) -> None:
    node = {"name": "heun", "grid": {"name": "karras"}}
    solvers.build(node)
    assert node == {"name": "heun", "grid": {"name": "karras"}}


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "huen"}, "no solver is called 'huen'; did you mean 'heun'?"),
        ({"name": "zzz"}, "no solver is called 'zzz'; known: churned, heun, needy, network, open_ended"),
        ({"name": 3}, "no solver is called 3"),
        ({}, "solver: the key 'name' is missing; known: churned"),
        ({"name": "churned", "chrun": 1}, "solver 'churned' has no key 'chrun'; did you mean 'churn'?"),
        ({"name": "churned", "churn": "much"}, "solver 'churned': .*'much'.* could not be converted to Float"),
        ({"name": "churned", "levels": 3}, "solver 'churned': .*"),
        ({"name": "churned", "levels": ["a"]}, "solver 'churned': .*'a'.* could not be converted to Integer"),
        ({"name": "churned", "denoise": "perhaps"}, "solver 'churned': .*perhaps"),
        ({"name": "churned", "clock": "t^3"}, r"solver 'churned': .*'t\^3'"),
        ({"name": "churned", "churn": None}, "solver 'churned': .*"),
        ({"name": "needy"}, "solver 'needy' needs a value for count, path"),
        ({"name": "needy", "path": "x"}, "solver 'needy' needs a value for count$"),
        ({"name": "needy", "grid": {"name": "karras"}}, "solver 'needy' has no key 'grid'"),
        ({"name": "open_ended", "anything": 1}, "solver 'open_ended' has no key 'anything'"),
    ],
)
def test_mistakes(solvers: Registry[Any], node: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        solvers.build(node)
    assert "\n" not in str(error.value)


def test_duplicates_are_refused_and_reloads_are_not(solvers: Registry[Any]) -> None:
    with pytest.raises(UsageError, match="two solvers are called 'heun': rename one"):
        solvers.register("heun")(Churned)
    assert solvers.register("heun")(Heun) is Heun
    assert solvers["heun"] is Heun


def test_it_is_a_mapping(solvers: Registry[Any]) -> None:
    assert sorted(solvers) == ["churned", "heun", "needy", "network", "open_ended"]
    assert len(solvers) == 5
    assert "heun" in solvers
    assert "absent" not in solvers


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An installed package that brings a solver 'leap' and one of a name already taken."""
    loaded: list[str] = []

    def entry(name: str, factory: Callable[..., object]) -> SimpleNamespace:
        def load() -> Callable[..., object]:
            loaded.append(name)
            return factory

        return SimpleNamespace(name=name, load=load)

    def entry_points(group: str) -> list[SimpleNamespace]:
        return [entry("leap", Churned), entry("heun", Churned)] if group == "diffaccel.solvers" else []

    monkeypatch.setattr(module, "entry_points", entry_points)
    return loaded


def test_plugins_come_by_entry_point(solvers: Registry[Any], plugin: list[str]) -> None:
    assert solvers["heun"] is Heun
    assert plugin == []  # nothing is imported before it is needed
    assert solvers.build({"name": "leap", "churn": 1.0}) == Churned(churn=1.0)
    assert solvers["heun"] is Heun  # a plugin replaces no part of ours
    assert plugin == ["leap", "heun"]
    with pytest.raises(UsageError, match="did you mean 'leap'"):
        solvers["leep"]
    assert plugin == ["leap", "heun"]


def test_group_follows_the_kind() -> None:
    assert Registry("solver").group == "diffaccel.solvers"
    assert Registry("process", group="diffaccel.processes").group == "diffaccel.processes"


def test_suggestions() -> None:
    assert suggest("huen", ["heun", "euler"]) == "; did you mean 'heun'?"
    assert suggest("zzz", ["heun", "euler"]) == "; known: euler, heun"
