"""Interrupts that wait for the end of a step, so that nothing that was computed is lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and the signal by which schedulers end a process."""


@contextmanager
def interrupts_held(said: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Collect interrupts in the list that is yielded, so that they don't leave a step incomplete.

    A second interrupt raises KeyboardInterrupt at once.

    Args:
        said: Function called at the first interrupt.
    """
    interrupts: list[int] = []

    def hold(number: int, _: object) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)
        said()

    # Only the main thread may set handlers. A handler that does not raise KeyboardInterrupt is left in place.
    main = threading.current_thread() is threading.main_thread()
    before = {one: handler for one in SIGNALS if main and _raises(handler := signal.getsignal(one))}
    for one in before:
        signal.signal(one, hold)
    try:
        yield interrupts
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _raises(handler: Any) -> bool:
    """Whether a handler raises KeyboardInterrupt, alone or, as Lightning sets it for SIGTERM, as one of several."""
    return signal.default_int_handler in (handler, *getattr(handler, "signal_handlers", ()))
