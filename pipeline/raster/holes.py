"""Pixels that do not count, filled with something that the network can make sense of."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.fill import fillnodata


def fill_holes(values: NDArray[Any], valid: NDArray[np.bool_], reach: int, far: Sequence[float]) -> NDArray[Any]:
    """A window whose holes go on smoothly from their edges.

    A pixel within `reach` of a valid one becomes an average of the nearest valid ones around it, weighted by inverse
    distance; all others become `far`. Valid pixels stay as they are, bit by bit.

    What a pixel becomes depends on pixels up to `reach` away and on nothing else: a window read with that margin
    is filled exactly as the whole raster would be. (GDAL's own filling is so, since it is asked for no smoothing.)

    Args:
        values: (bands, h, w); finite where valid.
        valid: (bands, h, w), or (1, h, w) for all bands.
        reach: in pixels; 0 fills with `far` alone.
        far: one value for each band, in its type's range.
    """
    if valid.all():
        return values
    filled = np.empty_like(values)
    for band, known in enumerate(np.broadcast_to(valid, values.shape)):
        constant = np.asarray(far[band] if values.dtype == np.float32 else np.rint(far[band])).astype(values.dtype)
        filled[band] = np.where(known, values[band], _grown(values[band], known, reach, constant))
    return filled


def _grown(plane: NDArray[Any], known: NDArray[np.bool_], reach: int, far: NDArray[Any]) -> NDArray[Any]:
    """A band whose holes are filled; where it is known, it is rounded to float32 and back."""
    if reach == 0 or not known.any() or known.all():
        return np.broadcast_to(far, plane.shape)
    start = np.where(known, plane, far).astype(np.float32)
    grown = fillnodata(start, known.astype(np.uint8), max_search_distance=reach, smoothing_iterations=0)
    return grown if plane.dtype == np.float32 else np.rint(grown).astype(plane.dtype)
