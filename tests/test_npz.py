"""Arrays of npz files: other programs' names, wrong kinds with their remedy, memory bounded by the file."""

import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import LABELS, RGB, N, data, save_npz, whole

from diffaccel.errors import UsageError


def npy(shape: str, content: bytes = b"", dtype: str = "|u1") -> bytes:
    """An array file whose header may say what it likes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


def refuses(path: str | Path, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        data("npz", path=str(path)).setup("fit")
    assert Path(path).name in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_names_of_other_programs(tmp_path: Path) -> None:
    """ADM's sampling writes arr_0, and arr_1 for labels."""
    images, labels = whole(data("npz", path=save_npz(tmp_path / "adm.npz", arr_0=RGB, arr_1=LABELS)))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), RGB)
    assert labels is not None and labels.tolist() == LABELS.tolist()
    assert whole(data("npz", path=save_npz(tmp_path / "bare.npz", arr_0=RGB)))[1] is None


def test_statistics_are_no_images(tmp_path: Path) -> None:
    for names in (("mu", "sigma"), ("mean", "covariance")):
        path = save_npz(tmp_path / "statistics.npz", **dict.fromkeys(names, np.eye(3)))
        refuses(path, f"contains statistics of images ({names[0]} and {names[1]}) and no images", "use an npz")


def test_fortran_order_is_read_alike(tmp_path: Path) -> None:
    images, _ = whole(data("npz", path=save_npz(tmp_path / "a.npz", images=np.asfortranarray(RGB))))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), RGB)


def test_arrays_that_are_not_read_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data("npz", path=save_npz(tmp_path / "twice.npz", images=RGB, arr_0=RGB)).setup("fit")
    assert capsys.readouterr().err == ""  # as `diffaccel sample` writes them
    data("npz", path=save_npz(tmp_path / "a.npz", images=RGB, y=LABELS)).setup("fit")
    assert capsys.readouterr().err == "a.npz (train): arrays that are not read: y\n"


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x_train": RGB}, ["no array 'images' or 'arr_0', only x_train"]),
        ({"images": RGB.transpose(0, 3, 1, 2)}, ["channels last", "transpose(0, 2, 3, 1)"]),
        ({"images": RGB[0]}, ["(6, 6, 3)", "a single RGB image as (1, H, W, 3)"]),
        ({"images": RGB[..., [0, 1, 2, 0]]}, ["(12, 6, 6, 4)", "C = 1 or 3"]),
        ({"images": RGB / 255}, ["float64 from 0 to 1", "(255 * images).round().astype('uint8')"]),
        ({"images": RGB / 127.5 - 1}, ["float64 from -1 to 1", "(127.5 * images + 127.5).round()"]),
        ({"images": RGB.astype(int)}, ["int64 from 0 to 255", "save uint8"]),
        ({"images": RGB.astype(complex)}, ["complex128", "save uint8"]),
        ({"images": RGB, "labels": np.array([None] * N)}, ["'labels' contains Python objects"]),
        ({"images": RGB, "labels": np.full(N, 2**63, np.uint64)}, [str(2**63), "number the classes from 0"]),
        ({"images": RGB, "labels": np.full(N, 10**9)}, [str(10**9), "number the classes from 0"]),
        ({"arr_0": RGB, "arr_1": LABELS[1:]}, ["'arr_1'", "(11,)"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_arrays_of_the_wrong_kind(tmp_path: Path, arrays: dict[str, Any], words: list[str]) -> None:
    refuses(save_npz(tmp_path / "bad.npz", **arrays), *words)


def test_a_bare_array_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "bare.npy", RGB)
    refuses(tmp_path / "bare.npy", "is a single array (.npy)", "np.savez(FILE, images=array)")


@pytest.mark.parametrize(
    "content",
    [
        npy("(1000000, 1000, 1000)", b"few bytes"),
        npy("(4611686018427387904, 4, 1)", bytes(64)),  # 0 elements in 64-bit arithmetic
        npy("(-1, -8, 8)", bytes(64)),
        npy("(" * 60),
        npy("-" * 60 + "1"),
        npy("(2, 2, 2)", bytes(7)),
        npy("('a',)", bytes(7)),
        b"no array",
        b"",
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes) -> None:
    """A declared size that the file doesn't hold is an error before anything is allocated for it."""
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("images.npy", content)
    tracemalloc.start()
    refuses(tmp_path / "lie.npz", "can't be read as npz")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_an_array_that_unpacks_to_far_more_than_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 kB of zeros in a file of less than 1 kB are allowed as long as they are few."""
    np.savez_compressed(tmp_path / "zeros.npz", images=np.zeros((300, 32, 32), np.uint8))
    assert data("npz", path=str(tmp_path / "zeros.npz")).shape == (1, 32, 32)
    monkeypatch.setattr("diffaccel.data.npz.ALWAYS_ALLOWED", 100_000)
    size = "'images' takes 307328 bytes, more than 100 times the size of its file"
    refuses(tmp_path / "zeros.npz", size, "without compression")
    honest = RGB.repeat(100, axis=0)
    np.savez_compressed(tmp_path / "honest.npz", images=honest)
    assert data("npz", path=str(tmp_path / "honest.npz")).size("train") == len(honest)
