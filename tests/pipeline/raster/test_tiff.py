"""What is written is read back by GDAL, by tifffile and by a validator of COGs; and interruptions leave no trace."""

import errno
import itertools
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rio_cogeo import cog_validate

from pipeline.errors import Stopped, WorkFailed
from pipeline.raster import tiff
from pipeline.raster.header import Band, DType, GroundControlPoint, Header, Validity
from pipeline.raster.journal import Journal
from pipeline.raster.overviews import halve, n_levels
from pipeline.raster.tags import descriptive_tags, lay_out, tag
from pipeline.raster.tiff import Compression, Layout, n_tiles, tiles_done, write_tiff
from stablesr.box import Box

UTM = rasterio.CRS.from_epsg(32618).to_wkt()
RGB = (Band(color="red"), Band(color="green"), Band(color="blue"))


class InMemory:
    """A level that is an array. Remembers what it was asked for, and may die of the question."""

    def __init__(self, pixels: NDArray[Any], mask: NDArray[np.uint8] | None = None) -> None:
        self.pixels, self.mask = pixels, mask
        self.height, self.width = pixels.shape[1:]
        self.asked: list[Box] = []
        self.dies_after: int | None = None

    def read(self, box: Box) -> NDArray[Any]:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise RuntimeError("killed")
        self.asked.append(box)
        return self.pixels[:, box.top : box.bottom, box.left : box.right]

    def read_mask(self, box: Box) -> NDArray[np.uint8]:
        assert self.mask is not None
        return self.mask[box.top : box.bottom, box.left : box.right]


def pyramid(header: Header, seed: int = 0, tile: int = 512) -> list[InMemory]:
    """Random pixels of few values, so that nodata, NaN and transparency are among them; and their overviews."""
    rng = np.random.default_rng(seed)
    shape = header.count, header.height, header.width
    pixels = (rng.normal(size=shape) * 40 + 100).astype(header.dtype)
    if header.validity == "nodata":
        pixels[rng.random(shape) < 0.2] = np.nan if header.nodata is None else header.nodata
    if header.validity == "alpha":
        pixels[-1] = rng.choice(np.array([0, 1, 200], header.dtype), shape[1:])
    mask = rng.choice(np.array([0, 255], np.uint8), shape[1:]) if header.validity == "mask" else None
    levels = [InMemory(pixels, mask)]
    for _ in range(n_levels(header.height, header.width, tile) - 1):
        last = levels[-1]
        if last.mask is None:
            levels.append(InMemory(halve(last.pixels, header)))
        else:
            levels.append(InMemory(*halve(last.pixels, header, last.mask)))
    return levels


def header(
    height: int = 70, width: int = 90, dtype: str = "uint8", bands: Sequence[Band] = RGB, **facts: Any
) -> Header:
    return Header(height=height, width=width, dtype=dtype, bands=tuple(bands), **facts)


def written(path: Path, head: Header, levels: Sequence[InMemory], layout: str = "cog", **options: Any) -> Path:
    write_tiff(path, head, levels, layout=layout, **{"compression": "zstd", "tile": 16, **options})
    return path


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """By GDAL; that a raster lies nowhere on Earth is no reason to warn here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, **options) as file:
            yield file


def cog_complaints(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        _, errors, complaints = cog_validate(path, strict=True, quiet=True)
    return [*errors, *complaints]


def assert_reads_as(path: Path, levels: Sequence[InMemory]) -> None:
    """Every level, to the bit, NaN included."""
    for k, level in enumerate(levels):
        with opened(path, **({"overview_level": k - 1} if k else {})) as file:
            np.testing.assert_array_equal(file.read(), level.pixels)
            if level.mask is not None:
                np.testing.assert_array_equal(file.dataset_mask(), level.mask)
            assert len(file.overviews(1)) == len(levels) - 1 - k


# Pixels


@st.composite
def headers(draw: st.DrawFn, longest: int) -> Header:
    dtype, validity = draw(st.sampled_from(get_args(DType))), draw(st.sampled_from(get_args(Validity)))
    bands = draw(st.lists(st.sampled_from(["red", "green", "blue", "nir", "undefined"]), min_size=1, max_size=4))
    nodata = None
    if validity == "nodata":
        nodata = draw(st.sampled_from([0, 100, 255] + [None, float("nan"), -9999.5] * (dtype == "float32")))
    sides = st.integers(1, longest)
    return header(draw(sides), draw(sides), dtype, [Band(color=c) for c in bands], validity=validity, nodata=nodata)


@settings(max_examples=60)
@given(
    headers(longest=100),
    st.sampled_from(get_args(Layout)),
    st.sampled_from(get_args(Compression)),
    st.sampled_from([16, 48]),
)
def test_any_raster_is_read_back_to_the_bit(head, layout, compression, tile):
    levels = pyramid(head, tile=tile)
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder, "a.tif"), head, levels, layout, compression=compression, tile=tile)
        if layout == "ome-tiff":  # it knows no masks
            levels = [InMemory(level.pixels) for level in levels]
        assert_reads_as(path, levels[:1] if layout == "bigtiff" else levels)
        if layout == "cog" and head.width > 1:  # else rio-cogeo takes the overviews for as large as the raster
            assert cog_complaints(path) == []
        assert sorted(os.listdir(folder)) == ["a.tif"]


@settings(max_examples=10)
@given(headers(longest=700), st.sampled_from(["cog", "ome-tiff"]), st.sampled_from(get_args(Compression)))
def test_rasters_of_several_large_tiles_are_read_back(head, layout, compression):
    levels = pyramid(head)
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder, "a.tif"), head, levels, layout, compression=compression, tile=512)
        assert_reads_as(path, [InMemory(level.pixels) for level in levels] if layout == "ome-tiff" else levels)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_tifffile_reads_the_same(tmp_path, layout):
    head = header(dtype="float32", bands=[Band()] * 5)
    levels = pyramid(head, tile=16)
    read = tifffile.imread(written(tmp_path / "a.tif", head, levels, layout))
    np.testing.assert_array_equal(read, levels[0].pixels.transpose(1, 2, 0))


def test_pixels_beyond_the_edge_repeat_the_last(tmp_path):
    """So they cost nothing, and are never nodata by themselves."""
    head = header(1, 2, bands=[Band()])
    path = written(tmp_path / "a.tif", head, [InMemory(np.array([[[5, 7]]], np.uint8))], "bigtiff", compression="none")
    assert path.read_bytes()[-256:] == bytes([5, 7, *[7] * 14] * 16)


def test_higher_levels_of_compression_are_smaller_and_too_high_ones_are_the_highest(tmp_path):
    head, levels, sizes = header(256, 256), [InMemory(np.indices((3, 256, 256)).prod(axis=0).astype(np.uint8))], {}
    for compression, highest in (("zstd", 22), ("deflate", 12)):
        for level in (1, highest, 99):
            path = written(tmp_path / "a.tif", head, levels, compression=compression, level=level, tile=256)
            sizes[compression, level] = path.stat().st_size
        assert sizes[compression, 99] == sizes[compression, highest] < sizes[compression, 1]


# Layouts


def test_a_cog_begins_with_what_gdal_looks_for(tmp_path):
    head = header(validity="mask")
    start = written(tmp_path / "a.tif", head, pyramid(head, tile=16)).read_bytes()[:300]
    assert start[:4] == b"II*\0"
    assert start[8:].split(b"\0")[0].decode().splitlines() == [
        "GDAL_STRUCTURAL_METADATA_SIZE=000174 bytes",
        "LAYOUT=IFDS_BEFORE_DATA",
        "BLOCK_ORDER=ROW_MAJOR",
        "BLOCK_LEADER=SIZE_AS_UINT4",
        "BLOCK_TRAILER=LAST_4_BYTES_REPEATED",
        "KNOWN_INCOMPATIBLE_EDITION=NO",
        " MASK_INTERLEAVED_WITH_IMAGERY=YES",
    ]


def test_tiles_of_a_cog_are_framed_and_smaller_levels_come_first(tmp_path):
    head = header(40, 40, validity="mask")
    content = written(path := tmp_path / "a.tif", head, pyramid(head, tile=16)).read_bytes()
    with tifffile.TiffFile(path) as file:
        pages = [(page.dataoffsets, page.databytecounts) for page in file.pages]
    assert len(pages) == 6  # three levels, each with its mask
    tiles = [
        tile
        for image, mask in ((4, 5), (2, 3), (0, 1))
        for pair in zip(zip(*pages[image], strict=True), zip(*pages[mask], strict=True), strict=True)
        for tile in pair
    ]
    end = tiles[0][0] - 4
    for offset, count in tiles:
        assert offset == end + 4
        assert struct.unpack_from("<I", content, offset - 4) == (count,)
        end = offset + count + 4
        assert content[end - 4 : end] == content[end - 8 : end - 4]
    assert end == len(content)


def test_a_cog_is_a_classic_tiff_while_it_surely_fits(tmp_path, monkeypatch):
    head = header()
    levels = pyramid(head, tile=16)
    uncompressed = n_tiles(levels, "cog", 16) * 16 * 16 * 3
    monkeypatch.setattr(tiff, "CLASSIC_LIMIT", uncompressed)
    small = written(tmp_path / "small.tif", head, levels)
    monkeypatch.setattr(tiff, "CLASSIC_LIMIT", uncompressed - 1)
    big = written(tmp_path / "big.tif", head, levels)
    assert (small.read_bytes()[:4], big.read_bytes()[:4]) == (b"II*\0", b"II+\0")
    for path in (small, big):
        assert_reads_as(path, levels)
        assert cog_complaints(path) == []


def test_the_limit_leaves_room_for_what_compression_may_add():
    """LZW writes at most 12 bits for a byte."""
    assert tiff.CLASSIC_LIMIT * 1.5 < 0.8 * 2**32


def test_other_layouts_are_big_however_small(tmp_path):
    head = header()
    for layout in ("bigtiff", "ome-tiff"):
        assert written(tmp_path / layout, head, pyramid(head, tile=16), layout).read_bytes()[:4] == b"II+\0"


def test_a_plain_bigtiff_has_one_level_and_its_mask(tmp_path):
    head = header(validity="mask")
    levels = pyramid(head, tile=16)
    assert n_tiles(levels, "bigtiff", 16) == 5 * 6
    with tifffile.TiffFile(written(tmp_path / "a.tif", head, levels, "bigtiff")) as file:
        assert [page.shape for page in file.pages] == [(70, 90, 3), (70, 90)]


@pytest.mark.parametrize("tile", [0, -16, 24])
def test_tiles_are_multiples_of_16(tmp_path, tile):
    with pytest.raises(ValueError, match="multiple of 16"):
        written(tmp_path / "a.tif", header(), pyramid(header()), tile=tile)


def test_levels_must_be_those_of_the_raster(tmp_path):
    levels = pyramid(header(70, 90), tile=16)
    with pytest.raises(ValueError, match="the raster needs"):
        written(tmp_path / "a.tif", header(71, 90), levels)
    with pytest.raises(ValueError, match="the raster needs"):
        written(tmp_path / "a.tif", header(70, 90), [levels[0], levels[2]])


# Metadata

EVERYTHING = header(
    dtype="uint16",
    bands=[
        Band(name="Rouge & <vert> é", color="red", unit="W/m²", scale=0.1, offset=-3.25, tags={"WAVELENGTH": "665"}),
        Band(color="green"),
        Band(color="blue"),
        Band(name="near", color="nir", tags={"A": "1", "B": "x=y:z"}),
    ],
    validity="alpha",
    crs=UTM,
    transform=(0.25, 0.1, 300_000.125, 0.05, -0.25, 4_000_000.5),
    tags={"TIFFTAG_SOFTWARE": "gigasr", "MADE": "of\nlines", "TIFFTAG_DATETIME": "2020:02:03 04:05:06"},
    domains={
        "SENSOR": {"SUN": "12.5"},
        "xml:XMP": {"xml:XMP": "<x:xmpmeta a='b'/>"},
        "xml:OTHER": {"xml:OTHER": "<a>&amp;</a>"},
    },
)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_everything_the_header_says_is_read_back(tmp_path, layout):
    with opened(written(tmp_path / "a.tif", EVERYTHING, pyramid(EVERYTHING, tile=16), layout)) as file:
        assert file.crs == rasterio.CRS.from_epsg(32618)
        assert file.transform[:6] == EVERYTHING.transform
        assert [c.name for c in file.colorinterp] == ["red", "green", "blue", "nir", "alpha"]
        assert file.descriptions == ("Rouge & <vert> é", None, None, "near", None)
        assert file.units == ("W/m²", None, None, None, None)
        assert (file.scales, file.offsets) == ((0.1, 1, 1, 1, 1), (-3.25, 0, 0, 0, 0))
        assert file.tags(1) == {"WAVELENGTH": "665"}
        assert file.tags(4) == {"A": "1", "B": "x=y:z"}
        assert file.tags().items() >= EVERYTHING.tags.items()
        assert {name: file.tags(ns=name) for name in EVERYTHING.domains} == EVERYTHING.domains


@pytest.mark.parametrize("dtype", get_args(DType))
@pytest.mark.parametrize("validity", ["all", "alpha"])
@pytest.mark.parametrize(
    "colors",
    [
        ["gray"], ["undefined"], ["gray", "gray"], ["red", "green", "blue"], ["blue", "green", "red"], ["nir"] * 5,
        ["red", "green", "blue", "nir"],
    ],
    ids="-".join,
)  # fmt: skip
def test_colours_are_read_back(tmp_path, dtype, validity, colors):
    head = header(dtype=dtype, bands=[Band(color=color) for color in colors], validity=validity)
    path = written(tmp_path / "a.tif", head, pyramid(head, tile=16))
    wanted = [*colors, "alpha"] if validity == "alpha" else colors
    for k in range(2):
        with opened(path, **({"overview_level": 0} if k else {})) as file:
            assert [color.name for color in file.colorinterp] == wanted
    with tifffile.TiffFile(path) as file:
        assert file.pages.first.photometric.name == ("RGB" if colors[:3] == ["red", "green", "blue"] else "MINISBLACK")


def test_tags_with_the_names_of_rasterios_arguments_are_left_out(tmp_path):
    head = header(tags={"ns": "1", "bidx": "2", "self": "3", "kept": "4"})
    with opened(written(tmp_path / "a.tif", head, pyramid(head, tile=16))) as file:
        assert file.tags().items() >= {("kept", "4")}


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [
        ("uint8", 0), ("uint8", 255), ("uint16", 65535), ("int16", -32768), ("float32", float("nan")),
        ("float32", -9999.9), ("float32", float(np.finfo(np.float32).min)), ("float32", 1e300), ("float32", np.inf),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of the test
def test_nodata_is_read_back(tmp_path, dtype, nodata):
    """As what the type makes of it."""
    head = header(dtype=dtype, bands=[Band()], validity="nodata", nodata=nodata)
    levels = pyramid(header(dtype=dtype, bands=[Band()]), tile=16)
    for k in range(2):
        with opened(written(tmp_path / "a.tif", head, levels), **({"overview_level": 0} if k else {})) as file:
            assert repr(file.nodata) == repr(float(np.dtype(dtype).type(nodata)))


def test_a_raster_without_nodata_has_none(tmp_path):
    head = header(dtype="float32", bands=[Band()], validity="nodata")
    with opened(written(tmp_path / "a.tif", head, pyramid(head, tile=16))) as file:
        assert file.nodata is None


GCPS = (
    GroundControlPoint(row=0.0, col=0.0, x=-75.5, y=40.5, z=12.0),
    GroundControlPoint(row=70.0, col=0.5, x=-75.25, y=40.5),
    GroundControlPoint(row=12.125, col=90.0, x=-75.0, y=40.75),
)


@pytest.mark.parametrize(
    "tags", [{}, {"AREA_OR_POINT": "Area"}, {"AREA_OR_POINT": "Point"}], ids=["unsaid", "area", "point"]
)
@pytest.mark.parametrize("crs", [rasterio.CRS.from_epsg(4326).to_wkt(), None], ids=["crs", "no-crs"])
def test_ground_control_points_stay_where_they_are(tmp_path, tags, crs):
    """GDAL 3.10 moves those of pixel-is-point rasters by a pixel whenever it writes them."""
    head = header(gcps=GCPS, gcp_crs=crs, tags=tags)
    with opened(written(tmp_path / "a.tif", head, pyramid(head, tile=16))) as file:
        points, found = file.gcps
        assert [(p.row, p.col, p.x, p.y, p.z) for p in points] == [(p.row, p.col, p.x, p.y, p.z) for p in GCPS]
        assert (found.to_epsg() if found else None) == (4326 if crs else None)


def test_the_transform_of_a_pixel_is_point_raster_stays(tmp_path):
    head = header(crs=UTM, transform=(10, 0, 300_000, 0, -10, 4_000_000), tags={"AREA_OR_POINT": "Point"})
    with opened(written(tmp_path / "a.tif", head, pyramid(head, tile=16))) as file:
        assert file.transform[:6] == head.transform
        assert file.tags()["AREA_OR_POINT"] == "Point"


def test_rational_polynomials_are_read_back(tmp_path):
    coefficients = " ".join(repr(k / 7) for k in range(20))
    rpcs = {f"{axis}_{part}_COEFF": coefficients for axis in ("LINE", "SAMP") for part in ("NUM", "DEN")}
    for k, axis in enumerate(["LINE", "SAMP", "LAT", "LONG", "HEIGHT"]):
        rpcs |= {f"{axis}_OFF": str(k + 0.125), f"{axis}_SCALE": str(100.5 + k)}
    head = header(rpcs=rpcs)
    with opened(written(tmp_path / "a.tif", head, pyramid(head, tile=16))) as file:
        found = file.tags(ns="RPC")
        for name, value in rpcs.items():
            assert [float(v) for v in found[name].split()] == pytest.approx(
                [float(v) for v in value.split()], rel=1e-14
            )


def test_significant_bits_are_the_largest_sample(tmp_path):
    head = header(dtype="uint16", bands=[Band(bits=12)] * 2)
    with tifffile.TiffFile(written(tmp_path / "a.tif", head, pyramid(head, tile=16))) as file:
        assert file.pages.first.tags["MaxSampleValue"].value == (4095, 4095)
    with opened(tmp_path / "a.tif") as file:
        assert file.tags()["TIFFTAG_MAXSAMPLEVALUE"] == "4095"


def test_the_size_of_a_slides_pixels_is_its_resolution(tmp_path):
    head = header(microns_per_pixel=(0.25, 0.5))
    with tifffile.TiffFile(written(tmp_path / "a.tif", head, pyramid(head, tile=16))) as file:
        tags = file.pages.first.tags
        assert (tags[282].value, tags[283].value, tags[296].value) == ((40_000, 1), (20_000, 1), 3)  # per centimetre


def test_tags_that_are_there_are_sorted_and_once():
    codes = [tag.code for tag in descriptive_tags(EVERYTHING)]
    assert codes == sorted(set(codes))


def test_a_directory_by_hand():
    head, positions = lay_out(b"", [[tag(256, 4, 7), tag(258, 3, 8, 9, 10)]], is_big=False, chained=True)
    assert head == bytes.fromhex(
        "49492a00 08000000"  # II, 42, the first directory is at 8
        "0200"  # two entries:
        "0001 0400 01000000 07000000"  # 256, one long: 7
        "0201 0300 03000000 28000000"  # 258, three shorts, at 40
        "00000000 0000"  # no directory follows; values begin at multiples of 8
        "0800 0900 0a00 0000"
    )
    assert positions == [{256: 18, 258: 40}]


# OME-TIFF


def test_tifffile_sees_a_pyramid_of_ome(tmp_path):
    head = header(microns_per_pixel=(0.25, 0.5), tags={"TIFFTAG_IMAGEDESCRIPTION": "Gewebe µ\x01", "MADE": "by gigasr"})
    levels = pyramid(head, tile=16)
    with tifffile.TiffFile(written(tmp_path / "a.ome.tif", head, levels, "ome-tiff")) as file:
        assert file.is_ome
        assert len(file.pages) == 1
        (series,) = file.series
        assert (series.kind, series.axes, len(series.levels)) == ("ome", "YXS", len(levels))
        for level, wanted in zip(series.levels, levels, strict=True):
            np.testing.assert_array_equal(level.asarray(), wanted.pixels.transpose(1, 2, 0))
        root = ElementTree.fromstring(file.ome_metadata)
    pixels = root.find("{*}Image/{*}Pixels")
    assert (pixels.get("PhysicalSizeX"), pixels.get("PhysicalSizeY")) == ("0.25", "0.5")
    assert root.find("{*}Image/{*}Description").text == "Gewebe µ"
    notes = {note.get("K"): note.text for note in root.findall(".//{*}M")}
    assert notes == {"TIFFTAG_IMAGEDESCRIPTION": "Gewebe µ", "MADE": "by gigasr"}


def test_channels_of_an_ome_tiff_have_names(tmp_path):
    head = header(dtype="float32", bands=[Band(name="DAPI"), Band(color="nir"), Band()], validity="alpha")
    levels = pyramid(head, tile=16)
    with tifffile.TiffFile(written(tmp_path / "a.ome.tif", head, levels, "ome-tiff")) as file:
        assert [level.shape for level in file.series[0].levels] == [(*level.pixels.shape[1:], 4) for level in levels]
        channel = ElementTree.fromstring(file.ome_metadata).find("{*}Image/{*}Pixels/{*}Channel")
    assert (channel.get("SamplesPerPixel"), channel.get("Name")) == ("4", "DAPI, nir, band 3, alpha")


def test_a_mask_is_not_in_an_ome_tiff_and_is_not_asked_for(tmp_path):
    head = header(validity="mask")
    levels = [InMemory(level.pixels) for level in pyramid(head, tile=16)]
    assert_reads_as(written(tmp_path / "a.ome.tif", head, levels, "ome-tiff"), levels)


# Interruptions


def levels_of_the_story() -> tuple[Header, list[InMemory]]:
    head = header(validity="mask", tags={"A": "b"})
    return head, pyramid(head, tile=16)


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_the_bytes_do_not_depend_on_the_threads(tmp_path, layout, compression):
    head, levels = levels_of_the_story()
    files = [
        written(
            tmp_path / f"{threads}.tif", head, levels, layout, compression=compression, threads=threads
        ).read_bytes()
        for threads in (1, 2, 4)
    ]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("layout", get_args(Layout))
def test_a_writer_that_dies_at_every_question_ends_with_the_same_bytes(tmp_path, monkeypatch, layout):
    """Each start reads one box more than is in the journal; no tile of the journal is read again."""
    monkeypatch.setattr(tiff, "BATCH", 1)  # every tile is a batch
    monkeypatch.setattr(tiff, "RUN", 16)  # and a box
    head, levels = levels_of_the_story()
    whole = written(tmp_path / "whole.tif", head, levels, layout).read_bytes()
    total, part, done, starts = n_tiles(levels, layout, 16), tmp_path / "part.tif", 0, 0
    while True:
        told: list[int] = []
        for level in levels:
            level.asked = []
        allowed = itertools.count()

        def read(level: InMemory, box: Box, allowed: Iterator[int] = allowed) -> NDArray[Any]:
            if next(allowed) == 5:
                raise RuntimeError("killed")
            level.asked.append(box)
            return level.pixels[:, box.top : box.bottom, box.left : box.right]

        monkeypatch.setattr(InMemory, "read", read)
        starts += 1
        try:
            written(part, head, levels, layout, threads=1, on_tiles=told.append)
        except RuntimeError:
            asked = sum(len(level.asked) for level in levels)
            assert asked == 5
            assert tiles_done(part) - done >= 1
            assert sum(told) <= asked
            done = tiles_done(part)
            continue
        break
    assert sum(told) == total - done == sum(len(level.asked) for level in levels)
    assert starts > 3
    assert part.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["part.tif", "whole.tif"]


def test_a_stop_keeps_every_tile_that_was_read(tmp_path):
    head, levels = levels_of_the_story()
    whole = written(tmp_path / "whole.tif", head, levels).read_bytes()
    part, total, told = tmp_path / "part.tif", n_tiles(levels, "cog", 16), []
    for start in range(1, total // 7 + 1):
        asked = itertools.count(1)
        with pytest.raises(Stopped, match=f"stopped with {7 * start} of {total} tiles"):
            written(part, head, levels, on_tiles=told.append, stopping=lambda asked=asked: next(asked) == 7)
        assert tiles_done(part) == sum(told) == 7 * start
    written(part, head, levels, on_tiles=told.append)
    assert sum(told) == total
    assert part.read_bytes() == whole


def test_whatever_is_torn_off_the_journal_and_the_file_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "BATCH", 2000)
    head, levels = levels_of_the_story()
    whole = written(tmp_path / "whole.tif", head, levels).read_bytes()
    part = tmp_path / "part.tif"
    asked = itertools.count(1)
    with pytest.raises(Stopped):
        written(part, head, levels, stopping=lambda: next(asked) == 20)
    journal, content = part.with_name("part.tif.tiles").read_bytes(), part.read_bytes()
    assert tiles_done(part) == 20
    for cut in [*range(0, 60, 7), len(journal) // 2, len(journal) - 1]:
        part.with_name("part.tif.tiles").write_bytes(journal[:cut] + bytes(cut % 3))
        part.write_bytes(content)
        assert tiles_done(part) < 20
        assert written(part, head, levels).read_bytes() == whole
    for cut in (0, 10, len(content) // 2, len(content) - 1):
        part.with_name("part.tif.tiles").write_bytes(journal)
        part.write_bytes(content[:cut])
        assert written(part, head, levels).read_bytes() == whole


def test_what_was_begun_differently_is_begun_again(tmp_path):
    head, levels = levels_of_the_story()
    part = tmp_path / "part.tif"
    for change in ({"compression": "lzw"}, {"layout": "bigtiff"}, {"level": 5}, {"tags": {"A": "c"}}):
        asked = itertools.count(1)
        with pytest.raises(Stopped):
            written(part, head, levels, stopping=lambda asked=asked: next(asked) == 10)
        changed = head.model_copy(update={k: v for k, v in change.items() if k == "tags"})
        options = {k: v for k, v in change.items() if k != "tags"}
        told: list[int] = []
        found = written(part, changed, levels, **options, on_tiles=told.append).read_bytes()
        assert sum(told) == n_tiles(levels, options.get("layout", "cog"), 16)
        assert found == written(tmp_path / "whole.tif", changed, levels, **options).read_bytes()


def test_a_file_that_is_there_without_a_journal_is_replaced(tmp_path):
    head, levels = levels_of_the_story()
    (tmp_path / "part.tif").write_bytes(b"something else" * 10_000)
    part = written(tmp_path / "part.tif", head, levels)
    assert part.read_bytes() == written(tmp_path / "whole.tif", head, levels).read_bytes()


def test_a_full_disk_is_one_error_and_the_run_goes_on_later(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "BATCH", 1)
    head, levels = levels_of_the_story()
    part, syncs, fsync = tmp_path / "part.tif", itertools.count(), os.fsync

    def full(descriptor: int) -> None:
        if next(syncs) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        WorkFailed, match=r"part.tif: No space left on device. It may take [\d,]+ bytes\nhint: make room"
    ):
        written(part, head, levels)
    monkeypatch.setattr(os, "fsync", fsync)
    assert 0 < tiles_done(part) < n_tiles(levels, "cog", 16)
    assert written(part, head, levels).read_bytes() == written(tmp_path / "whole.tif", head, levels).read_bytes()


def test_a_folder_that_is_not_there_is_one_error(tmp_path):
    head, levels = levels_of_the_story()
    with pytest.raises(WorkFailed, match="No such file or directory"):
        written(tmp_path / "nowhere" / "a.tif", head, levels)


KILLED = """
import sys, time
from pathlib import Path
from pipeline.raster import tiff
from tests.pipeline.raster import test_tiff as story

tiff.BATCH, tiff.RUN = 1, 16
head, levels = story.levels_of_the_story()
read = story.InMemory.read
def slowly(level, box):
    time.sleep(0.01)
    return read(level, box)
story.InMemory.read = slowly
story.written(Path(sys.argv[1]), head, levels)
"""


def test_a_killed_process_leaves_no_trace(tmp_path):
    head, levels = levels_of_the_story()
    part = tmp_path / "part.tif"
    victim = subprocess.Popen([sys.executable, "-c", KILLED, str(part)], cwd=Path(__file__).parents[3])
    try:
        deadline = time.monotonic() + 60
        while tiles_done(part) < 5:
            assert victim.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        victim.send_signal(signal.SIGKILL)
    finally:
        victim.kill()
        victim.wait()
    done, total, told = tiles_done(part), n_tiles(levels, "cog", 16), []
    assert 5 <= done < total
    written(part, head, levels, on_tiles=told.append)
    assert sum(told) == total - done
    assert part.read_bytes() == written(tmp_path / "whole.tif", head, levels).read_bytes()


# The journal


def test_a_journal_tells_what_was_noted_in_it(tmp_path):
    beside, digest = tmp_path / "x", bytes(range(32))
    journal = Journal(beside, digest, columns=2)
    assert len(journal.sizes) == 0
    journal.begin(0)
    journal.append(np.array([[1, 2]], np.uint64))
    journal.append(np.array([[3, 4], [5, 1 << 40]], np.uint64))
    journal.close()
    assert Journal(beside, digest, columns=2).sizes.tolist() == [[1, 2], [3, 4], [5, 1 << 40]]
    assert Journal(beside).sizes.tolist() == [[1, 2], [3, 4], [5, 1 << 40]]
    assert len(Journal(beside, bytes(32), columns=2).sizes) == 0
    again = Journal(beside, digest, columns=2)
    again.begin(1)
    again.append(np.array([[7, 8]], np.uint64))
    assert again.reread().tolist() == [[1, 2], [7, 8]]
    again.remove()
    assert os.listdir(tmp_path) == []
