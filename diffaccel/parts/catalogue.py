"""All registries by the key of their parts in an experiment; imported when they are used."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from diffaccel.errors import UsageError, suggest
from diffaccel.parts.registry import Registry

PACKAGE = Path(__file__).parents[1]
CATALOGUE = {
    "method": "diffaccel.methods.registry:METHODS",
    "data": "diffaccel.data.source:SOURCES",
    "condition": "diffaccel.data.conditions:CONDITIONERS",
    "encoder": "diffaccel.captions.encoders:TEXT_ENCODERS",
    "latents": "diffaccel.latents.base:AUTOENCODERS",
    "process": "diffaccel.process.base:PROCESSES",
    "attenuation": "diffaccel.process.attenuation:ATTENUATIONS",
    "network": "diffaccel.nn.unet:NETWORKS",
    "denoiser": "diffaccel.denoiser.base:DENOISERS",
    "levels": "diffaccel.denoiser.levels:LEVELS",
    "posterior": "diffaccel.prior.posterior:POSTERIORS",
    "prior": "diffaccel.prior.base:PRIORS",
    "density": "diffaccel.density.base:DENSITIES",
    "solver": "diffaccel.solver.base:SOLVERS",
    "grid": "diffaccel.solver.grid:GRIDS",
    "critic": "diffaccel.nn.critic:CRITICS",
    "objective": "diffaccel.training.objectives:OBJECTIVES",
    "extractor": "diffaccel.features.extractors:EXTRACTORS",
    "metric": "diffaccel.metrics.base:METRICS",
    "format": "diffaccel.weights.door:FORMATS",
}
"""Group -> ``module:name`` of its registry."""

DESCRIPTIONS = {
    "method": "published methods: training and combination of parts",
    "data": "sources of images",
    "condition": "conditions of images: degradations of the images, images of another source, or captions",
    "encoder": "text encoders of captions",
    "latents": "auto-encoders, in whose latents the diffusion runs",
    "process": "forward processes",
    "attenuation": "attenuations of images in the decoupled process",
    "network": "networks of denoisers and generators",
    "denoiser": "preconditionings of a network, and exact denoisers",
    "levels": "distributions of the training noise levels",
    "posterior": "estimates of the noise level of a state, for chains",
    "prior": "distributions of the states that sampling starts from",
    "density": "tractable densities of noisy images, for the prior `density`",
    "solver": "reverse integrators",
    "grid": "spacings of the noise levels of a solver",
    "critic": "critics that train implicit priors",
    "objective": "further objectives of implicit priors",
    "extractor": "feature networks that score images",
    "metric": "metrics of a point",
    "format": "formats of weights files",
}
"""Group -> description of its parts."""


def registry_of(group: str) -> Registry[Any]:
    """Return the registry of a group.

    Raises:
        UsageError: There is no such group.
    """
    if group not in CATALOGUE:
        raise UsageError(f"no group of parts is called {group!r}{suggest(group, CATALOGUE)}")
    module, _, name = CATALOGUE[group].partition(":")
    return cast(Registry[Any], getattr(import_module(module), name))


@cache
def names_of(group: str) -> frozenset[str]:
    """Return the names of the built-in parts of a group, from the source of the package: no part is imported."""
    registry = CATALOGUE[group].partition(":")[2]
    pattern = re.compile(rf'\b{registry}\.register\(\s*"(\w+)"')
    sources = (file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    return frozenset(name for source in sources for name in pattern.findall(source))
