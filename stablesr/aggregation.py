"""Tiles of a canvas, and how their predictions become one: the paper's aggregation sampling (StableSR, section 3.3).

At every diffusion step each tile is predicted on its own, and the predictions, not the states, are blended with
Gaussian weights: then one sampler step is taken on the whole canvas. A sampler that holds only a part of the canvas
calls the same functions for its share of the tiles: the sums run in tile order and are the same bits wherever they are
formed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stablesr.box import Box

WINDOW_VARIANCE = 0.01
"""Of the Gaussian weights, in units of the squared side of the tile."""

PANEL = 1 << 18
"""Numbers that are blended at once on a CPU: as many as its cache holds some copies of."""


@dataclass(frozen=True)
class TileGrid:
    """Overlapping tiles that cover a canvas, in tile order: column by column, from top to bottom, as published.

        extent 9, tile 4, stride 3    |012345678|
                                       aaaa           starts at 0
                                          bbbb        starts at 3
                                            cccc      starts at 5, not 6: pulled back to the edge

    All lengths are in the cells of the canvas: latents for sampling, pixels or latents for the autoencoder's patches.
    """

    height: int
    width: int
    tile_height: int
    tile_width: int
    overlap: int
    """Cells that two neighbours share, at least."""

    def __post_init__(self) -> None:
        for axis, extent, tile in (("rows", self.height, self.tile_height), ("columns", self.width, self.tile_width)):
            if not 0 < tile <= extent:
                raise ValueError(f"a tile of {tile} {axis} does not fit a canvas of {extent}: pad the canvas to a tile")
            if not 0 <= self.overlap < tile:
                raise ValueError(f"overlap={self.overlap} must be within 0 and {tile - 1}, or tiles never advance")

    @classmethod
    def square(cls, height: int, width: int, tile: int, overlap: int) -> "TileGrid":
        return cls(height, width, tile, tile, overlap)

    @classmethod
    def fitted(cls, height: int, width: int, tile: int, overlap: int) -> "TileGrid":
        """Tiles no larger than the canvas: for networks that take any size."""
        tile_height, tile_width = min(tile, height), min(tile, width)
        return cls(height, width, tile_height, tile_width, min(overlap, tile_height - 1, tile_width - 1))

    @property
    def canvas(self) -> Box:
        return Box(0, 0, self.height, self.width)

    @property
    def tops(self) -> list[int]:
        return tile_starts(self.height, self.tile_height, self.tile_height - self.overlap)

    @property
    def lefts(self) -> list[int]:
        return tile_starts(self.width, self.tile_width, self.tile_width - self.overlap)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def __iter__(self) -> Iterator[Box]:
        return iter(self.touching(self.canvas))

    def touching(self, region: Box) -> list[Box]:
        """Every tile that covers some of a region, in tile order."""
        rows = self.height, self.tile_height, self.tile_height - self.overlap
        columns = self.width, self.tile_width, self.tile_width - self.overlap
        tops = _starts_touching(*rows, region.top, region.bottom)
        lefts = _starts_touching(*columns, region.left, region.right)
        return [Box(t, le, t + self.tile_height, le + self.tile_width) for le in lefts for t in tops]

    def scaled(self, factor: int) -> "TileGrid":
        """The same tiles on a canvas whose cells are `factor` times finer."""
        return TileGrid(
            *(factor * n for n in (self.height, self.width, self.tile_height, self.tile_width, self.overlap))
        )


def tile_starts(extent: int, tile: int, stride: int) -> list[int]:
    """First cell of every tile along one axis; the last tile is pulled back to the edge.

    >>> tile_starts(9, tile=4, stride=3)
    [0, 3, 5]
    """
    last = extent - tile
    return [*range(0, last, stride), last]


def _starts_touching(extent: int, tile: int, stride: int, start: int, stop: int) -> list[int]:
    """Those of `tile_starts` whose tiles touch an interval; in no more time than there are of them."""
    last = extent - tile
    before = range(0, last, stride)
    found = [*before[max((start - tile) // stride + 1, 0) : max(-(-stop // stride), 0)]]
    return [*found, last] if last < stop and last + tile > start else found


# What is cached is made outside inference mode, so that a run within it leaves nothing behind that autograd refuses.
@cache
@torch.inference_mode(False)
def axis_window(side: int, centre: float) -> Tensor:
    """exp(-((k - centre) / side)^2 / (2 variance)) / sqrt(2 pi variance) for k = 0 ... side - 1; (side,), float64."""
    k = np.arange(side, dtype=np.float64)
    two_variance = 2.0 * WINDOW_VARIANCE
    return torch.from_numpy(np.exp(-(((k - centre) / side) ** 2) / two_variance) / np.sqrt(np.pi * two_variance))


@cache
@torch.inference_mode(False)
def gaussian_window(height: int, width: int) -> Tensor:
    """The weights of a tile, (height, width), float32.

    The published window: centred on the tile in x, half a cell below the centre in y. We keep that, so that pictures
    agree with the published ones.
    """
    rows, columns = axis_window(height, height / 2), axis_window(width, (width - 1) / 2)
    return (rows[:, None] * columns[None, :]).to(torch.float32)


class Prediction(NamedTuple):
    """What a network made of a tile, or the part of it that somebody needs."""

    tile: Box
    part: Box
    """What of the tile `values` holds; the tile itself, or less."""
    values: Tensor
    """(C, part.height, part.width)."""

    def cropped(self, region: Box) -> "Prediction | None":
        """Only what touches a region, in memory of its own, to travel; None if nothing does."""
        part = self.part.overlap(region)
        if part is None:
            return None
        values = self.values[(slice(None), *part.within(self.part))]
        return Prediction(self.tile, part, values.clone(memory_format=torch.contiguous_format))


def blend(grid: TileGrid, region: Box, predictions: Sequence[Prediction]) -> Tensor:
    """Sum of window * prediction over the tiles that cover a place, divided by the sum of their windows.

    Args:
        grid: of the whole canvas.
        region: what is wanted, a part of the canvas.
        predictions: of all tiles that touch the region and no others, in any order; they are summed in tile order.

    Returns:
        (C, region.height, region.width) in float32, on the predictions' device; bit for bit the crop of the blended
        canvas.

    Raises:
        ValueError: if the region leaves the canvas, or a tile is missing, there twice, or cropped to less than the
            region needs.
    """
    if region.overlap(grid.canvas) != region:
        raise ValueError(f"{region} is not within the canvas, {grid.canvas}")
    window = gaussian_window(grid.tile_height, grid.tile_width)
    expected = grid.touching(region)
    ordered = sorted(predictions, key=lambda prediction: (prediction.tile.left, prediction.tile.top))  # tile order
    given = [prediction.tile for prediction in ordered]
    if given != expected:
        missing = len(set(expected) - set(given))
        raise ValueError(
            f"{region} needs each of the {len(expected)} tiles that touch it once: "
            f"{missing} are missing, {len(given) + missing - len(expected)} are too many"
        )
    for tile, part, _ in ordered:
        wanted = tile.overlap(region)
        assert wanted is not None
        if wanted.overlap(part) != wanted:
            raise ValueError(f"of tile {tile} only {part} was given, but {region} needs {wanted}")
    first = ordered[0].values
    blended = torch.zeros(first.shape[0], region.height, region.width, dtype=torch.float32, device=first.device)
    for panel in _panels(region, first):
        total = blended[(slice(None), *panel.within(region))]
        for tile, part, values in ordered:
            here = tile.overlap(panel)
            if here is not None:
                weights = window[here.within(tile)].to(values.device)
                crop = values[(slice(None), *here.within(part))].float()
                total[(slice(None), *here.within(panel))].addcmul_(weights, crop)
        total /= window_sum(grid, panel).to(total.device)
    return blended


def _panels(region: Box, values: Tensor) -> Iterator[Box]:
    """A region in rows; on a CPU so few at a time that they stay in its cache until they are blended."""
    rows = max(PANEL // (values.shape[0] * region.width), 1) if values.device.type == "cpu" else region.height
    for top in range(region.top, region.bottom, rows):
        yield Box(top, region.left, min(top + rows, region.bottom), region.right)


def window_sum(grid: TileGrid, region: Box) -> Tensor:
    """Sum of the windows over each place of a region, (height, width), float32.

    Tiles form a lattice, so it is the product of a sum along rows and one along columns.
    """
    rows = _axis_sum(grid.height, grid.tile_height, grid.overlap, grid.tile_height / 2)
    columns = _axis_sum(grid.width, grid.tile_width, grid.overlap, (grid.tile_width - 1) / 2)
    of_rows, of_columns = rows[region.top : region.bottom, None], columns[None, region.left : region.right]
    return of_rows.to(torch.float32) * of_columns.to(torch.float32)


@cache
@torch.inference_mode(False)
def _axis_sum(extent: int, tile: int, overlap: int, centre: float) -> Tensor:
    total = torch.zeros(extent, dtype=torch.float64, device="cpu")
    for start in tile_starts(extent, tile, tile - overlap):
        total[start : start + tile] += axis_window(tile, centre)
    return total


def in_batches(
    predict: Callable[..., Tensor], tiles: Sequence[Box], frame: Box, canvases: Sequence[Tensor], batch: int
) -> Iterator[Prediction]:
    """Run a network over tiles, a fixed number at a time.

    Every batch has the same shape, the last one filled up with copies of its first tile, so that what becomes of a tile
    does not depend on how many there are.

    Args:
        predict: gets one tensor (batch, C, tile_height, tile_width) for each canvas; the rows of its answer are the
            values of the tiles.
        tiles: all of one size.
        frame: the box that the canvases hold.
        canvases: (C, frame.height, frame.width) each.
    """
    for start in range(0, len(tiles), batch):
        group = tiles[start : start + batch]
        filled = [*group, *[group[0]] * (batch - len(group))]
        crops = [torch.stack([canvas[(slice(None), *tile.within(frame))] for tile in filled]) for canvas in canvases]
        for tile, values in zip(group, predict(*crops), strict=False):  # the copies are left over
            yield Prediction(tile, tile, values)
