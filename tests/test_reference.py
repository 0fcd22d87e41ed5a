import hashlib
import itertools
import json
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffaccel import __version__
from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.data import DataModule
from diffaccel.errors import UsageError
from diffaccel.features.extractors import Identity
from diffaccel.metrics import Moments
from diffaccel.metrics.reference import (
    compute_reference,
    compute_references,
    load_reference,
    read_reference,
    save_references,
)
from diffaccel.report import read_points
from diffaccel.verbs import reference as statistics


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
        "shape": [2, 1, 1],
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
        with pytest.raises(
            UsageError, match="was computed with the extractor identity .*diffaccel reference EXPERIMENT"
        ):
            load_reference(saved[1], extractor)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "damage", ["missing", "empty", "truncated", "text", "npy", "lacks the mean", "pickle", "deep", "large"]
)
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
    elif damage == "deep":
        np.savez(path, **{**arrays, "provenance": np.array("[" * 100_000)})
    elif damage == "large":  # a header that declares a terabyte
        with zipfile.ZipFile(path, "a") as archive, archive.open("n.npy", "w") as member:
            header = {"descr": "<f8", "fortran_order": False, "shape": (1 << 37,)}
            np.lib.format.write_array_header_1_0(member, header)
    else:
        content = {"empty": b"", "truncated": path.read_bytes()[:-200], "text": b"fd: 3.0"}[damage]
        path.write_bytes(content)
    with pytest.raises(UsageError, match="train.npz.*diffaccel reference EXPERIMENT"):
        load_reference(path, Identity(2))


def test_a_pointer_is_named(saved):
    saved[1].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UsageError, match="git-lfs pointer.*git lfs pull"):
        load_reference(saved[1], Identity(2))


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
from diffaccel.config import load
from diffaccel.data import DataModule
from diffaccel.features.extractors import Identity
from diffaccel.metrics.reference import compute_reference
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


# The command


@pytest.fixture
def images(tmp_path):
    """Words of an experiment on the user's own images, with a test split or without."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 40), ("test", 30)):
        np.savez(tmp_path / f"{name}.npz", images=rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8))
    alone = ["digits/edm", f"data={{name: npz, path: {tmp_path / 'train.npz'}}}"]
    return alone, [*alone, f"data.test_path={tmp_path / 'test.npz'}"]


def hashes(*paths):
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


def test_statistics_go_to_out_and_say_how_they_are_used(images, tmp_path, capsys, monkeypatch, undrawn):
    shipped = [load("digits/edm").reference, load("digits/edm").floor]
    before, out = hashes(*shipped), tmp_path / "my out"
    assert main(["reference", *images[1], f"out={out}"]) == 0
    assert hashes(*shipped) == before
    assert sorted(path.name for path in out.iterdir()) == ["floor.npz", "reference.npz"]
    assert [read_reference(out / f"{name}.npz").moments.n for name in ("reference", "floor")] == [40, 30]
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("bench: ")[2])
    assert main(["bench", *images[1], *words, "n=20", "nfe=2", "logger=none", f"out={tmp_path / 'bench'}"]) == 0
    (point,) = read_points(tmp_path / "bench" / "points.jsonl")
    assert point["reference"]["n"] == 40 and point["floor"]["n"] == 20
    monkeypatch.chdir(tmp_path)
    assert main(["reference", "toy/edm", "data.n=50"]) == 0
    assert (tmp_path / "runs/toy/edm/floor.npz").is_file(), "runs/<data>/<method> by default"


def test_nothing_is_replaced_unasked(images, tmp_path, capsys, monkeypatch):
    words = ["reference", *images[1], f"out={tmp_path / 'out'}"]
    files = tmp_path / "out" / "reference.npz", tmp_path / "out" / "floor.npz"
    assert main(words) == 0
    before = hashes(*files)
    for path in files:  # the other one alone is enough
        kept = path.rename(tmp_path / "kept.npz")
        with monkeypatch.context() as patch:
            patch.setattr(statistics, "compute_references", None)
            assert main([*words, "limit=20"]) == 2
        assert "again=true" in capsys.readouterr().err
        kept.rename(path)
    assert hashes(*files) == before
    assert main([*words, "limit=20", "again=true"]) == 0
    assert [read_reference(path).moments.n for path in files] == [20, 20]


def test_without_a_test_split_there_is_no_floor(images, tmp_path, capsys):
    assert main(["reference", *images[0], f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["reference.npz"]
    assert "no floor" in printed.err and "no test split" in printed.err and "floor=null" in printed.out
    for asked in (f"floor={tmp_path / 'f.npz'}", "reference="):
        assert main(["reference", *images[0], f"out={tmp_path / 'b'}", asked]) == 2
        assert "no test split" in capsys.readouterr().err, "a floor that is asked for is not left out"


@pytest.mark.parametrize("word", ["reference=", "floor="])
def test_either_file_alone(images, tmp_path, word):
    assert main(["reference", *images[1], word, f"out={tmp_path / 'out'}"]) == 0
    assert [path.stem for path in (tmp_path / "out").iterdir()] == [
        {"reference=": "floor", "floor=": "reference"}[word]
    ]


def test_what_cannot_be_written_or_read_is_said_before_the_work(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(statistics, "compute_references", None)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for words, named in (
        ([*images[1], f"out={tmp_path / 'file' / 'out'}"], "another out="),
        ([*images[1], f"reference={tmp_path / 'folder'}"], "is a folder"),
        ([*images[1], f"reference={tmp_path / 'a.npz'}", f"floor={tmp_path / 'a.npz'}"], "given twice"),
        ([*images[0], f"data.test_path={tmp_path / 'none.npz'}", f"out={tmp_path / 'o'}"], "none.npz"),
        (["digits/edm", "data={name: npz, path: none.npz}", f"out={tmp_path / 'o'}"], "none.npz"),
        ([*images[1], "extractor.path=none.safetensors", f"out={tmp_path / 'o'}"], "none.safetensors"),
    ):
        assert main(["reference", *words]) == 2
        assert named in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_a_failure_leaves_none_of_two_files(images, tmp_path, capsys, monkeypatch):
    """Whether in the second split or in the second file."""
    words = ["reference", *images[1], f"out={tmp_path / 'out'}"]

    def failing(data, split, extractors, keep):
        if split == "test":
            raise UsageError("a broken image")
        return compute_references(data, split, extractors, keep=keep)

    with monkeypatch.context() as patch:
        patch.setattr(statistics, "compute_references", failing)
        assert main(words) == 2
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", full_at(2, np.savez_compressed))
        assert main(words) == 2
        assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def full_at(call, function):
    """Let a function fail from its ``call``-th call on, as on a full disk."""
    calls = itertools.count(1)

    def failing(*arguments, **keys):
        if next(calls) >= call:
            raise OSError(28, "No space left on device")
        return function(*arguments, **keys)

    return failing


OLD = [(), ("a.npz",), ("b.npz",), ("a.npz", "b.npz")]


@pytest.mark.parametrize(("old", "call"), [(old, call) for old in OLD for call in range(1, 3 + len(old))], ids=str)
def test_a_rename_that_fails_puts_back_what_was_there(saved, tmp_path, monkeypatch, old, call):
    folder = tmp_path / "both"
    folder.mkdir()
    for name in old:
        (folder / name).write_text(f"old {name}")
    replace = Path.replace
    fails = full_at(call, replace)
    failed = []

    def once(self, target):  # putting back is not to fail
        if failed:
            return replace(self, target)
        try:
            return fails(self, target)
        except OSError:
            failed.append(True)
            raise

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", once)
        with pytest.raises(UsageError, match="No space left"):
            save_references({folder / "a.npz": saved[0], folder / "b.npz": saved[0]})
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: f"old {name}" for name in old}
    save_references({folder / "a.npz": saved[0], folder / "b.npz": saved[0]})
    assert sorted(path.name for path in folder.iterdir()) == ["a.npz", "b.npz"]


def test_two_processes_write_the_files_of_one(images, tmp_path):
    """In float32, whatever the precision that networks run in."""
    words = ["reference", *images[1], "accelerator=cpu"]
    assert main([*words, f"out={tmp_path / 'one'}"]) == 0
    command = [
        sys.executable,
        "-m",
        "diffaccel",
        *words,
        "devices=2",
        "precision=bf16-mixed",
        f"out={tmp_path / 'two'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("reference=") == 1
    for name in ("reference.npz", "floor.npz"):
        one, two = (read_reference(tmp_path / out / name) for out in ("one", "two"))
        assert one.sha256 == two.sha256


# Many features


class Many(Identity):
    """Random projections, as many as need packing."""

    def features(self, images):
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(2, self.dim, generator=generator, dtype=torch.float32)
        return (images.flatten(1).float() @ weights).tanh()


def test_the_covariance_of_many_features_is_packed(data, tmp_path):
    """A quarter of the size; what is computed is what is read, and rounding is that of float32."""
    judge, path = Many(600), tmp_path / "many.npz"
    points = data.images("train").images
    reference = compute_reference(data, "train", judge, keep=20)
    assert reference.provenance["covariance"] == "upper triangle, float32"
    expected = Moments.from_features(judge(points))
    torch.testing.assert_close(reference.moments.covariance, expected.covariance, rtol=1e-7, atol=1e-12)
    reference.save(path)
    with np.load(path) as arrays:
        assert arrays["covariance"].shape == (600 * 601 // 2,) and arrays["covariance"].dtype == np.float32
    loaded = load_reference(path, judge)
    assert torch.equal(loaded.moments.covariance, reference.moments.covariance)
    assert torch.equal(loaded.moments.covariance, loaded.moments.covariance.T)
    assert loaded.sha256 == reference.sha256 and len(loaded.features) == 20


def test_a_triangle_of_the_wrong_size_is_refused(data, tmp_path):
    compute_reference(data, "train", Many(600), keep=20).save(tmp_path / "many.npz")
    arrays = dict(np.load(tmp_path / "many.npz"))
    np.savez(tmp_path / "many.npz", **{**arrays, "covariance": arrays["covariance"][:-1]})
    with pytest.raises(UsageError, match="many.npz is not a complete reference .*triangle"):
        read_reference(tmp_path / "many.npz")


def test_as_many_rows_are_kept_as_the_key_says(tmp_path):
    words = [f"reference={tmp_path / 'reference.npz'}", f"floor={tmp_path / 'floor.npz'}"]
    assert main(["reference", "toy/edm", "data.n=400", "keep_rows=30", *words]) == 0
    found = read_reference(tmp_path / "reference.npz")
    assert found.features.shape == (30, 2) and found.moments.n == 400
