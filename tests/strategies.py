"""What the properties are tried on: small canvases, and every awkward way to cut them."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from stablesr.aggregation import TileGrid
from stablesr.box import Box

seeds = st.integers(0, 2**32 - 1)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values that are the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def spans(draw: st.DrawFn, start: int, stop: int) -> tuple[int, int]:
    """Half-open, not empty, within [start, stop); the ends are likely."""
    first = draw(st.integers(start, stop - 1))
    return first, draw(st.integers(first + 1, stop))


@st.composite
def boxes(draw: st.DrawFn, frame: Box) -> Box:
    """Any box within a frame."""
    (top, bottom), (left, right) = draw(spans(frame.top, frame.bottom)), draw(spans(frame.left, frame.right))
    return Box(top, left, bottom, right)


@st.composite
def grids(draw: st.DrawFn, longest: int = 24) -> TileGrid:
    """Any grid on a canvas whose sides are at most `longest`."""
    height, width = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    tile_height, tile_width = draw(st.integers(1, height)), draw(st.integers(1, width))
    overlap = draw(st.integers(0, min(tile_height, tile_width) - 1))
    return TileGrid(height, width, tile_height, tile_width, overlap)


def with_reach(box: Box, reach: int, frame: Box) -> Box:
    """A box and what lies up to `reach` around it, less where the frame ends."""
    around = Box(box.top - reach, box.left - reach, box.bottom + reach, box.right + reach).overlap(frame)
    assert around is not None
    return around
