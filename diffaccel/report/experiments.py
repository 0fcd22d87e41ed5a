"""Keys of the experiments of points, as their files have them: no part is imported, and so PyTorch is not either."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffaccel.config import files_of, find
from diffaccel.errors import UsageError
from diffaccel.parts.trees import merge

Files = tuple[tuple[Path, Mapping[str, Any]], ...]


def is_own_judge(experiment: str, judge: str) -> bool:
    """Whether a judge is one of an experiment's; not if the experiment is not here, or has none of its own."""
    for file, tree in _files(experiment):
        nodes = tree.get("judges") or tree.get("extractor")
        if nodes:
            listed = nodes.replace(",", " ").split() if isinstance(nodes, str) else nodes
            return any(_is(judge, node, file.parent) for node in (listed if isinstance(listed, list) else [listed]))
    return False


def has_weights(experiment: str, sha256: object) -> bool:
    """Whether the file of an experiment's weights has a hash, or had it before its header was rewritten."""
    for file, tree in _files(experiment):
        if tree.get("checkpoint"):
            path = file.parent / str(tree["checkpoint"])
            return path.is_file() and sha256 in (_sha256(path), _header(path).get("header_of"))
    return False


def own_part(experiment: str, key: str) -> Mapping[str, Any]:
    """Return the node of an experiment's part, whose own parts may be names; empty if it has none, or is not here."""
    found: dict[str, Any] = {}
    for _, tree in reversed(_files(experiment)):
        found = merge(found, {key: tree[key]} if key in tree else {})
    node = found.get(key) or {}
    return node if isinstance(node, Mapping) else {"name": node}


def _files(experiment: str) -> Files:
    """Files of an experiment and its bases, the experiment's own first; none if it is not here."""
    try:
        file = find(experiment).resolve()
        return _read(file, file.stat().st_mtime_ns)
    except UsageError:
        return ()


@cache
def _read(file: Path, changed: int) -> Files:
    return tuple((path, {str(key): value for key, value in tree.items()}) for path, tree in files_of(file))


def _is(judge: str, node: Any, folder: Path) -> bool:
    """Whether an extractor has a name: that in the header of its weights, or its own, which other keys may extend."""
    if not isinstance(node, Mapping):
        return judge == node
    files = (folder / str(value) for value in node.values())
    names = [name for file in files if file.suffix == ".safetensors" and (name := _header(file).get("name"))]
    own = str(node.get("name"))
    return judge in names if names else judge == own or (len(node) > 1 and judge.startswith(f"{own}_"))


@cache
def _header(file: Path) -> Mapping[str, Any]:
    """Header of weights; empty if they are missing or damaged, which a bench then reports."""
    with suppress(SafetensorError, OSError, ValueError), safe_open(file, framework="numpy") as weights:
        found = json.loads((weights.metadata() or {}).get("diffaccel", "{}"))
        return found if isinstance(found, Mapping) else {}
    return {}


@cache
def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
