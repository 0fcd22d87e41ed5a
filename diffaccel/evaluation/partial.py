"""What is done of a point, on disk: whatever kills a run, the next one goes on from here.

Every batch leaves a file, written whole or not at all, and a chain the state it is in after it. Batches are the same
for any number of processes, so a point may be finished by another number than it was begun with.
"""

import io
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel import storage
from diffaccel.errors import UsageError
from diffaccel.prior import Group


@dataclass
class Chunk:
    """What a batch of images leaves.

    Attributes:
        indices: Of the images, (b,) int64.
        features: (b, dim) float32, which is what extractors compute in.
        digests: SHA-256 of each image, (b, 32) uint8.
        shown: Those of the images that the sample grid shows, (s, C, H, W).
        images: The images as they are scored, (b, C, H, W), if they are kept; else None.
        extractor: Hash of what made the features: others take theirs from the images.
        rank: Process that made them.
        evaluations: Samples by network, burn-in included.
        burn_in: The part of them spent in burn-in.
        flops: Of one sample by network.
        sampling: Seconds for making the images.
        scoring: Seconds for their features.
        trace: What a chain recorded in this round.
    """

    indices: Tensor
    features: Tensor
    digests: Tensor
    shown: Tensor
    images: Tensor | None
    extractor: str
    rank: int
    evaluations: dict[str, int]
    burn_in: dict[str, int]
    flops: dict[str, float]
    sampling: float
    scoring: float
    trace: list[dict[str, Any]] = field(default_factory=list)


class Partial:
    """The batches done of one point.

    Args:
        folder: Where they lie; None keeps nothing.
        kept: Whether they stay once the point is measured.
    """

    def __init__(self, folder: Path | None, kept: bool = False) -> None:
        self.folder, self.kept = folder, kept

    def done(self, group: Group, chained: bool) -> tuple[int, dict[str, Any] | None]:
        """Return how many of a group's leading batches are done, and its chains' state after the last of them.

        Args:
            group: The batches.
            chained: Whether they are rounds of chains. Then only as many count as the state knows of: a run that was
                killed between the two files makes the last batch again.
        """
        state = read_whole(self._state(group)) if chained else None
        if chained and state is None:
            return 0, None
        paths = [self._chunk(indices) for indices in (group[: state["rounds"]] if state else group)]
        done = sum(1 for _ in takewhile(lambda path: path is not None and path.is_file(), paths))
        if state and done < state["rounds"]:
            return 0, None  # someone removed files: a chain can't go back to where they end
        return done, state and state["state"]

    def read(self, indices: Sequence[int]) -> Chunk:
        """Read one of the batches that are done; one at a time, for a group of chains may be the whole point.

        Raises:
            UsageError: It is damaged, or another process has left it where this one can't see it.
        """
        content = read_whole(self._chunk(indices))
        if content is None:
            raise UsageError(f"{self._chunk(indices)} is missing: set out= to a folder that all processes share")
        return Chunk(**content)

    def save(self, group: Group, number: int, chunk: Chunk, state: dict[str, Any] | None) -> None:
        """Write the chunk of a group's batch of this number, then the chain's state after it."""
        if self.folder is None:
            return  # before the chunk's tensors are copied
        write_whole(self._chunk(group[number]), asdict(chunk))
        if state is not None:
            write_whole(self._state(group), {"rounds": number + 1, "state": state})

    def exists(self) -> bool:
        """Whether there is anything."""
        return self.folder is not None and self.folder.is_dir()

    def clear(self) -> None:
        """Remove everything, unless it is kept: the point is measured."""
        if self.folder is not None and not self.kept and self.folder.is_dir():
            # Under another name first: a folder that lacks some of its batches would seem to be a point's that goes on.
            rubbish = self.folder.with_name(f".{self.folder.name}{storage.PART}")
            self.folder.replace(rubbish)
            shutil.rmtree(rubbish, ignore_errors=True)

    def _chunk(self, indices: Sequence[int]) -> Path | None:
        return self.folder and self.folder / f"images_{indices[0]:08d}.pt"

    def _state(self, group: Group) -> Path | None:
        return self.folder and self.folder / f"chains_{group[0][0]:08d}.pt"


def write_whole(path: Path | None, content: Any) -> None:
    """Write what :func:`read_whole` reads: a file appears whole or not at all; nowhere, nothing."""
    if path is None:
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)  # straight to a file, a full disk is an error of its own that does not name the cause
    storage.write_whole(path, buffer.getbuffer())


def read_whole(path: Path | None) -> Any:
    """Read a file of tensors and plain values; None if there is none.

    Raises:
        UsageError: It is damaged.
    """
    if path is None or not path.is_file():
        return None
    try:
        return torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, EOFError, OSError) as error:
        raise UsageError(f"{path} is damaged ({error!r:.80}): remove the folder, and it starts anew") from None
