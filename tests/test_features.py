import hashlib
import json
import urllib.error

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.nn import features
from diffaccel.nn.features import (
    EXTRACTORS,
    Identity,
    Inception,
    Small,
    SmallClassifier,
    augment,
    fit_extractor,
    load_classifier,
    save_classifier,
)


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
    with pytest.raises(UsageError, match="lower it"):
        fit_extractor(DigitSource(), batch_size=5000)


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
