"""The method that most rows of the table are: a denoiser, a prior, a solver, and how the denoiser is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.data import Batch, DataModule
from diffaccel.data.augment import LABELS, augment
from diffaccel.denoiser import NetworkDenoiser
from diffaccel.denoiser.levels import Levels
from diffaccel.errors import UsageError
from diffaccel.methods.registry import METHODS
from diffaccel.noise import NoiseStreams
from diffaccel.prior import Prior
from diffaccel.sampling import Sampler
from diffaccel.training.ema import of_network
from diffaccel.training.module import Phase, TrainedModule
from diffaccel.training.plan import Training
from diffaccel.weights import tensors_sha256


@METHODS.base
@METHODS.register("diffusion")
class Diffusion(TrainedModule):
    """Baselines: whatever process, denoiser, prior and solver the experiment names.

    Attributes:
        sampler: Denoiser, prior and solver, with their settings by budget: all that a sample follows from.

    Args:
        sampler: What is trained, and samples.
        levels: Noise levels to train at.
        training: How to train.
        seed: The run's seed.
    """

    starts_from: type = Prior
    """Kind of prior without which a sample is none of the method's."""

    def __init__(self, sampler: Sampler, levels: Levels, training: Training, seed: int = 0) -> None:
        super().__init__(training, seed)
        self.sampler, self.levels = sampler, levels
        self.denoiser, self.prior = sampler.denoiser, sampler.prior  # registered here, for checkpoints and devices
        self.shape, self.classes = sampler.shape, sampler.classes
        self.truncated = self.frozen = False

    @classmethod
    def keeps_denoiser(cls, node: Mapping[str, Any]) -> bool:
        """Whether a fit of the method as ``node`` describes it leaves the denoiser's weights as they are."""
        return bool(node.get("frozen", False))

    def truncate_denoiser(self, ratio_star: float) -> None:
        """Train the denoiser up to a noise-to-data ratio and no further."""
        self.denoiser.ratio_range = self.denoiser.ratio_range[0], ratio_star
        self.truncated = True

    # A frozen denoiser

    def freeze_denoiser(self) -> None:
        """Keep the denoiser's weights; a checkpoint refers to them by their hash instead of copying them."""
        self.denoiser.requires_grad_(False).eval()
        self.strict_loading = False  # a checkpoint leaves the denoiser out
        self.frozen = True

    def train(self, mode: bool = True) -> "Diffusion":
        """Leave a frozen denoiser without dropout."""
        super().train(mode)
        if self.frozen:
            self.denoiser.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # torch overloads it
        """Leave a frozen denoiser out."""
        state = super().state_dict(*args, **kwargs)
        left_out = "denoiser." if self.frozen else ()
        return {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the denoiser was trained on, or a frozen one's hash."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["diffaccel"] |= self.trained_ratios()
        if self.frozen:
            checkpoint["diffaccel"]["denoiser_sha256"] = tensors_sha256(self.denoiser.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on over another denoiser than the one that was frozen.

        Raises:
            UsageError: The checkpoint was made over other weights.
        """
        super().on_load_checkpoint(checkpoint)
        known = checkpoint["diffaccel"].get("denoiser_sha256")
        if self.frozen and known != tensors_sha256(self.denoiser.state_dict()):
            raise UsageError("resume: the checkpoint belongs to another denoiser: set checkpoint= to the one it had")

    # Training

    @override
    def phases(self) -> list[Phase]:
        if not isinstance(self.denoiser, NetworkDenoiser):
            raise UsageError("this experiment's denoiser is exact: there is nothing to train")
        if self.training_plan.augment and not getattr(self.denoiser.network, "takes_augment", False):
            raise UsageError(f"training.augment: the network is told of augmentations: set network.augment={LABELS}")
        return [Phase("denoiser", self.denoiser.network.parameters(), self.denoiser_loss)]

    @property
    def trained_classes(self) -> int:
        """Number of classes of what is trained, which labels have to fit; 0 if no label is used."""
        return self.classes if self.trained_networks() else 0

    def trained_networks(self) -> dict[str, nn.Module]:
        """Networks that sample and are trained by steps, by name: they are averaged, and left when training is done."""
        trained = isinstance(self.denoiser, NetworkDenoiser) and not self.frozen
        return {"denoiser": self.denoiser.network} if trained else {}

    @override
    def averaged(self) -> nn.Module | None:
        networks = self.trained_networks()
        return nn.ModuleDict(networks) if networks else None

    def exports(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        """Return what training leaves: file name -> weights, and the header that describes them.

        The denoiser's are ``raw`` and, averaged, ``ema``; another network's go by its name.
        """
        average = self.ema.state_dict() if self.ema is not None else {}
        found = {}
        for name, network in self.trained_networks().items():
            own = of_network(average, name)
            raw, ema = ("raw", "ema") if name == "denoiser" else (f"{name}_raw", name)
            said = {"kind": name, **(self.trained_ratios() if name == "denoiser" else {})}
            found[raw] = (network.state_dict(), {**said, "averaged": False})
            found[ema] = ({**network.state_dict(), **own}, {**said, "averaged": bool(own)})
        return found

    def trained_ratios(self) -> dict[str, Any]:
        """Noise-to-data ratios that the denoiser is trained on, for its header; none if its levels have no bounds."""
        bounded = self.truncated or getattr(self.levels, "bounded", True)
        return {"trained_ratios": list(self.denoiser.ratio_range)} if bounded else {}

    def describe_fit(self, data: DataModule) -> list[str]:
        """Say how good what was fitted is on held-out images, a line each; nothing that the curve doesn't say."""
        return []

    def denoiser_loss(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Squared error of the network's output at one level a sample, (B,)."""
        u = self.level_quantiles(batch, noise)
        x_0, labels = self.augmented(batch)
        t, weight = self.times(u.to(self.device))
        loss = self.level_loss(x_0, t, noise, self.drop_labels(batch.condition, noise), labels)
        loss = weight.to(loss) * loss
        if self.training_plan.pixel_sum:
            loss = loss * x_0[0].numel()
        if self.logs_now:  # by quarters of the levels' law, from the least noise up
            quarters = [loss[(4 * u).long().clamp_max(3) == quarter] for quarter in range(4)]
            self.note({f"denoiser_loss_quarter_{i}": part.mean() for i, part in enumerate(quarters, 1) if len(part)})
        return loss

    def level_loss(
        self, x_0: Tensor, t: Tensor, noise: NoiseStreams, condition: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """Error at times t, (B,), on images with their class and augmentation labels."""
        assert isinstance(self.denoiser, NetworkDenoiser)
        return self.denoiser.loss(x_0, t, noise.normal(x_0), condition, augment)

    def level_quantiles(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """Where each sample's level lies in their law, (B,) in [0, 1]."""
        if not self.training_plan.antithetic:
            return noise.uniform()
        # Neighbours in the stream share a number, in whatever batches and processes they are.
        u = NoiseStreams(self.seed, batch.index // 2, "pairs of levels").uniform()
        return torch.where(batch.index.cpu() % 2 == 1, 1 - u, u)

    def times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Training times at quantiles of the levels, and the weight of the loss there: (B,) -> (B,) each, float64."""
        t = self.levels(self.denoiser, u)
        return t, torch.ones_like(t)

    def drop_labels(self, condition: Tensor | None, noise: NoiseStreams) -> Tensor | None:
        """Replace some labels by the null class."""
        if condition is None or not self.classes:
            return None
        dropped = noise.uniform().to(condition.device) < self.training_plan.label_drop
        return condition.masked_fill(dropped, self.classes)

    def augmented(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Images to train on and their augmentation labels, (B, 9); None if images are left as they are."""
        if not self.training_plan.augment:
            return batch.image, None
        return augment(batch.image, self.training_plan.augment, NoiseStreams(self.seed, batch.index, "augmentation"))
