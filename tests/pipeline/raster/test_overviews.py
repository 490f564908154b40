"""How many levels there are, and how one becomes the next: every cell by hand, windows as crops of the whole."""

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.raster import overviews
from pipeline.raster.header import Band, DType, Header, Validity
from pipeline.raster.overviews import halve, n_levels
from stablesr.box import Box


def header(dtype: str, validity: str = "all", nodata: float | None = None, count: int = 1) -> Header:
    bands = (Band(),) * (count - (validity == "alpha"))
    return Header(height=1, width=1, dtype=dtype, bands=bands, validity=validity, nodata=nodata)


def halved(rows: Any, dtype: str, validity: str = "all", nodata: float | None = None) -> list[list[float]]:
    """One band by itself."""
    cells: list[list[float]] = halve(np.array([rows], dtype), header(dtype, validity, nodata))[0].tolist()
    return cells


# How many


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        pytest.param(1, 1, 1, id="a-pixel"),
        pytest.param(512, 512, 1, id="one-tile"),
        pytest.param(512, 513, 2, id="one-more"),
        pytest.param(1024, 3, 2, id="narrow"),
        pytest.param(1025, 3, 3, id="rounded-up"),
        pytest.param(1_000_000, 1_000_000, 12, id="a-terapixel"),
    ],
)
def test_levels_go_on_until_one_tile_holds_the_last(height, width, expected):
    assert n_levels(height, width) == expected


def test_smaller_tiles_need_more_levels():
    assert n_levels(100, 100, tile=16) == 4


# Integers


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ([[1, 2], [3, 4]], 2),  # 2.5 to the even one
        ([[3, 4], [3, 4]], 4),  # 3.5, too
        ([[0, 0], [0, 1]], 0),
        ([[0, 0], [1, 1]], 0),
        ([[0, 1], [1, 1]], 1),
    ],
)
@pytest.mark.parametrize("dtype", get_args(DType))
def test_means_are_rounded_half_to_even(dtype, cell, expected):
    if dtype == "float32":
        expected = np.mean(cell)  # floats are not rounded
    assert halved(cell, dtype) == [[expected]]


def test_nothing_overflows():
    assert halved([[255, 255], [255, 254]], "uint8") == [[255]]
    assert halved([[65535, 65535], [65534, 65534]], "uint16") == [[65534]]
    assert halved([[-32768, -32768], [-32768, -32767]], "int16") == [[-32768]]
    largest = float(np.finfo(np.float32).max)
    assert halved([[largest] * 2] * 2, "float32") == [[largest]]


def test_negative_halves_go_to_the_even_one_as_well():
    assert halved([[-1, -2], [-1, -2]], "int16") == [[-2]]
    assert halved([[-3, -2], [-3, -2]], "int16") == [[-2]]


# Edges


def test_the_last_odd_row_and_column_are_averaged_by_themselves():
    assert halved([[0, 0, 1], [0, 0, 3], [5, 7, 9]], "uint8") == [[0, 2], [6, 9]]


def test_a_pixel_stays():
    assert halved([[7]], "uint16") == [[7]]


# Validity


def test_pixels_with_nodata_do_not_count():
    assert halved([[9, 4, 9, 9], [4, 6, 9, 9]], "uint8", "nodata", 9) == [[5, 9]]  # 14 / 3; nothing


@pytest.mark.parametrize(
    ("dtype", "cell", "nodata", "expected"),
    [
        pytest.param("uint8", [[9, 11], [8, 12]], 10, 11, id="up"),
        pytest.param("uint8", [[255, 255], [254, 254]], 255, 254, id="down-from-the-largest"),
        pytest.param("uint8", [[0, 0], [0, 1]], 0, 1, id="what-there-is"),
        pytest.param("int16", [[-1, 1], [-1, 1]], 0, 1, id="signed"),
        pytest.param("float32", [[1, 3], [1, 3]], 2, 2 - 2.0**-19, id="float"),
        pytest.param("float32", [[1, 3], [1, 3]], 2 + 2.0**-22, 2 - 7 * 2.0**-22, id="what-gdal-takes-for-nodata"),
        pytest.param("float32", [[1, 3], [1, 3]], 2 + 2.0**-18, 2, id="what-it-tells-from-nodata"),
        pytest.param("float32", [[1, 3], [1, 3]], 3, 1.0, id="not-met"),
    ],
)
def test_a_valid_mean_is_never_nodata(dtype, cell, nodata, expected):
    assert halved(cell, dtype, "nodata", nodata) == [[expected]]


def test_of_floats_neither_nan_nor_infinity_counts():
    cells = halved([[np.nan, 1, np.inf, np.nan], [2, -np.inf, np.nan, np.nan]], "float32", "nodata", -9999)
    assert cells == [[1.5, -9999]]


def test_holes_of_floats_without_nodata_are_nan():
    cells = halved([[np.nan, 1, np.inf, np.nan]], "float32", "nodata")
    assert cells[0][0] == 1
    assert np.isnan(cells[0][1])


def test_nodata_that_no_integer_can_be_changes_nothing():
    assert halved([[1, 2], [3, 4]], "uint8", "nodata", 2.5) == [[2]]


def test_nodata_is_of_every_band_by_itself():
    pixels = np.array([[[0, 4], [4, 4]], [[8, 8], [0, 8]]], np.uint8)
    assert halve(pixels, header("uint8", "nodata", 0, count=2)).tolist() == [[[4]], [[8]]]


def test_a_cell_with_any_valid_pixel_is_valid_and_is_their_mean():
    pixels = np.array([[[10, 20, 1, 2], [30, 99, 3, 6]]], np.uint8)
    mask = np.array([[0, 255, 0, 0], [255, 0, 0, 0]], np.uint8)
    cells, valid = halve(pixels, header("uint8", "mask"), mask)
    assert cells.tolist() == [[[25, 3]]]  # where none is valid, the mean of all
    assert valid.tolist() == [[255, 0]]


def test_colours_without_alpha_do_not_count_and_alpha_is_the_plain_mean():
    color = [[10, 20, 7, 7], [30, 99, 7, 7]]
    alpha = [[0, 200, 0, 0], [1, 0, 0, 0]]
    cells = halve(np.array([color, alpha], np.uint8), header("uint8", "alpha", count=2))
    assert cells.tolist() == [[[25, 7]], [[50, 0]]]


def test_a_mask_is_for_rasters_with_a_mask():
    pixels = np.zeros((1, 2, 2), np.uint8)
    with pytest.raises(ValueError, match="validity is 'mask', but no mask"):
        halve(pixels, header("uint8", "mask"))
    with pytest.raises(ValueError, match="validity is 'all', but a mask"):
        halve(pixels, header("uint8"), np.zeros((2, 2), np.uint8))


# Everything at once


@st.composite
def rasters(draw: st.DrawFn) -> tuple[Header, NDArray[Any], NDArray[np.uint8] | None]:
    """Small rasters of few values, so that every rule is met."""
    dtype, validity = draw(st.sampled_from(get_args(DType))), draw(st.sampled_from(get_args(Validity)))
    height, width, count = (
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        draw(st.integers(1 + (validity == "alpha"), 3)),
    )
    values: list[float] = [0, 1, 2, 3, 250] if dtype != "float32" else [0.0, 1.0, 2.5, -7.0]
    if dtype == "float32" and validity == "nodata":
        values += [np.nan, np.inf]
    nodata = None
    if validity == "nodata":
        nodata = draw(st.sampled_from(values if dtype != "float32" else [None, *values]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    pixels = rng.choice(np.array(values, dtype), (count, height, width))
    mask = rng.choice(np.array([0, 255], np.uint8), (height, width)) if validity == "mask" else None
    return header(dtype, validity, nodata, count), pixels, mask


def by_hand(header: Header, pixels: NDArray[Any], mask: NDArray[np.uint8] | None) -> NDArray[Any]:
    """Cell by cell."""
    count, height, width = pixels.shape
    cells = np.empty((count, -(-height // 2), -(-width // 2)), pixels.dtype)
    for band, row, col in np.ndindex(*cells.shape):
        place = slice(2 * row, 2 * row + 2), slice(2 * col, 2 * col + 2)
        all_of_it = pixels[band][place].astype(np.float64)
        valid = np.ones(all_of_it.shape, bool)
        if header.validity == "nodata":
            valid = np.isfinite(all_of_it) & (all_of_it != header.nodata)
        elif mask is not None:
            valid = mask[place] > 0
        elif header.validity == "alpha" and band < count - 1:
            valid = pixels[-1][place] > 0
        if header.validity == "nodata" and not valid.any():
            cells[band, row, col] = np.nan if header.nodata is None else header.nodata
            continue
        mean = np.mean(all_of_it[valid] if valid.any() else all_of_it)
        mean = pixels.dtype.type(mean if header.dtype == "float32" else np.rint(mean))
        if header.validity == "nodata" and mean == header.nodata:
            mean = header.beside_nodata
        cells[band, row, col] = mean
    return cells


@given(rasters(), st.sampled_from([1, 8, 1 << 17]))
def test_every_cell_is_what_it_is_by_hand(raster, strip):
    """Whatever the size of the strips that are halved at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overviews, "STRIP", strip)
        found = halve(raster[1], raster[0], raster[2])
    cells = found if raster[2] is None else found[0]
    np.testing.assert_array_equal(cells, by_hand(*raster))


@given(rasters(), st.data())
def test_a_window_that_starts_at_an_even_place_gives_the_crop_of_the_whole(raster, data):
    head, pixels, mask = raster
    _, height, width = pixels.shape
    top, left = data.draw(st.integers(0, (height - 1) // 2)) * 2, data.draw(st.integers(0, (width - 1) // 2)) * 2
    bottom = min(height, data.draw(st.integers(top + 1, height + 1)) + 1 & ~1)
    right = min(width, data.draw(st.integers(left + 1, width + 1)) + 1 & ~1)
    window = (slice(top, bottom), slice(left, right))
    cells = Box(top // 2, left // 2, -(-bottom // 2), -(-right // 2)).within(Box(0, 0, height, width))
    whole = halve(pixels, head, mask)
    part = halve(pixels[:, *window], head, None if mask is None else mask[window])
    if mask is None:
        whole, part = (whole,), (part,)
    for of_whole, of_part in zip(whole, part, strict=True):
        np.testing.assert_array_equal(of_part, of_whole[..., *cells])


@given(rasters())
def test_a_cell_is_valid_if_any_of_its_pixels_is(raster):
    head, pixels, mask = raster
    if mask is not None:
        _, valid = halve(pixels, head, mask)
        height, width = valid.shape
        whole = np.zeros((2 * height, 2 * width), np.uint8)
        whole[: mask.shape[0], : mask.shape[1]] = mask
        assert valid.tolist() == whole.reshape(height, 2, width, 2).max(axis=(1, 3)).tolist()
