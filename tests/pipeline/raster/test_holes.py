"""Holes are filled from their edges, the same in a window as in the whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.raster.holes import fill_holes
from stablesr.box import Box
from tests.pipeline.raster.rasters import samples
from tests.strategies import boxes, seeds, with_reach

DTYPES = ["uint8", "uint16", "int16", "float32"]


def test_a_hole_goes_on_from_its_edge_as_far_as_the_reach():
    values = np.array([[[7, 1, 1, 1, 1, 1]]], np.uint8)
    valid = values == 7
    assert fill_holes(values, valid, 0, [100]).tolist() == [[[7, 100, 100, 100, 100, 100]]]
    assert fill_holes(values, valid, 1, [100]).tolist() == [[[7, 7, 100, 100, 100, 100]]]
    assert fill_holes(values, valid, 3, [100]).tolist() == [[[7, 7, 7, 7, 100, 100]]]


def test_between_two_values_the_nearer_weighs_more():
    values = np.array([[[0, 9, 9, 9, 100]]], np.uint8)
    valid = np.array([[[True, False, False, False, True]]])
    assert fill_holes(values, valid, 4, [0]).tolist() == [[[0, 25, 50, 75, 100]]]


def test_each_band_has_its_own_holes_or_shares_them():
    values = np.array([[[1, 9]], [[9, 4]]], np.uint8)
    own = np.array([[[True, False]], [[False, True]]])
    assert fill_holes(values, own, 1, [0, 0]).tolist() == [[[1, 1]], [[4, 4]]]
    assert fill_holes(values, own[:1], 1, [0, 0]).tolist() == [[[1, 1]], [[9, 9]]]


def test_without_a_valid_pixel_everything_is_far():
    filled = fill_holes(samples(2, 3, 4), np.zeros((1, 3, 4), bool), 8, [5, 6.7])
    assert filled.tolist() == [[[5] * 4] * 3, [[7] * 4] * 3]


def test_without_a_hole_nothing_changes():
    values = samples(2, 3, 4)
    assert fill_holes(values, np.ones((1, 3, 4), bool), 8, [0, 0]) is values


def test_nan_in_a_hole_does_not_spread():
    values = np.array([[[np.nan, 2, np.inf]]], np.float32)
    assert fill_holes(values, np.isfinite(values), 1, [0]).tolist() == [[[2, 2, 2]]]


@given(st.sampled_from(DTYPES), st.floats(0, 1), st.integers(0, 6), seeds)
def test_valid_pixels_stay_and_the_others_lie_between_what_is_there(dtype, density, reach, seed):
    values = samples(2, 9, 8, dtype=dtype, seed=seed)
    valid = np.random.default_rng(seed).random((2, 9, 8)) < density
    before = values.copy()
    far = [float(values[0, 0, 0]), float(values[1, 0, 0])]
    filled = fill_holes(values, valid, reach, far)
    assert filled.dtype == values.dtype and np.array_equal(values, before)
    assert np.array_equal(filled[valid], values[valid])
    for band in range(2):
        known = np.append(values[band][valid[band]], np.asarray(far[band], dtype))
        slack = 1e-5 if dtype == "float32" else 0
        assert (filled[band] >= known.min() - slack).all() and (filled[band] <= known.max() + slack).all()


@given(
    st.sampled_from(DTYPES), st.integers(1, 24), st.integers(1, 24), st.integers(0, 7), st.booleans(), st.data(), seeds
)
def test_a_window_with_its_reach_is_filled_as_the_whole_is(dtype, height, width, reach, shared, data, seed):
    values = samples(2, height, width, dtype=dtype, seed=seed)
    density = data.draw(st.sampled_from([0.01, 0.05, 0.3, 0.9]))
    valid = np.random.default_rng(seed).random((1 if shared else 2, height, width)) < density
    canvas = Box(0, 0, height, width)
    if data.draw(st.booleans()):  # one large hole instead of many small ones
        valid[:] = True
        valid[(slice(None), *data.draw(boxes(canvas)).within(canvas))] = False
    box = data.draw(boxes(canvas))
    around = with_reach(box, reach, canvas)
    crop = (slice(None), *around.within(canvas))
    filled = fill_holes(values[crop], valid[crop], reach, [1, 2])[(slice(None), *box.within(around))]
    expected = fill_holes(values, valid, reach, [1, 2])[(slice(None), *box.within(canvas))]
    assert np.array_equal(filled, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values_are_kept_exactly(dtype):
    high = np.finfo(np.float32).max if dtype == "float32" else np.iinfo(dtype).max
    values = np.array([[[high, 0, high]]], dtype)
    assert fill_holes(values, np.array([[[True, False, True]]]), 1, [0]).tolist() == [[[high, high, high]]]
