"""Conditions of a batch: class labels, token embeddings, images and masks, and which of them a network takes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffaccel.errors import UsageError

NULL = -1
"""Label of a sample without class."""
LARGEST = 3.0
"""Largest absolute value of a condition's image: it is in [-1, 1], but interpolation overshoots, by up to 1.1."""


class Condition(NamedTuple):
    """What the samples of a batch are conditional on: any of the kinds together, or none.

    Every kind has a null value for samples without this condition: label -1, no valid token, an image and a mask of
    zeros. A network treats a kind that is None as null for the whole batch.

    The class is a named tuple, so that loaders, devices, precisions and compiled networks handle it like a batch.

    Attributes:
        labels: Class labels, (B,) int64; -1 for no class.
        tokens: Embeddings of a sequence of tokens, such as the words of a caption, (B, L, D).
        valid: Which tokens exist, as opposed to padding, (B, L) bool; None for all.
        image: Image in [-1, 1], (B, C', H, W), 0 where ``mask`` is 0.
        mask: 1 where ``image`` holds pixels of the sample itself, 0 elsewhere, (B, 1, H, W).
        features: What a network computes from the other kinds alone, for example by a text encoder, tensors (B, ...)
            that only this network understands; None where the network computes them in each evaluation.
    """

    labels: Tensor | None = None
    tokens: Tensor | None = None
    valid: Tensor | None = None
    image: Tensor | None = None
    mask: Tensor | None = None
    features: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, value: "Condition | Tensor | None") -> "Condition | None":
        """Convert class labels (B,) to a condition; conditions and None are returned unchanged."""
        return cls(labels=value) if isinstance(value, Tensor) else value

    @property
    def kinds(self) -> "tuple[Tensor | None, ...]":
        """The tensors of all kinds, without features."""
        return self[:-1]

    @property
    def size(self) -> int:
        """Number of samples."""
        return next((len(value) for value in self.kinds if value is not None), 0)

    def map(self, function: Any) -> "Condition":
        """Apply a function to the tensor of each kind."""
        features = None if self.features is None else tuple(function(value) for value in self.features)
        return Condition._make([*(None if value is None else function(value) for value in self.kinds), features])

    def to(self, device: torch.device | str, **options: Any) -> "Condition":
        """Move the tensors to a device; with options of :meth:`torch.Tensor.to`."""
        return self.map(lambda value: value.to(device, **options))

    def select(self, index: Tensor | slice) -> "Condition":
        """Select samples of the batch, in the order of ``index``."""
        return self.map(lambda value: value[index])

    def only(self, kinds: "Kinds") -> "Condition | None":
        """Leave out the kinds that a network does not take; None if no kind is left."""
        found = Condition(
            self.labels if kinds.classes else None,
            self.tokens if kinds.tokens else None,
            self.valid if kinds.tokens else None,
            self.image if kinds.image else None,
            self.mask if kinds.mask else None,
        )
        return found if found.size else None

    def drop(self, labels: Tensor | None = None, others: Tensor | None = None) -> "Condition":
        """Replace the condition of some samples by null; features are left out.

        Args:
            labels: Samples that lose their label, (B,) bool; None for no sample.
            others: Samples that lose tokens, image and mask, (B,) bool; None for no sample.
        """
        found = self._replace(features=None)
        if labels is not None and found.labels is not None:
            found = found._replace(labels=found.labels.masked_fill(labels, NULL))
        if others is None:
            return found
        if found.tokens is not None:
            valid = found.valid
            if valid is None:
                valid = torch.ones(found.tokens.shape[:2], dtype=torch.bool, device=found.tokens.device)
            found = found._replace(valid=valid & ~others[:, None])
        of_pixels = others[:, None, None, None]
        image, mask = (None if one is None else one.masked_fill(of_pixels, 0) for one in (found.image, found.mask))
        return found._replace(image=image, mask=mask)


def join(one: Condition | None, other: Condition | None) -> Condition | None:
    """Combine the kinds of two conditions of the same batch, without features; those of ``one`` take precedence."""
    if one is None or other is None:
        return one or other
    pairs = zip(one.kinds, other.kinds, strict=True)
    return Condition._make([*(second if first is None else first for first, second in pairs), None])


@dataclass(frozen=True)
class Kinds:
    """Kinds of conditions that a network takes, or that data have.

    Attributes:
        classes: Number of classes; 0 for no labels.
        tokens: Width of the token embeddings; 0 for no tokens.
        image: Number of channels of the image; 0 for no image.
        mask: Whether there is a mask.
    """

    classes: int = 0
    tokens: int = 0
    image: int = 0
    mask: bool = False

    @classmethod
    def taken_by(cls, network: nn.Module) -> "Kinds":
        """Return the declaration of a network, its attribute ``takes``, or else its classes."""
        declared = getattr(network, "takes", None)
        return declared if isinstance(declared, Kinds) else cls(classes=getattr(network, "classes", 0))

    @property
    def pixels(self) -> int:
        """Number of channels of image and mask together."""
        return self.image + self.mask

    @property
    def required(self) -> bool:
        """Whether there are kinds other than labels, for which a sampler has no default."""
        return bool(self.tokens or self.pixels)

    def __str__(self) -> str:
        found = [f"labels of {self.classes} classes"] if self.classes else []
        found += [f"tokens of width {self.tokens}"] if self.tokens else []
        found += [f"an image of {self.image} channel{'s' * (self.image > 1)}"] if self.image else []
        return " and ".join(found + ["a mask"] * self.mask) or "no condition"


def check_kinds(takes: Kinds, given: Kinds, by: str) -> None:
    """Check that a network takes exactly the tokens, image and mask that it is given; labels are checked elsewhere.

    Args:
        takes: Kinds that the network takes.
        given: Kinds that it is given.
        by: What gives them, for the message.

    Raises:
        UsageError: The kinds differ.
    """
    if (takes.tokens, takes.image, takes.mask) == (given.tokens, given.image, given.mask):
        return
    own, other = (Kinds(0, one.tokens, one.image, one.mask) for one in (takes, given))
    keys = {"tokens": given.tokens, "image": given.image, "mask": str(given.mask).lower()}
    settings = " ".join(
        f"network.{key}={value}" for key, value in keys.items() if getattr(takes, key) != getattr(given, key)
    )
    remedy = f"set {settings}" if given.required else "set condition="
    raise UsageError(f"the network takes {own}, but {by} gives {other}: {remedy}, or use another experiment")


def trained_without(network: nn.Module, part: Literal["class", "labels", "others"] = "class") -> bool:
    """Whether a network was also trained without conditions, by its attributes ``null_...``; True if that is unknown.

    Args:
        network: Network.
        part: ``class`` for no condition at all, ``labels`` for no labels beside other conditions, ``others`` for no
            tokens, image and mask beside labels.
    """
    return bool(getattr(network, f"null_{part}", getattr(network, "null_class", True)))


def check_condition(condition: Condition, takes: Kinds, n: int, shape: tuple[int, int, int]) -> None:
    """Check a condition that a user gives for n samples.

    Args:
        condition: Condition.
        takes: Kinds that the network takes.
        n: Number of samples.
        shape: Shape of a sample, (C, H, W).

    Raises:
        UsageError: A kind is missing, is not taken by the network, is no tensor, or has another shape or type; a value
            is out of range; or features are given.
    """
    if condition.features is not None:
        raise UsageError("condition: features are computed by the network: leave them out")
    for kind, needed in (
        ("labels", takes.classes),
        ("tokens", takes.tokens),
        ("valid", takes.tokens),
        ("image", takes.image),
        ("mask", takes.mask),
    ):
        value = getattr(condition, kind)
        if value is not None and not needed:
            raise UsageError(f"condition: the network takes {takes}, but {kind} is given: leave it out")
        if value is None and needed and kind not in ("labels", "valid"):
            raise UsageError(f"condition: the network takes {takes}, but {kind} is missing: give it")
        if value is not None and not isinstance(value, Tensor):
            raise UsageError(f"condition: {kind} is of type {type(value).__name__}, it must be a tensor")
    tokens, size = condition.tokens, shape[1:]
    if tokens is not None and (tokens.ndim != 3 or tokens.shape[::2] != (n, takes.tokens)):
        raise UsageError(f"condition: tokens have shape {tuple(tokens.shape)}, it must be ({n}, L, {takes.tokens})")
    length = 0 if tokens is None else tokens.shape[1]
    wanted = {"labels": (n,), "valid": (n, length), "image": (n, takes.image, *size), "mask": (n, 1, *size)}
    for kind, right in wanted.items():
        value = getattr(condition, kind)
        if value is not None and tuple(value.shape) != right:
            raise UsageError(f"condition: {kind} has shape {tuple(value.shape)}, it must be {right}")
    _check_values(condition, takes.classes)


def _check_values(condition: Condition, classes: int) -> None:
    """Check the types and the values of a condition's tensors."""
    labels, tokens, valid, image, mask, _ = condition
    for kind, value in (("tokens", tokens), ("image", image)):
        if value is not None and not (value.is_floating_point() and value.isfinite().all()):
            raise UsageError(
                f"condition: {kind} ({value.dtype}) must be floating-point numbers without NaN or infinity"
            )
    if image is not None and (top := image.abs().max()) > LARGEST:
        raise UsageError(f"condition: image has values up to {top:.4g}, it must be in [-1, 1]: rescale it")
    whole = labels is None or not (labels.is_floating_point() or labels.dtype == torch.bool)
    if labels is not None and not (whole and ((labels.long() >= NULL) & (labels < classes)).all()):
        raise UsageError(f"condition: labels must be whole numbers from 0 to {classes - 1}, or {NULL} for no class")
    if valid is not None and valid.dtype != torch.bool:
        raise UsageError(f"condition: valid is {valid.dtype}, it must be torch.bool: true where there is a token")
    if mask is not None and not ((mask == 0) | (mask == 1)).all():
        raise UsageError("condition: the mask must consist of 0 and 1")


def labels_of(condition: Condition | Tensor | None, classes: int, like: Tensor) -> Tensor:
    """Return the labels for an embedding of ``classes`` classes and a null class after them.

    Args:
        condition: Condition, or class labels (B,); None for the null class.
        classes: Number of classes, which is also the index of the null class.
        like: Tensor of the batch, (B, ...).

    Returns:
        Labels, (B,) int64.
    """
    condition = Condition.of(condition)
    if condition is None or condition.labels is None:
        return torch.full((len(like),), classes, dtype=torch.long, device=like.device)
    labels = condition.labels
    return torch.where(labels < 0, classes, labels)


def pixels_of(condition: Condition | Tensor | None, takes: Kinds, like: Tensor) -> Tensor:
    """Return image and mask as channels of a network's input; zeros for no condition.

    Args:
        condition: Condition.
        takes: Kinds that the network takes, with an image or a mask.
        like: Input of the network, (B, C, H, W).

    Returns:
        Channels, (B, takes.pixels, H, W), in the dtype of ``like``.

    Raises:
        UsageError: The image or the mask has another number of channels or another size.
    """
    condition = Condition.of(condition) or Condition()
    found = []
    for kind, channels in (("image", takes.image), ("mask", int(takes.mask))):
        value = getattr(condition, kind)
        right = (len(like), channels, *like.shape[2:])
        if channels and value is not None and tuple(value.shape) != right:
            raise UsageError(f"the condition's {kind} has shape {tuple(value.shape)}, the network takes {right}")
        if channels:
            found.append(torch.zeros(right, dtype=like.dtype, device=like.device) if value is None else value.to(like))
    return torch.cat(found, dim=1)


class Observation(ABC):
    """Part of a sample that its condition determines: an orthogonal projection P of images.

    The exact E[x_0 | x_t, condition] has P x_0 = P y, where y is the image of the condition. Imposing this on an
    estimate removes a part of its error and leaves the rest unchanged, so that the squared error can only fall.

    Attributes:
        rounds: Number of times that finished images are clamped to [-1, 1] and imposed on in turn. The image lies in
            both convex sets, so that alternating projections approach them. 0 if P acts on each pixel alone.
    """

    rounds: int = 0

    @abstractmethod
    def impose(self, x: Tensor, target: Tensor, condition: Condition) -> Tensor:
        """Compute x + P (target - x).

        Args:
            x: Images, (B, C, H, W).
            target: Images whose observed part is imposed, (B, C, H, W).
            condition: Condition of the images.
        """


class KnownPixels(Observation):
    """Pixels whose mask is 1, which are copied exactly."""

    def impose(self, x: Tensor, target: Tensor, condition: Condition) -> Tensor:
        """See :class:`Observation`."""
        assert condition.mask is not None
        return torch.where(condition.mask > 0, target, x)
