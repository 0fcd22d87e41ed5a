"""No training step makes the host wait for the GPU, except where values are logged."""

import lightning as L
import pytest
import torch
from torch import Tensor
from waits import GPU, Waits, allow, attach, batch_on_gpu, move, refusing

from diffaccel.config import load
from diffaccel.data import ArrayImages
from diffaccel.data.resident import Chosen, ResidentImages
from diffaccel.deferred import Checks
from diffaccel.experiment import build_data, build_method
from diffaccel.run import trainer as run_trainer
from diffaccel.solver import GRIDS, SOLVERS
from diffaccel.training.ema import EMA

STEPS = {
    "diffusion": ["digits/edm"],
    "diffusion on vp": ["digits/ddpm", "training.antithetic=true", "training.clip=null"],
    "cosine": ["digits/ddpm", "process=vp_cosine", "levels=log_uniform"],
    "augmentation": ["digits/edm", "training.augment=0.5", "network.augment=9"],
    "classes": ["digits/edm", "network.classes=10"],
    "ddm": ["digits/ddm"],
    "ddm, linear": ["digits/ddm", "process.attenuation=linear", "network.heads=2,1"],
    "tdpm": ["digits/tdpm"],
    "tdpm, separate": ["digits/edm", "method=tdpm", "prior=implicit", "network.classes=10", "training.antithetic=true"],
    "matching": [
        "digits/edm", "method=tdpm", "method.frozen=true", "prior=implicit", "method.objectives=[distribution_matching]"
    ],
    "small_t": ["digits/small_t_trained"],
    "small_t, pairs": ["digits/small_t_trained", "training.antithetic=true", "method.weighting=likelihood"],
    "small_t, flow": ["digits/small_t", "prior.density.name=flow"],
    "small_t, glow": ["digits/small_t", "prior.density={name: glow, scales: 1, steps: 2, width: 8}"],
    "dlg": ["digits/dlg"],
}  # fmt: skip


@pytest.mark.parametrize("words", STEPS.values(), ids=STEPS.keys())
def test_no_step_waits(words: list[str], monkeypatch: pytest.MonkeyPatch):
    """Data, noise levels, noise, loss, gradient, its check and clipping, optimisers, and average, of every method."""
    method = build_method(load(words[0], [*words[1:], "checkpoint=null"]), load=False)
    allow(monkeypatch)
    move(method)
    attach(method)
    network = method.averaged()
    if network is not None:
        method.ema = EMA(network, 1000)
        method.ema.failed = method._check.failed
    batch = batch_on_gpu(method.shape, 10)
    method.steps = 15
    method.training_step(batch, 0)  # makes tables and the optimiser's state
    with refusing():
        method.training_step(batch, 1)  # step 16, with the critic's penalty
    assert method.steps == 17


def test_batches_of_resident_images_are_gathered_on_the_gpu():
    images = ArrayImages(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), torch.arange(6))
    resident = ResidentImages(images, GPU, flip=True)
    one = torch.arange(2, device=GPU)
    with refusing():
        batch = resident.gather(Chosen(one, one))
    assert [tensor.device for tensor in (batch.image, batch.condition.labels, batch.index)] == [GPU] * 3
    assert batch.image.dtype == torch.float32


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), x.new_zeros(())),
        lambda x: x.nonzero(),
        lambda x: torch.tensor([0.5, 1.0], device=x.device),
        lambda x: torch.as_tensor(0.5, device=x.device),
        lambda x: x.new_tensor([0.5, 1.0]),
        lambda x: torch.arange(3.0).to(x),
        lambda x: x[x.argmax()],  # indexing by a number
        lambda x: torch.linalg.eigh(torch.outer(x, x)),
        lambda x: torch.linalg.inv(torch.outer(x, x)),
    ],
)
def test_what_waits_is_found(wait):
    """So that the tests above can fail."""
    x = torch.zeros(3, device=GPU)
    with pytest.raises((Waits, RuntimeError)), refusing():
        wait(x)


def test_logged_values_are_on_the_cpu():
    """Where Lightning's progress bar reads them in each of the following steps: tensors, as numbers would be moved."""
    logged: dict[str, tuple[Tensor, bool]] = {}

    def log(name: str, value: Tensor, prog_bar: bool = False) -> None:
        logged[name] = value, prog_bar

    method = build_method(load("digits/edm"), load=False)
    method._phases = method.phases()
    method.log = log  # type: ignore[assignment]
    method.note({"denoiser_loss": torch.tensor(3.0)})
    assert not method._noted, "the step is not logged"
    method.logs_now, method.images_seen = True, 128
    method.note({"denoiser_loss": torch.tensor(3.0), "other": torch.tensor(0.1)})
    method._log_noted()
    assert {name: (round(value.item(), 6), bar) for name, (value, bar) in logged.items()} == {
        "train/denoiser_loss": (3.0, True), "train/other": (0.1, False), "train/images": (128.0, True),
    }  # fmt: skip
    assert all(value.device.type == "cpu" for value, _ in logged.values())
    assert not method._noted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
@pytest.mark.parametrize("name", ["digits/edm", "digits/ddm", "digits/tdpm", "digits/small_t_trained", "digits/dlg"])
def test_no_step_waits_on_a_gpu(name: str, tmp_path):
    """Between two logged steps nothing waits, neither here nor in Lightning, as CUDA itself reports it."""

    class Strict(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            torch.cuda.set_sync_debug_mode("error" if 2 <= pl_module.steps < 9 else "default")

    words = ["accelerator=gpu", "precision=bf16-mixed", "logger=csv", f"out={tmp_path}", "checkpoint=null"]
    config = load(name, [*words, "training.log_every=10", "images=2000", "training.batch_size=128"])
    method, data = build_method(config, load=False), build_data(config)
    trainer = run_trainer.build_trainer(
        config, [run_trainer.build_checkpointer(config, data), Strict()], len(method.phases())
    )
    try:
        trainer.fit(method, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert method.steps == 16


SAMPLERS = {
    **{solver: ["digits/edm", f"solver={solver}"] for solver in SOLVERS if not SOLVERS[solver].adaptive},
    **{grid: ["digits/edm", "solver=euler", f"solver.grid={grid}"] for grid in sorted({*GRIDS} - {"index", "listed"})},
    "listed": ["digits/edm", "solver=euler", "solver.grid={name: listed, fractions: [0, 0.4, 1]}"],
    "index": ["digits/edm", "process=vp_discrete", "solver=ddim", "solver.grid=index", "denoiser.ratio_max=100"],
    "score_sde": ["digits/ddpm", "process.beta_1=10", "solver={name: pc, discretisation: score_sde, grid: time}"],
    "euler_maruyama of score_sde": ["digits/ddpm", "solver={name: euler_maruyama, discretisation: score_sde}"],
    "rhoab": ["digits/edm", "solver={name: deis, mode: rhoab}"],
    "tab on discrete vp": ["digits/edm", "process=vp_discrete", "solver=deis", "denoiser.ratio_max=100"],
    "guidance": ["digits/edm", "network.classes=10", "solver.guidance=1.0"],
    "ddm": ["digits/ddm", "by_nfe=null"],
    "dlg": ["digits/dlg", "by_nfe=null", "prior.chains=4", "prior.burn_in_counted=false"],
    "dlg, sampled levels": ["digits/dlg", "by_nfe=null", "prior.chains=4", "prior.burn_in_counted=false",
                            "prior.update=sample"],
    "restart": ["digits/edm", "solver=dpmpp2m",
                "prior={name: restart, chains: 4, init_steps: 2}"],
    "tdpm": ["digits/edm", "prior=implicit", "method=tdpm"],
    "tweedie": ["digits/edm", "tweedie_ratio=0.02"],
}  # fmt: skip


@pytest.mark.parametrize("words", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_no_batch_waits(words: list[str]):
    """From the first noise to the image: prior, chain, solver, last step, conversion."""
    sampler = build_method(load(words[0], [*words[1:], "checkpoint=null"]), load=False).sampler
    for module in sampler._modules():
        move(module)
    assert sampler.device == GPU
    n = 8
    plan = sampler.plan(30, n)
    (group, *_) = plan.prior.schedule(n, 4)
    checks = Checks()
    checks.add = lambda holds, error: None  # the results have no values
    sampler.denoiser.process.ratio(torch.zeros(1, dtype=torch.float64, device=GPU))  # copies its table to the GPU, once
    with torch.no_grad(), checks.collected(), refusing():
        state = sampler.open(plan, 0, group)
        images = [sampler.kind(x_0) for _, x_0 in sampler.draw(plan, 0, group, state)]
    assert {one.device for one in images} == {GPU}


def test_a_loss_that_samples_does_not_wait(monkeypatch: pytest.MonkeyPatch):
    words = ["method=tdpm", "method.frozen=true", "prior=implicit", "method.objectives=[{name: ode_pair, steps: 3}]"]
    method = build_method(load("digits/edm", [*words, "checkpoint=null"]), load=False)
    allow(monkeypatch)
    monkeypatch.setattr(Checks, "add", lambda self, holds, error: None)
    move(method)
    attach(method)
    batch = batch_on_gpu(method.shape, 10)
    method.steps = 15
    method.training_step(batch, 0)
    with refusing():
        method.training_step(batch, 1)
