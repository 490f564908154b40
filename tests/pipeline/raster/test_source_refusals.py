"""What is not read: one clear error each, from opening or from the window that is damaged, and no noise."""

import contextlib
import logging
import os
import warnings

import numpy as np
import pytest
import tifffile
import zarr

from pipeline.errors import SourceError
from pipeline.raster.checks import refuse_large_block
from pipeline.raster.source import open_source
from stablesr.box import Box
from tests.pipeline.raster.rasters import PLACE, opened, samples, vrt, vrt_band, whole, write, write_exif, write_svs


def refusal(path, bands=None, **options) -> str:
    """The message of the error that opening ends with."""
    with pytest.raises(SourceError) as caught:
        open_source(str(path), bands, **options)
    assert (caught.value.__cause__ is None and caught.value.__suppress_context__) or caught.value.__context__ is None
    return str(caught.value).replace(f"{os.path.dirname(path)}{os.sep}", "")


def test_a_missing_file(tmp_path):
    assert refusal(tmp_path / "nowhere.tif") == "there is no file nowhere.tif"


def test_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    assert refusal(tmp_path / "folder") == "folder is a folder, not a raster\nhint: name the file"


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.tif").touch()
    assert refusal(tmp_path / "empty.tif") == "empty.tif is empty: 0 bytes"


@pytest.mark.parametrize(
    "content", [b"hello", b"II*\0", b"II*\0\xff\xff\xff\xff", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"]
)
def test_what_is_not_a_raster(tmp_path, content):
    (tmp_path / "text.tif").write_bytes(content)
    assert refusal(tmp_path / "text.tif").startswith("text.tif is not a raster that GDAL can read, or it is damaged: ")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    write(tmp_path / "secret.tif", samples(1, 4, 6), transform=PLACE).chmod(0)
    assert refusal(tmp_path / "secret.tif") == "secret.tif cannot be read: no permission"


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0)])
def test_a_raster_without_pixels(tmp_path, height, width):
    write(tmp_path / "values.tif", samples(1, 4, 6), transform=PLACE)
    path = vrt(tmp_path / "none.vrt", height, width, vrt_band(1, "Byte", "values.tif"))
    assert "is not a raster that GDAL can read, or it is damaged" in refusal(path)


@pytest.mark.parametrize(
    ("dtype", "instead"), [("int8", "Int16"), ("uint32", "Float32"), ("int32", "Float32"), ("float64", "Float32")]
)
def test_other_types(tmp_path, dtype, instead):
    path = write(tmp_path / "wide.tif", np.zeros((1, 4, 6), dtype), transform=PLACE)
    message = refusal(path)
    assert message.startswith(f"wide.tif has samples of type {dtype}; those taken are uint8, uint16, int16, float32\n")
    assert f"hint: gdal_translate -ot {instead} " in message


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "complex_int16"])
def test_complex_samples(tmp_path, dtype):
    gdal = {"complex64": "CFloat32", "complex128": "CFloat64", "complex_int16": "CInt16"}[dtype]
    write(tmp_path / "values.tif", samples(1, 4, 6), transform=PLACE)
    path = vrt(tmp_path / "radar.vrt", 4, 6, vrt_band(1, gdal, "values.tif"))
    message = refusal(path)
    assert message.startswith(f"radar.vrt has complex samples ({dtype}), which no picture shows\nhint: ")
    # what the hint says works
    with opened(f"DERIVED_SUBDATASET:AMPLITUDE:{path}") as amplitude, opened(tmp_path / "values.tif") as values:
        assert np.array_equal(amplitude.read(), values.read())


def test_bands_of_different_types(tmp_path):
    write(tmp_path / "a.tif", samples(1, 4, 6), transform=PLACE)
    write(tmp_path / "b.tif", samples(1, 4, 6, dtype="uint16"), transform=PLACE)
    bands = [vrt_band(1, "Byte", "a.tif"), vrt_band(2, "UInt16", "b.tif"), vrt_band(3, "Byte", "a.tif")]
    path = vrt(tmp_path / "mixed.vrt", 4, 6, *bands)
    assert refusal(path).startswith("the bands of mixed.vrt are of different types: uint8, uint16, uint8\nhint: ")
    assert whole(path, [1, 3]).values.dtype == np.uint8
    assert whole(path, [2]).values.dtype == np.uint16


@pytest.mark.parametrize("band", [9, 0, -1])
def test_bands_that_are_not_there(tmp_path, band):
    path = write(tmp_path / "rgb.tif", samples(3, 4, 6), transform=PLACE)
    assert refusal(path, [1, band]).startswith(f"rgb.tif has 3 bands: there is no band {band}\nhint: ")
    path = write(tmp_path / "gray.tif", samples(1, 4, 6), transform=PLACE)
    assert refusal(path, [band]).startswith(f"gray.tif has 1 band: there is no band {band}\nhint: ")


def test_no_band_chosen(tmp_path):
    path = write(tmp_path / "rgb.tif", samples(3, 4, 6), transform=PLACE)
    assert refusal(path, []).startswith("no band of rgb.tif is chosen\nhint: ")


def test_pages_of_the_same_size(tmp_path):
    path = tmp_path / "pages.tif"
    tifffile.imwrite(path, values := samples(12, 4, 6), photometric="minisblack", metadata=None)
    lines = refusal(path).splitlines()
    assert lines[0] == "pages.tif holds several rasters:"
    assert lines[1] == "    GTIFF_DIR:1:pages.tif" and lines[-2] == "    ... and 4 more"
    assert lines[-1] == "hint: give one of these names as the source"
    assert np.array_equal(whole(f"GTIFF_DIR:2:{path}").values, values[1:2])


def test_a_picture_with_a_thumbnail_behind_it_is_read(tmp_path):
    with tifffile.TiffWriter(tmp_path / "scan.tif") as tiff:
        tiff.write(values := samples(20, 30), photometric="minisblack", metadata=None)
        tiff.write(samples(5, 6), photometric="minisblack", metadata=None)
    assert np.array_equal(whole(tmp_path / "scan.tif").values, [values])


def test_a_container_of_rasters(tmp_path):
    group = zarr.open_group(tmp_path / "cube.zarr", mode="w", zarr_format=2)
    for name in ("red", "nir"):
        group.create_array(name, shape=(4, 6), dtype="u1")
    message = refusal(tmp_path / "cube.zarr")
    assert message.startswith("cube.zarr holds several rasters:\n    ZARR:")
    assert message.endswith("\nhint: give one of these names as the source")


def test_a_small_file_that_claims_to_be_huge(tmp_path):
    path = write(tmp_path / "values.tif", samples(1, 4, 6), transform=PLACE)
    path = vrt(tmp_path / "bomb.vrt", 40_000, 50_000, vrt_band(1, "Byte", "values.tif"))
    message = refusal(path)
    assert message.startswith(
        "bomb.vrt would be 1.9 GiB of pixels (50000 x 40000) from 0.0 MiB on disk: more than 2000"
    )
    with open_source(str(path), trusted=True) as source:
        assert source.read(Box(0, 0, 4, 6)).values.shape == (1, 4, 6)


def test_an_empty_raster_of_a_gigabyte_is_read(tmp_path):
    write(tmp_path / "values.tif", samples(1, 4, 6), transform=PLACE)
    path = vrt(tmp_path / "empty.vrt", 32_768, 32_768, vrt_band(1, "Byte", "values.tif"))
    with open_source(str(path)) as source:
        assert source.header.n_bytes == 1 << 30


def test_blocks_that_no_memory_holds(tmp_path):
    refuse_large_block("fine.tif", 32_768, 32_768, 1 << 30)
    with pytest.raises(SourceError, match="stored in blocks of 40000 x 40000 pixels, 1.5 GiB each, that can only be"):
        refuse_large_block("large.tif", 40_000, 40_000, 1_600_000_000)
    profile = {"height": 33_000, "width": 33_000, "count": 1, "dtype": "uint8", "transform": PLACE}
    tiles = {"tiled": True, "blockxsize": 33_008, "blockysize": 33_008, "SPARSE_OK": True}
    with opened(tmp_path / "one.tif", "w", driver="GTiff", **profile, **tiles):
        pass
    with open(tmp_path / "one.tif", "ab") as file:
        file.truncate(1 << 20)  # so that it is no bomb
    assert "is stored in blocks of 33008 x 33008 pixels, 1.0 GiB each" in refusal(tmp_path / "one.tif")


# Damaged files


def truncated(path, part=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    return path


def test_a_truncated_tiff_is_found_when_it_is_opened(tmp_path):
    path = truncated(
        write(tmp_path / "cut.tif", samples(3, 64, 80), transform=PLACE, tiled=True, blockxsize=16, blockysize=16)
    )
    assert refusal(path).startswith("cut.tif is truncated: it has ")
    strip = write(tmp_path / "strip.tif", samples(1, 64, 80), transform=PLACE, blockysize=64, compress="deflate")
    assert refusal(truncated(strip)).startswith("strip.tif is truncated: it has ")


@pytest.mark.parametrize(("driver", "name"), [("PNG", "cut.png"), ("JPEG", "cut.jpg"), ("JP2OpenJPEG", "cut.jp2")])
def test_a_truncated_picture_is_found_where_it_ends(tmp_path, driver, name):
    """Also the whole of a PNG, for which GDAL by itself returns whatever was in memory."""
    path = truncated(write(tmp_path / name, samples(3, 200, 300), driver=driver))
    with open_source(str(path)) as source:
        for box in (Box(150, 20, 160, 30), Box(0, 0, 200, 300)):
            with pytest.raises(
                SourceError, match=f"cannot read rows {box.top} to {box.bottom - 1}, columns .* of .*{name}"
            ):
                source.read(box)


def test_a_tile_that_does_not_decode(tmp_path):
    path = write(
        tmp_path / "bad.tif",
        samples(1, 64, 64),
        transform=PLACE,
        tiled=True,
        blockxsize=32,
        blockysize=32,
        compress="zstd",
    )
    with opened(path) as dataset:
        offset, size = (int(dataset.get_tag_item(f"BLOCK_{what}_1_1", "TIFF", bidx=1)) for what in ("OFFSET", "SIZE"))
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    with open_source(str(path)) as source:
        assert source.read(Box(0, 0, 32, 64)).values.shape == (1, 32, 64)
        with pytest.raises(SourceError, match="cannot read rows 30 to 39, columns 40 to 49 of .*bad.tif: "):
            source.read(Box(30, 40, 40, 50))


def test_a_part_of_a_mosaic_that_is_missing(tmp_path):
    write(tmp_path / "here.tif", samples(1, 4, 6), transform=PLACE)
    path = vrt(tmp_path / "mosaic.vrt", 4, 6, vrt_band(1, "Byte", "here.tif"), vrt_band(2, "Byte", "gone.tif"))
    with open_source(str(path)) as source, pytest.raises(SourceError, match="gone.tif"):
        source.read(Box(0, 0, 4, 6))


def test_tags_in_another_alphabet(tmp_path):
    tifffile.imwrite(tmp_path / "latin.tif", samples(4, 6), extratags=[(315, 2, 6, b"Andr\xe9\0", True)], metadata=None)
    with open_source(str(tmp_path / "latin.tif")) as source:
        assert source.read(Box(0, 0, 4, 6)).values.shape == (1, 4, 6)


def test_nothing_is_written_to_the_terminal(tmp_path, capfd):
    logging.captureWarnings(False)
    (tmp_path / "text.tif").write_bytes(b"II*\0garbage")
    picture = truncated(write(tmp_path / "cut.png", samples(3, 200, 300), driver="PNG"))
    slide = truncated(write_svs(tmp_path / "cut.svs", np.moveaxis(samples(3, 200, 240), 0, -1)))
    photo = write(tmp_path / "photo.jpg", samples(3, 24, 40), driver="JPEG")
    write_exif(photo, 9)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in (tmp_path / "text.tif", picture, slide, photo):
            with contextlib.suppress(SourceError):
                whole(path)
    assert caught == []
    assert capfd.readouterr() == ("", "")
