"""Texts of the experiments of all methods for new images.

No experiment contains settings that were searched for other weights (``by_nfe``). The search of one's own weights is
`diffaccel search`, whose space ``edm.yaml`` contains.
"""

import math
from collections.abc import Mapping
from typing import Any

import yaml

from diffaccel.recipes.checkpoint import SIGMA_MAX, Given
from diffaccel.recipes.images import Facts
from diffaccel.recipes.network import length_for, lognormal_mean, network_for

FITS = "fits"
"""Folder of the fits, in that of the experiments."""
WEIGHTS = "weights"
"""Folder of the statistics, in that of the experiments."""
RATIO_MIN = 0.002
"""Lowest noise-to-data ratio of what the experiments train."""

SPACE = """\
search: # of `diffaccel search`, whose best.yaml has the best setting of each budget for your weights
  space:
    prior.ratio_star: [{starts}]
    solver.name: [dpmpp2m, dpmpp3m, unipc2, unipc3, deis, ipndm, heun, dpm2, ddim]
    solver.max_order: [2, 3, 4]
    solver.lower_order_final: [true, false]
    solver.variant: [bh1, bh2]
    solver.D2: [published, parabola]
    solver.mode: [tab, rhoab]
    solver.denoise: [true, false]
    solver.grid.name: [karras, log_snr, time, listed]
    solver.grid.rho: {{low: 3, high: 15}}
    solver.grid.ratio_min: {{low: {low:g}, high: 0.2, log: true}}
    gamma: [1.0, 1.1, 1.15, 1.2]
"""


def flow(value: Any) -> str:
    """Write a value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def experiments(facts: Facts, judges: Mapping[str, Any], given: Given | None) -> dict[str, str]:
    """Return the text of each experiment by the name of its file.

    Args:
        facts: The images.
        judges: Extractors that score images, as in an experiment, by their names.
        given: Checkpoint of a denoiser; None to train one.

    Raises:
        UsageError: The images don't fit the networks.
    """
    recipe = _Recipe(facts, given)
    found = {
        "base.yaml": _base(facts, judges),
        "edm.yaml": recipe.edm(),
        "ddpm.yaml": recipe.ddpm(),
        "ddm.yaml": recipe.ddm(),
        "small_t.yaml": recipe.small_t(),
        "tdpm.yaml": recipe.tdpm(),
    }
    if why_no_dlg(facts, given) is None:
        found["dlg.yaml"] = recipe.dlg()
    return dict(sorted(found.items()))


def why_no_dlg(facts: Facts, given: Given | None) -> str | None:
    """Return why there is no experiment ``dlg`` for these images and this checkpoint; None if there is."""
    _, height, width = facts.shape
    if not (height == width and height & (height - 1) == 0 and 2 <= height <= 512):
        return "its classifier requires square images of 2, 4, 8 ... 512 pixels"
    if given is not None and not given.unlabelled:
        return "its chains sample without labels, and the checkpoint was trained with labels only"
    return None


def _base(facts: Facts, judges: Mapping[str, Any]) -> str:
    _, height, width = facts.shape
    length = length_for(facts.train)
    statistics = {
        key: {judge: f"{WEIGHTS}/{key}_{judge}.npz" for judge in judges} if len(judges) > 1 else f"{WEIGHTS}/{key}.npz"
        for key in ("reference", "floor")
    }
    return f"""\
# Written by `diffaccel new`: {facts.train} training and {facts.test} held-out images of {width}x{height} pixels.
data: {flow(facts.data)}
shape: {flow(list(facts.shape))}
network: {flow(network_for(facts.shape, facts.resized_to))}
judges: {flow(list(judges.values()))}  # networks that score images; nobody trained them on these
reference: {flow(statistics["reference"])}
floor: {flow(statistics["floor"])}
n: {5000 if facts.train >= 2000 else 2000}
nfe: [5, 10, 20]
precision: auto
training:
  images: {length.images}  # images=N on the command line trains for longer or shorter
  warmup: {length.warmup}
  ema_half_life: {length.ema_half_life}
  flip: false  # true doubles the images, if a mirror image is as likely as the image
"""


class _Recipe:
    """Experiments on one denoiser.

    Args:
        facts: The images.
        given: Checkpoint of the denoiser; None to train one.
    """

    def __init__(self, facts: Facts, given: Given | None) -> None:
        self.facts, self.given = facts, given
        self.std = float(f"{facts.std:.2g}")
        self.low, self.high = (RATIO_MIN, SIGMA_MAX) if given is None else given.ratios

    def _grid(self, least: float, **keys: Any) -> dict[str, Any]:
        """Keys of a grid that ends at ``least`` or at the denoiser's lowest ratio; none if that is the default."""
        end = max(least, self.low)
        return {"grid": {**keys, "ratio_min": float(f"{end:.6g}")}} if keys or end > RATIO_MIN else {}

    def _ends(self) -> dict[str, Any]:
        return self._grid(RATIO_MIN)

    def _process(self, name: str) -> str:
        """Line with a process; none for weights that are valid on their own process only."""
        return f"process: {{name: {name}}}\n" if self.given is None or self.given.any_process else ""

    def edm(self) -> str:
        solver = flow({"name": "dpmpp2m", "lower_order_final": False, **self._ends()})
        starts = ", ".join(f"{ratio:g}" for ratio in (80, 40, 20, 10) if ratio <= self.high * 1.001)
        tail = f"prior: {{name: gaussian}}\nsolver: {solver}  # the authors' default of lower_order_final is true\n"
        tail += SPACE.format(starts=starts, low=max(RATIO_MIN, self.low))
        if self.given is None:
            return f"""\
# EDM's preconditioning, process and noise levels (Karras et al., 2022): the denoiser of ddpm, small_t, dlg and tdpm.
base: base.yaml
method: {{name: diffusion, label: edm}}
process: {{name: edm}}
denoiser: {{name: karras, sigma_data: {self.std:g}}}  # measured on the training images
levels: {{name: lognormal, mean: {lognormal_mean(self.facts.shape):g}, std: 1.2}}
checkpoint: {FITS}/edm/ema.safetensors  # of `diffaccel curve`, or `diffaccel fit` with out= set to its folder
{tail}"""
        return f"""\
# The given checkpoint ({self.given.format}), which is not trained here: the denoiser of ddpm, small_t, dlg and tdpm.
base: base.yaml
method: {{name: diffusion, label: edm}}
process: {flow(self.given.process)}
network: {flow(self.given.network)}
denoiser: {flow(self.given.denoiser)}
checkpoint: {flow(self.given.path)}
{tail}"""

    def ddpm(self) -> str:
        solver = flow({"name": "ddim", "eta": 1.0, **self._grid(0.01, name="time")})
        return f"""\
# Ancestral sampling (Ho et al., 2020) with the denoiser of edm.
base: edm.yaml
method: {{name: diffusion, label: ddpm}}
{self._process("vp")}solver: {solver}
"""

    def ddm(self) -> str:
        return f"""\
# Decoupled diffusion (Huang et al., 2024) on the clock t^2, with a denoiser of its own on the network of base.yaml.
base: base.yaml
method: ddm
process: {{name: decoupled, clock: t^2}}
denoiser: {{name: decoupled, sigma_data: {self.std:g}}}
levels: {{name: uniform}}
prior: {{name: gaussian}}
solver: {{name: bridge, eta: 1.0, clamp: true}}
checkpoint: {FITS}/ddm/ema.safetensors
"""

    def small_t(self) -> str:
        basis = "dct" if math.prod(self.facts.shape) > 1024 else "pca"
        return f"""\
# Small T (Franzese et al., 2023): sampling starts at T from the Gaussian of the noisy images, with the denoiser of edm.
base: edm.yaml
method: {{name: small_t, frozen: true}}
{self._process("vp")}prior:
  name: density
  T: 0.4
  density: {{name: gaussian, basis: {basis}}}
  checkpoint: {FITS}/small_t/density.safetensors
"""

    def dlg(self) -> str:
        init = flow({"name": "dpmpp2m", "lower_order_final": False, **self._ends()})
        least, most = max(0.05, self.low), min(SIGMA_MAX, self.high)
        return f"""\
# Denoising Langevin Gibbs (Kim and Ye, 2022): sampling starts from a chain, with the denoiser of edm. A fit trains the
# classifier of noise levels.
base: edm.yaml
method: dlg
posterior:
  name: classifier
  count: 600
  ratio_min: {least:g}
  ratio_max: {most:g}
  checkpoint: {FITS}/dlg/classifier.safetensors
prior:
  name: chain
  images_per_chain: 20
  carry: false
  eta: 1.0
  share: 0.3
  init_solver: {init}
  init_steps: 10
  warmup: [[5, null]]
"""

    def tdpm(self) -> str:
        total = length_for(self.facts.train).images
        unet = self.given is None or self.given.network.get("name") == "unet"
        objectives: list[Mapping[str, Any]] = [
            {"name": "ode_pair", "steps": 8, "pairs": 20_000, "lr": 5.0, "until": 3 * total // 10}
        ]
        if unet:
            objectives.append({"name": "moments", "lr": 0.06, "since": 3 * total // 10})
        critic = {"name": "features", "width": 64} if unet else {"name": "stylegan2", "channel_base": 512}
        solver = flow({"name": "dpmpp2m", "lower_order_final": False, **self._grid(0.03, name="log_snr")})
        return f"""\
# Truncated diffusion (Zheng et al., 2023): a generator at one noise level, trained on the frozen denoiser of edm: first
# on pairs of noise and the solver's state, then on the moments of real states, and at last against a critic.
base: edm.yaml
method:
  name: tdpm
  frozen: true
  critic: {flow(critic)}
  objectives: {flow(objectives)}
  critic_since: {6 * total // 10}
  generator_since: {65 * total // 100}
  generator_lr: 0.1
  critic_lr: 25.0
  gamma: 0.1
prior:
  name: implicit
  ratio_star: 0.5
  ratio_init: {min(SIGMA_MAX, self.high):g}
  checkpoint: {FITS}/tdpm/generator.safetensors
solver: {solver}
training: {{lr: 1e-4, decay: 0.2}}
"""
