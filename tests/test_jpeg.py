"""JPEG: what it keeps, and that scores of JPEGs are named so."""

import pytest
import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.features.extractors import Extractor, Identity
from diffaccel.features.jpeg import AsJPEG, jpeg


class Values(Extractor):
    """The values, under a name of its own."""

    name, dim, sha256 = "values", 3 * 16 * 16, "0" * 64

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


def coarse(channels: int) -> Tensor:
    blocks = torch.randint(256, (20, channels, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return blocks.repeat_interleave(4, -1).repeat_interleave(4, -2)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_less_at_less_quality(channels: int) -> None:
    images = coarse(channels)
    errors = [(jpeg(images, quality).double() - images).square().mean() for quality in (100, 90, 50, 10)]
    assert errors == sorted(errors) and errors[0] < errors[-1] / 2
    grey = torch.full_like(images, 128)
    assert (jpeg(grey, 50).double() - 128).abs().max() <= 1


def test_colours_are_halved_and_brightness_is_not() -> None:
    """Columns that alternate in colour alone become one colour; those that alternate in brightness stay."""
    column = torch.arange(16) % 2 == 0
    colour, brightness = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    colour[:, 0, :, column], colour[:, 1, :, ~column] = 150, 76  # both of brightness 0.299 150 = 0.587 76
    brightness[..., column] = 45
    kept = [jpeg(images, 95).double()[0, 0] for images in (colour, brightness)]
    assert (kept[0][:, column].mean() - kept[0][:, ~column].mean()).abs() < 15
    assert (kept[1][:, column].mean() - kept[1][:, ~column].mean()).abs() > 35


def test_scores_of_files_bear_their_quality() -> None:
    plain = Values()
    extractor = AsJPEG(plain, 75)
    assert extractor.metric_name == "fd_values_jpeg75" and extractor.sha256 not in (
        plain.sha256,
        AsJPEG(plain, 74).sha256,
    )
    assert torch.equal(extractor(coarse(3)), plain(jpeg(coarse(3), 75)))


@pytest.mark.parametrize("quality", [0, 101])
def test_qualities_that_are_none(quality: int) -> None:
    with pytest.raises(UsageError, match=f"jpeg={quality}.*1 to 100"):
        AsJPEG(Values(), quality)
    with pytest.raises(UsageError, match="'identity': set jpeg to 1 to 100 and use an extractor of images"):
        AsJPEG(Identity(768), 75)
