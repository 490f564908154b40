"""What is known of a raster, as JSON and s times larger."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rasterio.transform import Affine

from pipeline.raster.header import Band, GroundControlPoint, Header

PLAIN = Header(height=4, width=6, dtype="uint16", bands=(Band(color="red"), Band(name="near", color="nir")))

ROTATED = (0.8, -0.6, 500_000.0, -0.6, -0.8, 4_500_000.0)


def test_sizes() -> None:
    assert (PLAIN.count, PLAIN.itemsize, PLAIN.n_bytes) == (2, 2, 96)
    with_alpha = PLAIN.model_copy(update={"validity": "alpha"})
    assert (with_alpha.count, with_alpha.n_bytes) == (3, 144)
    assert PLAIN.model_copy(update={"dtype": "float32"}).n_bytes == 192


def test_a_header_is_a_value() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PLAIN.height = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra"):
        Header(height=1, width=1, dtype="uint8", bands=(), color="red")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="dtype"):
        Header(height=1, width=1, dtype="float64", bands=())  # type: ignore[arg-type]


@pytest.mark.parametrize("nodata", [None, 0.0, -9999.5, math.nan, math.inf, -math.inf, -3.4028234663852886e38])
def test_json_there_and_back(nodata: float | None) -> None:
    header = PLAIN.model_copy(
        update={
            "dtype": "float32",
            "validity": "nodata",
            "nodata": nodata,
            "transform": (1e-9, 0.1, 1 / 3, 0.0, -10.0, 1e15),
            "gcps": (GroundControlPoint(row=0.5, col=2.25, x=13.1, y=-math.inf, id="é"),),
            "rpcs": {"LINE_OFF": "3", "SAMP_NUM_COEFF": "1 2 3"},
            "tags": {"A": 'quoted "text"\n'},
            "domains": {"xml:XMP": {"xml:XMP": "<x/>"}},
            "microns_per_pixel": (0.499, 0.499),
        }
    )
    back = Header.model_validate_json(header.model_dump_json())
    assert repr(back) == repr(header)  # NaN is not equal to itself


# Nodata


@pytest.mark.parametrize(
    ("dtype", "nodata", "beside"),
    [
        pytest.param("uint8", 0, 1, id="up"),
        pytest.param("uint8", 255, 254, id="down-from-the-largest"),
        pytest.param("uint16", 65535, 65534, id="of-16-bits"),
        pytest.param("int16", -9999, -9998, id="signed"),
        pytest.param("int16", 32767, 32766, id="the-largest-signed"),
        pytest.param("float32", 1.0, 1 - 2.0**-20, id="float"),
        pytest.param("float32", -9999.0, -9999.0 * (1 - 2.0**-20), id="float-towards-zero"),
        pytest.param("float32", 0.0, 2.0**-149, id="smallest-float"),
        pytest.param("float32", math.nan, None, id="nan"),
        pytest.param("float32", math.inf, None, id="infinite"),
        pytest.param("uint8", None, None, id="none"),
    ],
)
def test_what_stands_beside_nodata(dtype: str, nodata: float | None, beside: float | None) -> None:
    assert PLAIN.model_copy(update={"dtype": dtype, "nodata": nodata}).beside_nodata == beside


@given(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda n: n == 0 or abs(n) > 1e-30))
def test_gdal_tells_what_stands_beside_nodata_from_it(nodata: float) -> None:
    beside = PLAIN.model_copy(update={"dtype": "float32", "nodata": nodata}).beside_nodata
    assert beside is not None
    found, value = float(np.float32(beside)), float(np.float32(nodata))
    assert found != value
    assert math.isfinite(found)
    assert abs(found - value) >= 2 * float(np.finfo(np.float32).eps) * abs(found + value) or nodata == 0.0


# Larger


def test_a_raster_is_scaled_about_its_corner() -> None:
    header = PLAIN.model_copy(update={"transform": ROTATED, "microns_per_pixel": (0.5, 0.25)})
    scaled = header.scaled(4)
    assert (scaled.height, scaled.width) == (16, 24)
    assert scaled.transform == (0.2, -0.15, 500_000.0, -0.15, -0.2, 4_500_000.0)
    assert scaled.microns_per_pixel == (0.125, 0.0625)
    assert (scaled.dtype, scaled.crs, scaled.nodata) == (header.dtype, header.crs, header.nodata)
    assert scaled.bands == header.bands


@given(st.integers(1, 8), st.tuples(*[st.floats(-1e6, 1e6)] * 6), st.floats(0, 1e5), st.floats(0, 1e5))
def test_a_place_on_the_ground_stays_where_it_is(s: int, transform: tuple[float, ...], row: float, col: float) -> None:
    scaled = PLAIN.model_copy(update={"transform": transform}).scaled(s)
    assert scaled.transform is not None
    before, after = Affine(*transform) @ (col, row), Affine(*scaled.transform) @ (s * col, s * row)
    assert after == pytest.approx(before, rel=1e-9, abs=1e-3)


def test_ground_control_points_move_with_their_pixels_and_keep_the_rest() -> None:
    point = GroundControlPoint(row=1.5, col=3.0, x=10.0, y=20.0, z=30.0, id="a", info="church")
    assert PLAIN.model_copy(update={"gcps": (point,)}).scaled(3).gcps == (
        GroundControlPoint(row=4.5, col=9.0, x=10.0, y=20.0, z=30.0, id="a", info="church"),
    )


RPCS = {"LINE_OFF": "100", "SAMP_OFF": "50.5", "LINE_SCALE": "100", "SAMP_SCALE": "51", "LAT_OFF": "48.1",
        "LINE_NUM_COEFF": "1 0 0", "ERR_BIAS": "2.5"}  # fmt: skip


def test_rpc_offsets_are_those_of_centres() -> None:
    scaled = PLAIN.model_copy(update={"rpcs": RPCS}).scaled(4).rpcs
    assert scaled == RPCS | {
        "LINE_OFF": "401.5", "SAMP_OFF": "203.5", "LINE_SCALE": "400.0", "SAMP_SCALE": "204.0",
    }  # fmt: skip


@given(st.integers(1, 8), st.floats(0, 1e5), st.floats(-1e4, 1e4), st.floats(1, 1e4))
def test_the_centre_of_a_pixel_is_found_by_its_rpcs_where_it_was(s: int, line: float, off: float, scale: float) -> None:
    """RPCs are functions of (line - LINE_OFF) / LINE_SCALE; line 0 is the centre of the first row."""
    rpcs = {**RPCS, "LINE_OFF": repr(off), "LINE_SCALE": repr(scale)}
    scaled = PLAIN.model_copy(update={"rpcs": rpcs}).scaled(s).rpcs
    assert scaled is not None
    centre = s * line + (s - 1) / 2  # of the s rows that the row became
    assert (centre - float(scaled["LINE_OFF"])) / float(scaled["LINE_SCALE"]) == pytest.approx(
        (line - off) / scale, abs=1e-6
    )


@pytest.mark.parametrize(
    ("given_as", "becomes"), [("+002199.00 pixels", "8797.5"), ("  7 ", "29.5"), ("nonsense", "nonsense")]
)
def test_rpc_offsets_may_come_with_their_unit(given_as: str, becomes: str) -> None:
    scaled = PLAIN.model_copy(update={"rpcs": {"LINE_OFF": given_as}}).scaled(4).rpcs
    assert scaled == {"LINE_OFF": becomes}


def test_tags_are_kept_unless_they_speak_of_other_pixels() -> None:
    header = PLAIN.model_copy(
        update={
            "tags": {"SENSOR": "ETM+", "STATISTICS_MEAN": "7", "TIFFTAG_XRESOLUTION": "72", "TIFFTAG_YRESOLUTION": "?"},
            "bands": (Band(unit="m", scale=0.1, offset=-3.0, tags={"WAVELENGTH": "560", "STATISTICS_MAXIMUM": "9"}),),
        }
    )
    scaled = header.scaled(2, {"GIGASR_SEED": "0", "SENSOR": "both"})
    assert scaled.tags == {
        "SENSOR": "both", "TIFFTAG_XRESOLUTION": "144", "TIFFTAG_YRESOLUTION": "?", "GIGASR_SEED": "0",
    }  # fmt: skip
    assert scaled.bands == (Band(unit="m", scale=0.1, offset=-3.0, tags={"WAVELENGTH": "560"}),)


@pytest.mark.parametrize(("first", "second"), [*product((1, 2, 3), (1, 2))])
def test_scaling_twice_is_scaling_by_the_product(first: int, second: int) -> None:
    header = PLAIN.model_copy(
        update={"transform": ROTATED, "rpcs": RPCS, "gcps": (GroundControlPoint(row=1, col=2, x=3, y=4),)}
    )
    twice, once = header.scaled(first).scaled(second), header.scaled(first * second)
    assert twice.transform == pytest.approx(once.transform)
    assert (twice.height, twice.width, twice.gcps) == (once.height, once.width, once.gcps)
    assert twice.rpcs == once.rpcs
