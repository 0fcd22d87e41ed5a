"""Registry of the methods. Lightning, which the methods require, is imported when a method is looked up."""

from typing import Any

from diffaccel.parts.registry import Registry

METHODS: Registry[Any] = Registry(
    "method",
    builtins=["diffaccel.methods"],
    context=[
        *("sampler", "levels", "training", "seed"),
        *("data", "device", "bf16", "state_path", "resume", "console"),  # of the fit of an extractor
        "network",  # of the fit of an auto-encoder
    ],
    extra={"label": str | None, "metric": str | None},
)

FORMER = ("edm", "edm_best", "ddpm")
"""Experiments that files of version 0.1 call methods: the method ``diffusion``, with that label."""
