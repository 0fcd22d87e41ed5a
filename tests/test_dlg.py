"""DLG as a method: one image whatever the batch, exact resume, units, the Tweedie step, and the classifier's test."""

import io
import math

import lightning as L
import pytest
import torch
from oracles import assemble, plan_of
from torch import nn

from diffaccel.data import Batch, DataModule
from diffaccel.denoiser import Denoiser, GaussianDenoiser, KarrasDenoiser, MixtureDenoiser
from diffaccel.denoiser.levels import LogNormal
from diffaccel.errors import UsageError
from diffaccel.methods import DenoisingLangevinGibbs, Training
from diffaccel.methods.dlg import accept
from diffaccel.nn.classifier import NoiseLevelClassifier
from diffaccel.nn.unet import UNet
from diffaccel.noise import NoiseStreams
from diffaccel.prior import (
    ChainState,
    ClassifierPosterior,
    ExactPosterior,
    GaussianPrior,
    LangevinGibbsPrior,
    geometric_levels,
)
from diffaccel.process import EDMVarianceExploding, Prediction, VariancePreserving
from diffaccel.sampling import Sampler, Tweedie
from diffaccel.solver import SOLVERS


def chain_method(update="argmax", solver=None, process=None, **options) -> DenoisingLangevinGibbs:
    """DLG on an exact denoiser with a short burn-in."""
    means = 0.5 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    denoiser = MixtureDenoiser(means, 0.05, process=process or EDMVarianceExploding())
    options = {"chains": 64, "eta": 0.5, "init_steps": 4, "warmup": [[2, 1.0], [2, None]], **options}
    prior = LangevinGibbsPrior(ExactPosterior(denoiser, geometric_levels(500)), update=update, **options)
    solver = SOLVERS.build(solver or {"name": "edm_stochastic"})
    return assemble(
        DenoisingLangevinGibbs, denoiser, prior, solver, LogNormal(), Training(), (3, 8, 8), tweedie_ratio=0.02
    )


def produce(method, n: int, batch_size: int, seed: int = 3):
    """Images (n, ...) in order, and the start level of each."""
    images, starts = torch.full((n, *method.shape), float("nan")), torch.full((n,), float("nan"), dtype=torch.float64)
    plan = plan_of(method, 5, 4)
    for group in method.prior.schedule(n, batch_size):
        state = method.sampler.open(plan, seed, group)
        for round_, (indices, x_0) in enumerate(method.sampler.draw(plan, seed, group, state)):
            images[list(indices)] = x_0
            starts[list(indices)] = torch.tensor(state.trace[round_]["start_ratio"], dtype=torch.float64)
    return images, starts


@pytest.mark.parametrize(
    ("update", "solver"),
    [
        ("argmax", {"name": "edm_stochastic"}),
        ("sample", {"name": "euler_maruyama"}),
        ("mean", {"name": "ddim", "eta": 1.0}),
        ("argmax", {"name": "heun"}),
    ],
)
def test_batch_size_changes_no_image(update, solver):
    method = chain_method(update, solver)
    # With this seed no state is near a ridge between two components, where rounding grows a thousandfold.
    images, starts = produce(method, 80, 64, seed=6)
    assert images.isfinite().all()
    assert starts.unique().numel() > 10  # each image starts from a level of its own
    for batch_size in (1, 7):
        others, their_starts = produce(method, 80, batch_size, seed=6)
        assert torch.allclose(their_starts, starts, rtol=1e-5)
        assert torch.allclose(others, images, atol=2e-4)


def test_chains_go_with_any_process():
    """y = x / alpha at equal ratio has one law, so a VP denoiser moves the chain as a VE one does."""
    levels = [[2, 1.0], [2, None]]
    ve = produce(chain_method(warmup=levels), 16, 16)
    start_at_152 = chain_method(warmup=levels, process=EDMVarianceExploding(152.2))
    vp = produce(chain_method(warmup=levels, process=VariancePreserving()), 16, 16)
    at_152 = produce(start_at_152, 16, 16)
    assert torch.allclose(vp[0], at_152[0], atol=0.02)
    assert not torch.allclose(ve[0], at_152[0], atol=0.02)


@pytest.mark.parametrize("options", [{}, {"update": "sample", "restart_every": 2}])
def test_resumed_chain_repeats_the_next_rounds_bit_for_bit(options):
    method = chain_method(**options)
    plan = plan_of(method, 3, 3)
    (group,) = method.prior.schedule(4 * 64, 64)
    uninterrupted = method.sampler.open(plan, 0, group)
    whole = list(method.sampler.draw(plan, 0, group, uninterrupted))

    state = method.sampler.open(plan, 0, group)
    list(method.sampler.draw(plan, 0, group[:1], state))
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    resumed = method.sampler.restore(plan, 0, group, torch.load(file, weights_only=True))
    for (indices, images), (_, again) in zip(whole[1:], method.sampler.draw(plan, 0, group[1:], resumed), strict=True):
        assert torch.equal(images, again), indices
    assert resumed.trace == uninterrupted.trace
    assert len(resumed.trace) == 4
    assert resumed.restarts == (2 if options else 1)


def test_state_dict_is_a_snapshot():
    method = chain_method()
    plan = plan_of(method, 1, 1)
    (group,) = method.prior.schedule(128, 64)
    state = method.sampler.open(plan, 0, group)
    before = state.state_dict()
    list(method.sampler.draw(plan, 0, group, state))
    assert before["rounds"] == 0 and before["trace"] == []


def test_restarts_begin_from_noise_again():
    method = chain_method(restart_every=2, chains=4)
    plan = plan_of(method, 1, 2)
    (group,) = method.prior.schedule(14, 4)
    state = method.sampler.open(plan, 0, group)
    list(method.sampler.draw(plan, 0, group, state))
    assert state.restarts == 2
    assert [record["rounds_since_start"] for record in state.trace] == [1, 2, 1, 2]
    assert [len(record["start_ratio"]) for record in state.trace] == [4, 4, 4, 2]


class InOtherUnits(Denoiser):
    """A denoiser of [-1, 1] made from one of [0, 1]: x_pm = 2 x - 1, so levels double."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.process, self.ratio_range, self._denoiser = denoiser.process, denoiser.ratio_range, denoiser

    def forward(self, x_t, t, condition=None):
        x_0, eps = self._denoiser((x_t + 1) / 2, t / 2)
        return Prediction(2 * x_0 - 1, eps)


class PosteriorInOtherUnits(ExactPosterior):
    def logits(self, y):
        return self._denoiser[0].log_prob((y + 1) / 2, self.levels / 2)


@pytest.mark.parametrize("solver", ["heun", "edm_stochastic", "reverse_diffusion", "euler_maruyama", "dpmpp2m"])
@pytest.mark.parametrize("update", ["argmax", "sample", "mean"])
def test_units(solver, update):
    """Twice the level and four times eta make the same chain on data in [-1, 1] as on data in [0, 1]."""
    unit = MixtureDenoiser(torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double(), 0.01)
    levels = geometric_levels(1000, 0.01, 50.0)
    y = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    ratio = torch.full((6,), 0.5, dtype=torch.float64)
    results = []
    for scale, denoiser, posterior in (
        (1, unit, ExactPosterior(unit, levels)),
        (2, InOtherUnits(unit), PosteriorInOtherUnits(unit, 2 * levels)),
    ):
        prior = LangevinGibbsPrior(posterior, eta=0.1 * scale**2, update=update)
        grid = {"name": "karras", "ratio_min": 0.01 * scale, "ratio_cap": 40.0 * scale}
        churn = {"S_min": 0.05 * scale, "S_max": 1.0 * scale} if solver == "edm_stochastic" else {}
        integrate = SOLVERS.build({"name": solver, "grid": grid, **churn})
        state = ChainState(scale * y - (scale - 1), scale * ratio, NoiseStreams(0, range(6), "chain"))
        for _ in range(3):
            noise = NoiseStreams(0, range(6))
            x_t, t = prior(denoiser, noise, (3, 8, 8), 5, state)
            results.append((x_t, t, integrate(denoiser, x_t, t, noise, 5)))
    for (x_t, t, x_0), (x_t_pm, t_pm, x_0_pm) in zip(results[:3], results[3:], strict=True):
        assert torch.allclose(t_pm, 2 * t, rtol=1e-8)
        assert torch.allclose(x_t_pm, 2 * x_t - 1, atol=1e-5)
        assert torch.allclose(x_0_pm, 2 * x_0 - 1, atol=1e-5)


def test_no_gradient_reaches_the_chain():
    """A level that is a mean over a classifier's outputs, and no warm-up to forget the graph."""
    method = chain_method("mean", warmup=[])
    method.prior.posterior.levels.requires_grad_(True)
    state = method.sampler.open(plan_of(method, 1, 1), 0, [range(4)])
    assert not state.ratio.requires_grad
    assert not state.y.requires_grad


E_TWEEDIE = 0.3


def test_tweedie_step_is_the_equation():
    """x + e^2 score(x, e), and the score of Gaussian data is -(x - m) / (a^2 + e^2)."""
    denoiser = GaussianDenoiser(torch.full((3, 8, 8), 0.2), 0.25)
    x = torch.randn(4, 3, 8, 8)
    expected = x - E_TWEEDIE**2 * (x - 0.2) / (0.25 + E_TWEEDIE**2)
    assert torch.allclose(Tweedie(E_TWEEDIE)(denoiser, x), expected, atol=1e-6)
    plain, last = (
        Sampler(denoiser, GaussianPrior(), SOLVERS.build({"name": "heun"}), (3, 8, 8), tweedie=tweedie)
        for tweedie in (None, Tweedie(E_TWEEDIE))
    )
    assert (plain.extra_evaluations, last.extra_evaluations) == (0, 1)
    (_, before), (_, after) = (
        next(sampler.draw(sampler.plan(9 + sampler.extra_evaluations, 4), 0, [range(4)])) for sampler in (plain, last)
    )
    assert torch.equal(after, Tweedie(E_TWEEDIE)(denoiser, before))


def trainable(levels: int = 50) -> DenoisingLangevinGibbs:
    denoiser = KarrasDenoiser(UNet((1, 8, 8), [8, 8], blocks=1, embedding=8), EDMVarianceExploding())
    table = geometric_levels(levels)
    posterior = ClassifierPosterior(NoiseLevelClassifier((1, 8, 8), levels, width=4), table)
    prior = LangevinGibbsPrior(posterior, chains=4)
    return assemble(
        DenoisingLangevinGibbs,
        denoiser,
        prior,
        SOLVERS.build({"name": "heun"}),
        LogNormal(),
        Training(),
        (1, 8, 8),
        seed=5,
    )


def test_trains_the_classifier_and_nothing_else():
    method = trainable()
    (phase,) = method.phases()
    classifier = list(method.classifier.network.parameters())
    assert {id(p) for p in phase.parameters} == {id(p) for p in classifier}
    assert not any(p.requires_grad for p in method.denoiser.parameters())
    assert method.averaged() is None
    assert list(method.sampler.auxiliary_networks()) == ["classifier"]
    assert list(method.sampler.evaluated_networks()) == ["denoiser"]


def test_loss_is_the_cross_entropy_of_the_level_that_was_drawn():
    method = trainable()
    batch = Batch(torch.rand(6, 1, 8, 8) * 2 - 1, None, torch.arange(100, 106))
    loss = method.classifier_loss(batch, NoiseStreams(5, batch.index, "training"))
    levels = method.classifier.levels
    for b in range(6):
        stream = NoiseStreams(5, [100 + b], "training")
        k = int(stream.uniform() * len(levels))
        y = batch.image[b : b + 1] + levels[k].float() * stream.normal(batch.image[b : b + 1])
        assert loss[b].item() == pytest.approx(-method.classifier.logits(y).log_softmax(1)[0, k].item(), rel=1e-5)


def test_a_fit_lowers_the_classifier_s_loss():
    torch.manual_seed(1)
    method = trainable()
    method.training_plan = Training(images=40 * 64, lr=3e-3, warmup=0)
    frozen = {name: p.clone() for name, p in method.denoiser.named_parameters()}
    images = torch.rand(256, 1, 8, 8) * 2 - 1
    before = accept(method.classifier, [images])
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(method, DataModule({"name": "digits"}, batch_size=64))
    after = accept(method.classifier, [images])
    assert method.steps == 40
    assert after.cross_entropy < before.cross_entropy - 0.3
    assert all(torch.equal(p, frozen[name]) for name, p in method.denoiser.named_parameters())


def test_levels_of_training_are_uniform():
    """So that the classifier's implied prior is log-uniform."""

    class Recorder(nn.Module):
        def forward(self, y):
            return torch.zeros(len(y), 50)

    method = trainable()
    method.prior.posterior.network = Recorder()
    drawn = []
    method.prior.posterior.loss = lambda x_0, index, eps: drawn.append(index) or torch.zeros(len(x_0))
    batch = Batch(torch.zeros(5000, 1, 1, 1), None, torch.arange(5000))
    method.classifier_loss(batch, NoiseStreams(0, batch.index, "training"))
    counts = torch.bincount(drawn[0], minlength=50)
    assert len(counts) == 50
    assert (counts - 100).abs().max() < 5 * 10  # 5 standard deviations of a count of mean 100


def test_an_exact_posterior_has_nothing_to_train():
    with pytest.raises(UsageError, match="nothing to train"):
        chain_method().phases()
    method = trainable()
    method.prior = GaussianPrior()
    with pytest.raises(UsageError, match="nothing to train"):
        method.phases()


class Ruler(nn.Module):
    """Reads the level off a state of black images by its root mean square, times ``factor``."""

    def __init__(self, levels, factor=1.0):
        super().__init__()
        self.levels, self.factor = levels, factor

    def forward(self, y):
        sigma = y.double().square().flatten(1).mean(1).sqrt() * self.factor
        return -1e3 * (self.levels.log() - sigma.log()[:, None]).abs()


def black(count=512):
    return [torch.zeros(128, 3, 32, 32) for _ in range(count // 128)]


def test_accepts_a_classifier_as_exact_as_the_dimension_allows():
    levels = geometric_levels()
    result = accept(ClassifierPosterior(Ruler(levels), levels), black())
    assert result.accepted
    assert result.limit == pytest.approx(max(3 / math.sqrt(2 * 3072), 2 * math.log(5000**0.001)))
    assert set(result.error) - {"100"} == {"0.01", "0.1", "1", "10"}
    # The root mean square of d normal numbers errs by a normal of deviation 1 / sqrt(2 d).
    for decade in ("0.1", "1", "10"):
        assert result.error[decade] == pytest.approx(math.sqrt(2 / math.pi) / math.sqrt(2 * 3072), rel=0.25)
    assert 0.1 < result.top_1 < 0.35  # the ceiling at this dimension is 26 %


def test_rejects_a_classifier_that_is_off():
    levels = geometric_levels()
    result = accept(ClassifierPosterior(Ruler(levels, 1.5), levels), black())
    assert not result.accepted
    assert result.error["1"] == pytest.approx(math.log(1.5), rel=0.05)


def test_rejects_a_classifier_that_is_off_in_one_decade():
    class OffBelow(Ruler):
        def forward(self, y):
            logits = super().forward(y)
            low = y.square().flatten(1).mean(1).sqrt() < 0.1
            return torch.where(low[:, None], logits.roll(20, 1), logits)

    levels = geometric_levels()
    result = accept(ClassifierPosterior(OffBelow(levels), levels), black())
    assert not result.accepted
    assert result.error["0.01"] > result.limit
    assert all(result.error[decade] < result.limit for decade in ("0.1", "1", "10"))


def test_limit_at_high_dimension_is_two_levels():
    levels = geometric_levels()
    result = accept(ClassifierPosterior(Ruler(levels), levels), [torch.zeros(2, 3, 256, 256)])
    assert result.limit == pytest.approx(2 * math.log(5000**0.001))


def test_acceptance_does_not_depend_on_batches():
    levels = geometric_levels()
    posterior = ClassifierPosterior(Ruler(levels), levels)
    whole, parts = accept(posterior, black(256)), accept(posterior, torch.zeros(256, 3, 32, 32).split(100))
    assert whole.error == pytest.approx(parts.error)
    assert whole.cross_entropy == pytest.approx(parts.cross_entropy)
