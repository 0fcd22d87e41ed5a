"""Detection of losses and gradients that are NaN or infinite, without a wait for the device in each step."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.deferred import Checks
from diffaccel.errors import UsageError


class Checked(NamedTuple):
    """Loss and gradient norm of a phase in one step."""

    phase: str
    images: int
    loss: Tensor
    norm: Tensor


class FiniteCheck:
    """Check that the losses and gradients of a run are finite.

    A check reads two numbers from the device, and so waits for all work that is queued there. A deferred check keeps
    the numbers until :meth:`read`. Until then, the flag :attr:`failed`, which stays on the device, has to prevent the
    updates of weights and averages.

    Args:
        device: Device of the losses.
        deferred: Whether the numbers are read by :meth:`read` only, and not at once.

    Attributes:
        failed: 1 from the first loss or gradient on that is not finite, before that 0, as a 0-dimensional tensor; None
            if the check is not deferred.
    """

    def __init__(self, device: torch.device, deferred: bool) -> None:
        # float32 in every precision, which fused optimisers require
        self.failed = torch.zeros((), dtype=torch.float32, device=device) if deferred else None
        self._unread: list[Checked] = []
        self._checks = Checks()

    def collected(self) -> AbstractContextManager[None]:
        """Defer the checks of sampling in a ``with`` block too, for losses that sample."""
        return nullcontext() if self.failed is None else self._checks.collected()

    def add(self, phase: str, images: int, loss: Tensor, norm: Tensor) -> None:
        """Check the loss and the norm of the gradient of a phase, 0-dimensional tensors, after ``images`` images.

        Raises:
            UsageError: One of them is not finite, and the check is not deferred.
        """
        self._unread.append(Checked(phase, images, loss.detach(), norm))
        if self.failed is None:
            self.read()
        else:
            failed = 1.0 - (loss.detach() + norm).isfinite().to(self.failed)
            torch.maximum(self.failed, failed, out=self.failed)  # in place, because averages share the tensor

    def read(self) -> None:
        """Read the numbers that were added since the last call; the only method that waits for the device.

        Raises:
            UsageError: One of them is not finite.
        """
        unread, self._unread = self._unread, []
        self._raise_first(unread)
        self._checks.settle()

    def _raise_first(self, unread: list[Checked]) -> None:
        if not unread:
            return
        numbers = torch.stack([number.double() for one in unread for number in (one.loss, one.norm)])
        if numbers.sum().isfinite():  # all of them are, in the usual case
            return
        for one, (loss, norm) in zip(unread, numbers.reshape(-1, 2).tolist(), strict=True):
            if not torch.tensor([loss, norm]).isfinite().all():
                raise UsageError(
                    f"{one.phase}: the loss is {loss:.4g} and its gradient {norm:.4g} after {one.images} images: lower "
                    "training.lr, or resume from an older checkpoint with resume=FILE"
                )
