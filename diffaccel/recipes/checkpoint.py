"""A denoiser's checkpoint for new images: comparison with the images, and what the experiments take from it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel.condition import Kinds, trained_without
from diffaccel.denoiser import DENOISERS
from diffaccel.errors import UsageError
from diffaccel.pretrained import Pretrained, files_sha256, read
from diffaccel.recipes.images import Facts

SIGMA_MAX = 80.0
"""Highest noise-to-data ratio of the process ``edm``; images beyond 64 pixels start higher, if trained there."""


@dataclass(frozen=True)
class Given:
    """Checkpoint of a denoiser.

    Attributes:
        path: File, or folder in diffusers format.
        sha256: Hash.
        network: Network, as in an experiment.
        denoiser: Preconditioning, as in an experiment.
        process: Process of the experiments.
        ratios: Lowest and highest noise-to-data ratio of its training.
        classes: Number of its classes; 0 for an unconditional network.
        unlabelled: Whether it can sample without labels.
        format: Name of the format.
    """

    path: str
    sha256: str
    network: dict[str, Any]
    denoiser: dict[str, Any]
    process: dict[str, Any]
    ratios: tuple[float, float]
    classes: int
    unlabelled: bool
    format: str

    @property
    def any_process(self) -> bool:
        """Whether the weights are valid on every process."""
        return bool(getattr(DENOISERS[self.denoiser["name"]], "any_process", False))

    def describe(self, facts: Facts) -> list[str]:
        """Describe the checkpoint, and differences to the images that do not prevent its use."""
        low, high = self.ratios
        classes = f"{self.classes} classes" if self.classes else "no classes"
        lines = [
            f"checkpoint {self.path}: {self.format}, images of shape {facts.shape} in [-1, 1], noise-to-data ratios "
            f"from {low:.4g} to {high:.4g}, {classes}; used as it is by all methods but ddm"
        ]
        if self.classes and not facts.classes:
            lines.append(f"the images have no classes; the {self.classes} classes are sampled equally often")
        elif self.classes > facts.classes > 0:
            lines.append(
                f"the images have {facts.classes} classes, the checkpoint {self.classes}: all of the checkpoint's "
                "classes are sampled equally often"
            )
        return lines


def read_given(path: str, facts: Facts) -> Given:
    """Read a denoiser's checkpoint, and compare shape, range and classes with the images.

    Args:
        path: File, or folder in diffusers format.
        facts: The images.

    Raises:
        UsageError: The file can't be read, is not of a denoiser, makes images of another shape, takes a condition other
            than labels, has fewer classes than the images, or was not trained up to levels at which images are noise.
    """
    place = Path(path).expanduser().absolute()
    found = read(place)
    if found.shape != facts.shape:
        raise UsageError(
            f"checkpoint={path} makes images of shape {found.shape}, yours have {facts.shape}{_fit(found, facts)}"
        )
    classes = int(found.network.get("classes") or 0)
    if 0 < classes < facts.classes:
        raise UsageError(
            f"checkpoint={path} has {classes} classes, and the images have {facts.classes}: use the images of its "
            "classes, or labels=false"
        )
    denoiser = found.build()
    if (takes := Kinds.taken_by(denoiser.network)).required:
        raise UsageError(
            f"checkpoint={path} takes {takes}, which the experiments of `new` do not give: use a checkpoint without "
            "condition, or with labels"
        )
    low, high = denoiser.ratio_range
    if high < 10 * facts.std:
        raise UsageError(
            f"checkpoint={path} was trained up to a noise-to-data ratio of {high:.4g}, at which images are not noise "
            f"yet (standard deviation {facts.std:.2g}): use a checkpoint of the whole diffusion"
        )
    process = found.process
    if getattr(DENOISERS[found.denoiser["name"]], "any_process", False):
        high = min(high, SIGMA_MAX) if max(facts.shape[1:]) <= 64 else high
        process = {"name": "edm", "sigma_max": high} if SIGMA_MAX < high < math.inf else {"name": "edm"}
    source = str(found.source.get("format", "diffaccel"))
    unlabelled = not classes or trained_without(denoiser.network)
    return Given(
        str(place),
        files_sha256(place),
        found.network,
        found.denoiser,
        process,
        (low, high),
        classes,
        unlabelled,
        source,
    )


def _fit(found: Pretrained, facts: Facts) -> str:
    channels, height, width = found.shape
    kind = "colour" if channels == 3 else "grey"
    resize = facts.resized_to(height) if height == width else f"resize them to {width}x{height} pixels"
    return f": {resize}, and use {kind} images" if channels in (1, 3) else ": use another checkpoint"
