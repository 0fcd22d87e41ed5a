"""A loss that is NaN or infinite ends the run, and what comes after it is neither averaged nor saved."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from test_training import BATCH, Averaged, SaveAt, TwoPhases, Watch, assert_same, diffusion, everything
from test_training import fit as plain_fit
from torch import Tensor

from diffaccel.config import load
from diffaccel.errors import UsageError
from diffaccel.experiment import build_data, build_method
from diffaccel.methods import Diffusion, Training
from diffaccel.run import trainer
from diffaccel.training.finite import FiniteCheck

POISONED = 5
"""Step whose loss is not finite."""


def poisoned(value: float = float("nan"), **training: Any) -> Diffusion:
    """A method with a loss that is not finite in one step, of which the check learns later."""

    class Poisoned(Diffusion):
        def denoiser_loss(self, batch, noise):
            loss = super().denoiser_loss(batch, noise)
            return loss * value if self.steps == POISONED else loss

    method = diffusion(**training)
    method.__class__ = Poisoned
    method.defer_check = True
    return method


def failed(*arguments: Any, seen: int = POISONED, **options: Any) -> None:
    with pytest.raises(UsageError, match=rf"denoiser: the loss is .* after {seen * BATCH} images: lower training\.lr"):
        plain_fit(*arguments, **options)


class Last(L.Callback):
    """Keeps the state of the weights, the average and the optimiser after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.states.append(everything(pl_module, trainer))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_deferred_check_ends_the_run_at_the_next_logged_step(value: float):
    """Weights, average and moments stay those before the step, however many steps are taken until then."""
    method, last = poisoned(value, log_every=8), Last()
    failed(method, [last])
    assert method.steps == 9, "step 8 is logged"
    assert len(last.states) == 8
    for state in last.states[POISONED:]:
        assert_same(state, last.states[POISONED - 1])
    assert all(tensor.isfinite().all() for tensor in everything(method, method.trainer).values())


def test_a_check_at_once_ends_the_run_in_the_step():
    """As on the CPU by default."""
    method = poisoned(log_every=8)
    method.defer_check = None
    failed(method)
    assert method.steps == POISONED


@pytest.mark.parametrize("images", [(POISONED + 1) * BATCH, (POISONED + 3) * BATCH])
def test_the_last_step_is_checked(images: int):
    failed(poisoned(images=images, log_every=1000))


def test_a_stopped_run_is_checked():
    failed(poisoned(log_every=1000), max_steps=POISONED + 2)


def test_nothing_is_saved_after_it(tmp_path: Path):
    """Neither at once nor later, though the step is not logged."""
    for step in (POISONED + 1, POISONED + 3):
        failed(poisoned(log_every=1000), [SaveAt(tmp_path / f"{step}.ckpt", step)])
    assert not list(tmp_path.iterdir())
    failed(poisoned(log_every=1000), [SaveAt(tmp_path / "before.ckpt", POISONED)])
    assert (tmp_path / "before.ckpt").is_file()


def test_a_fit_keeps_the_files_from_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of `diffaccel fit` with its checkpoints: no weights are exported."""
    config = load("digits/edm", ["logger=csv", "threads=1", f"out={tmp_path}", f"images={10 * BATCH}",
                                 f"training.batch_size={BATCH}", "network.widths=[8]", "network.attention=[]",
                                 "training.log_every=1000"])  # fmt: skip
    method, data = build_method(config, load=False), build_data(config)
    method.defer_check, loss = True, method.denoiser_loss

    def denoiser_loss(batch: Any, noise: Any) -> Tensor:
        found = loss(batch, noise)
        return found * float("nan") if method.steps == POISONED else found

    monkeypatch.setattr(method, "denoiser_loss", denoiser_loss)
    early = SaveAt(tmp_path / "last.ckpt", POISONED)
    with pytest.raises(UsageError, match="denoiser: the loss is nan and its gradient nan"):
        trainer.build_trainer(config, [trainer.build_checkpointer(config, data), early]).fit(method, data)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["diffaccel"]["steps"] == POISONED
    assert not list(tmp_path.glob("*.safetensors"))


def test_nothing_is_evaluated_after_it():
    class Evaluate(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with pl_module.averaged_weights():
                assert pl_module.steps <= POISONED

    failed(poisoned(log_every=1000), [Evaluate()])


def test_deferring_the_check_changes_no_weights():
    """The average is that of another expression, and so equal up to rounding."""
    at_once, deferred = diffusion(), diffusion()
    deferred.defer_check = True
    one, other = (everything(method, plain_fit(method)) for method in (at_once, deferred))
    exact = {name for name in one if not name.startswith("ema/")}
    assert_same({name: other[name] for name in exact}, {name: one[name] for name in exact})
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


class Unstable(Averaged):
    """The loss of the first of two phases is not finite, from a step on."""

    def _loss(self, name, value) -> Tensor:
        bad = name == "first" and self.steps >= 2
        return super()._loss(name, value * float("nan") if bad else value)


def test_other_phases_stop_too_and_the_first_is_named():
    """The second phase, with finite losses, would train on what the first has not become."""
    method = Unstable()
    method.training_plan.log_every, method.defer_check, method.every = 5, True, 1
    watch = Watch(lambda module: (module.a.item(), module.b.item(), module.ema.average["a"].item()))
    with pytest.raises(UsageError, match=rf"first: the loss is nan and its gradient nan after {2 * BATCH} images"):
        plain_fit(method, [watch])
    assert watch.seen[2:] == watch.seen[1:2] * len(watch.seen[2:]) and len(watch.seen) == 5


def test_a_loss_whose_gradient_is_finite_counts():
    class Constant(TwoPhases):
        def _loss(self, name, value) -> Tensor:
            return super()._loss(name, value) + (float("inf") if self.steps == 2 else 0)

    with pytest.raises(UsageError, match=rf"first: the loss is inf and its gradient 1 after {2 * BATCH} images"):
        plain_fit(Constant(Training(images=10 * BATCH)))


def test_the_flag_stays_set():
    torch.set_default_dtype(torch.float64)
    check = FiniteCheck(torch.device("cpu"), deferred=True)
    flags = []
    for value in (1.0, float("inf"), 1.0):
        check.add("p", 7, torch.tensor(value), torch.tensor(1.0))
        flags.append(check.failed.item())
    assert flags == [0, 1, 1]
    assert check.failed.dtype == torch.float32, "as fused optimisers require"
    with pytest.raises(UsageError, match="p: the loss is inf and its gradient 1 after 7 images"):
        check.read()
    check.read()  # what was read is not read again
