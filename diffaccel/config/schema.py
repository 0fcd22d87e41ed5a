"""The keys of an experiment, their types and defaults."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from diffaccel.parts import overrides
from diffaccel.parts.catalogue import CATALOGUE
from diffaccel.parts.schema import FILE, PLACE
from diffaccel.parts.trees import merge
from diffaccel.sampling import nearest
from diffaccel.training.plan import Training

BY_NFE = {"by_nfe": True}
"""Metadata of a part that ``by_nfe`` may set."""

STANDARD = ("frechet", "kid", "manifold", "memorisation")
"""Names of the metrics that are computed unless ``metrics`` names others."""

PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
"""Lightning's short names."""


@dataclass
class Search:
    """A seeded random search for the best prior and solver at each budget, by successive halving."""

    trials: int = 32
    """Settings drawn per budget, the experiment's own among them."""
    images: list[int] = field(default_factory=lambda: [500, 2000])
    """Images per setting, round by round."""
    keep: float = 0.25
    """Share of the settings that goes on to the next round."""
    space: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> its values: a list, or {low, high} with log: true or integer: true. Keys that a drawn part does
    not have are left out."""


@dataclass
class Tradeoff:
    """Start times to compare for small T."""

    T: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    """Times of the experiment's process."""
    densities: dict[float, str] = field(default_factory=dict, metadata=FILE)
    """Time -> weights of the experiment's density as fitted there, besides its own; all share one flow."""
    images: int = 512
    """Test images that the bound is taken of."""
    draws: int = 16
    """Evaluations on each."""
    fd: bool = True
    """Whether to sample ``n`` images from each start at each time, and measure their distance too."""


@dataclass
class Config:
    """Everything a run may set. Parts are checked when they are built, the rest here."""

    method: dict[str, Any] = field(default_factory=dict)
    """``diffusion``, the four methods ``tdpm``, ``ddm``, ``small_t`` and ``dlg``, or ``extractor`` for the feature
    network that scores; ``label`` is the name in points and tables, if it is not to be the method's own."""
    data: dict[str, Any] = field(default_factory=dict)
    """Source of images."""
    shape: list[int] = MISSING
    """Image shape [C, H, W]."""
    process: dict[str, Any] = field(default_factory=lambda: {"name": "edm"})
    """Forward process."""
    network: dict[str, Any] = field(default_factory=dict)
    """Backbone of the denoiser; none for an exact one."""
    denoiser: dict[str, Any] = field(default_factory=lambda: {"name": "karras"})
    """Preconditioning."""
    levels: dict[str, Any] = field(default_factory=lambda: {"name": "lognormal"})
    """Noise levels to train at."""
    posterior: dict[str, Any] = field(default_factory=dict)
    """What a chain asks for its noise level."""
    prior: dict[str, Any] = field(default_factory=lambda: {"name": "gaussian"}, metadata=BY_NFE)
    """Law of the starting states."""
    solver: dict[str, Any] = field(default_factory=lambda: {"name": "heun"}, metadata=BY_NFE)
    """Reverse integrator."""
    by_nfe: dict[int, Any] = field(default_factory=dict)
    """Budget -> ``{prior: ..., solver: ...}`` laid over the above from that budget on; the lowest also below it."""
    tuned_for: list[str] = field(default_factory=list)
    """``NETWORK=HASH`` of each of the weights that ``by_nfe`` was searched for, as `diffaccel search` writes it. With
    other weights ``by_nfe`` is left out. Empty if it holds for any."""
    search: Search = field(default_factory=Search)
    """What `diffaccel search` tries."""
    training: Training = field(default_factory=Training)
    """How to train."""
    checkpoint: str | None = field(default=None, metadata=FILE)
    """Weights of the denoiser: safetensors, or a checkpoint of ``fit``."""
    init: str | None = field(default=None, metadata=FILE)
    """Weights that a fit begins the denoiser with, in place of random ones; of the same kinds of files."""
    extractor: dict[str, Any] = field(default_factory=lambda: {"name": "inception"})
    """Feature network that scores."""
    reference: str | None = field(default=None, metadata=FILE)
    """Statistics that images are compared with (npz, from ``diffaccel reference``)."""
    floor: str | None = field(default=None, metadata=FILE)
    """Statistics of held-out real images, for the floor."""
    metrics: list[Any] = field(default_factory=lambda: list(STANDARD))
    """Metrics of a point: names, or mappings with a ``name`` and keys; ``frechet`` must be among them."""
    nfe: list[float] = field(default_factory=lambda: [10.0])
    """Budgets: most evaluations per image, one point each; null for an adaptive solver, which keeps to none."""
    n: int = 5000
    """Images per point."""
    seed: int = 0
    """Seed of sampling and of training."""
    batch_size: int = 100
    """Images per sampling batch; training has its own."""
    limit: int | None = None
    """Use only the first images of each split."""
    precision: str = "32-true"
    """Lightning's precision (32-true, bf16-mixed, 16-mixed, 64-true), or ``auto``: bf16-mixed where the device has bf16
    units, 32-true elsewhere. The default gives the same results on every machine, up to rounding."""
    compile: bool = False
    """Compile the networks with torch.compile: some seconds at first, then faster; results change by rounding."""
    channels_last: bool = False
    """Keep activations in channels-last order: faster convolutions on some devices, slower GroupNorm on CPUs."""
    threads: int | None = None
    """CPU threads per process; by default OMP_NUM_THREADS, or the process's share of the usable cores."""
    accelerator: str = "auto"
    """gpu, cpu, or ``auto``: CUDA GPUs if one is visible, else the CPU."""
    devices: int = 1
    """Devices (processes) per node."""
    num_nodes: int = 1
    """Nodes."""
    logger: str = "wandb"
    """``wandb``, ``csv``, ``tensorboard`` or ``none``."""
    wandb_mode: str | None = None
    """``offline`` needs no account; ``online`` uploads; ``disabled``. By default WANDB_MODE, or offline."""
    out: str | None = field(default=None, metadata=PLACE)
    """Folder to write to; runs/<data>/<method> by default."""
    resume: str | None = field(default=None, metadata=PLACE)
    """``auto`` goes on from OUT/last.ckpt if there is one; or a checkpoint's path."""
    tweedie_ratio: float | None = None
    """Noise-to-data ratio of one more denoising step after the solver; null for none. DLG's reference takes 0.02
    (CIFAR-10) or 0.002 (CelebA-HQ), after solvers that end in such a step themselves."""
    tweedie_counted: bool = True
    """Whether that step is an evaluation of the budget; DLG's reference doesn't count it. If not, points list it under
    ``tweedie``."""
    truncate: bool = False
    """Truncate images to uint8 as the DLG reference does, instead of rounding them."""
    jpeg: int | None = None
    """Score JPEGs of this quality, as the DLG reference did (75); the metrics are then named so, `fd_..._jpeg75`."""
    keep_features: bool = True
    """Keep the features of each point's first 10,000 images, which `diffaccel compare` pairs."""
    keep_images: bool = False
    """Keep each point's images in OUT/images: benched again with another extractor, they are scored, not made anew."""
    likelihood: bool = False
    """Measure bits per dimension of test images beside each point, by the probability flow."""
    likelihood_n: int = 512
    """How many test images."""
    tradeoff: Tradeoff = field(default_factory=Tradeoff)
    """What `diffaccel tradeoff` tries."""
    again: bool = False
    """Make what OUT has already once more: images and statistics replace the old ones, points are added."""
    dry_run: bool = False
    """Print the plan, its cost and memory; measure nothing."""
    format: str = "png"
    """Of ``diffaccel sample``: png, or npz with the arrays ``images`` and, the same, ``arr_0``."""
    experiment: str = ""
    """Where the configuration came from; set by the loader."""

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        """What was chosen for this machine, to be said when work starts; no key."""

    @property
    def method_name(self) -> str:
        """Name of the method in points, tables and headers: the label, or the method's own."""
        return str(self.method.get("label") or self.method["name"])

    @property
    def data_name(self) -> str:
        """The data set's name: the experiment's folder."""
        return Path(self.experiment).absolute().parent.name

    @property
    def folder(self) -> Path:
        """Where a run writes."""
        return Path(self.out or Path("runs", self.data_name, Path(self.experiment).stem))

    def at(self, nfe: float) -> dict[str, dict[str, Any]]:
        """Prior and solver at a budget."""
        own = {part: getattr(self, part) for part in TUNABLE}
        if not self.by_nfe:
            return own
        return merge(own, self.by_nfe[nearest(self.by_nfe, nfe)])


PARTS = tuple(
    item.name for item in dataclasses.fields(Config) if item.name in CATALOGUE and item.type == dict[str, Any]
)
"""Keys that hold a part."""

SECTIONS = tuple(item.name for item in dataclasses.fields(Config) if dataclasses.is_dataclass(item.type))
"""Keys that hold a mapping with keys of its own."""

TUNABLE = tuple(item.name for item in dataclasses.fields(Config) if "by_nfe" in item.metadata)
"""Those that ``by_nfe`` may set."""

KEYS = frozenset(item.name for item in dataclasses.fields(Config)) | overrides.ALIASES.keys()
"""Keys that need no part's name before them."""

FLAGS = frozenset(item.name for item in dataclasses.fields(Config) if item.type is bool)
"""Keys that ``--key`` alone sets to true."""
