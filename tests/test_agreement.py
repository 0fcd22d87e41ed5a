"""What files say of themselves is compared with what an experiment asks: weights, statistics, settings, labels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffaccel.__main__ import main
from diffaccel.config import EXPERIMENTS, find, load
from diffaccel.data import SOURCES, ArrayImages, DataModule, Source
from diffaccel.errors import UsageError
from diffaccel.experiment import build_evaluator, build_method
from diffaccel.methods import METHODS, DenoisingLangevinGibbs
from diffaccel.nn import NETWORKS
from diffaccel.process import PROCESSES
from diffaccel.report import read_points
from diffaccel.weights import kind_of, read_description, read_weights, save_weights

WEIGHTS = EXPERIMENTS / "digits" / "weights"
CIFAR = EXPERIMENTS / "cifar10_small" / "weights"
QUICK = ["logger=none", "threads=1", "n=40", "nfe=6"]


def bench(out: Path, experiment: str, *words: str) -> list[dict[str, Any]]:
    assert main(["bench", experiment, f"out={out}", *QUICK, *words]) == 0
    return read_points(out / "points.jsonl")


def rewritten(path: Path, out: Path, **said: Any) -> Path:
    """A file with another header over the same values."""
    tensors, description = read_weights(path)
    save_weights(out, tensors, {**description, **said})
    return out


# Weights


@pytest.mark.parametrize(
    ("experiment", "word", "message"),
    [
        ("digits/edm", f"checkpoint={WEIGHTS / 'ddpm.safetensors'}", 'denoiser is "eps" in the file and "karras"'),
        ("digits/ddpm", f"checkpoint={WEIGHTS / 'tdpm.safetensors'}", 'process is "vp_discrete" in the file and "vp"'),
        ("digits/edm", "denoiser.sigma_data=0.5", "denoiser.sigma_data is 0.73 in the file and 0.5"),
        ("digits/ddpm", "process.beta_1=12", "process.beta_1 is 20.0 in the file and 12"),
        ("digits/edm", "network.attention=[0]", "network.attention is [1] in the file and [0]"),
        ("digits/edm", f"checkpoint={WEIGHTS / 'classifier.safetensors'}", "holds a classifier"),
        ("digits/edm", f"checkpoint={WEIGHTS / 'extractor.safetensors'}", "holds an extractor"),
        ("cifar10_small/edm", f"checkpoint={CIFAR / 'tdpm.safetensors'}", "holds a generator"),
        ("cifar10_small/edm", "shape=[3,64,64]", "shape is [3, 32, 32] in the file and [3, 64, 64]"),
        ("cifar10_small/tdpm", f"prior.checkpoint={CIFAR / 'edm.safetensors'}", "holds a denoiser"),
        ("cifar10_small/tdpm", "prior.ratio_star=1.0", "prior.ratio_star is 0.5 in the file and 1.0"),
        ("cifar10_small/tdpm_shared", "prior.K=50", "prior.K is 100 in the file and 50"),
        ("digits/small_t", "prior.density.basis=dct", "prior.density is"),
        ("digits/small_t", f"prior.checkpoint={WEIGHTS / 'classifier.safetensors'}", "holds a classifier"),
    ],
)  # fmt: skip
def test_weights_of_something_else_are_refused_with_both_sides(experiment: str, word: str, message: str):
    with pytest.raises(UsageError) as caught:
        build_method(load(experiment, [word]), frozen=True)
    assert message in str(caught.value)


def test_a_chain_s_classifier_is_of_its_levels(tmp_path: Path):
    said = {"posterior": {"name": "classifier", "count": 150, "ratio_min": 0.05, "ratio_max": 80.0, "width": 12}}
    file = rewritten(WEIGHTS / "classifier.safetensors", tmp_path / "c.safetensors", **said)
    with pytest.raises(UsageError, match="posterior.ratio_min is 0.05 in the file and 0.1"):
        build_method(load("digits/dlg", [f"posterior.checkpoint={file}"]), frozen=True)
    build_method(load("digits/dlg", [f"posterior.checkpoint={file}", "posterior.ratio_min=0.05"]), frozen=True)


def test_defaults_that_a_file_or_an_experiment_leaves_out_are_no_difference(tmp_path: Path):
    node = {"name": "unet", "widths": [32, 48], "blocks": 1, "attention": [1], "embedding": 64, "dropout": 0.3}
    said = {"network": node, "denoiser": {"name": "karras", "sigma_data": 0.73, "ratio_max": 80}}
    file = rewritten(WEIGHTS / "edm.safetensors", tmp_path / "edm.safetensors", **said)
    build_method(load("digits/edm", [f"checkpoint={file}", "network.heads=[1]"]), frozen=True)
    build_method(
        load("digits/edm", [f"checkpoint={file}", "process.sigma_max=70"]), frozen=True
    )  # karras: on any process


def test_a_denoiser_is_not_used_at_levels_that_it_was_not_trained_at(tmp_path: Path):
    file = rewritten(WEIGHTS / "ddpm.safetensors", tmp_path / "short.safetensors", trained_ratios=[0.01, 2.0])
    with pytest.raises(UsageError, match="trained on noise-to-data ratios from 0.01 to 2, .* covers 0.01 to"):
        build_method(load("digits/ddpm", [f"checkpoint={file}"]), frozen=True)
    build_method(load("digits/ddpm", [f"checkpoint={file}", "denoiser.ratio_max=2"]), frozen=True)


def test_what_a_fit_leaves_says_what_it_is(tmp_path: Path):
    words = ["logger=none", "threads=1", "training.images=64", "training.batch_size=32", "nfe=5", "n=20"]
    assert main(["fit", "digits/small_t_trained", f"out={tmp_path}", *words]) == 0
    said = {path.stem: read_description(path) for path in tmp_path.glob("*.safetensors")}
    assert {name: kind_of(one) for name, one in said.items()} == {
        "ema": "denoiser", "raw": "denoiser", "density": "density"
    }  # fmt: skip
    star = load("digits/small_t_trained").prior["T"]
    assert said["ema"]["trained_ratios"][1] == pytest.approx(said["density"]["ratio_star"]), star
    for name in ("ema.safetensors", "last.ckpt"):  # trained up to T and no further
        with pytest.raises(UsageError, match="trained on noise-to-data ratios"):
            build_method(load("digits/ddpm", [f"checkpoint={tmp_path / name}"]), frozen=True)
    with pytest.raises(UsageError, match='denoiser is "eps" in the file and "karras"'):
        build_method(load("digits/edm", [f"checkpoint={tmp_path / 'last.ckpt'}"]), frozen=True)


def test_a_file_that_says_nothing_is_taken_by_its_tensors(tmp_path: Path):
    tensors, _ = read_weights(WEIGHTS / "edm.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    build_method(load("digits/edm", [f"checkpoint={tmp_path / 'bare.safetensors'}"]), frozen=True)


def test_shipped_headers_say_kind_and_shape():
    for path in EXPERIMENTS.glob("*/weights/*.safetensors"):
        said = read_description(path)
        assert kind_of(said), path
        assert kind_of(said) == "extractor" or "shape" in said, path


# Statistics and data


@pytest.mark.parametrize(
    ("experiment", "words", "message"),
    [
        ("cifar10_small/edm", ["data=folder", "data.path=MINE"], "statistics of 'CIFAR-10'.*are 'MINE'"),
        ("cifar10_small/edm", ["data.path=dogs.npz"], "statistics of 'CIFAR-10'.*are 'dogs.npz'"),
        ("digits/edm", ["data=npz", "data.path=mine.npz"], "statistics of 'digits 8x8'.*are 'mine.npz'"),
        ("digits/edm", [f"reference={CIFAR / 'reference.npz'}"], "computed with the extractor cifar10"),
    ],
)
def test_other_data_than_the_reference_s_are_refused(experiment: str, words: list[str], message: str):
    config = load(experiment, words)
    with pytest.raises(UsageError, match=message):
        build_evaluator(config, build_method(config, frozen=True).sampler)


def test_the_user_may_say_that_data_elsewhere_are_the_same():
    config = load("cifar10_small/edm", ["data.path=train.npz", "data.label=CIFAR-10 (PNG)"])
    build_evaluator(config, build_method(config, frozen=True).sampler)


def test_a_shape_that_the_data_do_not_have_is_refused():
    with pytest.raises(UsageError, match=r"data=digits: images have shape \(1, 8, 8\).*\(1, 16, 16\)"):
        build_evaluator(load("digits/edm", ["shape=[1,16,16]"]), build_method(load("digits/edm")).sampler)


@pytest.mark.parametrize(
    ("experiment", "method", "message"),
    [
        ("digits/edm", "dlg", "method 'dlg' starts from prior=chain"),
        ("digits/edm", "tdpm", "method 'tdpm' starts from prior=implicit"),
        ("digits/edm", "small_t", "set prior=density"),
        ("digits/edm", "ddpm", "no method is called 'ddpm'"),
        ("digits/edm", "ddm", "process=decoupled"),
    ],
)
def test_an_experiment_is_not_called_by_another_method_s_name(experiment: str, method: str, message: str):
    with pytest.raises(UsageError, match=message):
        build_method(load(experiment, [f"method={method}"]), frozen=True)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("vp", {"beta_0": 20.0, "beta_1": 0.1}),
        ("vp", {"beta_0": -0.1}),
        ("sub_vp", {"beta_1": float("nan")}),
        ("vp_cosine", {"offset": -0.1}),
        ("vp_cosine", {"t_max": 1.0}),
        ("ve", {"sigma_min": 100.0, "sigma_max": 0.02}),
        ("ve", {"sigma_min": 0.0}),
        ("edm", {"sigma_max": 0.0}),
        ("edm", {"sigma_max": float("inf")}),
        ("edm", {"sigma_max": float("nan")}),
    ],
)
def test_processes_refuse_levels_that_are_none(name: str, keys: dict[str, float]):
    with pytest.raises(UsageError, match=next(iter(keys))):
        PROCESSES.build({"name": name, **keys})


@pytest.mark.parametrize("word", ["sigma_data=0", "sigma_data=-1", "sigma_data=.nan", "ratio_min=0", "ratio_max=1e-4"])
def test_denoisers_refuse_levels_that_are_none(word: str):
    with pytest.raises(UsageError, match=word.split("=")[0]):
        build_method(load("digits/edm", [f"denoiser.{word}", "checkpoint=null"]), load=False)


# Settings by budget


def test_settings_searched_for_other_weights_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors, said = read_weights(WEIGHTS / "edm.safetensors")
    moved = {name: tensor + 0.01 * tensor.abs().mean() for name, tensor in tensors.items()}
    save_weights(tmp_path / "mine.safetensors", moved, said)
    known = build_method(load("digits/edm")).sampler.weights_sha256()
    file = tmp_path / "best.yaml"
    file.write_text(
        f"base: {find('digits/edm').resolve()}\ntuned_for: {json.dumps(known)}\n"
        "by_nfe: {6: {solver: {name: ddim, grid: {name: time, ratio_min: 0.5}}}}\n"
    )
    own = bench(tmp_path / "own", str(file))[0]
    assert own["tuned"] and own["solver"] == "ddim"
    mine = f"checkpoint={tmp_path / 'mine.safetensors'}"
    other, plain = bench(tmp_path / "other", str(file), mine)[0], bench(tmp_path / "plain", "digits/edm", mine)[0]
    assert "searched for another denoiser" in capsys.readouterr().err
    assert not other["tuned"] and other["solver"] == "dpmpp2m"
    assert other["images_sha256"] == plain["images_sha256"]
    asked = bench(tmp_path / "asked", str(file), mine, "by_nfe={6: {solver: heun}}")[0]
    assert asked["solver"] == "heun" and asked["by_budget"] and not asked["tuned"]


def test_a_fit_that_begins_with_searched_weights_trains_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """init= has the very hash that the search was for; what is trained has not, so that no point is called tuned."""
    known = build_method(load("digits/edm")).sampler.weights_sha256()
    file = tmp_path / "best.yaml"
    file.write_text(
        f"base: {find('digits/edm').resolve()}\ntuned_for: {json.dumps(known)}\nby_nfe: {{6: {{solver: ddim}}}}\n"
    )
    words = ["nfe=6", "n=20", "images=64", "batch_size=20", "logger=none", "threads=1", f"out={tmp_path / 'fit'}"]
    assert main(["fit", str(file), f"init={WEIGHTS / 'edm.safetensors'}", *words]) == 0
    assert "searched for another denoiser" in capsys.readouterr().err
    (point,) = read_points(tmp_path / "fit" / "points.jsonl")
    assert not point["tuned"] and point["solver"] == "dpmpp2m"
    sampler = build_method(load(str(file), [f"init={WEIGHTS / 'edm.safetensors'}"]), load=False).sampler
    assert not sampler.tuned and not sampler.by_nfe


def test_what_a_search_finds_belongs_to_its_weights(tmp_path: Path):
    words = ["nfe=5", "n=20", "search.trials=1", "search.images=[20]", "threads=1", f"out={tmp_path}"]
    assert main(["search", "digits/edm_best", *words]) == 0
    found = load(str(tmp_path / "best.yaml"))
    assert found.tuned_for == build_method(load("digits/edm")).sampler.weights_sha256()
    assert build_method(found, frozen=True).sampler.tuned


DENSITY = "{name: density, T: 0.3, density: {name: mixture, components: 3}, checkpoint: sub/density.safetensors}"


def test_weights_of_a_budget_are_found_from_its_file_and_are_part_of_the_point(tmp_path: Path, capsys):
    fit = ["fit", "toy/small_t", "prior.T=0.3", f"out={tmp_path / 'sub'}", "logger=none", "threads=1", "nfe=3", "n=20"]
    assert main(fit) == 0
    file = tmp_path / "own.yaml"
    file.write_text(f"base: {find('toy/small_t').resolve()}\nby_nfe: {{6: {{prior: {DENSITY}}}}}\n")
    assert load(str(file)).by_nfe[6]["prior"]["checkpoint"] == str(tmp_path / "sub" / "density.safetensors")
    bench(tmp_path / "out", str(file))
    assert len(bench(tmp_path / "out", str(file))) == 1, "measured before"
    density = tmp_path / "sub" / "density.safetensors"
    tensors, said = read_weights(density)
    changed = {name: 1.1 * tensor if name == "means" else tensor for name, tensor in tensors.items()}
    assert "means" in tensors, sorted(tensors)
    save_weights(density, changed, said, torch.float32)
    assert len(bench(tmp_path / "out", str(file))) == 2, "a replaced file makes another point"


# Names


def test_a_point_says_what_its_data_are_and_not_where_its_file_lies(tmp_path: Path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "mine.yaml").write_text(f"base: {find('digits/edm').resolve()}\n")
    assert bench(tmp_path / "out", str(folder / "mine.yaml"))[0]["data"] == "digits 8x8"


def test_a_source_s_own_type_says_whether_its_data_are_images(monkeypatch: pytest.MonkeyPatch):
    class Plane(Source):
        """Points as somebody else's package brings them."""

        label = "plane"

        def split(self, name: str) -> ArrayImages:
            return ArrayImages(torch.randn(30, 2, 1, 1))

    class Bytes(Plane):
        def split(self, name: str) -> ArrayImages:
            return ArrayImages(torch.zeros(30, 1, 8, 8, dtype=torch.uint8))

    monkeypatch.setitem(SOURCES._factories, "plane", Plane)
    monkeypatch.setitem(SOURCES._factories, "bytes", Bytes)
    assert not DataModule({"name": "plane"}).source.has_images()
    assert DataModule({"name": "bytes"}).source.has_images()
    config = load("toy/edm", ["data=plane"])
    with pytest.raises(UsageError, match="statistics of 'toy mixture'.*are 'plane'"):
        build_evaluator(config, build_method(config, frozen=True).sampler)
    monkeypatch.setattr(Plane, "label", "toy mixture")
    sampler = build_method(config, frozen=True).sampler
    build_evaluator(config, sampler)
    assert not sampler.kind.discrete


def test_a_subclass_under_another_name_is_fitted_and_evaluated_as_its_base_is(tmp_path: Path, monkeypatch, capsys):
    class Mine(DenoisingLangevinGibbs):
        pass

    monkeypatch.setitem(METHODS._factories, "mine", Mine)
    words = ["method=mine", "training.images=64", "training.batch_size=32", "prior.chains=20", "nfe=20", "n=40"]
    assert main(["fit", "digits/dlg", f"out={tmp_path / 'fit'}", "logger=none", "threads=1", *words]) == 0
    assert "noise classifier: mean |ln sigma error|" in capsys.readouterr().err
    method = build_method(load("digits/dlg", ["method=mine"]), frozen=True)
    assert method.frozen and isinstance(method, Mine)
    frozen = torch.load(tmp_path / "fit" / "last.ckpt", weights_only=True)["diffaccel"]["denoiser_sha256"]
    from diffaccel.weights import tensors_sha256

    assert frozen == tensors_sha256(method.denoiser.state_dict()), "the fit stood on the shipped denoiser"
    own, shipped = (bench(tmp_path / name, "digits/dlg", "nfe=20", *extra)[0]["images_sha256"]
                    for name, extra in (("own", ["method=mine"]), ("shipped", [])))  # fmt: skip
    assert own == shipped


# Conditions


@pytest.mark.parametrize("name", ["adm", "unet", "ddpm", "ncsnpp"])
def test_every_network_with_classes_is_conditional_and_has_a_null_class(name: str):
    """Labels move the output, no label is the null class, and the null class is none of the others."""
    plain = {"width": 16, "multipliers": [1, 2], "blocks": 1, "attention": []}
    small = {"unet": {"widths": [8, 8], "blocks": 1}, "ddpm": {**plain, "groups": 8}}.get(name, plain)
    network = NETWORKS.build({"name": name, "classes": 3, **small}, shape=(1, 8, 8)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x, noise = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1), torch.zeros(4)
        out = network(x, noise, torch.arange(4))
        none = network(x, noise, None)
    assert network.classes == 3
    torch.testing.assert_close(out[3], none[0])
    assert all(not torch.allclose(out[a], out[b], atol=1e-4) for a in range(4) for b in range(a))


def test_a_network_never_trained_without_labels_is_neither_guided_nor_run_by_chains():
    words = ["network.name=adm", "network.width=16", "network.multipliers=[1,2]", "network.blocks=1"]
    words += ["network.attention=[]", "network.classes=10", "network.null_class=false", "network.heads=[1]"]
    config = load("digits/edm", [*words, "checkpoint=null", "solver.guidance=1"])
    config.network = {key: value for key, value in config.network.items() if key not in ("widths", "embedding")}
    method = build_method(config, load=False)
    with pytest.raises(UsageError, match="trained without condition"):
        next(method.sampler.draw(method.sampler.plan(10, 2), 0, [range(2)]))
    config = load("digits/dlg", [*words, "checkpoint=null", "posterior.checkpoint=null"])
    config.network = {key: value for key, value in config.network.items() if key not in ("widths", "embedding")}
    with pytest.raises(UsageError, match="trained with labels only"):
        build_method(config, load=False).sampler.plan(20, 400)


@pytest.mark.parametrize(
    ("word", "changes"),
    [("training.label_drop=1", True), ("training.antithetic=true", True), ("training.pixel_sum=true", True),
     ("training.augment=1", True), ("training.flip=false", False)],
)  # fmt: skip
def test_small_t_trains_its_score_by_the_template_s_options(word: str, changes: bool):
    """Each option of the denoiser's training moves the loss of small T too."""

    def loss(*words: str) -> torch.Tensor:
        extra = ["network.classes=10", "network.augment=9", "training.batch_size=16", "training.label_drop=0"]
        method = build_method(load("digits/small_t_trained", [*extra, *words]), load=False)
        with torch.no_grad():
            for parameter in method.denoiser.network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        data = DataModule({"name": "digits"}, batch_size=16)
        batch = next(iter(data.train_dataloader()))
        from diffaccel.noise import NoiseStreams

        return method.denoiser_loss(batch, NoiseStreams(0, batch.index, "training")).mean()

    assert torch.equal(loss(), loss(word)) != changes


def test_mirrored_levels_in_strata_take_one_of_each_share():
    from diffaccel.data import Batch
    from diffaccel.noise import NoiseStreams

    words = ["training.antithetic=true", "training.batch_size=16"]
    method = build_method(load("digits/small_t_trained", words), load=False)
    index = torch.arange(32, 48)
    u = method.level_quantiles(Batch(torch.zeros(16, 1, 8, 8), None, index), NoiseStreams(0, index))
    assert (16 * u).floor().sort().values.tolist() == list(range(16))
    torch.testing.assert_close(u[::2] + u[1::2], torch.ones(8, dtype=u.dtype))
    with pytest.raises(UsageError, match="even"):
        build_method(load("digits/small_t_trained", ["training.antithetic=true", "training.batch_size=15"]), load=False)


@pytest.mark.parametrize(
    ("word", "message"),
    [("network.classes=5", "10 classes, the network 5"), ("data.path=nolabels.npz", "no labels, the network has 10")],
)
def test_labels_have_to_fit_the_network_that_they_train(tmp_path: Path, word: str, message: str, capsys):
    import numpy as np

    words = ["logger=none", "threads=1", "training.images=32", "training.batch_size=16", "network.classes=10", word]
    if "nolabels" in word:
        np.savez(tmp_path / "nolabels.npz", images=np.zeros((20, 8, 8), dtype=np.uint8))
        words = [*words[:-1], "data=npz", f"data.path={tmp_path / 'nolabels.npz'}", "reference=null"]
    assert main(["fit", "digits/edm", f"out={tmp_path / 'out'}", *words]) == 2
    assert message in capsys.readouterr().err
