"""Text encoders: frozen maps from captions to embeddings of their tokens."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import Count
from diffaccel.parts.registry import Registry

TEXT_ENCODERS: Registry["TextEncoder"] = Registry(
    "encoder", builtins=["diffaccel.captions.encoders", "diffaccel.captions.pretrained"]
)

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
"""A word: letters and digits, with apostrophes inside."""


@TEXT_ENCODERS.base
class TextEncoder(ABC):
    """Frozen map from captions to embeddings of their tokens.

    Attributes:
        dim: Width of the embeddings, D.
        length: Maximum number of tokens of a caption, L; further ones are cut off.
    """

    dim: int
    length: int
    cached: ClassVar[bool] = False
    """Whether the embeddings take long to compute, so that they are kept on disk."""
    weight_keys: ClassVar[tuple[str, ...] | None] = None
    """Keys that determine the embeddings, besides :attr:`sha256`; None for all."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hash of all that determines the embeddings.

        Raises:
            UsageError: The encoder is not available.
        """

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> Iterator[Tensor]:
        """Yield the embeddings of each caption, (tokens, D) float16, 1 to ``length`` tokens.

        Raises:
            UsageError: The encoder is not available.
        """


@TEXT_ENCODERS.register("words")
class Words(TextEncoder):
    """A fixed random vector for each word, so that any text can be encoded without weights or vocabulary.

    A word is a sequence of letters and digits, in lower case; its vector is standard normal noise whose stream is the
    hash of the word. Words have no similarity to each other: a network learns those of its training captions only, with
    a text encoder that is trained along (``network.text_layers``).

    Args:
        dim: Width of the vectors.
        length: Maximum number of words of a caption; further ones are cut off.
    """

    def __init__(self, dim: Count = 64, length: Count = 32) -> None:
        self.dim, self.length = dim, length
        self._known: dict[str, Tensor] = {}

    @property
    @override
    def sha256(self) -> str:
        return hashlib.sha256(f"words {self.dim} {self.length}".encode()).hexdigest()

    @override
    def encode(self, captions: Sequence[str]) -> Iterator[Tensor]:
        for caption in captions:
            words = WORD.findall(caption.lower())[: self.length]
            yield torch.stack([self._vector(word) for word in words or [""]])

    def _vector(self, word: str) -> Tensor:
        if word not in self._known:
            digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
            stream = int.from_bytes(digest, "little") >> 1  # below 2^63
            self._known[word] = NoiseStreams(0, [stream], "word").normal(torch.empty(1, self.dim))[0].half()
        return self._known[word]
