"""The condition ``captions``: tokens of a caption of each image."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.captions import layouts
from diffaccel.captions.embeddings import Embeddings, default_folder, embed
from diffaccel.captions.encoders import TEXT_ENCODERS, TextEncoder
from diffaccel.condition import Condition, Kinds
from diffaccel.data.conditions import CONDITIONERS, Conditioner, Given
from diffaccel.data.source import Images, Split
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams

MAX_CHARACTERS = 10_000
"""Length of a caption in Python."""


@CONDITIONERS.register("captions")
class Captions(Conditioner):
    """Caption of each image, as embeddings of its tokens by a frozen text encoder.

    An image with several captions has one of them, drawn from its noise stream, each time that it is used. The captions
    are, in this order: sentences generated from labels (``templates``); files (``path``); the array ``captions`` of an
    npz file, (N,) or (N, K) text; text files beside the images, one caption a line. The embeddings are computed once,
    and kept on disk if that takes long.

    Args:
        shape: Shape of the images, (C, H, W).
        encoder: Text encoder by name and keys.
        path: Folder of text files, as of CUB, or with COCO's ``captions_*.json``, or one such file.
        test_path: The same for the test split; ``path`` by default.
        templates: Sentences with ``{label}``, which stands for the name of the image's class.
        names: Names of the classes, in order; by default their numbers.
        caption: Caption of all sampled images, in place of those of the test images.
        cache: Folder of embeddings; by default in the user's cache, ``~/.cache/diffaccel/captions``.

    Raises:
        UsageError: The encoder or a key of it is unknown, a template lacks ``{label}``, or both ``templates`` and
            ``path`` are set.
    """

    restores, hashed = False, True
    weight_keys = ("encoder",)

    def __init__(
        self,
        shape: tuple[int, int, int],
        encoder: Annotated[dict[str, Any], TEXT_ENCODERS] = {"name": "words"},  # noqa: B006 (read only; for YAML)
        path: Path | None = None,
        test_path: Path | None = None,
        templates: list[str] = [],  # noqa: B006
        names: list[str] = [],  # noqa: B006
        caption: str | None = None,
        cache: Path | None = None,
    ) -> None:
        if templates and (path or test_path):
            raise UsageError("condition 'captions': both templates and path are set: remove one of them")
        if wrong := [template for template in templates if "{label}" not in template]:
            raise UsageError(f"condition.templates: {wrong[0]!r} has no {{label}}: write it for the name of the class")
        self.encoder: TextEncoder = TEXT_ENCODERS.build(encoder)
        self.kinds, self.token_count = Kinds(tokens=self.encoder.dim), self.encoder.length
        self.paths = {"train": path, "test": test_path or path}
        self.templates, self.names, self.caption = templates, names, caption
        self.cache = (Path(cache) if cache else default_folder()) if self.encoder.cached else None
        self._opened: list[CaptionConditions] = []

    @property
    @override
    def fingerprint(self) -> str | None:
        return self.encoder.sha256

    @override
    def open(self, split: Split, images: Images) -> "CaptionConditions":
        label = f"{split} split"
        if self.templates:
            captions = layouts.generated(images, self.templates, self.names, f"the {label}")
        else:
            captions = layouts.read_captions(images, self.paths[split], f"the {label}")
        found = CaptionConditions(captions, self.encoder, self.cache)
        same = [one for one in self._opened if one.identity == found.identity]
        self._opened += [] if same else [found]
        return same[0] if same else found

    @override
    def prepare(self) -> None:
        for one in self._opened:
            one.embeddings()

    @override
    def identity(self, conditions: Any) -> dict[str, Any]:
        return {"captions": conditions.identity, "encoder": self.encoder.sha256}

    @override
    def given(self) -> Given | None:
        if self.caption is None:
            return None
        caption = self.caption
        return Given(self, lambda: self.of_text([caption]), {"caption": caption})

    @override
    def of_text(self, captions: Sequence[str]) -> Condition:
        if wrong := [one for one in captions if not isinstance(one, str) or not one.strip()]:
            raise UsageError(f"caption={wrong[0]!r:.80}: give a text")
        if longest := [one for one in captions if len(one) > MAX_CHARACTERS]:
            raise UsageError(f"caption={longest[0]!r:.80}...: give at most {MAX_CHARACTERS} characters")
        different = list(dict.fromkeys(captions))
        rows = {caption: row for row, caption in enumerate(different)}
        return embed(different, self.encoder).condition(torch.tensor([rows[one] for one in captions]))


class CaptionConditions:
    """Captions of the images of a split, which are embedded when the first of them is used.

    Args:
        captions: One or more captions of each image.
        encoder: Text encoder.
        cache: Folder of embeddings; None to keep none.

    Attributes:
        identity: Hash of the captions of all images.

    Raises:
        UsageError: The encoder is not available.
    """

    def __init__(self, captions: layouts.Captions, encoder: TextEncoder, cache: Path | None) -> None:
        self.encoder, self.cache = encoder, cache
        digest = hashlib.sha256(f"{encoder.sha256}\n".encode())  # which checks that the encoder is available
        for own in captions:
            digest.update("\n".join((*own, "")).encode(errors="surrogatepass") + b"\0")
        self.identity = digest.hexdigest()
        self.texts = sorted({caption for own in captions for caption in own})
        rows = {caption: row for row, caption in enumerate(self.texts)}
        self.rows = torch.tensor([rows[caption] for own in captions for caption in own], dtype=torch.int64)
        self.counts = torch.tensor([len(own) for own in captions], dtype=torch.int64)
        self.starts = self.counts.cumsum(0) - self.counts
        self._embeddings: Embeddings | None = None

    def embeddings(self) -> Embeddings:
        """Return the embeddings of all captions, computed at the first call."""
        if self._embeddings is None:
            self._embeddings = embed(self.texts, self.encoder, self.cache)
        return self._embeddings

    def __call__(
        self, images: Tensor, chosen: Tensor, noise: NoiseStreams, mirrored: Tensor | None = None
    ) -> Condition:
        """See :class:`~diffaccel.data.stream.Conditions`; a mirrored image has the caption of the image."""
        chosen = chosen.cpu()
        counts = self.counts[chosen]
        number = (noise.uniform().cpu() * counts).long()
        return self.embeddings().condition(self.rows[self.starts[chosen] + number])
