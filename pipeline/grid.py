"""The canvas of a run: its blocks, tiles and patches, and which of them belong together. Numbers only, no pixels.

target      s*H x s*W pixels
canvas      the target in latents (8 x 8 pixels), at least one tile a side; what exceeds the target is reflection
blocks      partition the canvas: |0      |1      |2  |    the last ones may be smaller
tiles       cover it, overlapping: aaaa  cccc  eeee        fixed by the canvas, never by the number of workers
                                     bbbb  dddd
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from stablesr.aggregation import TileGrid
from stablesr.box import Box
from stablesr.model import patch_grid

Index = tuple[int, int]
"""Row and column of a block."""


@dataclass(frozen=True)
class Blocks:
    """Squares of `side` cells that partition an extent of `height` x `width` cells; the last ones may be smaller."""

    height: int
    width: int
    side: int

    @property
    def rows(self) -> int:
        return ceil(self.height / self.side)

    @property
    def columns(self) -> int:
        return ceil(self.width / self.side)

    def __len__(self) -> int:
        return self.rows * self.columns

    def __iter__(self) -> Iterator[Index]:
        """Row by row."""
        return ((row, column) for row in range(self.rows) for column in range(self.columns))

    def box(self, index: Index) -> Box:
        top, left = (self.side * i for i in index)
        return Box(top, left, min(top + self.side, self.height), min(left + self.side, self.width))

    def touching(self, region: Box) -> Iterator[Index]:
        """The blocks that hold some of a region, which may leave the extent."""
        inside = region.overlap(Box(0, 0, self.height, self.width))
        if inside is not None:
            for row in range(inside.top // self.side, ceil(inside.bottom / self.side)):
                for column in range(inside.left // self.side, ceil(inside.right / self.side)):
                    yield row, column

    def holding(self, row: int, column: int) -> Index:
        """The block of a cell."""
        return row // self.side, column // self.side


@dataclass(frozen=True)
class Canvas:
    """One layer's canvas; every layer of a run has the same."""

    source_height: int
    source_width: int
    scale: int
    factor: int
    """Target pixels a side of one latent."""
    tile: int
    overlap: int
    patch: int
    block: int
    """Side of a block, like those above in latents."""

    @property
    def target(self) -> Box:
        """In pixels."""
        return Box(0, 0, self.scale * self.source_height, self.scale * self.source_width)

    @property
    def source(self) -> Box:
        """In source pixels."""
        return Box(0, 0, self.source_height, self.source_width)

    @property
    def latents(self) -> Box:
        """In latents."""
        height, width = (max(ceil(n / self.factor), self.tile) for n in (self.target.height, self.target.width))
        return Box(0, 0, height, width)

    @property
    def pixels(self) -> Box:
        """The canvas in pixels: the target, and reflection to the right of it and below."""
        return self.latents.scaled(self.factor)

    @property
    def blocks(self) -> Blocks:
        """Of latents."""
        return Blocks(self.latents.height, self.latents.width, self.block)

    @property
    def output_blocks(self) -> Blocks:
        """Of target pixels: the same blocks, without those that hold reflection only."""
        return Blocks(self.target.height, self.target.width, self.block * self.factor)

    @property
    def source_blocks(self) -> Blocks:
        """Of source pixels: what is read of the source at once. As many pixels as a block of the output has."""
        return Blocks(self.source_height, self.source_width, self.block * self.factor)

    @property
    def tiles(self) -> TileGrid:
        return TileGrid.square(self.latents.height, self.latents.width, self.tile, self.overlap)

    @property
    def patches(self) -> TileGrid:
        return patch_grid(self.latents.height, self.latents.width, self.patch)

    def home(self, tile: Box) -> Index:
        """The block that a tile belongs to: the one that holds its centre."""
        return self.blocks.holding((tile.top + tile.bottom) // 2, (tile.left + tile.right) // 2)

    def at_home(self, index: Index) -> list[Box]:
        """The tiles that belong to a block."""
        row, column = index
        return Share(self, Box(row, column, row + 1, column + 1)).tiles

    def behind(self, pixels: Box) -> Box:
        """The source pixels that lie under a part of the canvas, reflections included, without any margin."""
        rows = reflected(pixels.top, pixels.bottom, self.target.height)
        columns = reflected(pixels.left, pixels.right, self.target.width)
        return Box(min(rows) // self.scale, min(columns) // self.scale,
                   max(rows) // self.scale + 1, max(columns) // self.scale + 1)  # fmt: skip


def reflected(start: int, stop: int, length: int) -> list[int]:
    """Where places of a canvas lie in an image of `length` that is continued by reflection at its edge pixels.

    >>> reflected(2, 7, length=4)
    [2, 3, 2, 1, 0]
    """
    period = max(2 * (length - 1), 1)
    return [min(i % period, period - i % period) if length > 1 else 0 for i in range(start, stop)]


@dataclass(frozen=True)
class Share:
    """What one worker does of a step. Cheap to make and to send: what it consists of is worked out where it is needed.

    region ______________          own: the blocks it writes
          |   ________   |         tiles: those it predicts, whole tiles within its frame
          |  |  own   |  |         region: what it blends and advances
          |  |________|  |         frame: what it holds of x_t and the low-resolution latents
          |______________|         inner: the part of the region that no tile of anybody else touches

    A worker whose latents stay with it predicts the tiles whose home it owns, and advances all latents that these
    tiles read (its reach), so that the neighbours' predictions are all it needs of a step. A share that is streamed,
    read from the store and written back at every step, predicts every tile that touches what it owns; tiles on a
    border are predicted by both sides.
    """

    canvas: Canvas
    rectangle: Box
    """Of the block grid."""
    streamed: bool = False

    @property
    def own(self) -> list[Index]:
        return [*_indexes(self.rectangle)]

    @property
    def own_box(self) -> Box:
        """In latents."""
        return own_box(self.canvas, self.rectangle)

    @cached_property
    def _lattice(self) -> tuple[list[int], range, list[int], range]:
        """Where rows and columns of tiles begin, and which of them are ours."""
        tiles, own = self.canvas.tiles, self.own_box
        tops, lefts = tiles.tops, tiles.lefts
        rows = _ours(tops, tiles.tile_height, own.top, own.bottom, self.streamed)
        return tops, rows, lefts, _ours(lefts, tiles.tile_width, own.left, own.right, self.streamed)

    @property
    def n_tiles(self) -> int:
        _, rows, _, columns = self._lattice
        return len(rows) * len(columns)

    @property
    def tiles(self) -> list[Box]:
        """In tile order."""
        tops, rows, lefts, columns = self._lattice
        height, width = self.canvas.tiles.tile_height, self.canvas.tiles.tile_width
        corners = ((tops[row], lefts[column]) for column in columns for row in rows)
        return [Box(top, left, top + height, left + width) for top, left in corners]

    @cached_property
    def region(self) -> Box:
        return self.own_box if self.streamed else self.frame

    @cached_property
    def frame(self) -> Box:
        tops, rows, lefts, columns = self._lattice
        own, tiles = self.own_box, self.canvas.tiles
        if not rows or not columns:
            return own
        return Box(
            min(tops[rows[0]], own.top),
            min(lefts[columns[0]], own.left),
            max(tops[rows[-1]] + tiles.tile_height, own.bottom),
            max(lefts[columns[-1]] + tiles.tile_width, own.right),
        )

    @cached_property
    def inner(self) -> Box | None:
        tops, rows, lefts, columns = self._lattice
        tiles, region = self.canvas.tiles, self.region
        top, bottom = _between(tops, tiles.tile_height, rows, region.top, region.bottom)
        left, right = _between(lefts, tiles.tile_width, columns, region.left, region.right)
        return Box(top, left, bottom, right) if top < bottom and left < right else None


def _ours(starts: Sequence[int], side: int, start: int, stop: int, streamed: bool) -> range:
    """Which tiles along an axis belong to an interval: those with their centre in it, or all that touch it."""
    if streamed:
        return range(bisect_right(starts, start - side), bisect_left(starts, stop))
    return range(*(bisect_left(starts, place, key=lambda first: (2 * first + side) // 2) for place in (start, stop)))


def _between(starts: Sequence[int], side: int, ours: range, start: int, stop: int) -> tuple[int, int]:
    """What of an interval the tiles beside ours leave free."""
    if not ours:
        return start, start
    before, after = ours.start - 1, ours.stop
    return (
        max(start, starts[before] + side) if before >= 0 else start,
        min(stop, starts[after]) if after < len(starts) else stop,
    )


def around(region: Box, inner: Box | None) -> list[Box]:
    """A region without what lies inside it: left, right, above, below."""
    if inner is None:
        return [region]
    edges = (
        (region.top, region.left, region.bottom, inner.left),
        (region.top, inner.right, region.bottom, region.right),
        (region.top, inner.left, inner.top, inner.right),
        (inner.bottom, inner.left, region.bottom, inner.right),
    )
    return [Box(*edge) for edge in edges if edge[0] < edge[2] and edge[1] < edge[3]]


def neighbours(shares: Sequence[Share]) -> list[list[int]]:
    """For each share, which others may need some of its tiles: an exchange goes both ways."""
    found: list[list[int]] = []
    of_block = {index: i for i, share in enumerate(shares) for index in _edge(share.rectangle)}
    for i, share in enumerate(shares):
        # The others' regions reach beyond their blocks, too, by less than a tile.
        tiles, region = share.canvas.tiles, share.region
        reach = max(tiles.tile_height, tiles.tile_width)
        seen = Box(region.top - reach, region.left - reach, region.bottom + reach, region.right + reach)
        near = {of_block[index] for index in share.canvas.blocks.touching(seen) if index in of_block} - {i}
        found.append(sorted(other for other in near if shares[other].region.overlap(region)))
    return found


def _edge(rectangle: Box) -> Iterator[Index]:
    """The blocks along the border of a rectangle: nobody else is near those inside."""
    for row, column in _indexes(rectangle):
        if row in (rectangle.top, rectangle.bottom - 1) or column in (rectangle.left, rectangle.right - 1):
            yield row, column


def own_box(canvas: Canvas, rectangle: Box) -> Box:
    """The latents of a rectangle of the block grid."""
    whole = rectangle.scaled(canvas.block).overlap(canvas.latents)
    assert whole is not None
    return whole


def _indexes(rectangle: Box) -> Iterator[Index]:
    for row in range(rectangle.top, rectangle.bottom):
        for column in range(rectangle.left, rectangle.right):
            yield row, column


class Loads:
    """How much there is to do in each block of a grid, such as its number of tiles; and in rectangles of it."""

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        self.rows, self.columns = len(rows), len(rows[0])
        self._sums = [[0.0] * (self.columns + 1)]
        """Over everything above and to the left."""
        for row in rows:
            above, sums, so_far = self._sums[-1], [0.0], 0.0
            for column, load in enumerate(row):
                so_far += load
                sums.append(above[column + 1] + so_far)
            self._sums.append(sums)

    @classmethod
    def even(cls, rows: int, columns: int) -> "Loads":
        return cls([[1.0] * columns] * rows)

    @classmethod
    def of_tiles(cls, canvas: Canvas) -> "Loads":
        """The number of tiles that have their home in each block."""
        tiles, blocks, side = canvas.tiles, canvas.blocks, canvas.block
        tops, lefts = tiles.tops, tiles.lefts
        of_rows = [len(_ours(tops, tiles.tile_height, top, top + side, False)) for top in range(0, blocks.height, side)]
        of_columns = [len(_ours(lefts, tiles.tile_width, left, left + side, False))
                      for left in range(0, blocks.width, side)]  # fmt: skip
        return cls([[row * column for column in of_columns] for row in of_rows])

    def __len__(self) -> int:
        return self.rows * self.columns

    def of(self, box: Box) -> float:
        """Of a rectangle of blocks."""
        above, upto = self._sums[box.top], self._sums[box.bottom]
        return upto[box.right] - upto[box.left] - above[box.right] + above[box.left]


def share_out(loads: Loads, speeds: Sequence[float]) -> list[Box]:
    """Cut a grid of blocks into a rectangle for each worker, so that all take about the same time.

    By halves, as often as needed, each time where the slower half is least slow; across the longer side, unless the
    other way is clearly fairer: short borders exchange less.

    Args:
        speeds: of the workers, relative to each other; no more workers than blocks.

    Returns:
        The rectangles, a partition, in the order of the speeds.
    """
    assert 0 < len(speeds) <= len(loads), (len(speeds), len(loads))
    return [*_halved(Box(0, 0, loads.rows, loads.columns), loads, speeds)]


FAIRER = 0.95
"""How much shorter the slower half must take for a cut along the longer side."""


def _halved(box: Box, loads: Loads, speeds: Sequence[float]) -> Iterator[Box]:
    if len(speeds) == 1:
        yield box
        return
    tall = box.height >= box.width
    longer, other = (_best_cut(box, loads, speeds, by_rows) for by_rows in (tall, not tall))
    cut = other if longer is None or (other is not None and other[0] < FAIRER * longer[0]) else longer
    assert cut is not None
    _, n, first, second = cut
    yield from _halved(first, loads, speeds[:n])
    yield from _halved(second, loads, speeds[n:])


def _best_cut(box: Box, loads: Loads, speeds: Sequence[float], by_rows: bool) -> tuple[float, int, Box, Box] | None:
    """How long the slower half takes, how many workers the first half gets, and the halves."""
    best, half = None, len(speeds) // 2
    length, across = (box.height, box.width) if by_rows else (box.width, box.height)
    for place in range(1, length):
        # where a half has fewer blocks than workers, the other takes the rest
        n = min(max(half, len(speeds) - (length - place) * across), place * across)
        if by_rows:
            at = box.top + place
            first, second = Box(box.top, box.left, at, box.right), Box(at, box.left, box.bottom, box.right)
        else:
            at = box.left + place
            first, second = Box(box.top, box.left, box.bottom, at), Box(box.top, at, box.bottom, box.right)
        time = max(loads.of(first) / sum(speeds[:n]), loads.of(second) / sum(speeds[n:]))
        if best is None or time <= best[0]:
            best = time, n, first, second
    return best
