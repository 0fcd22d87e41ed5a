"""Images for other programs: those that a bench measures, written to files, a folder for each budget.

A folder holds images of one run alone, and appears when they are whole: it is written under another name, with
``sample.json`` in it, which says what the images are. Until then OUT/partial has the batches that are done.
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

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffaccel import experiment
from diffaccel.collective import all_gather, failing_together
from diffaccel.config import Config
from diffaccel.data import SOURCES
from diffaccel.errors import UsageError
from diffaccel.evaluation.partial import Chunk, Partial
from diffaccel.evaluation.provenance import device_name, git_commit, identity_hash, versions
from diffaccel.evaluation.sampling import ImageKind, evaluations_per_image, progress, sample_group
from diffaccel.evaluation.scores import digests
from diffaccel.experiment import loading
from diffaccel.methods import Diffusion
from diffaccel.prior import Plan
from diffaccel.report.image_files import write_npz, write_png
from diffaccel.run import launch
from diffaccel.text.terminal import PlainConsole

DESCRIPTION = "sample.json"


def sample(config: Config, method: Diffusion, plans: Mapping[float, Plan]) -> list[Path]:
    """Write the images of every budget.

    Args:
        config: The run's.
        method: Makes the images; its weights are loaded.
        plans: How each budget is spent.

    Returns:
        The folders, one a budget.

    Raises:
        UsageError: A folder holds other images, OUT can't be written to, or the images can't be of this format.
    """
    writer = ImageWriter(config, loading.describe_checkpoint(config, method), plans)
    config.logger = "none"
    trainer = launch.build_trainer(config, [writer])
    trainer.test(method.eval(), DataLoader([0]), verbose=False)  # type: ignore[arg-type]
    return list(writer.folders.values()) if trainer.is_global_zero else []


class ImageWriter(L.Callback):
    """Makes and writes the images of each budget.

    Args:
        config: The run's.
        checkpoint: Description of the denoiser's weights.
        plans: How each budget is spent.

    Attributes:
        folders: Folder by budget.

    Raises:
        UsageError: A folder holds other images, or the images can't be of this format.
    """

    def __init__(self, config: Config, checkpoint: Mapping[str, Any] | None, plans: Mapping[float, Plan]) -> None:
        self.config, self.checkpoint, self.plans = config, checkpoint, plans
        self.kind = ImageKind(SOURCES.build(config.data).has_images(), config.truncate)
        self.format = config.format if self.kind.discrete else "npz"
        if self.format == "png" and config.shape[0] not in (1, 3):
            raise UsageError(f"format=png: images of {config.shape[0]} channels have no PNG: set format=npz")
        self.images = experiment.identify_images(config)
        self.folders = {budget: config.folder / folder_name(budget) for budget in plans}
        self.made_before = {budget for budget in plans if self._made_before(budget)}
        self.console = PlainConsole(stderr=True, soft_wrap=True)

    def _key(self, budget: float) -> str:
        """Hash of all that the files follow from."""
        return identity_hash({**self.images(budget), "files": self.format})

    def _made_before(self, budget: float) -> bool:
        """Whether the budget's folder holds these very images, and they aren't to be made again.

        Raises:
            UsageError: It holds others that aren't to be replaced, or what this program has not written.
        """
        folder = self.folders[budget]
        if not folder.exists():
            return False
        said = read_description(folder)
        if said is None:
            raise UsageError(f"{folder} has no {DESCRIPTION}: remove it, or choose another out=")
        if said.get("key") != self._key(budget) and not self.config.again:
            raise UsageError(
                f"{folder} holds {said.get('n')} images of seed {said.get('seed')}, made with other settings (see its "
                f"{DESCRIPTION}): again=true replaces them, or choose another out="
            )
        if not self.config.again and (lacking := self.config.n - _count(folder, said)):
            raise UsageError(f"{folder} lacks {lacking} of its images: again=true makes them anew")
        return not self.config.again

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make and write the images of every budget."""
        assert isinstance(pl_module, Diffusion)
        if trainer.is_global_zero and self.config.format != self.format:
            self.console.print(f"{self.config.data['name']} has points and no images: they are written as npz")
        for budget, plan in self.plans.items():
            if budget not in self.made_before:
                self._run(trainer, pl_module, budget, plan)
            elif trainer.is_global_zero:
                said = f"nfe {budget:g}: made before (again=true makes them anew)"
                self.console.print(said)

    @torch.no_grad()
    def _run(self, trainer: L.Trainer, method: Diffusion, budget: float, plan: Plan) -> None:
        """Make a budget's images in all processes, then write them in one."""
        method.tune(budget)
        partial = Partial(self.config.folder / "partial" / f"sample-{self._key(budget)}")
        groups = method.prior.schedule(self.config.n, self.config.batch_size)
        evaluations, burn_in = Counter[str](), Counter[str]()
        with failing_together(), progress(self.console, trainer.is_global_zero, budget) as bars:
            mine = groups[trainer.global_rank :: trainer.world_size]
            bar = bars.add_task("", total=sum(len(batch) for group in mine for batch in group))
            for group in mine:
                for chunk in self._chunks(trainer, method, plan, group, partial):
                    evaluations.update(chunk.evaluations)
                    burn_in.update(chunk.burn_in)
                    bars.advance(bar, len(chunk.indices))
        shares = all_gather((evaluations, burn_in))
        evaluations, burn_in = (sum(parts, Counter[str]()) for parts in zip(*shares, strict=True))
        nfe, burned = evaluations_per_image(method, budget, evaluations, burn_in, self.config.n)
        with failing_together():
            if trainer.is_global_zero:
                said = {"nfe": nfe, "nfe_burn_in": burned, "evaluations": evaluations}
                batches = sorted((batch for group in groups for batch in group), key=min)
                self._write(method, budget, partial, batches, {**self._describe(trainer, method, budget), **said})
                partial.clear()
                with suppress(OSError):  # it may hold a point's batches
                    (self.config.folder / "partial").rmdir()

    def _chunks(
        self, trainer: L.Trainer, method: Diffusion, plan: Plan, group: list[range], partial: Partial
    ) -> Iterator[Chunk]:
        """Yield a group's batches: those done before, then those made now."""
        done, saved = partial.done(group, hasattr(method.prior, "chains"))
        for indices in group[:done]:
            yield partial.read(indices)
        autocast = trainer.precision_plugin.forward_context
        batches = sample_group(method, plan, group, self.config.seed, self.kind, autocast, done, saved)
        for number, made in enumerate(batches, start=done):
            final = made.images.cpu()
            none = torch.zeros(len(final), 0)  # features are for scoring
            chunk = Chunk(
                made.indices, none, digests(final), final[:0], final, "", trainer.global_rank,
                made.evaluations, made.burn_in, made.flops, made.seconds, 0.0, made.trace,
            )  # fmt: skip
            partial.save(group, number, chunk, made.state)
            yield chunk

    def _write(
        self, method: Diffusion, budget: float, partial: Partial, batches: Sequence[range], said: dict[str, Any]
    ) -> None:
        """Write the folder whole, in place of the one that was there.

        Raises:
            UsageError: It can't be written.
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
                write_npz(part / "images.npz", images, self.config.n, method.labels(range(self.config.n)))
            said = {"key": self._key(budget), "images_sha256": _sha256(partial, batches), **said}
            (part / DESCRIPTION).write_text(json.dumps(said, indent=1, default=str) + "\n")
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            part.rename(folder)
        except OSError as error:
            raise UsageError(f"{folder} can't be written ({error.strerror or error}): choose another out=") from None
        shutil.rmtree(old, ignore_errors=True)

    def _describe(self, trainer: L.Trainer, method: Diffusion, budget: float) -> dict[str, Any]:
        """Say what the images are, in the words of a point."""
        config = self.config
        return {
            "experiment": config.experiment,
            "method": config.method_name,
            "checkpoint": self.checkpoint,
            "nfe_budget": budget if math.isfinite(budget) else None,
            "settings": config.at(budget),
            "n": config.n,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "classes": method.classes or None,
            "format": self.format,
            "truncate": config.truncate,
            "precision": str(trainer.precision),
            "world_size": trainer.world_size,
            "device": device_name(method.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "git": git_commit(),
        }


def _count(folder: Path, said: Mapping[str, Any]) -> int:
    """Number of images that a folder has."""
    if said["format"] == "png":
        return sum(1 for _ in folder.glob("*.png"))
    return said["n"] if (folder / "images.npz").is_file() else 0


def _sha256(partial: Partial, batches: Sequence[range]) -> str:
    """Hash of the images' hashes in order: ``images_sha256`` of a point."""
    digest = hashlib.sha256()
    for indices in batches:
        digest.update(partial.read(indices).digests.numpy().tobytes())
    return digest.hexdigest()


def folder_name(budget: float) -> str:
    """The folder of a budget's images in OUT."""
    return f"images_nfe{budget:g}" if math.isfinite(budget) else "images_adaptive"


def read_description(folder: Path) -> dict[str, Any] | None:
    """Read the record that a folder holds of its images; None without one."""
    try:
        found = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
