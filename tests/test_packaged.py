"""Extractors on weights that other packages ship, against independent evaluations of their architectures.

The golden values are means over eight groups of 160 features. They were computed in float64 on images that PIL
resized, for EfficientNet-Lite0 by the package efficientnet-lite-pytorch, and for MobileNetV2 by torchvision's module,
which takes the tensors in their order.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from judged import golden_images
from torch import nn
from torchvision.models import mobilenet_v2

from benchmarks.distances import features_of, noisy
from diffaccel.errors import UsageError
from diffaccel.features import packaged
from diffaccel.features.extractors import EXTRACTORS
from diffaccel.features.jpeg import AsJPEG
from diffaccel.features.packaged import EfficientNetLite0, MobileNetV2
from diffaccel.metrics import KernelReference, kernel_distance
from diffaccel.nn.mobile import EFFICIENTNET_LITE0, MOBILENET_V2, Mobile, assign_in_order

JUDGES = {"efficientnet_lite0": EfficientNetLite0, "mobilenetv2": MobileNetV2}
GOLDEN = {
    ("efficientnet_lite0", 112, "bicubic"): [
        [0.1252, 0.1504, 0.107, 0.0988, 0.1673, 0.2061, 0.1564, 0.2347],
        [0.0541, 0.0471, 0.1466, 0.0683, 0.0703, 0.0689, 0.0459, 0.0699],
        [0.1822, 0.1836, 0.2855, 0.1966, 0.2237, 0.2526, 0.2634, 0.2683],
    ],
    ("mobilenetv2", 112, "bicubic"): [
        [0.3297, 0.2497, 0.4107, 0.2692, 0.2113, 0.2802, 0.3271, 0.3014],
        [0.2925, 0.2958, 0.3236, 0.3409, 0.2995, 0.2922, 0.3629, 0.2986],
        [0.307, 0.2555, 0.3155, 0.2169, 0.3005, 0.2557, 0.2646, 0.1901],
    ],
    ("efficientnet_lite0", 97, "bilinear"): [
        [0.2248, 0.1628, 0.1296, 0.1134, 0.2613, 0.309, 0.1843, 0.2477],
        [0.0868, 0.0749, 0.1498, 0.0698, 0.0662, 0.1121, 0.0657, 0.0749],
        [0.0942, 0.1248, 0.1472, 0.0699, 0.1627, 0.1465, 0.1879, 0.1437],
    ],
    ("mobilenetv2", 97, "bilinear"): [
        [0.3665, 0.348, 0.4289, 0.345, 0.2921, 0.3823, 0.3252, 0.357],
        [0.4634, 0.6198, 0.5303, 0.5993, 0.4931, 0.5308, 0.5981, 0.4775],
        [0.391, 0.4979, 0.4717, 0.4306, 0.4165, 0.4574, 0.4819, 0.4365],
    ],
}


def installed(name: str) -> bool:
    try:
        distribution(JUDGES[name].shipped.package)
    except PackageNotFoundError:
        return False
    return True


@pytest.fixture(params=JUDGES)
def name(request: pytest.FixtureRequest) -> str:
    """A judge whose weights are installed, as `make setup` does."""
    if not installed(request.param):
        pytest.skip(f"{JUDGES[request.param].shipped.package} is not installed")
    return request.param


@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_features_are_those_of_an_independent_evaluation(golden):
    judge, resolution, resize = golden
    if not installed(judge):
        pytest.skip(f"{JUDGES[judge].shipped.package} is not installed")
    extractor = EXTRACTORS.build({"name": judge, "resolution": resolution, "resize": resize})
    found = extractor(golden_images())
    assert found.shape == (3, 1280) and found.dtype == torch.float64
    groups = found.reshape(3, 8, 160).mean(2)
    torch.testing.assert_close(groups, torch.tensor(GOLDEN[golden]).double(), rtol=0, atol=1e-4)


def test_the_architecture_is_torchvisions():
    """On any weights and odd sizes, tensors taken in their order; with and without the merged batch norms."""
    theirs, ours = mobilenet_v2(weights=None).eval(), Mobile(MOBILENET_V2).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    assign_in_order(ours, list(theirs.features.state_dict().values()))
    x = torch.randn(2, 3, 45, 64)
    with torch.no_grad():
        expected = theirs.features(x).mean((2, 3))
        torch.testing.assert_close(ours(x), expected)
        torch.testing.assert_close(ours.fused()(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())


@pytest.mark.parametrize(("size", "before"), [(7, 1), (8, 0)])
def test_tensorflows_padding_depends_on_the_size(size, before):
    """An odd size is padded on both sides, an even one below and to the right alone."""
    (conv,) = [module for name, module in Mobile(EFFICIENTNET_LITE0, same=True).named_modules() if name == "stem.conv"]
    nn.init.ones_(conv.weight)
    counts = conv(torch.ones(1, 3, size, size))[0, 0]
    assert counts.shape == (4, 4)
    assert counts[0, 0] == 3 * (3 - before) ** 2 and counts[-1, -1] == 3 * 2**2


def test_other_tensors_are_not_assigned():
    network = Mobile(MOBILENET_V2)
    tensors = list(network.state_dict().values())
    for wrong in (tensors[:-1], [*tensors[:-2], torch.zeros(3), tensors[-1]]):
        with pytest.raises(ValueError, match="other shapes"):
            assign_in_order(network, wrong)


def test_identity_is_weights_resolution_and_resize(name):
    plain = EXTRACTORS.build(name)
    others = [EXTRACTORS.build({"name": name, **keys}) for keys in ({"resolution": 96}, {"resize": "bilinear"})]
    assert plain.weights_sha256 == JUDGES[name].shipped.sha256
    assert plain.sha256 == hashlib.sha256(f"{plain.weights_sha256} bicubic 112".encode()).hexdigest()
    assert len({one.sha256 for one in (plain, *others)}) == 3, "features of other resolutions do not compare"
    assert {one.weights_sha256 for one in (*others, AsJPEG(plain, 75))} == {plain.weights_sha256}
    assert (plain.name, plain.metric_name, plain.dim) == (name, f"fd_{name}", 1280)
    assert [one.name for one in others] == [f"{name}_bicubic96", f"{name}_bilinear112"]


def test_grey_images_batches_and_train_mode(name):
    extractor = EXTRACTORS.build(name)
    grey = golden_images()[:, :1]
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))
    many = golden_images().repeat(10, 1, 1, 1)
    whole = extractor.train()(many)
    torch.testing.assert_close(whole, torch.cat([extractor(part) for part in many.split(7)]), rtol=0, atol=1e-5)
    assert not whole.requires_grad and not any(parameter.requires_grad for parameter in extractor.parameters())
    with pytest.raises(UsageError, match="reads uint8 images"):
        extractor(many / 255)


def test_noise_that_nobody_sees_is_seen(name):
    """Noise of 4 in 255 moves the kernel distance by more than three standard errors."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(400, 3, 5, 5, generator=generator), 32, mode="bicubic")
    images = (255 * smooth).clamp(0, 255).to(torch.uint8)
    extractor = EXTRACTORS.build({"name": name, "resolution": 64})
    real = KernelReference(features_of(images[:200], extractor))
    clean, weak, strong = (kernel_distance(features_of(noisy(images[200:], std), extractor), real) for std in (0, 4, 8))
    assert weak.kid - clean.kid > 3 * (weak.se**2 + clean.se**2) ** 0.5
    assert strong.kid > weak.kid


@pytest.fixture(params=JUDGES.values(), ids=JUDGES)
def judge(request: pytest.FixtureRequest):
    return request.param


def refused(judge: type, path: Path | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        judge(path)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(judge.shipped.install) and repr(judge.kind) in message
    return message


def test_a_missing_package_is_one_line_with_the_remedy(judge, monkeypatch):
    def nowhere(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(packaged, "distribution", nowhere)
    assert f"the package {judge.shipped.package}, which is not installed" in refused(judge)
    for files in (None, [SimpleNamespace(name="other.pth")]):
        monkeypatch.setattr(packaged, "distribution", lambda package, files=files: SimpleNamespace(files=files))
        assert f"has no file {judge.shipped.file}" in refused(judge)


def test_a_listed_file_that_is_gone_is_one_line_with_the_remedy(judge, tmp_path, monkeypatch):
    gone = SimpleNamespace(name=judge.shipped.file, locate=lambda: tmp_path / "gone")
    monkeypatch.setattr(packaged, "distribution", lambda package: SimpleNamespace(files=[gone]))
    assert f"there are no weights at {tmp_path / 'gone'}" in refused(judge)


def test_another_file_is_refused_before_it_is_read(judge, tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "read_stream", lambda *args: pytest.fail("read unchecked"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    digest = hashlib.sha256((tmp_path / "other.pth").read_bytes()).hexdigest()[:12]
    said = refused(judge, tmp_path / "other.pth")
    assert f"has SHA-256 {digest}..., not {judge.shipped.sha256[:12]}..." in said
    assert "there are no weights at" in refused(judge, tmp_path / "none.pth")


def test_the_resolution_has_a_lower_bound(judge):
    with pytest.raises(UsageError, match="resolution"):
        judge(resolution=16)
