"""What generated states get wrong in their simplest statistics, which a critic finds first."""

import torch
from torch import Tensor

BANDS = 4


def radial_power(x: Tensor, bands: int = BANDS) -> Tensor:
    """Mean power of images' Fourier coefficients in bands of radial frequency.

    Bands are equally wide up to the Nyquist frequency, lowest first; corners beyond it belong to the last, the mean of
    an image to the first. White noise has the same power in all.

    Args:
        x: Images, (B, C, H, W).
        bands: Number of bands.

    Returns:
        (bands,), in units of a pixel's variance; NaN for a band without a coefficient.
    """
    power = torch.fft.fft2(x.float(), norm="ortho").abs().square().mean((0, 1))
    rows, columns = (torch.fft.fftfreq(size, device=x.device) for size in x.shape[-2:])
    radius = (rows[:, None].square() + columns.square()).sqrt()
    band = (radius / 0.5 * bands).long().clamp_max(bands - 1)
    return torch.stack([power[band == index].mean() for index in range(bands)])


def compare_states(made: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Compare generated states with real ones of the same level.

    Args:
        made: (B, C, H, W).
        real: (B', C, H, W).

    Returns:
        For each channel ``mean_<c>``, the difference of means in units of the real deviation, and ``std_<c>``, the
        ratio of deviations; for each band ``power_<k>``, the ratio of powers. 0, 1 and 1 for equal laws.
    """
    channels = {}
    for c in range(real.shape[1]):
        one, other = made[:, c].float(), real[:, c].float()
        channels[f"mean_{c}"] = (one.mean() - other.mean()) / other.std()
        channels[f"std_{c}"] = one.std() / other.std()
    ratio = radial_power(made) / radial_power(real)
    return {**channels, **{f"power_{k}": value for k, value in enumerate(ratio) if value.isfinite()}}
