"""Scores of given images, computed as in a bench."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.config import EXPERIMENTS, STANDARD, read
from diffaccel.errors import UsageError, suggest
from diffaccel.evaluation.judges import Judge, further, judgements
from diffaccel.evaluation.partial import Chunk
from diffaccel.evaluation.scores import Real, Scores, digests
from diffaccel.features.extractors import EXTRACTORS, Extractor
from diffaccel.metrics.base import Metric, build_metrics
from diffaccel.metrics.reference import check_held_out, file_of, load_reference, read_reference
from diffaccel.parts.checks import whole_number


@torch.no_grad()
def measure(
    images: Tensor,
    reference: str | Path,
    floor: str | Path | None = None,
    extractor: str | Mapping[str, Any] | None = None,
    batch_size: int = 100,
) -> dict[str, float]:
    """Compute the standard metrics of images, as in a bench.

    Standard errors, limits and ``effective_n`` treat the images as independent. A bench keeps those of one chain
    together. Some metrics are of the first images only (see :mod:`diffaccel.metrics.standard`): shuffle images that are
    sorted, for example by class.

    Args:
        images: Images (n, C, H, W), uint8, or float32 for toy points.
        reference: Statistics of the data: name of a data set under experiments/ (``digits``), whose extractor and floor
            are the defaults; or a file of ``diffaccel reference``.
        floor: Statistics of held-out images; by default none for a file.
        extractor: Feature network, by name and keys; by default, for a file, the one that the statistics were computed
            with, if the name alone determines it (``inception``).
        batch_size: Number of images per batch of the extractor.

    Returns:
        Metrics, with the keys of a point's ``metrics``.

    Raises:
        UsageError: The data set is unknown, the statistics are of another extractor, the extractor is not given, or the
            images have another shape or type.
    """
    if not isinstance(images, Tensor):
        raise UsageError(f"measure: images are a {type(images).__name__}: give a tensor (torch.from_numpy makes one)")
    batch_size = whole_number("batch_size", batch_size)
    judge, real, shape = _judges(reference, floor, extractor)
    if images.ndim != 4 or len(images) < 2 or (shape is not None and tuple(images.shape[1:]) != shape):
        wanted = "(n, C, H, W)" if shape is None else f"(n, {', '.join(map(str, shape))})"
        raise UsageError(f"measure: the images have shape {tuple(images.shape)}, not {wanted} with n >= 2")
    if images.dtype not in (torch.uint8, torch.float32):
        raise UsageError(f"measure: the images are {images.dtype}: give uint8, or float32 for toy points")
    return judge_images(images, [Judge(judge, real)], build_metrics(STANDARD), batch_size)["metrics"]


@torch.no_grad()
def judge_images(
    images: Tensor, judges: Sequence[Judge], metrics: Sequence[Metric], batch_size: int = 100, chains: int | None = None
) -> dict[str, Any]:
    """Compute the metrics of images by all judges, as in a bench; the images may come from anywhere.

    Args:
        images: Images (n, C, H, W), uint8, or float32 for toy points.
        judges: Extractors with their statistics.
        metrics: Metrics.
        batch_size: Number of images per batch of the extractors.
        chains: Number of chains that sampled the images, image i by chain i modulo this number; None for independent
            images.

    Returns:
        Keys of a point, see :func:`~diffaccel.evaluation.judges.judgements`.
    """
    first, shape, n = judges[0], tuple(images.shape[1:]), len(images)
    others, dim = further(judges), first.extractor.dim
    scores = Scores(n, dim, shape, 0, images.dtype, first.real, chains, images.device, others)
    for start in range(0, n, batch_size):
        batch = images[start : start + batch_size]
        indices, hashes = torch.arange(start, start + len(batch)), digests(batch)
        found = {judge.extractor.sha256: judge.extractor(batch).float().cpu() for judge in judges}
        own = found[first.extractor.sha256]
        chunk = Chunk(indices, own, hashes, batch[:0], None, first.extractor.sha256, 0, {}, {}, {}, 0.0, 0.0)
        chunk.others = {sha256: found[sha256] for sha256 in others}
        scores.add(chunk)
    scores.reduce()
    return judgements(judges, scores, metrics)


def _judges(
    reference: str | Path, floor: str | Path | None, extractor: str | Mapping[str, Any] | None
) -> tuple[Extractor, Real, tuple[int, ...] | None]:
    """Build the extractor, read the statistics, and return them with the required shape of the images."""
    shape = None
    if not isinstance(reference, str | Path):
        raise UsageError(f"reference={reference!r:.80}: give a data set's name, or a file of statistics")
    if not Path(reference).is_file():
        known = sorted(file.parent.name for file in EXPERIMENTS.glob("*/base.yaml"))
        if str(reference) not in known:
            raise UsageError(f"reference={reference} is neither a file nor a data set{suggest(str(reference), known)}")
        keys = read(EXPERIMENTS / str(reference) / "base.yaml")
        if "reference" not in keys:
            raise UsageError(
                f"reference={reference}: no statistics are shipped: compute them with `diffaccel reference` and give "
                "the file"
            )
        shape = tuple(keys["shape"])
        built = EXTRACTORS.build(extractor or _first(keys))
        reference = _shipped(keys["reference"], built, str(reference))
        floor = floor or (file_of(keys["floor"], built.name) if "floor" in keys else None)
    else:
        built = EXTRACTORS.build(extractor or _extractor_of(Path(reference)))
    own, held_out = (load_reference(str(file), built) if file else None for file in (reference, floor))
    assert own is not None
    check_held_out(str(floor), held_out, own)
    for file, found in ((reference, own), (floor, held_out)):
        said = None if found is None else found.provenance.get("shape")
        if said is not None and shape is not None and tuple(said) != shape:
            raise UsageError(f"{file} contains statistics of images of shape {tuple(said)}, {reference} of {shape}")
        shape = shape if said is None else tuple(said)
    return built, Real(own, held_out), shape


def _first(keys: Mapping[str, Any]) -> Any:
    """Return the first judge of an experiment."""
    return keys["judges"][0] if keys.get("judges") else keys.get("extractor")


def _shipped(files: Any, extractor: Extractor, name: str) -> str:
    """Return the statistics of an experiment for an extractor.

    Raises:
        UsageError: There are none.
    """
    file = file_of(files, extractor.name)
    if file is None:
        raise UsageError(
            f"reference={name}: no statistics of {extractor.name!r} are shipped: compute them with "
            "`diffaccel reference` and give the file"
        )
    return file


def _extractor_of(reference: Path) -> str:
    """Name the extractor that made a file of statistics.

    Raises:
        UsageError: Its name alone doesn't build it.
    """
    name = str(read_reference(reference).provenance["extractor"]["name"])
    if name not in EXTRACTORS or EXTRACTORS.required(name):
        raise UsageError(f"{reference} was made with the extractor {name!r}: give it with its keys as extractor=")
    return name
