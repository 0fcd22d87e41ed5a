"""Data sets of images and toy points, with a training order that is independent of resuming and world size."""

from diffaccel.data import arrays, files
from diffaccel.data.module import DataModule
from diffaccel.data.source import SOURCES, ArrayImages, Images, MissingSplit, Source
from diffaccel.data.stream import Batch, Stream, to_float

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
    "files",
    "to_float",
]
