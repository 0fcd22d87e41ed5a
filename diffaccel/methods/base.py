"""Base class of the methods: a sampler, and the training of its denoiser."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.condition import Condition
from diffaccel.data import Batch
from diffaccel.data.augment import LABELS, augment
from diffaccel.denoiser import NetworkDenoiser
from diffaccel.denoiser.levels import Levels
from diffaccel.errors import UsageError
from diffaccel.methods.registry import METHODS
from diffaccel.noise import NoiseStreams
from diffaccel.prior import Prior
from diffaccel.sampling import Sampler
from diffaccel.training.ema import EMA, of_network
from diffaccel.training.module import Phase, TrainedModule
from diffaccel.training.plan import Training
from diffaccel.weights import tensors_sha256


@METHODS.base
@METHODS.register("diffusion")
class Diffusion(TrainedModule):
    """Diffusion with any process, denoiser, prior and solver: the baselines.

    Attributes:
        sampler: Denoiser, prior and solver, with their settings by budget.

    Args:
        sampler: Sampler whose denoiser is trained.
        levels: Distribution of the training noise levels.
        training: Settings of the training.
        seed: Seed of the run.
    """

    starts_from: type = Prior
    """Type of prior that samples of the method start from."""
    fitted_prior: type | tuple[()] = ()
    """Type of prior that a fit trains; an empty tuple for none."""
    fits_posterior = False
    """Whether a fit trains the noise classifier of a chain."""

    def __init__(self, sampler: Sampler, levels: Levels, training: Training, seed: int = 0) -> None:
        super().__init__(training, seed)
        self.sampler, self.levels = sampler, levels
        self.denoiser, self.prior = (
            sampler.denoiser,
            sampler.prior,
        )  # registered as submodules, for checkpoints and devices
        self.shape, self.takes = sampler.shape, sampler.takes
        self.classes = self.takes.classes
        self.truncated = False

    @classmethod
    def keeps_denoiser(cls, node: Mapping[str, Any]) -> bool:
        """Whether a fit of the method, configured by ``node``, keeps the denoiser's weights."""
        return bool(node.get("frozen", False))

    def truncate_denoiser(self, ratio_star: float) -> None:
        """Restrict the denoiser's training to noise-to-data ratios up to ``ratio_star``."""
        self.denoiser.ratio_range = self.denoiser.ratio_range[0], ratio_star
        self.truncated = True

    # A frozen denoiser

    def freeze_denoiser(self) -> None:
        """Freeze the denoiser's weights; checkpoints then contain their hash instead of a copy."""
        self.denoiser.requires_grad_(False).eval()
        self.strict_loading = False  # checkpoints do not contain the denoiser
        self.frozen = True

    def train(self, mode: bool = True) -> "Diffusion":
        """Set training mode, except for a frozen denoiser, which stays without dropout."""
        super().train(mode)
        if self.frozen:
            self.denoiser.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # torch overloads it
        """Return the state without the weights of a frozen denoiser."""
        state = super().state_dict(*args, **kwargs)
        left_out = "denoiser." if self.frozen else ()
        return {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the denoiser's training range, and the hash of a frozen denoiser."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["diffaccel"] |= self.trained_ratios()
        if self.frozen:
            checkpoint["diffaccel"]["denoiser_sha256"] = tensors_sha256(self.denoiser.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to the same frozen denoiser.

        Raises:
            UsageError: The denoiser of the checkpoint has other weights.
        """
        super().on_load_checkpoint(checkpoint)
        known = checkpoint["diffaccel"].get("denoiser_sha256")
        if self.frozen and known != tensors_sha256(self.denoiser.state_dict()):
            raise UsageError("resume: the training state belongs to another denoiser: set checkpoint= to that denoiser")

    # Training

    @override
    def phases(self) -> list[Phase]:
        if not isinstance(self.denoiser, NetworkDenoiser):
            raise UsageError("the denoiser of this experiment is exact, so that there is nothing to train")
        if self.training_plan.augment and not getattr(self.denoiser.network, "takes_augment", False):
            raise UsageError(
                f"training.augment requires a network with augmentation labels: set network.augment={LABELS}"
            )
        if self.training_plan.augment and self.takes.pixels:
            raise UsageError(
                f"training.augment moves the images, but not their condition ({self.takes}): set training.augment=0"
            )
        return [Phase("denoiser", self.denoiser.network.parameters(), self.denoiser_loss)]

    @property
    def trained_classes(self) -> int:
        """Number of classes of the trained networks, which the labels have to match; 0 if labels are not used."""
        return self.classes if self.trained_networks() else 0

    def trained_networks(self) -> dict[str, nn.Module]:
        """Return the networks that are trained step by step, averaged and exported, by name."""
        trained = isinstance(self.denoiser, NetworkDenoiser) and not self.frozen
        return {"denoiser": self.denoiser.network} if trained else {}

    @override
    def averaged(self) -> nn.Module | None:
        networks = self.trained_networks()
        return nn.ModuleDict(networks) if networks else None

    def exports(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        """Return the trained weights with their headers by file name.

        The names are ``raw`` and, averaged, ``ema`` for the denoiser, and the network's name for other networks. Of
        several averages, each is also exported under that name and its half-life, as in ``ema_50000``.
        """
        found = {}
        for name, network in self.trained_networks().items():
            raw, ema = ("raw", "ema") if name == "denoiser" else (f"{name}_raw", name)
            said = {"kind": name, **(self.trained_ratios() if name == "denoiser" else {})}
            found[raw] = (network.state_dict(), {**said, "averaged": False})
            for file, average in self._averages(ema).items():
                own = of_network(average.state_dict(), name) if average is not None else {}
                half_life = {"ema_half_life": average.half_life} if average is not None else {}
                chosen = self.chosen_by if file == ema else {}
                about = {**said, "averaged": bool(own), **half_life, **chosen}
                found[file] = ({**network.state_dict(), **own}, about)
        return found

    def _averages(self, name: str) -> dict[str, EMA | None]:
        """Return the averages by the names of their files; None for averages that there are not yet."""
        by_half_life = {ema.half_life: ema for ema in self.emas}
        half_lives = sorted(by_half_life or self.training_plan.ema_half_life)
        several = half_lives if len(half_lives) > 1 else []
        return {name: self.ema, **{f"{name}_{one:.0f}": by_half_life.get(one) for one in several}}

    def trained_ratios(self) -> dict[str, Any]:
        """Return the header entry with the denoiser's training range; empty if its levels are unbounded."""
        bounded = self.truncated or getattr(self.levels, "bounded", True)
        return {"trained_ratios": list(self.denoiser.ratio_range)} if bounded else {}

    def denoiser_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Compute the squared error of the network's output at one noise level per sample, (B,)."""
        u = self.level_quantiles(batch, noise)
        x_0, labels = self.augmented(batch)
        t, weight = self.times(u.to(self.device))
        loss = self.level_loss(x_0, t, noise, self.drop_condition(self.condition(batch), noise), labels)
        loss = weight.to(loss) * loss
        if self.training_plan.pixel_sum:
            loss = loss * x_0[0].numel()
        if self.logs_now:  # by quarters of the distribution of levels, from low to high noise
            quarters = [loss[(4 * u).long().clamp_max(3) == quarter] for quarter in range(4)]
            self.note({f"denoiser_loss_quarter_{i}": part.mean() for i, part in enumerate(quarters, 1) if len(part)})
        return loss

    def level_loss(
        self, x_0: Tensor, t: Tensor, noise: NoiseStreams, condition: Condition | None, augment: Tensor | None
    ) -> Tensor:
        """Compute the loss at times t (B,) of images with condition and augmentation labels, (B,)."""
        assert isinstance(self.denoiser, NetworkDenoiser)
        return self.denoiser.loss(x_0, t, noise.normal(x_0), condition, augment)

    def level_quantiles(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Draw the quantile of each sample's level in the distribution of levels, (B,) in [0, 1]."""
        if not self.training_plan.antithetic:
            return noise.uniform()
        # Neighbours in the stream share a number, whichever batches and ranks they are in.
        u = NoiseStreams(self.seed, batch.index // 2, "pairs of levels").uniform().to(batch.index.device)
        return torch.where(batch.index % 2 == 1, 1 - u, u)

    def times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the times at quantiles of the levels, and the weights of the loss: (B,) -> (B,) each, float64."""
        t = self.levels(self.denoiser, u)
        return t, torch.ones_like(t)

    def condition(self, batch: Batch) -> Condition | None:
        """Return the part of a batch's condition that the sampled networks take."""
        return None if batch.condition is None else batch.condition.only(self.takes)

    def drop_condition(self, condition: Condition | None, noise: NoiseStreams) -> Condition | None:
        """Replace random fractions by null: ``label_drop`` of the labels, ``condition_drop`` of all other kinds."""
        if condition is None:
            return None
        device, plan = next(value.device for value in condition.kinds if value is not None), self.training_plan
        if condition.labels is not None:
            condition = condition.drop(labels=noise.uniform().to(device) < plan.label_drop)
        if self.takes.required and plan.condition_drop:
            condition = condition.drop(others=noise.uniform().to(device) < plan.condition_drop)
        return condition

    def augmented(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return augmented images and their augmentation labels (B, 9); None as labels without augmentation."""
        if not self.training_plan.augment:
            return batch.image, None
        return augment(batch.image, self.training_plan.augment, NoiseStreams(self.seed, batch.index, "augmentation"))
