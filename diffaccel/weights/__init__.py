"""Weights files of diffaccel and of other codebases. Code in a file is never run.

>>> weights = open_weights("last.ckpt").of("denoiser")  # doctest: +SKIP
>>> weights.header["network"], weights.read()  # doctest: +SKIP
"""

from diffaccel.weights.door import FORMATS, File, Format, Weights, hash_files, open_weights
from diffaccel.weights.files import (
    assign_weights,
    check_finite,
    file_sha256,
    load_weights,
    networks_sha256,
    read_description,
    read_weights,
    save_weights,
    tensors_sha256,
)
from diffaccel.weights.formats import no_options, read_checkpoint
from diffaccel.weights.header import KINDS, kind_of, name_of

__all__ = [
    "FORMATS",
    "KINDS",
    "File",
    "Format",
    "Weights",
    "assign_weights",
    "check_finite",
    "file_sha256",
    "hash_files",
    "kind_of",
    "load_weights",
    "name_of",
    "networks_sha256",
    "no_options",
    "open_weights",
    "read_checkpoint",
    "read_description",
    "read_weights",
    "save_weights",
    "tensors_sha256",
]
