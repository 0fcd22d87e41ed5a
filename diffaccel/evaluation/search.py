"""Search for the best prior and solver at each budget, with the same number of trials for every method.

Listed candidates and random settings from a seeded generator are compared in rounds with increasing numbers of images
(successive halving). The best few of the last round are measured again on another seed, which decides, because the best
of many is also the luckiest. All settings of a budget share their noise, so that differences are less noisy than
distances.
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
from diffaccel.evaluation.eligible import INDEPENDENT, exclusion
from diffaccel.evaluation.space import Settings, candidates_of, check_space, draw, in_words, without_gamma
from diffaccel.noise import NoiseStreams
from diffaccel.parts.history import explicit
from diffaccel.parts.overrides import as_given
from diffaccel.prior import ChainPrior, Prior
from diffaccel.report import append_point, read_points
from diffaccel.sampling import Sampler
from diffaccel.sampling.conditions import condition_by_index
from diffaccel.solver import SOLVERS
from diffaccel.solver.searched import FineTrajectory
from diffaccel.storage import write_whole
from diffaccel.text.terminal import PlainConsole

STARTS = 64
"""Number of trajectories for the search of a grid."""
DRAWS = 200
"""Number of consecutive rejected draws after which a space counts as exhausted."""

Trial = dict[str, Any]


class Searcher:
    """Search of all budgets, one after the other.

    Each measured setting is a line of ``trials.jsonl``, from which an interrupted search is resumed. The winners are
    written to the experiment ``best.yaml``.

    The objective is the Frechet distance of the judge among the settings that are eligible: a chain whose images repeat
    one another is not, see :func:`~diffaccel.evaluation.eligible.exclusion`. For a search with chains, the experiment's
    solver is first measured from independent Gaussian starts, for comparison only.

    Args:
        search: Number of settings and images, candidates, search space, and confirmation.
        own: Budget -> prior and solver of the experiment; infinity for those of no budget. Both are settings of the
            first round.
        budgets: Maximum numbers of evaluations per image.
        n: Number of images that the winners will sample.
        seed: Seed of the noise and of the draws.
        base: Path of the experiment, for ``best.yaml``.
        prior: Function that builds a prior.
        evaluator: Function that builds an evaluator for a number of images and a seed.
        note: Message to be printed first; empty for none.

    Raises:
        UsageError: A number is out of range, the space or a candidate is invalid, or the experiment fixes the number
            of chains.
    """

    def __init__(
        self,
        search: Search,
        own: Callable[[float], Settings],
        budgets: list[float],
        n: int,
        seed: int,
        base: Path,
        prior: Callable[[dict[str, Any]], Prior],
        evaluator: Callable[[int, int], Evaluator],
        note: str = "",
    ) -> None:
        check_space(search.space)
        for budget in budgets:
            if not math.isfinite(budget) or budget != int(budget):
                raise UsageError(f"nfe={budget:g}: a search requires whole budgets")
        self.search, self.own, self.budgets, self.n, self.seed = search, own, budgets, n, seed
        self.base, self.build_prior, self.note = base, prior, note
        self.candidates = candidates_of(search.candidates, own(math.inf))
        for settings in (own(math.inf), *self.candidates):
            self._check(settings)
        confirm = search.confirm
        self.second = (confirm.n or search.images[-1], seed + 1 if confirm.seed is None else confirm.seed)
        if self.second[1] == seed:
            raise UsageError(f"search.confirm.seed={seed} is the seed of the search: choose another one")
        sizes = [(images, seed) for images in search.images] + ([self.second] if confirm.best > 1 else [])
        self.evaluators = {size: evaluator(*size) for size in sizes}
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

    def _check(self, settings: Settings) -> None:
        """Build a setting, for errors before long work."""
        prior = self.build_prior(settings["prior"])
        SOLVERS.build(without_gamma(settings["solver"]))
        if isinstance(prior, ChainPrior) and prior.chains is not None:
            raise UsageError(
                f"prior.chains={prior.chains}: the rounds of a search have different numbers of images, so that chains "
                f"would differ in length: set prior.images_per_chain={self.n / prior.chains:g} and prior.chains=null"
            )

    def run(self, sampler: Sampler, world: World = World()) -> dict[int, Settings]:  # noqa: B008 (frozen)
        """Search every budget, and return the best settings of each."""
        self.weights = sampler.weights_sha256()
        if self.before_for not in ([], self.weights):
            raise UsageError(f"{self.out / 'best.yaml'} contains settings for other weights: choose another out=")
        if self.note and world.first:
            self.console.print(self.note)
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
        """Reduce the settings round by round, confirm the best ones, and return the winner."""
        field = self._field(sampler, budget)
        if len(field) < self.search.trials and world.first:
            self.console.print(f"nfe {budget}: only {len(field)} different settings of the space fit the budget")
        ranked: list[Trial] = []
        for number, images in enumerate(self.search.images, start=1):
            ranked = self._round(sampler, world, budget, (images, self.seed), field, f"round {number}")
            field = [trial["drawn"] for trial in ranked[: max(1, math.ceil(self.search.keep * len(ranked)))]]
        best = [trial["drawn"] for trial in ranked[: self.search.confirm.best]]
        if self.search.confirm.best > 1:
            ranked = self._round(sampler, world, budget, self.second, best, f"confirmation on seed {self.second[1]}")
        if reason := ranked[0]["excluded"]:
            raise UsageError(f"nfe={budget}: no setting is eligible: that of the lowest distance has {reason}")
        return cast(Settings, ranked[0]["settings"])

    def _round(
        self, sampler: Sampler, world: World, budget: int, size: tuple[int, int], field: list[Settings], name: str
    ) -> list[Trial]:
        """Measure settings, and rank them: those that are eligible first, by distance."""
        chained = any(isinstance(self.build_prior(settings["prior"]), ChainPrior) for settings in field)
        independent = self._independent(sampler, world, budget, size) if chained else {}
        trials: list[Trial] = []
        for settings in field:
            trial = self._measure(sampler, world, budget, size, settings)
            trials.append({**trial, "excluded": exclusion(trial, independent)})
            if world.first:
                eligible = [one["score"] for one in trials if not one["excluded"]]
                best, said = min(eligible, default=math.inf), trials[-1]["excluded"]
                self.console.print(
                    f"nfe {budget}, {name}: {len(trials)} of {len(field)} at n={size[0]}, best {self.metric}"
                    f" {best:.4g}, this {trial['score']:.4g}" + (f" (not eligible: {said})" if said else ""),
                )  # fmt: skip
        ranked = sorted(trials, key=lambda trial: (bool(trial["excluded"]), trial["score"]))
        if not any(math.isfinite(trial["score"]) for trial in ranked):
            reason = ranked[0].get("error", "no distance")
            raise UsageError(f"nfe={budget}: no setting of the space could be measured: {reason}")
        if world.first:
            self._report(ranked, budget, size[0])
        return ranked

    def _independent(self, sampler: Sampler, world: World, budget: int, size: tuple[int, int]) -> dict[str, float]:
        """Metrics of the experiment's solver from independent starts; empty if it can't be measured."""
        settings = explicit({"prior": INDEPENDENT, "solver": self.own(math.inf)["solver"]})
        if not self._affordable(sampler, budget, settings):
            return {}
        found: dict[str, float] = self._measure(sampler, world, budget, size, settings).get("metrics", {})
        return found

    def _field(self, sampler: Sampler, budget: int) -> list[Settings]:
        """List distinct settings that are possible within the budget: the experiment's own, the candidates, and draws.

        The experiment's own settings are those of no budget and those that ``by_nfe`` has for this budget.
        """
        rng = np.random.default_rng((self.seed, budget))
        field: list[Settings] = []
        for settings in map(explicit, (self.own(math.inf), self.own(budget), *self.candidates)):
            if settings not in field and self._affordable(sampler, budget, settings):
                field.append(settings)
        field, vain = field[: self.search.trials], 0
        while len(field) < self.search.trials and vain < DRAWS:
            drawn = explicit(draw(self.search.space, self.own(math.inf), rng))
            if drawn in field or not self._affordable(sampler, budget, drawn):
                vain += 1
                continue
            field.append(drawn)
            vain = 0
        return field

    def _affordable(self, sampler: Sampler, budget: int, drawn: Settings) -> bool:
        """Whether the settings are possible within the budget in every round; an unknown key is an error."""
        prior, solver = self.build_prior(drawn["prior"]), SOLVERS.build(without_gamma(drawn["solver"]))
        try:
            for images, _ in self.evaluators:
                prior.plan(solver, budget, images, sampler.extra_evaluations)
        except UsageError:
            return False
        return True

    def _measure(self, sampler: Sampler, world: World, budget: int, size: tuple[int, int], drawn: Settings) -> Trial:
        """Measure settings with a number of images and a seed, or look up an earlier measurement."""
        evaluator = self.evaluators[size]
        trial: Trial = {"nfe_budget": budget, "n": size[0], "seed": size[1], "drawn": drawn}
        trial["extractor"] = evaluator.extractor.sha256
        trial["checkpoint"] = (evaluator.provenance["checkpoint"] or {}).get("sha256")
        if (key := self._key(trial)) in self.measured:
            return self._scored(self.measured[key])
        try:
            settings = self._filled(sampler, budget, drawn)
            own = sampler.using(self.build_prior(settings["prior"]), SOLVERS.build(settings["solver"]))
            point = evaluator.measure(own, budget, own.plan(budget, size[0]), world=world)
            trial |= {"settings": settings, "nfe": point["nfe"], "chains": point["chains"], "metrics": point["metrics"]}
        except UsageError as error:  # for example a chain that leaves the denoiser's range
            trial["error"] = str(error)
        if world.first:
            append_point(self.out / "trials.jsonl", trial)
        self.measured[key] = trial
        return self._scored(trial)

    def _scored(self, trial: Trial) -> Trial:
        score = trial.get("metrics", {}).get(self.metric)
        return {**trial, "score": score if isinstance(score, int | float) else math.inf}

    @staticmethod
    def _key(trial: Mapping[str, Any]) -> str:
        names = ("nfe_budget", "n", "seed", "drawn", "extractor", "checkpoint")
        return json.dumps([trial.get(name) for name in names], sort_keys=True)

    def _filled(self, sampler: Sampler, budget: int, drawn: Settings) -> Settings:
        """Replace a ``listed`` grid without levels by the grid found by dynamic programming."""
        grid = drawn["solver"].get("grid", {})
        if "gamma" not in grid:
            return drawn
        prior = self.build_prior(drawn["prior"]).to(sampler.device)
        solver = SOLVERS.build(without_gamma(drawn["solver"]))
        steps = prior.plan(solver, budget, self.n, sampler.extra_evaluations).steps
        key = json.dumps(drawn["prior"], sort_keys=True)
        if key not in self._trajectories:
            with sampler.arithmetic():
                noise, indices = NoiseStreams(self.seed, range(STARTS)), range(STARTS)
                state = prior.open(sampler.denoiser, self.seed, [indices], sampler.shape)
                condition = condition_by_index(sampler.takes, prior, sampler.inputs, indices, sampler.device)
                denoiser = sampler.denoiser.given(condition)
                x_t, t = prior(denoiser, noise, sampler.shape, 2, state)
                self._trajectories[key] = FineTrajectory(denoiser, x_t, t)
        found = self._trajectories[key].grid(steps, grid["gamma"], solver.denoise)
        node = {"name": grid["name"], "ratio_min": float(f"{found.ratio_min:.4g}"), "fractions": found.fractions}
        return {"prior": drawn["prior"], "solver": {**drawn["solver"], "grid": node}}

    def _report(self, ranked: list[Trial], budget: int, images: int) -> None:
        table = Table(box=None, header_style="bold")
        for head in (f"{self.metric}@{images}", "recall", "nfe"):
            table.add_column(head, no_wrap=True)
        for head in TUNABLE:
            table.add_column(head)
        for trial in ranked[:5]:
            parts = (in_words(trial["drawn"][part]) for part in TUNABLE)
            recall = trial.get("metrics", {}).get("recall", math.nan)
            table.add_row(f"{trial['score']:.4g}", f"{recall:.3f}", f"{trial.get('nfe', math.nan):.4g}", *parts)
        middle, excluded = (
            statistics.median(trial["score"] for trial in ranked),
            sum(bool(t["excluded"]) for t in ranked),
        )
        said = f", {excluded} of them not eligible" if excluded else ""
        self.console.print(f"nfe {budget}, n={images}: best five of {len(ranked)} settings{said}, median {middle:.4g}")
        self.console.print(table)

    def _write(self) -> None:
        """Write the winners so far as an experiment based on the searched one; winners of other budgets are kept."""
        best, own = {budget: copy.deepcopy(settings) for budget, settings in self.best.items()}, self.own(math.inf)
        for settings in best.values():  # inherited from the experiment; a path would be relative to best.yaml
            if settings["prior"].get("checkpoint") == own["prior"].get("checkpoint"):
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
