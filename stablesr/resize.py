"""Enlarging an image before the network sees it, and filling a canvas around it."""

from functools import cache

import torch
from torch import Tensor

BICUBIC_A = -0.75
"""Keys' parameter as PyTorch and OpenCV have it; the networks were trained on images enlarged with it."""

BICUBIC_REACH = 2
"""Source pixels around a window that its enlargement depends on."""


@cache
def bicubic_phases(scale: int) -> list[tuple[int, tuple[float, ...]]]:
    """For each phase p of `scale`: the first source pixel and its four weights, of target pixel scale * i + p.

    Pixels are squares with their centres in the middle, so p lies at (p + 1/2) / scale - 1/2 source pixels from i.
    The first pixel is relative to i.
    """
    phases = []
    for p in range(scale):
        position = (2 * p + 1 - scale) / (2 * scale)
        first = -1 if position >= 0 else -2
        distances = [abs(position - (first + k)) for k in range(4)]
        phases.append((first, tuple(map(_keys, distances))))
    return phases


def _keys(x: float) -> float:
    """Keys' cubic kernel (1981) at distance x."""
    a = BICUBIC_A
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def upscale_bicubic(image: Tensor, scale: int) -> Tensor:
    """Enlarge (..., H, W) to (..., scale * H, scale * W); edges repeat outwards, values may overshoot.

    Every phase has its own fixed weights, so a window with BICUBIC_REACH pixels around it gives exactly the crop of the
    whole, however far from the origin it lies.
    """
    if scale == 1:
        return image
    return _upscale_axis(_upscale_axis(image, scale, dim=-2), scale, dim=-1)


def _upscale_axis(image: Tensor, scale: int, dim: int) -> Tensor:
    dim += image.ndim
    length = image.shape[dim]
    first, last = image.narrow(dim, 0, 1), image.narrow(dim, length - 1, 1)
    padded = torch.cat([*[first] * BICUBIC_REACH, image, *[last] * BICUBIC_REACH], dim=dim)
    phases = []
    for start, weights in bicubic_phases(scale):
        taps = [padded.narrow(dim, BICUBIC_REACH + start + k, length) * w for k, w in enumerate(weights)]
        phases.append((taps[0] + taps[1]) + (taps[2] + taps[3]))
    return torch.stack(phases, dim=dim + 1).flatten(dim, dim + 1)


def reflect_to(image: Tensor, height: int, width: int) -> Tensor:
    """Fill (..., H, W) up to (..., height, width) below and to the right, by reflection at the edge pixel.

    Any amount can be filled: reflections are reflected again, and a single row or column is repeated.
    """
    for dim, wanted in ((-2, height), (-1, width)):
        length = image.shape[dim]
        if wanted > length:
            index = torch.arange(wanted, device=image.device) % max(2 * (length - 1), 1)
            index = torch.where(index < length, index, 2 * (length - 1) - index)
            image = image.index_select(dim, index)
    return image
