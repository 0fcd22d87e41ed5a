"""Lengths, rates and intervals of training."""

from dataclasses import dataclass, field


@dataclass
class Training:
    """How a method is trained; every length is in images, so batch size and processes change none of them."""

    images: int = 1_000_000
    """Images to see in all."""
    batch_size: int = 128
    """Images per step, over all processes."""
    flip: bool = False
    """Mirror images left to right at random."""
    augment: float = 0.0
    """Probability of each of EDM's geometric augmentations, an input of the network: set network.augment=9."""
    workers: int = 0
    """Processes that read images; 0 suits data in memory."""
    lr: float = 1e-3
    """Learning rate after warm-up."""
    warmup: int = 10_000
    """Images over which the rate rises linearly."""
    decay: float = 0.3
    """Last fraction of the run over which it falls to ``floor``."""
    decay_power: float = 1.0
    """Exponent of the fall; 1 is linear."""
    floor: float = 0.0
    """Least rate after warm-up, over ``lr``."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Adam's."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW's)."""
    clip: float | None = 1.0
    """Largest norm of a phase's gradient; null for none."""
    ema_half_life: int = 50_000
    """Half-life of the averaged weights."""
    antithetic: bool = False
    """Draw a denoiser's levels in mirrored pairs, u and 1 - u for neighbours in the stream: a less noisy loss."""
    pixel_sum: bool = False
    """Sum a denoiser's loss over pixels instead of averaging it, as DDPM's code does; ``clip`` acts on its gradient."""
    label_drop: float = 0.1
    """Share of labels that a class-conditional denoiser doesn't see in training, so that it can be guided."""
    evaluate_every: int | None = None
    """Images between evaluations of all budgets with the averaged weights; null for the full one at the end alone."""
    evaluate_n: int = 1000
    """Images per point of those."""
    keep_best: float | None = None
    """Budget whose distance decides which state is kept as best.ckpt; null keeps none."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    log_every: int = 50
    """Steps between logged losses."""
