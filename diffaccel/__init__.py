"""Few-step sampling of diffusion models under one protocol.

>>> import diffaccel as da
>>> model = da.load("digits/edm")  # a name, an experiment's file, or any checkpoint that convert reads
>>> sampler = da.Sampler(model, prior="gaussian", solver="dpmpp2m")
>>> images = sampler(500, nfe=10, seed=0)  # the bench's own images
>>> images.shape, images.dtype, sampler.spent.nfe
(torch.Size([500, 1, 8, 8]), torch.uint8, 10.0)
>>> scores = da.measure(images, reference="digits")
>>> 0.1 < scores["fd_digits"] < 3
True

Names are imported when they are first used: ``import diffaccel`` alone takes a few milliseconds.
"""

from typing import TYPE_CHECKING

from diffaccel.parts.lazy import lazy
from diffaccel.version import __version__

if TYPE_CHECKING:
    from diffaccel.api import (
        advise,
        bench,
        compare,
        convert,
        curve,
        export,
        fit,
        load,
        new,
        reference,
        sample,
        score,
        search,
        sweep,
        tradeoff,
        train,
    )
    from diffaccel.condition import Condition
    from diffaccel.denoiser import Denoiser
    from diffaccel.errors import UsageError
    from diffaccel.evaluation.measure import measure
    from diffaccel.prior import Prior
    from diffaccel.process import Process
    from diffaccel.sampling import Model, Sampler
    from diffaccel.solver import Solver

__all__ = [
    "Condition",
    "Denoiser",
    "Model",
    "Prior",
    "Process",
    "Sampler",
    "Solver",
    "UsageError",
    "__version__",
    "advise",
    "bench",
    "compare",
    "convert",
    "curve",
    "export",
    "fit",
    "load",
    "measure",
    "new",
    "reference",
    "sample",
    "score",
    "search",
    "sweep",
    "tradeoff",
    "train",
]

_FUNCTIONS = (
    *("advise", "bench", "compare", "convert", "curve", "export", "fit", "load", "new", "reference"),
    *("sample", "score", "search", "sweep", "tradeoff", "train"),
)

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Condition": "diffaccel.condition",
        "Denoiser": "diffaccel.denoiser",
        "Model": "diffaccel.sampling",
        "Prior": "diffaccel.prior",
        "Process": "diffaccel.process",
        "Sampler": "diffaccel.sampling",
        "Solver": "diffaccel.solver",
        "UsageError": "diffaccel.errors",
        "measure": "diffaccel.evaluation.measure",
        **dict.fromkeys(_FUNCTIONS, "diffaccel.api"),
    },
)
