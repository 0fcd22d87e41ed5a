"""Keys of an experiment, with types and defaults."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from diffaccel.budget import nearest
from diffaccel.parts import overrides
from diffaccel.parts.catalogue import CATALOGUE
from diffaccel.parts.schema import FILE, PLACE
from diffaccel.parts.trees import merge
from diffaccel.training.plan import Training

BY_NFE = {"by_nfe": True}
"""Metadata of a part that ``by_nfe`` may set."""

STANDARD = ("frechet", "kid", "manifold", "repetition", "memorisation")
"""Names of the metrics that are computed by default."""

PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
"""Short names of Lightning's precisions."""


@dataclass
class Confirm:
    """Second measurement of the best settings of a search, which decides between them."""

    best: int = 5
    """Number of settings of the last round that are measured again; 1 for no second measurement."""
    seed: int | None = None
    """Seed of their noise; by default the next one."""
    n: int | None = None
    """Images per setting; by default as many as in the last round."""


@dataclass
class Search:
    """Seeded random search for the best prior and solver at each budget, by successive halving."""

    trials: int = 32
    """Number of settings per budget, including the experiment's own and the candidates."""
    images: list[int] = field(default_factory=lambda: [500, 2000])
    """Images per setting in each round."""
    keep: float = 0.25
    """Fraction of the settings that are kept for the next round."""
    judge: Any = None
    """Judge whose distance is minimised: the name of one of ``judges``, or an extractor that is not among them (a name,
    or a mapping with a ``name`` and keys), so that no reported distance was minimised; by default the first of
    ``judges``."""
    candidates: list[Any] = field(default_factory=list)
    """Settings of the first round besides random ones: mappings ``{prior: ..., solver: ...}``, merged into these keys;
    a grid may be ``{name: listed, gamma: ...}``. Candidates that don't fit a budget are left out of it."""
    space: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> values: a list, or {low, high} with log: true or integer: true. Keys that a drawn part does not
    have are ignored."""
    confirm: Confirm = field(default_factory=Confirm)
    """Second measurement of the best settings."""
    identity: str | None = None
    """Hash of the parts, weights and statistics with which the winners in ``by_nfe`` were measured, written by
    `diffaccel search`, which adds winners to a file with the same hash only."""


@dataclass
class Tradeoff:
    """Comparison of start times for small T."""

    T: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    """Start times on the experiment's process."""
    densities: dict[float, str] = field(default_factory=dict, metadata=FILE)
    """Start time -> weights of the experiment's density fitted at that time, in addition to its own weights."""
    images: int = 512
    """Number of test images for the bound."""
    draws: int = 16
    """Evaluations per image for the bound."""
    fd: bool = True
    """Whether to measure the distance of ``n`` samples from each start at each time."""


@dataclass
class Validation:
    """Distances during and after a fit, on a seed and by an extractor that no point uses.

    They show how far a fit is, and choose one of several averages (``training.ema_half_life``).
    """

    judge: dict[str, Any] = field(default_factory=dict)
    """Extractor, which must not be one of the judges."""
    reference: str | None = field(default=None, metadata=FILE)
    """Statistics of training images in its features; null for no validation."""
    seed: int = 7
    """Seed of the images, which differs from ``seed``."""
    nfe: list[float] = field(default_factory=lambda: [5.0, 50.0])
    """Budgets. The average with the smallest distance at the largest one is chosen."""
    n: int | None = None
    """Images per budget for the choice of an average; by default the experiment's ``n``."""
    looks: list[float] = field(default_factory=list)
    """Fractions of the training after which the distances are measured and logged."""
    look_n: int = 1000
    """Images per budget in these measurements."""


@dataclass
class Config:
    """All keys of a run. Parts are checked when they are built."""

    method: dict[str, Any] = field(default_factory=dict)
    """``diffusion``, one of the four methods ``tdpm``, ``ddm``, ``small_t`` and ``dlg``, or ``extractor`` for the
    feature network that scores images; ``label`` is the name in points and tables, by default that of the method."""
    data: dict[str, Any] = field(default_factory=dict)
    """Source of images."""
    shape: list[int] = MISSING
    """Image shape [C, H, W]."""
    condition: dict[str, Any] = field(default_factory=dict)
    """Condition of each image in addition to its label: a degradation, or an image of another source. In sampling, the
    conditions are those of the test images, each for ``samples`` images in succession (1 by default); ``seed`` (0) is
    that of random degradations. Empty for none."""
    latents: dict[str, Any] = field(default_factory=dict)
    """Auto-encoder whose latents the diffusion runs in, in place of pixels; ``checkpoint`` is its weights, ``std`` the
    standard deviation of the latents (1 by default), ``sample`` whether they are drawn from the encoder's posterior
    (true by default) or its means, and ``cache`` the folder of the encoded images. Empty for pixels."""
    process: dict[str, Any] = field(default_factory=lambda: {"name": "edm"})
    """Forward process."""
    network: dict[str, Any] = field(default_factory=dict)
    """Network of the denoiser; empty for an exact denoiser."""
    denoiser: dict[str, Any] = field(default_factory=lambda: {"name": "karras"})
    """Preconditioning of the network, or exact denoiser."""
    levels: dict[str, Any] = field(default_factory=lambda: {"name": "lognormal"})
    """Distribution of the training noise levels."""
    posterior: dict[str, Any] = field(default_factory=dict)
    """Estimate of the noise level of a chain's state."""
    prior: dict[str, Any] = field(default_factory=lambda: {"name": "gaussian"}, metadata=BY_NFE)
    """Distribution of the starting states."""
    solver: dict[str, Any] = field(default_factory=lambda: {"name": "heun"}, metadata=BY_NFE)
    """Reverse integrator."""
    by_nfe: dict[int, Any] = field(default_factory=dict)
    """Budget -> ``{prior: ..., solver: ...}``, merged into these keys from that budget on; the lowest also below it."""
    tuned_for: list[str] = field(default_factory=list)
    """``NETWORK=HASH`` of the weights that ``by_nfe`` was searched for, written by `diffaccel search`. With other
    weights ``by_nfe`` is ignored. Empty if ``by_nfe`` applies to any weights."""
    search: Search = field(default_factory=Search)
    """Settings of `diffaccel search`."""
    training: Training = field(default_factory=Training)
    """Settings of the training."""
    validation: Validation = field(default_factory=Validation)
    """Measurements of a fit that are not points of the experiment."""
    checkpoint: str | None = field(default=None, metadata=FILE)
    """Weights of the denoiser: safetensors, or a checkpoint of ``fit``."""
    init: str | None = field(default=None, metadata=FILE)
    """Initial weights of the denoiser in a fit, from the same kinds of files; random if not set."""
    extractor: dict[str, Any] = field(default_factory=lambda: {"name": "inception"})
    """Feature network that scores images, if ``judges`` is empty. Of a file and its bases, and the command line, the
    last that sets ``extractor`` or ``judges`` decides."""
    judges: list[Any] = field(default_factory=list)
    """Feature networks that score images in one pass: names, or mappings with a ``name`` and keys. The first one is the
    one that tables, curves, searches and ``training.keep_best`` use by default."""
    reference: Any = field(default=None, metadata=FILE)
    """Statistics of training images (npz, from ``diffaccel reference``); for several judges, ``{JUDGE: FILE, ...}``."""
    floor: Any = field(default=None, metadata=FILE)
    """Statistics of held-out images, for the floor; for several judges, ``{JUDGE: FILE, ...}``."""
    keep_rows: int = 10_000
    """Number of images, evenly spaced over the split, whose features `diffaccel reference` writes: files grow by two
    bytes per feature and image, and KID, precision and recall use these images only."""
    metrics: list[Any] = field(default_factory=lambda: list(STANDARD))
    """Metrics of a point: names, or mappings with a ``name`` and keys; ``frechet`` must be among them."""
    nfe: list[float] = field(default_factory=lambda: [10.0])
    """Budgets: maximum number of evaluations per image, one point each; null for an adaptive solver."""
    n: int = 5000
    """Images per point."""
    seed: int = 0
    """Seed of sampling and of training."""
    batch_size: int | None = None
    """Images per sampling batch, on which images depend by rounding only; training has its own. By default as many as
    the device works well with: 100 on a CPU, 2,500 on a GPU with 40 GB, for 32 x 32 pixels."""
    limit: int | None = None
    """Number of images of each split to use, always the same random ones; null for all."""
    precision: str = "32-true"
    """Lightning's precision (32-true, bf16-mixed, 16-mixed, 64-true), or ``auto``: bf16-mixed if the device has bf16
    units, else 32-true. The default gives the same results on every machine, up to rounding."""
    compile: bool = False
    """Compile the networks with torch.compile: slower start, faster evaluations; results change by rounding."""
    channels_last: bool = False
    """Use channels-last memory format: faster convolutions on some devices, slower GroupNorm on CPUs."""
    threads: int | None = None
    """CPU threads per process; by default OMP_NUM_THREADS, or the process's share of the usable cores."""
    accelerator: str = "auto"
    """``gpu``, ``cpu``, or ``auto``: GPUs if one is visible, else the CPU."""
    devices: int = 1
    """Number of devices per node, with one process each."""
    num_nodes: int = 1
    """Number of nodes."""
    logger: str = "wandb"
    """``wandb``, ``csv``, ``tensorboard`` or ``none``."""
    wandb_mode: str | None = None
    """``offline`` (no account required), ``online`` or ``disabled``; by default WANDB_MODE, or offline."""
    out: str | None = field(default=None, metadata=PLACE)
    """Output folder; runs/<data>/<method> by default."""
    resume: str | None = field(default=None, metadata=PLACE)
    """``auto`` to resume from OUT/last.ckpt if it exists, or the path of a training state."""
    tweedie_ratio: float | None = None
    """Noise-to-data ratio of an additional denoising step after the solver; null for no such step. DLG's reference uses
    0.02 (CIFAR-10) or 0.002 (CelebA-HQ), after solvers that also end with such a step."""
    tweedie_counted: bool = True
    """Whether this step counts towards the NFE budget, unlike in DLG's reference; if not, points list it under
    ``tweedie``."""
    truncate: bool = False
    """Truncate images to uint8 as the DLG reference does, instead of rounding them."""
    jpeg: int | None = None
    """Score JPEGs of this quality, 75 in the DLG reference; metrics are then called `fd_..._jpeg75`."""
    keep_features: bool = True
    """Write the features of each point's first 10,000 images, for `diffaccel compare`."""
    keep_images: bool = False
    """Write each point's images to OUT/images, to score them with other extractors without sampling again."""
    likelihood: bool = False
    """Measure bits per dimension of test images for each point, by the probability flow."""
    likelihood_n: int = 512
    """Number of test images for ``likelihood``."""
    tradeoff: Tradeoff = field(default_factory=Tradeoff)
    """Settings of `diffaccel tradeoff`."""
    again: bool = False
    """Make results in OUT again: images and statistics are replaced, points are added."""
    dry_run: bool = False
    """Print the plan with its cost and memory, without measuring."""
    format: str = "png"
    """Format of ``diffaccel sample``: png, or npz with the array ``images``, also as ``arr_0``."""
    experiment: str = ""
    """Name or path of the experiment; set by the loader."""

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        """Messages about the machine, to be printed when work starts; not a key."""
        self.words: list[str] = []
        """Settings of the command line; not a key."""
        self.searched = False
        """Whether ``by_nfe`` is as it was searched for ``tuned_for``, without changes; not a key."""
        self.autoencoder_sha256: str | None = None
        """Hash of the auto-encoder's tensors, once they are read; not a key."""

    @property
    def method_name(self) -> str:
        """Name of the method in points, tables and headers: the label, or the name of the method."""
        return str(self.method.get("label") or self.method["name"])

    @property
    def extractors(self) -> list[Any]:
        """Names or mappings of the feature networks that score images."""
        return self.judges or [self.extractor]

    @property
    def images_per_batch(self) -> int:
        """Images per sampling batch; the default for a CPU until ``settle`` has chosen that of the device."""
        return self.batch_size or 100

    @property
    def data_name(self) -> str:
        """Name of the data set, which is that of the experiment's folder."""
        return Path(self.experiment).absolute().parent.name

    @property
    def folder(self) -> Path:
        """Output folder of the run."""
        return Path(self.out or Path("runs", self.data_name, Path(self.experiment).stem))

    def at(self, nfe: float) -> dict[str, dict[str, Any]]:
        """Return prior and solver of a budget."""
        own = {part: getattr(self, part) for part in TUNABLE}
        if not self.by_nfe:
            return own
        return merge(own, self.by_nfe[nearest(self.by_nfe, nfe)])


PARTS = tuple(
    item.name for item in dataclasses.fields(Config) if item.name in CATALOGUE and item.type == dict[str, Any]
)
"""Keys of parts."""

SECTIONS = tuple(item.name for item in dataclasses.fields(Config) if dataclasses.is_dataclass(item.type))
"""Keys of sections: mappings with a schema of their own."""

TUNABLE = tuple(item.name for item in dataclasses.fields(Config) if "by_nfe" in item.metadata)
"""Parts that ``by_nfe`` may set."""

KEYS = frozenset(item.name for item in dataclasses.fields(Config)) | overrides.ALIASES.keys()
"""Top-level keys."""
