"""Weights on disk: a round trip, and one clear error for every file that doesn't fit."""

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffaccel.errors import UsageError
from diffaccel.weights import file_sha256, load_weights, read_description, read_weights, save_weights


def build(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good file."""
    save_weights(
        tmp_path / "weights" / "net.safetensors", build().state_dict(), {"images": 5, "process": {"name": "ve"}}
    )
    return tmp_path / "weights" / "net.safetensors"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    module, other = build(), build()
    module[1].num_batches_tracked.fill_(12345)  # an integer keeps its value, whatever the floats are stored in
    save_weights(tmp_path / "a", module.state_dict(), {"images": 5, "label": "a b"}, dtype)
    assert load_weights(tmp_path / "a", other) == {"images": 5, "label": "a b"}
    for name, tensor in module.state_dict().items():
        expected = tensor.to(dtype).float() if tensor.is_floating_point() else tensor
        assert torch.equal(other.state_dict()[name], expected)
        assert other.state_dict()[name].dtype == tensor.dtype
    assert other[1].num_batches_tracked.item() == 12345


def test_saving_again_keeps_every_bit(tmp_path: Path, path: Path) -> None:
    tensors, description = read_weights(path)
    save_weights(tmp_path / "again", tensors, description)
    assert file_sha256(tmp_path / "again") == file_sha256(path)


def test_the_file_appears_whole(path: Path) -> None:
    assert [file.name for file in path.parent.iterdir()] == ["net.safetensors"]
    assert path.stat().st_mode & stat.S_IROTH
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_weights(path, build().state_dict(), {"no JSON": object()})
    assert path.read_bytes() == before


def test_description(path: Path) -> None:
    assert read_description(path) == {"images": 5, "process": {"name": "ve"}}


def test_foreign_file_has_no_description(tmp_path: Path) -> None:
    save_file(build().state_dict(), tmp_path / "foreign")
    assert load_weights(tmp_path / "foreign", build()) == {}
    assert read_description(tmp_path / "foreign") == {}


def test_hash(path: Path) -> None:
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_non_contiguous_and_grad(tmp_path: Path) -> None:
    weight = torch.randn(4, 6).t().requires_grad_()
    save_weights(tmp_path / "a", {"w": weight}, {}, torch.float32)
    assert torch.equal(read_weights(tmp_path / "a")[0]["w"], weight.detach())


def truncate(data: bytes) -> bytes:
    return data[: len(data) - 10]


def cut_header(data: bytes) -> bytes:
    return data[:20]


def empty(data: bytes) -> bytes:
    return b""


def pickled(data: bytes) -> bytes:
    return b"PK\x03\x04" + data


def page(data: bytes) -> bytes:
    return b"<!DOCTYPE html><html>404</html>"


def pointer(data: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def no_mapping(data: bytes) -> bytes:
    return data.replace(b'"diffaccel":"{', b'"diffaccel":"[').replace(b'}}"}', b'}]"}')


def nested(data: bytes) -> bytes:
    header = b'{"__metadata__":{"diffaccel":"' + b"[" * 100_000 + b'"}}'
    return len(header).to_bytes(8, "little") + header


TRUNCATED = "truncated or no safetensors file.*get the file anew"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (truncate, TRUNCATED),
        (cut_header, TRUNCATED),
        (pickled, TRUNCATED),
        (no_mapping, TRUNCATED),
        (nested, TRUNCATED),
        (empty, "the file is empty.*get the file again"),
        (page, "the file is a web page.*get the file again"),
        (pointer, "the file is a git-lfs pointer.*git lfs pull"),
    ],
)
def test_damaged_file(path: Path, damage: Callable[[bytes], bytes], match: str) -> None:
    path.write_bytes(damage(path.read_bytes()))
    module = build()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UsageError, match=match) as error:
        load_weights(path, module)
    assert str(path) in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert read_description(path) == {}


def test_missing_file(tmp_path: Path) -> None:
    for missing in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match="do not exist: train them with"):
            read_weights(missing)


def damaged_state(change: Callable[[dict[str, Tensor]], None], tmp_path: Path) -> Path:
    state = {name: tensor.clone() for name, tensor in build().state_dict().items()}
    change(state)
    save_weights(tmp_path / "damaged", state, {})
    return tmp_path / "damaged"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    path = damaged_state(lambda state: state["0.bias"].fill_(value), tmp_path)
    with pytest.raises(UsageError, match="tensor '0.bias' contains NaN or infinity"):
        load_weights(path, build())


def test_shapes_and_names(tmp_path: Path, path: Path) -> None:
    with pytest.raises(UsageError, match=r"has shape \(4.*\), the network's is \(8.*does the experiment's network"):
        load_weights(path, build(width=8))
    missing = damaged_state(lambda state: state.pop("0.bias"), tmp_path)
    with pytest.raises(UsageError, match=r"missing \['0.bias'\], surplus \[\] \(1 and 0 in all\)"):
        load_weights(missing, build())
    surplus = damaged_state(lambda state: state.update(extra=torch.zeros(1)), tmp_path)
    with pytest.raises(UsageError, match=r"missing \[\], surplus \['extra'\] \(0 and 1 in all\)"):
        load_weights(surplus, build())
    both = damaged_state(lambda state: state.update(extra=state.pop("0.bias")), tmp_path)
    with pytest.raises(UsageError, match=r"missing \['0.bias'\], surplus \['extra'\]"):
        load_weights(both, build())


def test_a_refused_file_changes_nothing(path: Path) -> None:
    module = build(width=8)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UsageError):
        load_weights(path, module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
