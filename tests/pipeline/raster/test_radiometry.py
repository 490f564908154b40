"""Samples to what the network sees, and back: nothing is lost, whatever lies outside the stretch."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.raster.header import Band, Header
from pipeline.raster.radiometry import Stretch, fixed_stretch, histogram, percentile_stretch, to_samples
from tests.strategies import seeds

INTEGERS = ["uint8", "uint16", "int16"]


def header(dtype: str, nodata: float | None = None, bands: int = 1, **facts: Any) -> Header:
    validity = "all" if nodata is None else "nodata"
    return Header(height=1, width=1, dtype=dtype, bands=(Band(),) * bands, nodata=nodata,
                  **{"validity": validity, **facts})  # type: ignore[arg-type]  # fmt: skip


def row(*values: float) -> torch.Tensor:
    """One band, one row."""
    return torch.tensor([[values]], dtype=torch.float32)


def samples(*values: float, dtype: str, nodata: float | None = None, **facts: Any) -> list[Any]:
    return to_samples(row(*values), header(dtype, nodata, **facts), None)[0, 0].tolist()


# There and back


def test_black_and_white_are_the_ends_of_the_stretch_and_the_rest_stays_outside() -> None:
    stretch = Stretch(low=(100.0,), high=(300.0,))
    seen = stretch.apply(torch.tensor([[[100, 200, 300, 0, 1100]]]))
    assert seen.tolist() == [[[-1.0, 0.0, 1.0, -2.0, 9.0]]]
    assert stretch.undo(seen).tolist() == [[[100.0, 200.0, 300.0, 0.0, 1100.0]]]


def test_every_band_has_its_own_stretch() -> None:
    stretch = Stretch(low=(0.0, -10.0, 5.0), high=(1.0, 10.0, 6.0)).of((2, 1))
    assert stretch == Stretch(low=(5.0, -10.0), high=(6.0, 10.0))
    assert stretch.apply(torch.tensor([[[5.5]], [[5.0]]])).tolist() == [[[0.0]], [[0.5]]]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("share", [1.0, 0.3, 0.01])
def test_every_integer_comes_back_from_every_stretch(dtype: str, share: float) -> None:
    limits = np.iinfo(dtype)
    every = np.arange(limits.min, limits.max + 1).astype(dtype)[None, None]
    middle, half = (limits.min + limits.max) / 2, share * (limits.max - limits.min) / 2
    stretch = Stretch(low=(middle - half,), high=(middle + half,))
    seen = stretch.apply(torch.from_numpy(every.astype(np.int32)))
    np.testing.assert_array_equal(to_samples(stretch.undo(seen), header(dtype), None), every)


@given(
    st.floats(-1e4, 1e4, width=32),
    st.floats(2**-7, 1e4, width=32),
    st.lists(st.floats(-5e4, 5e4, width=32), min_size=1),
)
def test_floats_come_back_to_rounding(low: float, gain: float, values: list[float]) -> None:
    stretch = Stretch(low=(low,), high=(low + gain,))
    back = stretch.undo(stretch.apply(row(*values)))
    scale = max(abs(low), gain, *map(abs, values))
    torch.testing.assert_close(back, row(*values), rtol=0, atol=8 * 2.0**-24 * scale)


# Which stretch


@pytest.mark.parametrize(
    ("dtype", "stretch", "bits", "expected"),
    [
        pytest.param("uint8", "auto", None, (0, 255), id="8-bit-as-is"),
        pytest.param("uint8", "auto", 1, (0, 1), id="1-bit"),
        pytest.param("uint16", "auto", 12, (0, 4095), id="12-bit"),
        pytest.param("uint16", "type", None, (0, 65535), id="the-types"),
        pytest.param("int16", "type", None, (-32768, 32767), id="signed"),
        pytest.param("float32", "type", None, (0, 1), id="float"),
        pytest.param("uint16", (300.0, 4000.0), None, (300, 4000), id="two-values"),
        pytest.param("uint8", (10.0, 20.0), None, (10, 20), id="two-values-of-8-bits"),
    ],
)
def test_a_stretch_that_needs_no_look(dtype: str, stretch: Any, bits: int | None, expected: tuple[int, int]) -> None:
    head = header(dtype).model_copy(update={"bands": (Band(bits=bits),) * 2})
    assert fixed_stretch(head, stretch) == Stretch(low=(expected[0],) * 2, high=(expected[1],) * 2)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_all_else_needs_percentiles(dtype: str) -> None:
    assert fixed_stretch(header(dtype), "auto") is None
    mixed = header("uint16").model_copy(update={"bands": (Band(bits=12), Band())})
    assert fixed_stretch(mixed, "auto") is None


# Percentiles


def of_one_band(values: NDArray[Any], valid: NDArray[np.bool_] | None, percentiles: tuple[float, float]) -> Stretch:
    return percentile_stretch([[histogram(values, valid)]], percentiles)


def test_a_histogram_counts_values_in_bins() -> None:
    assert histogram(np.array([1.0, 1.0, 2.0, -1.0], "float32"), None) == {"8128": 2, "8192": 1, "-8129": 1}
    assert histogram(np.array([1, 5], "uint16"), np.array([True, False])) == {"8128": 1}
    assert histogram(np.array([0.0, -0.0], "float32"), None) == {"0": 2}
    assert histogram(np.array([], "uint16"), None) == {}


@given(
    st.sampled_from(["uint16", "int16", "float32"]),
    st.integers(2, 300),
    st.sampled_from([(0.0, 100.0), (0.1, 99.9), (2.0, 98.0), (25.0, 50.0)]),
    st.sampled_from([1.0, 50.0, 4000.0]),
    seeds,
)
def test_percentiles_are_those_of_numpy_within_a_bin(
    dtype: str, n: int, percentiles: tuple[float, float], width: float, seed: int
) -> None:
    """A bin is at most 1/64 of its values wide; numpy's are the percentiles of what is there ("inverted_cdf")."""
    values = (np.random.default_rng(seed).normal(0 if dtype != "uint16" else 9000, width, n)).astype(dtype)
    stretch = of_one_band(values, None, percentiles)
    low, high = (float(v) for v in np.percentile(values, percentiles, method="inverted_cdf"))
    assume(low < high)
    assert 0 <= low - stretch.low[0] <= abs(low) / 63 + 1e-6  # outwards
    assert 0 <= stretch.high[0] - high <= abs(high) / 63 + 1e-6


@given(st.sampled_from(["uint16", "int16", "float32"]), st.integers(1, 12), st.integers(1, 12), st.data(), seeds)
def test_any_partition_into_blocks_gives_the_same_stretch(
    dtype: str, height: int, width: int, data: st.DataObject, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.normal(0, 3000, (2, height, width)) * (1 if dtype != "uint16" else 0.1) + 4000).astype(dtype)
    valid = rng.random((2, height, width)) < 0.8
    whole = [histogram(band, counts) for band, counts in zip(values, valid, strict=True)]
    rows = sorted(data.draw(st.sets(st.integers(1, height))) | {0, height})
    columns = sorted(data.draw(st.sets(st.integers(1, width))) | {0, width})
    blocks = [
        [histogram(v[top:bottom, left:right], c[top:bottom, left:right]) for v, c in zip(values, valid, strict=True)]
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
    ]
    data.draw(st.randoms()).shuffle(blocks)
    assert percentile_stretch(iter(blocks), (1.0, 99.0)) == percentile_stretch([whole], (1.0, 99.0))


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        pytest.param([7.0] * 5, 7.0, 7.0625, id="a-constant-is-its-bin"),
        pytest.param([-4.0], -4.0625, -4.0, id="a-negative-constant"),
        pytest.param([0.0] * 3, 0.0, 1.0, id="zeros"),
        pytest.param([], 0.0, 1.0, id="nothing"),
    ],
)
def test_a_stretch_is_never_empty(values: list[float], low: float, high: float) -> None:
    stretch = of_one_band(np.array(values, "float32"), None, (0.1, 99.9))
    assert (stretch.low[0], stretch.high[0]) == pytest.approx((low, high), rel=1e-6)


def test_few_very_bright_pixels_do_not_move_the_stretch() -> None:
    values = np.full(100_000, 1000.0, "float32")
    values[:10] = 60_000.0
    stretch = of_one_band(values, None, (0.1, 99.9))
    assert stretch.high[0] < 1100.0


def test_what_is_nearly_everywhere_zero_is_seen_as_a_whole() -> None:
    """Its percentiles are 0 and 0: in units of a stretch so narrow, everything else would be infinite."""
    values = np.zeros(100_000, "float32")
    values[:10] = 64.0
    stretch = of_one_band(values, None, (0.1, 99.9))
    assert stretch.low == (0.0,)
    assert 64.0 <= stretch.high[0] <= 65.0
    seen = stretch.apply(torch.from_numpy(values)[None, None])
    assert torch.isfinite(seen).all()
    torch.testing.assert_close(stretch.undo(seen)[0, 0], torch.from_numpy(values))


# Back to samples


def test_integers_are_rounded_half_to_even_and_kept_within_their_range() -> None:
    assert samples(0.49, 0.5, 1.5, 254.9, 300.0, -3.0, dtype="uint8") == [0, 0, 2, 255, 255, 0]
    assert samples(65534.6, 1e9, -1.0, dtype="uint16") == [65535, 65535, 0]
    assert samples(-0.6, -32769.0, 40000.0, -1e30, dtype="int16") == [-1, -32768, 32767, -32768]


def test_floats_stay_as_they_are() -> None:
    assert samples(0.25, -1e30, 3e38, dtype="float32") == [0.25, pytest.approx(-1e30), pytest.approx(3e38)]


@pytest.mark.parametrize(
    ("dtype", "nodata", "values", "expected"),
    [
        pytest.param("uint8", 0, [0.2, 1.0, -5.0], [1, 1, 1], id="zero"),
        pytest.param("uint8", 255, [255.0, 254.6, 999.0, 3.0], [254, 254, 254, 3], id="the-largest"),
        pytest.param("int16", -9999, [-9999.3, -9998.4, -9999.0], [-9998, -9998, -9998], id="signed"),
        pytest.param("uint16", 7, [6.4, 6.6, 7.4, 7.6], [6, 8, 8, 8], id="in-the-middle"),
        pytest.param(
            "float32", 0.5, [0.5, 0.5 + 2**-24, 0.5 + 2**-18], [0.5 - 2**-21] * 2 + [0.5 + 2**-18], id="float"
        ),
        pytest.param("float32", 0.0, [0.0, -0.0, 1e-9], [2**-149, 2**-149, pytest.approx(1e-9)], id="float-zero"),
    ],
)
def test_what_counts_is_never_nodata(dtype: str, nodata: float, values: list[float], expected: list[float]) -> None:
    assert samples(*values, dtype=dtype, nodata=nodata) == expected


@given(st.floats(-1e30, 1e30), st.integers(-20, 20), st.sampled_from([0.0, -9999.0, 0.1, 3.0e4, -3.4e38]))
def test_no_float_that_counts_is_taken_for_nodata_by_our_own_reading(far: float, steps: int, nodata: float) -> None:
    from pipeline.raster.gdal_source import _counts

    value = np.float32(nodata) + steps * np.spacing(np.float32(nodata))
    found = to_samples(row(float(value), far), header("float32", nodata), None)[0]
    assert _counts(found, nodata).all()


@pytest.mark.parametrize(
    ("dtype", "nodata", "facts", "fill"),
    [
        pytest.param("uint8", 9, {}, 9, id="nodata"),
        pytest.param("uint8", None, {"validity": "mask"}, 0, id="mask"),
        pytest.param("int16", None, {"validity": "alpha"}, 0, id="alpha"),
        pytest.param("float32", None, {"validity": "nodata"}, math.nan, id="floats-without-nodata"),
        pytest.param("float32", math.nan, {}, math.nan, id="nan"),
        pytest.param("float32", -math.inf, {}, -math.inf, id="infinity"),
        pytest.param("float32", -3.4028234663852886e38, {}, -3.4028234663852886e38, id="the-smallest-float"),
    ],
)
def test_what_does_not_count_becomes_what_says_so(
    dtype: str, nodata: float | None, facts: dict[str, Any], fill: float
) -> None:
    valid = torch.tensor([[[True, False]]])
    found = to_samples(row(5.0, 5.0), header(dtype, nodata, **facts), valid)
    np.testing.assert_array_equal(found[0, 0], np.array([5, fill], dtype))
    assert found.dtype == np.dtype(dtype)


def test_bands_have_their_own_holes_or_share_them() -> None:
    head, values = header("uint8", 0, bands=2), torch.full((2, 1, 2), 5.0)
    own = torch.tensor([[[True, False]], [[False, True]]])
    assert to_samples(values, head, own).tolist() == [[[5, 0]], [[0, 5]]]
    assert to_samples(values, head, own[:1]).tolist() == [[[5, 0]], [[5, 0]]]
