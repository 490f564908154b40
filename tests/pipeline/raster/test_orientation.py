"""Pictures that are stored lying or mirrored are read upright."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from pipeline.raster.header import Band, Header
from pipeline.raster.orientation import TURNS, Upright, stored_box, upright, upright_source
from pipeline.raster.source import Pixels, Source, open_source
from stablesr.box import Box
from tests.pipeline.raster.rasters import PLACE, opened, samples, whole, write, write_exif
from tests.strategies import boxes

UPRIGHT = [[1, 2, 3], [4, 5, 6]]

STORED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[3, 6], [2, 5], [1, 4]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[4, 1], [5, 2], [6, 3]],
}
"""What lies in the file, if the tag (274) says so: its definition in TIFF 6.0 and EXIF, by rows and columns."""


@pytest.mark.parametrize("orientation", TURNS)
def test_what_is_stored_becomes_upright(orientation):
    assert upright(np.array(STORED[orientation]), TURNS[orientation]).tolist() == UPRIGHT


@pytest.mark.parametrize("orientation", TURNS)
def test_a_tiff_is_read_upright(tmp_path, orientation):
    stored = np.array(STORED[orientation], np.uint8)
    tifffile.imwrite(tmp_path / "scan.tif", stored, extratags=[(274, 3, 1, orientation, True)], resolution=(300, 150))
    with open_source(str(tmp_path / "scan.tif")) as source:
        assert source.read(Box(0, 0, 2, 3)).values.tolist() == [UPRIGHT]
        assert source.read(Box(1, 0, 2, 2)).values.tolist() == [[[4, 5]]]
        header = source.header
    assert (header.height, header.width) == (2, 3)
    dots = ("150", "300") if orientation > 4 else ("300", "150")
    assert (header.tags["TIFFTAG_XRESOLUTION"], header.tags["TIFFTAG_YRESOLUTION"]) == dots


@pytest.mark.parametrize("orientation", TURNS)
def test_a_photograph_is_read_upright(tmp_path, orientation):
    path = write(tmp_path / "photo.jpg", samples(3, 24, 40), driver="JPEG")
    write_exif(path, orientation)
    with opened(path) as dataset:
        assert dataset.tags()["EXIF_Orientation"] == str(orientation)
        expected = upright(dataset.read(), TURNS[orientation])
    with open_source(str(path)) as source:
        header = source.header
    assert (header.height, header.width) == expected.shape[1:]
    assert np.array_equal(whole(path).values, expected)
    dots = ("150", "300") if orientation > 4 else ("300", "150")
    assert header.tags == {
        "TIFFTAG_XRESOLUTION": dots[0],
        "TIFFTAG_YRESOLUTION": dots[1],
        "TIFFTAG_RESOLUTIONUNIT": "2 (pixels/inch)",
    }


def test_a_raster_with_a_place_on_the_ground_is_read_as_it_is_stored(tmp_path):
    path = write(tmp_path / "photo.jpg", samples(3, 24, 40), driver="JPEG")
    write_exif(path, 6)
    Path(tmp_path / "photo.wld").write_text("\n".join(str(PLACE[k]) for k in (0, 3, 1, 4, 2, 5)), encoding="ascii")
    with open_source(str(path)) as source:
        assert (source.header.height, source.header.width) == (24, 40)
        assert source.header.transform is not None
        assert "EXIF_Orientation" not in source.header.tags


@pytest.mark.parametrize("orientation", [0, 9, 1000])
def test_an_orientation_that_does_not_exist_is_none(tmp_path, orientation):
    tifffile.imwrite(tmp_path / "scan.tif", samples(4, 6), extratags=[(274, 3, 1, orientation, True)], metadata=None)
    with open_source(str(tmp_path / "scan.tif")) as source:
        assert (source.header.height, source.header.width) == (4, 6)


class InMemory(Source):
    """A raster with alpha that was never in a file."""

    def __init__(self, height: int, width: int) -> None:
        self.header = Header(
            height=height,
            width=width,
            dtype="uint8",
            bands=(Band(), Band()),
            validity="alpha",
            microns_per_pixel=(1, 2),
        )
        self.pixels = Pixels(samples(2, height, width), samples(1, height, width) > 99, samples(height, width, seed=1))
        self.closed = False

    def read(self, box: Box) -> Pixels:
        return self.pixels.crop(box, Box(0, 0, self.header.height, self.header.width))

    def close(self) -> None:
        self.closed = True


@given(st.sampled_from(sorted(TURNS)), st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_window_is_the_crop_of_the_whole(orientation, height, width, data):
    stored = InMemory(height, width)
    source = Upright(stored, TURNS[orientation])
    frame = Box(0, 0, source.header.height, source.header.width)
    box = data.draw(boxes(frame))
    window, all_of_it = source.read(box), stored.pixels.each(lambda array: upright(array, TURNS[orientation]))
    for ours, expected in zip(window, all_of_it.crop(box, frame), strict=True):
        assert np.array_equal(ours, expected)
        assert ours.flags.c_contiguous


@given(st.sampled_from(sorted(TURNS)), st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_box_is_stored_where_its_pixels_are(orientation, height, width, data):
    turn = TURNS[orientation]
    frame = Box(0, 0, height, width)
    box = data.draw(boxes(frame))
    stored = np.arange(height * width).reshape((width, height) if turn.transposed else (height, width))
    rows, columns = stored_box(box, turn, height, width).within(Box(0, 0, *stored.shape))
    assert np.array_equal(upright(stored[rows, columns], turn), upright(stored, turn)[box.within(frame)])


def test_turning_swaps_what_belongs_to_an_axis():
    turned = upright_source(InMemory(3, 5), 6)
    assert (turned.header.height, turned.header.width, turned.header.microns_per_pixel) == (5, 3, (2, 1))
    mirrored = upright_source(InMemory(3, 5), 2)
    assert (mirrored.header.height, mirrored.header.width, mirrored.header.microns_per_pixel) == (3, 5, (1, 2))


def test_closing_closes_the_file():
    stored = InMemory(3, 5)
    with upright_source(stored, 6):
        pass
    assert stored.closed
