"""Whole folders of fits on a few batches, and a kill in their middle (`make test-slow`)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from diffaccel.experiment.order import plan
from diffaccel.verbs.train import train
from diffaccel.weights import read_weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(1800)
def test_cifar10_mid_runs_through_on_a_few_batches(tmp_path: Path):
    """Every fit of the folder at its own size: looks, the choice of an average, weights, and points by the judges."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        images, labels = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 64)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    data = [f"data.path={tmp_path / 'train.npz'}", f"data.test_path={tmp_path / 'test.npz'}"]
    words = [*data, "data.label=CIFAR-10 (JPEG)", "images=16", "training.batch_size=8", "n=8", "batch_size=8"]
    words += ["nfe=17", "compile=false", "channels_last=false", "precision=32-true", "logger=csv"]
    # Few images share the burn-in of the 100 chains of dlg, so that small budgets are out of its reach.
    words += ["validation.nfe=[17]", "validation.looks=[0.5]"]
    out = tmp_path / "out"
    fits = train("cifar10_mid", words, out=str(out))
    assert len(fits) == 7 and not any(fit.done for fit in fits)
    assert all(fit.done for fit in plan("cifar10_mid", out, settings=words))
    for name in ("edm", "ddm", "tdpm_shared", "tdpm"):
        file = out / name / ("generator.safetensors" if name == "tdpm" else "ema.safetensors")
        assert file.stat().st_size < 12_000_000
        _, header = read_weights(file)
        assert len(header["chosen_by"]["distances"]) == 3 and header["images_seen"] == 16
        (logged,) = (out / name).glob("csv/*/metrics.csv")
        assert "validation/nfe_017/fd_cifar10_check" in logged.read_text()
        assert (out / name / "points.jsonl").is_file()


def test_a_kill_in_the_middle_costs_nothing(tmp_path: Path):
    """SIGKILL of the command ends its fit too; the same command goes on, to the weights of an undisturbed run."""
    base = {"data": "digits", "shape": [1, 8, 8], "n": 20, "logger": "none", "checkpoint": "weights/edm.safetensors"}
    network = {"name": "unet", "widths": [8, 16], "blocks": 1, "embedding": 16}
    posterior = {"name": "classifier", "count": 20, "width": 4, "checkpoint": "weights/classifier.safetensors"}
    chain = {"name": "chain", "chains": 4, "init_steps": 5, "warmup": [[5, None]]}
    files = {
        "edm": {**base, "method": "diffusion", "network": network},
        "dlg": {"base": "edm.yaml", "method": "dlg", "posterior": posterior, "prior": chain},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    words = ["images=12800", "training.batch_size=32", "training.checkpoint_minutes=1e-9", "threads=1"]
    words += ["training.ema_half_life=[100,500]"]
    train(str(tmp_path), words, out=str(tmp_path / "whole"))
    command = [sys.executable, "-m", "diffaccel", "train", str(tmp_path), *words, f"out={tmp_path / 'parts'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, start_new_session=True, cwd=tmp_path)
    last = tmp_path / "parts" / "edm" / "last.ckpt"
    while not last.is_file():
        assert process.poll() is None and not time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3)  # the fit notices within a fraction of a second
    assert [fit.done for fit in plan(str(tmp_path), tmp_path / "parts", settings=words)] == [False, False]
    assert torch.load(last, weights_only=True)["diffaccel"]["images_seen"] < 12800
    assert subprocess.run(command, env=environment, cwd=tmp_path, timeout=500, check=False).returncode == 0
    for path in ("edm/ema", "edm/ema_100", "edm/ema_500", "edm/raw", "dlg/classifier"):
        one, two = (read_weights(tmp_path / run / f"{path}.safetensors")[0] for run in ("whole", "parts"))
        assert all(torch.equal(one[name], two[name]) for name in one), path
