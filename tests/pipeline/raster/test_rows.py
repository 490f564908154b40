"""Rasters in strips are decoded once, row after row, and windows of them are what they would be anyway."""

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from pipeline.raster.header import Band, Header
from pipeline.raster.rows import WholeRows
from pipeline.raster.source import Pixels, Source, open_source
from stablesr.box import Box
from tests.pipeline.raster.rasters import samples, whole
from tests.strategies import boxes


class Recorded(Source):
    """A raster that remembers what was read of it."""

    def __init__(self, height: int, width: int, validity: str = "all") -> None:
        self.header = Header(height=height, width=width, dtype="uint8", bands=(Band(), Band()), validity=validity)
        valid, alpha = samples(1, height, width) > 99, samples(height, width, seed=1)
        self.pixels = Pixels(
            samples(2, height, width),
            None if validity == "all" else valid,
            alpha if validity == "alpha" else None,
        )
        self.read_boxes: list[tuple[int, int, int, int]] = []

    def read(self, box: Box) -> Pixels:
        self.read_boxes.append((box.top, box.left, box.bottom, box.right))
        return self.pixels.crop(box, Box(0, 0, self.header.height, self.header.width))

    def close(self) -> None:
        self.read_boxes.append((0, 0, 0, 0))


def test_windows_in_rows_decode_every_row_once():
    stored = Recorded(20, 30)
    source = WholeRows(stored)
    for top, bottom in ((0, 8), (6, 14), (12, 20)):  # overlapping
        for left in (0, 8, 16, 22):
            source.read(Box(top, left, bottom, left + 8))
    assert stored.read_boxes == [(0, 0, 8, 30), (8, 0, 14, 30), (14, 0, 20, 30)]


def test_going_back_up_reads_again():
    stored = Recorded(20, 30)
    source = WholeRows(stored)
    source.read(Box(10, 0, 20, 5))
    source.read(Box(2, 0, 12, 5))
    assert stored.read_boxes == [(10, 0, 20, 30), (2, 0, 12, 30)]


def test_rows_that_are_too_large_to_keep_are_not_kept():
    stored = Recorded(20, 30)
    source = WholeRows(stored, limit=2 * 30 * 5)
    source.read(Box(0, 3, 5, 9))
    source.read(Box(0, 3, 6, 9))
    source.read(Box(0, 3, 5, 9))
    assert stored.read_boxes == [(0, 0, 5, 30), (0, 3, 6, 9), (0, 0, 5, 30)]


@pytest.mark.parametrize("validity", ["all", "mask", "alpha"])
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 300), st.data())
def test_windows_are_crops_in_any_order(validity, height, width, limit, data):
    stored = Recorded(height, width, validity)
    source, frame = WholeRows(stored, limit), Box(0, 0, height, width)
    for box in data.draw(st.lists(boxes(frame), min_size=1, max_size=8)):
        for ours, expected in zip(source.read(box), stored.pixels.crop(box, frame), strict=True):
            assert (ours is None) == (expected is None)
            assert ours is None or np.array_equal(ours, expected)


def test_what_is_read_may_be_changed():
    stored = Recorded(4, 4)
    source = WholeRows(stored)
    source.read(Box(0, 0, 4, 4)).values[:] = 0
    assert np.array_equal(source.read(Box(0, 0, 4, 4)).values, stored.pixels.values)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_tiff_in_a_single_strip(tmp_path, compression, planar):
    """Of more than 2000 rows, so that GDAL hands it out row by row."""
    values = samples(3, 2100, 50)
    tifffile.imwrite(
        tmp_path / "strip.tif",
        values if planar == "separate" else np.moveaxis(values, 0, -1),
        rowsperstrip=2100, photometric="rgb", planarconfig=planar, compression=compression, metadata=None,
    )  # fmt: skip
    with open_source(str(tmp_path / "strip.tif")) as source:
        assert isinstance(source, WholeRows)
        for box in (Box(2000, 10, 2100, 50), Box(0, 0, 10, 10), Box(5, 20, 1500, 30)):
            rows, columns = box.within(Box(0, 0, 2100, 50))
            assert np.array_equal(source.read(box).values, values[:, rows, columns])
    assert np.array_equal(whole(tmp_path / "strip.tif").values, values)
