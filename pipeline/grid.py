"""The canvas of a run: its blocks, tiles and patches, and which of them belong together. Numbers only, no pixels.

target      s*H x s*W pixels
canvas      the target in latents (8 x 8 pixels), at least one tile a side; what exceeds the target is reflection
blocks      partition the canvas: |0      |1      |2  |    the last ones may be smaller
tiles       cover it, overlapping: aaaa  cccc  eeee        fixed by the canvas, never by the number of workers
                                     bbbb  dddd
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """What one worker does of a step.

    reach  ______________          own: the blocks it writes
          |   ________   |         tiles: those it predicts, whole tiles within its frame
          |  |  own   |  |         region: what it blends and advances
          |  |________|  |         frame: what it holds of x_t and the low-resolution latents
          |______________|
    """

    own: tuple[Index, ...]
    tiles: tuple[Box, ...]
    region: Box
    frame: Box


def resident_shares(canvas: Canvas, rectangles: Sequence[Box]) -> list[Share]:
    """Shares of workers that keep their latents from step to step and exchange predictions at their borders.

    A worker predicts the tiles whose home it owns, and advances all latents that these tiles read, so that the
    neighbours' predictions are all it needs of a step.

    Args:
        rectangles: of the block grid, one for each worker; a partition.
    """
    homes: list[list[Box]] = [[] for _ in rectangles]
    for tile in canvas.tiles:
        row, column = canvas.home(tile)
        cell = Box(row, column, row + 1, column + 1)
        homes[next(i for i, rectangle in enumerate(rectangles) if rectangle.overlap(cell))].append(tile)
    shares = []
    for rectangle, tiles in zip(rectangles, homes, strict=True):
        own = own_box(canvas, rectangle)
        reach = bounding([own, *tiles])
        shares.append(Share(tuple(_indexes(rectangle)), tuple(tiles), reach, reach))
    return shares


def streamed_shares(canvas: Canvas, rectangles: Sequence[Box]) -> Iterator[Share]:
    """Shares that are worked on one after another, each read from the store and written back at every step.

    Each predicts every tile that touches it; tiles on a border are predicted by both sides.
    """
    for rectangle in rectangles:
        own = own_box(canvas, rectangle)
        tiles = tuple(canvas.tiles.touching(own))
        yield Share(tuple(_indexes(rectangle)), tiles, own, bounding(tiles))


def own_box(canvas: Canvas, rectangle: Box) -> Box:
    """The latents of a rectangle of the block grid."""
    whole = rectangle.scaled(canvas.block).overlap(canvas.latents)
    assert whole is not None
    return whole


def bounding(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of them."""
    return Box(
        min(b.top for b in boxes), min(b.left for b in boxes), max(b.bottom for b in boxes), max(b.right for b in boxes)
    )


def _indexes(rectangle: Box) -> Iterator[Index]:
    for row in range(rectangle.top, rectangle.bottom):
        for column in range(rectangle.left, rectangle.right):
            yield row, column


def split(rows: int, columns: int, parts: int) -> list[Box]:
    """Cut a grid of blocks into rectangles of about equal size: by halves, across the longer side, as often as needed.

    Fewer than `parts` if there are fewer blocks. In a fixed order.
    """
    return [*_halved(Box(0, 0, rows, columns), min(parts, rows * columns))]


def _halved(box: Box, parts: int) -> Iterator[Box]:
    if parts <= 1:
        yield box
        return
    share = parts // 2
    if box.height >= box.width:
        cut = box.top + min(max(round(box.height * share / parts), 1), box.height - 1)
        first, second = Box(box.top, box.left, cut, box.right), Box(cut, box.left, box.bottom, box.right)
    else:
        cut = box.left + min(max(round(box.width * share / parts), 1), box.width - 1)
        first, second = Box(box.top, box.left, box.bottom, cut), Box(box.top, cut, box.bottom, box.right)
    # where a half has fewer blocks than its share of the parts, the other takes the rest
    share = min(max(share, parts - second.height * second.width), first.height * first.width)
    yield from _halved(first, share)
    yield from _halved(second, parts - share)
