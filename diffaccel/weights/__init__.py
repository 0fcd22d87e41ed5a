"""Files of weights: ours, checkpoints, and PyTorch archives of other programs, read without running code."""

from diffaccel.weights.files import (
    assign_weights,
    check_finite,
    file_sha256,
    load_weights,
    read_checkpoint,
    read_description,
    read_weights,
    save_weights,
    tensors_sha256,
)

__all__ = [
    "assign_weights",
    "check_finite",
    "file_sha256",
    "load_weights",
    "read_checkpoint",
    "read_description",
    "read_weights",
    "save_weights",
    "tensors_sha256",
]
