"""``sample``: the images that a bench measures, written to one folder per budget.

A folder contains the images of one run, and ``sample.json``, which describes them. It is written under another name and
renamed when it is complete; until then, finished batches are in OUT/partial.
"""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel import experiment
from diffaccel.collective import World, all_gather, failing_together
from diffaccel.config import Config
from diffaccel.data import build_source
from diffaccel.errors import UsageError
from diffaccel.evaluation.partial import Partial
from diffaccel.evaluation.point import weights_of
from diffaccel.evaluation.production import produce, progress
from diffaccel.evaluation.provenance import device_name, git_commit, identity_hash, versions
from diffaccel.experiment import loading
from diffaccel.experiment.evaluation import own_weights
from diffaccel.experiment.identity import describe_configuration, settings_of
from diffaccel.experiment.loading import feature_networks_of
from diffaccel.noise import GENERATOR
from diffaccel.parts.overrides import as_given
from diffaccel.prior import ChainPrior, Plan
from diffaccel.report.image_files import write_npz, write_png
from diffaccel.run import launch
from diffaccel.sampling import Sampler
from diffaccel.text.terminal import PlainConsole, print_lines
from diffaccel.verbs.bench import planned

HELP = """\
sample EXPERIMENT nfe=10 n=64
write the images that bench measures (format=png or npz)

Keys:
  nfe=10 or nfe=5,10       maximum network evaluations per image, including burn-in; one folder each
  n=64 seed=0              number of images, and seed of their noise
  prior=gaussian chains=100  distribution of the starting states, and number of chains of a chain prior
  caption="a seven"        caption of all images, for an experiment with condition=captions
  format=npz               an npz file with the array `images`, also as `arr_0`, in place of PNG files
  dry_run=true             print the plan with its cost and memory; write nothing
"""
DESCRIPTION = "sample.json"


def sample(config: Config) -> list[Path]:
    """Write the images of every budget and print their folders.

    Returns:
        Folders, one per budget; empty for a dry run.

    Raises:
        UsageError: A folder contains other images, OUT can't be written to, or the format is not suitable.
    """
    sampler = planned(config)
    if sampler is None:
        return []
    writer = ImageWriter(config, sampler, loading.describe_checkpoint(config, sampler.denoiser))

    def run(world: World, device: torch.device) -> None:
        sampler.to(device)
        writer.run(world)

    folders = list(writer.folders.values())
    if launch.everywhere(config, run):
        print_lines(*map(str, folders))
    return folders


class ImageWriter:
    """Sampling and writing of the images of each budget.

    Args:
        config: Configuration of the run.
        sampler: Sampler with its weights.
        checkpoint: Description of the denoiser's weights.

    Attributes:
        folders: Folder of each budget.

    Raises:
        UsageError: A folder contains other images, or the format is not suitable.
    """

    def __init__(self, config: Config, sampler: Sampler, checkpoint: Mapping[str, Any] | None) -> None:
        self.config, self.sampler, self.checkpoint = config, sampler, checkpoint
        self.plans = {budget: sampler.plan(budget, config.n) for budget in config.nfe}
        self.format = config.format if sampler.kind.discrete else "npz"
        if self.format == "png" and config.shape[0] not in (1, 3):
            raise UsageError(f"format=png requires 1 or 3 channels, not {config.shape[0]}: set format=npz")
        self.images = experiment.identify_images(config)
        self.folders = {budget: config.folder / folder_name(budget) for budget in self.plans}
        self.made_before = {budget for budget in self.plans if self._made_before(budget)}
        self.console = PlainConsole(stderr=True, soft_wrap=True)

    def _key(self, budget: float) -> str:
        """Cache key of everything that determines the files."""
        return identity_hash({**self.images(budget), "files": self.format})

    def _made_before(self, budget: float) -> bool:
        """Whether the budget's folder contains these images already, and they should not be made again.

        Raises:
            UsageError: The folder contains other images that should not be replaced, or other files.
        """
        folder = self.folders[budget]
        if not folder.exists():
            return False
        said = read_description(folder)
        if said is None:
            raise UsageError(f"{folder} exists without {DESCRIPTION}: remove it, or choose another out=")
        if said.get("key") != self._key(budget) and not self.config.again:
            raise UsageError(
                f"{folder} contains {said.get('n')} images of seed {said.get('seed')}, made with other settings (see "
                f"its {DESCRIPTION}): set again=true to replace them, or choose another out="
            )
        if not self.config.again and (lacking := self.config.n - _count(folder, said)):
            raise UsageError(f"{folder} lacks {lacking} of its images: set again=true to make them again")
        return not self.config.again

    def run(self, world: World) -> None:
        """Sample and write the images of every budget."""
        if world.first and self.config.format != self.format:
            self.console.print(f"{self.config.data['name']} has points instead of images, which are written as npz")
        for budget, plan in self.plans.items():
            if budget not in self.made_before:
                self._run(world, budget, plan)
            elif world.first:
                self.console.print(f"nfe {budget:g}: made before (set again=true to make them again)")

    @torch.no_grad()
    def _run(self, world: World, budget: float, plan: Plan) -> None:
        """Sample the images of a budget on all ranks, and write them on the first."""
        config = self.config
        partial = Partial(config.folder / "partial" / f"sample-{self._key(budget)}")
        groups = plan.prior.schedule(config.n, config.images_per_batch)
        evaluations, burn_in = Counter[str](), Counter[str]()
        with failing_together(), progress(self.console, world.first, budget) as bars:
            mine = world.share(groups)
            bar = bars.add_task("", total=sum(len(batch) for group in mine for batch in group))
            for chunk in produce(self.sampler, plan, mine, config.seed, partial, world.rank):
                evaluations.update(chunk.evaluations)
                burn_in.update(chunk.burn_in)
                bars.advance(bar, len(chunk.indices))
        shares = all_gather((evaluations, burn_in))
        evaluations, burn_in = (sum(parts, Counter[str]()) for parts in zip(*shares, strict=True))
        nfe, burned = self.sampler.evaluations_per_image(plan, budget, evaluations, burn_in, config.n)
        with failing_together():
            if world.first:
                said = {"nfe": nfe, "nfe_burn_in": burned, "evaluations": evaluations}
                batches = sorted((batch for group in groups for batch in group), key=min)
                self._write(plan, partial, batches, budget, {**self._describe(world, budget), **said})
                partial.clear()
                with suppress(OSError):  # the folder may contain batches of a point
                    (config.folder / "partial").rmdir()

    def _write(
        self, plan: Plan, partial: Partial, batches: Sequence[range], budget: float, said: dict[str, Any]
    ) -> None:
        """Write the folder atomically, in place of an existing one.

        Raises:
            UsageError: The folder can't be written.
        """
        folder = self.folders[budget]
        part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")

        def images() -> Iterator[Tensor]:
            for indices in batches:
                found = partial.read(indices).images
                assert found is not None
                yield found

        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            if self.format == "png":
                write_png(part, images(), self.config.n)
            else:
                write_npz(part / "images.npz", images, self.config.n, self.sampler.classes_of(plan, self.config.n))
            said = {"key": self._key(budget), "images_sha256": _sha256(partial, batches), **said}
            (part / DESCRIPTION).write_text(json.dumps(said, indent=1, default=str) + "\n")
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            part.rename(folder)
        except OSError as error:
            raise UsageError(f"{folder} can't be written ({error.strerror or error}): choose another out=") from None
        shutil.rmtree(old, ignore_errors=True)

    def _describe(self, world: World, budget: float) -> dict[str, Any]:
        """Describe the images, with keys of a point."""
        config, prior = self.config, self.plans[budget].prior
        return {
            "experiment": config.experiment,
            "method": config.method_name,
            "process": config.process["name"],
            "data": as_given(config.data.get("label")) or build_source(config.data).label,
            "checkpoint": self.checkpoint,
            "feature_networks": feature_networks_of(*own_weights(config, self.sampler)),
            "configuration": describe_configuration(config, measured=True),
            "by_budget": bool(self.sampler.by_nfe),
            "tuned": self.sampler.tuned,
            "nfe_budget": budget if math.isfinite(budget) else None,
            "settings": settings_of(config, budget),
            "n": config.n,
            "seed": config.seed,
            "noise": GENERATOR,
            "weights": weights_of(prior),
            "chains": prior.chains_for(config.n) if isinstance(prior, ChainPrior) else None,
            "batch_size": config.images_per_batch,
            "classes": self.sampler.classes or None,
            "format": self.format,
            "truncate": config.truncate,
            "precision": config.precision,
            "world_size": world.size,
            "device": device_name(self.sampler.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "git": git_commit(),
        }


def _count(folder: Path, said: Mapping[str, Any]) -> int:
    """Number of images in a folder."""
    if said["format"] == "png":
        return sum(1 for _ in folder.glob("*.png"))
    return said["n"] if (folder / "images.npz").is_file() else 0


def _sha256(partial: Partial, batches: Sequence[range]) -> str:
    """Hash of the hashes of the images in order, ``images_sha256`` of a point."""
    digest = hashlib.sha256()
    for indices in batches:
        digest.update(partial.read(indices).digests.numpy().tobytes())
    return digest.hexdigest()


def folder_name(budget: float) -> str:
    """Return the name of the folder of a budget's images in OUT."""
    return f"images_nfe{budget:g}" if math.isfinite(budget) else "images_adaptive"


def read_description(folder: Path) -> dict[str, Any] | None:
    """Read the description of the images in a folder; None without one."""
    try:
        found = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def find_described(path: str) -> tuple[str, dict[str, Any] | None]:
    """Return the path of the images, and the description by ``sample`` beside them or None.

    Raises:
        UsageError: The path is not the folder of one budget, but the one above it.
    """
    place = Path(path)
    folder = place if place.is_dir() else place.parent
    said = read_description(folder)
    below = sorted(file.parent.name for file in place.glob(f"*/{DESCRIPTION}")) if place.is_dir() else []
    if said is None and below:
        raise UsageError(
            f"{path} contains the images of `diffaccel sample` in folders of their own ({', '.join(below)}): score one "
            f"at a time, for example {place / below[0]}"
        )
    if said is None or not (place.is_dir() or place == folder / "images.npz"):
        return path, None
    inside = folder / "images.npz"
    return (str(inside) if place.is_dir() and inside.is_file() else path), said
