"""Colour correction: the details of one image, the colours of another.

StableSR, section 3.4 and supplement: wavelet and AdaIN correction of the decoded image towards the upscaled input.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WAVELET_LEVELS = 5

WAVELET_REACH = sum(2**level for level in range(WAVELET_LEVELS))
"""Pixels around a window that its corrected values depend on: 1 + 2 + 4 + 8 + 16 = 31."""

PANEL = 1 << 17
"""Numbers that are blurred at once on a CPU: as many as its cache holds some copies of."""


def low_frequencies(image: Tensor) -> Tensor:
    """What is left of an image (..., H, W) after blurring it five times, with holes (a trous) that double.

    Each blur is [1 2 1] / 4 along both axes, the edge repeated outwards. It is computed place by place, so a window
    with WAVELET_REACH pixels around it (less where the image ends) gives exactly the crop of the whole.
    """
    return _blurred(_blurred(image, dim=-2), dim=-1)


def _blurred(image: Tensor, dim: int) -> Tensor:
    """Along one axis; on a CPU panel by panel across it, so that nothing leaves the cache between the five blurs."""
    across = -3 - dim
    cells = PANEL if image.device.type == "cpu" else image.numel()
    width = max(cells * image.shape[across] // max(image.numel(), 1), 1)
    blurred = torch.empty_like(image)
    for panel, target in zip(image.split(width, across), blurred.split(width, across), strict=True):
        target[...] = _blurred_panel(panel, dim)
    return blurred


def _blurred_panel(image: Tensor, dim: int) -> Tensor:
    length, margin = image.shape[dim], 2 ** (WAVELET_LEVELS - 1)
    shape = [*image.shape]
    shape[dim] += 2 * margin
    now, after = image.new_empty(shape), image.new_empty(shape)
    now.narrow(dim, margin, length)[...] = image
    for hole in (2**level for level in range(WAVELET_LEVELS)):
        centre, target = now.narrow(dim, margin, length), after.narrow(dim, margin, length)
        now.narrow(dim, margin - hole, hole)[...] = centre.narrow(dim, 0, 1)
        now.narrow(dim, margin + length, hole)[...] = centre.narrow(dim, length - 1, 1)
        torch.add(now.narrow(dim, margin - hole, length), now.narrow(dim, margin + hole, length), out=target)
        target.mul_(0.25).add_(centre, alpha=0.5)  # powers of two are exact: it does not matter what is fused
        now, after = after, now
    return now.narrow(dim, margin, length)


def wavelet_correction(content: Tensor, style: Tensor) -> Tensor:
    """The high frequencies of `content` with the low frequencies of `style`.

    high(content) + low(style) = content + low(style - content), since the blur is linear: one pass instead of two.

    Args:
        content: (..., H, W).
        style: the same shape.
    """
    return low_frequencies(style - content).add_(content)


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
