"""Settings of the training."""

from dataclasses import dataclass, field


@dataclass
class Training:
    """Settings of the training. All lengths are in images, independent of batch size and number of devices."""

    images: int = 1_000_000
    """Total number of images."""
    batch_size: int = 128
    """Images per step, over all devices."""
    flip: bool = False
    """Mirror images left to right at random."""
    augment: float = 0.0
    """Probability of each of EDM's geometric augmentations; their labels require network.augment=9."""
    workers: int = 0
    """Number of worker processes that load images; 0 is suitable for data in memory."""
    lr: float = 1e-3
    """Learning rate after warm-up."""
    warmup: int = 10_000
    """Images over which the learning rate increases linearly."""
    decay: float = 0.3
    """Last fraction of the run, over which the learning rate decreases to ``floor``."""
    decay_power: float = 1.0
    """Exponent of the decrease; 1 is linear."""
    floor: float = 0.0
    """Minimum learning rate after warm-up, as a fraction of ``lr``."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Coefficients of Adam."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW."""
    clip: float | None = 1.0
    """Maximum norm of the gradient of a phase; null for no clipping."""
    ema_half_life: list[int] = field(default_factory=lambda: [50_000])
    """Half-lives of the averaged weights, in images: a number, or a list for several averages in one fit, each of which
    is written. ``validation`` chooses one of several; without it, the first is used."""
    antithetic: bool = False
    """Draw the denoiser's noise levels in antithetic pairs, u and 1 - u, which makes the loss less noisy."""
    pixel_sum: bool = False
    """Sum the denoiser's loss over pixels, as in DDPM's code, instead of averaging; affects ``clip``."""
    label_drop: float = 0.1
    """Fraction of labels replaced by the null class in training a class-conditional denoiser, for guidance."""
    condition_drop: float = 0.0
    """Fraction of images trained without the conditions other than labels (image, mask, tokens), for guidance."""
    evaluate_every: int | None = None
    """Images between evaluations of all budgets with the averaged weights; null evaluates only at the end."""
    evaluate_n: int = 1000
    """Images per point in these evaluations."""
    keep_best: float | None = None
    """Budget whose distance determines which state is kept as best.ckpt; null keeps none."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    log_every: int = 50
    """Steps between logged losses."""

    def __post_init__(self) -> None:
        if isinstance(self.ema_half_life, int):
            self.ema_half_life = [self.ema_half_life]
