"""Lists of noise levels in the forms that other tools accept, and what they can't express.

Levels are noise-to-data ratios sigma_t / alpha_t, which diffusers, k-diffusion and ComfyUI call sigmas.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from diffaccel.denoiser import Denoiser
from diffaccel.denoiser.network import DataDenoiser, EpsDenoiser, KarrasDenoiser, VelocityDenoiser
from diffaccel.pretrained.denoisers import DiscreteVPDenoiser
from diffaccel.process import DiscreteVariancePreserving
from diffaccel.solver import Solver
from diffaccel.solver.multistep import DPMSolverPP2M
from diffaccel.solver.onestep import DDIM, DPMSolver2, Euler, Heun

PREDICTIONS: dict[type, str] = {EpsDenoiser: "epsilon", DataDenoiser: "sample", VelocityDenoiser: "v_prediction"}
"""Denoiser -> diffusers' name of what the network predicts."""
TARGETS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
"""Name of what a network predicts -> diffusers' name."""
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Schedules of beta that all schedulers of diffusers have."""

EDM_USE = """\
scheduler.set_timesteps(len(sigmas) - 1)
scheduler.sigmas = torch.tensor(sigmas)
scheduler.timesteps = scheduler.precondition_noise(scheduler.sigmas[:-1])"""
DPM_USE = """\
scheduler.set_timesteps(timesteps=timesteps)
scheduler.sigmas[-1] = sigmas[-1]"""
EULER_USE = "scheduler.set_timesteps(sigmas=sigmas)"
"""Lines that make a scheduler of diffusers take a list."""


class Equal(NamedTuple):
    """Sampler of each tool with the steps of a solver.

    Attributes:
        family: ``Euler`` or ``DPMSolverMultistep``, in the names of diffusers' schedulers; empty for none.
        k_diffusion: Function of k-diffusion.
        comfyui: Name in ComfyUI.
    """

    family: str
    k_diffusion: str
    comfyui: str


EULER = Equal("Euler", "sample_euler", "euler")
EQUALS: dict[type[Solver], Equal] = {
    Euler: EULER,
    DDIM: EULER,
    DPMSolverPP2M: Equal("DPMSolverMultistep", "sample_dpmpp_2m", "dpmpp_2m"),
    Heun: Equal("", "sample_heun", "heun"),
    DPMSolver2: Equal("", "sample_dpm_2", "dpm_2"),
}
"""Solver -> equal samplers, by exact type: a derived class takes other steps."""


class Setting(NamedTuple):
    """A setting for another tool.

    Attributes:
        solver: Solver.
        steps: Number of steps.
        sigmas: Levels, see :func:`diffaccel.sampling.schedule.levels`.
        denoiser: Denoiser that the list is for.
        evaluations: Evaluations of the solver here.
        tweedie: Whether another denoising step follows.
    """

    solver: Solver
    steps: int
    sigmas: list[float]
    denoiser: Denoiser
    evaluations: int
    tweedie: bool

    @property
    def equal(self) -> Equal | None:
        """Equal samplers of other tools; None if none is known."""
        found = EQUALS.get(type(self.solver))
        return None if getattr(self.solver, "eta", 0) else found

    @property
    def lowered(self) -> bool:
        """Whether a multistep solver lowers its order before the end."""
        before = self.steps - self.solver.denoise
        lowers = bool(getattr(self.solver, "lower_order_final", False))
        return lowers and 1 < before < getattr(self.solver, "lowers_below", math.inf)

    def notes(self) -> list[str]:
        """Return what a list of levels does not express."""
        solver, name, found = self.solver, type(self.solver).__name__, []
        if self.equal is None:
            noise = " (it adds noise in each step)" if getattr(solver, "eta", 0) else ""
            found.append(f"{name}{noise} has no equal there: another sampler with these levels makes other images")
        if solver.analytic_first is not None:
            found.append(
                f"the first prediction is computed for N(0, {solver.analytic_first:g}^2 I) data without the network "
                f"(solver.analytic_first); other tools evaluate the network there, {self.evaluations + 1} evaluations "
                f"in place of {self.evaluations}, and make other images"
            )
        if solver.guidance:
            found.append(f"guidance {solver.guidance:g} in our units is a guidance scale of {1 + solver.guidance:g}")
        if self.tweedie:
            found.append("the denoising step after the solver (tweedie_ratio) is not part of the list")
        if not solver.denoise:
            found.append(f"the list ends at {self.sigmas[-1]:g}, without a step to 0 (solver.denoise=false)")
        if self.lowered and solver.denoise:
            found.append(
                "the last step before 0 is of first order here (solver.lower_order_final), of second order there"
            )
        return found


def as_k_diffusion(setting: Setting) -> tuple[dict[str, Any], list[str]]:
    """Return k-diffusion's list, and notes."""
    equal = setting.equal
    return {"sampler": equal.k_diffusion if equal else None, "sigmas": setting.sigmas}, []


def as_comfyui(setting: Setting) -> tuple[dict[str, Any], list[str]]:
    """Return the text of ComfyUI's node for custom sigmas, and notes. Its numbers have no exponents."""
    equal = setting.equal
    text = ", ".join(f"{sigma:.8f}".rstrip("0").rstrip(".") if sigma else "0.0" for sigma in setting.sigmas)
    return {"sampler": equal.comfyui if equal else None, "sigmas": text}, []


def as_diffusers(setting: Setting) -> tuple[dict[str, Any], list[str]]:
    """Return a scheduler of diffusers with its configuration and lists, and notes."""
    solver, denoiser, sigmas = setting.solver, setting.denoiser, setting.sigmas
    family = setting.equal.family if setting.equal else ""
    common: dict[str, Any] = {"sigmas": sigmas, "timesteps": None, "scheduler": None, "config": {}, "use": None}
    if not family:
        return common, ["no scheduler of diffusers is known to take the same steps"] if setting.equal else []
    # The last level of a list without a step to 0 is its own.
    multistep: dict[str, Any] = {
        "solver_order": 2,
        "lower_order_final": setting.lowered and not solver.denoise,
        "final_sigmas_type": "zero" if solver.denoise else "sigma_min",
    }
    own = multistep if family.startswith("DPM") else {}
    if isinstance(denoiser, KarrasDenoiser):
        positive = [sigma for sigma in sigmas if sigma]
        own = {"sigma_min": positive[-1], "sigma_max": sigmas[0], "sigma_data": denoiser.sigma_data, **own}
        start = {"noise": sigmas[0], "use": EDM_USE}
        return {**common, "scheduler": f"EDM{family}Scheduler", "config": own, **start}, _scaling(sigmas[0])
    discrete = discrete_of(denoiser)
    if discrete is None:
        return common, [
            f"diffusers has no scheduler for {type(denoiser).__name__} on {type(denoiser.process).__name__}: the "
            "sigmas are valid for a scheduler that takes noise-to-data ratios"
        ]
    timesteps, notes = discrete.rounded(sigmas)
    common |= {"config": {**discrete.config, **own}, "timesteps": timesteps}
    if family == "Euler":
        return {**common, "scheduler": "EulerDiscreteScheduler", "noise": sigmas[0], "use": EULER_USE}, _scaling(
            sigmas[0]
        )
    noise = sigmas[0] / math.hypot(1, sigmas[0])
    return {**common, "scheduler": "DPMSolverMultistepScheduler", "noise": noise, "use": DPM_USE}, notes


def _scaling(high: float) -> list[str]:
    """Note on the scale of the noise that a scheduler suggests."""
    return [
        f"start from unit noise times `noise`, {high:g}; the scheduler's init_noise_sigma may be "
        f"sqrt({high:g}^2 + 1) instead"
    ]


class Discrete(NamedTuple):
    """Levels of a network that is conditioned on an index.

    Attributes:
        log_ratios: ln(ratio) of each index.
        config: Configuration of diffusers' schedulers.
    """

    log_ratios: np.ndarray
    config: dict[str, Any]

    def indices(self, sigmas: Sequence[float]) -> list[float]:
        """Return the indices of levels, linear in ln(ratio) between two indices; -1 for level 0."""
        logs = np.log([sigma for sigma in sigmas if sigma])
        found = np.interp(logs, self.log_ratios, np.arange(len(self.log_ratios))).tolist()
        return [*found, *([-1.0] if 0 in sigmas else [])]

    def rounded(self, sigmas: Sequence[float]) -> tuple[list[int], list[str]]:
        """Return the nearest indices of the levels that are evaluated, and a note if that changes the levels."""
        found = [round(index) for index in self.indices(sigmas[:-1])]
        change = np.abs(np.exp(self.log_ratios[found]) / np.array(sigmas[:-1]) - 1).max()
        notes = [] if change < 1e-5 else [f"timesteps are rounded, which changes the levels by up to {change:.1%}"]
        if len(set(found)) < len(found):
            notes.append("several levels have the same timestep: use fewer evaluations, or another grid")
        return found, notes


def discrete_of(denoiser: Denoiser) -> Discrete | None:
    """Return the levels of a network that is conditioned on an index; None for other networks."""
    if isinstance(denoiser, DiscreteVPDenoiser):
        logs = denoiser.log_ratios.double().cpu().numpy()
        config: dict[str, Any] = {"num_train_timesteps": len(logs), "prediction_type": TARGETS[denoiser.predicts]}
        if denoiser.schedule in SCHEDULES:
            first, last = denoiser.betas
            return Discrete(logs, {**config, "beta_schedule": denoiser.schedule, "beta_start": first, "beta_end": last})
        kept = np.concatenate([[1.0], 1 / (1 + np.exp(2 * logs))])
        return Discrete(logs, {**config, "trained_betas": (1 - kept[1:] / kept[:-1]).tolist()})
    process, prediction = denoiser.process, PREDICTIONS.get(type(denoiser))
    if not isinstance(process, DiscreteVariancePreserving) or prediction is None:
        return None
    logs = process.ratio(torch.arange(process.steps, dtype=torch.float64)).log().numpy()
    ends = {"beta_start": process.beta_0, "beta_end": process.beta_1}
    config = {"num_train_timesteps": process.steps, "beta_schedule": "linear", **ends}
    return Discrete(logs, {**config, "prediction_type": prediction})


TOOLS: Mapping[str, Callable[[Setting], tuple[dict[str, Any], list[str]]]] = {
    "diffusers": as_diffusers,
    "k-diffusion": as_k_diffusion,
    "comfyui": as_comfyui,
}
"""Format -> function that returns a setting in the format, and notes."""
