"""Words of ``score``: source, experiment, and settings."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffaccel.config import FLAGS
from diffaccel.errors import UsageError, suggest
from diffaccel.parts.checks import real_number, whole_number
from diffaccel.parts.overrides import scalar, sort_words

OWN = ("name", "nfe", "n", "seed", "image_size")
"""Keys that describe the source."""
JUDGING = ("extractor", "judges", "reference", "floor", "metrics", "jpeg")
"""Keys of an experiment that determine the scores."""
RUNNING = ("out", "batch_size", "threads", "accelerator", "devices", "num_nodes", "keep_features", "again")
KEYS = (*OWN, *JUDGING, *RUNNING)


@dataclass
class Asked:
    """Words of the command.

    Attributes:
        path: Folder, zip archive or npz file to score.
        experiment: Experiment or data set; None if ``settings`` give the reference.
        own: Values of the keys in ``OWN``.
        settings: Other settings, ``key=value``.
    """

    path: str
    experiment: str | None
    own: dict[str, Any]
    settings: list[str]

    @classmethod
    def of(cls, path: str, experiment: str | None, settings: Sequence[str]) -> "Asked":
        """Separate the keys that describe the source from other settings, and check them.

        Raises:
            UsageError: A key is unknown, or has an invalid value.
        """
        own: dict[str, Any] = {}
        rest = []
        for word in settings:
            key, _, value = word.partition("=")
            if (top := key.partition(".")[0]) not in KEYS:
                raise UsageError(f"score has no key {top!r}{suggest(top, KEYS)}")
            if key in OWN:
                own[key] = value if key == "name" else scalar(value)
            else:
                rest.append(word)
        for key in ("n", "seed"):
            if own.get(key) is not None:
                own[key] = whole_number(key, own[key])
        if own.get("nfe") is not None:
            own["nfe"] = real_number("nfe", own["nfe"])
        if not isinstance(own.get("image_size"), int | None):
            raise UsageError(f"image_size={own['image_size']!r}: give a whole number")
        return cls(path, experiment, own, rest)

    @property
    def given(self) -> set[str]:
        """Top-level keys of the settings."""
        return {word.partition("=")[0].partition(".")[0] for word in self.settings}


def read_words(words: Sequence[str]) -> Asked:
    """Separate source, experiment and settings of a command line.

    Raises:
        UsageError: The source is missing, there are further words, or a key is unknown or has an invalid value.
    """
    others, settings = sort_words(words, FLAGS)
    if not 1 <= len(others) <= 2:
        raise UsageError(
            f"score requires a source and an experiment{f', not {others!r}' if others else ''}: give a folder, a zip "
            "archive or an npz file, as in `diffaccel score images digits/edm`"
        )
    return Asked.of(os.path.expanduser(others[0]), others[1] if len(others) == 2 else None, settings)
