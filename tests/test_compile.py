"""A compiled fit trains through the compiled graphs, one call a step, without compiling again."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import fx

from diffaccel.config import load
from diffaccel.experiment import build_data, build_method
from diffaccel.run import trainer

TINY = ["network.widths=[8]", "network.attention=[]", "network.embedding=16", "training.batch_size=16", "images=96"]


class Graphs:
    """Backend that runs graphs as they are, and counts graphs and calls."""

    def __init__(self) -> None:
        self.made = self.calls = self.with_gradient = 0

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.made += 1

        def run(*arguments: Any) -> Any:
            self.calls += 1
            self.with_gradient += torch.is_grad_enabled()
            return graph.forward(*arguments)

        return run


@pytest.mark.parametrize(
    ("words", "graphs", "calls", "with_gradient"),
    [
        (["digits/edm"], 1, 1, 1),
        (["digits/edm", "precision=bf16-mixed", "network.dropout=0.1", "network.classes=10"], 1, 1, 1),
        (["digits/ddm", "network.widths=[8]"], 1, 1, 1),
        (["digits/tdpm", "method.critic.channel_base=64"], 2, 3, 2),  # denoiser, generator, and states for the critic
        (["digits/small_t_trained"], 1, 1, 1),
        (["digits/dlg"], 1, 1, 1),  # the noise classifier: the denoiser takes no part
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_step_calls_the_compiled_graphs(
    words: list[str], graphs: int, calls: int, with_gradient: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
):
    torch._dynamo.reset()
    backend, steps, compiled = Graphs(), [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled(function, backend=backend))

    class Look(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            steps.append((backend.made, backend.calls, backend.with_gradient))

    config = load(words[0], ["threads=1", "logger=none", "compile=true", f"out={tmp_path}", "checkpoint=null",
                             *TINY, *words[1:]])  # fmt: skip
    method = build_method(config, load=False)
    trainer.build_trainer(config, [Look()], len(method.phases())).fit(method, build_data(config))
    assert steps == [(graphs, calls * step, with_gradient * step) for step in range(1, 7)]
