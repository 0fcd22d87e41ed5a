"""Every kind of weights at every place that reads weights: accepted where it belongs, and one line elsewhere."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import VE, random_network, score_sde_content
from torch import Tensor

import diffaccel as da
from diffaccel.__main__ import main
from diffaccel.config import EXPERIMENTS, load
from diffaccel.errors import UsageError
from diffaccel.experiment import build_latents, build_method
from diffaccel.experiment.loading import check_resumable
from diffaccel.features.extractors import Small
from diffaccel.features.fitting import fit_extractor
from diffaccel.latents import AUTOENCODERS
from diffaccel.pretrained import inspect, read
from diffaccel.solver import SOLVERS
from diffaccel.weights import (
    FORMATS,
    KINDS,
    File,
    Format,
    Weights,
    kind_of,
    open_weights,
    read_description,
    read_weights,
    save_weights,
    tensors_sha256,
)

pytestmark = pytest.mark.usefixtures("undrawn")
WEIGHTS = EXPERIMENTS / "digits" / "weights"
QUICK = ["logger=none", "threads=1", "reference=", "training.images=32", "training.batch_size=16", "nfe=5", "n=20"]
IMPLICIT = ["method=tdpm", "method.frozen=true", "method.critic=mlp", "prior=implicit", "prior.ratio_star=0.5"]
KL = {"name": "kl", "widths": [8, 16], "blocks": 1, "groups": 4}
SMALL_KL = [f"latents.{key}={value}" for key, value in KL.items()]
SHIPPED = {"denoiser": "edm", "density": "gaussian", "classifier": "classifier", "extractor": "extractor"}


def rewritten(path: Path, out: Path, **said: Any) -> Path:
    """A file with another header over the same values; keys whose value is None are left out."""
    tensors, description = read_weights(path)
    header = {key: value for key, value in {**description, **said}.items() if value is not None}
    save_weights(out, tensors, header, torch.float32)
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the file holds -> a file of it; all but the foreign one fit the digits experiments."""
    out = tmp_path_factory.mktemp("kinds")
    found = {kind: WEIGHTS / f"{name}.safetensors" for kind, name in SHIPPED.items()}
    prior = {"name": "implicit", "ratio_star": 0.5}
    found["generator"] = rewritten(found["denoiser"], out / "generator.safetensors", kind="generator", prior=prior)
    for kind, experiment in (("denoiser", "digits/edm"), ("classifier", "digits/dlg")):
        assert main(["fit", experiment, f"out={out / kind}", *QUICK]) == 0
        found[f"training state of a {kind}"] = out / kind / "last.ckpt"
    found["autoencoder"] = out / "autoencoder.safetensors"
    network = AUTOENCODERS.build(KL, shape=(1, 8, 8))
    save_weights(found["autoencoder"], network.state_dict(), {"kind": "autoencoder", "autoencoder": KL}, torch.float32)
    from diffaccel.data import DataModule

    digits, state = DataModule({"name": "digits"}), out / "extractor.ckpt"
    fit_extractor(digits, dim=4, widths=(4, 4), epochs=1, batch_size=700, state_path=state)
    found["training state of an extractor"] = state
    torch.save(score_sde_content(random_network(1, **VE), random_network(2, **VE)), out / "foreign.pth")
    return {**found, "foreign": out / "foreign.pth"}


def use(experiment: str, key: str, *words: str, trained: bool = True) -> Callable[[Path], Any]:
    keys = {"load": False} if not trained else {"frozen": True}
    return lambda path: build_method(load(experiment, [*words, f"{key}={path}"]), **keys)


PLACES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "checkpoint": ("denoiser", use("digits/edm", "checkpoint")),
    "init": ("denoiser", use("digits/edm", "init", trained=False)),
    "prior.checkpoint of a generator": ("generator", use("digits/edm", "prior.checkpoint", *IMPLICIT)),
    "prior.init of a generator": ("generator", use("digits/edm", "prior.init", *IMPLICIT, trained=False)),
    "prior.checkpoint of a density": ("density", use("digits/small_t", "prior.checkpoint")),
    "posterior.checkpoint": ("classifier", use("digits/dlg", "posterior.checkpoint")),
    "extractor": ("extractor", lambda path: Small(str(path))),
    "latents.checkpoint": (
        "autoencoder",
        lambda path: build_latents(load("digits/edm", [*SMALL_KL, f"latents.checkpoint={path}"])),
    ),
    "resume": ("training state", lambda path: check_resumable(path, build_method(load("digits/edm"), load=False))),
}
"""Place -> the kind that it takes, and its reader."""
DENOISERS = ("denoiser", "training state of a denoiser")
ACCEPTED = {(kind, place) for place, (kind, _) in PLACES.items() for kind in SHIPPED if kind == PLACES[place][0]}
ACCEPTED |= {("generator", place) for place in PLACES if place.endswith("of a generator")}
ACCEPTED |= {(kind, place) for kind in DENOISERS for place in ("checkpoint", "init")}
ACCEPTED |= {("training state of a denoiser", "resume"), ("autoencoder", "latents.checkpoint")}
SAME_KIND = {("training state of a classifier", "resume"), ("foreign", "checkpoint"), ("foreign", "init")}
"""Of the right kind, and of other networks: tests below."""
STATES = [f"training state of {a}" for a in ("a denoiser", "a classifier", "an extractor")]
FILES = [*SHIPPED, "generator", "autoencoder", "foreign", *STATES]


@pytest.mark.parametrize(("held", "place"), [(f, p) for f in FILES for p in PLACES if (f, p) not in SAME_KIND])
def test_a_kind_is_read_where_it_belongs_and_named_elsewhere(held: str, place: str, files: dict[str, Path]):
    needed, reader = PLACES[place]
    if (held, place) in ACCEPTED:
        reader(files[held])
        return
    with pytest.raises(UsageError) as caught:
        reader(files[held])
    said = str(caught.value)
    found, named = "denoiser" if held == "foreign" else held.partition(" of ")[0], said.replace("auto-", "auto")
    assert str(files[held]) in said and "\n" not in said
    assert found in named and (needed in named or "of an extractor" in said)
    if found != "training state":
        assert f"holds {KINDS[found]}, and {KINDS[needed]} is needed" in said


@pytest.mark.parametrize("place", [place for place in PLACES if place != "resume"])
def test_a_missing_file_is_an_error_with_the_key_that_names_it(place: str, tmp_path: Path):
    """``checkpoint=`` is the denoiser's alone."""
    key = {"extractor": "extractor.path"}.get(place, place.partition(" of ")[0])
    with pytest.raises(UsageError) as caught:
        PLACES[place][1](tmp_path / "missing.safetensors")
    said = str(caught.value)
    assert f" {key}=" in said and "missing.safetensors" in said and "\n" not in said


def test_a_state_of_other_networks_is_not_gone_on_from(files: dict[str, Path]):
    with pytest.raises(UsageError, match="do not fit the network"):
        PLACES["resume"][1](files["training state of a classifier"])


@pytest.mark.parametrize("place", PLACES)
def test_a_file_without_a_header_is_taken_by_its_tensors_for_networks_alone(place: str, files, tmp_path: Path):
    needed, reader = PLACES[place]
    if needed in files:
        save_weights(tmp_path / "bare", read_weights(files[needed])[0], {}, torch.float32)
    else:
        save_weights(tmp_path / "bare", {"a": torch.zeros(1)}, {})
    if needed in ("extractor", "training state"):
        with pytest.raises(UsageError, match="holds no extractor|holds weights of unknown kind, and a training state"):
            reader(tmp_path / "bare")
    else:
        reader(tmp_path / "bare")


# Foreign checkpoints


def test_a_foreign_checkpoint_brings_its_network(files: dict[str, Path]):
    words = [f"checkpoint={files['foreign']}", "solver.grid.ratio_min=0.02"]
    method = build_method(load("cifar10_small/edm", words), frozen=True)
    expected = read(files["foreign"])
    assert method.denoiser.source == expected.source
    assert tensors_sha256(method.denoiser.network.state_dict()) == tensors_sha256(expected.tensors)
    with pytest.raises(UsageError, match=r"of shape \(3, 32, 32\), but the experiment's images have shape \(1, 8, 8\)"):
        PLACES["checkpoint"][1](files["foreign"])


def test_a_fit_begins_with_a_foreign_checkpoint_of_its_own_network(files: dict[str, Path], tmp_path: Path):
    expected = read(files["foreign"])
    for path in (files["foreign"], tmp_path / "converted.safetensors"):
        if path.suffix == ".safetensors":
            assert main(["convert", str(files["foreign"]), str(path)]) == 0
        with pytest.raises(UsageError, match='network is "ncsnpp" in the file and "unet" in the experiment'):
            build_method(load("cifar10_small/edm", [f"init={path}"]), load=False)
        config = load("cifar10_small/edm", [f"init={path}"])
        config.network, config.denoiser = expected.network, expected.denoiser
        network = build_method(config, load=False).denoiser.network
        assert tensors_sha256(network.state_dict()) == tensors_sha256(expected.tensors)


# Headers


def test_what_a_fit_leaves_says_what_it_is_and_stands_on(files: dict[str, Path]):
    over = tensors_sha256(read_weights(files["denoiser"])[0])
    state = files["training state of a classifier"]
    said = read_description(state.parent / "classifier.safetensors")
    wanted = {"kind": "classifier", "classes": 0, "shape": [1, 8, 8], "images_seen": 32, "stands_on": over}
    assert wanted.items() <= said.items()
    assert {"network", "denoiser", "process", "prior", "posterior", "data", "seed", "version"} <= said.keys()
    assert open_weights(state).header["stands_on"] == over
    trained = files["training state of a denoiser"]
    for header in (read_description(trained.parent / "ema.safetensors"), open_weights(trained).of("denoiser").header):
        assert header["kind"] == "denoiser" and header["images_seen"] == 32 and "stands_on" not in header
    assert main(["convert", str(trained), str(trained.parent / "own.safetensors")]) == 0
    assert read(trained.parent / "own.safetensors").source == {"format": "diffaccel"}


def test_a_generator_s_file_and_state_stand_on_the_denoiser_of_its_fit(files: dict[str, Path], tmp_path: Path):
    assert main(["fit", "digits/edm", *IMPLICIT, f"out={tmp_path}", *QUICK]) == 0
    tensors, said = read_weights(files["denoiser"])
    save_weights(tmp_path / "other.safetensors", {name: 1.1 * one for name, one in tensors.items()}, said)
    for name in ("generator.safetensors", "last.ckpt"):
        found = open_weights(tmp_path / name).of("generator")
        assert found.header["stands_on"] == tensors_sha256(tensors)
        words = [*IMPLICIT, f"prior.checkpoint={tmp_path / name}"]
        build_method(load("digits/edm", words), frozen=True)
        with pytest.raises(UsageError, match="was trained with the denoiser"):
            build_method(load("digits/edm", [*words, f"checkpoint={tmp_path / 'other.safetensors'}"]), frozen=True)


def test_weights_that_a_fit_does_not_need_may_be_missing_or_broken(tmp_path: Path):
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    for name in ("missing.safetensors", "missing.ckpt", "pointer.safetensors"):
        config = load("digits/edm", [f"checkpoint={tmp_path / name}"])
        build_method(config, load=False)
        with pytest.raises(UsageError, match=name):
            build_method(config, frozen=True)


def test_an_extractor_s_header_says_its_kind(tmp_path: Path):
    from diffaccel.features.extractors import SmallClassifier, save_classifier

    save_classifier(SmallClassifier(1, 2, 4, (4, 4)), tmp_path / "a.safetensors", "mine", "my images", 0.5, 0)
    assert open_weights(tmp_path / "a.safetensors").kind == read_description(tmp_path / "a.safetensors")["kind"]
    assert Small(str(tmp_path / "a.safetensors")).name == "mine"


@pytest.mark.parametrize("kind", ["generator", "density", "classifier"])
def test_only_a_generator_belongs_to_the_denoiser_that_it_was_trained_over(kind: str, files, tmp_path: Path):
    """Densities and noise classifiers are fitted to noisy data, and serve any denoiser."""
    own = tensors_sha256(read_weights(files["denoiser"])[0])
    _, reader = PLACES[{"classifier": "posterior.checkpoint"}.get(kind, f"prior.checkpoint of a {kind}")]
    reader(rewritten(files[kind], tmp_path / "own.safetensors", stands_on=own))
    other = rewritten(files[kind], tmp_path / "other.safetensors", stands_on="f" * 64)
    if kind != "generator":
        reader(other)
        return
    with pytest.raises(UsageError) as caught:
        reader(other)
    said = str(caught.value)
    assert f"trained with the denoiser {'f' * 16}," in said and own[:16] in said and "\n" not in said
    PLACES["prior.init of a generator"][1](other)  # a fit may begin with it


@pytest.mark.parametrize("key", ["network", "denoiser", "process", "shape"])
def test_a_key_that_a_header_lacks_is_not_compared_and_missed_where_it_is_needed(key: str, files, tmp_path: Path):
    path = rewritten(files["denoiser"], tmp_path / "a.safetensors", kind="denoiser", **{key: None})
    PLACES["checkpoint"][1](path)
    with pytest.raises(UsageError, match=f"its header does not say {key}$"):
        read(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("network", 1),
        ("network", {"widths": [1]}),
        ("denoiser", []),
        ("process", {"name": 3}),
        ("prior", "implicit"),
        ("shape", [1, 8]),
        ("shape", [1, 8, -8]),
        ("shape", {"a": 1}),
        ("trained_ratios", [1.0]),
        ("trained_ratios", ["a", "b"]),
        ("trained_ratios", float("nan")),
        ("classes", -1),
        ("images_seen", "many"),
        ("stands_on", 5),
        ("source", "elsewhere"),
    ],
)
def test_a_header_of_other_types_is_refused_by_its_key(key: str, value: Any, files: dict[str, Path], tmp_path: Path):
    path = rewritten(files["denoiser"], tmp_path / "a.safetensors", **{key: value})
    for reader in (PLACES["checkpoint"][1], inspect):
        with pytest.raises(UsageError, match=f"a.safetensors is refused: its header's {key} is not "):
            reader(path)


def test_an_unknown_kind_is_named(files: dict[str, Path], tmp_path: Path):
    path = rewritten(files["denoiser"], tmp_path / "a.safetensors", kind="banana")
    with pytest.raises(UsageError, match="holds the unknown kind 'banana', and a denoiser is needed"):
        PLACES["checkpoint"][1](path)


def test_shipped_files_open_as_what_they_are():
    """Those of version 0.1 that may not be rewritten have no kind in their header: it is inferred."""
    for path in EXPERIMENTS.glob("*/weights/*.safetensors"):
        weights = open_weights(path)
        assert weights.kind in KINDS and weights.kind == kind_of(read_description(path))
        assert weights.kind == "extractor" or {"network", "denoiser", "process", "data"} <= weights.header.keys()
        if "stands_on" in weights.header:
            edm = read_weights(path.parent / "edm.safetensors")[0]
            assert weights.header["stands_on"] == tensors_sha256(edm)


# Converted files, and models of a file


CLASSES = ["network.classes=10"]
SAID: dict[str, tuple[str, list[str], dict[str, Any], str]] = {
    "levels": ("ddpm", [], {"trained_ratios": [0.01, 2.0]}, "trained on noise-to-data ratios from 0.01 to 2"),
    "condition": ("edm", [], {"condition": {"name": "super_resolution", "factor": 4}}, "condition is "),
    "an older file's network": ("edm", ["network.widths=8,8"], {"source": {"format": "diffaccel"}}, "network.widths"),
}


@pytest.mark.parametrize("case", SAID)
def test_a_converted_file_is_compared_as_its_original_is(case: str, tmp_path: Path):
    name, words, said, message = SAID[case]
    original = rewritten(WEIGHTS / f"{name}.safetensors", tmp_path / "a.safetensors", images_seen=5, **said)
    assert main(["convert", str(original), str(tmp_path / "b.safetensors")]) == 0
    assert {"images_seen": 5, **said}.items() <= read_description(tmp_path / "b.safetensors").items()
    for file in ("a", "b"):
        with pytest.raises(UsageError, match=message):
            build_method(load(f"digits/{name}", [*words, f"checkpoint={tmp_path / file}.safetensors"]), frozen=True)


def test_a_network_without_null_class_has_no_guidance_wherever_it_is_loaded(tmp_path: Path):
    network = build_method(load("digits/edm", CLASSES), load=False).denoiser.network.state_dict()
    header = {**read_description(WEIGHTS / "edm.safetensors"), "label_drop": 0}
    header["network"] = {**header["network"], "classes": 10}
    save_weights(tmp_path / "a.safetensors", network, header)
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 0
    guided = {"name": "heun", "guidance": 1.0}
    for file in (tmp_path / "a.safetensors", tmp_path / "b.safetensors"):
        method = build_method(load("digits/edm", [*CLASSES, f"checkpoint={file}"]), frozen=True)
        for sampler in (
            da.Sampler(da.load(file), solver=guided),
            method.sampler.using(method.prior, SOLVERS.build(guided)),
        ):
            with pytest.raises(UsageError, match="trained without condition, which this network was not"):
                sampler(2, nfe=4)


def test_a_truncated_file_is_a_model_of_its_levels_only(tmp_path: Path):
    file = rewritten(WEIGHTS / "ddpm.safetensors", tmp_path / "a.safetensors", trained_ratios=[0.01, 2.0])
    model = da.load(file)
    assert model.denoiser.ratio_range == (0.01, 2.0)
    with pytest.raises(UsageError, match="up to a noise-to-data ratio of 2, .* load the experiment digits/ddpm"):
        da.Sampler(model)
    assert da.export("digits/edm", nfe=4, format="k-diffusion", solver="euler", checkpoint=file)["sigmas"][0] == 2.0


def test_a_file_whose_network_is_its_generator_samples_as_its_experiment_does():
    """Its header is of version 0.1, without the range of the training."""
    model, own = da.load(WEIGHTS / "tdpm.safetensors"), da.load("digits/tdpm")
    star = da.Sampler(own).prior.highest_ratio(own.denoiser)
    assert model.denoiser.ratio_range == pytest.approx((0.01, star)) and star < 10
    solver = {"name": "ddim", "grid": {"name": "index"}}
    assert torch.equal(*(da.Sampler(one, solver=solver)(4, nfe=3) for one in (model, own)))


# What a file holds


@pytest.mark.parametrize("held", FILES)
def test_inspect_says_what_a_file_holds(held: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    assert main(["convert", "--inspect", str(files[held])]) == 0
    printed = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert rows["kind"] == ("denoiser" if held == "foreign" else held.partition(" of ")[0])
    assert "numbers" in rows["tensors"]
    if "extractor" not in held and held != "autoencoder":
        shape = (3, 32, 32) if held == "foreign" else (1, 8, 8)
        assert rows["images"] == f"{shape}, in units of [-1, 1]"
        assert rows["network"].startswith("ncsnpp" if held == "foreign" else "unet")
    assert rows["from"].startswith({"foreign": "score_sde_pytorch"}.get(held, "")), rows
    expected = {"training state of a denoiser": ("averaged", "denoiser"), "classifier": ("data", "digits"),
                "denoiser": ("data", "digits"),
                "extractor": ("data", "digits 8x8"), "density": ("density", "GaussianDensity")}  # fmt: skip
    if held in expected:
        key, value = expected[held]
        assert rows[key] == value


def test_inspect_describes_a_file_without_a_header_and_convert_needs_a_denoiser(files, tmp_path: Path, capsys):
    save_weights(tmp_path / "bare.safetensors", {"a": torch.zeros(2, 3)}, {})
    assert "unknown" in inspect(tmp_path / "bare.safetensors")
    for kind in ("generator", "density", "classifier", "extractor"):
        assert main(["convert", str(files[kind]), str(tmp_path / "out.safetensors")]) == 2
        assert f"holds {KINDS[kind]}, and a denoiser is needed" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.safetensors").exists()


# Formats


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x1980])
def test_safetensors_whose_length_begins_as_a_pickle_does(length: int, tmp_path: Path):
    path, tensors, said = tmp_path / "a.safetensors", {"a": torch.zeros(3)}, {"kind": "density", "pad": ""}
    save_weights(path, tensors, said)
    whole = int.from_bytes(path.read_bytes()[:8], "little")
    save_weights(path, tensors, {**said, "pad": "x" * (length - whole)})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length and open_weights(path).kind == "density"
    assert open_weights(path).read()["a"].tolist() == [0, 0, 0]


def test_a_plugin_adds_a_format(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A header in JSON before safetensors: read at every place, described, and part of a point's identity."""

    class Mine(Format):
        def recognises(self, file: File) -> bool:
            return file.head.startswith(b"MINE\x00")

        def open(self, file: File, options: Mapping[str, Any]) -> Weights:
            header = json.loads(file.path.read_bytes()[5:])
            return Weights(file.path, "mine", "denoiser", header, self.tensors)

        @staticmethod
        def tensors() -> dict[str, Tensor]:
            return read_weights(files["denoiser"])[0]

    path = tmp_path / "weights.mine"
    path.write_bytes(b"MINE\x00" + json.dumps(read_description(files["denoiser"])).encode())
    with pytest.raises(UsageError, match="of none of the formats safetensors"):
        open_weights(path)
    monkeypatch.setitem(FORMATS._factories, "mine", Mine)
    method = PLACES["checkpoint"][1](path)
    assert tensors_sha256(method.denoiser.network.state_dict()) == tensors_sha256(Mine.tensors())
    assert inspect(path).splitlines()[0].split() == ["kind", "denoiser"]
    with pytest.raises(UsageError, match="holds a denoiser, and an extractor is needed"):
        Small(str(path))
