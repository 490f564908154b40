"""Enlarging, compared with PyTorch's, and in windows exactly what the whole would be; and filling by reflection."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stablesr.box import Box
from stablesr.resize import BICUBIC_REACH, bicubic_phases, reflect_to, upscale_bicubic
from tests.strategies import boxes, seeded, seeds, with_reach

SCALES = range(1, 9)


# Weights


def test_the_phases_of_scale_2():
    left = (-0.03515625, 0.26171875, 0.87890625, -0.10546875)  # at distances 1.75, 0.75, 0.25, 1.25
    assert bicubic_phases(2) == [(-2, left), (-1, left[::-1])]


def test_the_middle_phase_of_an_odd_scale_is_the_pixel_itself():
    assert bicubic_phases(3)[1] == (-1, (0.0, 1.0, 0.0, 0.0))


@pytest.mark.parametrize("scale", SCALES)
def test_the_weights_of_a_phase_sum_to_one(scale):
    assert len(bicubic_phases(scale)) == scale
    for _, weights in bicubic_phases(scale):
        assert math.fsum(weights) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("scale", SCALES)
def test_phases_are_symmetric(scale):
    phases = bicubic_phases(scale)
    for (first, weights), (mirrored_first, mirrored) in zip(phases, phases[::-1], strict=True):
        taps = {first + k: w for k, w in enumerate(weights) if w}
        assert taps == pytest.approx({-(mirrored_first + k): w for k, w in enumerate(mirrored) if w}, abs=1e-15)


# Enlarging


def test_a_step_enlarged_twice_overshoots_and_repeats_its_edges():
    enlarged = upscale_bicubic(torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), 2)
    low, high = -0.10546875, -0.10546875 + 0.87890625 - 0.03515625 + 0.26171875
    assert high == 1.0
    row = [0.0, 0.0, 0.0, -0.03515625, low, 0.2265625, 0.7734375, 1 - low, 1.03515625, 1.0, 1.0, 1.0]
    assert enlarged.tolist() == [row, row]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 3, 1, 1), (1, 1, 1, 6), (1, 1, 5, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_enlarging_agrees_with_pytorch(scale, shape, dtype, tolerance):
    """In float32, PyTorch rounds the place of every pixel, which ours does not."""
    image = seeded(*shape, dtype=dtype).clamp(-1, 1)
    expected = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
    torch.testing.assert_close(upscale_bicubic(image, scale), expected, rtol=0, atol=tolerance)


@given(st.sampled_from(SCALES), st.integers(1, 20), st.integers(1, 20), st.data(), seeds)
def test_a_window_with_its_reach_gives_exactly_the_crop_of_the_whole(scale, height, width, data, seed):
    image, canvas = seeded(3, height, width, seed=seed), Box(0, 0, height, width)
    window = data.draw(boxes(canvas))
    around = with_reach(window, BICUBIC_REACH, canvas)
    enlarged = upscale_bicubic(image[(slice(None), *around.within(canvas))], scale)
    crop = enlarged[(slice(None), *window.scaled(scale).within(around.scaled(scale)))]
    whole = upscale_bicubic(image, scale)
    assert torch.equal(crop, whole[(slice(None), *window.scaled(scale).within(canvas.scaled(scale)))])


def test_one_pixel_around_a_window_would_not_be_enough():
    assert BICUBIC_REACH == 2
    image = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    at_4 = upscale_bicubic(image, 2)[0, 4].item()  # the left phase of source pixel 2
    assert at_4 == -0.03515625
    assert upscale_bicubic(image[:, 1:], 2)[0, 2].item() == 0.0


@pytest.mark.parametrize("scale", SCALES)
def test_a_flat_image_stays_flat(scale):
    image = torch.full((1, 4, 5), 0.7)
    torch.testing.assert_close(
        upscale_bicubic(image, scale), torch.full((1, 4 * scale, 5 * scale), 0.7), rtol=0, atol=1.2e-7
    )


def test_scale_1_is_the_image():
    image = seeded(3, 4, 5)
    assert torch.equal(upscale_bicubic(image, 1), image)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_any_leading_axes_are_kept(leading):
    image = seeded(*leading, 4, 5)
    enlarged = upscale_bicubic(image, 3)
    assert enlarged.shape == (*leading, 12, 15)
    for one, large in zip(image.reshape(-1, 4, 5), enlarged.reshape(-1, 12, 15), strict=True):
        assert torch.equal(upscale_bicubic(one, 3), large)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_enlarging_keeps_the_dtype(dtype):
    assert upscale_bicubic(torch.ones(1, 2, 2, dtype=dtype), 4).dtype == dtype


# Filling


@pytest.mark.parametrize(
    ("row", "width", "filled"),
    [
        pytest.param([0, 1, 2], 3, [0, 1, 2], id="nothing-to-fill"),
        pytest.param([0, 1, 2], 2, [0, 1, 2], id="larger-than-wanted"),
        pytest.param([0, 1, 2], 5, [0, 1, 2, 1, 0], id="once"),
        pytest.param([0, 1, 2], 10, [0, 1, 2, 1, 0, 1, 2, 1, 0, 1], id="back-and-forth"),
        pytest.param([0, 1], 5, [0, 1, 0, 1, 0], id="two"),
        pytest.param([7], 4, [7, 7, 7, 7], id="a-single-one-is-repeated"),
    ],
)
def test_filling_reflects_at_the_edge_pixel(row, width, filled):
    assert reflect_to(torch.tensor([row]), 1, width).tolist() == [filled]
    assert reflect_to(torch.tensor([row]).T, width, 1).T.tolist() == [filled]


def test_both_axes_are_filled():
    assert reflect_to(torch.tensor([[1, 2], [3, 4]]), 3, 4).tolist() == [[1, 2, 1, 2], [3, 4, 3, 4], [1, 2, 1, 2]]


@given(st.integers(2, 12), st.integers(2, 12), st.data())
def test_filling_agrees_with_pytorch_where_one_reflection_does(height, width, data):
    below, right = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    image = seeded(3, height, width)
    expected = F.pad(image, (0, right, 0, below), mode="reflect")
    assert torch.equal(reflect_to(image, height + below, width + right), expected)
