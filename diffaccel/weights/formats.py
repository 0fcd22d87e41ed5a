"""The two formats of diffaccel: safetensors with a header, and training states of ``fit``."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.weights.door import FORMATS, File, Format, Weights, open_weights
from diffaccel.weights.files import check_finite, read_header, read_weights
from diffaccel.weights.header import kind_of
from diffaccel.weights.pickles import refuse
from diffaccel.weights.torchfile import Stored, load_all


def no_options(path: Path, options: Mapping[str, Any]) -> None:
    """Check that there are no options for a self-describing file.

    Raises:
        UsageError: There are options.
    """
    if options:
        raise refuse(str(path), f"its header says what it holds: leave {sorted(options)[0]}= out")


@FORMATS.register("safetensors")
class Safetensors(Format):
    """Weights written by ``fit`` or ``convert``, or other safetensors files without such a header."""

    def recognises(self, file: File) -> bool:
        """See :class:`Format`; recognised by the first bytes."""
        return file.container == "safetensors"

    def open(self, file: File, options: Mapping[str, Any]) -> Weights:
        """See :class:`Format`; a file without a header is of unknown kind."""
        no_options(file.path, options)
        header = read_header(file.path)
        return Weights(file.path, "safetensors", kind_of(header), header, lambda: read_weights(file.path)[0])


@FORMATS.register("fit")
class FitCheckpoint(Format):
    """Training state of ``fit``, of a method or of an extractor; its averaged networks can be used as weights."""

    def recognises(self, file: File) -> bool:
        """See :class:`Format`; recognised by the key ``diffaccel``."""
        return isinstance(file.archive, dict) and "diffaccel" in file.archive

    def open(self, file: File, options: Mapping[str, Any]) -> Weights:
        """See :class:`Format`."""
        path, content = file.path, file.archive
        no_options(path, options)
        own, state = content["diffaccel"], content.get("state_dict")
        if not isinstance(own, dict) or not isinstance(state, dict):
            raise UsageError(f"checkpoint {path} is not from `diffaccel fit`: give OUT/last.ckpt of a run")
        average, described = own.get("ema", {}), own.get("description", {})
        others = own.get("ema_others", {})
        if not isinstance(others, dict) or not all(str(half_life).isdecimal() for half_life in others):
            raise UsageError(f"checkpoint {path} has averages without half-lives: use an older one")
        for tensors in (state, average, *others.values()):
            if not isinstance(tensors, dict) or not all(isinstance(tensor, Stored) for tensor in tensors.values()):
                raise UsageError(f"checkpoint {path} contains other values than tensors: use an older one")
        if not isinstance(described, dict):
            raise UsageError(f"checkpoint {path} has a description that is not a mapping: use an older one")
        kept = {key: own[key] for key in ("images_seen", "trained_ratios", "extractor", "ema_half_life") if key in own}
        header = {**described, **kept, "kind": "training state"}
        parts: dict[str, Weights] = {}
        named = {str(name): tensor for name, tensor in average.items()}
        for kind in dict.fromkeys(name.partition(".")[0] for name in named):
            mine = {n.removeprefix(f"{kind}."): tensor for n, tensor in named.items() if n.startswith(f"{kind}.")}
            said = {**header, "kind": kind, "averaged": True}
            parts[kind] = Weights(path, "fit", kind, said, partial(_read, path, mine))
        whole = partial(_read, path, state)
        return Weights(path, "fit", "training state", header, whole, (), parts, lambda: load_all(content))


def _read(path: Path, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    tensors = {name: one.load() for name, one in stored.items()}
    check_finite(tensors, f"checkpoint {path}", "get or train the file anew")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the whole training state of a ``fit``. Code in a file is never run.

    Raises:
        UsageError: The file is damaged, contains code, or is of another kind.
    """
    found = open_weights(path).of("training state")
    assert found.content is not None  # a training state's
    return found.content()
