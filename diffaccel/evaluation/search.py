"""Search for the best prior and solver at each budget, with the same number of trials for every method.

Random settings from a seeded generator are compared in rounds with increasing numbers of images (successive halving).
All settings of a budget share their noise, so that differences are less noisy than distances.
"""

import copy
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table
from yaml import YAMLError  # OmegaConf's parser

from diffaccel.collective import World
from diffaccel.config import TUNABLE, Search
from diffaccel.errors import UsageError
from diffaccel.evaluation import Evaluator
from diffaccel.noise import NoiseStreams
from diffaccel.parts.history import explicit
from diffaccel.parts.overrides import as_given
from diffaccel.parts.registry import Registry
from diffaccel.parts.schema import suggest_key
from diffaccel.parts.trees import merge
from diffaccel.prior import PRIORS, ChainPrior, Prior
from diffaccel.report import append_point, read_points
from diffaccel.sampling import Sampler
from diffaccel.solver import GRIDS, SOLVERS, Listed
from diffaccel.solver.searched import FineTrajectory
from diffaccel.storage import write_whole
from diffaccel.text.terminal import PlainConsole

Settings = dict[str, dict[str, Any]]
"""``{"prior": ..., "solver": ...}``, with the name and keys of each part."""

STARTS = 64
"""Number of trajectories for the search of a grid."""
DRAWS = 200
"""Number of consecutive rejected draws after which a space counts as exhausted."""


def check_space(space: Mapping[str, Any]) -> None:
    """Check the keys, names and values of a search space.

    Args:
        space: Dotted key -> a list of values, or ``{low, high}`` with ``log: true`` or ``integer: true``. The key
            ``gamma`` applies to ``listed`` grids, whose levels are found by dynamic programming.

    Raises:
        UsageError: The space is empty, a key belongs to no prior or solver, a name is unknown, or values are neither a
            list nor a range.
    """
    if not space:
        raise UsageError("there is nothing to search, because the experiment has no search.space: set it")
    registries: dict[str, Registry[Any]] = {"prior": PRIORS, "solver": SOLVERS}
    for key, values in space.items():
        _value(key, values, np.random.default_rng(0))
        part, *path = key.split(".")
        registry = registries.get(part)
        if key == "gamma":
            continue
        if registry is None or not path:
            raise UsageError(f"search.space: {key!r} is neither gamma nor a key of {' or '.join(TUNABLE)}")
        while registry is not None and path:
            known = {"name"} | registry.known_keys()
            if path[0] not in known:
                raise UsageError(f"search.space: no {registry.kind} has a key {path[0]!r}{suggest_key(path[0], known)}")
            if path == ["name"]:
                for name in values:
                    registry[name]  # an unknown one is an error
            registry = registry.nested.get(path.pop(0))


def draw(space: Mapping[str, Any], own: Settings, rng: np.random.Generator) -> Settings:
    """Draw settings: the experiment's settings with drawn values, without keys that the drawn parts don't have.

    Args:
        space: Search space, see :func:`check_space`.
        own: Prior and solver of the experiment.
        rng: Random generator.
    """
    tree: dict[str, Any] = dict(own)
    gamma = None
    for key, values in space.items():
        value = _value(key, values, rng)
        if key == "gamma":
            gamma = value
            continue
        for name in reversed(key.split(".")):
            value = {name: value}
        tree = merge(tree, value)
    drawn = {"prior": _known(PRIORS, tree["prior"]), "solver": _known(SOLVERS, tree["solver"])}
    if "checkpoint" in own["prior"] and drawn["prior"]["name"] == own["prior"]["name"]:
        drawn["prior"]["checkpoint"] = own["prior"]["checkpoint"]  # not an argument of the prior, but read afterwards
    grid = drawn["solver"].get("grid", {})
    if "name" in grid and GRIDS[grid["name"]] is Listed:  # its levels are found later
        name = grid["name"]
        grid.clear()
        grid.update(name=name, gamma=gamma or 1.0)
    return drawn


def _value(key: str, values: Any, rng: np.random.Generator) -> Any:
    if isinstance(values, list) and values:
        return values[rng.integers(len(values))]
    if not isinstance(values, Mapping) or not {"low", "high"} <= values.keys() <= {"low", "high", "log", "integer"}:
        raise UsageError(f"search.space.{key}={values!r}: give a list of values, or {{low, high}} with log or integer")
    low, high = values["low"], values["high"]
    whole, log = bool(values.get("integer")), bool(values.get("log"))
    if not all(type(end) is int or (type(end) is float and not whole) for end in (low, high)):
        raise UsageError(f"search.space.{key}={values!r}: low and high must be {'whole ' * whole}numbers")
    if low > high or (log and (low <= 0 or whole)):
        rule = "low must not exceed high" if low > high else "log requires a positive low, and excludes integer"
        raise UsageError(f"search.space.{key}={values!r}: {rule}")
    if values.get("integer"):
        return int(rng.integers(low, high + 1))
    drawn = math.exp(rng.uniform(math.log(low), math.log(high))) if values.get("log") else rng.uniform(low, high)
    return float(f"{drawn:.3g}")


def _known(registry: Registry[Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a part, and the parts in it, without the keys that parts of their names don't have."""
    node = registry.normal(node)
    keys = registry.keys_of(node["name"])
    known = {key: value for key, value in node.items() if key == "name" or key in keys}
    for key, nested in registry.nested.items():
        if isinstance(known.get(key), Mapping) and "name" in known[key]:
            known[key] = _known(nested, known[key])
    return known


class Searcher:
    """Search of all budgets, one after the other.

    Each measured setting is a line of ``trials.jsonl``, from which an interrupted search is resumed. The winners are
    written to the experiment ``best.yaml``.

    Args:
        search: Number of settings and images, and the search space.
        own: Prior and solver of the experiment, which are the first setting of each budget.
        budgets: Maximum numbers of evaluations per image.
        n: Number of images that the winners will sample. The number of chains is scaled with the number of images, so
            that the burn-in per image and the drift are those of n images.
        seed: Seed of the noise and of the draws.
        base: Path of the experiment, for ``best.yaml``.
        prior: Function that builds a prior.
        evaluator: Function that builds an evaluator for a number of images.

    Raises:
        UsageError: A number is out of range, or the space is invalid.
    """

    def __init__(
        self,
        search: Search,
        own: Settings,
        budgets: list[float],
        n: int,
        seed: int,
        base: Path,
        prior: Callable[[dict[str, Any]], Prior],
        evaluator: Callable[[int], Evaluator],
    ) -> None:
        check_space(search.space)
        for budget in budgets:
            if not math.isfinite(budget) or budget != int(budget):
                raise UsageError(f"nfe={budget:g}: a search requires whole budgets")
        self.search, self.own, self.budgets, self.n, self.seed = search, own, budgets, n, seed
        self.base, self.build_prior = base, prior
        self.evaluators = {images: evaluator(images) for images in search.images}
        any_one = next(iter(self.evaluators.values()))
        self.out, self.metric = any_one.out, any_one.extractor.metric_name
        self.console = PlainConsole(stderr=True, soft_wrap=True)
        self.before, self.before_for = read_winners(self.out / "best.yaml", base)
        path = self.out / "trials.jsonl"
        trials = read_points(path) if path.is_file() else []
        self.measured = {self._key(trial): trial for trial in trials if _whole(trial)}
        self.broken = sum(not _whole(trial) for trial in trials)
        self.best: dict[int, Settings] = {}
        self.weights: list[str] = []
        self._trajectories: dict[str, FineTrajectory] = {}

    def run(self, sampler: Sampler, world: World = World()) -> dict[int, Settings]:  # noqa: B008 (frozen)
        """Search every budget, and return the best settings of each."""
        self.weights = sampler.weights_sha256()
        if self.before_for not in ([], self.weights):
            raise UsageError(f"{self.out / 'best.yaml'} contains settings for other weights: choose another out=")
        if self.broken and world.first:
            self.console.print(f"trials.jsonl: {self.broken} incomplete lines: their settings are measured again")
        for evaluator in self.evaluators.values():
            evaluator.to(sampler.device)
        for budget in self.budgets:
            self.best[int(budget)] = self._search(sampler, world, int(budget))
            if world.first:
                self._write()
        return self.best

    def _search(self, sampler: Sampler, world: World, budget: int) -> Settings:
        """Reduce the settings round by round, and return the best one."""
        field = self._field(sampler, budget)
        for number, images in enumerate(self.search.images, start=1):
            trials = []
            for settings in field:
                trials.append(self._measure(sampler, world, budget, images, settings))
                done, best = len(trials), min(trial["score"] for trial in trials)
                if world.first:
                    self.console.print(
                        f"nfe {budget}, round {number}: {done} of {len(field)} at n={images}, best {self.metric}"
                        f" {best:.4g}, this {trials[-1]['score']:.4g}",
                    )  # fmt: skip
            ranked = sorted(trials, key=lambda trial: trial["score"])
            if not math.isfinite(ranked[0]["score"]):
                reason = ranked[0].get("error", "no distance")
                raise UsageError(f"nfe={budget}: no setting of the space could be measured: {reason}")
            if world.first:
                self._report(ranked, budget, images)
            field = [trial["drawn"] for trial in ranked[: max(1, math.ceil(self.search.keep * len(ranked)))]]
        return ranked[0]["settings"]

    def _field(self, sampler: Sampler, budget: int) -> list[Settings]:
        """Draw distinct settings that are possible within the budget; the experiment's own settings come first."""
        rng = np.random.default_rng((self.seed, budget))
        field = [explicit(self.own)]
        vain = 0
        while len(field) < self.search.trials and vain < DRAWS:
            drawn = explicit(draw(self.search.space, self.own, rng))
            if drawn in field or not self._affordable(sampler, budget, drawn):
                vain += 1
                continue
            field.append(drawn)
            vain = 0
        return [settings for settings in field if self._affordable(sampler, budget, settings)]

    def _affordable(self, sampler: Sampler, budget: int, drawn: Settings) -> bool:
        """Whether the settings are possible within the budget in every round; an unknown key is an error."""
        prior, solver = self.build_prior(drawn["prior"]), SOLVERS.build(_without_gamma(drawn["solver"]))
        try:
            for images in self.search.images:
                self._scaled(prior, images).plan(solver, budget, images, sampler.extra_evaluations)
        except UsageError:
            return False
        return True

    def _scaled(self, prior: Prior, images: int) -> Prior:
        """Scale the number of chains with the number of images."""
        if isinstance(prior, ChainPrior):
            prior.chains = max(1, prior.chains * images // self.n)
        return prior

    def _measure(self, sampler: Sampler, world: World, budget: int, images: int, drawn: Settings) -> dict[str, Any]:
        """Measure settings, or look up an earlier measurement."""
        trial: dict[str, Any] = {"nfe_budget": budget, "n": images, "of": self.n, "seed": self.seed, "drawn": drawn}
        trial["extractor"] = self.evaluators[images].extractor.sha256
        trial["checkpoint"] = (self.evaluators[images].provenance["checkpoint"] or {}).get("sha256")
        if (key := self._key(trial)) in self.measured:
            return self._scored(self.measured[key])
        try:
            settings = self._filled(sampler, budget, drawn)
            prior = self._scaled(self.build_prior(settings["prior"]), images)
            own = sampler.using(prior, SOLVERS.build(settings["solver"]))
            point = self.evaluators[images].measure(own, budget, own.plan(budget, images), world=world)
            trial |= {"settings": settings, "nfe": point["nfe"], "metrics": point["metrics"]}
        except UsageError as error:  # for example a chain that leaves the denoiser's range
            trial["error"] = str(error)
        if world.first:
            append_point(self.out / "trials.jsonl", trial)
        self.measured[key] = trial
        return self._scored(trial)

    def _scored(self, trial: dict[str, Any]) -> dict[str, Any]:
        score = trial.get("metrics", {}).get(self.metric)
        return {**trial, "score": score if isinstance(score, int | float) else math.inf}

    @staticmethod
    def _key(trial: Mapping[str, Any]) -> str:
        names = ("nfe_budget", "n", "of", "seed", "drawn", "extractor", "checkpoint")
        return json.dumps([trial.get(name) for name in names], sort_keys=True)

    def _filled(self, sampler: Sampler, budget: int, drawn: Settings) -> Settings:
        """Replace a ``listed`` grid without levels by the grid found by dynamic programming."""
        grid = drawn["solver"].get("grid", {})
        if "gamma" not in grid:
            return drawn
        prior = self.build_prior(drawn["prior"]).to(sampler.device)
        solver = SOLVERS.build(_without_gamma(drawn["solver"]))
        steps = prior.plan(solver, budget, self.n, sampler.extra_evaluations).steps
        key = json.dumps(drawn["prior"], sort_keys=True)
        if key not in self._trajectories:
            with sampler.arithmetic():
                (indices, *_), noise = prior.schedule(STARTS, STARTS)[0], NoiseStreams(self.seed, range(STARTS))
                noise = noise.first(len(indices))
                state = prior.open(sampler.denoiser, self.seed, [indices], sampler.shape)
                x_t, t = prior(sampler.denoiser, noise, sampler.shape, 2, state)
                self._trajectories[key] = FineTrajectory(sampler.denoiser, x_t, t)
        found = self._trajectories[key].grid(steps, grid["gamma"], solver.denoise)
        node = {"name": grid["name"], "ratio_min": float(f"{found.ratio_min:.4g}"), "fractions": found.fractions}
        return {"prior": drawn["prior"], "solver": {**drawn["solver"], "grid": node}}

    def _report(self, ranked: list[dict[str, Any]], budget: int, images: int) -> None:
        table = Table(f"{self.metric}@{images}", "nfe", "prior", "solver", box=None, header_style="bold")
        for trial in ranked[:5]:
            parts = (_words(trial["drawn"][part]) for part in TUNABLE)
            table.add_row(f"{trial['score']:.4g}", f"{trial.get('nfe', math.nan):.4g}", *parts)
        middle = statistics.median(trial["score"] for trial in ranked)
        self.console.print(f"nfe {budget}, n={images}: best five of {len(ranked)} settings, median {middle:.4g}")
        self.console.print(table)

    def _write(self) -> None:
        """Write the winners so far as an experiment based on the searched one; winners of other budgets are kept."""
        best = {budget: copy.deepcopy(settings) for budget, settings in self.best.items()}
        for settings in best.values():  # inherited from the experiment; a path would be relative to best.yaml
            if settings["prior"].get("checkpoint") == self.own["prior"].get("checkpoint"):
                settings["prior"].pop("checkpoint", None)
        tree = {"base": str(self.base.resolve()), "tuned_for": self.weights, "by_nfe": {**self.before, **best}}
        write_whole(self.out / "best.yaml", OmegaConf.to_yaml(OmegaConf.create(as_given(tree))))
        for budget, settings in best.items():
            if self.before.get(budget, settings) != settings:
                self.console.print(f"nfe {budget}: best.yaml had another winner, whose trials are in trials.jsonl")
            self.before[budget] = settings


def read_winners(path: Path, base: Path) -> tuple[dict[int, Settings], list[str]]:
    """Read the winners of an earlier search by budget, and the hashes of their weights; empty if there is no file.

    Raises:
        UsageError: The file is not from a search of this experiment.
    """
    if not path.is_file():
        return {}, []
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict) or tree.get("base") != str(base.resolve()) or "by_nfe" not in tree:
        raise UsageError(f"{path} is not from a search of {base} and would be replaced: choose another out=")
    return cast(dict[int, Settings], tree["by_nfe"]), [str(one) for one in tree.get("tuned_for", [])]


def _whole(trial: Mapping[str, Any]) -> bool:
    """Whether a line of trials.jsonl is complete."""
    drawn, found = trial.get("drawn"), trial.get("settings")
    known = isinstance(drawn, Mapping) and all(isinstance(drawn.get(part), Mapping) for part in TUNABLE)
    measured = isinstance(found, Mapping) and isinstance(trial.get("metrics"), Mapping)
    return known and (isinstance(trial.get("error"), str) or measured and isinstance(trial.get("nfe"), int | float))


def _words(node: Mapping[str, Any]) -> str:
    """Describe a part in one line: dpmpp2m (denoise False, karras (rho 5))."""
    keys = [
        _words(value) if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in node.items()
        if key != "name" and value is not None
    ]
    return node["name"] + (f" ({', '.join(keys)})" if keys else "")


def _without_gamma(solver: Mapping[str, Any]) -> dict[str, Any]:
    grid = {key: value for key, value in solver.get("grid", {}).items() if key != "gamma"}
    return {**solver, "grid": grid} if grid else dict(solver)
