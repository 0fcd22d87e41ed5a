"""A bench takes no more memory for more images, past those whose features it keeps (`make test-slow`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffaccel.evaluation.scores import KEPT
from diffaccel.features.extractors import Identity
from diffaccel.metrics import Moments
from diffaccel.metrics.reference import Reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is in other units, and malloc not glibc's"),
]

DIM = 256  # numbers an image, all of them features: 1 KB
SCRIPT = """\
import resource
import sys
from diffaccel.__main__ import main
from diffaccel.evaluation import Evaluator

Evaluator._draw = Evaluator._draw_curve = lambda self: None
status = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""
BENCHES = {
    "independent": ["toy/edm", "nfe=1", "batch_size=1000"],
    "chains": ["toy/dlg", "nfe=7", "batch_size=100", "chains=100", "prior.eta=0.01"],
}


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words for an exact denoiser of standard normal images, and their statistics."""
    path, identity = tmp_path_factory.mktemp("noise") / "reference.npz", Identity(DIM)
    features = torch.randn(4 * DIM, DIM, generator=torch.Generator().manual_seed(0))
    extractor = {"name": identity.name, "sha256": identity.sha256, "dim": DIM}
    provenance = {"label": "toy mixture (noise)", "split": "train", "extractor": extractor}
    Reference(Moments.from_features(features), features.half(), provenance).save(path)
    means = f"denoiser.means=[[{','.join('0' * DIM)}]]"
    return [
        *("solver=ddim", f"shape=[{DIM},1,1]", f"extractor.dim={DIM}", means, "denoiser.weights=[1]", "denoiser.std=1"),
        *(f"reference={path}", "floor=", "logger=none"),
    ]


@pytest.mark.parametrize("bench", BENCHES)
def test_the_peak_does_not_grow_with_the_images(bench: str, noise: list[str], tmp_path: Path):
    # Freed blocks go back to the system at once: else the peak follows from how blocks fell into place, by 5 %.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}

    def peak(n: int) -> int:
        """Bytes that a process has ever had, imports included, which take 0.8 GB."""
        words = ["bench", *BENCHES[bench], *noise, f"n={n}", f"out={tmp_path / str(n)}"]
        run = [sys.executable, "-c", SCRIPT, *words]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return 1024 * int(done.stdout.rsplit("peak ", 1)[1])

    few, many, twice_as_many = peak(2000), peak(KEPT), peak(2 * KEPT)
    kept = (KEPT - 2000) * DIM * 4
    assert many - few < 2 * kept + 2e6, "the features of 8,000 more images, and one copy of them"
    # Digests take 32 bytes, what a chain records of a round some 100; an image takes 1,024, its features as many.
    assert twice_as_many - many < 500 * KEPT
    assert twice_as_many < 1.05 * few
