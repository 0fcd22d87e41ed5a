"""Conditions: their parts, who takes them, and what is refused before any work."""

import math

import pytest
import torch
from oracles import BatchedNoise
from torch import Tensor

from diffaccel.condition import (
    NULL,
    Condition,
    Kinds,
    KnownPixels,
    check_condition,
    check_kinds,
    join,
    labels_of,
    pixels_of,
)
from diffaccel.denoiser import Denoiser, GaussianDenoiser, KarrasDenoiser
from diffaccel.errors import UsageError
from diffaccel.nn import UNet
from diffaccel.nn.compiling import _filled
from diffaccel.nn.critic import MLPCritic, StyleGAN2Critic, r1_penalty
from diffaccel.noise import NoiseStreams
from diffaccel.prior import GaussianPrior
from diffaccel.process import Decoupled, EDMVarianceExploding, Prediction, Process, VariancePreserving, expand
from diffaccel.sampling import Sampler
from diffaccel.solver import SOLVERS

SHAPE = (3, 8, 8)
EVERYTHING = Condition(
    labels=torch.tensor([2, 0, 1]),
    tokens=torch.randn(3, 4, 5),
    valid=torch.ones(3, 4, dtype=torch.bool),
    image=torch.rand(3, *SHAPE) * 2 - 1,
    mask=(torch.rand(3, 1, 8, 8) < 0.5).float(),
)


def test_samples_are_selected_in_every_kind():
    features = (torch.randn(3, 2), torch.randn(3, 4, 1))
    chosen = EVERYTHING._replace(features=features).select(torch.tensor([2, 0]))
    pairs = zip((*chosen[:-1], *chosen.features), (*EVERYTHING[:-1], *features), strict=True)
    assert all(torch.equal(one, two[[2, 0]]) for one, two in pairs)
    assert chosen.size == 2
    assert EVERYTHING.select(slice(1, 2)).labels.tolist() == [0]


def test_dropped_kinds_are_null_and_the_others_stay():
    dropped = torch.tensor([True, False, True])
    found = EVERYTHING.drop(labels=dropped)
    assert found.labels.tolist() == [NULL, 0, NULL] and found[1:] == EVERYTHING[1:]
    found = EVERYTHING.drop(others=dropped)
    assert found.labels is EVERYTHING.labels
    for value, whole in zip(found[2:-1], EVERYTHING[2:-1], strict=True):
        assert not value[dropped].any() and torch.equal(value[1], whole[1])
    assert EVERYTHING._replace(valid=None).drop(others=dropped).valid.any(1).tolist() == [False, True, False]


def test_labels_of_no_class_are_the_null_class():
    like = torch.zeros(3)
    assert labels_of(Condition(labels=torch.tensor([2, NULL, 0])), 4, like).tolist() == [2, 4, 0]
    assert labels_of(torch.tensor([2, 4, 0]), 4, like).tolist() == [2, 4, 0]
    assert labels_of(None, 4, like).tolist() == labels_of(Condition(), 4, like).tolist() == [4, 4, 4]


def test_a_network_takes_what_it_says():
    takes = Kinds(classes=3, image=3)
    assert EVERYTHING.only(takes) == Condition(labels=EVERYTHING.labels, image=EVERYTHING.image)
    assert EVERYTHING.only(Kinds()) is None
    assert join(Condition(labels=EVERYTHING.labels), EVERYTHING.only(Kinds(mask=True))).mask is EVERYTHING.mask
    assert Kinds.taken_by(UNet(SHAPE, widths=[4], classes=3, image=2, mask=True)) == Kinds(3, image=2, mask=True)
    pixels = pixels_of(EVERYTHING, Kinds(image=3, mask=True), torch.zeros(3, *SHAPE))
    assert torch.equal(pixels, torch.cat([EVERYTHING.image, EVERYTHING.mask], 1))
    with pytest.raises(UsageError, match=r"mask has shape \(3, 1, 4, 4\), the network takes \(3, 1, 8, 8\)"):
        pixels_of(Condition(mask=torch.ones(3, 1, 4, 4)), Kinds(mask=True), torch.zeros(3, *SHAPE))


def network(**keys: object) -> UNet:
    torch.manual_seed(0)
    unet = UNet(SHAPE, widths=[8], blocks=1, embedding=8, unshuffle=2, **keys)
    for parameter in unet.parameters():  # off zero
        torch.nn.init.normal_(parameter, std=0.2)
    return unet


def test_image_and_mask_reach_the_network_and_null_is_zero():
    """A condition of zeros, a dropped one and none give the same output; each other condition gives another."""
    unet, x, noise = network(image=3, mask=True, classes=3), torch.randn(3, *SHAPE), torch.rand(3)
    condition = EVERYTHING.only(unet.takes)
    found = unet(x, noise, condition)
    every = torch.ones(3, dtype=torch.bool)
    assert torch.equal(unet(x, noise), unet(x, noise, condition.drop(every, every)))
    for kind in ("labels", "image", "mask"):
        other = condition._replace(**{kind: getattr(condition, kind).roll(1, 0)})
        assert not torch.allclose(unet(x, noise, other), found, atol=1e-4)
    one = unet(x[[1]], noise[[1]], condition.select(torch.tensor([1])))
    torch.testing.assert_close(one, found[[1]], rtol=1e-4, atol=1e-4)


def test_widened_weights_are_the_unconditional_network_until_they_are_trained():
    """So that a trained unconditional network can begin a conditional one, also under the null condition."""
    plain, conditional = network(), network(image=3, mask=True, classes=4)
    conditional.load_state_dict(conditional.widened(plain.state_dict()))
    x, noise = torch.randn(3, *SHAPE), torch.rand(3)
    image, mask, labels = torch.randn(3, *SHAPE), torch.ones(3, 1, *SHAPE[1:]), torch.tensor([0, 3, -1])
    for condition in (Condition(labels, image=image, mask=mask), None):
        torch.testing.assert_close(conditional(x, noise, condition), plain(x, noise))


def test_a_compiled_batch_is_filled_up_in_every_kind():
    filled = _filled(EVERYTHING, 3, 5)
    assert isinstance(filled, Condition) and filled.size == 5
    assert torch.equal(filled.image[3:], EVERYTHING.image[:1].expand(2, -1, -1, -1))


@pytest.mark.parametrize("kind", [StyleGAN2Critic, MLPCritic])
def test_a_critic_sees_the_condition_and_r1_the_sample_alone(kind: type):
    torch.manual_seed(0)
    critic = kind(SHAPE, image=3, mask=True)
    x, condition = torch.randn(3, *SHAPE), EVERYTHING.only(Kinds(image=3, mask=True))
    logits = critic(x, condition)
    assert not torch.allclose(critic(x, condition._replace(image=-condition.image)), logits, atol=1e-4)
    scaled = condition._replace(image=condition.image * 1.0)
    scaled.image.requires_grad_()
    penalty = r1_penalty(lambda seen: critic.logits(seen, scaled), critic.seen(x, scaled), 2.0)
    seen = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(seen, condition).sum(), seen)
    torch.testing.assert_close(penalty.float(), gradient.square().flatten(1).sum(1))


# --- The observed part


class Blurred(Denoiser):
    """A wrong denoiser with the image's true part added: E[x_0] is 0.3 everywhere."""

    ratio_range = (0.0, math.inf)

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Prediction:
        x_0 = torch.full_like(x_t, 0.3)
        alpha, sigma = expand(self.process.alpha(t), x_t), expand(self.process.sigma(t), x_t)
        return Prediction(x_0, (x_t - alpha * x_0) / sigma)


@pytest.mark.parametrize("process", [VariancePreserving(), EDMVarianceExploding(), Decoupled()], ids=repr)
def test_known_pixels_are_imposed_and_the_state_stays_that_of_the_prediction(process: Process):
    """x_t = alpha x_0 + sigma eps before and after, also at infinite ratio."""
    condition = EVERYTHING.only(Kinds(image=3, mask=True))
    top = process.ratio(torch.tensor(process.t_max, dtype=torch.float64))
    t = process.time(torch.stack([torch.tensor(0.05).double(), torch.tensor(1.0).double(), top]))
    x_t = torch.randn(3, *SHAPE, dtype=torch.float64)
    free, prediction = Blurred(process)(x_t, t), Blurred(process).given(condition, KnownPixels())(x_t, t)
    known = condition.mask.expand(3, *SHAPE) > 0
    assert torch.equal(prediction.x_0[known], condition.image.double()[known])
    assert torch.equal(prediction.x_0[~known], free.x_0[~known])
    assert torch.equal(prediction.eps[~known], free.eps[~known])
    alpha, sigma = expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)
    torch.testing.assert_close(alpha * prediction.x_0 + sigma * prediction.eps, alpha * free.x_0 + sigma * free.eps)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp2m", "unipc3", "bridge", "pc", "euler_maruyama", "rk45"])
def test_any_solver_keeps_known_pixels(name: str):
    """Also solvers that end above ratio 0, or add noise: to the bit, in 8-bit images."""
    values = torch.randint(256, (5, *SHAPE), dtype=torch.uint8)
    mask = (torch.rand(5, 1, 8, 8) < 0.6).float()
    condition = Condition(image=(values.float() / 127.5 - 1) * mask, mask=mask)

    class Takes(GaussianDenoiser):
        takes = Kinds(image=3, mask=True)

    denoiser = Takes(torch.zeros(SHAPE), 0.25, VariancePreserving())
    keys = {"denoise": False} if name in ("heun", "pc") else {"tol": 0.1} if name == "rk45" else {}
    sampler = Sampler(denoiser, GaussianPrior(), SOLVERS.build({"name": name, **keys}), SHAPE)
    images = sampler(5, math.inf if name == "rk45" else 9, condition=condition, batch_size=2)
    known = mask.expand(5, *SHAPE) > 0
    assert torch.equal(images[known], values[known])
    assert (images[~known].float() - values[~known]).abs().mean() > 10


def test_start_and_end_of_the_observed_part_are_exact():
    """The states that any prior starts from have the law of the diffused image where it is known."""
    from diffaccel.sampling.conditions import Observed

    process, n = VariancePreserving(), 4000
    condition = Condition(image=torch.full((n, 1, 2, 2), 0.7), mask=torch.tensor([[1.0, 0], [0, 1]]).expand(n, 1, 2, 2))
    observed = Observed.of(None, condition)
    t = process.time(torch.full((n,), 0.8, dtype=torch.float64))
    denoiser = GaussianDenoiser(torch.zeros(1, 2, 2), 1.0, process)
    x_t = observed.start(denoiser, torch.full((n, 1, 2, 2), 5.0), t, BatchedNoise(n))
    known = condition.mask > 0
    assert (x_t[~known] == 5).all()
    mean, std = process.alpha(t)[0].item() * 0.7, process.sigma(t)[0].item()
    assert x_t[known].mean().item() == pytest.approx(mean, abs=4 * std / (2 * n) ** 0.5)
    assert x_t[known].std().item() == pytest.approx(std, rel=0.05)
    assert (observed.end(x_t)[known] == 0.7).all()


# --- What is refused


def sampler_of(unet: UNet) -> Sampler:
    return Sampler(KarrasDenoiser(unet, EDMVarianceExploding()), GaussianPrior(), "ddim", SHAPE)


def test_conditions_that_cannot_be_used():
    whole = Condition(image=torch.zeros(2, *SHAPE), mask=torch.ones(2, 1, 8, 8))
    conditional = sampler_of(network(image=3, mask=True, classes=3))
    with pytest.raises(
        UsageError, match="the network takes labels of 3 classes and an image of 3 channels and a mask: "
    ):
        conditional(2, nfe=2)
    for condition, words in (
        (whole._replace(mask=None), "mask is missing: give it"),
        (whole._replace(mask=torch.ones(2, 1, 4, 4)), r"mask has shape \(2, 1, 4, 4\), it must be \(2, 1, 8, 8\)"),
        (whole._replace(mask=torch.full((2, 1, 8, 8), 0.5)), "the mask must consist of 0 and 1"),
        (whole._replace(labels=torch.tensor([0, 3])), "labels must be whole numbers from 0 to 2, or -1 for no class"),
        (whole._replace(tokens=torch.zeros(2, 4, 5)), "but tokens is given: leave it out"),
        (whole.select(slice(0, 1)), r"image has shape \(1, 3, 8, 8\)"),
        (whole._replace(valid=torch.ones(2, 4, dtype=torch.bool)), "but valid is given: leave it out"),
        (whole._replace(image=whole.image.to(torch.uint8)), r"image \(torch.uint8\) must be floating-point numbers"),
        (whole._replace(image=whole.image + math.nan), "without NaN or infinity"),
        (whole._replace(image=whole.image + 255), r"image has values up to 255, it must be in \[-1, 1\]"),
        (whole._replace(image=whole.image.numpy()), "image is of type ndarray, it must be a tensor"),
        (whole._replace(labels=[0, 1]), "labels is of type list, it must be a tensor"),
        (whole._replace(labels=torch.zeros(2)), "labels must be whole numbers from 0 to 2"),
    ):
        with pytest.raises(UsageError, match=words):
            conditional(2, nfe=2, condition=condition)
    words_only = sampler_of(network(tokens=5, attention=[0]))
    for valid, words in (
        (torch.ones(2, 3, dtype=torch.bool), r"valid has shape \(2, 3\), it must be \(2, 4\)"),
        (torch.ones(2, 4), r"valid is torch.float32, it must be torch.bool"),
    ):
        with pytest.raises(UsageError, match=words):
            words_only(2, nfe=2, condition=Condition(tokens=torch.zeros(2, 4, 5), valid=valid))
    words_only.denoiser.network.null_others = False
    with pytest.raises(UsageError, match="a sample has no valid token, but this network was trained with tokens only"):
        words_only(2, nfe=2, condition=Condition(None, torch.zeros(2, 4, 5), torch.zeros(2, 4, dtype=torch.bool)))
    with pytest.raises(UsageError, match="condition: the network takes no condition: leave it out"):
        sampler_of(network())(2, nfe=2, condition=whole)
    with pytest.raises(UsageError, match="condition: list is not a Condition"):
        conditional(2, nfe=2, condition=[1])
    with pytest.raises(UsageError, match="labels: the network has no classes: leave them out"):
        sampler_of(network(image=3, mask=True))(2, nfe=2, condition=whole, labels=[0, 1])


def test_kinds_are_checked_before_work():
    for takes, given, words in (
        (Kinds(image=3), Kinds(), r"takes an image of 3 channels, but X gives no condition: set condition="),
        (Kinds(), Kinds(image=3), r"takes no condition, but X gives an image of 3 channels: set network.image=3,"),
        (Kinds(image=3), Kinds(image=3, mask=True), r"gives an image of 3 channels and a mask: set network.mask=true,"),
    ):
        with pytest.raises(UsageError, match=words):
            check_kinds(takes, given, "X")
    check_kinds(Kinds(classes=10, image=1), Kinds(image=1), "X")
    check_condition(EVERYTHING.only(Kinds(3, 5, 3, True)), Kinds(3, 5, 3, True), 3, SHAPE)


def test_labels_that_a_given_condition_leaves_out_are_null():
    """Labels by index would contradict the user's image."""
    sampler, image = sampler_of(network(image=3, classes=3)), torch.randn(4, *SHAPE).tanh()
    null = sampler(4, nfe=2, condition=Condition(image=image))
    assert torch.equal(null, sampler(4, nfe=2, condition=Condition(image=image, labels=torch.full((4,), NULL))))
    labelled = sampler(4, nfe=2, condition=Condition(image=image), labels=[2, 2, 2, 2])
    assert not torch.equal(null, labelled)
    of_bytes = torch.full((4,), 2, dtype=torch.uint8)
    assert torch.equal(labelled, sampler(4, nfe=2, condition=Condition(image=image, labels=of_bytes)))
    with pytest.raises(UsageError, match="labels: the condition has labels too: leave one of them out"):
        sampler(4, nfe=2, condition=Condition(image=image, labels=of_bytes), labels=[1, 2, 1, 2])
    sampler.denoiser.network.null_class = sampler.denoiser.network.null_labels = False
    for labels in (None, torch.tensor([0, NULL, 1, 2])):
        with pytest.raises(UsageError, match="labels are missing or -1, but this network was trained with labels only"):
            sampler(4, nfe=2, condition=Condition(image=image, labels=labels))
    sampler(4, nfe=2, condition=Condition(image=image), labels=[0, 1, 2, 1])


class HeldOutImages:
    """Held-out images by index: each has another grey level, and a class of its own."""

    kinds, observation, token_count, samples = Kinds(image=3), None, 0, 1

    def __init__(self, labels: Tensor | None) -> None:
        self.known = labels

    def check(self, n: int) -> None: ...

    def prepare(self) -> None: ...

    def condition(self, indices: range) -> Condition:
        return Condition(image=torch.stack([torch.full(SHAPE, index / 10) for index in indices]))

    def labels(self, indices: range) -> Tensor | None:
        return None if self.known is None else self.known[indices.start : indices.stop]


def test_images_by_index_have_the_labels_of_their_conditions():
    """Labels in turn would contradict the images, on which the network was trained with theirs."""
    sampler, own = sampler_of(network(image=3, classes=3)), torch.tensor([2, 2, 0, 1])
    sampler.inputs = HeldOutImages(own)
    plan, image = sampler.plan(2, 4), sampler.inputs.condition(range(4)).image
    assert torch.equal(sampler.condition(plan, range(1, 4)).labels, own[1:])
    assert torch.equal(sampler.classes_of(plan, 4), own)
    by_index = sampler(4, nfe=2)
    assert torch.equal(by_index, sampler(4, nfe=2, condition=Condition(image=image, labels=own)))
    assert torch.equal(
        sampler(4, nfe=2, labels=[1, 0, 1, 0]), sampler(4, 2, 0, [1, 0, 1, 0], None, Condition(image=image))
    )
    sampler.inputs = HeldOutImages(own + 1)
    with pytest.raises(UsageError, match="labels up to 3, but the network has 3 classes: set network.classes=4"):
        sampler(4, nfe=2)
    sampler.inputs = HeldOutImages(None)
    assert sampler.classes_of(plan, 4) is None
    assert torch.equal(sampler(4, nfe=2), sampler(4, nfe=2, condition=Condition(image=image)))
    sampler.denoiser.network.null_class = False
    with pytest.raises(UsageError, match="condition of the images has no labels, but this network was trained with"):
        sampler(4, nfe=2)
    assert sampler(4, nfe=2, labels=[1, 0, 1, 0]).shape == (4, *SHAPE)


def test_pixels_in_holes_are_not_shown_to_the_network():
    """Networks are trained with 0 there; the rest of the user's image must not leak through the mask."""
    sampler, image = sampler_of(network(image=3, mask=True)), torch.rand(2, *SHAPE) * 2 - 1
    mask = (torch.rand(2, 1, 8, 8) < 0.5).float()
    whole, hidden = (sampler(2, nfe=2, condition=Condition(image=one, mask=mask)) for one in (image, image * mask))
    assert torch.equal(whole, hidden)


def test_a_part_of_the_batch_has_its_part_of_the_condition():
    sampler, image = sampler_of(network(image=3)), torch.randn(5, *SHAPE).tanh()
    whole = sampler(5, nfe=3, condition=Condition(image=image))
    parts = sampler(5, nfe=3, condition=Condition(image=image), batch_size=2)
    assert (whole.int() - parts.int()).abs().max() <= 1


def test_noise_of_images_is_the_same_with_a_condition():
    """The stream of an image continues after the start, so that priors see the same noise."""
    noise = NoiseStreams(0, range(2))
    plain, _ = GaussianPrior()(GaussianDenoiser(torch.zeros(SHAPE), 1.0), noise, SHAPE)
    again, _ = GaussianPrior()(
        GaussianDenoiser(torch.zeros(SHAPE), 1.0).given(EVERYTHING.select(slice(0, 2))),
        NoiseStreams(0, range(2)),
        SHAPE,
    )
    assert torch.equal(plain, again)
