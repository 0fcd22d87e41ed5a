import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffaccel import __version__
from diffaccel.data import DataModule
from diffaccel.errors import UsageError
from diffaccel.metrics import Moments
from diffaccel.nn.features import Identity
from diffaccel.reference import compute_reference, load_reference


@pytest.fixture(scope="module")
def data():
    return DataModule({"name": "toy", "n": 500, "seed": 3})


@pytest.fixture
def saved(data, tmp_path):
    reference = compute_reference(data, "train", Identity(2), batch_size=64, keep=50)
    reference.save(tmp_path / "statistics" / "train.npz")
    return reference, tmp_path / "statistics" / "train.npz"


def test_moments_are_those_of_the_whole_split(data, saved):
    reference, _ = saved
    points = data.images("train").images.flatten(1)
    expected = Moments.from_features(points)
    assert reference.moments.n == 500
    torch.testing.assert_close(reference.moments.mean, expected.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(reference.moments.covariance, expected.covariance, rtol=1e-12, atol=1e-14)


def test_kept_features_are_spread_over_the_split(data, saved):
    reference, _ = saved
    points = data.images("train").images.flatten(1)
    chosen = np.rint(np.linspace(0, 499, 50)).astype(int)
    assert reference.features.dtype == torch.float16
    assert torch.equal(reference.features, points[chosen].half())
    assert torch.equal(compute_reference(data, "train", Identity(2), keep=10_000).features, points.half())


def test_provenance_says_what_it_is(saved):
    assert saved[0].provenance == {
        "data": "toy",
        "label": "toy mixture",
        "split": "train",
        "n": 500,
        "limit": None,
        "extractor": {"name": "identity", "sha256": Identity(2).sha256, "dim": 2},
        "order": "features evenly spread over the split",
        "version": __version__,
    }


def test_moments_of_fewer_images_are_those_of_kept_features(data):
    reference = compute_reference(data, "train", Identity(2), keep=100)
    points = data.images("train").images.flatten(1).half()
    kept = points[np.rint(np.linspace(0, 499, 100)).astype(int)]
    expected = Moments.from_features(kept[np.rint(np.linspace(0, 99, 40)).astype(int)])
    assert reference.moments_of(40).n == 40
    torch.testing.assert_close(reference.moments_of(40).covariance, expected.covariance, rtol=1e-12, atol=1e-14)
    for n in (101, 500, 900):  # more than are kept: all of the split
        assert reference.moments_of(n) is reference.moments


def test_round_trip(saved):
    reference, path = saved
    loaded = load_reference(path, Identity(2))
    assert torch.equal(loaded.moments.mean, reference.moments.mean)
    assert torch.equal(loaded.moments.covariance, reference.moments.covariance)
    assert torch.equal(loaded.features, reference.features)
    assert loaded.provenance == reference.provenance
    assert loaded.sha256 == reference.sha256
    assert [file.name for file in path.parent.iterdir()] == ["train.npz"]  # no part is left behind


def test_hash_is_of_the_content(data, saved):
    others = compute_reference(data, "test", Identity(2)), compute_reference(data, "train", Identity(2), keep=49)
    assert len({saved[0].sha256, *(other.sha256 for other in others)}) == 3
    assert compute_reference(data, "train", Identity(2), batch_size=64, keep=50).sha256 == saved[0].sha256


def test_another_extractor_is_refused(saved):
    other = Identity(2)
    other.sha256 = "0" * 64
    for extractor in (other, Identity(3)):
        with pytest.raises(UsageError, match="was made with the extractor identity .*diffaccel reference EXPERIMENT"):
            load_reference(saved[1], extractor)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "npy", "lacks the mean", "pickle"])
def test_damaged_files_are_refused(saved, damage):
    path = saved[1]
    arrays = dict(np.load(path))
    if damage == "missing":
        path.unlink()
    elif damage == "npy":
        np.save(path.open("wb"), arrays["mean"])
    elif damage == "lacks the mean":
        np.savez(path, **{key: value for key, value in arrays.items() if key != "mean"})
    elif damage == "pickle":
        np.savez(path, **{**arrays, "mean": np.array([{}], dtype=object)})
    else:
        content = {"empty": b"", "truncated": path.read_bytes()[:-200], "text": b"fd: 3.0"}[damage]
        path.write_bytes(content)
    with pytest.raises(UsageError, match="train.npz.*diffaccel reference EXPERIMENT"):
        load_reference(path, Identity(2))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", np.zeros(3)),
        ("covariance", np.full((2, 2), np.nan)),
        ("features", np.zeros((5, 3), dtype=np.float16)),
        ("n", np.array(1)),
        ("provenance", np.array(json.dumps([1]))),
    ],
)
def test_arrays_that_make_no_sense_are_refused(saved, key, value):
    np.savez(saved[1], **{**dict(np.load(saved[1])), key: value})
    with pytest.raises(UsageError, match="train.npz"):
        load_reference(saved[1], Identity(2))


def test_features_beyond_half_precision_are_refused():
    class Far(Identity):
        def features(self, images):
            return 1e6 + super().features(images)

    with pytest.raises(UsageError, match="features of batch 0 exceed 65504"):
        compute_reference(DataModule({"name": "toy", "n": 20}), "train", Far(2))


WORKER = """
import sys, torch.distributed as dist
from diffaccel.data import DataModule
from diffaccel.nn.features import Identity
from diffaccel.reference import compute_reference
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
for batch_size in (64, 500):
    data = DataModule({"name": "toy", "n": 500, "seed": 3})
    print(compute_reference(data, "train", Identity(2), batch_size=batch_size, keep=50).sha256)
dist.destroy_process_group()
"""


def test_two_processes_are_one(data, tmp_path):
    """Also when the second gets no batch."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0].split() for process in processes)
    alone = [compute_reference(data, "train", Identity(2), batch_size=size, keep=50).sha256 for size in (64, 500)]
    assert first == second == alone
