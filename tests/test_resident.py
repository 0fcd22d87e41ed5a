"""Images that stay on the device give the batches, and so the weights, of images that are read on the CPU."""

from pathlib import Path

import lightning as L
import pytest
import torch
from stored import RGB, N, data, same, save_folder, together, training
from test_training import BATCH, STEPS, SaveAt, assert_same, diffusion, everything

from diffaccel.config import load
from diffaccel.data import ArrayImages, Batch, DataModule
from diffaccel.data import resident as on_device
from diffaccel.errors import UsageError
from diffaccel.experiment import build_data

CUDA = torch.device("cuda")


def gathered(module: DataModule, steps: int, rank: int = 0, world: int = 1) -> list[Batch]:
    """Batches of a module with resident images, as a trainer transfers them."""
    chosen = training(module, steps, rank, world)
    assert all(isinstance(one, on_device.Chosen) for one in chosen)
    module.trainer = None
    return [module.on_after_batch_transfer(one, 0) for one in chosen]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("source", ["npz", "folder", "digits", "toy"])
def test_batches_are_the_same_bit_for_bit(source: str, flip: bool, npz: str, tmp_path: Path):
    """Over several epochs, images of every kind: in memory, in files, and points."""
    place = {"npz": {"path": npz}, "folder": {"path": save_folder(tmp_path / "images")}}.get(source, {})
    keys = {"batch_size": 7, "flip": flip, "limit": N}
    read = training(data(source, **place, module=keys), 3 * N // 7)
    assert all(batch.image.dtype == torch.float32 for batch in read)
    found = gathered(data(source, **place, resident=True, module=keys), 3 * N // 7)
    assert all(same(one, other) for one, other in zip(found, read, strict=True))


def test_every_value_of_a_pixel_is_the_same():
    images = ArrayImages(torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8))
    batch = on_device.ResidentImages(images, torch.device("cpu"), chunk=3).gather(
        on_device.Chosen(torch.arange(4), torch.arange(4))
    )
    assert torch.equal(batch.image.flatten(), torch.arange(256) / 127.5 - 1)


def test_ranks_share_the_batch(npz: str):
    keys = {"batch_size": 6, "flip": True}
    alone = training(data("npz", path=npz, module=keys), 7)
    ranks = [gathered(data("npz", path=npz, resident=True, module=keys), 7, rank, 2) for rank in range(2)]
    for step, batch in enumerate(alone):
        assert same(batch, together(rank[step] for rank in ranks))


def fit(method, resident, callbacks=(), ckpt_path=None, precision="32-true"):
    trainer = L.Trainer(
        accelerator="cpu", precision=precision, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=list(callbacks),
    )  # fmt: skip
    module = DataModule({"name": "digits", "resident": resident}, batch_size=BATCH, seed=2, flip=True)
    trainer.fit(method, module, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_weights_are_the_same_and_resuming_is_exact(tmp_path: Path):
    """Also if a run that read its images on the CPU is resumed with resident ones."""
    read, resident, resumed = diffusion(), diffusion(), diffusion()
    end = everything(read, fit(read, False, [SaveAt(tmp_path / "read.ckpt", STEPS // 2)]))
    saving = SaveAt(tmp_path / "resident.ckpt", STEPS // 2)
    assert_same(everything(resident, fit(resident, True, [saving])), end)
    for name in ("read", "resident"):
        resumed = diffusion()
        assert_same(everything(resumed, fit(resumed, True, ckpt_path=tmp_path / f"{name}.ckpt")), end)


def test_batches_have_the_precision_of_the_run():
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch.image.dtype)

    for resident in (False, True):
        fit(diffusion(images=BATCH), resident, [Look()], precision="64-true")
    assert seen == [torch.float64, torch.float64]


def test_who_decides(npz: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By default, images in memory stay on a GPU if they take a quarter of its free memory at most."""
    images = data("npz", path=npz).images("train")
    files = data("folder", path=save_folder(tmp_path / "images")).images("train")
    decide, cpu = on_device.stays_resident, torch.device("cpu")
    assert on_device.size_in_bytes(images) == RGB.nbytes
    monkeypatch.setattr(on_device, "free_memory", lambda device: 4 * RGB.nbytes)
    assert [decide(images, CUDA, wanted) for wanted in (None, True, False)] == [True, True, False]
    assert [decide(files, CUDA, wanted) for wanted in (None, True, False)] == [False, True, False]
    assert [decide(images, cpu, wanted) for wanted in (None, True, False)] == [False, True, False]
    monkeypatch.setattr(on_device, "free_memory", lambda device: 4 * RGB.nbytes - 1)
    assert [decide(images, CUDA, wanted) for wanted in (None, True)] == [False, True]
    monkeypatch.setattr(on_device, "free_memory", lambda device: RGB.nbytes - 1)
    assert not decide(images, CUDA, None)
    with pytest.raises(UsageError, match=r"0\.0 GiB, but cuda has 0\.0 GiB.*data\.resident=false, or limit="):
        decide(images, CUDA, True)


@pytest.mark.parametrize(("word", "resident"), [("auto", None), ("true", True), ("false", False)])
def test_the_key_reads_alike_from_a_file_and_a_command(word: str, resident: bool | None, tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text(f"method: diffusion\ndata: {{name: digits, resident: {word}}}\nshape: [1, 8, 8]\n")
    for config in (load(str(file)), load("digits/edm", [f"data.resident={word}"])):
        assert build_data(config).resident is resident


def test_other_values_are_refused():
    with pytest.raises(UsageError, match=r"data\.resident=gpu: set auto, true or false"):
        build_data(load("digits/edm", ["data.resident=gpu"]))
