"""Files of every format, damaged byte by byte: each is read, or refused by one clear error."""

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import VE, as_filed, edm_content, edm_modules, random_network, score_sde_content
from safetensors.torch import save_file

from diffaccel.errors import UsageError
from diffaccel.nn.ddpm import DDPMUNet
from diffaccel.pretrained import convert, read
from diffaccel.pretrained.diffusers_names import names_of_ddpm
from diffaccel.weights import read_checkpoint
from diffaccel.weights.torchfile import read_torch

__all__ = ["edm_modules"]  # a fixture

TINY = {**VE, "multipliers": [1, 1]}
NETWORK = random_network(1, **TINY)
FOLDER = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [4, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
}
SCHEDULER = {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def older(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def newer(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network = DDPMUNet((3, 8, 8), 4, [1, 2], 1, [4], 0.0, 4, head_width=4)
    (tmp_path / "a").mkdir()
    tensors = as_filed(names_of_ddpm(network), network)
    save_file(tensors, tmp_path / "a" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "a" / "config.json").write_text(json.dumps(FOLDER))
    (tmp_path / "a" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return tmp_path / "a"


@pytest.fixture
def files(tmp_path: Path, folder: Path, edm_modules: None) -> dict[str, tuple[Path, Path]]:
    """Format -> what to damage, and what to read."""
    content = score_sde_content(NETWORK, NETWORK)
    (tmp_path / "zip.pth").write_bytes(newer(content))
    (tmp_path / "older.pth").write_bytes(older(content))
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps(edm_content(NETWORK, TINY), 4))
    convert(tmp_path / "zip.pth", tmp_path / "own.safetensors")
    weights = folder / "diffusion_pytorch_model.safetensors"
    found = {path.stem: (path, path) for path in tmp_path.iterdir() if path.is_file()}
    names = {"config": "config.json", "scheduler": "scheduler_config.json", "weights": weights.name}
    return found | {name: (folder / file, folder) for name, file in names.items()}


def damages(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Single bits and bytes, runs of bytes, cuts and insertions, mostly where the structure is: at the ends."""
    generator = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(data)
        near = generator.choice([0, 0, len(data) - 3000])
        at = generator.choice(
            [generator.randrange(len(data)), max(0, near) + generator.randrange(min(3000, len(data)))]
        )
        at = min(at, len(data) - 1)
        kind = generator.randrange(5)
        if kind == 0:
            damaged[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            damaged[at] = generator.choice([0, 0xFF, 0x7F, 0x80, generator.randrange(256)])
        elif kind == 2:
            damaged[at : at + 8] = generator.randbytes(8)
        elif kind == 3:
            del damaged[at:]
        else:
            damaged[at:at] = damaged[max(0, at - 5) : at + 5]
        yield bytes(damaged)


@pytest.mark.parametrize("name", ["zip", "older", "edm", "own", "config", "scheduler", "weights"])
def test_damaged_files_are_read_or_refused(files: dict[str, tuple[Path, Path]], name: str) -> None:
    damaged, path = files[name]
    whole, refused = damaged.read_bytes(), 0
    for data in damages(whole, 20, seed=7):
        damaged.write_bytes(data)
        try:
            found = read(path)
            if damaged.stat().st_size < 100_000 and found.source["format"] != "edm":  # its arguments may be others
                found.build()
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert refused > 3
    damaged.write_bytes(whole)
    read(path).build()


def test_damaged_checkpoints_are_read_or_refused(tmp_path: Path) -> None:
    """An archive has checksums: what is read is what was written."""
    weight = torch.arange(40.0).reshape(8, 5)
    state = {"weight": weight, "turned": weight.T}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.99), "params": [0]}]}
    whole = newer({"diffaccel": {"images_seen": 3, "ema": {"weight": weight}}, "state_dict": state, "opt": optimizer})
    path = tmp_path / "last.ckpt"
    for data in [whole, *damages(whole, 300, seed=8)]:
        path.write_bytes(data)
        try:
            content = read_checkpoint(path)
        except UsageError:
            assert data != whole
            continue
        assert torch.equal(content["state_dict"]["turned"], weight.T)
        assert torch.equal(content["diffaccel"]["ema"]["weight"], weight)
        assert content["opt"]["param_groups"] == optimizer["param_groups"]


def repacked(data: bytes, change: Callable[[str, bytes], list[tuple[str, bytes]]], **keys: Any) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w", **keys) as made:
        for name in source.namelist():
            for entry in change(name, source.read(name)):
                made.writestr(*entry)
    return target.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("keys", "change", "match"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, lambda name, data: [(name, data)], "compressed"),
        ({"compression": zipfile.ZIP_LZMA}, lambda name, data: [(name, data)], "compressed"),
        ({}, lambda name, data: [(name, data)] * 2, "two records of one name"),
        ({}, lambda name, data: [(name.replace("/", "-"), data)], "not one of torch.save"),
        ({}, lambda name, data: [(name, b"big" if "byteorder" in name else data)], "little-endian"),
        ({}, lambda name, data: [(name, data[:-1] if "data" in name else data)], "oversized|truncated"),
    ],
)
def test_archives_that_torch_does_not_write(tmp_path: Path, keys: dict, change: Callable, match: str) -> None:
    whole = newer({"diffaccel": {}, "state_dict": {"a": torch.zeros(1000)}})
    (tmp_path / "last.ckpt").write_bytes(repacked(whole, change, **keys))
    with pytest.raises(UsageError, match=match):
        read_checkpoint(tmp_path / "last.ckpt")


def test_an_archive_whose_directory_lies(tmp_path: Path) -> None:
    """Sizes of a terabyte, and two records that are one stretch of the file."""
    whole = newer({"diffaccel": {}, "state_dict": {"a": torch.zeros(1000), "b": torch.ones(1000)}})
    directory = whole.rindex(b"PK\x01\x02", 0, whole.index(b"/data/1", whole.index(b"PK\x01\x02")))
    (tmp_path / "size.ckpt").write_bytes(
        whole[: directory + 20] + struct.pack("<II", 2**32 - 2, 2**32 - 2) + whole[directory + 28 :]
    )
    first = whole.rindex(b"PK\x01\x02", 0, whole.index(b"/data/0", whole.index(b"PK\x01\x02")))
    place = slice(42, 46)
    moved = bytearray(whole)
    moved[directory + place.start : directory + place.stop] = whole[first + place.start : first + place.stop]
    (tmp_path / "place.ckpt").write_bytes(moved)
    for name in ("size", "place"):
        with pytest.raises(UsageError, match="is refused"):
            read_checkpoint(tmp_path / f"{name}.ckpt")


def archive_of(body: bytes) -> bytes:
    """An archive of torch.save around a program."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as made:
        made.writestr("a/data.pkl", b"\x80\x02" + body + b".")
        made.writestr("a/byteorder", "little")
    return target.getvalue()


TUPLES = b")" + b"".join(b"q" + bytes([index]) + b"h" + bytes([index]) + b"\x86" for index in range(60))
LONG = b"\x8a\x05" + (1 << 36).to_bytes(5, "little") + b"\x85R"


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"}" + TUPLES + b"K\x01s", "not a string or a small integer"),
        (b"c__builtin__\nbytearray\n" + LONG, "names .*bytearray"),
        (b"ctorch\nTensor\n" + LONG, "names torch.Tensor"),
        (b"]q\x00h\x00a", "damaged .something is written on"),
    ],
    ids=["a key whose hash takes years", "64 GB", "a tensor of 256 GB", "a list in itself"],
)
def test_archives_that_torch_load_with_weights_only_takes_are_refused(tmp_path: Path, body: bytes, match: str) -> None:
    """The reason for a reader of our own: torch.load hangs, allocates, or returns something endless."""
    (tmp_path / "last.ckpt").write_bytes(archive_of(body))
    with pytest.raises(UsageError, match=match):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_flipped_bit_in_a_weight_is_found(tmp_path: Path) -> None:
    path, weight = tmp_path / "last.ckpt", torch.arange(1000.0)
    data = bytearray(newer({"diffaccel": {}, "state_dict": {"a": weight}}))
    data[data.index(struct.pack("<2f", 500.0, 501.0)) + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="Bad CRC-32"):
        read_checkpoint(path)


def test_tensors_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    class Endless:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (torch.zeros(3).storage(), 0, (1 << 36,), (0,), False, {})

    torch.save({"diffaccel": {}, "state_dict": {"a": Endless()}}, tmp_path / "last.ckpt")
    with pytest.raises(UsageError, match="does not lie in its storage of 3 numbers"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_tensors_in_any_order_of_strides(tmp_path: Path) -> None:
    base = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    views = {
        "whole": base,
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base[0, 0].T,
        "permuted": base.permute(3, 1, 0, 2),
        "sliced": base[:, 1:, ::2, 1:3],
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 7),
        "half": base.half().transpose(0, 1),
    }
    for number, data in enumerate((newer(views), older(views))):
        (tmp_path / f"{number}.pth").write_bytes(data)
        found = read_torch(tmp_path / f"{number}.pth")
        for name, value in views.items():
            assert found[name].shape == tuple(value.shape) and found[name].dtype == value.dtype
            assert torch.equal(found[name].load(), value)


# Programs


def program(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


DOUBLED = b")" + b"".join(b"\x94h" + bytes([index]) + b"\x86" for index in range(60))  # 2^60 paths to ()
HOSTILE: dict[str, tuple[bytes, str]] = {
    "a key whose hash takes years": (b"}" + DOUBLED + b"K\x01s", "not a string or a small integer"),
    "a key of tuples in tuples": (b"}(" + b")" + b"\x85" * 50 + b"K\x01u", "not a string or a small integer"),
    "a set of tuples": (b"\x8f(" + b")" + b"\x85\x90", "not a string or a small integer"),
    "a frozenset of tuples": (b"(" + b")" + b"\x85\x91", "not a string or a small integer"),
    "keys that collide": (b"}(\x8a\x08" + struct.pack("<q", (1 << 61) - 1) + b"K\x01u", "not a string or a small"),
    "a negative key": (b"}(J\xff\xff\xff\xffK\x01u", "not a string or a small integer"),
    "nested tuples": (b")" + b"\x85" * 2000, "nested more than 100 deep"),
    "nested lists": (b"]" * 2000 + b"a" * 1999, "nested more than 100 deep"),
    "nested dicts": (b"}K\x01" * 2000 + b"N" + b"s" * 2000, "nested more than 100 deep"),
    "a list in itself": (b"]\x94h\x00a", "damaged .something is written on"),
    "a list in itself, by two": (b"]\x94]h\x00aa", "damaged .something is written on"),
    "marks": (b"(" * 3000, "damaged"),
    "operations": (b"N" * 10_001, "over 10000 pickle operations"),
    "a long string": (b"\x8d" + struct.pack("<Q", 1 << 40) + b"x", "announced"),
    "long bytes": (b"\x8e" + struct.pack("<Q", 1 << 40) + b"x", "announced"),
    "a long integer": (b"\x8b" + struct.pack("<i", 100) + b"\x7f" * 100, "operation LONG4"),
    "nothing": (b"", "damaged"),
    "a memo's gap": (b"h\x07", "damaged"),
    "an operation of old": (b"I12\n", "operation INT"),
    "a call of data": (b"K\x01)R", "is called"),
    "attributes of data": (b"]}b", "attributes of a list"),
    "attributes of a class": (b"ctorch.nn.modules.container\nModuleDict\n}b", "attributes of a"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_programs_that_mean_harm(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffaccel.weights.pickles.MAX_OPERATIONS", 10_000)
    body, match = HOSTILE[name]
    (tmp_path / "a.pkl").write_bytes(program(body))
    with pytest.raises(UsageError, match=match):
        read(tmp_path / "a.pkl")


@pytest.mark.parametrize("dimensions", [9, 60_000])
def test_tensors_of_many_dimensions(tmp_path: Path, dimensions: int) -> None:
    class Many:
        def __reduce__(self) -> Any:
            ones = (1,) * dimensions
            return torch._utils._rebuild_tensor_v2, (torch.zeros(1).storage(), 0, ones, ones, False, {})

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": Many()}, 4))
    with pytest.raises(UsageError, match=f"{dimensions} dimensions"):
        read(tmp_path / "a.pkl")


def test_modules_without_tensors_are_counted(tmp_path: Path, edm_modules: None) -> None:
    """A tree that shares its branches has more of them than a walk can visit."""
    from foreign import Recorded, write_pickle

    tree: Any = Recorded("Leaf", {})
    for _ in range(8):
        tree = Recorded("Node", {"_modules": {str(index): tree for index in range(20)}})
    tree.meta["class_name"] = "SongUNet"
    write_pickle(tmp_path / "a.pkl", {"ema": Recorded("EDMPrecond", {"_modules": {"model": tree}})})
    with pytest.raises(UsageError, match="no tree"):
        read(tmp_path / "a.pkl")


# Other things under a checkpoint's name


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl", ".safetensors"])
@pytest.mark.parametrize(
    ("data", "match"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 143019264\n",
            "git-lfs pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html>Virus scan warning</html>", "web page"),
        (b"\n  <html><body>", "web page"),
        (b"Entry not found", "is text"),
        (b"\x1f\x8b\x08\x00abc", "gzip archive: unpack it first"),
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n", "an image"),
        (b"x" * 257 + b"ustar" + bytes(300), "tar archive"),
    ],
)
def test_what_a_file_is_instead(tmp_path: Path, suffix: str, data: bytes, match: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=match):
        read(path)


def test_the_content_tells_the_format_whatever_the_name(tmp_path: Path, edm_modules: None) -> None:
    content = score_sde_content(NETWORK, NETWORK)
    made = {"zip": newer(content), "older": older(content), "edm": pickle.dumps(edm_content(NETWORK, TINY), 4)}
    (tmp_path / "zip.pth").write_bytes(made["zip"])
    convert(tmp_path / "zip.pth", tmp_path / "own.safetensors")
    made["own"] = (tmp_path / "own.safetensors").read_bytes()
    for name, data in made.items():
        for suffix in (".safetensors", ".pkl", ".pth", ".ckpt", ""):
            path = tmp_path / f"{name}_again{suffix}"
            path.write_bytes(data)
            assert read(path).source["format"] == ("edm" if name == "edm" else "score_sde_pytorch")


def test_content_of_no_format_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.pth")
    (tmp_path / "b.pkl").write_bytes(newer({"a": torch.zeros(1)}))
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("weights.txt", "1")
    (tmp_path / "d.pth").write_bytes(pickle.dumps({"a": 1}, 2))
    found = {"a.pth": "its header does not say network", "b.pkl": "of none of the formats safetensors, fit, "}
    found |= {"c.pth": "an archive, but not one of torch.save", "d.pth": "a pickle, but holds no network under 'ema'"}
    for name, match in found.items():
        with pytest.raises(UsageError, match=match):
            read(tmp_path / name)
