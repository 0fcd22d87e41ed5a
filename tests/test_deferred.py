"""Work that the host queues for a device: checks at the end, batches ahead, one compiled size."""

from pathlib import Path

import pytest
import torch
from test_dlg import chain_method
from torch import Tensor, nn

from diffaccel import deferred
from diffaccel.deferred import Checks, Stopwatch, as_numbers, check, to_device, to_host
from diffaccel.denoiser import GaussianDenoiser, KarrasDenoiser
from diffaccel.errors import UsageError
from diffaccel.evaluation import production
from diffaccel.evaluation.partial import Partial
from diffaccel.evaluation.production import produce
from diffaccel.nfe import EvaluationCounter
from diffaccel.nn.compiling import FixedBatch, compile_forward, is_compiled, uncompiled
from diffaccel.prior import GaussianPrior, LangevinGibbsPrior
from diffaccel.prior.posterior import ExactPosterior, geometric_levels
from diffaccel.process import EDMVarianceExploding
from diffaccel.sampling import Sampler, batches

SHAPE = (3, 4, 4)
CPU = torch.device("cpu")


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device that works behind the host."""
    for module in (production, batches):
        monkeypatch.setattr(module, "runs_ahead", lambda device: True)


def gaussian(mean: float = 0.0) -> Sampler:
    return Sampler(GaussianDenoiser(torch.full(SHAPE, mean), 1.0), GaussianPrior(), "edm_stochastic", SHAPE)


def test_a_check_raises_at_once_or_when_it_is_settled() -> None:
    def error() -> UsageError:
        return UsageError("too large")

    check(torch.tensor([True, True]), error)
    check(torch.empty(0, dtype=torch.bool), error)
    with pytest.raises(UsageError, match="too large"):
        check(torch.tensor([True, False]), error)
    checks = Checks()
    with checks.collected():
        check(torch.tensor([True, False]), error)
        assert deferred.is_deferring()
    assert not deferred.is_deferring()
    with pytest.raises(UsageError, match="too large"):
        checks.settle()
    checks.settle()  # once


def test_values_on_the_host_are_not_copied() -> None:
    value = {"y": torch.ones(2), "rounds": 3, "trace": [{"mean": torch.zeros(1)}]}
    copied = to_host(value)
    assert copied["y"] is value["y"] and copied["trace"][0]["mean"] is value["trace"][0]["mean"]
    assert as_numbers({"mean": torch.tensor([0.5]), "rounds": 1}) == {"mean": [0.5], "rounds": 1}
    assert to_device(value["y"], CPU) is value["y"]
    stopwatch = Stopwatch(CPU)
    stopwatch.stop()
    assert 0 <= stopwatch.seconds < 1


def chunks(method: Sampler, folder: Path | None = None, batch_size: int = 8, n: int = 40) -> list:
    plan = method.plan(9, n)
    return list(produce(method, plan, plan.prior.schedule(n, batch_size), 3, Partial(folder)))


@pytest.mark.parametrize("chained", [False, True])
def test_batches_ahead_are_the_same_batches(chained: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    method = chain_method(chains=8).sampler if chained else gaussian()
    expected = chunks(method, tmp_path / "before")
    request.getfixturevalue("ahead")
    found = chunks(method, tmp_path / "ahead")
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.digests, other.digests)
        assert (one.evaluations, one.burn_in, one.trace) == (other.evaluations, other.burn_in, other.trace)
    files = [sorted(file.name for file in (tmp_path / folder).iterdir()) for folder in ("before", "ahead")]
    assert files[0] == files[1]
    if chained:  # the state after each round goes on to the same images
        for file in (tmp_path / "ahead").glob("images_*"):
            file.unlink() if file.name > "images_00000008.pt" else None
        assert [torch.equal(a.images, b.images) for a, b in zip(chunks(method, tmp_path / "ahead"), found, strict=True)]


class Spoilt(nn.Module):
    """A network that returns NaN for one of its calls."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        self.calls += 1
        return x * float("nan") if self.calls == self.at else x


@pytest.mark.parametrize("at", [1, 9, 10])
def test_what_is_queued_fails_before_it_is_written(at: int, tmp_path: Path, ahead: None) -> None:
    method = Sampler(KarrasDenoiser(Spoilt(at), EDMVarianceExploding()), GaussianPrior(), "heun", SHAPE)
    with pytest.raises(UsageError, match="NaN or infinity"):
        chunks(method, tmp_path)
    assert len(list(tmp_path.glob("images_*"))) == (at > 9)  # of the batches before it alone


def test_a_level_out_of_range_fails_when_the_batch_is_settled(ahead: None) -> None:
    denoiser = GaussianDenoiser(torch.zeros(SHAPE), 1.0)
    denoiser.ratio_range = 0.002, 5.0
    levels = ExactPosterior.__new__(ExactPosterior)
    nn.Module.__init__(levels)
    levels.register_buffer("levels", geometric_levels(3, 6.0, 20.0), persistent=False)
    levels.logits = lambda y: torch.zeros(len(y), 3)
    prior = LangevinGibbsPrior(levels, chains=8, init_steps=2, warmup=[[1, 1.0]])
    with pytest.raises(UsageError, match="noise-to-data ratio in .20, 20."):
        chunks(Sampler(denoiser, prior, "heun", SHAPE), n=8)


def test_sampling_does_not_read_from_the_device() -> None:
    """Within a batch nothing asks for a value, which would make the host wait for a GPU."""
    for method in (gaussian(), chain_method(chains=8).sampler):
        plan = method.plan(9, 16)
        (group, *_) = plan.prior.schedule(16, 8)
        checks = Checks()
        with torch.no_grad(), checks.collected(), NoReading():
            state = method.open(plan, 0, group)
            list(method.draw(plan, 0, group, state))


class NoReading(torch.utils._python_dispatch.TorchDispatchMode):
    """Fail on operations that a GPU can't do without the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func.overloadpacket._qualified_op_name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


# Compilation


def test_a_short_batch_is_filled_up() -> None:
    sizes = []

    def double(x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        sizes.append(len(x))
        return 2 * x + noise[:, None]

    compiled = FixedBatch(double)
    compiled._compiled = double
    x = torch.randn(5, 3)
    with torch.no_grad():
        for count in (4, 2, 5, 1):
            assert torch.equal(compiled(x[:count], x[:count, 0], None), double(x[:count], x[:count, 0]))
    assert sizes[::2] == [4, 4, 5, 5]
    assert torch.equal(compiled(x[:3], x[:3, 0]), double(x[:3], x[:3, 0]))  # with gradients: a size of its own
    assert sizes[-2] == 3
    with uncompiled(), torch.no_grad():
        compiled(x[:1], x[:1, 0])
    assert sizes[-1] == 1


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.layer(x) + noise[:, None, None, None]


def test_compilation_is_no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done before the clock starts, once, and a short last batch compiles nothing."""
    graphs = []

    def backend(graph, inputs):  # noqa: ANN001, ANN202
        graphs.append(len(graphs))
        return graph.forward

    compile_as_is = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_as_is(function, backend=backend, dynamic=False))
    plain, network = Tiny(), Tiny()
    network.load_state_dict(plain.state_dict())
    compile_forward(network, constant=True)
    assert is_compiled(network) and not is_compiled(plain)
    found, expected = (
        chunks(Sampler(KarrasDenoiser(each, EDMVarianceExploding()), GaussianPrior(), "heun", SHAPE), n=20)
        for each in (network, plain)
    )
    assert len(graphs) == 1
    assert [chunk.warm_up > 0 for chunk in found] == [True, False, False]
    assert all(chunk.warm_up == 0 for chunk in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.evaluations, one.flops) == (other.evaluations, other.flops)
        assert (one.images.int() - other.images.int()).abs().max() <= 1


def test_flops_are_those_of_the_batch_and_not_of_the_filled_one() -> None:
    network = Tiny()
    compile_forward(network, constant=True)
    network.forward._sizes[False] = 8
    with EvaluationCounter({"denoiser": network}) as counter, torch.no_grad():
        network(torch.randn(2, 3, 4, 4), torch.zeros(2))
    assert counter.flops == {"denoiser": 2 * 3 * 3 * 9 * 16}
