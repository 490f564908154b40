"""The canvas and what it is cut into: blocks, tiles, patches, and who has them."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.grid import Blocks, Canvas, Loads, Share, around, neighbours, own_box, reflected, share_out
from stablesr.box import Box
from stablesr.resize import reflect_to
from tests.strategies import boxes

FACTOR = 8


@st.composite
def canvases(draw: st.DrawFn, longest: int = 60) -> Canvas:
    """Any small canvas: smaller than a tile, a strip, with blocks larger or smaller than tiles."""
    tile = draw(st.integers(1, 12))
    return Canvas(
        source_height=draw(st.integers(1, longest)),
        source_width=draw(st.integers(1, longest)),
        scale=draw(st.integers(1, 8)),
        factor=FACTOR,
        tile=tile,
        overlap=draw(st.integers(0, tile - 1)),
        patch=draw(st.integers(8, 16)),
        block=draw(st.sampled_from([8, 16, 32])),
    )


@st.composite
def shared_out(draw: st.DrawFn) -> tuple[Canvas, list[Box]]:
    """A canvas, and its block grid cut for some workers."""
    canvas = draw(canvases())
    n_workers = draw(st.integers(1, min(6, len(canvas.blocks))))
    return canvas, share_out(Loads.of_tiles(canvas), [1.0] * n_workers)


# Blocks


def test_blocks_partition_an_extent_and_the_last_ones_may_be_smaller() -> None:
    blocks = Blocks(5, 7, 4)
    assert (blocks.rows, blocks.columns, len(blocks)) == (2, 2, 4)
    assert [*blocks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [blocks.box(index) for index in blocks] == [
        Box(0, 0, 4, 4), Box(0, 4, 4, 7), Box(4, 0, 5, 4), Box(4, 4, 5, 7),
    ]  # fmt: skip
    assert blocks.holding(4, 3) == (1, 0)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 8, 64]))
def test_every_cell_is_in_one_block_and_that_is_the_one_that_holds_it(height: int, width: int, side: int) -> None:
    blocks = Blocks(height, width, side)
    owner = np.full((height, width), -1)
    for number, index in enumerate(blocks):
        box = blocks.box(index)
        assert (owner[box.top : box.bottom, box.left : box.right] == -1).all()
        owner[box.top : box.bottom, box.left : box.right] = number
    held = [[[*blocks].index(blocks.holding(row, column)) for column in range(width)] for row in range(height)]
    np.testing.assert_array_equal(owner, held)


@given(st.data())
def test_blocks_that_touch_a_region_are_those_that_overlap_it(data: st.DataObject) -> None:
    blocks = Blocks(data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30)), 8)
    region = data.draw(boxes(Box(-10, -10, 40, 40)))
    assert [*blocks.touching(region)] == [index for index in blocks if blocks.box(index).overlap(region)]


# Canvas


def test_a_known_canvas() -> None:
    """That of the Landsat scene, four times larger: four columns of the last latents are reflection."""
    canvas = Canvas(718, 791, scale=4, factor=8, tile=64, overlap=32, patch=128, block=256)
    assert canvas.target == Box(0, 0, 2872, 3164)
    assert canvas.latents == Box(0, 0, 359, 396)
    assert canvas.pixels == Box(0, 0, 2872, 3168)
    assert [*canvas.blocks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert canvas.blocks.box((1, 1)) == Box(256, 256, 359, 396)
    assert canvas.output_blocks.box((1, 1)) == Box(2048, 2048, 2872, 3164)
    assert [*canvas.source_blocks] == [(0, 0)]
    assert canvas.tiles.tops[-2:] == [288, 295]
    assert canvas.tiles.lefts[-2:] == [320, 332]
    assert (len(canvas.tiles.tops), len(canvas.tiles.lefts)) == (11, 12)
    assert canvas.patches.tops == [0, 96, 192, 231]


def test_a_canvas_has_at_least_one_tile_and_the_blocks_of_reflection_are_not_of_the_output() -> None:
    canvas = Canvas(3, 5, scale=2, factor=8, tile=64, overlap=32, patch=128, block=16)
    assert canvas.latents == Box(0, 0, 64, 64)
    assert len(canvas.tiles) == 1
    assert len(canvas.blocks) == 16
    assert [*canvas.output_blocks] == [(0, 0)]
    assert canvas.output_blocks.box((0, 0)) == Box(0, 0, 6, 10)


@given(canvases())
def test_the_blocks_of_the_output_are_the_first_of_the_canvas(canvas: Canvas) -> None:
    for index in canvas.output_blocks:
        whole = canvas.blocks.box(index).scaled(canvas.factor)
        assert canvas.output_blocks.box(index) == whole.overlap(canvas.target)


@given(canvases())
def test_every_tile_has_one_home_on_the_canvas_and_touches_it(canvas: Canvas) -> None:
    for tile in canvas.tiles:
        home = canvas.home(tile)
        assert home in {*canvas.blocks}
        assert canvas.blocks.box(home).overlap(tile)


@pytest.mark.parametrize(
    ("start", "stop", "length", "places"),
    [
        pytest.param(0, 3, 4, [0, 1, 2], id="inside"),
        pytest.param(2, 7, 4, [2, 3, 2, 1, 0], id="over-the-edge"),
        pytest.param(3, 9, 3, [1, 0, 1, 2, 1, 0], id="reflected-twice"),
        pytest.param(0, 4, 1, [0, 0, 0, 0], id="a-single-pixel"),
        pytest.param(3, 6, 2, [1, 0, 1], id="two-pixels"),
    ],
)
def test_reflected(start: int, stop: int, length: int, places: list[int]) -> None:
    assert reflected(start, stop, length) == places


@given(st.integers(1, 20), st.integers(1, 90), st.data())
def test_reflection_is_that_of_stablesr(length: int, wanted: int, data: st.DataObject) -> None:
    filled = reflect_to(torch.arange(length)[None], 1, wanted)[0].tolist()
    start = data.draw(st.integers(0, wanted - 1))
    stop = data.draw(st.integers(start + 1, wanted))
    assume(wanted >= length)
    assert reflected(start, stop, length) == filled[start:stop]


@given(st.data())
def test_behind_a_part_of_the_canvas_lie_just_the_source_pixels_that_it_shows(data: st.DataObject) -> None:
    canvas = data.draw(canvases(longest=20))
    pixels = data.draw(boxes(canvas.pixels))
    rows = {place // canvas.scale for place in reflected(pixels.top, pixels.bottom, canvas.target.height)}
    columns = {place // canvas.scale for place in reflected(pixels.left, pixels.right, canvas.target.width)}
    behind = canvas.behind(pixels)
    assert behind.overlap(canvas.source) == behind
    assert behind == Box(min(rows), min(columns), max(rows) + 1, max(columns) + 1)
    assert rows == {*range(behind.top, behind.bottom)}
    assert columns == {*range(behind.left, behind.right)}


# Shares


@pytest.mark.parametrize(
    ("rows", "columns", "parts", "rectangles"),
    [
        pytest.param(2, 3, 1, [Box(0, 0, 2, 3)], id="one"),
        pytest.param(2, 4, 2, [Box(0, 0, 2, 2), Box(0, 2, 2, 4)], id="across-the-longer-side"),
        pytest.param(2, 3, 2, [Box(0, 0, 1, 3), Box(1, 0, 2, 3)], id="across-the-shorter-side-where-that-is-fairer"),
        pytest.param(
            2,
            3,
            6,
            [Box(r, c, r + 1, c + 1) for r, c in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2))],
            id="a-block-each",
        ),
        pytest.param(
            1, 3, 3, [Box(0, 0, 1, 1), Box(0, 1, 1, 2), Box(0, 2, 1, 3)], id="a-half-with-too-few-blocks-for-its-parts"
        ),
        pytest.param(4, 1, 3, [Box(0, 0, 2, 1), Box(2, 0, 3, 1), Box(3, 0, 4, 1)], id="thirds"),
    ],
)
def test_blocks_with_as_much_to_do_are_shared_out_evenly(
    rows: int, columns: int, parts: int, rectangles: list[Box]
) -> None:
    assert share_out(Loads.even(rows, columns), [1.0] * parts) == rectangles


def test_who_is_twice_as_fast_gets_twice_as_much() -> None:
    assert share_out(Loads.even(1, 9), [2.0, 1.0]) == [Box(0, 0, 1, 6), Box(0, 6, 1, 9)]
    assert share_out(Loads.even(1, 9), [1.0, 2.0]) == [Box(0, 0, 1, 3), Box(0, 3, 1, 9)]


def test_blocks_with_nothing_to_do_cost_nothing() -> None:
    loads = Loads([[0.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, 4.0]])
    assert share_out(loads, [1.0, 1.0]) == [Box(0, 0, 1, 4), Box(1, 0, 2, 4)]


numbers = st.floats(0.1, 10)


@st.composite
def uneven(draw: st.DrawFn) -> tuple[list[list[float]], list[float]]:
    """Something to do in each block, and workers of different speeds; no more of them than blocks."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    cells = st.lists(st.integers(0, 20).map(float), min_size=columns, max_size=columns)
    loads = draw(st.lists(cells, min_size=rows, max_size=rows))
    return loads, draw(st.lists(numbers, min_size=1, max_size=min(rows * columns, 20)))


@given(uneven())
def test_a_partition_with_a_rectangle_for_each_worker(drawn: tuple[list[list[float]], list[float]]) -> None:
    cells, speeds = drawn
    rectangles = share_out(Loads(cells), speeds)
    assert len(rectangles) == len(speeds)
    covered = np.zeros((len(cells), len(cells[0])), int)
    for rectangle in rectangles:
        covered[rectangle.within(Box(0, 0, *covered.shape))] += 1
    assert (covered == 1).all()


@given(uneven(), st.data())
def test_the_load_of_a_rectangle_is_the_sum_of_its_blocks(
    drawn: tuple[list[list[float]], list[float]], data: st.DataObject
) -> None:
    cells, _ = drawn
    box = data.draw(boxes(Box(0, 0, len(cells), len(cells[0]))))
    assert Loads(cells).of(box) == np.array(cells)[box.within(Box(0, 0, len(cells), len(cells[0])))].sum()


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
def test_shares_are_about_equal(rows: int, columns: int, parts: int) -> None:
    """Where there are blocks enough."""
    assume(rows * columns >= 64 * parts)
    sizes = [r.height * r.width for r in share_out(Loads.even(rows, columns), [1.0] * parts)]
    assert max(sizes) <= 1.5 * rows * columns / parts


def test_the_tiles_of_a_block_are_those_with_their_centre_in_it() -> None:
    canvas = Canvas(718, 791, scale=4, factor=8, tile=64, overlap=32, patch=128, block=256)
    assert len(canvas.at_home((0, 0))) == 7 * 7  # centres at 32, 64 ... 224
    loads = Loads.of_tiles(canvas)
    assert loads.of(Box(0, 0, 1, 1)) == 49
    assert loads.of(Box(0, 0, 2, 2)) == len(canvas.tiles)


def bounding(boxes: list[Box]) -> Box:
    return Box(
        min(b.top for b in boxes), min(b.left for b in boxes), max(b.bottom for b in boxes), max(b.right for b in boxes)
    )


def shares_of(drawn: tuple[Canvas, list[Box]], streamed: bool = False) -> list[Share]:
    canvas, rectangles = drawn
    return [Share(canvas, rectangle, streamed) for rectangle in rectangles]


@given(shared_out())
def test_shares_have_every_block_and_every_tile_once(drawn: tuple[Canvas, list[Box]]) -> None:
    canvas, shares = drawn[0], shares_of(drawn)
    assert Counter(index for share in shares for index in share.own) == Counter([*canvas.blocks])
    assert Counter(tile for share in shares for tile in share.tiles) == Counter([*canvas.tiles])
    for share in shares:
        own = own_box(canvas, share.rectangle)
        assert share.tiles == [tile for tile in canvas.tiles if canvas.home(tile) in share.own]  # in tile order
        assert share.n_tiles == len(share.tiles) == Loads.of_tiles(canvas).of(share.rectangle)
        assert bounding([canvas.blocks.box(index) for index in share.own]) == own
        assert share.region == share.frame == bounding([own, *share.tiles])


@given(shared_out())
def test_streamed_shares_cover_each_block_once_and_predict_all_that_touches_it(drawn: tuple[Canvas, list[Box]]) -> None:
    canvas, shares = drawn[0], shares_of(drawn, streamed=True)
    assert Counter(index for share in shares for index in share.own) == Counter([*canvas.blocks])
    for share in shares:
        assert share.region == bounding([canvas.blocks.box(index) for index in share.own])
        assert share.tiles == [tile for tile in canvas.tiles if tile.overlap(share.region)]
        assert share.frame == bounding([share.region, *share.tiles])
        assert share.inner == share.region  # it waits for nobody


@given(shared_out())
def test_the_inner_part_is_all_that_no_tile_of_another_touches(drawn: tuple[Canvas, list[Box]]) -> None:
    canvas = drawn[0]
    for share in shares_of(drawn):
        foreign = np.zeros((canvas.latents.height, canvas.latents.width), bool)
        ours = {*share.tiles}
        for tile in canvas.tiles:
            if tile not in ours:
                foreign[tile.within(canvas.latents)] = True
        free = np.zeros_like(foreign)
        free[share.region.within(canvas.latents)] = True
        free &= ~foreign
        inner = np.zeros_like(foreign)
        if share.inner is not None:
            inner[share.inner.within(canvas.latents)] = True
        if share.tiles:
            np.testing.assert_array_equal(inner, free)
        else:
            assert share.inner is None
        covered = inner.astype(int)
        for edge in around(share.region, share.inner):
            covered[edge.within(canvas.latents)] += 1
        whole = np.zeros_like(covered)
        whole[share.region.within(canvas.latents)] = 1
        np.testing.assert_array_equal(covered, whole)


@given(shared_out())
def test_neighbours_are_those_whose_regions_meet(drawn: tuple[Canvas, list[Box]]) -> None:
    shares = shares_of(drawn)
    expected = [
        [k for k, other in enumerate(shares) if k != i and other.region.overlap(share.region)]
        for i, share in enumerate(shares)
    ]
    assert neighbours(shares) == expected


@given(shared_out())
def test_a_share_gets_all_tiles_over_its_region_from_its_neighbours(drawn: tuple[Canvas, list[Box]]) -> None:
    canvas, shares = drawn[0], shares_of(drawn)
    for share, near in zip(shares, neighbours(shares), strict=True):
        handed = {tile for k in near for tile in shares[k].tiles if tile.overlap(share.region)}
        assert {*canvas.tiles.touching(share.region)} <= handed | {*share.tiles}
