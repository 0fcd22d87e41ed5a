"""A few images as files of every kind that the data module reads, and what it makes of them."""

import json
import zipfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffaccel.condition import Condition
from diffaccel.data import Batch, DataModule

N, SIDE, CLASSES = 12, 6, 3
RGB = np.random.default_rng(0).integers(256, size=(N, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.arange(N) // 4  # sorted, so that class folders keep the order of the arrays


def data(name: str, *, module: Mapping[str, Any] | None = None, **keys: Any) -> DataModule:
    return DataModule({"name": name, **keys}, **(module or {}))


def save_npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def image_name(i: int) -> str:
    return f"class{LABELS[i]}/{i:04d}.png"


def save_folder(path: Path, images: np.ndarray = RGB) -> str:
    for i, image in enumerate(images):
        target = path / image_name(i)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target)
    return str(path)


def save_zip(path: Path, folder: Path, labels: Any = "those of the images") -> str:
    pairs = [[image_name(i), int(LABELS[i])] for i in reversed(range(N))]
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png"), reverse=True):
            archive.write(file, file.relative_to(folder))
        archive.writestr("dataset.json", json.dumps({"labels": pairs if isinstance(labels, str) else labels}))
    return str(path)


def whole(module: DataModule, split: str = "train") -> tuple[Tensor, Tensor | None]:
    parts = list(module.batches(split, 5))
    labels = None if parts[0][2] is None else torch.cat([part[2] for part in parts if part[2] is not None])
    return torch.cat([images for _, images, _ in parts]), labels


def training(module: DataModule, steps: int, rank: int = 0, world: int = 1) -> list[Batch]:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world, strategy=strategy)  # type: ignore[assignment]
    return list(islice(module.train_dataloader(), steps))


def tensors(batch: Batch) -> list[torch.Tensor]:
    """Images, index, and each kind of the condition."""
    return [batch.image, batch.index, *(value for value in batch.condition or () if value is not None)]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def together(batches: Iterable[Batch]) -> Batch:
    """The batch whose parts the ranks have."""
    parts = list(batches)
    kinds = zip(*(batch.condition or () for batch in parts), strict=True)
    condition = Condition(*(None if kind[0] is None else torch.cat(kind) for kind in kinds))
    return Batch(torch.cat([one.image for one in parts]), condition, torch.cat([one.index for one in parts]))
