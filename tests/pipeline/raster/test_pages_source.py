"""Slides and microscope pictures, which GDAL sees as loose pages."""

import base64
import struct

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.raster.gdal_source import GdalSource
from pipeline.raster.pages_source import PagesSource, look_at_tiff
from pipeline.raster.rows import WholeRows
from pipeline.raster.source import fingerprint, open_source
from stablesr.box import Box
from tests.pipeline.raster.rasters import PLACE, opened, samples, whole, write, write_ome, write_svs
from tests.strategies import boxes

HEIGHT, WIDTH = 150, 200
RGB = samples(HEIGHT, WIDTH, 3)
CHANNELS = samples(4, HEIGHT, WIDTH, dtype="uint16")


def header_of(path, bands=None):
    with open_source(str(path), bands) as source:
        assert isinstance(source, PagesSource)
        return source.header


def write_imagej(path, values, **options):
    tifffile.imwrite(path, values, imagej=True, **options)
    return path


def formats(folder):
    """Slides and microscope pictures, and what they hold as (bands, rows, columns)."""
    planar, channels = np.moveaxis(RGB, -1, 0), {"axes": "CYX"}
    yield "svs", write_svs(folder / "slide.svs", RGB), planar
    yield "rgb", write_ome(folder / "rgb.ome.tif", RGB, "YXS"), planar
    yield "channels", write_ome(folder / "channels.ome.tif", CHANNELS, "CYX"), CHANNELS
    yield "one-z", write_ome(folder / "one.ome.tif", CHANNELS[:, None], "CZYX"), CHANNELS
    yield "gray", write_ome(folder / "gray.ome.tif", CHANNELS[0], "YX"), CHANNELS[:1]
    yield "memory", write_imagej(folder / "ij.tif", CHANNELS, metadata=channels), CHANNELS
    yield (
        "float",
        write_imagej(folder / "float.tif", CHANNELS.astype(np.float32), metadata=channels),
        CHANNELS.astype(np.float32),
    )
    strip = folder / "strip.ome.tif"
    tifffile.imwrite(strip, planar, photometric="rgb", planarconfig="separate", compression="zlib", rowsperstrip=HEIGHT)
    yield "strip", strip, planar


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return {name: (path, values) for name, path, values in formats(tmp_path_factory.mktemp("pages"))}


NAMES = ["svs", "rgb", "channels", "one-z", "gray", "memory", "float", "strip"]


@pytest.mark.parametrize("name", NAMES)
def test_the_full_resolution_is_read(pictures, name):
    path, values = pictures[name]
    header, pixels = header_of(path), whole(path)
    assert (header.height, header.width, len(header.bands)) == (HEIGHT, WIDTH, len(values))
    assert header.dtype == values.dtype.name and pixels.values.dtype == values.dtype
    assert np.array_equal(pixels.values, values)
    assert pixels.values.flags.c_contiguous and pixels.values.flags.writeable
    assert (pixels.valid is None) == (name != "float") and pixels.alpha is None


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_windows_are_crops_of_the_whole(pictures, name, data):
    path, values = pictures[name]
    frame = Box(0, 0, HEIGHT, WIDTH)
    bands = data.draw(st.lists(st.integers(1, len(values)), min_size=1, unique=True))
    with open_source(str(path), bands) as source:
        for box in data.draw(st.lists(boxes(frame), min_size=1, max_size=3)):
            expected = values[[band - 1 for band in bands]][(slice(None), *box.within(frame))]
            assert np.array_equal(source.read(box).values, expected)


def test_the_header_of_a_slide(tmp_path):
    path = write_svs(tmp_path / "slide.svs", RGB, iccprofile=b"profile", resolution=(20000, 20000), resolutionunit=3)
    with opened(path) as dataset:
        assert len(dataset.subdatasets) > 1  # what GDAL makes of it
    header = header_of(path)
    assert header.microns_per_pixel == (0.499, 0.499)
    assert [band.color for band in header.bands] == ["red", "green", "blue"]
    assert header.tags == {
        "TIFFTAG_XRESOLUTION": "20000",
        "TIFFTAG_YRESOLUTION": "20000",
        "TIFFTAG_RESOLUTIONUNIT": "3 (pixels/cm)",
    }
    assert base64.b64decode(header.domains["COLOR_PROFILE"]["SOURCE_ICC_PROFILE"]) == b"profile"
    assert (header.transform, header.crs, header.validity) == (None, None, "all")


def test_a_slide_compressed_with_jpeg(tmp_path):
    smooth = np.tile(np.arange(WIDTH, dtype=np.uint8)[:, None], (HEIGHT, 1, 3))
    path = write_svs(tmp_path / "slide.svs", smooth, compression="jpeg", compressionargs={"level": 95})
    assert np.abs(whole(path).values.astype(int) - np.moveaxis(smooth, -1, 0)).max() <= 3


def write_ndpi(path, image):
    """As Hamamatsu's scanners write it: a TIFF whose offsets have 64 bits, their upper halves behind the entries."""
    height, width, _ = image.shape
    start, n_tags = 16, 14
    behind = start + image.nbytes
    directory = behind + 42
    entries = [
        (254, 4, 1, 0), (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, behind), (259, 3, 1, 1), (262, 3, 1, 2),
        (271, 2, 10, behind + 6), (273, 4, 1, start), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, image.nbytes),
        (282, 5, 1, behind + 16), (283, 5, 1, behind + 24), (296, 3, 1, 3),
    ]  # fmt: skip
    entries.append((65420, 4, 1, 1))
    values = struct.pack("<3H10s4I", 8, 8, 8, b"Hamamatsu\0", 40000, 1, 20000, 1)
    path.write_bytes(
        b"II*\0" + struct.pack("<QI", directory, 0) + image.tobytes() + values.ljust(42, b"\0")
        + struct.pack("<H", n_tags + 1) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        + struct.pack("<Q", 0) + bytes(4 * (n_tags + 1))
    )  # fmt: skip
    return path


def test_hamamatsu_says_its_resolution_in_tiff_tags(tmp_path):
    path = write_ndpi(tmp_path / "slide.ndpi", RGB)
    assert header_of(path).microns_per_pixel == (0.25, 0.5)
    assert np.array_equal(whole(path).values, np.moveaxis(RGB, -1, 0))


@pytest.mark.parametrize(
    ("about", "microns"),
    [
        pytest.param({"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}, (0.25, 0.5), id="microns-unsaid"),
        pytest.param(
            {"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.0005, "PhysicalSizeYUnit": "mm"},
            (0.25, 0.5),
            id="units",
        ),
        pytest.param({"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"}, (0.25, 0.25), id="only-x"),
        pytest.param({"PhysicalSizeX": 2, "PhysicalSizeXUnit": "pixel"}, None, id="pixels"),
        pytest.param({}, None, id="unsaid"),
    ],
)  # fmt: skip
def test_the_size_of_a_pixel_in_ome(tmp_path, about, microns):
    header = header_of(write_ome(tmp_path / "a.ome.tif", CHANNELS, "CYX", **about))
    assert header.microns_per_pixel == pytest.approx(microns)


def test_names_of_channels(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", CHANNELS, "CYX", Channel={"Name": ["DAPI", "GFP", "RFP", "Cy5"]})
    assert [(band.name, band.color) for band in header_of(path, [3, 1]).bands] == [
        ("RFP", "undefined"),
        ("DAPI", "undefined"),
    ]


def test_the_size_of_a_pixel_in_imagej(tmp_path):
    path = write_imagej(tmp_path / "a.tif", CHANNELS, resolution=(4, 2), metadata={"axes": "CYX", "unit": "um"})
    assert header_of(path).microns_per_pixel == (0.25, 0.5)
    path = write_imagej(tmp_path / "b.tif", CHANNELS, resolution=(72, 72), metadata={"axes": "CYX"})
    assert header_of(path).microns_per_pixel is None


def test_alpha_of_a_picture_with_four_samples(tmp_path):
    rgba = samples(HEIGHT, WIDTH, 4)
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["unassalpha"], tile=(64, 64))
    header, pixels = header_of(path), whole(path)
    assert (header.validity, len(header.bands)) == ("alpha", 3)
    assert np.array_equal(pixels.values, np.moveaxis(rgba, -1, 0)[:3])
    assert pixels.alpha is not None and np.array_equal(pixels.alpha, rgba[..., 3])
    assert np.array_equal(pixels.valid, rgba[np.newaxis, ..., 3] > 0)


def test_a_sideways_scan_is_turned(tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    assert np.array_equal(whole(path).values, np.moveaxis(np.rot90(RGB, -1), -1, 0))


def test_geotiffs_are_read_by_gdal(tmp_path):
    path = write(
        tmp_path / "scene.tif",
        samples(3, 512, 512),
        crs="EPSG:32618",
        transform=PLACE,
        tiled=True,
        blockxsize=256,
        blockysize=256,
    )
    with opened(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
        dataset.update_tags(TIFFTAG_IMAGEDESCRIPTION="Aperio Image Library|MPP = 0.5")
    with open_source(str(path)) as source:
        assert isinstance(source, GdalSource)


def test_pages_that_gdal_understands_are_read_by_gdal(tmp_path):
    tifffile.imwrite(tmp_path / "plain.tif", RGB, photometric="rgb", metadata=None)
    assert look_at_tiff(str(tmp_path / "plain.tif")) == (False, 1)
    with open_source(str(tmp_path / "plain.tif")) as source:
        assert isinstance(source, WholeRows)


def test_a_tiff_in_several_files(tmp_path):
    files = [tmp_path / f"c{c}.ome.tif" for c in range(2)]
    uuids = [f"urn:uuid:00000000-0000-0000-0000-00000000000{c}" for c in range(2)]
    channels = "".join(f'<Channel ID="Channel:0:{c}" SamplesPerPixel="1"/>' for c in range(2))
    parts = "".join(
        f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1"><UUID FileName="c{c}.ome.tif">{uuids[c]}</UUID></TiffData>'
        for c in range(2)
    )
    for c, file in enumerate(files):
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="{uuids[c]}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" '
            f'SizeX="{WIDTH}" SizeY="{HEIGHT}" SizeC="2" SizeZ="1" SizeT="1">{channels}{parts}</Pixels></Image></OME>'
        )
        tifffile.imwrite(file, CHANNELS[c], description=xml, metadata=None, tile=(64, 64))
    assert np.array_equal(whole(files[0]).values, CHANNELS[:2])
    assert [file["name"] for file in fingerprint(str(files[0]))["files"]] == ["c0.ome.tif", "c1.ome.tif"]


def test_more_than_one_plane_is_refused(tmp_path):
    path = write_ome(tmp_path / "stack.ome.tif", CHANNELS.reshape(2, 2, HEIGHT, WIDTH), "ZCYX")
    with pytest.raises(SourceError, match="its axes are Z=2, C=2, Y=150, X=200\nhint: "):
        open_source(str(path))


@pytest.mark.parametrize(
    ("dtype", "message"), [("float64", "type float64"), ("complex64", "complex samples"), ("bool", "type bool")]
)
def test_other_types_are_refused(tmp_path, dtype, message):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, np.zeros((HEIGHT, WIDTH), dtype))
    with pytest.raises(SourceError, match=message):
        open_source(str(path))


def test_bands_that_are_not_there(pictures):
    with pytest.raises(SourceError, match="has 4 bands: there is no band 5"):
        open_source(str(pictures["channels"][0]), [5])


def test_a_truncated_slide_is_found_when_it_is_opened(tmp_path):
    path = write_svs(tmp_path / "cut.svs", RGB)
    path.write_bytes(path.read_bytes()[:60_000])
    with pytest.raises(SourceError, match="cut.svs is truncated: it has 60,000 bytes, but its pixels reach to byte "):
        open_source(str(path))


def test_a_damaged_tile_is_found_where_it_is(tmp_path):
    path = write_svs(tmp_path / "bad.svs", RGB, compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        start, length = page.dataoffsets[-1], page.databytecounts[-1]
    content = bytearray(path.read_bytes())
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    with open_source(str(path)) as source:
        assert source.read(Box(0, 0, 64, 64)).values.shape == (3, 64, 64)
        with pytest.raises(
            SourceError, match="cannot read rows 140 to 149, columns 190 to 199 of .*bad.svs: .*\nhint: "
        ):
            source.read(Box(140, 190, 150, 200))


def test_a_tiny_slide_that_claims_to_be_huge(tmp_path, monkeypatch):
    path = write_svs(tmp_path / "slide.svs", RGB)
    monkeypatch.setattr("pipeline.raster.checks.BOMB_BYTES", 1000)
    monkeypatch.setattr("pipeline.raster.checks.BOMB_FACTOR", 0.1)
    with pytest.raises(SourceError, match="more than 0.1 bytes from each"):
        open_source(str(path))
    assert whole(path, trusted=True).values.shape == (3, HEIGHT, WIDTH)


def test_a_picture_that_is_one_huge_block(pictures, monkeypatch):
    path, values = pictures["strip"]
    monkeypatch.setattr("pipeline.raster.checks.BLOCK_BYTES", HEIGHT * WIDTH - 1)
    with pytest.raises(SourceError, match="stored in blocks of 200 x 150 pixels"):
        open_source(str(path))
    assert np.array_equal(whole(path, trusted=True).values, values)
