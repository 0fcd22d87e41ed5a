"""Defaults that have changed: what settings mean stays what it was, in experiments, points and searches."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_curves import labels, point

from diffaccel.config import EXPERIMENTS, load
from diffaccel.evaluation.space import check_space
from diffaccel.experiment.identity import identify_images
from diffaccel.parts.history import FORMER, as_measured, explicit
from diffaccel.prior import PRIORS
from diffaccel.report.points import normalised
from diffaccel.solver import SOLVERS

FILES = sorted(path for path in EXPERIMENTS.glob("*/*.yaml") if path.parent.name != "sweeps")
VARIANTS = ("lower_order_final", "variant", "D2", "mode", "max_order", "analytic_first", "denoise")
"""Keys of multistep solvers that a search should draw."""


def nodes(tree: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings in a tree."""
    values = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    if isinstance(tree, Mapping):
        yield tree
    for value in values:
        yield from nodes(value)


@pytest.mark.parametrize("name", FORMER)
def test_former_defaults_are_no_longer_the_defaults(name: str):
    whole = (SOLVERS if name in SOLVERS else PRIORS).complete({"name": name})
    assert all(whole[key] != value for key, value in FORMER[name].items())


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_searched_settings_do_not_depend_on_changed_defaults(path):
    """Neither do the chains and objectives that were searched with them; chains state their images per chain."""
    tree = OmegaConf.to_container(OmegaConf.load(path))
    searched = [tree.get("by_nfe"), tree.get("prior"), tree.get("method")]
    for node in [node for part in searched for node in nodes(part)]:
        if node.get("name") in ("chain", "restart"):
            assert "images_per_chain" in node and "chains" not in node
        elif isinstance(node.get("name"), str) and (former := FORMER.get(node["name"])) is not None:
            assert former.keys() <= node.keys(), "what changed is stated"
    if tree.get("by_nfe"):
        config = load(str(path.relative_to(EXPERIMENTS).with_suffix("")))
        for budget in config.by_nfe:
            solver = config.at(budget)["solver"]
            assert FORMER.get(solver["name"], {}).keys() <= solver.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_space_has_the_variants_of_its_solvers(path):
    space = load(str(path.relative_to(EXPERIMENTS).with_suffix(""))).search.space if "base" not in path.stem else {}
    if not space:
        return
    check_space(space)
    names = space.get("solver.name", [])
    multistep = [name for name in names if "lower_order_final" in SOLVERS.keys_of(name)]
    needed = {key for name in multistep for key in VARIANTS[:4] if key in SOLVERS.keys_of(name)}
    assert {f"solver.{key}" for key in needed} <= space.keys()
    if path.stem == "edm_best":
        assert {f"solver.{key}" for key in VARIANTS} <= space.keys()
        assert None in space["solver.analytic_first"] and set(space["solver.denoise"]) == {True, False}


def test_points_record_the_values_of_changed_defaults():
    chain = {"name": "chain", "init_solver": {"name": "unipc2", "variant": "bh2"}}
    found = explicit({"prior": chain, "solver": {"name": "deis", "max_order": 2}})
    assert found["prior"]["init_solver"] == {"name": "unipc2", "variant": "bh2", "lower_order_final": True}
    assert found["prior"]["chains"] is None, "the former default was a number"
    assert found["solver"] == {"name": "deis", "max_order": 2, "mode": "tab"}
    assert chain == {"name": "chain", "init_solver": {"name": "unipc2", "variant": "bh2"}}, "unchanged"
    plain = {"prior": {"name": "gaussian"}, "solver": {"name": "heun", "grid": {"name": "karras"}}}
    assert explicit(plain) == plain


def test_images_of_a_changed_default_are_others():
    """So that a bench doesn't take a point that was measured before for its own."""
    config = load("digits/edm", ["solver=dpmpp3m"])
    settings = identify_images(config)(10)["settings"]
    assert settings["solver"] == {"name": "dpmpp3m", "lower_order_final": True, "D2": "published"}


def test_older_points_have_the_former_defaults():
    solver = {"name": "dpmpp3m", "denoise": False}
    assert as_measured(solver) == {**solver, "lower_order_final": False, "D2": "parabola"}
    old = point(settings__solver={"name": "dpmpp3m"}, solver="dpmpp3m")
    now = point(settings__solver=explicit({"solver": {"name": "dpmpp3m"}})["solver"], solver="dpmpp3m")
    former = point(seed=1, settings__solver={"name": "dpmpp3m", **FORMER["dpmpp3m"]}, solver="dpmpp3m")
    first, second, third = labels(old, now, former)
    assert first == third == "edm (lower_order_final=false, D2=parabola)"
    assert second == "edm (lower_order_final=true, D2=published)"
    named = {key: value for key, value in old.items() if key != "settings"}  # which only names its solver
    assert normalised(named)["settings"]["solver"] == {"name": "dpmpp3m", **FORMER["dpmpp3m"]}
    chain = {"name": "chain", "init_solver": {"name": "dpmpp2m"}}
    first, second = labels(
        point(settings__prior=chain, prior="chain"),
        point(settings__prior=explicit({"prior": chain})["prior"], prior="chain"),
    )
    assert first != second and "lower_order_final=false" in first
    old = normalised(point(settings__prior={"name": "chain", "eta": 2.0}, prior="chain"))
    assert old["settings"]["prior"] == {"name": "chain", "eta": 2.0, "chains": 100}
    given = normalised(point(settings__prior={"name": "restart", "chains": 40}, prior="restart"))
    assert given["settings"]["prior"]["chains"] == 40
