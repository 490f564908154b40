"""Pictures that are numbers into a palette, read as the colours they stand for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.raster.checks import choose_bands
from pipeline.raster.header import Band
from pipeline.raster.source import Pixels, Source
from stablesr.box import Box

Colors = NDArray[np.uint8]
"""(entries, 4): red, green, blue, alpha of every index that the samples can hold."""


def colors_of(palette: Mapping[int, Sequence[int]], dtype: str) -> Colors:
    """A table of all indices; those that the palette leaves out are black."""
    colors = np.zeros((np.iinfo(dtype).max + 1, 4), np.uint8)
    colors[:, 3] = 255
    for index, color in palette.items():
        colors[index] = color
    return colors


def is_ramp(palette: Mapping[int, Sequence[int]], bits: int) -> bool:
    """Whether the palette only says that samples are shades of gray, from black (0) to white (2**bits - 1).

    GDAL gives one to every TIFF with one bit per sample.
    """
    white = 2**bits - 1
    shades = {index: (round(255 * index / white),) * 3 for index in range(white + 1)}
    return {index: tuple(color) for index, color in palette.items()} == {i: (*s, 255) for i, s in shades.items()}


class Palette(Source):
    """A picture whose one band is an index.

    It becomes red, green and blue, or one gray where the palette has no colour; and alpha if an entry is not opaque.
    An index that stands for nodata has no value among the colours: it becomes a mask. (Both GDAL and PNG also call
    its entry transparent, which alone makes no alpha.)
    """

    def __init__(self, path: str, indices: Source, colors: Colors, bands: Sequence[int] | None) -> None:
        """`indices` has one band, without alpha."""
        header = indices.header
        assert len(header.bands) == 1 and header.validity != "alpha"
        opaque = colors[:, 3] == 255
        if header.nodata is not None:
            opaque[int(header.nodata)] = True
        gray = bool((colors[:, :3] == colors[:, :1]).all())
        names = ("gray",) if gray else ("red", "green", "blue")
        n_bands = len(names) + int(not opaque.all())
        chosen, alpha = choose_bands(path, bands, n_bands, n_bands if n_bands > len(names) else None)

        self._indices = indices
        columns = [*range(len(names)), 3]
        self._colors = np.ascontiguousarray(colors[:, [columns[band - 1] for band in chosen]].T)
        self._alpha = colors[:, 3].copy() if alpha is not None else None
        self.header = header.model_copy(
            update={
                "dtype": "uint8",
                "bands": tuple(
                    Band(name=header.bands[0].name, color=names[band - 1] if band <= len(names) else "undefined")
                    for band in chosen
                ),
                "validity": "alpha" if alpha is not None else "all" if header.validity == "all" else "mask",
                "nodata": None,
            }
        )

    def read(self, box: Box) -> Pixels:
        (index,), valid, _ = self._indices.read(box)
        values = self._colors.take(index, axis=1)
        if self._alpha is None:
            return Pixels(values, valid, None)
        alpha: NDArray[Any] = self._alpha[index]
        if valid is not None:
            alpha[~valid[0]] = 0
        return Pixels(values, alpha[np.newaxis] > 0, alpha)

    def close(self) -> None:
        self._indices.close()
