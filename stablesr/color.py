"""Colour correction: the details of one image, the colours of another.

StableSR, section 3.4 and supplement: wavelet and AdaIN correction of the decoded image towards the upscaled input.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WAVELET_LEVELS = 5

WAVELET_REACH = sum(2**level for level in range(WAVELET_LEVELS))
"""Pixels around a window that its corrected values depend on: 1 + 2 + 4 + 8 + 16 = 31."""


def low_frequencies(image: Tensor) -> Tensor:
    """What is left of an image (..., H, W) after blurring it five times, with holes (a trous) that double.

    Each blur is [1 2 1] / 4 along both axes, the edge repeated outwards. It is computed place by place, so a window
    with WAVELET_REACH pixels around it (less where the image ends) gives exactly the crop of the whole.
    """
    for level in range(WAVELET_LEVELS):
        image = _blur(_blur(image, 2**level, dim=-2), 2**level, dim=-1)
    return image


def _blur(image: Tensor, hole: int, dim: int) -> Tensor:
    length = image.shape[dim]
    first, last = image.narrow(dim, 0, 1), image.narrow(dim, length - 1, 1)
    if length > hole:
        before = torch.cat([*[first] * hole, image.narrow(dim, 0, length - hole)], dim=dim)
        after = torch.cat([image.narrow(dim, hole, length - hole), *[last] * hole], dim=dim)
    else:
        before, after = first, last
    return (before + after) * 0.25 + image * 0.5


def wavelet_correction(content: Tensor, style: Tensor) -> Tensor:
    """The high frequencies of `content` with the low frequencies of `style`.

    high(content) + low(style) = content + low(style - content), since the blur is linear: one pass instead of two.

    Args:
        content: (..., H, W).
        style: the same shape.
    """
    return content + low_frequencies(style - content)


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel, (B, C, 1, 1)."""

    mean: Tensor
    std: Tensor


def channel_statistics(image: Tensor) -> ChannelStatistics:
    """Of an image (B, C, H, W); the variance is the unbiased one, raised by 1e-5 so that a flat channel has one too."""
    variance, mean = torch.var_mean(image, dim=(-2, -1), keepdim=True)
    return ChannelStatistics(mean, (variance + 1e-5).sqrt())


def adain_correction(content: Tensor, of_content: ChannelStatistics, of_style: ChannelStatistics) -> Tensor:
    """`content` (B, C, H, W) with the statistics of another image. AdaIN (arXiv:1703.06868), eq. 8."""
    return (content - of_content.mean) / of_content.std * of_style.std + of_style.mean
