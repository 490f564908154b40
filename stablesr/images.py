"""Arrays as users have them, and tensors as the networks want them."""

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

INTEGER_RANGES = {"uint8": 255, "uint16": 65535}
FLOATS = ("float16", "bfloat16", "float32", "float64")


def from_image(image: NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    """An image to (3, H, W), float32, in [-1, 1]; one band is repeated.

    Args:
        image: (H, W, 3) or (H, W) of NumPy, (3, H, W) or (H, W) of torch; uint8, uint16, or floats within [0, 1].

    Raises:
        ValueError: for any other shape, dtype or value.
    """
    dtype = _dtype_name(image)
    if dtype not in INTEGER_RANGES and dtype not in FLOATS:
        raise ValueError(f"an image of {dtype} is not supported: give uint8, uint16, or floats within [0, 1]")
    is_tensor = isinstance(image, Tensor)
    shape, band_axis = tuple(image.shape), 0 if is_tensor else 2
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[band_axis] != 3) or 0 in shape:
        wanted = "(3, H, W) or (H, W)" if is_tensor else "(H, W, 3) or (H, W)"
        raise ValueError(f"an image of shape {shape} is not supported: give {wanted}, not empty")
    if is_tensor:
        values = cast(Tensor, image).detach()
        values = values.to(torch.int32) if dtype == "uint16" else values  # torch computes little in uint16
    else:
        values = torch.from_numpy(
            np.ascontiguousarray(cast(Any, image).astype(np.float64 if dtype in FLOATS else np.int32))
        )
        values = values.permute(2, 0, 1) if len(shape) == 3 else values
    if dtype in FLOATS:
        low, high = float(values.min()), float(values.max())
        if not 0.0 <= low <= high <= 1.0:  # also false for NaN
            raise ValueError(
                f"a floating-point image must lie within [0, 1]; this one has values from {low:g} to {high:g}\n"
                "hint: stretch it first, and replace what is not finite"
            )
    unit = values.to(device, torch.float32) / INTEGER_RANGES.get(dtype, 1)
    return (unit if unit.ndim == 3 else unit.expand(3, -1, -1)) * 2.0 - 1.0


def to_image_like(pixels: Tensor, image: NDArray[np.generic] | Tensor) -> NDArray[np.generic] | Tensor:
    """The way back: (3, H, W) in about [-1, 1] to the kind of array that `image` is; one band is the mean of three.

    Values are clamped to the range, and rounded where they are integers. (The reference truncates them.)
    """
    dtype = _dtype_name(image)
    unit = (pixels.float() * 0.5 + 0.5).clamp(0.0, 1.0)
    if image.ndim == 2:
        unit = unit.mean(dim=0)
    if dtype in INTEGER_RANGES:
        unit = (unit * INTEGER_RANGES[dtype]).round().to(torch.int32)
    if isinstance(image, Tensor):
        return unit.to(image.device, image.dtype)
    array = unit.cpu().numpy()
    return np.ascontiguousarray(array.transpose(1, 2, 0) if array.ndim == 3 else array).astype(image.dtype)


def _dtype_name(image: NDArray[np.generic] | Tensor) -> str:
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(f"an image must be a NumPy array or a torch tensor, not {type(image).__name__}")
    return str(image.dtype).removeprefix("torch.") if isinstance(image, Tensor) else image.dtype.name
