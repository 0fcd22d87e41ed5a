"""Files that are damaged or mean harm: refused by name and reason, without a traceback, before any of it runs."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import (
    VE,
    VP,
    Recorded,
    edm_arguments,
    edm_content,
    edm_modules,
    random_network,
    recorded,
    score_sde_content,
    write_pickle,
)
from safetensors.torch import save_file
from torch import Tensor

from diffaccel.__main__ import main
from diffaccel.errors import UsageError
from diffaccel.pretrained import read

__all__ = ["edm_modules"]  # a fixture

NETWORKS = random_network(1, **VE), random_network(2, **VE)


class Call:
    """Pickles as a call of something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class Blob:
    """Pickles as a storage that holds these bytes."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.blob,)


def as_bytes(content: Any, **keys: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **keys)
    return file.getvalue()


def score_sde() -> dict[str, Any]:
    return score_sde_content(*NETWORKS)


def write(path: Path, content: Any) -> Path:
    """As torch.save does; a pickle of EDM's as pickle does."""
    if path.suffix == ".pkl":
        return write_pickle(path, content)
    path.write_bytes(as_bytes(content))
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(UsageError, match=match) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# What means harm


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


CALLS: dict[str, tuple[Callable[[str], Call], str]] = {
    "os.system": (lambda path: Call(os.system, f"touch {path}"), r"names \w+\.system"),
    "eval": (lambda path: Call(eval, f"open({path!r}, 'w')"), r"names \w+\.eval"),
    "exec": (lambda path: Call(exec, f"open({path!r}, 'w')"), r"names \w+\.exec"),
    "open": (lambda path: Call(open, path, "w"), r"names \w+\.open"),
    "getattr": (lambda path: Call(getattr, "text", "upper"), r"names \w+\.getattr"),
    "torch.load": (lambda path: Call(torch.load, path), r"names torch\.\w+\.load"),
    "import": (lambda path: Call(__import__, "os"), r"names \w+\.__import__"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("os.system", kind) for kind in ("zip", "stream", "pickle", "edm", "edm_2", "storage", "storage_stream", "bin")]
    + [(name, kind) for name in CALLS if name != "os.system" for kind in ("zip", "edm")],
)
def test_calls_are_refused_by_name(
    tmp_path: Path, canary: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str], edm_modules: None
) -> None:
    make, message = CALLS[name]
    call = make(str(canary))
    suffix = ".pkl" if "edm" in kind or "storage" in kind else ".pth"
    path = tmp_path / f"a{suffix}"
    if kind == "zip":
        torch.save({**score_sde(), "step": call}, path)
    elif kind == "stream":
        torch.save({**score_sde(), "step": call}, path, _use_new_zipfile_serialization=False)
    elif kind in ("pickle", "edm", "edm_2"):
        write_pickle(path, {"ema": call}, protocol=2 if kind == "edm_2" else 4)
    elif kind == "storage":
        write_pickle(path, {"ema": Blob(pickle.dumps(call))})
    elif kind == "storage_stream":
        write_pickle(path, {"ema": Blob(as_bytes(call, _use_new_zipfile_serialization=False))})
    else:
        path = tmp_path / "folder"
        path.mkdir()
        (path / "config.json").write_text(
            '{"_class_name": "UNet2DModel", "attention_head_dim": null, "downsample_padding": 0, "flip_sin_to_cos": '
            'false, "freq_shift": 1, "norm_eps": 1e-6, "norm_num_groups": 4, "sample_size": 8, "in_channels": 3,'
            '"layers_per_block": 1, "block_out_channels": [8], "down_block_types": ["DownBlock2D"],'
            '"up_block_types": ["UpBlock2D"]}'
        )
        torch.save({"conv_in.weight": call}, path / "diffusion_pytorch_model.bin")
    for words in (["convert", str(path), str(tmp_path / "b.safetensors")], ["convert", "--inspect", str(path)]):
        assert main(words) == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.err and not said.out
        assert "is refused" in said.err and "\n" not in said.err.strip()
    with pytest.raises(UsageError, match=message):
        read(path)
    assert not canary.exists() and not (tmp_path / "b.safetensors").exists()


def test_a_benign_file_beside_them_converts(tmp_path: Path, edm_modules: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.pth", score_sde())
    write(tmp_path / "a.pkl", edm_content(NETWORKS[0], VE))
    for name in ("a.pth", "a.pkl"):
        assert main(["convert", name, f"{name}.safetensors"]) == 0
        assert main(["convert", "--inspect", f"{name}.safetensors"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.pkl",
        "a.pkl.safetensors",
        "a.pth",
        "a.pth.safetensors",
    ]


def test_stand_ins_cannot_be_written_on_for_the_next_file(tmp_path: Path, edm_modules: None) -> None:
    """A pickle may set attributes on whatever a name stands for."""

    class Writes:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (), {"evil": 1}

    refused(write_pickle(tmp_path / "a.pkl", {"ema": Writes()}), "truncated or damaged")
    state = b"\x80\x04ctorch.nn.modules.container\nModuleDict\n}\x8c\x08__init__NsbK\x01."  # BUILD on the class itself
    (tmp_path / "b.pkl").write_bytes(state)
    refused(tmp_path / "b.pkl", "refused")
    assert read(write(tmp_path / "c.pkl", edm_content(NETWORKS[0], VE))).tensors


# What is damaged


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
@pytest.mark.parametrize("kind", ["a.pth", "b.pth", "a.pkl"])
def test_truncated(tmp_path: Path, kind: str, keep: float, edm_modules: None) -> None:
    if kind == "a.pkl":
        whole = pickle.dumps(edm_content(NETWORKS[0], VE), 4)
    else:
        whole = as_bytes(score_sde(), _use_new_zipfile_serialization=kind == "a.pth")
    (tmp_path / kind).write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    refused(tmp_path / kind, "is refused")


def edited(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1 and len(old) == len(new)
    return data.replace(old, new, 1)


def test_storages_of_another_size(tmp_path: Path, edm_modules: None) -> None:
    """In an older stream each storage is led by its length."""
    tensor = torch.arange(77.0)
    blob, led = as_bytes(tensor.storage(), _use_new_zipfile_serialization=False), struct.pack("<q", 77)
    for number, damaged in enumerate(
        (blob[:-4], edited(blob, led, struct.pack("<q", 78)), edited(blob, led, struct.pack("<q", 1 << 60)))
    ):
        refused(write_pickle(tmp_path / f"{number}.pkl", {"ema": Blob(damaged)}), "truncated or oversized")
    repack(as_bytes({"a": tensor}), tmp_path / "a.pth", lambda name, data: data[:-4] if "data/0" in name else data)
    refused(tmp_path / "a.pth", "truncated or oversized")


def repack(archive: bytes, path: Path, change: Callable[[str, bytes], bytes], **keys: Any) -> None:
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(path, "w", **keys) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))


class Tensorlike:
    """Pickles as a tensor of any shape on a storage of 12 numbers."""

    def __init__(self, offset: Any, size: Any, stride: Any) -> None:
        self.arguments = offset, size, stride

    def __reduce__(self) -> Any:
        storage = torch.arange(12.0).storage()
        return torch._utils._rebuild_tensor_v2, (storage, *self.arguments, False, OrderedDict())


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (13,), (1,)),
        (1, (12,), (1,)),
        (-1, (3,), (1,)),
        (0, (1 << 40, 1 << 40), (0, 0)),
        (0, (3, 4), (1, 3)),
        (0, (3, 4), (4,)),
        (0, (2.0,), (1,)),
        (0, "ab", (1,)),
    ],
)
def test_tensors_outside_their_storage(tmp_path: Path, offset: Any, size: Any, stride: Any) -> None:
    refused(write_pickle(tmp_path / "a.pkl", {"ema": Tensorlike(offset, size, stride)}), "refused")


def test_no_memory_for_a_small_file(tmp_path: Path, edm_modules: None) -> None:
    """Numbers that would make a reader allocate gigabytes: memo places, byte arrays, compressed archives, trees."""
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")  # LONG_BINPUT 2^31
    refused(tmp_path / "a.pkl", "numbers an object")
    (tmp_path / "b.pkl").write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.")  # BYTEARRAY8 of a terabyte
    refused(tmp_path / "b.pkl", "refused")
    repack(as_bytes(score_sde()), tmp_path / "c.pth", lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    refused(tmp_path / "c.pth", "compressed")
    tree: Any = Recorded("Leaf", {"_parameters": {"weight": torch.zeros(1)}})
    for _ in range(14):  # 2^14 leaves in a few hundred bytes
        tree = Recorded("Node", {"_modules": {"a": tree, "b": tree}})
    tree.meta["class_name"] = "SongUNet"
    content = {"ema": Recorded("EDMPrecond", {"_modules": {"model": tree}})}
    refused(write_pickle(tmp_path / "d.pkl", content), "no tree")
    for key, value in (("num_blocks", 10**9), ("channel_mult", [1] * 10**5), ("model_channels", 10**30)):
        arguments = {**edm_arguments(**VE), key: value}
        song = recorded(NETWORKS[0], "SongUNet", _init_kwargs=arguments)
        content = {"ema": Recorded("EDMPrecond", {"_modules": {"model": song}})}
        refused(write_pickle(tmp_path / "e.pkl", content), "refused")


# What is another file


def change(**edits: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        for name, value in edits.items():
            content[name] = value

    return apply


def in_model(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        key = f"module.all_modules.{name}"
        content["model"].pop(key, None)
        if value is not None:
            content["model"][key] = value

    return apply


def shorten_average(content: dict[str, Any]) -> None:
    content["ema"]["shadow_params"].pop()


def swap_averages(content: dict[str, Any]) -> None:
    shadow: list[Tensor] = content["ema"]["shadow_params"]
    shadow[0], shadow[4] = shadow[4], shadow[0]


def spoil_average(content: dict[str, Any]) -> None:
    content["ema"]["shadow_params"][3][0] = float("nan")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (change(model=None), "no 'model'"),
        (change(ema={}), "no 'model' with an 'ema'"),
        (change(model={"x": 1}), "no tensor"),
        (change(model={"layer.weight": torch.zeros(1)}), "layer.weight"),
        (in_model("3.bias", None), r"missing are \['all_modules.3.bias'\]"),
        (in_model("4.Conv_9.weight", torch.zeros(1)), r"surplus \['all_modules.4.Conv_9.weight'\]"),
        (in_model("4.Conv_1.weight", torch.zeros(8, 8, 1, 1)), "has shape"),
        (in_model("4.Conv_1.weight", torch.zeros(8, 8, 3, 3, dtype=torch.int32)), "(int32|lists)"),
        (in_model("99.weight", torch.zeros(1)), "gaps"),
        (shorten_average, "'ema' lists"),
        (swap_averages, "'ema' lists"),
        (spoil_average, "NaN"),
    ],
)
def test_score_sde_files_that_are_not(tmp_path: Path, edit: Callable[[dict[str, Any]], None], match: str) -> None:
    content = score_sde()
    edit(content)
    refused(write(tmp_path / "a.pth", content), match)


def test_layouts_that_are_not_built(tmp_path: Path) -> None:
    discrete = {**VE, "embedding": "positional"}
    content = score_sde_content(random_network(1, **discrete), random_network(2, **discrete))
    refused(write(tmp_path / "a.pth", content), "discrete-time VE")
    content = score_sde_content(random_network(1, **VP), random_network(2, **VP))
    content["model"] = OrderedDict((name.replace("NIN_0", "NIN_7"), value) for name, value in content["model"].items())
    refused(write(tmp_path / "b.pth", content), "module 7 holds|which no such network has")


@pytest.mark.parametrize(
    ("meta", "match"),
    [({"version": 5}, "version 5"), ({"type": "function"}, "type 'class'"), ({"state": None}, "no state")],
)
def test_records_of_another_kind(tmp_path: Path, edm_modules: None, meta: dict[str, Any], match: str) -> None:
    content = edm_content(NETWORKS[0], VE)
    content["ema"].meta.update(meta)
    refused(write(tmp_path / "a.pkl", content), match)


def test_edm_files_that_are_not(tmp_path: Path, edm_modules: None) -> None:
    def attempt(match: str, wrapper: str = "EDMPrecond", root: Any = None, **song: Any) -> None:
        content = edm_content(NETWORKS[0], VE, wrapper)
        model = content["ema"].meta["state"]["_modules"]["model"].meta
        model["class_name"] = song.pop("class_name", "SongUNet")
        model["state"].update(song)
        if root is not None:
            content = root(content)
        refused(write(tmp_path / "a.pkl", content), match)

    attempt("iDDPMPrecond", wrapper="iDDPMPrecond")
    attempt("its network is DiT", class_name="DiT")
    attempt("no network under 'ema'", root=lambda content: {"ema": 1})
    attempt("no network under 'ema'", root=lambda content: [1])
    attempt("positional arguments", _init_args=(1,))
    attempt("resample_filter", _init_kwargs={**edm_arguments(**VE), "resample_filter": [1, 2, 1]})
    attempt("another filter", _init_kwargs={**edm_arguments(**VE), "resample_filter": [1, 1]})
    attempt("model_channels", _init_kwargs={**edm_arguments(**VE), "model_channels": 8.0})
    attempt("learned_sigma", _init_kwargs={**edm_arguments(**VE), "learned_sigma": True})
    attempt("missing are", _init_kwargs={**edm_arguments(**VE), "augment_dim": 9})
    attempt("surplus", _parameters=OrderedDict(extra=torch.zeros(1)))
    attempt("is no tensor", _parameters=OrderedDict(extra="text"))
    attempt("no mapping of names", _parameters=7)
    attempt("no mapping of names", _modules={1: 2})


def test_ours_that_are_not(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1)}
    save_file(tensors, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "header does not say")
    for number, header in enumerate(("[1]", '{"network": 1}', '{"network": {"name": "ncsnpp", "blocks": 1000000000},'
                  '"denoiser": {}, "process": {}, "shape": [3, 32, 32]}', '{"network": {"name": "ncsnpp", "width": 8},'
                  '"denoiser": {}, "process": {}, "shape": [3, -32, 32]}')):  # fmt: skip
        save_file(tensors, tmp_path / f"{number}.safetensors", {"diffaccel": header})
        with pytest.raises(UsageError):
            read(tmp_path / f"{number}.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.pth", "b.safetensors"], "does not exist"),
        (["a.txt", "b.safetensors"], "none of the formats safetensors, fit, "),
        (["a.pth"], "requires a checkpoint and a new .safetensors file"),
        (["a.pth", "b.pth"], "must end in .safetensors"),
        (["a.pth", "b.safetensors", "weights=both"], "weights=both"),
        (["a.pth", "b.safetensors", "size=large"], "size=large is not a number"),
        (["a.pth", "b.safetensors", "wieghts=raw"], "did you mean 'weights'"),
    ],
)
def test_convert_s_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.pth").write_bytes(b"x")
    Path("a.txt").write_bytes(b"x")
    assert main(["convert", *words]) == 2
    assert message in capsys.readouterr().err
