"""Pictures that are numbers into a palette."""

import struct
import zlib

import numpy as np
import pytest
import tifffile

from pipeline.errors import SourceError
from pipeline.raster.palette import is_ramp
from pipeline.raster.source import open_source
from stablesr.box import Box
from tests.pipeline.raster.rasters import PLACE, edited, samples, vrt, vrt_band, whole, write

INDICES = np.array([[[0, 1, 2], [2, 1, 3]]], np.uint8)
COLORS = {0: (10, 20, 30, 255), 1: (40, 50, 60, 255), 2: (70, 80, 90, 255)}


def paletted(path, colors, indices=INDICES, **options):
    write(path, indices, transform=PLACE, **options)
    with edited(path) as dataset:
        dataset.write_colormap(1, colors)
    return path


def paletted_png(path, transparent):
    """GDAL writes no palette with several transparent entries, so by hand."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + bytes(row.tolist()) for row in INDICES[0])
    palette = bytes(value for color in [*COLORS.values(), (0, 0, 0)] for value in color[:3])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", palette)
        + chunk(b"tRNS", transparent)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_indices_become_colours(tmp_path, dtype):
    path = paletted(tmp_path / "map.tif", COLORS, INDICES.astype(dtype))
    with open_source(str(path)) as source:
        header = source.header
        assert (header.dtype, header.validity) == ("uint8", "all")
        assert [band.color for band in header.bands] == ["red", "green", "blue"]
        assert header.transform is not None
        assert source.read(Box(0, 1, 1, 3)).values.tolist() == [[[40, 70]], [[50, 80]], [[60, 90]]]
        assert source.read(Box(1, 2, 2, 3)).values.ravel().tolist() == [0, 0, 0]  # not in the palette
    assert whole(path).values.dtype == np.uint8


def test_bands_are_counted_after_expanding(tmp_path):
    path = paletted(tmp_path / "map.tif", COLORS)
    assert whole(path, [3]).values.tolist() == [[[30, 60, 90], [90, 60, 0]]]
    with pytest.raises(SourceError, match="has 3 bands: there is no band 4"):
        whole(path, [4])


def test_an_entry_that_is_not_opaque_makes_alpha(tmp_path):
    path = paletted_png(tmp_path / "map.png", transparent=bytes([255, 128, 0]))
    pixels = whole(path)
    assert pixels.alpha.tolist() == [[255, 128, 0], [0, 128, 255]]
    assert pixels.valid.tolist() == [[[True, True, False], [False, True, True]]]
    assert pixels.values[0].tolist() == [[10, 40, 70], [70, 40, 0]]
    only_green = whole(path, [2])
    assert only_green.values.shape == (1, 2, 3) and only_green.alpha is not None
    assert whole(path, [4]).values.tolist() == [[[255, 128, 0], [0, 128, 255]]]


def test_an_index_that_stands_for_nodata_becomes_a_mask(tmp_path):
    path = paletted(tmp_path / "map.tif", COLORS, nodata=1)
    with open_source(str(path)) as source:
        assert (source.header.validity, source.header.nodata) == ("mask", None)
        pixels = source.read(Box(0, 0, 2, 3))
    assert pixels.alpha is None
    assert pixels.valid.tolist() == [[[True, False, True], [True, False, True]]]


def test_one_transparent_colour_of_a_png_is_nodata(tmp_path):
    pixels = whole(paletted_png(tmp_path / "map.png", transparent=bytes([255, 0])))
    assert pixels.alpha is None
    assert pixels.valid.tolist() == [[[True, False, True], [True, False, True]]]


def test_a_palette_of_grays_becomes_one_band(tmp_path):
    shades = samples(8, 6)
    tifffile.imwrite(tmp_path / "white.tif", shades, photometric="miniswhite", metadata=None)  # 0 is white
    with open_source(str(tmp_path / "white.tif")) as source:
        assert [band.color for band in source.header.bands] == ["gray"]
        assert np.array_equal(source.read(Box(0, 0, 8, 6)).values, [255 - shades])


def test_black_and_white_stay_one_bit(tmp_path):
    picture = samples(8, 6) > 99
    tifffile.imwrite(tmp_path / "bits.tif", picture, photometric="minisblack", metadata=None)
    with open_source(str(tmp_path / "bits.tif")) as source:
        assert (source.header.bands[0].bits, source.header.bands[0].color) == (1, "gray")
        assert np.array_equal(source.read(Box(0, 0, 8, 6)).values, [picture])


@pytest.mark.parametrize(
    ("palette", "bits", "ramp"),
    [
        pytest.param({0: (0, 0, 0, 255), 1: (255, 255, 255, 255)}, 1, True, id="black-and-white"),
        pytest.param({0: (255, 255, 255, 255), 1: (0, 0, 0, 255)}, 1, False, id="white-and-black"),
        pytest.param({0: (0, 0, 0, 255), 1: (255, 255, 255, 0)}, 1, False, id="transparent"),
        pytest.param({0: (0, 0, 0, 255), 1: (255, 255, 255, 255)}, 8, False, id="too-few"),
        pytest.param({i: (i, i, i, 255) for i in range(256)}, 8, True, id="all-grays"),
    ],
)
def test_a_ramp_says_nothing_new(palette, bits, ramp):
    assert is_ramp(palette, bits) == ramp


def test_a_palette_beside_other_bands_is_refused_unless_it_is_not_chosen(tmp_path):
    path = write(tmp_path / "two.tif", samples(1, 4, 6), transform=PLACE)
    paletted(tmp_path / "map.tif", COLORS, np.zeros((1, 4, 6), np.uint8))
    inside = "<ColorInterp>Palette</ColorInterp><ColorTable><Entry c1='1' c2='2' c3='3' c4='255'/></ColorTable>"
    both = vrt(tmp_path / "both.vrt", 4, 6, vrt_band(1, "Byte", path.name), vrt_band(2, "Byte", "map.tif", 1, inside))
    with pytest.raises(SourceError, match="band 2 of .* is an index into a palette, beside other bands\nhint: "):
        whole(both)
    assert whole(both, [1]).values.shape == (1, 4, 6)


def test_an_index_without_a_palette_is_gray(tmp_path):
    write(tmp_path / "values.tif", values := samples(1, 4, 6))
    band = vrt_band(1, "Byte", "values.tif", 1, "<ColorInterp>Palette</ColorInterp>")
    path = vrt(tmp_path / "none.vrt", 4, 6, band)
    assert np.array_equal(whole(path).values, values)
    with open_source(str(path)) as source:
        assert source.header.bands[0].color == "gray"
