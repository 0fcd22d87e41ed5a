"""Checks of a sampler's arguments."""

from collections.abc import Mapping, Sequence

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.prior import PRIORS, Prior
from diffaccel.sampling.images import ImageKind
from diffaccel.sampling.model import Part
from diffaccel.sampling.settings import Setting, Tweedie


def check_part(key: str, part: object, kind: type) -> None:
    """Refuse what is neither a part of this kind, nor its name, nor its name and keys.

    Raises:
        UsageError: It is something else.
    """
    if part is not None and not isinstance(part, kind | str | Mapping):
        raise UsageError(f"{key}: {part!r:.80} is no {key}: give a name, a mapping with a name, or a {kind.__name__}")


def checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return an image shape as three integers.

    Raises:
        UsageError: It is none.
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UsageError(f"shape={shape!r}: give (C, H, W), three positive whole numbers")
    channels, height, width = sizes
    return channels, height, width


def check_settings(by_nfe: object, tweedie: object, kind: object) -> None:
    """Refuse settings of other types than a sampler's.

    Raises:
        UsageError: One is.
    """
    entries = by_nfe.items() if isinstance(by_nfe, Mapping) else [(by_nfe, None)]
    for budget, setting in entries if by_nfe is not None else ():
        if not isinstance(budget, int) or not isinstance(setting, Setting):
            raise UsageError(f"by_nfe={by_nfe!r:.80}: give budgets, whole numbers, with a Setting(prior, solver) each")
    for key, value, wanted in (("tweedie", tweedie, Tweedie), ("kind", kind, ImageKind)):
        if value is not None and not isinstance(value, wanted):
            raise UsageError(f"{key}={value!r:.80}: give an object of type {wanted.__name__}")


def build_prior(part: Part, denoiser: Denoiser, shape: tuple[int, int, int]) -> Prior:
    """Build a prior that needs nothing but a denoiser; the Gaussian one if none is named.

    Raises:
        UsageError: An unknown name or key, or a prior that reads noise levels or has weights of its own.
    """
    node = PRIORS.normal(part or "gaussian")
    name = node.get("name") if isinstance(node, Mapping) else None
    remedy = "give it as an object, or da.load an experiment that has it"
    if isinstance(name, str) and "posterior" in PRIORS.required(name):
        raise UsageError(f"prior {name!r} reads noise levels, which takes more than a denoiser: {remedy}")
    prior = PRIORS.build(node, denoiser=denoiser, shape=shape)
    if prior.networks():
        raise UsageError(f"prior {name!r} has a network of its own, whose weights a name doesn't bring: {remedy}")
    return prior
