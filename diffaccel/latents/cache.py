"""Encoded images on disk: moments of the latents, encoded once and read by index.

The file of a cache is named by a hash of everything that determines it: the auto-encoder's tensors, the images and
their number, and the layout. Records are appended to a partial file in the order of the images, so that an interrupted
encoding continues after its last whole batch, and the complete file is renamed.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffaccel.data.source import Images
from diffaccel.data.stream import to_float
from diffaccel.errors import UsageError
from diffaccel.latents.base import Latents, Moments
from diffaccel.storage import lock, unwritable, write_all
from diffaccel.text.terminal import say, track

FORMAT = 1
"""Version of the layout, which is part of the name."""
AT_ONCE = 64
"""Number of images per batch; an encoding continues at a multiple of it."""
EXPECTED = 2.0
"""Factor on the standard deviation of latents, above or below, from which a message is printed."""


@dataclass(frozen=True)
class LatentCache:
    """Moments of the standardised latents of the images of a split, which are the same for every ``std``.

    A record has the moments of an image and, if ``mirrored``, of the image mirrored left to right, because mirrored
    latents are not the latents of a mirrored image. Values are float16, with a relative error of 5e-4.

    Args:
        latents: Latents of a frozen auto-encoder.
        images: Images, uint8.
        folder: Folder of the file.
        mirrored: Whether records have mirrored images.
        sample: Whether records have the standard deviations of the posterior, and not only its means.
    """

    latents: Latents
    images: Images
    folder: Path
    mirrored: bool = False
    sample: bool = True

    @property
    def record(self) -> tuple[int, ...]:
        """Shape of a record: versions of the image, moments, and the shape of the latents."""
        return (1 + self.mirrored, 1 + self.sample, *self.latents.shape)

    @property
    def key(self) -> str:
        """Hash of everything that determines the file."""
        described = {
            "format": FORMAT,
            "autoencoder": self.latents.sha256,
            "images": self.images.fingerprint(),
            "n": len(self.images),
            "record": self.record,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        """File, which exists once all images are encoded."""
        return self.folder / f"latents-{self.key}.bin"

    def open(self, device: torch.device | str = "cpu") -> "EncodedImages":
        """Encode the images that are not encoded yet, and open the file; other processes wait meanwhile.

        Args:
            device: Device of the auto-encoder.

        Raises:
            UsageError: The file can't be written, or a latent is NaN or infinite.
        """
        path = self.path  # whose hash may read the images
        if not path.is_file():
            with _alone(path):
                if not path.is_file():
                    self._encode(path, torch.device(device))
        shape = (len(self.images), *self.record)
        found = np.memmap(path, np.float16, "r")
        if found.size != math.prod(shape):
            raise UsageError(f"{path} has {found.size} numbers instead of {math.prod(shape)}: remove the file")
        return EncodedImages(found.reshape(shape), self.latents.std)

    def _encode(self, path: Path, device: torch.device) -> None:
        part = path.with_suffix(".part")
        size, n = 2 * math.prod(self.record), len(self.images)
        done = part.stat().st_size // size // AT_ONCE * AT_ONCE if part.is_file() else 0
        if (free := shutil.disk_usage(self.folder).free) < (n - done) * size:
            raise UsageError(
                f"latents.cache={self.folder} has {free / 1e9:.3g} GB free, but the latents of {n:,} images take "
                f"{n * size / 1e9:.3g} GB: make room, or set latents.cache= to another folder"
            )
        if done:
            say(f"{part}: {done:,} of {n:,} images are encoded already")
        self.latents.to(device)
        sums = torch.zeros(3, dtype=torch.float64)
        starts = range(done, n, AT_ONCE)
        try:
            with part.open("r+b" if done else "wb", buffering=0) as file:
                file.truncate(done * size)
                file.seek(done * size)
                for start in track(starts, "encoding images, in batches", len(starts)):
                    records = self._records(torch.arange(start, min(start + AT_ONCE, n)), device)
                    if not records.isfinite().all():
                        raise UsageError(
                            "latents: a latent is NaN or infinite, or too large for float16: check the auto-encoder"
                        )
                    means = records[:, :, 0].double()
                    sums += torch.stack([torch.tensor(means.numel()).double(), means.sum(), means.square().sum()])
                    write_all(file, records.numpy().tobytes())
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise unwritable(part, error) from error
        self._report(sums)

    def _records(self, indices: Tensor, device: torch.device) -> Tensor:
        """Encode images, (B, *record) float16 on the CPU."""
        images = to_float(self.images.read(indices)).to(device)
        versions = [images, images.flip(-1)] if self.mirrored else [images]
        found = [torch.stack(self.latents.encode(version)[: self.record[1]], 1) for version in versions]
        return (torch.stack(found, 1) / self.latents.std).half().cpu()

    def _report(self, sums: Tensor) -> None:
        """Print the standard deviation of the latents, if it is far from the expected one."""
        count, first, second = sums.tolist()
        std = math.sqrt(max(second / max(count, 1) - (first / max(count, 1)) ** 2, 0))
        if not 1 / EXPECTED <= std <= EXPECTED:
            say(
                f"latents: the standard deviation over these images is {std:.3g} times latents.std: the auto-encoder's "
                f"scaling_factor may be that of other images; latents.std={self.latents.std / std:.3g} corrects it"
            )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Create the folder of a file, and wait for other processes that write it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("a+b", buffering=0)
    except OSError as error:
        raise unwritable(path, error) from None
    with file:
        lock(file)
        yield


class EncodedImages:
    """Open cache.

    Args:
        records: Records, (N, versions, moments, c, h, w) float16, in units of the latents' standard deviation.
        std: Standard deviation of the latents.
    """

    def __init__(self, records: "np.ndarray[tuple[int, ...], np.dtype[np.float16]]", std: float) -> None:
        self.records, self.std = records, std

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: Tensor, mirrored: Tensor | None = None) -> Moments:
        """Read the moments of images.

        Args:
            indices: Indices of the images, (B,).
            mirrored: Which images are mirrored, (B,) bool; None for none.

        Returns:
            Moments, (B, c, h, w) float32; the standard deviations are 0 if there are only means.
        """
        version = torch.zeros_like(indices) if mirrored is None else mirrored.to(indices)
        found = torch.from_numpy(self.records[indices.numpy(), version.numpy()]).float() * self.std
        mean = found[:, 0]
        return Moments(mean, found[:, 1] if found.shape[1] > 1 else torch.zeros_like(mean))
