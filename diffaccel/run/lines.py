"""Lines on the progress of a fit, where there is no progress bar."""

import time
from datetime import datetime, timedelta
from typing import Any

import lightning as L

from diffaccel.text.terminal import PlainConsole
from diffaccel.training.module import TrainedModule

INTERVAL = 60.0
"""Least time between two lines, in seconds."""


class SpeedLines(L.Callback):
    """Callback that prints speed and expected end about once a minute, if stderr is not a terminal."""

    def __init__(self) -> None:
        self._console = PlainConsole(stderr=True, soft_wrap=True)
        self._printed = float("-inf")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Print a line, unless the last one is recent or the speed is not known yet."""
        assert isinstance(pl_module, TrainedModule)
        now, speed = time.monotonic(), pl_module.speed.images_per_second
        if speed is None or now - self._printed < INTERVAL or self._console.is_terminal or not trainer.is_global_zero:
            return
        self._printed = now
        seen, total = pl_module.images_seen, pl_module.training_plan.images
        self._console.print(progress_line(seen, total, speed, pl_module.speed.seconds_left(total), datetime.now()))


def progress_line(seen: int, total: int, speed: float, seconds_left: float, now: datetime) -> str:
    """Describe the progress of a fit.

    Args:
        seen: Number of images seen.
        total: Number of images of the fit.
        speed: Images per second.
        seconds_left: Remaining time, in seconds.
        now: Present time.
    """
    end = now + timedelta(seconds=seconds_left)
    day = "" if end.date() == now.date() else f"{end:%Y-%m-%d} "
    return (
        f"{seen:,} of {total:,} images ({seen / total:.0%}), {speed:,.0f} images/s, expected end {day}{end:%H:%M:%S} "
        f"(in {seconds_left / 60:.1f} minutes)"
    )
