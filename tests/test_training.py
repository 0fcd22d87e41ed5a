"""The training loop on digits: exact resume, schedules, counters, phases, and errors that name themselves."""

import copy
import dataclasses

import lightning as L
import pytest
import torch
from oracles import assemble
from torch import Tensor, nn

from diffaccel.data import Batch, DataModule
from diffaccel.denoiser import GaussianDenoiser, KarrasDenoiser
from diffaccel.denoiser.levels import LogNormal
from diffaccel.errors import UsageError
from diffaccel.methods import Diffusion, Phase, TrainedModule, Training
from diffaccel.nn.unet import UNet
from diffaccel.noise import NoiseStreams
from diffaccel.prior import GaussianPrior
from diffaccel.process import EDMVarianceExploding
from diffaccel.sampling import nearest
from diffaccel.solver.onestep import Heun
from diffaccel.training.speed import Speed

BATCH, STEPS, MIDDLE = 32, 24, 12


def diffusion(dropout: float = 0.1, **training) -> Diffusion:
    """The smallest U-Net, with dropout, so that the global generator matters too; the same weights each time."""
    torch.manual_seed(1)
    network = UNet((1, 8, 8), [8, 16], blocks=1, embedding=16, dropout=dropout)
    options = {"images": STEPS * BATCH, "warmup": 200, "ema_half_life": 300, **training}
    denoiser = KarrasDenoiser(network, EDMVarianceExploding())
    return assemble(Diffusion, denoiser, GaussianPrior(), Heun(), LogNormal(), Training(**options), (1, 8, 8), seed=4)


class SaveAt(L.Callback):
    """Writes a checkpoint once the module has taken some number of steps, in the middle of the run."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, *args):
        if pl_module.steps == self.step:
            trainer.save_checkpoint(self.path)


class Watch(L.Callback):
    """Calls a function of the module after each step."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(copy.deepcopy(self.look(pl_module)))


def fit(method, callbacks=(), ckpt_path=None, batch_size=BATCH, max_steps=-1):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
    )
    trainer.fit(
        method, DataModule({"name": "digits"}, batch_size=batch_size, seed=2), ckpt_path=ckpt_path, weights_only=True
    )
    return trainer


def everything(method, trainer):
    """Weights, averages and the optimiser's moments."""
    state = {f"weights/{name}": p.detach().clone() for name, p in method.denoiser.network.named_parameters()}
    state |= {f"ema/{name}": tensor.clone() for name, tensor in method.ema.average.items()}
    for i, moments in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"adam/{i}/{key}": value.clone() for key, value in moments.items()}
    return state


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """All steps in one go, with a checkpoint left behind in the middle: (state at the end, checkpoint)."""
    path = tmp_path_factory.mktemp("run") / "middle.ckpt"
    torch.manual_seed(0)
    method = diffusion()
    trainer = fit(method, [SaveAt(path, MIDDLE)])
    return everything(method, trainer), path


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_resuming_from_the_middle_is_exact(whole_run):
    end, path = whole_run
    torch.manual_seed(99)
    torch.rand(7)  # a new process has another global generator
    method = diffusion()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(1.0)  # what is not in the checkpoint would show
    trainer = fit(method, ckpt_path=path)
    assert (method.steps, method.images_seen) == (STEPS, STEPS * BATCH)
    assert_same(everything(method, trainer), end)


def test_stopping_and_resuming_is_exact(whole_run, tmp_path):
    end, _ = whole_run
    first = diffusion()
    stopped = fit(first, max_steps=MIDDLE)
    assert first.steps == MIDDLE
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    second = diffusion()
    trainer = fit(second, ckpt_path=tmp_path / "stopped.ckpt")
    assert_same(everything(second, trainer), end)


def test_speed_is_that_of_the_last_window_and_the_end_that_of_all():
    now = [0.0]
    speed = Speed(lambda: now[0])
    assert speed.seconds_left(100) == float("inf")
    for time, images in ((5.0, 10), (7.0, 30), (8.0, 50)):  # the first window, with compilation, is left out
        now[0] = time
        speed.mark(images)
    assert speed.images_per_second == 20.0
    assert speed.seconds_left(90) == pytest.approx(40 * 3 / 40)
    with speed.paused():
        now[0] += 100.0
    now[0] += 1.0
    speed.mark(60)
    assert speed.images_per_second == 10.0 and speed.seconds_left(50) == 0


def test_resuming_twice_is_exact(whole_run, tmp_path):
    """A checkpoint of a resumed run is as good as one of the first."""
    end, path = whole_run
    fit(diffusion(), [SaveAt(tmp_path / "again.ckpt", MIDDLE + 5)], ckpt_path=path)
    method = diffusion()
    trainer = fit(method, ckpt_path=tmp_path / "again.ckpt")
    assert_same(everything(method, trainer), end)


def test_a_finished_run_is_not_trained_further(whole_run, tmp_path):
    end, _ = whole_run
    method = diffusion()
    fit(method, [SaveAt(tmp_path / "end.ckpt", STEPS)])
    again = diffusion()
    trainer = fit(again, ckpt_path=tmp_path / "end.ckpt")
    assert again.steps == STEPS
    assert_same(everything(again, trainer), end)


def test_checkpoint_holds_plain_values(whole_run):
    checkpoint = torch.load(whole_run[1], weights_only=True)
    assert checkpoint["diffaccel"]["images_seen"] == MIDDLE * BATCH
    assert checkpoint["diffaccel"]["steps"] == MIDDLE
    assert checkpoint["diffaccel"]["ema"].keys() == dict(diffusion().averaged().named_parameters()).keys()


def test_the_run_s_order_is_the_stream_s(whole_run):
    """Steps see consecutive positions of the training stream, after a resume too."""
    positions = []

    class Spy(Diffusion):
        def denoiser_loss(self, batch, noise):
            positions.append(batch.index.tolist())
            return super().denoiser_loss(batch, noise)

    method = diffusion()
    method.__class__ = Spy
    fit(method, ckpt_path=whole_run[1])
    assert [p for batch in positions for p in batch] == list(range(MIDDLE * BATCH, STEPS * BATCH))


def test_seed_changes_the_run(whole_run):
    method = diffusion()
    method.seed = 5
    trainer = fit(method)
    assert not torch.equal(everything(method, trainer)["weights/stem.weight"], whole_run[0]["weights/stem.weight"])


@pytest.mark.parametrize("batch_size", [20, 48, 64])
def test_stops_at_the_image_budget_whatever_the_batch(batch_size):
    method = diffusion(images=100)
    fit(method, batch_size=batch_size)
    assert method.steps == -(-100 // batch_size)
    assert method.images_seen == method.steps * batch_size


def test_loss_falls():
    losses = Watch(lambda module: float(module.last))

    class Recording(Diffusion):
        def denoiser_loss(self, batch, noise):
            loss = super().denoiser_loss(batch, noise)
            self.last = loss.detach().mean()
            return loss

    method = diffusion(dropout=0.0, images=60 * BATCH, warmup=0, lr=3e-3)
    method.__class__ = Recording
    fit(method, [losses])
    assert sum(losses.seen[-20:]) < 0.8 * sum(losses.seen[:20])


@pytest.mark.parametrize(
    ("seen", "rate"),
    [
        (0, 1e-3 / 1000),
        (499, 0.5e-3),
        (999, 1e-3),
        (5000, 1e-3),
        (7000, 1e-3),
        (8500, 0.5e-3),
        (9700, 1e-4),
        (10_000, 0),
    ],
)
def test_learning_rate_schedule(seen, rate):
    method = diffusion(images=10_000, warmup=1000, decay=0.3, lr=1e-3)
    method.images_seen = seen
    assert method.learning_rate() == pytest.approx(rate)


@pytest.mark.parametrize(("seen", "rate"), [(7000, 1e-3), (8500, 0.25e-3), (9400, 0.1e-3), (10_000, 0.1e-3)])
def test_learning_rate_falls_by_its_power_to_its_floor(seen, rate):
    method = diffusion(images=10_000, warmup=0, decay=0.3, decay_power=2.0, floor=0.1, lr=1e-3)
    method.images_seen = seen
    assert method.learning_rate() == pytest.approx(rate)


def test_learning_rate_without_warmup_or_decay():
    method = diffusion(images=100, warmup=0, decay=0.0, lr=1e-3)
    for seen in (0, 50, 99):
        method.images_seen = seen
        assert method.learning_rate() == pytest.approx(1e-3)


LIVES = [8, 24, 400]
"""Half-lives, of which the ramp soon allows the first, at last the second, and never the third."""


def averages(method):
    return {ema.half_life: {name: tensor.clone() for name, tensor in ema.average.items()} for ema in method.emas}


def test_several_averages_are_those_of_independent_recursions():
    """average <- keep average + (1 - keep) weights, keep = 2^(-batch / min(half-life, seen / 20)), in float64."""
    method = diffusion(dropout=0.0, ema_half_life=LIVES, images=30 * BATCH)
    watch = Watch(
        lambda module: {f"denoiser.{n}": p.detach().double() for n, p in module.denoiser.network.named_parameters()}
    )
    start = {f"denoiser.{n}": p.detach().double().clone() for n, p in method.denoiser.network.named_parameters()}
    fit(method, [watch])
    found = averages(method)
    assert [*found] == LIVES
    for half_life in LIVES:
        exact = dict(start)
        for step, weights in enumerate(watch.seen, start=1):
            keep = 0.5 ** (BATCH / min(half_life, 0.05 * BATCH * step))
            exact = {name: keep * exact[name] + (1 - keep) * weights[name] for name in exact}
        for name, tensor in found[half_life].items():
            torch.testing.assert_close(tensor.double(), exact[name], rtol=1e-5, atol=1e-7)


def test_half_lives_differ_once_the_ramp_allows_them():
    """A weight that falls by 0.1 a step lags by 0.1 / (1 - keep) behind, less 0.1, in the long run."""
    method = Averaged(half_lives=[BATCH, 2 * BATCH], steps=100)
    fit(method)
    for ema in method.emas:
        keep = 0.5 ** (BATCH / ema.half_life)
        assert ema.average["a"].item() - method.a.item() == pytest.approx(0.1 * keep / (1 - keep), rel=1e-3)


def test_resuming_several_averages_is_exact(tmp_path):
    path = tmp_path / "middle.ckpt"
    whole = diffusion(ema_half_life=LIVES)
    fit(whole, [SaveAt(path, MIDDLE)])
    kept = torch.load(path, weights_only=True)["diffaccel"]
    assert kept["ema_half_life"] == LIVES[0] and [*kept["ema_others"]] == ["24", "400"]
    resumed = diffusion(ema_half_life=LIVES)
    fit(resumed, ckpt_path=path)
    one, other = averages(whole), averages(resumed)
    assert [*one] == [*other]
    for half_life in LIVES:
        assert_same(one[half_life], other[half_life])


def test_the_average_in_use_may_change():
    method = diffusion(ema_half_life=LIVES)
    fit(method)
    before = averages(method)
    method.use_average(400)
    assert [ema.half_life for ema in method.emas] == [400, 8, 24]
    for half_life, average in averages(method).items():
        assert_same(average, before[half_life])
    exported = method.exports()
    assert [*exported] == ["raw", "ema", "ema_8", "ema_24", "ema_400"]
    assert_same(exported["ema"][0], exported["ema_400"][0])
    assert exported["ema"][1]["ema_half_life"] == 400 and exported["ema_24"][1]["ema_half_life"] == 24
    assert [*diffusion(ema_half_life=LIVES).exports()] == [*exported], "names are known before training"
    assert [*diffusion().exports()] == ["raw", "ema"]


class TwoPhases(TrainedModule):
    """Two numbers, each pulled by its own phase with a gradient of 1 and -10."""

    def __init__(self, training, every=2):
        super().__init__(training, seed=0)
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.every, self.calls = every, []

    def phases(self):
        return [
            Phase("first", [self.a], lambda batch, noise: self._loss("first", self.a)),
            Phase(
                "second", [self.b], lambda batch, noise: self._loss("second", -10 * self.b), every=self.every, lr=3.0
            ),
        ]

    def _loss(self, name, value) -> Tensor:
        self.calls.append((self.steps, name))
        return value


def test_phases_have_their_own_pace_and_rate():
    method = TwoPhases(Training(images=6 * BATCH, lr=0.1, warmup=0, decay=0.0))
    watch = Watch(lambda module: (module.a.item(), module.b.item()))
    trainer = fit(method, [watch])
    assert [step for step, name in method.calls if name == "first"] == [0, 1, 2, 3, 4, 5]
    assert [step for step, name in method.calls if name == "second"] == [0, 2, 4]
    # Adam's step on a constant gradient is its rate, whatever the gradient's size: one phase doesn't feel the other.
    for step, (a, b) in enumerate(watch.seen):
        assert a == pytest.approx(-0.1 * (step + 1), rel=1e-4)
        assert b == pytest.approx(0.3 * (step // 2 + 1), rel=1e-4)
    assert method.images_seen == 6 * BATCH
    assert len(trainer.optimizers) == 2


class Ruled(TwoPhases):
    """The first phase as the second is, but for what is given."""

    def __init__(self, training, **first):
        super().__init__(training, every=1)
        self.first, self.drawn = first, []

    def phases(self):
        one, other = super().phases()
        return [dataclasses.replace(one, **self.first), other]

    def _loss(self, name, value):
        self.drawn.append(torch.rand(()).item())  # as dropout does
        return super()._loss(name, value)


def test_a_phase_keeps_to_its_window():
    """In images: from 2 batches seen on, and before 4."""
    method = Ruled(Training(images=6 * BATCH), since=2 * BATCH, until=4 * BATCH)
    fit(method)
    assert [step for step, name in method.calls if name == "first"] == [2, 3]
    assert [step for step, name in method.calls if name == "second"] == [0, 1, 2, 3, 4, 5]


def test_a_phase_may_have_moments_of_its_own_and_leave_clipping_out():
    method = Ruled(Training(images=BATCH, betas=[0.8, 0.95], clip=0.5), betas=(0.0, 0.9), clip=False)
    watch = Watch(lambda module: (module.a.grad.item(), module.b.grad.item()))
    trainer = fit(method, [watch])
    assert [optimizer.param_groups[0]["betas"] for optimizer in trainer.optimizers] == [(0.0, 0.9), (0.8, 0.95)]
    assert watch.seen == [pytest.approx((1.0, -0.5), rel=1e-5)]


def test_weights_decay_apart_from_the_gradient():
    """AdamW: w <- (1 - lr decay) w - lr sign, so that from 2 two steps of 0.1 at a decay of 0.5 give 1.61."""
    method = TwoPhases(Training(images=2 * BATCH, lr=0.1, warmup=0, decay=0.0, weight_decay=0.5))
    with torch.no_grad():
        method.a.fill_(2.0)
    fit(method)
    assert method.a.item() == pytest.approx((2 * 0.95 - 0.1) * 0.95 - 0.1, rel=1e-4)


def test_each_step_has_draws_of_its_own():
    """What the global generator gives follows from seed and step; the noise from seed and position."""
    whole, part = Ruled(Training(images=3 * BATCH)), Ruled(Training(images=2 * BATCH))
    for method in (whole, part):
        fit(method)
    assert len(set(whole.drawn)) == 6 and part.drawn == whole.drawn[:4]
    uniform = []

    class Noisy(TwoPhases):
        def phases(self):
            return [Phase("noisy", [self.a], lambda batch, noise: uniform.append(noise.uniform()) or 0 * self.a)]

    fit(Noisy(Training(images=2 * BATCH)))
    assert torch.equal(torch.cat(uniform), NoiseStreams(0, range(2 * BATCH), "training").uniform())


class Averaged(TwoPhases):
    """The first of the two numbers is averaged: it falls by 0.1 a step."""

    def __init__(self, half_lives=(4,), steps=6):
        super().__init__(Training(images=steps * BATCH, lr=0.1, warmup=0, decay=0.0, ema_half_life=[*half_lives]))
        self.net = nn.Module()
        self.net.a = self.a

    def averaged(self):
        return self.net


def test_the_average_takes_up_every_step():
    """average <- keep average + (1 - keep) weights, keep = 2^-(images / half-life), after each step and of its weights.

    The half-life is a twentieth of the images seen, 4 from step 3 of 32 images on.
    """
    method = Averaged()
    watch = Watch(lambda module: (module.a.item(), module.ema.average["a"].item()))
    fit(method, [watch])
    assert len(watch.seen) == 6
    expected = 0.0
    for step, (a, average) in enumerate(watch.seen, 1):
        keep = 0.5 ** (BATCH / min(4, 0.05 * BATCH * step))
        expected = keep * expected + (1 - keep) * -0.1 * step
        assert a == pytest.approx(-0.1 * step, rel=1e-4)
        assert average == pytest.approx(expected, rel=1e-4)


def test_two_phases_resume_exactly(tmp_path):
    """Lightning's own counter counts two optimiser steps a batch; ours must not care."""
    plan = Training(images=11 * BATCH, lr=0.1, warmup=5 * BATCH)
    whole = TwoPhases(plan)
    fit(whole, [SaveAt(tmp_path / "five.ckpt", 5)])
    resumed = TwoPhases(plan)
    fit(resumed, ckpt_path=tmp_path / "five.ckpt")
    assert resumed.steps == whole.steps == 11
    assert resumed.calls == whole.calls[whole.calls.index((5, "first")) :]
    assert torch.equal(resumed.a, whole.a) and torch.equal(resumed.b, whole.b)


def test_gradients_are_clipped_to_the_largest_norm():
    class Steep(TrainedModule):
        def __init__(self, clip):
            super().__init__(Training(images=BATCH, clip=clip), seed=0)
            self.w = nn.Parameter(torch.zeros(2))

        def phases(self):
            return [Phase("steep", [self.w], lambda batch, noise: (self.w * torch.tensor([30.0, 40.0])).sum())]

    for clip, norm in ((1.0, 1.0), (5.0, 5.0), (100.0, 50.0), (None, 50.0)):
        watch = Watch(lambda module: module.w.grad)
        fit(Steep(clip), [watch])
        assert watch.seen[0].norm().item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_loss_is_named(value):
    class Unstable(TwoPhases):
        def _loss(self, name, parameter):
            bad = name == "second" and self.steps == 2
            return super()._loss(name, parameter * value if bad else parameter)

    method = Unstable(Training(images=10 * BATCH, lr=0.1))
    with pytest.raises(UsageError, match=rf"second: the loss is .* after {2 * BATCH} images.*training\.lr"):
        fit(method)
    assert method.steps == 2
    assert method.b.isfinite()  # the weights were not touched


def test_losses_are_noted_by_quarters_of_the_levels(monkeypatch):
    """A loss that is the level's quantile itself: each quarter's mean lies in that quarter, the least noise first."""
    method, noted = diffusion(), {}
    monkeypatch.setattr(method, "levels", lambda denoiser, u: u)
    monkeypatch.setattr(method, "level_loss", lambda x_0, t, *rest: t)
    monkeypatch.setattr(method, "note", noted.update)
    method.logs_now = True
    method.denoiser_loss(Batch(torch.zeros(64, 1, 8, 8), None, torch.arange(64)), NoiseStreams(0, range(64)))
    for quarter in (1, 2, 3, 4):
        assert (quarter - 1) / 4 < noted[f"denoiser_loss_quarter_{quarter}"] < quarter / 4


@pytest.mark.parametrize(("nfe", "budget"), [(1, 5), (5, 5), (9, 5), (10, 10), (19, 10), (10_000, 20)])
def test_settings_of_a_budget_are_those_of_the_highest_not_above(nfe, budget):
    assert nearest([10, 5, 20], nfe) == budget


def test_what_has_nothing_to_train_says_so():
    method = diffusion()
    method.denoiser = GaussianDenoiser(torch.zeros(1, 8, 8), 1.0)
    with pytest.raises(UsageError, match="nothing to train"):
        fit(method)
