"""Time of a network's forward pass and training step with precision, compile and channels_last, relative to float32.

The forward pass is that of `bench`, where ``compile`` treats weights as constants. The training step is that of `fit`.

taskset -c 1 python -m benchmarks.options [REPEATS]
"""

import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import compare, timed
from diffaccel.config import load
from diffaccel.experiment import build_method

EXPERIMENT, BATCH = "cifar10_small/edm", 64
OPTIONS = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "compile": {"compile": True},
    "channels_last": {"channels_last": True},
    "bf16-mixed, compile": {"precision": "bf16-mixed", "compile": True},
    "bf16-mixed, channels_last": {"precision": "bf16-mixed", "channels_last": True},
    "bf16-mixed, compile, channels_last": {"precision": "bf16-mixed", "compile": True, "channels_last": True},
}


def runs(precision: str = "32-true", **options: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions that run a forward pass and a training step of the experiment's network with some options."""
    words = [f"{key}={str(value).lower()}" for key, value in options.items()]
    config = load(EXPERIMENT, words)
    frozen, network = (build_method(config, load=False, frozen=value).denoiser.network for value in (True, False))
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    x, noise = torch.randn(BATCH, 3, 32, 32), torch.randn(BATCH)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")

    def forward() -> None:
        with torch.no_grad(), autocast:
            frozen(x, noise)

    def step() -> None:
        with autocast:
            loss = (network(x, noise) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    forward(), step()  # compile now
    return forward, step


def main(repeats: int = 9) -> None:
    """Measure every option relative to float32 without options."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = runs()
    table = Table("option", "forward", "training step", box=None, header_style="bold")
    for name, options in OPTIONS.items():
        ratios = (compare(timed(ours), timed(bare), repeats) for ours, bare in zip(runs(**options), plain, strict=True))
        table.add_row(name, *(f"{found.ratio:.2f} ({found.low:.2f} .. {found.high:.2f})" for found in ratios))
    print(f"time relative to float32; network of {EXPERIMENT}, batch {BATCH}, one thread")
    Console(width=100).print(table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
