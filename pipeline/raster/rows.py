"""Rasters that are stored in strips, read without decoding a strip for every window of it."""

import numpy as np

from pipeline.raster.source import Pixels, Source
from stablesr.box import Box

ROWS_BYTES = 256 << 20
"""What may be kept of a raster; twice that is needed while it moves down. Windows whose whole rows would be larger are
read without keeping them."""


class WholeRows(Source):
    """Reads whole rows where a window is asked for, and keeps them for the next.

    For files whose blocks span the width of the raster: rows of PNG and JPEG, strips of TIFF. Their windows cost whole
    rows anyway. Worse, a strip of many rows can only be decoded from its beginning (GDAL hands it out row by row, and
    starts again whenever a row above the last one is asked for), so it costs nothing more to go down the raster once,
    and a great deal to come back for each window.

    Measured 2026-11-23 on a 20000 x 12000 RGB TIFF in a single strip, GDAL 3.10.3, GDAL_CACHEMAX=64, five windows of
    600 x 600 in each of 23 rows of windows: deflate 61 s window by window, 1.7 s by whole rows; zstd 5.1 s and 0.5 s;
    deflate, one strip for each band, 14 s and 3.0 s. Uncompressed, GDAL finds each row at once (0.6 s and 1.7 s).
    Memory stays under 190 MB.

    What is kept moves down with the windows: those of one row of windows, then of the next, overlapping or not, decode
    the raster once. Any other order is right, only slower; so is a raster that is turned by its orientation.
    """

    def __init__(self, source: Source, limit: int = ROWS_BYTES) -> None:
        self._source, self._limit = source, limit
        self._rows: Box | None = None
        self._kept: Pixels | None = None
        self.header = source.header

    def read(self, box: Box) -> Pixels:
        header = self.header
        rows = Box(box.top, 0, box.bottom, header.width)
        if rows.height * header.n_bytes // header.height > self._limit:
            self._rows = self._kept = None
            return self._source.read(box)
        if self._rows is None or self._kept is None or not self._rows.top <= box.top < self._rows.bottom:
            self._rows, self._kept = rows, self._source.read(rows)
        elif box.bottom > self._rows.bottom:
            below = self._source.read(Box(self._rows.bottom, 0, box.bottom, header.width))
            above = self._kept.crop(Box(box.top, 0, self._rows.bottom, header.width), self._rows)
            self._rows, self._kept = rows, _stacked(above, below)
        return self._kept.crop(box, self._rows)

    def close(self) -> None:
        self._rows = self._kept = None
        self._source.close()


def _stacked(above: Pixels, below: Pixels) -> Pixels:
    """Two windows, one below the other, as one."""
    return Pixels(
        np.concatenate((above.values, below.values), axis=-2),
        None if above.valid is None or below.valid is None else np.concatenate((above.valid, below.valid), axis=-2),
        None if above.alpha is None or below.alpha is None else np.concatenate((above.alpha, below.alpha), axis=-2),
    )
