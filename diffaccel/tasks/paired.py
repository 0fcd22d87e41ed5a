"""Pairs of images from two data sets, such as photographs and saliency maps."""

from typing import Annotated, Any

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.condition import Condition, Kinds
from diffaccel.data.conditions import CONDITIONERS, Conditioner
from diffaccel.data.source import SOURCES, Images, Split, build_source
from diffaccel.data.stream import to_float
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams


@CONDITIONERS.register("paired")
class Paired(Conditioner):
    """Image of another source, paired with the images of ``data`` by order, and by name if both are files.

    The images of ``data`` are generated, such as saliency or edge maps; those of ``source`` are the conditions, such as
    photographs, of the same height and width.

    Args:
        shape: Shape of the images of ``data``, (C, H, W).
        source: Source of the condition's images, by name and keys, such as ``{name: folder, path: photographs}``.
        channels: Number of channels of the condition's images.

    Raises:
        UsageError: The source or a key of it is unknown.
    """

    weight_keys = ("channels",)
    hashed = True

    def __init__(
        self, shape: tuple[int, int, int], source: Annotated[dict[str, Any], SOURCES], channels: int = 3
    ) -> None:
        self.kinds, self.size = Kinds(image=channels), shape[1:]
        self.source = build_source(source)

    @override
    def open(self, split: Split, images: Images) -> "PairedConditions":
        others = self.source.split(split)
        chosen, whole = images.chosen or (None, len(images))
        found = len(others)
        others = others if chosen is None or found != whole else others.at(chosen)
        others.check()
        wanted = (self.kinds.image, *self.size)
        if found != whole or others.shape != wanted:
            raise UsageError(
                f"condition 'paired': {self.source.label} ({split}) has {found} images of shape {others.shape} "
                f"for {whole} images that require {wanted}: set condition.channels, image_size in both sources, "
                "or complete the pairs"
            )
        _check_names(getattr(images, "names", None), getattr(others, "names", None), self.source.label)
        return PairedConditions(others)

    @override
    def identity(self, conditions: Any) -> dict[str, Any]:
        return {"others": conditions.others.fingerprint()}


class PairedConditions:
    """Images of the other source, in the order of the images that they are paired with.

    Args:
        others: Images of the other source.
    """

    def __init__(self, others: Images) -> None:
        self.others = others

    def __call__(
        self, images: Tensor, chosen: Tensor, noise: NoiseStreams, mirrored: Tensor | None = None
    ) -> Condition:
        """See :class:`~diffaccel.data.stream.Conditions`; a mirrored image has the mirrored other image."""
        found = self.others.read(chosen)
        if mirrored is not None:
            found = torch.where(mirrored[:, None, None, None], found.flip(-1), found)
        return Condition(image=to_float(found))


def _check_names(own: Any, other: Any, label: str) -> None:
    """Check that paired files have the same names, without folders and suffixes.

    Raises:
        UsageError: Some names differ.
    """
    if own is None or other is None:
        return
    stems = [[str(name).rpartition("/")[2].rpartition(".")[0] for name in names] for names in (own, other)]
    for one, two in zip(*stems, strict=True):
        if one != two:
            raise UsageError(
                f"condition 'paired': {label} has {two!r} where the images have {one!r}: give both files of a pair the "
                "same name"
            )
