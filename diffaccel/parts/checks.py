"""Valid values: ranges of all keys of the schema, and conversion of written values to types."""

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from operator import attrgetter
from typing import Annotated, Any, Union, get_args, get_origin

from diffaccel.errors import UsageError
from diffaccel.parts.overrides import scalar
from diffaccel.parts.trees import leaves


@dataclass(frozen=True)
class Range:
    """Range of valid numbers.

    Attributes:
        low: Lower end.
        high: Upper end.
        ends: Brackets of the interval, "[]", "(]", "[)" or "()".
        why: Reason for the range, for messages.
    """

    low: float
    high: float = math.inf
    ends: str = "[]"
    why: str = ""

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.ends[0] == "(" else self.low <= value
        return above and (value < self.high if self.ends[1] == ")" else value <= self.high)

    @property
    def rule(self) -> str:
        """Description of the range."""
        positive = (self.low, self.ends[0]) == (0, "(")
        if self.high == math.inf:
            return "positive" if positive else f"{self.low:,} or more"
        if positive:
            return f"positive and at most {self.high:,}"
        return f"from {self.low:,} to {'below ' * (self.ends[1] == ')')}{self.high:,}"

    def __str__(self) -> str:
        return f"it must be {self.rule}{self.why and f' ({self.why})'}"


COUNT, LENGTH, SHARE, POSITIVE = Range(1, 10**6), Range(1, 10**12), Range(0, 1), Range(0, ends="(]")

FILLED = "one or more"
"""Mark of annotated lists that must not be empty."""
Count = Annotated[int, COUNT]
"""Annotation of a constructor's parameter: a positive integer, checked before the part is built."""
Counts = Annotated[list[int], COUNT, FILLED]
"""One or more positive integers."""
Whole = Annotated[int, Range(0, 10**6)]
"""Non-negative integer."""
Wholes = Annotated[list[int], Range(0, 10**6)]
"""Non-negative integers, or an empty list."""
Positives = Annotated[list[float], POSITIVE, FILLED]
"""One or more positive numbers."""
Dropout = Annotated[float, Range(0, 1, "[)")]
"""Probability of dropping a unit."""

RANGES: dict[str, Range] = {
    "n": Range(1, 10**8, why="the features of all images are kept in memory"),
    "nfe": Range(0, 10**5, "(]"),
    "seed": Range(0, 2**63 - 1),
    "shape": COUNT,
    "batch_size": COUNT,
    "limit": LENGTH,
    "keep_rows": LENGTH,
    "threads": Range(1, 1024),
    "devices": Range(1, 1024),
    "num_nodes": COUNT,
    "jpeg": Range(1, 100),
    "tweedie_ratio": POSITIVE,
    "likelihood_n": LENGTH,
    "search.trials": COUNT,
    "search.images": Range(2, 10**8),
    "search.keep": Range(0, 1, "(]"),
    "search.confirm.best": COUNT,
    "search.confirm.seed": Range(0, 2**63 - 1),
    "search.confirm.n": Range(2, 10**8),
    "tradeoff.T": POSITIVE,
    "tradeoff.densities": POSITIVE,
    "tradeoff.images": LENGTH,
    "tradeoff.draws": COUNT,
    "training.images": LENGTH,
    "training.batch_size": COUNT,
    "training.augment": SHARE,
    "training.workers": Range(0, 1024),
    "training.lr": POSITIVE,
    "training.warmup": Range(0, 10**12),
    "training.decay": SHARE,
    "training.decay_power": Range(0),
    "training.floor": SHARE,
    "training.betas": Range(0, 1, "[)"),
    "training.weight_decay": Range(0),
    "training.clip": Range(0, ends="(]", why="null for none"),
    "training.ema_half_life": LENGTH,
    "training.label_drop": SHARE,
    "training.condition_drop": SHARE,
    "training.evaluate_every": LENGTH,
    "training.evaluate_n": Range(2, 10**8),
    "training.keep_best": POSITIVE,
    "training.checkpoint_minutes": POSITIVE,
    "training.log_every": COUNT,
    "validation.nfe": Range(0, 10**5, "(]"),
    "validation.n": Range(2, 10**8),
    "validation.seed": Range(0, 2**63 - 1),
    "validation.looks": Range(0, 1, "()", why="a fraction of the training"),
    "validation.look_n": Range(2, 10**8),
}
"""Key -> range of its value, of each number in its list, or of each key of its mapping; null is not checked."""

SETS = ("nfe", "search.images", "tradeoff.T", "training.ema_half_life", "validation.nfe")
"""Lists of one or more different numbers."""

CHOICES: dict[str, tuple[str, ...]] = {
    "logger": ("wandb", "csv", "tensorboard", "none"),
    "wandb_mode": ("offline", "online", "disabled"),
    "format": ("png", "npz"),
    "precision": ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true"),
    "accelerator": ("auto", "cpu", "gpu"),
}
"""Key -> valid texts; null is not checked."""

LARGEST = 10**8
"""Maximum number of values of an image."""


def check(config: Any) -> None:
    """Check the numbers and names of a configuration.

    Raises:
        UsageError: A value is out of range.
    """
    for key, allowed in RANGES.items():
        value = attrgetter(key)(config)
        for number in value if isinstance(value, list | dict) else [value]:
            if number is not None and number not in allowed and not (key == "nfe" and value == [math.inf]):
                raise UsageError(f"{key}={_shown(value)}: {allowed}")
        if key in SETS and (not value or len(set(value)) < len(value)):
            raise UsageError(f"{key}={_shown(value)}: give one or more, each once; {allowed}")
    if len(config.shape) != 3 or math.prod(config.shape) > LARGEST:
        raise UsageError(f"shape={config.shape}: give [channels, height, width], {LARGEST:,} values at most")
    if len(config.training.betas) != 2:
        raise UsageError(f"training.betas={config.training.betas}: give two numbers")
    for key, choices in CHOICES.items():
        if (choice := attrgetter(key)(config)) is not None and choice not in choices:
            raise UsageError(f"{key}={choice!r} is not one of {', '.join(choices)}")


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) and abs(value) >= 1e15 else str(value)


def whole_number(key: str, value: Any) -> int:
    """Return an argument of a function if it is an integer, of any library, in the range of the key of its name.

    Raises:
        UsageError: It is something else, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{key}={value!r}: give a whole number")
    number = int(value)
    if number not in RANGES[key]:
        raise UsageError(f"{key}={_shown(number)}: {RANGES[key]}")
    return number


def real_number(key: str, value: Any, infinite: bool = False) -> float:
    """Return an argument of a function if it is a number in the range of the key of its name, or infinite if it may be.

    Raises:
        UsageError: It is something else, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{key}={value!r}: give a number")
    number = float(value)
    if number not in RANGES[key] and not (infinite and number == math.inf):
        raise UsageError(f"{key}={number:g}: {RANGES[key]}{', or math.inf' if infinite else ''}")
    return number


def check_finite(tree: Mapping[str, Any], where: object) -> None:
    """Check that all numbers are finite, except for a denoiser's ``ratio_max``, which may be infinite.

    Raises:
        UsageError: A number is NaN or infinite.
    """
    for keys, value in leaves(tree):
        if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and keys[-1] != "ratio_max")):
            hint = ", or null for an adaptive solver" if keys[0] == "nfe" else ""
            raise UsageError(f"{where}: {'.'.join(map(str, keys))} is {value}: give a finite number{hint}")


def positive(where: str, **values: float | None) -> None:
    """Check that values of a part are positive or None.

    Args:
        where: Part, for the message.
        values: Values by key.

    Raises:
        UsageError: A value is 0, negative or NaN.
    """
    for key, value in values.items():
        if value is not None and not value > 0:
            raise UsageError(f"{where}: {key} is {value}, it must be positive")


def at_least(low: float, where: str, **values: float | None) -> None:
    """Check that values of a part are ``low`` or more, or None; see :func:`positive`.

    Raises:
        UsageError: A value is less than ``low``, or NaN.
    """
    for key, value in values.items():
        if value is not None and not value >= low:
            raise UsageError(f"{where}: {key} is {value}, it must be {low:g} or more")


def check_annotated(where: str, values: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Check values against the :class:`Range` in the annotation of their parameters; None is not checked.

    Args:
        where: Part, for the message.
        values: Values by key.
        annotations: Annotations of the constructor's parameters.

    Raises:
        UsageError: A value is out of range, or a list is empty where a value is required.
    """
    for key, value in values.items():
        for annotation in (annotations.get(key), *get_args(annotations.get(key))):  # of ``Count | None``, too
            metadata = getattr(annotation, "__metadata__", ())
            for allowed in (item for item in metadata if isinstance(item, Range)):
                numbers = value if isinstance(value, list) else [value]
                if any(number is not None and number not in allowed for number in numbers):
                    raise UsageError(f"{where}: {key} is {_shown(value)}, {allowed}")
                if FILLED in metadata and not numbers:
                    raise UsageError(f"{where}: {key} is empty: give one or more, {allowed}")


def plain_type(annotation: Any) -> Any:
    """Return an annotation without ranges, also for unions such as ``Count | None``."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return Union[tuple(plain_type(one) for one in get_args(annotation))]  # noqa: UP007 (made at run time)
    return annotation


def conform(key: str, value: Any, kind: Any) -> Any:
    """Convert a written value to a type: 2e6 to an int, "5,10" to a list, "none" to None.

    Args:
        key: Key, for the message.
        value: Value from a file or the command line. A value that can't be converted is returned unchanged, and
            refused later by OmegaConf.
        kind: Annotation.

    Raises:
        UsageError: The value is a scalar for a list, a list or mapping for a number, or a number other than 0 and 1 for
            a bool.
    """
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            return value
        kinds = {field.name: field.type for field in fields(kind)}
        return {name: conform(f"{key}.{name}".lstrip("."), item, kinds.get(name, Any)) for name, item in value.items()}
    kind = plain_type(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        own = [argument for argument in arguments if argument is not types.NoneType]
        if len(own) == len(arguments) or len(own) > 1 or value is None:
            return value
        if own[0] is not str and isinstance(value, str) and value.lower() in ("none", "null"):
            return None
        return conform(key, value, own[0])
    if (origin is list and isinstance(value, Mapping)) or (kind in (int, float) and isinstance(value, list | Mapping)):
        raise UsageError(f"{key}={value}: give {'a list' if origin is list else 'a number'}")
    if origin is list and value is not None:
        if isinstance(value, str):
            value = [scalar(word) for word in value.replace(",", " ").split()]
        if not isinstance(value, list | tuple):
            raise UsageError(f"{key}={value}: give a list ('[{value}]' in a shell)")
        return [conform(key, item, arguments[0]) for item in value]
    if origin is dict and arguments[0] is float and isinstance(value, Mapping):
        return {float(name) if isinstance(name, int) else name: item for name, item in value.items()}
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and isinstance(value, bool):
        return str(value).lower()  # as written
    if kind is bool and type(value) in (int, float) and value not in (0, 1):
        raise UsageError(f"{key}={value}: give true or false")
    return value
