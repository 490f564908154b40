"""Pictures that are stored lying or mirrored, and read upright.

orientation   1       2       3       4       5       6       7       8
            1 2 3   3 2 1   6 5 4   4 5 6   1 4     3 6     6 3     4 1
stored      4 5 6   6 5 4   3 2 1   1 2 3   2 5     2 5     5 2     5 2
                                            3 6     1 4     4 1     6 3
upright     1 2 3   in every case
            4 5 6
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.raster.header import Header
from pipeline.raster.source import Pixels, Source
from stablesr.box import Box

EXIF_ORIENTATION = "EXIF_Orientation"
"""As GDAL names the tag, of JPEG; it tells none of PNG and WebP."""


class Turn(NamedTuple):
    """What makes a picture upright: rows become columns, then rows, then columns are reversed."""

    transposed: bool
    rows_reversed: bool
    columns_reversed: bool


TURNS = {
    1: Turn(False, False, False),
    2: Turn(False, False, True),
    3: Turn(False, True, True),
    4: Turn(False, True, False),
    5: Turn(True, False, False),
    6: Turn(True, False, True),
    7: Turn(True, True, True),
    8: Turn(True, True, False),
}
"""By the number in TIFF and EXIF (tag 274)."""


def upright(array: NDArray[Any], turn: Turn) -> NDArray[Any]:
    """The last two axes of what is stored, as they should be seen."""
    if turn.transposed:
        array = array.swapaxes(-1, -2)
    rows = slice(None, None, -1 if turn.rows_reversed else 1)
    columns = slice(None, None, -1 if turn.columns_reversed else 1)
    return np.ascontiguousarray(array[..., rows, columns])


def stored_box(box: Box, turn: Turn, height: int, width: int) -> Box:
    """Where a box of the upright picture, `height` x `width`, is stored."""
    top, left, bottom, right = box.top, box.left, box.bottom, box.right
    if turn.columns_reversed:
        left, right = width - right, width - left
    if turn.rows_reversed:
        top, bottom = height - bottom, height - top
    return Box(left, top, right, bottom) if turn.transposed else Box(top, left, bottom, right)


def upright_source(source: Source, orientation: int) -> Source:
    """The source as it should be seen.

    A raster with a place on the ground stays as it is: its transform speaks of rows and columns as they are stored.

    Args:
        orientation: of the file; 1 if it has none, or one that only the source's tags tell.
    """
    header = source.header
    tags = dict(header.tags)
    told = tags.pop(EXIF_ORIENTATION, "")
    if orientation == 1 and told.isdigit():
        orientation = int(told)
    source.header = header = header.model_copy(update={"tags": tags})
    turn = TURNS.get(orientation, TURNS[1])
    placed = header.transform is not None or header.gcps or header.rpcs is not None
    return source if placed or turn == TURNS[1] else Upright(source, turn)


class Upright(Source):
    """A source whose picture is turned."""

    def __init__(self, source: Source, turn: Turn) -> None:
        self._source, self._turn = source, turn
        self.header = _turned(source.header) if turn.transposed else source.header

    def read(self, box: Box) -> Pixels:
        stored = stored_box(box, self._turn, self.header.height, self.header.width)
        return self._source.read(stored).each(lambda array: upright(array, self._turn))

    def close(self) -> None:
        self._source.close()


def _turned(header: Header) -> Header:
    """Height for width, in everything that tells them apart."""
    x, y = "TIFFTAG_XRESOLUTION", "TIFFTAG_YRESOLUTION"
    microns = header.microns_per_pixel
    return header.model_copy(
        update={
            "height": header.width,
            "width": header.height,
            "tags": {{x: y, y: x}.get(name, name): value for name, value in header.tags.items()},
            "microns_per_pixel": microns and microns[::-1],
        }
    )
