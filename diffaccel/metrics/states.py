"""Comparison of simple statistics of generated and real states, for the logs of adversarial training."""

import torch
from torch import Tensor

BANDS = 4


def radial_power(x: Tensor, bands: int = BANDS) -> Tensor:
    """Compute the mean power of Fourier coefficients in bands of radial frequency.

    The bands have equal widths up to the Nyquist frequency, lowest first. The last band includes the corners beyond the
    Nyquist frequency, the first band the mean. White noise has the same power in all bands.

    Args:
        x: Images, (B, C, H, W).
        bands: Number of bands.

    Returns:
        Power in units of a pixel's variance, (bands,); NaN for a band without coefficients.
    """
    power = torch.fft.fft2(x.float(), norm="ortho").abs().square().mean((0, 1))
    rows, columns = (torch.fft.fftfreq(size, device=x.device) for size in x.shape[-2:])
    radius = (rows[:, None].square() + columns.square()).sqrt()
    band = (radius / 0.5 * bands).long().clamp_max(bands - 1)
    return torch.stack([power[band == index].mean() for index in range(bands)])


def compare_states(made: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Compare generated states with real states at the same noise level.

    Args:
        made: Generated states, (B, C, H, W).
        real: Real states, (B', C, H, W).

    Returns:
        For each channel, ``mean_<c>``, the difference of the means in units of the real standard deviation, and
        ``std_<c>``, the ratio of the standard deviations; for each band, ``power_<k>``, the ratio of the powers. Equal
        distributions give 0, 1 and 1.
    """
    channels = {}
    for c in range(real.shape[1]):
        one, other = made[:, c].float(), real[:, c].float()
        channels[f"mean_{c}"] = (one.mean() - other.mean()) / other.std()
        channels[f"std_{c}"] = one.std() / other.std()
    ratio = radial_power(made) / radial_power(real)
    return {**channels, **{f"power_{k}": value for k, value in enumerate(ratio) if value.isfinite()}}
