"""Search for the best prior and solver at each budget, with the same number of trials for every method.

Listed candidates and random settings from a seeded generator are compared in rounds with increasing numbers of images
(successive halving). The best few of the last round are measured again on another seed, which decides, because the best
of many is also the luckiest. All settings of a budget share their noise, so that differences are less noisy than
distances.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from rich.table import Table

from diffaccel.collective import World
from diffaccel.config import TUNABLE, Search
from diffaccel.errors import UsageError
from diffaccel.evaluation import Evaluator, Identity
from diffaccel.evaluation.eligible import INDEPENDENT, exclusion
from diffaccel.evaluation.provenance import identity_hash
from diffaccel.evaluation.space import Settings, candidates_of, check_space, draw, gamma_of, in_words, without_gamma
from diffaccel.evaluation.trials import Trial, Trials
from diffaccel.evaluation.winners import Winners
from diffaccel.noise import NoiseStreams
from diffaccel.parts.history import explicit
from diffaccel.prior import ChainPrior, Prior
from diffaccel.sampling import Sampler, Setting
from diffaccel.sampling.conditions import condition_by_index
from diffaccel.solver import SOLVERS
from diffaccel.solver.searched import FineTrajectory
from diffaccel.text.terminal import PlainConsole

STARTS = 64
"""Number of trajectories for the search of a grid."""
DRAWS = 200
"""Number of consecutive rejected draws after which a space counts as exhausted."""


class Searcher:
    """Search of all budgets, one after the other.

    Each measured setting is a line of ``trials.jsonl``, from which an interrupted search is resumed: a setting is
    measured again if anything that determines its distance has changed. The winners are written to the experiment
    ``best.yaml``.

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
        prior: Function that builds a prior.
        evaluator: Function that builds an evaluator for a number of images and a seed.
        identity: Function of an evaluator that returns a function of budget and settings -> everything that determines
            the distance that the evaluator measures.
        winners: Function that opens ``best.yaml`` for what determines the scores of given images.
        again: Whether to measure settings again that are in ``trials.jsonl``.
        note: Message to be printed first; empty for none.

    Raises:
        UsageError: A number is out of range, the space or a candidate is invalid, the experiment fixes the number of
            chains, or ``best.yaml`` is of another search.
    """

    def __init__(
        self,
        search: Search,
        own: Callable[[float], Settings],
        budgets: list[float],
        n: int,
        seed: int,
        prior: Callable[[dict[str, Any]], Prior],
        evaluator: Callable[[int, int], Evaluator],
        identity: Callable[[Evaluator], Callable[[float, Settings], Identity]],
        winners: Callable[[Mapping[str, Any]], Winners],
        again: bool = False,
        note: str = "",
    ) -> None:
        check_space(search.space)
        for budget in budgets:
            if not math.isfinite(budget) or budget != int(budget):
                raise UsageError(f"nfe={budget:g}: a search requires whole budgets")
        self.search, self.own, self.budgets, self.n, self.seed = search, own, budgets, n, seed
        self.build_prior, self.note = prior, note
        self.candidates = candidates_of(search.candidates, own(math.inf))
        for settings in (own(math.inf), *map(own, budgets), *self.candidates):
            self._check(settings)
        confirm = search.confirm
        self.second = (confirm.n or search.images[-1], seed + 1 if confirm.seed is None else confirm.seed)
        if self.second[1] == seed:
            raise UsageError(f"search.confirm.seed={seed} is the seed of the search: choose another one")
        sizes = [(images, seed) for images in search.images] + ([self.second] if confirm.best > 1 else [])
        self.evaluators = {size: evaluator(*size) for size in sizes}
        self.identities = {size: identity(one) for size, one in self.evaluators.items()}
        any_one = next(iter(self.evaluators.values()))
        self.out, self.metric = any_one.out, any_one.extractor.metric_name
        self.console = PlainConsole(stderr=True, soft_wrap=True)
        self.winners = winners(any_one.judges[0].identity())
        self.trials = Trials(self.out / "trials.jsonl", again)
        self.best: dict[int, Settings] = {}
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
        kept = {budget: one for budget, one in self.winners.settings.items() if budget not in self.budgets}
        if (before := self.winners.tuned_for) and not set(self._weights(sampler, kept)) <= set(before):
            raise UsageError(f"{self.out / 'best.yaml'} contains settings for other weights: choose another out=")
        if self.note and world.first:
            self.console.print(self.note)
        if self.trials.unusable and world.first:
            self.console.print(
                f"trials.jsonl: {self.trials.unusable} incomplete or older lines: their settings are measured again"
            )
        for evaluator in self.evaluators.values():
            evaluator.to(sampler.device)
        for budget in self.budgets:
            best = self.best[int(budget)] = self._search(sampler, world, int(budget))
            weights = self._weights(sampler, {**self.winners.settings, int(budget): best})
            if world.first and self.winners.write(int(budget), best, weights):
                self.console.print(f"nfe {budget:g}: best.yaml had another winner, whose trials are in trials.jsonl")
        return self.best

    def _weights(self, sampler: Sampler, winners: Mapping[int, Settings]) -> list[str]:
        """Hashes of the weights that the experiment's own settings and winners use."""
        chosen = {budget: Setting(self.build_prior(one["prior"]), sampler.solver) for budget, one in winners.items()}
        return sampler.using(sampler.prior, by_nfe={**sampler.by_nfe, **chosen}).weights_sha256()

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
                best = min((one["score"] for one in trials if not one["excluded"]), default=math.inf)
                failed, excluded = trial.get("error"), trials[-1]["excluded"]
                said = f" (failed: {failed})" if failed else f" (not eligible: {excluded})" if excluded else ""
                self.console.print(
                    f"nfe {budget}, {name}: {len(trials)} of {len(field)} at n={size[0]}, best {self.metric}"
                    f" {best:.4g}, this {trial['score']:.4g}{said}"
                )
        ranked = sorted(trials, key=lambda one: (not math.isfinite(one["score"]), bool(one["excluded"]), one["score"]))
        if not math.isfinite(ranked[0]["score"]):
            reason = ranked[0].get("error", "no distance")
            raise UsageError(f"nfe={budget}: no setting of the space could be measured: {reason}")
        if world.first:
            self._report(ranked, budget, size[0])
        return ranked

    def _independent(self, sampler: Sampler, world: World, budget: int, size: tuple[int, int]) -> dict[str, float]:
        """Metrics of the experiment's solver from independent starts; empty if it can't be measured."""
        settings = explicit({"prior": INDEPENDENT, "solver": self.own(math.inf)["solver"]})
        if self._problem(sampler, budget, settings):
            return {}
        found: dict[str, float] = self._measure(sampler, world, budget, size, settings).get("metrics", {})
        return found

    def _field(self, sampler: Sampler, budget: int) -> list[Settings]:
        """List distinct settings that are possible within the budget: the experiment's own, the candidates, and draws.

        The experiment's own settings are those of no budget and those that ``by_nfe`` has for this budget.

        Raises:
            UsageError: No setting is possible.
        """
        rng = np.random.default_rng((self.seed, budget))
        field: list[Settings] = []
        problems: list[str] = []
        for settings in map(explicit, (self.own(math.inf), self.own(budget), *self.candidates)):
            if problem := self._problem(sampler, budget, settings):
                problems.append(problem)
            elif settings not in field:
                field.append(settings)
        field, vain = field[: self.search.trials], 0
        while len(field) < self.search.trials and vain < DRAWS:
            drawn = explicit(draw(self.search.space, self.own(math.inf), rng))
            if drawn in field or self._problem(sampler, budget, drawn):
                vain += 1
                continue
            field.append(drawn)
            vain = 0
        if not field:
            raise UsageError(f"no setting of the space is possible; with the experiment's own settings: {problems[0]}")
        return field

    def _problem(self, sampler: Sampler, budget: int, drawn: Settings) -> str:
        """Return why settings are not possible within the budget in every round; empty if they are.

        Raises:
            UsageError: A key is unknown.
        """
        own = sampler.using(self.build_prior(drawn["prior"]), SOLVERS.build(without_gamma(drawn["solver"])))
        try:
            for images, _ in self.evaluators:
                own.plan(budget, images)
        except UsageError as error:
            return str(error)
        return ""

    def _measure(self, sampler: Sampler, world: World, budget: int, size: tuple[int, int], drawn: Settings) -> Trial:
        """Measure settings with a number of images and a seed, or look up an earlier measurement."""
        evaluator, found = self.evaluators[size], self.identities[size](budget, drawn)
        planned_for = {} if gamma_of(drawn["solver"]) is None else {"planned_for": self.n}  # as many steps
        key = identity_hash({**found.images, **found.scores, **planned_for})
        if key in self.trials.measured:
            return self._scored(self.trials.measured[key])
        trial: Trial = {"key": key, "nfe_budget": budget, "n": size[0], "seed": size[1], "drawn": drawn}
        try:
            settings = self._filled(sampler, budget, drawn)
            own = sampler.using(self.build_prior(settings["prior"]), SOLVERS.build(settings["solver"]))
            point = evaluator.measure(own, budget, own.plan(budget, size[0]), world=world)
            kept = {name: point.get(name) for name in ("nfe", "chains", "metrics", "neighbourhoods")}
            trial |= {"settings": settings, **kept}
        except UsageError as error:  # for example a chain that leaves the denoiser's range
            trial["error"] = str(error)
        self.trials.add(trial, write=world.first)
        return self._scored(trial)

    def _scored(self, trial: Trial) -> Trial:
        score = trial.get("metrics", {}).get(self.metric)
        return {**trial, "score": score if isinstance(score, int | float) else math.inf}

    def _filled(self, sampler: Sampler, budget: int, drawn: Settings) -> Settings:
        """Replace a ``listed`` grid without levels by the grid found by dynamic programming."""
        if (gamma := gamma_of(drawn["solver"])) is None:
            return drawn
        solver = SOLVERS.build(without_gamma(drawn["solver"]))
        plan = sampler.using(prior := self.build_prior(drawn["prior"]), solver).plan(budget, self.n)
        key = json.dumps(drawn["prior"], sort_keys=True)
        if key not in self._trajectories:
            with sampler.arithmetic():
                noise, indices = NoiseStreams(self.seed, range(STARTS)), range(STARTS)
                state = prior.open(sampler.denoiser, self.seed, [indices], sampler.shape)
                condition = condition_by_index(sampler.takes, prior, sampler.inputs, indices, sampler.device)
                denoiser = sampler.denoiser.given(condition)
                x_t, t = prior(denoiser, noise, sampler.shape, 2, state)
                self._trajectories[key] = FineTrajectory(denoiser, x_t, t)
        found = self._trajectories[key].grid(plan.steps, gamma, solver.denoise)
        ends = {"ratio_min": float(f"{found.ratio_min:.4g}"), "ratio_cap": found.ratio_cap}
        node = {"name": drawn["solver"]["grid"]["name"], **ends, "fractions": found.fractions}
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
