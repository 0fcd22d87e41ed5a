"""Degradations as conditions: what they compute, what they determine of an image, and their images in training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stored import RGB, N, data, save_folder, save_npz, training

from diffaccel.condition import Condition, Kinds
from diffaccel.data import ArrayImages, build_source
from diffaccel.data.conditions import CONDITIONERS, HeldOut, build_conditioner, round_to_8_bits
from diffaccel.data.resident import Chosen, ResidentImages
from diffaccel.data.stream import Stream, TrainingSet, coins, to_float
from diffaccel.errors import UsageError
from diffaccel.experiment.identity import _condition
from diffaccel.noise import NoiseStreams
from diffaccel.sampling.conditions import Observed
from diffaccel.tasks.inpainting import Inpainting
from diffaccel.tasks.linear import LUMA, Colourisation, SuperResolution, resizing

SHAPE = (3, 16, 16)
TASKS = [
    {"name": "super_resolution", "factor": 4},
    {"name": "super_resolution", "factor": 2, "kernel": "area"},
    {"name": "colourisation"},
    {"name": "inpainting"},
]
EACH = pytest.mark.parametrize("node", TASKS, ids=lambda node: f"{node['name']}_{node.get('kernel', '')}")


def images(n: int = 6) -> torch.Tensor:
    """Smooth ones, as photographs are, uint8."""
    coarse = torch.rand(n, 3, 4, 4) * 255
    return torch.nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bicubic").clamp(0, 255).round().to(torch.uint8)


def condition_of(node: dict[str, object], batch: torch.Tensor) -> Condition:
    conditioner = build_conditioner(node, SHAPE)
    index = torch.arange(len(batch))
    return conditioner.open("train", ArrayImages(batch))(batch, index, NoiseStreams(0, index))


# --- The degradations


def test_area_is_the_mean_of_blocks_and_bicubic_is_pillows():
    batch = images().double()
    area = SuperResolution(SHAPE, factor=4, kernel="area").shrink(batch)
    torch.testing.assert_close(area, batch.unflatten(2, (4, 4)).unflatten(4, (4, 4)).mean((3, 5)))
    bicubic = SuperResolution(SHAPE, factor=4).shrink(batch)
    for image, small in zip(batch[:, 0], bicubic[:, 0], strict=True):
        own = Image.fromarray(image.numpy().astype(np.float32)).resize((4, 4), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(own) - small.numpy()).max() < 0.01


def test_resizing_keeps_a_constant():
    for kernel in ("area", "bicubic"):
        torch.testing.assert_close(resizing(12, 3, kernel).sum(1), torch.ones(3, dtype=torch.float64))


def test_grey_is_luma():
    batch = images()
    grey = condition_of({"name": "colourisation"}, batch).image
    expected = sum(weight * batch[:, i].double() for i, weight in enumerate(LUMA)).round()
    assert torch.equal(((grey[:, 0].double() + 1) * 127.5).round(), expected)
    assert torch.equal(grey[:, 0], grey[:, 2])


@EACH
def test_the_observed_part_is_a_projection_that_keeps_the_image(node: dict[str, object]):
    """P is idempotent and symmetric, and P x is P of the condition's image, up to rounding to 8 bits."""
    batch = images()
    condition, x = condition_of(node, batch), to_float(batch).double()
    observation = build_conditioner(node, SHAPE).observation
    zero, one, other = torch.zeros_like(x), torch.randn_like(x), torch.randn_like(x)

    def project(value: torch.Tensor) -> torch.Tensor:
        return observation.impose(zero, value, condition)

    torch.testing.assert_close(project(project(one)), project(one))
    torch.testing.assert_close((project(one) * other).flatten(1).sum(1), (one * project(other)).flatten(1).sum(1))
    assert (project(x) - project(condition.image.double())).abs().max() < 1.5 / 127.5
    assert (project(one) - one).abs().max() > 0.1
    imposed = observation.impose(one, condition.image.double(), condition)
    torch.testing.assert_close(project(imposed), project(condition.image.double()))
    torch.testing.assert_close(imposed - project(imposed), one - project(one))
    assert ((imposed - x).square().mean() < (one - x).square().mean()).item(), "the error falls"


@EACH
def test_imposed_images_degrade_to_the_condition(node: dict[str, object]):
    batch = images()
    conditioner, condition = build_conditioner(node, SHAPE), condition_of(node, batch)
    imposed = conditioner.observation.impose(torch.randn(6, *SHAPE), condition.image, condition)
    again = conditioner.observe(imposed)
    if again is None:  # inpainting
        known = condition.mask.expand(6, *SHAPE) > 0
        assert torch.equal(imposed[known], to_float(batch)[known])
    else:
        small = conditioner.observe(condition.image)
        torch.testing.assert_close(again, small, atol=1e-5, rtol=1e-5)
        eight_bits = (small + 1) * 127.5
        torch.testing.assert_close(eight_bits, eight_bits.round(), atol=1e-3, rtol=0)


@EACH
def test_mixed_precision_changes_neither_condition_nor_projection(node: dict[str, object]):
    """In bfloat16, whose error at 1 is half a level of 8 bits, samples would not degrade to the small image."""
    batch, x = images(), torch.randn(6, *SHAPE)
    observation = build_conditioner(node, SHAPE).observation
    condition = condition_of(node, batch)
    imposed = observation.impose(x, condition.image, condition)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = condition_of(node, batch)
        again = observation.impose(x, mixed.image, mixed)
    assert torch.equal(mixed.image, condition.image) and torch.equal(again, imposed)


def test_imposing_on_samples_does_not_change_the_condition():
    """Weights were trained with one condition, and may be sampled with or without imposing."""
    node, batch = {"name": "super_resolution", "factor": 4}, images()
    one, other = (condition_of({**node, "impose": impose}, batch).image for impose in (True, False))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kernel", ["bicubic", "area"])
def test_the_condition_of_a_small_image_is_that_of_the_whole_image(kernel: str):
    conditioner, batch = SuperResolution(SHAPE, 4, kernel), to_float(images())
    small = round_to_8_bits(conditioner.shrink(batch))
    made = conditioner.degrade(batch, NoiseStreams(0, range(len(batch))))
    torch.testing.assert_close(conditioner.of_small(small).image, made.image)
    with pytest.raises(UsageError, match="small images have shape"):
        conditioner.of_small(batch)


def test_the_enlarged_image_is_near_bicubic():
    batch = images()
    conditioner, condition = SuperResolution(SHAPE, factor=4), condition_of(TASKS[0], batch)
    bicubic = conditioner.baseline(condition)
    own = Image.fromarray(conditioner.shrink(condition.image)[0, 0].numpy()).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(own)[4:-4, 4:-4] - bicubic[0, 0, 4:-4, 4:-4].numpy()).max() < 0.1  # another a, -0.75
    errors = [(one - to_float(batch)).square().mean().item() for one in (condition.image, bicubic)]
    assert errors[0] < errors[1], "the correction by the small image brings it nearer to the image"


# --- Masks


def test_masks_belong_to_the_image_and_the_seed():
    task, size = Inpainting(SHAPE), (32, 32)
    whole = task.mask(NoiseStreams(1, range(20)), *size, torch.device("cpu"))
    parts = [task.mask(NoiseStreams(1, part), *size, torch.device("cpu")) for part in (range(7), range(7, 20))]
    assert torch.equal(torch.cat(parts), whole)
    other = task.mask(NoiseStreams(2, range(20)), *size, torch.device("cpu"))
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    assert len({mask.numpy().tobytes() for mask in whole}) == 20
    assert set(whole.unique().tolist()) == {0.0, 1.0}


def test_holes_grow_with_width_and_strokes():
    def share(**keys: float) -> float:
        masks = Inpainting(SHAPE, **keys).mask(NoiseStreams(0, range(200)), 32, 32, torch.device("cpu"))
        return (1 - masks).mean().item()

    assert 0.15 < share() < 0.4
    assert share(width=0.1) < share() < share(width=0.4)
    assert share(strokes=1) < share() < share(strokes=8)
    assert share(width=1e-6) == 0


def test_a_stroke_is_where_its_segment_is():
    """One segment: its pixels are within half a width of a straight line, and its area is that of a capsule."""
    masks = Inpainting(SHAPE, strokes=1, segments=1, length=0.2, width=0.1)
    hole = 1 - masks.mask(NoiseStreams(0, range(400)), 128, 128, torch.device("cpu"))[:, 0].double()
    inside = hole[:, [0, -1]].flatten(1).sum(1) + hole[:, :, [0, -1]].flatten(1).sum(1) == 0  # not cut off
    area = hole[inside].flatten(1).sum(1)
    low_radius, high_radius, low_reach, high_reach = 3.2, 6.4, 6.4, 25.6
    assert area.min() > 0.9 * (math.pi * low_radius**2 + 2 * low_radius * low_reach)
    assert area.max() < 1.1 * (math.pi * high_radius**2 + 2 * high_radius * high_reach)


# --- In training


@EACH
def test_conditions_are_those_of_the_mirrored_images(node: dict[str, object], tmp_path: Path):
    """Whatever the number of ranks; masks are drawn anew in each epoch."""
    path = save_npz(tmp_path / "images.npz", images=images(N).permute(0, 2, 3, 1).numpy())
    keys = {"batch_size": 6, "flip": True, "seed": 3}
    module = data("npz", path=path, module={**keys, "conditioner": build_conditioner(node, SHAPE)})
    batches = training(module, 5)
    for batch in batches:
        stored = ((batch.image + 1) * 127.5).round().to(torch.uint8)
        made = build_conditioner(node, SHAPE).degrade(to_float(stored), NoiseStreams(3, batch.index, "condition"))
        assert torch.equal(batch.condition.image, made.image)
        assert batch.condition.mask is None or torch.equal(batch.condition.mask, made.mask)
        assert batch.condition.labels is None
    ranks = [
        training(data("npz", path=path, module={**keys, "conditioner": build_conditioner(node, SHAPE)}), 5, r, 2)
        for r in range(2)
    ]
    for step, batch in enumerate(batches):
        assert torch.equal(torch.cat([rank[step].condition.image for rank in ranks]), batch.condition.image)
    if node["name"] == "inpainting":
        masks = torch.cat([batch.condition.mask for batch in batches])
        assert len({mask.numpy().tobytes() for mask in masks}) == len(masks) > N


def test_resident_images_have_the_same_conditions(tmp_path: Path):
    for node in TASKS:
        batch, index = images(8), torch.arange(40, 48)
        make = build_conditioner(node, SHAPE).open("train", ArrayImages(batch))
        resident = ResidentImages(ArrayImages(batch), torch.device("cpu"), True, 5, make=make)
        stream = Stream(8, 5)
        read = TrainingSet(ArrayImages(batch), stream, True, make).__getitems__(index.tolist())
        found = resident.gather(Chosen(stream(index), index))
        assert torch.equal(found.image, read.image) and torch.equal(found.condition.image, read.condition.image)


def test_pairs_of_folders(tmp_path: Path):
    """The condition is the file of the same name, mirrored with its image."""
    grey = RGB[..., :1].repeat(1, -1)
    target = save_folder(tmp_path / "maps", grey[..., 0])
    source = {"name": "folder", "path": save_folder(tmp_path / "photographs"), "labels": False}
    conditioner = build_conditioner({"name": "paired", "source": source}, (1, *RGB.shape[1:3]))
    assert conditioner.kinds == Kinds(image=3) and conditioner.observation is None
    module = data(
        "folder", path=target, labels=False, module={"batch_size": 5, "flip": True, "conditioner": conditioner}
    )
    for batch in training(module, 4):
        chosen = Stream(N)(batch.index)
        flipped = coins(batch.index, 0)
        for image, condition, index, mirror in zip(batch.image, batch.condition.image, chosen, flipped, strict=True):
            photograph = torch.from_numpy(RGB[index]).permute(2, 0, 1)
            photograph = photograph.flip(-1) if mirror else photograph
            assert torch.equal(condition, to_float(photograph[None])[0])
            torch.testing.assert_close(image[0], condition[0])
    with pytest.raises(UsageError, match="data.resident=true: the conditions are read from files"):
        data("folder", path=target, resident=True, module={"conditioner": conditioner})


def test_other_photographs_at_the_same_place_are_other_conditions(tmp_path: Path):
    """So that a point is measured again; the place of the photographs is no part of it."""
    target, photographs = save_folder(tmp_path / "maps"), Path(save_folder(tmp_path / "photographs"))

    def identity(path: Path) -> dict[str, object]:
        keys = {"name": "paired", "source": {"name": "folder", "path": str(path), "labels": False}}
        source = build_source({"name": "folder", "path": target, "test_path": target, "labels": False})
        keys["source"]["test_path"] = str(path)
        assert "path" not in str(_condition(keys))
        return HeldOut(build_conditioner(keys, (3, *RGB.shape[1:3])), source).identity(N)

    before = identity(photographs)
    assert identity(photographs) == before
    assert identity(photographs.rename(tmp_path / "moved")) == before
    save_folder(tmp_path / "moved", 255 - RGB)
    assert identity(tmp_path / "moved") != before


def test_pairs_under_a_limit(tmp_path: Path):
    """The condition of an image is the same with a limit as without it, also if the order alone pairs them."""
    own, others = save_npz(tmp_path / "own.npz", images=RGB), save_npz(tmp_path / "others.npz", images=255 - RGB)
    images = data("npz", path=own, module={"limit": 4}).images("train")
    open_ = build_conditioner({"name": "paired", "source": {"name": "npz", "path": others}}, (3, *RGB.shape[1:3])).open
    index = torch.arange(4)
    condition = open_("train", images)(images.read(index), index, NoiseStreams(0, range(4)))
    torch.testing.assert_close(condition.image, -to_float(images.read(index)))


def test_pairs_that_are_none(tmp_path: Path):
    target = data("folder", path=save_folder(tmp_path / "maps"), labels=False).images("train")
    few = {"name": "npz", "path": save_npz(tmp_path / "few.npz", images=RGB[:5])}
    with pytest.raises(UsageError, match=r"few.npz .train. has 5 images .* for 12 images that require"):
        build_conditioner({"name": "paired", "source": few}, (3, *RGB.shape[1:3])).open("train", target)
    half = data("folder", path=save_folder(tmp_path / "half", RGB[:6]), labels=False, module={"limit": 3})
    more = {"name": "npz", "path": save_npz(tmp_path / "more.npz", images=RGB)}
    with pytest.raises(UsageError, match=r"more.npz .train. has 12 images .* for 6 images that require"):
        build_conditioner({"name": "paired", "source": more}, (3, *RGB.shape[1:3])).open("train", half.images("train"))
    small = {"name": "npz", "path": save_npz(tmp_path / "small.npz", images=RGB[:, :2])}
    with pytest.raises(UsageError, match="set condition.channels, image_size in both sources"):
        build_conditioner({"name": "paired", "source": small}, (3, *RGB.shape[1:3])).open("train", target)
    renamed = Path(save_folder(tmp_path / "renamed"))
    first = sorted(renamed.rglob("*.png"))[0]
    first.rename(first.with_name("0000_other.png"))
    other = {"name": "folder", "path": str(renamed), "labels": False}
    with pytest.raises(UsageError, match="has '0000_other' where the images have"):
        build_conditioner({"name": "paired", "source": other}, (3, *RGB.shape[1:3])).open("train", target)


# --- In sampling


def held_out(tmp_path: Path, n: int = 5, **keys: int) -> HeldOut:
    torch.manual_seed(0)
    test = images(n)
    path = save_npz(tmp_path / "test.npz", images=test.permute(0, 2, 3, 1).numpy())
    source = build_source({"name": "npz", "path": path, "test_path": path})
    return HeldOut(build_conditioner({"name": "inpainting"}, SHAPE), source, **keys)


def test_samples_of_an_image_are_in_succession(tmp_path: Path):
    """Sample i has the condition of the test image at i // samples of the order, in any batch, made once."""
    one, three = held_out(tmp_path), held_out(tmp_path, samples=3)
    expected = one.condition(range(5)).select(torch.arange(15) // 3)
    for span in (range(15), range(4, 11), range(7, 8)):
        found = three.condition(span)
        assert torch.equal(found.image, expected.image[span.start : span.stop])
        assert torch.equal(found.mask, expected.mask[span.start : span.stop])
        assert torch.equal(three.targets(span), one.targets(range(5))[torch.arange(15)[span.start : span.stop] // 3])
    assert not torch.equal(held_out(tmp_path, seed=1).condition(range(5)).mask, one.condition(range(5)).mask)
    assert one.identity(5)["sha256"] == three.identity(15)["sha256"] != one.identity(4)["sha256"]


def test_the_first_samples_are_typical_of_sorted_files(tmp_path: Path):
    """Every test image is used once; the first hundred of a thousand are spread over the file as random ones are."""
    inputs = held_out(tmp_path, n=1000)
    order = inputs.order
    assert torch.equal(order.sort().values, torch.arange(1000))
    counts = torch.bincount(order[:100] // 100, minlength=10)
    assert counts.min() >= 3 and counts.max() <= 20
    assert torch.equal(inputs.targets(range(20, 30)), inputs._open()[0].read(order[20:30]))
    assert not torch.equal(held_out(tmp_path, n=1000, seed=1).order, order)


def test_too_few_test_images(tmp_path: Path):
    held_out(tmp_path, samples=4).check(20)
    with pytest.raises(UsageError, match=r"n=21 with 4 sample\(s\) per image requires 6 .* has 5: set n=20 or less"):
        held_out(tmp_path, samples=4).check(21)
    with pytest.raises(UsageError, match="samples=0"):
        held_out(tmp_path, samples=0)


@pytest.mark.parametrize(("node", "words"), [
    ({"name": "super_resolution", "factor": 3}, "factor=3 must be 2 or more and divide images of 16x16"),
    ({"name": "super_resolution", "kernel": "cubic"}, "kernel: Invalid value 'cubic', expected one of"),
    ({"name": "inpainting", "width": 0.0}, "must be positive"),
    ({"name": "inpaint"}, "no condition is called 'inpaint'; did you mean 'inpainting'"),
])  # fmt: skip
def test_tasks_that_are_refused(node: dict[str, object], words: str):
    with pytest.raises(UsageError, match=words):
        build_conditioner(node, SHAPE)
    with pytest.raises(UsageError, match="three channels, not 1"):
        Colourisation((1, 8, 8))
    assert build_conditioner({}, SHAPE) is None and set(CONDITIONERS) >= {task["name"] for task in TASKS}


def test_finished_images_are_consistent_within_the_range_of_pixels(tmp_path: Path):
    """Clamping alone would undo what is imposed: alternating projections are nearer to the small image."""
    torch.manual_seed(0)
    batch = (torch.rand(6, *SHAPE) < 0.5).to(torch.uint8) * 255
    condition, task = condition_of(TASKS[0], batch), SuperResolution(SHAPE, factor=4)
    observed = Observed(task.observation, condition)
    x = 2 * torch.randn(6, *SHAPE)
    small = task.shrink(condition.image)
    once = task.observation.impose(x, condition.image, condition).clamp(-1, 1)
    errors = [(task.shrink(one) - small).square().mean().sqrt().item() for one in (once, observed.end(x).clamp(-1, 1))]
    assert errors[1] < 0.3 * errors[0]
