"""Tiles that cover a canvas, their weights, and predictions that become one, wherever they are summed."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stablesr.aggregation import Prediction, TileGrid, blend, gaussian_window, in_batches, tile_starts, window_sum
from stablesr.box import Box
from tests.strategies import boxes, grids, seeded, seeds

# Grids


@pytest.mark.parametrize(
    ("extent", "tile", "stride", "starts"),
    [
        pytest.param(4, 4, 3, [0], id="one-tile"),
        pytest.param(5, 4, 3, [0, 1], id="one-cell-more"),
        pytest.param(7, 4, 3, [0, 3], id="two-tiles-fit"),
        pytest.param(9, 4, 3, [0, 3, 5], id="last-tile-pulled-back"),
        pytest.param(8, 4, 4, [0, 4], id="no-overlap"),
        pytest.param(9, 4, 4, [0, 4, 5], id="no-overlap-but-the-last"),
        pytest.param(3, 1, 1, [0, 1, 2], id="tiles-of-one-cell"),
        pytest.param(160, 64, 32, [0, 32, 64, 96], id="published-sizes"),
    ],
)
def test_tile_starts(extent, tile, stride, starts):
    assert tile_starts(extent, tile, stride) == starts


def test_tiles_come_column_by_column_from_top_to_bottom():
    grid = TileGrid(height=3, width=5, tile_height=2, tile_width=3, overlap=1)
    assert [*grid] == [Box(0, 0, 2, 3), Box(1, 0, 3, 3), Box(0, 2, 2, 5), Box(1, 2, 3, 5)]
    assert len(grid) == 4


@given(grids())
def test_every_cell_is_covered_by_tiles_of_one_size_that_stay_on_the_canvas(grid):
    covered = torch.zeros(grid.height, grid.width)
    for tile in grid:
        assert tile.overlap(grid.canvas) == tile
        assert (tile.height, tile.width) == (grid.tile_height, grid.tile_width)
        covered[tile.within(grid.canvas)] += 1
    assert covered.min() >= 1


@given(grids())
def test_no_tile_is_there_twice_and_neighbours_share_the_overlap(grid):
    assert len({*grid}) == len(grid)
    for starts, tile in ((grid.tops, grid.tile_height), (grid.lefts, grid.tile_width)):
        assert all(start + tile - following >= grid.overlap for start, following in pairwise(starts))


@given(st.data())
def test_tiles_that_touch_a_region_are_those_that_overlap_it_in_tile_order(data):
    grid = data.draw(grids())
    region = data.draw(boxes(grid.canvas))
    assert grid.touching(region) == [tile for tile in grid if tile.overlap(region)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param((3, 9, 4, 4, 1), "a tile of 4 rows does not fit a canvas of 3", id="canvas-too-low"),
        pytest.param((9, 3, 4, 4, 1), "a tile of 4 columns does not fit a canvas of 3", id="canvas-too-narrow"),
        pytest.param((9, 9, 0, 4, 0), "a tile of 0 rows", id="tile-of-nothing"),
        pytest.param((9, 9, 4, 4, 4), "overlap=4 must be within 0 and 3", id="never-advances"),
        pytest.param((9, 9, 4, 2, 2), "overlap=2 must be within 0 and 1", id="never-advances-to-the-right"),
        pytest.param((9, 9, 4, 4, -1), "overlap=-1", id="gaps"),
    ],
)
def test_a_grid_that_cannot_cover_its_canvas_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        TileGrid(*sizes)


def test_square_tiles():
    assert TileGrid.square(96, 80, tile=64, overlap=32) == TileGrid(96, 80, 64, 64, 32)


@pytest.mark.parametrize(
    ("height", "width", "fitted"),
    [
        pytest.param(200, 300, TileGrid(200, 300, 128, 128, 32), id="large-enough"),
        pytest.param(100, 300, TileGrid(100, 300, 100, 128, 32), id="low"),
        pytest.param(20, 300, TileGrid(20, 300, 20, 128, 19), id="lower-than-the-overlap"),
        pytest.param(1, 1, TileGrid(1, 1, 1, 1, 0), id="one-cell"),
    ],
)
def test_fitted_tiles_are_no_larger_than_the_canvas(height, width, fitted):
    assert TileGrid.fitted(height, width, tile=128, overlap=32) == fitted


@given(grids(), st.integers(1, 8))
def test_a_scaled_grid_has_the_same_tiles_scaled(grid, factor):
    assert [*grid.scaled(factor)] == [tile.scaled(factor) for tile in grid]


# Windows


def test_the_window_is_centred_across_and_half_a_cell_low():
    """Oddity of the published window, kept: its rows are centred on height / 2, not on (height - 1) / 2."""
    rows = torch.tensor([3.7266532e-06, 0.043936934, 1.0, 0.043936934])  # exp(-50 (d / 4)^2), d = -2, -1, 0, 1
    columns = torch.tensor([8.8382633e-04, 0.45783336, 0.45783336, 8.8382633e-04])  # d = -1.5, -0.5, 0.5, 1.5
    peak = 15.915494  # 1 / (2 pi 0.01)
    torch.testing.assert_close(gaussian_window(4, 4), peak * rows[:, None] * columns, rtol=1e-6, atol=0)


def test_the_window_of_a_tile_that_is_not_square():
    window = gaussian_window(2, 3)
    assert window.shape == (2, 3) and window.dtype == torch.float32
    assert torch.equal(window[:, 0], window[:, 2])
    assert window[1, 1] == window.max() == pytest.approx(15.915494)
    assert window[0, 1] == pytest.approx(15.915494 * math.exp(-12.5))


@given(grids())
def test_the_window_sum_is_the_sum_of_the_windows(grid):
    total = torch.zeros(grid.height, grid.width, dtype=torch.float64)
    for tile in grid:
        total[tile.within(grid.canvas)] += gaussian_window(grid.tile_height, grid.tile_width)
    torch.testing.assert_close(window_sum(grid, grid.canvas), total.float(), rtol=1e-6, atol=0)


# Blending


def predictions_of(grid: TileGrid, region: Box, seed: int, channels: int = 2) -> list[Prediction]:
    """Of every tile that touches a region, unrelated from tile to tile, in tile order."""
    tiles = [*grid]
    return [
        Prediction(tile, tile, seeded(channels, tile.height, tile.width, seed=seed + tiles.index(tile)))
        for tile in grid.touching(region)
    ]


@given(grids(), seeds)
def test_blending_the_crops_of_an_image_gives_the_image_back(grid, seed):
    image = seeded(2, grid.height, grid.width, seed=seed)
    crops = [Prediction(tile, tile, image[(slice(None), *tile.within(grid.canvas))]) for tile in grid]
    torch.testing.assert_close(blend(grid, grid.canvas, crops), image, rtol=2e-6, atol=0)


@given(st.data(), seeds)
def test_a_blended_region_is_bit_for_bit_the_crop_of_the_blended_canvas(data, seed):
    grid = data.draw(grids())
    region = data.draw(boxes(grid.canvas))
    canvas = blend(grid, grid.canvas, predictions_of(grid, grid.canvas, seed))

    shuffled = data.draw(st.permutations(predictions_of(grid, region, seed)))
    travelled = [data.draw(st.sampled_from([prediction, prediction.cropped(region)])) for prediction in shuffled]
    assert torch.equal(blend(grid, region, travelled), canvas[(slice(None), *region.within(grid.canvas))])


def test_two_tiles_are_weighted_by_their_windows():
    grid = TileGrid(height=2, width=3, tile_height=2, tile_width=2, overlap=1)
    values = [torch.tensor([10.0, 20.0]).expand(1, 2, 2), torch.tensor([40.0, 60.0]).expand(1, 2, 2)]
    blended = blend(grid, grid.canvas, [Prediction(tile, tile, v) for tile, v in zip(grid, values, strict=True)])
    # the window is symmetric across, so the column that both have is the mean
    torch.testing.assert_close(blended, torch.tensor([10.0, 30.0, 60.0]).expand(1, 2, 3))


def test_low_rows_of_a_tile_outweigh_high_ones():
    grid = TileGrid(height=3, width=2, tile_height=2, tile_width=2, overlap=1)
    values = [torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]
    blended = blend(grid, grid.canvas, [Prediction(tile, tile, v) for tile, v in zip(grid, values, strict=True)])
    edge = math.exp(-12.5)  # weight of a tile's upper row; that of its lower row is 1
    assert blended[0, :, 0].tolist() == pytest.approx([0.0, edge / (1 + edge), 1.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_predictions_are_summed_in_float32(dtype):
    grid = TileGrid.square(4, 4, 4, 2)
    values = seeded(1, 4, 4).to(dtype)
    blended = blend(grid, grid.canvas, [Prediction(grid.canvas, grid.canvas, values)])
    assert blended.dtype == torch.float32
    torch.testing.assert_close(blended, values.float(), rtol=1e-6, atol=0)


def test_torch_defaults_do_not_matter():
    grid = TileGrid(13, 11, 7, 5, 3)  # sizes that no other test has, so that nothing of it is cached yet
    predictions = predictions_of(grid, grid.canvas, seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            blended = blend(grid, grid.canvas, predictions)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (blended.dtype, blended.device.type) == (torch.float32, "cpu")
    assert torch.equal(blended, blend(grid, grid.canvas, predictions))


def test_gradients_pass_even_if_the_windows_were_first_used_in_inference_mode():
    grid = TileGrid(17, 11, 7, 5, 3)  # again sizes of its own
    predictions = predictions_of(grid, grid.canvas, seed=0)
    with torch.inference_mode():
        blend(grid, grid.canvas, predictions)
    values = [prediction.values.requires_grad_() for prediction in predictions]
    blend(grid, grid.canvas, predictions).sum().backward()
    total = sum(value.grad.sum().item() for value in values)
    assert total == pytest.approx(2 * 17 * 11, rel=1e-5)  # the weights of a place sum to 1


GRID = TileGrid(height=3, width=5, tile_height=2, tile_width=3, overlap=1)  # four tiles


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        pytest.param(lambda four: four[:3], "4 tiles .* 1 are missing, 0 are too many", id="missing"),
        pytest.param(lambda four: [*four, four[1]], "0 are missing, 1 are too many", id="twice"),
        pytest.param(lambda four: [*four[:3], four[0]], "1 are missing, 1 are too many", id="one-for-another"),
        pytest.param(lambda four: [], "4 are missing", id="none-at-all"),
    ],
)
def test_a_blend_needs_every_tile_once(choose, message):
    predictions = predictions_of(GRID, GRID.canvas, seed=0)
    with pytest.raises(ValueError, match=message):
        blend(GRID, GRID.canvas, choose(predictions))


def test_a_blend_refuses_tiles_of_another_grid():
    other = TileGrid(height=3, width=6, tile_height=2, tile_width=3, overlap=0)  # the right column starts at 3, not 2
    with pytest.raises(ValueError, match="2 are missing, 2 are too many"):
        blend(GRID, GRID.canvas, predictions_of(other, other.canvas, seed=0))


def test_a_blend_refuses_a_tile_cropped_to_less_than_the_region_needs():
    first, *rest = predictions_of(GRID, GRID.canvas, seed=0)
    with pytest.raises(ValueError, match=r"only Box\(top=0, left=0, bottom=1, right=3\) was given"):
        blend(GRID, GRID.canvas, [first.cropped(Box(0, 0, 1, 5)), *rest])


@pytest.mark.parametrize("region", [Box(0, 0, 4, 5), Box(-1, 0, 3, 5), Box(7, 7, 9, 9)])
def test_a_blend_refuses_a_region_outside_the_canvas(region):
    with pytest.raises(ValueError, match="is not within the canvas"):
        blend(GRID, region, predictions_of(GRID, region, seed=0))


# Predictions that travel


def test_a_cropped_prediction_holds_its_part_and_no_more_memory():
    batch = torch.arange(2 * 1 * 4 * 5.0).reshape(2, 1, 4, 5)
    tile = Box(10, 20, 14, 25)
    cropped = Prediction(tile, tile, batch[1]).cropped(Box(0, 22, 12, 99))
    assert (cropped.tile, cropped.part) == (tile, Box(10, 22, 12, 25))
    assert cropped.values.tolist() == [[[22.0, 23.0, 24.0], [27.0, 28.0, 29.0]]]
    assert cropped.values.is_contiguous()
    assert cropped.values.untyped_storage().nbytes() == 6 * 4


def test_a_whole_prediction_leaves_its_batch_behind():
    batch = torch.zeros(3, 2, 4, 5).to(memory_format=torch.channels_last)
    tile = Box(0, 0, 4, 5)
    cropped = Prediction(tile, tile, batch[0]).cropped(tile)
    assert cropped.values.is_contiguous()
    assert cropped.values.untyped_storage().nbytes() == 2 * 4 * 5 * 4


def test_a_cropped_prediction_can_be_cropped_again():
    tile = Box(0, 0, 4, 4)
    once = Prediction(tile, tile, torch.arange(16.0).reshape(1, 4, 4)).cropped(Box(1, 1, 4, 4))
    assert once.cropped(Box(2, 0, 3, 3)).values.tolist() == [[[9.0, 10.0]]]


def test_nothing_is_left_of_a_prediction_elsewhere():
    tile = Box(0, 0, 4, 4)
    assert Prediction(tile, tile, torch.zeros(1, 4, 4)).cropped(Box(0, 4, 4, 8)) is None


# Batches


def test_every_batch_has_one_shape_and_the_last_is_filled_with_its_first_tile():
    grid = TileGrid(height=2, width=6, tile_height=2, tile_width=2, overlap=1)  # five tiles
    canvas = torch.arange(6.0).expand(1, 2, 6)
    seen = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x[:, 0, 0, 0].tolist())  # the column each tile starts at
        assert x.shape == (3, 1, 2, 2)
        return -x

    predictions = [*in_batches(predict, [*grid], grid.canvas, [canvas], batch=3)]
    assert seen == [[0, 1, 2], [3, 4, 3]]
    assert [prediction.tile for prediction in predictions] == [*grid]
    assert [prediction.values[0, 0, 0].item() for prediction in predictions] == [0, -1, -2, -3, -4]


@given(grids(longest=12), seeds, st.integers(1, 12))
def test_the_size_of_the_batch_does_not_matter(grid, seed, batch):
    frame = Box(-3, -2, grid.height + 1, grid.width)  # more than the canvas is held
    x, latent = seeded(2, 1, frame.height, frame.width, seed=seed)

    def predict(x: Tensor, latent: Tensor) -> Tensor:
        assert len(x) == len(latent) == batch
        return torch.cat([x, x * latent], dim=1)

    predictions = [*in_batches(predict, [*grid], frame, [x, latent], batch)]
    assert [prediction.tile for prediction in predictions] == [prediction.part for prediction in predictions] == [*grid]
    for tile, _, values in predictions:
        here = (slice(None), *tile.within(frame))
        assert torch.equal(values, torch.cat([x[here], x[here] * latent[here]]))


def test_no_tiles_make_no_batch():
    assert [*in_batches(pytest.fail, [], Box(0, 0, 4, 4), [torch.zeros(1, 4, 4)], batch=2)] == []
