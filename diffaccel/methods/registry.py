"""Methods by name. The methods themselves need Lightning, which is imported when one is looked up."""

from typing import TYPE_CHECKING

from diffaccel.parts.registry import Registry

if TYPE_CHECKING:
    from diffaccel.methods.base import Diffusion

METHODS: Registry["Diffusion"] = Registry(
    "method",
    builtins=["diffaccel.methods"],
    context=["sampler", "levels", "training", "seed"],
    extra={"label": str | None},
)
