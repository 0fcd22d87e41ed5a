"""Checks of a sampler's arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.prior import PRIORS, Prior
from diffaccel.sampling.images import ImageKind
from diffaccel.sampling.model import Model, Part
from diffaccel.sampling.settings import Setting, Tweedie
from diffaccel.solver import Solver


def check_part(key: str, part: object, kind: type) -> None:
    """Check that an argument is a part, a name, or a name and keys.

    Raises:
        UsageError: The argument has another type.
    """
    if part == "" or (part is not None and not isinstance(part, kind | str | Mapping)):
        raise UsageError(f"{key}: {part!r:.80} is not a {key}: give a name, a mapping, or a {kind.__name__}")


def checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Check an image shape and return it as three integers.

    Raises:
        UsageError: The shape is invalid.
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UsageError(f"shape={shape!r}: give (C, H, W), three positive whole numbers")
    channels, height, width = sizes
    return channels, height, width


def check_settings(by_nfe: object, tweedie: object, kind: object, **parts: object) -> None:
    """Check the types of a sampler's settings.

    Args:
        by_nfe: Budget -> setting.
        tweedie: Last denoising step.
        kind: Conversion to images.
        parts: Prior and solver that are given beside ``by_nfe``.

    Raises:
        UsageError: A setting has another type, or ``by_nfe`` would replace a prior or solver that is given.
    """
    if by_nfe is not None:
        _check_budgets(by_nfe)
    for key, part in parts.items():
        if by_nfe and part is not None:
            raise UsageError(
                f"{key}={part!r:.80} would be ignored, because by_nfe= sets one at each budget: leave out one"
            )
    for key, value, wanted in (("tweedie", tweedie, Tweedie), ("kind", kind, ImageKind)):
        if value is not None and not isinstance(value, wanted):
            raise UsageError(f"{key}={value!r:.80}: give an object of type {wanted.__name__}")


def _check_budgets(by_nfe: object) -> None:
    """Check the budgets of ``by_nfe``, and the parts of their settings."""
    if not isinstance(by_nfe, Mapping) or not all(isinstance(setting, Setting) for setting in by_nfe.values()):
        raise UsageError(f"by_nfe={by_nfe!r:.80}: give budgets, whole numbers, with a Setting(prior, solver) each")
    for budget, setting in by_nfe.items():
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise UsageError(f"by_nfe: {budget!r:.80} is not a budget: give a whole number from 1")
        for key, part, wanted in (("prior", setting.prior, Prior), ("solver", setting.solver, Solver)):
            if not isinstance(part, wanted):
                raise UsageError(
                    f"by_nfe.{budget}: the {key} {part!r:.80} is not a {wanted.__name__}: build it, for example with "
                    f"{key.upper()}S.build"
                )


def build_prior(part: Part, denoiser: Denoiser, shape: tuple[int, int, int]) -> Prior:
    """Build a prior that requires only a denoiser, by default the Gaussian prior.

    Raises:
        UsageError: A name or key is unknown, or the prior requires a posterior or weights.
    """
    node = PRIORS.normal(part or "gaussian")
    name = node.get("name") if isinstance(node, Mapping) else None
    remedy = "give the prior as an object, or da.load an experiment with this prior"
    if isinstance(name, str) and "posterior" in PRIORS.required(name):
        raise UsageError(f"prior {name!r} requires a posterior, which a denoiser does not have: {remedy}")
    prior = PRIORS.build(node, denoiser=denoiser, shape=shape)
    if prior.networks():
        raise UsageError(f"prior {name!r} has a network of its own, whose weights are not loaded by its name: {remedy}")
    return prior


def derived(model: Model, prior: Prior | Part, solver: Solver | Part) -> Any:
    """Return a model's sampler with other parts, given by name or as objects, at every budget."""
    made = model.derive(*(None if isinstance(part, Prior | Solver) else part for part in (prior, solver)))
    if not isinstance(prior, Prior) and not isinstance(solver, Solver):
        return made

    def laid_over(setting: Setting) -> Setting:
        own = solver if isinstance(solver, Solver) else setting.solver
        return Setting(prior if isinstance(prior, Prior) else setting.prior, own)

    own = laid_over(Setting(made.prior, made.solver))
    by_nfe = {budget: laid_over(setting) for budget, setting in made.by_nfe.items()}
    return made.using(own.prior, own.solver, by_nfe)
