"""Normalising flows (zuko) of the leading coordinates."""

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.density.base import DENSITIES, gaussian_log_prob
from diffaccel.density.basis import BasisName
from diffaccel.density.gaussian import LeadingDensity
from diffaccel.parts.optional import extra

Kind = Literal["nsf", "maf"]


@DENSITIES.register("flow")
class FlowDensity(LeadingDensity):
    """Normalising flow of the leading coordinates of y, whitened by the Gaussian with the same moments.

    The transforms are initialised as identities, and the density as this Gaussian. So the initial loss is the
    Gaussian's, and any decrease is due to the flow.

    Args:
        shape: See :class:`~diffaccel.density.base.Density`.
        ratio: See :class:`~diffaccel.density.base.Density`.
        basis: See :class:`~diffaccel.density.gaussian.GaussianDensity`.
        rank: See :class:`~diffaccel.density.gaussian.LeadingDensity`.
        kind: ``nsf`` for rational-quadratic splines (arXiv 1906.04032), ``maf`` for affine transforms (arXiv
            1705.07057).
        transforms: Number of transforms.
        width: Hidden units per layer of the transforms' networks.
        depth: Number of hidden layers.
        passes: Passes of each network per draw: 2 for couplings of two halves, None for a fully autoregressive flow.

    Raises:
        UsageError: zuko is not installed.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        ratio: float,
        basis: BasisName = "dct",
        rank: int = 64,
        kind: Kind = "nsf",
        transforms: int = 6,
        width: int = 128,
        depth: int = 2,
        passes: int | None = 2,
    ) -> None:
        with extra("flow", needed_by="density 'flow'"):
            import zuko

        super().__init__(shape, ratio, basis, rank)
        flow = {"nsf": zuko.flows.NSF, "maf": zuko.flows.MAF}[kind]
        self.flow = flow(self.rank, transforms=transforms, hidden_features=[width] * depth, passes=passes)
        for transform in self.flow.transform.transforms:
            last = transform.hyper[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @property
    def _scale(self) -> Tensor:
        """Standard deviations of the leading coordinates, (rank,) float64."""
        return self.variances[: self.rank].sqrt()

    @override
    def draw(self, z: Tensor, u: Tensor) -> Tensor:
        return self.flow().transform.inv(z) * self._scale.to(z)

    @override
    def leading_log_prob(self, c: Tensor) -> Tensor:
        z, log_det = self.flow().transform.call_and_ladj(c / self._scale.to(c))
        return gaussian_log_prob(z, torch.ones_like(self._scale)) + log_det.double() - self._scale.log().sum()
