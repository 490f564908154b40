"""Rectangles: half-open, never empty."""

import numpy as np
import pytest
from hypothesis import given

from stablesr.box import Box
from tests.strategies import boxes

FRAME = Box(-9, 5, 12, 23)


def test_a_box_is_half_open():
    box = Box(2, 3, 4, 8)
    assert (box.height, box.width) == (2, 5)


@pytest.mark.parametrize(
    "sides",
    [
        pytest.param((2, 3, 2, 8), id="no-rows"),
        pytest.param((2, 3, 4, 3), id="no-columns"),
        pytest.param((4, 3, 2, 8), id="upside-down"),
    ],
)
def test_an_empty_box_is_refused(sides):
    with pytest.raises(ValueError, match=rf"empty box: rows \[{sides[0]}, {sides[2]}\)"):
        Box(*sides)


@pytest.mark.parametrize(
    ("other", "both"),
    [
        pytest.param(Box(0, 0, 3, 3), Box(1, 1, 3, 3), id="corner"),
        pytest.param(Box(2, 2, 3, 3), Box(2, 2, 3, 3), id="inside"),
        pytest.param(Box(0, 2, 9, 3), Box(1, 2, 5, 3), id="across"),
        pytest.param(Box(1, 5, 5, 9), None, id="side-by-side"),
        pytest.param(Box(5, 1, 9, 5), None, id="one-above-the-other"),
    ],
)
def test_overlap(other, both):
    assert Box(1, 1, 5, 5).overlap(other) == both
    assert other.overlap(Box(1, 1, 5, 5)) == both


@given(boxes(FRAME), boxes(FRAME))
def test_the_overlap_is_what_is_in_both(a, b):
    counts = np.zeros((FRAME.height, FRAME.width), dtype=int)
    counts[a.within(FRAME)] += 1
    counts[b.within(FRAME)] += 1
    both = a.overlap(b)
    assert (counts == 2).sum() == (0 if both is None else both.height * both.width)
    assert both is None or (counts[both.within(FRAME)] == 2).all()


def test_within_a_frame_that_does_not_start_at_the_origin():
    held = np.arange(12).reshape(3, 4)  # rows 10 to 12, columns 20 to 23
    assert held[Box(11, 21, 13, 23).within(Box(10, 20, 13, 24))].tolist() == [[5, 6], [9, 10]]


def test_scaled_is_the_same_place_on_a_finer_canvas():
    assert Box(1, 2, 3, 5).scaled(8) == Box(8, 16, 24, 40)
