"""Folder of the experiments for new images: what `new` wrote there, and what may be written again."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffaccel.errors import UsageError
from diffaccel.storage import LOCK, PART, write_whole

MANIFEST = "new.json"
"""File that marks a folder of `new`, with what it was made of and the hashes of its files."""
FORMAT = 1


@dataclass
class Folder:
    """Folder that `new` writes.

    Args:
        path: Path.
        made_of: What determines the content: images, checkpoint, judges.
        files: Hash of each written file by its name.
    """

    path: Path
    made_of: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, made_of: dict[str, Any], again: bool) -> "Folder":
        """Open a new folder, or one that an earlier `new` wrote for the same images.

        Raises:
            UsageError: The folder has other content, or was made of something else and ``again`` is not set.
        """
        before = read_manifest(path)
        if before is None:
            check_empty(path)
            return cls(path, made_of)
        if not again and (changed := [key for key in made_of if made_of[key] != before["made_of"].get(key)]):
            raise UsageError(
                f"{path} was written for other {' and '.join(changed)}: choose another folder, or set again=true to "
                "replace its experiments and statistics (fits and points stay)"
            )
        return cls(path, made_of, {} if again else dict(before["files"]))

    def write(self, name: str, text: str) -> bool:
        """Write a file, unless it was changed since an earlier `new`; return whether it has the text now."""
        path = self.path / name
        if path.is_file() and name in self.files and _hash(path.read_text(encoding="utf-8")) != self.files[name]:
            return False
        write_whole(path, text)
        self.files[name] = _hash(text)
        return True

    def save(self) -> None:
        """Write the manifest."""
        content = {"format": FORMAT, "made_of": self.made_of, "files": self.files}
        write_whole(self.path / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(path: Path) -> Mapping[str, Any] | None:
    """Read the manifest of a folder; None for a folder that `new` did not write.

    Raises:
        UsageError: The manifest is damaged or of a later version.
    """
    file = path / MANIFEST
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] == FORMAT and isinstance(content["made_of"], dict) and isinstance(content["files"], dict):
            return dict(content)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise UsageError(f"{file} is damaged or of a later version: choose another folder, or remove this one")


def check_empty(path: Path) -> None:
    """Check that a folder does not exist or has no files, except those of a run that was killed at its start.

    Raises:
        UsageError: The path is a file, or the folder has other content.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: give the name of a new folder")
    found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    found = [name for name in found if name != LOCK and not (name.startswith(".") and PART in name)]
    if found:
        raise UsageError(
            f"{path} is not empty ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}) and not a folder of "
            "`diffaccel new`: give the name of a new folder"
        )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
