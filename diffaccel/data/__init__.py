"""Images (and toy points) by name, in a training order that neither resuming nor the number of processes changes."""

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
