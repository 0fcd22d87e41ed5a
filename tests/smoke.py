"""Fit and bench every method for a few batches on real images, then bench with two processes: minutes on two cores.

    python tests/smoke.py SUBSET

SUBSET is an npz file with ``images`` (and ``labels``), a folder of images, torchvision's CIFAR-10 root, or ``digits``.
Nothing here is a quality: it shows that every step runs on these images, from the command line's own entry.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from diffaccel.__main__ import main
from diffaccel.data import DataModule
from diffaccel.errors import UsageError
from diffaccel.features.extractors import SmallClassifier, save_classifier
from diffaccel.report import read_points

N, BUDGET, LIMIT = 32, 12, 256
QUICK = ["logger=csv", "threads=1"]
CRITIC = {"name": "mlp", "width": 16, "depth": 1}  # takes images of any size

METHODS: dict[str, dict[str, Any]] = {
    "edm": {
        "method": {"name": "diffusion", "label": "edm"},
        "process": "edm",
        "denoiser": "karras",
        "levels": "lognormal",
        "solver": "dpmpp2m",
    },
    "ddpm": {
        "method": {"name": "diffusion", "label": "ddpm"},
        "process": "vp",
        "denoiser": {"name": "eps", "ratio_min": 0.01},
        "levels": "uniform",
        "solver": {"name": "ddim", "eta": 1.0, "grid": {"name": "time", "ratio_min": 0.01}},
    },
    "ddm": {
        "process": {"name": "decoupled", "clock": "t^2"},
        "network": {"heads": [1, 1]},
        "denoiser": "decoupled",
        "levels": "uniform",
        "solver": {"name": "bridge", "clamp": True},
    },
    "small_t": {
        "base": "edm.yaml",
        "process": "vp",
        "method": {"name": "small_t", "frozen": True},
        "prior": {"name": "density", "T": 0.4, "density": {"name": "flow", "rank": 8, "width": 16}},
    },
    "dlg": {
        "base": "edm.yaml",
        "posterior": {"name": "classifier", "count": 50, "width": 4},
        "prior": {"name": "chain", "chains": 4, "init_steps": 5, "warmup": [[5, None]]},
    },
    "tdpm": {
        "base": "edm.yaml",
        "method": {"name": "tdpm", "frozen": True, "critic": CRITIC, "objectives": [{"name": "ode_pair", "steps": 2}]},
        "prior": {"name": "implicit", "ratio_star": 1.0},
    },
    "tdpm_shared": {
        "method": {"name": "tdpm", "critic": CRITIC},
        "process": "vp_discrete",
        "denoiser": {"name": "eps", "ratio_min": 0.01, "time_scale": 0.1},
        "levels": "index",
        "prior": {"name": "implicit", "generator": "shared", "K": 10},
        "solver": {"name": "ancestral", "clip": True, "grid": {"name": "index"}},
    },
}
LEFT = {
    "dlg": ("posterior", "classifier.safetensors"),
    "small_t": ("prior", "density.safetensors"),
    "tdpm": ("prior", "generator.safetensors"),
}
"""What a fit over the frozen edm network leaves, and the part that it is the checkpoint of."""


def source(subset: str) -> dict[str, Any]:
    """Say which source reads the images; a subset without a test split serves as both."""
    if subset == "digits":
        return {"name": "digits"}
    path = Path(subset).resolve()
    if path.is_file():
        kind = "npz" if path.suffix == ".npz" else "zip"
        return {"name": kind, "path": str(path), "test_path": str(path)}
    if (path / "cifar-10-batches-py").is_dir():
        return {"name": "cifar10", "root": str(path)}
    if path.is_dir():
        return {"name": "folder", "path": str(path), "test_path": str(path)}
    raise UsageError(f"no images at {path}: give an npz file, a folder of images, torchvision's root, or digits")


def write_experiments(folder: Path, images: DataModule, data: dict[str, Any]) -> None:
    """Write an experiment for each method, over one base."""
    base = {
        "data": data,
        "shape": list(images.shape),
        "network": {"name": "unet", "widths": [8, 16], "blocks": 1, "embedding": 16},
        "extractor": {"name": "small", "path": "extractor/extractor.safetensors"},
        "reference": "reference.npz",
        "n": N,
        "nfe": [BUDGET],
        "limit": LIMIT,
        "batch_size": 16,
        "training": {"images": 80, "batch_size": 16, "warmup": 16},
    }
    extractor = {"base": "base.yaml", "method": {"name": "extractor", "epochs": 1, "batch_size": 64, "dim": 8}}
    experiments = {name: {"base": "base.yaml", "method": name, **parts} for name, parts in METHODS.items()}
    for name, content in {"base": base, "extractor": extractor, **experiments}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def run(*words: str) -> None:
    """Run the command line in this process; stop at the first failure."""
    started = time.monotonic()
    status = main(list(words))
    named = " ".join(Path(word).stem if word.endswith(".yaml") else word for word in words[:2])
    if status:
        sys.exit(f"smoke: FAILED: diffaccel {' '.join(words)} (status {status})")
    print(f"smoke: ok: {named}, {time.monotonic() - started:.1f} s", flush=True)


def check(holds: bool, problem: str) -> None:
    """Stop with a sentence unless something holds."""
    if not holds:
        sys.exit(f"smoke: FAILED: {problem}")


def make_scorer(folder: Path, images: DataModule) -> None:
    """Train the extractor, or leave it at random where the images have no labels; then the reference."""
    if images.classes:
        run("fit", str(folder / "extractor.yaml"), f"out={folder / 'extractor'}", *QUICK)
    else:
        torch.manual_seed(0)
        model = SmallClassifier(images.shape[0], 2, dim=8, widths=(8, 16))
        save_classifier(model, folder / "extractor" / "extractor.safetensors", "random", images.label, 0.5, 0)
        print("smoke: the images have no labels: the extractor stays at its random start")
    run("reference", str(folder / "edm.yaml"), f"out={folder}")


def fit_and_bench(folder: Path, name: str) -> list[str]:
    """Fit a method, bench what it left, and check the point; returns the words that name the weights."""
    file, out = str(folder / f"{name}.yaml"), folder / name
    weights = [f"checkpoint={folder / ('edm' if name in LEFT else name) / 'ema.safetensors'}"]
    run("fit", file, f"out={out}", *QUICK, *(weights if name in LEFT else []))
    if name in LEFT:
        part, left = LEFT[name]
        weights.append(f"{part}.checkpoint={out / left}")
    run("bench", file, f"out={out}", *QUICK, *weights)
    at_the_end, point = read_points(out / "points.jsonl")
    check(point["n"] == N and 0 < point["nfe"] <= BUDGET, f"{name}: nfe {point['nfe']} of {BUDGET}")
    check(point["images_by_rank"] == [N], f"{name}: images by process {point['images_by_rank']}")
    check(point["nfe"] == at_the_end["nfe"], f"{name}: the fit's own point has another nfe")
    for left in ("curve.png", "curve.csv", "config.yaml", f"samples_nfe{BUDGET}.png"):
        check((out / left).is_file(), f"{name}: bench left no {left}")
    return weights


def bench_with_two_processes(folder: Path, name: str, weights: list[str]) -> None:
    """Two processes must make the very images that one makes."""
    words = ["bench", str(folder / f"{name}.yaml"), "batch_size=2", "accelerator=cpu", *QUICK, *weights]
    run(*words, f"out={folder / 'one'}")
    started = time.monotonic()
    command = [sys.executable, "-m", "diffaccel", *words, "devices=2", f"out={folder / 'two'}"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240, check=False)
    check(done.returncode == 0, f"{' '.join(command)} (status {done.returncode})")
    (one,), (two,) = (read_points(folder / out / "points.jsonl") for out in ("one", "two"))
    check(min(two["images_by_rank"]) > 0, f"one process did all the work: {two['images_by_rank']}")
    check(two["images_sha256"] == one["images_sha256"], f"{name}: two processes made other images than one")
    print(
        f"smoke: ok: {name} with two processes {two['images_by_rank']}, {time.monotonic() - started:.1f} s", flush=True
    )


def smoke(subset: str) -> None:
    """Run every step on a subset."""
    started = time.monotonic()
    data = source(subset)
    images = DataModule(data, limit=LIMIT)
    print(
        f"smoke: {images.label}: {images.size('train')} images of {images.shape}, {images.classes} classes", flush=True
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_experiments(folder, images, data)
        make_scorer(folder, images)
        weights = {method: fit_and_bench(folder, method) for method in METHODS}
        bench_with_two_processes(folder, "dlg", weights["dlg"])
    print(f"smoke: all done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} SUBSET   (an npz file, a folder, torchvision's root, or digits)")
    try:
        smoke(sys.argv[1])
    except UsageError as error:
        sys.exit(f"smoke: {error}")
