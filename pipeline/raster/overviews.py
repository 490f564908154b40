"""The pyramid above a raster: how many levels, and how one becomes the next."""

from collections.abc import Iterator
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.raster.header import Header
from stablesr.box import Box

STRIP = 1 << 17
"""Samples that are halved at once: small enough that what lies between the steps stays in the processor's cache."""


class Level(Protocol):
    """One level of a pyramid. Level 0 is the raster; level k has ceil(n / 2^k) rows and columns of it."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def read(self, box: Box) -> NDArray[Any]:
        """Pixels: (header.count, h, w) in header.dtype, alpha last where there is one."""
        ...

    def read_mask(self, box: Box) -> NDArray[np.uint8]:
        """Validity: (h, w), 0 or 255. Asked only of rasters with a mask."""
        ...


def n_levels(height: int, width: int, tile: int = 512) -> int:
    """Levels of the pyramid, the raster included, until one tile holds the last.

    >>> n_levels(512, 512), n_levels(513, 1), n_levels(2049, 5)
    (1, 2, 4)
    """
    levels = 1
    while max(height, width) > tile:
        height, width, levels = -(-height // 2), -(-width // 2), levels + 1
    return levels


@overload
def halve(pixels: NDArray[Any], header: Header, mask: None = None) -> NDArray[Any]: ...


@overload
def halve(pixels: NDArray[Any], header: Header, mask: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[np.uint8]]: ...


def halve(
    pixels: NDArray[Any], header: Header, mask: NDArray[np.uint8] | None = None
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[np.uint8]]:
    """The next level of a window: every cell of 2 x 2 pixels becomes the mean of those of them that are valid.

    The window starts at an even row and column of its level. If it ends at the raster's edge after an odd one, the last
    cells are means of what is there. Integers are rounded, half to even.

    What is valid, and what becomes of cells without a valid pixel, depends on `header.validity`:

        nodata   per band: finite and not nodata. A cell without any is nodata, or NaN if nothing is declared; a mean
                 that happens to be nodata, or so close that readers would take it for that, is moved beside it
        mask     pixels whose mask is not 0. A cell with any is valid; one without is the mean of all
        alpha    colours: pixels whose alpha is not 0, or else all. Alpha itself is the plain mean

    Args:
        pixels: (header.count, h, w) in header.dtype.
        mask: (h, w), 0 or 255; of rasters with a mask, and of no others.

    Returns:
        (header.count, ceil(h / 2), ceil(w / 2)); with a mask, also the mask of these.
    """
    if (mask is not None) != (header.validity == "mask"):
        raise ValueError(f"validity is {header.validity!r}, but {'no' if mask is None else 'a'} mask was given")
    count, height, width = pixels.shape
    halved = np.empty((count, -(-height // 2), -(-width // 2)), pixels.dtype)
    valid = None
    if mask is not None:
        valid = mask != 0
    elif header.validity == "alpha":
        valid = pixels[-1] > 0
    for rows, cells in _strips(height, width):
        for band, (source, target) in enumerate(zip(pixels, halved, strict=True)):
            if header.validity == "nodata":
                target[cells] = _halve_nodata(source[rows], header)
            elif valid is None or (header.validity == "alpha" and band == count - 1):
                target[cells] = _mean_of_all(_even(source[rows]))
            else:
                target[cells] = _mean_of_valid(_even(source[rows]), _even(valid[rows]))
    return halved if mask is None else (halved, _any(mask))


def _strips(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Rows, an even number of them, and the rows of cells they become."""
    rows = max(2, STRIP // width & ~1)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield slice(top, bottom), slice(top // 2, -(-bottom // 2))


def _even(strip: NDArray[Any]) -> NDArray[Any]:
    """With the last row and column repeated where their number is odd: the mean of the cell stays what it was."""
    height, width = strip.shape
    if height % 2 or width % 2:
        return np.pad(strip, ((0, height % 2), (0, width % 2)), mode="edge")
    return np.ascontiguousarray(strip)


def _mean_of_all(strip: NDArray[Any]) -> NDArray[Any]:
    """The plain mean of every cell; the sides are even.

    Two neighbours are looked at as one integer of twice the width: its halves are added without a stride, which is
    what makes this as fast as memory.
    """
    if strip.dtype == np.float32:
        columns = strip.astype(np.float64)
        with np.errstate(invalid="ignore"):  # NaN and infinities may meet
            rows = columns[0::2] + columns[1::2]
            return ((rows[:, 0::2] + rows[:, 1::2]) * 0.25).astype(np.float32)
    if strip.dtype == np.int16:  # a mean moves with its numbers, and 2^15 is even
        return (_mean_of_all(strip.view(np.uint16) ^ np.uint16(0x8000)) ^ np.uint16(0x8000)).view(np.int16)
    bits = 8 * strip.itemsize
    pairs = strip.view(np.dtype(f"u{2 * strip.itemsize}"))
    one = pairs.dtype.type
    sums = pairs & one((1 << bits) - 1)
    pairs = pairs >> one(bits)
    sums += pairs
    cells = sums[0::2] + sums[1::2]
    # half to even: (4 q + r + 1 + the last bit of q) >> 2 is q for r < 2, q + 1 for r = 3, and the even one for r = 2
    odd = cells >> one(2)
    odd &= one(1)
    cells += odd
    cells += one(1)
    cells >>= one(2)
    return cells.astype(strip.dtype)


def _mean_of_valid(strip: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[Any]:
    """The mean of the valid pixels of every cell, of all where none is valid; the sides are even."""
    mean = _mean_of_all(strip)
    n_valid = _sums(valid.view(np.uint8))
    some = (n_valid > 0) & (n_valid < 4)
    if some.any():
        sums = _sums(np.where(valid, strip, 0).astype(np.float64))
        part = sums[some] / n_valid[some]
        mean[some] = part if strip.dtype == np.float32 else np.rint(part)
    return mean


def _halve_nodata(strip: NDArray[Any], header: Header) -> NDArray[Any]:
    is_float, nodata = strip.dtype == np.float32, header.nodata
    value: Any = None
    if nodata is not None and (is_float or float(nodata).is_integer()):
        with np.errstate(over="ignore"):  # beyond float32 it is infinite, and so is not finite
            value = strip.dtype.type(nodata)
    strip = _even(strip)
    valid = np.isfinite(strip) if is_float else np.ones(strip.shape, np.bool_)
    if value is not None:
        valid &= strip != value
    if valid.all():
        mean = _mean_of_all(strip)
    else:
        mean = _mean_of_valid(strip, valid)
        mean[_sums(valid.view(np.uint8)) == 0] = np.nan if value is None else value
    beside = header.beside_nodata
    if value is not None and beside is not None:
        near = mean == value
        if is_float:
            with np.errstate(over="ignore", invalid="ignore"):
                near = np.abs(mean - value) < abs(beside - float(value))
        mean[near & (_sums(valid.view(np.uint8)) > 0)] = beside
    return mean


def _sums(strip: NDArray[Any]) -> NDArray[Any]:
    rows = strip[0::2] + strip[1::2]
    sums: NDArray[Any] = rows[:, 0::2] + rows[:, 1::2]
    return sums


def _any(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    mask = _even(mask)
    rows = mask[0::2] | mask[1::2]
    return np.where(rows[:, 0::2] | rows[:, 1::2], np.uint8(255), np.uint8(0))
