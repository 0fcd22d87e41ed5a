import errno
import hashlib
import io
import json
import pickle
import signal
import urllib.error
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from diffaccel.__main__ import main
from diffaccel.errors import UsageError
from diffaccel.features import extractors as features
from diffaccel.features import fitting
from diffaccel.features.extractors import (
    EXTRACTORS,
    Extractor,
    Identity,
    Inception,
    Small,
    SmallClassifier,
    load_classifier,
    save_classifier,
)
from diffaccel.features.fitting import augment, fit_extractor


class DigitSource:
    """Digits 0 and 1 as a data module gives them."""

    shape, classes = (1, 8, 8), 2

    def batches(self, split, batch_size, rank=0, world=1):
        digits = load_digits(n_class=2)
        chosen = torch.arange(len(digits.target)) % 5 == 0
        chosen = chosen if split == "test" else ~chosen
        images = torch.from_numpy(digits.images * 255 / 16).to(torch.uint8)[chosen, None]
        labels = torch.from_numpy(digits.target)[chosen]
        for b, parts in enumerate(zip(images.split(batch_size), labels.split(batch_size), strict=True)):
            yield b, *parts


def random_images(n: int = 12, channels: int = 1, side: int = 8) -> Tensor:
    return torch.randint(256, (n, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    model = SmallClassifier(channels=1, classes=10, dim=16, widths=(4, 8)).eval()
    path = tmp_path / "extractor.safetensors"
    save_classifier(model, path, name="digits", data="digits", accuracy=0.5, seed=3)
    return path


def test_small_round_trip(weights):
    model, metadata = load_classifier(weights)
    extractor = EXTRACTORS.build({"name": "small", "path": str(weights)})
    assert (extractor.name, extractor.metric_name, extractor.dim) == ("digits", "fd_digits", 16)
    assert extractor.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {"name": "digits", "data": "digits", "accuracy": 0.5, "seed": 3}.items() <= metadata.items()
    torch.manual_seed(0)
    for key, value in SmallClassifier(channels=1, classes=10, dim=16, widths=(4, 8)).state_dict().items():
        assert torch.equal(model.state_dict()[key], value.half().to(value.dtype))


class Scaled(Extractor):
    """Extractor of another package, whose hash is that of its weights alone."""

    def __init__(self, scale: float = 1.0, path: Path | None = None) -> None:
        super().__init__()
        self.scale, self.name, self.dim, self.sha256 = scale, "scaled", 64, "weights"

    def features(self, images: Tensor) -> Tensor:
        return self.scale * images.flatten(1).float()


def test_options_of_another_package_s_extractor_are_part_of_its_hash(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(EXTRACTORS._factories, "scaled", Scaled)
    default, half, same, file = (
        EXTRACTORS.build({"name": "scaled", **options})
        for options in ({}, {"scale": 2}, {"scale": 2.0}, {"scale": 1, "path": "weights.safetensors"})
    )
    assert default.sha256 == file.sha256 == "weights" != half.sha256 == same.sha256
    assert default.weights_sha256 == half.weights_sha256 == "weights", "those that a loss would use"
    other = EXTRACTORS.build({"name": "scaled", "scale": 3.0})
    assert len({default.sha256, half.sha256, other.sha256}) == 3


def test_logits_are_the_head_of_the_features(weights):
    model, _ = load_classifier(weights)
    images = random_images()
    expected = model.features(images / 127.5 - 1)
    torch.testing.assert_close(Small(str(weights))(images), expected.double())
    torch.testing.assert_close(model(images / 127.5 - 1), model.head(expected))


def test_features_are_float64_frozen_and_the_same_in_any_batch(weights):
    extractor, images = Small(str(weights)), random_images(23)
    whole = extractor.train()(images)
    assert whole.dtype == torch.float64 and not whole.requires_grad and not extractor.training
    parts = torch.cat([extractor(part) for part in images.split(5)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(extractor(images), whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(images), whole)


@pytest.mark.parametrize(("channels", "side", "widths", "blocks"), [(1, 8, (4, 8, 8), 1), (3, 33, (4, 4), 2)])
def test_any_size_and_colour(channels, side, widths, blocks):
    model = SmallClassifier(channels, 7, dim=12, widths=widths, blocks=blocks).eval()
    images = random_images(3, channels, side) / 127.5 - 1
    assert model.features(images).shape == (3, 12) and model(images).shape == (3, 7)


def spoil(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "shape":
        return {**state, "head.weight": torch.zeros(3, 16)}
    if how == "missing":
        return {key: value for key, value in state.items() if key != "stem.0.weight"}
    return {**state, "head.weight": torch.full_like(state["head.weight"], torch.nan)}


@pytest.mark.parametrize(
    ("how", "message"),
    [("shape", "holds no extractor"), ("missing", "holds no extractor"), ("nan", "head.weight.* NaN or infinity")],
)
def test_broken_weights_are_refused(weights, how, message):
    with safe_open(str(weights), framework="pt") as file:
        metadata = file.metadata()
    save_file(spoil(load_file(weights), how), weights, metadata=metadata)
    with pytest.raises(UsageError, match=message):
        Small(str(weights))


@pytest.mark.parametrize("content", [None, b"", b"{}", "truncated", "no metadata", "huge"])
def test_files_of_another_kind_are_refused(weights, content):
    if content is None:
        weights.unlink()
    elif content == "truncated":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif content == "no metadata":
        save_file(load_file(weights), weights)
    elif content == "huge":  # claims a network of terabytes, which must not be allocated
        metadata = {**load_classifier(weights)[1], "widths": [10**6, 10**6]}
        save_file(load_file(weights), weights, metadata={"diffaccel": json.dumps(metadata)})
    else:
        weights.write_bytes(content)
    with pytest.raises(UsageError, match="extractor.safetensors"):
        Small(str(weights))


def test_images_that_do_not_fit_are_refused(weights):
    for images in (random_images(2, channels=3), torch.zeros(2, 1, 8, 8)):
        with pytest.raises(UsageError, match="reads uint8 images"):
            Small(str(weights))(images)


def test_identity_flattens():
    points = torch.randn(5, 2, 1, 1)
    extractor = EXTRACTORS.build({"name": "identity", "dim": 2})
    assert torch.equal(extractor(points), points.flatten(1).double())
    images = random_images(3)
    assert torch.equal(Identity(64)(images), images.flatten(1).double())
    assert extractor.metric_name == "fd_identity"
    with pytest.raises(UsageError, match="dim=2, an image has 64"):
        extractor(images)


def test_augmentation_moves_whole_images():
    images = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment(images, 0, False, generator), images)
    padded = torch.nn.functional.pad(images, [1] * 4, mode="reflect")
    crops = [padded[..., i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    crops += [crop.flip(-1) for crop in crops]
    seen = set()
    for _ in range(60):
        for n, image in enumerate(augment(images, 1, True, generator)):
            matches = [k for k, crop in enumerate(crops) if torch.equal(crop[n], image)]
            assert len(matches) == 1
            seen.add(matches[0])
    assert len(seen) > 15


def test_fitting_learns_and_repeats():
    options = {"dim": 8, "widths": (4, 8), "epochs": 6, "batch_size": 32, "seed": 1}
    (model, accuracy), (again, _) = fit_extractor(DigitSource(), **options), fit_extractor(DigitSource(), **options)
    assert accuracy > 0.95
    assert not model.training
    for value, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other)
        assert not value.is_floating_point() or torch.equal(value, value.half().float())  # as the file will hold it


def test_fitting_needs_labelled_images():
    class Unlabelled(DigitSource):
        def batches(self, *args, **kwargs):
            return ((b, images, None) for b, images, _ in super().batches(*args, **kwargs))

    with pytest.raises(UsageError, match="labelled uint8 images"):
        fit_extractor(Unlabelled())
    with pytest.raises(UsageError, match="lower batch_size"):
        fit_extractor(DigitSource(), batch_size=5000)


RECIPE = {"dim": 8, "widths": (4, 8), "epochs": 3, "batch_size": 32, "seed": 1, "flip": True}
EPOCH_STEPS, STEPS = 9, 27


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The classifier of a fit that ran through, and its last state."""
    path = tmp_path_factory.mktemp("whole") / "last.ckpt"
    model, _ = fit_extractor(DigitSource(), **RECIPE, state_path=path)
    return model, path


def assert_same(model: SmallClassifier, other: SmallClassifier) -> None:
    for value, wanted in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(value, wanted)


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["diffaccel"]["step"]


def at_step(monkeypatch, step, happens):
    """Let something happen within the given step of the next fit, after the step's draws."""
    taken = []

    def augment_and(*args):
        taken.append(step)
        images = augment(*args)
        if len(taken) == step:
            happens()
        return images

    monkeypatch.setattr(fitting, "augment", augment_and)


def control_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("stops", [[1], [EPOCH_STEPS], [EPOCH_STEPS + 4, 2], [STEPS]], ids=str)
def test_a_stopped_fit_ends_where_a_whole_one_does(whole, stops, tmp_path, monkeypatch):
    path, done = tmp_path / "last.ckpt", 0
    for stop in stops:
        at_step(monkeypatch, stop, control_c)
        with pytest.raises(KeyboardInterrupt):
            fit_extractor(DigitSource(), **RECIPE, state_path=path, resume=path if done else None)
        done += stop
        assert step_of(path) == done, "the step is finished, and kept"
    at_step(monkeypatch, STEPS - done + 1, lambda: pytest.fail("steps were taken twice"))
    model, _ = fit_extractor(DigitSource(), **RECIPE, resume=path)
    assert_same(model, whole[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def twice():
    control_c()
    control_c()


def fail():
    raise OSError("no images any more")


@pytest.mark.parametrize(("happens", "error"), [(twice, KeyboardInterrupt), (fail, OSError)])
def test_a_fit_broken_off_within_a_step_goes_on_from_its_last_epoch(whole, happens, error, tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    at_step(monkeypatch, 2 * EPOCH_STEPS + 3, happens)
    with pytest.raises(error):
        fit_extractor(DigitSource(), **RECIPE, state_path=path)
    assert step_of(path) == 2 * EPOCH_STEPS
    model, _ = fit_extractor(DigitSource(), **RECIPE, state_path=path, resume=path)
    assert_same(model, whole[0])
    assert step_of(path) == STEPS


def test_a_state_appears_whole_or_not_at_all(whole, tmp_path, monkeypatch):
    def full(file, content):
        with file.open("wb") as stream:
            stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "last.ckpt"
    path.write_bytes(whole[1].read_bytes())
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match="No space left"):
        fit_extractor(DigitSource(), **RECIPE, state_path=path)
    assert step_of(path) == STEPS


def test_ctrl_c_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 1, control_c)
        fit_extractor(DigitSource(), **{**RECIPE, "epochs": 1})
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("other", "named"),
    [({"epochs": 4}, "epochs=3 .not 4."), ({"widths": (8, 8), "seed": 2}, r"widths=\[4, 8\] .* seed=1 .not 2.")],
    ids=["epochs", "widths"],
)
def test_a_state_of_another_recipe_is_refused(whole, other, named):
    with pytest.raises(UsageError, match=f"last.ckpt is from a fit with {named}: "):
        fit_extractor(DigitSource(), **{**RECIPE, **other}, resume=whole[1])


def test_other_files_are_refused(whole, tmp_path):
    content = torch.load(whole[1], weights_only=True)
    foreign = {"edm": {"steps": 3, "images_seen": 384}, "number": 1}
    for name, own in foreign.items():
        torch.save({**content, "diffaccel": own}, tmp_path / f"{name}.ckpt")
    torch.save({**content, "optimizer": {}}, tmp_path / "part.ckpt")
    torch.save({**content, "diffaccel": {"extractor": content["diffaccel"]["extractor"]}}, tmp_path / "nowhere.ckpt")
    torch.save({**content, "state_dict": {}}, tmp_path / "empty.ckpt")
    (tmp_path / "half.ckpt").write_bytes(whole[1].read_bytes()[:5000])
    (tmp_path / "code.ckpt").write_bytes(pickle.dumps(control_c, protocol=2))
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(UsageError, match=f"checkpoint {file} ") as refused:
            fit_extractor(DigitSource(), **RECIPE, resume=file)
        assert "\n" not in str(refused.value)


def test_progress_is_a_line_per_epoch_or_a_bar(whole):
    lines, bar = io.StringIO(), io.StringIO()
    model, _ = fit_extractor(DigitSource(), **RECIPE, console=Console(file=lines, width=100))
    assert_same(model, whole[0])
    first, _, last = lines.getvalue().splitlines()
    assert first.startswith(f"epoch 1/3: {32 * EPOCH_STEPS} images seen, loss 0.")
    assert last.startswith(f"epoch 3/3: {32 * STEPS} images seen") and last.endswith("0:00:00 left")
    fit_extractor(DigitSource(), **RECIPE, console=Console(file=bar, force_terminal=True, width=100))
    assert f"{STEPS}/{STEPS}" in bar.getvalue() and "epoch 3/3" in bar.getvalue()


def test_the_command_resumes_as_other_fits_do(tmp_path, monkeypatch, capsys):
    def fit(*words):
        status = main(["fit", "digits/extractor", "method.epochs=2", "method.dim=4", "method.widths=[4]", *words])
        return status, capsys.readouterr().err

    one, two = tmp_path / "one", tmp_path / "two"
    for word in ("images=100", "training.lr=0.5"):
        status, said = fit(f"out={one}", word)
        assert status == 2 and f"{word}: an extractor is trained in epochs: set method.epochs" in " ".join(said.split())
    status, said = fit(f"out={one}", "devices=2", "accelerator=cpu")
    assert status == 2 and "devices: an extractor is trained on one device" in " ".join(said.split())
    assert not one.exists()
    assert fit(f"out={one}")[0] == 0
    at_step(monkeypatch, 5, control_c)
    status, said = fit(f"out={two}", "resume=auto")
    assert status == 130 and f"{two / 'last.ckpt'} does not exist: starting a new run" in said and "resume=auto" in said
    assert {file.name for file in two.iterdir()} == {"last.ckpt", "config.yaml"}, "an unfinished fit leaves no weights"
    status, said = fit(f"out={two}")
    assert status == 2 and f"{two / 'last.ckpt'} exists: resume with resume=auto" in said
    status, said = fit(f"out={two}", f"resume={two / 'none.ckpt'}")
    assert status == 2 and "none.ckpt does not exist: give a file, or resume=auto for" in said
    status, said = fit(f"out={two}", "resume=auto", "seed=1")
    assert status == 2 and "seed=0 (not 1)" in said and said.count("\n") == 2
    status, said = fit(f"out={two}", "resume=auto")
    assert status == 0 and f"resuming from {two / 'last.ckpt'}" in said and "epoch 2/2" in said
    for name in ("extractor.safetensors", "last.ckpt"):
        assert (one / name).is_file()
    assert (one / "extractor.safetensors").read_bytes() == (two / "extractor.safetensors").read_bytes()
    status, said = fit(f"out={tmp_path / 'three'}", f"resume={one / 'last.ckpt'}")
    assert status == 0 and "epoch" not in said, "a finished fit takes no step more"


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights that pass for the published ones."""
    from torch_fidelity import feature_extractor_inceptionv3 as upstream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "load_state_dict_from_url", lambda *args, **kwargs: None)
        patch.setattr(upstream.FeatureExtractorInceptionV3, "load_state_dict", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        network = upstream.FeatureExtractorInceptionV3("inception", ["2048"])
    path = tmp_path_factory.mktemp("inception") / features.INCEPTION_FILE
    torch.save(network.state_dict(), path)
    return path, network


def test_inception_is_torch_fidelitys(inception_weights, monkeypatch):
    path, network = inception_weights
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    extractor = Inception(str(path))
    assert (extractor.metric_name, extractor.dim) == ("fid", 2048)
    colour, grey = random_images(2, channels=3), random_images(2)
    assert torch.equal(extractor(colour), network(colour)[0].double())
    assert torch.equal(extractor(grey), network(grey.expand(-1, 3, -1, -1))[0].double())


def test_inception_weights_are_checked_before_they_are_loaded(inception_weights, monkeypatch):
    path, _ = inception_weights
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("loaded unchecked"))
    with pytest.raises(UsageError, match="has SHA-256 .*, not 6726825d0af5"):
        Inception(str(path))
    with pytest.raises(UsageError, match="no Inception weights at .*elsewhere"):
        Inception(str(path) + ".elsewhere")


def test_inception_offline_says_where_the_file_goes(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        UsageError, match=f"no Inception weights at {tmp_path}/checkpoints/weights-inception.*no network"
    ):
        Inception()
