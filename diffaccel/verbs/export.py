"""``export``: a sampling setting as plain JSON, or as the list of noise levels that another tool takes."""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from diffaccel.config import Config, load
from diffaccel.errors import UsageError, suggest
from diffaccel.experiment.build import build_frozen
from diffaccel.experiment.models import build_checkpoint
from diffaccel.prior import Plan
from diffaccel.process import PROCESSES, Decoupled
from diffaccel.sampling.schedule import Ends, levels
from diffaccel.solver import GRIDS, SOLVERS
from diffaccel.verbs.exporting import FORMATS
from diffaccel.verbs.names import check_names
from diffaccel.verbs.run import check_dry_run, quiet
from diffaccel.verbs.tools import TOOLS, Setting, discrete_of


def export(
    experiment: str | None,
    settings: Sequence[str] = (),
    format: str = "json",  # noqa: A002 (the name of the key)
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    checkpoint: str | None = None,
) -> list[dict[str, Any]]:
    """Describe the sampling settings of an experiment's budgets.

    Args:
        experiment: Experiment; None for ``method=`` and ``data=`` in the settings.
        settings: ``key=value`` words, ``nfe`` among them.
        format: ``json``, ``diffusers``, ``k-diffusion`` or ``comfyui``.
        sigma_min: Last positive level of another model; by default that of the checkpoint, or of the setting.
        sigma_max: First level of another model; by default that of the checkpoint, or of the setting.
        checkpoint: Checkpoint of another model, for its range of levels and its parametrisation.

    Returns:
        Settings, one per budget. ``notes`` lists what the list of levels does not express.

    Raises:
        UsageError: The input is invalid, or the setting can't be expressed in the format.
    """
    if format not in FORMATS:
        raise UsageError(f"export has no format {format!r}{suggest(str(format), FORMATS)}")
    for key, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf):
            raise UsageError(f"{key}={value!r}: give a positive number")
    quiet()
    config = load(*check_names(experiment, list(settings)), trains=False)
    check_dry_run("export", config.dry_run)
    exporter = _Exporter(config, sigma_min, sigma_max, checkpoint)
    return [exporter.setting(budget, format) for budget in config.nfe]


class _Exporter:
    """Settings of an experiment, for its own model or another.

    Args:
        config: Configuration of the experiment.
        sigma_min: See :func:`export`.
        sigma_max: See :func:`export`.
        checkpoint: See :func:`export`.
    """

    def __init__(
        self, config: Config, sigma_min: float | None, sigma_max: float | None, checkpoint: str | None
    ) -> None:
        weights = Path(config.checkpoint) if config.checkpoint else None
        self.config, self.unread = config, None if weights is None or weights.is_file() else weights
        self.sampler = build_frozen(config, load=self.unread is None)
        self.denoiser = self.sampler.denoiser
        if checkpoint is not None:
            self.denoiser = build_checkpoint(Path(checkpoint).expanduser()).denoiser
            low, high = self.denoiser.ratio_range
            sigma_min, sigma_max = sigma_min or low, sigma_max or high
        self.ends = Ends(sigma_min, sigma_max)

    def setting(self, budget: float, form: str) -> dict[str, Any]:
        """Describe the setting of a budget in a format.

        Raises:
            UsageError: The format can't express the setting.
        """
        sampler = self.sampler
        plan = sampler.plan(budget, self.config.n)
        problem = self._problem(plan, budget)
        if problem is not None and (form != "json" or self.ends != Ends()):
            raise UsageError(
                f"{self.config.experiment}, nfe={budget:g}: {problem}; format=json without another range describes it"
            )
        sigmas = levels(sampler, plan, self.ends) if problem is None else None
        nfe = sampler.planned_nfe(plan, self.config.n)
        common = {
            "experiment": self.config.experiment,
            "method": self.config.method_name,
            "nfe_budget": None if math.isinf(budget) else budget,
            "nfe": None if math.isnan(nfe) else nfe,
        }
        notes = self._notes(problem)
        if form == "json" or sigmas is None:
            return {**common, **self._described(plan, budget, sigmas), "notes": notes}
        evaluations, tweedie = plan.solver.evaluations(plan.steps), sampler.tweedie is not None
        setting = Setting(plan.solver, plan.steps, sigmas, self.denoiser, evaluations, tweedie)
        found, more = TOOLS[form](setting)
        return {**common, "format": form, **found, "notes": [*notes, *setting.notes(), *more]}

    def _notes(self, problem: str | None) -> list[str]:
        notes = [] if problem is None else [f"there is no list of levels: {problem}"]
        if self.unread is not None and self.config.tuned_for:
            notes.append(
                f"{self.unread} does not exist: the settings by budget may have been searched for other weights"
            )
        return notes

    def _described(self, plan: Plan, budget: float, sigmas: list[float] | None) -> dict[str, Any]:
        """Parts and levels of a setting, as plain values."""
        discrete = discrete_of(self.denoiser)
        return {
            "tuned": self.sampler.tuned,
            "prior": self.config.at(budget)["prior"],
            "solver": _node(plan.solver),
            "process": _node(self.denoiser.process),
            "steps": plan.steps,
            "chain_steps": plan.chain_steps,
            "sigmas": sigmas,
            "timesteps": None if sigmas is None or discrete is None else discrete.indices(sigmas),
        }

    def _problem(self, plan: Plan, budget: float) -> str | None:
        """Reason why a setting has no list of levels; None if it has one."""
        name = self.config.at(budget)["prior"]["name"]
        if isinstance(self.sampler.denoiser.process, Decoupled):
            return "the decoupled process (DDM) has no equal in other tools"
        if not plan.prior.pure_noise:
            return f"prior={name} does not start from pure noise at one level, as other tools do"
        if plan.solver.adaptive:
            return f"{type(plan.solver).__name__} chooses its levels while sampling"
        if math.isinf(plan.prior.start_ratio(self.sampler.denoiser)):
            return "sampling starts at an infinite noise-to-data ratio"
        return None


def _node(part: Any) -> dict[str, Any]:
    """Describe a part that is a dataclass, with its nested parts, by names and keys."""
    nodes = (registry.node_of(part) for registry in (SOLVERS, PROCESSES, GRIDS))
    name = next((node["name"] for node in nodes if node is not None), type(part).__name__)
    own = {item.name: getattr(part, item.name) for item in dataclasses.fields(part)}
    return {"name": name, **{key: _node(one) if dataclasses.is_dataclass(one) else one for key, one in own.items()}}
