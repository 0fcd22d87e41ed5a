"""Registries: constructors are schemas, mistakes get one sentence, plugins come by entry point."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest

from diffaccel.errors import UsageError, suggest
from diffaccel.parts import plugins as module
from diffaccel.parts.catalogue import CATALOGUE
from diffaccel.parts.registry import Registry, part_of
from diffaccel.parts.schema import is_path, is_text


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
    grids.base(Grid)
    solvers: Registry[Any] = Registry("solver")
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


def test_a_constructor_that_passes_the_rest_on_gets_the_whole_context() -> None:
    """So that a subclass needn't repeat what its base is given; no file can set what is context."""
    parts: Registry[Any] = Registry("method", context=["shape", "seed"])
    parts.register("open_ended")(open_ended)
    assert parts.build({"name": "open_ended", "rate": 1}, shape=(1, 2, 2), seed=3) == (
        1.0,
        {"shape": (1, 2, 2), "seed": 3},
    )
    assert parts.keys_of("open_ended") == set(parts.annotations("open_ended")) == {"rate"}
    parts.register("network")(network)
    assert set(parts.annotations("network")) == {"widths", "depth"}
    with pytest.raises(UsageError, match="method 'open_ended' has no key 'seed'"):
        parts.build({"name": "open_ended", "seed": 1}, shape=(1, 2, 2), seed=3)


def test_annotations_say_what_is_a_path_a_text_and_a_part(solvers: Registry[Any]) -> None:
    assert is_path(Path) and is_path(Path | None) and not is_path(str) and not is_path(None)
    assert is_text(str) and is_text(str | None) and is_text(Literal["a", "b"]) and not is_text(Literal[1])
    assert not any(map(is_text, (Path, float, None, list[str], str | float)))
    grids = solvers.parts_of("heun")["grid"]
    assert part_of(Grid) is part_of(Grid | None) is grids and part_of(float) is part_of(None) is None
    assert part_of(Annotated[dict[str, Any], solvers] | None) is solvers
    assert solvers.annotation("grid") is Grid and solvers.annotation("clip", "churned") == float | None
    assert solvers.annotation("clip", "heun") is None, "another part's"
    assert solvers.annotation("clip", "absent") == float | None, "of any part"


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
        ({"name": "needy"}, "solver 'needy' requires a value for count, path"),
        ({"name": "needy", "path": "x"}, "solver 'needy' requires a value for count$"),
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


def entry(name: str, load: Callable[[], object], package: str | None = "pack", group: str = "diffaccel.solvers") -> Any:
    dist = SimpleNamespace(name=package) if package else None
    return SimpleNamespace(name=name, load=load, value=f"pack.solvers:{name}", dist=dist, group=group)


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Entry points of installed packages, to be filled."""
    found: list[Any] = []
    monkeypatch.setattr(module, "entry_points", lambda group: [each for each in found if each.group == group])
    return found


@pytest.fixture
def plugin(plugins: list[Any]) -> list[str]:
    """An installed package that brings a solver 'leap' and one of a name already taken; what of it was imported."""
    loaded: list[str] = []

    def load(name: str) -> Callable[[], object]:
        return lambda: loaded.append(name) or Churned

    plugins += [entry(name, load(name), package=None) for name in ("leap", "heun")]
    return loaded


def test_plugins_come_by_entry_point(
    solvers: Registry[Any], plugin: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert solvers["heun"] is Heun
    assert plugin == []  # nothing is imported before it is needed
    assert solvers.build({"name": "leap", "churn": 1.0}) == Churned(churn=1.0)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert solvers.build({"name": "heun"}) == Heun()  # a plugin replaces no part of ours
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "plugin 'heun' (pack.solvers:heun) is ignored" in said
    assert plugin == ["leap"]
    with pytest.raises(UsageError, match="did you mean 'leap'"):
        solvers["leep"]
    assert plugin == ["leap"]


def test_plugins_are_among_the_names(solvers: Registry[Any], plugin: list[str]) -> None:
    assert "leap" in list(solvers) and len(solvers) == 6 and plugin == ["leap"]
    assert "levels" in solvers.known_keys()


class Odd(BaseException):
    pass


def raising(error: BaseException) -> Callable[[], object]:
    def load() -> object:
        raise error

    return load


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (raising(ImportError("no module\x1b[31m named x")), r"can't be imported .*no module\\+x1b\[31m named x"),
        (raising(SyntaxError("bad")), "can't be imported"),
        (raising(SystemExit(3)), "can't be imported"),
        (raising(UsageError("two solvers are called 'heun': rename one")), "two solvers are called 'heun'"),
        (raising(Odd()), "can't be imported"),
        (lambda: None, "is not a class or function, and registers no solver 'broken'"),
        (lambda: SimpleNamespace(), "is not a class or function"),
    ],
)
def test_a_broken_plugin_names_itself_and_stops_nothing(
    solvers: Registry[Any], plugins: list[Any], load: Callable[[], object], reason: str
) -> None:
    plugins += [entry("broken", load), entry("leap", lambda: Churned)]
    assert solvers.build({"name": "leap"}) == Churned() and "broken" not in solvers and len(list(solvers)) == 6
    with pytest.raises(
        UsageError, match=rf"plugin 'broken' \(pack.solvers:broken\) of package 'pack': .*{reason}"
    ) as error:
        solvers["broken"]
    assert "\n" not in str(error.value) and str(error.value).startswith("no solver is called 'broken'")
    with pytest.raises(UsageError, match="did you mean 'leap'.*package 'pack'"):
        solvers.build({"name": "leep"})


def test_an_interrupt_is_no_broken_plugin(solvers: Registry[Any], plugins: list[Any]) -> None:
    plugins.append(entry("broken", raising(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        solvers["broken"]


def test_two_plugins_of_one_name_are_both_named(solvers: Registry[Any], plugins: list[Any]) -> None:
    plugins += [
        entry("leap", lambda: Churned),
        entry("leap", lambda: Heun, package="other"),
        entry("hop", lambda: Heun),
    ]
    with pytest.raises(UsageError, match="package 'pack'.*package 'other'.*uninstall one"):
        solvers["leap"]
    assert solvers["hop"] is Heun


def test_a_package_in_two_places_of_the_path_is_one(solvers: Registry[Any], plugins: list[Any]) -> None:
    plugins += [entry("leap", lambda: Churned), entry("leap", lambda: Churned)]
    assert solvers["leap"] is Churned


def test_a_module_may_register_its_parts_as_it_is_imported(solvers: Registry[Any], plugins: list[Any]) -> None:
    def load() -> object:
        solvers.register("leap")(Churned)
        solvers._factories.setdefault("hop", Heun)
        return SimpleNamespace()

    plugins += [entry("hop", load), entry("leap", load)]
    assert solvers["leap"] is Churned and solvers["hop"] is Heun
    with pytest.raises(UsageError, match="no solver is called 'x'; known: [a-z_, ]*$"):
        solvers["x"]


def test_entry_points_that_can_not_be_read_stop_no_other(
    solvers: Registry[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Damaged:
        metadata = {"Name": "torn"}

        @property
        def entry_points(self) -> object:
            raise TypeError("no =")

    def entry_points(group: str) -> list[Any]:
        raise TypeError("no =")

    whole = SimpleNamespace(entry_points=[entry("leap", lambda: Churned), entry("no", lambda: Heun, group="else")])
    monkeypatch.setattr(module, "entry_points", entry_points)
    monkeypatch.setattr(module, "distributions", lambda: [Damaged(), whole])
    assert solvers["leap"] is Churned and len(solvers) == 6
    with pytest.raises(UsageError, match="package 'torn': its entry points can't be read"):
        solvers["no"]


def unevaluated(rate: "Missing" = 1) -> object:  # type: ignore[name-defined]  # noqa: F821
    return rate


def positional(rate: float, /) -> float:
    return rate


def several(*rates: float, scale: float = 2.0) -> tuple[tuple[float, ...], float]:
    return rates, scale


def unhashable(rate: Any = {1}) -> object:  # noqa: B006
    return rate


class Signed:
    __signature__ = "none"


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (unevaluated, "annotations don't evaluate .*Missing"),
        (positional, "'rate' is positional only"),
        (unhashable, "defaults do not make a schema"),
        (Signed(), "constructor can't be inspected|annotations don't evaluate"),
        (iter, "constructor can't be inspected"),
    ],
)
def test_a_constructor_that_makes_no_schema_is_named(
    solvers: Registry[Any], plugins: list[Any], factory: Any, reason: str
) -> None:
    plugins.append(entry("odd", lambda: factory if callable(factory) else Signed))
    with pytest.raises(UsageError, match=rf"solver 'odd' of plugin 'odd' .*package 'pack'.*({reason})") as error:
        solvers.build({"name": "odd"})
    assert "\n" not in str(error.value)
    assert {"churn", "rate", "widths"} <= solvers.known_keys(), "those of the others"


def test_further_positional_arguments_are_no_key(solvers: Registry[Any]) -> None:
    solvers.register("several")(several)
    assert solvers.build({"name": "several", "scale": 3}) == ((), 3.0)


def registered() -> dict[str, list[str]]:
    """Registry -> names of diffaccel's own parts, by its source."""
    found: dict[str, list[str]] = {}
    for file in Path(module.__file__).parents[1].rglob("*.py"):
        for registry, name in re.findall(r"^@?([A-Z_]+)\.register\(\"(\w+)\"\)", file.read_text(), re.MULTILINE):
            found.setdefault(registry, []).append(name)
    return found


FRESH = """\
import importlib, json, os, sys
import torch, lightning  # once, which takes seconds; nothing of diffaccel
status = 0
for place, names in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    if os.fork() == 0:
        module, registry = place.split(":")
        found = getattr(importlib.import_module(module), registry)
        for name in names:
            found[name]  # the first lookup of this interpreter
        assert set(found) == set(names), place
        os._exit(0)
    status |= os.wait()[1]
sys.exit(bool(status))
"""


def test_built_in_parts_are_found_whatever_was_imported() -> None:
    own = registered()
    places = {place: sorted(own[place.partition(":")[2]]) for place in CATALOGUE.values()}
    assert len(places) == len(own), "a registry is in no catalogue"
    subprocess.run([sys.executable, "-c", FRESH, json.dumps(places)], check=True, timeout=300)


def test_modules_of_built_in_parts_are_imported_by_the_first_lookup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_parts").mkdir()
    for file in ("own_parts/__init__", "own_parts/one", "own_alone"):
        (tmp_path / f"{file}.py").write_text("")
    parts: Registry[Any] = Registry("solver", builtins=["own_parts", "own_alone"])
    own = {"own_parts", "own_parts.one", "own_alone"}
    assert not own & set(sys.modules)
    assert "absent" not in parts
    assert own <= set(sys.modules), "a package's modules too"
    for name in own:
        monkeypatch.delitem(sys.modules, name)
    assert "absent" not in parts and not own & set(sys.modules), "once"


def test_group_follows_the_kind() -> None:
    assert Registry("solver").group == "diffaccel.solvers"
    assert Registry("process", group="diffaccel.processes").group == "diffaccel.processes"


def test_suggestions() -> None:
    assert suggest("huen", ["heun", "euler"]) == "; did you mean 'heun'?"
    assert suggest("zzz", ["heun", "euler"]) == "; known: euler, heun"
