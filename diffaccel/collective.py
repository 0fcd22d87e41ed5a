"""Collective operations. Every rank must call them, or the run deadlocks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from diffaccel.errors import SharedError, UsageError

T = TypeVar("T")


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place, and return it; without a process group, the tensor is unchanged."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(value: Any) -> list[Any]:
    """Gather an object from each rank into a list, in order of rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise a UsageError of one rank on all ranks, because the other ranks would wait for it.

    Raises:
        SharedError: A rank failed; raised on every rank, with the message of the first that failed.
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
    """Rank of this process among the parallel processes of a run.

    Attributes:
        rank: Rank of this process.
        size: Number of ranks.
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
