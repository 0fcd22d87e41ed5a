"""Checks of a sampler's arguments."""

from collections.abc import Mapping, Sequence

from diffaccel.errors import UsageError


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
