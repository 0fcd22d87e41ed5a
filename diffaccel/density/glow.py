"""Multi-scale normalising flow of images, whitened by the Gaussian with the same moments."""

from torch import Tensor
from typing_extensions import override

from diffaccel.density.base import DENSITIES, gaussian_log_prob
from diffaccel.density.basis import BasisName
from diffaccel.density.gaussian import GaussianDensity
from diffaccel.nn.flow import Glow


@DENSITIES.register("glow")
class GlowDensity(GaussianDensity):
    """Glow of Q v^(-1/2) Q^T (y - mean), where v are the variances of the coordinates.

    This symmetric whitening preserves the locality of pixels. The flow is initialised as a rotation, and the density as
    the Gaussian.

    Args:
        shape: See :class:`~diffaccel.density.base.Density`.
        ratio: See :class:`~diffaccel.density.base.Density`.
        basis: See :class:`~diffaccel.density.gaussian.GaussianDensity`.
        scales: See :class:`~diffaccel.nn.flow.Glow`.
        steps: See :class:`~diffaccel.nn.flow.Glow`.
        width: See :class:`~diffaccel.nn.flow.Glow`.
    """

    bound = True

    def __init__(
        self,
        shape: tuple[int, int, int],
        ratio: float,
        basis: BasisName = "dct",
        scales: int = 3,
        steps: int = 16,
        width: int = 512,
    ) -> None:
        super().__init__(shape, ratio, basis)
        self.flow = Glow(self.shape, scales, steps, width)

    @override
    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        c = self.basis.rotate(self.flow.decode(z).flatten(1))
        return self.basis.images(c * self.variances.sqrt().to(c))

    @override
    def log_prob(self, y: Tensor) -> Tensor:
        c = self.basis.coordinates(y)
        white = self.basis.rotate_back(c / self.variances.sqrt().to(c)).reshape(y.shape)
        z, log_det = self.flow.encode(white)
        return gaussian_log_prob(z, self.variances.new_ones(self.size)) + log_det - 0.5 * self.variances.log().sum()
