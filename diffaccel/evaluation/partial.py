"""Partial results of a point on disk, for resuming.

Every batch is written to a file atomically, followed by the state of its chains. Batches do not depend on the number of
ranks, so that a point may be resumed with another number.
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
    """Results of a batch of images.

    Attributes:
        indices: Indices of the images, (b,) int64.
        features: Features, (b, dim) float32, the precision of extractors.
        digests: SHA-256 of each image, (b, 32) uint8.
        shown: Images for the sample grid, (s, C, H, W).
        images: Images as scored, (b, C, H, W); None if they are not kept.
        extractor: Hash of the extractor of the features. Another extractor computes its features from ``images``.
        rank: Rank that sampled the images.
        evaluations: Number of evaluations by network, including burn-in.
        burn_in: Number of burn-in evaluations by network.
        flops: FLOPs per sample by network.
        sampling: Time for sampling, in seconds.
        scoring: Time for the features, in seconds.
        trace: Records of a chain in this round.
        warm_up: Time for compilation and other work that only a first batch requires, in seconds.
        others: Features of further extractors by the hash of the extractor, (b, dim) float32 each.
        decoding: Time for decoding latents, in seconds.
        decoding_flops: FLOPs per image of the decoder of latents; 0 without latents.
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
    warm_up: float = 0.0
    others: dict[str, Tensor] = field(default_factory=dict)
    decoding: float = 0.0
    decoding_flops: float = 0.0

    def of(self, extractor: str) -> Tensor | None:
        """Return the features of the extractor with this hash; None if there are none."""
        return self.features if extractor == self.extractor else self.others.get(extractor)


class Partial:
    """Finished batches of a point.

    Args:
        folder: Folder of the files; None keeps nothing.
        kept: Whether to keep the files after the point has been measured.
    """

    def __init__(self, folder: Path | None, kept: bool = False) -> None:
        self.folder, self.kept = folder, kept

    def done(self, group: Group, chained: bool) -> tuple[int, dict[str, Any] | None]:
        """Return the number of leading batches of a group that are finished, and the state of its chains after them.

        Args:
            group: Batches of image indices.
            chained: Whether the batches are rounds of chains. If so, only batches before the saved state count: after
                a kill between the two files, the last batch is sampled again.
        """
        state = read_whole(self._state(group)) if chained else None
        if chained and state is None:
            return 0, None
        paths = [self._chunk(indices) for indices in (group[: state["rounds"]] if state else group)]
        done = sum(1 for _ in takewhile(lambda path: path is not None and path.is_file(), paths))
        if state and done < state["rounds"]:
            return 0, None  # files were removed, and a chain can't return to an earlier state
        return done, state and state["state"]

    def read(self, indices: Sequence[int]) -> Chunk:
        """Read a finished batch; one at a time, because a group of chains may contain all images of the point.

        Raises:
            UsageError: The file is damaged, or was written by another rank to a folder that is not shared.
        """
        content = read_whole(self._chunk(indices))
        if content is None:
            raise UsageError(f"{self._chunk(indices)} is missing: set out= to a folder that all processes share")
        return Chunk(**content)

    def save(self, group: Group, number: int, chunk: Chunk, state: dict[str, Any] | None) -> None:
        """Write the results of the batch with index ``number`` of a group, then the state of its chains."""
        if self.folder is None:
            return  # before asdict copies the tensors
        write_whole(self._chunk(group[number]), asdict(chunk))
        if state is not None:
            write_whole(self._state(group), {"rounds": number + 1, "state": state})

    def exists(self) -> bool:
        """Whether the folder exists."""
        return self.folder is not None and self.folder.is_dir()

    def clear(self) -> None:
        """Remove the folder after the point has been measured, unless it is kept."""
        if self.folder is not None and not self.kept and self.folder.is_dir():
            # Renamed first, because a folder with only some of its batches would look like that of an unfinished point.
            rubbish = self.folder.with_name(f".{self.folder.name}{storage.PART}")
            self.folder.replace(rubbish)
            shutil.rmtree(rubbish, ignore_errors=True)

    def _chunk(self, indices: Sequence[int]) -> Path | None:
        return self.folder and self.folder / f"images_{indices[0]:08d}.pt"

    def _state(self, group: Group) -> Path | None:
        return self.folder and self.folder / f"chains_{group[0][0]:08d}.pt"


def write_whole(path: Path | None, content: Any) -> None:
    """Write tensors and plain values for :func:`read_whole`, atomically; without a path, do nothing."""
    if path is None:
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)  # a full disk while torch.save writes to a file raises an error without the cause
    storage.write_whole(path, buffer.getbuffer())


def read_whole(path: Path | None) -> Any:
    """Read a file of tensors and plain values; return None if there is no file.

    Raises:
        UsageError: The file is damaged.
    """
    if path is None or not path.is_file():
        return None
    try:
        return torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, EOFError, OSError) as error:
        raise UsageError(f"{path} is damaged ({error!r:.80}): remove its folder to start over") from None
