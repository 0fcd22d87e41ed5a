"""Conditions of sampled images: by index, from inputs such as held-out images, or given by the user."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from diffaccel.condition import Condition, Kinds, KnownPixels, Observation, check_condition, join, trained_without
from diffaccel.denoiser import ConditionedDenoiser, Denoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.prior import ChainPrior, Prior
from diffaccel.solver import Solver


class Inputs(Protocol):
    """Conditions of images by index, in addition to labels."""

    @property
    def kinds(self) -> Kinds:
        """Kinds of the conditions."""

    @property
    def observation(self) -> Observation | None:
        """Part of the images that the conditions determine; None for no such part."""

    @property
    def token_count(self) -> int:
        """Number of tokens of a condition, for estimates of the cost; 0 for no tokens."""

    @property
    def samples(self) -> int:
        """Number of images in succession that share a condition."""

    def check(self, n: int) -> None:
        """Check that there are conditions for n images.

        Raises:
            UsageError: There are too few, or they can't be read.
        """

    def prepare(self) -> None:
        """Compute what the conditions need, before images are sampled."""

    def condition(self, indices: range) -> Condition:
        """Return the conditions of images, on the CPU."""

    def labels(self, indices: range) -> Tensor | None:
        """Return the classes of images, (B,) on the CPU; None for no classes."""

    def of_text(self, captions: Sequence[str]) -> Condition:
        """Make the conditions of captions.

        Raises:
            UsageError: The condition is no text.
        """


def labels_by_index(
    takes: Kinds, prior: Prior, inputs: Inputs | None, indices: range, device: torch.device
) -> Tensor | None:
    """Return the class labels of images, (B,): those of the inputs, which other labels would contradict.

    Without inputs, the labels are balanced and independent of the batch. Of every ``classes`` images in succession,
    each has another class. The order is rotated by one from group to group, so that the images of a jackknife block,
    one in ten, are not of one class.

    Returns None, the null class, if the network has no classes, for inputs without labels, and for chains, in which the
    class changes.
    """
    if not takes.classes or isinstance(prior, ChainPrior):
        return None
    if inputs is not None:
        labels = inputs.labels(indices)
        return None if labels is None else labels.to(device)
    index = torch.arange(indices.start, indices.stop, device=device)
    return (index + index // takes.classes) % takes.classes


def condition_by_index(
    takes: Kinds, prior: Prior, inputs: Inputs | None, indices: range, device: torch.device
) -> Condition | None:
    """Return the condition of images by index; None for no condition.

    Raises:
        UsageError: The network takes a condition other than labels, and there are no inputs.
    """
    labels = labels_by_index(takes, prior, inputs, indices, device)
    own = None if labels is None else Condition(labels=labels)
    if inputs is None:
        require_inputs(takes)
        return own
    return join(own, inputs.condition(indices).to(device))


def classes_of(labels: Tensor | None, inputs: Inputs | None, n: int) -> Tensor | None:
    """Return the classes that n images are made for, (n,) on the CPU; None for no classes.

    These are the labels of a class-conditional network, or else the classes of the inputs, such as those of captions.
    """
    if labels is not None:
        return labels.cpu()
    return None if inputs is None else inputs.labels(range(n))


def check_inputs(takes: Kinds, inputs: Inputs, n: int, network: nn.Module) -> None:
    """Check that there are conditions and labels of n images.

    Raises:
        UsageError: There are too few, they can't be read, the labels are of more classes than the network has, or there
            are none, and the network was trained with labels only.
    """
    inputs.check(n)
    if not takes.classes:
        return
    labels = inputs.labels(range(n))
    if labels is None:
        _require_null_labels(network, "the condition of the images has no labels")
    elif (largest := int(labels.max())) >= takes.classes:
        raise UsageError(
            f"the images of the condition have labels up to {largest}, but the network has {takes.classes} classes: "
            f"set network.classes={largest + 1}, or use other data"
        )


def _require_null_labels(network: nn.Module, why: str) -> None:
    if not trained_without(network, "labels"):
        raise UsageError(
            f"{why}, but this network was trained with labels only: give labels= to the sampler, or use a network "
            "fitted with training.label_drop"
        )


def require_inputs(takes: Kinds) -> None:
    """Check that sampling without inputs is possible.

    Raises:
        UsageError: The network takes a condition other than labels.
    """
    if takes.required:
        raise UsageError(
            f"the network takes {takes}: give condition=Condition(...) to the sampler, or condition= in the experiment"
        )


def given_condition(
    takes: Kinds,
    prior: Prior,
    n: int,
    shape: tuple[int, int, int],
    denoiser: Denoiser,
    labels: Sequence[int] | None,
    condition: Condition | str | Sequence[str] | None,
    inputs: Inputs | None = None,
) -> Condition | None:
    """Check the labels and conditions that a user gives for n images, and move them to the denoiser's device.

    Labels that are missing beside a condition are null, because those by index would contradict it; conditions that are
    missing beside labels are those of the inputs. A caption is that of all images. Image values where the mask is 0 are
    set to 0, which networks are trained with.

    Raises:
        UsageError: The network does not take them, or was not trained without those that are null; the prior is a
            chain; labels are given twice; or a value is invalid.
    """
    if labels is None and condition is None:
        return None
    if isinstance(prior, ChainPrior) or not (takes.classes or takes.required):
        what = "labels" if condition is None else "condition"
        reason = "a chain samples without " + what if isinstance(prior, ChainPrior) else "the network has no classes"
        if condition is not None and not isinstance(prior, ChainPrior):
            reason = "the network takes no condition"
        raise UsageError(f"{what}: {reason}: leave {'them' if condition is None else 'it'} out")
    if isinstance(condition, str):
        condition = [condition] * n
    if isinstance(condition, list | tuple) and not isinstance(condition, Condition):
        condition = _of_text(condition, n, takes, inputs)
    if condition is not None and not isinstance(condition, Condition):
        raise UsageError(f"condition: {type(condition).__name__} is not a Condition: give da.Condition(image=...)")
    found = Condition() if condition is None else condition
    if labels is not None:
        if found.labels is not None:
            raise UsageError("labels: the condition has labels too: leave one of them out")
        found = found._replace(labels=_checked_labels(takes.classes, labels, n))
    if condition is None and takes.required:
        if inputs is None:
            require_inputs(takes)
        else:
            inputs.check(n)
            found = inputs.condition(range(n))._replace(labels=found.labels)
    check_condition(found, takes, n, shape)
    _check_nulls(found, takes, denoiser.network)
    if found.labels is not None:
        found = found._replace(labels=found.labels.long())
    if found.image is not None and found.mask is not None:
        found = found._replace(image=found.image * found.mask)
    return found.to(denoiser.device)


def _check_nulls(condition: Condition, takes: Kinds, network: nn.Module) -> None:
    """Check that a network was trained without the kinds that a condition has as null."""
    if takes.classes and (condition.labels is None or (condition.labels < 0).any()):
        _require_null_labels(network, "condition: labels are missing or -1")
    no_token = condition.valid is not None and not condition.valid.any(1).all()
    if no_token and not trained_without(network, "others"):
        raise UsageError(
            "condition: a sample has no valid token, but this network was trained with tokens only: give one, or use "
            "a network fitted with training.condition_drop"
        )


def _of_text(captions: Sequence[str], n: int, takes: Kinds, inputs: Inputs | None) -> Condition:
    """Encode the captions of n images by the text encoder of the experiment."""
    if any(not isinstance(caption, str) for caption in captions):
        raise UsageError(
            f"condition: {type(captions).__name__} is not a Condition: give da.Condition(image=...), or captions"
        )
    if inputs is None or not takes.tokens:
        reason = "the model has no text encoder" if takes.tokens else f"the network takes {takes}"
        raise UsageError(f"condition: {reason}: give da.Condition(...), or load an experiment with condition=captions")
    if len(captions) != n:
        raise UsageError(f"condition: {len(captions)} captions for {n} images: give one caption, or one for each image")
    return inputs.of_text(captions)


def _checked_labels(classes: int, labels: Sequence[int], n: int) -> Tensor:
    if not classes:
        raise UsageError("labels: the network has no classes: leave them out")
    problem = UsageError(f"labels: give {n} whole numbers from 0 to {classes - 1}, one for each image")
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):  # no numbers at all, or of several shapes
        raise problem from None
    whole = given.dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    if given.shape != (n,) or not whole or not ((given >= 0) & (given < classes)).all():
        raise problem
    return given.long()


def check_parts(takes: Kinds, prior: Prior, solver: Solver, denoiser: Denoiser) -> None:
    """Check that prior and solver can sample with the conditions that the network takes.

    Raises:
        UsageError: A chain samples without condition, or a generator takes fewer kinds than the network, and the
            network requires them or was trained with labels only; or the solver is guided, and there is no condition,
            or the network was not trained without it.
    """
    chain, own = isinstance(prior, ChainPrior), Kinds.taken_by(denoiser.network)
    if chain and takes.required:
        raise UsageError(f"a chain samples without condition, but the network takes {takes}: choose another prior")
    if not chain and takes != own and prior.highest_ratio(denoiser) > 0:  # at ratio 0 the denoiser is not evaluated
        _check_generator(takes, own, denoiser.network)
    if solver.guidance:
        # A denoiser without bound condition refuses guidance, and so does a network that was not trained without.
        empty = Condition()
        bound = denoiser if chain or takes == Kinds() else ConditionedDenoiser(denoiser, empty, encoded=empty)
        bound.guided(solver.guidance)
    if chain and takes.classes and not trained_without(denoiser.network):
        raise UsageError(
            "a chain samples without labels, but this conditional network was trained with labels only: choose "
            "another prior, or a network fitted with training.label_drop"
        )


def _check_generator(takes: Kinds, own: Kinds, network: nn.Module) -> None:
    """Check that the denoiser's network can be evaluated with the condition that a generator takes.

    Args:
        takes: Kinds that the generator takes, which are those of the images.
        own: Kinds that the network takes.
        network: Network of the denoiser.

    Raises:
        UsageError: The network requires other kinds, or was trained with labels only, and the generator takes none.
    """
    if own.tokens > takes.tokens or own.image > takes.image or own.mask > takes.mask:
        raise UsageError(
            f"the prior's generator takes {takes}, but the denoiser's network takes {own}: use a generator that takes "
            "the same, or another prior"
        )
    part: Literal["class", "labels"] = "labels" if takes.required else "class"
    if own.classes and not takes.classes and not trained_without(network, part):
        raise UsageError(
            "the prior's generator takes no labels, but the denoiser's conditional network was trained with labels "
            f"only: use a generator with prior.network.classes={own.classes}, another prior, or a network fitted with "
            "training.label_drop"
        )


class Observed:
    """Observed part of a batch's samples, with the values that it has.

    Args:
        observation: Part of the samples that the condition determines.
        condition: Condition with an image that has these values.
    """

    def __init__(self, observation: Observation, condition: Condition) -> None:
        assert condition.image is not None
        self.observation, self.condition, self.image = observation, condition, condition.image

    @classmethod
    def of(cls, inputs: Inputs | None, condition: Condition | None) -> "Observed | None":
        """Return the observed part of a condition: that of the inputs, or else known pixels; None for no such part."""
        if condition is None or condition.image is None:
            return None
        own = inputs.observation if inputs is not None else None
        observation = own or (KnownPixels() if condition.mask is not None else None)
        return None if observation is None else cls(observation, condition)

    def start(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, noise: NoiseStreams) -> Tensor:
        """Replace the observed part of starting states, of any prior, by its exact law: the values, diffused to t.

        Args:
            denoiser: Denoiser.
            x_t: Starting states, (B, C, H, W).
            t: Times, (B,).
            noise: Noise streams of the images.
        """
        diffused = denoiser.process.marginal(self.image.to(x_t), t, noise.normal(x_t))
        return self.observation.impose(x_t, diffused, self.condition)

    def end(self, x_0: Tensor) -> Tensor:
        """Impose the observed part on finished images, (B, C, H, W), within [-1, 1] as far as possible."""
        image = self.image.to(x_0)
        x_0 = self.observation.impose(x_0, image, self.condition)
        for _ in range(self.observation.rounds):
            x_0 = self.observation.impose(x_0.clamp(-1, 1), image, self.condition)
        return x_0
