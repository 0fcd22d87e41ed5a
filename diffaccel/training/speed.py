"""Speed of a training: images per second between logged steps, and the remaining time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Speed:
    """Images per second, from marks at which the device is not behind the host.

    The time before the first mark is excluded, in which networks are compiled, and so is time in :meth:`paused`.

    Args:
        clock: Function that returns a time in seconds.

    Attributes:
        images_per_second: Speed between the last two marks; None before the second mark.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.images_per_second: float | None = None
        self._pauses = 0.0
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] = (0, 0.0)

    def mark(self, images: int) -> None:
        """Note that a number of images has been seen."""
        now = self.clock() - self._pauses
        if self._first is None:
            self._first = images, now
        elif now > self._last[1]:
            self.images_per_second = (images - self._last[0]) / (now - self._last[1])
        self._last = images, now

    def seconds_left(self, images: int) -> float:
        """Estimate the time until a number of images has been seen, from the mean speed; infinite if it is unknown."""
        if self._first is None or self._last[0] <= self._first[0]:
            return float("inf")
        mean = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        return max(0, images - self._last[0]) * mean

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time in a ``with`` block, for example of an evaluation."""
        started = self.clock()
        try:
            yield
        finally:
            self._pauses += self.clock() - started
