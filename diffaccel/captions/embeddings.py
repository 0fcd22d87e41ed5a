"""Embeddings of captions, computed once and kept in files that are named by what determines them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffaccel.captions.encoders import TextEncoder
from diffaccel.condition import Condition
from diffaccel.errors import UsageError
from diffaccel.storage import PART, lock
from diffaccel.text.terminal import say, track

SHOW_PROGRESS_FROM = 2_000
"""Number of captions; fewer take seconds."""


class Embeddings:
    """Embeddings of the tokens of captions, one caption after the other, in memory or in a file that is mapped.

    Args:
        tokens: Embeddings of all tokens, (T, D) float16.
        ends: Number of tokens up to the end of each caption, (N,) int64.
        length: Number of tokens that conditions are filled up to, L.
    """

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, length: int) -> None:
        self.tokens, self.ends, self.length = tokens, ends, length

    def __len__(self) -> int:
        return len(self.ends)

    def condition(self, rows: Tensor) -> Condition:
        """Return the captions at ``rows`` (B,) as a condition: tokens (B, L, D) float32, valid (B, L)."""
        tokens = torch.zeros(len(rows), self.length, self.tokens.shape[1])
        valid = torch.zeros(len(rows), self.length, dtype=torch.bool)
        for number, row in enumerate(rows.tolist()):
            start, end = int(self.ends[row - 1]) if row else 0, int(self.ends[row])
            tokens[number, : end - start] = torch.from_numpy(np.array(self.tokens[start:end], dtype=np.float32))
            valid[number, : end - start] = True
        return Condition(tokens=tokens, valid=valid)


def embed(captions: Sequence[str], encoder: TextEncoder, folder: Path | None = None) -> Embeddings:
    """Embed captions, or read their embeddings, if they are in a folder already.

    The name of the files is a hash of the captions and of the encoder, so that embeddings of others are never used. If
    the folder can't be written to, the embeddings stay in memory, with a message.

    Args:
        captions: Captions.
        encoder: Text encoder.
        folder: Folder of the files; None for an encoder whose embeddings are not kept.

    Raises:
        UsageError: The encoder is not available.
    """
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / ".lock").open("ab") as guard:
                lock(guard)  # processes of a run wait for the first of them
                return _kept(captions, encoder, folder / key_of(captions, encoder))
        except OSError as error:
            say(
                f"{folder} can't be written to ({error.strerror or error}): embeddings of captions are computed anew "
                "in each run; set condition.cache= to another folder"
            )
    found = list(_embedded(captions, encoder))
    ends = np.cumsum([len(one) for one in found], dtype=np.int64)
    return Embeddings(torch.cat(found).numpy(), ends, encoder.length)


def key_of(captions: Sequence[str], encoder: TextEncoder) -> str:
    """Hash captions and encoder."""
    digest = hashlib.sha256(f"1 {encoder.sha256}\n".encode())
    for caption in captions:
        digest.update(caption.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()[:32]


def default_folder() -> Path:
    """Return the folder of embeddings in the user's cache, ``$XDG_CACHE_HOME/diffaccel/captions``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffaccel" / "captions"


def _kept(captions: Sequence[str], encoder: TextEncoder, base: Path) -> Embeddings:
    """Read embeddings, or compute and write them.

    Raises:
        OSError: They can't be written.
    """
    tokens_file, ends_file = base.with_suffix(".f16"), base.with_suffix(".npy")
    found = _read(tokens_file, ends_file, len(captions), encoder)
    if found is not None:
        return found
    part, lengths = base.with_suffix(f"{PART}.f16"), list[int]()
    with part.open("wb") as file:
        for one in _embedded(captions, encoder):
            file.write(one.numpy().tobytes())
            lengths.append(len(one))
    np.save(ends_file, np.cumsum(lengths, dtype=np.int64))
    part.replace(tokens_file)  # last, so that there is no file of tokens without the ends
    found = _read(tokens_file, ends_file, len(captions), encoder)
    if found is None:
        raise OSError("the files differ from what was written")
    return found


def _read(tokens_file: Path, ends_file: Path, n: int, encoder: TextEncoder) -> Embeddings | None:
    """Map the embeddings of n captions; None if they are missing or incomplete."""
    try:
        ends = np.load(ends_file)
        tokens = np.memmap(tokens_file, dtype=np.float16, mode="r")
    except (OSError, ValueError, EOFError):
        return None
    whole = ends.shape == (n,) and n > 0 and tokens.size == ends[-1] * encoder.dim
    return Embeddings(tokens.reshape(-1, encoder.dim), ends, encoder.length) if whole else None


def _embedded(captions: Sequence[str], encoder: TextEncoder) -> Iterator[Tensor]:
    """Yield the embeddings of each caption, with a progress bar.

    Raises:
        UsageError: The encoder returned another width or number of tokens.
    """
    shown = encoder.cached and len(captions) >= SHOW_PROGRESS_FROM
    for one in track(encoder.encode(captions), "embedding captions", len(captions), shown=shown):
        if one.ndim != 2 or one.shape[1] != encoder.dim or not 1 <= len(one) <= encoder.length:
            raise UsageError(
                f"the text encoder returned {tuple(one.shape)} for a caption of 1 to {encoder.length} tokens of width "
                f"{encoder.dim}: set condition.encoder.dim and condition.encoder.length to those of the encoder"
            )
        yield one.contiguous()
