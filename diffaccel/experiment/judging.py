"""Construction of what scores images or statistics that exist already: extractor, reference and floor."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffaccel.config import Config
from diffaccel.data.given import GivenImages
from diffaccel.errors import UsageError
from diffaccel.evaluation.scores import Real
from diffaccel.experiment.judges import check_files, check_names
from diffaccel.features.extractors import EXTRACTORS, Extractor
from diffaccel.features.jpeg import AsJPEG
from diffaccel.features.names import distance_key
from diffaccel.metrics.base import Metric
from diffaccel.metrics.reference import Reference, check_held_out, compute_reference, file_of, load_reference
from diffaccel.metrics.statistics import Statistics, read_any

Found = Reference | GivenImages
"""Statistics, or images whose statistics are computed when they are needed."""


@dataclass(frozen=True)
class Stated:
    """Extractor of statistics, which is not built because no features are computed.

    Attributes:
        name: Name in tables and metric keys.
        sha256: Hash of all that determines the features; None if no file states it.
        dim: Number of features.
    """

    name: str
    sha256: str | None
    dim: int

    @property
    def metric_name(self) -> str:
        """Key of the Frechet distance in these features."""
        return distance_key(self.name)


@dataclass(frozen=True)
class Judge:
    """What scores images or statistics.

    Attributes:
        named: Extractor with name and hash; the same object as ``extractor`` if images are scored.
        extractor: Extractor of the images; None for statistics.
        base: Extractor of the reference's images; without the JPEG compression of ``extractor``.
        reference: Statistics or images of training data.
        floor: Statistics or images of held-out data; None for no floor.
        path: Path of the reference.
    """

    named: Extractor | Stated
    extractor: Extractor | None
    base: Extractor | None
    reference: Found
    floor: Found | None
    path: str = ""

    def real(self) -> Real:
        """Return the statistics of real images, after computing those that are given by images; collective."""
        return Real(self._statistics(self.reference), self._statistics(self.floor) if self.floor else None)

    def _statistics(self, found: Found) -> Reference:
        if isinstance(found, Reference):
            return found
        assert self.base is not None
        return compute_reference(found, "train", self.base)

    @property
    def distance_only(self) -> bool:
        """Whether the reference has no features of single images, so that only the Frechet distance is defined."""
        return isinstance(self.reference, Statistics)

    def applicable(self, metrics: Sequence[Metric], of_images: bool) -> list[Metric]:
        """Return the metrics that are defined for images or statistics."""
        return [metric for metric in metrics if metric.gives_distance or (of_images and not self.distance_only)]


def build_judges(config: Config, source: GivenImages | Reference, path: str, given: Collection[str]) -> list[Judge]:
    """Build the judges of images or statistics; see :func:`build_judge`.

    Raises:
        UsageError: Two judges have the same name, or one file of statistics is given for several judges.
    """
    files = {"reference": config.reference, "floor": config.floor}
    # The name of a single judge is not needed for single files, and its weights may not be here.
    several = len(config.extractors) > 1
    named = several or any(isinstance(file, Mapping) for file in files.values())
    names = [EXTRACTORS.build(node).name if named else "" for node in config.extractors]
    if several:
        check_names(names)
        images = [key for key, file in files.items() if isinstance(file, str) and file and not read_any(file)]
        check_files({key: file for key, file in files.items() if key not in images}, names)
    found = []
    for node, name in zip(config.extractors, names, strict=True):
        own: dict[str, Any] = {key: file_of(file, name) for key, file in files.items()}
        found.append(build_judge(dataclasses.replace(config, extractor=node, judges=[], **own), source, path, given))
    return found


def build_judge(config: Config, source: GivenImages | Reference, path: str, given: Collection[str]) -> Judge:
    """Build the judge of images or statistics.

    Args:
        config: Configuration with ``extractor``, ``reference``, ``floor`` and ``jpeg``.
        source: Images or statistics to score.
        path: Path of the source, for messages.
        given: Top-level keys that the user set, as opposed to those of the experiment.

    Raises:
        UsageError: The reference is missing or of another extractor, the extractor is unknown, or the images have
            another shape than those of the reference.
    """
    if config.reference is None:
        raise UsageError(
            f"there is nothing to compare {path} with: give an experiment (`diffaccel score {path} digits/edm`), or "
            "reference=FILE"
        )
    reference = _open(config.reference)
    floor = _open(config.floor) if config.floor else None
    _check_shape(config, source, path, reference)
    if floor is not None:
        _check_shape(config, source, path, floor, "floor")
    if isinstance(floor, Reference) and isinstance(reference, Reference):
        check_held_out(str(config.floor), floor, reference)
    if isinstance(source, Reference) and isinstance(reference, Reference):
        return _of_statistics(config, source, path, reference, floor, given)
    if isinstance(source, Reference):
        raise UsageError(f"{path} has statistics, {config.reference} images: set reference= to statistics too")
    if isinstance(reference, Reference) and not {"extractor", "judges"} & {*given} and not config.experiment:
        name = _own_extractor(config.reference, reference)
        config.extractor = {"name": name}
    elif not {"extractor", "judges"} & {*given} and not config.experiment:
        raise UsageError(f"{config.reference} has images, for any extractor: set extractor=, for example to inception")
    base = EXTRACTORS.build(config.extractor)
    for file, found in ((config.reference, reference), (config.floor, floor)):
        _check_extractor(str(file), found, base)
    extractor = base if config.jpeg is None else AsJPEG(base, config.jpeg)
    return Judge(extractor, extractor, base, reference, floor, str(config.reference))


def _open(path: str) -> Found:
    return read_any(path) or GivenImages(path)


def _own_extractor(path: str, reference: Reference) -> str:
    """Name of the extractor that made a reference.

    Raises:
        UsageError: The file does not state it, or its name alone does not build it.
    """
    made_with = reference.provenance.get("extractor")
    if made_with is None:
        raise UsageError(
            f"{path} does not state the extractor of its {reference.moments.dim} features: set extractor=, for example "
            "to inception"
        )
    if (name := str(made_with["name"])) not in EXTRACTORS or EXTRACTORS.required(name):
        raise UsageError(f"{path} was made with the extractor {name!r}: give it with its keys as extractor=")
    return name


def _check_extractor(path: str, found: Found | None, extractor: Extractor) -> None:
    """Check that statistics are of an extractor's features, as far as their file states it."""
    if isinstance(found, Statistics):
        check_dims(path, found.moments.dim, f"the extractor {extractor.name!r}", extractor.dim)
    elif isinstance(found, Reference):
        load_reference(path, extractor)


def check_dims(path: str, dim: int, other: str, dim_of_other: int | None) -> None:
    """Check the number of features of statistics; None if that of the other side is unknown.

    Raises:
        UsageError: They differ.
    """
    if dim_of_other not in (None, dim):
        raise UsageError(f"{path} has {dim} features, {other} has {dim_of_other}: use statistics of the same extractor")


def _of_statistics(
    config: Config, source: Reference, path: str, reference: Reference, floor: Found | None, given: Collection[str]
) -> Judge:
    """Build the judge of statistics, without building the extractor, whose weights may not be here.

    Raises:
        UsageError: The files are of different extractors, or none states its extractor and the user does not either.
    """
    if isinstance(floor, GivenImages):
        raise UsageError(f"{path} has statistics, floor={config.floor} images: set floor= to statistics, or to null")
    files = {str(config.reference): reference, **({str(config.floor): floor} if floor else {}), path: source}
    stated = {file: made for file, found in files.items() if (made := found.provenance.get("extractor"))}
    for file, found in files.items():
        check_dims(file, found.moments.dim, str(config.reference), reference.moments.dim)
    first, own = next(iter(stated.items()), ("", None))
    for file, made in stated.items():
        if own is not None and made["sha256"] != own["sha256"]:
            raise UsageError(
                f"{file} has features of the extractor {made['name']!r}, {first} of {own['name']!r}: use statistics of "
                "one extractor"
            )
    asked = _asked(config, given)
    if asked is not None:
        check_dims(path, source.moments.dim, f"the extractor {asked!r}", getattr(EXTRACTORS[asked], "dim", None))
        if own is not None and asked != own["name"] and not EXTRACTORS.required(asked):
            raise UsageError(f"{first} has features of {own['name']!r}, not of {asked!r}: omit extractor=")
    if own is None and asked is None:
        raise UsageError(
            f"neither {path} nor {config.reference} states the extractor of its {source.moments.dim} features: set "
            "extractor=, for example to inception"
        )
    named: dict[str, Any] = own or {"name": asked, "sha256": None}
    return Judge(
        Stated(str(named["name"]), named["sha256"], source.moments.dim),
        None,
        None,
        reference,
        floor,
        str(config.reference),
    )


def _asked(config: Config, given: Collection[str]) -> str | None:
    """Registered name of the extractor that the user or the experiment specifies; None if neither does."""
    if not config.experiment and not {"extractor", "judges"} & {*given}:
        return None
    return str(config.extractor if isinstance(config.extractor, str) else config.extractor["name"])


def _check_shape(
    config: Config, source: GivenImages | Reference, path: str, reference: Found, role: str = "reference"
) -> None:
    """Check that images have the shape of the reference's or the floor's images, as far as its file states it.

    Raises:
        UsageError: Another size, or another number of channels.
    """
    theirs = reference.provenance.get("shape") if isinstance(reference, Reference) else reference.shape
    wanted = theirs or (config.shape if config.experiment else None)
    own = source.provenance.get("shape") if isinstance(source, Reference) else source.shape
    if wanted is None or own is None or tuple(own) == tuple(wanted):
        return
    label = reference.provenance["label"] if isinstance(reference, Reference) else reference.label
    (channels, *size), (wanted_channels, *wanted_size) = own, wanted
    remedies = []
    if size != wanted_size:
        crops = wanted_size[0] == wanted_size[1] and isinstance(source, GivenImages) and source.resizable
        crop = f", or set image_size={wanted_size[0]} to crop and resize them" if crops else ""
        remedies.append(f"resize them to {wanted_size[1]}x{wanted_size[0]}{crop}")
    if channels != wanted_channels:
        remedies.append(f"convert them to {_colours(wanted_channels)}")
    raise UsageError(
        f"{path}: the images are {_described(own)}, those of the {role} {label!r} {_described(wanted)}: "
        f"{' and '.join(remedies)}"
    )


def _described(shape: Any) -> str:
    channels, height, width = shape
    return f"{width}x{height} {_colours(channels)}"


def _colours(channels: int) -> str:
    return {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
