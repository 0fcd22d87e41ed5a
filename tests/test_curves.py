"""Curves: points of one differ in seed and budget alone, and no label stands for two."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from diffaccel.config import EXPERIMENTS, load
from diffaccel.experiment.identity import describe_configuration, settings_of
from diffaccel.report.curves import places_of
from diffaccel.report.points import normalised
from diffaccel.report.points import settings_of as read_settings


def point(nfe: float | None = 5, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A point as this version records it; dotted keys with two underscores."""
    found: dict[str, Any] = {
        **{"method": "edm", "experiment": "digits/edm", "process": "edm", "data": "digits", "prior": "gaussian"},
        **{"solver": "ddim", "settings": {"prior": {"name": "gaussian"}, "solver": {"name": "ddim"}}, "tuned": False},
        **{"checkpoint": {"path": "weights/edm.safetensors", "sha256": "a" * 64}, "nfe_budget": nfe, "nfe": nfe or 7},
        **{"n": 100, "seed": seed, "precision": "32-true", "configuration": {"process": {"name": "edm"}}},
        **{"extractor": {"name": "digits", "sha256": "b" * 64}, "reference": {"name": "digits", "sha256": "c" * 64}},
        "metrics": {"fd_digits": 1.0},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        branch = found
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    for part in ("prior", "solver"):
        if f"settings__{part}__name" in changes:
            found[part] = changes[f"settings__{part}__name"]
    found["images_sha256"] = changes.get("images_sha256", f"{random.random()}")
    found.setdefault("weights", {})
    return found


def labels(*points: dict[str, Any], folders: list[str] | None = None) -> list[str]:
    return [place.label for place in places_of(points, folders)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"settings__solver__eta": 1.0}, ["edm (ddim, gaussian)", "edm (eta=1)"]),
        ({"settings__solver__name": "heun"}, ["edm (ddim)", "edm (heun)"]),
        ({"settings__prior__ratio_star": 40}, ["edm (ddim, gaussian)", "edm (ratio_star=40)"]),
        ({"settings__solver__grid": {"name": "karras", "rho": 3}}, ["edm (ddim, gaussian)", "edm (grid=karras)"]),
        ({"n": 200}, ["edm (n=100)", "edm (n=200)"]),
        ({"precision": "bf16-mixed"}, ["edm (precision=32-true)", "edm (precision=bf16-mixed)"]),
        ({"checkpoint__sha256": "d" * 64},
         ["edm (checkpoint=edm.safetensors aaaaaa)", "edm (checkpoint=edm.safetensors dddddd)"]),
        ({"configuration__process__name": "vp"}, ["edm (process=edm)", "edm (process=vp)"]),
        ({"configuration__training": {"lr": 1e-4}}, ["edm (ddim, gaussian)", "edm (training.lr=0.0001)"]),
        ({"method": "tdpm"}, ["edm (ddim, gaussian)", "tdpm (ddim, gaussian)"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_label_names_what_differs_and_nothing_else(changes: dict[str, Any], expected: list[str]):
    assert labels(point(), point(**changes)) == expected
    assert labels(point(), point(**changes), folders=["a", "b"]) == expected, "a folder is no difference"
    assert labels(point(5), point(10, **changes)) == expected, "nor does another budget hide one"


def test_seeds_and_budgets_are_one_curve():
    points = [point(5), point(10), point(5, seed=1), point(None), point(5, seed=2, experiment="elsewhere/edm")]
    assert labels(*points, folders=["a", "a", "b", "c", "d"]) == ["edm (ddim, gaussian)"] * 5
    assert not any(place.replaced for place in places_of(points))


def test_many_settings_have_many_labels():
    """The grid of small T: each of twelve settings at four budgets."""
    points = [
        point(nfe, settings__prior={"name": "density", "T": T, "density": {"name": density}})
        for T in (0.2, 0.3, 0.4, 0.6)
        for density in ("normal", "gaussian", "flow")
        for nfe in (5, 10, 20, 50)
    ]
    found = labels(*points)
    assert [found[i] for i in (0, 4, 47)] == [
        "edm (T=0.2, density=normal)",
        "edm (T=0.2, density=gaussian)",
        "edm (T=0.6, density=flow)",
    ]
    assert len(set(found)) == 12 and all(found.count(label) == 4 for label in found)


def test_no_two_settings_share_a_label():
    """Values that print alike, settings within settings, lists, booleans: whatever differs, labels do."""
    values: list[Any] = [1, 1.0000000001, True, None, "true", [1, 2], [1, 2, 3], "x" * 50, "x" * 51, {"name": "a"}]
    values += [{"name": "a", "b": 1}, {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}}}}, "\x1b", "\\x1b"]
    points = [point(settings__solver__key=value) for value in values]
    points += [point(settings__prior__key=1), point(configuration__key=1), point(settings__solver__grid={"key": 1})]
    assert len(set(labels(*points))) == len(points)


def test_points_with_old_names_of_keys_share_a_curve_with_new_ones():
    for old, new in (("told", "level_scale"), ("skips", "chain_steps")):
        points = [point(5, **{f"settings__prior__{old}": 2}), point(10, **{f"settings__prior__{new}": 2.0})]
        assert labels(*points, point(5)) == [f"edm ({new}=2)"] * 2 + ["edm (ddim, gaussian)"]
    assert normalised(point() | {"plan": {"steps": 6, "skips": 4}})["plan"] == {"steps": 6, "chain_steps": 4}


def test_tuned_settings_are_one_curve_unless_something_is_laid_over_them():
    own = [point(nfe, tuned=True, settings__solver__name=solver, configuration__tuning="e" * 64)
           for nfe, solver in ((5, "unipc2"), (10, "dpm2"), (20, "heun"))]  # fmt: skip
    assert labels(*own) == ["edm (tuned for each NFE)"] * 3
    laid = [point(nfe, tuned=True, settings__solver__name="heun", configuration__tuning="f" * 64) for nfe in (5, 7)]
    assert labels(*own, *laid) == ["edm (tuned for each NFE)"] * 3 + ["edm (tuned for each NFE, heun)"] * 2
    assert labels(*own, point(5)) == ["edm (tuned for each NFE)"] * 3 + ["edm (ddim, gaussian)"]


def searched_point(nfe: float, file: dict[int, str], seed: int = 0) -> dict[str, Any]:
    """A point of an experiment that has a solver for each of two budgets."""
    found = point(nfe, seed, tuned=True, settings__solver__name=file[10 if nfe > 5 else 5], key=f"{nfe}{file}{seed}")
    tuning = {str(n): {**found["settings"], "solver": {"name": name}} for n, name in file.items()}
    return found | {"configuration": {"tuning": tuning}}


def test_a_search_of_one_budget_leaves_the_other_points_in_the_curve():
    """Points of a file whose budgets were searched one after the other, and one of them again."""
    measured = searched_point
    first, second, third = {5: "ddim", 10: "dpm2"}, {5: "ipndm", 10: "dpm2"}, {5: "ipndm", 10: "heun"}
    curve, other = "edm (tuned for each NFE)", "edm (tuned for each NFE, ddim)"
    assert labels(measured(10, first), measured(5, second)) == ["edm (tuned for each NFE)"] * 2
    assert labels(measured(5, first), measured(20, first), measured(5, second)) == [other, curve, curve]
    assert len(set(labels(measured(10, first), measured(5, second), measured(10, third)))) == 2
    assert len(set(labels(measured(10, first), measured(5, third)))) == 2  # 10 is another setting of this file


def test_searches_in_two_folders_keep_their_points():
    """They are compared with each other, also where they agree."""
    before, after = {5: "ddim", 10: "dpm2"}, {5: "ddim", 10: "heun"}
    both = [searched_point(nfe, file) for file in (before, after) for nfe in (5, 10)]
    for folders in (["a", "a", "b", "b"], ["b", "b", "a", "a"]):
        found = labels(*both, folders=folders)
        assert found[0] == found[1] != found[2] == found[3]
    assert (
        labels(*both[2:], searched_point(5, after, seed=1), folders=["b", "b", "seeds"])
        == ["edm (tuned for each NFE)"] * 3
    )


def test_damaged_settings_of_budgets_are_those_of_an_unknown_search():
    for tuning in ({"5.0": {}}, {"9" * 5000: {}}, {"5": 1}, {}, [], "x"):
        points = [point(5, tuned=True, settings__solver__name=name, configuration__tuning=tuning) for name in "ab"]
        assert len(set(labels(*points))) == 2


def test_weights_of_a_prior_are_told_apart_by_their_content():
    """As those of a denoiser are: neither another place of the file nor the same place tells."""

    def start(path: str, weights: str, tuned: bool, seed: int = 0) -> dict[str, Any]:
        settings = {"prior": {"name": "density", "checkpoint": path}, "solver": {"name": "ddim"}}
        return point(5, seed, tuned=tuned, settings=settings, weights={"density": weights})

    for tuned in (False, True):
        assert len(set(labels(start("a", "1" * 16, tuned), start("../a", "1" * 16, tuned, 1)))) == 1
        assert len(set(labels(start("a", "1" * 16, tuned), start("a", "2" * 16, tuned, 1)))) == 2


def test_tuned_points_of_an_older_version_are_told_apart_by_their_settings():
    def old(nfe: float, solver: str, seed: int = 0) -> dict[str, Any]:
        return point(
            nfe, seed, tuned=True, settings__solver__name=solver, configuration=None, key=f"{nfe}{solver}{seed}"
        )

    own = [old(5, "unipc2"), old(10, "dpm2"), old(10, "dpm2", seed=1)]
    laid = [old(nfe, solver) for solver in ("heun", "ddim") for nfe in (5, 10)]
    expected = ["edm (tuned for each NFE)"] * 3
    expected += [f"edm (tuned for each NFE, {solver})" for solver in ("heun", "ddim") for _ in range(2)]
    assert labels(*own, *laid, folders=["own", "own", "seeds", *["laid"] * 4]) == expected


def test_the_last_of_the_same_measurement_counts():
    first, second = point(key="1", images_sha256="x"), point(key="1", images_sha256="y")
    third = point(key="2", images_sha256="y")  # another version's key for the same images
    assert [place.replaced for place in places_of([first, second, third])] == [True, True, False]
    assert len(set(labels(first, second, third))) == 1
    copies = places_of([first, second, second], ["a", "a", "copy"])
    assert [place.replaced for place in copies] == [True, False, True]


def test_what_points_do_not_record_still_tells_them_apart():
    """Other images of the same seed: before and after a change of the code, or an older version's missing keys."""
    before, after = point(key="1"), point(key="1")
    assert labels(before, after, folders=["before", "after"]) == ["edm (folder=before)", "edm (folder=after)"]
    assert len(set(labels(point(key="1"), point(key="2"), point(10, key="3")))) == 3
    older = point(configuration=None)
    assert labels(point(), older) == ["edm (ddim, gaussian)", "edm (older version)"]


def test_anything_has_a_label():
    junk: list[dict[str, Any]] = [
        {},
        {"method": 3},
        {"settings": []},
        {"settings": {"prior": 1, "solver": {"name": []}}},
    ]
    assert all(labels(*junk)) and all(isinstance(place.replaced, bool) for place in places_of(junk))
    assert places_of([]) == []


SEARCHED = sorted(file for file in EXPERIMENTS.glob("*/*.yaml") if "\nby_nfe:" in file.read_text())


@pytest.mark.parametrize("file", SEARCHED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_points_of_an_experiment_have_the_settings_that_it_names(file: Path):
    config = load(file)
    tuning = json.loads(json.dumps(describe_configuration(config, measured=True)))["tuning"]
    for budget in config.by_nfe:
        found = normalised({"settings": json.loads(json.dumps(settings_of(config, budget)))})
        assert found["settings"] == read_settings(tuning[str(budget)])
