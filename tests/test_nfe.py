"""Counting: FLOPs of known layers, burn-in apart, and every evaluation of every integrator."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import assemble, plan_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffaccel.condition import Condition
from diffaccel.denoiser import MixtureDenoiser
from diffaccel.denoiser.levels import LogNormal
from diffaccel.errors import UsageError
from diffaccel.methods import DenoisingLangevinGibbs, Diffusion, Training
from diffaccel.nfe import EvaluationCounter, FlopCounter, burn_in, total_flops
from diffaccel.nn import UNet, compiling
from diffaccel.nn.classifier import NoiseLevelClassifier
from diffaccel.nn.text import CrossAttention
from diffaccel.noise import NoiseStreams
from diffaccel.prior import (
    ChainState,
    ClassifierPosterior,
    ExactPosterior,
    GaussianPrior,
    LangevinGibbsPrior,
    Plan,
    geometric_levels,
)
from diffaccel.solver import SOLVERS

SHAPE = (1, 8, 8)
FIXED = [name for name in SOLVERS if name != "rk45"]


def test_counts_samples_and_not_calls():
    network = nn.Linear(3, 5)
    with EvaluationCounter({"net": network}) as counter:
        for batch in (4, 1, 7):
            network(torch.zeros(batch, 3))
    assert counter.evaluations == {"net": 12}
    assert counter.burn_in["net"] == 0
    network(torch.zeros(4, 3))
    assert counter.evaluations == {"net": 12}  # the hooks are gone


@pytest.mark.parametrize("batch", [1, 4])
def test_flops_of_known_layers(batch):
    linear, conv = nn.Linear(3, 5), nn.Conv2d(2, 6, 3, padding=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with EvaluationCounter({"linear": linear, "conv": conv}) as counter:
            for _ in range(3):
                linear(torch.zeros(batch, 3))
                conv(torch.zeros(batch, 2, 8, 8))
    assert counter.flops == {"linear": 2 * 3 * 5, "conv": 2 * 2 * 6 * 9 * 64}
    assert total_flops(counter.evaluations, counter.flops) == 3 * batch * (30 + 2 * 2 * 6 * 9 * 64)


class Attending(nn.Module):
    """A convolution, attention, and products as functions and as layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(x).flatten(2).mT
        attended = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return torch.einsum("bnc,bnd->bcd", self.linear(attended), tokens) @ (tokens.mT @ tokens)[0] @ tokens[0, 0]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("bf16", [False, True])
def test_flops_are_pytorch_s(mode: Any, bf16: bool):
    network, x = Attending(), torch.randn(2, 3, 4, 4)
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with FlopCounterMode(display=False) as theirs:
            expected = network(x)
        with FlopCounter() as counter:
            found = network(x)
    assert counter.total == theirs.get_total_flops() > 0 and torch.equal(found, expected)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_flops_of_attention_do_not_depend_on_the_kernel(contiguous: bool, masked: bool, mode: Any):
    """2 B H L S (D + D): PyTorch chooses the kernel by strides, and counts some of them as nothing."""
    B, H, L, S, D = 2, 3, 16, 4, 32
    q, k, v = (torch.randn(B, length, H, D).transpose(1, 2) for length in (L, S, S))
    if contiguous:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    else:
        q, k, v = (one.mT.contiguous().mT for one in (q, k, v))  # as channels last before, channels first after
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool) if masked else None
    with mode(), FlopCounter() as counter:
        nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert counter.total == 4 * B * H * L * S * D


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_flops_of_a_network_do_not_depend_on_its_memory_format(format: torch.memory_format):
    torch.manual_seed(0)
    keys: dict[str, Any] = {"widths": [8, 32], "blocks": 1, "attention": [1], "embedding": 16, "tokens": 6}
    network = UNet((3, 8, 8), **keys).to(memory_format=format)
    with torch.no_grad(), EvaluationCounter({"net": network}) as counter:
        network(torch.randn(1, 3, 8, 8), torch.rand(1), Condition(tokens=torch.randn(1, 4, 6)))
    convolutions = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda layer, _, out: convolutions.append(
                2 * layer.weight[0].numel() * out.numel()))  # fmt: skip
    network(torch.randn(1, 3, 8, 8), torch.rand(1), Condition(tokens=torch.randn(1, 4, 6)))
    self_attention, cross_attention = 4 * 16 * 16 * 32, 4 * 16 * 4 * 32  # of one stage
    stages = sum(isinstance(module, CrossAttention) for module in network.modules())
    assert counter.flops["net"] == sum(convolutions) + stages * (self_attention + cross_attention)


def test_flops_of_a_network_within_another():
    inner = nn.Linear(3, 3)
    outer = nn.Sequential(inner, nn.ReLU(), nn.Linear(3, 2))
    with EvaluationCounter({"outer": outer, "inner": inner}) as counter:
        outer(torch.zeros(2, 3))
        inner(torch.zeros(1, 3))
    assert counter.flops == {"outer": 18 + 12, "inner": 18}
    assert counter.evaluations == {"outer": 2, "inner": 3}


def test_flops_of_a_compiled_network():
    network = nn.Linear(3, 5)
    network.forward = torch.compile(network.forward, backend="eager")
    with EvaluationCounter({"net": network}) as counter:
        for batch in (2, 4):
            network(torch.zeros(batch, 3))
    assert counter.flops == {"net": 30} and counter.evaluations == {"net": 6}


def test_burn_in_is_counted_apart_and_nests():
    network = nn.Linear(1, 1)
    x = torch.zeros(2, 1)
    with EvaluationCounter({"net": network}) as counter:
        network(x)
        with burn_in():
            network(x)
            with burn_in():
                network(x)
            network(x)
        network(x)
        with pytest.raises(RuntimeError), burn_in():
            network(torch.zeros(2, 7))  # fails, and counts: it was asked for
        network(x)
    assert counter.evaluations["net"] == 14
    assert counter.burn_in["net"] == 8


def test_hooks_go_after_an_error():
    network = nn.Linear(1, 1)
    counter = EvaluationCounter({"net": network})
    with pytest.raises(RuntimeError), counter:
        network(torch.zeros(2, 7))
    assert not network._forward_pre_hooks and not network._forward_hooks
    network(torch.zeros(2, 1))
    assert counter.evaluations["net"] == 2


def test_a_failed_first_call_does_not_spoil_the_flops():
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    broken = network[1]
    network[1] = nn.Linear(4, 2)
    with EvaluationCounter({"net": network}) as counter:
        with pytest.raises(RuntimeError):
            network(torch.zeros(2, 3))
        network[1] = broken
        network(torch.zeros(2, 3))
    assert counter.flops["net"] == 2 * (15 + 10)


def test_an_interrupt_in_the_first_call_leaves_nothing_behind():
    """Hooks on all modules, which a FLOP counter sets, would break every later double backward."""

    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    network = nn.Sequential(nn.Linear(3, 3), Interrupted())
    with pytest.raises(KeyboardInterrupt), EvaluationCounter({"net": network}):
        network(torch.zeros(2, 3))
    assert not nn.modules.module._global_forward_pre_hooks
    x = torch.ones(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(nn.Linear(3, 1)(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()


def exact() -> MixtureDenoiser:
    means = 0.5 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    return MixtureDenoiser(means, 0.05)


def dlg(solver="heun", tweedie=0.02, **options) -> DenoisingLangevinGibbs:
    denoiser = exact()
    prior = LangevinGibbsPrior(ExactPosterior(denoiser, geometric_levels(200)), **{"eta": 0.5, **options})
    built = SOLVERS.build({"name": solver})
    return assemble(
        DenoisingLangevinGibbs, denoiser, prior, built, LogNormal(), Training(), SHAPE, tweedie_ratio=tweedie
    )


def count(method, n: int, batch_size: int, plan: Plan) -> EvaluationCounter:
    networks = {**method.sampler.evaluated_networks(), **method.sampler.auxiliary_networks()}
    with EvaluationCounter(networks) as counter:
        for group in method.prior.schedule(n, batch_size):
            state = method.sampler.open(plan, 0, group)
            for indices, images in method.sampler.draw(plan, 0, group, state):
                assert len(indices) == len(images)
    return counter


@pytest.mark.parametrize("tweedie", [None, 0.02])
@pytest.mark.parametrize("solver", FIXED)
def test_every_integrator_costs_skips_plus_its_own_plus_tweedie(solver, tweedie):
    method = dlg(solver, tweedie, chains=5, init_steps=2, warmup=[[1, None]])
    plan = plan_of(method, 4, 3)
    counter = count(method, 10, 5, plan)
    marginal = counter.evaluations["denoiser"] - counter.burn_in["denoiser"]
    assert marginal == 10 * (3 + method.sampler.solver.evaluations(4) + (tweedie is not None))
    assert counter.burn_in["denoiser"] == 5 * (3 + 1)


@pytest.mark.parametrize(
    ("solver", "evaluations"),
    [
        ("heun", 2 * 7 - 1),
        ("edm_stochastic", 2 * 7 - 1),
        ("reverse_diffusion", 7),
        ("probability_flow", 7),
        ("euler_maruyama", 7),
    ],
)
def test_integrators_of_the_paper(solver, evaluations):
    assert SOLVERS.build({"name": solver}).evaluations(7) == evaluations


def test_adaptive_integrator_is_counted_as_it_goes():
    """2 + 6 (accepted + rejected steps) for each sample: what it takes alone from the same starts."""
    method = dlg("rk45", chains=5, init_steps=2, warmup=[[1, None]])
    plan = plan_of(method, 1, 3)
    counter = count(method, 5, 5, plan)
    (group,) = method.prior.schedule(5, 5)
    noise = NoiseStreams(0, group[0])
    x_t, t = method.prior(method.denoiser, noise, SHAPE, plan.chain_steps, method.sampler.open(plan, 0, group))
    alone = []
    for b in range(5):
        with EvaluationCounter({"denoiser": method.denoiser}) as single:
            method.sampler.solver(method.denoiser, x_t[b : b + 1], t[b : b + 1], noise)
        alone.append(single.evaluations["denoiser"])
    assert all(evaluations > 2 and (evaluations - 2) % 6 == 0 for evaluations in alone)
    marginal = counter.evaluations["denoiser"] - counter.burn_in["denoiser"]
    assert marginal == sum(alone) + 5 * (3 + 1)


@pytest.mark.parametrize(
    ("options", "total"),
    [({"warmup": [[10, 2.0], [10, None]]}, 57), ({"warmup": [[50, 6.4], [20, None]], "eta": 3.2}, 107)],
    ids=["CIFAR-10", "CelebA-HQ"],
)
def test_published_burn_in_as_counted(options, total):
    method = dlg(chains=3, **options)
    with EvaluationCounter(method.sampler.evaluated_networks()) as counter:
        method.sampler.open(plan_of(method, 1, 1), 0, [range(3)])
    assert counter.evaluations == counter.burn_in == {"denoiser": 3 * total}


@pytest.mark.parametrize("n", [12, 14])
@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize("restart_every", [None, 1, 2])
@pytest.mark.parametrize(("solver", "budget"), [("heun", 40.5), ("dpmpp2m", 31.0)])
def test_what_is_planned_is_what_is_counted(n, batch_size, restart_every, solver, budget):
    method = dlg(solver, chains=4, restart_every=restart_every, init_steps=2, warmup=[[2, 1.0], [1, None]])
    plan = method.sampler.plan(budget, n)
    counter = count(method, n, batch_size, plan)
    assert counter.evaluations["denoiser"] / n == pytest.approx(method.sampler.planned_nfe(plan, n))
    assert counter.burn_in["denoiser"] == method.prior.burn_in_evaluations(n)
    assert counter.evaluations["denoiser"] <= budget * n


@pytest.mark.parametrize("budget", [1, 2, 5, 10])
def test_baseline_spends_its_plan(budget):
    method = assemble(
        Diffusion, exact(), GaussianPrior(), SOLVERS.build({"name": "heun"}), LogNormal(), Training(), SHAPE
    )
    plan = method.sampler.plan(budget, 7)
    counter = count(method, 7, 3, plan)
    assert counter.evaluations["denoiser"] / 7 == method.sampler.planned_nfe(plan, 7) <= budget


def test_adaptive_integrator_refuses_a_budget():
    with pytest.raises(UsageError, match="adaptive"):
        dlg("rk45").sampler.plan(50, 100)


def test_classifier_is_no_evaluation_but_its_flops_count():
    denoiser = exact()
    network = NoiseLevelClassifier(SHAPE, 20, width=4, normalise=False)
    prior = LangevinGibbsPrior(ClassifierPosterior(network, geometric_levels(20)), eta=0.01)
    method = assemble(
        DenoisingLangevinGibbs,
        denoiser,
        prior,
        SOLVERS.build({"name": "heun"}),
        LogNormal(),
        Training(),
        SHAPE,
        tweedie_ratio=0.02,
    )
    assert list(method.sampler.evaluated_networks()) == ["denoiser"]
    noise = NoiseStreams(0, range(2), "chain")
    state = ChainState(noise.normal(torch.empty(2, *SHAPE)), torch.full((2,), 1.0, dtype=torch.float64), noise)
    with EvaluationCounter({**method.sampler.evaluated_networks(), **method.sampler.auxiliary_networks()}) as counter:
        prior(denoiser, noise, SHAPE, 5, state)
    assert counter.evaluations == {"denoiser": 10, "classifier": 10}
    sizes, widths = (8, 4, 2, 2), (1, 4, 8, 16, 32)
    convolutions = sum(2 * 9 * a * b * s**2 for s, a, b in zip(sizes, widths, widths[1:], strict=False))
    assert counter.flops["classifier"] == convolutions + 2 * 128 * 20


def test_counters_within_each_other_leave_compiled_graphs_in_use():
    network = nn.Linear(2, 2)
    with EvaluationCounter({"a": network}) as outer, EvaluationCounter({"a": network}) as inner:
        network(torch.zeros(3, 2))
    assert outer.evaluations == inner.evaluations == {"a": 3} and outer.flops == inner.flops == {"a": 8}
    assert not compiling._EAGER.get() and not compiling._STANCES
    made = []
    compiled = torch.compile(network, backend=lambda graph, _: made.append(graph) or graph.forward)
    for _ in range(2):
        with EvaluationCounter({"a": compiled}), EvaluationCounter({"a": compiled}):
            compiled(torch.zeros(3, 2))
        assert not made
    compiled(torch.zeros(3, 2))
    assert len(made) == 1


class Meeting(nn.Linear):
    """Layer whose calls wait for each other, so that calls of two threads overlap."""

    def __init__(self, features: int, barrier: threading.Barrier) -> None:
        super().__init__(features, features)
        self.barrier = barrier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.barrier.wait(timeout=30)
        return super().forward(x)


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, call=call: found.update({i: call()})) for i, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(len(calls))]


def test_counters_of_two_threads_count_their_own_calls():
    network, opened = Meeting(3, threading.Barrier(2)), threading.Barrier(2)

    def count(samples: int) -> EvaluationCounter:
        with EvaluationCounter({"net": network}) as counter:
            opened.wait(timeout=30)  # both have their hooks on the network
            for _ in range(5):
                network(torch.zeros(samples, 3))
            opened.wait(timeout=30)
        return counter

    few, many = in_threads(lambda: count(2), lambda: count(7))
    assert few.evaluations == {"net": 10} and many.evaluations == {"net": 35}
    assert few.flops == many.flops == {"net": 2 * 3 * 3}
    assert not network._forward_pre_hooks and not network._forward_hooks
