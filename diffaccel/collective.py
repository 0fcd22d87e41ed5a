"""What the processes of a run tell each other. Every one of them reaches each of these calls, or all would wait."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from diffaccel.errors import SharedError, UsageError

T = TypeVar("T")


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over the processes, in place; the tensor itself where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(thing: Any) -> list[Any]:
    """One thing of each process, in order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [thing]
    things = [thing] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


@contextmanager
def failing_together() -> Iterator[None]:
    """Let an error of one process, which the others would wait for in vain, be an error of all.

    Raises:
        SharedError: In every process, with the message of the first that has one.
    """
    error: UsageError | None = None
    try:
        yield
    except UsageError as raised:
        error = raised
    texts = all_gather(error and str(error))
    if len(texts) == 1 and error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise SharedError(f"process {rank} failed: {text}") from error


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's share of some items: every ``size``-th."""
        return items[self.rank :: self.size]

    def broadcast(self, thing: T) -> T:
        """Return the first process's thing in every process."""
        return all_gather(thing)[0] if self.size > 1 else thing
