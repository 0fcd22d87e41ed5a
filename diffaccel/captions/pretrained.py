"""Text encoders of the library transformers: CLIP and T5, from a local folder or from the hub.

Weights are read from safetensors files only, and no code of a repository is run.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.captions.encoders import TEXT_ENCODERS, TextEncoder
from diffaccel.errors import UsageError
from diffaccel.parts.checks import Count
from diffaccel.parts.optional import extra
from diffaccel.text.escape import printable
from diffaccel.weights import file_sha256

FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "spiece.model",
)  # fmt: skip
"""Files that determine the embeddings: networks and tokenizers."""
BATCH = 64
"""Captions that are encoded at once."""


class Pretrained(TextEncoder):
    """Last hidden states of a text encoder of the library transformers, of the tokens that are not padding.

    Args:
        path: Folder with ``config.json``, safetensors weights and the files of the tokenizer; None for the hub's.
        model: Name on the Hugging Face hub, whose files are downloaded to the hub's cache, if there is no ``path``.
        dim: Width of the hidden states.
        length: Maximum number of tokens of a caption; further ones are cut off.
    """

    cached = True
    weight_keys = ("dim", "length")
    name: ClassVar[str]
    network: ClassVar[str]
    """Class of the library."""

    def __init__(self, path: Path | None, model: str, dim: int, length: int) -> None:
        self.path, self.model, self.dim, self.length = path, model, dim, length
        self._loaded: tuple[Any, Any] | None = None

    @property
    def folder(self) -> Path:
        """Local folder of the files.

        Raises:
            UsageError: There is no such folder, or the model can't be downloaded.
        """
        if self.path is None:
            return _downloaded(self.model, self._where)
        if not Path(self.path).is_dir():
            raise UsageError(
                f"{self._where}: there is no folder {printable(str(self.path))}: set condition.encoder.path= to a "
                "folder with config.json, safetensors weights and a tokenizer, or condition.encoder.model= to a name "
                "on the hub"
            )
        return Path(self.path)

    @property
    def _where(self) -> str:
        return f"encoder {self.name!r}"

    @property
    @override
    def sha256(self) -> str:
        with extra("text", needed_by=self._where):
            import transformers  # noqa: F401 (whether it is there, before captions are read)
        files = sorted({file for pattern in FILES for file in self.folder.glob(pattern)})
        if not any(file.suffix == ".safetensors" for file in files):
            raise UsageError(
                f"{self._where}: {printable(str(self.folder))} has no safetensors weights: convert them with "
                "`model.save_pretrained(FOLDER)`, or choose another folder"
            )
        digest = hashlib.sha256(f"{self.network} {self.length}\n".encode())
        for file in files:
            digest.update(f"{file.name} {_hash(file, *_stamp(file))}\n".encode())
        return digest.hexdigest()

    def load(self) -> tuple[Any, Any]:
        """Load network and tokenizer, once.

        Raises:
            UsageError: The library is not installed, or the folder contains no such network.
        """
        if self._loaded is None:
            with extra("text", needed_by=self._where):
                import transformers
            folder = str(self.folder)
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
                kind = getattr(transformers, self.network)
                network = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).float()
            except Exception as error:  # whatever the library finds wrong with the files
                reason = " ".join(str(error).split())
                raise UsageError(
                    f"{self._where}: {printable(folder)} holds no such network and tokenizer "
                    f"({printable(reason):.200}): choose another folder"
                ) from None
            if (dim := network.config.hidden_size) != self.dim:
                raise UsageError(
                    f"{self._where}: the hidden states have the width {dim}, not {self.dim}: set "
                    f"condition.encoder.dim={dim} and network.tokens={dim}, or choose another folder"
                )
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = network.to(device).eval().requires_grad_(False), tokenizer
        return self._loaded

    @override
    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Iterator[Tensor]:
        network, tokenizer = self.load()
        for first in range(0, len(captions), BATCH):
            batch = list(captions[first : first + BATCH])
            read = tokenizer(batch, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
            ids, mask = read["input_ids"].to(network.device), read["attention_mask"].to(network.device)
            with torch.autocast(network.device.type, enabled=False):
                hidden = network(input_ids=ids, attention_mask=mask).last_hidden_state
            for caption, states, own in zip(batch, hidden.half().cpu(), mask.bool().cpu(), strict=True):
                if not torch.isfinite(states[own]).all():
                    raise UsageError(f"{self._where}: the embedding of {printable(caption)!r:.80} is not finite")
                yield states[own]


@TEXT_ENCODERS.register("clip")
class CLIPText(Pretrained):
    """Text encoder of CLIP, from a folder of the library transformers or the hub.

    Args:
        path: Folder with ``config.json``, safetensors weights and the files of the tokenizer; None for the hub's.
        model: Name on the Hugging Face hub, whose files are downloaded to the hub's cache, if there is no ``path``.
        dim: Width of the hidden states: 768 for CLIP ViT-L/14, 512 for ViT-B/32.
        length: Maximum number of tokens of a caption; further ones are cut off.

    References:
        Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021),
        https://arxiv.org/abs/2103.00020
    """

    name, network = "clip", "CLIPTextModel"

    def __init__(
        self,
        path: Path | None = None,
        model: str = "openai/clip-vit-large-patch14",
        dim: Count = 768,
        length: Count = 77,
    ) -> None:
        super().__init__(path, model, dim, length)


@TEXT_ENCODERS.register("t5")
class T5Text(Pretrained):
    """Encoder of T5, from a folder of the library transformers or the hub.

    Args:
        path: Folder with ``config.json``, safetensors weights and the files of the tokenizer; None for the hub's.
        model: Name on the Hugging Face hub, whose files are downloaded to the hub's cache, if there is no ``path``.
        dim: Width of the hidden states: 768 for the base models, 4096 for XXL.
        length: Maximum number of tokens of a caption; further ones are cut off.

    References:
        Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (Raffel et al., 2020),
        https://arxiv.org/abs/1910.10683
        Scaling Instruction-Finetuned Language Models (Chung et al., 2022), https://arxiv.org/abs/2210.11416
    """

    name, network = "t5", "T5EncoderModel"

    def __init__(
        self,
        path: Path | None = None,
        model: str = "google/flan-t5-base",
        dim: Count = 768,
        length: Count = 128,
    ) -> None:
        super().__init__(path, model, dim, length)


def _downloaded(model: str, where: str) -> Path:
    """Return the folder of a model in the hub's cache, which is downloaded if it is missing.

    Raises:
        UsageError: The library is not installed, or the model can't be downloaded.
    """
    with extra("text", needed_by=where):
        from huggingface_hub import snapshot_download
    for offline in (True, False):  # without a connection, if the files are there
        try:
            return Path(snapshot_download(model, allow_patterns=list(FILES), local_files_only=offline))
        except Exception as error:  # of the connection, the name, or the cache; the library has many
            problem = error
    reason = " ".join(str(problem).split())
    raise UsageError(
        f"{where}: {printable(model)} is not in the hub's cache and can't be downloaded ({printable(reason):.120}): "
        "set condition.encoder.path= to a local folder"
    ) from None


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of a file, by which a changed one is recognised within a run."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=64)
def _hash(file: Path, size: int, changed: int) -> str:
    """Hash a file once per run."""
    return file_sha256(file)
