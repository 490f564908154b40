"""Between samples and what the network sees, [-1, 1]: a stretch fixed once for the whole raster, and the way back.

    samples --stretch--> base (within [-1, 1]) + excess (what left the stretch)
                           |                        |
                       the network                  |
                           v                        |
    target <--back-- detail of base + excess, low frequencies of base + excess

What leaves the stretch goes around the network, enlarged with it, so that no value is lost.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.raster.header import Band, DType, Frozen, Header

KEY_BITS = 17
"""Bits of a float32 that a histogram ignores: 64 bins for each doubling of a value, 1.6 % or finer."""


NARROWEST = 2.0**-40
"""Of a stretch, beside the largest value: what is nearly everywhere 0 must not make infinities of the rest."""

SMALLEST_NORMAL = 2.0**-126
"""Of float32."""


class Stretch(Frozen):
    """The samples that the network sees as black and white, one pair for each band."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def of(self, bands: Sequence[int]) -> "Stretch":
        """The stretch of some bands, counted from 0."""
        return Stretch(low=tuple(self.low[b] for b in bands), high=tuple(self.high[b] for b in bands))

    def apply(self, samples: Tensor) -> Tensor:
        """(bands, H, W) of any type to float32; the stretch becomes [-1, 1], and values outside it stay outside."""
        low, gain = self._columns(samples.device)
        return (samples.float() - low).div_(gain).mul_(2.0).sub_(1.0)

    def undo(self, values: Tensor) -> Tensor:
        """Back to the samples' units, float32, not rounded."""
        low, gain = self._columns(values.device)
        return (values * 0.5).add_(0.5).mul_(gain).add_(low)

    def _columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        low = torch.tensor(self.low, dtype=torch.float64)[:, None, None]
        high = torch.tensor(self.high, dtype=torch.float64)[:, None, None]
        return low.to(device, torch.float32), (high - low).to(device, torch.float32)


def fixed_stretch(header: Header, stretch: str | tuple[float, float]) -> Stretch | None:
    """The stretch that needs no look at the pixels; None if percentiles are wanted.

    Args:
        stretch: two values, "type", or "auto"; see `pipeline.config.Radiometry`.
    """
    if isinstance(stretch, tuple):
        ends = [stretch] * len(header.bands)
    elif stretch == "type" or header.dtype == "uint8" or all(band.bits for band in header.bands):
        ends = [_range(header.dtype, band) for band in header.bands]
    else:
        return None
    return Stretch(low=tuple(low for low, _ in ends), high=tuple(high for _, high in ends))


def _range(dtype: DType, band: Band) -> tuple[float, float]:
    if dtype == "float32":
        return 0.0, 1.0
    limits = np.iinfo(dtype)
    return float(limits.min), float(2**band.bits - 1 if band.bits and limits.min == 0 else limits.max)


def histogram(samples: NDArray[Any], valid: NDArray[np.bool_] | None) -> dict[str, int]:
    """How often values occur, in bins as fine as a float16's or finer; adds up over blocks.

    Args:
        samples: of one band, any shape, finite where valid.
        valid: the same shape, or None.

    Returns:
        Counts by bin, in a form that JSON can hold.
    """
    chosen = samples if valid is None else samples[valid]
    keys, counts = np.unique(_keys(chosen), return_counts=True)
    return {str(int(key)): int(count) for key, count in zip(keys, counts, strict=True)}


def _keys(samples: NDArray[Any]) -> NDArray[np.int64]:
    """Numbers of the bins, rising with the value: the leading bits of a float, negative ones turned around."""
    bits = (samples.astype(np.float32) + np.float32(0.0)).view(np.int32).astype(np.int64)  # -0.0 + 0.0 = 0.0
    return np.where(bits >= 0, bits >> KEY_BITS, -1 - ((bits & 0x7FFFFFFF) >> KEY_BITS))


def _bin_ends(key: int) -> tuple[float, float]:
    """The values between which a bin lies."""
    magnitude = key if key >= 0 else -1 - key
    ends = np.array([magnitude << KEY_BITS, ((magnitude + 1) << KEY_BITS) - 1], dtype=np.int32).view(np.float32)
    near, far = float(ends[0]), float(ends[1])
    return (near, far) if key >= 0 else (-far, -near)


def percentile_stretch(histograms: Iterable[Sequence[Mapping[str, int]]], percentiles: tuple[float, float]) -> Stretch:
    """The stretch between two percentiles of all valid samples, outwards to the ends of their bins.

    Args:
        histograms: of every block, one for each band.
        percentiles: within 0 and 100.
    """
    totals: list[Counter[int]] = []
    for block in histograms:
        totals = totals or [Counter() for _ in block]
        for total, counts in zip(totals, block, strict=True):
            total.update({int(key): count for key, count in counts.items()})
    ends = [_percentiles(total, percentiles) for total in totals]
    return Stretch(low=tuple(low for low, _ in ends), high=tuple(high for _, high in ends))


def _percentiles(total: Mapping[int, int], percentiles: tuple[float, float]) -> tuple[float, float]:
    if not total:
        return 0.0, 1.0
    keys = sorted(total)
    share = np.cumsum([total[key] for key in keys]) / sum(total.values())
    first, last = (keys[min(int(np.searchsorted(share, p / 100.0)), len(keys) - 1)] for p in percentiles)
    low, high = _bin_ends(first)[0], _bin_ends(last)[1]
    least, most = _bin_ends(keys[0])[0], _bin_ends(keys[-1])[1]
    if high - low < NARROWEST * max(-least, most):
        low, high = least, most
    return (low, high) if high - low > SMALLEST_NORMAL else (low, low + 1.0)


def to_samples(values: Tensor, header: Header, valid: Tensor | None) -> NDArray[Any]:
    """Values in the samples' units to the raster's type: rounded, never truncated, and within its range.

    Args:
        values: (bands, H, W), float32.
        valid: (bands or 1, H, W); pixels that do not count get the nodata value, NaN in floats without one, 0 under a
            mask or alpha. Those that count never get it, nor a value that a reader would take for it.
    """
    nodata, beside, samples = header.nodata, header.beside_nodata, values
    if header.dtype != "float32":
        limits = np.iinfo(header.dtype)
        samples = values.round().clamp_(limits.min, limits.max)
    if nodata is not None and beside is not None:
        near = (samples - nodata).abs_() < abs(beside - nodata)
        samples = torch.where(near, torch.tensor(beside, device=samples.device), samples)
    if valid is not None:
        fill = 0.0 if header.validity != "nodata" else float("nan") if nodata is None else nodata
        samples = torch.where(valid, samples, torch.tensor(fill, device=samples.device))
    return samples.to(getattr(torch, header.dtype)).cpu().numpy()
