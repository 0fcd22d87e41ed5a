"""Conditions of the images of a data set: degradations of the images themselves, or companions such as other images."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaccel.condition import Condition, Kinds, Observation
from diffaccel.data.source import Images, Source, Split, random_order
from diffaccel.data.stream import Conditions, to_float
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import conform
from diffaccel.parts.registry import Registry

CONDITIONERS: Registry["Conditioner"] = Registry(
    "condition",
    builtins=["diffaccel.tasks", "diffaccel.captions.conditioner"],
    context=["shape"],
    extra={"samples": int, "seed": int, "lpips": bool},
)


@CONDITIONERS.base
class Conditioner(ABC):
    """Part that makes the condition of each image.

    Attributes:
        kinds: Kinds of the conditions.
        observation: Part of the image that its condition determines; None for no such part.
        token_count: Number of tokens of a condition, for estimates of the cost.
    """

    kinds: Kinds
    observation: Observation | None = None
    token_count: int = 0
    restores: ClassVar[bool] = True
    """Whether the image is to be restored from its condition, so that samples are compared with the image."""
    hashed: ClassVar[bool] = False
    """Whether :meth:`identity` covers the files that keys name, so that their paths do not identify the samples."""
    on_device: ClassVar[bool] = False
    """Whether the conditions depend on the images alone, so that they can be made on the device of the images."""
    weight_keys: ClassVar[tuple[str, ...] | None] = None
    """Keys that determine what the weights of a network mean; None for all."""

    @abstractmethod
    def open(self, split: Split, images: Images) -> Conditions:
        """Open what the conditions of a split are made from.

        Raises:
            UsageError: It is missing, or doesn't fit the images.
        """

    @property
    def fingerprint(self) -> str | None:
        """Hash of files that determine what the weights of a network mean, besides its keys; None for no such files.

        Raises:
            UsageError: The files are missing.
        """
        return None

    def prepare(self) -> None:  # noqa: B027  (optional)
        """Compute what the opened conditions need, before worker processes are started."""

    def identity(self, conditions: Conditions) -> dict[str, Any]:
        """Return what determines the conditions of a split, besides its images and the keys of the conditioner."""
        return {}

    def given(self) -> "Given | None":
        """Return the condition of sampled images that keys set; None for those of the test images."""
        return None

    def of_text(self, captions: Sequence[str]) -> Condition:
        """Make the conditions of captions, (B,) of them.

        Raises:
            UsageError: The condition is no text.
        """
        raise UsageError(f"captions: the condition is {self.kinds} and no text: give condition=Condition(...)")

    def baseline(self, condition: Condition) -> Tensor | None:
        """Return images that are made from the condition without a model, (B, C, H, W); None if there are none."""
        return None

    def observe(self, images: Tensor) -> Tensor | None:
        """Degrade images in 0 .. 255, (B, C, H, W) float, for the consistency with the condition; None if undefined."""
        return None


class Degradation(Conditioner):
    """Condition that is made from the image itself."""

    on_device = True

    def open(self, split: Split, images: Images) -> Conditions:
        """See :class:`Conditioner`; nothing is opened."""
        return lambda batch, chosen, noise, mirrored=None: self.degrade(to_float(batch), noise)

    @abstractmethod
    def degrade(self, images: Tensor, noise: NoiseStreams) -> Condition:
        """Make the conditions of images in [-1, 1], (B, C, H, W)."""


def round_to_8_bits(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to the values of 8-bit images."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


class OfConditioner:
    """What all conditions of sampled images take over from their conditioner."""

    conditioner: Conditioner

    @property
    def kinds(self) -> Kinds:
        """Kinds of the conditions."""
        return self.conditioner.kinds

    @property
    def observation(self) -> Observation | None:
        """Part of the images that the conditions determine; None for no such part."""
        return self.conditioner.observation

    @property
    def token_count(self) -> int:
        """Number of tokens of a condition; 0 for no tokens."""
        return self.conditioner.token_count

    def of_text(self, captions: Sequence[str]) -> Condition:
        """Make the conditions of captions; see :class:`Conditioner`."""
        return self.conditioner.of_text(captions)


class HeldOut(OfConditioner):
    """Conditions of sampled images: those of the images of the test split, each for some samples in succession.

    Sample i belongs to test image ``order[i // samples]``, where ``order`` is a random permutation, because files are
    often sorted by class. The permutation and random degradations, which depend on the index of the test image, have a
    seed of their own. They are the same for every method, budget and seed of sampling.

    Args:
        conditioner: Conditioner.
        source: Data set.
        limit: Maximum number of test images; None for all.
        samples: Number of samples per test image.
        seed: Seed of the permutation and of random degradations.
        lpips: Whether to measure the perceptual distance of samples to the test images.

    Raises:
        UsageError: ``samples`` is less than 1, or ``seed`` is negative.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        source: Source,
        limit: int | None = None,
        samples: int = 1,
        seed: int = 0,
        lpips: bool = False,
    ) -> None:
        if samples < 1 or seed < 0:
            raise UsageError(f"condition: samples={samples} and seed={seed}: set 1 or more, and 0 or more")
        self.conditioner, self.source, self.limit, self.samples, self.seed = conditioner, source, limit, samples, seed
        self.lpips = lpips
        self._opened: tuple[Images, Conditions] | None = None
        self._order: Tensor | None = None

    def _open(self) -> tuple[Images, Conditions]:
        if self._opened is None:
            images = self.source.split("test")
            images = images if self.limit is None else images.some(self.limit)
            images.check()
            self._opened = images, self.conditioner.open("test", images)
        return self._opened

    def check(self, n: int) -> None:
        """Check that there are test images for n samples.

        Raises:
            UsageError: There are too few, or no test images at all.
        """
        found, wanted = len(self._open()[0]), -(-n // self.samples)
        if wanted > found:
            raise UsageError(
                f"n={n} with {self.samples} sample(s) per image requires {wanted} test images as conditions, but "
                f"{self.source.label} has {found}: set n={found * self.samples} or less"
            )

    @property
    def order(self) -> Tensor:
        """Test images in the order of their use, (N,) int64."""
        if self._order is None:
            self._order = random_order(len(self._open()[0]), self.seed)
        return self._order

    def _inputs(self, indices: range) -> tuple[Tensor, Tensor]:
        """Test images of a batch of samples, and the position of each sample's image among them."""
        first, last = indices.start // self.samples, (indices.stop - 1) // self.samples
        return self.order[first : last + 1], torch.arange(indices.start, indices.stop) // self.samples - first

    def prepare(self) -> None:
        """Compute what the conditions need, before images are sampled."""
        self._open()
        self.conditioner.prepare()

    def labels(self, indices: range) -> Tensor | None:
        """Return the class labels of the test images of samples, (B,); None for images without labels."""
        chosen, position = self._inputs(indices)
        labels = self._open()[0].labels
        return None if labels is None else labels[chosen][position]

    def condition(self, indices: range) -> Condition:
        """Return the conditions of samples, (B,) of them, each made once per test image."""
        chosen, position = self._inputs(indices)
        images, conditions = self._open()
        made = conditions(images.read(chosen), chosen, NoiseStreams(self.seed, chosen, "condition"))
        return made.select(position)

    def targets(self, indices: range) -> Tensor:
        """Return the test images of samples, (B, C, H, W) uint8."""
        chosen, position = self._inputs(indices)
        return self._open()[0].read(chosen)[position]

    def identity(self, n: int) -> dict[str, Any]:
        """Return what determines the conditions of n samples, besides the conditioner: a hash of the test images."""
        self.check(n)
        digest, (images, conditions) = hashlib.sha256(), self._open()
        for first in range(0, count := -(-n // self.samples), 500):
            batch = images.read(self.order[first : min(first + 500, count)])
            digest.update(batch.numpy().tobytes())
        own = {"sha256": digest.hexdigest(), "samples": self.samples, "seed": self.seed}
        return {**own, **self.conditioner.identity(conditions)}


class Given(OfConditioner):
    """The same condition for all sampled images.

    Args:
        conditioner: Conditioner.
        make: Function that makes the condition, of one sample.
        key: What determines the condition, besides the conditioner.
    """

    samples = 1
    """Images depend on one another by nothing but the condition, which is the same for all."""

    def __init__(self, conditioner: Conditioner, make: Callable[[], Condition], key: Mapping[str, Any]) -> None:
        self.conditioner, self.make, self.key = conditioner, make, key
        self._made: Condition | None = None

    def check(self, n: int) -> None:
        """Check that the condition can be made.

        Raises:
            UsageError: It can't.
        """
        self.prepare()

    def prepare(self) -> None:
        """Make the condition, once."""
        self._made = self._made or self.make()

    def condition(self, indices: range) -> Condition:
        """Return the conditions of samples, (B,) of them."""
        self.prepare()
        assert self._made is not None
        return self._made.map(lambda value: value.expand(len(indices), *value.shape[1:]))

    def labels(self, indices: range) -> Tensor | None:
        """Return the classes of samples, which are unknown: None."""
        return None

    def identity(self, n: int) -> dict[str, Any]:
        """Return what determines the conditions of n samples, besides the keys of the conditioner."""
        return {**self.key, "fingerprint": self.conditioner.fingerprint}


class ToGive(OfConditioner):
    """Conditions of a model without data, which the user gives in each call of the sampler.

    Args:
        conditioner: Conditioner that the model was trained with.
        fingerprint: Its fingerprint in training; None if it is unknown.
    """

    samples = 1
    """Images do not share a condition."""

    def __init__(self, conditioner: Conditioner, fingerprint: str | None = None) -> None:
        self.conditioner, self._fingerprint = conditioner, fingerprint

    def check(self, n: int) -> None:
        """Refuse to sample without a given condition.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            f"the network takes {self.kinds}, and its file has no images: give condition=... to the sampler, or load "
            "an experiment with checkpoint=, whose test images have conditions"
        )

    def prepare(self) -> None:
        """Compute nothing."""

    def condition(self, indices: range) -> Condition:
        """See :meth:`check`."""
        self.check(len(indices))
        return Condition()

    def labels(self, indices: range) -> Tensor | None:
        """Return the classes of samples, which are unknown: None."""

    def of_text(self, captions: Sequence[str]) -> Condition:
        """Make the conditions of captions; see :class:`Conditioner`.

        Raises:
            UsageError: The condition is no text, or the text encoder is missing or another one than in training.
        """
        if self._fingerprint not in (None, self.conditioner.fingerprint):
            raise UsageError(
                "condition: the text encoder has other weights than that of the training: load the experiment with "
                "checkpoint= and the path of that encoder"
            )
        return self.conditioner.of_text(captions)


def sampling_keys(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a condition that belong to sampling (``samples``, ``seed``, ``lpips``), null for the default.

    Raises:
        UsageError: A value has another type.
    """
    found: dict[str, Any] = {"samples": 1, "seed": 0, "lpips": False}
    for key in found:
        kind = CONDITIONERS.extra[key]
        value = conform(f"condition.{key}", node.get(key), kind | None)
        if value is None:
            continue
        if type(value) is not kind and not (kind is bool and value in (0, 1)):
            raise UsageError(f"condition.{key}={value}: give {'true or false' if kind is bool else 'a whole number'}")
        found[key] = kind(value)
    return found


def build_conditioner(node: Mapping[str, Any], shape: tuple[int, int, int]) -> Conditioner | None:
    """Build a conditioner from its node, without the keys of the sampling; None for an empty node.

    Raises:
        UsageError: A name or key is unknown, or there are keys without a name.
    """
    if not node:
        return None
    if node.get("name") is None:
        raise UsageError(
            f"condition.{next(iter(node))} is set, but the experiment has no condition: remove it, set condition=NAME "
            f"({', '.join(CONDITIONERS)}), or use an experiment with a condition"
        )
    return CONDITIONERS.build({key: value for key, value in node.items() if key not in CONDITIONERS.extra}, shape=shape)
