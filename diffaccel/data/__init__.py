"""Data sets of images and toy points, with a training order that is independent of resuming and world size."""

from typing import TYPE_CHECKING

from diffaccel.data import arrays, files
from diffaccel.data.source import SOURCES, ArrayImages, Images, MissingSplit, Source, build_source
from diffaccel.data.stream import Batch, Stream, to_float
from diffaccel.parts.lazy import lazy

if TYPE_CHECKING:
    from diffaccel.data.module import DataModule

__all__ = [
    "SOURCES",
    "ArrayImages",
    "Batch",
    "DataModule",
    "Images",
    "MissingSplit",
    "Source",
    "Stream",
    "arrays",
    "build_source",
    "files",
    "to_float",
]

__getattr__, __dir__ = lazy(__name__, {"DataModule": "diffaccel.data.module"})  # which needs Lightning
